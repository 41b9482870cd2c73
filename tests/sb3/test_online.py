"""Offline to online through SB3's own loop: returns-to-go in the buffer, step by step, and what each batch is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL, CalQL, Checkpoints

INF = np.inf
OBSERVATIONS = spaces.Box(-1e6, 1e6, (2,), np.float32)
ACTIONS = spaces.Box(-2, 2, (1,), np.float32)


class Script(gym.Env[np.ndarray, np.ndarray]):
    """Plays written episodes: (rewards, "T" terminated or "o" timed out at the end), over and over."""

    def __init__(self, episodes: list[tuple[list[float], str]]) -> None:
        self.observation_space, self.action_space = OBSERVATIONS, ACTIONS
        self.episodes, self.episode, self.t = episodes, -1, 0

    def observe(self) -> np.ndarray:
        return np.array([self.episode, self.t], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rewards, end = self.episodes[self.episode % len(self.episodes)]
        reward = rewards[self.t]
        self.t += 1
        over = self.t == len(rewards)
        return self.observe(), reward, over and end == "T", over and end == "o", {}


class Snapshots(BaseCallback):
    """The returns-to-go of the buffer as they are when the next step begins."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[list[float]]] = []

    def _on_step(self) -> bool:
        self.take()
        return True

    def take(self) -> None:
        buffer = self.model.replay_buffer  # type: ignore[attr-defined]
        self.seen.append(buffer.returns_to_go[: buffer.size()].tolist())


def tiny_dataset(reward: float = 1.0) -> OfflineDataset:
    """Two episodes, one terminated and one timed out."""
    return from_arrays(
        np.arange(12.0, dtype=np.float32).reshape(6, 2),
        np.linspace(-1, 1, 6, dtype=np.float32)[:, None],
        np.full(6, reward, dtype=np.float32),
        np.array([0, 0, 1, 0, 0, 0], bool),
        np.array([0, 0, 0, 0, 0, 1], bool),
        next_observations=np.arange(2.0, 14.0, dtype=np.float32).reshape(6, 2),
        observation_space=OBSERVATIONS,
        action_space=ACTIONS,
    )


