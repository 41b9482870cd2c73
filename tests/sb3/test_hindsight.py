"""Goals relabelled in hindsight, offline and online: the rewards are the environment's, the returns those of the rewards."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins.adapters import DatasetError, OfflineDataset
from cql_plugins.sb3 import CQL, CalQL, ScaleReward

INF = float("inf")
PLACE = spaces.Box(-100.0, 100.0, (1,), np.float32)
GOALS = spaces.Dict({"observation": PLACE, "achieved_goal": PLACE, "desired_goal": PLACE})


class Line(gym.Env[Any, Any]):
    """Only the spaces and the reward: -1 where the place is not the goal, 0 where it is."""

    observation_space, action_space = GOALS, spaces.Box(-1.0, 1.0, (1,), np.float32)

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        return -(np.abs(achieved_goal - desired_goal)[..., 0] > 0.5).astype(np.float64)


def column(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def two_episodes() -> OfflineDataset:
    """0, 1, 2, 3 ends at its goal 3; 10, 11, 12, 11 is cut off, its goal 20 never reached. Observations name the rows."""
    return OfflineDataset(
        {
            "observation": column([0, 1, 2, 3, 10, 11, 12, 13]),
            "achieved_goal": column([0, 1, 2, 3, 10, 11, 12, 11]),
            "desired_goal": column([3, 3, 3, 3, 20, 20, 20, 20]),
        },
        column([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        np.array([-1.0, -1.0, 0.0, -1.0, -1.0, -1.0]),
        np.array([False, False, True, False, False, False]),
        np.array([False, False, False, False, False, True]),
        observation_space=GOALS,
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        name="two",
    )


# (observation, new goal): (reward, return), gamma one half, failure -1: what never ends is worth -2.
FINAL = {
    (0, 3): (-1, -1.5),
    (1, 3): (-1, -1.0),
    (2, 3): (0, 0.0),
    (10, 11): (0, -0.5),
    (11, 11): (-1, -1.0),
    (12, 11): (0, 0.0),
}
FUTURE = FINAL | {
    (0, 1): (0, -0.75),
    (0, 2): (-1, -1.25),
    (1, 2): (0, -0.5),
    (10, 12): (-1, -1.25),
    (11, 12): (0, -0.5),
}
EPISODE = FUTURE | {
    (1, 1): (-1, -1.5),  # all failure, but terminated: it ends
    (2, 1): (-1, -1.0),
    (2, 2): (-1, -1.0),
    (12, 12): (-1, -2.0),  # a goal that was left, and a cut: it never ends
}
REAL = {
    (0, 3): (-1, -1.5),
    (1, 3): (-1, -1.0),
    (2, 3): (0, 0.0),
    (10, 20): (-1, -2.0),
    (11, 20): (-1, -2.0),
    (12, 20): (-1, -2.0),
}
TABLES = {"final": FINAL, "future": FUTURE, "episode": EPISODE}


def model_on(env: Any, algorithm: Any = CalQL, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "gamma": 0.5,
        "buffer_size": 100,
        "batch_size": 8,
        "cql_n_actions": 2,
        "policy_kwargs": {"net_arch": [8]},
        "device": "cpu",
        "seed": 0,
        "replay_buffer_class": HerReplayBuffer,
        "replay_buffer_kwargs": {"n_sampled_goal": 3, **changes.pop("hindsight", {})},
    }
    if algorithm is CalQL:
        arguments["return_tail"] = "sparse"
    return algorithm("MultiInputPolicy", env, **arguments | changes)


def sampled(buffer: Any, n: int = 400, env: Any = None) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Real and virtual transitions of a batch: (observation, goal) to (reward, return)."""
    np.random.seed(1)
    batch = buffer.sample(n, env=env)
    # All fields of one row, goals before and after the step alike.
    assert th.equal(batch.observations["desired_goal"], batch.next_observations["desired_goal"])
    keys = zip(batch.observations["observation"][:, 0].tolist(), batch.observations["desired_goal"][:, 0].tolist(), strict=True)
    values = zip(batch.rewards[:, 0].tolist(), batch.returns_to_go[:, 0].tolist(), strict=True)
    pairs = list(zip(keys, values, strict=True))
    n_virtual = int(buffer.her_ratio * n)
    return dict(pairs[: n - n_virtual]), dict(pairs[n - n_virtual :])


