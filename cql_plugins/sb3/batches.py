"""A training batch, whatever buffers its rows came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import TensorDict


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        observations: Shape ``(B, ...)`` or a dict of such.
        actions: Shape ``(B, A)``, scaled to ``[-1, 1]``.
        next_observations: As ``observations``.
        dones: 1 where the episode terminated, shape ``(B, 1)``.
        rewards: Shape ``(B, 1)``.
        discounts: ``gamma^k``, shape ``(B, 1)``, or ``None`` for ``gamma``.
        returns_to_go: ``G(s)``, shape ``(B, 1)``, in the units of ``rewards``; ``-inf`` where it is not known (a running
            episode, a tail that is ``none``), ``None`` where the buffers carry none.
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    next_observations: th.Tensor | TensorDict
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    returns_to_go: th.Tensor | None

    def map(self, function: Callable[[th.Tensor], th.Tensor]) -> Batch:
        """Apply a function to each tensor.

        Args:
            function: From a tensor to a tensor.
        """

        def of(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: function(tensor) for key, tensor in value.items()}
            return None if value is None else function(value)

        return Batch(*(of(value) for value in self))

    def tensors(self) -> dict[str, th.Tensor]:
        """Get all tensors by name, those of Dict observations by ``observations.<key>``."""
        tensors: dict[str, th.Tensor] = {}
        for name, value in zip(self._fields, self, strict=True):
            if isinstance(value, dict):
                tensors |= {f"{name}.{key}": tensor for key, tensor in value.items()}
            elif value is not None:
                tensors[name] = value
        return tensors


def concatenate(first: Batch, second: Batch, gamma: float) -> Batch:
    """Join two batches; a field that only one of them has is filled (discounts) or dropped (returns-to-go).

    Args:
        first: Comes first.
        second: Comes second.
        gamma: Discount where a batch has none of its own.
    """
    discounts = returns = None
    if first.discounts is not None or second.discounts is not None:
        filled = [th.full_like(b.rewards, gamma) if b.discounts is None else b.discounts for b in (first, second)]
        discounts = th.cat(filled)
    if first.returns_to_go is not None and second.returns_to_go is not None:
        returns = th.cat((first.returns_to_go, second.returns_to_go))
    return Batch(
        _concatenate_observations(first.observations, second.observations),
        th.cat((first.actions, second.actions)),
        _concatenate_observations(first.next_observations, second.next_observations),
        th.cat((first.dones, second.dones)),
        th.cat((first.rewards, second.rewards)),
        discounts,
        returns,
    )


def _concatenate_observations(first: th.Tensor | TensorDict, second: th.Tensor | TensorDict) -> th.Tensor | TensorDict:
    if isinstance(first, dict):
        assert isinstance(second, dict)
        return {key: th.cat((value, second[key])) for key, value in first.items()}
    assert isinstance(second, th.Tensor)
    return th.cat((first, second))
