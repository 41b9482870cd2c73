"""SB3 replay buffers that carry returns-to-go.

The returns are one more column beside the actions, in one array: SB3's own sampling code then gathers them with the same
indices as the rest of a transition, at next to no cost, in every one of its buffers and with any number of environments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins.returns import ReturnTail, returns_to_go

TailValueFunction = Callable[[Any], NDArray[np.floating[Any]]]
"""From the observations after the truncated ends to their values, in the units of the rewards the critic sees."""

_LIMIT_TOLERANCE = 0.01
"""How far VecNormalize's reward clip may drift before returns are summed again, as a share."""


class ReturnsToGoSamples(NamedTuple):
    """SB3's ``ReplayBufferSamples`` (or its Dict form) and one column more.

    Attributes:
        returns_to_go: ``G(s)`` of each transition, shape ``(batch_size, 1)``, in the units of ``rewards``; ``-inf`` where it is
            not known (a running episode, a relabelled goal, a tail that is ``none``).
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    next_observations: th.Tensor | TensorDict
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    returns_to_go: th.Tensor


class ReturnsToGoMixin(ReplayBuffer):
    """Adds returns-to-go to the SB3 replay buffer class that follows it in the bases.

    Use :func:`returns_to_go_buffer_class` to get a class, :func:`with_returns_to_go` to extend a buffer that exists. An online
    transition has ``-inf`` until its episode ends; then the whole episode is filled in, each environment by itself.

    Attributes:
        returns_to_go: Shape ``(buffer_size, n_envs)``, float32: of the rewards as stored, or as clipped by ``VecNormalize``.
    """

    returns_to_go: NDArray[np.float32]

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
        self._largest_reward = max(self._largest_reward, float(np.abs(reward).max()))
        self._running_length = np.minimum(self._running_length + 1, self.buffer_size)
        for env_index in np.flatnonzero(done):
            length = int(self._running_length[env_index])
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
        timeouts = self.timeouts[rows, columns] > 0
        return (self.dones[rows, columns] > 0) & ~timeouts, timeouts

    def _compute_returns(self, rows: NDArray[np.int64], columns: slice) -> NDArray[np.float32]:
        """Compute the returns-to-go of consecutive rows; never writes."""
        terminations, truncations = self._flags(rows, columns)
        tail, tail_values = self._return_tail, None
        if tail == "bootstrap":
            tail_values = self._tail_values
            if tail_values is None or len(tail_values) != truncations.sum():
                # The value of an end is not known before the algorithm has estimated it.
                tail, tail_values = "none", None
        failure_reward = self.failure_reward
        if tail == "sparse" and failure_reward is None:
            failure_reward = float(self.rewards[: self.size()].min())
        return returns_to_go(
            np.clip(self.rewards[rows, columns], -self._reward_limit, self._reward_limit),
            terminations,
            truncations,
            self._returns_gamma,
            tail,
            failure_reward=failure_reward,
            tail_values=tail_values,
            cuts=self._cuts[rows, columns],
        )

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

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReturnsToGoSamples:  # type: ignore[override]
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
        return ReturnsToGoSamples(
            samples.observations,
            actions,
            samples.next_observations,
            samples.dones,
            samples.rewards,
            samples.discounts,
            returns if scale == 1.0 else returns / scale,
        )

    def _get_virtual_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Hindsight relabelling (``HerReplayBuffer``) changes the rewards, so the return is no longer known."""
        samples = super()._get_virtual_samples(*args, **kwargs)  # type: ignore[misc]
        samples.actions[:, -1] = -np.inf
        return samples

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
        base = type(self).__mro__[2]
        return _empty_buffer, (base,), self.__getstate__()


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
    return type(f"ReturnsToGo{base.__name__}", (ReturnsToGoMixin, base), {"__module__": __name__, "__doc__": base.__doc__})


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
        A buffer of a subclass of ``buffer``'s class; ``buffer`` itself where it carries returns-to-go already.
    """
    if isinstance(buffer, ReturnsToGoMixin):
        extended: ReturnsToGoMixin = buffer
    else:
        extended = _empty_buffer(type(buffer))
        extended.__dict__.update(buffer.__dict__)
        extended._init_returns()
    extended.configure_returns(gamma, tail, failure_reward)
    extended.recompute_returns()
    return extended
