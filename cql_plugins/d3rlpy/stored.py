"""What a checkpoint holds of buffers and data: the online buffer whole, the logged data's identity, bootstrapped returns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from d3rlpy.dataset import Episode, EpisodeBase, FIFOBuffer, InfiniteBuffer, ReplayBufferBase, Signature
from d3rlpy.types import NDArray

from cql_plugins._checkpoints import CheckpointError, ContentHash
from cql_plugins.d3rlpy.batches import ReturnsSettings
from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer
from cql_plugins.d3rlpy.episodes import CompleteEpisode, EpisodeEnd, end_of, mark_end
from cql_plugins.d3rlpy.online import OfflineOnlineReplayBuffer, ReturnsToGoReplayBuffer

_BLOCK = 2**25
"""Bytes of episodes in one array of the archive: neither writing nor reading needs the buffer's memory twice."""


class LazyArrays(Mapping[str, NDArray]):
    """Arrays by name, some of which are put together only when they are asked for."""

    def __init__(self) -> None:
        self.parts: dict[str, NDArray | Callable[[], NDArray]] = {}

    def __getitem__(self, name: str) -> NDArray:
        part = self.parts[name]
        return part() if callable(part) else part

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


# The logged data's identity ---------------------------------------------------------------------------------------------


def identity_of(dataset: ReplayBufferBase) -> dict[str, Any]:
    """Hash what logged episodes hold, in their order.

    Args:
        dataset: The data.

    Returns:
        Counts, and SHA-256 of each kind of content; ``"set"`` is that of the episodes whatever their order.
    """
    names = ("observations", "actions", "rewards", "terminated")
    hashes = {name: hashlib.sha256() for name in names}
    episodes = []
    for episode in dataset.episodes:
        observations = episode.all_observations if isinstance(episode, CompleteEpisode) else episode.observations
        contents: dict[str, Sequence[Any]] = {
            "observations": _leaves(observations),
            "actions": [episode.actions],
            "rewards": [episode.rewards],
            "terminated": [np.array([bool(episode.terminated), end_of(episode).cut, end_of(episode).padded])],
        }
        whole = hashlib.sha256()
        for name in names:
            content = ContentHash()
            for array in contents[name]:
                content.add(name, array)
            digest = content.hexdigest().encode()
            hashes[name].update(digest)
            whole.update(digest)
        episodes.append(whole.digest())
    return {
        "episodes": len(episodes),
        "transitions": int(dataset.transition_count),
        **{name: hashes[name].hexdigest() for name in names},
        "set": hashlib.sha256(b"".join(sorted(episodes))).hexdigest(),
    }


