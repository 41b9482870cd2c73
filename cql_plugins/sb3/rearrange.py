"""Replay buffers moved to another number of environments or another size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins.sb3.buffers import ReturnsToGoMixin, with_returns_to_go

Rows = list[tuple[int, NDArray[np.int64]]]
"""Rows of the old buffer in the order of time, with their environment."""


def refill(target: ReplayBuffer, source: ReplayBuffer) -> None:
    """Fill an empty buffer with what another one holds, whatever their numbers of environments and sizes.

    Every transition keeps its values, its return-to-go and its order in time; the oldest go where there is no room. Episodes
    that were running are over: no return is known for them. Of hindsight buffers whole episodes are taken, finished ones.
    Returns-to-go that only the new buffer carries are summed first, while episodes are in one piece.

    Args:
        target: An empty buffer of the same kind.
        source: The buffer to take from.

    Raises:
        ValueError: If their kinds differ, or both keep each observation once (``optimize_memory_usage``).
    """
    if target.optimize_memory_usage or source.optimize_memory_usage:
        raise ValueError(
            f"A replay buffer with optimize_memory_usage=True cannot go from {source.n_envs} environments and "
            f"{source.buffer_size} rows to {target.n_envs} and {target.buffer_size}: its rows are each other's next "
            "observations. Keep both, or start with an empty buffer."
        )
    if isinstance(source, HerReplayBuffer) != isinstance(target, HerReplayBuffer):
        raise ValueError(f"Cannot fill a {type(target).__name__} from a {type(source).__name__}.")
    if isinstance(target, ReturnsToGoMixin) and not isinstance(source, ReturnsToGoMixin):
        source = with_returns_to_go(source, target._returns_gamma, target._return_tail, target.failure_reward)
    if isinstance(target, HerReplayBuffer):
        target.ep_start[:], target.ep_length[:] = 0, 0  # SB3's `reset` keeps the episodes that were there.
    columns = _whole_episodes(source, target) if isinstance(source, HerReplayBuffer) else _even_shares(source, target)
    length = max((sum(len(rows) for _, rows in column) for column in columns), default=0)
    for index, column in enumerate(columns):
        start = 0
        for environment, rows in column:
            place = slice(start, start + len(rows))
            _copy(target, source, place, index, environment, rows)
            if isinstance(target, HerReplayBuffer):
                target.ep_start[place, index], target.ep_length[place, index] = start, len(rows)
            start += len(rows)
    target.pos, target.full = length % target.buffer_size, length >= target.buffer_size
    if isinstance(target, HerReplayBuffer):
        target._current_ep_start[:] = target.pos
    if isinstance(target, ReturnsToGoMixin):
        target._largest_reward = float(np.abs(target.rewards[:length]).max(initial=0.0))
        target.failure_reward = getattr(source, "failure_reward", None)
        target._reward_limit = getattr(source, "_reward_limit", np.inf)
        target._running_length[:] = 0


def _even_shares(source: ReplayBuffer, target: ReplayBuffer) -> list[Rows]:
    """Put all environments' records one after the other and cut that into as many equal parts as are wanted."""
    size = source.size()
    in_order = (np.arange(size) + (source.pos if source.full else 0)) % source.buffer_size
    length = min(size * source.n_envs // target.n_envs, target.buffer_size)
    # The oldest of each environment go first.
    surplus = size * source.n_envs - length * target.n_envs
    drops = [surplus // source.n_envs + (environment < surplus % source.n_envs) for environment in range(source.n_envs)]
    pieces = [(environment, in_order[drop:]) for environment, drop in enumerate(drops)]
    columns: list[Rows] = []
    for _ in range(target.n_envs):
        column, room = [], length
        while room:
            environment, rows = pieces[0]
            taken, rest = rows[:room], rows[room:]
            column.append((environment, taken))
            room -= len(taken)
            pieces[:1] = [(environment, rest)] if len(rest) else []
        columns.append(column)
    return columns


def _whole_episodes(source: HerReplayBuffer, target: ReplayBuffer) -> list[Rows]:
    """Give each finished episode, newest first while there is room, to the environment that has the fewest rows yet."""
    found = []
    for environment in range(source.n_envs):
        rows = np.flatnonzero(source.ep_length[:, environment] > 0)
        for start in np.unique(source.ep_start[rows, environment]):
            length = int(source.ep_length[start, environment])
            age = (source.pos - 1 - start) % source.buffer_size
            found.append((int(age), environment, (start + np.arange(length)) % source.buffer_size))
    columns: list[Rows] = [[] for _ in range(target.n_envs)]
    used = [0] * target.n_envs
    for _, environment, rows in sorted(found, key=lambda episode: episode[:2]):
        index = int(np.argmin(used))
        if used[index] + len(rows) <= target.buffer_size:
            columns[index].insert(0, (environment, rows))
            used[index] += len(rows)
    return columns


def _copy(
    target: ReplayBuffer, source: ReplayBuffer, place: slice, index: int, environment: int, rows: NDArray[np.int64]
) -> None:
    for name in ("observations", "next_observations"):
        own, theirs = getattr(target, name), getattr(source, name)
        for to, of in [(own[key], theirs[key]) for key in own] if isinstance(own, dict) else [(own, theirs)]:
            to[place, index] = of[rows, environment]
    names = ["actions", "rewards", "dones", "timeouts"]
    has_returns = isinstance(target, ReturnsToGoMixin) and isinstance(source, ReturnsToGoMixin)
    names += ["returns_to_go", "_cuts"] if has_returns else []
    names += ["infos"] if getattr(target, "copy_info_dict", False) and getattr(source, "copy_info_dict", False) else []
    for name in names:
        getattr(target, name)[place, index] = getattr(source, name)[rows, environment]
    last = place.stop - 1
    if not target.dones[last, index]:
        if isinstance(target, ReturnsToGoMixin):
            target._cuts[last, index] = True
        if isinstance(target, NStepReplayBuffer):
            # Else rewards would be summed across the seam. To a sum of n steps a broken record is a truncated one.
            target.timeouts[last, index] = 1.0


def column_arrays(buffer: ReplayBuffer) -> dict[str, Any]:
    """The arrays of a buffer that have a row for each step: by name, and dicts of them.

    Args:
        buffer: Any of SB3's or ours.
    """
    views = ("actions", "returns_to_go") if isinstance(buffer, ReturnsToGoMixin) else ()
    found = {}
    for name, value in vars(buffer).items():
        leaves = list(value.values()) if isinstance(value, dict) else [value]
        if name not in views and leaves and all(_is_column(leaf, buffer) for leaf in leaves):
            found[name] = value
    return found


def _is_column(value: Any, buffer: ReplayBuffer) -> bool:
    return isinstance(value, np.ndarray) and value.shape[:2] == (buffer.buffer_size, buffer.n_envs)


__all__ = ["column_arrays", "refill"]
