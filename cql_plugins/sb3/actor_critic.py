"""CQL's gradient step for actor-critic algorithms with a squashed Gaussian policy: SAC and its kin.

A base class joins by four methods that say what its critics are: :meth:`ConservativeActorCritic._q_values`,
:meth:`~ConservativeActorCritic._bellman_error`, :meth:`~ConservativeActorCritic._next_values` and
:meth:`~ConservativeActorCritic._actor_values`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from torch.distributions import Normal

from cql_plugins import losses
from cql_plugins.ensembles import Precision, Workspace, evaluate_actions, perceptrons
from cql_plugins.losses import Calibration, CQLVariant, Gaussian, Penalty, ProposedActions
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.conservative import CalibratedMixin, ConservativeMixin
from cql_plugins.sb3.metrics import CQLMetrics

SelfActorCritic = TypeVar("SelfActorCritic", bound="ConservativeActorCritic")


class PolicyStep(NamedTuple):
    """The current policy at the batch's states.

    Attributes:
        actions: One sampled action for each state, with gradient, shape ``(B, A)``.
        log_prob: Its log-density, with gradient, shape ``(B, 1)``.
        mean: Mean before the squash, with gradient, shape ``(B, A)``.
        std: Standard deviation before the squash, with gradient, shape ``(B, A)``.
    """

    actions: th.Tensor
    log_prob: th.Tensor
    mean: th.Tensor
    std: th.Tensor


class CriticStep(NamedTuple):
    """What the critic's update reports."""

    critic_loss: th.Tensor
    bellman_loss: th.Tensor
    q_data: th.Tensor
    penalty: Penalty | None
    cql_loss: th.Tensor | None
    multiplier: th.Tensor | None


def critic_outputs(
    critic: Any,
    observations: th.Tensor | TensorDict,
    actions: th.Tensor,
    precision: Precision = "f32",
    n_backward: int | None = None,
    workspace: Workspace | None = None,
) -> th.Tensor:
    """Evaluate several actions at each state in one forward pass, with the features extracted once per state.

    Args:
        critic: SB3 critic with ``C`` networks of ``K`` outputs each.
        observations: Batch of ``B`` observations.
        actions: Shape ``(B, M, A)``, without gradient.
        precision: Of all but the output layer.
        n_backward: See :func:`~cql_plugins.ensembles.evaluate_actions`.
        workspace: See there.

    Returns:
        Shape ``(C, B, M, K)``.
    """
    batch_size, n_actions, _ = actions.shape
    # SB3's critic trains its features extractor unless the actor owns it.
    with (
        th.set_grad_enabled(th.is_grad_enabled() and not critic.share_features_extractor),
        th.autocast(actions.device.type, th.bfloat16, enabled=precision == "bf16"),
    ):
        features = critic.extract_features(observations, critic.features_extractor)
    layers = perceptrons((q_network,) for q_network in critic.q_networks)
    # A single action on the CPU gains nothing, and stays SB3's own product to the last bit.
    if layers is not None and (n_actions > 1 or actions.is_cuda):
        return evaluate_actions(layers, features, actions, precision, n_backward, workspace)
    features = features.to(actions.dtype).unsqueeze(1).expand(batch_size, n_actions, features.shape[1])
    inputs = th.cat((features, actions), dim=2).reshape(batch_size * n_actions, -1)
    if precision == "f32":
        outputs = [q_network(inputs) for q_network in critic.q_networks]
    else:
        outputs = [_in_bf16(q_network, inputs) for q_network in critic.q_networks]
    return th.stack([own.view(batch_size, n_actions, -1) for own in outputs])


def own_critic_outputs(
    critic: Any, observations: th.Tensor | TensorDict, actions: th.Tensor, precision: Precision = "f32"
) -> th.Tensor:
    """Evaluate several actions at each state by the critic's own ``forward``, whatever it does, as SB3 calls it.

    Args:
        critic: Gives a tuple of ``C`` values ``(n, K)``, or a tensor ``(n, C, K)``.
        observations: Batch of ``B`` observations.
        actions: Shape ``(B, M, A)``, without gradient.
        precision: Of all that autocasting covers.

    Returns:
        Shape ``(C, B, M, K)``.
    """
    batch_size, n_actions, _ = actions.shape
    if n_actions > 1 and isinstance(observations, dict):
        observations = {key: value.repeat_interleave(n_actions, 0) for key, value in observations.items()}
    elif n_actions > 1:
        assert isinstance(observations, th.Tensor)
        observations = observations.repeat_interleave(n_actions, 0)
    with th.autocast(actions.device.type, th.bfloat16, enabled=precision == "bf16"):
        outputs = critic(observations, actions.flatten(0, 1))
    values = outputs.unbind(1) if isinstance(outputs, th.Tensor) else outputs
    stacked = th.stack([own.reshape(batch_size, n_actions, -1) for own in values])
    return stacked.float() if precision == "bf16" else stacked


