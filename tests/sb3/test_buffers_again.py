"""Buffers that come from elsewhere or come again: with resets in them, shared by two models, loaded, assigned by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins.adapters import from_sb3
from cql_plugins.sb3 import CQL, CalQL, DiscreteCalQL
from cql_plugins.sb3.buffers import ReturnsToGoMixin, with_returns_to_go


def finite_share(buffer: Any) -> float:
    return float(np.isfinite(buffer.returns_to_go[: buffer.size()]).mean())


class TestBootstrap:
    """The values after truncated ends are estimated anew whenever data is adopted, not only every thousand steps."""

    def test_every_call_of_learn_offline(self, host: Any) -> None:
        model = host.build(CalQL, return_tail="bootstrap")
        for _ in range(3):
            model.learn_offline(host.collect(limit=3), 5)
            assert finite_share(model.offline_buffer) == 1.0

    def test_after_a_load(self, host: Any, tmp_path: Path) -> None:
        data = host.collect(limit=3)
        model = host.build(CalQL, return_tail="bootstrap").learn_offline(data, 5)
        model.learn(30)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        loaded = CalQL.load(tmp_path / "model", env=host.corridors(), device="cpu")
        loaded.set_offline_data(data)
        loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.train(1, 8)
        assert finite_share(loaded.offline_buffer) == 1.0
        assert finite_share(loaded.replay_buffer) > 0.5

    def test_estimating_moves_no_running_statistics(self, host: Any) -> None:
        """The actor's batch normalisation sees the batch of the gradient step, and nothing else."""
        policy_kwargs = {"features_extractor_class": NormExtractor, "optimizer_class": th.optim.SGD}
        models = [host.build(CalQL, return_tail=tail, policy_kwargs=policy_kwargs) for tail in ("none", "bootstrap")]
        for model in models:
            model.learn_offline(host.collect(limit=3), 1)
        assert finite_share(models[1].offline_buffer) == 1.0
        none, bootstrap = (dict(model.actor.features_extractor.named_buffers()) for model in models)
        assert none["norm.num_batches_tracked"] == 2, "this step's states and the next ones"
        for name, value in none.items():
            assert th.equal(bootstrap[name], value), name

    def test_estimates_are_those_of_evaluation(self, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = host.build(CalQL, return_tail="bootstrap").set_offline_data(host.collect(limit=3))
        values_of, modes = model._values_of, []

        def spy(observations: Any) -> Any:
            modes.append(model.actor.training)
            return values_of(observations)

        monkeypatch.setattr(model, "_values_of", spy)
        for mode in (True, False):
            model.policy.set_training_mode(mode)
            model._tails_are_due = True
            model.sample_batch(4)
            assert (model.actor.training, model.critic.training) == (mode, mode)
        assert modes == [False, False]


class NormExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=2)
        self.norm = th.nn.BatchNorm1d(2)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(observations)  # type: ignore[no-any-return]


