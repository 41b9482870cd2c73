"""The online phase: returns-to-go of running and ended episodes, transitions at time-outs, shares of offline data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
from d3rlpy.dataset import MixedReplayBuffer, create_fifo_replay_buffer
from d3rlpy.logging import NoopAdapterFactory
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, from_d3rlpy, to_d3rlpy
from cql_plugins.d3rlpy import (
    CalQLConfig,
    CQLConfig,
    DiscreteCalQLConfig,
    DiscreteCQLConfig,
    OfflineOnlineReplayBuffer,
    ReturnsToGoReplayBuffer,
)
from cql_plugins.d3rlpy.batches import ReturnsSettings

INFINITY = float("inf")
HALF = ReturnsSettings(gamma=0.5)
SMALL = d3rlpy.models.VectorEncoderFactory([8])

# Rewards of each episode and how it ends; the third has one step.
SCRIPT = [([1.0, 2.0, 4.0], "terminated"), ([8.0, 16.0], "truncated"), ([32.0], "terminated"), ([64.0], "truncated")]
# Observation -> (next observation, return with gamma 0.5, zero tail); observations count all the steps and resets.
LITERALS = {
    1: (2, 3.0),
    2: (3, 4.0),
    3: (4, 4.0),
    5: (6, 16.0),
    6: (7, 16.0),
    8: (9, 32.0),
    10: (11, 64.0),
}


class Scripted(gym.Env[Any, Any]):
    """Plays the script, again and again; an observation is the number of observations so far."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, discrete: bool = False, script: list[tuple[list[float], str]] = SCRIPT) -> None:
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self.script, self.episode, self.count, self.step_index = script, -1, 0, 0

    def _observe(self) -> np.ndarray:
        self.count += 1
        return np.array([self.count], np.float32)

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:  # type: ignore[override]
        self.episode, self.step_index = (self.episode + 1) % len(self.script), 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rewards, end = self.script[self.episode]
        reward = rewards[self.step_index]
        self.step_index += 1
        last = self.step_index == len(rewards)
        return self._observe(), reward, last and end == "terminated", last and end == "truncated", {}


def offline(n: int = 50) -> Any:
    """Logged data whose observations are from 1000 on."""
    return to_d3rlpy(
        OfflineDataset(
            1000 + np.arange(n + 1, dtype=np.float32)[:, None],
            np.zeros((n, 1), np.float32),
            np.ones(n, np.float32),
            np.arange(n) == n - 1,
            np.zeros(n, bool),
            observation_space=Scripted.observation_space,
            action_space=spaces.Box(-1, 1, (1,), np.float32),
        )
    )


def truncated(n: int) -> Any:
    """Logged data of one episode that was truncated."""
    return to_d3rlpy(
        OfflineDataset(
            np.arange(n + 1, dtype=np.float32)[:, None],
            np.full((n, 1), 0.5, np.float32),
            np.ones(n, np.float32),
            np.zeros(n, bool),
            np.arange(n) == n - 1,
            observation_space=Scripted.observation_space,
            action_space=spaces.Box(-1, 1, (1,), np.float32),
        )
    )


def small(config: Any, **options: Any) -> Any:
    encoders = (
        {"encoder_factory": SMALL}
        if "encoder_factory" in config.__dataclass_fields__
        else {"actor_encoder_factory": SMALL, "critic_encoder_factory": SMALL, "n_action_samples": 2}
    )
    return config(**({"gamma": 0.5, "batch_size": 2} | encoders | options)).create()


QUIET: dict[str, Any] = {"logger_adapter": NoopAdapterFactory(), "show_progress": False}


def literal_pairs(buffer: Any) -> dict[int, tuple[int, float]]:
    batch = buffer.sample_transition_batch(300)
    rows = zip(batch.observations[:, 0], batch.next_observations[:, 0], batch.returns_to_go(HALF)[:, 0], strict=True)
    return {int(o): (int(n), float(g)) for o, n, g in rows}


