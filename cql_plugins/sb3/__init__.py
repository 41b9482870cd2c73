"""CQL and Cal-QL as Stable-Baselines3 algorithms."""

from cql_plugins.sb3.cal_ql import CalQL
from cql_plugins.sb3.cql import CQL

__all__ = ["CQL", "CalQL"]
