"""What the algorithms are compared on: data, environment, budget and the settings that every algorithm gets alike.

Four tasks make their data on the spot, from hand-written controllers, the same for every algorithm and seed; the others read
the files under ``CQL_PLUGINS_DATA`` (see README.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from cql_plugins.adapters import OfflineDataset, from_arrays, from_d4rl, from_minari

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CQL_PLUGINS_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Task:
    """One comparison.

    Attributes:
        load: Reads or makes the data.
        make_env: To evaluate and fine-tune in.
        steps: Offline gradient steps, evaluated each ``eval_every``.
        online_steps: Environment steps afterwards, evaluated each ``online_eval_every``.
        eval_episodes: Episodes of an evaluation.
        net_arch: Hidden layers of actors and critics.
        batch_size: Transitions of a gradient step.
        gamma: Discount.
        normalize_observations: Whether observations are normalised by the data's mean and variance.
        host: Settings of SAC that ours inherit, in SB3's words; d3rlpy's get the same in theirs.
        common: Settings of CQL and Cal-QL, in our words; d3rlpy's get the same in theirs.
        iql: Settings of IQL, in d3rlpy's words, from its published reproduction.
        return_tail: Of Cal-QL.
        precision: Of our algorithms; bfloat16 wins nothing with small networks.
        reference: Returns of score 0 and 100; none where D4RL's table has them.
    """

    load: Callable[[], OfflineDataset]
    make_env: Callable[[], gym.Env[Any, Any]]
    steps: int
    eval_every: int
    eval_episodes: int
    online_steps: int = 0
    online_eval_every: int = 1000
    net_arch: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    gamma: float = 0.99
    normalize_observations: bool = False
    host: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    iql: dict[str, Any] = field(default_factory=dict)
    return_tail: str = "zero"
    precision: str = "bf16"
    reference: tuple[float, float] | None = None

    @property
    def is_discrete(self) -> bool:
        """Whether actions are numbered."""
        return isinstance(self.make_env().action_space, gym.spaces.Discrete)

    def cut(self, fraction: float) -> Task:
        """The same with a fraction of the steps, and as many evaluations."""
        names = ("steps", "eval_every", "online_steps", "online_eval_every")
        return replace(self, **{name: int(getattr(self, name) * fraction) for name in names})

    def score(self, returns: list[float]) -> float:
        """Turn undiscounted returns into the mean normalised score."""
        if self.reference is None:
            return float(np.mean(self.load().normalized_score(returns)))
        low, high = self.reference
        return float(100 * (np.mean(returns) - low) / (high - low))


# Data of our own making ---------------------------------------------------------------------------------------------------


def play(
    make_env: Callable[[], gym.Env[Any, Any]],
    control: Callable[[np.ndarray], Any],
    noises: tuple[float, ...],
    n_episodes: int,
    seed: int,
    name: str,
) -> OfflineDataset:
    """Log episodes of a controller, an equal share at each rate of random actions."""
    env, rng = make_env(), np.random.default_rng(seed)
    env.action_space.seed(seed)
    rows: list[tuple[Any, ...]] = []
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        ended = False
        while not ended:
            random = rng.random() < noises[episode % len(noises)]
            action = env.action_space.sample() if random else control(observation)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, terminated, truncated and not terminated, following))
            observation, ended = following, terminated or truncated
    before, actions, rewards, terminations, truncations, after = (np.stack(column) for column in zip(*rows, strict=True))
    return from_arrays(
        before,
        actions,
        rewards,
        terminations,
        truncations,
        next_observations=after,
        observation_space=env.observation_space,
        action_space=env.action_space,
        name=name,
    )


def control_pole(observation: np.ndarray) -> int:
    """Lean against the fall."""
    return int(observation[2] + 0.3 * observation[3] > 0)


def control_pendulum(observation: np.ndarray) -> np.ndarray:
    """Pump energy until the top is near, then hold it there [Astrom and Furuta 2000]."""
    cosine, sine, speed = (float(x) for x in observation)
    angle = np.arctan2(sine, cosine)
    # Of a rod of length and mass 1 under g = 10 about its end, relative to resting at the top.
    energy = speed**2 / 6 + 5 * (cosine - 1)
    torque = -20 * angle - 4 * speed if abs(angle) < 0.6 else -4 * np.sign(speed or 1.0) * energy
    return np.clip(np.array([torque], np.float32), -2.0, 2.0)


def make_pendulum() -> gym.Env[Any, Any]:
    """Pendulum, 200 steps."""
    return gym.make("Pendulum-v1")


@cache
def pendulum_log() -> OfflineDataset:
    """A quarter each of 25, 50, 75 and 100 % random actions."""
    return play(make_pendulum, control_pendulum, (0.25, 0.5, 0.75, 1.0), 100, 0, "pendulum-mixed")


@cache
def cartpole_log() -> OfflineDataset:
    """A quarter each of 40, 60, 80 and 100 % random actions."""
    return play(lambda: gym.make("CartPole-v1"), control_pole, (0.4, 0.6, 0.8, 1.0), 60, 0, "cartpole-mixed")


@cache
def quickstart() -> Any:
    """The example that has the river, its bridge and the careful walkers."""
    spec = spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def bridge_log() -> OfflineDataset:
    """Sixty careful walks: hardly any off the bridge."""
    log: OfflineDataset = quickstart().make_log(seed=0)
    return log


def make_pointmaze(shift: float) -> gym.Env[Any, Any]:
    """PointMaze with one goal an episode, its observation one vector, so that every package takes it."""
    import pointmaze

    from cql_plugins.sb3 import ScaleReward

    return ScaleReward(gym.wrappers.FlattenObservation(pointmaze.make_env()), shift=shift)


@cache
def pointmaze_log(shift: float) -> OfflineDataset:
    """A hundred episodes of a waypoint controller with noise: a step at the goal is paid, nothing terminates."""
    import pointmaze

    env = make_pointmaze(shift)
    log = pointmaze.collect(100, seed=0)
    steps = log.transitions(np.arange(len(log)))
    before, after = (
        np.concatenate([np.asarray(observations[key]) for key in sorted(observations)], axis=1)
        for observations in (steps.observations, steps.next_observations)
    )
    flat = from_arrays(
        before,
        steps.actions,
        steps.rewards,
        steps.terminations,
        steps.truncations,
        next_observations=after,
        observation_space=env.observation_space,
        action_space=env.action_space,
        name="pointmaze-waypoints",
    )
    return flat.scale_rewards(shift=shift)


# Data of others -----------------------------------------------------------------------------------------------------------


def load_minari(name: str) -> Callable[[], OfflineDataset]:
    """Return a reader of a Minari set of the shared data."""

    @cache
    def read() -> OfflineDataset:
        if not (DATA / "minari").is_dir():  # Minari would make it.
            raise FileNotFoundError(f"No data sets in {DATA}: set CQL_PLUGINS_DATA to the folder that has minari/ and d4rl/.")
        os.environ.setdefault("MINARI_DATASETS_PATH", str(DATA / "minari"))
        return from_minari(name)

    return read


@cache
def medium_expert() -> OfflineDataset:
    """Half of it by a medium agent, half by an expert."""
    return from_d4rl(DATA / "d4rl" / "halfcheetah-medium-expert.hdf5")


class D4RLDoorReward(gym.Wrapper[Any, Any, Any, Any]):
    """Give AdroitHandDoor the reward of D4RL: gymnasium-robotics adds the hand's distance instead of subtracting it."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and turn the sign of the distance term."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward) - 0.2 * float(np.linalg.norm(observation[35:38])), terminated, truncated, info


