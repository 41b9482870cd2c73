"""What every test shares. The warnings policy is in pyproject.toml."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read once, when the libraries load, hence before the imports below. The suite's networks are tiny: a second thread
# costs them more in hand-overs than it saves, and one thread makes sums come out the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# No test opens a window or a GPU, whatever the machine has.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest

from cql_plugins.adapters import OfflineDataset

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(autouse=True)
def minari_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the user's datasets: no test can read, change or delete those.

    A test that wants a dataset which lies somewhere else sets MINARI_DATASETS_PATH itself, through `monkeypatch`.
    """
    home = tmp_path_factory.mktemp("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home))
    return home


@pytest.fixture(scope="session")
def data_root() -> Path:
    default = REPO_ROOT.parent / "shared" / "data"
    root = Path(os.environ.get("CQL_PLUGINS_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set CQL_PLUGINS_DATA to the folder that has it")
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _assert_same(first: OfflineDataset, second: OfflineDataset) -> None:
    """Every array equal, to the bit and the dtype."""

    def compare(left: Any, right: Any) -> None:
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            for key in left:
                compare(left[key], right[key])
        else:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)

    for field in ("observations", "actions", "rewards", "terminations", "truncations", "offsets"):
        compare(getattr(first, field), getattr(second, field))
    assert first.observation_space == second.observation_space
    assert first.action_space == second.action_space


@pytest.fixture
def assert_same() -> Callable[[OfflineDataset, OfflineDataset], None]:
    return _assert_same
