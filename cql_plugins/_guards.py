"""What tells a sick training run: numbers that are not finite, and Q-values that no rewards allow.

Detection is a sum over what is looked at, or one kernel on a GPU; names and rows are searched for only once it has struck.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th

LOOK_INTERVAL = 100
"""Gradient steps between two looks at what a GPU has noted: each makes the host wait for it."""
_MOST_NAMED = 5
"""Rows, cells or tensors that a message lists."""
_BLOCK_BYTES = 2**24
"""Of a stored column that is searched at once; it may be a file larger than memory."""
_INITIAL_Q = 1.0
"""How far from zero a new critic may be whatever the rewards are."""


class NonFiniteError(ArithmeticError):
    """A number in a gradient step is not finite; training has stopped.

    Args:
        message: What was found, where, and what to try.
        step: See below.
        tensor: See below.
        rows: See below.
        stepped: See below.
        is_usable: See below.

    Attributes:
        step: Number of the gradient step, the first is 1; the steps before it were good.
        tensor: What is not finite, for example ``batch.rewards``, ``critic_loss`` or ``critic.qf0.2.weight.grad``.
        rows: Rows of the batch (of the process that the message names): those that are not finite, or those with the largest
            values where a loss or gradient is not. Empty where they are not known.
        stepped: What this step had changed already and could not be taken back; empty where the model is as it was before.
        is_usable: Whether all parameters are finite, so that the model can be saved.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        tensor: str,
        rows: Sequence[int] = (),
        stepped: Sequence[str] = (),
        is_usable: bool = True,
    ) -> None:
        super().__init__(message)
        self.step, self.tensor, self.is_usable = step, tensor, is_usable
        self.rows, self.stepped = tuple(rows), tuple(stepped)

    def __reduce__(self) -> tuple[Any, ...]:
        # By keyword: an error crosses from a worker process by pickle.
        return _rebuilt, (str(self), self.step, self.tensor, self.rows, self.stepped, self.is_usable)


def _rebuilt(message: str, step: int, tensor: str, rows: Any, stepped: Any, is_usable: bool) -> NonFiniteError:
    return NonFiniteError(message, step=step, tensor=tensor, rows=rows, stepped=stepped, is_usable=is_usable)


SickListener = Callable[[NonFiniteError], None]
"""Told of the error before it is raised, while the model is as the error says; may save it."""


def tell(listeners: Iterable[SickListener], error: NonFiniteError) -> None:
    """Tell those who wait for it; one that fails is warned of, since the error that it was told of matters more.

    Args:
        listeners: Not called where the model is not worth saving.
        error: About to be raised.
    """
    if not error.is_usable:
        return
    for listener in list(listeners):
        try:
            listener(error)
        except Exception as failure:
            warnings.warn(
                f"{getattr(listener, '__qualname__', listener)} failed when it was told that training is sick: {failure!r}.",
                RuntimeWarning,
                stacklevel=3,
            )


# Detection -------------------------------------------------------------------------------------------------------------


def floats(tensors: Iterable[th.Tensor]) -> list[th.Tensor]:
    """Pick those that can hold something that is not finite."""
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def total_is_finite(tensors: Sequence[th.Tensor]) -> bool:
    """Tell whether the sum of everything is finite; where it is not, some number is not, or the sum overflowed.

    Args:
        tensors: Of floating-point numbers, on the CPU.
    """
    # Number by number is cheaper than stacking them.
    return math.isfinite(sum(tensor.sum().item() for tensor in tensors))


def returns_are_well(returns: th.Tensor) -> bool:
    """Tell whether returns-to-go are numbers or ``-inf``, which stands for an unknown one.

    Args:
        returns: On the CPU.
    """
    return returns.max().item() < math.inf  # A maximum is not a number where a single one is not.


