"""Many small updates in one process: does memory grow, do steps get slower?

    python benchmarks/endurance.py [--algorithm DiscreteCalQL CalQL] [--updates 100000]

Offline on logs of random actions, networks of 2 x 32, batch 16, through `learn_offline` with its logger. Printed by tenths:
the process's own time for an update, since wall time says nothing on a shared machine, and its resident memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CalQL, DiscreteCalQL

ALGORITHMS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "DiscreteCalQL": (DiscreteCalQL, "CartPole-v1", {}),
    "CalQL": (CalQL, "Pendulum-v1", {"cql_n_actions": 2, "return_tail": "bootstrap"}),
}


def collect(env: gym.Env[Any, Any], steps: int = 2000) -> OfflineDataset:
    """Random actions, whole episodes and a last one that is cut off."""
    env.action_space.seed(0)
    rows = []
    observation, _ = env.reset(seed=0)
    for step in range(steps):
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated or step == steps - 1, following))
        observation = env.reset()[0] if terminated or truncated else following
    before, actions, rewards, terminations, truncations, after = (np.stack(column) for column in zip(*rows, strict=True))
    return from_arrays(
        before,
        actions,
        rewards,
        terminations,
        truncations & ~terminations,
        next_observations=after,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )


def resident_mib() -> float:
    """Memory of this process that is in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--updates", type=int, default=100_000)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    for name in arguments.algorithm:
        algorithm, env_id, options = ALGORITHMS[name]
        env = gym.make(env_id)
        dataset = collect(env)
        model = algorithm("MlpPolicy", env, seed=0, batch_size=16, policy_kwargs={"net_arch": [32, 32]}, **options)
        print(f"{name}: updates, the process's own ms an update, resident MiB")
        for tenth in range(1, 11):
            began = time.process_time()
            model.learn_offline(dataset, arguments.updates // 10)
            spent = (time.process_time() - began) * 1e3 / (arguments.updates // 10)
            print(f"  {tenth * (arguments.updates // 10):>9,} {spent:7.3f} {resident_mib():9.2f}", flush=True)


if __name__ == "__main__":
    main()
