"""Replay buffers with returns-to-go: SB3's samples, one column more, right in every row."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins.sb3.buffers import ReturnsToGoMixin, returns_to_go_buffer_class, with_returns_to_go

INF = np.inf
BOX = spaces.Box(-1e6, 1e6, (2,), np.float32)
DICT = spaces.Dict({"a": BOX, "b": spaces.Box(0, 255, (1, 4, 4), np.uint8)})
ACTIONS = spaces.Box(-1, 1, (3,), np.float32)


def observation(space: spaces.Space[Any], value: np.ndarray) -> Any:
    """An observation for each environment that says which row it is."""
    if isinstance(space, spaces.Dict):
        return {key: observation(sub, value) for key, sub in space.spaces.items()}
    assert space.shape is not None
    return np.broadcast_to(value.reshape(-1, *[1] * len(space.shape)), (len(value), *space.shape)).astype(space.dtype)


def add_steps(buffer: ReplayBuffer, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> None:
    """Add steps ``(T, n_envs)`` whose observations and actions repeat the reward."""
    for r, term, trunc in zip(rewards, terminated, truncated, strict=True):
        action = np.repeat(r[:, None] / 1000, 3, axis=1)
        obs = observation(buffer.observation_space, r)
        infos = [{"TimeLimit.truncated": bool(t)} for t in trunc]
        buffer.add(obs, observation(buffer.observation_space, r + 0.5), action, r, np.logical_or(term, trunc), infos)


def flags(text: str) -> tuple[np.ndarray, np.ndarray]:
    """One letter a step and environment: T terminated, o timed out (over), - runs. Environments are separated by spaces."""
    letters = np.array([list(row) for row in text.split()]).T
    return letters == "T", letters == "o"


class TestOnline:
    """Rewards are powers of two and gamma is one half, so that every sum is a literal."""

    def filled(self, tail: str = "zero", size: int = 8) -> ReturnsToGoMixin:
        buffer = returns_to_go_buffer_class(ReplayBuffer)(size, BOX, ACTIONS, "cpu")
        buffer.configure_returns(0.5, tail)  # type: ignore[arg-type]
        return buffer

    def test_one_environment_before_and_after_each_end(self) -> None:
        buffer = self.filled()
        steps = [
            (1.0, "-", [-INF]),
            (2.0, "-", [-INF, -INF]),
            (4.0, "T", [3, 4, 4]),
            (8.0, "-", [3, 4, 4, -INF]),
            (16.0, "o", [3, 4, 4, 16, 16]),
            (32.0, "-", [3, 4, 4, 16, 16, -INF]),
        ]
        for reward, letter, expected in steps:
            add_steps(buffer, np.array([[reward]]), *flags(letter))
            assert buffer.returns_to_go[: buffer.pos, 0].tolist() == expected

    def test_four_environments_each_by_itself(self) -> None:
        buffer = returns_to_go_buffer_class(ReplayBuffer)(16, BOX, ACTIONS, "cpu", n_envs=4)
        buffer.configure_returns(0.5, "zero")
        rewards = np.array([[1, 10, 100, 1000], [2, 20, 200, 2000], [4, 40, 400, 4000]], dtype=float)
        terminated, truncated = flags("--T To- o-- ---")
        expected = [
            [[-INF, 10, -INF, -INF]],
            [[-INF, 10, -INF, -INF], [-INF, 20, -INF, -INF]],
            [[3, 10, -INF, -INF], [4, 20, -INF, -INF], [4, -INF, -INF, -INF]],
        ]
        # Environment 2 times out after one step, so its first return is its own reward.
        for step in expected:
            step[0][2] = 100
        for t in range(3):
            add_steps(buffer, rewards[t : t + 1], terminated[t : t + 1], truncated[t : t + 1])
            assert buffer.returns_to_go[: t + 1].tolist() == expected[t]

    @pytest.mark.parametrize(("tail", "expected"), [("zero", [2, 2]), ("none", [-INF, -INF]), ("sparse", [2, 2])])
    def test_tails_online(self, tail: str, expected: list[float]) -> None:
        buffer = self.filled(tail)
        buffer.failure_reward = -1.0
        add_steps(buffer, np.array([[1.0], [2.0]]), *flags("-o"))
        assert buffer.returns_to_go[:2, 0].tolist() == expected

    def test_sparse_tail_online_is_the_infinite_sum_of_failure(self) -> None:
        buffer = self.filled("sparse")
        buffer.failure_reward = -1.0
        add_steps(buffer, np.array([[-1.0], [-1.0]]), *flags("-o"))
        assert buffer.returns_to_go[:2, 0].tolist() == [-2.0, -2.0]

    def test_ring_wraps_inside_an_episode(self) -> None:
        buffer = self.filled(size=4)
        add_steps(buffer, np.array([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]), *flags("-T---T"))
        # Rows 0 and 1 now hold 16 and 32, which ended the episode that began with 4 in row 2.
        assert buffer.rewards[:, 0].tolist() == [16, 32, 4, 8]
        assert buffer.returns_to_go[:, 0].tolist() == [32, 32, 4 + 4 + 4 + 4, 8 + 8 + 8]

    def test_episode_longer_than_the_ring(self) -> None:
        buffer = self.filled(size=2)
        add_steps(buffer, np.array([[1.0], [2.0], [4.0], [8.0], [16.0]]), *flags("----T"))
        assert buffer.returns_to_go[:, 0].tolist() == [16, 8 + 8]

    def test_reset_of_the_environment_does_not_join_two_episodes(self) -> None:
        buffer = self.filled()
        add_steps(buffer, np.array([[1.0], [2.0]]), *flags("--"))
        buffer.cut_running_episodes()
        add_steps(buffer, np.array([[4.0], [8.0]]), *flags("-T"))
        expected = [-INF, -INF, 8, 8]
        assert buffer.returns_to_go[:4, 0].tolist() == expected
        buffer.recompute_returns()
        assert buffer.returns_to_go[:4, 0].tolist() == expected, "the cut is remembered"

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_recomputing_changes_nothing(self, n_envs: int, rng: np.random.Generator) -> None:
        buffer = returns_to_go_buffer_class(ReplayBuffer)(20 * n_envs, BOX, ACTIONS, "cpu", n_envs=n_envs)
        ends = rng.integers(0, 6, size=(33, n_envs))
        add_steps(buffer, rng.normal(size=(33, n_envs)), ends == 0, ends == 1)
        before = buffer.returns_to_go.copy()
        assert np.isfinite(before).any()
        buffer.recompute_returns()
        np.testing.assert_allclose(buffer.returns_to_go, before, rtol=1e-6, atol=1e-6)


BASES = {
    "plain": (ReplayBuffer, BOX, {}),
    "compact": (ReplayBuffer, BOX, {"optimize_memory_usage": True, "handle_timeout_termination": False}),
    "dict": (DictReplayBuffer, DICT, {}),
    "n-step": (NStepReplayBuffer, BOX, {"n_steps": 3, "gamma": 0.5}),
}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", BASES)
class TestSampling:
    def pair(self, name: str, n_envs: int) -> tuple[ReplayBuffer, ReturnsToGoMixin]:
        base, space, kwargs = BASES[name]
        plain = base(40 * n_envs, space, ACTIONS, "cpu", n_envs=n_envs, **kwargs)
        rewards = np.arange(1.0, 50 * n_envs + 1).reshape(50, n_envs)  # wraps around
        ends = np.random.default_rng(1).integers(0, 8, size=(50, n_envs))
        add_steps(plain, rewards, ends == 0, ends == 1)
        return plain, with_returns_to_go(plain, gamma=0.5)

    def test_same_samples_as_sb3_and_the_return_of_the_same_row(self, name: str, n_envs: int) -> None:
        plain, ours = self.pair(name, n_envs)
        np.random.seed(3)
        expected = plain.sample(64)
        np.random.seed(3)
        sampled = ours.sample(64)
        for field in expected._fields:
            value, other = getattr(expected, field), getattr(sampled, field)
            if isinstance(value, dict):
                assert all(th.equal(value[key], other[key]) for key in value)
            else:
                assert value is other is None or th.equal(value, other), field
        # The action repeats its row's reward, which no other row has: find the row, and its return.
        rows = {round(float(a)): g for a, g in zip(ours.rewards.ravel(), ours.returns_to_go.ravel(), strict=True)}
        wanted = [rows[round(float(a) * 1000)] for a in sampled.actions[:, 0]]
        assert sampled.returns_to_go[:, 0].tolist() == wanted
        assert len(set(wanted)) > 5

    def test_sampling_leaves_the_buffer_as_it_was(self, name: str, n_envs: int) -> None:
        _, ours = self.pair(name, n_envs)
        before = ours.actions.copy(), ours.returns_to_go.copy()
        ours.sample(16)
        assert ours.actions.shape[-1] == 3
        assert np.array_equal(before[0], ours.actions)
        assert np.array_equal(before[1], ours.returns_to_go)

    def test_the_extended_buffer_is_left_alone(self, name: str, n_envs: int) -> None:
        plain, ours = self.pair(name, n_envs)
        assert not isinstance(plain, ReturnsToGoMixin)
        assert isinstance(ours, BASES[name][0])
        assert not np.shares_memory(plain.actions, ours.actions)
        assert with_returns_to_go(ours, gamma=0.5) is ours

    def test_pickles_whole_and_goes_on(self, name: str, n_envs: int) -> None:
        _, ours = self.pair(name, n_envs)
        again = pickle.loads(pickle.dumps(ours))
        assert type(again) is type(ours)
        assert np.array_equal(again.returns_to_go, ours.returns_to_go)
        rewards = np.full((1, n_envs), 7.0)
        for buffer in (ours, again):
            add_steps(buffer, rewards, np.ones((1, n_envs), bool), np.zeros((1, n_envs), bool))
        assert np.array_equal(again.returns_to_go, ours.returns_to_go)
        assert np.array_equal(again.actions, ours.actions)
        np.random.seed(0)
        first = ours.sample(8).returns_to_go
        np.random.seed(0)
        assert th.equal(first, again.sample(8).returns_to_go)


def test_relabelled_goals_have_the_return_of_their_rewards() -> None:
    """Written out in test_hindsight.py; here: after pickling, too."""
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True)])
    buffer = returns_to_go_buffer_class(HerReplayBuffer)(
        200,
        env.observation_space,
        env.action_space,
        env=env,
        device="cpu",
        n_sampled_goal=3,  # type: ignore[arg-type]
    )
    obs = env.reset()
    for _ in range(60):
        action = np.array([env.action_space.sample()])
        new_obs, reward, done, infos = env.step(action)
        after = {k: v[None] for k, v in infos[0]["terminal_observation"].items()} if done[0] else new_obs
        buffer.add({k: v.copy() for k, v in obs.items()}, after, action, reward, done, infos)  # type: ignore[union-attr]
        obs = new_obs
    assert th.isfinite(buffer.sample(64).returns_to_go).all()
    again = pickle.loads(pickle.dumps(buffer))
    with pytest.raises(AssertionError, match="VecEnv so it can compute rewards"):
        again.sample(8)
    again.set_env(env)
    np.random.seed(0)
    first = buffer.sample(8).returns_to_go
    np.random.seed(0)
    assert th.equal(first, again.sample(8).returns_to_go)


class TestVecNormalize:
    def env(self) -> VecNormalize:
        import gymnasium as gym

        return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), norm_obs=False, clip_reward=10.0)

    def filled(self, rewards: list[float]) -> ReturnsToGoMixin:
        buffer = returns_to_go_buffer_class(ReplayBuffer)(len(rewards), BOX, ACTIONS, "cpu")
        buffer.configure_returns(0.5)
        add_steps(buffer, np.array(rewards)[:, None], *flags("-" * (len(rewards) - 1) + "T"))
        return buffer

    def sampled(self, buffer: ReturnsToGoMixin, env: VecNormalize) -> dict[float, float]:
        """Reward the critic sees -> return-to-go that it sees."""
        samples = buffer.sample(200, env=env)
        return {
            round(r, 4): round(g, 4)
            for r, g in zip(samples.rewards[:, 0].tolist(), samples.returns_to_go[:, 0].tolist(), strict=True)
        }

    def test_returns_are_those_of_the_scaled_rewards(self) -> None:
        env, buffer = self.env(), self.filled([1.0, 2.0, 4.0])
        env.ret_rms.var, env.epsilon = np.array(4.0), 0.0
        assert self.sampled(buffer, env) == {0.5: 1.5, 1.0: 2.0, 2.0: 2.0}
        env.ret_rms.var = np.array(1.0)  # the scale moves on: so do the returns
        assert self.sampled(buffer, env) == {1.0: 3.0, 2.0: 4.0, 4.0: 4.0}

    def test_returns_are_those_of_the_clipped_rewards(self) -> None:
        env, buffer = self.env(), self.filled([1.0, 2.0, 100.0])
        env.ret_rms.var, env.epsilon = np.array(4.0), 0.0
        # 100 / 2 is clipped to 10.
        assert self.sampled(buffer, env) == {0.5: 0.5 + 0.5 + 2.5, 1.0: 1 + 5.0, 10.0: 10.0}
        env.norm_reward = False
        assert self.sampled(buffer, env) == {1.0: 27.0, 2.0: 52.0, 100.0: 100.0}


def test_an_unknown_base_is_extended_too() -> None:
    class Custom(ReplayBuffer):
        pass

    made = returns_to_go_buffer_class(Custom)
    assert issubclass(made, Custom)
    assert returns_to_go_buffer_class(Custom) is made
    assert returns_to_go_buffer_class(made) is made
