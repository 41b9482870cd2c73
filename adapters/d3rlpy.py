"""Reader and writer for d3rlpy's replay buffers."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._steps import FieldNames, Steps, announce, dataset_from_steps
from cql_plugins.adapters._tree import Array
from cql_plugins.adapters._validation import DatasetError
from cql_plugins.adapters.dataset import OfflineDataset
from cql_plugins.adapters.frames import StackedFrames

if TYPE_CHECKING:
    from d3rlpy.dataset import EpisodeBase, ReplayBufferBase, TrajectorySlicerProtocol, TransitionPickerProtocol

    from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer


# Writing --------------------------------------------------------------------------------------------------------------


def to_d3rlpy(
    dataset: OfflineDataset,
    *,
    transition_picker: "TransitionPickerProtocol | None" = None,
    trajectory_slicer: "TrajectorySlicerProtocol | None" = None,
) -> "OfflineReplayBuffer":
    """Make a d3rlpy replay buffer that has every transition, with its real next observation.

    The arrays are shared, not copied. Actions are in the environment's units, as d3rlpy keeps them, continuous or
    discrete as the space says. Dict observations become d3rlpy's tuples, in the order of the space's keys; images (uint8)
    become channel-first: channel-last ones are transposed, grey ones `(H, W)` get one channel, `(1, H, W)`.

    Args:
        dataset: The data set.
        transition_picker: d3rlpy's picker, for stacked frames or n-step returns; the last steps of truncated episodes
            are picked with it, too.
        trajectory_slicer: d3rlpy's slicer, for its transformers.

    Returns:
        The buffer; it also serves d3rlpy's own algorithms.

    Raises:
        DatasetError: If d3rlpy has no algorithm for such observations or actions, or frames are stacked already.
        ImportError: If d3rlpy is not installed.
    """
    from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer

    source = dataset.name or "OfflineDataset"
    leaves = _leaves(dataset.observations, dataset.observation_space, "observations", source)
    action_space = dataset.action_space
    actions = dataset.actions.reshape(len(dataset), -1)
    if isinstance(action_space, spaces.Box):
        bounds = action_space.low.reshape(-1), action_space.high.reshape(-1)
        discrete, size = False, actions.shape[1]
    else:
        assert isinstance(action_space, spaces.Discrete)
        if action_space.start != 0:
            raise DatasetError(
                f"expected discrete actions from 0 on, as d3rlpy has them; got {action_space}", source=source, field="actions"
            )
        bounds, discrete, size = None, True, int(action_space.n)
    return OfflineReplayBuffer(
        leaves if isinstance(dataset.observation_space, spaces.Dict) else leaves[0],
        actions,
        dataset.rewards,
        dataset.terminations,
        dataset.offsets,
        discrete=discrete,
        action_size=size,
        action_bounds=bounds,
        transition_picker=transition_picker,
        trajectory_slicer=trajectory_slicer,
    )


def _leaves(observations: Any, space: spaces.Space[Any], field: str, source: str) -> list[Array]:
    """List the arrays of (nested) dict observations, each with a row of at least one number."""
    if isinstance(space, spaces.Dict):
        return [
            leaf for key, subspace in space.items() for leaf in _leaves(observations[key], subspace, f"{field}.{key}", source)
        ]
    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"expected numbers, got {space}: d3rlpy has no encoder for integers that are names",
            source=source,
            field=field,
            hint="One-hot encode them",
        )
    if isinstance(observations, StackedFrames):
        k = observations.n_stack
        raise DatasetError(
            f"expected single frames, since d3rlpy stacks them itself; got {observations}",
            source=source,
            field=field,
            hint=f"Pass the data set before stack_frames({k}), with transition_picker=FrameStackTransitionPicker({k}) of "
            "d3rlpy.dataset",
        )
    array: Array = observations
    if array.ndim == 1:
        array = array.reshape(-1, 1)
    if array.ndim == 3 and array.dtype == np.uint8:
        array = array[:, None]
    if array.ndim not in (2, 4):
        warnings.warn(
            f"{source}, field {field!r}: d3rlpy's own encoders take vectors, and images of shape (channels, height, width); "
            f"got observations of shape {array.shape[1:]}. Flatten or reshape them, or train with an encoder factory of your "
            "own.",
            UserWarning,
            stacklevel=3,
        )
    if array.ndim == 4 and array.dtype == np.uint8 and array.shape[3] < min(array.shape[1:3]):
        array = np.moveaxis(array, 3, 1)
    return [array]


# Reading --------------------------------------------------------------------------------------------------------------


def from_d3rlpy(
    replay_buffer: "ReplayBufferBase",
    *,
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
) -> OfflineDataset:
    """Read the episodes of a d3rlpy replay buffer.

    d3rlpy's own episodes lack the observation after a time-out: that transition cannot be used, and a warning says how
    many there were. Ours have it (`to_d3rlpy`, and what `fit_online` of our algorithms collected). A running episode
    counts as truncated. Of a FIFO buffer whole episodes are read, also where their first steps are no longer sampled.
    Images come back channel-first, as d3rlpy has them: grey ones as `(1, H, W)`.

    Args:
        replay_buffer: Any of d3rlpy's, or ours.
        observation_space: Space of one observation; inferred where None: unbounded, and for tuples a Dict with the keys
            "0", "1" and so on.
        action_space: Space of one action; where None a Box of the buffer's own bounds, else of [-1, 1] widened where
            values lie outside, or a Discrete of the buffer's number of actions.
        name: Name for reports, and an id to look reference returns up by.
        env_id: Id of the environment that the data comes from.
        references: Returns of a random and of an expert policy, in place of those looked up.

    Returns:
        The data set, a copy.

    Raises:
        DatasetError: If there is no transition, or values are invalid.
        ImportError: If d3rlpy is not installed.
    """
    from cql_plugins.d3rlpy.buffers import is_discrete

    source = name or type(replay_buffer).__name__
    info = replay_buffer.dataset_info
    discrete = is_discrete(replay_buffer)
    if action_space is None:
        bounds = getattr(replay_buffer, "action_bounds", None)
        if discrete:
            action_space = spaces.Discrete(int(info.action_size))
        elif bounds is not None:
            action_space = spaces.Box(bounds[0], bounds[1], dtype=bounds[0].dtype.type)
    parts, dropped = [], 0
    for episode, is_complete in _episodes(replay_buffer):
        part = _read_episode(episode)
        if part is not None:
            parts.append(part)
        dropped += not is_complete
    if not parts:
        raise DatasetError("expected at least one transition, got none", source=source)
    announce(
        source,
        [
            f"{dropped} transition(s) at the end of truncated episodes were dropped, since d3rlpy does not keep the "
            "observation after them"
        ]
        if dropped
        else [],
        stacklevel=3,
    )
    actions = np.concatenate([part["actions"] for part in parts])
    return dataset_from_steps(
        Steps(
            observations=_stack([part["observations"] for part in parts]),
            actions=actions.reshape(-1) if discrete else actions,
            rewards=np.concatenate([part["rewards"] for part in parts]),
            terminations=np.concatenate([part["terminations"] for part in parts]),
            truncations=np.concatenate([part["truncations"] for part in parts]),
            next_observations=_stack([part["next_observations"] for part in parts]),
            source=source,
            names=FieldNames(),
        ),
        observation_space=observation_space,
        action_space=action_space,
        announce_inferred=False,
        name=name,
        env_id=env_id,
        references=references,
    )


def _episodes(replay_buffer: "ReplayBufferBase") -> "list[tuple[EpisodeBase, bool]]":
    """List the episodes, and whether the observation after their last step is there (or does not matter)."""
    from d3rlpy.dataset import MixedReplayBuffer

    from cql_plugins.d3rlpy.episodes import has_final_observation

    if isinstance(replay_buffer, MixedReplayBuffer):
        return [*_episodes(replay_buffer.primary_replay_buffer), *_episodes(replay_buffer.secondary_replay_buffer)]
    return [(episode, bool(episode.terminated) or has_final_observation(episode)) for episode in replay_buffer.episodes]


def _read_episode(episode: "EpisodeBase") -> dict[str, Any] | None:
    """Get an episode's transitions as step arrays; None where it has none."""
    from cql_plugins.d3rlpy.episodes import as_complete

    complete = as_complete(episode)
    n_steps = complete.size()
    if n_steps == 0:
        return None
    ends = np.zeros(n_steps, dtype=np.bool_)
    ends[-1] = True
    rows = complete.all_observations
    keyed = rows if isinstance(rows, np.ndarray) else {str(i): leaf for i, leaf in enumerate(rows)}
    return {
        "observations": _map(lambda leaf: leaf[:-1], keyed),
        "next_observations": _map(lambda leaf: leaf[1:], keyed),
        "actions": np.asarray(complete.actions),
        "rewards": np.asarray(complete.rewards)[:, 0],
        "terminations": ends & complete.terminated,
        "truncations": ends & (not complete.terminated),
    }


def _map(function: Any, tree: Any) -> Any:
    return {key: function(leaf) for key, leaf in tree.items()} if isinstance(tree, dict) else function(tree)


def _stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)
