"""ONNX files, by torch's present exporter: d3rlpy's own call fails with torch 2.9 and later."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch as th

_OPSET = 18


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
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f'{package} is needed here: {error}. Install it with: pip install "cql-plugins[onnx]"') from error
    batch: Any = th.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # torch's own code, on itself.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        th.onnx.export(
            module,
            examples,
            path,
            dynamo=True,
            opset_version=_OPSET,
            input_names=[f"input_{i}" for i in range(len(examples))],
            output_names=["output_0"],
            dynamic_shapes=(tuple({0: batch} for _ in examples),),
            external_data=False,
            verbose=False,
        )
