"""Reader and writer for Stable-Baselines3 replay buffers."""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins._nested import is_nested
from cql_plugins.adapters._steps import Steps, dataset_from_steps
from cql_plugins.adapters._tree import Array, is_mapped, map_leaves, named_leaves, row_blocks, row_nbytes
from cql_plugins.adapters._validation import DatasetError, require_extra
from cql_plugins.adapters.dataset import OfflineDataset
from cql_plugins.adapters.frames import StackedFrames, has_channels_first, is_image
from cql_plugins.returns import ReturnTail

if TYPE_CHECKING:
    from stable_baselines3.common.buffers import ReplayBuffer

    from cql_plugins.sb3.buffers import ReturnsToGoMixin


def to_sb3(
    dataset: OfflineDataset,
    model_or_env: Any,
    *,
    gamma: float | None = None,
    return_tail: ReturnTail | None = None,
    n_steps: int | None = None,
    device: Any = None,
    share: bool | None = None,
) -> "ReturnsToGoMixin":
    """Fill a replay buffer for a Stable-Baselines3 model or environment.

    The buffer is a subclass of SB3's own (`ReplayBuffer`, `DictReplayBuffer`, or `NStepReplayBuffer` for `n_steps >
    1`), full, with one environment, and as SB3 fills it: actions scaled to [-1, 1] by the bounds of the model's action
    space, raw observations, `dones` at every end of an episode and `timeouts` at truncated ones. Channel-last images
    are transposed where the model has them channel-first. Nested dict observations are flattened, each leaf under a key
    like "desired_goal/microwave", for a model or environment that is not nested (see `FlattenNestedObservation`).

    Where the model was given SB3's `HerReplayBuffer` (or a subclass) the buffer is one, with the model's own
    `replay_buffer_kwargs` and its environment for `compute_reward`: goals are relabelled when batches are sampled, and
    relabelled transitions have the returns-to-go of their relabelled rewards.

    With `share` the observations stay where they are, in the data set's memory or file, and each batch is gathered from
    there: the same samples at less than half the memory, from a buffer that does not grow. Single frames are stacked,
    as SB3's `VecFrameStack` does it, where the model has a multiple of their channels.

    Action values outside the bounds are clipped, and counted in one warning. Where bounds are exactly -1 and 1 the
    values are copied as they are, since SB3's scaling formula would round them.

    Args:
        dataset: The data set.
        model_or_env: A model (its `gamma`, `n_steps`, `return_tail` and `device` are the defaults here), or a Gymnasium
            or SB3 environment, vectorised or not.
        gamma: Discount factor of the returns-to-go and of n-step returns; 0.99 where the model does not say.
        return_tail: What follows a truncated end, see `OfflineDataset.returns_to_go`; "zero" where the model does not
            say. With "bootstrap" all returns are -inf until the algorithm estimates them.
        n_steps: Steps of n-step returns; 1 where the model does not say.
        device: Device that samples go to; "auto" where the model does not say.
        share: Whether to share the observations instead of copying them; where None they are if some of them are images
            (bytes), stacked frames or in a file.

    Returns:
        The buffer, with `returns_to_go` of shape `(len(dataset), 1)`.

    Raises:
        DatasetError: If the data set does not fit the spaces, which are both printed, or SB3 has no buffer for them, or
            no networks (integers that do not start at 0); for a model with hindsight, if there is no `compute_reward`,
            or if it does not give the data set's rewards.
        ImportError: If Stable-Baselines3 is not installed.
    """
    base = _buffer_base(dataset, model_or_env, n_steps := _setting(n_steps, model_or_env, "n_steps", 1))
    from cql_plugins.sb3.buffers import returns_to_go_buffer_class
    from cql_plugins.sb3.shared_buffer import shared_buffer_class

    observation_space, action_space = _spaces_of(model_or_env)
    if not is_nested(observation_space):
        dataset = dataset.flatten_observations()
    dataset = _stacked_to_fit(dataset, observation_space)
    hindsight = _hindsight_arguments(dataset, model_or_env) if _is_hindsight(base) else {}
    _check_fit(dataset, observation_space, action_space)
    gamma = float(_setting(gamma, model_or_env, "gamma", 0.99))
    tail = _setting(return_tail, model_or_env, "return_tail", "zero")
    # Before the buffer takes its memory: summing returns needs room of its own.
    returns = None if tail == "bootstrap" else dataset.returns_to_go(gamma, tail)
    options: dict[str, Any] = {"n_steps": n_steps, "gamma": gamma} if n_steps > 1 else {}
    if share is None:
        share = not hindsight and any(_is_worth_sharing(leaf) for _, leaf in named_leaves(dataset.observations, ""))
    if share:
        base = shared_buffer_class(base)
        options |= {"shared_observations": dataset.observations, "offsets": dataset.offsets}
    buffer = returns_to_go_buffer_class(base)(
        len(dataset),
        observation_space,
        action_space,
        device=_setting(device, model_or_env, "device", "auto"),
        n_envs=1,
        **options,
        **hindsight,
    )
    buffer.configure_returns(gamma, tail)
    if hindsight and not hasattr(model_or_env, "return_tail"):
        setattr(buffer, "sums_relabelled_rewards", False)  # noqa: B010 (HER's alone) CQL does not look at returns.
    if not share:
        _write_observations(dataset, buffer, observation_space)
    _write_actions(dataset, buffer, action_space)
    np.copyto(buffer.rewards[:, 0], dataset.rewards, casting="same_kind")
    np.logical_or(dataset.terminations, dataset.truncations, out=buffer.dones[:, 0], casting="unsafe")
    np.copyto(buffer.timeouts[:, 0], dataset.truncations)
    buffer.returns_to_go[:, 0] = -np.inf if returns is None else returns
    buffer.mark_full()
    if hindsight and (problem := buffer.reward_mismatch()):  # type: ignore[attr-defined]
        raise DatasetError(problem, source=dataset.name or "OfflineDataset", field="rewards")
    return buffer


