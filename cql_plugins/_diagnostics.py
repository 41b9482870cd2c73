"""Figures that say whether a critic is right and conservative; both rooms fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ValueBias:
    """What the critic predicts for the actions that the policy took, and what they brought [CQL, Table 4].

    Attributes:
        predicted: Mean of ``Q(s, a)``, in the units of the rewards that the model was trained on.
        actual: Mean discounted return from there on.
        entropy: Mean of the discounted entropy bonus that the predicted values include: 0 unless the critic's target has one.
            It is that of today's policy and coefficient, which a critic contains once it has settled. Until then, as in SAC's
            first thousands of steps, it can be many times what the critic has learnt, and ``bias`` far off: compare
            ``predicted`` with ``actual`` there.
        std_error: Of ``bias``, over episodes; NaN where there was one.
        tail: The largest weight ``gamma^k`` that what follows a time-out would have had in ``actual``, where nothing follows.
            With gamma 0.99 it is 0.37 after 100 steps and 4e-5 after 1,000: evaluate in an environment with a longer time
            limit where it is not small.
        returns: Undiscounted return of each episode, before any normalisation of rewards where the environment has a monitor.
    """

    predicted: float
    actual: float
    entropy: float
    std_error: float
    tail: float
    returns: tuple[float, ...]

    @classmethod
    def of(
        cls,
        predicted: npt.ArrayLike,
        rewards: Sequence[npt.ArrayLike],
        truncated: Sequence[bool],
        gamma: float,
        *,
        entropy: npt.ArrayLike = 0.0,
        returns: Sequence[float] | None = None,
    ) -> ValueBias:
        """Discount the rewards of some episodes and compare.

        Args:
            predicted: Value of each episode's first action, shape ``(n,)``.
            rewards: Of each episode, shape ``(steps,)``.
            truncated: Whether a time-out ended it.
            gamma: Discount.
            entropy: Discounted entropy bonus in each value, shape ``(n,)``.
            returns: Undiscounted returns, where they are not the sums of ``rewards``.
        """
        columns = [np.asarray(column, np.float64) for column in rewards]
        weights = [gamma ** np.arange(len(column) + 1) for column in columns]
        actual = np.array([np.dot(column, weight[:-1]) for column, weight in zip(columns, weights, strict=True)])
        predicted, n = np.asarray(predicted, np.float64), len(actual)
        entropy = np.broadcast_to(np.asarray(entropy, np.float64), n)
        tails = [weight[-1] for weight, cut in zip(weights, truncated, strict=True) if cut]
        return cls(
            predicted=float(predicted.mean()),
            actual=float(actual.mean()),
            entropy=float(entropy.mean()),
            std_error=float((predicted - actual - entropy).std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
            tail=float(max(tails, default=0.0)),
            returns=tuple(float(column.sum()) for column in columns) if returns is None else tuple(returns),
        )

    @property
    def bias(self) -> float:
        """Predicted minus actual: above 0 the critic over-estimates its own policy, below 0 it is conservative."""
        return self.predicted - self.actual - self.entropy


@dataclass(frozen=True)
class GapExpansion:
    """Values of the data's actions, the policy's and uniform ones in the data's states [CQL, Figure 2].

    Attributes:
        q_data: Mean of ``Q(s, a)`` over transitions of the data.
        q_policy: Mean of ``Q(s, a)``, ``a`` drawn from the policy; with discrete actions the best one.
        q_random: Mean of ``Q(s, a)``, ``a`` uniform over the action space.
        q_random_max: Mean of the largest of ``n_actions`` uniform ones' values; with discrete actions the largest of all.
    """

    q_data: float
    q_policy: float
    q_random: float
    q_random_max: float

    @property
    def gap(self) -> float:
        """How far uniform actions are below the data's: it grows while a conservative critic learns."""
        return self.q_data - self.q_random

    @property
    def delta(self) -> float:
        """The paper's figure: how far the best of some uniform actions is above the data's. Below 0 where the gap is wide."""
        return self.q_random_max - self.q_data


def batches(total: int, largest: int) -> list[int]:
    """Split a number of rows into batches of at most ``largest``."""
    return [min(largest, total - start) for start in range(0, total, largest)]


def require_positive(**numbers: int) -> None:
    """Refuse arguments below 1 by their names.

    Raises:
        ValueError: For the first of them.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}.")


__all__ = ["GapExpansion", "ValueBias", "batches", "require_positive"]
