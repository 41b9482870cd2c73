"""The maths of CQL and Cal-QL: tensors in, tensors out, no framework.

Sources: CQL = Kumar et al. 2020 (arXiv 2006.04779), Cal-QL = Nakamoto et al. 2023 (arXiv 2303.05479).

Dimension letters: ``C`` critics, ``B`` batch, ``N`` sampled actions in one group, ``M`` sampled actions in all, ``A`` action
dimension. Actions are those that the network sees, in ``[-1, 1]^A``. Losses come out elementwise, ``(C, B)``: the caller
reduces, since reductions are where conventions differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch as th
from torch import Tensor
from torch.nn import functional as F

CQLVariant = Literal["H", "rho", "mu", "pointwise"]
CQL_VARIANTS: tuple[str, ...] = get_args(CQLVariant)

LAGRANGE_MAX = 1e6
"""Clamp of the Lagrange multiplier, as in the authors' code."""
_LOG_2 = math.log(2.0)


class Gaussian(NamedTuple):
    """A policy's normal distribution before the squash; mean and standard deviation have shape ``(B, A)``."""

    mean: Tensor
    std: Tensor


class ProposedActions(NamedTuple):
    """Actions drawn from a proposal, with the density they were drawn with.

    Attributes:
        actions: Shape ``(B, N, A)``, in ``[-1, 1]``.
        log_density: Natural logarithm of the proposal's density at each action, shape ``(B, N)``.
    """

    actions: Tensor
    log_density: Tensor


class Calibration(NamedTuple):
    """What Cal-QL adds to the penalty.

    Attributes:
        returns_to_go: ``G(s)``, shape ``(B, 1)``; ``-inf`` where it is not known.
        calibrate_random: Whether the uniform actions' values are bounded, too.
    """

    returns_to_go: Tensor
    calibrate_random: bool = False


