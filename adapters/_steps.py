"""From one row per step, the layout of most files, to the `T + 1` observations per episode of `OfflineDataset`, and back."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins._files import whole_file
from cql_plugins.adapters._tree import Array, extremes, map_leaves, named_leaves, row_blocks, row_nbytes
from cql_plugins.adapters._untrusted import MAX_DEPTH
from cql_plugins.adapters._validation import (
    DatasetError,
    Flags,
    Where,
    check_flags,
    check_rewards,
    check_supported_space,
    check_tree,
    check_values,
    resolve_both_flags,
)
from cql_plugins.adapters.dataset import OfflineDataset


@dataclass(frozen=True)
class FieldNames:
    """What the source calls its fields, for error messages."""

    terminations: str = "terminations"
    truncations: str = "truncations"


@dataclass(frozen=True)
class Steps:
    """Data with one row per step. Array-likes may be NumPy arrays or HDF5 data sets: they are only sliced by rows.

    Attributes:
        observations: Observation before each step; array-like or (nested) mapping.
        actions: Action of each step.
        rewards: Reward of each step.
        terminations: Whether each step reached a terminal state.
        truncations: Whether the episode was cut short after each step; None where the source does not say.
        next_observations: Observation after each step; None where the source does not have it.
        segment_ends: Rows after which the record breaks off although no flag says so, beside the last one.
        source: File or kind of input, for messages.
        names: What the source calls its fields.
    """

    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any
    next_observations: Any
    source: str
    segment_ends: npt.NDArray[np.int64] | None = None
    names: FieldNames = FieldNames()


def dataset_from_steps(
    steps: Steps,
    *,
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any] | None,
    max_episode_steps: int | None = None,
    prefer_termination: bool = False,
    announce_inferred: bool = True,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
) -> OfflineDataset:
    """Validate step data and lay it out episode by episode.

    Args:
        steps: The data.
        observation_space: Space of one observation; inferred from the values where None.
        action_space: Space of one action; inferred from the values where None.
        max_episode_steps: Time limit that ends episodes where the source has no truncations.
        prefer_termination: Read a step with both flags as terminated instead of refusing it.
        announce_inferred: Warn when a space had to be inferred.
        name: Name of the data set.
        env_id: Id of the environment.
        references: Returns of a random and of an expert policy.

    Raises:
        DatasetError: If the data is not valid.
    """
    dataset, notes = read_steps(
        steps,
        observation_space=observation_space,
        action_space=action_space,
        max_episode_steps=max_episode_steps,
        prefer_termination=prefer_termination,
        announce_inferred=announce_inferred,
        name=name,
        env_id=env_id,
        references=references,
    )
    announce(steps.source, notes)
    return dataset


def read_steps(
    steps: Steps,
    *,
    observation_space: spaces.Space[Any] | None,
    action_space: spaces.Space[Any] | None,
    max_episode_steps: int | None = None,
    prefer_termination: bool = False,
    announce_inferred: bool = True,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
    allocate: Callable[[tuple[int, ...], Any], Array] = np.empty,
) -> tuple[OfflineDataset, list[str]]:
    """Do what `dataset_from_steps` does, and return what there is to tell the user.

    Args:
        steps: See `dataset_from_steps`, as all others but the last.
        observation_space: See there.
        action_space: See there.
        max_episode_steps: See there.
        prefer_termination: See there.
        announce_inferred: See there.
        name: See there.
        env_id: See there.
        references: See there.
        allocate: From shape and dtype to the array that observations or actions are written to.

    Raises:
        DatasetError: If the data is not valid.
    """
    where = Where(steps.source)
    rewards = check_rewards(steps.rewards, None, "rewards", where)
    if not len(rewards):
        raise where.error("expected at least one step, got an empty episode", field="rewards")
    inferred = frozenset(
        kind for kind, space in (("observation_space", observation_space), ("action_space", action_space)) if space is None
    )
    if observation_space is None:
        observation_space = infer_observation_space(steps.observations, "observations", where)
        if steps.next_observations is not None:
            observation_space = _with_followers(observation_space, steps.next_observations, "next_observations", where)
    action_space = action_space or infer_action_space(steps.actions, where)
    _check_steps(steps, observation_space, action_space, len(rewards), where)
    terminations, truncations = _read_flags(steps, len(rewards), where, max_episode_steps, prefer_termination)
    layout = _lay_out(steps, terminations, truncations, where)
    dataset = OfflineDataset._trusted(
        observations=_gather_observations(steps, layout, allocate, where),
        actions=_keep_rows(steps.actions, layout.kept, allocate),
        rewards=np.array(rewards[layout.kept]),
        terminations=layout.terminations,
        truncations=layout.truncations,
        unflagged=layout.unflagged,
        observation_space=observation_space,
        action_space=action_space,
        name=name,
        env_id=env_id,
        references=references,
        inferred=inferred,
    )
    notes = list(layout.notes)
    if inferred and announce_inferred:
        said = ", ".join(f"{kind} {getattr(dataset, kind)}" for kind in sorted(inferred))
        notes.append(f"inferred from the values: {said}; pass the spaces to say otherwise")
    return dataset, notes


class ReadingWarning(UserWarning):
    """What a reader decided, all in one warning.

    Attributes:
        notes: The decisions, one by one.
    """

    def __init__(self, source: str, notes: list[str]) -> None:
        super().__init__(f"{source}: {'; '.join(notes)}.")
        self.notes = tuple(notes)


def announce(source: str, notes: list[str], stacklevel: int = 4) -> None:
    """Say in one warning what was decided while reading.

    Args:
        source: File or data set.
        notes: What was decided; nothing is said where empty.
        stacklevel: As in `warnings.warn`, chosen so that the warning points at the user's own line.
    """
    if notes:
        warnings.warn(ReadingWarning(source, notes), stacklevel=stacklevel)


# Spaces ---------------------------------------------------------------------------------------------------------------


def infer_observation_space(observations: Any, field: str, where: Where) -> spaces.Space[Any]:
    """Infer a space: an unbounded Box from floats, [0, 255] from bytes, a Discrete from a vector of integers."""
    if isinstance(observations, Mapping):
        if not observations:
            raise where.error("expected at least one key, got an empty mapping", field=field)
        return spaces.Dict({key: infer_observation_space(leaf, f"{field}.{key}", where) for key, leaf in observations.items()})
    shape, dtype = _shape_and_dtype(observations, field, where)
    if len(shape) == 1 and dtype.kind in "iu":
        return _infer_discrete(observations, field, where)
    if len(shape) > 1 and dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape[1:], dtype.type)
    if len(shape) > 1 and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return spaces.Box(limits.min, limits.max, shape[1:], dtype.type)
    raise _cannot_infer(shape, dtype, field, "observation_space", where)


def _with_followers(space: spaces.Space[Any], followers: Any, field: str, where: Where) -> spaces.Space[Any]:
    """Widen Discrete spaces by what only comes last in an episode; what does not fit in other ways is refused later."""
    if isinstance(space, spaces.Dict) and isinstance(followers, Mapping):
        widened = {
            key: _with_followers(one, followers[key], f"{field}.{key}", where) if key in followers else one
            for key, one in space.items()
        }
        return spaces.Dict(widened)
    if isinstance(space, spaces.Discrete):
        shape, dtype = _shape_and_dtype(followers, field, where)
        if len(shape) == 1 and dtype.kind in "iu":
            return spaces.Discrete(int(max(space.n, _infer_discrete(followers, field, where).n)))
    return space


def infer_action_space(actions: Any, where: Where) -> spaces.Space[Any]:
    """Infer a space from values: floats give a Box of [-1, 1] widened where values lie outside, a vector of integers a
    Discrete.

    Floats that happen to be whole numbers stay continuous.
    """
    shape, dtype = _shape_and_dtype(actions, "actions", where)
    if len(shape) == 1 and dtype.kind in "iu":
        return _infer_discrete(actions, "actions", where)
    if len(shape) > 1 and dtype.kind == "f" and shape[0]:
        check_values(actions, spaces.Box(-np.inf, np.inf, shape[1:], dtype.type), "actions", where)
        low, high = extremes(actions)
        return spaces.Box(np.minimum(low, -1).astype(dtype), np.maximum(high, 1).astype(dtype), dtype=dtype.type)
    raise _cannot_infer(shape, dtype, "actions", "action_space", where)


def _shape_and_dtype(array: Any, field: str, where: Where) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise where.error(f"expected an array, got {type(array).__name__}", field=field)
    return tuple(array.shape), np.dtype(array.dtype)


def _cannot_infer(shape: tuple[int, ...], dtype: np.dtype[Any], field: str, argument: str, where: Where) -> DatasetError:
    return where.error(
        f"expected floats of rank 2 or more (rows, features) or a vector of integers, got shape {shape} and dtype {dtype}",
        field=field,
        hint=f"Reshape or convert them, or pass {argument}",
    )


def _infer_discrete(array: Any, field: str, where: Where) -> spaces.Discrete:
    values = np.asarray(array)
    if not values.size:
        raise where.error("expected at least one row, got none", field=field)
    if values.min() < 0:
        raise where.error(
            f"expected integers from 0 on, got {values.min()}",
            field=field,
            row=int(values.argmin()),
            hint="Pass the space",
        )
    if int(values.max()) >= np.iinfo(np.int64).max:
        raise where.error(
            f"expected integers below 2 ** 63 - 1, got {values.max()}",
            field=field,
            row=int(values.argmax()),
            hint="Pass the space",
        )
    return spaces.Discrete(int(values.max()) + 1)


# Flags ----------------------------------------------------------------------------------------------------------------


def _check_steps(
    steps: Steps,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    n_steps: int,
    where: Where,
) -> None:
    check_supported_space(observation_space, "observations", where)
    check_supported_space(action_space, "actions", where)
    check_tree(steps.observations, observation_space, n_steps, "observations", where)
    check_tree(steps.actions, action_space, n_steps, "actions", where)
    if steps.next_observations is not None:
        check_tree(steps.next_observations, observation_space, n_steps, "next_observations", where)


def _read_flags(
    steps: Steps, n_steps: int, where: Where, max_episode_steps: int | None, prefer_termination: bool
) -> tuple[Flags, Flags]:
    terminations = check_flags(steps.terminations, n_steps, steps.names.terminations, where)
    if steps.truncations is not None:
        truncations = check_flags(steps.truncations, n_steps, steps.names.truncations, where)
        names = (steps.names.terminations, steps.names.truncations)
        return terminations, resolve_both_flags(terminations, truncations, names, where, prefer_termination)
    if max_episode_steps is not None:
        return terminations, _time_limits(terminations, max_episode_steps)
    if steps.next_observations is not None:
        # The breaks between episodes show in the observations, see `_find_breaks`.
        return terminations, np.zeros(n_steps, dtype=np.bool_)
    raise where.error(
        "expected this field, or next_observations, to find where episodes were cut short; got neither",
        field=steps.names.truncations,
        hint="Pass max_episode_steps, the time limit of the environment",
    )


def _time_limits(terminations: Flags, max_episode_steps: int) -> Flags:
    """Mark the steps at which an episode that did not terminate reaches the time limit."""
    rows = np.arange(len(terminations))
    starts = np.zeros(len(terminations), dtype=np.int64)
    starts[1:] = np.where(terminations[:-1], rows[1:], 0)
    steps_before = rows - np.maximum.accumulate(starts)
    limits: Flags = ((steps_before + 1) % max_episode_steps == 0) & ~terminations
    return limits


def _find_breaks(steps: Steps, ends: Flags) -> Flags:
    """Mark the rows inside an episode whose next observation is not the observation of the following row."""
    breaks = np.zeros(len(ends), dtype=np.bool_)
    followers = dict(named_leaves(steps.next_observations, ""))
    for name, leaf in named_leaves(steps.observations, ""):
        # Of two widths of floats the same number is the same only at the narrower one.
        dtypes = np.dtype(leaf.dtype), np.dtype(followers[name].dtype)
        dtype = min(dtypes, key=lambda one: one.itemsize) if dtypes[0].kind == "f" else np.result_type(*dtypes)
        for start, stop in row_blocks(len(ends) - 1, row_nbytes(leaf)):
            with np.errstate(over="ignore"):
                ours, theirs = (
                    block.astype(dtype, copy=False) for block in (leaf[start + 1 : stop + 1], followers[name][start:stop])
                )
            differs = theirs != ours
            breaks[start:stop] |= differs.reshape(stop - start, -1).any(axis=1)
    return breaks & ~ends


# Layout ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the rows of the source go.

    Attributes:
        kept: Per row of the source, whether its transition is kept.
        observed: Per row of the source, whether its observation is kept (also as the last one of a shortened episode).
        followed: Per row of the source, whether a final observation is added after its own.
        terminations: Per kept row.
        truncations: Per kept row.
        unflagged: Per kept episode.
        notes: What to tell the user.
    """

    kept: Flags
    observed: Flags
    followed: Flags
    terminations: Flags
    truncations: Flags
    unflagged: Flags
    notes: list[str]


