"""Gradient steps as CUDA graphs: recorded once, then replayed with one launch.

The networks of offline RL are small: on a GPU the hundreds of kernels of an update are faster than Python can launch them. A
graph holds them all, the noise and the optimisers' steps included, so that a replay does what the same step would have done.
What Python decides (phases, weights, sizes) is frozen in a graph; each combination that occurs gets one of its own. An option
that changes in every step is therefore never captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch as th

from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.metrics import MetricsVector

_WARM_UP = 3
"""Steps of each kind that run as they are, on a stream of their own, before one is recorded."""
_MOST_GRAPHS = 8
"""Each holds the memory of a step; the one that was not used for longest goes first."""


class _Recording(NamedTuple):
    """A graph, where it leaves its metrics and where it reads its batch."""

    graph: Any
    metrics: MetricsVector
    batch: Batch


class CapturedSteps:
    """Runs gradient steps through CUDA graphs, made when a kind of step occurs for the fourth time.

    Args:
        step: Does one gradient step on a batch without waiting for the device.
        kind: Describes what the step reads from Python and what may change between two steps.
        record: Records a function into a graph with a ``replay`` method, and returns both the graph and the function's result;
            a CUDA graph where ``None``.
    """

    def __init__(
        self,
        step: Callable[[Batch], MetricsVector],
        kind: Callable[[], Hashable],
        record: Callable[[Callable[[], MetricsVector]], tuple[Any, MetricsVector]] | None = None,
    ) -> None:
        self._step, self._kind, self._record = step, kind, record or self._record_cuda_graph
        # In the order of their last use.
        self._warm_ups: OrderedDict[Hashable, int] = OrderedDict()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._surroundings: Any = None
        self._stream: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model records graphs of its own tensors."""
        return

    def __call__(self, batch: Batch) -> MetricsVector:
        """Do one gradient step.

        Args:
            batch: The batch; copied into the graph's own.

        Returns:
            Its metrics: tensors that the next step overwrites.
        """
        if not batch.actions.is_cuda:
            return self._run(batch)
        # Streams and graphs are those of the current device, which need not be the model's.
        with th.cuda.device(batch.actions.device):
            self._stream = self._stream or th.cuda.Stream()
            return self._run(batch)

    def require_same(self, tensors: Iterable[th.Tensor], optimizers: Iterable[th.optim.Optimizer]) -> None:
        """Drop all graphs where they would work on something else than the model does.

        Args:
            tensors: What a step reads or writes.
            optimizers: Those that it steps.
        """
        surroundings = (
            [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors],
            [_surroundings_of(optimizer) for optimizer in optimizers],
        )
        if surroundings != self._surroundings:
            self._surroundings = surroundings
            self._warm_ups.clear()
            self._recordings.clear()

    def _run(self, batch: Batch) -> MetricsVector:
        tensors = batch.tensors()
        kind = (self._kind(), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        recording = self._recordings.get(kind)
        if recording is None:
            if _counted(self._warm_ups, kind) <= _WARM_UP:
                return self._step_on_side_stream(batch)
            own = batch.map(th.clone)
            recording = _Recording(*self._record(lambda: self._step(own)), own)
            self._recordings[kind] = recording
            while len(self._recordings) > _MOST_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(kind)
        th._foreach_copy_(list(recording.batch.tensors().values()), list(tensors.values()))
        recording.graph.replay()
        return recording.metrics

    def _record_cuda_graph(self, function: Callable[[], MetricsVector]) -> tuple[Any, MetricsVector]:
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph, stream=self._stream):
            metrics = function()
        return graph, metrics

    def _step_on_side_stream(self, batch: Batch) -> MetricsVector:
        """Run a step as CUDA asks for before a capture: on the stream of the capture, which is not the default one."""
        if self._stream is None:
            return self._step(batch)
        self._stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(self._stream):
            metrics = self._step(batch)
        th.cuda.current_stream().wait_stream(self._stream)
        return metrics


def _counted(counts: OrderedDict[Hashable, int], kind: Hashable) -> int:
    """Count a kind; the one that was not seen for longest is forgotten where there are many."""
    counts[kind] = counts.pop(kind, 0) + 1
    while len(counts) > _MOST_GRAPHS:
        counts.popitem(last=False)
    return counts[kind]


def _surroundings_of(optimizer: th.optim.Optimizer) -> tuple[Any, ...]:
    """Where an optimiser's numbers lie, and its options but for the rate, which a graph reads anew."""
    options = [
        {name: value for name, value in group.items() if name not in ("params", "lr", "_rate", "_rate_value")}
        for group in optimizer.param_groups
    ]
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, th.Tensor))
    return options, [tensor.data_ptr() for tensor in tensors]


# Optimisers ------------------------------------------------------------------------------------------------------------


def is_capturable(optimizer: th.optim.Optimizer) -> bool:
    """Tell whether an optimiser's step can be part of a graph.

    Args:
        optimizer: Any; Adam and its kin can, SGD cannot.
    """
    return "capturable" in optimizer.defaults


def make_capturable(optimizer: th.optim.Optimizer) -> None:
    """Let an optimiser's step become part of a graph: its rates and step counts move to the device.

    Rates keep their tensors, so that a graph that was recorded reads what a schedule writes later. Costs next to nothing where
    all is done already.

    Args:
        optimizer: Changed.
    """
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not isinstance(rate, th.Tensor):
            own = group.get("_rate")
            if own is None:
                own = group["_rate"] = th.zeros((), device=group["params"][0].device)
                group["_rate_value"] = None
            if group["_rate_value"] != rate:
                own.fill_(rate)
                group["_rate_value"] = rate
            group["lr"] = own
        if not group["capturable"]:
            group["capturable"] = group["_made_capturable"] = True
            _count_on_the_device(optimizer, group)
    make_fused(optimizer)


def make_fused(optimizer: th.optim.Optimizer) -> None:
    """Let an optimiser step all its parameters in one kernel, where it can and nobody chose otherwise.

    Args:
        optimizer: Changed. Results are those of the plain form up to rounding.
    """
    for group in optimizer.param_groups:
        is_free = "fused" in group and group["fused"] is None and not group.get("foreach") and not group.get("differentiable")
        if is_free:
            group["fused"] = group["_made_fused"] = True
            _count_on_the_device(optimizer, group)


def _count_on_the_device(optimizer: th.optim.Optimizer, group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = th.as_tensor(state["step"], dtype=th.float32).to(parameter.device)


def portable_state(state: dict[str, Any]) -> dict[str, Any]:
    """Undo the above in an optimiser's state dict, so that the base class loads it on any device.

    Args:
        state: From ``optimizer.state_dict()``; not changed.
    """
    groups = []
    changed = False
    for group in state["param_groups"]:
        own = {key: value for key, value in group.items() if key not in ("_rate", "_rate_value")}
        if "_rate_value" in group:
            own["lr"] = group["_rate_value"]
        for option, plain in (("capturable", False), ("fused", None)):
            if own.pop(f"_made_{option}", False):
                own[option], changed = plain, True
        groups.append(own)
    if not changed:
        return {"state": state["state"], "param_groups": groups}
    steps = {
        index: {**values, "step": values["step"].cpu()} if isinstance(values.get("step"), th.Tensor) else values
        for index, values in state["state"].items()
    }
    return {"state": steps, "param_groups": groups}
