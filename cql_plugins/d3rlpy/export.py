"""ONNX files of d3rlpy's policies: d3rlpy's own call fails with torch 2.9 and later."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

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
