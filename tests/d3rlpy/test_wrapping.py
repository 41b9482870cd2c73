"""Buffers that are wrapped again, interrupted, dumped, or picked from in other ways than d3rlpy's basic one."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FIFOBuffer,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    LastFrameWriterPreprocess,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    SparseRewardTransitionPicker,
    create_fifo_replay_buffer,
)
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, from_d3rlpy, to_d3rlpy
from cql_plugins.d3rlpy import (
    CalQLConfig,
    CQLConfig,
    DiscreteCalQLConfig,
    DiscreteCQLConfig,
    ReturnsToGoReplayBuffer,
    with_returns_to_go,
)
from cql_plugins.d3rlpy.batches import ReturnsSettings, TailValues
from cql_plugins.d3rlpy.episodes import CompleteEpisode, CompleteTransitionPicker
from cql_plugins.d3rlpy.online import NewestFrameWriterPreprocess
from tests.d3rlpy.test_online import HALF, QUIET, Scripted, literal_pairs, offline, small

INFINITY = float("inf")
FAILING = [([-1.0] * 5, "truncated")]
SPARSE = ReturnsSettings(0.5, "sparse")


def returns_by_observation(buffer: Any, settings: ReturnsSettings) -> dict[int, float]:
    batch = with_returns_to_go(buffer).sample_transition_batch(300)
    return {int(o): float(g) for o, g in zip(batch.observations[:, 0], batch.returns_to_go(settings)[:, 0], strict=True)}


class TestWrappedAgain:
    """What is known of an episode's end must outlive the wrapper that saw it."""

    # Five failures, truncated: they never end. Then two steps more, broken off at the end of training.
    LITERALS: ClassVar[dict[int, float]] = {**dict.fromkeys(range(1, 6), -2.0), 7: -INFINITY, 8: -INFINITY}

    def collected(self) -> Any:
        env = Scripted(script=FAILING)
        raw = create_fifo_replay_buffer(100, env=env)
        small(CalQLConfig, return_tail="sparse").fit_online(
            env, raw, n_steps=7, n_steps_per_epoch=7, update_start_step=100, **QUIET
        )
        return raw

    def test_gives_the_same_returns(self) -> None:
        raw = self.collected()
        assert returns_by_observation(raw, SPARSE) == self.LITERALS
        assert returns_by_observation(MixedReplayBuffer(raw, raw, 0.5), SPARSE) == self.LITERALS

    def test_the_added_row_is_no_reward(self) -> None:
        scaler = d3rlpy.preprocessing.MultiplyRewardScaler(-1.0)
        wrapper = ReturnsToGoReplayBuffer(self.collected())
        assert wrapper.smallest_reward(None) == -1.0
        assert wrapper.smallest_reward(scaler) == 1.0, "of the scaled rewards"
        assert to_d3rlpy(from_d3rlpy(wrapper)).smallest_reward(scaler) == 1.0

    def test_nothing_is_lost_to_a_reader(self) -> None:
        data = from_d3rlpy(self.collected())  # warns of nothing
        assert data.episode_lengths.tolist() == [5, 2]
        assert data.observations[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]

    def test_through_a_file(self) -> None:
        file = io.BytesIO()
        with_returns_to_go(self.collected()).dump(file)
        loaded = ReplayBuffer.load(
            file, InfiniteBuffer(), episode_cls=CompleteEpisode, transition_picker=CompleteTransitionPicker()
        )
        assert loaded.transition_count == 7
        assert returns_by_observation(loaded, SPARSE) == self.LITERALS
        values = ReturnsSettings(0.5, "bootstrap", tail_values=TailValues(lambda observations: observations[:, 0]))
        assert returns_by_observation(loaded, values)[5] == -1 + 0.5 * 6

    def test_a_mixture_is_not_wrapped_whole(self) -> None:
        with pytest.raises(TypeError, match="with_returns_to_go"):
            ReturnsToGoReplayBuffer(MixedReplayBuffer(self.collected(), self.collected(), 0.5))

    def test_a_wrapped_buffer_as_offline_data_has_the_failure_reward(self) -> None:
        algo = small(CalQLConfig, return_tail="sparse")
        algo.set_offline_data(self.collected())
        assert algo._failure_reward() == -1.0