class TestOneEpisodeAfterAnother:
    @pytest.mark.parametrize("write_at_termination", [False, True])
    @pytest.mark.parametrize("discrete", [False, True])
    def test_collected_transitions_and_returns(self, write_at_termination: bool, discrete: bool) -> None:
        env = Scripted(discrete)
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, env=env, write_at_termination=write_at_termination))
        algo = small(DiscreteCalQLConfig if discrete else CalQLConfig)
        algo.fit_online(env, buffer, n_steps=7, n_steps_per_epoch=7, update_start_step=100, **QUIET)
        assert buffer.transition_count == 7
        found = literal_pairs(buffer)
        assert found == LITERALS

    def test_d3rlpys_own_loop_loses_and_joins(self) -> None:
        """The twin: the ends of truncated episodes are gone, and an episode of one step runs into the next."""
        env = Scripted()
        buffer = create_fifo_replay_buffer(100, env=env)
        algo = d3rlpy.algos.CalQLConfig(gamma=0.5, batch_size=2, actor_encoder_factory=SMALL).create()
        algo.fit_online(env, buffer, n_steps=7, n_steps_per_epoch=7, update_start_step=100, **QUIET)
        batch = buffer.sample_transition_batch(300)
        pairs = {(int(o), int(n)) for o, n in zip(batch.observations[:, 0], batch.next_observations[:, 0], strict=True)}
        assert (6, 7) not in pairs
        assert (8, 10) in pairs, "from one episode into another"

    @pytest.mark.parametrize("write_at_termination", [False, True])
    def test_a_running_episode_never_shows_a_return(self, write_at_termination: bool) -> None:
        env = Scripted(script=[([1.0, 2.0, 4.0, 8.0, 16.0], "terminated"), ([1.0] * 4, "truncated")])
        literals = {1: 5.0, 2: 8.0, 3: 12.0, 4: 16.0, 5: 16.0, 7: 1.875, 8: 1.75, 9: 1.5, 10: 1.0}
        algo = small(CalQLConfig, batch_size=1)
        seen: list[tuple[int, dict[int, float]]] = []
        update = algo.update

        def record(batch: Any) -> dict[str, float]:
            returns = batch.returns_to_go(HALF)[:, 0]
            seen.append((env.count, {int(o): float(g) for o, g in zip(batch.observations[:, 0], returns, strict=True)}))
            return update(batch)

        algo.update = record
        # A plain buffer of d3rlpy's, handed over as a user would.
        plain = create_fifo_replay_buffer(100, env=env, write_at_termination=write_at_termination)
        algo.fit_online(env, plain, n_steps=9, n_steps_per_epoch=9, n_updates=60, **QUIET)
        # First observation of an episode -> the count of observations at which its end is known.
        ends = {1: 6, 7: 11}
        running_shown = 0
        for count, returns in seen:
            for observation, value in returns.items():
                start = max(first for first in ends if first <= observation)
                if count < ends[start]:
                    assert value == -INFINITY
                    running_shown += 1
                else:
                    assert value == literals[observation]
        assert {observation for _, returns in seen for observation in returns} == set(literals)
        assert (running_shown > 0) is not write_at_termination

    def test_broken_off_is_not_truncated(self) -> None:
        env = Scripted()
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, env=env))
        small(CalQLConfig).fit_online(env, buffer, n_steps=4, n_steps_per_epoch=4, update_start_step=100, **QUIET)
        found = literal_pairs(buffer)
        assert found[5] == (6, -INFINITY), "the last step is kept, its return unknown"
        assert found[2] == (3, 4.0)

    def test_what_was_collected_can_be_read(self) -> None:
        env = Scripted()
        buffer = small(CalQLConfig).collect(env, n_steps=7, show_progress=False)
        data = from_d3rlpy(buffer, name="collected")
        assert data.episode_lengths.tolist() == [3, 2, 1, 1]
        assert data.rewards.tolist() == [1, 2, 4, 8, 16, 32, 64]
        assert data.truncations.tolist() == [False] * 4 + [True, False, True]
        assert data.observations[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]

    def test_a_small_fifo_forgets(self) -> None:
        script = [([1.0, 1.0], "terminated")]
        env = Scripted(script=script)
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(6, env=env))
        algo = small(CalQLConfig)
        algo.fit_online(env, buffer, n_steps=400, n_steps_per_epoch=400, n_updates=1, update_interval=50, **QUIET)
        assert buffer.transition_count == 6
        assert len(buffer._records) <= buffer.size() + 17
        assert set(buffer.sample_transition_batch(50).returns_to_go(HALF)[:, 0].tolist()) == {1.0, 1.5}

    def test_sparse_returns_take_the_offline_failure_reward(self) -> None:
        """An online episode of successes only must not make success its failure."""
        data = offline()  # every reward is 1, and so is the failure reward
        algo = small(CalQLConfig, return_tail="sparse")
        algo.set_offline_data(data)
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, env=Scripted()))
        env = Scripted(script=[([5.0, 5.0], "truncated")])
        algo.fit_online(env, buffer, n_steps=2, n_steps_per_epoch=2, update_start_step=100, **QUIET)
        batch = buffer.sample_transition_batch(20)
        assert set(algo._returns_of(batch)[:, 0].tolist()) == {7.5, 5.0}
        algo.set_offline_data(None)
        assert set(algo._returns_of(batch)[:, 0].tolist()) == {10.0}, "the twin: its own smallest reward"