def make_adroit(env_id: str) -> gym.Env[Any, Any]:
    """An environment of gymnasium-robotics."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(env_id)


def make_door() -> gym.Env[Any, Any]:
    """AdroitHandDoor as D4RL rewards it."""
    return D4RLDoorReward(make_adroit("AdroitHandDoor-v1"))


class EndsWhenDropped(gym.Wrapper[Any, Any, Any, Any]):
    """Adroit's pen as D4RL has it: 100 steps, and over when the pen falls below 0.075 m."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and look where the pen is."""
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, float(reward), bool(observation[26] < 0.075), truncated, info


def make_pen() -> gym.Env[Any, Any]:
    """AdroitHandPen with D4RL's end."""
    env = make_adroit("AdroitHandPen-v1")
    return gym.wrappers.TimeLimit(EndsWhenDropped(env.unwrapped), 100)


BRIDGE = Task(
    bridge_log,
    lambda: quickstart().Bridge(),
    steps=4000,
    eval_every=500,
    eval_episodes=50,
    online_steps=2000,
    online_eval_every=250,
    net_arch=(64, 64),
    batch_size=128,
    gamma=0.95,
    host={"tau": 0.01, "ent_coef": "auto_0.1"},
    common={"cql_alpha": 1.0, "learning_rate": 1e-3, "actor_learning_rate": 1e-3},
    iql={"expectile": 0.7, "weight_temp": 3.0},
    precision="f32",
    reference=(0.0, 10.0),
)
POINTMAZE = Task(
    partial(pointmaze_log, 0.0),
    partial(make_pointmaze, 0.0),
    steps=5000,
    eval_every=500,
    eval_episodes=20,
    online_steps=3000,
    online_eval_every=500,
    common={"cql_alpha": 5.0, "actor_learning_rate": 1e-4},
    iql={"expectile": 0.9, "weight_temp": 10.0},
    return_tail="bootstrap",
    reference=(0.0, 300.0),
)
TASKS: dict[str, Task] = {
    "pendulum": Task(
        pendulum_log,
        make_pendulum,
        steps=10_000,
        eval_every=1000,
        eval_episodes=10,
        net_arch=(64, 64),
        batch_size=128,
        gamma=0.98,  # RL Zoo's for TD3: after 200 steps 0.018 is left, so that a return tells nearly all of a value
        common={"cql_alpha": 1.0, "actor_learning_rate": 3e-4, "learning_rate": 1e-3},
        iql={"expectile": 0.7, "weight_temp": 3.0},
        return_tail="bootstrap",
        precision="f32",
        reference=(-1230.0, -150.0),  # random actions, about the best there is
    ),
    "bridge": BRIDGE,
    "bridge-long": replace(BRIDGE, steps=8000, online_steps=0),
    # Rewards 1 lower, as usual where a goal is paid: new critics, near 0, then start above the values and not below them.
    "pointmaze": replace(
        POINTMAZE, load=partial(pointmaze_log, -1.0), make_env=partial(make_pointmaze, -1.0), reference=(-300.0, 0.0)
    ),
    "pointmaze-unshifted": replace(POINTMAZE, online_steps=0),
    "cartpole": Task(
        cartpole_log,
        lambda: gym.make("CartPole-v1"),
        steps=10_000,
        eval_every=1000,
        eval_episodes=20,
        online_steps=5000,
        net_arch=(64, 64),
        batch_size=64,
        common={"cql_alpha": 1.0, "learning_rate": 3e-4},
        precision="f32",
        reference=(0.0, 500.0),
    ),
    "halfcheetah-replay": Task(
        load_minari("published-policies/halfcheetah/replay-v0"),
        lambda: gym.make("HalfCheetah-v5"),
        steps=10_000,
        eval_every=1250,
        eval_episodes=5,
        common={"cql_alpha": 5.0},
        iql={"expectile": 0.7, "weight_temp": 3.0},
    ),
    "halfcheetah-medium-expert": Task(
        medium_expert,
        lambda: gym.make("HalfCheetah-v5"),
        steps=10_000,
        eval_every=1250,
        eval_episodes=5,
        common={"cql_alpha": 5.0},
        iql={"expectile": 0.7, "weight_temp": 3.0},
    ),
    "door-human": Task(
        load_minari("dapg/door/human-replay-v0"),
        make_door,
        steps=5000,
        eval_every=1000,
        eval_episodes=10,
        normalize_observations=True,
        common={"cql_alpha": 1.0, "actor_learning_rate": 1e-4},
        iql={"expectile": 0.7, "weight_temp": 0.5},
    ),
    "pen-expert": Task(
        load_minari("dapg/pen/expert-regen-v0"),
        make_pen,
        steps=5000,
        eval_every=1000,
        eval_episodes=20,
        normalize_observations=True,
        common={"cql_alpha": 1.0, "actor_learning_rate": 1e-4},
        iql={"expectile": 0.7, "weight_temp": 0.5},
    ),
}
