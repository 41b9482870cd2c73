"""Observations are one array or a (nested) dict of arrays: the few helpers that treat both alike."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Observations: TypeAlias = "Array | dict[str, Observations]"

BLOCK_BYTES = 256 * 2**10
"""Rows are moved in blocks of about this many bytes, so that no temporary grows with the data set."""


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `function` to each leaf of `tree` (and to the leaves of `others` at the same place)."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, tree[key], *(other[key] for other in others)) for key in tree}
    return function(tree, *others)


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield `(name, leaf)` pairs; a leaf under key `k` is called `name.k`."""
    if isinstance(tree, Mapping):
        for key in tree:
            yield from named_leaves(tree[key], f"{name}.{key}")
    else:
        yield name, tree


def first_leaf(tree: Any) -> Any:
    """Return any one leaf: all leaves of a validated tree have the same number of rows."""
    return next(leaf for _, leaf in named_leaves(tree, ""))


def read_only(array: Array) -> Array:
    """Return a view that cannot be written, nor made writable. What only stands for an array is returned as it is.

    NumPy refuses to make a view writable while the owner of its memory is not, so the owner is locked too.
    """
    owner: Any = array
    if not isinstance(owner, np.ndarray):
        return array  # `StackedFrames`, read-only by itself.
    while isinstance(owner, np.ndarray):
        owner.flags.writeable = False
        owner = owner.base
    return array.view()


def is_mapped(array: Any) -> bool:
    """Tell whether an array is a view of a file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def row_blocks(n_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut `n_rows` rows of `row_bytes` bytes into `(start, stop)` blocks of about `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, n_rows, size):
        yield start, min(start + size, n_rows)


def row_nbytes(array: Any) -> int:
    """Bytes of one row of an array-like that has `shape` and `dtype`."""
    return int(np.prod(array.shape[1:], dtype=np.int64)) * int(np.dtype(array.dtype).itemsize)


def extremes(array: Any) -> tuple[Array, Array]:
    """Find minimum and maximum over the rows, reading them in blocks: they may be a file, or stacked frames."""
    low = high = None
    for start, stop in row_blocks(len(array), row_nbytes(array)):
        block = np.asarray(array[start:stop])
        smallest, largest = block.min(axis=0), block.max(axis=0)
        low = smallest if low is None else np.minimum(low, smallest)
        high = largest if high is None else np.maximum(high, largest)
    assert low is not None
    assert high is not None
    return low, high
