"""Reader and writer for D4RL's raw layout; the d4rl package is not needed."""

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._hdf5 import PlainObjects, Unfailing, declared_bytes, row_of_chunks
from cql_plugins.adapters._steps import FieldNames, OnProgress, Steps, announce, new_file, read_steps, step_columns
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
from cql_plugins.adapters._tree import extremes, map_leaves, named_leaves
from cql_plugins.adapters._untrusted import check_memory, check_regular_file, parsing
from cql_plugins.adapters._validation import DatasetError, require_extra
from cql_plugins.adapters.arrays import stem
from cql_plugins.adapters.dataset import OfflineDataset
from cql_plugins.adapters.scores import find_task

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")
_LARGE = ("observations", "actions", "next_observations")
_NAMES = FieldNames("terminals", "timeouts")
_CHUNK_CACHE = 32 * 2**20
"""Bytes of chunks that h5py keeps unpacked, so that reading by small blocks does not unpack each chunk many times; more where
the chunks next to each other are larger."""
_WHOLE = "expected a complete HDF5 file, got one that cannot be read"
_FETCH_AGAIN = "It may be cut off or of another format; fetch it again"
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

    An HDF5 file is taken as untrusted: links, virtual data sets and external storage are not followed, and what it declares
    must fit in memory (see docs/security.md).

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
            first version of D4RL); known here for the locomotion tasks. A file's own `timeouts` come first, and a warning
            says so where an episode is longer than this.
        prefer_termination: Read a step with both flags as terminated instead of refusing it.
        storage: `memory`, or `memmap` to keep the data of a file in files of its own, see `from_minari`.
        cache_dir: Folder for these files, see `from_minari`.

    Returns:
        The data set.

    Raises:
        DatasetError: If the file is absent, cut off or not HDF5, a field is missing or no plain data in this file, the data
            cannot fit, and as `from_arrays`.
        ImportError: If h5py is needed and not installed.
    """
    mapped = check_storage(storage, cache_dir)
    is_mapping = isinstance(path_or_mapping, Mapping)
    source = (name or "D4RL mapping") if is_mapping else str(path_or_mapping)
    name = name if is_mapping else name or stem(source)
    limit = _TIME_LIMITS.get(find_task(name or env_id or "") or "") if max_episode_steps is None else max_episode_steps

    def read(fields: Mapping[str, Any], present: list[str], allocate: Allocate) -> tuple[OfflineDataset, list[str]]:
        known = "timeouts" in fields or "next_observations" in fields
        dataset, notes = read_steps(
            _steps_of(fields, present, source),
            observation_space=observation_space,
            action_space=action_space,
            max_episode_steps=max_episode_steps if known else limit,
            prefer_termination=prefer_termination,
            announce_inferred="actions" in fields and _leaves_unit_box(fields["actions"]),
            allocate=allocate,
        )
        longest = int(dataset.episode_lengths.max())
        if max_episode_steps is not None and "timeouts" in fields and longest > max_episode_steps:
            notes.append(
                f"max_episode_steps={max_episode_steps} did not end an episode of {longest} steps, since timeouts are given; "
                "leave that field out where nobody filled it in"
            )
        return dataset, notes

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
        check_regular_file(source, "an HDF5 file", source)
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
        rewards=_vector(fields["rewards"]),
        terminations=_vector(fields["terminals"]),
        truncations=_vector(fields.get("timeouts")),
        next_observations=fields.get("next_observations"),
        source=source,
        names=_NAMES,
    )


def _vector(column: Any) -> Any:
    """Drop the last axis of a column of shape `(N, 1)`, as D4RL's own `get_dataset` does."""
    return column[:, 0] if getattr(column, "ndim", 0) == 2 and column.shape[1] == 1 else column


def _leaves_unit_box(actions: Any) -> bool:
    """Tell whether continuous actions break D4RL's convention that they lie in [-1, 1]."""
    if isinstance(actions, Mapping) or actions.dtype.kind != "f" or not actions.shape or not actions.size:
        return True
    low, high = extremes(actions)
    return bool(max(high.max(), -low.min()) > 1.0)


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise require_extra("h5py", "d4rl", error) from error
    return h5py


