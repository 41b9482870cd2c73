"""CQL and Cal-QL as Stable-Baselines3 algorithms, on SAC, DQN and sb3-contrib's QR-DQN and TQC."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cql_plugins._gym import import_quietly

import_quietly()

from cql_plugins._guards import NonFiniteError  # noqa: E402
from cql_plugins.sb3.checkpoints import CheckpointError, Checkpoints, load_checkpoint  # noqa: E402
from cql_plugins.sb3.cql import CQL, CalQL  # noqa: E402
from cql_plugins.sb3.diagnostics import (  # noqa: E402
    DiagnosticsCallback,
    GapExpansion,
    ValueBias,
    gap_expansion,
    value_bias,
)
from cql_plugins.sb3.dqn import DiscreteCalQL, DiscreteCQL  # noqa: E402
from cql_plugins.sb3.export import export_policy  # noqa: E402
from cql_plugins.sb3.weights import WeightsError, load_weights, save_weights  # noqa: E402
from cql_plugins.sb3.wrappers import FlattenNestedObservation, ResumableEnv, ScaleReward  # noqa: E402

if TYPE_CHECKING:
    from cql_plugins.sb3.qrdqn import CQLQRDQN, CalQLQRDQN
    from cql_plugins.sb3.tqc import CQLTQC, CalQLTQC

__all__ = [
    "CQL",
    "CalQL",
    "CheckpointError",
    "Checkpoints",
    "DiagnosticsCallback",
    "DiscreteCQL",
    "DiscreteCalQL",
    "FlattenNestedObservation",
    "GapExpansion",
    "NonFiniteError",
    "ResumableEnv",
    "ScaleReward",
    "ValueBias",
    "WeightsError",
    "export_policy",
    "gap_expansion",
    "load_checkpoint",
    "load_weights",
    "save_weights",
    "value_bias",
]

_CONTRIB = {"CQLQRDQN": "qrdqn", "CalQLQRDQN": "qrdqn", "CQLTQC": "tqc", "CalQLTQC": "tqc"}
"""Class that needs sb3-contrib, module that has it."""
if find_spec("sb3_contrib") is not None:
    __all__ += ["CQLQRDQN", "CQLTQC", "CalQLQRDQN", "CalQLTQC"]


def __getattr__(name: str) -> Any:
    if name not in _CONTRIB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"cql_plugins.sb3.{_CONTRIB[name]}")
    except ImportError as error:
        raise ImportError(
            f'sb3-contrib is needed for {name}: {error}. Install it with: pip install "cql-plugins[contrib]"'
        ) from error
    return getattr(module, name)
