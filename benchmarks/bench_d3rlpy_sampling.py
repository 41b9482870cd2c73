"""Cost of a training batch in d3rlpy: our buffers with returns-to-go against d3rlpy's own, with and without them.

    python benchmarks/bench_d3rlpy_sampling.py

From the buffer to the tensors that an update takes. Ours and the peer run in turn, in one process, in short blocks;
the ratio is taken block by block. Printed: median ratio and its quartiles.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from bench_update import ratio, report
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.d3rlpy import OfflineOnlineReplayBuffer, ReturnsToGoReplayBuffer
from cql_plugins.d3rlpy.batches import ReturnsSettings, ReturnsToGoMiniBatch

import d3rlpy  # isort: skip  (after ours, which imports it without gym's notice)
from d3rlpy.dataset import Episode, InfiniteBuffer, MixedReplayBuffer, ReplayBuffer  # isort: skip
from d3rlpy.torch_utility import TorchMiniBatch, convert_to_torch  # isort: skip

BATCH, GAMMA = 256, 0.99
SETTINGS = ReturnsSettings(GAMMA)


def make_dataset(n_episodes: int, length: int) -> OfflineDataset:
    rng = np.random.default_rng(0)
    n = n_episodes * length
    ends = np.arange(n) % length == length - 1
    return OfflineDataset(
        rng.normal(size=(n + n_episodes, 17)).astype(np.float32),
        rng.uniform(-1, 1, size=(n, 6)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        ends & (np.arange(n) // length % 2 == 0),
        ends & (np.arange(n) // length % 2 == 1),
        observation_space=spaces.Box(-np.inf, np.inf, (17,), np.float32),
        action_space=spaces.Box(-1, 1, (6,), np.float32),
    )


def as_d3rlpy(dataset: OfflineDataset) -> Any:
    """The same episodes as d3rlpy keeps them."""
    episodes = [Episode(e.observations[:-1], e.actions, e.rewards.reshape(-1, 1), e.terminated) for e in dataset]
    return ReplayBuffer(InfiniteBuffer(), episodes=episodes, action_space=d3rlpy.ActionSpace.CONTINUOUS, action_size=6)


def ready(buffer: Any, returns: bool) -> None:
    """Sample, and make the tensors."""
    batch = buffer.sample_transition_batch(BATCH)
    ours = isinstance(batch, ReturnsToGoMiniBatch)
    TorchMiniBatch.from_batch(batch, GAMMA, compute_returns_to_go=returns and not ours, device="cpu")
    if returns and isinstance(batch, ReturnsToGoMiniBatch):
        convert_to_torch(batch.returns_to_go(SETTINGS), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--length", type=int, default=1000)
    arguments = parser.parse_args()
    dataset = make_dataset(arguments.episodes, arguments.length)
    ours, theirs = to_d3rlpy(dataset), as_d3rlpy(dataset)
    wrapped = ReturnsToGoReplayBuffer(theirs)
    mixed, their_mix = OfflineOnlineReplayBuffer(theirs, ours, 0.5), MixedReplayBuffer(theirs, theirs, 0.5)
    print(f"{len(dataset)} transitions, batches of {BATCH}, median of {arguments.blocks} paired blocks [quartiles]")
    for name, first, second, with_returns, limit in (
        ("offline, returns / d3rlpy without", ours, theirs, False, 1.0),
        ("offline, returns / d3rlpy with", ours, theirs, True, 1.0),
        ("mixed, returns / d3rlpy without", mixed, their_mix, False, 1.0),
        ("wrapped d3rlpy buffer, returns / without", wrapped, theirs, False, 1.5),
    ):
        result = ratio(
            lambda b=first: ready(b, True),  # type: ignore[misc]
            lambda b=second, r=with_returns: ready(b, r),  # type: ignore[misc]
            arguments.blocks,
            20,
        )
        report(name, result, limit)


if __name__ == "__main__":
    main()
