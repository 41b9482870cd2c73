"""Buffers that are collected into, and their mixture with logged data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO, Literal, NoReturn, Protocol

import numpy as np
from d3rlpy.dataset import (
    BufferProtocol,
    DatasetInfo,
    Episode,
    EpisodeBase,
    MixedReplayBuffer,
    PartialTrajectory,
    ReplayBufferBase,
    Signature,
    TrajectoryMiniBatch,
    TrajectorySlicerProtocol,
    Transition,
    TransitionMiniBatch,
    TransitionPickerProtocol,
)
from d3rlpy.types import NDArray, Observation

from cql_plugins.d3rlpy.batches import ReturnsSettings, ReturnsToGoMiniBatch, join_batches, with_lookup
from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer
from cql_plugins.d3rlpy.episodes import CompleteTransitionPicker, map_leaves


class EnvironmentRecord(Protocol):
    """What the online buffer asks of the environment: d3rlpy's loop does not hand it on."""

    @property
    def last_observation(self) -> Observation:
        """What the last step returned, before any reset."""

    @property
    def last_truncated(self) -> bool:
        """Whether the last step was truncated."""


@dataclasses.dataclass(eq=False)
class _EpisodeRecord:
    """An ended episode of a d3rlpy buffer and its returns.

    Attributes:
        episode: d3rlpy's episode; kept, so that its identity is not given to another.
        cut: Whether it was broken off rather than ended: its returns stay unknown.
        padded: Whether its last row is one that was added to reach the observation after the last action.
    """

    episode: EpisodeBase
    cut: bool = False
    padded: bool = False
    settings: ReturnsSettings | None = None
    returns: NDArray | None = None

    def returns_to_go(self, settings: ReturnsSettings) -> NDArray:
        """Get the returns of its transitions; summed once for each settings."""
        if self.returns is None or not settings.is_same(self.settings):
            self.settings, self.returns = settings, self._sum(settings)
        return self.returns

    def _sum(self, settings: ReturnsSettings) -> NDArray:
        rewards = np.asarray(self.episode.rewards)[:, 0]
        terminated = self.episode.terminated
        if self.cut:
            return np.full(len(rewards), -np.inf, dtype=np.float32)
        # The row whose observation is the last one known has no transition; its reward counts only where nothing follows.
        ends_early = not terminated and (self.padded or settings.tail == "bootstrap")
        n_steps = len(rewards) - ends_early
        last = np.zeros(n_steps, dtype=np.bool_)
        last[-1] = True
        return settings.sum(
            settings.scale(rewards[:n_steps]),
            last & terminated,
            last & (not terminated),
            lambda: map_leaves(lambda leaf: leaf[n_steps : n_steps + 1], self.episode.observations),
        )


