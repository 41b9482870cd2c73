"""The updates: d3rlpy's implementations with the shared penalty in place of its own."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch as th
import torch.distributed as dist
from d3rlpy.algos.qlearning.torch.cql_impl import CQLCriticLoss as HostCriticLoss
from d3rlpy.algos.qlearning.torch.cql_impl import CQLImpl as HostCQLImpl
from d3rlpy.algos.qlearning.torch.cql_impl import DiscreteCQLImpl as HostDiscreteCQLImpl
from d3rlpy.algos.qlearning.torch.cql_impl import DiscreteCQLLoss as HostDiscreteCQLLoss
from d3rlpy.algos.qlearning.torch.ddpg_impl import DDPGBaseImpl
from d3rlpy.algos.qlearning.torch.dqn_impl import DQNImpl
from d3rlpy.dataset import TransitionMiniBatch
from d3rlpy.models.torch import (
    ContinuousEnsembleQFunctionForwarder,
    ContinuousMeanQFunction,
    PixelEncoderWithAction,
    VectorEncoderWithAction,
    get_parameter,
)
from d3rlpy.torch_utility import TorchMiniBatch, expand_and_repeat_recursively, flatten_left_recursively
from d3rlpy.types import Float32NDArray, TorchObservation
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cql_plugins import losses
from cql_plugins.d3rlpy.watch import Watch
from cql_plugins.ensembles import Precision, Workspace, evaluate_actions, linear_layers
from cql_plugins.losses import Calibration, Gaussian, Penalty

if TYPE_CHECKING:
    from cql_plugins.d3rlpy.cal_ql import CalQLConfig
    from cql_plugins.d3rlpy.cql import CQLConfig, DiscreteCQLConfig

    _ImplBase: Any
else:
    _ImplBase = object

_PER_IMAGE = (nn.Conv2d, nn.ReLU)
"""Modules that do the same to an image whatever else is in the batch, and how often it is."""

_PER_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules in training whose answer depends on what else is in the batch, or on the pass."""
_PASSES_OF_D3RLPY = ("current", "next", "random", "data")
"""The order in which d3rlpy evaluates its groups of actions."""

ReturnsOf = Callable[[TransitionMiniBatch], Float32NDArray]
"""From a batch to its returns-to-go, shape ``(B, 1)``."""


def _with_returns(batch: TorchMiniBatch, returns_of: ReturnsOf) -> TorchMiniBatch:
    """Fill in the returns-to-go, which d3rlpy would sum in Python for each transition."""
    if batch.numpy_batch is None:
        return batch
    returns = th.as_tensor(returns_of(batch.numpy_batch), dtype=th.float32, device=batch.device)
    return dataclasses.replace(batch, returns_to_go=returns)


class _Critic(NamedTuple):
    """A critic taken apart.

    Attributes:
        extract: From observations to their features, shape ``(B, ...)``; ``None`` where they are the features.
        layers: The perceptron over features and action.
    """

    extract: nn.Module | None
    layers: list[nn.Linear]


def _critics(forwarder: ContinuousEnsembleQFunctionForwarder) -> list[_Critic] | None:
    """The critics where they are plain perceptrons, over images after plain convolutions; ``None`` for all others.

    Those inside ``DistributedDataParallel`` are others: it watches its modules.
    """
    found = []
    for own in forwarder._forwarders:
        q_func = getattr(own, "_q_func", None)
        if type(q_func) is not ContinuousMeanQFunction:
            return None
        encoder: Any = q_func.encoder
        extract: Any
        if type(encoder) is VectorEncoderWithAction:
            extract, perceptron = None, encoder._layers
        elif type(encoder) is PixelEncoderWithAction and all(type(m) in _PER_IMAGE for m in encoder._cnn_layers.children()):
            extract, perceptron = encoder._cnn_layers, encoder._last_layers
        else:
            return None
        layers = linear_layers(perceptron, q_func._fc)
        if layers is None or encoder._discrete_action:
            return None
        found.append(_Critic(extract, layers))
    return found


