"""Checkpoints from which d3rlpy's ``fit`` and ``fit_online`` go on as if they had not been interrupted.

d3rlpy's own ``save`` holds networks, optimisers and config. These hold the random states, the counters, the environment's
generators and the online buffer, too. A checkpoint is one file; nothing in it is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from d3rlpy.base import DeviceArg, LearnableConfigWithShape
from d3rlpy.dataset import MixedReplayBuffer, ReplayBufferBase
from d3rlpy.torch_utility import unwrap_ddp_model

from cql_plugins import __version__
from cql_plugins._checkpoints import (
    Archive,
    CheckpointError,
    CheckpointFolder,
    StopSignals,
    encode,
    random_states,
    read_archive,
    set_random_states,
    write_archive,
)
from cql_plugins.d3rlpy.batches import TailValues
from cql_plugins.d3rlpy.offline import CalibratedMixin, OfflineToOnlineMixin
from cql_plugins.d3rlpy.online import OfflineOnlineReplayBuffer, ReturnsToGoReplayBuffer, with_returns_to_go
from cql_plugins.d3rlpy.runs import (
    ResumePoint,
    Run,
    environment_states,
    set_environment_states,
    set_states_before_reset,
    states_before_reset,
)
from cql_plugins.d3rlpy.stored import (
    LazyArrays,
    StoredBuffer,
    check_identity,
    identity_of,
    pack_buffer,
    pack_returns,
    put_returns,
)

_SCALERS = ("observation_scaler", "action_scaler", "reward_scaler")


# Saving -----------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    algo: Any,
    path: str | Path,
    *,
    dataset: ReplayBufferBase | None = None,
    buffer: ReplayBufferBase | None = None,
    env: Any = None,
    keep_last: int | None = 3,
) -> Path:
    """Save all that training needs to go on, whole or not at all.

    In a callback of ``fit``, ``fitter`` or ``fit_online``, or between the epochs of ``fitter``, the call's step, data, buffer
    and environment are known. Elsewhere (a loop of your own around ``update``) say what there is.

    Args:
        algo: One of ours, with its networks built.
        path: A file (``.zip``), or a folder of checkpoints, numbered.
        dataset: Logged data, of which only the identity is saved; what the algorithm remembers where ``None``.
        buffer: The buffer that is collected into.
        env: The environment, of which the random states are saved.
        keep_last: How many checkpoints of a folder to keep; ``None`` for all.

    Returns:
        The file.

    Raises:
        NonFiniteError: If a parameter is not finite; older checkpoints are as they were.
        OSError: If the disk does not take it; older checkpoints and the training are as they were.
        TypeError: If the algorithm is not one of ours.
        ValueError: If its networks are not built.
    """
    _check_algorithm(algo)
    if algo.impl is None:
        raise ValueError("The networks are not built yet, there is nothing to save. Call fit or create_impl first.")
    if unfitted := [name for name in _SCALERS if (scaler := getattr(algo.config, name)) is not None and not scaler.built]:
        raise ValueError(f"{' and '.join(unfitted)}: not fitted yet, and d3rlpy cannot write it so. Call fit first.")
    algo._require_finite_parameters()
    run: Run | None = algo._run
    if run is not None and run.left_at is not None and run.left_at != algo.grad_step:
        run = None  # Trained further since.
    document, arrays, tensors = _describe(algo, run, dataset, buffer, env)
    if Path(path).suffix == ".zip":
        write_archive(Path(path), document, arrays, tensors)
        return Path(path)
    label = f"step_{algo.grad_step}" if run is None else f"{run.phase}_{run.step}"
    return CheckpointFolder(path, keep_last).write(label, document, arrays, tensors)


def _describe(
    algo: Any, run: Run | None, dataset: ReplayBufferBase | None, buffer: ReplayBufferBase | None, env: Any
) -> tuple[dict[str, Any], LazyArrays, dict[str, Any]]:
    """The archive's document, arrays and tensors."""
    random = random_states()
    arrays, plain = LazyArrays(), dict[str, Any]()
    dataset = algo.offline_data if dataset is None else dataset
    if run is not None:
        buffer = run.buffer if buffer is None else buffer
        env = run.recorder.env if env is None and run.recorder is not None else env
    exact = run is not None and run.can_be_exact
    document: dict[str, Any] = {
        "framework": "d3rlpy",
        "versions": _versions(),
        "algorithm": algo.config.get_type(),
        "config": _config_of(algo).serialize(),
        "grad_step": algo.grad_step,
        "run": None,
        "random": {name: random[name] for name in ("python", "numpy")},
        "environment": None if not isinstance(env, gym.Env) else environment_states(env),
        "dataset": _identity(dataset, run),
        "mixed": _identity(_mixed_into(buffer, dataset), run),
        "buffer": None,
        "returns": None,
    }
    if run is not None:
        document["run"] = {
            "phase": run.phase,
            "step": run.step,
            "epoch_ended": run.epoch_ended,
            "exact": exact,
            "arguments": run.arguments,
            "evaluation": [environment_states(one) if isinstance(one, gym.Env) else None for one in run.evaluation],
            "episode": None,
        }
        if run.recorder is not None:
            before = run.recorder.before_reset if exact else states_before_reset(run.recorder.env)
            first = run.recorder.first_observation if exact else None
            document["run"]["episode"] = {"before_reset": before, "first_observation": first}
    collecting = _collecting(buffer)
    if collecting is not None:
        document["buffer"] = pack_buffer(collecting, arrays)
    if isinstance(algo, CalibratedMixin) and algo._tail_values is not None:
        settings = algo._returns_settings()
        document["returns"] = {
            "dataset": pack_returns(dataset, settings, arrays, "returns.dataset"),
            "buffer": pack_returns(buffer, settings, arrays, "returns.buffer"),
        }
    encoded = {name: encode(value, plain, name) for name, value in document.items()}
    arrays.parts.update(plain)
    modules = {
        name: (unwrap_ddp_model(module) if isinstance(module, th.nn.Module) else module).state_dict()
        for name, module in algo.impl._checkpointer.modules.items()
    }
    return encoded, arrays, {"modules": modules, "torch": random["torch"], "cuda": random["cuda"]}