class ReturnsToGoReplayBuffer(ReplayBufferBase):
    """A d3rlpy buffer with returns-to-go that are right online: a running episode has none until it ends.

    Wraps any buffer of d3rlpy, empty or full, whatever its ``write_at_termination``; storing stays the wrapped one's.
    Where it knows the environment (``fit_online`` tells it) the last transition of a truncated episode is kept, and an episode
    that is merely broken off at the end of training is told from one that was truncated. An episode of one step, which
    d3rlpy's writer would join to the next one, is stored as one.

    Args:
        inner: The buffer that stores.
    """

    def __init__(self, inner: ReplayBufferBase) -> None:
        self.inner = inner
        self.environment: EnvironmentRecord | None = None
        picker = inner.transition_picker
        self._picker = picker if isinstance(picker, CompleteTransitionPicker) else CompleteTransitionPicker(picker)
        self._pending: tuple[Observation, int | NDArray, float | NDArray] | None = None
        self._n_written = 0
        self._last_action: int | NDArray = 0
        self._smallest_reward = min((float(np.min(e.rewards)) for e in inner.episodes), default=np.inf)
        self._records: dict[int, _EpisodeRecord] = {}
        self._last_ended = self._newest_episode()

    # Storing ---------------------------------------------------------------------------------------------------------

    def append(self, observation: Observation, action: int | NDArray, reward: float | NDArray) -> None:
        """Store one step.

        Args:
            observation: Before the action.
            action: In the environment's units.
            reward: After it.
        """
        self._smallest_reward = min(self._smallest_reward, float(np.min(reward)))
        self._last_action = action
        if self._pending is None and self._n_written == 0:
            self._pending = (observation, action, reward)  # Whether its episode has a second step is not known yet.
        else:
            self._write_pending()
            self.inner.append(observation, action, reward)
            self._n_written += 1

    def _write_pending(self) -> None:
        if self._pending is not None:
            self.inner.append(*self._pending)
            self._pending, self._n_written = None, 1

    def clip_episode(self, terminated: bool) -> None:
        """End the running episode.

        Args:
            terminated: Whether it ended for good; else it was truncated, or broken off where the environment says so.
        """
        cut = padded = False
        if terminated:
            if self._pending is not None:
                self.inner.append_episode(self._episode_of_one_step(*self._pending))
            elif self._n_written:
                self.inner.clip_episode(True)
        elif self.environment is not None and (self._pending is not None or self._n_written):
            # One step more, so that d3rlpy reaches the observation after the last action.
            cut, padded = not self.environment.last_truncated, True
            self._write_pending()
            self.inner.append(self.environment.last_observation, self._last_action, 0.0)
            self.inner.clip_episode(False)
        elif self._n_written:
            self.inner.clip_episode(False)
        self._pending, self._n_written = None, 0
        newest = self._newest_episode()
        if newest is not None and newest is not self._last_ended:
            self._last_ended = newest
            self._records[id(newest)] = _EpisodeRecord(newest, cut, padded)
            self._forget_what_was_dropped()

    def _episode_of_one_step(self, observation: Observation, action: int | NDArray, reward: float | NDArray) -> Episode:
        info = self.inner.dataset_info

        def row(value: Any, signature: Signature) -> NDArray:
            return np.asarray(value, dtype=signature.dtype[0]).reshape(1, *(signature.shape[0] or (1,)))

        return Episode(
            map_leaves(
                lambda leaf: leaf[None], observation if isinstance(observation, (list, tuple)) else np.asarray(observation)
            ),
            row(action, info.action_signature),
            row(reward, info.reward_signature),
            terminated=True,
        )

    def append_episode(self, episode: EpisodeBase) -> None:
        """Store an episode that has ended.

        Args:
            episode: The episode.
        """
        self._smallest_reward = min(self._smallest_reward, float(np.min(episode.rewards)))
        self.inner.append_episode(episode)
        self._last_ended = self._newest_episode()

    def has_final_observation(self, episode: EpisodeBase) -> bool:
        """Tell whether the last row of a truncated episode was added for the observation after its last action.

        Args:
            episode: One of ``episodes``.
        """
        record = self._records.get(id(episode))
        return record is not None and record.padded

    def _newest_episode(self) -> EpisodeBase | None:
        episodes = self.inner.episodes
        return episodes[-1] if len(episodes) else None

    def _forget_what_was_dropped(self) -> None:
        """Drop the records of episodes that a FIFO buffer has dropped, now and then."""
        if len(self._records) > 2 * len(self.inner.episodes) + 16:
            kept = {id(episode) for episode in self.inner.episodes}
            self._records = {key: record for key, record in self._records.items() if key in kept}

    # Sampling --------------------------------------------------------------------------------------------------------

    def sample_transition(self) -> Transition:
        """Sample one transition."""
        return self._picker(*self.inner.buffer[int(np.random.randint(self.transition_count))])  # noqa: NPY002

    def sample_transition_batch(self, batch_size: int) -> ReturnsToGoMiniBatch:
        """Sample uniformly, as d3rlpy does.

        Args:
            batch_size: Number of transitions.
        """
        stored = self.inner.buffer
        pairs = [stored[int(row)] for row in np.random.randint(self.transition_count, size=batch_size)]  # noqa: NPY002
        batch = TransitionMiniBatch.from_transitions([self._picker(episode, index) for episode, index in pairs])
        return with_lookup(batch, partial(self._look_up, pairs))

    def _look_up(self, pairs: Sequence[tuple[EpisodeBase, int]], settings: ReturnsSettings) -> NDArray:
        if settings.tail == "sparse" and settings.failure_reward is None:
            smallest = float(settings.scale(np.array([self._smallest_reward]))[0])
            settings = dataclasses.replace(settings, failure_reward=smallest)
        newest = self._newest_episode()
        running = newest if self._n_written and newest is not self._last_ended else None
        returns = np.full(len(pairs), -np.inf, dtype=np.float32)
        for i, (episode, index) in enumerate(pairs):
            if episode is not running:
                record = self._records.setdefault(id(episode), _EpisodeRecord(episode))
                returns[i] = record.returns_to_go(settings)[index]
        return returns

    def sample_trajectory(self, length: int) -> PartialTrajectory:
        """Sample a partial trajectory, as d3rlpy does."""
        return self.inner.sample_trajectory(length)

    def sample_trajectory_batch(self, batch_size: int, length: int) -> TrajectoryMiniBatch:
        """Sample partial trajectories, as d3rlpy does."""
        return self.inner.sample_trajectory_batch(batch_size, length)

    # What d3rlpy asks of a buffer ------------------------------------------------------------------------------------

    def dump(self, f: BinaryIO) -> None:
        """Write the episodes as d3rlpy does."""
        self.inner.dump(f)

    @classmethod
    def from_episode_generator(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: build d3rlpy's buffer, then wrap it."""
        raise NotImplementedError("Build d3rlpy's ReplayBuffer and wrap it: ReturnsToGoReplayBuffer(buffer).")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: load d3rlpy's buffer, then wrap it."""
        raise NotImplementedError("Load d3rlpy's ReplayBuffer and wrap it: ReturnsToGoReplayBuffer(buffer).")

    @property
    def episodes(self) -> Sequence[EpisodeBase]:
        """The episodes."""
        return self.inner.episodes

    def size(self) -> int:
        """Number of episodes."""
        return self.inner.size()

    @property
    def buffer(self) -> BufferProtocol:
        """d3rlpy's storage."""
        return self.inner.buffer

    @property
    def transition_count(self) -> int:
        """Number of transitions."""
        return self.inner.transition_count

    @property
    def transition_picker(self) -> TransitionPickerProtocol:
        """The picker."""
        return self._picker

    @property
    def trajectory_slicer(self) -> TrajectorySlicerProtocol:
        """The slicer."""
        return self.inner.trajectory_slicer

    @property
    def dataset_info(self) -> DatasetInfo:
        """Signatures, kind and size of the actions."""
        return self.inner.dataset_info


class OfflineOnlineReplayBuffer(MixedReplayBuffer):
    """Batches of which a stated share is offline data.

    Args:
        online: The buffer that is collected into.
        offline: The logged data.
        offline_fraction: Share of each batch that comes from ``offline``, in ``[0, 1]``, rounded to whole transitions; or
            ``"proportional"`` to the sizes. While nothing is collected, the whole batch is offline data.
    """

    def __init__(
        self,
        online: ReplayBufferBase,
        offline: ReplayBufferBase,
        offline_fraction: float | Literal["proportional"] = 0.5,
    ) -> None:
        self.offline_fraction = offline_fraction
        self.online, self.offline = with_returns_to_go(online), with_returns_to_go(offline)
        super().__init__(self.online, self.offline, 0.5 if offline_fraction == "proportional" else offline_fraction)

    def _n_offline(self, batch_size: int) -> int:
        n_online, n_offline = self.online.transition_count, self.offline.transition_count
        if n_online == 0:
            return batch_size
        fraction = self.offline_fraction
        return round(batch_size * (n_offline / (n_offline + n_online) if fraction == "proportional" else fraction))

    def sample_transition(self) -> Transition:
        """Sample one transition from either, in their shares."""
        is_offline = np.random.random() * 1e6 < self._n_offline(1_000_000)  # noqa: NPY002
        return (self.offline if is_offline else self.online).sample_transition()

    def sample_transition_batch(self, batch_size: int) -> ReturnsToGoMiniBatch:
        """Sample from both, online transitions first.

        Args:
            batch_size: Number of transitions in all.
        """
        n_offline = self._n_offline(batch_size)
        parts = [
            source.sample_transition_batch(count)
            for source, count in ((self.online, batch_size - n_offline), (self.offline, n_offline))
            if count
        ]
        return parts[0] if len(parts) == 1 else join_batches(parts)  # type: ignore[return-value, arg-type]


def with_returns_to_go(buffer: ReplayBufferBase) -> ReplayBufferBase:
    """Give a d3rlpy buffer returns-to-go.

    Args:
        buffer: Any; ours have them already, a ``MixedReplayBuffer`` gets them for both its parts.

    Returns:
        A buffer whose batches are :class:`ReturnsToGoMiniBatch`.
    """
    if isinstance(buffer, (OfflineReplayBuffer, ReturnsToGoReplayBuffer, OfflineOnlineReplayBuffer)):
        return buffer
    if isinstance(buffer, MixedReplayBuffer):
        return OfflineOnlineReplayBuffer(
            buffer.primary_replay_buffer, buffer.secondary_replay_buffer, buffer._secondary_mix_ratio
        )
    return ReturnsToGoReplayBuffer(buffer)
