"""What a gradient step reports, as a typed object, and its means between two log lines."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch as th


@dataclass(frozen=True)
class CQLMetrics:
    """Scalars of one gradient step; each field is logged as ``train/<field>``.

    Tensors stay on the device: reading them would make the host wait for it. ``None`` means that the step had none.

    Attributes:
        critic_loss: Whole critic loss.
        bellman_loss: Its Bellman part, ``1/2 sum_j mean_B (Q_j - y)^2``.
        cql_loss: Its conservative part.
        cql_gap: Conservative gap, mean over critics and batch, before any weight.
        q_data: Mean of ``Q(s, a_data)``.
        q_policy: Mean of ``Q(s, a)`` for the current policy's actions, before any bound.
        q_random: Mean of ``Q(s, a)`` for uniform actions, before any bound.
        bound_rate: Share of bounded values among those that Cal-QL may bound.
        actor_loss: Actor loss (behaviour cloning during ``bc_steps``).
        ent_coef: Entropy coefficient used.
        ent_coef_loss: Loss of the entropy coefficient, where it is learned.
        cql_alpha: Lagrange multiplier, where there is one.
    """

    critic_loss: th.Tensor
    bellman_loss: th.Tensor
    q_data: th.Tensor
    actor_loss: th.Tensor
    ent_coef: th.Tensor
    cql_loss: th.Tensor | None = None
    cql_gap: th.Tensor | None = None
    q_policy: th.Tensor | None = None
    q_random: th.Tensor | None = None
    bound_rate: th.Tensor | None = None
    ent_coef_loss: th.Tensor | None = None
    cql_alpha: th.Tensor | None = None


@dataclass(frozen=True)
class DiscreteCQLMetrics:
    """As :class:`CQLMetrics`, of algorithms with discrete actions.

    Attributes:
        loss: Whole loss.
        bellman_loss: The base class's loss.
        q_data: Mean of ``Q(s, a_data)``.
        q_policy: Mean of ``max_a Q(s, a)``.
        q_random: Mean of ``Q(s, a)`` over all actions.
        cql_loss: Conservative part of the loss.
        cql_gap: Conservative gap, mean over the batch, before its weight.
        bound_rate: Share of values that Cal-QL bounded.
    """

    loss: th.Tensor
    bellman_loss: th.Tensor
    q_data: th.Tensor
    q_policy: th.Tensor
    q_random: th.Tensor
    cql_loss: th.Tensor | None = None
    cql_gap: th.Tensor | None = None
    bound_rate: th.Tensor | None = None


class MetricsMean:
    """Running means of the metrics on the device, read once for each log line."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether there were gradient steps since the last call of :meth:`pop`."""
        return bool(self._sums)

    def update(self, metrics: CQLMetrics | DiscreteCQLMetrics) -> None:
        """Add one gradient step."""
        for field in fields(metrics):
            value = getattr(metrics, field.name)
            if value is None:
                continue
            value = value.detach().reshape(())
            self._sums[field.name] = self._sums[field.name] + value if field.name in self._sums else value
            self._counts[field.name] = self._counts.get(field.name, 0) + 1

    def pop(self) -> dict[str, float]:
        """Return the means since the last call by name, in one transfer, and start anew."""
        if not self._sums:
            return {}
        sums = th.stack([value.float() for value in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means