class TestInterrupted:
    def interrupt(self, env: Any, buffer: Any, at: int) -> None:
        def stop(algo: Any, epoch: int, total_step: int) -> None:
            if total_step == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            small(CalQLConfig).fit_online(
                env, buffer, n_steps=50, n_steps_per_epoch=50, update_start_step=3, callback=stop, **QUIET
            )

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_the_next_run_starts_an_episode_of_its_own(self, wrapped: bool) -> None:
        env = Scripted(script=[([1.0] * 8, "terminated")])
        buffer: Any = create_fifo_replay_buffer(100, env=env)
        buffer = ReturnsToGoReplayBuffer(buffer) if wrapped else buffer
        self.interrupt(env, buffer, at=5)
        small(CalQLConfig).fit_online(env, buffer, n_steps=8, n_steps_per_epoch=8, update_start_step=1, **QUIET)
        found = literal_pairs(with_returns_to_go(buffer))
        assert {o: n - o for o, (n, _) in found.items()} == dict.fromkeys([1, 2, 3, 4, 5, *range(7, 15)], 1), "no seam"
        assert {found[o][1] for o in range(1, 6)} == {-INFINITY}
        assert found[14][1] == 1.0

    def test_an_episode_appended_in_the_middle(self) -> None:
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, env=Scripted()))
        for i in range(3):
            buffer.append(np.array([i + 1], np.float32), np.zeros(1, np.float32), 1.0)
        buffer.append_episode(Episode(np.full((2, 1), 90.0, np.float32), np.zeros((2, 1)), np.full((2, 1), 4.0), True))
        assert set(returns_by_observation(buffer, HALF).items()) >= {(1, -INFINITY), (2, -INFINITY)}
        buffer.append(np.array([4], np.float32), np.zeros(1, np.float32), 1.0)
        buffer.clip_episode(True)
        assert returns_by_observation(buffer, HALF)[1] == 1.875