def _setting(given: Any, model: Any, attribute: str, default: Any) -> Any:
    """Return what was given, else what the model has, else the default."""
    if given is not None:
        return given
    value = getattr(model, attribute, None) if hasattr(model, "policy") or hasattr(model, "replay_buffer") else None
    return default if value is None else value


def _spaces_of(model_or_env: Any) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Return the spaces of one environment; a Gymnasium vector environment has those of the batch beside them."""
    found = []
    for kind in ("observation_space", "action_space"):
        space = getattr(model_or_env, f"single_{kind}", None) or getattr(model_or_env, kind, None)
        if not isinstance(space, spaces.Space):
            raise DatasetError(
                f"expected a Stable-Baselines3 model or an environment, got {type(model_or_env).__name__} without {kind}"
            )
        found.append(space)
    return found[0], found[1]


def _buffer_base(dataset: OfflineDataset, model_or_env: Any, n_steps: int) -> "type[ReplayBuffer]":
    try:
        from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
    except ImportError as error:
        raise require_extra("stable_baselines3", None, error) from error

    if isinstance(dataset.observation_space, spaces.Dict):
        if n_steps > 1:
            raise DatasetError(
                f"Stable-Baselines3 has no n-step buffer for dict observations, got n_steps={n_steps}",
                hint="Use n_steps=1",
            )
        own = getattr(model_or_env, "replay_buffer_class", None)
        return own if own is not None and _is_hindsight(own) else DictReplayBuffer
    return NStepReplayBuffer if n_steps > 1 else ReplayBuffer


def _is_worth_sharing(leaf: Any) -> bool:
    """Tell whether copies of these observations would cost much memory."""
    return isinstance(leaf, StackedFrames) or is_mapped(leaf) or (leaf.dtype == np.uint8 and leaf.ndim >= 3)


def _is_hindsight(base: Any) -> bool:
    from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

    return issubclass(base, HerReplayBuffer)


def _hindsight_arguments(dataset: OfflineDataset, model: Any) -> dict[str, Any]:
    """Collect what a hindsight buffer needs beside spaces: the model's options, and its environment for the rewards."""
    source = dataset.name or "OfflineDataset"
    if missing := {"observation", "achieved_goal", "desired_goal"} - set(dataset.observation_space):  # type: ignore[call-overload]
        raise DatasetError(
            f"hindsight relabelling (HerReplayBuffer) needs the keys observation, achieved_goal and desired_goal at the top "
            f"level; {sorted(missing)} are missing in {dataset.observation_space}",
            source=source,
            field="observations",
            hint="Build the model without replay_buffer_class=HerReplayBuffer to train on these observations as they are",
        )
    if model.env is None or not model.env.has_attr("compute_reward"):
        raise DatasetError(
            "hindsight relabelling (HerReplayBuffer) needs an environment with compute_reward(achieved_goal, desired_goal, "
            f"info); the model has {'no environment' if model.env is None else model.env}",
            source=source,
            hint="Give the model the goal environment, or build it without replay_buffer_class=HerReplayBuffer",
        )
    # The log has no infos to copy.
    return {**model.replay_buffer_kwargs, "env": model.env, "copy_info_dict": False}


