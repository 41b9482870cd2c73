"""What the four algorithms share: logged data kept for the online phase, environments watched, policies exported."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch as th
from d3rlpy.algos import QLearningAlgoBase
from d3rlpy.base import LearnableConfig
from d3rlpy.constants import IMPL_NOT_INITIALIZED_ERROR, ActionSpace
from d3rlpy.dataset import (
    FrameStackTransitionPicker,
    MixedReplayBuffer,
    ReplayBufferBase,
    SparseRewardTransitionPicker,
    TransitionMiniBatch,
    create_fifo_replay_buffer,
)
from d3rlpy.dataset.utils import cast_tuple_shape, is_tuple_shape
from d3rlpy.serializable_config import CONFIG_STORAGE
from d3rlpy.types import Float32NDArray, GymEnv, Observation

from cql_plugins._guards import SickListener, bad_cells
from cql_plugins.d3rlpy.batches import ReturnsSettings, ReturnsToGoMiniBatch, TailValues
from cql_plugins.d3rlpy.buffers import OfflineReplayBuffer
from cql_plugins.d3rlpy.export import alone, example_inputs, export_onnx
from cql_plugins.d3rlpy.online import (
    NewestFrameWriterPreprocess,
    OfflineOnlineReplayBuffer,
    ReturnsToGoReplayBuffer,
    with_returns_to_go,
)
from cql_plugins.d3rlpy.runs import ResumePoint, Run, following, states_before_reset

if TYPE_CHECKING:
    _AlgoBase = QLearningAlgoBase[Any, Any]
else:
    _AlgoBase = object

_BOOTSTRAP_INTERVAL = 1000
"""Gradient steps between two estimates of the values after truncated ends (``return_tail="bootstrap"``)."""
_VALUE_BATCH = 4096
_ONLINE_CAPACITY = 1_000_000
"""Transitions that ``fit_online`` keeps where no buffer is given, d3rlpy's number."""


def register_once(config: type[LearnableConfig]) -> None:
    """Register a config with d3rlpy under its type name, or in the place of its former self after a reload.

    Args:
        config: The config class.
    """
    CONFIG_STORAGE[LearnableConfig].config_list[config.get_type()] = config


class EnvironmentRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers what d3rlpy's loop does not hand on: what the last step returned, and how the episode began."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.last_observation: Any = None
        self.last_truncated = False
        self.before_reset: dict[str, Any] | None = None
        self.first_observation: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Reset, and remember what the reset may draw from: a resumed run does it once more."""
        self.before_reset = states_before_reset(self.env)
        observation, info = self.env.reset(**options)
        self.first_observation = observation
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and remember."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.last_observation, self.last_truncated = observation, bool(truncated)
        return observation, reward, terminated, truncated, info


class OfflineToOnlineMixin(_AlgoBase):
    """Adds to a d3rlpy algorithm what its logged data is needed for after ``fit``."""

    resume_point: ResumePoint | None = None
    """Where a loaded checkpoint goes on; ``None`` for nowhere, and once it has."""
    _offline_data: ReplayBufferBase | None = None
    _needs_returns = False
    _run: Run | None = None

    @cached_property
    def _sick_listeners(self) -> list[SickListener]:
        """Called before a ``NonFiniteError`` is raised, while the algorithm is as the error says."""
        return []

    def _watch(self, impl: Any) -> None:
        """Tell a new implementation's watch of the data and of those who listen."""
        impl.watch.listeners, impl.watch.bad_cells = self._sick_listeners, self._bad_cells

    def _bad_cells(self) -> Iterator[str]:
        """Name the cells of the logged data that are not finite."""
        for number, episode in enumerate([] if self._offline_data is None else self._offline_data.episodes):
            for field in ("observations", "actions", "rewards"):
                column = getattr(episode, field)
                for i, leaf in enumerate(column if isinstance(column, (list, tuple)) else [column]):
                    name = f"episodes[{number}].{field}" + (f"[{i}]" if isinstance(column, (list, tuple)) else "")
                    yield from bad_cells(name, leaf, len(leaf))

    def save(self, fname: str) -> None:
        """Save the algorithm, see d3rlpy; one whose parameters are not finite is refused, lest it replace a good one.

        Args:
            fname: See d3rlpy.

        Raises:
            NonFiniteError: If they are not.
        """
        self._require_finite_parameters()
        super().save(fname)

    def save_model(self, fname: str) -> None:
        """Save the parameters, see d3rlpy; those that are not finite are refused.

        Args:
            fname: See d3rlpy.

        Raises:
            NonFiniteError: If they are not.
        """
        self._require_finite_parameters()
        super().save_model(fname)

    def _require_finite_parameters(self) -> None:
        if self._impl is not None:
            self._impl.watch.require_finite_parameters(self._grad_step)

    @property
    def offline_data(self) -> ReplayBufferBase | None:
        """The logged data: what ``fit`` was last given. It is not saved with the algorithm."""
        return self._offline_data

    def set_offline_data(self, dataset: ReplayBufferBase | None) -> None:
        """Say which logged data ``fit_online`` mixes in, after a load for instance.

        Args:
            dataset: A d3rlpy buffer, for example from :func:`cql_plugins.adapters.to_d3rlpy`; ``None`` for none.

        Raises:
            TypeError: If it is no buffer.
        """
        if dataset is not None and not isinstance(dataset, ReplayBufferBase):
            raise TypeError(
                f"dataset must be a buffer of d3rlpy's; got {type(dataset).__name__}. Pass "
                "cql_plugins.adapters.to_d3rlpy(dataset) for an OfflineDataset."
            )
        if dataset is not None and self._needs_returns:
            dataset = with_returns_to_go(dataset)
        self._offline_data = dataset

    def fitter(
        self, dataset: ReplayBufferBase, *args: Any, **kwargs: Any
    ) -> Generator[tuple[int, dict[str, float]], None, None]:
        """Train on logged data, see d3rlpy; the data is remembered for :meth:`fit_online`."""
        self.set_offline_data(dataset)
        assert self._offline_data is not None
        if isinstance(self._offline_data, OfflineReplayBuffer) and self._offline_data.action_bounds is not None:
            self._check_action_range(*self._offline_data.action_bounds, "dataset")
        call = _bound(super().fitter, self._offline_data, *args, **kwargs)
        with following(self, Run("offline", self._offline_data), call) as loop:
            for epoch, metrics in super().fitter(*call.args, **call.kwargs):
                if loop.ends_epoch():
                    yield epoch, loop.figures(metrics)

    def fit_online(self, env: GymEnv, buffer: ReplayBufferBase | None = None, *args: Any, **kwargs: Any) -> None:
        """Train online in d3rlpy's loop, see d3rlpy; batches are mixed from the logged data where there is some.

        Args:
            env: Environment, one.
            buffer: Where to collect. Without one, a new buffer of a million transitions, and batches of which
                ``offline_fraction`` of the config comes from the logged data. With a ``MixedReplayBuffer`` its own ratio
                counts; with any other buffer nothing is mixed in. Running episodes have no return-to-go in any of them.
            *args: See d3rlpy.
            **kwargs: See d3rlpy.
        """
        if isinstance(env.action_space, gym.spaces.Box):
            self._check_action_range(env.action_space.low, env.action_space.high, "environment")
        with _watched(env, self._online_buffer(env, buffer, mix=True)) as (watched, collecting):
            call = _bound(super().fit_online, watched, collecting, *args, **kwargs)
            recorder = watched if isinstance(watched, EnvironmentRecorder) else None
            with following(self, Run("online", self._offline_data, collecting, recorder), call):
                super().fit_online(*call.args, **call.kwargs)

    def collect(self, env: GymEnv, buffer: ReplayBufferBase | None = None, *args: Any, **kwargs: Any) -> ReplayBufferBase:
        """Collect with the policy, see d3rlpy; the last transitions of truncated episodes are kept.

        Args:
            env: Environment, one.
            buffer: Where to collect; a new one where ``None``.
            *args: See d3rlpy.
            **kwargs: See d3rlpy.

        Returns:
            The buffer, with returns-to-go.
        """
        with _watched(env, self._online_buffer(env, buffer, mix=False)) as (watched, collecting):
            return super().collect(watched, collecting, *args, **kwargs)

    def _online_buffer(self, env: Any, buffer: ReplayBufferBase | None, mix: bool) -> ReplayBufferBase:
        if buffer is not None:
            return with_returns_to_go(buffer)
        offline = self._offline_data if mix else None
        while isinstance(offline, OfflineOnlineReplayBuffer):
            offline = offline.offline  # The data of an earlier mix, whose online part is its own.
        picker = None if offline is None else offline.transition_picker
        picker = getattr(picker, "inner", picker)
        preprocessor = None
        if offline is not None and isinstance(picker, FrameStackTransitionPicker):
            # Environments whose frames are stacked give all of them; the picker stacks those that are stored.
            shapes = offline.dataset_info.observation_signature.shape
            preprocessor = NewestFrameWriterPreprocess([int(shape[0]) for shape in shapes])
        online = create_fifo_replay_buffer(
            _ONLINE_CAPACITY,
            env=env,
            transition_picker=picker,
            trajectory_slicer=None if offline is None else offline.trajectory_slicer,
            writer_preprocessor=preprocessor,
        )
        if offline is None:
            return with_returns_to_go(online)
        return OfflineOnlineReplayBuffer(online, offline, self._config.offline_fraction)

    def _check_action_range(self, low: Any, high: Any, where: str) -> None:
        """Warn where actions would be squashed into a range that is not theirs."""
        if self.get_action_type() != ActionSpace.CONTINUOUS or self._config.action_scaler is not None:
            return
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        if not (np.allclose(low, -1.0) and np.allclose(high, 1.0)):
            bounded = bool(np.all(np.isfinite(low)) and np.all(np.isfinite(high)))
            warnings.warn(
                f"The {where}'s actions are bounded by {low.tolist()} and {high.tolist()}, the policy's by -1 and 1. "
                + (
                    "Set action_scaler=d3rlpy.preprocessing.MinMaxActionScaler(minimum=low, maximum=high) in the config."
                    if bounded
                    else "Set an action_scaler with the smallest and largest action that make sense."
                ),
                UserWarning,
                stacklevel=4,
            )

    def save_policy(self, fname: str) -> None:
        """Save the greedy policy for use without d3rlpy, scalers included: TorchScript (``.pt``) or ONNX (``.onnx``).

        The ONNX file takes batches of any size; its inputs are named ``input_0``, ``input_1`` and so on, its output
        ``output_0``. The file is written whole or not at all.

        Args:
            fname: Where to; the ending chooses the format.

        Raises:
            ImportError: For ONNX, if the packages that write it are missing.
            ValueError: If the ending is another.
        """
        assert self._impl is not None, IMPL_NOT_INITIALIZED_ERROR
        impl = self._impl
        suffix = Path(fname).suffix
        if suffix not in (".pt", ".onnx"):
            raise ValueError(f"fname must end in .pt (TorchScript) or .onnx (ONNX); got {fname!r}.")
        shape = impl.observation_shape
        examples = example_inputs(list(cast_tuple_shape(shape)) if is_tuple_shape(shape) else [shape], self._device)
        impl.modules.set_eval()
        self._impl = alone(impl)
        try:
            policy = self._greedy_policy()
            with th.no_grad():
                policy(*examples)  # d3rlpy's scalers make their tensors at the first call, and must not make them while traced.
            with tempfile.TemporaryDirectory(dir=Path(fname).resolve().parent) as folder:
                written = os.path.join(folder, f"policy{suffix}")
                if suffix == ".pt":
                    super().save_policy(written)
                else:
                    export_onnx(policy, examples, written)
                os.replace(written, fname)
        finally:
            self._impl = impl

    def _greedy_policy(self) -> th.nn.Module:
        """The policy as one module, from raw observations to actions in the environment's units."""
        impl: Any = self._impl
        config = self._config

        class GreedyPolicy(th.nn.Module):
            def forward(self, *observations: th.Tensor) -> th.Tensor:
                x: Any = observations[0] if len(observations) == 1 else list(observations)
                if config.observation_scaler:
                    x = config.observation_scaler.transform(x)
                action = impl.inner_predict_best_action(x)
                if config.action_scaler:
                    action = config.action_scaler.reverse_transform(action)
                return action  # type: ignore[no-any-return]

        return GreedyPolicy().eval()


