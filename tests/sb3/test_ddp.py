"""One SB3 model trained by two processes, under torchrun with Gloo."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch as th

from cql_plugins.sb3 import CQL
from cql_plugins.sb3.distributed import Ranks, refuse_shared_gpus, world_size

pytest.importorskip("sb3_contrib")

WORKER = Path(__file__).with_name("ddp_worker.py")
TOLERANCE = 1e-5
"""Between two processes and one with the whole batch, of values relative to 1 or their own size.

Summing n float32 numbers of size t in another order changes the sum by 2 n u t at most, u = 2^-24; here n = 16, the rows of a
batch and the units of a layer. What is summed to a gradient stays below 5, so that gradients differ by 1e-5 at most. A step
moves a parameter by the learning rate of 1e-2 times as much with SGD, and with Adam at eps = 0.1 by 1e-2 / 0.1 times as much:
1e-6, which makes 9e-6 in 9 steps. (Temperature and multiplier have an Adam without that eps, and gradients near 1.)
"""
FAR = 100 * TOLERANCE
"""What must differ differs by more."""


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sb3_ddp_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two processes wrote, in the order of their ranks."""
    pytest.importorskip("tensorboard")  # what the worker logs to
    if not th.distributed.is_gloo_available():
        pytest.skip("torch without Gloo")
    worker.checkpoint_of_one(folder / worker.RUNS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def distance(first: dict[str, Any], second: dict[str, Any], part: str = "") -> float:
    """The largest difference between tensors whose names start alike."""
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith(part)]
    assert names
    return max(float(((first[name] - second[name]).abs() / second[name].abs().clamp(min=1)).max()) for name in names)


# The same as one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", worker.ALGORITHMS)
def test_two_processes_are_one_with_the_whole_batch(ranks: list[dict[str, Any]], name: str, optimizer: str) -> None:
    first, second = (rank[f"given {name} {optimizer}"] for rank in ranks)
    alone = worker.train_on_given(name, optimizer)
    assert distance(first["after"], second["after"]) == 0.0
    assert distance(first["after"], alone["after"]) < TOLERANCE
    # The values that are logged are means over the ranks; only the first has any.
    assert second["log"] == []
    assert [row["train/n_updates"] for row in first["log"]] == [4, 8, 9]
    for row, expected in zip(first["log"], alone["log"], strict=True):
        assert row == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


PARTS = ["policy.critic.", "policy.actor.", "log_ent_coef", "log_cql_lagrange"]


@pytest.mark.parametrize("part", PARTS)
def test_without_averaging_every_part_drifts(ranks: list[dict[str, Any]], part: str) -> None:
    """The twin that must differ; and what moves nothing would prove nothing."""
    first, second = (rank["apart"] for rank in ranks)
    alone = ranks[0]["given CalQL sgd"]
    assert distance(first["before"], second["before"]) == 0.0
    assert distance(alone["before"], alone["after"], part) > FAR
    assert distance(first["after"], second["after"], part) > FAR
    assert distance(first["after"], alone["after"], part) > FAR


# Batches and noise of their own ----------------------------------------------------------------------------------------------


def test_first_rank_counts_and_parameters_stay_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["own"] for rank in ranks)
    assert distance(first["after"], second["after"]) == 0.0
    # Three steps that only the first had done before.
    assert first["counters"] == second["counters"] == (worker.STEPS + 3, worker.STEPS, 0)
    assert first["after"]["critic.optimizer.state.0.step"] == worker.STEPS + 3
    assert th.equal(first["mean"], second["mean"])  # of VecNormalize


