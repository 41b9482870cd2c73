"""What all conservative and calibrated algorithms share, whatever their base class: options, the loop, returns-to-go."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import MaybeCallback, TensorDict
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins.ensembles import PRECISIONS, Precision, warn_of_slow_bf16
from cql_plugins.returns import RETURN_TAILS, ReturnTail
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.buffers import ReturnsToGoMixin, with_returns_to_go
from cql_plugins.sb3.captured import CapturedSteps, is_capturable, make_capturable, make_fused, portable_state
from cql_plugins.sb3.distributed import Ranks
from cql_plugins.sb3.metrics import MetricsVector
from cql_plugins.sb3.watch import WatchedMixin

SelfConservative = TypeVar("SelfConservative", bound="ConservativeMixin")
_BOOTSTRAP_INTERVAL = 1000
"""Gradient steps between two estimates of the values after truncated ends (``return_tail="bootstrap"``)."""
_VALUE_BATCH = 4096


class ConservativeMixin(WatchedMixin):
    """Options and loop of conservative Q-learning for the SB3 algorithm that follows it in the bases.

    Args:
        *args: See the base class, as all keyword arguments but these.
        cql_alpha: Weight ``w`` of the conservative gap, not negative.
        cql_temperature: ``T`` of the soft maximum, positive.
        cql_clip_diff: Smallest and largest gap of one sample; AntMaze uses ``(-200, inf)``.
        normalize_gap: Subtract the gap of a flat Q, so that it is 0 whatever the number of actions.
        cql_alpha_online: Weight during ``learn``; ``None`` keeps ``cql_alpha``. With 0 the gap is not computed: the base
            class's cost.
        precision: ``"bf16"`` computes the hidden layers of the critics' training pass with bfloat16 numbers (and an image's
            features in it). Output layers, losses, targets, the actor, parameters and optimisers stay float32. A processor
            without such products is many times slower with it, and a warning says so.
        compile: On a GPU, replay each gradient step as one CUDA graph, which does what the step would have done. Needs
            Adam or one of its kin, no gSDE, and one process; no effect on the CPU.
        **kwargs: See the base class and :class:`OfflineMixin`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    _step_options: tuple[str, ...] = ("cql_temperature", "cql_clip_diff", "normalize_gap", "precision", "gamma", "tau")
    """Attributes that a gradient step reads; each class names its own."""

    def __init__(
        self,
        *args: Any,
        cql_alpha: float = 1.0,
        cql_temperature: float = 1.0,
        cql_clip_diff: tuple[float, float] = (-math.inf, math.inf),
        normalize_gap: bool = False,
        cql_alpha_online: float | None = None,
        precision: Precision = "f32",
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        if not (math.isfinite(cql_alpha) and cql_alpha >= 0.0):
            raise ValueError(f"cql_alpha must be a number >= 0; got {cql_alpha}.")
        if cql_alpha_online is not None and not (math.isfinite(cql_alpha_online) and cql_alpha_online >= 0.0):
            raise ValueError(f"cql_alpha_online must be None or a number >= 0; got {cql_alpha_online}.")
        if not (math.isfinite(cql_temperature) and cql_temperature > 0.0):
            raise ValueError(f"cql_temperature must be a number > 0; got {cql_temperature}.")
        if len(cql_clip_diff) != 2 or not cql_clip_diff[0] < cql_clip_diff[1]:
            raise ValueError(f"cql_clip_diff must be (smallest, largest) with smallest < largest; got {cql_clip_diff}.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}.")
        self.cql_alpha = cql_alpha
        self.cql_temperature = cql_temperature
        self.cql_clip_diff = (float(cql_clip_diff[0]), float(cql_clip_diff[1]))
        self.normalize_gap = normalize_gap
        self.cql_alpha_online = cql_alpha_online
        self.precision: Precision = precision
        self.compile = compile
        self._captured_steps: CapturedSteps | None = None
        super().__init__(*args, **kwargs)

    @property
    def _cql_weight(self) -> float:
        """``w`` of the phase that the model is in."""
        if self._is_offline_phase or self.cql_alpha_online is None:
            return self.cql_alpha
        return self.cql_alpha_online

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Do gradient steps on batches of the dataset, the online buffer or both.

        Args:
            gradient_steps: How many.
            batch_size: Transitions in each.

        Raises:
            NonFiniteError: If a number of a step is not finite; the model is then as it was before that step.
        """
        if not hasattr(self, "_logger"):
            self._logger = configure_logger(self.verbose, self.tensorboard_log, type(self).__name__)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        step: Callable[[Batch], MetricsVector] = self._measured_step
        if self.compile and self.device.type == "cuda":
            step = self._captured()
        elif self.precision != "f32" or self.device.type == "cuda":
            # In single precision on the CPU the steps are the base class's, to the last bit.
            for optimizer in self._all_optimizers():
                make_fused(optimizer)
        self._prepare_watch()
        for _ in range(gradient_steps):
            self._metrics.update(step(self.sample_batch(batch_size)))
            self._n_updates += 1
            self._count_watched_step()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _setup_model(self) -> None:
        super()._setup_model()
        warn_of_slow_bf16(self.precision, self.device)
        if self.compile:
            unknown = [type(o).__name__ for o in self._all_optimizers() if not is_capturable(o)]
            if unknown or getattr(self, "use_sde", False):
                raise ValueError(
                    "compile=True needs optimisers that can be captured (Adam and its kin) and no gSDE; got "
                    f"{', '.join(unknown) or 'use_sde=True'}. Set compile=False."
                )

    def _check_ranks(self, n_ranks: int) -> None:
        super()._check_ranks(n_ranks)
        if self.compile:
            # On the CPU, too, where it has no effect: a script should fail where it is tried out.
            raise ValueError(
                f"compile=True is for one process, and this is one of {n_ranks}: the exchange of gradients is not part of a "
                "CUDA graph. Set compile=False."
            )

    def _optimizers(self) -> list[th.optim.Optimizer]:
        """Optimisers that follow ``learning_rate``."""
        return []

    def _minimize(self, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        """Do one step of an optimiser down the gradient of a loss."""
        self._compute_gradients(loss, optimizer)
        optimizer.step()

    def _compute_gradients(self, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        """Set the gradients of an optimiser's parameters; the one door through which they come, averaged over ranks."""
        optimizer.zero_grad()
        loss.backward()
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        loss = loss.detach()
        if self._ranks is not None:
            loss = loss.clone()
            # With the loss, so that no rank goes on where another one's is not finite.
            self._ranks.average([*gradients, loss])
        self._watch_gradients(optimizer, loss, gradients)

    def _measured_step(self, batch: Batch) -> MetricsVector:
        return MetricsVector.of(self._watched_step(batch))

    def _captured(self) -> CapturedSteps:
        """Prepare gradient steps that run as CUDA graphs."""
        for optimizer in self._all_optimizers():
            make_capturable(optimizer)
        if self._captured_steps is None:
            self._captured_steps = CapturedSteps(self._measured_step, self._step_kind)
        self._captured_steps.require_same(self._step_tensors(), self._all_optimizers())
        return self._captured_steps

    def _all_optimizers(self) -> list[th.optim.Optimizer]:
        """Every optimiser that a gradient step moves."""
        return list(self._named_optimizers().values())

    def _step_kind(self) -> tuple[Any, ...]:
        """The options and phases of a gradient step: two steps with equal kinds do the same to the same tensors."""
        names = (name for base in type(self).__mro__ for name in vars(base).get("_step_options", ()))
        return (self._cql_weight, *(getattr(self, name, None) for name in names))

    def _step_tensors(self) -> list[th.Tensor]:
        """The tensors that a gradient step reads or writes beside its batch; with another one, graphs are made anew."""
        return [*self.policy.parameters(), *self.policy.buffers()]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_captured_steps"]

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Load parameters, see SB3."""
        self._captured_steps = None  # The optimisers' state lies in other tensors afterwards.
        super().set_parameters(*args, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Get parameters, see SB3; the optimisers' can be loaded by the base class on any device."""
        parameters = super().get_parameters()
        return {name: portable_state(state) if "param_groups" in state else state for name, state in parameters.items()}

    @abstractmethod
    def _values_of(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        """The target critics' value ``V(s)`` under the current policy, shape ``(n,)``."""

    def learn(
        self: SelfConservative,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfConservative:
        """Train online in SB3's own loop, with batches mixed from the dataset where there is one.

        Without a dataset this is the online algorithm with the conservative critic. After ``learn_offline`` there are no random
        actions: the first ``learning_starts`` steps are collected by the policy.

        Args:
            total_timesteps: Environment steps.
            callback: SB3 callback(s).
            log_interval: Episodes between two log lines.
            tb_log_name: Name of the TensorBoard run; the algorithm's where ``None``.
            reset_num_timesteps: Whether to start the count of environment steps anew.
            progress_bar: Show SB3's progress bar (needs tqdm and rich).

        Returns:
            The model.

        Raises:
            ValueError: If this is one of several processes that ``torch.distributed`` or its launcher knows of.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        with self._own_streams():
            super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)
            self._look_at_last_steps()
        return self


class CalibratedMixin(ConservativeMixin):
    """Returns-to-go for the conservative algorithm that follows it in the bases, offline and online.

    Args:
        *args: See the base class, as all keyword arguments but these.
        return_tail: What follows a truncated end in ``G``: ``"zero"`` (non-negative rewards), ``"sparse"`` (goal tasks: an
            episode of failure rewards never ends), ``"none"`` (the bound is off for its episode) or ``"bootstrap"`` (the
            target critics' value, estimated anew every 1000 gradient steps).
        **kwargs: See the base class.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, *args: Any, return_tail: ReturnTail = "zero", **kwargs: Any) -> None:
        if return_tail not in RETURN_TAILS:
            raise ValueError(f"return_tail must be one of {RETURN_TAILS}; got {return_tail!r}.")
        self.return_tail: ReturnTail = return_tail
        # Whether values after truncated ends are to be estimated at the next step: whatever was adopted anew has none.
        self._tails_are_due = True
        super().__init__(*args, **kwargs)

    def _follow_first_rank(self, ranks: Ranks, **asked: Any) -> None:
        super()._follow_first_rank(ranks, **asked)
        self._tails_are_due = True  # On every rank, whichever of them knew the dataset already.

    def _prepare_online_buffer(self) -> None:
        super()._prepare_online_buffer()
        buffer = self.replay_buffer
        assert buffer is not None
        self._tails_are_due = True
        # Some returns could not be summed again: of episodes that lie in two places since the buffer was rearranged.
        keeps_returns = (
            isinstance(buffer, ReturnsToGoMixin)
            and buffer.has_settings(self.gamma, self.return_tail)
            and buffer.failure_reward == self._failure_reward
            and not isinstance(buffer, HerReplayBuffer)  # SB3 ends its last episode when it loads it.
        )
        if not keeps_returns:
            self.replay_buffer = with_returns_to_go(buffer, self.gamma, self.return_tail, self._failure_reward)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.replay_buffer, ReturnsToGoMixin):
            self._prepare_online_buffer()  # One of SB3's own, assigned by hand.
        return super()._setup_learn(*args, **kwargs)

    def _adopt_offline_buffer(self, buffer: ReplayBuffer) -> ReturnsToGoMixin:
        extended = with_returns_to_go(buffer, self.gamma, self.return_tail)
        self._tails_are_due = True
        if self.return_tail == "sparse":
            # One failure reward for both phases: an online episode must not define its own.
            extended.failure_reward = float(extended.rewards[: extended.size()].min())
            assert isinstance(self.replay_buffer, ReturnsToGoMixin)
            self.replay_buffer.failure_reward = extended.failure_reward
        return extended

    @property
    def _failure_reward(self) -> float | None:
        return self.offline_buffer.failure_reward if isinstance(self.offline_buffer, ReturnsToGoMixin) else None

    def sample_batch(self, batch_size: int) -> Batch:
        """Sample a training batch with returns-to-go, see :meth:`OfflineMixin.sample_batch`.

        Args:
            batch_size: ``B``, number of transitions.

        Returns:
            The batch, ``returns_to_go`` set.
        """
        is_due = self._tails_are_due or self._n_updates % _BOOTSTRAP_INTERVAL == 0
        if self.return_tail == "bootstrap" and is_due:
            self._tails_are_due = False
            # The values are of sampled actions: one estimate for all ranks.
            with nullcontext() if self._ranks is None else self._ranks.same_noise(self._n_updates):
                for buffer in (self.offline_buffer, self.replay_buffer):
                    if isinstance(buffer, ReturnsToGoMixin):
                        buffer.recompute_returns(self._target_values, self._vec_normalize_env)
        batch = super().sample_batch(batch_size)
        if batch.returns_to_go is None:
            raise ValueError(
                "A batch has no returns-to-go: the replay buffer is one of SB3's own. Assign "
                "cql_plugins.sb3.buffers.with_returns_to_go(buffer, model.gamma, model.return_tail), or call learn()."
            )
        return batch

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_tails_are_due"]

    @th.no_grad()
    def _target_values(self, observations: Any) -> np.ndarray:
        """The target critics' value of many observations under the policy that collects, shape ``(n,)``, block by block."""
        if isinstance(observations, dict):
            length = len(next(iter(observations.values())))
            blocks = [
                {key: value[start : start + _VALUE_BATCH] for key, value in observations.items()}
                for start in range(0, length, _VALUE_BATCH)
            ]
        else:
            blocks = list(observations.split(_VALUE_BATCH))
        mode = self.policy.training
        self.policy.set_training_mode(False)
        try:
            return th.cat([self._values_of(block) for block in blocks]).cpu().numpy()
        finally:
            self.policy.set_training_mode(mode)
