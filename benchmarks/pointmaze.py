"""Goal-conditioned Cal-QL on PointMaze (UMaze, sparse reward), offline then online, with and without hindsight relabelling.

    python benchmarks/pointmaze.py data --data runs/minari
    python benchmarks/pointmaze.py train hindsight --data runs/minari --precision bf16    # and `train plain`
    python benchmarks/pointmaze.py figure

``data`` logs a waypoint controller by the open recipe of D4RL and Minari (value iteration on the grid of the maze, a PD
controller to the next cell's centre, Gaussian noise of 0.5 on each action) and stores it with Minari. Unlike there an episode
has one goal and 300 steps, as in the environment that Minari's sets name for evaluation: the point stays at the goal once it is
there, nothing terminates, and every step at the goal is paid. ``train`` goes on from its last offline checkpoint when it was
stopped (the online phase starts anew).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from train import commit

from cql_plugins.adapters import OfflineDataset, from_arrays, from_minari
from cql_plugins.ensembles import PRECISIONS
from cql_plugins.sb3 import CalQL, ScaleReward
from cql_plugins.sb3.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pointmaze"
DATASET = "cql-plugins/pointmaze-umaze-waypoints-v0"
ENV = "PointMaze_UMaze-v3"
FAMILY = PRESETS["antmaze"]
SCALE, SHIFT = FAMILY.reward_scale, FAMILY.reward_shift
PRESET = FAMILY.arguments(CalQL)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hindsight": {
        "replay_buffer_class": HerReplayBuffer,
        "replay_buffer_kwargs": {"n_sampled_goal": 4, "goal_selection_strategy": "future"},
    },
}


def make_env() -> gym.Env[Any, Any]:
    """One goal an episode: it stays where it is when it was reached, and the episode ends by its limit of 300 steps."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(ENV, continuing_task=True, reset_target=False)


# Data -----------------------------------------------------------------------------------------------------------------


class WaypointController:
    """Drives through the centres of the cells on the shortest way to the goal."""

    def __init__(self, maze: Any, gain: float = 10.0, damping: float = -1.0, threshold: float = 0.1) -> None:
        self.maze, self.gain, self.damping, self.threshold = maze, gain, damping, threshold
        self.free = np.array([[cell != 1 for cell in row] for row in maze.maze_map])
        self.goal: np.ndarray | None = None

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Return the action without noise, in [-1, 1]."""
        position, goal = observation["achieved_goal"], observation["desired_goal"]
        if self.goal is None or not np.array_equal(goal, self.goal):
            self.goal, self.goal_cell = goal.copy(), self._cell(goal)
            self.values = self._iterate_values(self.goal_cell)
            self.cell = self._next(self._cell(position))
        target = self._place(self.cell)
        if self.cell != self.goal_cell and np.linalg.norm(target - position) <= self.threshold:
            self.cell = self._next(self.cell)
            target = self._place(self.cell)
        return np.clip(self.gain * (target - position) + self.damping * observation["observation"][2:], -1.0, 1.0)

    def _cell(self, place: np.ndarray) -> tuple[int, int]:
        row, column = self.maze.cell_xy_to_rowcol(place)
        return int(row), int(column)

    def _place(self, cell: tuple[int, int]) -> np.ndarray:
        assert self.goal is not None
        return self.goal if cell == self.goal_cell else self.maze.cell_rowcol_to_xy(np.array(cell))

    def _neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        row, column = cell
        around = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        return [other for other in around if self.free[other]]

    def _iterate_values(self, goal: tuple[int, int]) -> np.ndarray:
        """Value iteration with -1 a move: the values are minus the distances."""
        values = np.full(self.free.shape, -float(self.free.size))
        values[goal] = 0.0
        for _ in range(self.free.size):
            for cell in zip(*np.nonzero(self.free), strict=True):
                if cell != goal:
                    values[cell] = max(values[other] for other in self._neighbours(cell)) - 1.0
        return values

    def _next(self, cell: tuple[int, int]) -> tuple[int, int]:
        return cell if cell == self.goal_cell else max(self._neighbours(cell), key=lambda other: self.values[other])


def collect(n_episodes: int, seed: int) -> OfflineDataset:
    """Log the controller with noise."""
    env = make_env()
    controller, rng = WaypointController(env.unwrapped.maze), np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        ended = False
        while not ended:
            action = np.clip(controller.act(observation) + 0.5 * rng.standard_normal(2), -1.0, 1.0).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, terminated, truncated, following))
            observation, ended = following, terminated or truncated
    before, actions, rewards, terminations, truncations, after = zip(*rows, strict=True)

    def stacked(observations: Any) -> dict[str, np.ndarray]:
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}

    return from_arrays(
        stacked(before),
        np.stack(actions),
        np.array(rewards),
        np.array(terminations),
        np.array(truncations),
        next_observations=stacked(after),
        observation_space=env.observation_space,
        action_space=env.action_space,
        env_id=ENV,
    )


def make_data(arguments: argparse.Namespace) -> None:
    """Log, store with Minari, read back, report."""
    collect(arguments.episodes, arguments.seed).to_minari(
        DATASET, algorithm_name="value iteration, waypoints, PD controller", description=f"seed {arguments.seed}"
    )
    dataset = from_minari(DATASET)
    print(dataset.summary())
    print(f"episodes that reach their goal: {np.mean(dataset.episode_returns > 0):.3f}")


# Training -------------------------------------------------------------------------------------------------------------


class Judge:
    """Success rate of the deterministic policy: episodes in which the goal is reached at any step, always the same ones."""

    def __init__(self, n_episodes: int, first_seed: int = 10_000) -> None:
        self.envs = [make_env() for _ in range(n_episodes)]
        self.first_seed = first_seed

    def success_rate(self, model: CalQL) -> float:
        """Play all episodes side by side."""
        running = {i: env.reset(seed=self.first_seed + i)[0] for i, env in enumerate(self.envs)}
        n_reached = 0
        while running:
            batch = {key: np.stack([o[key] for o in running.values()]) for key in next(iter(running.values()))}
            actions, _ = model.predict(batch, deterministic=True)  # type: ignore[arg-type]
            for i, action in zip(list(running), actions, strict=True):
                observation, reward, _, truncated, _ = self.envs[i].step(action)
                running[i] = observation
                if reward > 0 or truncated:
                    n_reached += reward > 0
                    del running[i]
        return n_reached / len(self.envs)


class EvaluateEvery(BaseCallback):
    """Call `record(step, model)` after each `interval` steps of the phase's clock."""

    def __init__(self, interval: int, record: Callable[[int, CalQL], None]) -> None:
        super().__init__()
        self.interval, self.record = interval, record

    def _on_step(self) -> bool:
        if self.num_timesteps % self.interval == 0:
            assert isinstance(self.model, CalQL)
            self.record(self.num_timesteps, self.model)
        return True


