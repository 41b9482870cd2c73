"""One model trained by several processes, each on its share of every batch.

    torchrun --nproc-per-node 2 examples/torchrun_cql.py

``python examples/torchrun_cql.py`` does the same in one process, with other random numbers. Writes ``push.zip``, once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL


def make_log(episodes: int = 50, steps: int = 40) -> OfflineDataset:
    """Log a point in the plane that is pushed towards the origin, more or less; the same in every process."""
    rng = np.random.default_rng(0)
    states = [rng.uniform(-1.0, 1.0, size=(episodes, 2))]
    actions = []
    for _ in range(steps):
        actions.append(np.clip(-0.5 * states[-1] + rng.normal(0.0, 0.5, size=(episodes, 2)), -1.0, 1.0))
        states.append(states[-1] + 0.2 * actions[-1])
    positions, pushes = np.stack(states, axis=1).astype(np.float32), np.stack(actions, axis=1).astype(np.float32)
    n = episodes * steps
    return from_arrays(
        positions[:, :-1].reshape(n, 2),
        pushes.reshape(n, 2),
        -np.linalg.norm(positions[:, 1:].reshape(n, 2), axis=1),
        terminations=np.zeros(n, dtype=bool),
        truncations=np.arange(n) % steps == steps - 1,
        next_observations=positions[:, 1:].reshape(n, 2),
        observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        action_space=spaces.Box(-1.0, 1.0, (2,), np.float32),
        name="pushes",
    )


def main() -> None:
    """Train; the first process writes the model and says what it does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    # torchrun sets both; a GPU is not chosen for you.
    rank, local_rank = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local_rank}" if th.cuda.is_available() else "cpu"
    dataset = make_log()
    model = CQL.from_dataset(
        dataset,
        batch_size=256,  # of all processes together
        gamma=0.9,
        learning_rate=1e-3,
        actor_learning_rate=None,
        cql_alpha=1.0,
        policy_kwargs={"net_arch": [64, 64]},
        verbose=int(rank == 0),
        seed=0,
        device=device,
    )
    model.learn_offline(dataset, arguments.gradient_steps)  # joins the others, logs in the first process alone

    if rank == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        model.save(arguments.out / "push.zip")
        push, _ = model.predict(np.array([0.8, -0.8], dtype=np.float32), deterministic=True)
        print(f"at (0.8, -0.8) push ({push[0]:.2f}, {push[1]:.2f})")
    if th.distributed.is_initialized():
        th.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