def make_model(env: Any, algorithm: type[CQL] = CalQL, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {
        "policy_kwargs": {"net_arch": [8]},
        "buffer_size": 64,
        "gamma": 0.5,
        "cql_n_actions": 2,
        "batch_size": 8,
        "seed": 0,
        "device": "cpu",
        "learning_starts": 0,
    }
    return algorithm("MlpPolicy", env, **(arguments | kwargs))


def run(model: Any, steps: int) -> list[list[list[float]]]:
    snapshots = Snapshots()
    model.learn(steps, callback=snapshots)
    snapshots.take()
    # The callback runs before a step is stored: the first snapshot is the empty buffer.
    assert snapshots.seen[0] == []
    return snapshots.seen[1:]


def test_returns_of_one_environment_step_by_step() -> None:
    """gamma is one half. 1, 2, 4 terminated; 8, 16 timed out; 32, 64 terminated; and the first again."""
    env = Script([([1.0, 2.0, 4.0], "T"), ([8.0, 16.0], "o"), ([32.0, 64.0], "T")])
    seen = run(make_model(env), 8)
    assert [[row[0] for row in snapshot] for snapshot in seen] == [
        [-INF],
        [-INF, -INF],
        [3, 4, 4],
        [3, 4, 4, -INF],
        [3, 4, 4, 16, 16],
        [3, 4, 4, 16, 16, -INF],
        [3, 4, 4, 16, 16, 64, 64],
        [3, 4, 4, 16, 16, 64, 64, -INF],
    ]


def test_returns_of_four_environments_step_by_step() -> None:
    scripts = [
        [([1.0, 2.0, 4.0], "T")],
        [([10.0], "T"), ([20.0, 40.0], "o")],
        [([100.0, 200.0, 400.0, 800.0, 1600.0], "o")],
        [([1000.0, 2000.0], "T"), ([4000.0], "o"), ([8000.0], "T")],
    ]
    env = DummyVecEnv([lambda s=s: Script(s) for s in scripts])
    seen = run(make_model(env), 16)
    assert seen == [
        [[-INF, 10, -INF, -INF]],
        [[-INF, 10, -INF, 2000], [-INF, -INF, -INF, 2000]],
        [[3, 10, -INF, 2000], [4, 40, -INF, 2000], [4, 40, -INF, 4000]],
        [[3, 10, -INF, 2000], [4, 40, -INF, 2000], [4, 40, -INF, 4000], [-INF, 10, -INF, 8000]],
    ]


def test_the_tail_of_a_time_out_online() -> None:
    episodes = [([1.0, 2.0], "o"), ([4.0, 8.0], "T")]
    none = run(make_model(Script(episodes), return_tail="none"), 4)[-1]
    assert [row[0] for row in none] == [-INF, -INF, 8, 8]
    zero = run(make_model(Script(episodes), return_tail="zero"), 4)[-1]
    assert [row[0] for row in zero] == [2, 2, 8, 8]


def test_sparse_failure_reward_comes_from_the_dataset() -> None:
    """Online, an episode of reward 0 alone is a success where the data's failures are -1."""
    data = tiny_dataset(-1.0)
    model = make_model(Script([([0.0, 0.0], "o"), ([-1.0, -1.0], "o")]), return_tail="sparse")
    model.learn_offline(data, 1)
    assert model.offline_buffer.returns_to_go[:, 0].tolist() == [-1.75, -1.5, -1.0, -2.0, -2.0, -2.0]
    assert [row[0] for row in run(model, 4)[-1]] == [0, 0, -2, -2]


def test_a_new_learn_call_does_not_join_episodes() -> None:
    model = make_model(Script([([1.0, 2.0, 4.0], "T")]))
    model.learn(2)
    model.learn(3)  # resets the environment in the middle of an episode
    assert model.replay_buffer.returns_to_go[:5, 0].tolist() == [-INF, -INF, 3, 4, 4]
    continued = make_model(Script([([1.0, 2.0, 4.0], "T")]))
    continued.learn(2)
    continued.learn(1, reset_num_timesteps=False)  # goes on with it
    assert continued.replay_buffer.returns_to_go[:3, 0].tolist() == [3, 4, 4]


class Stop(BaseCallback):
    """End the training at a step, by its answer or by an error."""

    def __init__(self, at: int, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.at, self.error = at, error

    def _on_step(self) -> bool:
        if self.n_calls == self.at and self.error is not None:
            raise self.error
        return self.n_calls != self.at


def stored(model: Any) -> list[list[tuple[list[float], list[float], float, float]]]:
    """Environment by environment: observation, next observation, reward and return of each step."""
    buffer = model.replay_buffer
    arrays = (buffer.observations, buffer.next_observations, buffer.rewards, buffer.returns_to_go)
    return [list(zip(*(array[: buffer.size(), k].tolist() for array in arrays), strict=True)) for k in range(buffer.n_envs)]


# gamma is one half; episodes of rewards 1, 2, 4 and of 8, 16, then the first again.
TWO_EPISODES: list[tuple[list[float], str]] = [([1.0, 2.0, 4.0], "T"), ([8.0, 16.0], "T")]
STEPS_OF_TWO_EPISODES = [
    ([0, 0], [0, 1], 1, 3),
    ([0, 1], [0, 2], 2, 4),
    ([0, 2], [0, 3], 4, 4),
    ([1, 0], [1, 1], 8, 16),
    ([1, 1], [1, 2], 16, 16),
]


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_that_a_callback_ended_goes_on_where_it_was(at: int, n_envs: int) -> None:
    """SB3 leaves before it stores the step at which the callback says no."""
    model = make_model(DummyVecEnv([lambda: Script(TWO_EPISODES)] * n_envs), learning_starts=100)
    model.learn(100, callback=Stop(at))
    model.learn((5 - at) * n_envs, reset_num_timesteps=False)
    assert stored(model) == [STEPS_OF_TWO_EPISODES] * n_envs


def test_a_run_that_an_error_ended_starts_a_new_episode() -> None:
    """The environment is at ``[0, 2]`` and the last step that is known ended at ``[0, 1]``."""
    model = make_model(Script(TWO_EPISODES), learning_starts=100)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=Stop(2, KeyboardInterrupt))
    model.learn(2, reset_num_timesteps=False)
    assert stored(model) == [[([0, 0], [0, 1], 1, -INF), *STEPS_OF_TWO_EPISODES[3:]]]


def test_a_run_that_a_callback_ended_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model = make_model(Script(TWO_EPISODES), learning_starts=100)
    Checkpoints(tmp_path).learn(model, 100, callback=Stop(2))
    run = Checkpoints(tmp_path)
    again = run.resume(make_model(Script(TWO_EPISODES), learning_starts=100))
    run.learn(again, 5)
    assert stored(again) == [STEPS_OF_TWO_EPISODES]


def test_bootstrap_tail_is_the_target_critics_value() -> None:
    """Where the target critics say c everywhere, the tail of a time-out is c and that of a termination is 0."""
    data = tiny_dataset(1.0)
    model = make_model(Script([([1.0], "o")]), return_tail="bootstrap")
    model.set_offline_data(data)
    for parameter in model.critic_target.parameters():
        parameter.data.zero_()
    for network in model.critic_target.q_networks:
        network[-1].bias.data.fill_(8.0)
    model.train(1, 8)
    assert model.offline_buffer.returns_to_go[:, 0].tolist() == pytest.approx([1.75, 1.5, 1.0, 2.75, 3.5, 5.0])


@pytest.mark.parametrize("algorithm", [CQL, CalQL])
@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8), ("proportional", None)])
def test_each_batch_has_its_share_of_the_dataset(algorithm: type[CQL], fraction: Any, expected: int | None) -> None:
    """Offline rewards are 1, online ones 2: count them in every batch that is trained on."""
    model = make_model(Script([([2.0, 2.0, 2.0], "T")]), algorithm, offline_fraction=fraction)
    model.learn_offline(tiny_dataset(1.0), 2)
    shares, sizes = [], []
    sample = model.sample_batch

    def count(batch_size: int) -> Any:
        batch = sample(batch_size)
        shares.append(int((batch.rewards == 1.0).sum()))
        sizes.append(model.replay_buffer.size())
        assert len(batch.rewards) == len(batch.actions) == len(batch.observations) == 8
        return batch

    model.sample_batch = count
    model.learn(12)
    assert len(shares) == 12
    if expected is None:
        assert shares == [round(8 * 6 / (6 + online)) for online in sizes]
        assert shares[0] == 7
        assert shares[-1] == 3
    else:
        assert shares == [expected] * 12


