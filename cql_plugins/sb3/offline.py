"""What an SB3 off-policy algorithm needs to learn from a dataset first and online afterwards.

Nothing here knows CQL: the mixin adds the offline loop, the mixing of offline and online batches, and their bookkeeping to any
``OffPolicyAlgorithm``.
"""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import (
    check_for_nested_spaces,
    is_image_space,
    is_image_space_channels_first,
)
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, TrainFreq
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins._checkpoints import StopSignals, random_states, set_random_states
from cql_plugins._nested import flatten_space
from cql_plugins.returns import discounted_suffix_sum
from cql_plugins.sb3.batches import Batch, concatenate
from cql_plugins.sb3.buffers import ReturnsToGoMixin
from cql_plugins.sb3.device_data import DeviceData, refuse_normalized_rewards
from cql_plugins.sb3.distributed import Ranks, world_size
from cql_plugins.sb3.metrics import MetricsMean
from cql_plugins.sb3.rearrange import refill

SelfOffline = TypeVar("SelfOffline", bound="OfflineMixin")
COUNTERS = ("num_timesteps", "exploration_rate", "ep_info_buffer", "ep_success_buffer")
"""Attributes without an underscore that training changes."""
_NOT_OPTIONS = ("data_device", "device", "n_envs", "offline_buffer", "seed", "start_time", "tensorboard_log", "verbose")
_CLOCK = "time/gradient_steps"
_OF_ONLINE_PHASE = ("buffer_size", "gradient_steps", "learning_starts", "optimize_memory_usage", "train_freq")
"""Options that are nothing to processes that train offline together."""
_UNTOUCHED_COUNT = 0.5
"""``RunningMeanStd`` starts with a count of 1e-4; a first observation brings it above 1."""


@runtime_checkable
class OfflineData(Protocol):
    """Anything that can write itself into an SB3 replay buffer for a model; ``OfflineDataset`` can."""

    def to_sb3(
        self, model_or_env: Any, *, gamma: float | None = None, return_tail: Any = None, n_steps: int | None = None
    ) -> ReplayBuffer:
        """Return a replay buffer in the form that ``model_or_env`` trains on."""


class OfflineProgressBarCallback(ProgressBarCallback):
    """SB3's progress bar with gradient steps as its clock."""

    def _on_step(self) -> bool:
        self.pbar.update(1)  # type: ignore[no-untyped-call]
        return True


