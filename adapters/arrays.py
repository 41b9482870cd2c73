"""Readers for arrays that are in memory, or in an `.npz` file, and the writer of such a file."""

import contextlib
import shutil
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins.adapters._steps import (
    OnProgress,
    Steps,
    announce,
    dataset_from_steps,
    new_file,
    read_steps,
    step_columns,
)
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
from cql_plugins.adapters._tree import Array, map_leaves
from cql_plugins.adapters._untrusted import (
    MAX_DEPTH,
    check_declared,
    check_disk,
    check_memory,
    check_packed,
    check_regular_file,
    parsing,
    read_npy_header,
)
from cql_plugins.adapters._validation import DatasetError
from cql_plugins.adapters.dataset import OfflineDataset

_SMALL = 2**16
_NESTED = ("observations", "next_observations")
_FIELDS = (*_NESTED, "actions", "rewards", "terminations", "terminals", "truncations", "timeouts")


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
    optionally `next_observations`. Dict observations are stored under `observations/key`. Members of other names are left
    alone, and what the fields declare must fit in memory (see docs/security.md).

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
        DatasetError: If the file is absent or is not an `.npz` file, a field is missing or holds Python objects, the data
            cannot fit, and as `from_arrays`.
    """
    source = str(path)

    def read(fields: dict[str, Any], present: list[str], allocate: Allocate) -> tuple[OfflineDataset, list[str]]:
        return read_steps(
            _steps_of(fields, present, source),
            observation_space=observation_space,
            action_space=action_space,
            prefer_termination=prefer_termination,
            allocate=allocate,
        )

    if check_storage(storage, cache_dir):
        check_regular_file(source, "an .npz file", source)
        options = {
            "reader": "npz",
            "spaces": [fingerprint(observation_space), fingerprint(action_space)],
            "prefer_termination": prefer_termination,
        }
        origin = Origin(name=source, files=[Path(source)], options=options)
        dataset, notes = stored(origin, cache_dir, lambda columns: read(*_read_npz(source, columns), columns.allocate))
    else:
        dataset, notes = read(*_read_npz(source), in_memory)
    announce(source, notes, stacklevel=3)
    return dataset._replaced(name=name or stem(source), env_id=env_id, references=references)


def _steps_of(fields: Mapping[str, Any], present: list[str], source: str) -> Steps:
    required = {
        "observations": _collect(fields, "observations", source),
        "actions": fields.get("actions"),
        "rewards": fields.get("rewards"),
        "terminations": fields.get("terminations", fields.get("terminals")),
        "truncations": fields.get("truncations", fields.get("timeouts")),
    }
    missing = [key for key, value in required.items() if value is None]
    if missing:
        raise DatasetError(f"expected this field, got only {sorted(present)}", source=source, field=missing[0])
    return Steps(**required, next_observations=_collect(fields, "next_observations", source), source=source)


def stem(path: str) -> str:
    """Return a file's name without folders and without its last suffix."""
    base = path.replace("\\", "/").rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[0] or base


def _read_npz(source: str, columns: ColumnFiles | None = None) -> tuple[dict[str, Any], list[str]]:
    """Read the known arrays, or unpack them to files of `columns` and map those; also name all that the file has."""
    check_regular_file(source, "an .npz file", source)
    fields: dict[str, Any] = {}
    with open(source, "rb") as file, contextlib.ExitStack() as stack:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise DatasetError("expected an .npz file, got a single .npy array", source=source)
        with parsing("expected an .npz file, got something else or a part of one", source):
            archive = stack.enter_context(zipfile.ZipFile(file))
            members = archive.infolist()
        arrays = _choose_members(members, source)
        declared = {key: _check_member(archive, member, source, key) for key, member in arrays.items()}
        if columns is None:
            # What is laid out is there twice for a moment: as it was read, and in the order of episodes.
            twice = sum(size for key, size in declared.items() if key.startswith(("observations", "actions")))
            check_memory(sum(declared.values()) + twice, source)
        else:
            check_disk(sum(declared.values()), columns.folder, source)
        for key, member in arrays.items():
            with parsing("expected a plain array, got something else or a part of one", source, key):
                if columns is None:
                    with archive.open(member) as stream:
                        fields[key] = np.lib.format.read_array(stream, allow_pickle=False)
                else:
                    fields[key] = _unpack(archive, member, columns)
    return fields, [_array_name(member) for member in members]


