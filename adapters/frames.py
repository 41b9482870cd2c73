"""Frame stacks that hold each frame once."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins.adapters._tree import Array, read_only, row_blocks, row_nbytes
from cql_plugins.adapters._validation import Where

Padding: TypeAlias = Literal["zero", "reset"]
"""What precedes the first frame of an episode: zeros (SB3's `VecFrameStack`), or that frame again (Gymnasium's
`FrameStackObservation`)."""


class StackedFrames:
    """Stacks of the `k` latest frames, read-only, put together when rows are asked for.

    Stands where an array of observations would. As with an array, a slice shares memory and a list of rows copies;
    `numpy.asarray` makes the whole array. The frames are stored once each, flat, episode after episode; the `k - 1`
    frames that precede each episode are kept apart, so that the frames themselves may be anyone's array or a file.

    In a stack the oldest frame comes first, along the channels: `(H, W, C)` becomes `(H, W, k * C)`, as SB3's
    `VecFrameStack` has it, and `(C, H, W)` becomes `(k * C, H, W)`.
    """

    def __init__(
        self,
        frames: Array,
        leads: Array,
        starts: npt.NDArray[np.int64],
        channels_first: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        """Put stacks over frames; nothing is copied, and all arrays are locked.

        Args:
            frames: Shape `(rows, *frame)`.
            leads: Shape `(E, k - 1, *frame)`: what precedes each episode, oldest first.
            starts: Shape `(E,)`: the row of each episode's first frame, increasing, the first one 0.
            channels_first: Whether stacks grow along the first axis of a frame, else along its last.
            window: First row, and one past the last, that are seen from outside; all where None.
        """
        self._frames, self._leads = read_only(frames), read_only(leads)
        self._starts = read_only(np.asarray(starts, dtype=np.int64))
        self._channels_first = channels_first
        self._window = (0, len(frames)) if window is None else window

    # As an array ------------------------------------------------------------------------------------------------------

    @property
    def n_stack(self) -> int:
        """Frames in a stack, `k`."""
        return int(self._leads.shape[1]) + 1

    @property
    def channels_first(self) -> bool:
        """Whether stacks grow along the first axis of a frame, else along its last."""
        return self._channels_first

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array this stands for."""
        return (len(self), *stacked_shape(self._frames.shape[1:], self.n_stack, self._channels_first))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the frames."""
        dtype: np.dtype[Any] = self._frames.dtype
        return dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._frames.ndim

    @property
    def size(self) -> int:
        """Number of entries of the array this stands for."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that are stored, not of the stacks made of them."""
        inside = slice(*np.searchsorted(self._starts, self._window))
        return len(self) * row_nbytes(self._frames) + _stored_nbytes(self._leads[inside])

    @property
    def frames(self) -> Array:
        """The newest frame of each row, a view."""
        return self._frames[slice(*self._window)]

    def __len__(self) -> int:
        """Count the rows."""
        return self._window[1] - self._window[0]

    def __repr__(self) -> str:
        """Say what it stands for, in one line."""
        return f"StackedFrames(shape={self.shape}, dtype={self.dtype}, n_stack={self.n_stack})"

    def __getitem__(self, index: Any) -> Any:
        """Get one stack by an integer, a view by a slice of step 1, copies by a list of rows, a mask or another slice.

        Further indices apply to the stacks.

        Raises:
            IndexError: If a row is out of range.
        """
        if isinstance(index, tuple):
            return self[index[0]] if len(index) == 1 else np.asarray(self[index[0]])[_further(index)]
        first, _ = self._window
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            window = first + start, first + max(start, stop)
            return StackedFrames(self._frames, self._leads, self._starts, self._channels_first, window)
        chosen = self._rows(index)
        stacks = self._gather(first + chosen.reshape(-1))
        return stacks.reshape(*chosen.shape, *stacks.shape[1:])

    def _rows(self, index: Any) -> npt.NDArray[np.int64]:
        """Return the rows of an index, counted from the first, as integers of the index's shape."""
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)))
        rows = np.asarray(index)
        if rows.dtype == np.bool_:
            picked: npt.NDArray[np.int64] = np.arange(len(self))[rows]
            return picked
        if not rows.size:
            return np.zeros(rows.shape, dtype=np.int64)
        if rows.dtype.kind not in "iu" or not (rows.min() >= -len(self) and rows.max() < len(self)):
            raise IndexError(f"rows must be integers in [0, {len(self)}), got {index!r}")
        return np.where(rows < 0, rows + len(self), rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Make the array this stands for.

        Raises:
            ValueError: If a copy was ruled out.
        """
        if copy is False:
            raise ValueError("expected that stacks may be copied: they are put together from single frames")
        stacks = self._gather(np.arange(*self._window))
        return stacks if dtype is None else stacks.astype(dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor, since pickled arrays come back writable."""
        return StackedFrames, (self._frames, self._leads, self._starts, self._channels_first, self._window)

    # Gathering --------------------------------------------------------------------------------------------------------

    def _gather(self, rows: npt.NDArray[np.int64]) -> Array:
        """Stack the frames that end at `rows` of `frames`."""
        frame_shape, k = self._frames.shape[1:], self.n_stack
        axis = 1 if self._channels_first else len(frame_shape)
        stacks = np.empty((len(rows), *frame_shape[: axis - 1], k, *frame_shape[axis - 1 :]), dtype=self.dtype)
        for slot in range(k):
            stacks[(slice(None),) * axis + (slot,)] = self._frames_before(rows, k - 1 - slot)
        return stacks.reshape(len(rows), *self.shape[1:])

    def _frames_before(self, rows: npt.NDArray[np.int64], back: int) -> Array:
        """Get the single frames `back` steps before `rows`; where an episode is younger than that, from its leads."""
        if not back:
            return self._frames[rows]
        episodes = np.searchsorted(self._starts, rows, side="right") - 1
        ages = rows - self._starts[episodes]
        found = self._frames[rows - np.minimum(back, ages)]
        young = np.flatnonzero(ages < back)
        if len(young):
            found[young] = self._leads[episodes[young], self.n_stack - 1 - back + ages[young]]
        return found

    # Whole episodes ---------------------------------------------------------------------------------------------------

    def take_ranges(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> "StackedFrames":
        """Copy ranges of rows, each becoming an episode whose first stacks are what they were.

        Args:
            starts: First row of each range.
            stops: One past the last.
        """
        first = self._window[0]
        k = self.n_stack
        leads = np.empty((len(starts), *self._leads.shape[1:]), dtype=self.dtype)
        for slot in range(k - 1):
            leads[:, slot] = self._frames_before(first + np.asarray(starts), k - 1 - slot)
        rows = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
        lengths = np.asarray(stops) - starts
        return StackedFrames(
            self.frames[rows], leads, np.concatenate(([0], np.cumsum(lengths)[:-1])), channels_first=self._channels_first
        )

    @staticmethod
    def concatenate(parts: "Sequence[StackedFrames]") -> "StackedFrames":
        """Join stacks of one kind, each beginning with a new episode; frames are copied.

        Args:
            parts: At least one.
        """
        compact = [part._compact() for part in parts]
        before = np.cumsum([0, *(len(part) for part in parts)])
        return StackedFrames(
            np.concatenate([frames for frames, _, _ in compact]),
            np.concatenate([leads for _, leads, _ in compact]),
            np.concatenate([starts + n for (_, _, starts), n in zip(compact, before[:-1], strict=True)]),
            channels_first=parts[0]._channels_first,
        )

    def _compact(self) -> tuple[Array, Array, npt.NDArray[np.int64]]:
        """Frames, leads and starts of the window alone."""
        first, last = self._window
        inside = (self._starts > first) & (self._starts < last)
        opening = np.empty((1, *self._leads.shape[1:]), dtype=self.dtype)
        for slot in range(self.n_stack - 1):
            opening[:, slot] = self._frames_before(np.array([first]), self.n_stack - 1 - slot)
        starts = np.concatenate(([0], self._starts[inside] - first))
        return self.frames, np.concatenate((opening, self._leads[inside])), starts


def _further(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is left of an index once its rows are picked."""
    return index[1:] if isinstance(index[0], int | np.integer) else (slice(None), *index[1:])


def _stored_nbytes(array: Array) -> int:
    """Bytes behind an array, each counted once where it was broadcast."""
    axes = [length for length, stride in zip(array.shape, array.strides, strict=True) if stride]
    return int(np.prod(axes, dtype=np.int64)) * array.itemsize if array.size else 0


# Making stacks --------------------------------------------------------------------------------------------------------


def stacked_shape(frame_shape: tuple[int, ...], k: int, channels_first: bool) -> tuple[int, ...]:
    """Return the shape of `k` frames of `frame_shape`, one after another along the channels."""
    if channels_first:
        return (k * frame_shape[0], *frame_shape[1:])
    return (*frame_shape[:-1], k * frame_shape[-1])


def has_channels_first(shape: tuple[int, ...]) -> bool:
    """Tell where the channels are, as SB3 does: an image's smallest axis; of anything else the last."""
    return len(shape) == 3 and int(np.argmin(shape)) == 0


def is_image(space: spaces.Space[Any]) -> bool:
    """Tell whether observations of `space` are images: bytes, with two axes (grey) or three."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def stack(leaf: Array, starts: npt.NDArray[np.int64], k: int, padding: Padding) -> StackedFrames:
    """Put stacks over single frames; grey images without a channel axis get one in front.

    Args:
        leaf: Shape `(rows, *frame)`.
        starts: Row of the first frame of each episode.
        k: Frames in a stack.
        padding: What precedes the first frame.
    """
    if leaf.ndim == 3 and leaf.dtype == np.uint8:
        leaf = leaf[:, None]
    frame_shape = leaf.shape[1:]
    shape = (len(starts), k - 1, *frame_shape)
    if padding == "zero":
        leads = np.broadcast_to(np.zeros((), dtype=leaf.dtype), shape)
    else:
        leads = np.broadcast_to(leaf[starts][:, None], shape)
    return StackedFrames(leaf, leads, starts, channels_first=has_channels_first(frame_shape))


def stacked_space(space: spaces.Box, k: int) -> spaces.Box:
    """Return the space of `k` stacked frames of `space`, as `stack` arranges them."""
    low, high = space.low, space.high
    if low.ndim == 2 and space.dtype == np.uint8:
        low, high = low[None], high[None]
    axis = 0 if has_channels_first(low.shape) else -1
    dtype: Any = np.dtype(space.dtype).type
    return spaces.Box(np.concatenate([low] * k, axis=axis), np.concatenate([high] * k, axis=axis), dtype=dtype)


def _stacks_first(leaf: Array, k: int, field: str, where: Where) -> bool:
    """Find whether the first or the last axis of stacks is the channels': the shortest of a frame, not of the stack."""
    shape = leaf.shape[1:]
    fitting = []
    for is_first in (True, False):
        axis = 0 if is_first else len(shape) - 1
        frame = [size // k if place == axis else size for place, size in enumerate(shape)]
        if shape[axis] % k == 0 and has_channels_first(tuple(frame)) == is_first:
            fitting.append(is_first)
    if not fitting:
        raise where.error(f"expected a multiple of {k} channels, got shape {shape}", field=field)
    return has_channels_first(shape) if len(fitting) == 2 else fitting[0]


def unstack(leaf: Array, starts: npt.NDArray[np.int64], k: int, field: str, where: Where) -> StackedFrames:
    """Keep each frame of stacks once, after checking that each stack continues the one before.

    Args:
        leaf: Shape `(rows, *stack)`.
        starts: Row of the first stack of each episode.
        k: Frames in a stack.
        field: Name for messages.
        where: Source for messages.

    Raises:
        DatasetError: If `k` does not divide the channels, or a stack is not the one before, moved on by a frame.
    """
    channels_first = _stacks_first(leaf, k, field, where)
    axis = 1 if channels_first else leaf.ndim - 1
    size = leaf.shape[axis] // k

    def part(rows: Array, first: int, last: int) -> Array:
        return rows[(slice(None),) * axis + (slice(first * size, last * size),)]

    frames = np.empty((len(leaf), *part(leaf[:0], k - 1, k).shape[1:]), dtype=leaf.dtype)
    is_start = np.zeros(len(leaf), dtype=np.bool_)
    is_start[starts] = True
    for start, stop in row_blocks(len(leaf), row_nbytes(leaf)):
        block = leaf[max(start - 1, 0) : stop]
        frames[start:stop] = part(block[-(stop - start) :], k - 1, k)
        differs = (part(block[:-1], 1, k) != part(block[1:], 0, k - 1)).any(axis=tuple(range(1, leaf.ndim)))
        broken = np.flatnonzero(differs & ~is_start[max(start - 1, 0) + 1 : stop])
        if broken.size:
            row = max(start - 1, 0) + 1 + int(broken[0])
            raise where.error(
                f"expected a stack of {k} frames that continues the one before, got other frames",
                field=field,
                row=row,
                hint="Check the number of frames; without next observations the last one of an episode is a repetition",
            )
    first_stacks = leaf[starts]
    leads = np.stack([part(first_stacks, slot, slot + 1) for slot in range(k - 1)], axis=1)
    return StackedFrames(frames, leads, starts, channels_first=channels_first)
