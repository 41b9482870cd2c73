"""Cost of returns-to-go: sampling against SB3's own sampler, and a Cal-QL update against a CQL update.

    python benchmarks/bench_update.py

Ours and the peer run in turn, in one process, in short blocks; the ratio is taken block by block, so that a machine whose speed
drifts slows both sides of a ratio alike. Printed: median ratio and its quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from cql_plugins.sb3 import CQL, CalQL
from cql_plugins.sb3.buffers import with_returns_to_go

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (17,), np.float32)
ACTIONS = spaces.Box(-1, 1, (6,), np.float32)


def ratio(ours: Callable[[], Any], peer: Callable[[], Any], blocks: int, repeats: int) -> tuple[np.ndarray, float, float]:
    """Time two functions in turn; return the ratios of the blocks and the median times in milliseconds."""

    def block(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats * 1e3

    ours(), peer()
    times = []
    for i in range(blocks):
        # Which goes first alternates, too.
        pair = (block(ours), block(peer)) if i % 2 else (block(peer), block(ours))[::-1]
        times.append(pair)
    table = np.array(times)
    return table[:, 0] / table[:, 1], float(np.median(table[:, 0])), float(np.median(table[:, 1]))


def report(name: str, result: tuple[np.ndarray, float, float], limit: float) -> None:
    ratios, ours, peer = result
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    verdict = "ok" if median <= limit else "OVER"
    print(f"{name:44} {ours:9.3f} ms / {peer:9.3f} ms = {median:5.3f} [{low:5.3f}, {high:5.3f}]  limit {limit}  {verdict}")


def make_buffer(base: type[ReplayBuffer], size: int, **kwargs: Any) -> ReplayBuffer:
    """A full buffer of random transitions in episodes of 1000."""
    rng = np.random.default_rng(0)
    space = spaces.Dict({"a": OBSERVATIONS, "b": OBSERVATIONS}) if base is DictReplayBuffer else OBSERVATIONS
    buffer = base(size, space, ACTIONS, "cpu", **kwargs)
    for stored in (buffer.observations, buffer.next_observations):
        for part in stored.values() if isinstance(stored, dict) else (stored,):
            part[:] = rng.normal(size=part.shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = rng.normal(size=buffer.rewards.shape)
    buffer.dones[999::1000] = buffer.timeouts[999::1000] = 1
    buffer.full = True
    return buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--size", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    print(f"torch {th.__version__}, {arguments.threads} threads, median of {arguments.blocks} paired blocks [quartiles]")

    for base, kwargs in ((ReplayBuffer, {}), (DictReplayBuffer, {}), (NStepReplayBuffer, {"n_steps": 3})):
        peer = make_buffer(base, arguments.size, **kwargs)
        ours = with_returns_to_go(peer, 0.99)
        result = ratio(lambda b=ours: b.sample(256), lambda b=peer: b.sample(256), arguments.blocks, 200)  # type: ignore[misc]
        report(f"sample 256 with returns / SB3 {base.__name__}", result, 1.5)

    buffer = make_buffer(ReplayBuffer, 20_000)
    models = []
    for algorithm in (CalQL, CQL):
        # Equal but for the bound: Cal-QL's max backup is an option of both.
        models.append(algorithm.from_dataset(buffer, seed=0, device="cpu", max_q_backup=False))
    calql, cql = models
    result = ratio(lambda: calql.train(1, 256), lambda: cql.train(1, 256), arguments.blocks, 3)
    report("Cal-QL update / CQL update (2x256, N = 10)", result, 1.05)


if __name__ == "__main__":
    main()
