"""Episodes of which no transition is lost.

d3rlpy keeps ``T`` observations of an episode of ``T`` steps, so that the last transition of a truncated episode is lost and the
next observation of a terminal one is zeros. Here an episode has the observation after its last step, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    EpisodeBase,
    FrameStackTransitionPicker,
    MultiStepTransitionPicker,
    Transition,
    TransitionPickerProtocol,
)
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
class _Fields:
    """What a complete episode stores, in the place of what d3rlpy's stores."""

    all_observations: ObservationSequence
    actions: NDArray
    rewards: Float32NDArray
    terminated: bool
    cut: bool = False


class CompleteEpisode(_Fields, Episode):
    """An episode of ``T`` steps with all its ``T + 1`` observations: each step is a transition.

    Attributes:
        all_observations: ``T + 1`` rows; a list of arrays for tuple observations.
        actions: ``T`` rows, in the environment's units; shape ``(T, 1)`` for discrete actions.
        rewards: Shape ``(T, 1)``.
        terminated: Whether it ended in a terminal state; else it was truncated.
        cut: Whether it was merely broken off, at the end of training for instance: its returns are not known.
    """

    __eq__ = object.__eq__  # d3rlpy's compares arrays as if they were numbers
    __hash__ = object.__hash__

    @property
    def observations(self) -> ObservationSequence:
        """``T`` rows, one for each step, as d3rlpy expects them."""
        return map_leaves(lambda leaf: leaf[: self.size()], self.all_observations)  # type: ignore[no-any-return]

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

    def serialize(self) -> dict[str, Any]:
        """Get the fields by name; the observations are all ``T + 1``."""
        return super().serialize() | {"observations": self.all_observations, "cut": self.cut}

    @classmethod
    def deserialize(cls, serializedData: dict[str, Any]) -> CompleteEpisode:  # noqa: N803 (d3rlpy's name)
        """Undo :meth:`serialize`."""
        return cls(*(serializedData[key] for key in ("observations", "actions", "rewards", "terminated", "cut")))


@dataclasses.dataclass(frozen=True, eq=False)
class EpisodeEnd:
    """How an episode that d3rlpy's writer collected has ended.

    It is kept on d3rlpy's own episode, so that every buffer, picker and reader that meets the episode knows it.

    Attributes:
        cut: Whether it was broken off rather than ended: its returns stay unknown.
        padded: Whether its last row was added for the observation after the last action of a truncated episode.
        final_observation: The observation after a terminal step, as it would be stored; ``None`` where it is not known.
    """

    cut: bool = False
    padded: bool = False
    final_observation: Any = None


def mark_end(episode: EpisodeBase, end: EpisodeEnd) -> None:
    """Note on an episode of d3rlpy's writer how it ended.

    Args:
        episode: The episode; written to.
        end: Its end.
    """
    object.__setattr__(episode, "_cql_plugins_end", end)  # d3rlpy's plain episodes are frozen


def end_of(episode: EpisodeBase) -> EpisodeEnd:
    """What is known of an episode's end.

    Args:
        episode: Any.
    """
    return getattr(episode, "_cql_plugins_end", EpisodeEnd(cut=isinstance(episode, CompleteEpisode) and episode.cut))


def has_final_observation(episode: EpisodeBase) -> bool:
    """Tell whether the observation after the last step is known.

    Args:
        episode: Any.
    """
    end = end_of(episode)
    return isinstance(episode, CompleteEpisode) or end.padded or end.final_observation is not None


def as_complete(episode: EpisodeBase) -> CompleteEpisode:
    """Read any episode as one whose every step is a transition.

    Where the observation after the last step is not known, a terminal step gets its own again (no target looks at it), and a
    truncated episode ends one step earlier.

    Args:
        episode: Any.
    """
    if isinstance(episode, CompleteEpisode):
        return episode
    end = end_of(episode)
    observations, actions, rewards = episode.observations, episode.actions, episode.rewards
    if episode.terminated:
        final = end.final_observation
        if final is None:
            final = map_leaves(lambda leaf: leaf[-1], observations)
        if isinstance(observations, np.ndarray):
            observations = np.concatenate([observations, np.asarray(final)[None]])
        else:
            observations = [
                np.concatenate([leaf, np.asarray(last)[None]]) for leaf, last in zip(observations, final, strict=True)
            ]
    else:
        actions, rewards = actions[:-1], rewards[:-1]
    return CompleteEpisode(observations, actions, rewards, bool(episode.terminated), end.cut)


class CompleteTransitionPicker(TransitionPickerProtocol):
    """Picks every transition of an episode whose last observation is known, with its real next observation.

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
        if not has_final_observation(episode):
            return self.inner(episode, index)
        if episode.terminated:
            transition = self.inner(_of_steps_alone(episode), index)
            if transition.terminal:
                # The target does not look at it, but the penalty asks for the policy there.
                after = self.inner(as_complete(episode).padded, index)
                transition = dataclasses.replace(transition, next_observation=after.next_observation)
            return transition
        complete = as_complete(episode)
        transition = self.inner(complete.padded, index)
        if type(self.inner) in _PICKERS_OF_PLAIN_REWARDS:
            return dataclasses.replace(transition, rewards_to_go=transition.rewards_to_go[:-1])
        # Another picker may judge the rewards; it must not see the one that was added.
        judged = self.inner(_of_steps_alone(complete), index)
        return dataclasses.replace(transition, rewards_to_go=judged.rewards_to_go)


_PICKERS_OF_PLAIN_REWARDS = (BasicTransitionPicker, FrameStackTransitionPicker, MultiStepTransitionPicker)
"""Those whose ``rewards_to_go`` are the episode's rewards from the step on."""


def _of_steps_alone(episode: EpisodeBase) -> Episode:
    """d3rlpy's episode of the steps, with a terminal end, so that d3rlpy's pickers reach all of them."""
    return Episode(episode.observations, episode.actions, episode.rewards, terminated=True)