@contextlib.contextmanager
def _open_hdf5(source: str, *, streaming: bool) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Give the known fields of a file, and the names of all that it has.

    With `streaming` the observations and actions are read when they are asked for, inside the context.
    """
    n_bytes = check_regular_file(source, "an HDF5 file", source)
    h5py = _import_h5py()
    with contextlib.ExitStack() as stack:

        def look(chunk_cache: int) -> tuple[list[str], dict[str, Any]]:
            with parsing(_WHOLE, source, hint=_FETCH_AGAIN):
                file = stack.enter_context(h5py.File(source, "r", rdcc_nbytes=chunk_cache))
                objects = PlainObjects(file, n_bytes, source)
            names = (*_REQUIRED, *_OPTIONAL)
            return objects.names(file), {key: objects.open(file, key, key) for key in names if objects.has(file, key)}

        present, found = look(_CHUNK_CACHE)
        if streaming:
            large = {key: tree for key, tree in found.items() if key in _LARGE}
            wanted = [row_of_chunks(leaf) for _, leaf in named_leaves(large, "")]
            if max(wanted, default=0) > _CHUNK_CACHE:
                check_memory(sum(wanted), source, mapped=True)
                stack.close()  # The library takes the size when it opens a file that nobody has open.
                present, found = look(max(wanted))
        loaded = {key: tree for key, tree in found.items() if not (streaming and key in _LARGE)}
        # What is laid out is there twice for a moment: as it was read, and in the order of episodes.
        twice = {key: tree for key, tree in loaded.items() if key in ("observations", "actions")}
        check_memory(declared_bytes(loaded) + declared_bytes(twice), source, mapped=streaming)
        fields: dict[str, Any] = {}
        for key, tree in found.items():
            with parsing(_WHOLE, source, key, _FETCH_AGAIN):
                fields[key] = map_leaves(_same if streaming and key in _LARGE else _load, tree)
        try:
            yield fields, present
        except (OSError, RuntimeError, MemoryError) as error:  # Read while the caller goes through the rows.
            raise DatasetError(f"{_WHOLE}: {error}", source=source, hint=_FETCH_AGAIN) from error


def _load(data: Any) -> Any:
    """Read a whole data set of a file."""
    return np.asarray(data[()])


def _same(data: Any) -> Any:
    """Leave a data set in its file."""
    return data


# Writing --------------------------------------------------------------------------------------------------------------


def to_d4rl(
    dataset: OfflineDataset,
    path: "str | PathLike[str]",
    *,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> None:
    """Write a data set as an HDF5 file in D4RL's raw layout, which `from_d4rl` reads back, every value and dtype; whole or
    not at all.

    Fields are `observations`, `actions`, `rewards`, `terminals`, `timeouts` and `next_observations`, one row per step: without
    the last one the observation at the end of an episode, and with it the last step of each truncated one, would be lost.
    Dict observations, of which D4RL's own tools know nothing, become groups. The file holds no date: with the same versions of
    HDF5 and its zlib, equal data sets give equal bytes.

    The format does not hold spaces (`from_d4rl` takes observations as unbounded and actions as lying in [-1, 1] unless it is
    given them), the environment's id, reference returns (looked up by the file's name), infos and seeds. Rewards are stored as
    they are now, after `scale_rewards`. An end that its source did not flag is stored as a time-out. Stacked frames are stored
    as the stacks they stand for.

    Args:
        dataset: The data set.
        path: The file.
        overwrite: Whether to replace what is there, once the new file is whole.
        progress: Called with the share that is written, in `[0, 1]`.

    Raises:
        DatasetError: If the path is taken, or a key of dict observations is empty, a dot or two, or has a slash.
        ImportError: If h5py is not installed.
        OSError: If the disk does not take it.
    """
    h5py = _import_h5py()
    columns = step_columns(dataset, str(path), _NAMES, progress)
    with new_file(path, overwrite) as place:
        unfailing = Unfailing(place)
        with h5py.File(unfailing, "w") as file:
            for column in columns:
                data = file.create_dataset(
                    column.name,
                    column.shape,
                    column.dtype,
                    chunks=(column.block_rows, *column.shape[1:]),  # each is packed once, as its block comes
                    compression="gzip",
                    shuffle=True,
                    track_times=False,
                )
                for start, stop, block in column.blocks():
                    data[start:stop] = block
                    unfailing.check()
        unfailing.check()
