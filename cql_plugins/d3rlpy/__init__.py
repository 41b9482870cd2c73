"""CQL and Cal-QL, continuous and discrete, as d3rlpy algorithms. Importing registers their types with d3rlpy."""

from cql_plugins._gym import import_quietly

import_quietly()
try:
    import d3rlpy as _d3rlpy  # noqa: F401
except ImportError as error:
    raise ImportError(f'd3rlpy is needed here: {error}. Install it with: pip install "cql-plugins[d3rlpy]"') from error

from cql_plugins._diagnostics import GapExpansion, ValueBias  # noqa: E402
from cql_plugins._guards import NonFiniteError  # noqa: E402
from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer  # noqa: E402
from cql_plugins.d3rlpy.cal_ql import CalQL, CalQLConfig, DiscreteCalQL, DiscreteCalQLConfig  # noqa: E402
from cql_plugins.d3rlpy.checkpoints import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint  # noqa: E402
from cql_plugins.d3rlpy.cql import CQL, CQLConfig, DiscreteCQL, DiscreteCQLConfig  # noqa: E402
from cql_plugins.d3rlpy.episodes import CompleteEpisode, CompleteTransitionPicker  # noqa: E402
from cql_plugins.d3rlpy.evaluators import QGapEvaluator, ValueBiasEvaluator, gap_expansion, value_bias  # noqa: E402
from cql_plugins.d3rlpy.online import OfflineOnlineReplayBuffer, ReturnsToGoReplayBuffer, with_returns_to_go  # noqa: E402
from cql_plugins.d3rlpy.weights import WeightsError, load_weights, save_weights  # noqa: E402

__all__ = [
    "CQL",
    "CQLConfig",
    "CalQL",
    "CalQLConfig",
    "CheckpointError",
    "Checkpoints",
    "CompleteEpisode",
    "CompleteTransitionPicker",
    "DiscreteCQL",
    "DiscreteCQLConfig",
    "DiscreteCalQL",
    "DiscreteCalQLConfig",
    "GapExpansion",
    "NonFiniteError",
    "OfflineOnlineReplayBuffer",
    "OfflineReplayBuffer",
    "QGapEvaluator",
    "ReturnsToGoReplayBuffer",
    "ValueBias",
    "ValueBiasEvaluator",
    "WeightsError",
    "gap_expansion",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "save_weights",
    "value_bias",
    "with_returns_to_go",
]
