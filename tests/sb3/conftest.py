"""Small environments, datasets and models for the tests of CQL and Cal-QL in SAC's place; each costs milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import cql_plugins.sb3
from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3.actor_critic import ConservativeActorCritic

QUANTILES: tuple[type[BaseAlgorithm], ...] = ()
"""Host classes with quantiles, and among them those of discrete actions; empty without sb3-contrib."""
QUANTILES_OF_DISCRETE: tuple[type[BaseAlgorithm], ...] = ()
if find_spec("sb3_contrib") is not None:
    from sb3_contrib import QRDQN, TQC

    QUANTILES, QUANTILES_OF_DISCRETE = (QRDQN, TQC), (QRDQN,)

SIDE = 36
"""Height and width of images: the smallest that SB3's network takes."""
POLICIES = {"vector": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy", "goal": "MultiInputPolicy"}


class Corridor(gym.Env[Any, np.ndarray]):
    """A point on a line: an action pushes it, the middle pays best, a wall ends the episode, as does the time limit.

    The bounds of the actions are not symmetric, so that a scaling left out or done twice shows.

    Attributes:
        taken: The actions as the environment got them.
        seen: The positions that it showed, one before each action.
    """

    WALL = 2.0

    def __init__(
        self,
        form: str = "vector",
        limit: int = 8,
        channels_first: bool = False,
        start: float | None = None,
        discrete: bool = False,
    ) -> None:
        self.form, self.limit, self.channels_first, self.start = form, limit, channels_first, start
        self.discrete = discrete
        self.action_space: spaces.Space[Any] = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 3.0, (1,), np.float32)
        vector = spaces.Box(-10.0, 10.0, (2,), np.float32)
        image = spaces.Box(0, 255, (1, SIDE, SIDE) if channels_first else (SIDE, SIDE, 1), np.uint8)
        place = spaces.Box(-10.0, 10.0, (1,), np.float32)
        self.observation_space: spaces.Space[Any] = {
            "vector": vector,
            "image": image,
            "dict": spaces.Dict({"camera": image, "state": vector, "room": spaces.Discrete(3)}),
            "goal": spaces.Dict({"observation": vector, "achieved_goal": place, "desired_goal": place}),
        }[form]
        self.position, self.speed, self.clock = 0.0, 0.0, 0
        self.taken: list[np.ndarray] = []
        self.seen: list[float] = []

    def _vector(self) -> np.ndarray:
        return np.array([self.position, self.speed], dtype=np.float32)

    def _image(self) -> np.ndarray:
        picture = np.zeros((SIDE, SIDE), dtype=np.uint8)
        picture[:, int(np.clip((self.position / self.WALL + 1.0) * SIDE / 2.0, 0, SIDE - 1))] = 255
        return picture[None] if self.channels_first else picture[..., None]

    def _observe(self) -> Any:
        if self.form == "vector":
            return self._vector()
        if self.form == "image":
            return self._image()
        if self.form == "dict":
            return {"camera": self._image(), "state": self._vector(), "room": self.clock % 3}
        achieved = np.array([self.position], dtype=np.float32)
        return {"observation": self._vector(), "achieved_goal": achieved, "desired_goal": np.zeros(1, dtype=np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        start = self.np_random.uniform(-1.0, 1.0) if self.start is None else self.start
        self.position, self.speed, self.clock = float(start), 0.0, 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken.append(np.array(action, copy=True))
        self.seen.append(self.position)
        push = 2.0 * int(action) - 1.0 if self.discrete else float(action[0])
        self.speed = 0.5 * self.speed + 0.2 * push
        self.position = float(np.float32(self.position + self.speed))
        self.clock += 1
        hit = abs(self.position) > self.WALL
        observation = self._observe()
        if self.form == "goal":
            reward = float(self.compute_reward(observation["achieved_goal"], observation["desired_goal"], {}))
        else:
            reward = 1.0 - abs(self.position)
        return observation, reward, hit, not hit and self.clock >= self.limit, {"is_success": abs(self.position) < 0.5}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: Any) -> np.ndarray:
        return -(np.abs(achieved - desired)[..., 0] > 0.5).astype(np.float32)

    def render(self) -> None:
        return None


class Spaces(gym.Env[Any, Any]):
    """Random observations of any space, for actions of any space."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], limit: int = 6) -> None:
        self.observation_space, self.action_space, self.limit, self.clock = observation_space, action_space, limit, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.clock = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.clock += 1
        return self.observation_space.sample(), float(self.clock), False, self.clock >= self.limit, {}


def corridors(n_envs: int = 1, **kwargs: Any) -> VecEnv:
    return DummyVecEnv([lambda: Corridor(**kwargs) for _ in range(n_envs)])


def collect(form: str = "vector", steps: int = 60, reward: float | None = None, **kwargs: Any) -> OfflineDataset:
    """Log random actions in a corridor; the data always ends with an episode's end. A constant reward tags the rows."""
    env, rows = Corridor(form, **kwargs), []
    env.action_space.seed(3)
    observation, _ = env.reset(seed=3)
    while len(rows) < steps or not (rows[-1][4] or rows[-1][5]):
        action = env.action_space.sample()
        following, paid, terminated, truncated, _ = env.step(action)
        rows.append((observation, following, action, paid if reward is None else reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else following
    before, after, actions, rewards, terminations, truncations = zip(*rows, strict=True)
    return from_arrays(
        _stack(before),
        np.stack(actions),
        np.array(rewards),
        np.array(terminations),
        np.array(truncations),
        next_observations=_stack(after),
        observation_space=env.observation_space,
        action_space=env.action_space,
        name="corridor",
    )


def _stack(observations: Any) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)


def tiny(model_class: type[BaseAlgorithm], form: str = "vector", **changes: Any) -> dict[str, Any]:
    """Arguments that keep a model of this class small: networks, buffers, batches, sampled actions."""
    policy_kwargs: dict[str, Any] = {"net_arch": [8]}
    if form == "image":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    elif form == "dict":
        policy_kwargs["features_extractor_kwargs"] = {"cnn_output_dim": 8}
    arguments: dict[str, Any] = {
        "policy_kwargs": policy_kwargs | changes.pop("policy_kwargs", {}),
        "buffer_size": 200,
        "batch_size": 8,
        "learning_starts": 10,
        "seed": 0,
        "device": "cpu",
    }
    if issubclass(model_class, ConservativeActorCritic):
        arguments["cql_n_actions"] = 2
    if issubclass(model_class, QUANTILES):
        arguments["policy_kwargs"].setdefault("n_quantiles", 5)
    return arguments | changes


def build(model_class: type[Any], env: Any = None, form: str = "vector", policy: Any = None, **changes: Any) -> Any:
    """Make a small model on a corridor, or on the environment given."""
    env = corridors(form=form, discrete=issubclass(model_class, (DQN, *QUANTILES_OF_DISCRETE))) if env is None else env
    return model_class(policy or POLICIES[form], env, **tiny(model_class, form, **changes))


def state(model: Any) -> dict[str, th.Tensor]:
    """Copy every tensor that training changes: networks, targets, entropy and Lagrange variables, optimisers."""
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for name in ("log_ent_coef", "log_cql_lagrange"):
        if getattr(model, name, None) is not None:
            tensors[name] = getattr(model, name)
    optimizers = {
        "actor": getattr(getattr(model, "actor", None), "optimizer", None),
        "critic": getattr(getattr(model, "critic", None), "optimizer", None),
        "ent_coef": getattr(model, "ent_coef_optimizer", None),
        "lagrange": getattr(model, "cql_lagrange_optimizer", None),
        "policy": getattr(model.policy, "optimizer", None),
    }
    for owner, optimizer in optimizers.items():
        if optimizer is not None:
            tensors |= {f"{owner}.{name}": value for name, value in _leaves(optimizer.state_dict())}
    return {name: value.detach().clone() for name, value in tensors.items()}


class _Missing(type):
    """Of a stand-in for a class: a test that would use it is skipped."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pytest.skip("sb3-contrib is not installed")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        pytest.skip("sb3-contrib is not installed")


def of_contrib(*names: str) -> list[Any]:
    """Classes of `cql_plugins.sb3` whose host is in sb3-contrib."""
    if find_spec("sb3_contrib") is None:
        return [_Missing(name, (), {}) for name in names]
    return [getattr(cql_plugins.sb3, name) for name in names]


@pytest.fixture(autouse=True)
def needs_contrib(request: pytest.FixtureRequest) -> None:
    """Skip a test with such a parameter before anything else looks at it."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and any(isinstance(value, _Missing) for value in callspec.params.values()):
        pytest.skip("sb3-contrib is not installed")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, th.Tensor]]:
    if isinstance(tree, (dict, list, tuple)):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(branch, f"{prefix}.{key}")
    elif isinstance(tree, (int, float, th.Tensor)):
        yield prefix, th.as_tensor(tree)


def differing(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> set[str]:
    """Name the tensors that are not the same to the last bit, or that only one of the two has."""
    both = first.keys() & second.keys()
    return {name for name in both if not th.equal(first[name], second[name])} | (first.keys() ^ second.keys())


def networks(names: set[str]) -> set[str]:
    """The part of a name that says which network it belongs to."""
    return {name.split(".")[1] for name in names if name.startswith("policy.")}


@pytest.fixture
def host() -> SimpleNamespace:
    """The helpers of this file; a fixture, since test files do not import each other."""
    return SimpleNamespace(
        Corridor=Corridor,
        Spaces=Spaces,
        build=build,
        collect=collect,
        corridors=corridors,
        differing=differing,
        networks=networks,
        state=state,
        tiny=tiny,
    )


@pytest.fixture
def dataset() -> OfflineDataset:
    return collect()


@pytest.fixture
def quiet_progress_bar(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """Let SB3's progress bars draw nothing; the call gives those that were made."""
    import stable_baselines3.common.callbacks as callbacks

    made: list[Any] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total, self.n, self.closed = total, 0, False
            made.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(callbacks, "tqdm", Bar)
    return lambda: made