def _check_algorithm(algo: Any) -> None:
    if not isinstance(algo, OfflineToOnlineMixin):
        raise TypeError(
            f"algo must be CQL, CalQL, DiscreteCQL or DiscreteCalQL of cql_plugins.d3rlpy; got {type(algo).__name__}. For "
            "others there is d3rlpy's own save, which holds networks and optimisers."
        )


def _config_of(algo: Any) -> LearnableConfigWithShape:
    return LearnableConfigWithShape(
        observation_shape=algo.impl.observation_shape, action_size=algo.impl.action_size, config=algo.config
    )


def _versions() -> dict[str, str]:
    return {"cql-plugins": __version__, **{name: version(name) for name in ("d3rlpy", "numpy", "torch")}}


def _identity(dataset: ReplayBufferBase | None, run: Run | None) -> dict[str, Any] | None:
    """The identity of logged data, computed once in a run."""
    if dataset is None:
        return None
    known = {} if run is None else run.known
    if id(dataset) not in known:
        known[id(dataset)] = (dataset, identity_of(dataset))  # the data is kept, so that its number stays its own
    found: dict[str, Any] = known[id(dataset)][1]
    return found


def _mixed_into(buffer: ReplayBufferBase | None, dataset: ReplayBufferBase | None) -> ReplayBufferBase | None:
    """The logged data in a mixed buffer, where it is not that of the algorithm."""
    offline = buffer.secondary_replay_buffer if isinstance(buffer, MixedReplayBuffer) else None
    return None if offline is dataset else offline


def _collecting(buffer: ReplayBufferBase | None) -> ReturnsToGoReplayBuffer | None:
    """The part of a buffer that is collected into."""
    if buffer is None:
        return None
    buffer = with_returns_to_go(buffer)
    online = buffer.online if isinstance(buffer, OfflineOnlineReplayBuffer) else buffer
    return online if isinstance(online, ReturnsToGoReplayBuffer) else None


