"""CQL and Cal-QL as Stable-Baselines3 algorithms."""

from cql_plugins._gym import import_quietly

import_quietly()

from cql_plugins.sb3.cal_ql import CalQL  # noqa: E402
from cql_plugins.sb3.cql import CQL  # noqa: E402
from cql_plugins.sb3.wrappers import FlattenNestedObservation, ScaleReward  # noqa: E402

__all__ = ["CQL", "CalQL", "FlattenNestedObservation", "ScaleReward"]