def _lay_out(steps: Steps, terminations: Flags, truncations: Flags, where: Where) -> _Layout:
    flagged = terminations | truncations
    stops = np.zeros(len(flagged), dtype=np.bool_)
    stops[-1] = True
    if steps.segment_ends is not None:
        stops[steps.segment_ends] = True
    stops &= ~flagged
    notes = [f"{stops.sum()} episode(s) end with the record and no flag, taken as truncated"] if stops.any() else []
    if steps.next_observations is not None:
        breaks = _find_breaks(steps, flagged | stops)
        if breaks.any():
            notes.append(
                f"{breaks.sum()} step(s) without a flag are followed by an observation that is not their next one, "
                "the episode is split there and taken as truncated"
            )
        return _lay_out_complete(terminations, flagged | stops | breaks, stops | breaks, notes)
    return _lay_out_without_next(terminations, flagged | stops, stops, notes, where)


def _lay_out_complete(terminations: Flags, ends: Flags, unflagged: Flags, notes: list[str]) -> _Layout:
    everything = np.ones(len(ends), dtype=np.bool_)
    return _Layout(
        kept=everything,
        observed=everything,
        followed=ends,
        terminations=terminations.copy(),
        truncations=ends & ~terminations,
        unflagged=unflagged[ends],
        notes=notes,
    )


