"""Watches the updates of the d3rlpy algorithms: stops at the first number that is not finite, warns of impossible Q-values.

On the CPU each optimiser's step is checked before it is done. On a GPU d3rlpy reads its losses in every update; they are looked
at there, and gradients are noted on the device and read every 100 updates: the host waits no more often than it did.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch as th
import torch.distributed as dist
from d3rlpy.dataset import TransitionMiniBatch
from d3rlpy.preprocessing import RewardScaler
from d3rlpy.torch_utility import Modules, TorchMiniBatch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cql_plugins import _guards
from cql_plugins._guards import Blame, DeviceNote, Finding, NonFiniteError, QRange, SickListener, Snapshot

_BATCH = "batch"
_PARAMETER_INTERVAL = 1000
"""Gradient steps between two looks at the parameters, beside those before they are saved."""
_SCALARS = ("temp", "alpha")
"""Optimisers that move a single number, stepped while a gradient is computed."""
_TRY_DATA = "Repair or remove these rows. Where what is stored is finite, look at the config's scalers."
_TRY_STEP = (
    "Try lower learning rates, clip_grad_norm in the optimizer factories, a reward_scaler, or a smaller conservative weight; "
    "look for rewards or observations of an unusual size in the rows above."
)


class _Found(Exception):  # noqa: N818 - never leaves this module
    """Something is not finite in this step; ``None`` where only another process knows what."""

    def __init__(self, finding: Finding | None) -> None:
        super().__init__("on another process" if finding is None else finding.text)
        self.finding = finding


@dataclasses.dataclass(eq=False)
class Watch:
    """The watch over one implementation's updates.

    Attributes:
        modules: Networks and optimisers.
        device: Where they are.
        data_values: From a batch to ``Q(s, a)`` of its actions, shape ``(B,)``.
        policy_outputs: From a batch to what torch may refuse to make a distribution of.
        gamma: Discount factor.
        weight_name: Field of the conservative weight.
        entropy: The most that an entropy term adds to a reward at a temperature of 1.
        reward_scaler: The config's.
        listeners: Told before an error is raised.
        bad_cells: Names the cells of the logged data that are not finite.
    """

    modules: Modules
    device: str
    data_values: Callable[[TorchMiniBatch], th.Tensor]
    policy_outputs: Callable[[TorchMiniBatch], dict[str, th.Tensor]]
    gamma: float
    weight_name: str
    entropy: float = 0.0
    reward_scaler: RewardScaler | None = None
    listeners: list[SickListener] = dataclasses.field(default_factory=list)
    bad_cells: Callable[[], Iterator[str]] | None = None

    def __post_init__(self) -> None:
        self.q_range = QRange()
        self._rewards = (math.inf, -math.inf)
        self._stepped: list[str] = []
        self._note: DeviceNote | None = None
        self._n_noted = 0
        modules = (part for module in self.modules.get_torch_modules().values() for part in module.modules())
        self._is_distributed = any(isinstance(module, DistributedDataParallel) for module in modules)

    def over(self, name: str, compute: Callable[[TorchMiniBatch], Any], optimizer: Any) -> Callable[[TorchMiniBatch], Any]:
        """Watch a function that sets an optimiser's gradients.

        Args:
            name: Of what it trains.
            compute: From a batch to its losses, a dataclass whose ``<name>_loss`` is the one that was minimised.
            optimizer: Not stepped before the result is back.
        """
        return partial(self._look_at_gradients, name, compute, optimizer)  # A partial can be copied with its model.

    def step(
        self, update: Callable[[TorchMiniBatch, int], dict[str, float]], batch: TorchMiniBatch, n: int
    ) -> dict[str, float]:
        """Do one update; raise where one of its numbers is not finite, with the model as it was before.

        Args:
            update: Does it.
            batch: The batch.
            n: Gradient steps so far.
        """
        metrics = self._step_on_device(update, batch, n) if self._defers else self._step(update, batch, n)
        self._note_values(metrics, batch, n + 1)
        if (n + 1) % _PARAMETER_INTERVAL == 0:
            self.require_finite_parameters(n + 1)
        return metrics

    @property
    def _defers(self) -> bool:
        return "cuda" in self.device

    def _step(
        self, update: Callable[[TorchMiniBatch, int], dict[str, float]], batch: TorchMiniBatch, n: int
    ) -> dict[str, float]:
        self._stepped = []
        before = Snapshot(wrapper.optim for wrapper in self._scalars().values())
        try:
            self._look_at_batch(batch)
            return update(batch, n)
        except _Found as found:
            finding, cause = found.finding, None
        except ValueError as error:  # torch refuses a distribution whose parameters are not finite
            self.modules.set_eval()
            with th.no_grad():
                finding, cause = _guards.find(self.policy_outputs(batch)), error
            if finding is None:
                raise
        before.restore()
        place = ""
        if cause is None:
            finding, place = self._agreed(finding, batch)
        assert finding is not None
        if not finding.tensor.startswith(_BATCH):
            self.require_finite_parameters(n)  # Where they are not, nothing that came of them is to blame.
        self._raise(finding, place, batch, n + 1, cause)

    def _scalars(self) -> dict[str, Any]:
        wrappers = {name: getattr(self.modules, f"{name}_optim", None) for name in _SCALARS}
        return {name: wrapper for name, wrapper in wrappers.items() if wrapper is not None}

    def _look_at_batch(self, batch: TorchMiniBatch) -> None:
        tensors = _batch_tensors(batch)
        finding = None
        well = _guards.returns_are_well(batch.returns_to_go) and _guards.total_is_finite(_guards.floats(tensors.values()))
        if not well:
            finding = _guards.find(tensors | {f"{_BATCH}.returns_to_go": batch.returns_to_go}, (f"{_BATCH}.returns_to_go",))
        if self._any_process(finding is not None):  # The rows of one process, but all have to stop.
            raise _Found(finding)

    def _look_at_gradients(
        self, name: str, compute: Callable[[TorchMiniBatch], Any], optimizer: Any, batch: TorchMiniBatch
    ) -> Any:
        losses = compute(batch)
        loss_name = f"{name}_loss" if name else "loss"
        loss: th.Tensor = getattr(losses, loss_name).detach()
        # With those of the single numbers, which are stepped already.
        optimizers = [optimizer.optim, *(wrapper.optim for wrapper in self._scalars().values())]
        parameters = [p for own in optimizers for group in own.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._defers:
            self._device_note().look(loss_name, [loss, *gradients])
            return losses
        finding = None
        if not _guards.total_is_finite([loss, *gradients]):
            names = {id(parameter): key for key, parameter in self._named_parameters()}
            named = {f"{names[id(p)]}.grad": p.grad for p in parameters if p.grad is not None}
            finding = _guards.find({loss_name: loss.reshape(())}) or _guards.find(named)
        if self._any_process(finding is not None):  # Gradients are averaged, a loss is one process's own.
            raise _Found(finding)
        self._stepped.append(name)
        return losses

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.modules.get_torch_modules().items():
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter

    # Several processes -----------------------------------------------------------------------------------------------

    def _any_process(self, finding: bool) -> bool:
        """Tell whether it is so in any of the processes, all of which ask at the same points."""
        if not self._is_distributed:
            return finding
        flag = th.tensor([finding], dtype=th.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _agreed(self, finding: Finding | None, batch: TorchMiniBatch) -> tuple[Finding, str]:
        """The finding of the first process that has one, and its place in the data; all of them are here."""
        place = self._place(finding, batch)
        if self._is_distributed:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (finding, place))
            process, (first, place) = next((i, one) for i, one in enumerate(everyone) if one[0] is not None)
            finding = first._replace(text=f"on process {process}, {first.text}")
        assert finding is not None
        return finding, place

    def _worst(self, blame: Blame) -> Blame:
        """The rows of the process that has the largest value; all of them are here."""
        if not self._is_distributed:
            return blame
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, blame)
        return _guards.worst(everyone, "process")

    # What went wrong -------------------------------------------------------------------------------------------------

    def _raise(self, finding: Finding, place: str, batch: TorchMiniBatch, step: int, cause: Exception | None) -> NoReturn:
        rows, sentences = finding.rows, [f"Gradient step {step}: {finding.text}."]
        if finding.tensor.startswith(_BATCH):
            sentences.append(f"Rows of the batch: {_guards.listed(rows)}.")
        elif cause is None:
            self.modules.set_eval()
            with th.no_grad():
                blame = _guards.largest_rows(self.data_values(batch), batch.rewards[:, 0])
            blame = self._worst(blame._replace(text=f"{blame.text} {self._stored(batch, blame.rows)}".rstrip()))
            rows = blame.rows
            sentences.append(blame.text)
        kept = f"All parameters and optimisers are those after step {step - 1}."
        if self._stepped:
            kept = (
                f"All parameters are finite; of this step, {' and '.join(self._stepped)} had been done, all else is as before."
            )
        sentences += [place, kept, _TRY_DATA if finding.tensor.startswith(_BATCH) else _TRY_STEP]
        message = " ".join(sentence for sentence in sentences if sentence)
        error = NonFiniteError(message, step=step, tensor=finding.tensor, rows=rows, stepped=self._stepped)
        _guards.tell(self.listeners, error)
        if cause is None:
            self._any_process(True)  # A launcher ends the first process once another has failed: let it save first.
        raise error from cause

    def _place(self, finding: Finding | None, batch: TorchMiniBatch) -> str:
        return "" if finding is None or not finding.tensor.startswith(_BATCH) else self._stored(batch, finding.rows)

    def _stored(self, batch: TorchMiniBatch, rows: Sequence[int]) -> str:
        place_of = getattr(batch.numpy_batch, "place_of", None)
        if place_of is not None and rows:
            return f"In the data: {_guards.listed([place_of(row) for row in rows])}."
        cells = "" if self.bad_cells is None else _guards.cells_text(self.bad_cells())
        return f"In the data: {cells}." if cells else ""

    # On a GPU --------------------------------------------------------------------------------------------------------

    def _device_note(self) -> DeviceNote:
        if self._note is None:
            self._note = DeviceNote([_BATCH, "loss", "critic_loss", "actor_loss"], th.device(self.device))
        return self._note

    def _step_on_device(
        self, update: Callable[[TorchMiniBatch, int], dict[str, float]], batch: TorchMiniBatch, n: int
    ) -> dict[str, float]:
        note = self._device_note()
        note.look(_BATCH, _guards.floats(_batch_tensors(batch).values()), batch.returns_to_go)
        metrics = update(batch, n)
        note.end_step()
        self._n_noted += 1
        is_odd = self._any_process(not all(math.isfinite(value) for value in metrics.values()))
        if is_odd or self._n_noted >= _guards.LOOK_INTERVAL:
            steps, self._n_noted = self._n_noted, 0
            kinds, good = self._read(note)
            if kinds:
                self._raise_late(kinds[0], n + 1 - steps + good + 1)
        return metrics

    def _read(self, note: DeviceNote) -> tuple[list[str], int]:
        """Read what any of the processes has noted, and how many steps were good in all of them."""
        kinds, good = note.read()
        if self._is_distributed:
            largest = th.tensor([*(name in kinds for name in note.names), -good], dtype=th.int32, device=self.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            *flags, bad = largest.tolist()
            kinds, good = [name for name, flag in zip(note.names, flags, strict=True) if flag], -bad
        return kinds, good

    def _raise_late(self, kind: str, step: int) -> NoReturn:
        finding = self._sick_parameter()
        cells = "" if self.bad_cells is None else _guards.cells_text(self.bad_cells())
        sentences = [f"Gradient step {step}: {kind} {'or its gradient ' if kind != _BATCH else ''}is not finite."]
        sentences += [f"In the data: {cells}."] if cells else []
        sentences.append(
            "On a GPU this is seen after the step"
            + (", but all parameters are finite." if finding is None else f", and by now {finding.text}: load a checkpoint.")
        )
        sentences.append(_TRY_DATA if cells or kind == _BATCH else _TRY_STEP)
        names = tuple(name for name, _ in self.modules.get_torch_modules().items())
        error = NonFiniteError(" ".join(sentences), step=step, tensor=kind, stepped=names, is_usable=finding is None)
        _guards.tell(self.listeners, error)
        self._any_process(True)  # As above.
        raise error

    # Parameters and values -------------------------------------------------------------------------------------------

    def _sick_parameter(self) -> Finding | None:
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.modules.get_torch_modules().items()
            for key, tensor in module.state_dict().items()
        }
        if not self._defers and _guards.total_is_finite(_guards.floats(tensors.values())):
            return None
        return _guards.find(tensors)

    def require_finite_parameters(self, step: int) -> None:
        """Refuse parameters that are not finite; called now and then, and before the algorithm is saved.

        Args:
            step: Gradient steps so far.

        Raises:
            NonFiniteError: If there are some.
        """
        finding = self._sick_parameter()
        if finding is not None:
            text = (
                f"After gradient step {step}, {finding.text}: the algorithm is not worth saving. Load the last checkpoint. "
                "Gradients were finite when they were used: look for code that writes to the parameters, or for a learning "
                "rate so large that a step overflows."
            )
            raise NonFiniteError(text, step=step, tensor=finding.tensor, rows=finding.rows, is_usable=False)

    def _note_values(self, metrics: dict[str, float], batch: TorchMiniBatch, step: int) -> None:
        """Keep the range of the rewards; compare it with Q now and then."""
        if self.q_range.has_warned or batch.numpy_batch is None:
            return
        rewards = batch.numpy_batch.rewards
        self._rewards = (min(self._rewards[0], float(rewards.min())), max(self._rewards[1], float(rewards.max())))
        if step % _guards.LOOK_INTERVAL:
            return
        ends = np.array(self._rewards, dtype=np.float32).reshape(2, 1)
        if self.reward_scaler is not None:
            ends = np.asarray(self.reward_scaler.transform_numpy(ends))
        self.q_range.widen(float(ends.min()), float(ends.max()), self.gamma, self.entropy * metrics.get("temp", 0.0))
        values = {name: metrics.get(name) for name in ("q_data", "q_policy", "q_random")}
        if text := self.q_range.warning(values, self.weight_name, step):
            warnings.warn(text, UserWarning, stacklevel=2)


def _batch_tensors(batch: TorchMiniBatch) -> dict[str, th.Tensor]:
    """What must be finite; what came from bytes is."""
    tensors = {f"{_BATCH}.rewards": batch.rewards, f"{_BATCH}.actions": batch.actions}
    source: TransitionMiniBatch | None = batch.numpy_batch
    for name in ("observations", "next_observations"):
        leaves = getattr(batch, name)
        arrays = None if source is None else getattr(source, name)
        is_one = isinstance(leaves, th.Tensor)
        for i, leaf in enumerate([leaves] if is_one else leaves):
            array = arrays if is_one or arrays is None else arrays[i]
            if array is None or array.dtype != np.uint8:
                tensors[f"{_BATCH}.{name}" + ("" if is_one else f"[{i}]")] = leaf
    return tensors
