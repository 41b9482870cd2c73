"""A dataset that lies where the networks are: sampled there, no copy from the host in a gradient step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.buffers import ReturnsToGoMixin

_BLOCK = 4096
"""Rows that are copied at once."""


class DeviceData:
    """The rows of an SB3 replay buffer as tensors on one device.

    Rows are what the buffer's own sampler makes of them, n-step rewards and returns-to-go included. They are drawn with the
    device's random generator, so that batches are other ones than the buffer would draw.

    Args:
        buffer: The buffer; not changed later on.
        device: Where to keep the rows.

    Raises:
        ValueError: If the buffer draws its rows in a way of its own, or if they do not fit.
    """

    def __init__(self, buffer: ReplayBuffer, device: th.device) -> None:
        own = _own_sampling(type(buffer))
        if own is not None:
            raise ValueError(
                f"data_device draws rows uniformly, but {type(buffer).__name__} has its own {own}: leave data_device=None."
            )
        if isinstance(buffer, HerReplayBuffer) or buffer.n_envs != 1 or buffer.optimize_memory_usage:
            raise ValueError(
                "data_device takes buffers of one environment with rows of their own: no HerReplayBuffer, n_envs=1, "
                f"optimize_memory_usage=False; got a {type(buffer).__name__} with n_envs={buffer.n_envs}, "
                f"optimize_memory_usage={buffer.optimize_memory_usage}. Leave data_device=None, or pass an OfflineDataset."
            )
        self.buffer, self._device = buffer, device
        self._n_rows = buffer.size()
        self._check_room()
        # Those of Dict observations by "observations.<key>".
        self._columns: dict[str, th.Tensor] = {}
        for start in range(0, self._n_rows, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, self._n_rows))
            for name, part in self._read(rows).items():
                self._write(name, part, rows[0])
        self._returns_version = self._current_returns_version
        # By key: copies of the mean and the variance, and what is computed with on the device.
        self._statistics: dict[str, tuple[Any, Any, th.Tensor, th.Tensor]] = {}

    def _read(self, rows: np.ndarray) -> dict[str, Any]:
        """Get rows through the buffer's own sampler, without its random numbers."""
        buffer, state = self.buffer, np.random.get_state()  # noqa: NPY002 - SB3 draws the environment of each row
        narrow = buffer.actions
        if isinstance(buffer, ReturnsToGoMixin):
            buffer.actions = buffer._wide_actions
        try:
            samples = buffer._get_samples(rows)
        finally:
            buffer.actions = narrow
            np.random.set_state(state)  # noqa: NPY002
        read = {name: value for name, value in zip(samples._fields, samples, strict=True) if value is not None}
        if isinstance(buffer, ReturnsToGoMixin):
            wide = read["actions"]
            read["actions"], read["returns_to_go"] = wide[:, :-1], wide[:, -1:]
        return read

    def _write(self, name: str, part: Any, start: int) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                self._write(f"{name}.{key}", value, start)
            return
        if name not in self._columns:
            self._columns[name] = th.empty((self._n_rows, *part.shape[1:]), dtype=part.dtype, device=self._device)
        self._columns[name][start : start + len(part)] = part

    def _check_room(self) -> None:
        parts = self._read(np.arange(1)).values()
        tensors = [tensor for part in parts for tensor in (part.values() if isinstance(part, dict) else (part,))]
        needed = self._n_rows * sum(tensor.nbytes for tensor in tensors)
        if self._device.type == "cuda":
            free, _ = th.cuda.mem_get_info(self._device)
            if needed > 0.9 * free:
                raise ValueError(
                    f"The dataset needs {needed / 2**30:.1f} GiB on {self._device}, which has {free / 2**30:.1f} GiB left: "
                    "leave data_device=None to sample it from the host's memory."
                )

    @property
    def _current_returns_version(self) -> int:
        return self.buffer.returns_version if isinstance(self.buffer, ReturnsToGoMixin) else 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(column.nbytes for column in self._columns.values())

    def sample(self, batch_size: int, device: th.device, env: VecNormalize | None = None) -> Batch:
        """Draw rows uniformly, with replacement; nothing waits for the device.

        Args:
            batch_size: Number of transitions.
            device: Where the batch is wanted.
            env: ``VecNormalize`` wrapper, which normalises observations.

        Returns:
            The batch.

        Raises:
            ValueError: If the wrapper normalises rewards.
        """
        refuse_normalized_rewards(env)
        if self._returns_version != self._current_returns_version:
            self._returns_version = self._current_returns_version
            assert isinstance(self.buffer, ReturnsToGoMixin)
            self._columns["returns_to_go"].copy_(th.from_numpy(self.buffer.returns_to_go[: self._n_rows].copy()))
        rows = th.randint(self._n_rows, (batch_size,), device=self._device)
        batch: dict[str, Any] = {"discounts": None, "returns_to_go": None}
        for name, column in self._columns.items():
            field, _, key = name.partition(".")
            drawn = column.index_select(0, rows).to(device)
            if env is not None and env.norm_obs and field in ("observations", "next_observations"):
                drawn = self._normalize(drawn, key, env)
            if key:
                batch.setdefault(field, {})[key] = drawn
            else:
                batch[field] = drawn
        return Batch(**batch)

    def _normalize(self, observations: th.Tensor, key: str, env: VecNormalize) -> th.Tensor:
        """Normalise as ``VecNormalize`` does; its statistics are fetched again when they changed."""
        if key and env.norm_obs_keys is not None and key not in env.norm_obs_keys:
            return observations
        rms = env.obs_rms[key] if isinstance(env.obs_rms, dict) else env.obs_rms
        known = self._statistics.get(key)
        if known is None or not (np.array_equal(known[0], rms.mean) and np.array_equal(known[1], rms.var)):
            arrays = (rms.mean, np.sqrt(rms.var + env.epsilon))
            mean, scale = (th.as_tensor(array, dtype=th.float32, device=observations.device) for array in arrays)
            known = self._statistics[key] = (np.copy(rms.mean), np.copy(rms.var), mean, scale)
        return ((observations - known[2]) / known[3]).clamp_(-env.clip_obs, env.clip_obs)


def refuse_normalized_rewards(env: VecNormalize | None) -> None:
    """Refuse a wrapper whose rewards rows on a device would not follow.

    Args:
        env: ``VecNormalize`` wrapper, or none.

    Raises:
        ValueError: If it normalises rewards.
    """
    if env is not None and env.norm_reward:
        raise ValueError(
            "data_device and VecNormalize(norm_reward=True) do not go together: scale the dataset's rewards instead, or leave "
            "data_device=None."
        )


def _own_sampling(buffer_class: type[ReplayBuffer]) -> str | None:
    """The name of a sampling method that is neither SB3's nor ours, where there is one."""
    for name in ("sample", "_get_samples"):
        owners = {base.__module__.partition(".")[0] for base in buffer_class.__mro__ if name in vars(base)}
        if owners - {"stable_baselines3", "cql_plugins"}:
            return name
    return None