class Pixels(gym.Env[Any, Any]):
    """Two stacked frames of one value each, 4 x 4; every second episode has one step and terminates.

    The second channel of a frame is 100 above the first, the third 200; before the first frame is black.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, channels: int = 1) -> None:
        self.observation_space = spaces.Box(0, 255, (2 * channels, 4, 4), np.uint8)
        self.channels = 100 * np.arange(channels)
        self.episode, self.count, self.frames = -1, 0, [0, 0]

    def _observe(self) -> np.ndarray:
        self.count += 1
        self.frames = [self.frames[1], self.count]
        values = np.concatenate([frame + self.channels * (frame > 0) for frame in self.frames])
        return np.ones((len(values), 4, 4), np.uint8) * values.astype(np.uint8)[:, None, None]

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:  # type: ignore[override]
        self.episode, self.steps, self.frames = self.episode + 1, 0, [0, 0]
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        short = self.episode % 2 == 1
        return self._observe(), 1.0, short, not short and self.steps == 3, {}


def pixel_log(channels: int = 1) -> OfflineDataset:
    """Single frames: an episode of three steps, truncated."""
    return OfflineDataset(
        np.arange(200, 204, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, channels, 4, 4), np.uint8),
        np.array([0, 1, 0]),
        np.ones(3, np.float32),
        np.zeros(3, bool),
        np.array([False, False, True]),
        observation_space=spaces.Box(0, 255, (channels, 4, 4), np.uint8),
        action_space=spaces.Discrete(2),
    )


PIXEL_ENCODER = d3rlpy.models.PixelEncoderFactory([[2, 2, 1]], feature_size=4)


class TestStackedFrames:
    def pairs(self, buffer: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        batch = buffer.sample_transition_batch(200)
        rows = zip(batch.observations[:, :, 0, 0], batch.next_observations[:, :, 0, 0], strict=True)
        return {(tuple(map(int, o)), tuple(map(int, n))) for o, n in rows}

    def online_pairs(self, config: Any, channels: int) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What is sampled of the online part after eight steps in the environment."""
        algo = small(config, encoder_factory=PIXEL_ENCODER, observation_scaler=d3rlpy.preprocessing.PixelObservationScaler())
        log = to_d3rlpy(pixel_log(channels), transition_picker=FrameStackTransitionPicker(2))
        algo.fit(log, n_steps=1, n_steps_per_epoch=1, **QUIET)
        env, kept = Pixels(channels), []
        online_buffer = algo._online_buffer
        algo._online_buffer = lambda *args, **kwargs: kept.append(online_buffer(*args, **kwargs)) or kept[-1]
        algo.fit_online(env, n_steps=8, n_steps_per_epoch=8, **QUIET)
        mixed = kept[0].sample_transition_batch(4).observations
        assert mixed.shape[1:] == env.observation_space.shape, "logged and collected stacks are of one shape"
        return self.pairs(kept[0].online)

    @pytest.mark.parametrize("config", [DiscreteCQLConfig, DiscreteCalQLConfig])
    def test_offline_then_online(self, config: Any) -> None:
        # Three steps, truncated; one step; three; one. Observations are counted over all.
        assert self.online_pairs(config, channels=1) == {
            ((0, 1), (1, 2)), ((1, 2), (2, 3)), ((2, 3), (3, 4)), ((0, 5), (5, 6)),
            ((0, 7), (7, 8)), ((7, 8), (8, 9)), ((8, 9), (9, 10)), ((0, 11), (11, 12)),
        }  # fmt: skip

    @pytest.mark.parametrize("config", [DiscreteCQLConfig, DiscreteCalQLConfig])
    def test_frames_in_colour(self, config: Any) -> None:
        """A frame has two channels: d3rlpy's own preprocessor keeps the last one alone."""
        assert self.online_pairs(config, channels=2) == {
            ((0, 0, 1, 101), (1, 101, 2, 102)), ((1, 101, 2, 102), (2, 102, 3, 103)), ((2, 102, 3, 103), (3, 103, 4, 104)),
            ((0, 0, 5, 105), (5, 105, 6, 106)), ((0, 0, 7, 107), (7, 107, 8, 108)), ((7, 107, 8, 108), (8, 108, 9, 109)),
            ((8, 108, 9, 109), (9, 109, 10, 110)), ((0, 0, 11, 111), (11, 111, 12, 112)),
        }  # fmt: skip

    def test_the_newest_frame_of_each_array(self) -> None:
        stack = np.arange(6).reshape(6, 1, 1)
        picture, vector = NewestFrameWriterPreprocess([3, 2]).process_observation([stack, np.arange(4)])
        assert picture[:, 0, 0].tolist() == [3, 4, 5]
        assert vector.tolist() == [2, 3]
        grey = NewestFrameWriterPreprocess([1]).process_observation(stack)
        assert np.array_equal(grey, LastFrameWriterPreprocess().process_observation(stack)), "with one channel as d3rlpy's"

    def test_values_after_truncated_ends_see_the_stack(self) -> None:
        seen: list[Any] = []

        def values(observations: Any) -> Any:
            seen.append(observations[:, :, 0, 0].tolist())
            return np.full(len(observations), 8.0)

        settings = ReturnsSettings(0.5, "bootstrap", tail_values=TailValues(values))
        offline_buffer = to_d3rlpy(pixel_log(), transition_picker=FrameStackTransitionPicker(2))
        assert offline_buffer.returns_to_go(settings).tolist() == [1 + 0.5 + 0.25 + 1, 1 + 0.5 + 2, 1 + 4]
        env = Pixels()
        raw = create_fifo_replay_buffer(
            100,
            env=env,
            transition_picker=FrameStackTransitionPicker(2),
            writer_preprocessor=LastFrameWriterPreprocess(),
        )
        algo = small(DiscreteCQLConfig, encoder_factory=PIXEL_ENCODER)
        algo.collect(env, raw, n_steps=4, show_progress=False)
        returns = with_returns_to_go(raw).sample_transition_batch(100).returns_to_go(settings)
        assert set(returns[:, 0].tolist()) == {2.75, 3.5, 5.0, 1.0}
        assert seen == [[[202, 203]], [[3, 4]]]


