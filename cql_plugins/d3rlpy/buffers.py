"""The buffer of logged data: read-only, gathered at once, returns-to-go summed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, BinaryIO, NoReturn

import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import (
    BasicTrajectorySlicer,
    BufferProtocol,
    DatasetInfo,
    EpisodeBase,
    PartialTrajectory,
    ReplayBufferBase,
    Signature,
    TrajectoryMiniBatch,
    TrajectorySlicerProtocol,
    Transition,
    TransitionMiniBatch,
    TransitionPickerProtocol,
)
from d3rlpy.dataset.io import dump as dump_episodes
from d3rlpy.dataset.utils import stack_observations
from d3rlpy.preprocessing import RewardScaler
from d3rlpy.types import NDArray, Observation, ObservationSequence

from cql_plugins.d3rlpy.batches import LazyTransitions, ReturnsSettings, ReturnsToGoMiniBatch, with_lookup
from cql_plugins.d3rlpy.episodes import CompleteEpisode, CompleteTransitionPicker, map_leaves


class _EpisodeRows(BufferProtocol):
    """d3rlpy's view of the transitions: row to (episode, index)."""

    def __init__(self, owner: OfflineReplayBuffer) -> None:
        self._owner = owner

    def append(self, episode: EpisodeBase, index: int) -> NoReturn:
        self._owner._refuse_to_grow()

    @property
    def episodes(self) -> Sequence[EpisodeBase]:
        return self._owner.episodes

    @property
    def transition_count(self) -> int:
        return self._owner.transition_count

    def __len__(self) -> int:
        return self._owner.transition_count

    def __getitem__(self, index: int) -> tuple[EpisodeBase, int]:
        row = range(self._owner.transition_count)[index]
        episode = int(self._owner._episode_of_row[row])
        return self._owner.episodes[episode], row - int(self._owner.offsets[episode])


