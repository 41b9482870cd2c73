from __future__ import annotations

import subprocess
import sys

import pytest

import cql_plugins.adapters as adapters

HEAVY = ("torch", "stable_baselines3", "minari", "h5py", "d3rlpy", "pyarrow", "rich", "PIL")


def test_import_is_light() -> None:
    code = f"""
import sys
import cql_plugins.adapters as adapters
adapters.OfflineDataset, adapters.from_minari, adapters.from_d4rl, adapters.to_sb3, adapters.from_npz
print([name for name in {HEAVY} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names() -> None:
    assert dir(adapters) == sorted(adapters.__all__)
    for name in adapters.__all__:
        assert getattr(adapters, name).__module__.startswith("cql_plugins.adapters.")
    with pytest.raises(AttributeError, match="no attribute 'from_nowhere'"):
        _ = adapters.from_nowhere
