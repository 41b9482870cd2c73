"""ONNX files of d3rlpy's policies: d3rlpy's own call fails with torch 2.9 and later."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch as th
from d3rlpy.torch_utility import unwrap_ddp_model

from cql_plugins._files import whole_file
from cql_plugins._onnx import onnx_bytes


def example_inputs(shapes: Sequence[Sequence[int]], device: str) -> tuple[th.Tensor, ...]:
    """Make observations to trace with: two rows, since the exporter takes a batch of one for a constant.

    Args:
        shapes: Shapes of one observation.
        device: Where the parameters are.
    """
    return tuple(th.rand(2, *shape, device=device) for shape in shapes)


def export_onnx(module: th.nn.Module, examples: tuple[th.Tensor, ...], path: str) -> None:
    """Write a module as an ONNX file for batches of any size.

    Args:
        module: From one tensor for each input to one tensor; its parameters are constants of the file.
        examples: From :func:`example_inputs`.
        path: Where to.

    Raises:
        ImportError: If the packages that write ONNX are missing.
    """
    contents = onnx_bytes(module, examples, [f"input_{i}" for i in range(len(examples))], "output_0")
    with whole_file(path) as file:
        file.write(contents)


def alone(impl: Any) -> Any:
    """Take an implementation out of ``DistributedDataParallel``, which cannot be traced.

    Args:
        impl: Of any of the algorithms; stays as it is.

    Returns:
        A shallow copy to predict with, with the same parameters.
    """
    networks = {name: unwrap_ddp_model(module) for name, module in impl.modules.get_torch_modules().items()}
    impl = copy.copy(impl)
    impl._modules = dataclasses.replace(impl._modules, **networks)
    impl._q_func_forwarder = copy.copy(impl._q_func_forwarder)
    impl._q_func_forwarder._forwarders = [copy.copy(own) for own in impl._q_func_forwarder.forwarders]
    for forwarder, q_func in zip(impl._q_func_forwarder.forwarders, networks["q_funcs"], strict=True):
        forwarder.set_q_func(q_func)
    return impl
