"""Runs that can be killed at any moment and go on, bit for bit, as if they had not been."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3 import __version__ as sb3_version
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins._checkpoints import (
    Archive,
    Arrays,
    CheckpointError,
    CheckpointFolder,
    ContentHash,
    StopSignals,
    decode,
    encode,
    random_states,
    random_states_kept,
    read_archive,
    set_random_states,
    write_archive,
)
from cql_plugins._env_state import capture_state, misfits, restore_state
from cql_plugins.sb3.buffers import ReturnsToGoMixin, with_returns_to_go
from cql_plugins.sb3.offline import COUNTERS, OfflineData, OfflineMixin, options_of
from cql_plugins.sb3.rearrange import column_arrays, refill
from cql_plugins.sb3.watch import WatchedMixin

Model = TypeVar("Model", bound=OfflineMixin)

_NOT_COUNTERS = (
    "_buffer_waits_for_env", "_captured_steps", "_custom_logger", "_device_data", "_logger", "_num_timesteps_at_start",
    "_offline_source", "_random_states", "_ranks", "_sick_listeners", "_stats_window_size", "_total_timesteps",
    "_stop_signals", "_vec_normalize_env", "_workspace",
)  # fmt: skip
_BUFFER_SETTINGS = (
    "_return_tail", "_returns_gamma", "buffer_size", "gamma", "goal_selection_strategy", "handle_timeout_termination",
    "her_ratio", "n_envs", "n_sampled_goal", "n_steps", "sums_relabelled_rewards",
)  # fmt: skip
"""What the model's own replay buffer was built with; where the run had others, the model's count."""
_OF_ENVIRONMENT = ("_last_obs", "_last_original_obs", "_last_episode_starts")


class Checkpoints(BaseCallback):
    """Write checkpoints of a run and go on from the newest one: the same script, started again, takes up where it was.

    ::

        run = Checkpoints("runs/door", save_freq=5_000)
        model = run.resume(CalQL("MlpPolicy", env, seed=0))
        run.learn_offline(model, dataset, gradient_steps=50_000)
        run.learn(model, total_timesteps=20_000)

    A checkpoint has everything that training goes on from: networks, targets, optimisers, temperature and Lagrange multiplier,
    counters, the random states of Python, NumPy, torch and the spaces, the online buffer with returns-to-go and running
    episodes, ``VecNormalize``, the environments in the middle of their episodes, and a hash of the offline data. On the CPU the
    parameters after N steps, a new start and M steps are those of N + M steps, to the last bit.

    Environments are read attribute by attribute, MuJoCo's included. One that hides its state (a physics engine in C, a server)
    is reset on resuming, with a warning: its episode is broken off, and what follows is another run. So is one whose episodes
    have more or fewer objects; one that merely makes its objects in ``reset`` is reset and then goes on where it was.
    Environments in other processes must be wrapped in :class:`ResumableEnv`. Put this callback last in a list: what comes after
    it (an evaluation that draws random numbers) is not in the checkpoint of that step. Under ``torchrun`` rank 0 writes, and
    random streams start anew.

    Args:
        save_path: Folder of this one run.
        save_freq: Gradient steps (offline) or environment steps (online) between two checkpoints; 0 for none by count.
        save_minutes: Minutes between two checkpoints; ``None`` for none by time.
        keep_last: How many to keep; ``None`` keeps all.
        verbose: 1 prints what is written.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        save_path: str | Path,
        save_freq: int = 10_000,
        save_minutes: float | None = None,
        keep_last: int | None = 3,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if save_freq < 0:
            raise ValueError(f"save_freq must not be negative; got {save_freq}.")
        if save_minutes is not None and not save_minutes > 0:
            raise ValueError(f"save_minutes must be positive, or None; got {save_minutes}.")
        self.files = CheckpointFolder(save_path, keep_last)
        self.save_freq, self.save_minutes = save_freq, save_minutes
        self._signals = StopSignals()
        self._archive: Archive | None = None
        self._identity: tuple[weakref.ref[ReplayBuffer], str] | None = None
        self._saved_at: tuple[str, int] | None = None
        self._last_save = ("", 0, 0.0)
        # Whether gSDE has drawn its noise for the rollout that comes next.
        self._noise_is_drawn = False

    # Going on --------------------------------------------------------------------------------------------------------

    def resume(self, model: Model) -> Model:
        """Bring a model that was just built to the newest checkpoint; nothing happens where there is none.

        Args:
            model: Built as the run's was, with its environment. With another number of environments it goes on, too: the
                online buffer is rearranged, the environments start anew.

        Returns:
            The model.

        Raises:
            CheckpointError: If no checkpoint is whole, or it is another algorithm's or of networks of other shapes or other
                environments; the model is as it was.
        """
        archive = self.files.newest()
        if archive is not None:
            load_checkpoint(model, archive)
            self._archive = archive
            self._saved_at = archive.document["phase"], archive.document["step"]
        return model

    def learn_offline(
        self,
        model: Model,
        dataset: OfflineData | ReplayBuffer,
        gradient_steps: int,
        callback: MaybeCallback = None,
        **kwargs: Any,
    ) -> Model:
        """Train offline until the model has done so many gradient steps in all, with checkpoints.

        SIGTERM, and a first SIGINT, end it after the gradient step that runs, with a checkpoint; a second SIGINT at once. Under
        ``torchrun`` a signal to any rank ends all of them.

        Args:
            model: From :meth:`resume`.
            dataset: See ``learn_offline`` of the model.
            gradient_steps: All that are wanted, with those that were done before.
            callback: SB3 callback(s) beside this one.
            **kwargs: See ``learn_offline`` of the model.

        Returns:
            The model.

        Raises:
            CheckpointError: If the dataset is not the one that the run had.
            SystemExit: After SIGTERM, with status 143.
            KeyboardInterrupt: After SIGINT.
        """
        left = gradient_steps - model._n_offline_steps
        with self._signals:
            if left > 0:
                model._stop_signals = self._signals
                try:
                    model.learn_offline(dataset, left, callback=self._with(callback), **kwargs)
                finally:
                    model._stop_signals = None
            else:
                model._restore_online_clock()
                model.set_offline_data(dataset)
                self._check_data(model)
            self._signals.obey()
        return model

    def learn(self, model: Model, total_timesteps: int, callback: MaybeCallback = None, **kwargs: Any) -> Model:
        """Train online until the model has done so many environment steps in all, with checkpoints.

        Signals are obeyed between two rollouts, see :meth:`learn_offline`.

        Args:
            model: From :meth:`resume`, with its offline data set where it has some.
            total_timesteps: All that are wanted, with those that were done before.
            callback: SB3 callback(s) beside this one.
            **kwargs: See ``learn`` of the model, but for ``reset_num_timesteps``.

        Returns:
            The model.

        Raises:
            CheckpointError: If the offline data is not the run's.
            SystemExit: After SIGTERM, with status 143.
            KeyboardInterrupt: After SIGINT.
        """
        if self._waits_for("offline"):
            self._check_data(model)
            self._go_on(model)
        model._restore_online_clock()
        left = total_timesteps - model.num_timesteps
        with self._signals:
            if left > 0:
                is_first = model.num_timesteps == 0
                model.learn(left, callback=self._with(callback), reset_num_timesteps=is_first, **kwargs)
            self._signals.obey()
        return model

    def _with(self, callback: MaybeCallback) -> Any:
        if callback is None:
            return self
        if isinstance(callback, list):
            return [*callback, self]
        return [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback), self]

    def _go_on(self, model: OfflineMixin) -> None:
        """Set once more what preparing a phase may have moved, at the point at which it was read."""
        archive, self._archive = self._archive, None
        if archive is not None and _same_environments(model, archive):
            _restore_run(model, archive)

    def _waits_for(self, phase: str) -> bool:
        return self._archive is not None and self._archive.document["phase"] == phase

    def _check_data(self, model: OfflineMixin) -> None:
        expected = None if self._archive is None else self._archive.document["data"]
        if expected is None:
            return
        if model.offline_buffer is None:
            raise CheckpointError("The run had offline data and the model has none: call set_offline_data(dataset) first.")
        if (found := self._data_identity(model.offline_buffer)) != expected:
            raise CheckpointError(
                f"The dataset is not the one that this run had: expected content with hash {expected[:16]}..., got "
                f"{found[:16]}.... Pass the same data, in the same order and with the same preparation, or start a run in "
                "another folder."
            )

    def _data_identity(self, buffer: ReplayBuffer) -> str:
        if self._identity is None or self._identity[0]() is not buffer:
            self._identity = weakref.ref(buffer), data_identity(buffer)
        return self._identity[1]

    # The callback ------------------------------------------------------------------------------------------------------

    def _init_callback(self) -> None:
        if not isinstance(self.model, OfflineMixin):
            raise TypeError(f"Checkpoints are for the algorithms of cql_plugins.sb3; got {type(self.model).__name__}.")
        self._check_data(self.model)
        listeners = getattr(self.model, "_sick_listeners", None)
        if listeners is not None and self._on_sick not in listeners:
            listeners.append(self._on_sick)

    def _on_training_start(self) -> None:
        if self._phase == "offline" and self._waits_for("offline"):
            self._go_on(self._owner)
        self._last_save = (self._phase, self._clock(), time.monotonic())
        self._noise_is_drawn = False

    def _on_step(self) -> bool:
        if self._owner._is_offline_phase:
            self._save_where_due()
        return True

    def _on_rollout_start(self) -> None:
        """Look between two rollouts: only then has the last step been stored and trained on."""
        model = self._owner
        if self._archive is not None and self._waits_for("online"):
            is_drawn = self._archive.document.get("noise_is_drawn", True)
            self._go_on(model)
            if model.use_sde and not is_drawn:
                model.actor.reset_noise(model.n_envs)  # type: ignore[operator]  # As SB3 did, before the state was set back.
        self._noise_is_drawn = True
        self._save_where_due()

    def _on_rollout_end(self) -> None:
        self._noise_is_drawn = False

    def _on_training_end(self) -> None:
        self._noise_is_drawn = False
        if self._saved_at != (self._phase, self._clock()):
            self.save()

    @property
    def _owner(self) -> OfflineMixin:
        assert isinstance(self.model, OfflineMixin)
        return self.model

    @property
    def _phase(self) -> str:
        return "offline" if self._owner._is_offline_phase else "online"

    def _clock(self) -> int:
        return int(self._owner.num_timesteps)

    def _save_where_due(self) -> None:
        phase, step, moment = self._last_save
        steps = self._clock() - step if phase == self._phase else self._clock()
        is_due = (self.save_freq and steps >= self.save_freq) or (
            self.save_minutes is not None and time.monotonic() - moment >= 60 * self.save_minutes
        )
        is_told = self._signals.received is not None
        if (is_due or is_told) and self._saved_at != (self._phase, self._clock()):
            self.save()
        if is_told and self._owner._ranks is None:  # Several ranks end together, after the step.
            self._signals.obey()

    def save(self) -> Path:
        """Write a checkpoint of the model that trains with this callback.

        Returns:
            Its path.

        Raises:
            NonFiniteError: If a parameter is not finite; older checkpoints are as they were.
            OSError: If the disk does not take it; older checkpoints and the model are as they were.
        """
        model = self._owner
        if isinstance(model, WatchedMixin):
            model.require_finite_parameters()
        document, arrays, tensors = self._contents(model)
        path = self.files.write(f"{self._phase}_{self._clock()}", document, arrays, tensors)
        self._saved_at = self._phase, self._clock()
        self._last_save = (*self._saved_at, time.monotonic())
        if self.verbose:
            print(f"Saved {path}")
        return path

    def _contents(self, model: OfflineMixin) -> tuple[dict[str, Any], Arrays, Any]:
        data = None if model.offline_buffer is None else self._data_identity(model.offline_buffer)
        document, arrays, tensors = _checkpoint_contents(model, self._phase, data)
        return document | {"noise_is_drawn": self._noise_is_drawn}, arrays, tensors

    def _on_sick(self, error: Exception) -> None:
        """Write the state from before a step that failed; never resumed from, since it would fail again."""
        path = self.files.folder / f"before_failure_{self._phase}_{self._clock()}.zip"
        write_archive(path, *self._contents(self._owner))
        warnings.warn(f"The state before the failed step is in {path}; load_checkpoint(model, path) reads it.", stacklevel=2)


