"""Cal-QL for continuous and discrete actions as d3rlpy algorithms."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import d3rlpy
from d3rlpy.algos.qlearning.torch.cql_impl import CQLImpl as HostCQLImpl
from d3rlpy.algos.qlearning.torch.cql_impl import DiscreteCQLImpl as HostDiscreteCQLImpl
from d3rlpy.base import DeviceArg

from cql_plugins.d3rlpy.cql import CQL, CQLConfig, DiscreteCQL, DiscreteCQLConfig
from cql_plugins.d3rlpy.impl import CalQLImpl, DiscreteCalQLImpl
from cql_plugins.d3rlpy.offline import CalibratedMixin, register_once
from cql_plugins.returns import RETURN_TAILS, ReturnTail


@dataclasses.dataclass()
class CalQLConfig(CQLConfig):
    """Config of Calibrated Q-Learning: CQL that is ready for online fine-tuning (Nakamoto et al. 2023, arXiv 2303.05479).

    Inside the soft maximum the policy's values are bounded from below by the data's return-to-go, ``max(Q(s, a), G(s))``
    [Cal-QL, Eq. 5.1], offline and online. Returns are those of the scaled rewards, summed once for each episode; online
    transitions get theirs when their episode ends, and until then the bound is off for them.

    Args:
        max_q_backup: As in CQL, but on, as in the authors' code.
        return_tail: What follows a truncated end in ``G``: ``"zero"`` (non-negative rewards), ``"sparse"`` (goal tasks: an
            episode of failure rewards never ends), ``"none"`` (the bound is off for its episode) or ``"bootstrap"`` (the
            target critics' value, estimated anew every 1000 gradient steps).
        calibrate_random: Whether the uniform actions' values are bounded too.

    Raises:
        ValueError: If a field is out of its range.
    """

    max_q_backup: bool = True
    return_tail: ReturnTail = "zero"
    calibrate_random: bool = False
    _host_config: ClassVar[type[d3rlpy.algos.CQLConfig]] = d3rlpy.algos.CalQLConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tail(self.return_tail)

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> CalQL:
        """Make the algorithm, see d3rlpy.

        Args:
            device: ``"cpu"``, ``"cuda:0"``, an index, or a boolean.
            enable_ddp: Train one model in several processes (``torchrun``).
        """
        return CalQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name under which d3rlpy finds it in a saved file."""
        return "cql_plugins.cal_ql"


class CalQL(CalibratedMixin, CQL):
    """Calibrated Q-Learning in d3rlpy, see :class:`CalQLConfig`."""

    _config: CalQLConfig

    def _wrap_impl(self, built: HostCQLImpl) -> CalQLImpl:
        return CalQLImpl(built, self._config, self.compiled, self._returns_of)


@dataclasses.dataclass()
class DiscreteCalQLConfig(DiscreteCQLConfig):
    """Config of Calibrated Q-Learning for discrete actions; no published code has it.

    Inside the soft maximum every action's value is bounded from below by the data's return-to-go; the value of the data's
    action is not.

    Args:
        return_tail: What follows a truncated end in the return-to-go, see :class:`CalQLConfig`.

    Raises:
        ValueError: If a field is out of its range.
    """

    return_tail: ReturnTail = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tail(self.return_tail)

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> DiscreteCalQL:
        """Make the algorithm, see d3rlpy.

        Args:
            device: ``"cpu"``, ``"cuda:0"``, an index, or a boolean.
            enable_ddp: Train one model in several processes (``torchrun``).
        """
        return DiscreteCalQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """The name under which d3rlpy finds it in a saved file."""
        return "cql_plugins.discrete_cal_ql"


class DiscreteCalQL(CalibratedMixin, DiscreteCQL):
    """Calibrated Q-Learning for discrete actions in d3rlpy, see :class:`DiscreteCalQLConfig`."""

    _config: DiscreteCalQLConfig

    def _wrap_impl(self, built: HostDiscreteCQLImpl) -> DiscreteCalQLImpl:
        return DiscreteCalQLImpl(built, self._config, self.compiled, self._returns_of)


def _check_tail(tail: str) -> None:
    if tail not in RETURN_TAILS:
        raise ValueError(f"return_tail must be one of {RETURN_TAILS}; got {tail!r}.")


register_once(CalQLConfig)
register_once(DiscreteCalQLConfig)