class TestTwoEpisodes:
    @pytest.mark.parametrize("strategy", ["final", "future", "episode"])
    def test_every_reward_and_return(self, strategy: str) -> None:
        model = model_on(Line(), hindsight={"goal_selection_strategy": strategy})
        model.set_offline_data(two_episodes())
        real, virtual = sampled(model.offline_buffer)
        assert virtual == TABLES[strategy]
        assert real == REAL

    def test_bookkeeping_and_options_of_the_model(self) -> None:
        model = model_on(Line(), hindsight={"n_sampled_goal": 7, "goal_selection_strategy": "final", "copy_info_dict": True})
        buffer = two_episodes().to_sb3(model)
        assert isinstance(buffer, HerReplayBuffer)
        assert buffer.ep_start[:, 0].tolist() == [0, 0, 0, 3, 3, 3]
        assert buffer.ep_length[:, 0].tolist() == [3] * 6
        assert buffer.her_ratio == 1 - 1 / 8
        assert buffer.env is model.env
        assert (buffer.dones[:, 0].tolist(), buffer.timeouts[:, 0].tolist()) == ([0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1])

    def test_terminations_are_the_stored_ones(self) -> None:
        model = model_on(Line(), hindsight={"goal_selection_strategy": "episode"})
        batch = model.set_offline_data(two_episodes()).offline_buffer.sample(200)
        assert th.equal(batch.dones[:, 0] == 1, batch.observations["observation"][:, 0] == 2)

    @pytest.mark.parametrize(
        ("tail", "changed"),
        [
            # The truncated episode's remainder without success is a partial sum of failures.
            ("zero", {(12, 12): (-1, -1.0)}),
            ("none", {key: (value[0], -INF) for key, value in EPISODE.items() if key[0] >= 10}),
            # No value of the last observation is known for the new goal.
            ("bootstrap", {key: (value[0], -INF) for key, value in EPISODE.items() if key[0] >= 10}),
        ],
    )
    def test_other_tails(self, tail: str, changed: dict[Any, Any]) -> None:
        model = model_on(Line(), hindsight={"goal_selection_strategy": "episode"}, return_tail=tail)
        _, virtual = sampled(model.set_offline_data(two_episodes()).offline_buffer)
        assert virtual == EPISODE | changed

    def test_twin_that_keeps_the_logged_returns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_on(Line(), hindsight={"goal_selection_strategy": "final"})
        buffer = model.set_offline_data(two_episodes()).offline_buffer
        monkeypatch.setattr(
            type(buffer), "_relabelled_returns", lambda self, rows, columns, *_: self.returns_to_go[rows, columns]
        )
        _, virtual = sampled(buffer)
        assert virtual.keys() == FINAL.keys()
        assert {key: value[1] for key, value in virtual.items()} != {key: value[1] for key, value in FINAL.items()}

    def test_an_algorithm_without_a_bound_gets_the_same_goals(self) -> None:
        model = model_on(Line(), CQL, hindsight={"goal_selection_strategy": "future"})
        model.learn_offline(two_episodes(), 2)
        _, virtual = sampled(model.offline_buffer)
        assert {key: value[0] for key, value in virtual.items()} == {key: value[0] for key, value in FUTURE.items()}

    def test_without_hindsight_nothing_is_relabelled(self) -> None:
        model = model_on(Line(), replay_buffer_class=None, replay_buffer_kwargs=None)
        batch = model.set_offline_data(two_episodes()).offline_buffer.sample(100)
        assert set(batch.observations["desired_goal"][:, 0].tolist()) == {3.0, 20.0}

    def test_no_goal_sampled_is_no_hindsight(self) -> None:
        model = model_on(Line(), hindsight={"n_sampled_goal": 0})
        buffer = two_episodes().to_sb3(model)
        batch = buffer._get_virtual_samples(np.zeros(0, np.int64), np.zeros(0, np.int64))
        assert batch.actions.shape[0] == 0