class TestPickers:
    def test_d3rlpys_sparse_returns_are_those_of_the_rewards(self) -> None:
        """d3rlpy's own picker judges rewards; the row that reaches the last observation must not be judged with them."""
        log = offline(4)
        failed = OfflineDataset(
            np.arange(4, dtype=np.float32)[:, None],
            np.zeros((3, 1), np.float32),
            np.full(3, -1.0, np.float32),
            np.zeros(3, bool),
            np.array([False, False, True]),
            observation_space=Scripted.observation_space,
            action_space=spaces.Box(-1, 1, (1,), np.float32),
        )
        for reward, step_reward, expected in ((-1.0, -1.0, [[-100.0]]), (0.0, 0.0, [[-100.0]]), (-1.0, 0.0, [[-1.0], [-1.0]])):
            picker = SparseRewardTransitionPicker(-100.0, step_reward)
            data = to_d3rlpy(failed.scale_rewards(shift=reward + 1.0), transition_picker=picker)
            assert data.transition(1).rewards_to_go.tolist() == expected
        with pytest.warns(UserWarning, match='return_tail="sparse"'):
            small(CalQLConfig).set_offline_data(data)
        small(CalQLConfig, return_tail="sparse").set_offline_data(data)
        assert log.transition(0).rewards_to_go.tolist() == [[1.0]] * 4

    @pytest.mark.parametrize("config", [CQLConfig, CalQLConfig])
    def test_the_online_buffer_picks_as_the_logged_data_does(self, config: Any) -> None:
        env = Scripted()
        raw = create_fifo_replay_buffer(100, env=env, transition_picker=MultiStepTransitionPicker(n_steps=3, gamma=0.5))
        small(config).collect(env, raw, n_steps=7, show_progress=False)
        algo = small(config)
        algo.fit(raw, n_steps=1, n_steps_per_epoch=1, **QUIET)
        online = algo._online_buffer(env, None, mix=True).online
        assert isinstance(online.transition_picker.inner, MultiStepTransitionPicker)
        assert isinstance(offline().transition_picker.inner, BasicTransitionPicker)

    def test_an_episode_as_long_as_d3rlpys_cache(self) -> None:
        """There is no room for a row more: the last transition is lost, as d3rlpy loses it, and nothing fails."""
        env = Scripted(script=[([1.0] * 4, "truncated")])
        raw = ReplayBuffer(FIFOBuffer(100), env=env, cache_size=4)
        small(CalQLConfig).fit_online(env, raw, n_steps=9, n_steps_per_epoch=9, update_start_step=5, **QUIET)
        assert returns_by_observation(raw, HALF) == {1: 1.875, 2: 1.75, 3: 1.5, 6: 1.875, 7: 1.75, 8: 1.5, 11: -INFINITY}


class TestBootstrap:
    def test_is_estimated_wherever_the_count_of_steps_starts(self) -> None:
        env = Scripted()
        algo = small(CalQLConfig, return_tail="bootstrap")
        algo.build_with_env(env)
        algo.set_grad_step(1234)
        algo.fit(to_d3rlpy(from_d3rlpy(algo.collect(env, n_steps=7, show_progress=False))), 1, n_steps_per_epoch=1, **QUIET)
        assert np.isfinite(algo.offline_data._returns[1]).all()

    def test_does_not_move_statistics(self) -> None:
        env = Scripted()
        encoder = d3rlpy.models.VectorEncoderFactory([8], use_batch_norm=True, dropout_rate=0.5)
        algo = small(CalQLConfig, return_tail="bootstrap", actor_encoder_factory=encoder, critic_encoder_factory=encoder)
        algo.build_with_env(env)
        before = {name: value.clone() for name, value in algo.impl.modules.policy.state_dict().items()}
        first, second = (algo._target_values(np.ones((1, 1), np.float32)) for _ in range(2))
        assert first.shape == second.shape == (1,)
        assert all(th.equal(value, before[name]) for name, value in algo.impl.modules.policy.state_dict().items())
        assert algo.impl.modules.policy.training
