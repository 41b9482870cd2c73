"""One model trained by two processes, under torchrun with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th

WORKER = Path(__file__).with_name("ddp_worker.py")


def train(folder: Path, launcher: list[str], rate: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder), rate],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def parameters(path: Path) -> dict[str, Any]:
    state = th.load(path, weights_only=False)
    return {f"{part}.{key}": value for part, values in state.items() for key, value in values.items() if th.is_tensor(value)}


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    assert {"policy._mu.weight", "q_funcs.0._fc.weight", "log_temp._parameter", "log_alpha._parameter"} <= first.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("alpha_learning_rate", ["0.0", "1e-2"])
def test_two_processes_are_one_with_the_doubled_batch(alpha_learning_rate: str, tmp_path: Path) -> None:
    train(tmp_path, [], alpha_learning_rate)
    train(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], alpha_learning_rate)
    first, second = parameters(tmp_path / "2-0.pt"), parameters(tmp_path / "2-1.pt")
    assert largest_difference(first, second) == 0.0
    alone = parameters(tmp_path / "1-0.pt")
    assert largest_difference(first, alone) < 1e-6
    untouched = {key: th.zeros_like(value) for key, value in alone.items()}
    assert largest_difference(untouched, alone) > 1e-2
    for rank in range(2):
        batch, loss, noted = (tmp_path / f"sick-{rank}.txt").read_text().split("\n")
        assert batch.startswith("Gradient step 51: on process 1, batch.rewards has 1 of 16 values"), batch
        assert loss.startswith("Gradient step 51: on process 1, critic_loss is inf"), loss
        assert "On process 1: The largest Q(s, a) of the data's actions, or rewards, are in row 4:" in loss, loss
        assert noted.startswith("Gradient step 51: critic_loss or its gradient is not finite"), noted