def _lay_out_without_next(terminations: Flags, ends: Flags, unflagged: Flags, notes: list[str], where: Where) -> _Layout:
    """Drop the last transition of each truncated episode: what was observed after it is not in the source.

    A terminated episode keeps its last transition. Its target does not look at the next observation, so the last one is
    repeated there.
    """
    dropped = ends & ~terminations
    starts = np.concatenate(([True], ends[:-1]))
    alone = dropped & starts  # A truncated episode of one step has no transition left.
    last_rows = np.flatnonzero(dropped & ~alone)
    truncations = np.zeros(len(ends), dtype=np.bool_)
    truncations[last_rows - 1] = True
    kept = ~dropped
    if not kept.any():
        raise where.error(
            f"expected at least one transition whose next observation is known, got none in {len(ends)} step(s)",
            field="observations",
            hint="Give next_observations",
        )
    if dropped.any():
        notes = [
            *notes,
            f"{dropped.sum()} transition(s) at the end of truncated episodes were dropped, since the observation after "
            "them is not given",
        ]
    return _Layout(
        kept=kept,
        observed=~alone,
        followed=ends & terminations,
        terminations=terminations[kept],
        truncations=truncations[kept],
        unflagged=unflagged[ends & ~alone],
        notes=notes,
    )


def _keep_rows(source: Any, kept: Flags, allocate: Callable[[tuple[int, ...], Any], Array]) -> Array:
    """Copy the kept rows, block by block."""
    result = allocate((int(kept.sum()), *source.shape[1:]), source.dtype.newbyteorder("="))
    filled = 0
    for start, stop in row_blocks(len(kept), row_nbytes(source)):
        block = kept[start:stop]
        count = int(block.sum())
        result[filled : filled + count] = source[start:stop] if count == stop - start else source[start:stop][block]
        filled += count
    return result


