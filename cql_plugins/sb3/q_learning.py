"""CQL's gradient step for Q-learning with discrete actions: DQN and its kin.

A base class joins by :meth:`ConservativeQLearning._quantiles` and :meth:`~ConservativeQLearning._bellman_loss`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TensorDict, TrainFrequencyUnit
from stable_baselines3.common.utils import polyak_update

from cql_plugins import losses
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.conservative import CalibratedMixin, ConservativeMixin
from cql_plugins.sb3.metrics import DiscreteCQLMetrics


class ConservativeQLearning(ConservativeMixin):
    """Conservative Q-Learning for the Q-learning algorithm with discrete actions that follows it in the bases.

    Offline the target network follows gradient steps. After an offline phase, exploration starts at its final rate.

    Args:
        *args: See the base class, as all keyword arguments but these.
        double_q: Choose the target's action by the network and evaluate it by the target network (double DQN, van Hasselt et
            al. 2016).
        offline_target_update_interval: Gradient steps between two updates of the target network offline; ``None`` for as many
            as lie between two of them online, by ``target_update_interval``, ``train_freq`` and ``gradient_steps``.
        **kwargs: See the base class and :class:`ConservativeMixin`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    _step_options = ("double_q", "max_grad_norm")
    _network_class: ClassVar[Any]
    """The base class's network; only its own forward pass is taken apart."""
    batch_norm_stats: list[th.Tensor]
    batch_norm_stats_target: list[th.Tensor]
    exploration_final_eps: float
    exploration_rate: float
    max_grad_norm: Any
    target_update_interval: int

    def __init__(
        self, *args: Any, double_q: bool = False, offline_target_update_interval: int | None = None, **kwargs: Any
    ) -> None:
        if offline_target_update_interval is not None and not (
            isinstance(offline_target_update_interval, int) and offline_target_update_interval >= 1
        ):
            raise ValueError(
                f"offline_target_update_interval must be None or an integer >= 1; got {offline_target_update_interval!r}."
            )
        self.double_q = double_q
        self.offline_target_update_interval = offline_target_update_interval
        super().__init__(*args, **kwargs)

    # What a base class says of its network ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _networks(self) -> tuple[Any, Any]:
        """The network and the target network."""

    @abstractmethod
    def _quantiles(self, network: Any, observations: th.Tensor | TensorDict) -> th.Tensor:
        """Evaluate all actions, shape ``(B, K, n_actions)``: ``K`` quantiles, or one value."""

    @abstractmethod
    def _bellman_loss(self, current: th.Tensor, target: th.Tensor) -> th.Tensor:
        """Compute the base class's loss of the data's actions: both ``(B, K)``, a scalar."""

    # Setup -----------------------------------------------------------------------------------------------------------

    def _setup_without_env(self) -> None:
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(f"{type(self).__name__} needs a Discrete action space; the dataset has {self.action_space}.")
        super()._setup_without_env()

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer]

    def _named_optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"": self.policy.optimizer}

    def _data_values(self, batch: Batch) -> th.Tensor:
        return _of_actions(self._quantiles(self._networks[0], batch.observations), batch.actions.long()).mean(dim=1)

    def _on_step(self) -> None:
        super()._on_step()
        if self._n_offline_steps:
            # A pre-trained policy does not start from random actions.
            self.exploration_rate = self.exploration_final_eps
            self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # One gradient step -------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> DiscreteCQLMetrics:
        network, target_network = self._networks
        with th.no_grad():
            target = self._compute_target(batch)
        quantiles = self._quantiles(network, batch.observations)
        actions = batch.actions.long()
        current = _of_actions(quantiles, actions)
        bellman_loss = self._bellman_loss(current, target)
        q_values = quantiles.mean(dim=1)

        loss, gap, bound_rate, weight = bellman_loss, None, None, self._cql_weight
        if weight > 0.0:
            gaps, bound_rate = losses.discrete_gap(
                q_values.unsqueeze(0),
                actions,
                returns_to_go=self._bound(batch),
                temperature=self.cql_temperature,
                clip=self.cql_clip_diff,
                normalize=self.normalize_gap,
            )
            gap = gaps.mean()
            loss = bellman_loss + weight * gap

        self._compute_gradients(loss, self.policy.optimizer)
        if self.max_grad_norm is not None:
            th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        if self._target_is_due:
            polyak_update(network.parameters(), target_network.parameters(), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

        q_values = q_values.detach()
        return DiscreteCQLMetrics(
            loss=loss,
            bellman_loss=bellman_loss,
            q_data=current.detach().mean(),
            q_policy=q_values.max(dim=1).values.mean(),
            q_random=q_values.mean(),
            cql_loss=None if gap is None else weight * gap.detach(),
            cql_gap=gap,
            bound_rate=bound_rate,
        )

    @property
    def _target_is_due(self) -> bool:
        """Whether the target network moves with this gradient step; online it follows environment steps."""
        return self._is_offline_phase and (self._n_updates + 1) % self._offline_interval == 0

    def _step_kind(self) -> tuple[Any, ...]:
        return (*super()._step_kind(), self._target_is_due)

    def _evaluate(self, network: Any, head: th.nn.Sequential, observations: th.Tensor | TensorDict) -> th.Tensor:
        """Evaluate a network, its output layer in float32 and all before it in the precision of the model.

        Targets are float32 throughout.
        """
        if self.precision == "f32" or not th.is_grad_enabled():
            return network(observations)  # type: ignore[no-any-return]
        with th.autocast(self.device.type, th.bfloat16):
            if type(network).forward is not self._network_class.forward or type(head) is not th.nn.Sequential:
                return network(observations).float()  # type: ignore[no-any-return]  # The user's: it is for it to say how.
            hidden = head[:-1](network.extract_features(observations, network.features_extractor))
        return head[-1](hidden.float())  # type: ignore[no-any-return]

    def _compute_target(self, batch: Batch) -> th.Tensor:
        """Compute the Bellman target of the greedy action, shape ``(B, K)``."""
        next_values = self._next_quantiles(batch.next_observations)
        discounts = self.gamma if batch.discounts is None else batch.discounts
        return losses.td_target(batch.rewards, batch.dones, discounts, next_values)

    def _next_quantiles(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        network, target_network = self._networks
        quantiles = self._quantiles(target_network, observations)
        chooser = self._quantiles(network, observations) if self.double_q else quantiles
        return _of_actions(quantiles, chooser.mean(dim=1).argmax(dim=1, keepdim=True))

    def _values_of(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        return self._next_quantiles(observations).mean(dim=1)

    def _bound(self, batch: Batch) -> th.Tensor | None:
        """What bounds the values from below, shape ``(B, 1)``: nothing here, the returns-to-go in Cal-QL."""
        return None

    @property
    def _offline_interval(self) -> int:
        """Gradient steps between two updates of the target network offline."""
        if self.offline_target_update_interval is not None:
            return self.offline_target_update_interval
        calls: int = max(self.target_update_interval // self.n_envs, 1)
        frequency: Any = self.train_freq
        if frequency.unit is TrainFrequencyUnit.EPISODE:
            return calls  # How many steps an episode has is not known; one gradient step a step is what is left.
        steps: int = self.gradient_steps if self.gradient_steps >= 0 else frequency.frequency * self.n_envs
        return max(round(calls * steps / int(frequency.frequency)), 1)


class CalibratedQLearning(CalibratedMixin):
    """Calibrated Q-Learning for the conservative Q-learning algorithm that follows it in the bases.

    Inside the soft maximum every action's value is bounded from below by the data's return-to-go [Cal-QL, Eq. 5.1]; the
    value of the data's action is not. No published code has it.
    """

    def _bound(self, batch: Batch) -> th.Tensor | None:
        return batch.returns_to_go


def _of_actions(quantiles: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Pick one action's quantiles: from ``(B, K, n_actions)`` and ``(B, 1)`` to ``(B, K)``."""
    return quantiles.gather(2, actions.unsqueeze(1).expand(-1, quantiles.shape[1], 1)).squeeze(2)