# Continuous actions --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CQLCriticLoss(HostCriticLoss):
    """What the critic's update reports, each a scalar; d3rlpy's are ``critic_loss``, ``conservative_loss`` and ``alpha``.

    Attributes:
        td_loss: Bellman error, summed over critics, scaled as the loss is.
        conservative_gap: Mean gap before weight and threshold.
        q_data: Mean Q of the data's actions.
        q_policy: Mean unbounded Q of the policy's actions.
        q_random: Mean unbounded Q of uniform actions, where the variant has them.
        bound_rate: Share of values that Cal-QL bounded.
    """

    td_loss: th.Tensor
    conservative_gap: th.Tensor
    q_data: th.Tensor
    q_policy: th.Tensor
    q_random: th.Tensor | None
    bound_rate: th.Tensor | None


class CQLImpl(HostCQLImpl):
    """CQL's update.

    Args:
        built: What d3rlpy's builder made: its networks, optimisers and forwarders are taken over.
        config: The algorithm's config.
        compiled: Whether steps are captured as CUDA graphs.
    """

    def __init__(self, built: HostCQLImpl, config: CQLConfig, compiled: bool) -> None:
        super().__init__(
            observation_shape=built.observation_shape,
            action_size=built.action_size,
            modules=built._modules,
            q_func_forwarder=built._q_func_forwarder,
            targ_q_func_forwarder=built._targ_q_func_forwarder,
            gamma=config.gamma,
            tau=config.tau,
            alpha_threshold=config.alpha_threshold,
            conservative_weight=config.conservative_weight,
            n_action_samples=config.n_action_samples,
            soft_q_backup=config.soft_q_backup,
            max_q_backup=config.max_q_backup,
            compiled=compiled,
            device=built.device,
        )
        self._options = config
        self._warned_of_clamp = False
        self._looks_at_the_batch = any(isinstance(module, _PER_BATCH) for module in self._modules.q_funcs.modules())
        self._workspace = Workspace()
        # What d3rlpy compiles around it leaves it as it is.
        self._evaluate_actions = th.compiler.disable(evaluate_actions) if compiled else evaluate_actions
        self.watch = Watch(
            self._modules,
            self._device,
            self._data_values,
            self._policy_outputs,
            config.gamma,
            "conservative_weight",
            # log pi of a squashed policy has no lower bound but -A log 2, and is near the target, A, on average.
            entropy=float(self._action_size) if config.soft_q_backup else 0.0,
            reward_scaler=config.reward_scaler,
        )
        optimizers = self._modules.critic_optim, self._modules.actor_optim
        self._compute_critic_grad = self.watch.over("critic", self._compute_critic_grad, optimizers[0])
        self._compute_actor_grad = self.watch.over("actor", self._compute_actor_grad, optimizers[1])

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        """Do one gradient step.

        Args:
            batch: The batch.
            grad_step: Gradient steps so far.

        Raises:
            NonFiniteError: If a number of the step is not finite; the model is then as it was before.
        """
        return self.watch.step(super().inner_update, batch, grad_step)

    def _data_values(self, batch: TorchMiniBatch) -> th.Tensor:
        q_values = self._q_values(self._q_func_forwarder, batch.observations, batch.actions.unsqueeze(1))[:, :, 0]
        return q_values.gather(0, q_values.abs().argmax(dim=0, keepdim=True)).squeeze(0)

    def _policy_outputs(self, batch: TorchMiniBatch) -> dict[str, th.Tensor]:
        outputs: dict[str, th.Tensor] = {}
        for place, observations in (("observations", batch.observations), ("next_observations", batch.next_observations)):
            policy = self._modules.policy(observations)
            assert policy.logstd is not None
            outputs |= {f"policy.mean({place})": policy.mu, f"policy.logstd({place})": policy.logstd}
        return outputs

    # The target ------------------------------------------------------------------------------------------------------

    @th.no_grad()
    def compute_target(self, batch: TorchMiniBatch) -> th.Tensor:
        """``V(s')``: of a sampled action, of the best of several or of the policy's mode, as in d3rlpy's convention.

        Args:
            batch: The batch.

        Returns:
            Shape ``(B, 1)``, or ``(B, n_quantiles)``.
        """
        if self._options.conventions == "d3rlpy":
            return super().compute_target(batch)
        policy = self._gaussian(batch.next_observations)
        if self._options.mode_q_backup:
            mode = th.tanh(policy.mean)
            return self._targ_q_func_forwarder.compute_target(batch.next_observations, mode, reduction="min")
        n_actions = self._n_action_samples if self._max_q_backup else 1
        proposed = losses.propose_from_policy(policy.mean, policy.std, n_actions)
        actions, log_density = proposed.actions[:, 0], proposed.log_density[:, :1]
        if self._max_q_backup:
            q_values = self._q_values(self._targ_q_func_forwarder, batch.next_observations, proposed.actions)
            _, best = losses.max_backup(q_values)
            actions = proposed.actions.gather(1, best.unsqueeze(2).expand(-1, -1, actions.shape[1])).squeeze(1)
            log_density = proposed.log_density.gather(1, best)
        values = self._targ_q_func_forwarder.compute_target(batch.next_observations, actions, reduction="min")
        if self._soft_q_backup:
            values = values - get_parameter(self._modules.log_temp).exp() * log_density
        return values

    @th.no_grad()
    def _gaussian(self, observations: TorchObservation) -> Gaussian:
        """The policy before the squash."""
        output = self._modules.policy(observations)
        assert output.logstd is not None
        return Gaussian(output.mu, output.logstd.exp())

    @th.no_grad()
    def value_of(self, observations: TorchObservation) -> th.Tensor:
        """The target critics' value ``min_j Q_j(s, a)``, ``a ~ pi(.|s)``, shape ``(n,)``.

        Args:
            observations: Scaled, ``n`` rows.
        """
        policy = self._gaussian(observations)
        actions = losses.propose_from_policy(policy.mean, policy.std, 1).actions
        return self._q_values(self._targ_q_func_forwarder, observations, actions).min(dim=0).values.squeeze(1)

    def _q_values(
        self,
        forwarder: ContinuousEnsembleQFunctionForwarder,
        observations: TorchObservation,
        actions: th.Tensor,
        precision: Precision = "f32",
    ) -> th.Tensor:
        """Evaluate ``M`` actions at each state in one pass: actions ``(B, M, A)``, values ``(C, B, M)``."""
        batch_size, n_actions, action_size = actions.shape
        critics = _critics(forwarder)
        if critics is not None and isinstance(observations, th.Tensor):
            if all(critic.extract is None for critic in critics):
                layers = [critic.layers for critic in critics]
                return self._evaluate_actions(layers, observations, actions, precision, workspace=self._workspace)[..., 0]
            # Each critic has convolutions of its own, which see an image once and not once for each action.
            values = []
            for critic in critics:
                assert critic.extract is not None
                with th.autocast(actions.device.type, th.bfloat16, enabled=precision == "bf16"):
                    features = critic.extract(observations)
                values.append(self._evaluate_actions([critic.layers], features.flatten(1), actions, precision)[..., 0])
            return th.cat(values)
        repeated = flatten_left_recursively(expand_and_repeat_recursively(observations, n_actions), dim=1)
        expected = forwarder.compute_expected_q(repeated, actions.reshape(-1, action_size), "none")
        return expected.view(-1, batch_size, n_actions)

    # The critic ------------------------------------------------------------------------------------------------------

    def compute_critic_loss(self, batch: TorchMiniBatch, q_tpn: th.Tensor) -> CQLCriticLoss:
        """The Bellman error of d3rlpy's Q-functions and the conservative gap [CQL, Eq. 4].

        Args:
            batch: The batch.
            q_tpn: Target values of the next states.
        """
        td_error = DDPGBaseImpl.compute_critic_loss(self, batch, q_tpn).critic_loss
        penalty = self._compute_penalty(batch)
        threshold = self._threshold
        if self._steps_alpha_first:
            self._update_multiplier(penalty.gap.detach())
        alpha = losses.lagrange_multiplier(get_parameter(self._modules.log_alpha).detach()).squeeze()
        weight = alpha * self._conservative_weight
        scale = 1.0 if self._options.conventions == "d3rlpy" else 0.5
        loss = losses.critic_loss(td_error, penalty.gap, weight, threshold, scale)
        td_loss = scale * td_error.detach()
        return CQLCriticLoss(
            critic_loss=loss,
            conservative_loss=loss.detach() - td_loss,
            alpha=alpha,
            td_loss=td_loss,
            conservative_gap=penalty.gap.detach().mean(),
            q_data=penalty.q_data.detach().mean(),
            q_policy=penalty.q_policy,
            q_random=penalty.q_random,
            bound_rate=penalty.bound_rate,
        )

    def _compute_penalty(self, batch: TorchMiniBatch) -> Penalty:
        """Evaluate the data's and all proposed actions; return the gap."""
        options = self._options
        groups = losses.propose_actions(
            options.cql_variant,
            batch.actions,
            self._gaussian(batch.observations),
            self._gaussian(batch.next_observations),
            self._n_action_samples,
        )
        actions = {"data": batch.actions.unsqueeze(1)} | {name: group.actions for name, group in groups.items()}
        return losses.conservative_penalty(
            self._values_of_groups(batch.observations, actions),
            groups,
            calibration=self._calibration(batch),
            variant=options.cql_variant,
            temperature=options.cql_temperature,
            clip=options.cql_clip_diff,
            normalize=options.normalize_gap,
        )

    def _values_of_groups(self, observations: TorchObservation, groups: dict[str, th.Tensor]) -> th.Tensor:
        """Evaluate groups of actions ``(B, M, A)`` at each state, in one pass; values of all in their order, ``(C, B, ...)``.

        With d3rlpy's convention each group has a pass of its own where it matters in what company an action is evaluated.
        """
        evaluate = partial(self._q_values, self._q_func_forwarder, observations, precision=self._options.precision)
        if self._options.conventions == "d3rlpy" and self._looks_at_the_batch:
            values = {name: evaluate(groups[name]) for name in _PASSES_OF_D3RLPY if name in groups}
            return th.cat([values[name] for name in groups], dim=2)
        return evaluate(th.cat(list(groups.values()), dim=1))

    def _calibration(self, batch: TorchMiniBatch) -> Calibration | None:
        """What bounds the policy's values from below: nothing here, the returns-to-go in Cal-QL."""
        return None

    def update_critic(self, batch: TorchMiniBatch) -> dict[str, float]:
        """Step the critic, then the Lagrange multiplier.

        Args:
            batch: The batch.

        Returns:
            The metrics, see :class:`CQLCriticLoss`.
        """
        loss = self._compute_critic_grad(batch)
        self._modules.critic_optim.step()
        assert isinstance(loss, CQLCriticLoss)
        if not self._steps_alpha_first:
            self._update_multiplier(loss.conservative_gap.reshape(1, 1))
        values = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
        values = {name: value.detach().reshape(()) for name, value in values.items() if value is not None}
        # In one transfer: on a GPU each is a wait.
        metrics: dict[str, float] = dict(zip(values, th.stack(list(values.values())).tolist(), strict=True))
        if metrics["alpha"] >= losses.LAGRANGE_MAX and not self._warned_of_clamp:
            self._warned_of_clamp = True
            warnings.warn(
                f"The Lagrange multiplier reached its clamp of {losses.LAGRANGE_MAX:g}: the gap cannot come down to "
                f"alpha_threshold={self._alpha_threshold}. Raise the threshold, or set normalize_gap=True so that a flat Q has "
                "gap 0.",
                UserWarning,
                stacklevel=2,
            )
        return metrics

    # The parameters that are not networks ----------------------------------------------------------------------------

    @property
    def _steps_alpha_first(self) -> bool:
        """d3rlpy steps the multiplier before it uses it; the authors' code uses it first."""
        return self._options.conventions == "d3rlpy"

    @property
    def _threshold(self) -> float:
        """``tau``; without the Lagrange form a constant that d3rlpy subtracts and the paper does not have."""
        has_threshold = self._modules.alpha_optim is not None or self._options.conventions == "d3rlpy"
        return self._alpha_threshold if has_threshold else 0.0

    def _update_multiplier(self, gap: th.Tensor) -> None:
        """Step the Lagrange multiplier towards a gap of ``alpha_threshold``."""
        optimizer = self._modules.alpha_optim
        if optimizer is None:
            return
        log_alpha = get_parameter(self._modules.log_alpha)
        optimizer.zero_grad()
        mean_gap = self._mean_over_processes(gap.mean()) if self._is_distributed else gap.mean()
        losses.lagrange_loss(log_alpha, mean_gap.reshape(1, 1), self._conservative_weight, self._alpha_threshold).backward()
        optimizer.step()

    def update_temp(self, log_prob: th.Tensor) -> th.Tensor:
        """Step the temperature; d3rlpy's own step does not average over processes, so that they would drift apart.

        Args:
            log_prob: Log-density of the policy's actions, shape ``(B, 1)``.
        """
        if self._is_distributed:
            log_prob = self._mean_over_processes(log_prob.detach().mean()).reshape(1, 1)
        return super().update_temp(log_prob)

    @property
    def _is_distributed(self) -> bool:
        """Whether several processes train this model together."""
        return isinstance(self._modules.policy, DistributedDataParallel)

    @staticmethod
    def _mean_over_processes(value: th.Tensor) -> th.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()