def _in_bf16(network: th.nn.Module, inputs: th.Tensor) -> th.Tensor:
    """Run a network in bfloat16, but for its output layer where it is a plain sequence."""
    with th.autocast(inputs.device.type, th.bfloat16):
        if type(network) is not th.nn.Sequential:
            return network(inputs).float()  # type: ignore[no-any-return]
        hidden = network[:-1](inputs)
    return network[-1](hidden.float())  # type: ignore[no-any-return]


class UncheckedSquashedGaussian(SquashedDiagGaussianDistribution):
    """SB3's policy distribution without torch's check of its arguments, for which the host would wait for the device."""

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> UncheckedSquashedGaussian:
        """Set mean and standard deviation.

        Args:
            mean_actions: Before the squash, shape ``(B, A)``.
            log_std: Shape ``(B, A)``.
        """
        self.distribution = Normal(mean_actions, log_std.exp(), validate_args=False)
        return self


@contextmanager
def _frozen(network: th.nn.Module) -> Iterator[None]:
    """Let gradients pass through a network to its inputs without computing those of its parameters."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ConservativeActorCritic(ConservativeMixin):
    """Conservative Q-Learning for the actor-critic algorithm that follows it in the bases.

    Args:
        *args: See the base class, as all keyword arguments but these.
        actor_learning_rate: Learning rate of the actor and of the entropy coefficient, a number or a schedule;
            ``None`` for ``learning_rate``, which the critic uses.
        cql_alpha: Weight ``w`` of the conservative gap, not negative.
        cql_n_actions: Actions sampled in each of the three groups (uniform, current policy, policy at the next state).
        cql_variant: ``"H"`` (maximum entropy, Eq. 4), ``"rho"`` (proposal is the frozen policy, Eq. 3), ``"mu"`` (Eq. 2) or
            ``"pointwise"`` (Eq. 1, only to reproduce Table 4).
        cql_lagrange_threshold: ``tau``: learn the weight's multiplier so that the gap is near ``tau``; ``None`` for off. A flat
            Q already has a gap of about ``A log 2 + log 3N`` (hopper 5.5, walker 7.6, AntMaze 8.9, pen 20.0, door 22.8), so
            ``tau`` means nothing across tasks unless ``normalize_gap`` is on. May be set on a model later.
        max_q_backup: Target is the best of ``cql_n_actions`` sampled actions, the minimum over critics first.
        mode_q_backup: Target takes the policy's mode instead of a sample, as d3rlpy's does: critics of the policy that
            ``predict(deterministic=True)`` plays. With neither of the two others.
        backup_entropy: Whether the target has the entropy term of maximum-entropy learning.
        bc_steps: Gradient steps during which the actor clones the data's actions first.
        cql_n_backward: On the CPU, send the critics' gradient back through so many actions of a state on average, drawn in
            proportion to their weight; right in the mean, noisier, and cheaper. ``None`` for all. No effect on a GPU, nor for
            critics that are not perceptrons with rectified linear units.
        **kwargs: See the base class and :class:`ConservativeMixin`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    _step_options = (
        "cql_lagrange_threshold",
        "cql_n_actions",
        "cql_variant",
        "max_q_backup",
        "mode_q_backup",
        "backup_entropy",
        "target_entropy",
        "calibrate_random",
        "top_quantiles_to_drop_per_net",
    )
    _critic_class: ClassVar[Any] = ContinuousCritic
    actor: Any
    batch_norm_stats: list[th.Tensor]
    batch_norm_stats_target: list[th.Tensor]
    critic: Any
    critic_target: Any
    log_ent_coef: th.Tensor | None
    ent_coef_optimizer: th.optim.Adam | None
    ent_coef_tensor: th.Tensor
    target_entropy: Any
    target_update_interval: int

    def __init__(
        self,
        *args: Any,
        actor_learning_rate: float | Schedule | None = 1e-4,
        cql_alpha: float = 5.0,
        cql_n_actions: int = 10,
        cql_variant: CQLVariant = "H",
        cql_lagrange_threshold: float | None = None,
        max_q_backup: bool = False,
        mode_q_backup: bool = False,
        backup_entropy: bool = False,
        bc_steps: int = 0,
        cql_n_backward: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(cql_n_actions, (int, np.integer)) and cql_n_actions >= 1):
            raise ValueError(f"cql_n_actions must be an integer >= 1; got {cql_n_actions!r}.")
        if cql_variant not in losses.CQL_VARIANTS:
            raise ValueError(f"cql_variant must be one of {losses.CQL_VARIANTS}; got {cql_variant!r}.")
        if not (isinstance(bc_steps, (int, np.integer)) and bc_steps >= 0):
            raise ValueError(f"bc_steps must be an integer >= 0; got {bc_steps!r}.")
        if cql_n_backward is not None and not (isinstance(cql_n_backward, (int, np.integer)) and cql_n_backward >= 1):
            raise ValueError(f"cql_n_backward must be None or an integer >= 1; got {cql_n_backward!r}.")
        others = [name for name, on in (("max_q_backup", max_q_backup), ("backup_entropy", backup_entropy)) if on]
        if mode_q_backup and others:
            raise ValueError(
                f"mode_q_backup takes one action, the policy's mode, without entropy; {' and '.join(others)} cannot be on "
                f"as well. Set {', '.join(f'{name}=False' for name in others)}."
            )
        self.cql_n_backward = None if cql_n_backward is None else int(cql_n_backward)
        self.actor_learning_rate = actor_learning_rate
        self.cql_n_actions = int(cql_n_actions)
        self.cql_variant: CQLVariant = cql_variant
        self.cql_lagrange_threshold = cql_lagrange_threshold
        self.max_q_backup = max_q_backup
        self.mode_q_backup = mode_q_backup
        self.backup_entropy = backup_entropy
        self.bc_steps = int(bc_steps)
        self.log_cql_lagrange: th.Tensor | None = None
        self.cql_lagrange_optimizer: th.optim.Adam | None = None
        self._warned_of_clamp = False
        self._workspace = Workspace()
        super().__init__(*args, cql_alpha=cql_alpha, **kwargs)

    # What a base class says of its critics ------------------------------------------------------------------------------

    def _critic_outputs(
        self,
        critic: Any,
        observations: th.Tensor | TensorDict,
        actions: th.Tensor,
        precision: Precision = "f32",
        n_backward: int | None = None,
    ) -> th.Tensor:
        """See :func:`critic_outputs`; what comes out can be differentiated until the next call."""
        if type(critic).forward is not self._critic_class.forward:
            return own_critic_outputs(critic, observations, actions, precision)  # The user's: it is for it to say how.
        return critic_outputs(critic, observations, actions, precision, n_backward, self._workspace)

    @abstractmethod
    def _q_values(self, outputs: th.Tensor) -> th.Tensor:
        """Read the values that the gap is made of.

        Args:
            outputs: From :func:`critic_outputs`, shape ``(C, B, M, K)``.

        Returns:
            Shape ``(C', B, M)``.
        """

    @abstractmethod
    def _bellman_error(self, outputs: th.Tensor, target: th.Tensor) -> th.Tensor:
        """Compute the Bellman error of the data's actions, twice what the base class minimises.

        Args:
            outputs: Of the data's actions, shape ``(C, B, K)``.
            target: Shape ``(B, K')``.

        Returns:
            Shape ``(C,)``, or a scalar for all critics.
        """

    @abstractmethod
    def _next_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Evaluate the best of several actions with the target critics.

        Args:
            observations: ``B`` observations.
            actions: Shape ``(B, N, A)``.

        Returns:
            Values ``(B, K')`` and the index of the action ``(B, 1)``.
        """

    @abstractmethod
    def _actor_values(self, observations: th.Tensor | TensorDict, actions: th.Tensor) -> th.Tensor:
        """Evaluate what the actor climbs: actions ``(B, A)``, values ``(B, 1)``."""

    # Setup -----------------------------------------------------------------------------------------------------------

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.learning_rate if self.actor_learning_rate is None else self.actor_learning_rate
        self.actor_lr_schedule: Schedule = FloatSchedule(rate)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.device.type == "cuda":
            self._do_not_check_the_policy()
        # The base class made these with the critic's learning rate.
        update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(1))
        if self.ent_coef_optimizer is not None:
            update_learning_rate(self.ent_coef_optimizer, self.actor_lr_schedule(1))
        self._setup_lagrange()

    def _setup_lagrange(self) -> None:
        """Make the Lagrange multiplier and its optimiser where there is a threshold; where there is none, remove them."""
        self.log_cql_lagrange = self.cql_lagrange_optimizer = None
        if self.cql_lagrange_threshold is not None:
            # The authors' code starts at log alpha' = 1 and steps at the critic's rate.
            self.log_cql_lagrange = th.ones(1, device=self.device, requires_grad=True)
            self.cql_lagrange_optimizer = th.optim.Adam([self.log_cql_lagrange], lr=self.lr_schedule(1))

    @property
    def cql_lagrange_threshold(self) -> float | None:
        """``tau``; set to a number where it was ``None``, a multiplier starts, and set to ``None``, it goes."""
        threshold: float | None = self.__dict__.get("cql_lagrange_threshold")
        return threshold

    @cql_lagrange_threshold.setter
    def cql_lagrange_threshold(self, threshold: float | None) -> None:
        is_switched = (threshold is None) != (self.cql_lagrange_threshold is None)
        self.__dict__["cql_lagrange_threshold"] = threshold  # Where SB3 looks for what it saves and loads.
        if is_switched and getattr(self, "policy", None) is not None:
            self._setup_lagrange()

    @classmethod
    def load(cls: type[SelfActorCritic], path: Any, *args: Any, **kwargs: Any) -> SelfActorCritic:
        """Load a model, see SB3; ``cql_lagrange_threshold`` may be on in the file and off here, or the other way round.

        Args:
            path: See SB3.
            *args: See SB3.
            **kwargs: See SB3.

        Returns:
            The model.
        """
        switch = {name: kwargs.pop(name) for name in ("cql_lagrange_threshold",) if name in kwargs}
        model = super().load(path, *args, **kwargs)
        for name, value in switch.items():
            setattr(model, name, value)  # When the multiplier of the file has been read.
        return model

    def _do_not_check_the_policy(self) -> None:
        """Leave out torch's check of the policy's mean and deviation: on a GPU the host would wait for it in each step."""
        own = self.actor.action_dist
        if type(own) is SquashedDiagGaussianDistribution:
            self.actor.action_dist = UncheckedSquashedGaussian(own.action_dim, own.epsilon)

    def _setup_without_env(self) -> None:
        if not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"{type(self).__name__} needs a Box action space; the dataset has {self.action_space}.")
        if not np.isfinite([self.action_space.low, self.action_space.high]).all():
            raise ValueError(f"The action space needs finite bounds; the dataset has {self.action_space}.")
        if self.target_entropy == "auto":
            self.target_entropy = -float(np.prod(self.action_space.shape))
        super()._setup_without_env()

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        """Update the critic's optimisers by ``learning_rate``, the actor's by ``actor_learning_rate``."""
        own = [self.critic.optimizer]
        if self.cql_lagrange_optimizer is not None:
            own.append(self.cql_lagrange_optimizer)
        super()._update_learning_rate(own)
        # Without a rate of its own the actor follows whatever `lr_schedule` is by now.
        schedule = self.lr_schedule if self.actor_learning_rate is None else self.actor_lr_schedule
        actor_rate = schedule(self._current_progress_remaining)
        self.logger.record("train/actor_learning_rate", actor_rate)
        for optimizer in (self.actor.optimizer, self.ent_coef_optimizer):
            if optimizer is not None:
                update_learning_rate(optimizer, actor_rate)

    def _named_optimizers(self) -> dict[str, th.optim.Optimizer]:
        scalars = self._scalar_optimizers()
        networks = {"critic": self.critic.optimizer, "actor": self.actor.optimizer}
        order = ("ent_coef", "critic", "cql_lagrange", "actor")
        return {name: own for name in order if (own := scalars.get(name) or networks.get(name)) is not None}

    def _scalar_optimizers(self) -> dict[str, th.optim.Optimizer]:
        every = {"ent_coef": self.ent_coef_optimizer, "cql_lagrange": self.cql_lagrange_optimizer}
        return {name: optimizer for name, optimizer in every.items() if optimizer is not None}

    def _step_kind(self) -> tuple[Any, ...]:
        cloning, moving = self._n_updates < self.bc_steps, self._n_updates % self.target_update_interval == 0
        return (*super()._step_kind(), cloning, moving)

    def _step_tensors(self) -> list[th.Tensor]:
        more = (self.log_ent_coef, getattr(self, "ent_coef_tensor", None), self.log_cql_lagrange)
        return [*super()._step_tensors(), *(tensor for tensor in more if tensor is not None)]

    # One gradient step, as the paper has it ----------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> CQLMetrics:
        if self.use_sde:
            self.actor.reset_noise()
        policy_step = self._sample_policy(batch)
        ent_coef, ent_coef_loss = self._update_ent_coef(policy_step)
        target, next_policy = self._compute_target(batch, ent_coef)
        critic_step = self._update_critic(batch, target, policy_step, next_policy)
        actor_loss = self._update_actor(batch, policy_step, ent_coef)
        # Counted over all calls; SAC counts anew in each, so that one step a call always moves the targets.
        if self._n_updates % self.target_update_interval == 0:
            self._update_targets()

        penalty = critic_step.penalty
        return CQLMetrics(
            critic_loss=critic_step.critic_loss,
            bellman_loss=critic_step.bellman_loss,
            q_data=critic_step.q_data,
            actor_loss=actor_loss,
            ent_coef=ent_coef,
            ent_coef_loss=ent_coef_loss,
            cql_loss=critic_step.cql_loss,
            cql_gap=None if penalty is None else penalty.gap.mean(),
            q_policy=None if penalty is None else penalty.q_policy,
            q_random=None if penalty is None else penalty.q_random,
            bound_rate=None if penalty is None else penalty.bound_rate,
            cql_alpha=critic_step.multiplier,
        )

    def _sample_policy(self, batch: Batch) -> PolicyStep:
        """Draw ``a ~ pi(.|s)`` with gradient, and keep the Gaussian that it came from for the proposals."""
        actions, log_prob = self.actor.action_log_prob(batch.observations)
        distribution = self.actor.action_dist
        gaussian = distribution.distribution
        if isinstance(distribution, SquashedDiagGaussianDistribution):
            distribution.gaussian_actions = None  # It would keep the whole graph of this step alive.
        return PolicyStep(actions, log_prob.reshape(-1, 1), gaussian.mean, gaussian.stddev)

    def _update_ent_coef(self, policy_step: PolicyStep) -> tuple[th.Tensor, th.Tensor | None]:
        """Step the entropy coefficient; return the one to use in this gradient step, from before the update, and the loss."""
        if self.ent_coef_optimizer is None or self.log_ent_coef is None:
            return self.ent_coef_tensor, None
        ent_coef = th.exp(self.log_ent_coef.detach())
        loss = -(self.log_ent_coef * (policy_step.log_prob + self.target_entropy).detach()).mean()
        self._minimize(loss, self.ent_coef_optimizer)
        return ent_coef, loss

    @th.no_grad()
    def _compute_target(self, batch: Batch, ent_coef: th.Tensor) -> tuple[th.Tensor, Gaussian]:
        """Compute the Bellman target ``(B, K')``; return the policy at the next states with it, one of the proposals."""
        if self.max_q_backup:
            gaussian = self._policy_gaussian(batch.next_observations)
            proposed = losses.propose_from_policy(gaussian.mean, gaussian.std, self.cql_n_actions)
            next_values, best = self._next_values(batch.next_observations, proposed.actions)
            next_log_prob = proposed.log_density.gather(1, best)
        elif self.mode_q_backup:
            gaussian = self._policy_gaussian(batch.next_observations)
            next_values, _ = self._next_values(batch.next_observations, self.actor.action_dist.mode().unsqueeze(1))
            next_log_prob = next_values.new_zeros(())
        else:
            actions, log_prob = self.actor.action_log_prob(batch.next_observations)
            distribution = self.actor.action_dist.distribution
            gaussian = Gaussian(distribution.mean, distribution.stddev)
            next_values, _ = self._next_values(batch.next_observations, actions.unsqueeze(1))
            next_log_prob = log_prob.reshape(-1, 1)
        if self.backup_entropy:
            next_values = next_values - ent_coef * next_log_prob
        discounts = self.gamma if batch.discounts is None else batch.discounts
        return losses.td_target(batch.rewards, batch.dones, discounts, next_values), gaussian

    def _policy_gaussian(self, observations: th.Tensor | TensorDict) -> Gaussian:
        """The policy's normal distribution before the squash."""
        mean, log_std, kwargs = self.actor.get_action_dist_params(observations)
        distribution = self.actor.action_dist.proba_distribution(mean, log_std, **kwargs).distribution
        return Gaussian(distribution.mean, distribution.stddev)

    def _values_of(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        actions, _ = self.actor.action_log_prob(observations)
        values, _ = self._next_values(observations, actions.unsqueeze(1))
        return values.mean(dim=1)

    # The critic --------------------------------------------------------------------------------------------------------

    def _update_critic(self, batch: Batch, target: th.Tensor, policy_step: PolicyStep, next_policy: Gaussian) -> CriticStep:
        """Step the critic (and the Lagrange multiplier) on the Bellman error and the conservative gap."""
        weight = self._cql_weight
        # With weight 0 nothing is proposed: the base class's numbers at the base class's cost.
        groups = {} if weight == 0.0 else self._propose(batch, Gaussian(policy_step.mean, policy_step.std), next_policy)
        actions = th.cat([batch.actions.unsqueeze(1), *(group.actions for group in groups.values())], dim=1)
        outputs = self._critic_outputs(self.critic, batch.observations, actions, self.precision, self.cql_n_backward)
        bellman_error = self._bellman_error(outputs[:, :, 0], target)
        q_values = self._q_values(outputs)
        penalty = self._compute_penalty(batch, q_values, groups) if groups else None

        multiplier, threshold = None, 0.0
        if penalty is not None and self.log_cql_lagrange is not None:
            assert self.cql_lagrange_threshold is not None
            multiplier, threshold = losses.lagrange_multiplier(self.log_cql_lagrange.detach()), self.cql_lagrange_threshold
        full_weight = weight if multiplier is None else weight * multiplier
        loss = losses.critic_loss(bellman_error, None if penalty is None else penalty.gap, full_weight, threshold).squeeze()

        self._minimize(loss, self.critic.optimizer)
        if penalty is not None and multiplier is not None:
            self._update_lagrange(penalty.gap, weight)

        with th.no_grad():
            bellman_loss = losses.critic_loss(bellman_error, None, 0.0)
        cql_loss = None if penalty is None else loss.detach() - bellman_loss
        return CriticStep(loss, bellman_loss, q_values[:, :, 0].detach().mean(), penalty, cql_loss, multiplier)

    def _propose(self, batch: Batch, policy: Gaussian, next_policy: Gaussian) -> dict[str, ProposedActions]:
        """Draw the actions of the soft maximum, by group."""
        return losses.propose_actions(self.cql_variant, batch.actions, policy, next_policy, self.cql_n_actions)

    def _compute_penalty(self, batch: Batch, q_values: th.Tensor, groups: dict[str, ProposedActions]) -> Penalty:
        """Compute the gap from the values of the data's and of all proposed actions, shape ``(C, B, 1 + M)``."""
        return losses.conservative_penalty(
            q_values,
            groups,
            calibration=self._calibration(batch),
            variant=self.cql_variant,
            temperature=self.cql_temperature,
            clip=self.cql_clip_diff,
            normalize=self.normalize_gap,
        )

    def _calibration(self, batch: Batch) -> Calibration | None:
        """What bounds the policy's values from below: nothing here, the returns-to-go in Cal-QL."""
        return None

    def _update_lagrange(self, gap: th.Tensor, weight: float) -> None:
        """Step the Lagrange multiplier towards a gap of ``cql_lagrange_threshold``."""
        assert self.log_cql_lagrange is not None
        assert self.cql_lagrange_optimizer is not None
        assert self.cql_lagrange_threshold is not None
        loss = losses.lagrange_loss(self.log_cql_lagrange, gap, weight, self.cql_lagrange_threshold)
        self._minimize(loss, self.cql_lagrange_optimizer)

    # The actor and the targets -----------------------------------------------------------------------------------------

    def _update_actor(self, batch: Batch, policy_step: PolicyStep, ent_coef: th.Tensor) -> th.Tensor:
        """Step the actor towards higher Q and entropy, or towards the data during ``bc_steps``."""
        if self._n_updates < self.bc_steps:
            log_prob_data = losses.behavior_cloning_log_prob(batch.actions, policy_step.mean, policy_step.std)
            loss = (ent_coef * policy_step.log_prob - log_prob_data).mean()
        else:
            with _frozen(self.critic):
                values = self._actor_values(batch.observations, policy_step.actions)
            loss = (ent_coef * policy_step.log_prob - values).mean()
        self._minimize(loss, self.actor.optimizer)
        return loss.detach()

    def _update_targets(self) -> None:
        """Move the target critics by ``tau``; running statistics of batch normalisation are copied."""
        if self.device.type == "cuda":  # One kernel for all; on the CPU it is SB3's own, to the last bit.
            targets, current = (list(network.parameters()) for network in (self.critic_target, self.critic))
            with th.no_grad():
                th._foreach_lerp_(targets, current, self.tau)
        else:
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    # The watch -----------------------------------------------------------------------------------------------------------

    def _data_values(self, batch: Batch) -> th.Tensor:
        q_values = self._q_values(self._critic_outputs(self.critic, batch.observations, batch.actions.unsqueeze(1)))[:, :, 0]
        return q_values.gather(0, q_values.abs().argmax(dim=0, keepdim=True)).squeeze(0)

    def _policy_outputs(self, batch: Batch) -> dict[str, th.Tensor]:
        outputs: dict[str, th.Tensor] = {}
        for place, observations in (("observations", batch.observations), ("next_observations", batch.next_observations)):
            mean, log_std, _ = self.actor.get_action_dist_params(observations)
            outputs |= {f"actor.mean({place})": mean, f"actor.log_std({place})": log_std}
        return outputs

    def _entropy_bonus(self) -> float:
        if not self.backup_entropy:
            return 0.0
        # -log pi of a squashed policy is at most A log 2, and near the target on average.
        assert isinstance(self.action_space, spaces.Box)
        largest = max(float(self.action_space.low.size * np.log(2.0)), abs(float(self.target_entropy)))
        return float(self.logger.name_to_value.get("train/ent_coef", 0.0)) * largest

    # Logging and saving --------------------------------------------------------------------------------------------------

    def _record_metrics(self) -> None:
        super()._record_metrics()
        multiplier = self.logger.name_to_value.get("train/cql_alpha", 0.0)
        # A mean of many such numbers is off by their rounding.
        if multiplier >= 0.999 * losses.LAGRANGE_MAX and not self._warned_of_clamp:
            self._warned_of_clamp = True
            warnings.warn(
                f"The Lagrange multiplier reached its clamp of {losses.LAGRANGE_MAX:g}: the gap cannot come down to "
                f"cql_lagrange_threshold={self.cql_lagrange_threshold}. Raise the threshold, or set normalize_gap=True so that "
                "a flat Q has gap 0.",
                stacklevel=2,
            )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_workspace"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.cql_lagrange_threshold is not None:
            return [*state_dicts, "cql_lagrange_optimizer"], [*variables, "log_cql_lagrange"]
        return state_dicts, variables


class CalibratedActorCritic(CalibratedMixin):
    """Calibrated Q-Learning for the conservative actor-critic algorithm that follows it in the bases [Cal-QL, Eq. 5.1].

    Args:
        *args: See the base class, as all keyword arguments but these.
        max_q_backup: As in CQL, but on, as in the authors' code.
        calibrate_random: Whether the uniform actions' values are bounded too.
        **kwargs: See the base class and :class:`CalibratedMixin`.
    """

    def __init__(self, *args: Any, max_q_backup: bool = True, calibrate_random: bool = False, **kwargs: Any) -> None:
        self.calibrate_random = calibrate_random
        super().__init__(*args, max_q_backup=max_q_backup, **kwargs)

    def _calibration(self, batch: Batch) -> Calibration:
        assert batch.returns_to_go is not None
        return Calibration(batch.returns_to_go, self.calibrate_random)