def test_ranks_draw_apart_and_the_same_again(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["own"] for rank in ranks)
    assert first["batches"].shape == second["batches"].shape == (worker.STEPS, worker.ROWS // 2, 1)
    # Of 200 rows, two draws are the same one in 200; a shared stream would make all of them the same.
    assert (first["batches"] == second["batches"]).float().mean() < 0.1
    for rank in ranks:
        assert th.equal(rank["own"]["batches"], rank["own again"]["batches"])
        assert distance(rank["own"]["after"], rank["own again"]["after"]) == 0.0


def test_bootstrapped_returns_are_one_estimate(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert th.equal(first["own"]["returns"], second["own"]["returns"])
    assert not th.equal(first["noise apart"]["returns"], second["noise apart"]["returns"])


def test_batch_normalization_keeps_statistics_of_its_own(ranks: list[dict[str, Any]]) -> None:
    """They differ although the models had the same seed: the ranks draw apart."""
    first, second = (rank["normalized"] for rank in ranks)
    running = {name for name in first if "running" in name}
    assert {name for name in first if not th.equal(first[name], second[name])} == running != set()


# One rank speaks -------------------------------------------------------------------------------------------------------------


def test_only_the_first_logs_saves_and_runs_callbacks(ranks: list[dict[str, Any]], folder: Path) -> None:
    first, second = (rank["host"] for rank in ranks)
    assert (first["calls"], second["calls"]) == (5, 0)
    assert "train/" in first["printed"]
    assert second["printed"] == ""
    assert {path.name for path in folder.iterdir()} == {"0.pt", "1.pt", worker.RUNS, "checkpoints0", "tensorboard0"}
    assert {path.name for path in (folder / "checkpoints0").iterdir()} == {"rl_model_2_steps.zip", "rl_model_4_steps.zip"}


def test_a_callback_stops_all_at_the_same_step(ranks: list[dict[str, Any]]) -> None:
    assert [rank["host"]["steps"] for rank in ranks] == [5, 5]


def test_a_checkpoint_is_a_model_of_one_process(ranks: list[dict[str, Any]], folder: Path) -> None:
    model = worker.CQL.load(folder / "checkpoints0" / "rl_model_4_steps.zip", device="cpu")
    model.learn_offline(worker.make_dataset(), 1)
    assert model._n_updates == 5


# Checkpoints of all ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_to_any_rank_ends_all_with_a_checkpoint(ranks: list[dict[str, Any]], folder: Path) -> None:
    for told, end, step in (("SIGTERM to one", "SystemExit(143)", 6), ("SIGINT to all", "KeyboardInterrupt()", 9)):
        first, second = (rank[told] for rank in ranks)
        assert (first["end"], second["end"]) == (end, end)
        assert (first["steps"], second["steps"]) == (step, step)
        assert distance(first["after"], second["after"]) == 0
    steps = [int(path.stem.rpartition("_")[2]) for path in worker.Checkpoints(folder / worker.RUNS).files.paths()]
    assert steps == [3, 6, 9]


def test_resumed_ranks_have_one_estimate_of_returns(ranks: list[dict[str, Any]]) -> None:
    for told in ("SIGTERM to one", "SIGINT to all"):
        assert th.equal(*(rank[told]["returns"] for rank in ranks))


# Refusals and failures -------------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_makes_the_other_fail(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["failure"] for rank in ranks)
    assert (first["error"], second["error"]) == ("RuntimeError", "KeyError")
    assert first["steps"] == 2
    assert first["seconds"] < 60  # not the 30 minutes of the timeout


@pytest.mark.parametrize(("where", "tensor"), [("batch", "batch.rewards"), ("gradient", "critic.qf0.0.weight.grad")])
def test_a_rank_that_is_sick_stops_all_at_that_step(ranks: list[dict[str, Any]], where: str, tensor: str) -> None:
    first, second = (rank[f"sick {where}"] for rank in ranks)
    for own in (first, second):
        assert (own["step"], own["tensor"], own["closed"]) == (3, tensor, True)
        assert ("on rank 1, batch.rewards has 1 of 8" in own["text"]) == (where == "batch")
    assert (first["rows"], second["rows"]) == ((5,), (5,)) or where == "gradient"
    assert distance(first["state"], second["state"]) == 0
    ((step, saved),) = first["told"]
    assert step == 3
    assert distance(saved, first["state"]) == 0
    assert second["told"] == []
    assert all(rank["sick nothing"] == {"text": "never sick"} for rank in ranks)


def test_all_blame_the_rows_of_the_rank_that_has_the_worst(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["sick loss"] for rank in ranks)
    assert first["tensor"] == "critic_loss"
    assert "On rank 1: The largest Q(s, a) of the data's actions, or rewards, are in row 5:" in first["text"]
    assert first["rows"][0] == 5
    assert (first["text"], first["rows"]) == (second["text"], second["rows"])


def test_what_one_rank_has_noted_before_is_read_by_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["noted"] for rank in ranks)
    assert distance(first["after"], second["after"]) == 0
    steps = worker.STEPS + 3
    assert first["text"].startswith(f"Gradient step {steps + 1}: batch is not finite.")
    assert second["text"].startswith(f"Gradient step {steps + 1}: batch is not finite.")


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        ("batch_size", "got batch_size=15 and 2 ranks."),
        ("compile", "Set compile=False."),
        ("learn", "this is one of 2"),
        ("gradient_steps", "gradient_steps is [1, 2] on ranks 0 to 1."),
        ("algorithm", "algorithm is [CQL, CalQL] on ranks 0 to 1."),
        ("gamma", "gamma is [0.9, 0.5] on ranks 0 to 1."),
        ("schedule", "lr_schedule(1) is [0.01, 0.02] on ranks 0 to 1."),
        ("callback", "learning_rate is [0.0001, 0.01] on ranks 0 to 1."),
    ],
)
def test_refusals_on_every_rank(ranks: list[dict[str, Any]], attempt: str, said: str) -> None:
    assert all(said in rank["refusals"][attempt] for rank in ranks)


def test_a_gpu_for_each_rank() -> None:
    refuse_shared_gpus(["GPU-a", "GPU-b"])
    with pytest.raises(ValueError, match=r"device=f\"cuda:\{os.environ\['LOCAL_RANK'\]\}\""):
        refuse_shared_gpus(["GPU-a", "GPU-b", "GPU-a"])


@pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="torch without Gloo")
def test_ranks_wait_as_long_as_the_group_of_the_user(tmp_path: Path) -> None:
    timeout = timedelta(hours=5)
    th.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timeout)
    try:
        ranks = Ranks(th.device("cpu"))
        assert ranks._host._get_backend(th.device("cpu")).options._timeout == timeout
        ranks.close()
    finally:
        th.distributed.destroy_process_group()


def test_one_process_alone_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a launcher's whole set of variables makes a rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_size() == 1
    worker.make_model(worker.CQL).learn_offline(worker.make_dataset(), 1)
    assert not th.distributed.is_initialized()
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 2


def test_options_are_compared_by_the_same_names_whatever_their_types() -> None:
    """NumPy's numbers are no plain ones; a rank that lacked a name would fail in another way than the rest."""
    asked: list[dict[str, Any]] = []

    class Recorder:
        def require_equal(self, **values: Any) -> None:
            asked.append(values)

    for gamma in (0.9, np.float32(0.9)):
        model = CQL("MlpPolicy", "Pendulum-v1", gamma=gamma, policy_kwargs={"net_arch": [4]})
        model._require_equal_options(Recorder())
    plain, of_numpy = asked
    assert plain.keys() == of_numpy.keys() >= {"gamma", "cql_alpha", "batch_size", "lr_schedule(1)"}
    assert [name for name in plain if plain[name] != of_numpy[name]] == ["gamma"], "refused, with its name"
