"""Critics evaluated at many actions of each state: where CQL spends its time.

An update evaluates every critic at the data's action and ``3N`` others of each state and differentiates what comes out. Here
that is one operation over all of them which does less than the layers one by one, with the same result:

- the observation's part of the first layer is computed once for each state, not once for each action;
- going back, rows are left out whose gradients are too small to change a state's sum. The soft maximum weighs an action by
  ``exp(Q)``: after some training many weights are that small. How many is a matter of the data, and decided anew each time;
- no gradient is computed for actions, whose values the critic's loss takes as given;
- on a GPU the critics are one batched product.

Dimension letters: ``C`` critics, ``B`` batch, ``M`` actions of each state, ``R = B M`` rows, ``F`` features, ``A`` action
dimension, ``H`` width of a layer, ``K`` outputs of a critic.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch as th
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Precision = Literal["f32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

_DTYPES = {"f32": th.float32, "bf16": th.bfloat16}
_NEGLIGIBLE = {th.float64: 2.0**-53, th.float32: 2.0**-24, th.bfloat16: 2.0**-16}
"""Share of a state's largest gradient that the left out rows of the state may have together: below what rounding changes.

Far below in bfloat16: its rounding averages out over a batch, what is left out does not.
"""
_BLOCK = 1024
"""Rows that are converted to another type at once."""
_WORTH_GATHERING = 0.85
"""Above this share of rows, gathering them costs more than it saves."""


def warn_of_slow_bf16(precision: str, device: th.device | str) -> None:
    """Say it where bfloat16 costs time instead of saving it: on a processor that has no products of such numbers.

    PyTorch then multiplies them one by one; an update took 14 times as long as in float32.

    Args:
        precision: The model's.
        device: Where its networks are.
    """
    if precision == "bf16" and str(device).startswith("cpu") and not multiplies_bf16():
        warnings.warn(
            "precision='bf16' is slow on this processor, which has no bfloat16 products (such as avx512_bf16 or amx_bf16): an "
            "update takes many times as long as in single precision. Set precision='f32' here.",
            UserWarning,
            stacklevel=3,
        )


def multiplies_bf16() -> bool:
    """Whether oneDNN takes bfloat16 matrices on this processor; true where PyTorch cannot tell."""
    try:
        return bool(th.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return True


class Workspace:
    """Memory that one evaluation after another uses again.

    An evaluation fills tens of megabytes. Given back to the operating system and asked for anew in each step, as the C library
    does by default, they cost more than the arithmetic on some of them.
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, rows: int, columns: int, dtype: th.dtype) -> Tensor:
        """Get memory of that name, whatever it holds.

        Args:
            name: What was taken under it before is overwritten.
            rows: Rows.
            columns: Columns.
            dtype: Type of the numbers.

        Returns:
            Shape ``(rows, columns)``, on the CPU.
        """
        # By type, too: targets in float32 and a training pass in bfloat16 take turns.
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name, dtype] = th.empty(rows * columns, dtype=dtype)
        return buffer[: rows * columns].view(rows, columns)


def perceptrons(critics: Iterable[Sequence[nn.Module]]) -> list[list[nn.Linear]] | None:
    """Read critics that are perceptrons of one shape, which is what :func:`evaluate_actions` takes.

    Args:
        critics: For each the modules that it applies one after the other.

    Returns:
        The layers of each; ``None`` where any is something else, see :func:`linear_layers`, or their shapes differ.
    """
    found = [linear_layers(*parts) for parts in critics]
    shapes = {None if layers is None else tuple(layer.weight.shape for layer in layers) for layers in found}
    return [layers for layers in found if layers] if len(shapes) == 1 and None not in shapes else None