class TestShares:
    def shares(self, algo: Any, env: Any, buffer: Any = None, n_steps: int = 12) -> list[float]:
        update, found = algo.update, []

        def record(batch: Any) -> dict[str, float]:
            found.append(float((batch.observations[:, 0] >= 1000).mean()))
            return update(batch)  # type: ignore[no-any-return]

        algo.update = record
        algo.fit_online(env, buffer, n_steps=n_steps, n_steps_per_epoch=n_steps, **QUIET)
        algo.update = update
        return found

    @pytest.mark.parametrize("config", [CQLConfig, CalQLConfig])
    @pytest.mark.parametrize(("fraction", "share"), [(0.5, 0.5), (0.25, 0.25), (0.0, 0.0), (1.0, 1.0)])
    def test_of_fit_online_after_fit(self, config: Any, fraction: float, share: float) -> None:
        algo = small(config, batch_size=8, offline_fraction=fraction)
        algo.fit(offline(), n_steps=1, n_steps_per_epoch=1, **QUIET)
        found = self.shares(algo, Scripted())
        assert found[0] == 1.0, "nothing is collected yet"
        assert set(found[3:]) == {share}

    def test_proportional(self) -> None:
        algo = small(CalQLConfig, batch_size=16, offline_fraction="proportional")
        algo.set_offline_data(offline(50))
        found = self.shares(algo, Scripted(script=[([1.0] * 60, "terminated")]), n_steps=51)
        assert found[-1] == 0.5, "50 offline, 50 collected transitions (the newest waits for its successor)"
        assert found[10] > 0.7

    def test_without_logged_data(self) -> None:
        assert set(self.shares(small(CQLConfig), Scripted())) == {0.0}

    def test_a_buffer_of_ones_own_is_left_alone(self) -> None:
        algo = small(CalQLConfig)
        algo.set_offline_data(offline())
        env = Scripted()
        assert set(self.shares(algo, env, create_fifo_replay_buffer(100, env=env))) == {0.0}

    def test_d3rlpys_mixed_buffer_keeps_its_ratio(self) -> None:
        env = Scripted()
        mixed = MixedReplayBuffer(
            create_fifo_replay_buffer(100, env=env, transition_picker=offline().transition_picker), offline(), 0.75
        )
        algo = small(CalQLConfig, batch_size=8)
        assert set(self.shares(algo, env, mixed)[3:]) == {0.75}

    def test_goes_on_with_the_offline_data_of_a_mix(self) -> None:
        algo = small(CQLConfig, batch_size=8)
        algo.fit(offline(), n_steps=1, n_steps_per_epoch=1, **QUIET)
        self.shares(algo, Scripted())
        assert set(self.shares(algo, Scripted())[3:]) == {0.5}

    def test_single_transitions_come_from_both(self) -> None:
        env = Scripted()
        online = create_fifo_replay_buffer(100, env=env, transition_picker=offline().transition_picker)
        small(CQLConfig).collect(env, online, n_steps=7, show_progress=False)
        mixed = OfflineOnlineReplayBuffer(online, offline(), 0.25)
        picked = [float(mixed.sample_transition().observation[0]) >= 1000 for _ in range(400)]
        assert np.mean(picked) == pytest.approx(0.25, abs=0.08)
        batch = mixed.sample_transition_batch(8)
        assert [float(t.observation[0]) for t in batch.transitions] == batch.observations[:, 0].tolist()