class CalibratedImpl(_ImplBase):  # type: ignore[misc]
    """Brings the returns-to-go to the update that follows it in the bases.

    Args:
        built: What d3rlpy's builder made.
        config: The algorithm's config.
        compiled: Whether steps are captured as CUDA graphs.
        returns_of: Looks up the returns-to-go of a batch.
    """

    def __init__(self, built: Any, config: Any, compiled: bool, returns_of: ReturnsOf) -> None:
        super().__init__(built, config, compiled)
        self._returns_of = returns_of

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        """Do one gradient step.

        Args:
            batch: The batch.
            grad_step: Gradient steps so far.
        """
        return super().inner_update(_with_returns(batch, self._returns_of), grad_step)  # type: ignore[no-any-return]


class CalQLImpl(CalibratedImpl, CQLImpl):
    """Cal-QL's update: the policy's values are bounded by the returns-to-go [Cal-QL, Eq. 5.1]."""

    _options: CalQLConfig

    def _calibration(self, batch: TorchMiniBatch) -> Calibration:
        return Calibration(batch.returns_to_go, self._options.calibrate_random)


# Discrete actions ----------------------------------------------------------------------------------------------------


def _no_outputs(_batch: TorchMiniBatch) -> dict[str, th.Tensor]:
    """There is no policy beside the critics. Not a lambda: an algorithm can be pickled."""
    return {}