# Writing ----------------------------------------------------------------------------------------------------------------


def _checkpoint_contents(model: OfflineMixin, phase: str, data: str | None) -> tuple[dict[str, Any], Arrays, Any]:
    """All of a model's state; nothing is changed."""
    arrays: Arrays = {}
    states = random_states()
    environment, problems = (None, []) if model.env is None else capture_state(model.env, arrays)
    noise, noise_problems = capture_state(model.action_noise, arrays, "action_noise")
    counters = {}
    for name, value in vars(model).items():
        if name in COUNTERS or (name.startswith("_") and name not in _NOT_COUNTERS):
            try:
                counters[name] = encode(value, arrays, f"counters.{name}")
            except TypeError:
                continue  # An object; those that matter are written one by one.
    document = {
        "algorithm": type(model).__name__,
        "phase": phase,
        "step": int(model.num_timesteps),
        "n_envs": model.n_envs,
        "versions": {"stable_baselines3": sb3_version, "torch": th.__version__, "numpy": np.__version__},
        "options": options_of(model),
        "counters": counters,
        "data": data,
        "offline_returns": _capture_offline_returns(model, arrays),
        "buffer": _capture_buffer(model.replay_buffer, arrays),
        "environment": environment,
        "action_noise": [type(model.action_noise).__name__, noise],
        "unseen": problems + [f"action_noise{problem}" for problem in noise_problems],
        "random": encode({key: states[key] for key in ("python", "numpy")}, arrays, "random"),
        "spaces": encode([_generator_of(model.action_space)], arrays, "spaces"),
    }
    tensors = {
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name).detach() for name in model._get_torch_save_params()[1]},
        "random": {key: states[key] for key in ("torch", "cuda")},
        "exploration": {name: value.detach() for name, value in _exploration_tensors(model).items()},
    }
    return document, arrays, tensors