class TestOptions:
    def test_bootstrap_values_come_from_the_target_critics(self) -> None:
        env = Scripted()
        algo = small(CalQLConfig, return_tail="bootstrap", batch_size=4)
        algo.build_with_env(env)
        buffer = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, env=env))
        algo.fit_online(env, buffer, n_steps=7, n_steps_per_epoch=7, n_updates=1, **QUIET)
        algo._tail_values = None
        before = dict(zip(*_columns(algo, buffer), strict=True))
        assert before[6.0] == -INFINITY
        assert before[2.0] == 4.0, "a terminal end needs no value"
        algo.set_grad_step(0)
        algo.update(buffer.sample_transition_batch(4))
        after = dict(zip(*_columns(algo, buffer), strict=True))
        value = (after[6.0] - 16.0) / 0.5
        assert after[5.0] == pytest.approx(8.0 + 0.5 * 16.0 + 0.25 * value, rel=1e-5)
        assert np.isfinite(value)

    def test_a_plain_batch_says_nothing_about_ends(self) -> None:
        env = Scripted()
        plain = create_fifo_replay_buffer(100, env=env)
        small(CQLConfig).collect(env, plain, n_steps=7, show_progress=False)
        batch = plain.sample_transition_batch(4)
        algo = small(CalQLConfig)
        algo.build_with_env(env)
        assert algo.update(batch)["bound_rate"] >= 0.0
        strict = small(CalQLConfig, return_tail="none")
        strict.build_with_env(env)
        with pytest.raises(ValueError, match="with_returns_to_go"):
            strict.update(batch)

    def test_actions_of_another_range_are_told(self) -> None:
        env = Scripted()
        env.action_space = spaces.Box(-2, 2, (1,), np.float32)
        with pytest.warns(UserWarning, match="MinMaxActionScaler"):
            small(CQLConfig).fit_online(env, n_steps=2, n_steps_per_epoch=2, **QUIET)
        scaler = d3rlpy.preprocessing.MinMaxActionScaler(minimum=env.action_space.low, maximum=env.action_space.high)
        small(CQLConfig, action_scaler=scaler).fit_online(env, n_steps=2, n_steps_per_epoch=2, **QUIET)
        env.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        with pytest.warns(UserWarning, match="smallest and largest action that make sense"):
            small(CQLConfig)._check_action_range(env.action_space.low, env.action_space.high, "environment")

    def test_the_bound_is_at_work(self) -> None:
        """Returns far above Q bound every policy value; far below, none."""
        for reward, rate in ((1e3, 1.0), (-1e3, 0.0)):
            data = OfflineDataset(
                np.zeros((9, 1), np.float32),
                np.zeros((8, 1), np.float32),
                np.full(8, reward, np.float32),
                np.arange(8) == 7,
                np.zeros(8, bool),
                observation_space=Scripted.observation_space,
                action_space=spaces.Box(-1, 1, (1,), np.float32),
            )
            algo = small(CalQLConfig)
            (_, metrics), *_ = algo.fit(to_d3rlpy(data), n_steps=1, n_steps_per_epoch=1, **QUIET)
            assert metrics["bound_rate"] == rate


@pytest.mark.parametrize("config", [CQLConfig, CalQLConfig, DiscreteCQLConfig, DiscreteCalQLConfig])
def test_a_dataset_is_not_a_buffer(config: Any) -> None:
    data = from_d3rlpy(offline(5))
    with pytest.raises(TypeError, match=r"dataset must be a buffer .* got OfflineDataset. Pass cql_plugins.adapters.to_d3rlpy"):
        small(config).fit(data, n_steps=1, n_steps_per_epoch=1, **QUIET)
    with pytest.raises(TypeError, match="got OfflineDataset"):
        small(config).set_offline_data(data)
    small(config).set_offline_data(None)


def _columns(algo: Any, buffer: Any) -> tuple[list[float], list[float]]:
    batch = buffer.sample_transition_batch(200)
    return batch.observations[:, 0].tolist(), algo._returns_of(batch)[:, 0].tolist()


def test_signatures_are_the_hosts(noise: Callable[[int], Any]) -> None:
    import inspect

    for name in ("fit", "fitter", "fit_online", "collect"):
        ours = inspect.signature(getattr(CQLConfig().create(), name))
        theirs = inspect.signature(getattr(d3rlpy.algos.CQLConfig().create(), name))
        assert list(ours.parameters) == list(theirs.parameters)


def test_bootstrapped_returns_of_read_only_episodes() -> None:
    """A dataset's arrays cannot be written to, which torch warns of where it is given them as they are."""
    plain: Any = d3rlpy.dataset.ReplayBuffer(d3rlpy.dataset.InfiniteBuffer(), episodes=truncated(20).episodes)
    assert not plain.episodes[0].observations.flags.writeable
    small(CalQLConfig, return_tail="bootstrap").fit(plain, n_steps=1, n_steps_per_epoch=1, **QUIET)