def _gather_observations(steps: Steps, layout: _Layout, allocate: Callable[[tuple[int, ...], Any], Array], where: Where) -> Any:
    """Copy the observations, with each episode's final one after its last step."""
    followed = layout.followed
    destinations = np.cumsum(layout.observed) - 1 + np.cumsum(followed) - followed

    names = iter(name for name, _ in named_leaves(steps.observations, "next_observations"))

    def gather(source: Any, follower: Any) -> Array:
        field = next(names)
        n_rows = int(layout.observed.sum() + followed.sum())
        result = allocate((n_rows, *source.shape[1:]), source.dtype.newbyteorder("="))
        for start, stop in row_blocks(len(followed), row_nbytes(source)):
            rows, observed = destinations[start:stop], layout.observed[start:stop]
            block = source[start:stop]
            result[rows[observed]] = block if observed.all() else block[observed]
            ends = followed[start:stop]
            given = follower[start:stop][ends]
            with np.errstate(over="ignore"):
                last = given.astype(source.dtype, copy=False)
            if not (np.isfinite(last) if last.dtype.kind == "f" else last == given).all():
                raise where.error(
                    f"expected values that {last.dtype} can hold, as those of observations; got larger ones", field=field
                )
            result[rows[ends] + 1] = last
        return result

    following = steps.observations if steps.next_observations is None else steps.next_observations
    return map_leaves(gather, steps.observations, following)