# Loading ----------------------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | Path,
    algo: Any = None,
    *,
    dataset: ReplayBufferBase | None = None,
    buffer: ReplayBufferBase | None = None,
    env: Any = None,
    device: DeviceArg = None,
) -> Any:
    """Load a checkpoint. The next ``fit`` or ``fit_online``, called as it was the first time, goes on at its step.

    ``algo.resume_point`` says in which phase and at which step it was written. In a checkpoint of ``fit_online`` the buffer's
    content waits for the next ``fit_online``; without a run (see :func:`save_checkpoint`) it goes into ``buffer`` at once.

    Args:
        path: A file, or a folder, of which the newest whole checkpoint is taken.
        algo: Where to load into, of the same config; a new one where ``None``.
        dataset: The logged data, checked against that of the checkpoint. ``fit`` checks its own; ``fit_online`` needs it here
            where it was mixed in.
        buffer: For a loop of your own: the buffer that was saved, empty.
        env: For a loop of your own: the environment whose random states were saved.
        device: Of a new algorithm, see d3rlpy.

    Returns:
        The algorithm.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        CheckpointError: If it is damaged, or belongs to another algorithm, config or data. Nothing is changed then.
        TypeError: If the algorithm is not one of ours.
    """
    archive = _read(path)
    document = {name: archive.decoded(name) for name in archive.document}
    if document.get("framework") != "d3rlpy":
        raise CheckpointError(f"{archive.path} was written by {document.get('framework')!r}, not by cql_plugins.d3rlpy.")
    config = _read_config(archive, document)
    if algo is not None:
        _check_algorithm(algo)
        _check_config(archive, document, config, algo)
    stored = None if document["buffer"] is None else StoredBuffer(document["buffer"], archive.arrays)
    if dataset is not None:
        check_identity(document["dataset"], identity_of(dataset))
    _warn_of_versions(archive, document["versions"])

    if algo is None:
        algo = config.config.create(device)
    if algo.impl is None:
        algo.create_impl(config.observation_shape, config.action_size)
    for name in _SCALERS:  # d3rlpy fits them to the data only where they are not
        if (scaler := getattr(algo.config, name)) is not None and not scaler.built:
            setattr(algo.config, name, getattr(config.config, name))
    for name, module in algo.impl._checkpointer.modules.items():
        target = unwrap_ddp_model(module) if isinstance(module, th.nn.Module) else module
        target.load_state_dict(archive.tensors["modules"][name])
    algo.set_grad_step(document["grad_step"])
    if dataset is not None:
        algo.set_offline_data(dataset)
    algo._run = None
    if isinstance(algo, CalibratedMixin):
        algo._tail_values = None if document["returns"] is None else TailValues(algo._target_values)
    algo.resume_point = None if document["run"] is None else _resume_point(archive, document, stored)
    if buffer is not None and stored is not None and (collecting := _collecting(buffer)) is not None:
        stored.put_into(collecting)
    if document["run"] is None and document["returns"] is not None:
        settings = algo._returns_settings()
        put_returns(algo.offline_data, document["returns"]["dataset"], settings, archive.arrays)
        put_returns(buffer, document["returns"]["buffer"], settings, archive.arrays)
    if env is not None and document["environment"] is not None:
        set_environment_states(env, document["environment"])
    set_random_states({**document["random"], "torch": archive.tensors["torch"], "cuda": archive.tensors["cuda"]})
    return algo


def _read(path: str | Path) -> Archive:
    path = Path(path)
    if not path.is_dir():
        return read_archive(path)
    found = CheckpointFolder(path).newest()
    if found is None:
        raise FileNotFoundError(f"There is no checkpoint in {path}.")
    return found


def _read_config(archive: Archive, document: Mapping[str, Any]) -> LearnableConfigWithShape:
    try:
        config = LearnableConfigWithShape.deserialize(document["config"])
    except Exception as error:  # Whatever d3rlpy makes of the config of another release.
        raise CheckpointError(
            f"{archive.path} holds {document['algorithm']!r} with a config that this release does not read: "
            f"{type(error).__name__}: {error}."
        ) from error
    shape: Any = config.observation_shape
    config.observation_shape = tuple(tuple(one) if isinstance(one, list) else one for one in shape)
    return config