class CalibratedMixin(OfflineToOnlineMixin):
    """Adds the returns-to-go that Cal-QL's bound needs, offline and online."""

    _needs_returns = True
    _tail_values: TailValues | None = None

    @property
    def need_returns_to_go(self) -> bool:
        """Whether d3rlpy should sum the returns of each sampled transition: no, the buffer has them."""
        return False

    def set_offline_data(self, dataset: ReplayBufferBase | None) -> None:
        """Say which logged data ``fit_online`` mixes in, see :meth:`OfflineToOnlineMixin.set_offline_data`.

        Args:
            dataset: A d3rlpy buffer; ``None`` for none.
        """
        super().set_offline_data(dataset)
        picker = None if dataset is None else dataset.transition_picker
        if isinstance(getattr(picker, "inner", picker), SparseRewardTransitionPicker) and self._config.return_tail != "sparse":
            warnings.warn(
                "The buffer's SparseRewardTransitionPicker is not asked for returns-to-go: they are summed by "
                f'return_tail={self._config.return_tail!r}. Set return_tail="sparse", which gives a failed episode the return '
                "of one that never ends.",
                UserWarning,
                stacklevel=2,
            )

    def update(self, batch: TransitionMiniBatch) -> dict[str, float]:
        """Do one gradient step, see d3rlpy.

        Args:
            batch: Of one of our buffers, or of d3rlpy's: those are summed as they are, as if episodes had ended.
        """
        is_due = self._tail_values is None or self._grad_step % _BOOTSTRAP_INTERVAL == 0
        if self._config.return_tail == "bootstrap" and is_due:
            self._tail_values = TailValues(self._target_values)
        return super().update(batch)

    def _returns_of(self, batch: TransitionMiniBatch) -> Float32NDArray:
        """Look up the returns-to-go of a batch, shape ``(B, 1)``."""
        config, settings = self._config, self._returns_settings()
        if isinstance(batch, ReturnsToGoMiniBatch):
            return batch.returns_to_go(settings)
        if config.return_tail != "zero":
            raise ValueError(
                f"return_tail={config.return_tail!r} asks how episodes ended, which d3rlpy's mini-batch does not say. Sample "
                "from cql_plugins.d3rlpy.with_returns_to_go(buffer)."
            )
        sums = []
        for transition in batch.transitions:
            rewards = settings.scale(np.asarray(transition.rewards_to_go)[:, 0])
            sums.append([np.sum(config.gamma ** np.arange(len(rewards)) * rewards)])
        return np.asarray(sums, dtype=np.float32)

    def _returns_settings(self) -> ReturnsSettings:
        """How returns are summed now."""
        config = self._config
        return ReturnsSettings(
            config.gamma, config.return_tail, config.reward_scaler, self._failure_reward(), self._tail_values
        )

    def _failure_reward(self) -> float | None:
        """One failure reward for both phases: an online episode must not define its own."""
        data = self._offline_data.offline if isinstance(self._offline_data, OfflineOnlineReplayBuffer) else self._offline_data
        if self._config.return_tail != "sparse" or not isinstance(data, (OfflineReplayBuffer, ReturnsToGoReplayBuffer)):
            return None
        return data.smallest_reward(self._config.reward_scaler)

    @th.no_grad()
    def _target_values(self, observations: Observation) -> Float32NDArray:
        """The target critics' value ``min_j Q_j(s, a)``, ``a ~ pi(.|s)``, of many observations, shape ``(n,)``."""
        assert self._impl is not None
        leaves = [observations] if isinstance(observations, np.ndarray) else list(observations)
        values = []
        self._impl.modules.set_eval()  # One episode may be a batch of one, and statistics must not move.
        for start in range(0, len(leaves[0]), _VALUE_BATCH):
            block: Any = [
                th.tensor(leaf[start : start + _VALUE_BATCH], dtype=th.float32, device=self._device) for leaf in leaves
            ]
            block = block[0] if isinstance(observations, np.ndarray) else block
            if self._config.observation_scaler:
                block = self._config.observation_scaler.transform(block)
            values.append(self._impl.value_of(block))
        self._impl.modules.set_train()
        return th.cat(values).cpu().numpy().astype(np.float32)