class TestResets:
    """``learn`` resets the environments at its start; what ran before does not go on."""

    def twice(self, host: Any, model_class: Any, n_envs: int = 1) -> Any:
        env = host.corridors(n_envs, limit=8, discrete=issubclass(model_class, DQN))
        model = host.build(model_class, env, learning_starts=1000)
        model.learn(11 * n_envs)
        model.learn(20 * n_envs)
        return model

    @pytest.mark.parametrize("n_envs", [1, 2])
    def test_found_in_sb3s_own_buffer(self, host: Any, n_envs: int) -> None:
        sac, calql = self.twice(host, SAC, n_envs), self.twice(host, CalQL, n_envs)
        sac.replay_buffer.observations[:] = calql.replay_buffer.observations
        for name in ("next_observations", "actions", "rewards", "dones", "timeouts"):
            getattr(sac.replay_buffer, name)[:] = getattr(calql.replay_buffer, name)
        extended = with_returns_to_go(sac.replay_buffer, 0.99)
        known = calql.replay_buffer
        np.testing.assert_array_equal(extended._cuts, known._cuts)
        np.testing.assert_array_equal(extended._running_length, known._running_length)
        np.testing.assert_array_equal(extended.returns_to_go[:31], known.returns_to_go[:31])
        assert (known.returns_to_go[:11] == -math.inf).any(), "an episode was broken off by the second call"

    def test_both_ways_to_give_a_buffer_agree(self, host: Any) -> None:
        sac = self.twice(host, SAC)
        model = host.build(CalQL)
        model.set_offline_data(sac.replay_buffer)
        raw = model.offline_buffer.returns_to_go[: sac.replay_buffer.pos, 0].copy()
        known = np.isfinite(raw)
        with pytest.warns(UserWarning, match="taken as truncated"):
            data = from_sb3(sac.replay_buffer)
        model.set_offline_data(data)
        assert 0 < known.sum() < len(raw)
        other = model.offline_buffer.returns_to_go[:, 0]
        assert set(np.round(raw[known], 4)) <= set(np.round(other, 4))

    def test_a_running_episode_of_a_loaded_buffer_is_cut(self, host: Any, tmp_path: Path) -> None:
        sac = host.build(SAC, host.corridors(limit=8, start=0.0), learning_starts=1000)
        sac.learn(11)
        running = 11 - 1 - int(np.flatnonzero(sac.replay_buffer.dones[:11, 0])[-1])
        assert running > 0
        sac.save_replay_buffer(tmp_path / "buffer")
        model = host.build(CalQL, host.corridors(limit=8, start=0.0), learning_starts=1000)
        model.load_replay_buffer(tmp_path / "buffer")
        model.learn(20)
        rows = slice(11 - running, 11)
        assert np.all(model.replay_buffer.returns_to_go[rows] == -math.inf)
        model.replay_buffer.recompute_returns()
        assert np.all(model.replay_buffer.returns_to_go[rows] == -math.inf)
        assert np.isfinite(model.replay_buffer.returns_to_go[11:19]).all()

    @pytest.mark.parametrize("n_envs", [1, 2, 3])
    def test_found_before_a_buffer_is_rearranged(self, host: Any, tmp_path: Path, n_envs: int) -> None:
        sac = host.build(SAC, DummyVecEnv([Clock]), learning_starts=1000, gamma=0.9)
        sac.learn(3)
        sac.learn(30)  # the first three rows are of an episode that nobody finished
        sac.save_replay_buffer(tmp_path / "buffer")
        model = host.build(CalQL, DummyVecEnv([Clock] * n_envs), learning_starts=1000, gamma=0.9)
        model.load_replay_buffer(tmp_path / "buffer")
        buffer = model.replay_buffer
        best = sum(0.9**k for k in range(Clock.LIMIT))
        returns, clock = buffer.returns_to_go[: buffer.size()], buffer.observations[: buffer.size(), :, 0]
        known = np.isfinite(returns).copy()
        expected = (1 - 0.9 ** (Clock.LIMIT - clock)) / (1 - 0.9)
        np.testing.assert_allclose(returns[known], expected[known], rtol=1e-5)
        assert (~known).sum() <= 3, "those of the episode that nobody finished"
        assert returns[known].max() <= best + 1e-5
        # Where an episode was cut in two, only those who had it in one piece could sum it.
        buffer.recompute_returns()
        again = np.isfinite(returns)
        np.testing.assert_allclose(returns[again], expected[again], rtol=1e-5)
        assert not (again & ~known).any()
        assert again.sum() >= 12

    @pytest.mark.parametrize("n_envs", [2, 4])
    def test_moving_a_buffer_forgets_no_return(self, host: Any, tmp_path: Path, n_envs: int) -> None:
        """25 steps in each of three environments: four episodes of six steps, and one step of a fifth."""

        def build(n_envs: int) -> Any:
            return host.build(CalQL, DummyVecEnv([Clock] * n_envs), learning_starts=1000, gamma=0.9)

        model = build(3).learn(75)
        # Moved, and loaded once more as it then is.
        for _ in range(2):
            model.save_replay_buffer(tmp_path / "buffer")
            model = build(n_envs)
            model.load_replay_buffer(tmp_path / "buffer")
            buffer = model.replay_buffer
            returns, clock = buffer.returns_to_go[: buffer.size()], buffer.observations[: buffer.size(), :, 0]
            known = np.isfinite(returns)
            assert (~known).sum() == 3
            expected = (1 - 0.9 ** (Clock.LIMIT - clock)) / (1 - 0.9)
            np.testing.assert_allclose(returns[known], expected[known], rtol=1e-5)

    @pytest.mark.parametrize("memory_efficient", [False, True])
    def test_stay_unknown_when_summed_again(self, host: Any, memory_efficient: bool) -> None:
        options = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
        model = host.build(
            CalQL,
            DummyVecEnv([Clock]),
            learning_starts=1000,
            return_tail="bootstrap",
            **(options if memory_efficient else {}),
        )
        model.learn(3)
        with pytest.warns(UserWarning, match="will be truncated") if memory_efficient else nullcontext():
            model.learn(10)
        model.replay_buffer.recompute_returns()
        assert model.replay_buffer.dones[2, 0] == memory_efficient, "SB3 takes it for an end"
        assert np.all(model.replay_buffer.returns_to_go[:3] == -math.inf)
        assert np.isfinite(model.replay_buffer.returns_to_go[3:9]).all()

    @pytest.mark.parametrize("algorithm", [CQL, CalQL])
    def test_no_sum_of_steps_goes_across(self, algorithm: Any, host: Any) -> None:
        model = host.build(algorithm, DummyVecEnv([Clock, Clock]), n_steps=3, gamma=0.5, learning_starts=1000)
        model.learn(6)  # three steps of each environment
        model.learn(20)
        buffer = model.replay_buffer
        found = {}
        for _ in range(60):
            sample = buffer.sample(8)
            before, after, rewards, dones = sample.observations, sample.next_observations, sample.rewards, sample.dones
            for row in range(8):
                found.setdefault((float(before[row, 0]), float(after[row, 0])), set()).add(
                    (float(rewards[row]), float(dones[row]))
                )
        assert found[1.0, 3.0] == {(1.5, 0.0)}, "cut after the third step: two rewards, and the target goes on from there"
        assert found[2.0, 3.0] == {(1.0, 0.0)}
        assert found[1.0, 4.0] == {(1.75, 0.0)}, "the other episodes have three"
        assert all(before < after for before, after in found)

    def test_a_broken_record_of_several_steps_has_no_return_for_calql(self, host: Any, tmp_path: Path) -> None:
        cql = host.build(CQL, DummyVecEnv([Clock]), n_steps=3, gamma=0.5, learning_starts=1000)
        cql.learn(3)
        cql.learn(14)
        cql.save_replay_buffer(tmp_path / "buffer")
        of_data = host.build(CalQL, DummyVecEnv([Clock]), n_steps=3, gamma=0.5).set_offline_data(cql.replay_buffer)
        for n_envs in (1, 2):
            loaded = host.build(CalQL, DummyVecEnv([Clock] * n_envs), n_steps=3, gamma=0.5)
            loaded.load_replay_buffer(tmp_path / "buffer")
            for buffer in (of_data.offline_buffer, loaded.replay_buffer):
                clock = buffer.observations[: buffer.size(), :, 0]
                returns = buffer.returns_to_go[: buffer.size()]
                known = np.isfinite(returns)
                np.testing.assert_allclose(returns[known], (2 - 2 * 0.5 ** (Clock.LIMIT - clock))[known], rtol=1e-5)
                assert known.any()
                if buffer.n_envs == 1:
                    assert not known[:3].any()
        with pytest.warns(UserWarning, match="taken as truncated"):
            assert from_sb3(cql.replay_buffer).unflagged_episodes.tolist() == [True, False, False, True]


