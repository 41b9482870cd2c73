"""Run by test_ddp.py, alone or under torchrun: train a few steps on a share of each batch, write the parameters."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import numpy as np
import torch as th

import cql_plugins.d3rlpy as room
from cql_plugins._guards import NonFiniteError
from cql_plugins.d3rlpy.watch import Watch

import d3rlpy  # isort: skip  (after ours, which imports it without its notice)

STEPS, ROWS, OBSERVATION, ACTION = 50, 32, 3, 2
LARGE = 1e25
"""A reward whose square is too large for a float32."""


class SharedNoise:
    """Random numbers for all rows of a batch, of which each process takes its own rows."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.generator = th.Generator().manual_seed(3)
        self.rank, self.world_size = rank, world_size

    def _own(self, numbers: th.Tensor) -> th.Tensor:
        return numbers.chunk(self.world_size)[self.rank]

    def normal(self, rows: int, *shape: int) -> th.Tensor:
        return self._own(th.zeros(rows * self.world_size, *shape).normal_(generator=self.generator))

    def uniform(self, rows: int, *shape: int) -> th.Tensor:
        return self._own(th.rand(rows * self.world_size, *shape, generator=self.generator))

    def inject(self) -> None:
        uniform_ = th.Tensor.uniform_

        def from_distribution(distribution: Any, shape: Any = ()) -> th.Tensor:
            assert not shape
            return distribution.loc + distribution.scale * self.normal(*distribution.loc.shape)

        def from_uniform(tensor: th.Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> th.Tensor:
            if tensor.ndim != 3:
                return uniform_(tensor, low, high, **kwargs)  # networks being made
            return tensor.copy_(low + (high - low) * self.uniform(*tensor.shape))

        th.distributions.Normal.rsample = from_distribution  # type: ignore[method-assign]
        th.randn = lambda *shape, **_: self.normal(*shape)  # type: ignore[assignment]
        th.Tensor.uniform_ = from_uniform  # type: ignore[method-assign]


def batch_of(step: int, rank: int, world_size: int) -> Any:
    rng = np.random.default_rng(step)
    columns = [rng.normal(size=(ROWS, size)).astype(np.float32) for size in (OBSERVATION, ACTION, 1, OBSERVATION)]
    rows = np.arange(ROWS).reshape(world_size, -1)[rank]
    return d3rlpy.dataset.TransitionMiniBatch.from_transitions(
        [
            d3rlpy.dataset.Transition(
                observation=columns[0][i],
                action=np.tanh(columns[1][i]),
                reward=columns[2][i],
                next_observation=columns[3][i],
                next_action=np.tanh(columns[1][i]),
                terminal=float(i % 5 == 0),
                interval=1,
                rewards_to_go=columns[2][i : i + 1],
            )
            for i in rows
        ]
    )


def become_sick(algo: Any, rank: int, world_size: int, reward: float) -> str:
    """The second process has a batch that is not finite, or one whose loss is not, though its gradient is; both stop."""
    batch = batch_of(STEPS, rank, world_size)
    if rank == 1:
        batch.rewards[4] = reward
    try:
        algo.update(batch)
    except NonFiniteError as error:
        return str(error)
    return ""


def main(folder: str, steps_of_lagrange: str) -> None:
    distributed = "RANK" in os.environ
    rank = d3rlpy.distributed.init_process_group("gloo") if distributed else 0
    world_size = th.distributed.get_world_size() if distributed else 1
    th.manual_seed(100 + rank if distributed else 100)  # the first process's parameters count
    encoder = d3rlpy.models.VectorEncoderFactory([16, 16])
    config = room.CalQLConfig(
        batch_size=ROWS // world_size,
        n_action_samples=4,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        alpha_learning_rate=float(steps_of_lagrange),
        alpha_threshold=1.0,
        temp_learning_rate=1e-3,
    )
    algo = config.create(device="cpu:0", enable_ddp=distributed)
    algo.create_impl((OBSERVATION,), ACTION)
    SharedNoise(rank, world_size).inject()
    for step in range(STEPS):
        algo.update(batch_of(step, rank, world_size))
    assert algo.impl is not None
    algo.impl.save_model(open(os.path.join(folder, f"{world_size}-{rank}.pt"), "wb"))  # noqa: SIM115
    if distributed:
        texts = [become_sick(algo, rank, world_size, reward) for reward in (np.nan, LARGE)]
        Watch._defers = True  # type: ignore[assignment, method-assign]  # as on a GPU
        texts.append(become_sick(algo, rank, world_size, LARGE))
        with open(os.path.join(folder, f"sick-{rank}.txt"), "w") as file:
            file.write("\n".join(texts))
        d3rlpy.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
