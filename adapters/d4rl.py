"""Reader for D4RL's raw layout; the d4rl package is not needed."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._steps import FieldNames, Steps, dataset_from_steps
from cql_plugins.adapters._tree import map_leaves
from cql_plugins.adapters._validation import DatasetError, require_extra
from cql_plugins.adapters.arrays import stem
from cql_plugins.adapters.dataset import OfflineDataset
from cql_plugins.adapters.scores import find_task

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")
# The first D4RL files of these tasks have no `timeouts`.
_TIME_LIMITS = {"halfcheetah": 1000, "hopper": 1000, "walker2d": 1000, "ant": 1000}


def from_d4rl(
    path_or_mapping: "str | PathLike[str] | Mapping[str, Any]",
    *,
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
    max_episode_steps: int | None = None,
    prefer_termination: bool = False,
) -> OfflineDataset:
    """Read data in D4RL's raw layout.

    Fields are `observations`, `actions`, `rewards`, `terminals`, and optionally `timeouts` and `next_observations`.

    D4RL files say nothing about spaces. Observations are taken as unbounded, actions as lying in [-1, 1] (true of
    D4RL's tasks), with a warning where they do not. What happens to the last transition of an episode is described at
    `from_arrays`.

    Args:
        path_or_mapping: An HDF5 file, or a mapping of field names to arrays, as `env.get_dataset()` returned.
        observation_space: Space of one observation, where it is known.
        action_space: Space of one action, where it is known.
        name: Name for reports, and an id to look reference returns up by; the file's name where not given.
        env_id: Id of the environment that the data comes from.
        references: Returns of a random and of an expert policy, in place of those looked up.
        max_episode_steps: The environment's time limit, for files with neither `timeouts` nor `next_observations` (the
            first version of D4RL); known here for the locomotion tasks.
        prefer_termination: Read a step with both flags as terminated instead of refusing it.

    Returns:
        The data set.

    Raises:
        DatasetError: If the file is absent, cut off or not HDF5, a field is missing, and as `from_arrays`.
        ImportError: If h5py is needed and not installed.
    """
    if isinstance(path_or_mapping, Mapping):
        source = name or "D4RL mapping"
        fields = {key: path_or_mapping[key] for key in (*_REQUIRED, *_OPTIONAL) if key in path_or_mapping}
        present = list(path_or_mapping)
    else:
        source = str(path_or_mapping)
        name = name or stem(source)
        fields, present = _read_hdf5(source)
    for key in _REQUIRED:
        if key not in fields:
            raise DatasetError(f"expected this field, got only {sorted(map(str, present))}", source=source, field=key)
    fields = map_leaves(np.asarray, fields)
    steps = Steps(
        observations=fields["observations"],
        actions=fields["actions"],
        rewards=fields["rewards"],
        terminations=fields["terminals"],
        truncations=fields.get("timeouts"),
        next_observations=fields.get("next_observations"),
        source=source,
        names=FieldNames("terminals", "timeouts"),
    )
    if "timeouts" not in fields and "next_observations" not in fields and max_episode_steps is None:
        max_episode_steps = _TIME_LIMITS.get(find_task(name or env_id or "") or "")
    return dataset_from_steps(
        steps,
        observation_space=observation_space,
        action_space=action_space,
        max_episode_steps=max_episode_steps,
        prefer_termination=prefer_termination,
        announce_inferred=_leaves_unit_box(fields["actions"]),
        name=name,
        env_id=env_id,
        references=references,
    )


def _leaves_unit_box(actions: Any) -> bool:
    """Tell whether continuous actions break D4RL's convention that they lie in [-1, 1]."""
    if isinstance(actions, Mapping) or actions.dtype.kind != "f" or not actions.size:
        return True
    return bool(max(actions.max(), -actions.min()) > 1.0)


def _read_hdf5(source: str) -> tuple[dict[str, Any], list[str]]:
    """Read the known fields of a file whole, and list all that it has."""
    if not Path(source).is_file():
        raise DatasetError("expected an HDF5 file, there is no such file", source=source)
    try:
        import h5py
    except ImportError as error:
        raise require_extra("h5py", "d4rl", error) from error

    key = None
    try:
        with h5py.File(source, "r") as file:  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            present = list(file)
            fields: dict[str, Any] = {}
            for key in (*_REQUIRED, *_OPTIONAL):
                if key in file:
                    fields[key] = _load(file[key])
    except (OSError, RuntimeError, KeyError) as error:
        raise DatasetError(
            f"expected a complete HDF5 file, got one that cannot be read: {error}",
            source=source,
            field=key,
            hint="It may be cut off or of another format; fetch it again",
        ) from error
    return fields, present


def _load(node: Any) -> Any:
    """Read a data set, or a group as a dict."""
    return map_leaves(lambda data: data[()], node)
