"""SB3 replay buffers that carry returns-to-go.

The returns are one more column beside the actions, in one array: SB3's own sampling code then gathers them with the same
indices as the rest of a transition, at next to no cost, in every one of its buffers and with any number of environments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins.returns import ReturnTail, returns_to_go
from cql_plugins.sb3.batches import Batch

TailValueFunction = Callable[[Any], NDArray[np.floating[Any]]]
"""From the observations after the truncated ends to their values, in the units of the rewards the critic sees."""

_BLOCK = 4096
"""Rows that are compared at once."""
_LIMIT_TOLERANCE = 0.01
"""How far VecNormalize's reward clip may drift before returns are summed again, as a share."""


class ReturnsToGoMixin(ReplayBuffer):
    """Adds returns-to-go to the SB3 replay buffer class that follows it in the bases.

    Use :func:`returns_to_go_buffer_class` to get a class, :func:`with_returns_to_go` to extend a buffer that exists. An online
    transition has ``-inf`` until its episode ends; then the whole episode is filled in, each environment by itself.

    Attributes:
        returns_to_go: Shape ``(buffer_size, n_envs)``, float32: of the rewards as stored, or as clipped by ``VecNormalize``.
        returns_version: How many times all returns were summed anew.
    """

    returns_to_go: NDArray[np.float32]
    returns_version: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_returns()

    def _init_returns(self) -> None:
        """Widen the action storage by one column and start with no return known."""
        self._returns_gamma = 0.99
        self._return_tail: ReturnTail = "zero"
        self.failure_reward: float | None = None
        self._tail_values: NDArray[np.float64] | None = None
        self._reward_limit = np.inf
        self._largest_reward = 0.0
        # Rows of the running episode of each environment, and rows after which a record breaks off without an end.
        self._running_length = np.zeros(self.n_envs, dtype=np.int64)
        self._cuts = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        actions = self.actions
        self._wide_actions = np.zeros((*actions.shape[:2], actions.shape[2] + 1), dtype=np.float32)
        self._bind_views()
        stored = self.size()
        self.actions[:stored] = actions[:stored]
        self.returns_to_go[:stored] = -np.inf
        if stored:
            self._find_breaks()

    def _find_breaks(self) -> None:
        """Find, in rows that SB3's own buffer stored, where a record breaks off without an end, and what runs still.

        A record breaks off where the observation after a step is not the next row's: ``learn`` resets the environments at
        its start and says nothing of it to the buffer. With ``optimize_memory_usage`` that cannot be seen.
        """
        rows = self._rows_in_order()
        ended = self.dones[rows] > 0
        if not self.optimize_memory_usage:
            after, before = self.next_observations, self.observations
            pairs = [(after[key], before[key]) for key in after] if isinstance(after, dict) else [(after, before)]
            for column in range(self.n_envs):
                for start in range(0, len(rows) - 1, _BLOCK):
                    block = rows[start : start + _BLOCK + 1]
                    for following, own in pairs:
                        differs = following[block[:-1], column] != own[block[1:], column]
                        self._cuts[block[:-1], column] |= differs.reshape(len(differs), -1).any(axis=1)
        self._cuts[rows] &= ~ended
        for column in range(self.n_envs):
            over = np.flatnonzero(ended[:, column] | self._cuts[rows, column])
            self._running_length[column] = len(rows) - 1 - over[-1] if len(over) else len(rows)

    def _bind_views(self) -> None:
        self.actions = self._wide_actions[:, :, :-1]
        self.returns_to_go = self._wide_actions[:, :, -1]

    def configure_returns(self, gamma: float, tail: ReturnTail = "zero", failure_reward: float | None = None) -> None:
        """Set how returns are summed from now on; what is stored stays until :meth:`recompute_returns`.

        Args:
            gamma: Discount factor of the training.
            tail: What follows a truncated end.
            failure_reward: The reward of a step without success, for the ``sparse`` tail; the smallest stored where ``None``.
        """
        self._returns_gamma, self._return_tail, self.failure_reward = gamma, tail, failure_reward

    def has_settings(self, gamma: float, tail: ReturnTail) -> bool:
        """Tell whether returns are summed like this already.

        Args:
            gamma: Discount factor.
            tail: What follows a truncated end.
        """
        return (self._returns_gamma, self._return_tail) == (gamma, tail)

    def with_own_returns(self) -> ReturnsToGoMixin:
        """Get a buffer of the same rows whose returns-to-go are its own, for another model that trains on them."""
        twin = type(self).__new__(type(self))  # copy.copy would pickle, and HER's pickles have no environment
        twin.__dict__.update(self.__dict__)
        twin._wide_actions, twin._cuts = self._wide_actions.copy(), self._cuts.copy()
        twin._running_length = self._running_length.copy()
        twin._bind_views()
        return twin

    # Storing ---------------------------------------------------------------------------------------------------------

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of each environment; where an episode ends, fill in its returns-to-go."""
        row = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        self.returns_to_go[row] = -np.inf
        self._cuts[row] = False
        # In every step of every environment: plain Python is faster than NumPy on so few numbers.
        self._largest_reward = max(self._largest_reward, *map(abs, np.asarray(reward).ravel().tolist()))
        self._running_length += 1
        for env_index, has_ended in enumerate(np.asarray(done).ravel().tolist()):
            if not has_ended:
                continue
            length = min(int(self._running_length[env_index]), self.buffer_size)
            rows = np.arange(row - length + 1, row + 1) % self.buffer_size
            self.returns_to_go[rows, env_index] = self._compute_returns(rows, slice(env_index, env_index + 1))[:, 0]
            self._running_length[env_index] = 0

    def mark_full(self) -> None:
        """Say that every row was written from outside, in blocks and in the order of time, as by :meth:`add`."""
        self.pos, self.full = 0, True
        self._largest_reward = max(float(self.rewards.max()), -float(self.rewards.min()))

    def cut_running_episodes(self) -> None:
        """Say that the environments were reset: what runs now will not be continued, its returns stay unknown."""
        running = self._running_length > 0
        self._cuts[self.pos - 1, running] = True
        self._running_length[:] = 0

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        if hasattr(self, "_running_length"):
            self._running_length[:] = 0
            self._cuts[:] = False

    # Returns ---------------------------------------------------------------------------------------------------------

    def _flags(self, rows: NDArray[np.int64], columns: slice) -> tuple[np.ndarray, np.ndarray]:
        # SB3 and `refill` mark the last row of a broken-off record as an end, so that nothing is sampled across the seam.
        goes_on = ~self._cuts[rows, columns]
        timeouts = (self.timeouts[rows, columns] > 0) & goes_on
        return (self.dones[rows, columns] > 0) & ~timeouts & goes_on, timeouts

    def _compute_returns(self, rows: NDArray[np.int64], columns: slice) -> NDArray[np.float32]:
        """Compute the returns-to-go of consecutive rows; never writes."""
        terminations, truncations = self._flags(rows, columns)
        tail, tail_values = self._return_tail, None
        if tail == "bootstrap":
            tail_values = self._tail_values
            if tail_values is None or len(tail_values) != truncations.sum():
                # The value of an end is not known before the algorithm has estimated it.
                tail, tail_values = "none", None
        return returns_to_go(
            np.clip(self.rewards[rows, columns], -self._reward_limit, self._reward_limit),
            terminations,
            truncations,
            self._returns_gamma,
            tail,
            failure_reward=self._known_failure_reward(),
            tail_values=tail_values,
            cuts=self._cuts[rows, columns],
        )

    def _known_failure_reward(self) -> float | None:
        """The reward of a step without success as the critic sees it, where the tail asks for it."""
        reward = self.failure_reward
        if self._return_tail == "sparse" and reward is None:
            reward = float(self.rewards[: self.size()].min())
        return None if reward is None else float(np.clip(reward, -self._reward_limit, self._reward_limit))

    def _rows_in_order(self) -> NDArray[np.int64]:
        """Stored rows, oldest first."""
        size = self.size()
        return (np.arange(size) + (self.pos if self.full else 0)) % self.buffer_size

    def recompute_returns(self, tail_value_function: TailValueFunction | None = None, env: VecNormalize | None = None) -> None:
        """Compute the returns-to-go of all that is stored.

        Args:
            tail_value_function: For the ``bootstrap`` tail: values of the (normalised) observations after truncated ends.
            env: ``VecNormalize`` wrapper of the training environment, where there is one.
        """
        rows = self._rows_in_order()
        if not len(rows):
            return
        everything = slice(0, self.n_envs)
        self._reward_limit = _reward_limit(env)
        self._largest_reward = float(np.abs(self.rewards[rows]).max())
        if self._return_tail == "bootstrap" and tail_value_function is not None:
            _, truncations = self._flags(rows, everything)
            env_indices, positions = np.nonzero(truncations.T)
            # `returns_to_go` wants the ends environment by environment.
            self._tail_values = np.zeros(0)
            if len(positions):
                after = self._next_observations_at(rows[positions], env_indices, env)
                self._tail_values = _reward_scale(env) * np.asarray(tail_value_function(after), dtype=np.float64)
        self.returns_to_go[rows] = self._compute_returns(rows, everything)
        self.returns_version += 1
        self._tail_values = None

    def _next_observations_at(self, rows: np.ndarray, env_indices: np.ndarray, env: VecNormalize | None) -> Any:
        if isinstance(self.next_observations, dict):
            picked: Any = {key: value[rows, env_indices] for key, value in self.next_observations.items()}
        elif self.optimize_memory_usage:
            picked = self.observations[(rows + 1) % self.buffer_size, env_indices]
        else:
            picked = self.next_observations[rows, env_indices]
        normalized = self._normalize_obs(picked, env)
        if isinstance(normalized, dict):
            return {key: self.to_torch(value) for key, value in normalized.items()}
        return self.to_torch(normalized)

    def _follow_reward_clip(self, env: VecNormalize | None) -> None:
        """Sum the returns again where ``VecNormalize`` clips rewards elsewhere than it did.

        Its scale alone needs no new sum: the returns are divided by it when they are sampled.
        """
        limit = _reward_limit(env)
        if min(limit, self._reward_limit) >= self._largest_reward or self._return_tail == "bootstrap":
            return  # Nothing is clipped, or the algorithm asks for new sums on its own clock.
        if not abs(limit - self._reward_limit) <= _LIMIT_TOLERANCE * min(limit, self._reward_limit):
            self.recompute_returns(env=env)

    # Sampling --------------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Batch:  # type: ignore[override]
        """Sample as SB3 does, with the same random numbers, and add the returns-to-go.

        Args:
            batch_size: Number of transitions.
            env: ``VecNormalize`` wrapper, which normalises observations, rewards and returns-to-go.
        """
        self._follow_reward_clip(env)
        narrow = self.actions
        self.actions = self._wide_actions
        try:
            samples = super().sample(batch_size, env=env)
        finally:
            self.actions = narrow
        actions, returns = samples.actions[:, :-1].contiguous(), samples.actions[:, -1:]
        scale = _reward_scale(env)
        return Batch(
            samples.observations,
            actions,
            samples.next_observations,
            samples.dones,
            samples.rewards,
            samples.discounts,
            returns if scale == 1.0 else returns / scale,
        )

    # Pickling: the two views would be saved as copies, and the class is made on demand ---------------------------------

    def __getstate__(self) -> dict[str, Any]:
        parent_state = getattr(super(), "__getstate__", None)
        state = dict(parent_state() if parent_state is not None else self.__dict__)
        del state["actions"], state["returns_to_go"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parent_setstate = getattr(super(), "__setstate__", None)
        if parent_setstate is not None:
            parent_setstate(state)
        else:
            self.__dict__.update(state)
        self._bind_views()

    def __reduce__(self) -> tuple[Any, ...]:
        base = type(self).__bases__[1]
        return _empty_buffer, (base,), self.__getstate__()


class HindsightReturnsMixin(ReturnsToGoMixin, HerReplayBuffer):  # type: ignore[misc]
    """Returns-to-go for SB3's ``HerReplayBuffer``: those of a relabelled transition are summed from its relabelled rewards.

    For each virtual transition the rewards from its step to the end of its episode are computed again with the new goal, by the
    environment's own ``compute_reward`` in one call for the whole batch. Terminations stay the stored ones, as everywhere in
    SB3's HER. With the ``sparse`` tail a remainder whose every relabelled reward is the failure reward never ends; with
    ``bootstrap`` the value of a truncated end under the new goal is not known, so that the return is ``-inf`` there.

    Attributes:
        sums_relabelled_rewards: Whether to sum them at all; without, relabelled transitions have ``-inf``, at SB3's own cost.
    """

    def has_settings(self, gamma: float, tail: ReturnTail) -> bool:
        """Tell whether returns are summed like this already, those of relabelled transitions too.

        Args:
            gamma: Discount factor.
            tail: What follows a truncated end.
        """
        return super().has_settings(gamma, tail) and self.sums_relabelled_rewards

    def with_own_returns(self) -> ReturnsToGoMixin:
        """Get a buffer of the same rows whose returns-to-go are its own; it sums those of relabelled transitions."""
        twin = super().with_own_returns()
        assert isinstance(twin, HindsightReturnsMixin)
        twin.sums_relabelled_rewards = True
        return twin

    def _init_returns(self) -> None:
        super()._init_returns()
        self.sums_relabelled_rewards = True
        self._new_goals: NDArray[Any] | None = None
        self._rewards_were_checked = False

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Store one step of each environment; warn once where ``compute_reward`` does not give the rewards of an episode."""
        row = self.pos
        super().add(*args, **kwargs)
        if not self._rewards_were_checked and self.dones[row].any():
            self._rewards_were_checked = True
            if problem := self.reward_mismatch():
                warnings.warn(problem, stacklevel=2)

    def mark_full(self) -> None:
        """Say that every row was written from outside, in blocks and in the order of time; ``dones`` say where episodes end."""
        super().mark_full()
        self.ep_length[:] = 0
        for column in range(self.n_envs):
            ends = np.flatnonzero(self.dones[:, column] > 0)
            starts = np.concatenate(([0], ends[:-1] + 1))
            lengths = np.diff(ends, prepend=-1)
            rows = slice(0, int(lengths.sum()))
            self.ep_start[rows, column] = np.repeat(starts, lengths)
            self.ep_length[rows, column] = np.repeat(lengths, lengths)
        self._current_ep_start[:] = 0

    def truncate_last_trajectory(self) -> None:
        """Let the running episodes end here by a time-out, see SB3."""
        super().truncate_last_trajectory()
        self._running_length[:] = 0

    # Relabelling -----------------------------------------------------------------------------------------------------

    def _sample_goals(self, batch_indices: np.ndarray, env_indices: np.ndarray) -> np.ndarray:
        """Sample goals as SB3 does, and keep them for the returns: SB3 hands back normalised ones only."""
        self._new_goals = super()._sample_goals(batch_indices, env_indices)
        return self._new_goals

    def _get_virtual_samples(
        self, batch_indices: np.ndarray, env_indices: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        samples = super()._get_virtual_samples(batch_indices, env_indices, env)
        goals, self._new_goals = self._new_goals, None
        if not self.sums_relabelled_rewards:
            samples.actions[:, -1] = -np.inf
        elif len(batch_indices):
            assert goals is not None
            returns = self._relabelled_returns(batch_indices, env_indices, goals, _reward_limit(env))
            samples.actions[:, -1] = self.to_torch(returns)
        return samples

    def _relabelled_returns(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], goals: NDArray[Any], limit: float
    ) -> NDArray[np.float32]:
        """Compute the returns-to-go of transitions under new goals.

        Args:
            rows: Row of each transition, shape ``(B,)``; its episode has ended.
            columns: Environment of each transition, shape ``(B,)``.
            goals: New desired goals, shape ``(B, ...)``, not normalised.
            limit: Where ``VecNormalize`` clips rewards, in their own units.

        Returns:
            Shape ``(B,)``.
        """
        done_steps = (rows - self.ep_start[rows, columns]) % self.buffer_size
        remaining = self.ep_length[rows, columns] - done_steps
        last = np.cumsum(remaining) - 1
        first = last - remaining + 1
        ahead = np.arange(last[-1] + 1) - np.repeat(first, remaining)
        rows_ahead = (np.repeat(rows, remaining) + ahead) % self.buffer_size
        columns_ahead = np.repeat(columns, remaining)
        rewards = self._goal_rewards(rows_ahead, columns_ahead, np.repeat(goals, remaining, axis=0))
        truncated = self.timeouts[rows_ahead[last], columns_ahead[last]] > 0
        terminations, truncations = np.zeros((2, len(rewards)), dtype=bool)
        terminations[last], truncations[last] = ~truncated, truncated
        returns = returns_to_go(
            np.clip(rewards, -limit, limit),
            terminations,
            truncations,
            self._returns_gamma,
            "none" if self._return_tail == "bootstrap" else self._return_tail,
            failure_reward=self._known_failure_reward(),
            # SB3 takes an episode that a reset broke off and the next one for one.
            cuts=self._cuts[rows_ahead, columns_ahead],
        )
        first_returns: NDArray[np.float32] = returns[first]
        return first_returns

    def _goal_rewards(self, rows: NDArray[np.int64], columns: NDArray[np.int64], goals: NDArray[Any]) -> NDArray[np.float32]:
        """Compute the rewards of transitions for given goals by the environment's ``compute_reward``, in one call.

        Args:
            rows: Shape ``(n,)``.
            columns: Shape ``(n,)``.
            goals: Desired goals, shape ``(n, ...)``.

        Returns:
            Shape ``(n,)``, at the precision of stored rewards.

        Raises:
            ValueError: If ``compute_reward`` does not give one reward for each goal.
        """
        if self.env is None:
            raise ValueError("HerReplayBuffer has no environment to compute rewards with; call set_env(env) first.")
        infos = [dict(info) for info in self.infos[rows, columns]] if self.copy_info_dict else [{}] * len(rows)
        achieved = self.next_observations["achieved_goal"][rows, columns]
        # SB3, too, asks the first environment for all.
        rewards = np.asarray(self.env.env_method("compute_reward", achieved, goals, infos, indices=[0])[0], dtype=np.float32)
        if rewards.shape != (len(rows),):
            raise ValueError(
                f"compute_reward must be vectorised for hindsight relabelling: expected {len(rows)} rewards of shape "
                f"({len(rows)},), got shape {rewards.shape}. Let it reduce over the last axis of the goals only."
            )
        return rewards

    def reward_mismatch(self, n_rows: int = 1000) -> str | None:
        """Compare stored rewards with ``compute_reward`` of the stored goals, on rows spread over all finished episodes.

        Relabelled and stored rewards would otherwise be in different units in one batch. Both the goal seen before the step and
        the one seen after it may explain a reward: environments that hand out a new goal at success differ in which of the two
        they paid for.

        Args:
            n_rows: How many rows to compare; those of the smallest and of the largest reward are among them.

        Returns:
            What is wrong, with the numbers; ``None`` where nothing is.
        """
        valid = np.flatnonzero(self.ep_length > 0)
        if not len(valid):
            return None
        paid = self.rewards.reshape(-1)[valid]
        spread = np.linspace(0, len(valid) - 1, min(n_rows, len(valid))).astype(np.int64)
        chosen = valid[np.unique(np.concatenate((spread, [paid.argmin(), paid.argmax()])))]
        rows, columns = np.unravel_index(chosen, self.ep_length.shape)
        stored = self.rewards[rows, columns]
        after, before = (
            self._goal_rewards(rows, columns, observations["desired_goal"][rows, columns])
            for observations in (self.next_observations, self.observations)
        )
        wrong = ~(np.isclose(after, stored, rtol=1e-4, atol=1e-5) | np.isclose(before, stored, rtol=1e-4, atol=1e-5))
        if not wrong.any():
            return None
        example = int(np.flatnonzero(wrong)[0])
        return (
            f"{int(wrong.sum())} of {len(chosen)} stored rewards are not what the environment's compute_reward gives for the "
            f"stored goals: at row {int(rows[example])} the stored reward is {float(stored[example]):g}, compute_reward gives "
            f"{float(after[example]):g}. Relabelled rewards would be in other units than stored ones. Where rewards were "
            "scaled and shifted, wrap the environment in cql_plugins.sb3.ScaleReward(env, scale, shift) with the same numbers."
        )