def _generator_of(space: Any) -> Any:
    return getattr(space, "_np_random", None)


def _exploration_tensors(model: OfflineMixin) -> dict[str, th.Tensor]:
    """The noise of gSDE that holds until it is drawn anew."""
    distribution = getattr(getattr(model, "actor", None), "action_dist", None)
    names = ("exploration_mat", "exploration_matrices")
    found = {name: getattr(distribution, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, th.Tensor)}


def _capture_buffer(buffer: ReplayBuffer | None, arrays: Arrays) -> dict[str, Any] | None:
    """Read a replay buffer: its rows so far, and all else that is plain."""
    if buffer is None:
        return None
    columns = column_arrays(buffer)
    # One row more: where each observation is kept once, it has the newest next observation.
    n_rows = buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)
    rest = {}
    for name, value in vars(buffer).items():
        if name not in (*columns, "actions", "returns_to_go", "device", "env", "infos", "observation_space", "action_space"):
            try:
                rest[name] = encode(value, arrays, f"buffer.{name}")
            except TypeError:
                continue
    infos = None
    if isinstance(buffer, HerReplayBuffer) and buffer.copy_info_dict:
        try:
            infos = encode(buffer.infos[:n_rows].tolist(), arrays, "buffer.infos")
        except TypeError as error:
            raise CheckpointError(
                f"copy_info_dict=True: {error}, which a checkpoint cannot hold. Keep plain values in the infos, or set it "
                "to False."
            ) from error
    own: dict[str, Any] = {}
    for name, value in columns.items():
        if name != "infos":
            trimmed = {key: leaf[:n_rows] for key, leaf in value.items()} if isinstance(value, dict) else value[:n_rows]
            own[name] = encode(trimmed, arrays, f"buffer/{name}")
    return {
        "class": type(buffer).__name__,
        "columns": own,
        "rest": rest,
        "infos": infos,
        "size": [int(buffer.buffer_size), int(buffer.n_envs)],
        "n_rows": int(n_rows),
    }


