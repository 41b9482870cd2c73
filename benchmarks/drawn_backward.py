"""How noisy the critics' gradient gets when fewer actions of a state send it back (``cql_n_backward``).

    python benchmarks/drawn_backward.py runs/halfcheetah-replay_cql_seed0.zip --task halfcheetah-replay

Takes a trained model (a checkpoint of ``train.py``) and some batches of its data. Of each batch it computes the exact gradient
of the critics and drawn ones with the same noise, and prints the mean squared distance of the two as a share of the variance
that the exact gradient has from batch to batch anyway, with the share of rows that went back.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from train import TASKS, make_vec

from cql_plugins import ensembles
from cql_plugins.sb3 import CQL
from cql_plugins.sb3.batches import Batch


class Found(Exception):  # noqa: N818 - not an error
    """Carries a gradient out of a gradient step that is not to go on."""


def critics_gradient(model: Any, batch: Batch, n_backward: int | None, seed: int) -> th.Tensor:
    """The critics' gradient on a batch; nothing is stepped but the entropy coefficient, which is put back."""

    def stop(loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        if optimizer is model.critic.optimizer:
            optimizer.zero_grad()
            loss.backward()
            raise Found(th.cat([parameter.grad.flatten() for parameter in model.critic.parameters()]))

    model.cql_n_backward, model._minimize = n_backward, stop
    th.manual_seed(seed)
    try:
        model._train_step(batch)
    except Found as found:
        gradient: th.Tensor = found.args[0]
        return gradient.clone()
    raise AssertionError("the critics were not stepped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="halfcheetah-replay")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--n-backward", type=int, nargs="+", default=[2, 4, 8, 16, 31, 62])
    arguments = parser.parse_args()

    task = TASKS[arguments.task]
    model: Any = CQL.load(arguments.checkpoint, env=make_vec(task, 0, training=True), device="cpu")
    model.set_offline_data(task.load())
    model.precision = "f32"

    find, kept = ensembles._rows_that_matter, []

    def watching(gradient: th.Tensor, *rest: Any) -> th.Tensor | None:
        rows = find(gradient, *rest)
        kept.append(1.0 if rows is None else len(rows) / len(gradient))
        return rows

    ensembles._rows_that_matter = watching
    np.random.seed(0)  # noqa: NPY002 - SB3 draws its batches from NumPy's global generator
    batches = [model.sample_batch(model.batch_size) for _ in range(arguments.batches)]
    exact = [critics_gradient(model, batch, None, seed) for seed, batch in enumerate(batches)]
    variance = float(th.stack(exact).var(dim=0).sum())
    size = float(th.stack(exact).mean(dim=0).norm())
    print(f"{arguments.task}, {model._n_offline_steps} gradient steps, {len(batches)} batches of {model.batch_size}")
    print(
        f"exact: rows that went back {100 * np.mean(kept):.0f} %; batch noise {variance**0.5 / size:.2f} of the gradient's size"
    )
    for n_backward in arguments.n_backward:
        kept.clear()
        distances = [
            float(((critics_gradient(model, batch, n_backward, seed) - own) ** 2).sum())
            for seed, (batch, own) in enumerate(zip(batches, exact, strict=True))
        ]
        print(
            f"cql_n_backward={n_backward:3}: rows that went back {100 * np.mean(kept):5.1f} %, variance added "
            f"{100 * np.mean(distances) / variance:6.2f} % of the batch's own"
        )


if __name__ == "__main__":
    main()
