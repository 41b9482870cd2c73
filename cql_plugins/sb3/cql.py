"""Conservative Q-Learning on Stable-Baselines3's SAC."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.sac.sac import SAC

from cql_plugins import losses
from cql_plugins.sb3.actor_critic import CalibratedActorCritic, ConservativeActorCritic


class CQL(ConservativeActorCritic, SAC):
    """Conservative Q-Learning (CQL): SAC with a critic that does not overrate actions the data does not have.

    Paper: https://arxiv.org/abs/2006.04779. The critic minimises
    ``1/2 sum_j [ mean (Q_j - y)^2 + cql_alpha * mean gap_j ]``, where the gap is a soft maximum of Q over actions minus Q at
    the data's action [CQL, Eq. 4]. The weight means what it means in the published codes: the
    paper's ``alpha`` is ``cql_alpha / 2``.

    Departures from SAC's defaults: the Bellman target has no entropy term (``backup_entropy``), and actor and entropy
    coefficient have a learning rate of their own (``actor_learning_rate``). With ``cql_alpha=0``, ``backup_entropy=True`` and
    ``actor_learning_rate=None`` it is SAC, number for number. ``target_update_interval`` counts gradient steps over all calls
    of ``train``, where SAC starts anew in each, so that an interval above 1 is kept with one gradient step a call, too.

    All arguments of SAC come first, in its order and with its defaults; ours are keyword-only, see
    :class:`~cql_plugins.sb3.actor_critic.ConservativeActorCritic`, :class:`~cql_plugins.sb3.conservative.ConservativeMixin` and
    :class:`~cql_plugins.sb3.offline.OfflineMixin`.
    """

    policy_aliases: ClassVar[dict[str, Any]] = SAC.policy_aliases

    def _q_values(self, outputs: th.Tensor) -> th.Tensor:
        return outputs[..., 0]

    def _bellman_error(self, outputs: th.Tensor, target: th.Tensor) -> th.Tensor:
        return ((outputs[..., 0] - target.T) ** 2).mean(dim=1)

    def _next_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return losses.max_backup(self._critic_outputs(self.critic_target, observations, actions)[..., 0])

    def _actor_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> th.Tensor:
        return th.cat(self.critic(observations, actions), dim=1).min(dim=1, keepdim=True).values


class CalQL(CalibratedActorCritic, CQL):
    """Calibrated Q-Learning (Cal-QL): CQL that is ready for online fine-tuning.

    Paper: https://arxiv.org/abs/2303.05479. Inside the soft maximum the policy's values are bounded from below by the data's
    return-to-go, ``max(Q(s, a), G(s))`` [Cal-QL, Eq. 5.1], offline and online. Online transitions get their returns when their
    episode ends; until then the bound is off for them.

    Arguments: those of :class:`CQL`, with ``max_q_backup`` on as in the authors' code, and ``return_tail`` and
    ``calibrate_random``, see :class:`~cql_plugins.sb3.actor_critic.CalibratedActorCritic`.
    """