def _check_config(archive: Archive, document: Mapping[str, Any], config: LearnableConfigWithShape, algo: Any) -> None:
    """Refuse an algorithm of another kind, config or shape."""
    if document["algorithm"] != algo.config.get_type():
        raise CheckpointError(f"{archive.path} is of {document['algorithm']!r}, the algorithm is {algo.config.get_type()!r}.")
    unfitted = {name: scaler for name in _SCALERS if (scaler := getattr(algo.config, name)) is not None and not scaler.built}
    then, now = _plain(config.config), _plain(dataclasses.replace(algo.config, **dict.fromkeys(unfitted)))
    for name, scaler in unfitted.items():  # d3rlpy cannot describe those
        now[name] = then[name] if then[name]["type"] == scaler.get_type() else {"type": scaler.get_type()}
    if algo.impl is not None:
        then |= {"observation_shape": _plain(config)["observation_shape"], "action_size": config.action_size}
        now |= {"observation_shape": _plain(_config_of(algo))["observation_shape"], "action_size": algo.impl.action_size}
    changed = [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]
    if changed:
        raise CheckpointError(
            f"{archive.path} was written with another config: {'; '.join(changed)}. Give the config of then, or none: "
            "load_checkpoint(path) makes the algorithm itself."
        )


def _plain(config: Any) -> dict[str, Any]:
    """A config as JSON has it, so that tuples equal lists."""
    found: dict[str, Any] = json.loads(config.serialize())
    return found


def _warn_of_versions(archive: Archive, then: Mapping[str, str]) -> None:
    now = _versions()
    changed = [f"{name} {then[name]} (now {now[name]})" for name in then if then[name] != now.get(name)]
    if changed:
        warnings.warn(
            f"{archive.path} was written with {', '.join(changed)}: the run goes on, but perhaps not to the bit.",
            UserWarning,
            stacklevel=3,
        )


def _resume_point(archive: Archive, document: dict[str, Any], stored: StoredBuffer | None) -> ResumePoint:
    """What the next call of d3rlpy's loop needs to go on."""
    described, arrays, tensors = document["run"], archive.arrays, archive.tensors
    waiting = [stored]  # given away at the begin, so that the memory is not held twice

    def begin(algo: Any, run: Run) -> None:
        check_identity(document["dataset"], _identity(run.dataset, run))
        check_identity(document["mixed"], _identity(_mixed_into(run.buffer, run.dataset), run))
        if run.phase == "online" and waiting[0] is not None:
            collecting = _collecting(run.buffer)
            if collecting is None:
                raise CheckpointError("The checkpoint has an online buffer, and this run collects into none of d3rlpy's.")
            waiting[0].put_into(collecting)
        if document["returns"] is not None:
            settings = algo._returns_settings()
            put_returns(run.dataset, document["returns"]["dataset"], settings, arrays)
            put_returns(run.buffer, document["returns"]["buffer"], settings, arrays)
        if not described["exact"]:
            warnings.warn(
                "The checkpoint was written in the middle of an episode, which cannot be gone on with: it stays in the buffer "
                "as one that was broken off, and a new one begins. The run goes on, but not to the bit.",
                UserWarning,
                stacklevel=6,
            )

    def reset(recorder: Any) -> Any:
        episode = described["episode"]
        if episode is None or not hasattr(recorder, "before_reset"):
            return recorder.reset()[0]
        set_states_before_reset(recorder.env, episode["before_reset"])
        observation, _ = recorder.reset()
        if episode["first_observation"] is not None and not _same(observation, episode["first_observation"]):
            warnings.warn(
                "The environment did not begin the episode after the checkpoint as it did then: its reset depends on more than "
                "its random generators. The run goes on, but not to the bit.",
                UserWarning,
                stacklevel=6,
            )
        return observation

    def go_on(run: Run) -> None:
        if run.recorder is not None and document["environment"] is not None and described["exact"]:
            set_environment_states(run.recorder.env, document["environment"])
        for env, states in zip(run.evaluation, described["evaluation"], strict=False):
            if states is not None:
                set_environment_states(env, states)
        set_random_states({**document["random"], "torch": tensors["torch"], "cuda": tensors["cuda"]})
        waiting[0] = None

    return ResumePoint(
        described["phase"],
        described["step"],
        described["epoch_ended"],
        described["exact"],
        described["arguments"],
        begin,
        reset,
        go_on,
    )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_same(*pair) for pair in zip(first, second, strict=True))
    return np.array_equal(first, second, equal_nan=np.asarray(first).dtype.kind == "f")