class Penalty(NamedTuple):
    """The conservative gap of a batch and what is logged of it.

    Attributes:
        gap: Shape ``(C, B)``, with gradient.
        q_data: ``Q_j(s, a_data)``, shape ``(C, B)``, with gradient.
        q_policy: Mean unbounded Q of the current policy's actions.
        q_random: Mean unbounded Q of uniform actions, where the variant has them.
        bound_rate: Share of values that Cal-QL bounded, where it bounds.
    """

    gap: Tensor
    q_data: Tensor
    q_policy: Tensor
    q_random: Tensor | None
    bound_rate: Tensor | None


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Refuse a tensor whose shape is not the expected one; ``None`` matches any size."""
    if len(expected) != tensor.ndim or any(e is not None and e != s for e, s in zip(expected, tensor.shape, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({wanted}); got {tuple(tensor.shape)}.")


# Proposals -----------------------------------------------------------------------------------------------------------


def squashed_gaussian_log_density(pre_tanh: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of ``a = tanh(u)`` at ``u``, for ``u`` normal with independent coordinates.

    The change of variables ``log(1 - tanh(u)^2)`` is written ``2 (log 2 - u - softplus(-2u))``, which is exact in floating
    point. The usual ``log(1 - tanh(u)^2 + 1e-6)`` is off by 1.2 nats a dimension at ``u = 8``: it over-weights
    saturated actions.

    Args:
        pre_tanh: ``u``, shape ``(..., A)``.
        mean: Mean of ``u``, broadcastable to ``pre_tanh``.
        std: Standard deviation of ``u``, positive, broadcastable to ``pre_tanh``.

    Returns:
        Log-density of the action, shape ``(...)``.
    """
    log_normal = -0.5 * ((pre_tanh - mean) / std) ** 2 - th.log(std) - 0.5 * math.log(2.0 * math.pi)
    log_jacobian = 2.0 * (_LOG_2 - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return (log_normal - log_jacobian).sum(dim=-1)


def propose_from_policy(mean: Tensor, std: Tensor, n_actions: int) -> ProposedActions:
    """Draw ``n_actions`` actions for each state from a squashed Gaussian policy, without gradient.

    Args:
        mean: Mean before the squash, shape ``(B, A)``.
        std: Standard deviation before the squash, shape ``(B, A)``.
        n_actions: ``N``, at least 1.

    Returns:
        Actions ``(B, N, A)`` and their log-density under the policy ``(B, N)``.
    """
    _check_shape("std", std, tuple(mean.shape))
    mean, std = mean.detach().unsqueeze(1), std.detach().unsqueeze(1)
    noise = th.randn(mean.shape[0], n_actions, mean.shape[2], dtype=mean.dtype, device=mean.device)
    pre_tanh = mean + std * noise
    return ProposedActions(th.tanh(pre_tanh), squashed_gaussian_log_density(pre_tanh, mean, std))


def propose_uniformly(like: Tensor, n_actions: int) -> ProposedActions:
    """Draw ``n_actions`` actions for each state uniformly from ``[-1, 1]^A``.

    Args:
        like: Any tensor ``(B, A)``; gives batch size, action dimension, dtype and device.
        n_actions: ``N``, at least 1.

    Returns:
        Actions ``(B, N, A)`` and their log-density, ``-A log 2`` everywhere, ``(B, N)``.
    """
    batch_size, action_dim = like.shape
    actions = th.empty(batch_size, n_actions, action_dim, dtype=like.dtype, device=like.device).uniform_(-1.0, 1.0)
    return ProposedActions(actions, actions.new_full((batch_size, n_actions), -action_dim * _LOG_2))


def propose_actions(
    variant: CQLVariant, data_actions: Tensor, policy: Gaussian, next_policy: Gaussian, n_actions: int
) -> dict[str, ProposedActions]:
    """Draw the actions of the soft maximum, by group; all are to be evaluated at the current state.

    Args:
        variant: ``H`` has the three groups ``random``, ``current`` and ``next``; the others have ``current`` alone.
        data_actions: The data's actions, shape ``(B, A)``; gives the sizes.
        policy: The policy at the current states.
        next_policy: The policy at the next states.
        n_actions: ``N``, actions in each group.

    Returns:
        The groups, in the order in which they enter the soft maximum.
    """
    current = propose_from_policy(policy.mean, policy.std, n_actions)
    if variant != "H":
        return {"current": current}
    return {
        "random": propose_uniformly(data_actions, n_actions),
        "current": current,
        "next": propose_from_policy(next_policy.mean, next_policy.std, n_actions),
    }


# Target --------------------------------------------------------------------------------------------------------------


def td_target(rewards: Tensor, dones: Tensor, discounts: Tensor | float, next_values: Tensor) -> Tensor:
    """Bellman target ``y = r + gamma^k (1 - terminated) V(s')`` [CQL, section 3.1].

    Args:
        rewards: Shape ``(B, 1)``.
        dones: 1 where the episode terminated; a time-out is 0 and bootstraps. Shape ``(B, 1)``.
        discounts: ``gamma^k``, a number or shape ``(B, 1)``.
        next_values: ``V(s')``, shape ``(B, 1)``, or its ``K`` quantiles, ``(B, K)``.

    Returns:
        Target, shape of ``next_values``.
    """
    _check_shape("rewards", rewards, (None, 1))
    _check_shape("dones", dones, tuple(rewards.shape))
    _check_shape("next_values", next_values, (rewards.shape[0], None))
    if isinstance(discounts, Tensor) and discounts.dim():
        _check_shape("discounts", discounts, tuple(rewards.shape))
    return rewards + (1 - dones) * discounts * next_values


def max_backup(q_values: Tensor) -> tuple[Tensor, Tensor]:
    """``max_i min_j Q_j(s', a_i)``: the minimum over critics comes first [CQL, appendix F].

    Args:
        q_values: Target critics' values, shape ``(C, B, N)``.

    Returns:
        The value ``(B, 1)`` and the index of its action ``(B, 1)``.
    """
    _check_shape("q_values", q_values, (None, None, None))
    values, indices = q_values.min(dim=0).values.max(dim=1, keepdim=True)
    return values, indices


# The conservative gap ------------------------------------------------------------------------------------------------


def bound_by_returns(q_values: Tensor, returns_to_go: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each ``Q_j(s, a_i)`` by ``max(Q_j(s, a_i), G(s))`` [Cal-QL, Eq. 5.1].

    No gradient flows where ``G`` wins; ``G = -inf`` leaves ``Q`` alone.

    Args:
        q_values: Shape ``(C, B, M)``.
        returns_to_go: ``G``, shape ``(B, 1)``.

    Returns:
        Bounded values ``(C, B, M)`` and, for each, whether ``G`` won (bool).
    """
    _check_shape("q_values", q_values, (None, None, None))
    _check_shape("returns_to_go", returns_to_go, (q_values.shape[1], 1))
    reference = returns_to_go.unsqueeze(0)
    bounded = q_values.detach() < reference
    return th.where(bounded, reference, q_values), bounded


def soft_maximum(q_values: Tensor, log_density: Tensor | None, temperature: float = 1.0) -> Tensor:
    """``T logsumexp_i( Q(s, a_i) / T - log density_i )``, an importance-weighted ``T log integral exp(Q / T)``.

    Not divided by the number of actions, as in the authors' code: the constant has no gradient. The temperature divides ``Q``
    alone [CQL, Eq. 4 with the sampling estimate of appendix F]; published codes divide the density too, which is an error.

    Args:
        q_values: Shape ``(C, B, M)``.
        log_density: Log-density of each action's own proposal, shape ``(B, M)``, or ``None`` for no weights.
        temperature: ``T``, positive.

    Returns:
        Shape ``(C, B)``.
    """
    logits = q_values / temperature
    if log_density is not None:
        logits = logits - log_density
    return temperature * th.logsumexp(logits, dim=2)


def conservative_gap(
    q_data: Tensor,
    q_sampled: Tensor,
    log_density: Tensor,
    *,
    action_dim: int,
    variant: CQLVariant = "H",
    temperature: float = 1.0,
    clip: tuple[float, float] = (-math.inf, math.inf),
    normalize: bool = False,
) -> Tensor:
    """The conservative gap of each critic at each state, elementwise.

    ======================= ============================================================ ===========================
    variant                 gap                                                          source
    ======================= ============================================================ ===========================
    ``H``                   ``T logsumexp_i(Q_i/T - log density_i) - Q(s, a_data)``      [CQL, Eq. 4]
    ``rho``                 ``T logsumexp_i(Q_i/T) - T log N - Q(s, a_data)``            [CQL, Eq. 3], R = -KL(mu, rho)
    ``mu``                  ``mean_i Q_i - Q(s, a_data)``                                [CQL, Eq. 2], mu = pi
    ``pointwise``           ``mean_i Q_i``                                               [CQL, Eq. 1], Table 4 only
    ======================= ============================================================ ===========================

    Args:
        q_data: ``Q_j(s, a_data)``, shape ``(C, B)``.
        q_sampled: ``Q_j(s, a_i)``, shape ``(C, B, M)``: all three groups for ``H``, the current policy's for the others.
        log_density: Log-density of each action's own proposal, shape ``(B, M)``; used by ``H`` alone.
        action_dim: ``A``, used by ``normalize``.
        variant: See the table.
        temperature: ``T``, positive.
        clip: Smallest and largest gap of one sample; the gradient is zero outside.
        normalize: For ``H``, subtract ``T (log M + A log 2)``, so that a flat Q has gap 0 whatever ``A`` and ``N``. The other
            variants have that already.

    Returns:
        Shape ``(C, B)``.

    Raises:
        ValueError: If shapes disagree or the variant is unknown.
    """
    n_critics, batch_size = q_data.shape if q_data.ndim == 2 else (None, None)
    _check_shape("q_data", q_data, (n_critics, batch_size))
    _check_shape("q_sampled", q_sampled, (n_critics, batch_size, None))
    _check_shape("log_density", log_density, tuple(q_sampled.shape[1:]))
    n_sampled = q_sampled.shape[2]

    if variant == "H":
        gap = soft_maximum(q_sampled, log_density, temperature) - q_data
        if normalize:
            gap = gap - temperature * (math.log(n_sampled) + action_dim * _LOG_2)
    elif variant == "rho":
        gap = soft_maximum(q_sampled, None, temperature) - temperature * math.log(n_sampled) - q_data
    elif variant == "mu":
        gap = q_sampled.mean(dim=2) - q_data
    elif variant == "pointwise":
        gap = q_sampled.mean(dim=2)
    else:
        raise ValueError(f"variant must be one of {CQL_VARIANTS}; got {variant!r}.")
    return gap.clamp(*clip) if clip != (-math.inf, math.inf) else gap


def conservative_penalty(
    q_values: Tensor,
    groups: Mapping[str, ProposedActions],
    *,
    calibration: Calibration | None = None,
    variant: CQLVariant = "H",
    temperature: float = 1.0,
    clip: tuple[float, float] = (-math.inf, math.inf),
    normalize: bool = False,
) -> Penalty:
    """The gap of CQL, or of Cal-QL, from the values of the data's and of all proposed actions.

    Args:
        q_values: Shape ``(C, B, 1 + M)``: the data's action first, then the groups in their order.
        groups: From :func:`propose_actions`.
        calibration: Bounds the policy's groups by the returns-to-go [Cal-QL, Eq. 5.1], never the data action's value; ``None``
            for CQL.
        variant: See :func:`conservative_gap`, as the arguments that follow.
        temperature: ``T``.
        clip: Smallest and largest gap of one sample.
        normalize: Subtract the gap of a flat Q.

    Returns:
        The gap and what is logged of it.
    """
    q_data, q_sampled = q_values[:, :, 0], q_values[:, :, 1:]
    q_groups = dict(zip(groups, q_sampled.split([g.actions.shape[1] for g in groups.values()], dim=2), strict=True))
    q_policy = q_groups["current"].detach().mean()
    q_random = q_groups["random"].detach().mean() if "random" in q_groups else None
    bound_rate = None
    if calibration is not None:
        shares = []
        for name, values in q_groups.items():
            if name == "random" and not calibration.calibrate_random:
                continue
            q_groups[name], is_bounded = bound_by_returns(values, calibration.returns_to_go)
            shares.append(is_bounded.float().mean())
        q_sampled, bound_rate = th.cat(list(q_groups.values()), dim=2), th.stack(shares).mean()
    gap = conservative_gap(
        q_data,
        q_sampled,
        th.cat([group.log_density for group in groups.values()], dim=1),
        action_dim=groups["current"].actions.shape[2],
        variant=variant,
        temperature=temperature,
        clip=clip,
        normalize=normalize,
    )
    return Penalty(gap, q_data, q_policy, q_random, bound_rate)


def discrete_gap(
    q_values: Tensor,
    actions: Tensor,
    *,
    returns_to_go: Tensor | None = None,
    temperature: float = 1.0,
    clip: tuple[float, float] = (-math.inf, math.inf),
    normalize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``T logsumexp_a(Q_j(s, a) / T) - Q_j(s, a_data)`` for discrete actions [CQL, section 3.2], elementwise.

    With ``returns_to_go`` it is the calibrated form: ``Q(s, a) <- max(Q(s, a), G(s))`` for every action inside the
    soft maximum [Cal-QL, Eq. 5.1]; ``Q(s, a_data)`` is not bounded.

    Args:
        q_values: ``Q_j(s, a)`` of every action (the mean over quantiles where there are some), shape ``(C, B, A)``.
        actions: The data's actions, integers, shape ``(B,)`` or ``(B, 1)``.
        returns_to_go: ``G(s)``, shape ``(B, 1)``, or ``None`` for plain CQL.
        temperature: ``T``, positive.
        clip: Smallest and largest gap of one sample; the gradient is zero outside.
        normalize: Subtract ``T log A``, so that a flat Q has gap 0 whatever the number of actions.

    Returns:
        The gap, shape ``(C, B)``, and the share of values that were bounded, where there is a bound.

    Raises:
        ValueError: If shapes disagree.
    """
    _check_shape("q_values", q_values, (None, None, None))
    n_critics, batch_size, n_actions = q_values.shape
    if actions.numel() != batch_size:
        raise ValueError(f"actions must have shape ({batch_size},) or ({batch_size}, 1); got {tuple(actions.shape)}.")
    index = actions.reshape(1, batch_size, 1).expand(n_critics, batch_size, 1)
    q_data = q_values.gather(2, index).squeeze(2)
    bound_rate = None
    if returns_to_go is not None:
        q_values, is_bounded = bound_by_returns(q_values, returns_to_go)
        bound_rate = is_bounded.float().mean()
    gap = soft_maximum(q_values, None, temperature) - q_data
    if normalize:
        gap = gap - temperature * math.log(n_actions)
    return (gap.clamp(*clip) if clip != (-math.inf, math.inf) else gap), bound_rate


# Critic, actor and dual losses ---------------------------------------------------------------------------------------


def critic_loss(
    bellman_error: Tensor, gap: Tensor | None, weight: Tensor | float, threshold: float = 0.0, scale: float = 0.5
) -> Tensor:
    """``scale * sum_j [ mean_B (Q_j - y)^2 + weight * (mean_B gap_j - threshold) ]`` [CQL, Eq. 4].

    The scale is global, so that with the default of a half ``weight = 0`` is SAC's loss and ``weight`` means what it means in
    the published codes, whose Bellman error is not halved; the paper's alpha is ``weight / 2``.

    Args:
        bellman_error: Bellman error of each critic, the mean over the batch, shape ``(C,)``; or their sum, a scalar.
        gap: Conservative gap, shape ``(C, B)``, or ``None`` for none.
        weight: ``w``, times the Lagrange multiplier (without gradient) where there is one.
        threshold: ``tau`` of the Lagrange form; constant for the critic.
        scale: Global factor.

    Returns:
        Scalar.
    """
    loss = bellman_error.sum()
    if gap is not None:
        _check_shape("gap", gap, (bellman_error.shape[0] if bellman_error.ndim else None, None))
        loss = loss + weight * (gap.mean(dim=1) - threshold).sum()
    return scale * loss


def lagrange_multiplier(log_multiplier: Tensor) -> Tensor:
    """``alpha' = clip(exp(log alpha'), 0, 1e6)`` [CQL, appendix F]."""
    return log_multiplier.exp().clamp(0.0, LAGRANGE_MAX)


def lagrange_loss(log_multiplier: Tensor, gap: Tensor, weight: float, threshold: float) -> Tensor:
    """Dual loss ``-mean_j alpha' w (gap_j - tau)``: the multiplier grows where the gap is above ``tau``.

    Args:
        log_multiplier: Logarithm of ``alpha'``, shape ``(1,)``.
        gap: Conservative gap, shape ``(C, B)``; taken as fixed.
        weight: ``w``.
        threshold: ``tau``.

    Returns:
        Scalar.
    """
    return -(lagrange_multiplier(log_multiplier) * weight * (gap.detach() - threshold)).mean()


def behavior_cloning_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-likelihood of the data's actions under a squashed Gaussian policy.

    Data actions may lie on the bounds, where the density is infinite: they are clipped to ``1 - 1e-5`` before the inverse
    squash.

    Args:
        actions: Data actions, shape ``(B, A)``, in ``[-1, 1]``.
        mean: Policy mean before the squash, shape ``(B, A)``.
        std: Policy standard deviation before the squash, shape ``(B, A)``.

    Returns:
        Shape ``(B, 1)``.
    """
    _check_shape("actions", actions, tuple(mean.shape))
    pre_tanh = th.atanh(actions.clamp(-1.0 + 1e-5, 1.0 - 1e-5))
    return squashed_gaussian_log_density(pre_tanh, mean, std).unsqueeze(-1)
