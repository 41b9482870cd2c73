"""What a gradient step reports, as a typed object, and its means between two log lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

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


class MetricsVector(NamedTuple):
    """The metrics of one gradient step as one tensor.

    Attributes:
        names: Those that the step had.
        values: Shape ``(len(names),)``, float32, without gradient.
    """

    names: tuple[str, ...]
    values: th.Tensor

    @classmethod
    def of(cls, metrics: CQLMetrics | DiscreteCQLMetrics) -> MetricsVector:
        """Gather the fields that are not ``None``.

        Args:
            metrics: Of one step.
        """
        named = {field.name: getattr(metrics, field.name) for field in fields(metrics)}
        named = {name: value for name, value in named.items() if value is not None}
        return cls(tuple(named), th.stack([value.detach().reshape(()).float() for value in named.values()]))


class MetricsMean:
    """Running means of the metrics on the device, read once for each log line."""

    def __init__(self) -> None:
        # By the names that occur together.
        self._sums: dict[tuple[str, ...], th.Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def __bool__(self) -> bool:
        """Whether there were gradient steps since the last call of :meth:`pop`."""
        return bool(self._sums)

    def update(self, metrics: MetricsVector) -> None:
        """Add one gradient step.

        Args:
            metrics: Its metrics; the tensor may be overwritten afterwards.
        """
        if metrics.names in self._sums:
            self._sums[metrics.names] += metrics.values
        else:
            self._sums[metrics.names] = metrics.values.clone()
        self._counts[metrics.names] = self._counts.get(metrics.names, 0) + 1

    def average(self, over_ranks: Callable[[list[th.Tensor]], None]) -> None:
        """Replace the means by those over all ranks, which have done steps of the same kinds.

        Args:
            over_ranks: Replaces tensors by their means over the ranks.
        """
        over_ranks(list(self._sums.values()))

    def pop(self) -> dict[str, float]:
        """Return the means since the last call by name, in one transfer, and start anew."""
        if not self._sums:
            return {}
        sums = iter(th.cat(list(self._sums.values())).tolist())
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names in self._sums:
            for name in names:
                totals[name] = totals.get(name, 0.0) + next(sums)
                counts[name] = counts.get(name, 0) + self._counts[names]
        self._sums, self._counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items()}