# Now and then -----------------------------------------------------------------------------------------------------------


class Checkpoints:
    """A callback for ``fit``, ``fitter`` and ``fit_online`` that saves checkpoints.

    Online a checkpoint that is due waits for the end of the running episode, since only there training goes on exactly; where
    no episode ends before the next one is due, it is written in the middle of one.
    At SIGTERM and Ctrl-C the step is finished, a checkpoint written (in the middle of an episode, if one runs), and training
    stopped with ``SystemExit(143)`` or ``KeyboardInterrupt``; a second Ctrl-C stops at once.

    Several processes that train one model need a folder each. Inside another callback signals are heeded only within
    ``with checkpoints:``.

    Args:
        folder: Where checkpoints go; one run each.
        every_steps: Save after each so many steps of the loop; ``None`` for not by steps.
        every_minutes: Save after so many minutes; ``None`` for not by time.
        keep_last: How many to keep; ``None`` for all.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = 10_000,
        every_minutes: float | None = None,
        keep_last: int | None = 3,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, or None; got {value}.")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self._folder = CheckpointFolder(folder, keep_last)
        self._signals = StopSignals()
        self._active = contextlib.ExitStack()
        self._depth = 0
        self._algo: Any = None
        self._is_due = False
        self._last_time = time.monotonic()

    @property
    def folder(self) -> Path:
        """Where checkpoints go."""
        return self._folder.folder

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return self._folder.paths()

    def resume(self, algo: Any, dataset: ReplayBufferBase | None = None) -> bool:
        """Load the newest whole checkpoint, where there is one; the next ``fit`` or ``fit_online`` goes on from it.

        Args:
            algo: Where to load into, see :func:`load_checkpoint`.
            dataset: The logged data.

        Returns:
            Whether there was one.
        """
        if not self.paths():
            return False
        load_checkpoint(self.folder, algo, dataset=dataset)
        return True

    def __call__(self, algo: Any, epoch: int, total_step: int) -> None:
        """Save where it is time to, see d3rlpy's callbacks."""
        self._algo = algo
        is_time = self.every_steps is not None and total_step % self.every_steps == 0
        if self.every_minutes is not None and time.monotonic() - self._last_time >= 60 * self.every_minutes:
            is_time, self._last_time = True, time.monotonic()
        run: Run | None = getattr(algo, "_run", None)
        stopping = self._signals.received is not None
        waits = run is not None and run.recorder is not None and not run.can_be_exact and not (is_time and self._is_due)
        self._is_due = self._is_due or is_time
        if stopping or (self._is_due and not waits):
            self._is_due, self._last_time = False, time.monotonic()
            save_checkpoint(algo, self.folder, keep_last=self._folder.keep_last)
        if stopping:
            self._signals.obey()

    def keep_from_before(self, algo: Any) -> None:
        """Write the state from before a step that failed beside the checkpoints; never resumed from, since it would fail again.

        Args:
            algo: What was trained, as a ``NonFiniteError`` leaves it.
        """
        path = save_checkpoint(algo, self.folder / f"before_failure_step_{algo.grad_step}.zip")
        warnings.warn(f"The state before the failed step is in {path}; load_checkpoint(path) reads it.", stacklevel=2)

    def __enter__(self) -> Checkpoints:
        if self._depth == 0:
            self._active.enter_context(self._signals)
            self._is_due, self._last_time = False, time.monotonic()
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._active.close()
        algo, self._algo = self._algo, None
        if error is None and self._signals.received is not None:  # It came after the last step.
            if algo is not None and algo._run is not None:
                save_checkpoint(algo, self.folder, keep_last=self._folder.keep_last)
            self._signals.obey()


__all__ = ["CheckpointError", "Checkpoints", "load_checkpoint", "save_checkpoint"]
