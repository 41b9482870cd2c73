"""What a running ``fit`` or ``fit_online`` knows of itself, and how it goes on at the step of a checkpoint.

d3rlpy's loops begin at step 0. A resumed one therefore runs through the steps before the checkpoint without doing anything
(no batch, no update, no environment step, no log), so that epochs, schedules and intervals fall where they fell; at the end of
the checkpoint's step everything is put back, and the loop goes on from there.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch as th
from d3rlpy.dataset import MixedReplayBuffer, ReplayBufferBase

from cql_plugins._guards import NonFiniteError

Phase = Literal["offline", "online"]

_LOOP_ARGUMENTS = {
    "offline": ("n_steps_per_epoch",),
    "online": ("n_steps_per_epoch", "update_interval", "n_updates", "update_start_step", "random_steps"),
}
"""Arguments of d3rlpy's loops that decide what a step does; ``n_steps`` may be another at a resume."""


# Random states of environments ------------------------------------------------------------------------------------------


def environment_states(env: Any) -> dict[str, Any]:
    """The states of all random generators that an environment, its wrappers and its spaces keep as attributes.

    Args:
        env: Environment.

    Returns:
        States by the generator's place, as NumPy and Python give them.
    """
    return {place: _state_of(generator) for place, generator in _generators(env)}


def set_environment_states(env: Any, states: Mapping[str, Any]) -> None:
    """Set what :func:`environment_states` returned.

    Args:
        env: An environment like the one of then.
        states: The states.

    Raises:
        ValueError: If it has other generators.
    """
    found = dict(_generators(env))
    if found.keys() != states.keys():
        raise ValueError(
            f"the environment keeps random generators at {sorted(found)}; that of the checkpoint kept them at "
            f"{sorted(states)}. Make the environment with the same wrappers."
        )
    for place, generator in found.items():
        _set_state(generator, states[place])