def test_offline_phase_uses_the_dataset_alone() -> None:
    model = make_model(Script([([2.0], "T")]))
    model.learn(10)
    model.set_offline_data(tiny_dataset(1.0))
    batches = []
    sample = model.sample_batch
    model.sample_batch = lambda n: batches.append(sample(n)) or batches[-1]
    model.learn_offline(tiny_dataset(1.0), 3)
    assert all((batch.rewards == 1.0).all() for batch in batches)
    assert len(batches) == 3


class TestVecNormalize:
    def data(self, n: int = 400) -> OfflineDataset:
        rng = np.random.default_rng(0)
        ends = np.arange(n) % 50 == 49
        observations = (rng.normal(size=(n, 2)) * [2, 30] + [5, -7]).astype(np.float32)
        return from_arrays(
            observations,
            rng.uniform(-2, 2, size=(n, 1)).astype(np.float32),
            rng.normal(size=n).astype(np.float32) * 4,
            np.zeros(n, bool),
            ends,
            next_observations=np.roll(observations, -1, axis=0),
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
        )

    def model(self, training: bool = True) -> tuple[Any, VecNormalize]:
        env = VecNormalize(DummyVecEnv([lambda: Script([([2.0], "T")])]), gamma=0.9, training=training)
        return make_model(env), env

    def test_untouched_statistics_are_those_of_the_dataset(self) -> None:
        model, env = self.model()
        data = self.data()
        model.set_offline_data(data)
        stored = model.offline_buffer.observations[:, 0]
        assert isinstance(env.obs_rms.mean, np.ndarray)  # type: ignore[union-attr]
        np.testing.assert_allclose(env.obs_rms.mean, stored.mean(0), rtol=1e-4)  # type: ignore[union-attr]
        np.testing.assert_allclose(env.obs_rms.var, stored.var(0), rtol=1e-3)  # type: ignore[union-attr]
        # The reward scale is what the wrapper would have found on its own.
        running, seen = 0.0, []
        for episode in data:
            running = 0.0
            for reward in episode.rewards:
                running = 0.9 * running + float(reward)
                seen.append(running)
        assert env.ret_rms.var == pytest.approx(np.var(seen), rel=1e-3)
        batch = model.sample_batch(200)
        assert abs(batch.observations.mean().item()) < 0.3
        assert batch.observations.std().item() == pytest.approx(1.0, abs=0.2)

    def test_returns_are_sums_of_the_normalised_rewards(self) -> None:
        model, env = self.model()
        model.set_offline_data(self.data())
        batch = model.sample_batch(300)
        scale = float(np.sqrt(env.ret_rms.var + env.epsilon))
        raw = model.offline_buffer.returns_to_go[:, 0] / scale
        pairs = {round(float(r), 5): g for r, g in zip(model.offline_buffer.rewards[:, 0] / scale, raw, strict=True)}
        wanted = [pairs[round(float(r), 5)] for r in batch.rewards[:, 0]]
        assert np.allclose(batch.returns_to_go[:, 0], wanted, rtol=1e-4, atol=1e-5)
        assert scale > 2, "the scale is not one, so the check can fail"

    def test_seen_or_frozen_statistics_are_left_alone(self) -> None:
        model, env = self.model()
        model.learn(30)
        before = env.obs_rms.mean.copy()  # type: ignore[union-attr]
        model.set_offline_data(self.data())
        assert np.array_equal(env.obs_rms.mean, before)  # type: ignore[union-attr]
        model, env = self.model(training=False)
        model.set_offline_data(self.data())
        assert np.array_equal(env.obs_rms.mean, np.zeros(2))  # type: ignore[union-attr]


def test_online_buffer_of_calql_carries_returns_and_cqls_is_sb3s_own() -> None:
    from stable_baselines3.common.buffers import ReplayBuffer

    env = Script([([1.0], "T")])
    assert type(make_model(env, CQL).replay_buffer) is ReplayBuffer
    calql = make_model(env, CalQL)
    assert isinstance(calql.replay_buffer, ReplayBuffer)
    assert calql.replay_buffer.returns_to_go.shape == (64, 1)
