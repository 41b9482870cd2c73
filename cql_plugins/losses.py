"""The maths of CQL and Cal-QL: tensors in, tensors out, no framework.

Sources: CQL = Kumar et al. 2020 (arXiv 2006.04779), Cal-QL = Nakamoto et al. 2023 (arXiv 2303.05479).

Dimension letters: ``C`` critics, ``B`` batch, ``N`` sampled actions in one group, ``M`` sampled actions in all, ``A`` action
dimension. Actions are those that the network sees, in ``[-1, 1]^A``. Losses come out elementwise, ``(C, B)``: the caller
reduces, since reductions are where conventions differ.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch as th
from torch import Tensor
from torch.nn import functional as F

CQLVariant = Literal["H", "rho", "mu", "pointwise"]
CQL_VARIANTS: tuple[str, ...] = get_args(CQLVariant)

LAGRANGE_MAX = 1e6
"""Clamp of the Lagrange multiplier, as in the authors' code."""
_LOG_2 = math.log(2.0)


class ProposedActions(NamedTuple):
    """Actions drawn from a proposal, with the density they were drawn with.

    Attributes:
        actions: Shape ``(B, N, A)``, in ``[-1, 1]``.
        log_density: Natural logarithm of the proposal's density at each action, shape ``(B, N)``.
    """

    actions: Tensor
    log_density: Tensor


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


# Target --------------------------------------------------------------------------------------------------------------


def td_target(rewards: Tensor, dones: Tensor, discounts: Tensor | float, next_values: Tensor) -> Tensor:
    """Bellman target ``y = r + gamma^k (1 - terminated) V(s')`` [CQL, section 3.1].

    Args:
        rewards: Shape ``(B, 1)``.
        dones: 1 where the episode terminated; a time-out is 0 and bootstraps. Shape ``(B, 1)``.
        discounts: ``gamma^k``, a number or shape ``(B, 1)``.
        next_values: ``V(s')``, shape ``(B, 1)``.

    Returns:
        Target, shape ``(B, 1)``.
    """
    _check_shape("dones", dones, tuple(rewards.shape))
    _check_shape("next_values", next_values, tuple(rewards.shape))
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


# Critic, actor and dual losses ---------------------------------------------------------------------------------------


def critic_loss(squared_error: Tensor, gap: Tensor | None, weight: Tensor | float, threshold: float = 0.0) -> Tensor:
    """``1/2 sum_j [ mean_B (Q_j - y)^2 + weight * (mean_B gap_j - threshold) ]`` [CQL, Eq. 4].

    The half is global, so that ``weight = 0`` is SAC's loss and ``weight`` means what it means in the published codes, whose
    Bellman error is not halved; the paper's alpha is ``weight / 2``.

    Args:
        squared_error: ``(Q_j(s, a) - y)^2``, shape ``(C, B)``.
        gap: Conservative gap, shape ``(C, B)``, or ``None`` for none.
        weight: ``w``, times the Lagrange multiplier (without gradient) where there is one.
        threshold: ``tau`` of the Lagrange form; constant for the critic.

    Returns:
        Scalar.
    """
    loss = squared_error.mean(dim=1).sum()
    if gap is not None:
        _check_shape("gap", gap, tuple(squared_error.shape))
        loss = loss + weight * (gap.mean(dim=1) - threshold).sum()
    return 0.5 * loss


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
