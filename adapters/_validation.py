"""What is refused at the door, and how the refusal reads."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins.adapters._tree import Array, named_leaves, row_blocks, row_nbytes

Flags: TypeAlias = npt.NDArray[np.bool_]


class DatasetError(ValueError):
    """Data that cannot become an `OfflineDataset`, or an `OfflineDataset` that does not fit where it should go.

    The message names the source, the field and the row, then what was expected, what came, and what to do.

    Attributes:
        source: File, data-set id or kind of input.
        field: Name of the field, `observations.image` for a key of dict observations.
        row: Row of the field, counted from 0 (inside `episode` where that is given).
        episode: Episode of the source, counted from 0.
    """

    def __init__(
        self,
        problem: str,
        *,
        source: str | None = None,
        field: str | None = None,
        row: int | None = None,
        episode: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.source, self.field, self.row, self.episode = source, field, row, episode
        self._problem, self._hint = problem, hint
        where = [source] if source else []
        where += [f"field '{field}'"] if field else []
        where += [f"episode {episode}"] if episode is not None else []
        where += [f"row {row}"] if row is not None else []
        prefix = ", ".join(where)
        message = f"{prefix}: {problem}" if prefix else problem
        super().__init__(f"{message}. {hint}" if hint else message)

    def in_episode(self, episode: int) -> "DatasetError":
        """Return the same error, said of one episode."""
        return DatasetError(self._problem, source=self.source, field=self.field, row=self.row, episode=episode, hint=self._hint)


class Where:
    """The place in the source that a check is looking at, for its error message."""

    def __init__(self, source: str, episode: int | None = None, first_row: int = 0) -> None:
        self.source = source
        self.episode = episode
        self.first_row = first_row

    def error(self, problem: str, *, field: str | None = None, row: int | None = None, hint: str | None = None) -> DatasetError:
        """Build the error; `row` counts from the first row under the eye."""
        absolute = None if row is None else self.first_row + row
        return DatasetError(problem, source=self.source, field=field, row=absolute, episode=self.episode, hint=hint)

    def at(self, first_row: int) -> "Where":
        """Return the same place, `first_row` rows further down."""
        return Where(self.source, self.episode, self.first_row + first_row)


def require_extra(module: str, extra: str | None, error: ImportError) -> ImportError:
    """Return the ImportError that tells which extra brings the missing `module`; None where no extra is needed."""
    package = "cql-plugins" if extra is None else f"cql-plugins[{extra}]"
    return ImportError(f'{module} is needed here: {error}. Install it with: pip install "{package}"')


def check_supported_space(space: spaces.Space[Any], field: str, where: Where) -> None:
    """Refuse spaces other than Box and Discrete, or for observations a (nested) Dict of them."""
    if isinstance(space, spaces.Dict) and field.startswith("observations"):
        for key, subspace in space.spaces.items():
            check_supported_space(subspace, f"{field}.{key}", where)
    elif not isinstance(space, spaces.Box | spaces.Discrete):
        allowed = "Box, Discrete or Dict" if field.startswith("observations") else "Box or Discrete"
        raise where.error(
            f"expected a space of type {allowed}, got {space}",
            field=field,
            hint="Flatten it first, for instance with gymnasium.spaces.flatten_space",
        )


def check_structure(values: Any, space: spaces.Space[Any], field: str, where: Where) -> None:
    """Check that `values` has the keys of a Dict `space` and is a plain array elsewhere."""
    if isinstance(space, spaces.Dict):
        if not isinstance(values, Mapping):
            raise where.error(f"expected a mapping with keys {sorted(space.spaces)}, got {type(values).__name__}", field=field)
        if set(values) != set(space.spaces):
            raise where.error(f"expected keys {sorted(space.spaces)}, got {sorted(map(str, values))}", field=field)
        for key, subspace in space.spaces.items():
            check_structure(values[key], subspace, f"{field}.{key}", where)
    elif isinstance(values, Mapping):
        raise where.error(f"expected an array for the space {space}, got a mapping with {sorted(values)}", field=field)


def _describe(array: Any) -> str:
    return f"shape {tuple(array.shape)} and dtype {array.dtype}"


def check_layout(array: Any, space: spaces.Space[Any], n_rows: int, field: str, where: Where) -> None:
    """Check rank, row shape, number of rows and kind of dtype of one leaf against its space; no value is read.

    Args:
        array: Anything with `shape` and `dtype`.
        space: The Box or Discrete space of one row.
        n_rows: Number of rows expected.
        field: Name used in the message.
        where: Source used in the message.

    Raises:
        DatasetError: If one of them disagrees.
    """
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise where.error(f"expected an array, got {type(array).__name__}", field=field)
    shape = () if isinstance(space, spaces.Discrete) else tuple(space.shape or ())
    if len(array.shape) != 1 + len(shape):
        raise where.error(
            f"expected rank {1 + len(shape)} (rows, then {shape} for {space}), got {_describe(array)}", field=field
        )
    if tuple(array.shape[1:]) != shape:
        raise where.error(f"expected rows of shape {shape} for {space}, got {_describe(array)}", field=field)
    if array.shape[0] != n_rows:
        raise where.error(f"expected {n_rows} rows, got {array.shape[0]}", field=field, hint="Fields must have equal lengths")
    kind = np.dtype(array.dtype).kind
    if isinstance(space, spaces.Discrete):
        if kind not in "iu":
            raise where.error(f"expected integers for {space}, got {_describe(array)}", field=field)
    elif np.dtype(space.dtype).kind == "f":
        if kind != "f":
            raise where.error(
                f"expected floating point values for {space}, got {_describe(array)}",
                field=field,
                hint=f"Convert with .astype({np.dtype(space.dtype).name!r}), or give the space that fits",
            )
    elif np.dtype(array.dtype).newbyteorder("=") != np.dtype(space.dtype):
        raise where.error(f"expected dtype {space.dtype} for {space}, got {_describe(array)}", field=field)


def check_values(array: Array, space: spaces.Space[Any], field: str, where: Where) -> None:
    """Refuse NaN and infinity, and entries of a Discrete space that are out of range. Reads in blocks."""
    if isinstance(space, spaces.Box) and np.dtype(array.dtype).kind != "f":
        return  # Images, for instance, which may be a file: every value is a valid one.
    for start, stop in row_blocks(array.shape[0], row_nbytes(array)):
        block = array[start:stop]
        if isinstance(space, spaces.Discrete):
            low, high = int(space.start), int(space.start + space.n - 1)
            bad = np.flatnonzero((block < low) | (block > high))
            if bad.size:
                raise where.error(
                    f"expected integers in [{low}, {high}] for {space}, got {block[bad[0]]}",
                    field=field,
                    row=start + int(bad[0]),
                )
        elif block.dtype.kind == "f":
            check_finite(block, field, where.at(start))


def check_finite(block: Array, field: str, where: Where) -> None:
    """Refuse NaN and infinity, naming the first row that has one."""
    finite = np.isfinite(block)
    if finite.all():
        return
    row, *rest = (int(i) for i in np.argwhere(~finite)[0])
    column = f" in column {tuple(rest) if len(rest) > 1 else rest[0]}" if rest else ""
    bad_rows = int((~finite.reshape(len(finite), -1)).any(axis=1).sum())
    raise where.error(
        f"expected finite values, got {block[(row, *rest)]}{column} ({bad_rows} such rows in this block)",
        field=field,
        row=row,
        hint="Remove or repair these rows first",
    )


def check_rewards(rewards: Any, n_rows: int | None, field: str, where: Where) -> Array:
    """Return rewards as a floating point vector of `n_rows` finite values; integers and booleans become float64."""
    if isinstance(rewards, Mapping):
        raise where.error("expected a vector, got a mapping", field=field)
    values = np.asarray(rewards)
    if values.ndim != 1:
        raise where.error(
            f"expected rank 1 (one reward per step), got {_describe(values)}", field=field, hint="Use .reshape(-1)"
        )
    if n_rows is not None and len(values) != n_rows:
        raise where.error(f"expected {n_rows} rows, got {len(values)}", field=field, hint="Fields must have equal lengths")
    if values.dtype.kind not in "fiub":
        raise where.error(f"expected numbers, got {_describe(values)}", field=field)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    check_finite(values, field, where)
    return values


def check_flags(flags: Any, n_rows: int, field: str, where: Where) -> Flags:
    """Return a vector of `n_rows` booleans; numbers are accepted if each is 0 or 1."""
    if isinstance(flags, Mapping):
        raise where.error("expected a vector, got a mapping", field=field)
    values = np.asarray(flags)
    if values.ndim != 1:
        raise where.error(f"expected rank 1 (one flag per step), got {_describe(values)}", field=field, hint="Use .reshape(-1)")
    if len(values) != n_rows:
        raise where.error(f"expected {n_rows} rows, got {len(values)}", field=field, hint="Fields must have equal lengths")
    if values.dtype.kind == "b":
        return values
    if values.dtype.kind not in "fiu":
        raise where.error(f"expected booleans, got {_describe(values)}", field=field)
    bad = np.flatnonzero((values != 0) & (values != 1))
    if bad.size:
        raise where.error(f"expected 0 or 1, got {values[bad[0]]}", field=field, row=int(bad[0]))
    return values.astype(np.bool_)


def resolve_both_flags(
    terminations: Flags,
    truncations: Flags,
    names: tuple[str, str],
    where: Where,
    prefer_termination: bool,
) -> Flags:
    """Return the truncations, cleared where a step also terminates if `prefer_termination`; otherwise refuse such a
    step.

    Whether such a step bootstraps is a choice that changes the learnt values, so it is not made silently.
    """
    both = terminations & truncations
    if not both.any():
        return truncations
    if prefer_termination:
        return truncations & ~terminations
    rows = np.flatnonzero(both)
    raise where.error(
        f"expected at most one of '{names[0]}' and '{names[1]}' on a step, got both ({rows.size} such steps)",
        field=names[1],
        row=int(rows[0]),
        hint="Pass prefer_termination=True to read such a step as terminated (its target does not bootstrap)",
    )


def check_tree(values: Any, space: spaces.Space[Any], n_rows: int, field: str, where: Where, *, read: bool = True) -> None:
    """Check structure, layout and (unless `read` is false) every value of observations or actions."""
    check_structure(values, space, field, where)
    for (name, leaf), (_, leaf_space) in zip(named_leaves(values, field), leaf_spaces(space, values), strict=True):
        check_layout(leaf, leaf_space, n_rows, name, where)
        if read:
            check_values(leaf, leaf_space, name, where)


def leaf_spaces(space: spaces.Space[Any], values: Any) -> list[tuple[str, spaces.Space[Any]]]:
    """List the spaces of the leaves of `values`, in the order of its keys."""
    return list(named_leaves(space_tree(space, values), ""))


def space_tree(space: spaces.Space[Any], values: Any) -> Any:
    """Return the spaces arranged as `values` is."""
    if isinstance(space, spaces.Dict):
        return {key: space_tree(space.spaces[key], values[key]) for key in values}
    return space