class OfflineMixin(OffPolicyAlgorithm):
    """Offline pre-training and offline-to-online fine-tuning for the SB3 off-policy algorithm that follows it in the bases.

    With a ``seed`` the model trains on random streams of its own, which start where SB3's seeding leaves the global ones: other
    models in the process neither disturb them nor are disturbed. ``model.set_random_seed`` starts them anew; seeding the global
    streams does not. Without a seed the model draws from the global streams, as SB3's do.

    Args:
        *args: See the base class, as all keyword arguments but these.
        offline_fraction: Share of each online batch that comes from the dataset, or ``"proportional"`` to the sizes.
        data_device: Where to keep and sample the dataset, ``"cuda"`` for the model's GPU where it fits on it; ``None`` for its
            replay buffer in the host's memory. Batches are drawn with that device's random generator.
        **kwargs: See the base class.

    Raises:
        ValueError: If an argument is out of its range.

    Attributes:
        offline_buffer: The dataset as a replay buffer, ``None`` before there is one. Never saved with the model.
        offline_fraction: Share of each online batch that comes from the dataset.
    """

    offline_buffer: ReplayBuffer | None
    offline_fraction: float | Literal["proportional"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = merged_signature(cls)  # type: ignore[attr-defined]

    def __init__(
        self,
        *args: Any,
        offline_fraction: float | Literal["proportional"] = 0.5,
        data_device: th.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if offline_fraction != "proportional" and not (
            isinstance(offline_fraction, (int, float, np.number)) and 0.0 <= offline_fraction <= 1.0
        ):
            raise ValueError(f"offline_fraction must be in [0, 1] or 'proportional'; got {offline_fraction!r}.")
        self.offline_fraction: float | Literal["proportional"] = (
            float(offline_fraction) if isinstance(offline_fraction, np.number) else offline_fraction
        )
        self.data_device = None if data_device is None else str(th.device(data_device))
        self.offline_buffer = None
        self._device_data: DeviceData | None = None
        self._metrics = MetricsMean()
        self._n_offline_steps = 0
        # What the offline buffer was made of, so that the same is not made twice.
        self._offline_source: tuple[Any, ...] | None = None
        # Whether the environment has been told to do a step that is not stored yet.
        self._has_open_step = False
        # The count of environment steps while gradient steps are the clock.
        self._num_timesteps_online: int | None = None
        # Whether it was trained on what VecNormalize made of observations, where that is known; the wrapper itself is never
        # saved with the model.
        self._normalized_observations: bool | None = None
        # With a seed: where the model's own random streams stand between two calls that train.
        self._random_states: dict[str, Any] | None = None
        # The processes that train together, during such a `learn_offline`.
        self._ranks: Ranks | None = None
        # What tells this process to end, while somebody obeys it.
        self._stop_signals: StopSignals | None = None
        super().__init__(*args, **kwargs)

    # Data ------------------------------------------------------------------------------------------------------------

    def set_offline_data(self: SelfOffline, dataset: OfflineData | ReplayBuffer) -> SelfOffline:
        """Give the model the data for offline training and for the offline part of online batches.

        The dataset is never saved inside the model: after ``load``, call this before going on. Where ``VecNormalize`` has seen
        nothing yet, its statistics are set from the data.

        Args:
            dataset: An ``OfflineDataset``, or an SB3 replay buffer (actions scaled to ``[-1, 1]``, raw observations).

        Returns:
            The model.

        Raises:
            TypeError: If the dataset is neither.
            ValueError: If it is empty, does not fit the model's spaces, or sums other steps than the model's ``n_steps``.
        """
        source: tuple[Any, ...] | None = None
        if isinstance(dataset, ReplayBuffer):
            buffer = dataset
            for name in ("observation_space", "action_space"):
                ours, theirs = getattr(self, name), getattr(buffer, name)
                if not _same_form(ours, theirs):
                    raise ValueError(
                        f"The replay buffer's {name} does not fit the model's: expected {ours}, got {theirs}. "
                        "Build the buffer with the model's spaces."
                    )
        elif isinstance(dataset, OfflineData):
            tail = getattr(self, "return_tail", None)
            asked = (self.env, self.gamma, tail, self.n_steps, self.device, self.data_device)
            known = self._offline_source
            # By identity: datasets of the user's may compare their arrays.
            if self.offline_buffer is not None and known is not None and known[0]() is dataset and known[1] == asked:
                self._fill_normalization()
                return self
            with suppress(TypeError):  # With __slots__ it cannot be remembered, and is taken anew each time.
                source = (weakref.ref(dataset), asked)
            buffer = dataset.to_sb3(self, gamma=self.gamma, return_tail=tail, n_steps=self.n_steps)
        else:
            raise TypeError(
                "dataset must be an OfflineDataset (see cql_plugins.adapters.from_minari, from_d4rl, from_arrays) or an SB3 "
                f"ReplayBuffer; got {type(dataset).__name__}."
            )
        if buffer.size() == 0:
            raise ValueError("The dataset is empty: at least one transition is needed.")
        if self.n_steps > 1 and not isinstance(buffer, NStepReplayBuffer):
            raise ValueError(
                f"The model uses n_steps={self.n_steps}, but a {type(dataset).__name__} gives one-step targets: pass an "
                "NStepReplayBuffer with the same n_steps and gamma, or an OfflineDataset."
            )
        if self.n_steps > 1 and isinstance(buffer, NStepReplayBuffer) and not _sums_like(buffer, self.n_steps, self.gamma):
            raise ValueError(
                f"The model sums {self.n_steps} steps with gamma={self.gamma}, the replay buffer {buffer.n_steps} with "
                f"gamma={buffer.gamma}: build it with the model's, or pass an OfflineDataset."
            )
        buffer.device = self.device
        adopted = self._adopt_offline_buffer(buffer)
        device_data = None if self.data_device is None else self._place_on_device(adopted, th.device(self.data_device))
        self.offline_buffer, self._device_data, self._offline_source = adopted, device_data, source
        self._fill_normalization()
        return self

    def _place_on_device(self, buffer: ReplayBuffer, device: th.device) -> DeviceData | None:
        """Bring a dataset to where it is to be sampled."""
        if device.type == "cuda" and not th.cuda.is_available():
            warnings.warn(
                f"data_device={self.data_device!r} is not there (was the model made on another machine?): the dataset is "
                "sampled from the host's memory. Set model.data_device = None to say so.",
                stacklevel=3,
            )
            return None
        if device == th.device("cuda") and self.device.type == "cuda":
            device = self.device  # The current GPU is the first one, in every process of torchrun.
        if device.type == "cuda" and (device.index or 0) >= (n_gpus := th.cuda.device_count()):
            raise ValueError(
                f"data_device={self.data_device!r} is not there: expected one of cuda:0 to cuda:{n_gpus - 1}. Set "
                "model.data_device = 'cuda' for the model's own GPU, or None for the host's memory."
            )
        if buffer is self.replay_buffer:
            raise ValueError(
                "data_device is for data that does not grow, and this is the model's own replay buffer: set it to None."
            )
        refuse_normalized_rewards(self._vec_normalize_env)
        return DeviceData(buffer, device)

    def _fill_normalization(self) -> None:
        if self._vec_normalize_env is not None and self.offline_buffer is not None:
            fill_normalization(self._vec_normalize_env, self.offline_buffer)

    @property
    def _normalizes_observations(self) -> bool:
        return self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs

    def _note_normalization(self) -> None:
        self._normalized_observations = self._normalizes_observations

    def _require_same_normalization(self) -> None:
        """Refuse to go on with networks that were trained on observations in other units."""
        known = self._normalized_observations
        if self._n_updates and known is not None and known != self._normalizes_observations:
            raise ValueError(
                "The model was trained on normalised observations, and its environment does not normalise them: wrap it in "
                "VecNormalize with the statistics of the training (VecNormalize.load), and call set_env(); load_weights wraps "
                "the environment that it is given."
                if known
                else "The model was trained on raw observations, and its environment's VecNormalize normalises them: call "
                "set_env() with the environment without it, or with norm_obs=False; or have VecNormalize from the start. Where "
                "the data was normalised before, do the same in a gymnasium wrapper."
            )

    def _adopt_offline_buffer(self, buffer: ReplayBuffer) -> ReplayBuffer:
        """Prepare a buffer for training; a hook for algorithms that need more than SB3's columns."""
        return buffer

    @classmethod
    def from_dataset(cls: type[SelfOffline], dataset: Any, policy: Any = None, **kwargs: Any) -> SelfOffline:
        """Build a model with the dataset's spaces and no environment: for logged data with no simulator.

        ``learn_offline``, ``predict``, ``save`` and ``load`` work; ``learn`` needs ``set_env`` first, and so do callbacks that
        look at the training environment, such as SB3's ``EvalCallback``.

        Args:
            dataset: An ``OfflineDataset`` or an SB3 replay buffer; becomes the model's offline data.
            policy: Policy name or class; ``None`` chooses ``MlpPolicy`` or ``MultiInputPolicy`` by the observation space.
            **kwargs: Any argument of the constructor but ``env``.

        Returns:
            The model.

        Raises:
            ValueError: If ``env`` is given, or the spaces do not suit the algorithm.
        """
        if kwargs.get("env") is not None:
            raise ValueError(f"from_dataset takes no env; use {cls.__name__}(policy, env) and learn_offline(dataset) instead.")
        kwargs.pop("env", None)
        observation_space = _channels_first(flatten_space(dataset.observation_space))
        action_space = dataset.action_space
        check_for_nested_spaces(observation_space)
        if policy is None:
            policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
        model = cls(policy, None, _init_setup_model=False, **kwargs)
        model.observation_space, model.action_space, model.n_envs = observation_space, action_space, 1
        model._setup_without_env()
        return model.set_offline_data(dataset)

    def _setup_model(self) -> None:
        """Build the networks and the replay buffer, which has room for next to nothing while there is no environment."""
        wanted = self.buffer_size
        if self.env is None:
            self.buffer_size = self.n_envs
        try:
            super()._setup_model()
        finally:
            self.buffer_size = wanted
        self._buffer_waits_for_env = self.env is None
        self._prepare_online_buffer()
        if self.seed is not None:
            self._random_states = random_states()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Set the seed, see SB3; the model's own random streams start from it.

        Args:
            seed: ``None`` changes nothing.
        """
        super().set_random_seed(seed)
        if seed is not None:
            self._random_states = random_states()

    @contextmanager
    def _own_streams(self) -> Iterator[None]:
        """Train with the model's own random streams where it has a seed: what other models draw in between is nothing to it."""
        own, self._random_states = self._random_states, None
        if own is None:
            yield
            return
        others = random_states()
        set_random_states(own)
        try:
            yield
        finally:
            self._random_states = random_states()
            set_random_states(others)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Set the environment, see SB3; a model that was built without one gets its replay buffer now.

        Args:
            env: Environment.
            force_reset: See SB3.

        Raises:
            ValueError: If a buffer that was loaded before cannot be rearranged (``optimize_memory_usage``); it is kept.
        """
        super().set_env(env, force_reset)
        self._fill_normalization()
        waiting = self.replay_buffer
        if not self._buffer_waits_for_env or waiting is None:
            return
        if waiting.size() == 0 or waiting.n_envs != self.n_envs:
            assert self.replay_buffer_class is not None
            assert isinstance(self.observation_space, spaces.Space)
            self.replay_buffer = self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **self.replay_buffer_kwargs,
            )
            self._prepare_online_buffer()
            try:
                if waiting.size():
                    refill(self.replay_buffer, waiting)
            except ValueError:
                self.replay_buffer = waiting
                raise
        self._buffer_waits_for_env = False

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """Load a replay buffer, see SB3; one that was filled with another number of environments is rearranged.

        A model without an environment keeps it as it is until :meth:`set_env`.

        Args:
            path: See SB3.
            truncate_last_traj: See SB3.

        Raises:
            ValueError: If it cannot be rearranged (``optimize_memory_usage``).
        """
        own = getattr(self, "replay_buffer", None)  # SB3's users delete it before they load one.
        super().load_replay_buffer(path, truncate_last_traj)
        self._prepare_online_buffer()  # Before it is rearranged: its episodes are still in one piece.
        loaded = self.replay_buffer
        if self._buffer_waits_for_env or own is None or loaded is None:
            return
        if own is not loaded and own.n_envs != loaded.n_envs:
            self.replay_buffer = own
            own.reset()
            refill(own, loaded)

    def _prepare_online_buffer(self) -> None:
        """Prepare a new replay buffer for training; a hook for algorithms that need more than SB3's columns."""

    def _setup_without_env(self) -> None:
        """Build the networks from the spaces that were set; a hook for algorithms that read more from their environment."""
        self._setup_model()

    # The offline loop --------------------------------------------------------------------------------------------------

    def learn_offline(
        self: SelfOffline,
        dataset: OfflineData | ReplayBuffer,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1000,
        tb_log_name: str | None = None,
        progress_bar: bool = False,
    ) -> SelfOffline:
        """Train on a dataset alone, without touching the environment.

        SB3's logger and callbacks run with gradient steps as the clock: ``num_timesteps`` counts them during the call, so that
        ``EvalCallback(eval_freq=1000)`` evaluates every 1000 gradient steps and learning-rate schedules advance with them. May
        be called again to go on.

        In a process group of ``torch.distributed`` with more than one rank, and under ``torchrun``, which is joined by itself
        (Gloo on the CPU, NCCL on GPUs), all ranks train one model, data-parallel. All of them must make the call. The model of
        rank 0 counts: parameters, optimisers and counters are copied from it, then every rank draws ``batch_size / ranks``
        transitions and noise of its own, and gradients are averaged: the parameters stay equal on all ranks. What is logged is
        the mean over ranks. Only rank 0 logs, shows progress and runs callbacks; the others go as far as those let it. A rank
        that fails makes the others fail, at the latest when the timeout of the process group is over, which is also what a
        callback may take: 30 minutes in a group that is made here; for more call ``init_process_group(timeout=...)`` before.
        ``device`` stays what the model was built with: on GPUs pass ``f"cuda:{os.environ['LOCAL_RANK']}"``. Running statistics
        of batch normalisation stay each rank's own.

        Args:
            dataset: An ``OfflineDataset``, or an SB3 replay buffer; kept for ``learn`` to mix in.
            gradient_steps: How many gradient steps to do.
            callback: SB3 callback(s), called after each gradient step.
            log_interval: Gradient steps between two log lines.
            tb_log_name: Name of the TensorBoard run; the algorithm's with ``_offline`` where ``None``.
            progress_bar: Show SB3's progress bar (needs tqdm and rich).

        Returns:
            The model.

        Raises:
            ValueError: If ``gradient_steps`` is negative, if the model was trained on raw observations and its environment
                normalises them, or the other way round, or if the ranks cannot train this model together.
        """
        if gradient_steps < 0:
            raise ValueError(f"gradient_steps must not be negative; got {gradient_steps}.")
        n_ranks = world_size()
        if n_ranks > 1:
            self._check_ranks(n_ranks)
        self.set_offline_data(dataset)
        self._require_same_normalization()
        self._note_normalization()
        name = f"{type(self).__name__}_offline" if tb_log_name is None else tb_log_name
        with self._own_streams():
            try:
                if n_ranks > 1:
                    self._ranks = Ranks(self.device)
                    self._follow_first_rank(self._ranks, gradient_steps=gradient_steps, log_interval=log_interval)
                    if not self._ranks.is_first:
                        callback, progress_bar = None, False
                listener = self._setup_learn_offline(gradient_steps, callback, name, progress_bar)
                total_timesteps = self._total_timesteps
                listener.on_training_start(
                    {"self": self, "total_timesteps": total_timesteps, "tb_log_name": name, "log_interval": log_interval},
                    globals(),
                )
                while self.num_timesteps < total_timesteps:
                    self.train(gradient_steps=1, batch_size=self.batch_size // n_ranks)
                    self._n_offline_steps += 1
                    self.num_timesteps = self._n_offline_steps
                    self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                    # A callback's own lines, such as an evaluation's, say that they are of the offline phase.
                    self.logger.record(_CLOCK, self.num_timesteps, exclude="tensorboard")
                    listener.update_locals({"self": self, "infos": [], "dones": np.zeros(0, dtype=bool)})
                    goes_on = listener.on_step()
                    if self._ranks is not None:
                        goes_on = self._decide_together(self._ranks, goes_on)
                    if not goes_on:
                        break
                    if log_interval and self.num_timesteps % log_interval == 0:
                        self._dump_offline_logs()
                self._look_at_last_steps()
                listener.on_training_end()
                if self._metrics:
                    self._dump_offline_logs()
            finally:
                self._restore_online_clock()
                if (logger := getattr(self, "_logger", None)) is not None:  # There is none before the first training.
                    logger.name_to_value.pop(_CLOCK, None)
                if self._ranks is not None:
                    self._ranks.close()
                    self._ranks = None
        return self

    def _decide_together(self, ranks: Ranks, goes_on: bool) -> bool:
        """Go on where the first rank's callbacks do and no rank was told to end; all know of a signal afterwards."""
        signals = self._stop_signals
        goes_on, received = ranks.decision(goes_on, 0 if signals is None else signals.received or 0)
        if received and signals is not None:
            signals.received = received
        return goes_on and not received

    def _look_at_last_steps(self) -> None:
        """Look at what steps have left to be looked at, before anyone hears that training has ended; a hook."""

    def _check_ranks(self, n_ranks: int) -> None:
        """Refuse what cannot be trained by several processes; a hook for algorithms with more to refuse."""
        if self.batch_size % n_ranks:
            raise ValueError(
                "batch_size is the batch of all ranks together and must divide by their number; got "
                f"batch_size={self.batch_size} and {n_ranks} ranks."
            )

    def _follow_first_rank(self, ranks: Ranks, **asked: Any) -> None:
        """Take over from the first rank all that training goes on from, then draw other numbers than it does.

        Args:
            ranks: The processes.
            **asked: What the ranks were asked for beside the model's own settings.
        """
        self._require_equal_options(ranks, algorithm=type(self).__name__, batch_size=self.batch_size, **asked)
        self._restore_online_clock()  # as in `_setup_learn_offline`
        variables = {name: recursive_getattr(self, name) for name in self._get_torch_save_params()[1]}
        counters = {name: getattr(self, name) for name in ("_n_updates", "_n_offline_steps", "num_timesteps")}
        first: tuple[Any, ...] = ranks.from_first((self.get_parameters(), variables, counters))
        parameters, values, counts = first
        if not ranks.is_first:
            self.set_parameters(parameters)
            with th.no_grad():
                for name, variable in variables.items():
                    variable.copy_(values[name])
            for name, count in counts.items():
                setattr(self, name, count)
        self._metrics = MetricsMean()  # Steps that one rank did by itself have no part in the means over ranks.
        ranks.separate_streams()

    def _require_equal_options(self, ranks: Ranks, **asked: Any) -> None:
        """Refuse ranks whose options are not the same; of a schedule the first rate stands for all."""
        names = inspect.signature(type(self)).parameters.keys() - set(_OF_ONLINE_PHASE) - asked.keys()
        known = options_of(self)
        options = {name: known.get(name) for name in sorted(names)}  # the same names on all, whatever the types
        ranks.require_equal(**asked, **options, **{"lr_schedule(1)": self.lr_schedule(1)})

    def _setup_learn_offline(
        self, gradient_steps: int, callback: MaybeCallback, tb_log_name: str, progress_bar: bool
    ) -> BaseCallback:
        """Set the logger, the callbacks and the clock; the environment is not reset."""
        # A model saved by a checkpoint in the middle of an offline run comes back with gradient steps as its clock.
        self._restore_online_clock()
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or self.ep_success_buffer is None:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if not self._custom_logger:
            first = self._n_offline_steps == 0
            if self._ranks is None or self._ranks.is_first:
                self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps=first)
            else:
                self._logger = Logger(None, [])
        if isinstance(callback, list):
            callback = CallbackList(callback)
        if not isinstance(callback, BaseCallback):
            callback = ConvertCallback(callback)
        if progress_bar:
            callback = CallbackList([callback, OfflineProgressBarCallback()])
        self._num_timesteps_online = self.num_timesteps
        self.num_timesteps = self._num_timesteps_at_start = self._n_offline_steps
        self._total_timesteps = self._n_offline_steps + gradient_steps
        # Else the first step would use the rates that the last run ended with.
        self._update_current_progress_remaining(self.num_timesteps, max(self._total_timesteps, 1))
        callback.init_callback(self)
        return callback

    def _restore_online_clock(self) -> None:
        if self._num_timesteps_online is not None:
            self.num_timesteps, self._num_timesteps_online = self._num_timesteps_online, None

    def mark_pretrained(self, gradient_steps: int) -> None:
        """Say that the networks were trained elsewhere: online, the first actions are the policy's, not random ones.

        Args:
            gradient_steps: How many steps that training had; ``learn_offline`` counts on from there.
        """
        self._n_offline_steps = gradient_steps
        self._note_normalization()

    @property
    def _is_offline_phase(self) -> bool:
        return self._num_timesteps_online is not None

    def _dump_offline_logs(self) -> None:
        if self._ranks is not None:
            self._require_equal_options(self._ranks)  # A callback changes them on the first rank alone.
            self._metrics.average(self._ranks.average)
            if not self._ranks.is_first:
                self._metrics.pop()
                return
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        steps = self.num_timesteps - self._num_timesteps_at_start
        self.logger.record(_CLOCK, self.num_timesteps, exclude="tensorboard")
        self.logger.record("time/gradient_steps_per_second", steps / elapsed)
        self.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        self._record_metrics()
        self.logger.dump(step=self.num_timesteps)

    def _record_metrics(self) -> None:
        """Move the means since the last log line to the logger: the one place where the host waits for the device."""
        for name, value in self._metrics.pop().items():
            self.logger.record(f"train/{name}", value)

    # The online phase --------------------------------------------------------------------------------------------------

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if (n_ranks := world_size()) > 1:
            raise ValueError(
                f"learn() is for one process, and this is one of {n_ranks} that torch.distributed or its launcher knows of: "
                "each would collect and train for itself. Save the model on rank 0 after learn_offline, and call learn() in a "
                "process that was started without torchrun."
            )
        self._restore_online_clock()  # as in `_setup_learn_offline`
        if self.env is not None and self.replay_buffer is not None and self.replay_buffer.n_envs != self.env.num_envs:
            raise ValueError(
                f"The replay buffer was filled with {self.replay_buffer.n_envs} environment(s), the model collects with "
                f"{self.env.num_envs}: nothing could be added to it. Pass it to set_offline_data() to learn from it."
            )
        self._require_same_normalization()
        self._note_normalization()
        before = self._last_obs
        if self._has_open_step:
            # An error or an interrupt came before the step was stored: the environment is no longer at the last observation.
            self._last_obs, self._has_open_step = None, False
        result = super()._setup_learn(*args, **kwargs)
        if self._last_obs is not before:
            self._break_off_running_episodes()
        return result

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, train_freq: TrainFreq, replay_buffer: ReplayBuffer, *args: Any, **kwargs: Any
    ) -> RolloutReturn:
        """Collect steps, see SB3; the step at which a callback ends the training is stored, too.

        SB3 leaves it out and goes on from the observation before it: the next transition would be made of two that are a step,
        or an episode, apart, and no return would be right.

        Args:
            env: See SB3.
            callback: See SB3.
            train_freq: See SB3.
            replay_buffer: See SB3.
            *args: See SB3.
            **kwargs: See SB3.

        Returns:
            See SB3.
        """
        rollout = super().collect_rollouts(env, callback, train_freq, replay_buffer, *args, **kwargs)
        if self._has_open_step:
            step = (callback.locals[name] for name in ("buffer_actions", "new_obs", "rewards", "dones", "infos"))
            self._store_transition(replay_buffer, *step)
        return rollout

    def _store_transition(self, *args: Any, **kwargs: Any) -> None:
        super()._store_transition(*args, **kwargs)
        self._has_open_step = False

    def _break_off_running_episodes(self) -> None:
        """Tell the replay buffer that the environments were reset."""
        buffer = self.replay_buffer
        if isinstance(buffer, ReturnsToGoMixin):
            buffer.cut_running_episodes()
        if isinstance(buffer, NStepReplayBuffer) and buffer.size():
            # Else rewards would be summed across the reset. To a sum of n steps a broken record is a truncated one.
            # As SB3 marks it while it samples; `dones` stays, since the episode has not ended.
            running = buffer.dones[buffer.pos - 1] == 0
            buffer.timeouts[buffer.pos - 1, running] = 1.0

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._has_open_step = True
        # A pre-trained policy collects from its first step on; `learning_starts` still delays the first update.
        return super()._sample_action(0 if self._n_offline_steps else learning_starts, action_noise, n_envs)

    def dump_logs(self) -> None:
        """Write log data, with the training metrics since the last line."""
        if self._ranks is None:  # Else the next line is the ranks' together.
            self._record_metrics()
        super().dump_logs()

    # Batches ---------------------------------------------------------------------------------------------------------

    def _offline_batch_size(self, batch_size: int) -> int:
        """How many of a batch come from the dataset at this moment."""
        if self.offline_buffer is None:
            return 0
        online = self._online_size()
        if self._is_offline_phase or online == 0:
            return batch_size
        if self.offline_fraction == "proportional":
            offline = self.offline_buffer.size() * self.offline_buffer.n_envs
            return round(batch_size * offline / (offline + online))
        return round(batch_size * self.offline_fraction)

    def _online_size(self) -> int:
        """Transitions in the online buffer that can be sampled."""
        assert self.replay_buffer is not None
        if isinstance(self.replay_buffer, HerReplayBuffer) and not self.replay_buffer.ep_length.any():
            return 0  # Hindsight relabelling needs a finished episode.
        return self.replay_buffer.size() * self.replay_buffer.n_envs

    def sample_batch(self, batch_size: int) -> Batch:
        """Sample a training batch: from the dataset in the offline phase, mixed online.

        Args:
            batch_size: ``B``, number of transitions.

        Returns:
            The batch; offline transitions come first.
        """
        n_offline = self._offline_batch_size(batch_size)
        parts = []
        for buffer, size in ((self.offline_buffer, n_offline), (self.replay_buffer, batch_size - n_offline)):
            if size > 0:
                assert buffer is not None
                if self._device_data is not None and self._device_data.buffer is buffer:
                    parts.append(self._device_data.sample(size, self.device, env=self._vec_normalize_env))
                else:
                    samples = buffer.sample(size, env=self._vec_normalize_env)
                    # By name: a buffer of the user's has samples with fields of its own.
                    fields: dict[str, Any] = {name: getattr(samples, name, None) for name in Batch._fields}
                    parts.append(Batch(**fields))
        return parts[0] if len(parts) == 1 else concatenate(parts[0], parts[1], self.gamma)

    # Saving ----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Get what a copy or another process needs; which object the dataset was is known here alone."""
        return {**self.__dict__, "_offline_source": None}

    def _excluded_save_params(self) -> list[str]:
        own = ["_random_states", "offline_buffer", "_device_data", "_offline_source", "_metrics", "_ranks", "_stop_signals"]
        return [*super()._excluded_save_params(), *own]


def options_of(model: OfflineMixin) -> dict[str, str]:
    """What was asked for, as text: enough to tell that a run is asked for something else.

    Args:
        model: Any.
    """
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: repr(value)
        for name, value in vars(model).items()
        if not name.startswith("_") and name not in (*COUNTERS, *_NOT_OPTIONS) and isinstance(value, plain)
    }