@contextmanager
def _watched(env: GymEnv, buffer: ReplayBufferBase) -> Iterator[tuple[GymEnv, ReplayBufferBase]]:
    """Let the buffer that is collected into know the environment for as long as it is stepped."""
    collecting = buffer.primary_replay_buffer if isinstance(buffer, MixedReplayBuffer) else buffer
    if not isinstance(env, gym.Env) or not isinstance(collecting, ReturnsToGoReplayBuffer):
        yield env, buffer  # An environment of the old gym, which d3rlpy takes, too.
        return
    recorder = EnvironmentRecorder(env)
    collecting.environment = recorder
    try:
        yield recorder, buffer
    finally:
        collecting.clip_episode(False)  # Where training was interrupted, an episode still runs.
        collecting.environment = None


def _bound(method: Any, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call by name, defaults included."""
    call = inspect.signature(method).bind(*args, **kwargs)
    call.apply_defaults()
    return call


def adopt_signatures(cls: type[OfflineToOnlineMixin], host: type[QLearningAlgoBase[Any, Any]]) -> None:
    """Show d3rlpy's own arguments where ours are passed on as they come: for editors and ``help``."""
    for name in ("fitter", "fit_online", "collect"):
        getattr(cls, name).__signature__ = inspect.signature(getattr(host, name))
