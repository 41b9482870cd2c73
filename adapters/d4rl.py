"""Reader for D4RL's raw layout; the d4rl package is not needed."""

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._steps import FieldNames, Steps, announce, read_steps
from cql_plugins.adapters._storage import (
    Allocate,
    ColumnFiles,
    Origin,
    Storage,
    check_storage,
    fingerprint,
    in_memory,
    stored,
)
from cql_plugins.adapters._tree import extremes, map_leaves
from cql_plugins.adapters._validation import DatasetError, require_extra
from cql_plugins.adapters.arrays import stem
from cql_plugins.adapters.dataset import OfflineDataset
from cql_plugins.adapters.scores import find_task

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")
_LARGE = ("observations", "actions", "next_observations")
_CHUNK_CACHE = 32 * 2**20
"""Bytes of chunks that h5py keeps unpacked, so that reading by small blocks does not unpack each chunk many times."""
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
    storage: Storage = "memory",
    cache_dir: "str | PathLike[str] | None" = None,
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
        storage: `memory`, or `memmap` to keep the data of a file in files of its own, see `from_minari`.
        cache_dir: Folder for these files, see `from_minari`.

    Returns:
        The data set.

    Raises:
        DatasetError: If the file is absent, cut off or not HDF5, a field is missing, and as `from_arrays`.
        ImportError: If h5py is needed and not installed.
    """
    mapped = check_storage(storage, cache_dir)
    is_mapping = isinstance(path_or_mapping, Mapping)
    source = (name or "D4RL mapping") if is_mapping else str(path_or_mapping)
    name = name if is_mapping else name or stem(source)
    limit = _TIME_LIMITS.get(find_task(name or env_id or "") or "") if max_episode_steps is None else max_episode_steps

    def read(fields: Mapping[str, Any], present: list[str], allocate: Allocate) -> tuple[OfflineDataset, list[str]]:
        known = "timeouts" in fields or "next_observations" in fields
        return read_steps(
            _steps_of(fields, present, source),
            observation_space=observation_space,
            action_space=action_space,
            max_episode_steps=max_episode_steps if known else limit,
            prefer_termination=prefer_termination,
            announce_inferred="actions" in fields and _leaves_unit_box(fields["actions"]),
            allocate=allocate,
        )

    if isinstance(path_or_mapping, Mapping):
        if mapped:
            raise DatasetError(
                "expected a file to keep in column files, got a mapping, of which it cannot be told whether it changed",
                source=source,
                hint="Use storage='memory', or write an HDF5 file first",
            )
        given = {key: path_or_mapping[key] for key in (*_REQUIRED, *_OPTIONAL) if key in path_or_mapping}
        dataset, notes = read(map_leaves(np.asarray, given), list(path_or_mapping), in_memory)
    elif mapped:
        _check_is_file(source)
        options = {
            "reader": "d4rl",
            "spaces": [fingerprint(observation_space), fingerprint(action_space)],
            "max_episode_steps": [max_episode_steps, limit],
            "prefer_termination": prefer_termination,
        }

        def read_file(columns: ColumnFiles) -> tuple[OfflineDataset, list[str]]:
            with _open_hdf5(source, streaming=True) as (fields, present):
                return read(fields, present, columns.allocate)

        dataset, notes = stored(Origin(name=source, files=[Path(source)], options=options), cache_dir, read_file)
    else:
        with _open_hdf5(source, streaming=False) as (fields, present):
            pass
        dataset, notes = read(fields, present, in_memory)
    announce(source, notes, stacklevel=3)
    return dataset._replaced(name=name, env_id=env_id, references=references)


def _steps_of(fields: Mapping[str, Any], present: list[str], source: str) -> Steps:
    for key in _REQUIRED:
        if key not in fields:
            raise DatasetError(f"expected this field, got only {sorted(map(str, present))}", source=source, field=key)
    return Steps(
        observations=fields["observations"],
        actions=fields["actions"],
        rewards=fields["rewards"],
        terminations=fields["terminals"],
        truncations=fields.get("timeouts"),
        next_observations=fields.get("next_observations"),
        source=source,
        names=FieldNames("terminals", "timeouts"),
    )


def _leaves_unit_box(actions: Any) -> bool:
    """Tell whether continuous actions break D4RL's convention that they lie in [-1, 1]."""
    if isinstance(actions, Mapping) or actions.dtype.kind != "f" or not actions.size:
        return True
    low, high = extremes(actions)
    return bool(max(high.max(), -low.min()) > 1.0)


def _check_is_file(source: str) -> None:
    if not Path(source).is_file():
        raise DatasetError("expected an HDF5 file, there is no such file", source=source)


@contextlib.contextmanager
def _open_hdf5(source: str, *, streaming: bool) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Give the known fields of a file, and the names of all that it has.

    With `streaming` the observations and actions are read when they are asked for, inside the context.
    """
    _check_is_file(source)
    try:
        import h5py
    except ImportError as error:
        raise require_extra("h5py", "d4rl", error) from error

    key = None
    try:
        with h5py.File(source, "r", rdcc_nbytes=_CHUNK_CACHE) as file:  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            present = list(file)
            fields: dict[str, Any] = {}
            for key in (*_REQUIRED, *_OPTIONAL):
                if key in file:
                    fields[key] = map_leaves(_same if streaming and key in _LARGE else _load, file[key])
            key = None
            yield fields, present
    except (OSError, RuntimeError, KeyError) as error:
        raise DatasetError(
            f"expected a complete HDF5 file, got one that cannot be read: {error}",
            source=source,
            field=key,
            hint="It may be cut off or of another format; fetch it again",
        ) from error


def _load(data: Any) -> Any:
    """Read a whole data set of a file."""
    return np.asarray(data[()])


def _same(data: Any) -> Any:
    """Leave a data set in its file."""
    return data
