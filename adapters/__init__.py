"""Readers and writers around one type, `OfflineDataset`.

Readers (`from_minari`, `from_d4rl`, `from_arrays`, `from_npz`, `from_sb3`, `from_d3rlpy`) validate what comes in once and
hand back an `OfflineDataset`; writers (`to_sb3`, `to_d3rlpy`, `to_minari`, `to_d4rl`, `to_npz`) turn one into a replay
buffer or a stored data set; `to_sb3_model` and `to_d3rlpy_model` move trained models. Importing this package needs NumPy and
Gymnasium only: each format's library is imported by the function that uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cql_plugins.adapters._validation import DatasetError
    from cql_plugins.adapters.arrays import from_arrays, from_npz, to_npz
    from cql_plugins.adapters.d3rlpy import from_d3rlpy, to_d3rlpy
    from cql_plugins.adapters.d4rl import from_d4rl, to_d4rl
    from cql_plugins.adapters.dataset import Episode, OfflineDataset, Transitions
    from cql_plugins.adapters.frames import StackedFrames
    from cql_plugins.adapters.minari import from_minari, to_minari
    from cql_plugins.adapters.models import ModelError, to_d3rlpy_model, to_sb3_model
    from cql_plugins.adapters.report import DatasetSummary
    from cql_plugins.adapters.sb3 import from_sb3, to_sb3
    from cql_plugins.adapters.scores import normalized_score, reference_scores

__all__ = [
    "DatasetError",
    "DatasetSummary",
    "Episode",
    "ModelError",
    "OfflineDataset",
    "StackedFrames",
    "Transitions",
    "from_arrays",
    "from_d3rlpy",
    "from_d4rl",
    "from_minari",
    "from_npz",
    "from_sb3",
    "normalized_score",
    "reference_scores",
    "to_d3rlpy",
    "to_d3rlpy_model",
    "to_d4rl",
    "to_minari",
    "to_npz",
    "to_sb3",
    "to_sb3_model",
]

_HOMES = {
    "DatasetError": "_validation",
    "DatasetSummary": "report",
    "Episode": "dataset",
    "ModelError": "models",
    "OfflineDataset": "dataset",
    "StackedFrames": "frames",
    "Transitions": "dataset",
    "from_arrays": "arrays",
    "from_d3rlpy": "d3rlpy",
    "from_d4rl": "d4rl",
    "from_minari": "minari",
    "from_npz": "arrays",
    "from_sb3": "sb3",
    "normalized_score": "scores",
    "reference_scores": "scores",
    "to_d3rlpy": "d3rlpy",
    "to_d3rlpy_model": "models",
    "to_d4rl": "d4rl",
    "to_minari": "minari",
    "to_npz": "arrays",
    "to_sb3": "sb3",
    "to_sb3_model": "models",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