class TestUnits:
    """Rewards 10 r + 5 are -5 and 5 in the data: the environment has to say the same."""

    def scaled(self) -> OfflineDataset:
        return two_episodes().scale_rewards(10.0, 5.0)

    def test_wrapped_environment(self) -> None:
        model = model_on(ScaleReward(Line(), 10.0, 5.0), hindsight={"goal_selection_strategy": "final"})
        _, virtual = sampled(model.set_offline_data(self.scaled()).offline_buffer)
        # -5 - 2.5 + 1.25; -5 + 2.5; 5; 5 - 2.5 + 1.25; -5 + 2.5; 5
        assert virtual == {
            (0, 3): (-5, -6.25),
            (1, 3): (-5, -2.5),
            (2, 3): (5, 5),
            (10, 11): (5, 3.75),
            (11, 11): (-5, -2.5),
            (12, 11): (5, 5),
        }

    @pytest.mark.parametrize(
        ("dataset", "env", "values"),
        [
            ("scaled", Line(), "row 0 the stored reward is -5, compute_reward gives -1"),
            ("scaled", gym.wrappers.TransformReward(Line(), lambda r: 10.0 * r + 5.0), "is -5, compute_reward gives -1"),
            ("plain", ScaleReward(Line(), 10.0, 5.0), "row 0 the stored reward is -1, compute_reward gives -5"),
            ("scaled", ScaleReward(Line(), 10.0, 6.0), "row 0 the stored reward is -5, compute_reward gives -4"),
        ],
    )
    def test_other_units_are_refused(self, dataset: str, env: Any, values: str) -> None:
        data = self.scaled() if dataset == "scaled" else two_episodes()
        with pytest.raises(DatasetError, match=f"two, field 'rewards': 6 of 6 stored rewards are not what .*{values}"):
            model_on(env).learn_offline(data, 1)

    def test_a_scale_alone_shows_in_the_one_success(self) -> None:
        """Failure is 0 in both units, and a sample of rows might miss the success."""
        data = two_episodes().scale_rewards(10.0, 10.0)
        long = OfflineDataset.concatenate([data[1:]] * 999 + [data])
        with pytest.raises(DatasetError, match=r"1 of 1001 stored .* reward is 10, compute_reward gives 1"):
            long.to_sb3(model_on(ScaleReward(Line(), 1.0, 1.0)))

    def test_goal_handed_out_after_success(self) -> None:
        """PointMaze shows the new goal one step late: the reward is that of the goal seen after the step."""
        data = two_episodes()
        goals = data.observations["desired_goal"].copy()
        goals[4] = 11
        stale = OfflineDataset(
            data.observations | {"desired_goal": goals},
            data.actions,
            data.rewards,
            data.terminations,
            data.truncations,
            observation_space=GOALS,
            action_space=data.action_space,
        )
        assert stale.to_sb3(model_on(Line())).size() == 6

    def test_online_rewards_in_other_units_are_told(self, host: Any) -> None:
        env = gym.wrappers.TransformReward(host.Corridor("goal"), lambda reward: 10.0 * float(reward))
        model = model_on(env, learning_starts=50)
        with pytest.warns(UserWarning, match="stored reward is -10, compute_reward gives -1.*ScaleReward") as caught:
            model.learn(40)
        assert len(caught) == 1

    def test_online_rewards_in_one_unit(self, host: Any) -> None:
        model = model_on(ScaleReward(host.Corridor("goal"), 10.0, 5.0), learning_starts=10)
        model.learn_offline(host.collect("goal").scale_rewards(10.0, 5.0), 2).learn(30)
        assert set(model.sample_batch(200).rewards[:, 0].tolist()) == {-5.0, 5.0}
        assert model.replay_buffer.failure_reward == -5.0


