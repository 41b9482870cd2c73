"""Dict observations end to end: sets shaped as those of PointMaze, AntMaze and Kitchen, through Minari into training."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer

from cql_plugins._nested import flatten_space, flatten_tree, is_nested
from cql_plugins.adapters import DatasetError, OfflineDataset, from_minari
from cql_plugins.sb3 import CQL, CalQL, FlattenNestedObservation

TASKS = {"bottom burner": 2, "kettle": 7, "microwave": 1}
"""Three of Kitchen's, with its names and the sizes of their places."""


def box(n: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (n,), np.float64)


def maze_space(n: int) -> spaces.Dict:
    return spaces.Dict({"observation": box(n), "achieved_goal": box(2), "desired_goal": box(2)})


KITCHEN_GOALS = spaces.Dict({task: box(n) for task, n in TASKS.items()})
LAYOUTS = {
    "pointmaze": (maze_space(4), 2),
    "antmaze": (maze_space(27), 8),
    "kitchen": (spaces.Dict({"observation": box(59), "achieved_goal": KITCHEN_GOALS, "desired_goal": KITCHEN_GOALS}), 9),
}


class Layout(gym.Env[Any, Any]):
    """The observations and the sparse reward of one of the three, for a point that is pushed about."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.observation_space, n_actions = LAYOUTS[name]
        self.action_space = spaces.Box(-1.0, 1.0, (n_actions,), np.float32)

    def _observe(self) -> dict[str, Any]:
        observation = np.zeros(self.observation_space["observation"].shape)
        observation[:2] = self.place
        if self.name == "kitchen":
            achieved = {task: np.full(n, self.place[0]) for task, n in TASKS.items()}
            return {
                "observation": observation,
                "achieved_goal": achieved,
                "desired_goal": {t: v + 1 for t, v in achieved.items()},
            }
        return {"observation": observation, "achieved_goal": self.place.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.goal, self.clock = self.np_random.normal(size=2), self.np_random.normal(size=2), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = self.place + 0.5 * action[:2]
        self.clock += 1
        reward = 0.0 if self.name == "kitchen" else float(self.compute_reward(self.place, self.goal, {}))
        return self._observe(), reward, False, self.clock == 5, {}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return (np.linalg.norm(achieved_goal - desired_goal, axis=-1) <= 0.45).astype(np.float64)


def logged(name: str, n_episodes: int = 6) -> OfflineDataset:
    """Random actions, stored with Minari and read back."""
    for module in ("minari", "h5py"):
        pytest.importorskip(module)
    env = Layout(name)
    env.action_space.seed(1)
    observations, actions, rewards = [], [], []
    for episode in range(n_episodes):
        observations.append(env.reset(seed=episode)[0])
        for _ in range(5):
            actions.append(env.action_space.sample())
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
    truncations = np.arange(len(rewards)) % 5 == 4

    def stacked(trees: list[Any]) -> Any:
        if isinstance(trees[0], dict):
            return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}
        return np.stack(trees)

    OfflineDataset(
        stacked(observations),
        np.stack(actions),
        np.array(rewards),
        np.zeros(len(rewards), bool),
        truncations,
        observation_space=env.observation_space,
        action_space=env.action_space,
    ).to_minari(f"made/{name}-v0")
    return from_minari(f"made/{name}-v0")


ARGUMENTS: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "buffer_size": 50,
    "batch_size": 8,
    "learning_starts": 6,
    "cql_n_actions": 2,
    "device": "cpu",
    "seed": 0,
}


@pytest.mark.parametrize("algorithm", [CQL, CalQL])
@pytest.mark.parametrize("name", LAYOUTS)
def test_offline_then_online(name: str, algorithm: Any) -> None:
    dataset = logged(name)
    assert dataset.observation_space == LAYOUTS[name][0]
    env = FlattenNestedObservation(Layout(name)) if name == "kitchen" else Layout(name)
    model = algorithm("MultiInputPolicy", env, **ARGUMENTS)
    before = th.cat([p.detach().flatten().clone() for p in model.policy.parameters()])
    model.learn_offline(dataset, 3)
    buffer = model.offline_buffer
    assert isinstance(buffer, DictReplayBuffer)
    # Every leaf, at every row, before and after the step.
    flat = dataset.flatten_observations()
    rows = flat.observation_rows(np.arange(len(flat)))
    assert buffer.observations.keys() == flat.observations.keys() == set(model.observation_space)
    for key, values in flat.observations.items():
        np.testing.assert_array_equal(buffer.observations[key][:, 0], values[rows])
        np.testing.assert_array_equal(buffer.next_observations[key][:, 0], values[rows + 1])
    if algorithm is CalQL:
        np.testing.assert_array_equal(buffer.returns_to_go[:, 0], dataset.returns_to_go(0.99))
    model.learn(14)
    assert model._n_updates == 3 + 8
    after = th.cat([p.detach().flatten() for p in model.policy.parameters()])
    assert th.isfinite(after).all()
    assert not th.equal(before, after)
    assert model.predict(env.reset(seed=0)[0])[0].shape == (LAYOUTS[name][1],)


@pytest.mark.parametrize("name", ["pointmaze", "antmaze"])
def test_hindsight(name: str) -> None:
    model = CalQL("MultiInputPolicy", Layout(name), replay_buffer_class=HerReplayBuffer, return_tail="sparse", **ARGUMENTS)
    model.learn_offline(logged(name), 2).learn(14)
    batch = model.sample_batch(40)
    distance = (batch.next_observations["achieved_goal"] - batch.observations["desired_goal"]).norm(dim=1)
    assert th.equal(batch.rewards[:, 0], (distance <= 0.45).float())
    assert th.isfinite(batch.returns_to_go).all()


def test_kitchen_has_no_goal_to_relabel() -> None:
    model = CalQL(
        "MultiInputPolicy", FlattenNestedObservation(Layout("kitchen")), replay_buffer_class=HerReplayBuffer, **ARGUMENTS
    )
    with pytest.raises(DatasetError, match=r"\['achieved_goal', 'desired_goal'\] are missing in Dict"):
        model.learn_offline(logged("kitchen"), 1)


def test_kitchen_without_an_environment() -> None:
    dataset = logged("kitchen")
    model = CalQL.from_dataset(dataset, **ARGUMENTS)
    model.learn_offline(dataset, 2)
    observation = {key: values[0] for key, values in dataset.flatten_observations().observations.items()}
    assert model.predict(observation)[0].shape == (9,)


def test_nested_environment_is_told_how() -> None:
    dataset = logged("kitchen")
    with pytest.raises(DatasetError, match=r"nested dict observations, wrap the environment in .*FlattenNestedObservation"):
        dataset.to_sb3(Layout("kitchen"))


def test_wrong_leaf_of_a_nested_set() -> None:
    goals = spaces.Dict({task: box(n + (task == "kettle")) for task, n in TASKS.items()})
    space = spaces.Dict(LAYOUTS["kitchen"][0].spaces | {"desired_goal": goals})
    env = Layout("kitchen")
    env.observation_space = space
    with pytest.raises(DatasetError, match=r"at key 'desired_goal/kettle', shape \(7,\) is not \(8,\)"):
        logged("kitchen").to_sb3(FlattenNestedObservation(env))


class TestFlattening:
    SPACE = spaces.Dict({"b": spaces.Dict({"y": box(1), "x": spaces.Dict({"deep": spaces.Discrete(3)})}), "a": box(2)})

    def test_names_and_leaves(self) -> None:
        assert is_nested(self.SPACE)
        assert flatten_space(self.SPACE) == spaces.Dict({"a": box(2), "b/x/deep": spaces.Discrete(3), "b/y": box(1)})
        tree = {"b": {"y": [1.0], "x": {"deep": 2}}, "a": [3.0, 4.0]}
        assert flatten_tree(tree) == {"b/y": [1.0], "b/x/deep": 2, "a": [3.0, 4.0]}

    def test_what_is_flat_stays_as_it_is(self) -> None:
        for flat in (maze_space(4), box(1)):
            assert flatten_space(flat) is flat
            assert not is_nested(flat)

    def test_two_leaves_with_one_name(self) -> None:
        with pytest.raises(ValueError, match="Two leaves would have the key 'a/b'"):
            flatten_tree({"a": {"b": 1}, "a/b": 2})

    def test_arrays_are_shared(self) -> None:
        dataset = logged("kitchen")
        flat = dataset.flatten_observations()
        kettle = flat.observations["desired_goal/kettle"]
        assert np.shares_memory(kettle, dataset.observations["desired_goal"]["kettle"])
        assert not kettle.flags.writeable
        assert flat.flatten_observations() is flat
        assert len(flat) == len(dataset)

    def test_wrapper_gives_what_the_space_says(self) -> None:
        env = FlattenNestedObservation(Layout("kitchen"))
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        assert list(observation) == list(env.observation_space)
        assert env.step(env.action_space.sample())[0]["desired_goal/bottom burner"].shape == (2,)

    def test_wrapper_refuses_what_is_no_dict(self, host: Any) -> None:
        with pytest.raises(ValueError, match="expected a Dict observation space, got Box"):
            FlattenNestedObservation(host.Corridor())