def linear_layers(*parts: nn.Module) -> list[nn.Linear] | None:
    """Read a perceptron with rectified linear units.

    Args:
        *parts: The modules that a critic applies one after the other.

    Returns:
        Its layers, two at least; ``None`` where it is anything else (other activations, normalisation, subclasses, hooks).
    """
    modules = [module for part in parts for module in (part if type(part) is nn.Sequential else (part,))]
    layers = [module for module in modules[::2] if type(module) is nn.Linear and module.bias is not None]
    is_known = len(modules) >= 3 and len(layers) == (len(modules) + 1) // 2 and len(modules) % 2 == 1
    if not is_known or any(type(module) is not nn.ReLU for module in modules[1::2]):
        return None
    return None if any(_is_watched(module) for module in (*parts, *modules)) else layers


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants the module itself to run: hooks, or a ``forward`` of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def evaluate_actions(
    networks: Sequence[Sequence[nn.Linear]],
    features: Tensor,
    actions: Tensor,
    precision: Precision = "f32",
    n_backward: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Evaluate several perceptrons of one shape at several actions of each state.

    Args:
        networks: The layers of each critic, see :func:`perceptrons`; the first takes features and action, concatenated.
        features: Shape ``(B, F)``; differentiated where it requires a gradient.
        actions: Shape ``(B, M, A)``; never differentiated.
        precision: ``"bf16"`` computes all but the output layer with bfloat16 numbers (sums are float32 in both).
        n_backward: How many actions of a state the gradient goes back through on average, on the CPU: drawn in proportion to
            the size of their gradients and weighted by the inverse of their chance, so that the gradient is right in the mean.
            ``None`` for all that matter.
        workspace: Memory to use again, on the CPU. What comes out can be differentiated until the next evaluation with it.

    Returns:
        Shape ``(C, B, M, K)``, float32 (float64 where the networks are).

    Raises:
        ValueError: If shapes disagree.
    """
    in_features = networks[0][0].in_features
    if features.ndim != 2 or actions.ndim != 3 or actions.shape[0] != features.shape[0]:
        raise ValueError(
            f"features must have shape (B, F) and actions (B, M, A); got {tuple(features.shape)} and {tuple(actions.shape)}."
        )
    if features.shape[1] + actions.shape[2] != in_features:
        raise ValueError(
            f"the critics take {in_features} numbers; got {features.shape[1]} features and {actions.shape[2]} of the action."
        )
    parameters = [parameter for layers in networks for layer in layers for parameter in (layer.weight, layer.bias)]
    dtype = th.float64 if parameters[0].dtype == th.float64 else _DTYPES[precision]
    values: Tensor = _EvaluateActions.apply(  # type: ignore[no-untyped-call]
        features, actions.detach(), len(networks), dtype, n_backward, workspace, *parameters
    )
    return values


class _EvaluateActions(th.autograd.Function):
    """The operation of :func:`evaluate_actions`.

    On the CPU the critics go one after the other through matrix products, each a group of its own; on a GPU they are one
    group, stacked, and all products are batched.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        actions: Tensor,
        n_critics: int,
        dtype: th.dtype,
        n_backward: int | None,
        workspace: Workspace | None,
        *parameters: Tensor,
    ) -> Tensor:
        batch_size, n_actions, action_dim = actions.shape
        inputs = features.to(dtype), actions.reshape(-1, action_dim).to(dtype)
        space = workspace if actions.device.type == "cpu" and not _stacks(parameters[0]) else None
        values, saved = [], []
        for group, (weights, biases) in enumerate(_groups(parameters, n_critics, dtype)):
            of_actions, of_state = _split_first(weights[0], features.shape[1])
            hidden = _times(inputs[1], of_actions.mT.contiguous(), space, ("hidden", group, 0))
            hidden.unflatten(-2, (batch_size, n_actions)).add_(_affine(biases[0], inputs[0], of_state).unsqueeze(-2))
            saved.append(hidden.relu_())
            for layer, (weight, bias) in enumerate(zip(weights[1:-1], biases[1:-1], strict=True), start=1):
                hidden = _times(saved[-1], weight.mT, space, ("hidden", group, layer))
                saved.append(hidden.add_(bias.unsqueeze(-2)).relu_())
            parts = (_affine(biases[-1], part, weights[-1]) for part in _in_type_of(biases[-1], saved[-1], space))
            values.append(th.cat(list(parts), dim=-2))
        ctx.sizes = batch_size, n_actions, n_critics, len(values), dtype, n_backward, space
        # Whoever fills the workspace again before the backward pass is found out by torch, which counts the writes.
        ctx.save_for_backward(*inputs, *parameters, *saved)
        return th.stack(values).reshape(n_critics, batch_size, n_actions, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        batch_size, n_actions, n_critics, n_groups, dtype, n_backward, space = ctx.sizes
        features, actions, *rest = ctx.saved_tensors
        n_parameters = len(ctx.needs_input_grad) - 6
        parameters, saved = rest[:n_parameters], rest[n_parameters:]
        depth = len(saved) // n_groups
        gradient_features = th.zeros_like(features, dtype=gradient.dtype) if ctx.needs_input_grad[0] else None
        gradients: list[list[Tensor]] = [[] for _ in range(n_critics)]
        for group, (weights, _) in enumerate(_groups(parameters, n_critics, dtype)):
            hiddens = saved[group * depth : (group + 1) * depth]
            upstream = gradient if n_groups == 1 < n_critics else gradient[group]
            upstream = upstream.flatten(-3, -2)
            if n_backward is not None:
                upstream = _thin_out(upstream, n_actions, n_backward)
            rows = _rows_that_matter(upstream, n_actions, dtype)
            of_rows = actions
            if rows is not None:
                upstream, of_rows = upstream[rows], actions[rows]
                hiddens = [_rows_of(hidden, rows, space, ("rows", layer)) for layer, hidden in enumerate(hiddens)]
            # Last layer first: (gradient of the weight, of the bias) of each.
            blocks = upstream.split(_BLOCK) if space else (upstream,)
            of_output = [own.mT @ part for own, part in zip(blocks, _in_type_of(upstream, hiddens[-1], space), strict=True)]
            pairs = [(of_output[0] if len(of_output) == 1 else th.stack(of_output).sum(0), upstream.sum(-2))]
            flowing = _times(upstream.to(dtype), weights[-1].to(dtype), space, ("flowing", depth % 2))
            for layer in range(depth - 1, 0, -1):
                flowing = _through_relu(flowing, hiddens[layer])
                pairs.append((flowing.mT @ hiddens[layer - 1], flowing.sum(-2)))
                flowing = _times(flowing, weights[layer], space, ("flowing", layer % 2))
            flowing = _through_relu(flowing, hiddens[0])
            of_state = _sum_over_actions(flowing, rows, batch_size, n_actions)
            # The narrow factor first: the other way round the BLAS takes many times as long.
            of_first = th.cat((of_state.mT @ features, (of_rows.mT @ flowing).mT), dim=-1)
            pairs.append((of_first, of_state.sum(-2)))
            if gradient_features is not None:
                flowing = of_state @ _split_first(weights[0], features.shape[1])[1]
                gradient_features += flowing.sum(0) if flowing.ndim == 3 else flowing
            for pair in reversed(pairs):
                for tensor in pair:
                    for critic, own in enumerate(tensor) if n_groups == 1 < n_critics else ((group, tensor),):
                        gradients[critic].append(own.to(gradient.dtype))
        return gradient_features, *(None for _ in range(5)), *(own for of_critic in gradients for own in of_critic)


def _groups(parameters: Sequence[Tensor], n_critics: int, dtype: th.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Sort parameters by group: weights and biases of each layer, in ``dtype`` but for the output layer's."""
    of_critic = [parameters[i :: len(parameters) // n_critics] for i in range(len(parameters) // n_critics)]
    if n_critics > 1 and _stacks(parameters[0]):
        columns = [[th.stack(tuple(column)) for column in of_critic]]
    else:
        columns = [[column[critic] for column in of_critic] for critic in range(n_critics)]
    return [
        (
            [weight.to(dtype) for weight in group[:-2:2]] + [group[-2]],
            [bias.to(dtype) for bias in group[1:-2:2]] + [group[-1]],
        )
        for group in columns
    ]


def _stacks(parameter: Tensor) -> bool:
    """Whether critics are evaluated as one batched product; on the CPU that is no faster."""
    return parameter.is_cuda


def _split_first(weight: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """The first layer's weight for the actions and for the features."""
    return weight[..., n_features:], weight[..., :n_features]


def _affine(bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim == 2:
        return th.addmm(bias, inputs, weight.mT)
    return th.baddbmm(bias.unsqueeze(-2), inputs.expand(len(weight), *inputs.shape[-2:]), weight.mT)


def _times(inputs: Tensor, weight: Tensor, space: Workspace | None, name: Hashable) -> Tensor:
    """``inputs @ weight``, into the workspace where there is one."""
    if space is None:
        return inputs @ weight
    return th.mm(inputs, weight, out=space.take(name, len(inputs), weight.shape[1], inputs.dtype))


def _rows_of(tensor: Tensor, rows: Tensor, space: Workspace | None, name: Hashable) -> Tensor:
    if space is None:
        return tensor[rows]
    return th.index_select(tensor, 0, rows, out=space.take(name, len(rows), tensor.shape[1], tensor.dtype))


def _in_type_of(other: Tensor, rows: Tensor, space: Workspace | None) -> Iterator[Tensor]:
    """Convert rows to the type of another tensor, block by block where there is a workspace: these stay in the caches."""
    if space is None:
        yield rows.to(other.dtype)
        return
    for part in rows.split(_BLOCK):
        yield part if part.dtype == other.dtype else space.take("block", part.shape[0], part.shape[1], other.dtype).copy_(part)


def _through_relu(gradient: Tensor, output: Tensor) -> Tensor:
    """Set the gradient to zero, in place, where the unit was off."""
    th.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)
    return gradient


def _sum_over_actions(gradient: Tensor, rows: Tensor | None, batch_size: int, n_actions: int) -> Tensor:
    summed: Tensor
    if rows is None:
        summed = gradient.unflatten(-2, (batch_size, n_actions)).sum(-2)
        return summed
    summed = gradient.new_zeros(batch_size, gradient.shape[-1])
    summed.index_add_(0, rows.div(n_actions, rounding_mode="floor"), gradient)
    return summed


def _thin_out(gradient: Tensor, n_actions: int, n_backward: int) -> Tensor:
    """Set rows to zero at random and enlarge the others, so that the mean stays.

    A row stays with a chance in proportion to its size, at most 1: the large ones are there in every draw.

    Args:
        gradient: Shape ``(R, K)``.
        n_actions: ``M``.
        n_backward: Rows of a state that are to stay, on average and at most.
    """
    if gradient.is_cuda or gradient.ndim == 3:
        return gradient  # A graph cannot depend on how many are left.
    size = gradient.abs().amax(-1).unflatten(0, (-1, n_actions))
    chance = (n_backward * size / size.sum(1, keepdim=True).clamp_min(th.finfo(size.dtype).tiny)).clamp_max(1.0)
    # Without those whose inverse is no number any more; all together they are below rounding.
    chance = th.where(chance < 2.0**-24 / n_actions, 0.0, chance)
    stays = th.rand_like(chance) < chance
    factor = th.where(stays, 1.0 / chance, 0.0).reshape(-1, 1)
    return gradient * factor


def _rows_that_matter(gradient: Tensor, n_actions: int, dtype: th.dtype) -> Tensor | None:
    """Find the rows whose gradients matter, on the CPU.

    Left out are, for each state, rows so small that all of them together could not change the sum over the state's rows by more
    than rounding does.

    Args:
        gradient: Shape ``(R, K)``.
        n_actions: ``M``.
        dtype: What products are computed with.

    Returns:
        Their indices; ``None`` for all. On a GPU always all: it would have to wait for their number.
    """
    if gradient.is_cuda or gradient.ndim == 3:
        return None
    size = gradient.abs().amax(-1).unflatten(0, (-1, n_actions))
    # Written so that what is not a number is kept, and seen.
    is_negligible = (size < size.amax(1, keepdim=True) * (_NEGLIGIBLE[dtype] / n_actions)) | (size == 0.0)
    rows = is_negligible.logical_not().flatten().nonzero().squeeze(1)
    return rows if len(rows) < _WORTH_GATHERING * len(gradient) else None


__all__ = ["PRECISIONS", "Precision", "Workspace", "evaluate_actions", "linear_layers", "perceptrons"]
