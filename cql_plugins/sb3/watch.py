"""Watches the gradient steps of an SB3 algorithm: stops at the first number that is not finite, warns of impossible Q-values.

On the CPU every step is checked before it changes anything that could not be taken back. On a GPU a step only notes what it
meets, and the note is read at log lines, every 100 steps, before the model is saved and at the end: the host never waits for a
single step.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins import _guards
from cql_plugins._guards import Blame, DeviceNote, Finding, NonFiniteError, QRange, SickListener, Snapshot
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.buffers import _reward_limit, _reward_scale
from cql_plugins.sb3.distributed import Ranks
from cql_plugins.sb3.offline import OfflineMixin

_UNKNOWN = ("batch.returns_to_go",)
"""What may be ``-inf``: a return that is not known."""
_BATCH = "batch"
_TRY_DATA = (
    "Repair or remove these rows. Where what is stored is finite, look at the statistics of VecNormalize and at compute_reward."
)
_TRY_STEP = (
    "Try a lower learning_rate (and actor_learning_rate), rewards scaled down, a smaller cql_alpha, or cql_clip_diff; look for "
    "rewards or observations of an unusual size in the rows above."
)


class _Found(Exception):  # noqa: N818 - never leaves this module
    """Something is not finite in this step; ``None`` where only another rank knows what."""

    def __init__(self, finding: Finding | None) -> None:
        super().__init__("on another rank" if finding is None else finding.text)
        self.finding = finding


@dataclass
class _WatchState:
    """What the watch remembers; nothing of it belongs to the model.

    Attributes:
        stepped: What the step under way has changed already.
        note: Of a GPU.
        n_noted: Steps since it was read.
        reward_ranges: By buffer, its state when it was looked through, the smallest and the largest reward.
    """

    stepped: list[str] = field(default_factory=list)
    note: DeviceNote | None = None
    n_noted: int = 0
    reward_ranges: dict[str, tuple[tuple[int, ...], float, float]] = field(default_factory=dict)


class WatchedMixin(OfflineMixin):
    """The watch over the gradient steps of the algorithm that is made of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sick_listeners: list[SickListener] = []
        self._q_range = QRange()
        self._watch = _WatchState()
        super().__init__(*args, **kwargs)

    # What an algorithm says of itself --------------------------------------------------------------------------------

    @abstractmethod
    def _train_step(self, batch: Batch) -> Any:
        """Do one gradient step; return its metrics, a dataclass of scalars."""

    @abstractmethod
    def _named_optimizers(self) -> dict[str, th.optim.Optimizer]:
        """Every optimiser that a gradient step moves, in that order; the loss of ``critic`` is ``critic_loss``."""

    @abstractmethod
    def _data_values(self, batch: Batch) -> th.Tensor:
        """``Q(s, a)`` of the data's actions, the largest in size over critics, shape ``(B,)``."""

    def _scalar_optimizers(self) -> dict[str, th.optim.Optimizer]:
        """Those of :meth:`_named_optimizers` that move a single number."""
        return {}

    def _policy_outputs(self, batch: Batch) -> dict[str, th.Tensor]:
        """What torch may refuse to make a distribution of."""
        return {}

    def _entropy_bonus(self) -> float:
        """The most that an entropy term adds to each reward."""
        return 0.0

    # One gradient step -----------------------------------------------------------------------------------------------

    @property
    def _defers(self) -> bool:
        """Whether steps only note what they meet."""
        return self.device.type == "cuda"

    def _watched_step(self, batch: Batch) -> Any:
        """Do one gradient step; raise where one of its numbers is not finite, with the model as it was before."""
        if self._defers:
            note = self._device_note()
            note.look(_BATCH, _guards.floats(_without_returns(batch)), batch.returns_to_go)
            metrics = self._train_step(batch)
            note.end_step()
            return metrics
        self._watch.stepped = []
        scalars = self._scalar_optimizers()
        before = Snapshot(scalars.values())
        try:
            self._look_at_batch(batch)
            return self._train_step(batch)
        except _Found as found:
            finding = found.finding
        except ValueError as error:  # torch refuses a distribution whose parameters are not finite
            finding = self._blame_policy(batch)
            if finding is None:
                raise
            before.restore()
            self.require_finite_parameters()
            self._raise_step(finding, error=error)
        before.restore()
        stepped = [name for name in self._watch.stepped if name not in scalars]
        finding = self._agreed(finding)
        details, rows = "", finding.rows
        if not finding.tensor.startswith(_BATCH):
            self.require_finite_parameters()  # Where they are not, nothing that came of them is to blame.
            _, rows, details = self._describe_rows(batch)
        self._raise_step(finding, details, rows, stepped)

    def _look_at_batch(self, batch: Batch) -> None:
        finding = None
        well = batch.returns_to_go is None or _guards.returns_are_well(batch.returns_to_go)
        if not (well and _guards.total_is_finite(_guards.floats(_without_returns(batch)))):
            finding = _guards.find({f"{_BATCH}.{name}": tensor for name, tensor in batch.tensors().items()}, _UNKNOWN)
        is_sick = finding is not None
        if self._ranks is not None:  # One rank's rows, but all have to stop.
            is_sick = self._ranks.any_of(is_sick)
        if is_sick:
            raise _Found(finding)

    def _watch_gradients(self, optimizer: th.optim.Optimizer, loss: th.Tensor, gradients: Sequence[th.Tensor]) -> None:
        """Look at a loss and its gradients, before the optimiser uses them."""
        name = next((name for name, own in self._named_optimizers().items() if own is optimizer), "")
        loss_name = f"{name}_loss" if name else "loss"
        if self._defers:
            self._device_note().look(loss_name, [loss, *gradients])
            return
        if not _guards.total_is_finite([loss, *gradients]):
            finding = _guards.find({loss_name: loss.reshape(())}) or _guards.find(self._named_gradients(optimizer))
            if finding is not None:
                raise _Found(finding)
        self._watch.stepped.append(name)

    def _named_gradients(self, optimizer: th.optim.Optimizer) -> dict[str, th.Tensor]:
        names = {id(parameter): name for name, parameter in self.policy.named_parameters()}
        names |= {id(value): name for name, value in self._variables().items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {
            f"{names.get(id(parameter), f'parameter {index}')}.grad": parameter.grad
            for index, parameter in enumerate(parameters)
            if parameter.grad is not None
        }

    def _variables(self) -> dict[str, th.Tensor]:
        """Parameters that are not the policy's, as saved with the model."""
        return {name: recursive_getattr(self, name) for name in self._get_torch_save_params()[1]}

    # What went wrong -------------------------------------------------------------------------------------------------

    @th.no_grad()
    def _blame_policy(self, batch: Batch) -> Finding | None:
        self.policy.set_training_mode(False)
        return _guards.find(self._policy_outputs(batch))

    @th.no_grad()
    def _describe_rows(self, batch: Batch) -> Blame:
        """Say which rows of a finite batch, of all ranks' the worst, have the values that a sick loss came from."""
        self.policy.set_training_mode(False)  # Running statistics stay.
        blame = _guards.largest_rows(self._data_values(batch), batch.rewards[:, 0])
        stored = list(dict.fromkeys(place for row in blame.rows if (place := self._place_of(batch, row))))
        blame = blame._replace(text=blame.text + (f" In the data: {_guards.listed(stored)}." if stored else ""))
        return blame if self._ranks is None else _guards.worst(self._ranks.gather(blame), "rank")

    def _buffers(self) -> Iterator[tuple[str, ReplayBuffer]]:
        for name in ("offline_buffer", "replay_buffer"):
            buffer = getattr(self, name)
            if buffer is not None and buffer.size():
                yield name, buffer

    def _place_of(self, batch: Batch, row: int) -> str | None:
        """Find the stored row that a row of a batch came from."""
        for name, buffer in self._buffers():
            found = _rows_like(buffer, batch, row, self._vec_normalize_env)
            if len(found) == 1:
                return f"{name}[{found[0][0]}, {found[0][1]}]"
        return None

    def _bad_cells(self) -> str:
        """Name the cells of the buffers that are not finite."""

        def cells() -> Iterator[str]:
            for name, buffer in self._buffers():
                for column_name in ("observations", "actions", "rewards", "next_observations", "returns_to_go"):
                    column = getattr(buffer, column_name, None)
                    columns = column if isinstance(column, dict) else {"": column}
                    for key, own in columns.items():
                        if own is not None:
                            label = f"{name}.{column_name}" + (f"[{key!r}]" if key else "")
                            yield from _guards.bad_cells(label, own, buffer.size(), column_name == "returns_to_go")

        return _guards.cells_text(cells())

    def _agreed(self, finding: Finding | None) -> Finding:
        """The finding of the first rank that has one; all of them are here."""
        if self._ranks is not None:
            everyone = self._ranks.gather(finding)
            rank, first = next((rank, one) for rank, one in enumerate(everyone) if one is not None)
            # All else is averaged, and the same on all.
            finding = first._replace(text=f"on rank {rank}, {first.text}") if first.tensor.startswith(_BATCH) else first
        assert finding is not None
        return finding

    def _raise_step(
        self,
        finding: Finding,
        details: str = "",
        rows: Sequence[int] = (),
        stepped: Sequence[str] = (),
        error: Exception | None = None,
    ) -> NoReturn:
        """Put the message together, tell the listeners, raise."""
        step = self._n_updates + 1
        sentences = [f"Gradient step {step}: {finding.text}."]
        rows = rows or finding.rows
        if finding.tensor.startswith(_BATCH):
            sentences.append(f"Rows of the batch: {_guards.listed(finding.rows)}.")
            if place := self._bad_cells():
                sentences.append(f"In the data: {place}.")
            else:
                sentences.append("What is stored in the buffers is finite.")
        elif details:
            sentences.append(details)
        kept = f"All parameters and optimisers are those after step {step - 1}."
        if stepped:
            kept = f"All parameters are finite; of this step, {' and '.join(stepped)} had been done, all else is as before."
        sentences += [kept, _TRY_DATA if finding.tensor.startswith(_BATCH) else _TRY_STEP]
        self._announce(NonFiniteError(" ".join(sentences), step=step, tensor=finding.tensor, rows=rows, stepped=stepped), error)

    def _announce(self, error: NonFiniteError, cause: Exception | None = None, is_alone: bool = False) -> NoReturn:
        _guards.tell(self._sick_listeners, error)
        if self._ranks is not None and cause is None and not is_alone:
            self._ranks.decision_of_first(True)  # A launcher ends the first rank once another has failed: let it save first.
        raise error from cause

    # What a GPU has noted --------------------------------------------------------------------------------------------

    def _device_note(self) -> DeviceNote:
        if self._watch.note is None:
            losses = [f"{name}_loss" if name else "loss" for name in self._named_optimizers()]
            self._watch.note, self._watch.n_noted = DeviceNote([_BATCH, *losses], self.device), 0
        return self._watch.note

    def _prepare_watch(self) -> None:
        """Make what steps write to, before one of them becomes part of a graph."""
        if self._defers:
            for optimizer in self._named_optimizers().values():
                self._device_note().hold(optimizer)

    def _count_watched_step(self) -> None:
        """Look at the note now and then; steps are counted already."""
        if self._watch.note is not None:
            self._watch.n_noted += 1
            if self._watch.n_noted >= _guards.LOOK_INTERVAL:
                self._read_note()

    def _read_note(self) -> None:
        """Raise where the device has met something, all ranks at the same step."""
        if not self._defers or (self._ranks is None and not self._watch.n_noted):
            return
        kinds, left_out = self._take_note()
        if self._ranks is not None:
            everyone = self._ranks.gather((kinds, left_out))
            left_out = max(one[1] for one in everyone)
            kinds = [kind for kind in self._device_note().names if any(kind in one[0] for one in everyone)]
        if kinds:
            self._raise_noted(kinds, left_out)

    def _read_own_note(self) -> None:
        """Raise where the device has met something; of several ranks the first may be here alone, and only looks."""
        if self._ranks is None:
            self._read_note()
        elif self._watch.note is not None and self._watch.note.is_sick:
            self._raise_noted(*self._take_note(), is_alone=True)

    def _take_note(self) -> tuple[list[str], int]:
        """What the device has met since the last call, and how many steps were not good."""
        note, steps = self._device_note(), self._watch.n_noted
        self._watch.n_noted = 0
        kinds, good = note.read()
        return kinds, steps - good

    def _follow_first_rank(self, ranks: Ranks, **asked: Any) -> None:
        super()._follow_first_rank(ranks, **asked)
        if self._defers and not ranks.is_first:
            self._take_note()  # Of steps that are gone with the parameters.
        self._read_note()  # From here on all count alike, whatever steps one of them did alone.

    def _look_at_last_steps(self) -> None:
        super()._look_at_last_steps()
        self._read_note()

    def _raise_noted(self, kinds: Sequence[str], left_out: int, is_alone: bool = False) -> NoReturn:
        first = self._n_updates - left_out + 1
        self._n_updates = first - 1  # Later ones were left out, or are not worth counting.
        parameters = self._sick_parameter()
        sentences = [f"Gradient step {first}: {kinds[0]} {'or its gradient ' if kinds[0] != _BATCH else ''}is not finite."]
        if place := self._bad_cells():
            sentences.append(f"In the data: {place}.")
        elif kinds[0] == _BATCH:
            sentences.append("What is stored in the buffers is finite.")
        if parameters is None:
            sentences.append(
                f"On a GPU one looks every {_guards.LOOK_INTERVAL} steps. All parameters are finite: fused optimisers left out "
                "the rest of this step and all after it, though target networks may have moved on."
            )
        else:
            sentences.append(
                f"On a GPU one looks every {_guards.LOOK_INTERVAL} steps, and by now {parameters.text}: load a checkpoint."
            )
        sentences.append(_TRY_DATA if place or kinds[0] == _BATCH else _TRY_STEP)
        done = list(self._named_optimizers())[: max(self._device_note().names.index(kinds[0]) - 1, 0)]
        self._announce(
            NonFiniteError(
                " ".join(sentences),
                step=first,
                tensor=kinds[0],
                stepped=[*done, "targets"],
                is_usable=parameters is None,
            ),
            is_alone=is_alone,
        )

    # Parameters ------------------------------------------------------------------------------------------------------

    def _sick_parameter(self) -> Finding | None:
        tensors = self.policy.state_dict() | self._variables()
        if not self._defers and _guards.total_is_finite(_guards.floats(tensors.values())):
            return None
        return _guards.find(tensors)

    def require_finite_parameters(self) -> None:
        """Refuse parameters that are not finite, or that stand still since a step was not; called before the model is saved.

        Raises:
            NonFiniteError: If there are some.
        """
        self._read_own_note()
        finding = self._sick_parameter()
        if finding is not None:
            text = (
                f"After gradient step {self._n_updates}, {finding.text}: the model is not worth saving (get_parameters() still "
                "gives what there is). Load the last checkpoint. Gradients were finite when they were used: look for code "
                "that writes to the parameters, or for a learning rate so large that a step overflows."
            )
            raise NonFiniteError(text, step=self._n_updates, tensor=finding.tensor, rows=finding.rows, is_usable=False)

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model, see SB3; one that is sick is refused, lest it replace a good one.

        Args:
            path: See SB3.
            exclude: See SB3.
            include: See SB3.

        Raises:
            NonFiniteError: See :meth:`require_finite_parameters`; ``model.get_parameters()`` still gives what there is.
        """
        self.require_finite_parameters()
        super().save(path, exclude, include)

    # Log lines -------------------------------------------------------------------------------------------------------

    def _dump_offline_logs(self) -> None:
        self._read_note()
        self.require_finite_parameters()
        super()._dump_offline_logs()

    def dump_logs(self) -> None:
        """Write log data, see SB3; parameters that are not finite stop training."""
        if self._ranks is None:  # Else one rank alone is here.
            self._read_note()
            self.require_finite_parameters()
        super().dump_logs()

    def _record_metrics(self) -> None:
        super()._record_metrics()
        logged = self.logger.name_to_value
        values = {name: logged.get(f"train/{name}") for name in ("q_data", "q_policy", "q_random")}
        if self._q_range.has_warned or values["q_data"] is None:
            return
        scale, limit = _reward_scale(self._vec_normalize_env), _reward_limit(self._vec_normalize_env)
        for name, buffer in self._buffers():
            low, high = np.clip(self._reward_range(name, buffer), -limit, limit) / scale
            self._q_range.widen(float(low), float(high), self.gamma, self._entropy_bonus())
        if text := self._q_range.warning(values, "cql_alpha", self._n_updates):
            warnings.warn(text, stacklevel=2)

    def _reward_range(self, name: str, buffer: ReplayBuffer) -> tuple[float, float]:
        """The smallest and the largest stored reward; of data that does not grow they are looked for once."""
        version = (id(buffer), buffer.pos, buffer.size())
        known = self._watch.reward_ranges.get(name)
        if known is None or known[0] != version:
            rewards = buffer.rewards[: buffer.size()]
            known = self._watch.reward_ranges[name] = (version, float(rewards.min()), float(rewards.max()))
        return known[1:]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_sick_listeners", "_q_range", "_watch"]


def _without_returns(batch: Batch) -> Iterator[th.Tensor]:
    """The tensors of which every number must be finite; what is computed from counters is."""
    for value in (batch.rewards, batch.actions, batch.observations, batch.next_observations):
        if isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def _rows_like(buffer: ReplayBuffer, batch: Batch, row: int, env: Any) -> list[tuple[int, int]]:
    """Find the stored transitions, row and environment, that equal one of a batch in all that is stored as it is sampled."""
    size = buffer.size()

    def of(tensor: th.Tensor) -> np.ndarray:
        return tensor[row].cpu().numpy()

    actions = buffer.actions[:size]
    rows, columns = np.nonzero((actions == of(batch.actions)).reshape(*actions.shape[:2], -1).all(axis=2))
    if not isinstance(buffer, (NStepReplayBuffer, HerReplayBuffer)) and (env is None or not env.norm_reward):
        same = buffer.rewards[rows, columns] == of(batch.rewards)
        rows, columns = rows[same], columns[same]
    if (env is None or not env.norm_obs) and len(rows) and not isinstance(buffer, HerReplayBuffer):
        pairs = (
            [(buffer.observations[key], tensor) for key, tensor in batch.observations.items()]
            if isinstance(batch.observations, dict)
            else [(buffer.observations, batch.observations)]
        )
        for stored, tensor in pairs:
            same = (stored[rows, columns] == of(tensor)).reshape(len(rows), -1).all(axis=1)
            rows, columns = rows[same], columns[same]
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
