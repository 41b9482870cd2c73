"""CQL and Cal-QL beside d3rlpy's baselines on one dataset: BC, BCQ, IQL, TD3+BC, Decision Transformer, and d3rlpy's own CQL.

    python examples/d3rlpy_baselines.py [--seed 0] [--steps 5000]

One ``OfflineDataset``, the quick start's log of walkers who cross a river by a bridge, goes to every algorithm through
``to_d3rlpy``; each learns from the log alone. Prints one table.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.d3rlpy import CalQLConfig, CQLConfig

# After ours, which imports it without gym's notice.
import d3rlpy  # isort: skip
from quickstart import GAMMA, Bridge, make_log  # isort: skip  (the script beside this one)

ENCODER = d3rlpy.models.VectorEncoderFactory([64, 64])
COMMON: dict[str, Any] = {"batch_size": 128, "gamma": GAMMA}
NETWORKS: dict[str, Any] = {"actor_encoder_factory": ENCODER, "critic_encoder_factory": ENCODER}
RATES: dict[str, Any] = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
SAC_LIKE: dict[str, Any] = {**COMMON, **NETWORKS, **RATES, "temp_learning_rate": 1e-3, "initial_temperature": 0.1, "tau": 0.01}

CONFIGS: dict[str, Callable[[], Any]] = {
    "BC": lambda: d3rlpy.algos.BCConfig(**COMMON, learning_rate=1e-3, encoder_factory=ENCODER),
    "BCQ": lambda: d3rlpy.algos.BCQConfig(**COMMON, **NETWORKS, **RATES, imitator_encoder_factory=ENCODER),
    "TD3+BC": lambda: d3rlpy.algos.TD3PlusBCConfig(**COMMON, **NETWORKS, **RATES),
    "IQL": lambda: d3rlpy.algos.IQLConfig(**COMMON, **NETWORKS, **RATES, value_encoder_factory=ENCODER),
    "Decision Transformer": lambda: d3rlpy.algos.DecisionTransformerConfig(
        batch_size=64,
        learning_rate=1e-3,
        encoder_factory=ENCODER,
        num_layers=2,
        max_timestep=Bridge.limit + 1,
    ),
    "CQL (d3rlpy's)": lambda: d3rlpy.algos.CQLConfig(**SAC_LIKE, conservative_weight=1.0),
    "CQL": lambda: CQLConfig(**SAC_LIKE, conservative_weight=1.0),
    "Cal-QL": lambda: CalQLConfig(**SAC_LIKE, conservative_weight=1.0, max_q_backup=False),
}


def train(name: str, log: OfflineDataset, steps: int) -> Any:
    """Train one algorithm; every one takes the same buffer."""
    algo = CONFIGS[name]().create()
    algo.fit(
        to_d3rlpy(log),
        n_steps=steps,
        n_steps_per_epoch=steps,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        show_progress=False,
    )
    return algo


def walk(algo: Any, n_walks: int, best_return: float) -> tuple[float, float]:
    """Shares of walks, in percent, that arrive and that end in the water."""
    is_transformer = isinstance(algo, d3rlpy.algos.TransformerAlgoBase)
    actor = algo.as_stateful_wrapper(target_return=best_return) if is_transformer else None
    arrived = drowned = 0
    env = Bridge()
    for index in range(n_walks):
        observation, _ = env.reset(seed=50_000 + index)
        reward, done = 0.0, False
        if actor is not None:
            actor.reset()
        while not done:
            action = actor.predict(observation, reward) if actor is not None else algo.predict(observation[None])[0]
            observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        arrived += reward > 0
        drowned += terminated and reward == 0
    return 100.0 * arrived / n_walks, 100.0 * drowned / n_walks


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000, help="gradient steps of each algorithm")
    parser.add_argument("--walks", type=int, default=50, help="evaluation episodes")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    log = make_log(options.seed)
    log_arrived = 100.0 * float(np.mean(log.episode_returns > 0))
    results: dict[str, dict[str, float]] = {}
    for name in track(CONFIGS, description="Training", console=Console(stderr=True)):
        d3rlpy.seed(options.seed)
        start = time.perf_counter()
        algo = train(name, log, options.steps)
        seconds = time.perf_counter() - start
        arrived, drowned = walk(algo, options.walks, float(log.episode_returns.max()))
        results[name] = {"arrived": arrived, "drowned": drowned, "seconds": seconds}

    table = Table(title=f"{options.walks} walks after {options.steps:,} gradient steps on {len(log):,} logged ones")
    for title in ("", "arrived", "drowned", "training"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("the log", f"{log_arrived:.0f} %", "", "")
    for name, result in results.items():
        table.add_row(name, f"{result['arrived']:.0f} %", f"{result['drowned']:.0f} %", f"{result['seconds']:.0f} s")
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