class TestRefused:
    def test_no_compute_reward(self, host: Any) -> None:
        model = model_on(host.Spaces(GOALS, Line.action_space))
        with pytest.raises(DatasetError, match=r"two: hindsight relabelling .* needs an environment with compute_reward"):
            model.learn_offline(two_episodes(), 1)

    def test_no_environment(self) -> None:
        model = model_on(Line())
        model.env = None
        with pytest.raises(DatasetError, match="the model has no environment"):
            two_episodes().to_sb3(model)

    def test_no_goals(self, host: Any) -> None:
        space = spaces.Dict({"observation": PLACE, "desired_goal": PLACE})
        data = two_episodes()
        observations = {key: data.observations[key] for key in space}
        less = OfflineDataset(
            observations,
            data.actions,
            data.rewards,
            data.terminations,
            data.truncations,
            observation_space=space,
            action_space=data.action_space,
        )
        with pytest.raises(DatasetError, match=r"\['achieved_goal'\] are missing"):
            less.to_sb3(model_on(host.Spaces(space, Line.action_space)))

    def test_reward_for_one_goal_at_a_time(self) -> None:
        class Single(Line):
            def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> Any:
                return -float(np.abs(achieved_goal - desired_goal).max() > 0.5)

        with pytest.raises(ValueError, match=r"must be vectorised .* 6 rewards of shape \(6,\), got shape \(\)"):
            two_episodes().to_sb3(model_on(Single()))


# Against a loop -------------------------------------------------------------------------------------------------------


def by_hand(
    buffer: Any, row: int, env_index: int, goal: np.ndarray, tail: str, gamma: float, failure: float, limit: float
) -> float:
    """The return of one relabelled transition, step by step in float64."""
    rewards, flags = [], None
    while flags is None:
        achieved = buffer.next_observations["achieved_goal"][row, env_index]
        rewards.append(float(np.clip(-float(abs(achieved[0] - goal[0]) > 0.5), -limit, limit)))
        if buffer.dones[row, env_index]:
            flags = bool(buffer.timeouts[row, env_index])
        row = (row + 1) % buffer.buffer_size
    if flags and tail == "none":
        return -INF
    value = 0.0
    failure = float(np.clip(failure, -limit, limit))  # as the critic sees it
    if flags and tail == "sparse" and all(reward == failure for reward in rewards):
        value = failure / (1.0 - gamma)
    for reward in reversed(rewards):
        value = reward + gamma * value
    return value


@pytest.mark.parametrize("tail", ["zero", "sparse", "none"])
@pytest.mark.parametrize("strategy", ["final", "future", "episode"])
@pytest.mark.parametrize(("n_envs", "copy_info_dict", "clip"), [(1, False, None), (3, True, None), (2, False, 0.25)])
def test_equal_to_a_loop(host: Any, tail: str, strategy: str, n_envs: int, copy_info_dict: bool, clip: float | None) -> None:
    """Online, around the ring's end, several environments, and rewards clipped by VecNormalize."""
    gamma = 0.9
    env: Any = DummyVecEnv([lambda: host.Corridor("goal", limit=9) for _ in range(n_envs)])
    if clip is not None:
        env = VecNormalize(env, norm_obs=False, clip_reward=clip)
    model = model_on(
        env,
        gamma=gamma,
        return_tail=tail,
        buffer_size=40 * n_envs,
        learning_starts=10**6,
        hindsight={"goal_selection_strategy": strategy, "copy_info_dict": copy_info_dict},
    )
    model.learn(71 * n_envs)
    buffer = model.replay_buffer
    assert buffer.full
    scale = 1.0 if clip is None else float(np.sqrt(env.ret_rms.var + env.epsilon))
    limit = INF if clip is None else clip * scale
    np.random.seed(4)
    batch = buffer.sample(200, env=model._vec_normalize_env)
    n_real = 200 - int(buffer.her_ratio * 200)
    before = buffer.observations["observation"]
    expected = []
    for i in range(n_real, 200):
        row, env_index = np.argwhere((before == batch.observations["observation"][i].numpy()).all(axis=-1))[0]
        goal = batch.observations["desired_goal"][i].numpy()
        expected.append(by_hand(buffer, row, env_index, goal, tail, gamma, -1.0, limit) / scale)
    # One rounding of a sum of at most 9 rewards (or of 10 for what never ends) to float32, and one of the division.
    np.testing.assert_allclose(batch.returns_to_go[n_real:, 0], expected, rtol=2 * 2.0**-24, atol=1e-7)
    assert np.isfinite(expected).any() or tail == "none"
    assert len(set(expected)) > 3