def train(arguments: argparse.Namespace) -> None:
    """Train one arm, offline and then online."""
    th.set_num_threads(arguments.threads)
    preset = PRESET | {"normalize_gap": arguments.normalize_gap, "precision": arguments.precision}
    name = f"{arguments.arm}{'_normalized' if arguments.normalize_gap else ''}_seed{arguments.seed}"
    for folder in (arguments.results, arguments.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    result_path, checkpoint = arguments.results / f"{name}.json", arguments.checkpoints / f"pointmaze_{name}.zip"

    raw = from_minari(DATASET)
    dataset = raw.scale_rewards(SCALE, SHIFT)
    env = Monitor(ScaleReward(make_env(), SCALE, SHIFT))
    judge = Judge(arguments.eval_episodes)
    result: dict[str, Any]
    start = time.time()

    def recorder(phase: str) -> Callable[[int, CalQL], None]:
        def record(step: int, model: CalQL) -> None:
            model._record_metrics()
            logged = {k.removeprefix("train/"): round(v, 4) for k, v in model.logger.name_to_value.items() if k[:6] == "train/"}
            success = judge.success_rate(model)
            result[phase].append({"step": step, "success": success, "seconds": round(time.time() - start, 1), **logged})
            result_path.write_text(json.dumps(result, indent=1) + "\n")
            if phase == "offline":
                model.save(checkpoint)
            shown = {key: logged[key] for key in ("q_data", "cql_gap", "cql_alpha", "bound_rate") if key in logged}
            print(f"{name} {phase} {step:>6} success {success:.2f} {shown} {time.time() - start:.0f} s", flush=True)

        return record

    command = {
        key: str(value) for key, value in vars(arguments).items() if key not in ("results", "checkpoints", "data", "run")
    }
    if checkpoint.exists() and result_path.exists():
        result = json.loads(result_path.read_text()) | {"command": command, "online": []}
        model = CalQL.load(checkpoint, env=env, device="cpu")
        print(f"{name}: goes on after {model._n_offline_steps} gradient steps", flush=True)
    else:
        result = {
            "command": command,
            "commit": commit(),
            "versions": {
                p: version(p)
                for p in ("torch", "stable-baselines3", "gymnasium", "gymnasium-robotics", "mujoco", "minari", "numpy")
            },
            "python": platform.python_version(),
            "device": "CPU",
            "dataset": {
                "name": raw.name,
                "episodes": raw.n_episodes,
                "transitions": len(raw),
                "success": float(np.mean(raw.episode_returns > 0)),
            },
            "arguments": {key: str(value) for key, value in (preset | ARMS[arguments.arm]).items()},
            "offline": [],
            "online": [],
        }
        model = CalQL(
            "MultiInputPolicy",
            env,
            seed=arguments.seed,
            device="cpu",
            **copy.deepcopy(preset),
            **copy.deepcopy(ARMS[arguments.arm]),
        )
    remaining = arguments.steps - model._n_offline_steps
    if remaining > 0:
        callback = EvaluateEvery(arguments.eval_every, recorder("offline"))
        model.learn_offline(dataset, remaining, callback=callback, log_interval=0)
    model.set_random_seed(arguments.seed)
    model.set_offline_data(dataset)
    callback = EvaluateEvery(arguments.eval_every, recorder("online"))
    model.learn(arguments.online_steps, callback=callback, log_interval=10**9)
    returns = [episode["r"] for episode in model.ep_info_buffer or ()]
    result["online_episodes"] = {"count": len(returns), "reached": sum(r > SHIFT * 300 for r in returns)}
    result["finished"] = time.strftime("%Y-%m-%d", time.gmtime())
    result_path.write_text(json.dumps(result, indent=1) + "\n")


# Figure ---------------------------------------------------------------------------------------------------------------


def draw(arguments: argparse.Namespace) -> None:
    """Draw success over both phases, one curve a run, and print the table."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    results = {path.stem: json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))}
    if not results:
        raise SystemExit(f"expected results under {arguments.results}, got none: run `train` first")
    figure, axes = plt.subplots(figsize=(8.0, 4.0))
    switch = max(point["step"] for result in results.values() for point in result["offline"])
    for name, result in results.items():
        points = [(p["step"], p["success"]) for p in result["offline"]]
        points += [(switch + p["step"], p["success"]) for p in result["online"]]
        arm = result["command"]["arm"]
        steps, rates = zip(*points, strict=True)
        axes.plot(steps, rates, marker="o", markersize=3, color={"plain": "C1", "hindsight": "C0"}[arm], label=name)
        for phase in ("offline", "online"):
            print(f"{name} {phase}: " + ", ".join(f"{p['step']}: {p['success']:.2f}" for p in result[phase]))
    axes.axvline(switch, color="0.4", linestyle="--", linewidth=1)
    axes.text(switch, 1.06, "offline  ", ha="right", color="0.3")
    axes.text(switch, 1.06, "  online", ha="left", color="0.3")
    axes.set(xlabel="gradient steps, then environment steps", ylabel="success rate", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    path = arguments.results / "success.png"
    figure.savefig(path, dpi=120)
    print(path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--data", type=Path, help="folder of the Minari set; default MINARI_DATASETS_PATH or Minari's own")
    stored.add_argument("--seed", type=int, default=0)
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--results", type=Path, default=RESULTS)

    command = commands.add_parser("data", parents=[stored], help="log the controller, store it with Minari")
    command.add_argument("--episodes", type=int, default=250)
    command.set_defaults(run=make_data)

    command = commands.add_parser("train", parents=[stored, written], help="train one arm")
    command.add_argument("arm", choices=sorted(ARMS))
    command.add_argument("--steps", type=int, default=8000, help="offline gradient steps")
    command.add_argument("--online-steps", type=int, default=5000)
    command.add_argument("--eval-every", type=int, default=1000)
    command.add_argument("--eval-episodes", type=int, default=50)
    command.add_argument("--normalize-gap", action="store_true", help="a departure from the preset: a flat Q has gap 0")
    command.add_argument("--precision", choices=PRECISIONS, default="f32")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--checkpoints", type=Path, default=ROOT / "runs")
    command.set_defaults(run=train)

    command = commands.add_parser("figure", parents=[written], help="draw the figure, print the table")
    command.set_defaults(run=draw)

    arguments = parser.parse_args()
    if getattr(arguments, "data", None) is not None:
        arguments.data.mkdir(parents=True, exist_ok=True)
        os.environ["MINARI_DATASETS_PATH"] = str(arguments.data.resolve())
    arguments.run(arguments)


if __name__ == "__main__":
    main()