def _reward_scale(env: VecNormalize | None) -> float:
    """What ``VecNormalize`` divides rewards by at this moment."""
    if env is None or not env.norm_reward:
        return 1.0
    return float(np.sqrt(env.ret_rms.var + env.epsilon))


def _reward_limit(env: VecNormalize | None) -> float:
    """The largest stored reward that ``VecNormalize`` does not clip at this moment."""
    if env is None or not env.norm_reward:
        return np.inf
    return env.clip_reward * _reward_scale(env)


def _empty_buffer(base: type[ReplayBuffer]) -> ReturnsToGoMixin:
    buffer_class = returns_to_go_buffer_class(base)
    return buffer_class.__new__(buffer_class)


@cache
def returns_to_go_buffer_class(base: type[ReplayBuffer]) -> type[ReturnsToGoMixin]:
    """Get the subclass of an SB3 replay buffer class that carries returns-to-go.

    Args:
        base: ``ReplayBuffer``, ``DictReplayBuffer``, ``NStepReplayBuffer``, ``HerReplayBuffer`` or a subclass of one.

    Returns:
        ``base`` itself where it carries them already. One class for each base; its buffers can be pickled.
    """
    if issubclass(base, ReturnsToGoMixin):
        return base
    mixin = HindsightReturnsMixin if issubclass(base, HerReplayBuffer) else ReturnsToGoMixin
    return type(f"ReturnsToGo{base.__name__}", (mixin, base), {"__module__": __name__, "__doc__": base.__doc__})


def with_returns_to_go(
    buffer: ReplayBuffer, gamma: float, tail: ReturnTail = "zero", failure_reward: float | None = None
) -> ReturnsToGoMixin:
    """Extend an SB3 replay buffer by the returns-to-go of all that it holds.

    Args:
        buffer: The buffer; its observations and rewards are shared with the result, its actions are copied.
        gamma: Discount factor of the training.
        tail: What follows a truncated end.
        failure_reward: The reward of a step without success, for the ``sparse`` tail; the smallest stored where ``None``.

    Returns:
        A buffer of a subclass of ``buffer``'s class; ``buffer`` itself where it carries these returns-to-go already.
    """
    if isinstance(buffer, ReturnsToGoMixin):
        extended: ReturnsToGoMixin = buffer if buffer.has_settings(gamma, tail) else buffer.with_own_returns()
    else:
        extended = _empty_buffer(type(buffer))
        extended.__dict__.update(buffer.__dict__)
        extended._init_returns()
    extended.configure_returns(gamma, tail, failure_reward)
    extended.recompute_returns()
    return extended
