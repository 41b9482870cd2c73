"""What the watch over sick numbers costs in an update: the same updates with and without it, one after the other in turns.

    OMP_NUM_THREADS=1 python benchmarks/bench_watch.py --updates 60

Time is that of the process, which a busy machine distorts less than that of the clock. Two figures for each algorithm: the
median over updates with the watch by that without it, and the share of an update that the watch's own calls take when they
are timed by themselves, which is steadier.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from cql_plugins._guards import Snapshot
from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL, CalQL, DiscreteCQL

NETS = [256, 256, 256]


def make_dataset(discrete: bool, n: int = 20_000) -> OfflineDataset:
    """Noise in the shapes of halfcheetah."""
    rng = np.random.default_rng(0)
    last = np.arange(n) % 1000 == 999
    states = rng.normal(size=(n // 1000, 1001, 17)).astype(np.float32)
    return from_arrays(
        states[:, :-1].reshape(n, 17),
        rng.integers(6, size=n) if discrete else rng.uniform(-1, 1, size=(n, 6)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        np.zeros(n, dtype=bool),
        last,
        next_observations=states[:, 1:].reshape(n, 17),
        observation_space=spaces.Box(-np.inf, np.inf, (17,), np.float32),
        action_space=spaces.Discrete(6) if discrete else spaces.Box(-1.0, 1.0, (6,), np.float32),
    )


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def sb3(algorithm: type[Any], updates: int, batch_size: int) -> tuple[float, float, float]:
    """Seconds of an update without and with the watch, and of the watch's own calls."""

    class Unwatched(algorithm):  # type: ignore[misc]
        def _watched_step(self, batch: Any) -> Any:
            return self._train_step(batch)

        def _watch_gradients(self, optimizer: Any, loss: Any, gradients: Any) -> None:
            pass

    data = make_dataset(issubclass(algorithm, DiscreteCQL))
    models = [
        made.from_dataset(data, policy_kwargs={"net_arch": NETS}, batch_size=batch_size, seed=0, device="cpu")
        for made in (Unwatched, algorithm)
    ]
    times: list[list[float]] = [[], []]
    for i in range(updates + 5):
        for which in (0, 1) if i % 2 else (1, 0):
            took = seconds(lambda model=models[which]: model.train(1, batch_size))
            if i >= 5:
                times[which].append(took)
    model = models[1]
    batch = model.sample_batch(batch_size)

    def own() -> None:
        Snapshot(model._scalar_optimizers().values())
        model._look_at_batch(batch)
        for optimizer in model._named_optimizers().values():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            model._watch_gradients(optimizer, loss, gradients)
        model._stepped.clear()

    loss = th.zeros(())
    alone = statistics.median(seconds(lambda: [own() for _ in range(10)]) / 10 for _ in range(50))
    return statistics.median(times[0]), statistics.median(times[1]), alone


def d3rlpy_cql(updates: int, batch_size: int) -> tuple[float, float, float]:
    """As :func:`sb3`, of d3rlpy's CQL."""
    import d3rlpy

    from cql_plugins.adapters import to_d3rlpy
    from cql_plugins.d3rlpy import CQLConfig
    from cql_plugins.d3rlpy.watch import Watch

    encoder = d3rlpy.models.VectorEncoderFactory(NETS)
    config = CQLConfig(batch_size=batch_size, actor_encoder_factory=encoder, critic_encoder_factory=encoder)
    data = to_d3rlpy(make_dataset(False))
    algo = config.create(device="cpu")
    algo.build_with_dataset(data)
    impl: Any = algo.impl
    watched = {name: getattr(impl, name) for name in ("_compute_critic_grad", "_compute_actor_grad")}
    plain = {name: function.args[1] for name, function in watched.items()}
    step = Watch.step
    times: list[list[float]] = [[], []]
    for i in range(updates + 5):
        for which in (0, 1) if i % 2 else (1, 0):
            batch = data.sample_transition_batch(batch_size)
            for name, function in (watched if which else plain).items():
                setattr(impl, name, function)
            Watch.step = step if which else lambda _self, update, batch, n: update(batch, n)  # type: ignore[method-assign]
            took = seconds(lambda batch=batch: algo.update(batch))
            if i >= 5:
                times[which].append(took)
    Watch.step = step  # type: ignore[method-assign]
    torch_batch = d3rlpy.torch_utility.TorchMiniBatch.from_batch(batch, 0.99, False, "cpu")

    class Losses:
        critic_loss = actor_loss = th.zeros(())

    def own() -> None:
        impl.watch.step(lambda *_: {}, torch_batch, 1)
        for name, optimizer in (("critic", impl.modules.critic_optim), ("actor", impl.modules.actor_optim)):
            impl.watch._look_at_gradients(name, lambda _: Losses, optimizer, torch_batch)

    alone = statistics.median(seconds(lambda: [own() for _ in range(10)]) / 10 for _ in range(50))
    return statistics.median(times[0]), statistics.median(times[1]), alone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=60)
    updates = parser.parse_args().updates
    th.set_num_threads(1)
    cases: dict[str, Callable[[], tuple[float, float, float]]] = {
        "sb3 CQL, batch 256": lambda: sb3(CQL, updates, 256),
        "sb3 CalQL, batch 256": lambda: sb3(CalQL, updates, 256),
        "sb3 DiscreteCQL, batch 256": lambda: sb3(DiscreteCQL, 4 * updates, 256),
        "sb3 DiscreteCQL, batch 32": lambda: sb3(DiscreteCQL, 8 * updates, 32),
        "d3rlpy CQL, batch 256": lambda: d3rlpy_cql(updates, 256),
    }
    for name, case in cases.items():
        without, with_it, alone = case()
        print(
            f"{name:28} update {1e3 * without:7.2f} ms without, {1e3 * with_it:7.2f} ms with, ratio {with_it / without:.4f}; "
            f"the watch alone {1e3 * alone:.3f} ms, {100 * alone / without:.2f} % of an update",
            flush=True,
        )


if __name__ == "__main__":
    main()