# Fit ------------------------------------------------------------------------------------------------------------------


def _check_fit(dataset: OfflineDataset, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    for field, own, target in (
        ("observation_space", dataset.observation_space, observation_space),
        ("action_space", dataset.action_space, action_space),
    ):
        inferred = field in dataset.inferred_spaces
        problem = (
            _misfit(own, target, inferred)
            or (_degenerate_bounds(target) if field == "action_space" else _nested(target) or _scalar(target))
            or _shifted(target)
        )
        if problem:
            raise DatasetError(
                f"the data set does not fit: {problem}. Data set{' (inferred)' if inferred else ''}: {own}. "
                f"Model or environment: {target}",
                source=dataset.name or "OfflineDataset",
                field=field,
            )


def _stacked_to_fit(dataset: OfflineDataset, target: spaces.Space[Any]) -> OfflineDataset:
    """Stack single frames where `target` has a multiple of their channels; whether the rest fits is checked later."""
    own = dataset.observation_space
    if not isinstance(own, spaces.Dict):
        k = _frames_to_stack(own, target)
        return dataset.stack_frames(k) if k > 1 else dataset
    if isinstance(target, spaces.Dict):
        for key in set(own) & set(target):
            k = _frames_to_stack(own[key], target[key])
            if k > 1:
                dataset = dataset.stack_frames(k, keys=[key])
    return dataset


def _frames_to_stack(own: spaces.Space[Any], target: spaces.Space[Any]) -> int:
    """How many images of the space `own` are one of `target`; 1 where they do not fit at all."""
    if not (is_image(own) and is_image(target)) or own.shape == target.shape:
        return 1
    frame, stacked = own.shape or (), target.shape or ()
    grey = len(frame) == 2
    if grey or has_channels_first(frame):
        channels, sides = (1, frame) if grey else (frame[0], frame[1:])
        found = stacked[0] if len(stacked) == 3 and stacked[1:] == sides else 0
    else:
        channels, sides = frame[2], frame[:2]
        last, first = (len(stacked) == 3 and part == sides for part in (stacked[:2], stacked[1:]))
        found = stacked[2] if last else stacked[0] if first else 0
    return found // channels if found and found % channels == 0 else 1


def _misfit(own: spaces.Space[Any], target: spaces.Space[Any], inferred: bool) -> str | None:
    """Say why data of the space `own` cannot be used where `target` is expected; None if it can."""
    if isinstance(own, spaces.Dict) and isinstance(target, spaces.Dict):
        if set(own.spaces) != set(target.spaces):
            return f"keys {sorted(own.spaces)} are not {sorted(target.spaces)}"
        problems = [(key, _misfit(own[key], target[key], inferred)) for key in own.spaces]
        return next((f"at key '{key}', {problem}" for key, problem in problems if problem), None)
    if isinstance(own, spaces.Discrete) and isinstance(target, spaces.Discrete):
        same = own.start == target.start and (own.n <= target.n if inferred else own.n == target.n)
        return None if same else "the ranges of integers differ"
    if isinstance(own, spaces.Box) and isinstance(target, spaces.Box):
        return _box_misfit(own, target, inferred)
    return f"{type(own).__name__} is not {type(target).__name__}"


def _box_misfit(own: spaces.Box, target: spaces.Box, inferred: bool) -> str | None:
    kinds = np.dtype(own.dtype).kind, np.dtype(target.dtype).kind
    if kinds[0] != kinds[1] or (kinds[0] != "f" and own.dtype != target.dtype):
        return f"dtype {own.dtype} is not {target.dtype}"
    if own.shape != target.shape and not _is_transposed(own, target):
        return f"shape {own.shape} is not {target.shape}"
    if inferred or own.shape != target.shape:
        return None
    for side in ("low", "high"):
        ours, theirs = getattr(own, side).astype(np.float64), getattr(target, side).astype(np.float64)
        # Many environments declare no bounds for what does have some, so a missing bound contradicts nothing.
        both = np.isfinite(ours) & np.isfinite(theirs)
        if not np.allclose(ours[both], theirs[both], rtol=1e-5, atol=1e-6):
            return f"the bounds '{side}' differ, so the values are in other units"
    return None


def _is_transposed(own: spaces.Box, target: spaces.Box) -> bool:
    """Tell whether `target` is the channel-first form of channel-last images."""
    if own.dtype != np.uint8 or len(own.shape) != 3 or own.shape == target.shape:
        return False
    return target.shape == (own.shape[2], *own.shape[:2])


def _nested(space: spaces.Space[Any]) -> str | None:
    nested = isinstance(space, spaces.Dict) and any(isinstance(s, spaces.Dict | spaces.Tuple) for s in space.values())
    return (
        "Stable-Baselines3 has no buffer for nested dict observations, wrap the environment in "
        "cql_plugins.sb3.FlattenNestedObservation"
        if nested
        else None
    )


def _scalar(space: spaces.Space[Any]) -> str | None:
    """Find single numbers without an axis: SB3's buffers store them, and fail when they are sampled."""
    if isinstance(space, spaces.Dict):
        return next((f"at key '{key}', {problem}" for key, sub in space.items() if (problem := _scalar(sub))), None)
    if isinstance(space, spaces.Box) and space.shape == ():
        return (
            "Stable-Baselines3 cannot sample observations of shape (). Give them the shape (1,) in the data, and in the "
            "environment by a wrapper"
        )
    return None


def _degenerate_bounds(space: spaces.Space[Any]) -> str | None:
    if isinstance(space, spaces.Box):
        span = space.high.astype(np.float64) - space.low
        if not np.all(np.isfinite(span) & (span > 0)):
            return "actions cannot be scaled without finite bounds, low below high"
    return None


def _shifted(space: spaces.Space[Any]) -> str | None:
    """Find integers that do not start at 0: SB3's networks have a column for each of 0 to n - 1."""
    if isinstance(space, spaces.Dict):
        return next((f"at key '{key}', {problem}" for key, sub in space.items() if (problem := _shifted(sub))), None)
    if isinstance(space, spaces.Discrete) and space.start != 0:
        return (
            f"Stable-Baselines3 has integers from 0 on, these start at {space.start}. Subtract {space.start} in the data, and "
            "in the environment by a wrapper"
        )
    return None


# Writing --------------------------------------------------------------------------------------------------------------


def _write_observations(dataset: OfflineDataset, buffer: Any, space: spaces.Space[Any]) -> None:
    current, following = buffer.observations, buffer.next_observations
    if isinstance(space, spaces.Dict):
        pairs = [(dataset.observations[key], current[key], following[key]) for key in space.spaces]
    else:
        pairs = [(dataset.observations, current, following)]
    for source, target, next_target in pairs:
        transposed = source.ndim == 4 and source.shape[1:] != target.shape[2:]
        for start, stop in row_blocks(len(dataset), row_nbytes(source)):
            rows = dataset.observation_rows(np.arange(start, stop))
            for column in (target, next_target):
                block = np.moveaxis(source[rows], 3, 1) if transposed else source[rows]
                # Discrete observations are kept with a trailing axis of one.
                column[start:stop, 0] = block.reshape(len(rows), *column.shape[2:])
                rows += 1


def _write_actions(dataset: OfflineDataset, buffer: Any, space: spaces.Space[Any]) -> None:
    source = dataset.actions.reshape(len(dataset), -1)
    target = buffer.actions[:, 0]
    if not isinstance(space, spaces.Box):
        target[...] = source
        return
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
    as_they_are = bool(np.all(low == -1) and np.all(high == 1))
    clipped_rows = clipped_values = 0
    for start, stop in row_blocks(len(source), 2 * row_nbytes(source)):
        block = target[start:stop]
        block[...] = source[start:stop] if as_they_are else 2.0 * ((source[start:stop] - low) / (high - low)) - 1.0
        # At the buffer's precision, so that a bound that was rounded is not taken for a value outside.
        if block.max() > 1.0 or block.min() < -1.0:
            outside = np.abs(block) > 1.0
            clipped_values += int(outside.sum())
            clipped_rows += int(outside.any(axis=1).sum())
            np.clip(block, -1.0, 1.0, out=block)
    if clipped_values:
        warnings.warn(
            f"{dataset.name or 'OfflineDataset'}: {clipped_values} action value(s) in {clipped_rows} of {len(dataset)} "
            f"transitions lie outside {space} and were clipped.",
            UserWarning,
            stacklevel=3,
        )


# Reading --------------------------------------------------------------------------------------------------------------


def from_sb3(
    replay_buffer: "ReplayBuffer",
    *,
    name: str | None = None,
    env_id: str | None = None,
    references: tuple[float, float] | None = None,
) -> OfflineDataset:
    """Read what a Stable-Baselines3 replay buffer holds, with any number of environments.

    Environments follow one another, each from its oldest step to its newest; actions are scaled back from [-1, 1] to
    the action space. An episode that is still running, and one that was broken off by a reset, count as truncated; a
    warning says how many. An oldest episode whose first steps were overwritten starts where the buffer does.

    With `optimize_memory_usage=True` SB3 does not keep the observation after the newest step of an ended episode, and
    does not tell time-outs from terminations: every end is then a termination, as it is for SB3 itself.

    Args:
        replay_buffer: A `ReplayBuffer`, `DictReplayBuffer` or subclass, also one made by `to_sb3`.
        name: Name for reports, and an id to look reference returns up by.
        env_id: Id of the environment that the data comes from.
        references: Returns of a random and of an expert policy, in place of those looked up.

    Returns:
        The data set, a copy.

    Raises:
        DatasetError: If the buffer is empty or holds invalid values.
    """
    source = name or type(replay_buffer).__name__
    if not replay_buffer.size():
        raise DatasetError("expected at least one step, got an empty buffer", source=source)
    overlapping = bool(getattr(replay_buffer, "optimize_memory_usage", False))
    rows = _rows_in_order(replay_buffer, overlapping)
    observation_space, action_space = replay_buffer.observation_space, replay_buffer.action_space

    def column(array: Array) -> Array:
        """Stack the environments on top of each other."""
        picked = array[rows].swapaxes(0, 1)
        return np.ascontiguousarray(picked).reshape(-1, *array.shape[2:])

    dones, timeouts = (column(flags) != 0 for flags in (replay_buffer.dones, replay_buffer.timeouts))
    n_envs = int(replay_buffer.n_envs)
    steps = Steps(
        observations=_in_space_shape(_map(column, replay_buffer.observations), observation_space),
        actions=_unscale(column(replay_buffer.actions), action_space),
        rewards=column(replay_buffer.rewards),
        terminations=dones & ~timeouts,
        truncations=dones & timeouts,
        next_observations=None
        if overlapping
        else _in_space_shape(_map(column, replay_buffer.next_observations), observation_space),
        segment_ends=len(rows) * np.arange(1, n_envs + 1) - 1,
        source=source,
    )
    return dataset_from_steps(
        steps,
        observation_space=observation_space,
        action_space=action_space,
        name=name,
        env_id=env_id,
        references=references,
    )


def _rows_in_order(replay_buffer: Any, overlapping: bool) -> npt.NDArray[np.int64]:
    """Rows from the oldest to the newest."""
    if not replay_buffer.full:
        return np.arange(replay_buffer.pos)
    rows: npt.NDArray[np.int64] = np.roll(np.arange(replay_buffer.buffer_size), -replay_buffer.pos)
    # With one array for both, the observation of the oldest step was overwritten by the one after the newest.
    return rows[1:] if overlapping else rows


def _map(function: Any, tree: Any) -> Any:
    return map_leaves(function, dict(tree) if isinstance(tree, dict) else tree)


def _in_space_shape(values: Any, space: spaces.Space[Any]) -> Any:
    """Undo the trailing axis that SB3 gives to Discrete observations."""
    if isinstance(space, spaces.Dict):
        return {key: _in_space_shape(values[key], subspace) for key, subspace in space.spaces.items()}
    return values.reshape(len(values), *(space.shape or ()))


def _unscale(actions: Array, space: spaces.Space[Any]) -> Array:
    """Bring actions back from [-1, 1] to the space; integers back from however they were stored."""
    shaped = actions.reshape(len(actions), *(space.shape or ()))
    if not isinstance(space, spaces.Box):
        integers: Array = np.rint(shaped).astype(space.dtype or np.int64)
        return integers
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.all(low == -1) and np.all(high == 1)):
        shaped = np.clip(low + 0.5 * (shaped + 1.0) * (high - low), low, high)
    return (np.rint(shaped) if np.dtype(space.dtype).kind in "iu" else shaped).astype(space.dtype)
