"""SB3 replay buffers over logged data that is used where it lies: in memory, in a file, or as single frames to stack.

SB3 keeps each observation twice, as the one before a step and the one after another. Here both are gathered from one array with
``T + 1`` observations per episode when a batch is drawn. The arrays of the buffers stand for SB3's own, index by index, so that
SB3's sampling code, and with it n-step returns and returns-to-go, run on them as they are.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer


class SharedObservations:
    """Stands for SB3's array of observations, shape ``(n, 1, *observation)``; read-only, rows are copied when asked for.

    Args:
        leaf: ``n + e`` rows, ``T + 1`` for each of ``e`` episodes. Only ``shape``, ``dtype`` and ``leaf[rows]`` are asked for.
        offsets: ``e + 1`` rows: episode ``i`` has the transitions ``offsets[i]:offsets[i + 1]``.
        shape: Shape of one observation; where it is the leaf's with the last axis first, images are transposed.
        dtype: What rows are cast to.
        shift: 0 for the observations before the steps, 1 for those after them.
    """

    def __init__(self, leaf: Any, offsets: NDArray[np.int64], shape: tuple[int, ...], dtype: Any, shift: int) -> None:
        self._leaf, self._offsets, self._shift = leaf, offsets, shift
        self._transposed = len(leaf.shape) == 4 and tuple(leaf.shape[1:]) != tuple(shape)
        self.shape = (int(offsets[-1]), 1, *shape)
        self.dtype = np.dtype(dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its own: none, the rows are someone else's."""
        return 0

    def __len__(self) -> int:
        """Count the transitions."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Copy rows, by any index that SB3's array would take, rows first."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        chosen = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if chosen.dtype == np.bool_:
            chosen = np.flatnonzero(chosen)
        block = self._gather(chosen.reshape(-1))
        if not rest:
            return block.reshape(*chosen.shape, 1, *self.shape[2:])
        if chosen.ndim == 1 and isinstance(rest[0], np.ndarray) and not rest[0].any():
            return block[(slice(None), *rest[1:])]  # SB3's sampler: the one environment of each row
        local: Any = slice(None) if isinstance(rows, slice) else np.arange(len(block)).reshape(chosen.shape)
        return block[:, None][(local if chosen.ndim else 0, *rest)]

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        """Refuse: the data is fixed."""
        raise ValueError("assignment destination is read-only: this buffer shares its observations with a dataset")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Make the array this stands for."""
        return np.asarray(self[:], dtype=dtype)

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Get the observations of transitions ``rows``, shape ``(len(rows), *observation)``."""
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows must be in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        episodes = np.searchsorted(self._offsets, rows, side="right") - 1
        block = np.asarray(self._leaf[rows + episodes + self._shift])
        if self._transposed:
            block = np.array(np.moveaxis(block, 3, 1), order="C")  # a copy also where there is one channel: torch sees strides
        # Discrete observations are kept with a trailing axis of one.
        return block.astype(self.dtype, copy=False).reshape(len(rows), *self.shape[2:])


class SharedReplayMixin(ReplayBuffer):
    """Gives the SB3 replay buffer class that follows it in the bases the observations of a dataset. One environment, read-only.

    Args:
        buffer_size: Number of transitions ``n``.
        observation_space: The model's.
        action_space: The model's.
        shared_observations: ``n + e`` rows, ``T + 1`` for each of ``e`` episodes; array-likes, or a dict of them.
        offsets: ``e + 1`` rows: episode ``i`` has the transitions ``offsets[i]:offsets[i + 1]``.
        **kwargs: See SB3.

    Raises:
        ValueError: If lengths disagree.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        shared_observations: Any,
        offsets: NDArray[np.int64],
        **kwargs: Any,
    ) -> None:
        # With one row, since SB3 takes memory for all of them.
        super().__init__(1, observation_space, action_space, **kwargs)
        leaves = shared_observations.values() if isinstance(shared_observations, dict) else [shared_observations]
        n_rows = buffer_size + len(offsets) - 1
        for leaf in leaves:
            if len(leaf) != n_rows or int(offsets[-1]) != buffer_size or self.n_envs != 1:
                raise ValueError(
                    f"shared_observations must have one row more than steps in each episode, {buffer_size} + "
                    f"{len(offsets) - 1} rows, of one environment; got {len(leaf)} rows, offsets up to {offsets[-1]}, "
                    f"{self.n_envs} environment(s)."
                )
        self.buffer_size = buffer_size
        self.actions = np.zeros((buffer_size, *self.actions.shape[1:]), dtype=self.actions.dtype)
        self.rewards, self.dones, self.timeouts = (np.zeros((buffer_size, 1), dtype=np.float32) for _ in range(3))
        self.observations: Any = self._sharing(shared_observations, offsets, 0)
        self.next_observations: Any = self._sharing(shared_observations, offsets, 1)

    def _sharing(self, leaves: Any, offsets: NDArray[np.int64], shift: int) -> Any:
        if isinstance(leaves, dict):
            shapes: Any = self.obs_shape
            assert isinstance(self.observation_space, spaces.Dict)
            return {
                key: SharedObservations(leaves[key], offsets, shapes[key], subspace.dtype, shift)
                for key, subspace in self.observation_space.items()
            }
        return SharedObservations(leaves, offsets, self.obs_shape, self.observation_space.dtype, shift)

    def add(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the data is fixed."""
        self._refuse_to_change()

    def reset(self) -> NoReturn:
        """Refuse: the data is fixed."""
        self._refuse_to_change()

    def _refuse_to_change(self) -> NoReturn:
        raise NotImplementedError(
            "This buffer shares its observations with a dataset and does not grow. Collect into a buffer of its own, as "
            "learn() does; batches are mixed by offline_fraction. To get one that grows: to_sb3(dataset, model, share=False)."
        )


class SharedReplayBuffer(SharedReplayMixin, ReplayBuffer):
    """SB3's ``ReplayBuffer`` over a dataset's own observations."""


class SharedDictReplayBuffer(SharedReplayMixin, DictReplayBuffer):
    """SB3's ``DictReplayBuffer`` over a dataset's own observations."""


class SharedNStepReplayBuffer(SharedReplayMixin, NStepReplayBuffer):
    """SB3's ``NStepReplayBuffer`` over a dataset's own observations."""


def shared_buffer_class(base: type[ReplayBuffer]) -> type[SharedReplayMixin]:
    """Get the class that shares observations in the place of one of SB3's.

    Args:
        base: ``ReplayBuffer``, ``DictReplayBuffer`` or ``NStepReplayBuffer``.

    Raises:
        TypeError: If it is another.
    """
    found: dict[type[ReplayBuffer], type[SharedReplayMixin]] = {
        ReplayBuffer: SharedReplayBuffer,
        DictReplayBuffer: SharedDictReplayBuffer,
        NStepReplayBuffer: SharedNStepReplayBuffer,
    }
    if base not in found:
        raise TypeError(f"expected one of {[each.__name__ for each in found]}, got {base.__name__}.")
    return found[base]
