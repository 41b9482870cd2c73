"""Conservative Q-learning with discrete actions on SB3's DQN and contrib's QR-DQN, beside both without conservatism.

    python benchmarks/discrete_sb3.py cartpole --seeds 0 1 2
    python benchmarks/discrete_sb3.py river --seeds 0 1 2

Every algorithm gets the same log, networks and gradient steps, then goes online from where it is. DQN and QR-DQN offline are
our classes with ``cql_alpha=0``, which a test holds to the hosts' own to the last bit.

``cartpole``: the log of ``discrete_cartpole.py``, made by a controller that acts at random half of the time or more.
``river``: pictures of 42 x 42 pixels. A walker crosses a river by its bridge to a goal; water ends the walk. Who made the log
never stepped into water, so nothing in it says what water does.

Writes ``results/discrete_sb3/<task>.json`` and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQLQRDQN, CalQLQRDQN, DiscreteCalQL, DiscreteCQL

RESULTS = Path(__file__).resolve().parent / "results" / "discrete_sb3"
NOISE = (0.4, 0.6, 0.8, 1.0)


class River(gym.Env[np.ndarray, int]):
    """A grid of 7 x 7 cells seen from above: water in the middle column, one bridge, a goal on the other side."""

    SIZE, SCALE, WATER, LIMIT = 7, 6, 3, 30
    MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
    observation_space = spaces.Box(0, 255, (SIZE * SCALE, SIZE * SCALE, 1), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Place bridge, walker and goal."""
        super().reset(seed=seed)
        self.bridge = int(self.np_random.integers(self.SIZE))
        self.place = np.array([self.np_random.integers(self.SIZE), self.np_random.integers(self.WATER)])
        self.goal = np.array([self.np_random.integers(self.SIZE), self.SIZE - 1])
        self.clock = 0
        return self._picture(), {}

    def _picture(self) -> np.ndarray:
        cells = np.zeros((self.SIZE, self.SIZE), np.uint8)
        cells[:, self.WATER] = 80
        cells[self.bridge, self.WATER] = 0
        cells[tuple(self.goal)] = 160
        cells[tuple(self.place)] = 255
        return np.kron(cells, np.ones((self.SCALE, self.SCALE), np.uint8))[..., None]

    def is_water(self, place: np.ndarray) -> bool:
        """Tell whether a cell is water."""
        return bool(place[1] == self.WATER and place[0] != self.bridge)

    def after(self, action: int) -> np.ndarray:
        """Where a move leads."""
        return np.clip(self.place + self.MOVES[int(action)], 0, self.SIZE - 1)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Walk one cell."""
        self.place = self.after(action)
        self.clock += 1
        arrived, drowned = bool((self.place == self.goal).all()), self.is_water(self.place)
        return self._picture(), float(arrived), arrived or drowned, self.clock >= self.LIMIT and not (arrived or drowned), {}


def control_pole(env: Any, observation: np.ndarray, noise: float, rng: np.random.Generator) -> int:
    """Lean against the fall, or act at random."""
    return int(rng.integers(2)) if rng.random() < noise else int(observation[2] + 0.3 * observation[3] > 0)


def cross_river(env: Any, observation: np.ndarray, noise: float, rng: np.random.Generator) -> int:
    """Walk to the bridge, over it and to the goal, or anywhere but into water."""
    world = env.unwrapped
    row, column = world.place
    if column < world.WATER - 1 or (column < world.SIZE - 1 and row == world.bridge and column <= world.WATER):
        action = 3
    elif column < world.WATER:
        action = 0 if row > world.bridge else 1
    elif column < world.SIZE - 1:
        action = 3
    else:
        action = 0 if row > world.goal[0] else 1
    if rng.random() < noise:
        action = int(rng.choice([a for a in range(4) if not world.is_water(world.after(a))]))
    return action


def make_log(make_env: Callable[[], Any], control: Callable[..., int], seed: int, n_episodes: int, name: str) -> OfflineDataset:
    """Play the episodes, a quarter of them at each rate of random actions."""
    rng, env = np.random.default_rng(seed), make_env()
    columns: dict[str, list[Any]] = {key: [] for key in ("o", "a", "r", "term", "trunc", "next")}
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        done = False
        while not done:
            action = control(env, observation, NOISE[episode % len(NOISE)], rng)
            after, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(columns, (observation, action, reward, terminated, truncated, after), strict=True):
                columns[key].append(value)
            observation, done = after, terminated or truncated
    a = {key: np.array(values) for key, values in columns.items()}
    return from_arrays(
        a["o"],
        a["a"],
        a["r"],
        a["term"],
        a["trunc"],
        next_observations=a["next"],
        observation_space=env.observation_space,
        action_space=env.action_space,
        name=name,
        prefer_termination=True,  # the pole may fall in the very step of the time limit
    )


COMMON: dict[str, Any] = {"gamma": 0.99, "train_freq": 1, "learning_starts": 0, "exploration_final_eps": 0.05, "device": "cpu"}
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "env": lambda: TimeLimit(CartPoleEnv(), 500),
        "control": control_pole,
        "episodes": 60,
        "policy": "MlpPolicy",
        "steps": 20_000,
        "online": 5000,
        "arguments": {"learning_rate": 3e-4, "batch_size": 64, "target_update_interval": 200},
        "networks": {"net_arch": [256, 256]},
        "alpha": {"dqn": 1.0, "qrdqn": 1.0},
    },
    "river": {
        "env": River,
        "control": cross_river,
        "episodes": 300,
        "policy": "CnnPolicy",
        "steps": 4000,
        "online": 2000,
        "arguments": {"learning_rate": 3e-4, "batch_size": 64, "target_update_interval": 200, "buffer_size": 20_000},
        "networks": {"features_extractor_kwargs": {"features_dim": 128}},
        "alpha": {"dqn": 0.1, "qrdqn": 0.1},
    },
}
ALGORITHMS: dict[str, tuple[Any, str, bool]] = {
    "DQN": (DiscreteCQL, "dqn", False),
    "DiscreteCQL": (DiscreteCQL, "dqn", True),
    "DiscreteCalQL": (DiscreteCalQL, "dqn", True),
    "QR-DQN": (CQLQRDQN, "qrdqn", False),
    "CQLQRDQN": (CQLQRDQN, "qrdqn", True),
    "CalQLQRDQN": (CalQLQRDQN, "qrdqn", True),
}


def evaluate(model: Any, make_env: Callable[[], Any], seed: int, n_episodes: int) -> list[float]:
    """Undiscounted returns of the greedy policy, in episodes that every algorithm gets alike."""
    env, returns = make_env(), []
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=10_000 * (seed + 1) + episode)
        total, done = 0.0, False
        while not done:
            picture = observation.transpose(2, 0, 1) if observation.ndim == 3 else observation
            action, _ = model.predict(picture, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def run(
    task: dict[str, Any], name: str, log: OfflineDataset, seed: int, steps: int, online: int, episodes: int
) -> dict[str, Any]:
    """Train one algorithm offline, then online; evaluate at a quarter of each, and at the ends."""
    algorithm, family, conservative = ALGORITHMS[name]
    networks = dict(task["networks"]) | ({"n_quantiles": 50} if family == "qrdqn" else {})
    model = algorithm(
        task["policy"],
        task["env"](),
        cql_alpha=task["alpha"][family] if conservative else 0.0,
        policy_kwargs=networks,
        seed=seed,
        **COMMON,
        **task["arguments"],
    )
    start, result = time.perf_counter(), {"offline": {}, "online": {}, "q_data": {}}  # type: ignore[var-annotated]
    model.verbose = 0
    for part in range(1, 5):
        model.learn_offline(log, steps // 4, log_interval=steps // 4)
        result["offline"][part * steps // 4] = evaluate(model, task["env"], seed, episodes)
        result["q_data"][part * steps // 4] = model.logger.name_to_value.get("train/q_data")
    for part in range(1, 5 if online else 1):
        model.learn(online // 4, reset_num_timesteps=part == 1, log_interval=10_000)
        result["online"][part * online // 4] = evaluate(model, task["env"], seed, episodes)
    return result | {"seconds": time.perf_counter() - start}


def table(title: str, runs: dict[str, Any], phase: str, seeds: list[int]) -> str:
    steps = list(next(iter(next(iter(runs.values())).values()))[phase])
    lines = [f"| {title} | " + " | ".join(f"{int(s):,}" for s in steps) + " | at the end, by seed |"]
    lines.append("|---|" + "---:|" * len(steps) + "---|")
    for name, by_seed in runs.items():
        means = {s: [float(np.mean(by_seed[seed][phase][s])) for seed in seeds] for s in steps}
        ends = ", ".join(f"{m:.3g}" for m in means[steps[-1]])
        lines.append(f"| {name} | " + " | ".join(f"{np.mean(m):.3g}" for m in means.values()) + f" | {ends} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="offline gradient steps")
    parser.add_argument("--online", type=int, help="environment steps")
    parser.add_argument("--algorithms", nargs="*", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--cql-alpha", type=float, help="another weight than the task's")
    parser.add_argument("--name", help="of the file of results; the task's where not given")
    parser.add_argument("--eval-episodes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    task = TASKS[arguments.task]
    if arguments.cql_alpha is not None:
        task = task | {"alpha": dict.fromkeys(task["alpha"], arguments.cql_alpha)}
    steps = arguments.steps or task["steps"]
    online = task["online"] if arguments.online is None else arguments.online

    logs: dict[int, list[float]] = {}
    runs: dict[str, dict[int, Any]] = {name: {} for name in arguments.algorithms}
    for seed in arguments.seeds:
        log = make_log(task["env"], task["control"], seed, task["episodes"], arguments.task)
        logs[seed] = log.episode_returns.tolist()
        for name in arguments.algorithms:
            result = runs[name][seed] = run(task, name, log, seed, steps, online, arguments.eval_episodes)
            shown = {phase: [round(float(np.mean(r)), 2) for r in result[phase].values()] for phase in ("offline", "online")}
            print(f"seed {seed}  {name:14} {shown}  {result['seconds']:.0f} s", flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numpy")}
    command = {key: value for key, value in vars(arguments).items() if key != "results"} | {"steps": steps, "online": online}
    record = {"command": command, "versions": versions, "python": platform.python_version(), "logs": logs, "runs": runs}
    (arguments.results / f"{arguments.name or arguments.task}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    log_mean = np.mean([np.mean(returns) for returns in logs.values()])
    print(f"\nThe log: mean return {log_mean:.3g}, {task['episodes']} episodes a seed\n")
    for phase in ("offline", "online") if online else ("offline",):
        print(table(phase, runs, phase, arguments.seeds), end="\n\n")


if __name__ == "__main__":
    main()
