"""Gradient steps as CUDA graphs: recorded once, then replayed with one launch.

The networks of offline RL are small: on a GPU the hundreds of kernels of an update are faster than Python can launch them. A
graph holds them all, the noise and the optimisers' steps included, so that a replay does what the same step would have done.
What Python decides (phases, weights, sizes) is frozen in a graph; each combination that occurs gets one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch as th

from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.metrics import MetricsVector

_WARM_UP = 3
"""Steps of each kind that run as they are, on a stream of their own, before one is recorded."""


class _Recording(NamedTuple):
    """A graph, where it reads its batch and where it leaves its metrics."""

    graph: Any
    batch: Batch
    metrics: MetricsVector


class CapturedSteps:
    """Runs gradient steps through CUDA graphs, made when a kind of step occurs for the fourth time.

    Args:
        step: Does one gradient step on a batch without waiting for the device.
        key: Describes all that the step reads from Python and that may change between two steps.
        record: Records a function into a graph with a ``replay`` method, and returns both the graph and the function's result;
            a CUDA graph where ``None``.
    """

    def __init__(
        self,
        step: Callable[[Batch], MetricsVector],
        key: Callable[[], Hashable],
        record: Callable[[Callable[[], MetricsVector]], tuple[Any, MetricsVector]] | None = None,
    ) -> None:
        self._step, self._key, self._record = step, key, record or _record_cuda_graph
        self._warm_ups: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, batch: Batch) -> MetricsVector:
        """Do one gradient step.

        Args:
            batch: The batch; copied into the graph's own.

        Returns:
            Its metrics: tensors that the next step overwrites.
        """
        tensors = batch.tensors()
        kind = (self._key(), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        recording = self._recordings.get(kind)
        if recording is None:
            if self._warm_ups.get(kind, 0) < _WARM_UP:
                self._warm_ups[kind] = self._warm_ups.get(kind, 0) + 1
                return _on_side_stream(self._step, batch)
            own = batch.map(th.clone)
            graph, metrics = self._record(lambda: self._step(own))
            recording = self._recordings[kind] = _Recording(graph, own, metrics)
        th._foreach_copy_(list(recording.batch.tensors().values()), list(tensors.values()))
        recording.graph.replay()
        return recording.metrics


def _record_cuda_graph(function: Callable[[], MetricsVector]) -> tuple[Any, MetricsVector]:
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        metrics = function()
    return graph, metrics


def _on_side_stream(step: Callable[[Batch], MetricsVector], batch: Batch) -> MetricsVector:
    """Run a step as CUDA asks for before a capture: libraries take their workspaces on another stream than the default."""
    if not batch.actions.is_cuda:
        return step(batch)
    stream = th.cuda.Stream()
    stream.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(stream):
        metrics = step(batch)
    th.cuda.current_stream().wait_stream(stream)
    return metrics


# Optimisers ------------------------------------------------------------------------------------------------------------


def is_capturable(optimizer: th.optim.Optimizer) -> bool:
    """Tell whether an optimiser's step can be part of a graph.

    Args:
        optimizer: Any; Adam and its kin can.
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
        rate, device = group["lr"], group["params"][0].device
        if not isinstance(rate, th.Tensor):
            own = group.get("_rate")
            if own is None:
                own = group["_rate"] = th.zeros((), device=device)
                group["_rate_value"] = None
            if group["_rate_value"] != rate:
                own.fill_(rate)
                group["_rate_value"] = rate
            group["lr"] = own
        group["capturable"] = True
    make_fused(optimizer)


def make_fused(optimizer: th.optim.Optimizer) -> None:
    """Let an optimiser step all its parameters in one kernel, where it can.

    Args:
        optimizer: Changed. Results are those of the plain form up to rounding.
    """
    for group in optimizer.param_groups:
        if "fused" not in group or group["fused"]:
            continue  # An optimiser that has no such form, or done already.
        group["fused"], group["foreach"] = True, None
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
    for group in state["param_groups"]:
        own = {key: value for key, value in group.items() if key not in ("_rate", "_rate_value")}
        if "_rate_value" in group:
            own["lr"] = group["_rate_value"]
        if own.get("fused"):
            own["fused"] = None
        if own.get("capturable"):
            own["capturable"] = False
        groups.append(own)
    steps = {
        index: {**values, "step": values["step"].cpu()} if isinstance(values.get("step"), th.Tensor) else values
        for index, values in state["state"].items()
    }
    return {"state": steps, "param_groups": groups}