def _capture_offline_returns(model: OfflineMixin, arrays: Arrays) -> Any:
    """Returns of the dataset that depend on more than the dataset: on estimates, or on where rewards are clipped."""
    buffer = model.offline_buffer
    if not isinstance(buffer, ReturnsToGoMixin):
        return None
    if buffer._return_tail != "bootstrap" and not np.isfinite(buffer._reward_limit):
        return None
    names = ("returns_to_go", "_reward_limit", "_largest_reward")
    return encode({name: getattr(buffer, name) for name in names}, arrays, "offline_returns")


def data_identity(buffer: ReplayBuffer) -> str:
    """Hash what a buffer holds, in its order: observations, actions, rewards and ends.

    Args:
        buffer: Any.

    Returns:
        SHA-256, as 64 hexadecimal digits.
    """
    size = buffer.size()
    rows = (np.arange(size) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size
    content = ContentHash()
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        value = getattr(buffer, name, None)
        for key, leaf in value.items() if isinstance(value, dict) else [("", value)]:
            if leaf is not None:
                content.add(f"{name}/{key}", leaf, rows)
    return content.hexdigest()


# Reading ----------------------------------------------------------------------------------------------------------------


def load_checkpoint(model: Model, checkpoint: str | Path | Archive) -> Model:
    """Bring a model to the state of a checkpoint; nothing is unpickled.

    :meth:`Checkpoints.resume` does this with the newest one of a run.

    Args:
        model: Built as the checkpoint's was.
        checkpoint: Path of a file that :class:`Checkpoints` wrote.

    Returns:
        The model.

    Raises:
        CheckpointError: If it is damaged, another algorithm's, or of networks of other shapes or other environments; the model
            is as it was.
    """
    archive = checkpoint if isinstance(checkpoint, Archive) else read_archive(checkpoint)
    _require_fit(model, archive)
    _require_buffer(model, archive)
    _require_environments(model, archive)
    document = archive.document
    model.set_parameters(archive.tensors["parameters"], exact_match=True, device=model.device)
    with th.no_grad():
        for name, value in archive.tensors["variables"].items():
            recursive_getattr(model, name).copy_(value)
    _restore_buffer(model, archive)
    _restore_run(model, archive)
    changed = {
        name: (before, now) for name, now in options_of(model).items() if (before := document["options"].get(name, now)) != now
    }
    if changed:
        told = ", ".join(f"{name} was {before} and is {now}" for name, (before, now) in changed.items())
        warnings.warn(f"The run goes on with other options than it had: {told}.", stacklevel=3)
    if not _same_environments(model, archive):
        reason = (
            f"the run had {document['n_envs']} environment(s), the model has {model.n_envs}"
            if document["n_envs"] != model.n_envs
            else f"their state could not be read: {'; '.join(document['unseen'])}"
            if document["unseen"]
            else f"a part of their state has no place in the model's, also after a reset: {'; '.join(archive.unplaced)}"
        )
        warnings.warn(
            f"The environments start anew, so what follows is another run than without the stop: {reason}.", stacklevel=3
        )
    return model


def _require_fit(model: OfflineMixin, archive: Archive) -> None:
    document = archive.document
    if document["algorithm"] != type(model).__name__:
        raise CheckpointError(f"{archive.path} is of {document['algorithm']}; the model is a {type(model).__name__}.")
    saved, own = archive.tensors["parameters"], model.get_parameters()
    if saved.keys() != own.keys():
        raise CheckpointError(
            f"{archive.path} has {sorted(saved)}; the model has {sorted(own)}: build it with the same options."
        )
    shapes = ({name: tuple(value.shape) for name, value in found["policy"].items()} for found in (saved, own))
    theirs, ours = shapes
    differing = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    if differing:
        name = sorted(differing)[0]
        raise CheckpointError(
            f"{archive.path} has other networks: {name} has shape {theirs.get(name)} there and {ours.get(name)} in the model"
            f"{f', and {len(differing) - 1} more' if len(differing) > 1 else ''}. Build the model with the same policy_kwargs."
        )


def _same_environments(model: OfflineMixin, archive: Archive) -> bool:
    return archive.document["n_envs"] == model.n_envs and not archive.document["unseen"] and not archive.unplaced


def _restore_run(model: OfflineMixin, archive: Archive) -> None:
    """Set counters, random states, environments and what else is not a parameter or a stored transition."""
    document = archive.document
    is_same = _same_environments(model, archive)
    options = options_of(model)
    # Several ranks make one estimate together; only the first of them is here.
    keeps_returns = model._ranks is None and all(
        document["options"].get(name) == options.get(name) for name in ("gamma", "return_tail")
    )
    left_out = {*_NOT_COUNTERS, *(() if is_same else _OF_ENVIRONMENT)}
    for name, value in archive.decoded("counters").items():
        if name not in left_out:
            # Values after truncated ends are estimated anew where they are of another discount.
            setattr(model, name, True if name == "_tails_are_due" and not keeps_returns else value)
    problems = []
    for target, state in _states_to_set(model, archive):
        problems += restore_state(target, state, archive.arrays)
    if is_same and problems:
        raise CheckpointError(_told_misfits(archive, problems))
    returns = archive.decoded("offline_returns")
    if returns is not None and keeps_returns and isinstance(model.offline_buffer, ReturnsToGoMixin):
        model.offline_buffer.returns_to_go[:] = returns.pop("returns_to_go")
        # Not the run's count: a copy on a device compares it with the one that it was made at.
        returns["returns_version"] = model.offline_buffer.returns_version + 1
        vars(model.offline_buffer).update(returns)
    if not is_same:
        model._last_obs = None
    distribution = getattr(getattr(model, "actor", None), "action_dist", None)
    for name, tensor in archive.tensors["exploration"].items():
        setattr(distribution, name, tensor.to(model.device))
    (generator,) = archive.decoded("spaces")
    if generator is not None:
        model.action_space.np_random.bit_generator.state = generator.bit_generator.state
    states = {**archive.decoded("random"), **archive.tensors["random"]}
    if model._random_states is None:  # It draws from the global streams, or trains, so that those are its own.
        set_random_states(states)
    else:
        model._random_states = states


def _states_to_set(model: OfflineMixin, archive: Archive) -> Iterator[tuple[Any, Any]]:
    """The model's environments and its action noise, each with what is to be written into it."""
    document = archive.document
    if "objects" not in document["action_noise"][1]:
        raise CheckpointError(
            f"{archive.path} was written before 0.1.0, with the state of environments in another form. Go on with the code "
            "that wrote it, or start a run in another folder."
        )
    if document["n_envs"] == model.n_envs:
        if model.env is not None and document["environment"] is not None:
            yield model.env, document["environment"]
        kind, noise = document["action_noise"]
        if kind == type(model.action_noise).__name__:  # SB3 makes one for several environments of it when it starts to learn.
            yield model.action_noise, noise
    else:
        yield from _statistics_to_set(model.env, document["environment"])


def _statistics_to_set(env: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """What the networks' inputs are normalised by: it is the policy's, however many environments there are."""
    reference = None if state is None else state["root"]
    while isinstance(env, VecEnvWrapper) and isinstance(reference, int):
        attributes = state["objects"][reference].get("attributes", {})
        if isinstance(env, VecNormalize):
            for name in ("obs_rms", "ret_rms"):
                if name in attributes and hasattr(env, name):
                    yield getattr(env, name), {**state, "root": attributes[name]}
        env, reference = env.venv, attributes.get("venv")


def _require_environments(model: OfflineMixin, archive: Archive) -> None:
    """Refuse other environments, before anything is written.

    Those that have no place for a part of the state may make it when they reset; where they do not, they start anew.
    """
    archive.unplaced = []
    # The environments last: they may be reset.
    for target, state in sorted(_states_to_set(model, archive), key=lambda pair: pair[0] is model.env):
        others, unplaced = misfits(target, state, archive.arrays)
        if unplaced and not others and target is model.env and not archive.document["unseen"]:
            with random_states_kept():
                model.env.reset()
            others, unplaced = misfits(target, state, archive.arrays)
        if others or (unplaced and target is not model.env):
            raise CheckpointError(_told_misfits(archive, others + unplaced))
        archive.unplaced += unplaced


def _told_misfits(archive: Archive, problems: list[str]) -> str:
    return (
        f"{archive.path} has a state of environments that the model's cannot take: {'; '.join(problems)}. Build them as the "
        "run's were, with the same wrappers."
    )


def _require_buffer(model: OfflineMixin, archive: Archive) -> None:
    """Refuse a replay buffer that the model's cannot take, before anything is written."""
    saved = archive.document["buffer"]
    buffer = model.replay_buffer
    if saved is None or buffer is None:
        return
    if saved["class"] != type(buffer).__name__:
        raise CheckpointError(
            f"{archive.path} has a {saved['class']}, the model a {type(buffer).__name__}: build it with the same."
        )
    if absent := sorted(saved["columns"].keys() - column_arrays(buffer).keys()):
        raise CheckpointError(
            f"{archive.path} has {', '.join(absent)} in its replay buffer, the model's has none: build it with the same."
        )
    for name, target, source in _columns(buffer, archive):
        if target.shape[2:] != source.shape[2:] or target.dtype != source.dtype:
            raise CheckpointError(
                f"{archive.path}: a row of {name} of the replay buffer has shape {source.shape[2:]} and type "
                f"{source.dtype} there, {target.shape[2:]} and {target.dtype} in the model. Build it with the same spaces."
            )
    is_moved = saved["size"] != [buffer.buffer_size, buffer.n_envs] and not model._buffer_waits_for_env
    if _holds_rows(archive) and is_moved and buffer.optimize_memory_usage:
        raise CheckpointError(
            f"{archive.path} has a replay buffer of {saved['size'][1]} environments and {saved['size'][0]} rows, the model one "
            f"of {buffer.n_envs} and {buffer.buffer_size}. With optimize_memory_usage=True it cannot be moved, since its rows "
            "are each other's next observations. Keep both."
        )


def _columns(buffer: ReplayBuffer, archive: Archive) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Columns of a buffer and of the checkpoint, side by side, with their names."""
    own = column_arrays(buffer)
    for name, encoded in archive.document["buffer"]["columns"].items():
        theirs = decode(encoded, archive.arrays)
        pairs = [(own[name][key], theirs[key]) for key in theirs] if isinstance(theirs, dict) else [(own[name], theirs)]
        for target, source in pairs:
            yield name, target, source


def _holds_rows(archive: Archive) -> bool:
    """Whether anything had been collected."""
    rest = archive.document["buffer"]["rest"]
    return bool(decode(rest["pos"], archive.arrays) or decode(rest["full"], archive.arrays))


def _restore_buffer(model: OfflineMixin, archive: Archive) -> None:
    saved = archive.document["buffer"]
    buffer = model.replay_buffer
    if saved is None or buffer is None:
        return
    size, n_envs = saved["size"]
    if model._buffer_waits_for_env and _holds_rows(archive):
        # The model has no room for it yet: it keeps the run's own until it gets its environment.
        buffer = model.replay_buffer = _empty_like(model, buffer, size, n_envs)
    if (size, n_envs) == (buffer.buffer_size, buffer.n_envs):
        _fill_buffer(buffer, archive)
        return
    if not _holds_rows(archive):
        return
    old = _empty_like(model, buffer, size, n_envs)
    _fill_buffer(old, archive)
    refill(buffer, old)


def _empty_like(model: OfflineMixin, buffer: ReplayBuffer, size: int, n_envs: int) -> ReplayBuffer:
    """Build a buffer of another shape as SB3 does."""
    assert model.replay_buffer_class is not None
    assert not isinstance(model.observation_space, str)
    more = {"env": model.env} if isinstance(buffer, HerReplayBuffer) else {}
    plain = model.replay_buffer_class(
        size * n_envs,
        model.observation_space,
        model.action_space,
        device=model.device,
        n_envs=n_envs,
        optimize_memory_usage=model.optimize_memory_usage,
        **{**model.replay_buffer_kwargs, **more},
    )
    if isinstance(buffer, ReturnsToGoMixin):
        return with_returns_to_go(plain, buffer._returns_gamma, buffer._return_tail, buffer.failure_reward)
    return plain


def _fill_buffer(buffer: ReplayBuffer, archive: Archive) -> None:
    saved, n_rows = archive.document["buffer"], archive.document["buffer"]["n_rows"]
    for _, target, source in _columns(buffer, archive):
        target[:n_rows] = source
    if saved["infos"] is not None:
        assert isinstance(buffer, HerReplayBuffer)
        buffer.infos[:n_rows] = np.array(decode(saved["infos"], archive.arrays), dtype=object)
    others = {}
    for name, value in saved["rest"].items():
        if name not in _BUFFER_SETTINGS:
            setattr(buffer, name, decode(value, archive.arrays))
        else:
            others[name] = decode(value, archive.arrays)
    if isinstance(buffer, ReturnsToGoMixin) and not buffer.has_settings(others["_returns_gamma"], others["_return_tail"]):
        buffer.recompute_returns()


__all__ = ["CheckpointError", "Checkpoints", "data_identity", "load_checkpoint"]
