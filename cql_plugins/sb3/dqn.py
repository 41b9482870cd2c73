"""Conservative and Calibrated Q-Learning on Stable-Baselines3's DQN."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
import torch.nn.functional as F
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.dqn.dqn import DQN
from stable_baselines3.dqn.policies import QNetwork

from cql_plugins.sb3.q_learning import CalibratedQLearning, ConservativeQLearning


class DiscreteCQL(ConservativeQLearning, DQN):
    """Conservative Q-Learning for discrete actions: DQN that does not overrate actions the data does not have.

    Minimised is ``DQN's loss + cql_alpha * gap`` with ``gap = T logsumexp_a(Q(s, a) / T) - Q(s, a_data)``
    [CQL, section 3.2]. With ``cql_alpha=0`` it is DQN, number for number. All arguments of DQN come first, in its order and
    with its defaults; ours are keyword-only, see :class:`~cql_plugins.sb3.q_learning.ConservativeQLearning`,
    :class:`~cql_plugins.sb3.conservative.ConservativeMixin` and :class:`~cql_plugins.sb3.offline.OfflineMixin`.
    """

    policy_aliases: ClassVar[dict[str, Any]] = DQN.policy_aliases
    _network_class = QNetwork

    @property
    def _networks(self) -> tuple[Any, Any]:
        return self.q_net, self.q_net_target

    def _quantiles(self, network: Any, observations: th.Tensor | TensorDict) -> th.Tensor:
        return self._evaluate(network, network.q_net, observations).unsqueeze(1)

    def _bellman_loss(self, current: th.Tensor, target: th.Tensor) -> th.Tensor:
        return F.smooth_l1_loss(current, target)


class DiscreteCalQL(CalibratedQLearning, DiscreteCQL):
    """Calibrated Q-Learning for discrete actions on DQN, see :class:`DiscreteCQL`; ``return_tail`` as in ``CalQL``."""