class Clock(gym.Env[Any, Any]):
    """Shows how many steps its episode has had, pays 1 for each, and ends after six."""

    LIMIT = 6
    observation_space, action_space = spaces.Box(0.0, 100.0, (1,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.clock = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.clock += 1
        return np.full(1, self.clock, np.float32), 1.0, self.clock >= self.LIMIT, False, {}


class TestTwoModels:
    def test_each_has_its_own_returns(self, host: Any) -> None:
        buffer = host.collect().to_sb3(host.build(CalQL))
        far, near = host.build(CalQL, gamma=0.99), host.build(CalQL, gamma=0.5)
        far.set_offline_data(buffer)
        before = far.offline_buffer.returns_to_go.copy()
        near.set_offline_data(buffer)
        np.testing.assert_array_equal(far.offline_buffer.returns_to_go, before)
        assert not np.array_equal(near.offline_buffer.returns_to_go, before)
        assert near.offline_buffer.observations is far.offline_buffer.observations, "the rest is shared"
        far.set_offline_data(buffer)
        assert far.offline_buffer is buffer, "nothing is copied where nothing differs"

    def test_the_same_dataset_is_not_written_twice(self, host: Any, dataset: Any) -> None:
        model = host.build(CalQL).learn_offline(dataset, 1)
        first = model.offline_buffer
        model.learn_offline(dataset, 1)
        assert model.offline_buffer is first
        model.learn_offline(dataset[:3], 1)
        assert model.offline_buffer is not first

    def test_what_came_between_is_not_taken_for_it(self, host: Any, dataset: Any) -> None:
        model = host.build(CalQL).set_offline_data(dataset)
        other = dataset[:2].to_sb3(model)
        model.set_offline_data(other)
        assert model.offline_buffer is other
        model.set_offline_data(dataset)
        assert model.offline_buffer.size() == len(dataset)

    def test_refused_data_leaves_the_old(self, host: Any, dataset: Any) -> None:
        model = host.build(CalQL).set_offline_data(dataset)
        first = model.offline_buffer
        with pytest.raises(ValueError, match="does not fit"):
            model.set_offline_data(host.collect("image"))
        assert model.offline_buffer is first


class TestSparseTail:
    def test_failure_is_clipped_with_the_rewards(self, host: Any) -> None:
        env = VecNormalize(host.corridors(), norm_obs=False, clip_reward=2.0)
        env.ret_rms.var, env.ret_rms.count = np.array(1.0), 10.0
        env.training = False
        model = host.build(CalQL, env, return_tail="sparse", gamma=0.9)
        data = host.collect(reward=-5.0, limit=4)
        model.set_offline_data(data)
        batch = model.sample_batch(40)
        assert batch.returns_to_go is not None
        ends_well = batch.returns_to_go > -19.0
        np.testing.assert_allclose(batch.returns_to_go[~ends_well].numpy(), -20.0, rtol=1e-5)
        assert (~ends_well).any()


class TestAssignedByHand:
    @pytest.mark.parametrize("algorithm", [CalQL, DiscreteCalQL])
    def test_a_plain_buffer(self, algorithm: Any, host: Any) -> None:
        model = host.build(algorithm, host.corridors(discrete=algorithm is DiscreteCalQL))
        buffer = ReplayBuffer(200, model.observation_space, model.action_space, device="cpu")
        for _ in range(3):
            buffer.add(*(np.zeros((1, 2)),) * 2, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
        model.replay_buffer = buffer
        with pytest.raises(ValueError, match="A batch has no returns-to-go"):
            model.train(1, 4)
        model.learn(20)
        assert isinstance(model.replay_buffer, ReturnsToGoMixin)


class TestWithoutAnEnvironment:
    def test_the_online_buffer_waits_for_one(self, host: Any, tmp_path: Path) -> None:
        """A million rows of images would not fit into memory."""
        data = host.collect("image")
        model = CalQL.from_dataset(data, "CnnPolicy", **(host.tiny(CalQL, "image") | {"buffer_size": 10**12}))
        model.learn_offline(data, 1)
        model.save(tmp_path / "model")
        loaded = CalQL.load(tmp_path / "model", device="cpu")
        assert loaded.buffer_size == 10**12
        for one in (model, loaded):
            assert one.replay_buffer.buffer_size == 1
            one.buffer_size = 50
            one.set_env(host.corridors(form="image"))
            assert one.replay_buffer.buffer_size == 50
            assert isinstance(one.replay_buffer, ReturnsToGoMixin)
            one.set_offline_data(data)
            one.learn(20)
            first = one.replay_buffer
            one.set_env(host.corridors(form="image"))
            assert one.replay_buffer is first, "what was collected stays"

    @pytest.mark.parametrize("algorithm", [CQL, CalQL])
    @pytest.mark.parametrize("n_envs", [1, 4])
    def test_a_loaded_buffer_waits_with_it(self, algorithm: Any, host: Any, dataset: Any, tmp_path: Path, n_envs: int) -> None:
        collector = host.build(algorithm, host.corridors(n_envs))
        collector.learn(40)
        collector.save_replay_buffer(tmp_path / "buffer")
        model = algorithm.from_dataset(dataset, **host.tiny(algorithm))
        model.load_replay_buffer(tmp_path / "buffer")
        model.learn_offline(dataset, 1)
        model.set_env(host.corridors())
        assert model.replay_buffer.n_envs == 1
        assert model.replay_buffer.size() == 40
        assert isinstance(model.replay_buffer, ReturnsToGoMixin) == (algorithm is CalQL)
        model.learn(20)
        assert model.replay_buffer.size() == 60

    def test_a_loaded_buffer_that_cannot_be_rearranged_is_kept(self, host: Any, dataset: Any, tmp_path: Path) -> None:
        options = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
        host.build(CQL, host.corridors(2), **options).learn(40).save_replay_buffer(tmp_path / "buffer")
        model = CQL.from_dataset(dataset, **host.tiny(CQL, **options))
        model.load_replay_buffer(tmp_path / "buffer")
        with pytest.raises(ValueError, match="each other's next"):
            model.set_env(host.corridors())
        assert model.replay_buffer.size() == 20
        assert model._buffer_waits_for_env


class TestHindsight:
    def collector(self, host: Any, algorithm: Any, n_envs: int = 1, **changes: Any) -> Any:
        options = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 4}}
        return host.build(algorithm, host.corridors(n_envs, form="goal"), form="goal", **options, **changes)

    def test_a_model_of_another_discount_relabels_too(self, host: Any, tmp_path: Path) -> None:
        first = self.collector(host, CalQL, gamma=0.99).learn(40)
        first.save_replay_buffer(tmp_path / "buffer")
        data = self.collector(host, CalQL, gamma=0.5).set_offline_data(first.replay_buffer)
        loaded = self.collector(host, CalQL, gamma=0.5)
        loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
        for buffer in (data.offline_buffer, loaded.replay_buffer):
            returns = buffer.sample(200).returns_to_go
            assert returns.min() >= -2.0, "rewards are -1 and 0"
        assert first.replay_buffer.sample(200).returns_to_go.min() < -2.0
        loaded.learn(20)

    def test_a_buffer_of_cql_has_all_returns_for_calql(self, host: Any) -> None:
        data = host.collect("goal")
        cql = self.collector(host, CQL).set_offline_data(data)
        calql = self.collector(host, CalQL).set_offline_data(cql.offline_buffer)
        of_data = self.collector(host, CalQL).set_offline_data(data)
        for model in (calql, of_data):
            assert np.isfinite(model.sample_batch(200).returns_to_go.numpy()).all()
        assert not cql.offline_buffer.sums_relabelled_rewards, "CQL does not pay for them afterwards"
        again = self.collector(host, CalQL).set_offline_data(of_data.offline_buffer)
        assert again.offline_buffer is of_data.offline_buffer

    def test_a_loaded_buffer_takes_the_place_of_all_that_was_there(self, host: Any, tmp_path: Path) -> None:
        saved = self.collector(host, CQL, 4, learning_starts=1000).learn(40)
        saved.save_replay_buffer(tmp_path / "buffer")
        model = self.collector(host, CQL).learn(150)
        model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
        buffer = model.replay_buffer
        assert buffer.ep_length[: buffer.size()].all()
        assert not buffer.ep_length[buffer.size() :].any()
        model.learn(20)

    @pytest.mark.parametrize(("algorithm", "factor"), [(CQL, 1), (CalQL, 2)])
    def test_only_who_looks_at_returns_pays_for_them(self, algorithm: Any, factor: int, host: Any) -> None:
        env = host.corridors(form="goal")
        options = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
        model = host.build(algorithm, env, form="goal", **options)
        model.set_offline_data(host.collect("goal"))
        calls: list[int] = []
        original = env.envs[0].unwrapped.compute_reward
        env.envs[0].unwrapped.compute_reward = lambda *args: calls.append(1) or original(*args)
        batch = model.sample_batch(16)
        assert len(calls) == factor
        if algorithm is CalQL:
            assert th.isfinite(batch.returns_to_go).any()