@dataclasses.dataclass(frozen=True)
class DiscreteCQLLoss(HostDiscreteCQLLoss):
    """What an update reports, each a scalar; d3rlpy's are ``loss``, ``td_loss`` and ``conservative_loss``.

    Attributes:
        q_data: Mean Q of the data's actions.
    """

    q_data: th.Tensor


@dataclasses.dataclass(frozen=True)
class DiscreteCalQLLoss(DiscreteCQLLoss):
    """As :class:`DiscreteCQLLoss`.

    Attributes:
        bound_rate: Share of values that were bounded.
    """

    bound_rate: th.Tensor


class DiscreteCQLImpl(HostDiscreteCQLImpl):
    """Discrete CQL's update: double DQN (or QR-DQN, by the Q-function) with the conservative gap.

    Args:
        built: What d3rlpy's builder made.
        config: The algorithm's config.
        compiled: Whether steps are captured as CUDA graphs.
    """

    def __init__(self, built: HostDiscreteCQLImpl, config: DiscreteCQLConfig, compiled: bool) -> None:
        super().__init__(
            observation_shape=built.observation_shape,
            action_size=built.action_size,
            modules=built._modules,
            q_func_forwarder=built._q_func_forwarder,
            targ_q_func_forwarder=built._targ_q_func_forwarder,
            target_update_interval=config.target_update_interval,
            gamma=config.gamma,
            alpha=config.alpha,
            compiled=compiled,
            device=built.device,
        )
        self._options = config
        self.watch = Watch(
            self._modules,
            self._device,
            self._data_values,
            _no_outputs,
            config.gamma,
            "alpha",
            reward_scaler=config.reward_scaler,
        )
        self._compute_grad = self.watch.over("", self._compute_grad, self._modules.optim)

    def inner_update(self, batch: TorchMiniBatch, grad_step: int) -> dict[str, float]:
        """Do one gradient step.

        Args:
            batch: The batch.
            grad_step: Gradient steps so far.

        Raises:
            NonFiniteError: If a number of the step is not finite; the model is then as it was before.
        """
        return self.watch.step(super().inner_update, batch, grad_step)

    def _data_values(self, batch: TorchMiniBatch) -> th.Tensor:
        q_values = self._q_func_forwarder.compute_expected_q(batch.observations, "none")
        index = batch.actions.long().reshape(1, -1, 1).expand(q_values.shape[0], -1, 1)
        return q_values.gather(2, index).mean(dim=0).squeeze(1)

    @th.no_grad()
    def value_of(self, observations: TorchObservation) -> th.Tensor:
        """The target critics' value of the greedy action, the smallest over critics, shape ``(n,)``.

        Args:
            observations: Scaled, ``n`` rows.
        """
        actions = self._q_func_forwarder.compute_expected_q(observations, "mean").argmax(dim=1, keepdim=True)
        return self._targ_q_func_forwarder.compute_expected_q(observations, "min").gather(1, actions).squeeze(1)

    def compute_loss(self, batch: TorchMiniBatch, q_tpn: th.Tensor) -> DiscreteCQLLoss:
        """The Bellman error of d3rlpy's Q-functions and the gap, summed over critics [CQL, section 3.2].

        Args:
            batch: The batch.
            q_tpn: Target values of the next states.
        """
        return DiscreteCQLLoss(*self._compute_parts(batch, q_tpn, None)[:4])

    def _compute_parts(
        self, batch: TorchMiniBatch, q_tpn: th.Tensor, returns_to_go: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor | None]:
        """Loss, Bellman error, mean gap summed over critics, mean Q of the data, bound rate."""
        td_loss = DQNImpl.compute_loss(self, batch, q_tpn).loss
        q_values = self._q_func_forwarder.compute_expected_q(batch.observations, "none")
        actions = batch.actions.long()
        gap, bound_rate = losses.discrete_gap(
            q_values,
            actions,
            returns_to_go=returns_to_go,
            temperature=self._options.cql_temperature,
            clip=self._options.cql_clip_diff,
            normalize=self._options.normalize_gap,
        )
        conservative_loss = gap.mean(dim=1).sum()
        q_data = q_values.detach().gather(2, actions.reshape(1, -1, 1).expand(q_values.shape[0], -1, 1)).mean()
        return td_loss + self._alpha * conservative_loss, td_loss, conservative_loss, q_data, bound_rate


class DiscreteCalQLImpl(CalibratedImpl, DiscreteCQLImpl):
    """Discrete Cal-QL's update: inside the soft maximum every action's value is bounded by the returns-to-go."""

    def compute_loss(self, batch: TorchMiniBatch, q_tpn: th.Tensor) -> DiscreteCalQLLoss:
        """As :meth:`DiscreteCQLImpl.compute_loss`, calibrated.

        Args:
            batch: The batch.
            q_tpn: Target values of the next states.
        """
        loss, td_loss, conservative_loss, q_data, bound_rate = self._compute_parts(batch, q_tpn, batch.returns_to_go)
        assert bound_rate is not None
        return DiscreteCalQLLoss(loss, td_loss, conservative_loss, q_data, bound_rate)
