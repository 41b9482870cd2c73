"""Conservative and Calibrated Q-Learning on sb3-contrib's TQC."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.tqc.policies import Critic
from sb3_contrib.tqc.tqc import TQC
from stable_baselines3.common.type_aliases import TensorDict

from cql_plugins.sb3.actor_critic import CalibratedActorCritic, ConservativeActorCritic


class CQLTQC(ConservativeActorCritic, TQC):
    """Conservative Q-Learning on truncated quantile critics (TQC, Kuznetsov et al. 2020, arXiv 2005.04269).

    The critic minimises ``TQC's loss + cql_alpha / 2 * gap``. The gap [CQL, Eq. 4] is of one value, the mean over the quantiles
    that TQC keeps: all critics' quantiles of an action are pooled and sorted, and the ``top_quantiles_to_drop_per_net`` largest
    of each critic left out. TQC averages its loss over quantiles and critics, and beyond an error of 1 it grows linearly, so a
    weight weighs more here than in :class:`~cql_plugins.sb3.CQL`.

    With ``cql_alpha=0``, ``backup_entropy=True`` and ``actor_learning_rate=None`` it is TQC, number for number. All arguments
    of TQC come first, then ours, see :class:`~cql_plugins.sb3.CQL`.
    """

    policy_aliases: ClassVar[dict[str, Any]] = TQC.policy_aliases
    _critic_class = Critic

    def _kept(self, outputs: th.Tensor) -> th.Tensor:
        """Pool, sort and truncate quantiles as TQC does: from ``(C, B, M, K)`` to ``(B, M, C (K - dropped))``."""
        pooled, _ = outputs.permute(1, 2, 0, 3).flatten(2).sort(dim=2)
        return pooled[:, :, : pooled.shape[2] - self.top_quantiles_to_drop_per_net * outputs.shape[0]]

    def _q_values(self, outputs: th.Tensor) -> th.Tensor:
        pooled = outputs.permute(1, 2, 0, 3).flatten(2)
        n_dropped = self.top_quantiles_to_drop_per_net * outputs.shape[0]
        # Without sorting all of them for a mean: of all but the largest.
        kept = pooled.sum(dim=2) - pooled.topk(n_dropped, dim=2, sorted=False).values.sum(dim=2)
        return (kept / (pooled.shape[2] - n_dropped)).unsqueeze(0)

    def _bellman_error(self, outputs: th.Tensor, target: th.Tensor) -> th.Tensor:
        # Twice, since the loss of the critics is halved as a whole.
        return 2.0 * quantile_huber_loss(outputs.transpose(0, 1), target.unsqueeze(1), sum_over_quantiles=False)

    def _next_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        kept = self._kept(self._critic_outputs(self.critic_target, observations, actions))
        best = kept.mean(dim=2).argmax(dim=1, keepdim=True)
        return kept.gather(1, best.unsqueeze(2).expand(-1, -1, kept.shape[2])).squeeze(1), best

    def _actor_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> th.Tensor:
        return self.critic(observations, actions).mean(dim=2).mean(dim=1, keepdim=True)  # type: ignore[no-any-return]


class CalQLTQC(CalibratedActorCritic, CQLTQC):
    """Calibrated Q-Learning on truncated quantile critics, see :class:`CQLTQC` and :class:`~cql_plugins.sb3.CalQL`."""