def _generators(env: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    depth = 0
    while env is not None:
        layer = f"{depth}.{type(env).__name__}"
        inner = env.env if isinstance(env, gym.Wrapper) else None
        if inner is None and isinstance(env, gym.Env):
            with contextlib.suppress(Exception):  # an environment may have none, or its own idea of it
                _ = env.np_random  # made at the first use; from then on it can be put back
        for name, value in list(getattr(env, "__dict__", {}).items()):
            if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
                yield f"{layer}.{name}", value
        for name in ("action_space", "observation_space"):
            for place, space in _spaces(getattr(env, name, None), f"{layer}.{name}"):
                if id(space) not in seen:
                    seen.add(id(space))
                    yield place, space.np_random
        env, depth = inner, depth + 1


def _spaces(space: Any, place: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(space, gym.Space):
        return
    yield place, space
    parts = getattr(space, "spaces", ())
    for name, part in parts.items() if isinstance(parts, Mapping) else enumerate(parts):
        yield from _spaces(part, f"{place}.{name}")


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def states_before_reset(env: Any) -> dict[str, Any]:
    """All that a reset may draw from: the environment's own generators and the global ones of the CPU.

    Args:
        env: Environment.
    """
    return {
        "environment": environment_states(env),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (some environments draw from it)
        "torch": th.get_rng_state().numpy(),
    }


def set_states_before_reset(env: Any, states: Mapping[str, Any]) -> None:
    """Set what :func:`states_before_reset` returned.

    Args:
        env: An environment like the one of then.
        states: The states.
    """
    set_environment_states(env, states["environment"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    th.set_rng_state(th.from_numpy(states["torch"]))


# What is known of a run -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ResumePoint:
    """Where a loaded checkpoint goes on.

    Attributes:
        phase: ``"offline"``: call ``fit`` or ``fitter``; ``"online"``: call ``fit_online``.
        step: Steps of that call that are done.
        epoch_ended: Whether evaluators and logs at the end of the step's epoch are done, too.
        exact: Whether the rest will be what it would have been. It is not where an episode was running.
        arguments: Of the call, those that decide what a step does.
        begin: Puts back what the loop is given: buffer and returns. Raises where they do not fit.
        reset: Puts the environment where its episode began, and begins it again; returns the first observation.
        go_on: Puts back the random states.
    """

    phase: Phase
    step: int
    epoch_ended: bool
    exact: bool
    arguments: dict[str, Any]
    begin: Callable[[Any, Run], None]
    reset: Callable[[Any], Any]
    go_on: Callable[[Run], None]


@dataclass(eq=False)
class Run:
    """A call of ``fitter`` or ``fit_online`` under way.

    Attributes:
        phase: Which.
        dataset: The logged data, where there is some.
        buffer: What is collected into, offline data mixed in or not; ``None`` offline.
        recorder: The watched environment; ``None`` offline, and for one of the old gym.
        arguments: Of the call, those that decide what a step does.
        evaluation: Environments of the evaluations, in their order.
        step: Steps done, as callbacks see them.
        epoch_ended: Whether the end of the step's epoch is done, too.
        left_at: Gradient steps at which a callback left the loop; ``None`` while it runs.
        left_exact: Whether it could have been resumed exactly there.
        known: The identities of logged data that were computed.
    """

    phase: Phase
    dataset: ReplayBufferBase | None = None
    buffer: ReplayBufferBase | None = None
    recorder: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    evaluation: list[Any] = field(default_factory=list)
    step: int = 0
    epoch_ended: bool = False
    left_at: int | None = None
    left_exact: bool = True
    known: dict[int, Any] = field(default_factory=dict)

    @property
    def collecting(self) -> Any:
        """The buffer that is collected into, without what is mixed in."""
        buffer = self.buffer
        return buffer.primary_replay_buffer if isinstance(buffer, MixedReplayBuffer) else buffer

    @property
    def can_be_exact(self) -> bool:
        """Whether a checkpoint of this moment goes on exactly: offline always, online where no episode runs."""
        if self.left_at is not None:
            return self.left_exact
        return self.phase == "offline" or (self.recorder is not None and not self.collecting.has_running_episode)


# Going on ---------------------------------------------------------------------------------------------------------------


class _Loop:
    """One call of d3rlpy's loop: its arguments with what watches it, and skips what is done.

    Args:
        algo: The algorithm.
        run: What is known of it.
        arguments: The loop's; written to.
        point: Where to go on; ``None`` at a beginning.
    """

    def __init__(self, algo: Any, run: Run, arguments: dict[str, Any], point: ResumePoint | None) -> None:
        self.algo, self.run, self.point = algo, run, point
        self.skipping = point is not None
        self.resumed_epoch = False  # whether the epoch's figures are of a part of its steps
        self._n_per_epoch = int(arguments["n_steps_per_epoch"])
        self._step = 0
        self._callback = arguments["callback"]
        self._shadowed: dict[str, Any] = {}
        arguments["callback"] = self._after_step
        if point is not None:
            self._skip_with(arguments)

    def _skip_with(self, arguments: dict[str, Any]) -> None:
        for name, skipping in _SKIPPING.items():
            if arguments.get(name) is not None:
                arguments[name] = skipping(arguments[name], self)
        if arguments.get("evaluators"):
            arguments["evaluators"] = {
                name: _SkippingEvaluator(evaluator, self) for name, evaluator in arguments["evaluators"].items()
            }
        if arguments.get("epoch_callback") is not None:
            epoch_callback = arguments["epoch_callback"]
            arguments["epoch_callback"] = lambda *args: None if self.skipping else epoch_callback(*args)
        if self.run.phase == "offline":
            self._shadow("update", lambda batch: {})
        else:
            self._shadow("sample_action", lambda x: (None,))

    def _shadow(self, name: str, function: Callable[..., Any]) -> None:
        """Put a function in the place of a method for as long as steps are skipped."""
        attributes = vars(self.algo)
        self._shadowed[name] = attributes.get(name)
        attributes[name] = function

    def unshadow(self) -> None:
        """Give the methods back."""
        for name, before in self._shadowed.items():
            if before is None:
                vars(self.algo).pop(name, None)
            else:
                vars(self.algo)[name] = before
        self._shadowed = {}

    def _after_step(self, algo: Any, epoch: int, total_step: int) -> None:
        self._step = total_step
        if self.skipping:
            assert self.point is not None
            ends_epoch = total_step % self._n_per_epoch == 0
            if total_step == self.point.step and not (self.point.epoch_ended and ends_epoch):
                self._go_on(partly=True)
            return
        run = self.run
        run.step, run.epoch_ended = total_step, False
        if self._callback is None:
            return
        try:
            self._callback(algo, epoch, total_step)
        except BaseException:
            run.left_exact, run.left_at = run.can_be_exact, algo.grad_step
            raise

    def ends_epoch(self) -> bool:
        """Note that an epoch's end is done.

        Returns:
            Whether it was the end of an epoch that counts; else of one that was skipped.
        """
        if self.skipping:
            assert self.point is not None
            if self._step == self.point.step:
                self._go_on(partly=False)
            return False
        self.run.epoch_ended = True
        return True

    def _go_on(self, partly: bool) -> None:
        assert self.point is not None
        self.point.go_on(self.run)
        self.unshadow()
        self.run.step, self.run.epoch_ended = self.point.step, self.point.epoch_ended
        self.skipping, self.resumed_epoch = False, partly
        self.algo.resume_point = None

    def figures(self, metrics: dict[str, float]) -> dict[str, float]:
        """An epoch's figures without the times where steps of it were skipped."""
        resumed, self.resumed_epoch = self.resumed_epoch, False
        return {name: value for name, value in metrics.items() if not (resumed and name.startswith("time_"))}


@contextlib.contextmanager
def following(algo: Any, run: Run, call: inspect.BoundArguments) -> Iterator[_Loop]:
    """Watch a call of d3rlpy's loop, and let it go on where a checkpoint was loaded.

    Args:
        algo: The algorithm.
        run: What is known of the call.
        call: The call's arguments with defaults; written to.

    Raises:
        ValueError: If the call cannot go on from the loaded checkpoint.
    """
    arguments = call.arguments
    run.arguments = {name: arguments[name] for name in _LOOP_ARGUMENTS[run.phase]} | _sampling(run)
    evaluated = [getattr(evaluator, "_env", None) for evaluator in (arguments.get("evaluators") or {}).values()]
    run.evaluation = [env for env in (*evaluated, arguments.get("eval_env")) if env is not None]
    point = _point_for(algo, run, int(arguments["n_steps"]))
    if point is not None:
        point.begin(algo, run)
    callback = arguments["callback"]
    loop = _Loop(algo, run, arguments, point)
    algo._run = run
    try:
        with callback if hasattr(callback, "__enter__") else contextlib.nullcontext():
            yield loop
    except NonFiniteError as error:
        algo._run = None  # The state is from before the step: of no point that the loop could go on from.
        if error.is_usable and (keep := getattr(callback, "keep_from_before", None)) is not None:
            keep(algo)
        raise
    finally:
        loop.unshadow()
        if run.left_at is None:
            algo._run = None  # What a callback left can still be saved as it is; what broke off within a step cannot.


def _sampling(run: Run) -> dict[str, Any]:
    """How the buffers' transitions are picked and mixed, which is no part of the algorithm's config."""
    found: dict[str, Any] = {}
    for name, buffer in (("dataset", run.dataset), ("buffer", run.collecting)):
        if buffer is not None:
            picker = getattr(buffer.transition_picker, "inner", buffer.transition_picker)
            plain = {key: value for key, value in vars(picker).items() if isinstance(value, (bool, int, float, str))}
            shown = ", ".join(f"{key.lstrip('_')}={value}" for key, value in sorted(plain.items()))
            found[f"{name}.transition_picker"] = f"{type(picker).__name__}({shown})"
    if (fraction := getattr(run.buffer, "offline_fraction", None)) is not None:
        found["buffer.offline_fraction"] = fraction
    return found


def _point_for(algo: Any, run: Run, n_steps: int) -> ResumePoint | None:
    """The loaded checkpoint's point, where this call is to go on from it."""
    point: ResumePoint | None = algo.resume_point
    if point is None:
        return None
    if point.phase == "offline" and run.phase == "online":
        algo.resume_point = None  # The rest of the offline phase is not wanted.
        return None
    if point.phase == "online" and run.phase == "offline":
        raise ValueError(
            f"The checkpoint was written at step {point.step} of fit_online, and fit would train offline once more. Call "
            "fit_online, or set resume_point = None to train on from the checkpoint's networks alone."
        )
    n_steps -= n_steps % run.arguments["n_steps_per_epoch"] if run.phase == "offline" else 0
    if n_steps < point.step:
        raise ValueError(
            f"The checkpoint was written after {point.step} steps, and n_steps asks for {n_steps} in all. n_steps counts the "
            "steps before the checkpoint, too."
        )
    changed = [
        f"{name}={run.arguments[name]} (was {before})"
        for name, before in point.arguments.items()
        if run.arguments.get(name, before) != before  # What is missing altogether is asked for later.
    ]
    if changed:
        warnings.warn(
            f"The run goes on with {', '.join(changed)}: it will not be the one that was interrupted.",
            UserWarning,
            stacklevel=6,
        )
    return point


class _Skipping:
    """Stands before something that the loop uses, and keeps the loop from it while steps are skipped."""

    def __init__(self, inner: Any, loop: _Loop) -> None:
        self._inner, self._loop = inner, loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _SkippingBuffer(_Skipping):
    def sample_transition_batch(self, batch_size: int) -> Any:
        return None if self._loop.skipping else self._inner.sample_transition_batch(batch_size)

    @property
    def transition_count(self) -> int:
        return 0 if self._loop.skipping else self._inner.transition_count

    def append(self, *step: Any) -> None:
        if not self._loop.skipping:
            self._inner.append(*step)

    def clip_episode(self, terminated: bool) -> None:
        if not self._loop.skipping:
            self._inner.clip_episode(terminated)


class _SkippingEnvironment(_Skipping):
    """Its one reset while skipping is the one that began the episode after the checkpoint."""

    _observation: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        if not self._loop.skipping:
            return self._inner.reset(**options)  # type: ignore[no-any-return]
        assert self._loop.point is not None
        self._observation = self._loop.point.reset(self._inner)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._loop.skipping:
            return self._observation, 0.0, False, False, {}
        return self._inner.step(action)  # type: ignore[no-any-return]


class _SkippingEvaluation(_Skipping):
    """An environment for evaluations: while skipping an episode is one step of nothing."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        if self._loop.skipping:
            space = self._inner.observation_space
            return np.zeros(space.shape, space.dtype), {}
        return self._inner.reset(**options)  # type: ignore[no-any-return]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._loop.skipping:
            return None, 0.0, True, False, {}
        return self._inner.step(action)  # type: ignore[no-any-return]


class _SkippingExplorer(_Skipping):
    def sample(self, algo: Any, x: Any, step: int) -> Any:
        return (None,) if self._loop.skipping else self._inner.sample(algo, x, step)


class _SkippingEvaluator(_Skipping):
    def __call__(self, algo: Any, dataset: Any) -> float:
        return 0.0 if self._loop.skipping else self._inner(algo, getattr(dataset, "_inner", dataset))


class _SkippingLogs(_Skipping):
    """A factory of log writers."""

    def create(self, *args: Any, **kwargs: Any) -> Any:
        return _SkippingLog(self._inner.create(*args, **kwargs), self._loop)


class _SkippingLog(_Skipping):
    def before_write_metric(self, epoch: int, step: int) -> None:
        if not self._loop.skipping:
            self._inner.before_write_metric(epoch, step)

    def write_metric(self, epoch: int, step: int, name: str, value: float) -> None:
        if not self._loop.skipping and not (self._loop.resumed_epoch and name.startswith("time_")):
            self._inner.write_metric(epoch, step, name, value)

    def after_write_metric(self, epoch: int, step: int) -> None:
        if not self._loop.skipping:
            self._inner.after_write_metric(epoch, step)

    def watch_model(self, epoch: int, step: int) -> None:
        if not self._loop.skipping:
            self._inner.watch_model(epoch, step)
            if self._loop.run.phase == "online":
                self._loop.resumed_epoch = False

    def save_model(self, epoch: int, algo: Any) -> None:
        if not self._loop.skipping:
            self._inner.save_model(epoch, algo)


_SKIPPING: dict[str, type[_Skipping]] = {
    "dataset": _SkippingBuffer,
    "buffer": _SkippingBuffer,
    "env": _SkippingEnvironment,
    "eval_env": _SkippingEvaluation,
    "explorer": _SkippingExplorer,
    "logger_adapter": _SkippingLogs,
}
"""What stands before the loop's arguments, by their names."""
