"""Episodes of which no transition is lost.

d3rlpy keeps ``T`` observations of an episode of ``T`` steps, so that the last transition of a truncated episode is lost and the
next observation of a terminal one is zeros. Here an episode has the observation after its last step, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from d3rlpy.dataset import BasicTransitionPicker, Episode, EpisodeBase, Signature, Transition, TransitionPickerProtocol
from d3rlpy.types import Float32NDArray, NDArray, ObservationSequence


def map_leaves(function: Callable[[NDArray], Any], observations: ObservationSequence) -> Any:
    """Apply to the array, or to each array of a tuple observation.

    Args:
        function: From an array to anything.
        observations: An array, or several.
    """
    if isinstance(observations, np.ndarray):
        return function(observations)
    return [function(leaf) for leaf in observations]


@dataclasses.dataclass(frozen=True, eq=False)
class CompleteEpisode:
    """An episode of ``T`` steps with all its ``T + 1`` observations: each step is a transition.

    Attributes:
        all_observations: ``T + 1`` rows; a list of arrays for tuple observations.
        actions: ``T`` rows, in the environment's units; shape ``(T, 1)`` for discrete actions.
        rewards: Shape ``(T, 1)``.
        terminated: Whether it ended in a terminal state; else it was truncated.
    """

    all_observations: ObservationSequence
    actions: NDArray
    rewards: Float32NDArray
    terminated: bool

    @property
    def observations(self) -> ObservationSequence:
        """``T`` rows, one for each step, as d3rlpy expects them."""
        return map_leaves(lambda leaf: leaf[: self.size()], self.all_observations)  # type: ignore[no-any-return]

    @property
    def observation_signature(self) -> Signature:
        """Shape and dtype of one observation."""
        return self.padded.observation_signature

    @property
    def action_signature(self) -> Signature:
        """Shape and dtype of one action."""
        return Signature(dtype=[self.actions.dtype], shape=[self.actions.shape[1:]])

    @property
    def reward_signature(self) -> Signature:
        """Shape and dtype of one reward."""
        return Signature(dtype=[self.rewards.dtype], shape=[self.rewards.shape[1:]])

    @property
    def transition_count(self) -> int:
        """``T``, whatever the end."""
        return self.size()

    @property
    def padded(self) -> Episode:
        """d3rlpy's episode with one step more, so that its pickers reach the observation after the last action.

        The last action is repeated and a reward of zero added; the episode is not marked as terminated.
        """
        return Episode(
            observations=self.all_observations,
            actions=np.concatenate([self.actions, self.actions[-1:]]),
            rewards=np.concatenate([self.rewards, np.zeros_like(self.rewards[-1:])]),
            terminated=False,
        )

    def size(self) -> int:
        """Steps of the episode."""
        return len(self.rewards)

    def compute_return(self) -> float:
        """Sum of the rewards."""
        return float(np.sum(self.rewards))

    def serialize(self) -> dict[str, Any]:
        """Get the fields by name; the observations are all ``T + 1``."""
        return {
            "observations": self.all_observations,
            "actions": self.actions,
            "rewards": self.rewards,
            "terminated": self.terminated,
        }

    @classmethod
    def deserialize(cls, serializedData: dict[str, Any]) -> CompleteEpisode:  # noqa: N803 (d3rlpy's name)
        """Undo :meth:`serialize`."""
        return cls(*(serializedData[key] for key in ("observations", "actions", "rewards", "terminated")))

    def __len__(self) -> int:
        return self.size()


class CompleteTransitionPicker(TransitionPickerProtocol):
    """Picks every transition of a :class:`CompleteEpisode`, with its real next observation.

    Other episodes are left to the inner picker, one of d3rlpy's (frame stacking, several steps).

    Args:
        inner: d3rlpy's picker; ``BasicTransitionPicker`` where ``None``.
    """

    def __init__(self, inner: TransitionPickerProtocol | None = None) -> None:
        self.inner = inner or BasicTransitionPicker()

    @property
    def is_basic(self) -> bool:
        """Whether the inner picker is d3rlpy's basic one, so that a batch can be gathered at once."""
        return type(self.inner) is BasicTransitionPicker

    def __call__(self, episode: EpisodeBase, index: int) -> Transition:
        """Pick the transition of step ``index``."""
        if not isinstance(episode, CompleteEpisode):
            return self.inner(episode, index)
        if not episode.terminated:
            transition = self.inner(episode.padded, index)
            return dataclasses.replace(transition, rewards_to_go=transition.rewards_to_go[:-1])
        transition = self.inner(Episode(episode.observations, episode.actions, episode.rewards, True), index)
        if transition.terminal:
            # The target does not look at it, but the penalty asks for the policy there.
            after = self.inner(episode.padded, index)
            transition = dataclasses.replace(transition, next_observation=after.next_observation)
        return transition
