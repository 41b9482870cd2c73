"""Discrete CQL and Cal-QL on CartPole logs of mixed quality, beside d3rlpy's DiscreteCQL, DoubleDQN and BC.

Same data, same budget.

    python benchmarks/discrete_cartpole.py --seeds 0 1 2 3 4

The log is made on the spot: a hand-written controller that acts at random with probability 0.4, 0.6, 0.8 or 1, a quarter of the
episodes each. Offline, then online from the same networks; d3rlpy's DiscreteCQL goes online in d3rlpy's own way, with
its ``MixedReplayBuffer``. Prints a Markdown table and writes every return to ``results/d3rlpy/discrete_cartpole.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import structlog
import torch as th
from discrete_sb3 import control_pole, make_log

from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.d3rlpy import DiscreteCalQLConfig, DiscreteCQLConfig

import d3rlpy  # isort: skip  (after ours, which imports it without gym's notice)
from d3rlpy.dataset import MDPDataset, MixedReplayBuffer, create_fifo_replay_buffer  # isort: skip

RESULTS = Path(__file__).resolve().parent / "results" / "d3rlpy"
QUIET: dict[str, Any] = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}


def as_mdp_dataset(dataset: OfflineDataset) -> Any:
    """The same log as d3rlpy's users would give it."""
    rows = dataset.observation_rows(np.arange(len(dataset)))
    return MDPDataset(
        dataset.observations[rows],
        dataset.actions,
        dataset.rewards.astype(np.float32),
        dataset.terminations.astype(np.float32),
        dataset.truncations.astype(np.float32),
        action_space=d3rlpy.ActionSpace.DISCRETE,
        action_size=2,
    )


def evaluate(algo: Any, seed: int, n_episodes: int = 20) -> list[float]:
    """Undiscounted returns of the greedy policy, in environments that every algorithm gets alike."""
    env, returns = gym.make("CartPole-v1"), []
    for episode in range(n_episodes):
        observation, _ = env.reset(seed=10_000 * (seed + 1) + episode)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(int(algo.predict(observation[None])[0]))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


COMMON: dict[str, Any] = {"learning_rate": 3e-4, "batch_size": 64, "gamma": 0.99, "target_update_interval": 200}
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "d3rlpy BC": lambda: d3rlpy.algos.DiscreteBCConfig(learning_rate=3e-4, batch_size=64),
    "d3rlpy DoubleDQN": lambda: d3rlpy.algos.DoubleDQNConfig(**COMMON),
    "d3rlpy DiscreteCQL": lambda: d3rlpy.algos.DiscreteCQLConfig(**COMMON),
    "ours DiscreteCQL": lambda: DiscreteCQLConfig(**COMMON),
    "ours DiscreteCalQL": lambda: DiscreteCalQLConfig(**COMMON),
}


def run(name: str, dataset: OfflineDataset, seed: int, steps: int, online_steps: int) -> dict[str, Any]:
    """Train one algorithm offline and online."""
    d3rlpy.seed(seed)
    th.manual_seed(seed)
    algo = ALGORITHMS[name]().create()
    ours = name.startswith("ours")
    data = to_d3rlpy(dataset) if ours else as_mdp_dataset(dataset)
    start = time.perf_counter()
    *_, (_, metrics) = algo.fit(data, n_steps=steps, n_steps_per_epoch=steps // 5, **QUIET)
    kept = {key: metrics[key] for key in ("q_data", "conservative_loss", "bound_rate") if key in metrics}
    result: dict[str, Any] = {"offline": evaluate(algo, seed), "seconds": time.perf_counter() - start, "last_fifth": kept}
    if "BC" in name or online_steps == 0:
        return result
    env = gym.make("CartPole-v1")
    env.reset(seed=seed)
    explorer = d3rlpy.algos.ConstantEpsilonGreedy(0.05)
    online: dict[str, Any] = {"explorer": explorer, "n_steps": online_steps, "n_steps_per_epoch": online_steps}
    if ours:
        algo.fit_online(env, **online, **QUIET)
    else:
        buffer = create_fifo_replay_buffer(100_000, env=env)
        # d3rlpy's mix samples from an empty online buffer and fails, so a first episode is collected outside of it.
        algo.collect(env, buffer, explorer=explorer, n_steps=100, show_progress=False)
        algo.fit_online(env, MixedReplayBuffer(buffer, data, 0.5), **online, **QUIET)
    return result | {"online": evaluate(algo, seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10_000, help="offline gradient steps")
    parser.add_argument("--online-steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    th.set_num_threads(arguments.threads)

    logs, runs = {}, {name: {} for name in ALGORITHMS}  # type: ignore[var-annotated]
    for seed in arguments.seeds:
        dataset = make_log(lambda: gym.make("CartPole-v1"), control_pole, seed, arguments.episodes, "cartpole-mixed")
        logs[seed] = dataset.episode_returns.tolist()
        for name in ALGORITHMS:
            runs[name][seed] = run(name, dataset, seed, arguments.steps, arguments.online_steps)
            result = runs[name][seed]
            means = {phase: round(float(np.mean(result[phase])), 1) for phase in ("offline", "online") if phase in result}
            metrics = {key: round(value, 2) for key, value in result["last_fifth"].items()}
            print(f"seed {seed}  {name:20} {means}  {metrics}  {result['seconds']:.0f} s", flush=True)

    arguments.results.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("torch", "d3rlpy", "gymnasium", "numpy")}
    command = {key: value for key, value in vars(arguments).items() if key != "results"}
    record = {"command": command, "versions": versions, "python": platform.python_version(), "logs": logs, "runs": runs}
    (arguments.results / "discrete_cartpole.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    log_means = [np.mean(returns) for returns in logs.values()]
    print(f"\nThe log: mean return {np.mean(log_means):.0f}, {np.mean([len(r) for r in logs.values()]):.0f} episodes a seed\n")
    header = " | ".join(f"seed {seed}" for seed in arguments.seeds)
    for phase in ("offline", "online"):
        print(f"| {phase} | {header} | mean |\n|---|" + "---:|" * (len(arguments.seeds) + 1))
        for name, by_seed in runs.items():
            if all(phase in result for result in by_seed.values()):
                means = [float(np.mean(by_seed[seed][phase])) for seed in arguments.seeds]
                print(f"| {name} | " + " | ".join(f"{m:.0f}" for m in means) + f" | **{np.mean(means):.0f}** |")
        print()


if __name__ == "__main__":
    main()