class OfflineReplayBuffer(ReplayBufferBase):
    """Logged episodes for d3rlpy: no transition lost, batches gathered at once, returns-to-go summed once. Read-only.

    Made by :func:`cql_plugins.adapters.to_d3rlpy`. With ``n`` transitions in ``e`` episodes the observations have ``n + e``
    rows, ``T + 1`` for each episode; the arrays are used as they are, not copied.

    Args:
        observations: ``n + e`` rows; a list of arrays for tuple observations.
        actions: Shape ``(n, A)`` in the environment's units, or ``(n, 1)`` integers from 0 on.
        rewards: Shape ``(n,)``.
        terminations: Shape ``(n,)``; whether the row ended its episode for good. Every other end is a truncation.
        offsets: ``e + 1`` rows: episode ``i`` has the transitions ``offsets[i]:offsets[i + 1]``.
        discrete: Whether actions are discrete, as the space says.
        action_size: Dimension of continuous actions, number of discrete ones.
        action_bounds: Smallest and largest continuous action, each of shape ``(A,)``, where known.
        transition_picker: d3rlpy's picker; with one that is not basic, batches are picked one by one as d3rlpy does.
        trajectory_slicer: d3rlpy's slicer, for its transformers.
    """

    def __init__(
        self,
        observations: ObservationSequence,
        actions: NDArray,
        rewards: NDArray,
        terminations: NDArray,
        offsets: NDArray,
        *,
        discrete: bool,
        action_size: int,
        action_bounds: tuple[NDArray, NDArray] | None = None,
        transition_picker: TransitionPickerProtocol | None = None,
        trajectory_slicer: TrajectorySlicerProtocol | None = None,
    ) -> None:
        n_steps, n_episodes = len(actions), len(offsets) - 1
        leaves = [observations] if isinstance(observations, np.ndarray) else list(observations)
        for leaf in leaves:
            if len(leaf) != n_steps + n_episodes:
                raise ValueError(
                    f"observations must have one row more than steps in each episode, {n_steps} + {n_episodes} rows; "
                    f"got {len(leaf)}."
                )
        self.offsets = np.asarray(offsets)
        self.action_bounds = action_bounds
        self._observations = observations if isinstance(observations, np.ndarray) else leaves
        self._actions = actions
        self._rewards = np.asarray(rewards, dtype=np.float32).reshape(-1, 1)
        self._terminations = np.asarray(terminations, dtype=np.bool_)
        self._ends = np.zeros(n_steps, dtype=np.bool_)
        self._ends[self.offsets[1:] - 1] = True
        self._episode_of_row = np.repeat(np.arange(n_episodes), np.diff(self.offsets))
        self._returns: tuple[ReturnsSettings, NDArray] | None = None
        self._picker = CompleteTransitionPicker(transition_picker)
        self._slicer = trajectory_slicer or BasicTrajectorySlicer()
        self._dataset_info = DatasetInfo(
            observation_signature=Signature([leaf.dtype for leaf in leaves], [leaf.shape[1:] for leaf in leaves]),
            action_signature=Signature([actions.dtype], [actions.shape[1:]]),
            reward_signature=Signature([self._rewards.dtype], [(1,)]),
            action_space=ActionSpace.DISCRETE if discrete else ActionSpace.CONTINUOUS,
            action_size=action_size,
        )

    # Sampling --------------------------------------------------------------------------------------------------------

    def transition(self, row: int) -> Transition:
        """Pick one transition.

        Args:
            row: Its row, episode after episode.
        """
        return self._picker(*self.buffer[row])

    def sample_transition(self) -> Transition:
        """Sample one transition."""
        return self.transition(int(np.random.randint(self.transition_count)))  # noqa: NPY002 (d3rlpy.seed seeds this one)

    def sample_transition_batch(self, batch_size: int) -> ReturnsToGoMiniBatch:
        """Sample uniformly, with the random numbers that d3rlpy would take.

        Args:
            batch_size: Number of transitions.
        """
        return self.transition_batch(np.random.randint(self.transition_count, size=batch_size))  # noqa: NPY002

    def transition_batch(self, rows: NDArray) -> ReturnsToGoMiniBatch:
        """Gather transitions by row, episode after episode.

        Args:
            rows: Integers, shape ``(B,)``.
        """
        lookup, place_of = partial(self._look_up, rows), partial(self._place_of, rows)
        if not self._picker.is_basic:
            picked = TransitionMiniBatch.from_transitions([self.transition(int(row)) for row in rows])
            return with_lookup(picked, lookup, place_of)
        observation_rows = rows + self._episode_of_row[rows]
        terminal = self._terminations[rows]
        # As d3rlpy has it: zero after a terminal step. What was done after a truncated one is not known.
        next_actions = self._actions[rows + 1 - self._ends[rows]].astype(np.float32)
        next_actions[terminal] = 0.0
        return ReturnsToGoMiniBatch(
            observations=map_leaves(lambda leaf: leaf[observation_rows].astype(np.float32, copy=False), self._observations),
            actions=self._actions[rows].astype(np.float32, copy=False),
            rewards=self._rewards[rows],
            next_observations=map_leaves(
                lambda leaf: leaf[observation_rows + 1].astype(np.float32, copy=False), self._observations
            ),
            next_actions=next_actions,
            terminals=terminal.astype(np.float32).reshape(-1, 1),
            intervals=np.ones((len(rows), 1), dtype=np.float32),
            transitions=LazyTransitions(self.transition, rows),
            lookup=lookup,
            place_of=place_of,
        )

    def _place_of(self, rows: NDArray, i: int) -> str:
        episode = int(self._episode_of_row[rows[i]])
        return f"row {int(rows[i])} (step {int(rows[i] - self.offsets[episode])} of episode {episode})"

    def sample_trajectory(self, length: int) -> PartialTrajectory:
        """Sample a partial trajectory, as d3rlpy does."""
        episode, index = self.buffer[int(np.random.randint(self.transition_count))]  # noqa: NPY002
        return self._slicer(episode, index, length)

    def sample_trajectory_batch(self, batch_size: int, length: int) -> TrajectoryMiniBatch:
        """Sample partial trajectories, as d3rlpy does."""
        return TrajectoryMiniBatch.from_partial_trajectories([self.sample_trajectory(length) for _ in range(batch_size)])

    # Returns ---------------------------------------------------------------------------------------------------------

    def returns_to_go(self, settings: ReturnsSettings) -> NDArray:
        """Get the returns-to-go of all transitions, shape ``(n,)``; summed once for each settings.

        Args:
            settings: How to sum.
        """
        if self._returns is None or not self._returns[0].is_same(settings):
            sums = settings.sum(
                settings.scale(self._rewards[:, 0]),
                self._terminations,
                self._ends & ~self._terminations,
                self._final_observations,
            )
            self._returns = (settings, sums)
        return self._returns[1]

    def smallest_reward(self, reward_scaler: RewardScaler | None) -> float:
        """Get the smallest scaled reward: the failure reward of the ``sparse`` tail.

        Args:
            reward_scaler: The algorithm's.
        """
        return float(ReturnsSettings(1.0, reward_scaler=reward_scaler).scale(self._rewards[:, 0]).min())

    def _look_up(self, rows: NDArray, settings: ReturnsSettings) -> NDArray:
        return self.returns_to_go(settings)[rows]

    def _final_observations(self) -> Any:
        """The observations after the truncated ends, in their order."""
        truncated = np.flatnonzero(self._ends & ~self._terminations)
        if not self._picker.is_basic:
            return stack_observations([self.transition(int(row)).next_observation for row in truncated])
        rows = truncated + self._episode_of_row[truncated] + 1
        return map_leaves(lambda leaf: leaf[rows], self._observations)

    # What d3rlpy asks of a buffer ------------------------------------------------------------------------------------

    def _refuse_to_grow(self) -> NoReturn:
        raise NotImplementedError(
            "This buffer holds logged data and does not grow. Collect into a buffer of its own, as fit_online does where none "
            "is given, or mix both: OfflineOnlineReplayBuffer(online_buffer, offline_buffer, offline_fraction)."
        )

    def append(self, observation: Observation, action: int | NDArray, reward: float | NDArray) -> NoReturn:
        """Refuse: the data is fixed."""
        self._refuse_to_grow()

    def append_episode(self, episode: EpisodeBase) -> NoReturn:
        """Refuse: the data is fixed."""
        self._refuse_to_grow()

    def clip_episode(self, terminated: bool) -> NoReturn:
        """Refuse: the data is fixed."""
        self._refuse_to_grow()

    def dump(self, f: BinaryIO) -> None:
        """Write the episodes as d3rlpy does, each with the observation after its last step.

        The file does not say what kind of actions it holds, nor how many there are. Whoever reads it back does; where it is
        left to ``d3rlpy.dataset.ReplayBuffer.load``, it guesses from the actions that are there::

            import d3rlpy
            from cql_plugins.d3rlpy import CompleteEpisode, CompleteTransitionPicker

            with open("data.h5", "rb") as f:
                episodes = d3rlpy.dataset.load(CompleteEpisode, f)
            buffer = d3rlpy.dataset.ReplayBuffer(
                d3rlpy.dataset.InfiniteBuffer(),
                episodes=episodes,
                transition_picker=CompleteTransitionPicker(),
                action_space=d3rlpy.ActionSpace.CONTINUOUS,
                action_size=6,
            )

        Args:
            f: File, open for binary reading and writing.
        """
        dump_episodes(self.episodes, f)

    @classmethod
    def from_episode_generator(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: d3rlpy's episodes lack their last observation."""
        raise NotImplementedError("Use cql_plugins.adapters.to_d3rlpy(dataset).")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: d3rlpy's file does not say what kind of actions it holds, see :meth:`dump`."""
        raise NotImplementedError(
            "The file does not say what kind of actions it holds, nor how many there are. Use d3rlpy.dataset.ReplayBuffer("
            "d3rlpy.dataset.InfiniteBuffer(), episodes=d3rlpy.dataset.load(CompleteEpisode, f), "
            "transition_picker=CompleteTransitionPicker(), action_space=..., action_size=...), with the action space and size "
            "of the dumped buffer's dataset_info, and CompleteEpisode and CompleteTransitionPicker from cql_plugins.d3rlpy."
        )

    @cached_property
    def episodes(self) -> Sequence[EpisodeBase]:
        """The episodes, views of the arrays."""
        found = []
        for i, (start, stop) in enumerate(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)):
            found.append(
                CompleteEpisode(
                    map_leaves(lambda leaf, rows=slice(start + i, stop + i + 1): leaf[rows], self._observations),  # type: ignore[misc]
                    self._actions[start:stop],
                    self._rewards[start:stop],
                    bool(self._terminations[stop - 1]),
                )
            )
        return found

    def size(self) -> int:
        """Number of episodes."""
        return len(self.offsets) - 1

    @property
    def buffer(self) -> BufferProtocol:
        """d3rlpy's view of the transitions."""
        return _EpisodeRows(self)

    @property
    def transition_count(self) -> int:
        """Number of transitions: all steps."""
        return len(self._actions)

    @property
    def transition_picker(self) -> TransitionPickerProtocol:
        """The picker."""
        return self._picker

    @property
    def trajectory_slicer(self) -> TrajectorySlicerProtocol:
        """The slicer."""
        return self._slicer

    @property
    def dataset_info(self) -> DatasetInfo:
        """Signatures, kind and size of the actions."""
        return self._dataset_info


def is_discrete(buffer: ReplayBufferBase) -> bool:
    """Tell whether a buffer's actions are discrete.

    Args:
        buffer: Any of d3rlpy's.
    """
    return buffer.dataset_info.action_space == ActionSpace.DISCRETE