def _array_name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _choose_members(members: list[zipfile.ZipInfo], source: str) -> dict[str, zipfile.ZipInfo]:
    """Pick the members that are fields; others are never unpacked."""
    chosen: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        key = _array_name(member)
        name, *path = key.split("/")
        if name not in _FIELDS or (path and name not in _NESTED):
            continue
        if any(part in ("", ".", "..") for part in path) or len(path) > MAX_DEPTH:
            raise DatasetError(
                f"expected names as in observations/key, at most {MAX_DEPTH} deep, got {key[:100]!r}", source=source, field=name
            )
        if key in chosen:
            raise DatasetError("expected one array of this name, the file has several", source=source, field=key)
        chosen[key] = member
    return chosen


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: str, key: str) -> int:
    """Return the bytes that a member's array takes, after a look at how it is packed and at its header."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DatasetError(
            "expected a member that is stored or deflated, as NumPy writes it, got another packing", source=source, field=key
        )
    with parsing("expected a plain array, got something else or a part of one", source, key), archive.open(member) as stream:
        shape, _, dtype = read_npy_header(stream, source, key)
        held = member.file_size - stream.tell()
    declared = check_declared(shape, dtype, source, key)
    if declared != held:
        raise DatasetError(
            f"expected a plain array, got something else or a part of one: shape {shape} and {dtype} take {declared:,} bytes, "
            f"{held:,} are there",
            source=source,
            field=key,
        )
    check_packed(declared, member.compress_size, source, key)
    return declared


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, columns: ColumnFiles) -> Array:
    """Copy one array out of an archive, a piece at a time, and map it."""
    path = columns.new_path()
    with archive.open(member) as packed, path.open("wb") as unpacked:
        columns.reserve(unpacked, member.file_size)
        shutil.copyfileobj(packed, unpacked)
    with path.open("rb") as file:
        # What cannot be mapped, being empty, is read as in memory.
        array: Array = (
            np.load(file, allow_pickle=False) if path.stat().st_size < _SMALL else np.load(path, "r", allow_pickle=False)
        )
    return array


def _collect(fields: Mapping[str, Any], name: str, source: str) -> Any:
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
            if not isinstance(branch, dict):
                break
        if not isinstance(branch, dict) or last in branch:
            raise DatasetError("expected an array or arrays below this name, got both", source=source, field=key)
        branch[last] = value
    return tree or None


# Writing --------------------------------------------------------------------------------------------------------------


def to_npz(
    dataset: OfflineDataset,
    path: "str | PathLike[str]",
    *,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> None:
    """Write a data set to an `.npz` file that `from_npz` reads back, every value and dtype; whole or not at all.

    One row per step, with `next_observations`, so that the last observation of an episode is kept. Dict observations are
    stored under `observations/key`. The file holds no date: with the same versions of Python and its zlib, equal data sets
    give equal bytes.

    The format does not hold spaces (pass them to `from_npz`), the name, the environment's id, reference returns, infos and
    seeds. Rewards are stored as they are now, after `scale_rewards`. An end that its source did not flag is stored as a
    truncation. Stacked frames are stored as the stacks they stand for.

    Args:
        dataset: The data set.
        path: The file.
        overwrite: Whether to replace what is there, once the new file is whole.
        progress: Called with the share that is written, in `[0, 1]`.

    Raises:
        DatasetError: If the path is taken, or a key of dict observations is empty, a dot or two, or has a slash.
        OSError: If the disk does not take it.
    """
    columns = step_columns(dataset, str(path), progress=progress)
    with new_file(path, overwrite) as file, zipfile.ZipFile(file, "w") as archive:
        for column in columns:
            member = zipfile.ZipInfo(f"{column.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                header = {
                    "descr": np.lib.format.dtype_to_descr(column.dtype),
                    "fortran_order": False,
                    "shape": column.shape,
                }
                np.lib.format.write_array_header_1_0(stream, header)
                for _, _, block in column.blocks():
                    stream.write(block.data)
