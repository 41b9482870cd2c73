"""The memory targets, measured as `benchmarks/bench_memory.py` does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the figures are Linux's"),
]


@pytest.fixture
def bench(repo_root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("bench_memory", repo_root / "benchmarks" / "bench_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stacks_and_their_buffer_hold_each_frame_once(bench: Any, tmp_path: Path) -> None:
    rows = bench.measure_held(100_000, tmp_path)
    for row in rows.values():
        assert row["array_bytes"] <= 1.1 * row["pixel_bytes"]
        assert row["own"] + row["file"] <= 1.1 * row["pixel_bytes"]
        assert row["peak"] <= 1.1 * row["pixel_bytes"]
    assert rows["memmap"]["own"] <= 0.1 * rows["memmap"]["pixel_bytes"]


def test_four_times_the_memory_trains(bench: Any, tmp_path: Path) -> None:
    limit = 512
    rows = bench.measure_limited(limit, 20, tmp_path)
    assert rows["memmap"]["gradient_steps"] == 20
    assert rows["memmap"]["observation_bytes"] >= 4 * limit * 2**20
    assert "MemoryError" in rows["memory"]["failed"]  # the control: the same data does not fit