# The way back ---------------------------------------------------------------------------------------------------------

OnProgress: TypeAlias = Callable[[float], None]
"""Called with the share that is written, up to 1."""


@dataclass(frozen=True)
class StepColumn:
    """One array with a row for each step, read from a data set in blocks.

    Attributes:
        name: Its field, with the keys of dict observations after slashes.
        shape: Its shape.
        dtype: Its dtype.
        block_rows: Rows of each block; the last one may have fewer.
        read: Gives the rows from a start to a stop.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block_rows: int
    read: Callable[[int, int], Array]

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield start, stop and the rows between them."""
        for start in range(0, self.shape[0], self.block_rows):
            stop = min(start + self.block_rows, self.shape[0])
            yield start, stop, np.ascontiguousarray(self.read(start, stop))


def step_columns(
    dataset: OfflineDataset, source: str, names: FieldNames | None = None, progress: OnProgress | None = None
) -> list[StepColumn]:
    """Lay a data set out with one row per step, next observations and all: `read_steps` gives the same data set again.

    Args:
        dataset: The data set.
        source: What it is written to, for messages.
        names: What the target calls its fields.
        progress: Called as the blocks are taken.

    Raises:
        DatasetError: If a key of dict observations cannot be a part of a name.
    """
    names = names or FieldNames()
    n_steps, read_bytes = len(dataset), 0
    columns: list[StepColumn] = []

    def add(name: str, array: Any, read: Callable[[int, int], Array]) -> None:
        n_bytes = row_nbytes(array)
        rows = min(n_steps, next(stop for _, stop in row_blocks(n_steps, n_bytes)))

        def reported(start: int, stop: int) -> Array:
            nonlocal read_bytes
            read_bytes += (stop - start) * n_bytes
            if progress is not None:
                progress(read_bytes / total)
            return read(start, stop)

        columns.append(StepColumn(name, (n_steps, *array.shape[1:]), np.dtype(array.dtype), rows, reported))

    def add_observations(field: str, shift: int) -> None:
        for name, leaf in _slashed(dataset.observations, field, source):

            def read(start: int, stop: int, leaf: Any = leaf) -> Array:
                rows: Array = leaf[dataset.observation_rows(np.arange(start, stop)) + shift]
                return rows

            add(name, leaf, read)

    add_observations("observations", 0)
    flat: dict[str, Array] = {
        "actions": dataset.actions,
        "rewards": dataset.rewards,
        names.terminations: dataset.terminations,
        names.truncations: dataset.truncations,
    }
    for name, array in flat.items():
        add(name, array, lambda start, stop, array=array: array[start:stop])  # type: ignore[misc]
    add_observations("next_observations", 1)
    total = sum(math.prod(column.shape) * column.dtype.itemsize for column in columns)
    return columns


def _slashed(tree: Any, name: str, source: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of dict observations, named as in `observations/key`."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, branch in tree.items():
        if not isinstance(key, str) or key in ("", ".", "..") or set(key) & {"/", "\0"} or depth == MAX_DEPTH:
            raise DatasetError(
                f"expected keys without slashes, nested at most {MAX_DEPTH} deep, got {key!r}",
                source=source,
                field=name,
                hint='Store it with to_minari and data_format="arrow", or before flatten_observations',
            )
        yield from _slashed(branch, f"{name}/{key}", source, depth + 1)


@contextlib.contextmanager
def new_file(path: "str | os.PathLike[str]", overwrite: bool) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears when it is whole; refuse to where something is, at the start and at the end.

    Raises:
        DatasetError: If there is something, and it is not to be overwritten.
        OSError: If the disk does not take it.
    """
    taken = DatasetError(
        "expected a name that is not taken, there is something",
        source=str(Path(path)),
        hint="Choose another name, or pass overwrite=True",
    )
    if not overwrite and os.path.lexists(path):
        raise taken
    try:
        with whole_file(path, replace=overwrite) as file:
            yield file
    except FileExistsError as error:
        if error.errno is None:
            raise taken from error
        raise
