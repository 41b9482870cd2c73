"""Mini-batches that bring a function for their returns-to-go.

Returns-to-go depend on the discount factor, the reward scaler and the tail, which belong to the algorithm. A batch therefore
looks them up; the buffer it came from sums each episode once for each of these settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from d3rlpy.dataset import Transition, TransitionMiniBatch
from d3rlpy.preprocessing import RewardScaler
from d3rlpy.types import Float32NDArray, NDArray

from cql_plugins.returns import ReturnTail, returns_to_go


@dataclasses.dataclass(frozen=True, eq=False)
class TailValues:
    """Values after truncated ends, for ``return_tail="bootstrap"``; a new object stands for a new estimate.

    Attributes:
        function: From ``n`` observations (array, or list of arrays) to their values ``(n,)``, in the units of scaled rewards.
    """

    function: Callable[[Any], NDArray]


@dataclasses.dataclass(frozen=True, eq=False)
class ReturnsSettings:
    """How returns are summed.

    Attributes:
        gamma: Discount factor of the training.
        tail: What follows a truncated end, see :data:`cql_plugins.returns.ReturnTail`.
        reward_scaler: Applied to the rewards first, since returns are those of the rewards trained on.
        failure_reward: Scaled reward of a step without success, for the ``sparse`` tail; the smallest stored where ``None``.
        tail_values: For the ``bootstrap`` tail; ``None`` before the first estimate, and the bound is then off.
    """

    gamma: float
    tail: ReturnTail = "zero"
    reward_scaler: RewardScaler | None = None
    failure_reward: float | None = None
    tail_values: TailValues | None = None

    def is_same(self, other: ReturnsSettings | None) -> bool:
        """Tell whether both give the same sums."""
        return (
            other is not None
            and (self.gamma, self.tail, self.failure_reward) == (other.gamma, other.tail, other.failure_reward)
            and self.reward_scaler is other.reward_scaler
            and self.tail_values is other.tail_values
        )

    def scale(self, rewards: NDArray) -> NDArray:
        """Scale rewards, shape ``(n,)``, as the algorithm does."""
        if self.reward_scaler is None:
            return rewards
        return np.asarray(self.reward_scaler.transform_numpy(rewards.reshape(-1, 1))).reshape(-1)

    def sum(
        self, rewards: NDArray, terminations: NDArray, truncations: NDArray, final_observations: Callable[[], Any]
    ) -> NDArray:
        """Sum scaled rewards within each episode, shape ``(n,)``; ``-inf`` where the return is not known."""
        tail, values = self.tail, None
        if tail == "bootstrap":
            if self.tail_values is None:
                tail = "none"
            elif truncations.any():
                values = self.tail_values.function(final_observations())
        return returns_to_go(
            rewards, terminations, truncations, self.gamma, tail, failure_reward=self.failure_reward, tail_values=values
        )


ReturnsLookup = Callable[[ReturnsSettings], Float32NDArray]


@dataclasses.dataclass(frozen=True)
class ReturnsToGoMiniBatch(TransitionMiniBatch):
    """d3rlpy's mini-batch whose returns-to-go can be looked up.

    Attributes:
        lookup: From settings to ``G(s)``, shape ``(B,)``.
        place_of: From a row of the batch to where its transition is stored, in words.
    """

    lookup: ReturnsLookup
    place_of: Callable[[int], str]

    def returns_to_go(self, settings: ReturnsSettings) -> Float32NDArray:
        """Look up ``G(s)`` of each transition, shape ``(B, 1)``, float32; ``-inf`` where it is not known."""
        return self.lookup(settings).astype(np.float32, copy=False).reshape(-1, 1)


def with_lookup(batch: TransitionMiniBatch, lookup: ReturnsLookup, place_of: Callable[[int], str]) -> ReturnsToGoMiniBatch:
    """Give d3rlpy's mini-batch its returns-to-go.

    Args:
        batch: The batch.
        lookup: From settings to ``G(s)``, shape ``(B,)``.
        place_of: From a row of the batch to where its transition is stored, in words.
    """
    own = {field.name: getattr(batch, field.name) for field in dataclasses.fields(TransitionMiniBatch)}
    return ReturnsToGoMiniBatch(**own, lookup=lookup, place_of=place_of)


class LazyTransitions(Sequence[Transition]):
    """The transitions of a batch, picked only if something asks for them one by one.

    Args:
        pick: From a row to its transition.
        rows: The rows.
    """

    def __init__(self, pick: Callable[[int], Transition], rows: Sequence[int] | NDArray) -> None:
        self._pick, self._rows = pick, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Transition: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Transition]: ...
    def __getitem__(self, index: int | slice) -> Transition | Sequence[Transition]:
        if isinstance(index, slice):
            return LazyTransitions(self._pick, self._rows[index])
        return self._pick(int(self._rows[index]))


def join_batches(parts: Sequence[ReturnsToGoMiniBatch]) -> ReturnsToGoMiniBatch:
    """Put batches one after another.

    Args:
        parts: The batches, at least one.
    """

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], np.ndarray):
            return np.concatenate(values)
        return [np.concatenate(leaves) for leaves in zip(*values, strict=True)]

    def part_of(row: int) -> tuple[ReturnsToGoMiniBatch, int]:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[part], row - int(starts[part])

    def pick(row: int) -> Transition:
        part, own_row = part_of(row)
        return part.transitions[own_row]

    def place_of(row: int) -> str:
        part, own_row = part_of(row)
        return part.place_of(own_row)

    starts = np.cumsum([0, *(len(part.transitions) for part in parts)])
    names = [field.name for field in dataclasses.fields(TransitionMiniBatch) if field.name != "transitions"]
    return ReturnsToGoMiniBatch(
        **{name: joined(name) for name in names},
        transitions=LazyTransitions(pick, range(int(starts[-1]))),
        lookup=lambda settings: np.concatenate([part.lookup(settings) for part in parts]),
        place_of=place_of,
    )
