"""Several processes that train one model together through ``torch.distributed``, each on its share of every batch.

The means over the shares are the means over the batch, so that with averaged gradients all processes do the step that one
process would have done with the whole batch, and their parameters stay equal to the last bit.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.utils import set_random_seed

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)
"""Of a group made here: torch's default for Gloo; the one for NCCL is shorter."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch's ``env://`` reads: torchrun sets them, and so do others. One alone may mean something else."""


def world_size() -> int:
    """Tell how many processes train together: those of the process group, else as many as a launcher says it started."""
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


class Ranks:
    """The processes of one training run, seen from one of them.

    Made, used and closed by all of them at the same points of the program. Where there is no process group yet, one is made as
    the launcher says: Gloo for a model on the CPU, NCCL for one on a GPU. It outlives this object: a second one under the same
    launcher could not be made. Ranks wait for each other as long as that group says.

    Args:
        device: Of the model. With NCCL each rank needs a GPU of its own.

    Raises:
        ValueError: If two ranks share a GPU that NCCL is to use.

    Attributes:
        rank: Number of this process; the first is 0.
        size: How many there are.
    """

    def __init__(self, device: th.device) -> None:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        # A group of this run's own, on the host: its messages do not wait for a GPU, and a rank that fails closes it, so that
        # the others fail at once instead of waiting for the missing one.
        self._host: Any = dist.new_group(backend="gloo", timeout=_timeout_of(dist.group.WORLD))
        self._tensors: Any = dist.group.WORLD if device.type == "cuda" else self._host
        if device.type == "cuda" and "nccl" in dist.get_backend_config():
            refuse_shared_gpus(self.gather(str(th.cuda.get_device_properties(device).uuid)))
        # From the stream that the model's seed started, and another one in each run.
        self._seed = self.from_first(int(np.random.randint(2**31)))  # noqa: NPY002

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs, saves and runs callbacks."""
        return self.rank == 0

    def close(self) -> None:
        """End the run; ranks that still wait for this one fail."""
        dist.destroy_process_group(self._host)

    # Messages --------------------------------------------------------------------------------------------------------

    def from_first(self, value: T) -> T:
        """Get the first rank's value, its tensors on the CPU.

        Args:
            value: Any object that can be pickled; the other ranks' are ignored.
        """
        message: list[bytes | None] = [None]
        if self.is_first:
            packed = io.BytesIO()
            th.save(value, packed)
            message = [packed.getvalue()]
        dist.broadcast_object_list(message, src=0, group=self._host)
        assert message[0] is not None
        # Pickled by another process of this very run; a tensor of the first rank's GPU must not land on that GPU again.
        return th.load(io.BytesIO(message[0]), map_location="cpu", weights_only=False)  # type: ignore[no-any-return]

    def decision_of_first(self, decision: bool) -> bool:
        """Get the first rank's decision; cheap enough for each gradient step.

        Args:
            decision: The other ranks' are ignored.
        """
        flag = th.tensor([decision])
        dist.broadcast(flag, src=0, group=self._host)
        return bool(flag)

    def decision(self, goes_on: bool, signal: int) -> tuple[bool, int]:
        """Get the first rank's decision and any rank's signal; cheap enough for each gradient step.

        Args:
            goes_on: The other ranks' are ignored.
            signal: Number of the signal that this rank was sent; 0 for none.

        Returns:
            Whether to go on, and the largest number.
        """
        flags = th.tensor([self.is_first and not goes_on, signal], dtype=th.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._host)
        stops, received = flags.tolist()
        return not stops, received

    def require_equal(self, **values: Any) -> None:
        """Refuse to go on where the ranks were asked for different things: they would wait for each other.

        Args:
            **values: Of this rank, by name.

        Raises:
            ValueError: If they differ, on all ranks.
        """
        everyone = self.gather(values)
        for name in values:
            by_rank = [one[name] for one in everyone]
            if any(value != by_rank[0] for value in by_rank):
                raise ValueError(
                    f"All ranks must train alike, but {name} is [{', '.join(map(str, by_rank))}] on ranks 0 to "
                    f"{self.size - 1}. Build the model alike on all; a callback, which runs on rank 0 alone, cannot change it."
                )

    def any_of(self, finding: bool) -> bool:
        """Tell whether it is so on any rank; cheap enough for each gradient step.

        Args:
            finding: Of this rank.
        """
        flag = th.tensor([finding], dtype=th.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._host)
        return bool(flag)

    def gather(self, value: T) -> list[T]:
        """Get the values of all ranks, in their order.

        Args:
            value: Of this rank; any object that can be pickled.
        """
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self._host)
        return everyone

    # Tensors ---------------------------------------------------------------------------------------------------------

    @th.no_grad()
    def average(self, tensors: Sequence[th.Tensor]) -> None:
        """Replace tensors by their means over the ranks, in one exchange.

        Args:
            tensors: On the model's device, of the same shapes on all ranks; changed.
        """
        flat = th.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self._tensors)
        means = (flat / self.size).split([tensor.numel() for tensor in tensors])
        th._foreach_copy_(list(tensors), [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)])

    # Random numbers --------------------------------------------------------------------------------------------------

    def separate_streams(self) -> None:
        """Let every rank draw batches and noise of its own; the first one's streams go on as they are."""
        if not self.is_first:
            set_random_seed(self._stream(self.rank))

    @contextmanager
    def same_noise(self, clock: int) -> Iterator[None]:
        """Let every rank draw the same numbers from torch, and leave its streams where they were.

        Args:
            clock: For other numbers at another time.
        """
        with th.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            th.manual_seed(self._stream(0, clock))
            yield

    def _stream(self, *key: int) -> int:
        return int(np.random.SeedSequence(self._seed, spawn_key=key).generate_state(1)[0])


def _timeout_of(group: Any) -> timedelta:
    """How long the processes of a group wait for each other; torch has no public way to ask."""
    device = next(iter(group._device_types))
    options = getattr(group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", _TIMEOUT)
    return timeout


def refuse_shared_gpus(gpus: Sequence[str]) -> None:
    """Refuse two ranks on one GPU, for which NCCL has an error that names no remedy.

    Args:
        gpus: The GPU of each rank.

    Raises:
        ValueError: If one is there twice.
    """
    if len(set(gpus)) < len(gpus):
        raise ValueError(
            f"Each rank needs a GPU of its own; got {list(gpus)}. The process does not choose for the model: build it with "
            "device=f\"cuda:{os.environ['LOCAL_RANK']}\" ('cuda' and 'auto' are the first GPU in every process)."
        )
