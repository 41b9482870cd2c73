"""Calibrated Q-Learning: CQL whose critic is not pushed below what the data's own policy got."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from cql_plugins.losses import Calibration
from cql_plugins.returns import RETURN_TAILS, ReturnTail
from cql_plugins.sb3.buffers import ReturnsToGoMixin, with_returns_to_go
from cql_plugins.sb3.cql import CQL
from cql_plugins.sb3.offline import Batch

_BOOTSTRAP_INTERVAL = 1000
"""Gradient steps between two estimates of the values after truncated ends (``return_tail="bootstrap"``)."""
_VALUE_BATCH = 4096


class CalQL(CQL):
    """Calibrated Q-Learning (Cal-QL): CQL that is ready for online fine-tuning.

    Paper: https://arxiv.org/abs/2303.05479. Inside the soft maximum the policy's values are bounded from below by the data's
    return-to-go, ``max(Q(s, a), G(s))`` [Cal-QL, Eq. 5.1], offline and online. Online transitions get their returns when their
    episode ends; until then the bound is off for them.

    Args:
        *args: See :class:`CQL`, as all keyword arguments but these.
        max_q_backup: As in CQL, but on, as in the authors' code.
        return_tail: What follows a truncated end in ``G``: ``"zero"`` (non-negative rewards), ``"sparse"`` (goal tasks: an
            episode of failure rewards never ends), ``"none"`` (the bound is off for its episode) or ``"bootstrap"`` (the
            target critics' value, estimated anew every 1000 gradient steps).
        calibrate_random: Whether the uniform actions' values are bounded too.
        **kwargs: See :class:`CQL`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *args: Any,
        max_q_backup: bool = True,
        return_tail: ReturnTail = "zero",
        calibrate_random: bool = False,
        **kwargs: Any,
    ) -> None:
        if return_tail not in RETURN_TAILS:
            raise ValueError(f"return_tail must be one of {RETURN_TAILS}; got {return_tail!r}.")
        self.return_tail: ReturnTail = return_tail
        self.calibrate_random = calibrate_random
        super().__init__(*args, max_q_backup=max_q_backup, **kwargs)

    # Buffers with returns-to-go ------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        super()._setup_model()
        assert self.replay_buffer is not None
        self.replay_buffer = with_returns_to_go(self.replay_buffer, self.gamma, self.return_tail)

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """Load a replay buffer; returns-to-go are computed where it was saved without them.

        Args:
            path: See SB3.
            truncate_last_traj: See SB3.
        """
        super().load_replay_buffer(path, truncate_last_traj)
        assert self.replay_buffer is not None
        self.replay_buffer = with_returns_to_go(self.replay_buffer, self.gamma, self.return_tail, self._failure_reward)

    def _adopt_offline_buffer(self, buffer: ReplayBuffer) -> ReturnsToGoMixin:
        extended = with_returns_to_go(buffer, self.gamma, self.return_tail)
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
        if self.return_tail == "bootstrap" and self._n_updates % _BOOTSTRAP_INTERVAL == 0:
            for buffer in (self.offline_buffer, self.replay_buffer):
                if isinstance(buffer, ReturnsToGoMixin):
                    buffer.recompute_returns(self._target_values, self._vec_normalize_env)
        return super().sample_batch(batch_size)

    @th.no_grad()
    def _target_values(self, observations: Any) -> np.ndarray:
        """The target critics' value ``min_j Q_j(s, a)``, ``a ~ pi(.|s)``, of many observations, shape ``(n,)``."""
        if isinstance(observations, dict):
            length = len(next(iter(observations.values())))
            blocks = [
                {key: value[start : start + _VALUE_BATCH] for key, value in observations.items()}
                for start in range(0, length, _VALUE_BATCH)
            ]
        else:
            blocks = list(observations.split(_VALUE_BATCH))
        values = []
        for block in blocks:
            actions, _ = self.actor.action_log_prob(block)
            values.append(th.cat(self.critic_target(block, actions), dim=1).min(dim=1).values)
        return th.cat(values).cpu().numpy()

    # The bound -----------------------------------------------------------------------------------------------------------

    def _calibration(self, batch: Batch) -> Calibration:
        assert batch.returns_to_go is not None
        return Calibration(batch.returns_to_go, self.calibrate_random)


def _merged_signature() -> inspect.Signature:
    """CQL's arguments, with CalQL's own default and options: what editors and ``help`` should show."""
    own = dict(inspect.signature(CalQL.__init__).parameters)
    base = inspect.signature(CQL.__init__)
    parameters = [own.pop(name, parameter) if name != "self" else parameter for name, parameter in base.parameters.items()]
    parameters += [own[name] for name in ("return_tail", "calibrate_random")]
    return base.replace(parameters=parameters)


CalQL.__init__.__signature__ = _merged_signature()  # type: ignore[attr-defined]