def test_a_running_episode_is_not_relabelled(host: Any) -> None:
    model = model_on(host.Corridor("goal", limit=6, start=0.0), learning_starts=10**6)
    model.learn(20)
    buffer = model.replay_buffer
    running = int(buffer._running_length[0])
    assert running > 0
    last = buffer.observations["observation"][buffer.pos - running : buffer.pos, 0, 1]
    seen = buffer.sample(300).observations["observation"][:, 1].numpy()
    assert not np.isin(last[1:], seen).any(), "the first row of each episode is the same"


def test_an_episode_broken_off_by_a_reset_has_no_return(host: Any) -> None:
    """SB3 joins it to the next one; the sum of both would be nobody's return."""
    model = model_on(host.Corridor("goal", limit=6, start=0.0), learning_starts=10**6, return_tail="zero")
    model.learn(3)
    model.learn(12)
    buffer = model.replay_buffer
    assert not buffer.dones[:3].any()
    assert buffer.ep_length[0, 0] > 6, "joined"
    batch = buffer.sample(200)
    rows = [
        (buffer.observations["observation"][:, 0] == o).all(axis=-1).argmax() for o in batch.observations["observation"].numpy()
    ]
    broken_off = np.isin(rows, [1, 2])  # row 0 looks as all first rows do
    whole = np.array(rows) > 3
    returns = batch.returns_to_go[:, 0].numpy()
    assert broken_off.any()
    assert np.isneginf(returns[broken_off]).all()
    assert np.isfinite(returns[whole]).all()


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_offline_share_of_a_batch(host: Any, fraction: float) -> None:
    model = model_on(host.Corridor("goal"), learning_starts=10, offline_fraction=fraction, batch_size=40)
    model.learn_offline(host.collect("goal"), 1).learn(30)
    logged = model.offline_buffer.observations["observation"][:, 0]
    batch = model.sample_batch(40)
    from_log = [(logged == row).all(axis=-1).any() for row in batch.observations["observation"].numpy()]
    assert sum(from_log) == 40 * fraction
    assert th.isfinite(batch.returns_to_go).all()


def test_saved_and_loaded(host: Any, tmp_path: Any) -> None:
    model = model_on(host.Corridor("goal"))
    model.learn_offline(host.collect("goal"), 2)
    model.save(tmp_path / "model")
    again = CalQL.load(tmp_path / "model", env=host.Corridor("goal"))
    again.set_offline_data(host.collect("goal")).learn(30)
    assert isinstance(again.offline_buffer, HerReplayBuffer)


class TestScaleReward:
    @pytest.mark.parametrize(("scale", "shift"), [(0.0, 1.0), (INF, 0.0), (1.0, float("nan"))])
    def test_out_of_range(self, scale: float, shift: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            ScaleReward(Line(), scale, shift)

    def test_step_and_goals_agree(self, host: Any) -> None:
        env = ScaleReward(host.Corridor("goal", start=0.0), 10.0, -5.0)
        env.reset()
        observation, reward, *_ = env.step(np.array([3.0], dtype=np.float32))
        assert reward == -15.0
        goals = np.array([[0.0], [observation["achieved_goal"][0]]], dtype=np.float32)
        assert env.compute_reward(observation["achieved_goal"], goals, {}).tolist() == [-15.0, -5.0]

    def test_environment_without_goals(self, host: Any) -> None:
        env = ScaleReward(host.Corridor("vector", start=0.0), 2.0, 1.0)
        env.reset()
        assert env.step(np.zeros(1, dtype=np.float32))[1] == 3.0
        plain = ScaleReward(host.Spaces(PLACE, Line.action_space))
        with pytest.raises(AttributeError, match="compute_reward"):
            plain.compute_reward(0, 0, {})