def merged_signature(cls: type) -> inspect.Signature:
    """The arguments of a class whose bases pass theirs on: those of the algorithm at the bottom, then each option above it.

    This is what editors and ``help`` should show.

    Args:
        cls: The class.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if "__init__" not in base.__dict__ or base is object:
            continue
        own = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
        if not passes_on:
            parameters = dict(own)  # A base that names all its arguments hides those below it.
            continue
        parameters |= {name: own_one for name, own_one in own.items() if own_one.kind is inspect.Parameter.KEYWORD_ONLY}
    parameters.pop("self", None)
    return inspect.Signature(list(parameters.values()))


def _channels_first(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The space as SB3's networks see it: it wraps environments with images in a ``VecTransposeImage``."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _channels_first(subspace) for key, subspace in space.spaces.items()})
    if is_image_space(space) and not is_image_space_channels_first(space):  # type: ignore[arg-type]
        return VecTransposeImage.transpose_space(space)  # type: ignore[arg-type]
    return space


def _sums_like(buffer: NStepReplayBuffer, n_steps: int, gamma: float) -> bool:
    return buffer.n_steps == n_steps and bool(np.isclose(buffer.gamma, gamma, rtol=1e-9))


def _same_form(ours: spaces.Space[Any], theirs: spaces.Space[Any]) -> bool:
    """Whether data of one space can be fed to a network made for the other: bounds and float width may differ."""
    if isinstance(ours, spaces.Dict) and isinstance(theirs, spaces.Dict):
        return ours.spaces.keys() == theirs.spaces.keys() and all(
            _same_form(space, theirs.spaces[key]) for key, space in ours.spaces.items()
        )
    if isinstance(ours, spaces.Discrete) and isinstance(theirs, spaces.Discrete):
        return bool(ours.n == theirs.n)
    # A user's subclass of a space is as good as the space.
    return (isinstance(ours, type(theirs)) or isinstance(theirs, type(ours))) and ours.shape == theirs.shape


def fill_normalization(env: VecNormalize, buffer: ReplayBuffer) -> None:
    """Set the statistics of a ``VecNormalize`` that has seen nothing yet from a dataset.

    Frozen statistics (``training=False``) and those with data in them are left alone. The reward scale is set too, from the
    running discounted returns of the data, as the wrapper would have seen them.

    Args:
        env: The wrapper of the training environment; written to.
        buffer: The dataset, with raw observations and rewards.
    """
    if not env.training:
        return
    rows = (np.arange(buffer.size()) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size
    if env.norm_obs:
        statistics = env.obs_rms if isinstance(env.obs_rms, dict) else {None: env.obs_rms}
        for key, rms in statistics.items():
            if rms.count < _UNTOUCHED_COUNT:
                stored = buffer.observations if key is None else buffer.observations[key]
                _update_in_blocks(rms, stored, rows)
    if env.norm_reward and env.ret_rms.count < _UNTOUCHED_COUNT:
        # VecNormalize's R <- gamma R + r, zero after each end, is a suffix sum of the reversed rows.
        ends = buffer.dones[rows] > 0
        factors = np.where(np.concatenate((np.ones_like(ends[:1]), ends[:-1])), 0.0, env.gamma)
        for column in range(buffer.n_envs):
            terms = buffer.rewards[rows, column].astype(np.float64)
            running = discounted_suffix_sum(terms[::-1], factors[::-1, column], len(rows))
            env.ret_rms.update(running)


def _update_in_blocks(rms: RunningMeanStd, stored: np.ndarray, rows: np.ndarray, block: int = 65_536) -> None:
    """Update statistics block by block, so that images are never all cast to float64 at once."""
    block = max(1, min(block, 2**26 // (8 * rms.mean.size)))
    for start in range(0, len(rows), block):
        part = stored[rows[start : start + block]]
        rms.update(part.reshape(-1, *rms.mean.shape).astype(np.float64))


__all__ = ["Batch", "OfflineData", "OfflineMixin", "OfflineProgressBarCallback", "fill_normalization"]
