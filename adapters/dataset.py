"""`OfflineDataset`, the one type that readers produce and writers consume."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins._nested import flatten_space, flatten_tree, is_nested
from cql_plugins.adapters._tree import Array, Observations, map_leaves, named_leaves, read_only
from cql_plugins.adapters._validation import (
    DatasetError,
    Flags,
    Where,
    check_flags,
    check_rewards,
    check_structure,
    check_supported_space,
    check_tree,
    resolve_both_flags,
)
from cql_plugins.adapters.frames import Padding, StackedFrames, is_image, stack, stacked_space, unstack
from cql_plugins.adapters.scores import normalized_score, reference_scores
from cql_plugins.returns import ReturnTail, returns_to_go

if TYPE_CHECKING:
    from cql_plugins.adapters.report import DatasetSummary


@dataclass(frozen=True, eq=False, slots=True)
class Episode:
    """One episode of `T` steps, as read-only views of the data set's arrays.

    Attributes:
        observations: `T + 1` observations, the last one being what followed the last action; array or (nested) dict.
        actions: `T` actions, in the environment's units.
        rewards: `T` rewards.
        terminations: `T` booleans; only the last can be true.
        truncations: `T` booleans; only the last can be true.
    """

    observations: Any
    actions: Array
    rewards: Array
    terminations: Flags
    truncations: Flags

    def __len__(self) -> int:
        """Count the steps."""
        return len(self.rewards)

    @property
    def next_observations(self) -> Any:
        """The observations after each of the `T` actions: a view, no copy."""
        return map_leaves(lambda leaf: leaf[1:], self.observations)

    @property
    def terminated(self) -> bool:
        """Whether the episode ended in a terminal state."""
        return bool(self.terminations[-1])

    @property
    def truncated(self) -> bool:
        """Whether the episode was cut short, by a time limit or by the end of the record."""
        return bool(self.truncations[-1])

    @property
    def total_reward(self) -> float:
        """Undiscounted return of the episode."""
        return float(self.rewards.sum(dtype=np.float64))


@dataclass(frozen=True, eq=False, slots=True)
class Transitions:
    """Transitions picked by row, each field with one row per transition (copies).

    Attributes:
        observations: Array or (nested) dict.
        actions: In the environment's units.
        rewards: One per transition.
        next_observations: As `observations`.
        terminations: Whether the step reached a terminal state.
        truncations: Whether the episode was cut short after the step.
    """

    observations: Any
    actions: Array
    rewards: Array
    next_observations: Any
    terminations: Flags
    truncations: Flags


class OfflineDataset:
    """Logged episodes in memory, immutable: `T + 1` observations and `T` actions for each.

    Arrays are flat, episode after episode. With `N` transitions in `E` episodes `observations` has `N + E` rows and
    every other field `N`. Every episode ends in its one flagged row: terminated, or truncated (a time limit, or the end
    of the record).

    `len(dataset)` counts transitions; iterating and indexing are by **episode**: `dataset[3]` is an `Episode`,
    `dataset[:10]` the data set of the first ten.
    """

    def __init__(
        self,
        observations: Any,
        actions: Array,
        rewards: npt.ArrayLike,
        terminations: npt.ArrayLike,
        truncations: npt.ArrayLike,
        *,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        name: str | None = None,
        env_id: str | None = None,
        references: tuple[float, float] | None = None,
    ) -> None:
        """Validate and copy flat arrays that already have `T + 1` observations per episode.

        For arrays with one row per step use `cql_plugins.adapters.from_arrays`.

        Args:
            observations: `N + E` rows; an array, or a (nested) dict of arrays for a Dict space.
            actions: `N` rows, in the units of `action_space`.
            rewards: Shape `(N,)`.
            terminations: Shape `(N,)`, true where an episode ended in a terminal state.
            truncations: Shape `(N,)`, true where an episode was cut short.
            observation_space: Box, Discrete, or a (nested) Dict of them.
            action_space: Box or Discrete.
            name: A name for reports, and an id to look reference scores up by.
            env_id: Id of the environment that the data comes from.
            references: Returns of a random and of an expert policy; looked up by `name`, then `env_id`, where not
                given.

        Raises:
            DatasetError: If an array does not fit its space, a length disagrees, a value is NaN or infinite, a step has
                both flags, or the last row has none.
        """
        where = Where(name or "OfflineDataset")
        check_supported_space(observation_space, "observations", where)
        check_supported_space(action_space, "actions", where)
        rewards_ = check_rewards(rewards, None, "rewards", where)
        n_steps = len(rewards_)
        terminations_ = check_flags(terminations, n_steps, "terminations", where)
        truncations_ = check_flags(truncations, n_steps, "truncations", where)
        resolve_both_flags(terminations_, truncations_, ("terminations", "truncations"), where, prefer_termination=False)
        ends = terminations_ | truncations_
        if n_steps == 0 or not ends[-1]:
            raise where.error(
                f"expected the last of {n_steps} rows to be terminated or truncated",
                field="truncations",
                hint="Set truncations[-1] where the record simply stops",
            )
        check_structure(observations, observation_space, "observations", where)
        observations = map_leaves(_copied, observations)
        actions = np.array(actions)
        check_tree(observations, observation_space, n_steps + int(ends.sum()), "observations", where)
        check_tree(actions, action_space, n_steps, "actions", where)
        self._assign(
            observations=observations,
            actions=actions,
            rewards=rewards_.copy(),
            terminations=terminations_.copy(),
            truncations=truncations_.copy(),
            observation_space=observation_space,
            action_space=action_space,
            name=name,
            env_id=env_id,
            references=references,
        )

    @classmethod
    def _trusted(cls, **parts: Any) -> "OfflineDataset":
        """Build from arrays that were validated and are not shared with anyone; nothing is copied."""
        dataset = cls.__new__(cls)
        dataset._assign(**parts)
        return dataset

    def _assign(
        self,
        *,
        observations: Any,
        actions: Array,
        rewards: Array,
        terminations: Flags,
        truncations: Flags,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        name: str | None = None,
        env_id: str | None = None,
        references: tuple[float, float] | None = None,
        unflagged: Flags | None = None,
        inferred: frozenset[str] = frozenset(),
        reward_transform: tuple[float, float] | None = (1.0, 0.0),
        looks_up: bool = True,
    ) -> None:
        # One order of keys everywhere, that of the space, so that leaves can be walked side by side.
        if isinstance(observation_space, spaces.Dict):
            observations = _in_space_order(observations, observation_space)
        self._observations = map_leaves(read_only, observations)
        self._actions = read_only(actions)
        self._rewards = read_only(rewards)
        self._terminations = read_only(terminations)
        self._truncations = read_only(truncations)
        self._offsets = read_only(
            np.concatenate(([0], np.flatnonzero(self._terminations | self._truncations) + 1)).astype(np.int64)
        )
        self._observation_space = observation_space
        self._action_space = action_space
        self._name = name
        self._env_id = env_id
        self._looks_up = looks_up  # Not where parts with others were joined: the table's would be one more.
        known = (reference_scores(name) or reference_scores(env_id)) if looks_up else None
        self._references = references or known
        n_episodes = len(self._offsets) - 1
        self._unflagged = read_only(np.zeros(n_episodes, dtype=np.bool_) if unflagged is None else unflagged)
        self._inferred = inferred
        self._reward_transform = reward_transform
        self._returns: dict[tuple[float, str, float | None], npt.NDArray[np.float32]] = {}

    # Arrays -----------------------------------------------------------------------------------------------------------

    @property
    def observations(self) -> Any:
        """`N + E` observations, `T + 1` per episode; an array (or `StackedFrames`) or a (nested) dict of them, read-only."""
        return map_leaves(lambda leaf: leaf, self._observations)

    @property
    def actions(self) -> Array:
        """`N` actions in the units of `action_space`, read-only."""
        return self._actions

    @property
    def rewards(self) -> Array:
        """`N` rewards, read-only."""
        return self._rewards

    @property
    def terminations(self) -> Flags:
        """`N` booleans, true on the last step of an episode that reached a terminal state; read-only."""
        return self._terminations

    @property
    def truncations(self) -> Flags:
        """`N` booleans, true on the last step of an episode that was cut short; read-only."""
        return self._truncations

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """`E + 1` rows: episode `i` has the transitions `offsets[i]:offsets[i + 1]`, its observations start `i` rows later."""
        return self._offsets

    @property
    def episode_lengths(self) -> npt.NDArray[np.int64]:
        """Steps of each episode."""
        return np.diff(self._offsets)

    @cached_property
    def episode_returns(self) -> npt.NDArray[np.float64]:
        """Undiscounted return of each episode, in the rewards as they are now (after `scale_rewards`)."""
        return read_only(np.add.reduceat(self._rewards, self._offsets[:-1], dtype=np.float64))

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def observation_space(self) -> spaces.Space[Any]:
        """Space of one observation."""
        return self._observation_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        """Space of one action."""
        return self._action_space

    @property
    def inferred_spaces(self) -> frozenset[str]:
        """Which of `"observation_space"` and `"action_space"` the reader had to infer from the values."""
        return self._inferred

    @property
    def name(self) -> str | None:
        """Id or file name that the data came from."""
        return self._name

    @property
    def env_id(self) -> str | None:
        """Id of the environment that the data came from, where known."""
        return self._env_id

    @property
    def references(self) -> tuple[float, float] | None:
        """Returns of a random and of an expert policy, where known."""
        return self._references

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self._offsets) - 1

    @property
    def unflagged_episodes(self) -> Flags:
        """Per episode, whether its source ended it without a flag; such an end counts as a truncation."""
        return self._unflagged

    def __len__(self) -> int:
        """Count the transitions (not the episodes, which are `n_episodes`)."""
        return len(self._rewards)

    def __repr__(self) -> str:
        """Say what is in it, in one line."""
        title = self._name or self._env_id or "unnamed"
        return f"OfflineDataset({title!r}, {self.n_episodes} episodes, {len(self)} transitions)"

    # Episodes ---------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Episode]:
        """Iterate over the episodes."""
        return (self._episode(i) for i in range(self.n_episodes))

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Episode: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | npt.NDArray[Any]) -> "OfflineDataset": ...
    def __getitem__(self, index: Any) -> "Episode | OfflineDataset":
        """Get one episode by an integer, or a data set of several by a slice, a list of integers or a boolean mask.

        A slice with step 1 shares memory with this data set; any other choice copies.

        Raises:
            IndexError: If an index is out of range.
            DatasetError: If no episode is chosen.
        """
        if isinstance(index, int | np.integer):
            if not -self.n_episodes <= index < self.n_episodes:
                raise IndexError(f"episode {index} is out of range: the data set has {self.n_episodes} episodes")
            return self._episode(int(index) % self.n_episodes)
        chosen = np.arange(self.n_episodes)[index]
        if isinstance(index, slice) and index.step in (None, 1) and len(chosen):
            return self._contiguous(int(chosen[0]), int(chosen[-1]) + 1)
        return self._select(chosen)

    def _episode(self, i: int) -> Episode:
        start, stop = (int(row) for row in self._offsets[i : i + 2])
        rows = slice(start, stop)
        return Episode(
            observations=map_leaves(lambda leaf: leaf[start + i : stop + i + 1], self._observations),
            actions=self._actions[rows],
            rewards=self._rewards[rows],
            terminations=self._terminations[rows],
            truncations=self._truncations[rows],
        )

    def _contiguous(self, first: int, last: int) -> "OfflineDataset":
        start, stop = (int(self._offsets[i]) for i in (first, last))
        rows = slice(start, stop)
        return self._replaced(
            observations=map_leaves(lambda leaf: leaf[start + first : stop + last], self._observations),
            actions=self._actions[rows],
            rewards=self._rewards[rows],
            terminations=self._terminations[rows],
            truncations=self._truncations[rows],
            unflagged=self._unflagged[first:last],
        )

    def _select(self, chosen: npt.NDArray[np.intp]) -> "OfflineDataset":
        if not len(chosen):
            raise DatasetError(
                f"expected at least one episode, got none of {self.n_episodes}", source=self._name or "OfflineDataset"
            )
        rows = _ranges(self._offsets[chosen], self._offsets[chosen + 1])
        starts, stops = self._offsets[chosen] + chosen, self._offsets[chosen + 1] + chosen + 1
        observation_rows = _ranges(starts, stops)

        def take(leaf: Any) -> Any:
            return leaf.take_ranges(starts, stops) if isinstance(leaf, StackedFrames) else leaf[observation_rows]

        return self._replaced(
            observations=map_leaves(take, self._observations),
            actions=self._actions[rows],
            rewards=self._rewards[rows],
            terminations=self._terminations[rows],
            truncations=self._truncations[rows],
            unflagged=self._unflagged[chosen],
        )

    def _parts(self) -> dict[str, Any]:
        return {
            "observations": self._observations,
            "actions": self._actions,
            "rewards": self._rewards,
            "terminations": self._terminations,
            "truncations": self._truncations,
            "observation_space": self._observation_space,
            "action_space": self._action_space,
            "name": self._name,
            "env_id": self._env_id,
            "references": self._references,
            "unflagged": self._unflagged,
            "inferred": self._inferred,
            "reward_transform": self._reward_transform,
            "looks_up": self._looks_up,
        }

    def _replaced(self, **changes: Any) -> "OfflineDataset":
        return OfflineDataset._trusted(**(self._parts() | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor, since pickled arrays come back writable."""
        return _rebuild, (self._parts(),)

    def filter(self, predicate: Callable[[Episode], bool]) -> "OfflineDataset":
        """Keep the episodes for which `predicate(episode)` is true.

        Args:
            predicate: Called with each `Episode`.

        Returns:
            A data set of copies.

        Raises:
            DatasetError: If no episode is kept.
        """
        return self._select(np.flatnonzero([bool(predicate(episode)) for episode in self]))

    @staticmethod
    def concatenate(datasets: "Iterable[OfflineDataset]") -> "OfflineDataset":
        """Join data sets, episode after episode.

        Name, environment id and references are kept where all agree. A space that was inferred gives way to one that
        was given; two inferred ones are widened to hold both.

        Args:
            datasets: At least one data set.

        Returns:
            A data set of copies.

        Raises:
            DatasetError: If there is none, spaces or dtypes disagree, or frames are stacked in some of them only.
        """
        parts = list(datasets)
        if not parts:
            raise DatasetError("expected at least one data set to concatenate, got none")
        where = Where("concatenate")
        for field in ("_observations", "_actions"):
            layouts = {_of_leaves(lambda leaf: leaf.dtype, getattr(d, field)) for d in parts}
            if len(layouts) > 1:
                raise where.error(f"expected one dtype, got {sorted(layouts)}", field=field.strip("_"))
        stacked = {_of_leaves(_stacking, d._observations) for d in parts}
        if len(stacked) > 1:
            raise where.error(
                f"expected frames that are stacked in one way, got {sorted(stacked)}",
                field="observations",
                hint="Call stack_frames (on single frames) or unstack_frames (on stacks) on each before joining",
            )
        merged_spaces = {}
        for kind in ("observation_space", "action_space"):
            merged_spaces[kind] = _merged_space([(getattr(d, kind), kind in d._inferred) for d in parts], kind, where)

        def common(attribute: str) -> Any:
            values = {getattr(d, attribute) for d in parts}
            return values.pop() if len(values) == 1 else None

        def joined(attribute: str) -> Any:
            trees = [getattr(d, attribute) for d in parts]
            return map_leaves(lambda *leaves: _concatenated(leaves), *trees)

        return OfflineDataset._trusted(
            observations=joined("_observations"),
            actions=joined("_actions"),
            rewards=joined("_rewards"),
            terminations=joined("_terminations"),
            truncations=joined("_truncations"),
            unflagged=joined("_unflagged"),
            **merged_spaces,
            name=common("_name"),
            env_id=common("_env_id"),
            references=common("_references"),
            looks_up=len({d._references for d in parts}) == 1,
            inferred=frozenset.intersection(*(d._inferred for d in parts)),
            reward_transform=common("_reward_transform"),
        )

    def __add__(self, other: "OfflineDataset") -> "OfflineDataset":
        """Join two data sets, see `concatenate`."""
        if not isinstance(other, OfflineDataset):
            return NotImplemented
        return OfflineDataset.concatenate([self, other])

    # Transitions ------------------------------------------------------------------------------------------------------

    def observation_rows(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Find where in `observations` the transitions `rows` start; what follows each of them is one row further down.

        Args:
            rows: Transition numbers in `[0, N)`.
        """
        rows_ = np.asarray(rows, dtype=np.int64)
        return rows_ + np.searchsorted(self._offsets, rows_, side="right") - 1

    def transitions(self, rows: npt.ArrayLike) -> Transitions:
        """Copy the transitions `rows` out.

        Args:
            rows: Transition numbers in `[0, N)`, any order.

        Raises:
            IndexError: If a number is out of range.
        """
        rows_ = np.asarray(rows, dtype=np.int64)
        if rows_.size and not (rows_.min() >= 0 and rows_.max() < len(self)):
            raise IndexError(f"transitions must be in [0, {len(self)}), got {rows_.min()} to {rows_.max()}")
        at = self.observation_rows(rows_)
        return Transitions(
            observations=map_leaves(lambda leaf: leaf[at], self._observations),
            actions=self._actions[rows_],
            rewards=self._rewards[rows_],
            next_observations=map_leaves(lambda leaf: leaf[at + 1], self._observations),
            terminations=self._terminations[rows_],
            truncations=self._truncations[rows_],
        )

    # Frame stacks -----------------------------------------------------------------------------------------------------

    def stack_frames(self, k: int, padding: Padding = "zero", *, keys: Sequence[str] | None = None) -> "OfflineDataset":
        """Let each observation be the `k` latest ones of its episode; each frame stays in memory once.

        Channels grow: `(H, W, C)` becomes `(H, W, k * C)` with the newest frame last, as SB3's `VecFrameStack` has it,
        channel-first images `(k * C, H, W)`. Grey images `(H, W)` become `(k, H, W)`, as Gymnasium's
        `FrameStackObservation` has them. `to_sb3` calls this where the model has `k` times the channels.

        Args:
            k: Frames in a stack.
            padding: What precedes the first frame of an episode: `zero` as `VecFrameStack`, or `reset`, the first frame
                again, as `FrameStackObservation(padding_type="reset")`.
            keys: Of Dict observations, the keys to stack; all images where None.

        Returns:
            A data set whose `observations` are `StackedFrames`: put together when rows are asked for.

        Raises:
            DatasetError: If there is nothing to stack, or it is stacked already.
        """
        if k < 1:
            raise ValueError(f"expected at least one frame in a stack, got k={k}")

        def stacked(leaf: Any, space: spaces.Space[Any], field: str) -> tuple[Any, spaces.Space[Any]]:
            where = Where(self._name or "OfflineDataset")
            if isinstance(leaf, StackedFrames):
                raise where.error(f"expected single frames, got stacks of {leaf.n_stack}", field=field)
            if not isinstance(space, spaces.Box) or not space.shape:
                raise where.error(f"expected frames of a Box space with an axis to stack along, got {space}", field=field)
            return stack(leaf, self._observation_starts, k, padding), stacked_space(space, k)

        return self._with_leaves(stacked, keys)

    def unstack_frames(self, k: int, *, keys: Sequence[str] | None = None) -> "OfflineDataset":
        """Keep each frame of observations that came stacked once; the observations stay what they were.

        Args:
            k: Frames in a stack.
            keys: Of Dict observations, the keys that are stacked; all images where None.

        Returns:
            A data set of a `k`-th of the size, whose `observations` are `StackedFrames`.

        Raises:
            DatasetError: If consecutive observations of an episode do not overlap in `k - 1` frames.
        """
        if k < 2:
            raise ValueError(f"expected at least two frames in a stack, got k={k}")

        def unstacked(leaf: Any, space: spaces.Space[Any], field: str) -> tuple[Any, spaces.Space[Any]]:
            where = Where(self._name or "OfflineDataset")
            if isinstance(leaf, StackedFrames) or leaf.ndim < 2:
                raise where.error(f"expected stacks of {k} frames as an array, got {leaf!r}", field=field)
            return unstack(leaf, self._observation_starts, k, field, where), space

        return self._with_leaves(unstacked, keys)

    @property
    def _observation_starts(self) -> npt.NDArray[np.int64]:
        return self._offsets[:-1] + np.arange(self.n_episodes)

    def _with_leaves(
        self, change: Callable[[Any, spaces.Space[Any], str], tuple[Any, spaces.Space[Any]]], keys: Sequence[str] | None
    ) -> "OfflineDataset":
        """Replace the observations, or those of `keys`, and their spaces."""
        space = self._observation_space
        if not isinstance(space, spaces.Dict):
            if keys is not None:
                raise DatasetError(f"expected no keys for the space {space}, got {list(keys)}", source=self._name)
            leaf, changed = change(self._observations, space, "observations")
            return self._replaced(observations=leaf, observation_space=changed)
        chosen = [key for key, subspace in space.items() if is_image(subspace)] if keys is None else list(keys)
        if not chosen or not set(chosen) <= set(space):
            raise DatasetError(
                f"expected keys of {sorted(space)} to stack, got {chosen or 'none, since none of them is an image'}",
                source=self._name or "OfflineDataset",
                field="observations",
                hint="Pass keys",
            )
        assert isinstance(self._observations, dict)
        leaves, subspaces = dict(self._observations), dict(space.spaces)
        for key in chosen:
            leaves[key], subspaces[key] = change(leaves[key], subspaces[key], f"observations.{key}")
        return self._replaced(observations=leaves, observation_space=spaces.Dict(subspaces))

    def flatten_observations(self) -> "OfflineDataset":
        """Give each leaf of nested dict observations a key of its own, `"desired_goal/microwave"`.

        Returns:
            A data set that shares every array; this one where observations are not nested.

        Raises:
            ValueError: If two leaves would have one key.
        """
        if not is_nested(self._observation_space):
            return self
        return self._replaced(
            observations=flatten_tree(self._observations), observation_space=flatten_space(self._observation_space)
        )

    # Rewards and returns ----------------------------------------------------------------------------------------------

    def scale_rewards(self, scale: float = 1.0, shift: float = 0.0) -> "OfflineDataset":
        """Replace each reward `r` by `scale * r + shift`, for instance `(10, -5)` on AntMaze.

        Args:
            scale: Finite and not zero.
            shift: Finite; added after scaling.

        Returns:
            A data set that shares everything but the rewards. `normalized_score()` still scores the original rewards.

        Raises:
            ValueError: If scale or shift is not finite, the scale is zero, or a reward becomes too large for its type.
        """
        if not (np.isfinite(scale) and np.isfinite(shift)) or scale == 0:
            raise ValueError(f"expected a finite, non-zero scale and a finite shift, got {scale} and {shift}")
        transform = self._reward_transform
        if transform is not None:
            transform = (transform[0] * scale, transform[1] * scale + shift)
        with np.errstate(over="ignore", invalid="ignore"):
            rewards = self._rewards * float(scale) + float(shift)
        if not np.isfinite(rewards).all():
            raise ValueError(f"scale={scale} and shift={shift} make rewards too large for {rewards.dtype}")
        return self._replaced(rewards=rewards, reward_transform=transform)

    def returns_to_go(
        self,
        gamma: float,
        tail: ReturnTail = "zero",
        *,
        failure_reward: float | None = None,
        tail_values: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the discounted return from each transition to the end of its episode; once per choice of arguments.

        Args:
            gamma: Discount factor.
            tail: What follows a truncated end: `zero`, `sparse`, `none` or `bootstrap`, see `cql_plugins.returns`.
            failure_reward: For `sparse`, the reward of a step without success; the smallest reward where None.
            tail_values: For `bootstrap`, the value after each truncated end, in order. Results with it are not kept.

        Returns:
            Shape `(N,)`, float32, read-only.
        """
        key = (float(gamma), tail, failure_reward)
        if tail_values is None and key in self._returns:
            return self._returns[key]
        returns = read_only(
            returns_to_go(
                self._rewards,
                self._terminations,
                self._truncations,
                gamma,
                tail,
                failure_reward=failure_reward,
                tail_values=tail_values,
            )
        )
        if tail_values is None:
            self._returns[key] = returns
        return returns

    @overload
    def normalized_score(self, returns: None = None) -> npt.NDArray[np.float64]: ...
    @overload
    def normalized_score(self, returns: float) -> float: ...
    @overload
    def normalized_score(self, returns: npt.ArrayLike) -> npt.NDArray[np.float64]: ...
    def normalized_score(self, returns: npt.ArrayLike | None = None) -> float | npt.NDArray[np.float64]:
        """Score undiscounted returns as D4RL does: 0 for a random policy, 100 for an expert.

        Args:
            returns: One return or an array, in the environment's own rewards. Where None, this data set's episodes are
                scored, with `scale_rewards` undone.

        Returns:
            Scores of the shape of `returns`, or one per episode.

        Raises:
            DatasetError: If no reference returns are known, or data sets with differently scaled rewards were joined.
        """
        if self._references is None:
            raise DatasetError(
                f"no reference returns are known for name {self._name!r} and environment {self._env_id!r}",
                source=self._name or "OfflineDataset",
                hint="Give the reader references=(random_return, expert_return)",
            )
        if returns is None:
            if self._reward_transform is None:
                raise DatasetError("data sets with differently scaled rewards were joined, give the returns to score")
            scale, shift = self._reward_transform
            returns = (self.episode_returns - shift * self.episode_lengths) / scale
        return normalized_score(returns, self._references)

    # Reports and writers ----------------------------------------------------------------------------------------------

    def summary(self) -> "DatasetSummary":
        """Describe episodes, returns, rewards, actions and columns; print the result to see a table."""
        from cql_plugins.adapters.report import summarize

        return summarize(self)

    def to_sb3(self, model_or_env: Any, **kwargs: Any) -> Any:
        """Fill a replay buffer for a Stable-Baselines3 model or environment, see `cql_plugins.adapters.to_sb3`."""
        from cql_plugins.adapters.sb3 import to_sb3

        return to_sb3(self, model_or_env, **kwargs)

    def to_minari(self, dataset_id: str, **kwargs: Any) -> Any:
        """Store as a Minari data set, see `cql_plugins.adapters.to_minari`."""
        from cql_plugins.adapters.minari import to_minari

        return to_minari(self, dataset_id, **kwargs)


def _rebuild(parts: dict[str, Any]) -> OfflineDataset:
    return OfflineDataset._trusted(**parts)


def _of_leaves(describe: Callable[[Any], Any], tree: Any) -> str:
    """Describe each leaf, whatever the order of the keys."""
    return "; ".join(sorted(f"{name}: {describe(leaf)}".lstrip(".: ") for name, leaf in named_leaves(tree, "")))


def _in_space_order(observations: Any, space: spaces.Space[Any]) -> Observations:
    if isinstance(space, spaces.Dict):
        return {key: _in_space_order(observations[key], subspace) for key, subspace in space.spaces.items()}
    leaf: Array = observations
    return leaf


def _copied(leaf: Any) -> Any:
    """Copy an array; stacks cannot be written and are kept."""
    return leaf if isinstance(leaf, StackedFrames) else np.array(leaf)


def _stacking(leaf: Any) -> str:
    """Say how the frames of a leaf are stacked."""
    return f"{leaf.n_stack} frames, channels first: {leaf.channels_first}" if isinstance(leaf, StackedFrames) else "not stacked"


def _concatenated(leaves: Sequence[Any]) -> Any:
    return StackedFrames.concatenate(leaves) if isinstance(leaves[0], StackedFrames) else np.concatenate(leaves)


def _ranges(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Concatenate `arange(start, stop)` for each pair."""
    lengths = stops - starts
    first = np.repeat(starts - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return first + np.arange(lengths.sum())


def _merged_space(candidates: list[tuple[spaces.Space[Any], bool]], kind: str, where: Where) -> spaces.Space[Any]:
    """Find the space for joined data: the one that was given, or the hull of the inferred ones."""
    given = [space for space, inferred in candidates if not inferred]
    for space in given[1:]:
        if space != given[0]:
            raise where.error(f"expected equal spaces, got {given[0]} and {space}", field=kind)
    merged = given[0] if given else candidates[0][0]
    for space, inferred in candidates:
        if inferred:
            merged = _hull(merged, space, kind, where, fixed=bool(given))
    return merged


def _hull(merged: spaces.Space[Any], space: spaces.Space[Any], kind: str, where: Where, *, fixed: bool) -> spaces.Space[Any]:
    if isinstance(merged, spaces.Dict) and isinstance(space, spaces.Dict) and set(merged) == set(space):
        return spaces.Dict({key: _hull(merged[key], space[key], kind, where, fixed=fixed) for key in merged.spaces})
    if isinstance(merged, spaces.Box) and isinstance(space, spaces.Box) and merged.shape == space.shape:
        if fixed:
            return merged
        # Equal dtypes: `concatenate` refuses others before.
        dtype: Any = np.dtype(merged.dtype).type
        return spaces.Box(np.minimum(merged.low, space.low), np.maximum(merged.high, space.high), dtype=dtype)
    if isinstance(merged, spaces.Discrete) and isinstance(space, spaces.Discrete) and merged.start == space.start:
        if not fixed:
            return spaces.Discrete(int(max(merged.n, space.n)), start=int(merged.start))
        if space.n <= merged.n:
            return merged
    raise where.error(f"expected spaces that can be joined, got {merged} and {space}", field=kind)
