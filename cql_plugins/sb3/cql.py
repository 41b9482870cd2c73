"""Conservative Q-Learning on Stable-Baselines3's SAC."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import (
    FloatSchedule,
    configure_logger,
    polyak_update,
    update_learning_rate,
)
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.sac.sac import SAC

from cql_plugins import losses
from cql_plugins.losses import Calibration, CQLVariant, Gaussian, Penalty, ProposedActions
from cql_plugins.sb3.metrics import CQLMetrics
from cql_plugins.sb3.offline import Batch, OfflineMixin

SelfCQL = TypeVar("SelfCQL", bound="CQL")


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


def critic_q_values(critic: ContinuousCritic, observations: th.Tensor | TensorDict, actions: th.Tensor) -> th.Tensor:
    """Evaluate several actions at each state in one forward pass, with the features extracted once per state.

    Args:
        critic: SB3 critic with ``C`` networks.
        observations: Batch of ``B`` observations.
        actions: Shape ``(B, M, A)``.

    Returns:
        Shape ``(C, B, M)``.
    """
    batch_size, n_actions, _ = actions.shape
    # SB3's critic trains its features extractor unless the actor owns it.
    with th.set_grad_enabled(th.is_grad_enabled() and not critic.share_features_extractor):
        features = critic.extract_features(observations, critic.features_extractor)
    features = features.unsqueeze(1).expand(batch_size, n_actions, features.shape[1])
    inputs = th.cat((features, actions), dim=2).reshape(batch_size * n_actions, -1)
    return th.stack([q_network(inputs).view(batch_size, n_actions) for q_network in critic.q_networks])


class CQL(OfflineMixin, SAC):
    """Conservative Q-Learning (CQL): SAC with a critic that does not overrate actions the data does not have.

    Paper: https://arxiv.org/abs/2006.04779. The critic minimises
    ``1/2 sum_j [ mean (Q_j - y)^2 + cql_alpha * mean gap_j ]``, where the gap is a soft maximum of Q over actions minus Q at
    the data's action [CQL, Eq. 4]. The weight means what it means in the published codes: the
    paper's ``alpha`` is ``cql_alpha / 2``.

    Departures from SAC's defaults: the Bellman target has no entropy term (``backup_entropy``), and actor and entropy
    coefficient have a learning rate of their own (``actor_learning_rate``). With ``cql_alpha=0``, ``backup_entropy=True`` and
    ``actor_learning_rate=None`` it is SAC, number for number. ``target_update_interval`` counts gradient steps over all calls
    of ``train``, where SAC starts anew in each, so that an interval above 1 is kept with one gradient step a call, too.

    Args:
        policy: See SAC, as all arguments up to ``device``.
        actor_learning_rate: Learning rate of the actor and of the entropy coefficient, a number or a schedule;
            ``None`` for ``learning_rate``, which the critic uses.
        cql_alpha: Weight ``w`` of the conservative gap, not negative.
        cql_n_actions: Actions sampled in each of the three groups (uniform, current policy, policy at the next state).
        cql_variant: ``"H"`` (maximum entropy, Eq. 4), ``"rho"`` (proposal is the frozen policy, Eq. 3), ``"mu"`` (Eq. 2) or
            ``"pointwise"`` (Eq. 1, only to reproduce Table 4).
        cql_temperature: ``T`` of the soft maximum, positive.
        cql_lagrange_threshold: ``tau``: learn the weight's multiplier so that the gap is near ``tau``; ``None`` for off. A flat
            Q already has a gap of about ``A log 2 + log 3N`` (hopper 5.5, walker 7.6, AntMaze 8.9, pen 20.0, door 22.8), so
            ``tau`` means nothing across tasks unless ``normalize_gap`` is on.
        cql_clip_diff: Smallest and largest gap of one sample; AntMaze uses ``(-200, inf)``.
        normalize_gap: Subtract the gap of a flat Q, ``T (log 3N + A log 2)``.
        max_q_backup: Target is the best of ``cql_n_actions`` sampled actions, the minimum over critics first.
        backup_entropy: Whether the target has SAC's entropy term.
        bc_steps: Gradient steps during which the actor clones the data's actions first.
        offline_fraction: Share of each online batch that comes from the dataset, or ``"proportional"`` to the sizes.
        cql_alpha_online: Weight during ``learn``; ``None`` keeps ``cql_alpha``. With 0 the gap is not computed: SAC's cost.

    Raises:
        ValueError: If an argument is out of its range.
    """

    policy_aliases: ClassVar[dict[str, Any]] = SAC.policy_aliases

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        actor_learning_rate: float | Schedule | None = 1e-4,
        cql_alpha: float = 5.0,
        cql_n_actions: int = 10,
        cql_variant: CQLVariant = "H",
        cql_temperature: float = 1.0,
        cql_lagrange_threshold: float | None = None,
        cql_clip_diff: tuple[float, float] = (-math.inf, math.inf),
        normalize_gap: bool = False,
        max_q_backup: bool = False,
        backup_entropy: bool = False,
        bc_steps: int = 0,
        offline_fraction: float | Literal["proportional"] = 0.5,
        cql_alpha_online: float | None = None,
    ) -> None:
        _check_options(
            cql_alpha=cql_alpha,
            cql_n_actions=cql_n_actions,
            cql_variant=cql_variant,
            cql_temperature=cql_temperature,
            cql_clip_diff=cql_clip_diff,
            bc_steps=bc_steps,
            cql_alpha_online=cql_alpha_online,
        )
        self.actor_learning_rate = actor_learning_rate
        self.cql_alpha = cql_alpha
        self.cql_n_actions = cql_n_actions
        self.cql_variant: CQLVariant = cql_variant
        self.cql_temperature = cql_temperature
        self.cql_lagrange_threshold = cql_lagrange_threshold
        self.cql_clip_diff = (float(cql_clip_diff[0]), float(cql_clip_diff[1]))
        self.normalize_gap = normalize_gap
        self.max_q_backup = max_q_backup
        self.backup_entropy = backup_entropy
        self.bc_steps = bc_steps
        self.cql_alpha_online = cql_alpha_online
        self.log_cql_lagrange: th.Tensor | None = None
        self.cql_lagrange_optimizer: th.optim.Adam | None = None
        self._warned_of_clamp = False
        self._init_offline(offline_fraction)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            ent_coef,
            target_update_interval,
            target_entropy,
            use_sde,
            sde_sample_freq,
            use_sde_at_warmup,
            stats_window_size,
            tensorboard_log,
            policy_kwargs,
            verbose,
            seed,
            device,
            _init_setup_model,
        )

    # Setup -----------------------------------------------------------------------------------------------------------

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.learning_rate if self.actor_learning_rate is None else self.actor_learning_rate
        self.actor_lr_schedule: Schedule = FloatSchedule(rate)

    def _setup_model(self) -> None:
        super()._setup_model()
        # SAC made these with the critic's learning rate.
        update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(1))
        if self.ent_coef_optimizer is not None:
            update_learning_rate(self.ent_coef_optimizer, self.actor_lr_schedule(1))
        if self.cql_lagrange_threshold is not None:
            # The authors' code starts at log alpha' = 1 and steps at the critic's rate.
            self.log_cql_lagrange = th.ones(1, device=self.device, requires_grad=True)
            self.cql_lagrange_optimizer = th.optim.Adam([self.log_cql_lagrange], lr=self.lr_schedule(1))

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
        actor_rate = self.actor_lr_schedule(self._current_progress_remaining)
        self.logger.record("train/actor_learning_rate", actor_rate)
        for optimizer in (self.actor.optimizer, self.ent_coef_optimizer):
            if optimizer is not None:
                update_learning_rate(optimizer, actor_rate)

    # One gradient step, as the paper has it ----------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Do gradient steps on batches of the dataset, the online buffer or both.

        Args:
            gradient_steps: How many.
            batch_size: Transitions in each.
        """
        if not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__)
        self.policy.set_training_mode(True)
        self._update_learning_rate([])
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            if self.use_sde:
                self.actor.reset_noise()

            policy_step = self._sample_policy(batch)
            ent_coef, ent_coef_loss = self._update_ent_coef(policy_step)
            target, next_policy = self._compute_target(batch, ent_coef)
            critic_step = self._update_critic(batch, target, policy_step, next_policy)
            actor_loss = self._update_actor(batch, policy_step, ent_coef)
            self._n_updates += 1
            # Counted over all calls; SAC counts anew in each, so that one step a call always moves the targets.
            if (self._n_updates - 1) % self.target_update_interval == 0:
                self._update_targets()

            penalty = critic_step.penalty
            self._metrics.update(
                CQLMetrics(
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
            )
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _sample_policy(self, batch: Batch) -> PolicyStep:
        """Draw ``a ~ pi(.|s)`` with gradient, and keep the Gaussian that it came from for the proposals."""
        actions, log_prob = self.actor.action_log_prob(batch.observations)
        gaussian = self.actor.action_dist.distribution
        return PolicyStep(actions, log_prob.reshape(-1, 1), gaussian.mean, gaussian.stddev)

    def _update_ent_coef(self, policy_step: PolicyStep) -> tuple[th.Tensor, th.Tensor | None]:
        """Step the entropy coefficient; return the one to use in this gradient step, from before the update, and the loss."""
        if self.ent_coef_optimizer is None or self.log_ent_coef is None:
            return self.ent_coef_tensor, None
        ent_coef = th.exp(self.log_ent_coef.detach())
        assert isinstance(self.target_entropy, float)
        loss = -(self.log_ent_coef * (policy_step.log_prob + self.target_entropy).detach()).mean()
        self.ent_coef_optimizer.zero_grad()
        loss.backward()
        self.ent_coef_optimizer.step()
        return ent_coef, loss

    @th.no_grad()
    def _compute_target(self, batch: Batch, ent_coef: th.Tensor) -> tuple[th.Tensor, Gaussian]:
        """Compute the Bellman target ``(B, 1)``; return the policy at the next states with it, one of the proposals."""
        if self.max_q_backup:
            gaussian = self._policy_gaussian(batch.next_observations)
            proposed = losses.propose_from_policy(gaussian.mean, gaussian.std, self.cql_n_actions)
            q_values = critic_q_values(self.critic_target, batch.next_observations, proposed.actions)
            next_values, best = losses.max_backup(q_values)
            next_log_prob = proposed.log_density.gather(1, best)
        else:
            actions, log_prob = self.actor.action_log_prob(batch.next_observations)
            distribution = self.actor.action_dist.distribution
            gaussian = Gaussian(distribution.mean, distribution.stddev)
            next_values = th.cat(self.critic_target(batch.next_observations, actions), dim=1).min(dim=1, keepdim=True).values
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

    # The critic --------------------------------------------------------------------------------------------------------

    @property
    def _cql_weight(self) -> float:
        """``w`` of the phase that the model is in."""
        if self._is_offline_phase or self.cql_alpha_online is None:
            return self.cql_alpha
        return self.cql_alpha_online

    def _update_critic(self, batch: Batch, target: th.Tensor, policy_step: PolicyStep, next_policy: Gaussian) -> CriticStep:
        """Step the critic (and the Lagrange multiplier) on the Bellman error and the conservative gap."""
        weight = self._cql_weight
        if weight == 0.0:
            # The host's own forward, so that weight 0 is SAC to the last bit and costs no more.
            q_data = th.cat(self.critic(batch.observations, batch.actions), dim=1).T
            penalty = None
        else:
            penalty = self._compute_penalty(batch, Gaussian(policy_step.mean, policy_step.std), next_policy)
            q_data = penalty.q_data
        bellman_error = ((q_data - target.T) ** 2).mean(dim=1)

        multiplier, threshold = None, 0.0
        if penalty is not None and self.log_cql_lagrange is not None:
            assert self.cql_lagrange_threshold is not None
            multiplier, threshold = (
                losses.lagrange_multiplier(self.log_cql_lagrange.detach()),
                self.cql_lagrange_threshold,
            )
        full_weight = weight if multiplier is None else weight * multiplier
        loss = losses.critic_loss(bellman_error, None if penalty is None else penalty.gap, full_weight, threshold).squeeze()

        self.critic.optimizer.zero_grad()
        loss.backward()
        self.critic.optimizer.step()
        if penalty is not None and multiplier is not None:
            self._update_lagrange(penalty.gap, weight)

        with th.no_grad():
            bellman_loss = losses.critic_loss(bellman_error, None, 0.0)
        cql_loss = None if penalty is None else loss.detach() - bellman_loss
        return CriticStep(loss, bellman_loss, q_data.detach().mean(), penalty, cql_loss, multiplier)

    def _compute_penalty(self, batch: Batch, policy: Gaussian, next_policy: Gaussian) -> Penalty:
        """Evaluate the data's and all proposed actions in one pass; return the gap."""
        groups = self._propose(batch, policy, next_policy)
        actions = th.cat([batch.actions.unsqueeze(1), *(group.actions for group in groups.values())], dim=1)
        return losses.conservative_penalty(
            critic_q_values(self.critic, batch.observations, actions),
            groups,
            calibration=self._calibration(batch),
            variant=self.cql_variant,
            temperature=self.cql_temperature,
            clip=self.cql_clip_diff,
            normalize=self.normalize_gap,
        )

    def _propose(self, batch: Batch, policy: Gaussian, next_policy: Gaussian) -> dict[str, ProposedActions]:
        """Draw the actions of the soft maximum, by group."""
        return losses.propose_actions(self.cql_variant, batch.actions, policy, next_policy, self.cql_n_actions)

    def _calibration(self, batch: Batch) -> Calibration | None:
        """What bounds the policy's values from below: nothing here, the returns-to-go in Cal-QL."""
        return None

    def _update_lagrange(self, gap: th.Tensor, weight: float) -> None:
        """Step the Lagrange multiplier towards a gap of ``cql_lagrange_threshold``."""
        assert self.log_cql_lagrange is not None
        assert self.cql_lagrange_optimizer is not None
        assert self.cql_lagrange_threshold is not None
        loss = losses.lagrange_loss(self.log_cql_lagrange, gap, weight, self.cql_lagrange_threshold)
        self.cql_lagrange_optimizer.zero_grad()
        loss.backward()
        self.cql_lagrange_optimizer.step()

    # The actor and the targets -----------------------------------------------------------------------------------------

    def _update_actor(self, batch: Batch, policy_step: PolicyStep, ent_coef: th.Tensor) -> th.Tensor:
        """Step the actor towards higher Q and entropy, or towards the data during ``bc_steps``."""
        if self._n_updates < self.bc_steps:
            log_prob_data = losses.behavior_cloning_log_prob(batch.actions, policy_step.mean, policy_step.std)
            loss = (ent_coef * policy_step.log_prob - log_prob_data).mean()
        else:
            q_values = th.cat(self.critic(batch.observations, policy_step.actions), dim=1)
            loss = (ent_coef * policy_step.log_prob - q_values.min(dim=1, keepdim=True).values).mean()
        self.actor.optimizer.zero_grad()
        loss.backward()
        self.actor.optimizer.step()
        return loss.detach()

    def _update_targets(self) -> None:
        """Move the target critics by ``tau``; running statistics of batch normalisation are copied."""
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    # Logging, learning and saving ----------------------------------------------------------------------------------------

    def _record_metrics(self) -> None:
        super()._record_metrics()
        multiplier = self.logger.name_to_value.get("train/cql_alpha", 0.0)
        if multiplier >= losses.LAGRANGE_MAX and not self._warned_of_clamp:
            self._warned_of_clamp = True
            warnings.warn(
                f"The Lagrange multiplier reached its clamp of {losses.LAGRANGE_MAX:g}: the gap cannot come down to "
                f"cql_lagrange_threshold={self.cql_lagrange_threshold}. Raise the threshold, or set normalize_gap=True so that "
                "a flat Q has gap 0.",
                stacklevel=2,
            )

    def learn(
        self: SelfCQL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfCQL:
        """Train online in SB3's own loop, with batches mixed from the dataset where there is one.

        Without a dataset this is online CQL. After ``learn_offline`` there are no random actions: the first ``learning_starts``
        steps are collected by the policy.

        Args:
            total_timesteps: Environment steps.
            callback: SB3 callback(s).
            log_interval: Episodes between two log lines.
            tb_log_name: Name of the TensorBoard run; the algorithm's where ``None``.
            reset_num_timesteps: Whether to start the count of environment steps anew.
            progress_bar: Show SB3's progress bar (needs tqdm and rich).

        Returns:
            The model.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.cql_lagrange_threshold is not None:
            return [*state_dicts, "cql_lagrange_optimizer"], [*variables, "log_cql_lagrange"]
        return state_dicts, variables


def _check_options(
    *,
    cql_alpha: float,
    cql_n_actions: int,
    cql_variant: str,
    cql_temperature: float,
    cql_clip_diff: tuple[float, float],
    bc_steps: int,
    cql_alpha_online: float | None,
) -> None:
    """Refuse options out of range before anything is built."""
    if not (math.isfinite(cql_alpha) and cql_alpha >= 0.0):
        raise ValueError(f"cql_alpha must be a number >= 0; got {cql_alpha}.")
    if cql_alpha_online is not None and not (math.isfinite(cql_alpha_online) and cql_alpha_online >= 0.0):
        raise ValueError(f"cql_alpha_online must be None or a number >= 0; got {cql_alpha_online}.")
    if not (isinstance(cql_n_actions, int) and cql_n_actions >= 1):
        raise ValueError(f"cql_n_actions must be an integer >= 1; got {cql_n_actions!r}.")
    if cql_variant not in losses.CQL_VARIANTS:
        raise ValueError(f"cql_variant must be one of {losses.CQL_VARIANTS}; got {cql_variant!r}.")
    if not (math.isfinite(cql_temperature) and cql_temperature > 0.0):
        raise ValueError(f"cql_temperature must be a number > 0; got {cql_temperature}.")
    if len(cql_clip_diff) != 2 or not cql_clip_diff[0] < cql_clip_diff[1]:
        raise ValueError(f"cql_clip_diff must be (smallest, largest) with smallest < largest; got {cql_clip_diff}.")
    if not (isinstance(bc_steps, int) and bc_steps >= 0):
        raise ValueError(f"bc_steps must be an integer >= 0; got {bc_steps!r}.")