def check_identity(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Refuse other logged data than that of a checkpoint.

    Args:
        then: The checkpoint's identity, ``None`` where it had no data.
        now: That of what there is.

    Raises:
        CheckpointError: If they differ; the message says in what.
    """
    if then == now:
        return
    if then is None:
        raise CheckpointError("The run of the checkpoint had no logged data, this one has: call set_offline_data(None).")
    if now is None:
        raise CheckpointError(
            f"The run of the checkpoint had logged data ({then['episodes']} episodes, {then['transitions']} transitions), this "
            "one has none. Give it: load_checkpoint(path, algo, dataset=...), or algo.set_offline_data(dataset)."
        )
    if then["set"] == now["set"]:
        raise CheckpointError(
            "The logged data is not that of the checkpoint: it has the same episodes in another order. Batches would be others."
        )
    counts = [f"{then[name]} {name} then, {now[name]} now" for name in ("episodes", "transitions") if then[name] != now[name]]
    contents = [name for name in ("observations", "actions", "rewards", "terminated") if then[name] != now[name]]
    raise CheckpointError(
        "The logged data is not that of the checkpoint. It differs in "
        + "; ".join([*counts, *(f"{name} (sha256 {then[name][:12]} then, {now[name][:12]} now)" for name in contents)])
        + ". Load the same data, prepared in the same way."
    )


# The buffer that is collected into --------------------------------------------------------------------------------------


def pack_buffer(buffer: ReturnsToGoReplayBuffer, arrays: LazyArrays) -> dict[str, Any]:
    """Describe an online buffer for a checkpoint; an episode that runs is in it as one that was broken off.

    Args:
        buffer: The buffer; as it was afterwards.
        arrays: What its arrays are added to.
    """
    storage = buffer.buffer
    running = buffer._running_episode if buffer.has_running_episode else None
    episodes = [episode for episode in storage.episodes if episode is not running]
    listed = list(range(len(episodes)))
    numbers = {id(episode): number for number, episode in enumerate(episodes)}
    pairs: Any = getattr(storage, "_transitions", None)  # a deque is slow by index
    rows: list[tuple[int, int]] = []
    for episode, index in (storage[i] for i in range(storage.transition_count)) if pairs is None else pairs:
        if episode is running:
            continue
        number = numbers.get(id(episode))
        if number is None:
            number = numbers[id(episode)] = len(episodes)
            episodes.append(episode)
        rows.append((number, index))
    if buffer.has_running_episode and (broken := buffer.broken_off()) is not None:
        n_transitions = len(broken.rewards) - 1
        listed.append(len(episodes))
        rows.extend((len(episodes), index) for index in range(n_transitions))
        episodes.append(broken)
    parts = arrays.parts
    table = np.array(rows, dtype=np.int32).reshape(-1, 2)
    parts["buffer.transitions"] = table
    parts["buffer.listed"] = np.array(listed, dtype=np.int32)
    ends = [end_of(episode) for episode in episodes]
    parts["buffer.lengths"] = np.array([len(episode.rewards) for episode in episodes], dtype=np.int64)
    parts["buffer.flags"] = np.array(
        [
            (
                isinstance(episode, CompleteEpisode),
                bool(episode.terminated),
                end.cut,
                end.padded,
                end.final_observation is not None,
            )
            for episode, end in zip(episodes, ends, strict=True)
        ],
        dtype=np.bool_,
    ).reshape(-1, 5)
    starts = _pack_blocks(episodes, ends, parts)
    return {
        "blocks": starts,
        "n_leaves": len(buffer.dataset_info.observation_signature.dtype),
        "signature": signature_of(buffer),
        "capacity": storage._limit if isinstance(storage, FIFOBuffer) else None,
        "reward_range": [float(value) for value in buffer._reward_range],
    }


def _pack_blocks(episodes: Sequence[EpisodeBase], ends: Sequence[EpisodeEnd], parts: dict[str, Any]) -> list[int]:
    """Add the episodes' arrays, several episodes in each; return the first episode of each block."""
    contents = [_contents(episode, end) for episode, end in zip(episodes, ends, strict=True)]
    starts: list[int] = []
    size, layout = 0, None
    for number, content in enumerate(contents):
        own_layout = {name: (array.dtype, array.shape[1:]) for name, array in content.items() if not name.startswith("final")}
        if not starts or size > _BLOCK or own_layout != layout:
            starts.append(number)
            size, layout = 0, own_layout
        size += sum(array.nbytes for array in content.values())
    for block, (start, stop) in enumerate(zip(starts, [*starts[1:], len(contents)], strict=True)):
        for name in sorted({name for content in contents[start:stop] for name in content}):
            pieces = [content[name] for content in contents[start:stop] if name in content]
            parts[f"buffer.{block}.{name}"] = lambda pieces=pieces: np.concatenate(pieces)
    return starts


def _contents(episode: EpisodeBase, end: EpisodeEnd) -> dict[str, NDArray]:
    observations = episode.all_observations if isinstance(episode, CompleteEpisode) else episode.observations
    contents = {f"observations.{i}": leaf for i, leaf in enumerate(_leaves(observations))}
    contents |= {"actions": episode.actions, "rewards": episode.rewards}
    if end.final_observation is not None:
        contents |= {f"final.{i}": np.asarray(leaf)[None] for i, leaf in enumerate(_leaves(end.final_observation))}
    return contents


class StoredBuffer:
    """An online buffer that was read from a checkpoint.

    Args:
        packed: What :func:`pack_buffer` returned.
        arrays: The checkpoint's arrays.
    """

    def __init__(self, packed: dict[str, Any], arrays: Mapping[str, NDArray]) -> None:
        self._packed = packed
        self._listed = arrays["buffer.listed"].tolist()
        self._transitions = arrays["buffer.transitions"].tolist()
        self._episodes: list[Any] = []
        lengths, flags = arrays["buffer.lengths"].tolist(), arrays["buffer.flags"].tolist()
        starts = packed["blocks"]
        for block, (start, stop) in enumerate(zip(starts, [*starts[1:], len(lengths)], strict=True)):
            taken: dict[str, int] = {}

            def take(name: str, count: int, block: int = block, taken: dict[str, int] = taken) -> NDArray:
                start = taken.get(name, 0)
                taken[name] = start + count
                return arrays[f"buffer.{block}.{name}"][start : start + count]

            for number in range(start, stop):
                self._episodes.append(self._unpack(take, lengths[number], *flags[number]))

    def _unpack(
        self,
        take: Callable[[str, int], NDArray],
        n_rows: int,
        complete: bool,
        terminated: bool,
        cut: bool,
        padded: bool,
        final: bool,
    ) -> Any:
        def leaves(name: str, count: int) -> Any:
            found = [take(f"{name}.{i}", count) for i in range(self._packed["n_leaves"])]
            return found[0] if len(found) == 1 else found

        observations, actions, rewards = (
            leaves("observations", n_rows + complete),
            take("actions", n_rows),
            take("rewards", n_rows),
        )
        if complete:
            return CompleteEpisode(observations, actions, rewards, terminated, cut)
        episode = Episode(observations, actions, rewards, terminated)
        last = leaves("final", 1) if final else None
        if last is not None:
            last = last[0] if isinstance(last, np.ndarray) else [leaf[0] for leaf in last]
        mark_end(episode, EpisodeEnd(cut, padded, last))
        return episode

    def put_into(self, buffer: ReturnsToGoReplayBuffer) -> None:
        """Give a buffer this content in the place of its own.

        Args:
            buffer: The buffer; written to.

        Raises:
            CheckpointError: If it is another kind of buffer.
        """
        storage = buffer.buffer
        if (now := signature_of(buffer)) != self._packed["signature"]:
            raise CheckpointError(f"The buffer of the checkpoint holds {self._packed['signature']}, this one {now}.")
        capacity = storage._limit if isinstance(storage, FIFOBuffer) else None
        if capacity != self._packed["capacity"]:
            raise CheckpointError(
                f"The buffer of the checkpoint has room for {self._packed['capacity']} transitions, this one for {capacity}."
            )
        listed = [self._episodes[number] for number in self._listed]
        pairs = [(self._episodes[number], index) for number, index in self._transitions]
        if type(storage) in (FIFOBuffer, InfiniteBuffer):
            stored: Any = storage
            stored._transitions.clear()
            stored._transitions.extend(pairs)
            stored._episodes[:] = listed
        elif storage.transition_count:
            raise CheckpointError(f"The {type(storage).__name__} must be empty, for the checkpoint's content to go into it.")
        else:
            for episode, index in pairs:
                storage.append(episode, index)
        low, high = self._packed["reward_range"]
        buffer._reward_range = (low, high)
        buffer._records = {}


def signature_of(buffer: ReplayBufferBase) -> str:
    """Describe what steps a buffer holds.

    Args:
        buffer: The buffer.
    """

    def described(signature: Signature) -> str:
        return " + ".join(
            f"{np.dtype(dtype).name}{list(shape)}" for dtype, shape in zip(signature.dtype, signature.shape, strict=True)
        )

    info = buffer.dataset_info
    return (
        f"observations {described(info.observation_signature)}, actions {described(info.action_signature)} "
        f"({info.action_space.name.lower()}, {info.action_size})"
    )


# Bootstrapped returns ---------------------------------------------------------------------------------------------------


def pack_returns(buffer: ReplayBufferBase | None, settings: ReturnsSettings, arrays: LazyArrays, name: str) -> Any:
    """Describe returns that later critics would give otherwise: those with bootstrapped tails.

    Args:
        buffer: Where they are.
        settings: How returns are summed now; those of earlier settings are left out.
        arrays: What their arrays are added to.
        name: What to call these.
    """
    if isinstance(buffer, OfflineOnlineReplayBuffer):
        return [pack_returns(part, settings, arrays, f"{name}.{i}") for i, part in enumerate((buffer.online, buffer.offline))]
    if isinstance(buffer, OfflineReplayBuffer) and buffer._returns is not None and buffer._returns[0].is_same(settings):
        arrays.parts[name] = buffer._returns[1]
        return {"array": name}
    if isinstance(buffer, ReturnsToGoReplayBuffer):
        known = []
        for episode in buffer.episodes:
            record = buffer._records.get(id(episode))
            is_known = record is not None and record.returns is not None and settings.is_same(record.settings)
            known.append(record.returns if record is not None and is_known else None)
        arrays.parts[f"{name}.lengths"] = np.array(
            [-1 if returns is None else len(returns) for returns in known], dtype=np.int64
        )
        arrays.parts[name] = np.concatenate([np.zeros(0, np.float32), *(returns for returns in known if returns is not None)])
        return {"array": name, "lengths": f"{name}.lengths"}
    return None


def put_returns(buffer: ReplayBufferBase | None, packed: Any, settings: ReturnsSettings, arrays: Mapping[str, NDArray]) -> None:
    """Undo :func:`pack_returns`.

    Args:
        buffer: Where they go; written to.
        packed: What it returned.
        settings: How returns are summed now.
        arrays: The checkpoint's arrays.
    """
    if isinstance(packed, list) and isinstance(buffer, OfflineOnlineReplayBuffer):
        for part, of_part in zip((buffer.online, buffer.offline), packed, strict=True):
            put_returns(part, of_part, settings, arrays)
    elif isinstance(buffer, OfflineReplayBuffer) and packed is not None:
        buffer._returns = (settings, arrays[packed["array"]])
    elif isinstance(buffer, ReturnsToGoReplayBuffer) and packed is not None:
        start = 0
        for episode, length in zip(buffer.episodes, arrays[packed["lengths"]].tolist(), strict=False):
            if length >= 0:
                buffer.set_returns(episode, settings, arrays[packed["array"]][start : start + length])
                start += length


def _leaves(observations: Any) -> list[Any]:
    return [observations] if isinstance(observations, np.ndarray) else list(observations)
