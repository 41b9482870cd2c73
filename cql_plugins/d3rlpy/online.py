"""Buffers that are collected into, and their mixture with logged data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO, Literal, NoReturn, Protocol

import numpy as np
from d3rlpy.dataset import (
    BasicWriterPreprocess,
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
from d3rlpy.dataset.io import dump as dump_episodes
from d3rlpy.preprocessing import RewardScaler
from d3rlpy.types import NDArray, Observation

from cql_plugins.d3rlpy.batches import ReturnsSettings, ReturnsToGoMiniBatch, join_batches, with_lookup
from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer
from cql_plugins.d3rlpy.episodes import (
    CompleteEpisode,
    CompleteTransitionPicker,
    EpisodeEnd,
    as_complete,
    end_of,
    has_final_observation,
    map_leaves,
    mark_end,
)


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
    """An ended episode and its returns.

    Attributes:
        episode: The episode; kept, so that its identity is not given to another.
        picker: The buffer's picker, through which the final observation is seen as the algorithm sees it.
    """

    episode: EpisodeBase
    picker: CompleteTransitionPicker
    settings: ReturnsSettings | None = None
    returns: NDArray | None = None

    def returns_to_go(self, settings: ReturnsSettings) -> NDArray:
        """Get the returns of its transitions; summed once for each settings."""
        if self.returns is None or not settings.is_same(self.settings):
            self.settings, self.returns = settings, self._sum(settings)
        return self.returns

    def _sum(self, settings: ReturnsSettings) -> NDArray:
        episode = self.episode
        rewards = real_rewards(episode)
        if end_of(episode).cut:
            return np.full(len(rewards), -np.inf, dtype=np.float32)
        # Where the observation after the last step is not known, that step has no transition, and no value follows it.
        known = bool(episode.terminated) or has_final_observation(episode) or settings.tail != "bootstrap"
        n_steps = len(rewards) if known else len(rewards) - 1
        last = np.zeros(n_steps, dtype=np.bool_)
        last[-1] = True
        return settings.sum(
            settings.scale(rewards[:n_steps]),
            last & episode.terminated,
            last & (not episode.terminated),
            lambda: _row(self.picker(episode, n_steps - 1).next_observation),
        )


def real_rewards(episode: EpisodeBase) -> NDArray:
    """The rewards of an episode's steps, shape ``(T,)``, without that of a row that was added.

    Args:
        episode: Any.
    """
    rewards = np.asarray(episode.rewards)[:, 0]
    return rewards[:-1] if end_of(episode).padded else rewards


def _row(observation: Observation) -> Any:
    """A batch of one."""
    return map_leaves(lambda leaf: np.asarray(leaf)[None], observation)


class NewestFrameWriterPreprocess(BasicWriterPreprocess):
    """Stores the newest frame of a stack, as d3rlpy's ``LastFrameWriterPreprocess`` does where a frame has one channel.

    Args:
        n_channels: Channels of one frame, for each array of an observation.
    """

    def __init__(self, n_channels: Sequence[int]) -> None:
        self._n_channels = tuple(n_channels)

    def process_observation(self, observation: Observation) -> Observation:
        """Take the newest frame.

        Args:
            observation: Stacked frames, the newest last.
        """
        if isinstance(observation, np.ndarray):
            return observation[-self._n_channels[0] :]
        return [leaf[-n:] for leaf, n in zip(observation, self._n_channels, strict=True)]


class ReturnsToGoReplayBuffer(ReplayBufferBase):
    """A d3rlpy buffer with returns-to-go that are right online: a running episode has none until it ends.

    Wraps a ``ReplayBuffer`` of d3rlpy, empty or full, whatever its ``write_at_termination``; storing stays the wrapped one's.
    Where it knows the environment (``fit_online`` tells it) the last transition of a truncated episode is kept, terminal
    steps have their real next observation, and an episode that is merely broken off at the end of training is told from one
    that was truncated. An episode of one step, which d3rlpy's writer would join to the next one, is stored as one.

    Args:
        inner: The buffer that stores.

    Raises:
        TypeError: If it is a mixture of buffers.
    """

    def __init__(self, inner: ReplayBufferBase) -> None:
        if isinstance(inner, (MixedReplayBuffer, OfflineReplayBuffer, ReturnsToGoReplayBuffer)):
            raise TypeError(
                f"inner must be a ReplayBuffer of d3rlpy's; got {type(inner).__name__}. Use with_returns_to_go(buffer)."
            )
        self.inner = inner
        self.environment: EnvironmentRecord | None = None
        picker = inner.transition_picker
        self._picker = picker if isinstance(picker, CompleteTransitionPicker) else CompleteTransitionPicker(picker)
        self._pending: tuple[Observation, int | NDArray, float | NDArray] | None = None
        self._n_written = 0
        self._last_action: int | NDArray = 0
        self._records: dict[int, _EpisodeRecord] = {}
        self._reward_range = (np.inf, -np.inf)
        for episode in inner.episodes:
            self._see_rewards(real_rewards(episode))

    # Storing ---------------------------------------------------------------------------------------------------------

    def append(self, observation: Observation, action: int | NDArray, reward: float | NDArray) -> None:
        """Store one step.

        Args:
            observation: Before the action.
            action: In the environment's units.
            reward: After it.
        """
        self._see_rewards(reward)
        self._last_action = action
        if not self.has_running_episode:
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
        """End the running episode; nothing happens where none runs.

        Args:
            terminated: Whether it ended for good; else it was truncated, or broken off where the environment says so.
        """
        episode: EpisodeBase | None = self._running_episode
        end, known = EpisodeEnd(), self.environment
        if not self.has_running_episode:
            return
        if terminated:
            end = EpisodeEnd(final_observation=None if known is None else self._as_stored(known.last_observation))
            if self._pending is not None:
                self.inner.append_episode(self._episode_of_one_step(*self._pending, end.final_observation))
                episode = None
        elif known is not None:
            # One step more, where d3rlpy has room for it, so that it reaches the observation after the last action.
            fits = self._n_written < getattr(self._writer, "_cache_size", np.inf)
            end = EpisodeEnd(cut=not known.last_truncated, padded=fits)
            if fits:
                self._write_pending()
                self.inner.append(known.last_observation, self._last_action, 0.0)
        if self._pending is None:
            self.inner.clip_episode(terminated)
            if episode is not None:
                mark_end(episode, end)
        self._pending, self._n_written = None, 0
        self._forget_what_was_dropped()

    def broken_off(self) -> Episode | None:
        """The running episode as :meth:`clip_episode` would store it if it were broken off now; the buffer stays as it is.

        Returns:
            The episode, marked as broken off; ``None`` where nothing of it would be stored.
        """
        if self._pending is not None:
            episode: Any = self._episode_of_one_step(*self._pending, None)
        elif self._n_written > 0 and self._running_episode is not None:
            episode = self._running_episode.to_episode(False)
        else:
            return None
        known = self.environment
        padded = known is not None and len(episode.rewards) < getattr(self._writer, "_cache_size", np.inf)
        observations, actions, rewards = episode.observations, episode.actions, episode.rewards
        if padded and known is not None:
            last = self._as_stored(known.last_observation)
            observations = (
                np.concatenate([observations, last[None]])
                if isinstance(observations, np.ndarray)
                else [np.concatenate([leaf, end[None]]) for leaf, end in zip(observations, last, strict=True)]
            )
            actions, rewards = np.concatenate([actions, actions[-1:]]), np.concatenate([rewards, np.zeros_like(rewards[-1:])])
        elif len(rewards) < 2:
            return None
        broken = Episode(observations, actions, rewards, terminated=False)
        mark_end(broken, EpisodeEnd(cut=True, padded=padded))
        return broken

    @property
    def _writer(self) -> Any:
        """d3rlpy's writer, which alone knows the running episode; ``None`` in a buffer that is not d3rlpy's."""
        return getattr(self.inner, "_writer", None)

    @property
    def _running_episode(self) -> Any:
        return getattr(self._writer, "_active_episode", None)

    @property
    def has_running_episode(self) -> bool:
        """Whether an episode has begun and not ended."""
        return self._pending is not None or self._n_written > 0

    def _as_stored(self, observation: Observation) -> Any:
        """An observation as d3rlpy's writer would store it."""
        processed = observation if self._writer is None else self._writer._preprocessor.process_observation(observation)
        dtypes = self.inner.dataset_info.observation_signature.dtype
        if isinstance(processed, (list, tuple)):
            return [np.asarray(leaf, dtype=dtype) for leaf, dtype in zip(processed, dtypes, strict=True)]
        return np.asarray(processed, dtype=dtypes[0])

    def _episode_of_one_step(
        self, observation: Observation, action: int | NDArray, reward: float | NDArray, final_observation: Any
    ) -> EpisodeBase:
        info = self.inner.dataset_info

        def row(value: Any, signature: Signature) -> NDArray:
            return np.asarray(value, dtype=signature.dtype[0]).reshape(1, *(signature.shape[0] or (1,)))

        episode = Episode(
            _row(self._as_stored(observation)),
            row(action, info.action_signature),
            row(reward, info.reward_signature),
            terminated=True,
        )
        if final_observation is None:
            return episode
        both = (
            [np.stack(pair) for pair in zip(self._as_stored(observation), final_observation, strict=True)]
            if isinstance(final_observation, list)
            else np.stack([self._as_stored(observation), final_observation])
        )
        return CompleteEpisode(both, episode.actions, episode.rewards, terminated=True)

    def append_episode(self, episode: EpisodeBase) -> None:
        """Store an episode that has ended.

        Args:
            episode: The episode.
        """
        self._see_rewards(real_rewards(episode))
        self.inner.append_episode(episode)

    def _see_rewards(self, rewards: float | NDArray) -> None:
        low, high = self._reward_range
        self._reward_range = (min(low, float(np.min(rewards))), max(high, float(np.max(rewards))))

    def smallest_reward(self, reward_scaler: RewardScaler | None) -> float:
        """Get the smallest scaled reward so far: the failure reward of the ``sparse`` tail.

        Args:
            reward_scaler: The algorithm's; it must be monotone, as all of d3rlpy's are.
        """
        return float(ReturnsSettings(1.0, reward_scaler=reward_scaler).scale(np.array(self._reward_range)).min())

    def _forget_what_was_dropped(self) -> None:
        """Drop the records of episodes that a FIFO buffer has dropped, now and then."""
        if len(self._records) > len(self.inner.episodes) + 16:
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
        return with_lookup(batch, partial(self._look_up, pairs), partial(self._place_of, pairs))

    def _place_of(self, pairs: Sequence[tuple[EpisodeBase, int]], i: int) -> str:
        episode, step = pairs[i]
        number = next((n for n, own in enumerate(self.inner.episodes) if own is episode), None)
        return f"step {step} of " + ("the running episode" if number is None else f"episode {number} of this buffer")

    def _look_up(self, pairs: Sequence[tuple[EpisodeBase, int]], settings: ReturnsSettings) -> NDArray:
        if settings.tail == "sparse" and settings.failure_reward is None:
            settings = dataclasses.replace(settings, failure_reward=self.smallest_reward(settings.reward_scaler))
        running = self._running_episode
        returns = np.full(len(pairs), -np.inf, dtype=np.float32)
        for i, (episode, index) in enumerate(pairs):
            if episode is not running:
                record = self._records.setdefault(id(episode), _EpisodeRecord(episode, self._picker))
                returns[i] = record.returns_to_go(settings)[index]
        return returns

    def set_returns(self, episode: EpisodeBase, settings: ReturnsSettings, returns: NDArray) -> None:
        """Say what the returns-to-go of an episode are, where a checkpoint knows them.

        Args:
            episode: One of the buffer's.
            settings: How they were summed.
            returns: One for each transition.
        """
        self._records[id(episode)] = _EpisodeRecord(episode, self._picker, settings, returns)

    def sample_trajectory(self, length: int) -> PartialTrajectory:
        """Sample a partial trajectory, as d3rlpy does."""
        return self.inner.sample_trajectory(length)

    def sample_trajectory_batch(self, batch_size: int, length: int) -> TrajectoryMiniBatch:
        """Sample partial trajectories, as d3rlpy does."""
        return self.inner.sample_trajectory_batch(batch_size, length)

    # What d3rlpy asks of a buffer ------------------------------------------------------------------------------------

    def dump(self, f: BinaryIO) -> None:
        """Write the episodes, each with the observation after its last step, as :class:`CompleteEpisode`.

        They are read back as in :meth:`OfflineReplayBuffer.dump`. The wrapped buffer's own ``dump`` does not say how episodes
        ended.

        Args:
            f: File, open for binary reading and writing.
        """
        ended = [episode for episode in self.inner.episodes if episode is not self._running_episode]
        dump_episodes([as_complete(episode) for episode in ended], f)

    @classmethod
    def from_episode_generator(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: build d3rlpy's buffer, then wrap it."""
        raise NotImplementedError("Build d3rlpy's ReplayBuffer and wrap it: ReturnsToGoReplayBuffer(buffer).")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: read the episodes into d3rlpy's buffer, see :meth:`OfflineReplayBuffer.dump`, then wrap it."""
        raise NotImplementedError(
            "Read the episodes into d3rlpy's ReplayBuffer, as the docstring of OfflineReplayBuffer.dump shows, and wrap it: "
            "ReturnsToGoReplayBuffer(buffer)."
        )

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
