"""Run by test_ddp.py under torchrun, and imported by it for the run of one process: trains models, writes what came of it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins import _guards
from cql_plugins._guards import NonFiniteError
from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL, CQLTQC, CalQL, Checkpoints, DiscreteCQL
from cql_plugins.sb3.distributed import Ranks

STEPS, ROWS, LOG_INTERVAL = 9, 16, 4
RUNS = "runs"
"""Folder of checkpoints that all ranks know."""
ALGORITHMS: dict[str, type[Any]] = {"CQL": CQL, "CalQL": CalQL, "DiscreteCQL": DiscreteCQL, "CQLTQC": CQLTQC}


def make_dataset(discrete: bool = False) -> OfflineDataset:
    """Noise in Pendulum's spaces, or with three actions; episodes of 20 steps, each second one cut off."""
    rng, n = np.random.default_rng(7), 200
    states = rng.uniform(-1, 1, size=(10, 21, 3)).astype(np.float32)
    last = np.arange(n) % 20 == 19
    cut = np.arange(n) % 40 == 39
    return from_arrays(
        states[:, :-1].reshape(n, 3),
        rng.integers(3, size=n) if discrete else rng.uniform(-2, 2, size=(n, 1)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        last & ~cut,
        cut,
        next_observations=states[:, 1:].reshape(n, 3),
        observation_space=spaces.Box(-np.array([1, 1, 8], np.float32), np.array([1, 1, 8], np.float32)),
        action_space=spaces.Discrete(3) if discrete else spaces.Box(-2.0, 2.0, (1,), np.float32),
    )


def make_model(algorithm: type[Any], optimizer: str = "adam", env: Any = None, **changes: Any) -> Any:
    """A small model, with rates at which a few steps move it visibly."""
    # With such an eps Adam's step is no sign of the gradient, but smooth in it.
    networks = {"optimizer_class": th.optim.SGD} if optimizer == "sgd" else {"optimizer_kwargs": {"eps": 0.1}}
    arguments: dict[str, Any] = {
        "policy_kwargs": {"net_arch": [16], **networks, **changes.pop("policy_kwargs", {})},
        "batch_size": ROWS,
        "buffer_size": 100,
        "learning_rate": 1e-2,
        "seed": 0,
        "device": "cpu",
    } | changes
    discrete = issubclass(algorithm, DiscreteCQL)
    if discrete:
        arguments = {"max_grad_norm": 0.5, "offline_target_update_interval": 2} | arguments
    else:
        arguments = {"actor_learning_rate": None, "cql_n_actions": 3} | arguments
    if issubclass(algorithm, CQLTQC):
        arguments["policy_kwargs"]["n_quantiles"] = 5
    if issubclass(algorithm, CalQL):
        arguments = {"cql_alpha": 1.0, "cql_lagrange_threshold": 4.0} | arguments
    if env is None:
        model = algorithm.from_dataset(make_dataset(discrete), **arguments)
    else:
        model = algorithm("MlpPolicy", env, **arguments)
    if optimizer == "sgd":
        for name, variable in (("ent_coef_optimizer", "log_ent_coef"), ("cql_lagrange_optimizer", "log_cql_lagrange")):
            if getattr(model, name, None) is not None:
                setattr(model, name, th.optim.SGD([getattr(model, variable)], lr=1e-2))
    return model


def state_of(model: Any) -> dict[str, th.Tensor]:
    """Every tensor that training changes, optimisers' included."""

    def leaves(tree: Any, name: str) -> None:
        if isinstance(tree, th.Tensor):
            found[name] = tree.detach().clone()
        elif isinstance(tree, dict):
            for key, branch in tree.items():
                leaves(branch, f"{name}.{key}")

    found: dict[str, th.Tensor] = {}
    for name, tree in model.get_parameters().items():
        leaves(tree, name)
    for name in model._get_torch_save_params()[1]:
        leaves(getattr(model, name), name)
    return found


class Rows(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append({key: value for key, value in key_values.items() if not key.startswith("time/")})

    def close(self) -> None:
        pass


# Given batches and noise ---------------------------------------------------------------------------------------------------


class GivenNoise:
    """Random numbers for all rows of a batch, of which each process takes its own rows."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.generator = rank, size, th.Generator().manual_seed(3)

    def normal(self, rows: int, *shape: int) -> th.Tensor:
        return th.zeros(rows * self.size, *shape).normal_(generator=self.generator).chunk(self.size)[self.rank]

    def uniform(self, tensor: th.Tensor, low: float, high: float) -> th.Tensor:
        rows = th.rand(len(tensor) * self.size, *tensor.shape[1:], generator=self.generator)
        return tensor.copy_(low + (high - low) * rows.chunk(self.size)[self.rank])

    @contextlib.contextmanager
    def injected(self) -> Any:
        def rsample(distribution: Any, shape: Any = ()) -> th.Tensor:
            return distribution.loc + distribution.scale * self.normal(*distribution.loc.shape)

        with (
            mock.patch.object(th.distributions.Normal, "rsample", rsample),
            mock.patch.object(th, "randn", lambda *shape, **_: self.normal(*shape)),
            mock.patch.object(th.Tensor, "uniform_", self_as_argument(self.uniform)),
        ):
            yield


def self_as_argument(function: Any) -> Any:
    """A method of any class from a function that is bound already."""
    return lambda *args: function(*args)


def on_given_batches(algorithm: type[Any], rank: int, size: int, averages: bool) -> type[Any]:
    """The algorithm with the same batch in every process, of which each takes its own rows."""

    class OnGivenBatches(algorithm):  # type: ignore[misc]
        def sample_batch(self, batch_size: int) -> Any:
            assert batch_size * size == ROWS
            np.random.seed(self._n_updates)
            return super().sample_batch(ROWS).map(lambda rows: rows.chunk(size)[rank])

        def _compute_gradients(self, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
            ranks = self._ranks
            self._ranks = ranks if averages else None
            super()._compute_gradients(loss, optimizer)
            self._ranks = ranks

    return OnGivenBatches


def train_on_given(name: str, optimizer: str, rank: int = 0, size: int = 1, averages: bool = True) -> dict[str, Any]:
    model = make_model(on_given_batches(ALGORITHMS[name], rank, size, averages), optimizer)
    before, log = state_of(model), Rows()
    model.set_logger(Logger(None, [log]))
    with GivenNoise(rank, size).injected():
        model.learn_offline(make_dataset(name == "DiscreteCQL"), STEPS, log_interval=LOG_INTERVAL)
    return {"before": before, "after": state_of(model), "log": log.rows}


# What only processes that train together have ------------------------------------------------------------------------------


def train_on_own(rank: int, shares_noise: bool = True) -> dict[str, Any]:
    """Own batches and noise, from models that differ and of which the first has a past."""

    class Watched(CalQL):
        def sample_batch(self, batch_size: int) -> Any:
            batch = super().sample_batch(batch_size)
            batches.append(batch.actions.clone())
            return batch

    batches: list[th.Tensor] = []
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), norm_reward=False)
    model = make_model(Watched, env=env, seed=5 + rank, return_tail="bootstrap", learning_starts=0, train_freq=100)
    if rank == 0:
        model.set_offline_data(make_dataset())
        model.train(3, ROWS)
    batches.clear()
    unshared = mock.patch.object(Ranks, "same_noise", return_value=contextlib.nullcontext())
    with contextlib.nullcontext() if shares_noise else unshared:
        model.learn_offline(make_dataset(), STEPS)
    return {
        "after": state_of(model),
        "batches": th.stack(batches),
        "returns": th.as_tensor(model.offline_buffer.returns_to_go.copy()),
        "mean": th.as_tensor(env.obs_rms.mean),
        "counters": (model._n_updates, model._n_offline_steps, model.num_timesteps),
    }


class Normalized(FlattenExtractor):
    """Batch normalisation of the observations."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)
        self.normalize = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.normalize(super().forward(observations))


def train_normalized() -> dict[str, th.Tensor]:
    model = make_model(DiscreteCQL, policy_kwargs={"features_extractor_class": Normalized})
    return state_of(model.learn_offline(make_dataset(True), STEPS))


class Stop(BaseCallback):
    """Stops training; counts its calls."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        return self.num_timesteps < self.step


def train_with_host(folder: Path, rank: int) -> dict[str, Any]:
    """Logs and checkpoints, in folders that are this rank's own, and a callback that stops."""
    model = make_model(CQL, tensorboard_log=str(folder / f"tensorboard{rank}"), verbose=1)
    stop, printed = Stop(5), io.StringIO()
    callbacks = [CheckpointCallback(2, str(folder / f"checkpoints{rank}")), stop]
    with contextlib.redirect_stdout(printed):
        model.learn_offline(make_dataset(), STEPS, callback=callbacks, log_interval=2)
    return {"steps": model._n_offline_steps, "calls": stop.n_calls, "printed": printed.getvalue()}


def train_with_failure(rank: int) -> dict[str, Any]:
    """The second rank fails in its third step; the first has nothing but the group to learn of it."""

    class Failing(CQL):
        def sample_batch(self, batch_size: int) -> Any:
            if rank == 1 and self._n_updates == 2:
                raise KeyError("broken row")
            return super().sample_batch(batch_size)

    model, start = make_model(Failing), time.monotonic()
    try:
        model.learn_offline(make_dataset(), STEPS)
    except (KeyError, RuntimeError) as error:
        return {"error": type(error).__name__, "seconds": time.monotonic() - start, "steps": model._n_updates}
    return {"error": None}


def train_sick(rank: int, where: str) -> dict[str, Any]:
    """In the third step the second rank has a batch, a loss or a gradient that is not finite."""

    class Sick(CQL):
        def sample_batch(self, batch_size: int) -> Any:
            batch = super().sample_batch(batch_size)
            if where == "batch" and rank == 1 and self._n_updates == 2:
                batch.rewards[5] = np.nan
            if where == "loss" and rank == 1 and self._n_updates == 2:
                batch.rewards[5] = 1e25
            return batch

    def spoil(gradient: th.Tensor) -> th.Tensor:
        return gradient * np.nan if where == "gradient" and rank == 1 and model._n_updates == 2 else gradient

    model, told = make_model(Sick), []
    model.critic.qf0[0].weight.register_hook(spoil)
    if rank == 0:
        model._sick_listeners.append(lambda error: told.append((error.step, state_of(model))))
    try:
        model.learn_offline(make_dataset(), STEPS)
    except NonFiniteError as error:
        own = {"text": str(error), "step": error.step, "tensor": error.tensor, "rows": error.rows}
        return own | {"state": state_of(model), "told": told, "closed": model._ranks is None}
    return {"text": "never sick"}


def checkpoint_of_one(folder: Path) -> None:
    """What is gone on from by several processes."""
    Checkpoints(folder).learn_offline(make_model(CalQL, return_tail="bootstrap"), make_dataset(), 3)


def resume_and_end(folder: Path, rank: int, told: tuple[int, ...], number: int, step: int) -> dict[str, Any]:
    """Go on from the newest checkpoint; in some step some ranks are sent a signal."""
    run = Checkpoints(folder, save_freq=0)
    model = run.resume(make_model(CalQL, return_tail="bootstrap"))
    sample = model.sample_batch

    def sampled(size: int) -> Any:
        if rank in told and model._n_updates == step - 1:
            os.kill(os.getpid(), number)
        return sample(size)

    model.sample_batch = sampled
    end = "finished"
    try:
        run.learn_offline(model, make_dataset(), 12)
    except (SystemExit, KeyboardInterrupt) as error:
        end = repr(error)
    returns = th.as_tensor(model.offline_buffer.returns_to_go.copy())
    return {"end": end, "steps": model._n_offline_steps, "after": state_of(model), "returns": returns}


def train_noted(rank: int) -> dict[str, Any]:
    """As on a GPU, with steps that the first rank had done before; then all of them meet what it had met alone."""

    class Noting(CQL):
        _defers = True

    model = make_model(Noting, precision="bf16")  # with fused optimisers, whose steps can be left out
    with mock.patch.object(_guards, "LOOK_INTERVAL", 5):
        if rank == 0:
            model.train(3, ROWS)
        model.learn_offline(make_dataset(), STEPS)
        result: dict[str, Any] = {"after": state_of(model)}
        if rank == 0:
            model.offline_buffer.rewards[:] = np.nan
            model.train(1, ROWS)
        try:
            model.learn_offline(model.offline_buffer, STEPS)
        except NonFiniteError as error:
            result["text"] = str(error)
    return result


def slow_down(local: dict[str, Any], _: Any) -> bool:
    local["self"].learning_rate = 1e-4
    return True


def refusals(rank: int) -> dict[str, str]:
    data = make_dataset()
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    attempts = {
        "batch_size": lambda: make_model(CQL, batch_size=15).learn_offline(data, 1),
        "compile": lambda: make_model(CQL, compile=True).learn_offline(data, 1),
        "learn": lambda: make_model(CQL, env=env).learn(1),
        "gradient_steps": lambda: make_model(CQL).learn_offline(data, 1 + rank),
        "algorithm": lambda: make_model((CQL, CalQL)[rank]).learn_offline(data, 1),
        "gamma": lambda: make_model(CQL, gamma=(0.9, 0.5)[rank], seed=rank, verbose=rank).learn_offline(data, 1),
        "schedule": lambda: make_model(CQL, learning_rate=lambda _: 0.01 * (1 + rank)).learn_offline(data, 1),
        "callback": lambda: make_model(CQL).learn_offline(data, 9, callback=slow_down, log_interval=4),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[name] = str(error)
    return said


def main(folder: str) -> None:
    th.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert not th.distributed.is_initialized()
    results: dict[str, Any] = {
        f"given {name} {optimizer}": train_on_given(name, optimizer, rank, size)
        for name in ALGORITHMS
        for optimizer in ("sgd", "adam")
    }
    assert th.distributed.get_world_size() == size
    results["apart"] = train_on_given("CalQL", "sgd", rank, size, averages=False)
    results["failure"] = train_with_failure(rank)
    results |= {f"sick {where}": train_sick(rank, where) for where in ("batch", "loss", "gradient", "nothing")}
    results["noted"] = train_noted(rank)
    runs = Path(folder, RUNS)
    results["SIGTERM to one"] = resume_and_end(runs, rank, (1,), signal.SIGTERM, 6)
    results["SIGINT to all"] = resume_and_end(runs, rank, (0, 1), signal.SIGINT, 9)
    results["own"], results["own again"] = train_on_own(rank), train_on_own(rank)
    results["noise apart"] = train_on_own(rank, shares_noise=False)
    results["normalized"] = train_normalized()
    results["host"] = train_with_host(Path(folder), rank)
    results["refusals"] = refusals(rank)
    th.save(results, Path(folder, f"{rank}.pt"))
    th.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
