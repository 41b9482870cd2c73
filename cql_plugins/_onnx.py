"""ONNX files by torch's present exporter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch as th

_OPSET = 18


def onnx_bytes(
    module: th.nn.Module,
    examples: tuple[th.Tensor, ...],
    inputs: Sequence[str],
    output: str,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Give a module as the contents of an ONNX file, for batches of any size.

    Args:
        module: From one tensor for each input to one tensor; its parameters are constants of the file.
        examples: What to trace with: two rows each, since the exporter takes a batch of one for a constant.
        inputs: Names of the inputs.
        output: Name of the output.
        metadata: Kept in the file, as ``metadata_props``.

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
        program: Any = th.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(tuple({0: batch} for _ in examples),),
            verbose=False,
        )
    proto = program.model_proto
    # What torch notes of each node has lines of its caller's source, and the folders that they lie in.
    del proto.graph.metadata_props[:]
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    return bytes(proto.SerializeToString())


__all__ = ["onnx_bytes"]
