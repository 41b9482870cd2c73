"""Conservative and Calibrated Q-Learning on sb3-contrib's QR-DQN."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.qrdqn.policies import QuantileNetwork
from sb3_contrib.qrdqn.qrdqn import QRDQN
from stable_baselines3.common.type_aliases import TensorDict

from cql_plugins.sb3.q_learning import CalibratedQLearning, ConservativeQLearning


class CQLQRDQN(ConservativeQLearning, QRDQN):
    """Conservative Q-Learning on QR-DQN (Dabney et al. 2017, arXiv 1710.10044): the algorithm of CQL's Atari results.

    Minimised is ``QR-DQN's loss + cql_alpha * gap``: the loss is summed over quantiles and averaged over targets and batch,
    the gap is of the mean over quantiles. The paper's weights, 4.0 on 1 % and 1.0 on 10 % of the Atari data, are
    ``cql_alpha`` here. With ``cql_alpha=0`` it is QR-DQN, number for number. Arguments: QR-DQN's, then ours, see
    :class:`~cql_plugins.sb3.DiscreteCQL`.
    """

    policy_aliases: ClassVar[dict[str, Any]] = QRDQN.policy_aliases
    _network_class = QuantileNetwork

    @property
    def _networks(self) -> tuple[Any, Any]:
        return self.quantile_net, self.quantile_net_target

    def _quantiles(self, network: Any, observations: th.Tensor | TensorDict) -> th.Tensor:
        outputs = self._evaluate(network, network.quantile_net, observations)
        return outputs.view(len(outputs), network.n_quantiles, -1)

    def _bellman_loss(self, current: th.Tensor, target: th.Tensor) -> th.Tensor:
        return quantile_huber_loss(current, target, sum_over_quantiles=True)


class CalQLQRDQN(CalibratedQLearning, CQLQRDQN):
    """Calibrated Q-Learning on QR-DQN, see :class:`CQLQRDQN`; ``return_tail`` as in ``CalQL``."""