class DeviceNote:
    """What the steps on a device have met, noted there and read later; nothing waits for the device.

    Each kind of number has a flag of its own. The first that is raised holds all the optimisers that know the note: torch's own
    way of leaving out a step (that of its gradient scaler) takes a tensor, so that parameters stay those from before.

    Args:
        names: Kinds of numbers, in the order in which a step computes them.
        device: Where.
    """

    def __init__(self, names: Sequence[str], device: th.device) -> None:
        self.names = tuple(names)
        self._flags = [th.zeros((), device=device) for _ in names]
        self._sick, self._good_steps = th.zeros((), device=device), th.zeros((), device=device)
        self._one = th.ones((), device=device)

    def hold(self, optimizer: th.optim.Optimizer) -> bool:
        """Let the optimiser leave out its steps from the first sick one on.

        Args:
            optimizer: Changed where it can.

        Returns:
            Whether it can: only fused ones can.
        """
        can = all(group.get("fused") for group in optimizer.param_groups)
        # Not a part of its state dict.
        optimizer.found_inf = self._sick if can else None  # type: ignore[attr-defined]
        return can

    @th.no_grad()
    def look(self, name: str, tensors: Sequence[th.Tensor], returns: th.Tensor | None = None) -> None:
        """Note whether something is not finite.

        Args:
            name: Kind of these numbers.
            tensors: Of floating-point numbers; multiplied by 1.
            returns: Returns-to-go, which may be ``-inf``; left alone.
        """
        looked_at = [tensor.detach() for tensor in tensors]
        if returns is not None:
            looked_at.append(th.nan_to_num(returns.detach(), nan=math.nan, posinf=math.inf, neginf=0.0))
        own = self._flags[self.names.index(name)]
        # The gradient scaler's check: one kernel for all, raises the flag and never lowers it.
        th._amp_foreach_non_finite_check_and_unscale_(looked_at, own, self._one)
        th.maximum(self._sick, own, out=self._sick)

    @th.no_grad()
    def end_step(self) -> None:
        """Count the step where it was good."""
        self._good_steps.add_(1.0).sub_(self._sick)

    @property
    def is_sick(self) -> bool:
        """Whether anything was met since the last call of :meth:`read`; waits for the device."""
        return bool(self._sick)

    def read(self) -> tuple[list[str], int]:
        """Wait for the device, and start anew.

        Returns:
            The kinds that were met, in the order of a step, and how many steps were good since the last call.
        """
        *flags, good = th.stack([*self._flags, self._good_steps]).tolist()
        for tensor in (*self._flags, self._sick, self._good_steps):
            tensor.zero_()
        return [name for name, flag in zip(self.names, flags, strict=True) if flag], int(good)


