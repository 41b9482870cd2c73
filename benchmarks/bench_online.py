"""What the plugin itself costs online: our ``learn`` beside SAC's, with the same update, on HalfCheetah.

    python benchmarks/bench_online.py

The weight is 0, so that ours does SAC's update, number for number; what is left is ours: half of each batch from a dataset,
returns-to-go of the finished episodes, metrics, options. SAC and ours train on in turn, in short blocks in one process; the
ratio is taken block by block. Printed: median ratio of the times per environment step, its quartiles, and where ours spends
its time. ``collecting alone`` makes no update: the loop, the buffer and the environment.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from bench_update import ratio
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from cql_plugins.sb3 import CQL, CalQL

AS_SAC: dict[str, Any] = {"cql_alpha": 0.0, "backup_entropy": True, "actor_learning_rate": None}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 environment, 1 update a step": (1, {}),
    "4 environments, 1 update for 4 steps": (4, {}),
    "4 environments, 1 update a step": (4, {"gradient_steps": -1}),
    "1 environment, 4 updates a step": (1, {"gradient_steps": 4}),
    "1 environment, collecting alone": (1, {"learning_starts": 10**9}),
    "4 environments, collecting alone": (4, {"learning_starts": 10**9}),
}


def make_dataset(env: Any, size: int = 20_000) -> ReplayBuffer:
    """Random rows in HalfCheetah's spaces; what they hold does not change how long they take."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(size, env.observation_space, env.action_space, "cpu")
    buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.next_observations[:] = np.roll(buffer.observations, -1, axis=0)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.dones[999::1000] = buffer.timeouts[999::1000] = 1
    buffer.full = True
    return buffer


def make_learner(algorithm: Any, n_envs: int, arguments: dict[str, Any], steps: int) -> Callable[[], Any]:
    """Get a function that trains on for so many environment steps."""
    env = make_vec_env("HalfCheetah-v5", n_envs=n_envs, seed=0)
    options = {"seed": 0, "device": "cpu", "buffer_size": 100_000, "learning_starts": 300} | arguments
    if algorithm is not SAC:
        options |= AS_SAC | ({"max_q_backup": False} if algorithm is CalQL else {})
    model = algorithm("MlpPolicy", env, **options)
    if algorithm is not SAC:
        model.set_offline_data(make_dataset(env))
    model.learn(max(400, steps), log_interval=4)
    return lambda: model.learn(steps, log_interval=4, reset_num_timesteps=False)


def profile(learner: Callable[[], Any], n_functions: int) -> list[str]:
    """Where the time goes: our own functions, by the time in themselves."""
    profiler = cProfile.Profile()
    profiler.runcall(learner)
    statistics: Any = pstats.Stats(profiler)
    total = statistics.total_tt
    ours = [(own, name, calls) for (file, _, name), (_, calls, own, _, _) in statistics.stats.items() if "cql_plugins" in file]
    ours.sort(reverse=True)
    share = sum(own for own, _, _ in ours) / total
    lines = [f"    inside our own functions: {100 * share:.1f} % of the time (profiled)"]
    return lines + [f"      {100 * own / total:5.2f} %  {name} ({calls} calls)" for own, name, calls in ours[:n_functions]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=48, help="environment steps in a block; 20 times as many without updates")
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--profile", type=int, default=0, help="show so many of our own functions")
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    print(f"torch {th.__version__}, {arguments.threads} threads, 2 x 256 nets, batch 256, {arguments.blocks} paired blocks")
    for name, (n_envs, options) in SETTINGS.items():
        steps = arguments.steps * (20 if "learning_starts" in options else 1)
        sac = make_learner(SAC, n_envs, options, steps)
        for algorithm in (CQL, CalQL):
            ours = make_learner(algorithm, n_envs, options, steps)
            ratios, own, peer = ratio(ours, sac, arguments.blocks, 1)
            low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            print(
                f"{algorithm.__name__:6} / SAC, {name:40} {own / steps:7.3f} / {peer / steps:7.3f} ms a step = {median:5.3f} "
                f"[{low:5.3f}, {high:5.3f}]  limit 1.05  {'ok' if median <= 1.05 else 'OVER'}",
                flush=True,
            )
            if arguments.profile:
                print("\n".join(profile(ours, arguments.profile)))


if __name__ == "__main__":
    main()
