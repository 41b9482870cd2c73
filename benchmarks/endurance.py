"""Many small updates in one process: does memory grow, do steps get slower?

    python benchmarks/endurance.py [--algorithm DiscreteCalQL CalQL d3rlpy-CalQL] [--updates 100000]

Offline on logs of random actions, networks of 2 x 32, batch 16, through `learn_offline` or d3rlpy's `fit`. For each tenth:
resident memory, the process's own time for an update, and that time by a fresh model's, whose updates are run between those
of the old one. An absolute time follows how busy the machine is; the ratio does not.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from tasks import play

from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.sb3 import CalQL, DiscreteCalQL

Train = Callable[[int], object]
"""Makes so many updates."""
BATCH = 16
NETS = [32, 32]


def collect(env_id: str, n_episodes: int) -> OfflineDataset:
    """Random actions."""
    return play(lambda: gym.make(env_id), lambda observation: None, (1.0,), n_episodes, 0, env_id)


def sb3(algorithm: Any, dataset: OfflineDataset, **options: Any) -> Train:
    model = algorithm.from_dataset(dataset, seed=0, batch_size=BATCH, policy_kwargs={"net_arch": NETS}, device="cpu", **options)
    return lambda updates: model.learn_offline(dataset, updates)


def d3rlpy_calql(dataset: OfflineDataset) -> Train:
    import logging

    import structlog
    from d3rlpy.logging import NoopAdapterFactory
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.preprocessing import MinMaxActionScaler

    from cql_plugins.d3rlpy import CalQLConfig

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # else a page for each `fit`
    nets = VectorEncoderFactory(NETS)
    model = CalQLConfig(
        actor_encoder_factory=nets,
        critic_encoder_factory=nets,
        batch_size=BATCH,
        n_action_samples=2,
        return_tail="bootstrap",
        action_scaler=MinMaxActionScaler(),
    ).create(device="cpu")
    data = to_d3rlpy(dataset)
    silent = NoopAdapterFactory()
    return lambda updates: model.fit(data, updates, updates, logger_adapter=silent, show_progress=False)


ALGORITHMS: dict[str, tuple[str, int, Callable[[OfflineDataset], Train]]] = {
    "DiscreteCalQL": ("CartPole-v1", 100, lambda data: sb3(DiscreteCalQL, data)),
    "CalQL": ("Pendulum-v1", 10, lambda data: sb3(CalQL, data, cql_n_actions=2, return_tail="bootstrap")),
    "d3rlpy-CalQL": ("Pendulum-v1", 10, d3rlpy_calql),
}


def resident_mib() -> float:
    """Memory of this process that is in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def spent(train: Train, updates: int) -> float:
    """Milliseconds of processor time an update."""
    began = time.process_time()
    train(updates)
    return (time.process_time() - began) * 1e3 / updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=500, help="updates of the old model in a row")
    parser.add_argument("--fresh", type=int, default=100, help="updates of the fresh model after each block")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    blocks = arguments.updates // 10 // arguments.block
    if blocks == 0:
        parser.error(f"--updates {arguments.updates}: expected at least ten times --block {arguments.block}")
    for name in arguments.algorithm:
        env_id, n_episodes, make = ALGORITHMS[name]
        dataset = collect(env_id, n_episodes)
        old = make(dataset)
        spent(old, 100)  # what is set up once
        print(f"{name}: updates, resident MiB, ms an update, by a fresh model's [quartiles]")
        for tenth in range(1, 11):
            fresh = make(dataset)
            spent(fresh, 100)
            times, ratios = [], []
            for _ in range(blocks):
                before = spent(fresh, arguments.fresh)
                times.append(spent(old, arguments.block))
                ratios.append(2 * times[-1] / (before + spent(fresh, arguments.fresh)))
            del fresh
            gc.collect()
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"  {tenth * blocks * arguments.block:>9,} {resident_mib():9.2f} {statistics.median(times):7.3f}"
                f"   {middle:.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