# The search ------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """A tensor with numbers that are not finite.

    Attributes:
        tensor: Its name.
        text: The name, how many there are, of how many, and which.
        rows: Rows along its first axis.
    """

    tensor: str
    text: str
    rows: tuple[int, ...] = ()


def find(tensors: Mapping[str, th.Tensor], may_be_unknown: Sequence[str] = ()) -> Finding | None:
    """Find the first tensor with numbers that are not finite.

    Args:
        tensors: By name.
        may_be_unknown: Names of those that may hold ``-inf``.
    """
    findings = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        bad = ~tensor.detach().isfinite()
        if name in may_be_unknown:
            bad &= tensor.detach() != -math.inf
        if bad.any():
            findings.append((name, tensor.detach(), bad))
    if not findings:
        return None
    name, tensor, bad = findings[0]
    kinds = sorted({str(value) for value in tensor[bad].unique().tolist()})
    count = int(bad.sum())
    if tensor.ndim == 0:
        text = f"{name} is {kinds[0]}"
        rows: tuple[int, ...] = ()
    else:
        text = f"{name} has {count} of {tensor.numel()} values that are not finite ({', '.join(kinds)})"
        rows = tuple(bad.reshape(len(bad), -1).any(dim=1).nonzero().flatten().tolist())
    others = [other for other, _, _ in findings[1:]]
    return Finding(name, text + (f", and so have {listed(others)}" if others else ""), rows)


def listed(values: Sequence[Any]) -> str:
    """Write out the first few of many."""
    shown = ", ".join(str(value) for value in values[:_MOST_NAMED])
    return shown + (f" and {len(values) - _MOST_NAMED} more" if len(values) > _MOST_NAMED else "")


def bad_cells(name: str, column: Any, n_rows: int, may_be_unknown: bool = False) -> Iterator[str]:
    """Search a stored column, block by block.

    Args:
        name: Of the column.
        column: An array, or what can be sliced like one.
        n_rows: How many of its rows are filled.
        may_be_unknown: Whether it may hold ``-inf``.

    Yields:
        Cells that are not finite, as ``rewards[123, 0]``.
    """
    if n_rows == 0 or not np.issubdtype(column.dtype, np.floating):
        return
    row_bytes = max(1, int(np.prod(column.shape[1:])) * column.dtype.itemsize)
    block = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, n_rows, block):
        part = np.asarray(column[start : min(start + block, n_rows)])
        bad = ~np.isfinite(part)
        if may_be_unknown:
            bad &= part != -np.inf
        if bad.any():
            for row, *rest in np.argwhere(bad).tolist():
                yield f"{name}[{', '.join(str(index) for index in (start + row, *rest))}]"


def cells_text(cells: Iterable[str]) -> str:
    """Name the first few cells of many; empty where there are none."""
    first: list[str] = []
    for cell in cells:
        if len(first) == _MOST_NAMED:
            return ", ".join(first) + " and more"
        first.append(cell)
    return ", ".join(first)


class Blame(NamedTuple):
    """Rows of a finite batch whose values are not finite, or the largest.

    Attributes:
        size: The largest of these values and rewards; infinite where one is not finite.
        rows: Along the first axis.
        text: A sentence.
    """

    size: float
    rows: tuple[int, ...]
    text: str


def largest_rows(values: th.Tensor, rewards: th.Tensor, count: int = 3) -> Blame:
    """Say which rows of a batch have Q-values that are not finite, or else the largest values and rewards.

    Args:
        values: ``Q(s, a)`` of the data's actions, shape ``(B,)``.
        rewards: Shape ``(B,)``.
        count: How many rows to name.
    """
    size = th.where(values.isfinite(), th.maximum(values.abs(), rewards.abs()), math.inf)
    rows = size.topk(min(count, len(size))).indices.tolist()
    if not bool(values.isfinite().all()):
        rows = [row for row in rows if not math.isfinite(float(values[row]))]
        what = "Q(s, a) of the data's actions is not finite in"
    else:
        what = "The largest Q(s, a) of the data's actions, or rewards, are in"
    shown = "; ".join(f"row {row}: Q {float(values[row]):.6g}, reward {float(rewards[row]):.6g}" for row in rows)
    return Blame(float(size.max()), tuple(rows), f"{what} {shown}.")


def worst(blames: Sequence[Blame], process: str) -> Blame:
    """Pick the one with the largest value, and say whose it is.

    Args:
        blames: Of the processes that train together.
        process: What to call one of them.
    """
    number, blame = max(enumerate(blames), key=lambda numbered: numbered[1].size)
    return blame._replace(text=f"On {process} {number}: {blame.text}")


# The way back ----------------------------------------------------------------------------------------------------------


class Snapshot:
    """Copies of what costs next to nothing to copy: parameters that are single numbers, their optimisers, torch's generator.

    Args:
        optimizers: Of single numbers, such as a temperature; those of networks would be too much to copy in each step.
    """

    def __init__(self, optimizers: Iterable[th.optim.Optimizer]) -> None:
        self._noise = th.get_rng_state()
        self._parameters = [
            (optimizer, parameter, parameter.detach().clone(), {k: _copied(v) for k, v in optimizer.state[parameter].items()})
            if parameter in optimizer.state
            else (optimizer, parameter, parameter.detach().clone(), None)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    @th.no_grad()
    def restore(self) -> None:
        """Write the copies back, in place."""
        th.set_rng_state(self._noise)
        for optimizer, parameter, value, state in self._parameters:
            parameter.copy_(value)
            if state is None:
                optimizer.state.pop(parameter, None)
                continue
            for key, old in state.items():
                if isinstance(old, th.Tensor):
                    optimizer.state[parameter][key].copy_(old)
                else:
                    optimizer.state[parameter][key] = old


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, th.Tensor) else value


# Q-values --------------------------------------------------------------------------------------------------------------


@dataclass
class QRange:
    """What rewards allow Q to be, as wide as it ever was.

    A sum of discounted rewards lies between ``r_min / (1 - gamma)`` and ``r_max / (1 - gamma)``; 0 is always allowed, since
    episodes end. The margin on each side is the width of this range, and 1 for networks that are new. CQL pushes the values of
    actions that the data does not have down without any bound, so that only the data's own may be too low.

    Attributes:
        low: Smallest possible sum so far.
        high: Largest possible sum so far.
        has_warned: Whether :meth:`warning` has had something to say.
    """

    low: float = 0.0
    high: float = 0.0
    has_warned: bool = False

    def widen(self, smallest: float, largest: float, gamma: float, entropy: float = 0.0) -> None:
        """Take in the rewards that training sees.

        Args:
            smallest: Reward.
            largest: Reward.
            gamma: Discount factor.
            entropy: The most that an entropy term adds to or takes from each reward.
        """
        horizon = math.inf if gamma >= 1.0 else 1.0 / (1.0 - gamma)
        for reward in (smallest - entropy, largest + entropy):
            total = reward * horizon if reward else 0.0
            if not math.isnan(total):
                self.low, self.high = min(self.low, total), max(self.high, total)

    def warning(self, values: Mapping[str, float | None], weight_name: str, step: int) -> str | None:
        """Say once that Q is beyond what rewards allow.

        Args:
            values: Means of ``q_data``, ``q_policy`` and ``q_random``, where there are such.
            weight_name: Option of the conservative weight.
            step: Gradient steps so far.

        Returns:
            What to warn of; ``None`` where nothing is wrong or all is said.
        """
        if self.has_warned:
            return None
        margin = self.high - self.low + _INITIAL_Q
        text = None
        for name, value in values.items():
            if value is None:
                continue
            if value > self.high + margin:
                text = (
                    f"{name} is {value:.4g} at gradient step {step}, but no rewards seen so far can sum to more than "
                    f"{self.high:.4g} (the largest, divided by 1 - gamma): Q overrates actions. Try a larger {weight_name}, "
                    "check that time-outs are not stored as terminations nor terminations left out, or lower the critic's "
                    "learning rate."
                )
            elif name == "q_data" and value < self.low - margin:
                text = (
                    f"{name} is {value:.4g} at gradient step {step}, but no rewards seen so far can sum to less than "
                    f"{self.low:.4g} (the smallest, divided by 1 - gamma): the penalty drags the data's own values down. Try a "
                    f"smaller {weight_name}, cql_clip_diff=(-200, inf), or a lower learning rate of the critic."
                )
            if text is not None:
                self.has_warned = True
                return text
        return None
