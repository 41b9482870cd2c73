"""Readers for arrays that are in memory, or in an `.npz` file."""

import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins.adapters._steps import Steps, announce, dataset_from_steps, read_steps
from cql_plugins.adapters._storage import Allocate, Origin, Storage, check_storage, fingerprint, in_memory, stored
from cql_plugins.adapters._tree import Array, map_leaves
from cql_plugins.adapters._validation import DatasetError
from cql_plugins.adapters.dataset import OfflineDataset

_SMALL = 2**16


def from_arrays(
    observations: Any,
    actions: npt.ArrayLike,
    rewards: npt.ArrayLike,
    terminations: npt.ArrayLike,
    truncations: npt.ArrayLike,
    *,
    next_observations: Any = None,
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
    prefer_termination: bool = False,
) -> OfflineDataset:
    """Read arrays with one row per step, episode after episode.

    Without `next_observations` the observation after the last step of a truncated episode is unknown: that transition
    is dropped and counted in a warning (the last transition of a terminated episode is kept, with its own observation
    repeated, since its target does not look ahead). With them, a step whose next observation is not that of the
    following row ends its episode, as truncated. The last row need not carry a flag; it then counts as truncated.

    Args:
        observations: Observation before each of the `N` steps: shape `(N, ...)`, or `(N,)` integers; or a (nested) dict
            of such.
        actions: Shape `(N, ...)` in the environment's units, or `(N,)` integers.
        rewards: Shape `(N,)`.
        terminations: Shape `(N,)`, whether the step reached a terminal state.
        truncations: Shape `(N,)`, whether the episode was cut short after the step.
        next_observations: Observation after each step, as `observations`.
        observation_space: Box, Discrete or (nested) Dict; inferred and said in a warning where not given.
        action_space: Box or Discrete; inferred and said in a warning where not given.
        name: Name for reports, and an id to look reference returns up by.
        env_id: Id of the environment that the data comes from.
        references: Returns of a random and of an expert policy, in place of those looked up.
        prefer_termination: Read a step with both flags as terminated instead of refusing it.

    Returns:
        The data set; it shares no memory with the arguments.

    Raises:
        DatasetError: If lengths, ranks, dtypes or keys disagree with each other or the spaces, a value is NaN, infinite
            or out of range, or a step has both flags.
    """
    steps = Steps(
        observations=map_leaves(np.asarray, observations),
        actions=np.asarray(actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        next_observations=None if next_observations is None else map_leaves(np.asarray, next_observations),
        source=name or "arrays",
    )
    return dataset_from_steps(
        steps,
        observation_space=observation_space,
        action_space=action_space,
        prefer_termination=prefer_termination,
        name=name,
        env_id=env_id,
        references=references,
    )


def from_npz(
    path: "str | PathLike[str]",
    *,
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
    prefer_termination: bool = False,
    storage: Storage = "memory",
    cache_dir: "str | PathLike[str] | None" = None,
) -> OfflineDataset:
    """Read the arrays of `from_arrays` from an `.npz` file. Nothing in it is ever unpickled.

    Fields are `observations`, `actions`, `rewards`, `terminations` (or `terminals`), `truncations` (or `timeouts`) and
    optionally `next_observations`. Dict observations are stored under `observations/key`.

    Args:
        path: The file.
        observation_space: See `from_arrays`.
        action_space: See `from_arrays`.
        name: See `from_arrays`; the file's name where not given.
        env_id: See `from_arrays`.
        references: See `from_arrays`.
        prefer_termination: See `from_arrays`.
        storage: `memory`, or `memmap` to keep the data in files, see `from_minari`.
        cache_dir: Folder for these files, see `from_minari`.

    Raises:
        DatasetError: If the file is absent or is not an `.npz` file, a field is missing or holds Python objects, and as
            `from_arrays`.
    """
    source = str(path)

    def read(fields: dict[str, Any], allocate: Allocate) -> tuple[OfflineDataset, list[str]]:
        return read_steps(
            _steps_of(fields, source),
            observation_space=observation_space,
            action_space=action_space,
            prefer_termination=prefer_termination,
            allocate=allocate,
        )

    if check_storage(storage, cache_dir):
        if not Path(source).is_file():
            raise DatasetError("expected an .npz file, there is no such file", source=source)
        options = {
            "reader": "npz",
            "spaces": [fingerprint(observation_space), fingerprint(action_space)],
            "prefer_termination": prefer_termination,
        }
        origin = Origin(name=source, files=[Path(source)], options=options)
        dataset, notes = stored(origin, cache_dir, lambda columns: read(_read_npz(source, columns.new_path), columns.allocate))
    else:
        dataset, notes = read(_read_npz(source), in_memory)
    announce(source, notes, stacklevel=3)
    return dataset._replaced(name=name or stem(source), env_id=env_id, references=references)


def _steps_of(fields: Mapping[str, Any], source: str) -> Steps:
    required = {
        "observations": _collect(fields, "observations"),
        "actions": fields.get("actions"),
        "rewards": fields.get("rewards"),
        "terminations": fields.get("terminations", fields.get("terminals")),
        "truncations": fields.get("truncations", fields.get("timeouts")),
    }
    missing = [key for key, value in required.items() if value is None]
    if missing:
        raise DatasetError(f"expected this field, got only {sorted(fields)}", source=source, field=missing[0])
    return Steps(**required, next_observations=_collect(fields, "next_observations"), source=source)


def stem(path: str) -> str:
    """Return a file's name without folders and without its last suffix."""
    base = path.replace("\\", "/").rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[0] or base


def _read_npz(source: str, new_path: Callable[[], Path] | None = None) -> dict[str, Any]:
    """Read all arrays, or unpack them to files named by `new_path` and map those."""
    key = None
    fields: dict[str, Any] = {}
    try:
        # Opened here, since NumPy leaves a file open that turns out to be no archive.
        with open(source, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DatasetError("expected an .npz file, got a single .npy array", source=source)
            for key in archive.files:
                fields[key] = archive[key] if new_path is None else _unpack(archive, key, new_path())
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError("expected an .npz file, there is no such file", source=source) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        expected = "an .npz file" if key is None else "a plain array"
        raise DatasetError(
            f"expected {expected}, got something else or a part of one: {error}",
            source=source,
            field=key,
            hint="Python objects are not read, since unpickling runs code from the file",
        ) from error
    return fields


def _unpack(archive: Any, key: str, path: Path) -> Array:
    """Copy one array out of an archive, a piece at a time, and map it."""
    members = archive.zip.namelist()
    with archive.zip.open(key if key in members else f"{key}.npy") as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    with path.open("rb") as file:
        # What cannot be mapped, being empty or no plain array, is read or refused as in memory.
        array: Array = (
            np.load(file, allow_pickle=False) if path.stat().st_size < _SMALL else np.load(path, "r", allow_pickle=False)
        )
    return array


def _collect(fields: Mapping[str, Any], name: str) -> Any:
    """Return the array `name`, or the nested dict of all `name/...`, or None."""
    if name in fields:
        return fields[name]
    tree: dict[str, Any] = {}
    for key, value in fields.items():
        head, *parents, last = key.split("/") if "/" in key else [key, ""]
        if head != name:
            continue
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree or None
