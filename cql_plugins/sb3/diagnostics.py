"""Is the critic right, and is it conservative? Predicted against real returns, and the gap between seen and unseen actions.

Both work on any off-policy algorithm of Stable-Baselines3 and sb3-contrib that has a critic: ours can be put beside SAC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from cql_plugins._checkpoints import random_states_kept
from cql_plugins._diagnostics import GapExpansion, ValueBias, batches, require_positive
from cql_plugins.sb3.offline import OfflineData, OfflineMixin

_BATCH = 1024


def value_bias(
    model: OffPolicyAlgorithm,
    env: gym.Env[Any, Any] | VecEnv,
    n_episodes: int = 10,
    *,
    deterministic: bool | None = None,
) -> ValueBias:
    """Compare the critic's values in the first states of episodes with their discounted returns [CQL, Section 6, Table 4].

    The value of an action is the smallest over critics, or TQC's mean over all quantiles: what the actor is trained on. Global
    random streams are left as they were.

    Args:
        model: Any SAC, TD3, DQN, TQC or QR-DQN, ours or the hosts'.
        env: To play in. Rewards and observations must be those that the model is trained on: with normalisation or a scaled
            reward, pass an environment wrapped in the same way (for ``VecNormalize``, with ``training = False``).
        n_episodes: Whole episodes to play.
        deterministic: Whether the policy's mode acts. By default actor-critics draw their actions, since that is the policy
            whose value they learn, and algorithms with discrete actions take the best one.

    Raises:
        ValueError: If the model has no critic, or ``n_episodes`` is below 1.
    """
    require_positive(n_episodes=n_episodes)
    _check_model(model)
    record = _Episodes(model)
    chosen = isinstance(model.action_space, spaces.Discrete) if deterministic is None else deterministic
    with random_states_kept():
        evaluate_policy(model, env, n_episodes, deterministic=chosen, callback=record.on_step, warn=False)
    return record.bias()


def gap_expansion(
    model: OffPolicyAlgorithm,
    dataset: OfflineData | ReplayBuffer,
    *,
    n_states: int = 4096,
    n_actions: int = 10,
    seed: int = 0,
) -> GapExpansion:
    """Compare the values of the data's actions with others' in the same states [CQL, Figure 2].

    Args:
        model: Any SAC, TD3, DQN, TQC or QR-DQN, ours or the hosts'.
        dataset: An ``OfflineDataset``, or a replay buffer such as ``model.offline_buffer``, which saves making one.
        n_states: Transitions to draw.
        n_actions: Uniform actions in each state.
        seed: Of the draws. Global random streams are left as they were.

    Raises:
        ValueError: If the model has no critic, or a number is below 1.
    """
    require_positive(n_states=n_states, n_actions=n_actions)
    _check_model(model)
    buffer = dataset if isinstance(dataset, ReplayBuffer) else dataset.to_sb3(model)
    model.policy.set_training_mode(False)
    sums = np.zeros(4)
    with _random_streams_apart(seed), th.no_grad():
        for rows in batches(n_states, max(1, _BATCH // n_actions)):
            batch = buffer.sample(rows, env=model.get_vec_normalize_env())
            sums += rows * np.array(_compare(model, batch.observations, batch.actions, n_actions))
    return GapExpansion(*(float(total) / n_states for total in sums))


class DiagnosticsCallback(EvalCallback):
    """SB3's ``EvalCallback`` that also logs whether the critic is right and conservative, without further episodes.

    Logged beside ``eval/mean_reward``: ``eval/normalized_score``, ``eval/value_bias``, ``eval/predicted_return`` and
    ``eval/discounted_return`` (see :class:`ValueBias`), ``eval/q_gap`` and ``eval/q_random_max_minus_data`` (see
    :class:`GapExpansion`). Use it in ``learn_offline`` and ``learn`` alike.

    Args:
        eval_env: As for ``EvalCallback``.
        dataset: For the gap; by default the data that the model learns from, where it has some.
        score: Turns the returns of episodes into scores, such as ``dataset.normalized_score``.
        n_states: Transitions of the data to draw for the gap.
        n_actions: Uniform actions in each.
        **kwargs: See ``EvalCallback``. ``deterministic`` stays True as there: the values are then those of the policy's mode.
    """

    def __init__(
        self,
        eval_env: gym.Env[Any, Any] | VecEnv,
        *args: Any,
        dataset: OfflineData | ReplayBuffer | None = None,
        score: Callable[[Sequence[float]], npt.ArrayLike] | None = None,
        n_states: int = 4096,
        n_actions: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_env, *args, **kwargs)
        self.dataset = dataset
        self.score = score
        self.n_states = n_states
        self.n_actions = n_actions
        self._episodes: _Episodes | None = None

    def _init_callback(self) -> None:
        super()._init_callback()
        assert isinstance(self.model, OffPolicyAlgorithm)
        _check_model(self.model)
        if self.dataset is not None and not isinstance(self.dataset, ReplayBuffer):
            self.dataset = self.dataset.to_sb3(self.model)

    def _on_step(self) -> bool:
        self._episodes = None  # There are some if an evaluation was interrupted.
        return super()._on_step()

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        super()._log_success_callback(locals_, globals_)
        assert isinstance(self.model, OffPolicyAlgorithm)
        if self._episodes is None:
            self._episodes = _Episodes(self.model)
        self._episodes.on_step(locals_, globals_)
        if len(self._episodes.finished) == self.n_eval_episodes:  # EvalCallback writes the line next.
            self._record(self._episodes)
            self._episodes = None

    def _record(self, episodes: _Episodes) -> None:
        assert isinstance(self.model, OffPolicyAlgorithm)
        if self.score is not None:
            self.logger.record("eval/normalized_score", float(np.mean(np.asarray(self.score(episodes.raw_returns)))))
        found = episodes.bias()
        self.logger.record("eval/value_bias", found.bias)
        self.logger.record("eval/predicted_return", found.predicted)
        self.logger.record("eval/discounted_return", found.actual)
        data = self.dataset
        if data is None and isinstance(self.model, OfflineMixin):
            data = self.model.offline_buffer
        if data is not None:
            gap = gap_expansion(self.model, data, n_states=self.n_states, n_actions=self.n_actions)
            self.logger.record("eval/q_gap", gap.gap)
            self.logger.record("eval/q_random_max_minus_data", gap.delta)


@dataclass(frozen=True)
class _Episode:
    observations: list[Any]
    """All of them where the entropy is wanted, else the first."""
    action: Any
    """The first."""
    rewards: npt.NDArray[np.float64]
    truncated: bool


class _Episodes:
    """Gathers episodes from the steps of ``evaluate_policy``."""

    def __init__(self, model: OffPolicyAlgorithm) -> None:
        self.model = model
        self.finished: list[_Episode] = []
        self.raw_returns: list[float] = []
        """Undiscounted, as the monitor has them where there is one: before any normalisation."""
        self._entropy_weight = _entropy_weight(model)
        self._running: dict[int, list[tuple[Any, Any, float]]] = {}

    def on_step(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        i, info = locals_["i"], locals_["info"]
        steps = self._running.setdefault(i, [])
        looked_at = not steps or self._entropy_weight
        observation = _select(locals_["observations"], i) if looked_at else None
        steps.append((observation, locals_["actions"][i], float(locals_["reward"])))
        # A monitored environment says when its episode has ended: a lost life in Atari is no end.
        if not locals_["done"] or (locals_["is_monitor_wrapped"] and "episode" not in info):
            return
        self._running[i] = []
        observations, actions, rewards = zip(*steps, strict=True)
        kept = list(observations if self._entropy_weight else observations[:1])
        truncated = bool(info.get("TimeLimit.truncated", False))
        self.finished.append(_Episode(kept, actions[0], np.array(rewards), truncated))
        self.raw_returns.append(float(info["episode"]["r"]) if "episode" in info else float(np.sum(rewards)))

    def bias(self) -> ValueBias:
        """Compare what was gathered with the critic."""
        model: Any = self.model
        with _random_streams_apart(0), th.no_grad():
            model.policy.set_training_mode(False)
            actions = np.stack([episode.action for episode in self.finished])
            if isinstance(model.action_space, spaces.Box):
                actions = model.policy.scale_action(actions).reshape(len(actions), -1).astype(np.float32)
            starts, _ = model.policy.obs_to_tensor(_stack([episode.observations[0] for episode in self.finished]))
            predicted = _values(model, starts, th.as_tensor(actions, device=model.device))
            entropy = np.array([self._discounted_entropy(episode) for episode in self.finished])
        return ValueBias.of(
            predicted,
            [episode.rewards for episode in self.finished],
            [episode.truncated for episode in self.finished],
            model.gamma,
            entropy=entropy,
            returns=self.raw_returns,
        )

    def _discounted_entropy(self, episode: _Episode) -> float:
        """Estimate the bonus that the first action's value includes: of every later state, each by one action's log-density."""
        model: Any = self.model
        if not self._entropy_weight or len(episode.rewards) == 1:
            return 0.0
        later = episode.observations[1:]
        log_prob = [
            model.actor.action_log_prob(model.policy.obs_to_tensor(_stack(later[start : start + _BATCH]))[0])[1]
            for start in range(0, len(later), _BATCH)
        ]
        weights = model.gamma ** np.arange(1, len(episode.rewards))
        return -self._entropy_weight * float(np.dot(weights, th.cat(log_prob).double().cpu().numpy().reshape(-1)))


def _check_model(model: Any) -> None:
    """Refuse a model without critics that this module can ask."""
    has_critic = any(hasattr(model, name) for name in ("critic", "q_net", "quantile_net"))
    if not isinstance(model, OffPolicyAlgorithm) or not has_critic:
        raise ValueError(
            "model: expected an off-policy algorithm with a critic (SAC, TD3, DQN, TQC, QR-DQN or a class of cql_plugins.sb3), "
            f"got {type(model).__name__}."
        )


def _values(model: Any, observations: Any, actions: th.Tensor) -> npt.NDArray[np.float64]:
    """Evaluate ``(B, A)`` actions as the networks see them, or ``(B,)`` numbers of discrete ones; returns ``(B,)``."""
    if isinstance(model.action_space, spaces.Discrete):
        values = _all_values(model, observations).gather(1, actions.long().reshape(-1, 1))[:, 0]
    else:
        outputs = model.critic(observations, actions)
        # A tuple of (B, 1), one for each critic, whose smallest counts; or TQC's (B, C, K) quantiles, whose mean does.
        values = outputs.mean(dim=(1, 2)) if isinstance(outputs, th.Tensor) else th.cat(outputs, dim=1).min(dim=1).values
    return np.asarray(values.double().cpu().numpy())


def _all_values(model: Any, observations: Any) -> th.Tensor:
    """Evaluate all discrete actions, ``(B, n_actions)``."""
    if hasattr(model, "quantile_net"):
        return model.quantile_net(observations).mean(dim=1)  # type: ignore[no-any-return]
    return model.q_net(observations)  # type: ignore[no-any-return]


def _compare(model: Any, observations: Any, actions: th.Tensor, n_actions: int) -> tuple[float, float, float, float]:
    """Means over a batch of the four values of :class:`GapExpansion`."""
    q_data = _values(model, observations, actions)
    if isinstance(model.action_space, spaces.Discrete):
        q_all = _all_values(model, observations).double()
        largest = float(q_all.max(dim=1).values.mean())
        return float(q_data.mean()), largest, float(q_all.mean()), largest
    drawn = model.policy._predict(observations, deterministic=False)
    uniform = th.rand(len(actions) * n_actions, actions.shape[1], device=actions.device) * 2 - 1
    repeated = _repeat(observations, n_actions)
    q_random = _values(model, repeated, uniform).reshape(-1, n_actions)
    q_policy = _values(model, observations, drawn)
    return float(q_data.mean()), float(q_policy.mean()), float(q_random.mean()), float(q_random.max(axis=1).mean())


def _entropy_weight(model: Any) -> float:
    """The weight of the entropy in the critic's target: 0 where it has none."""
    # Ours say whether it has; SAC's and TQC's always does.
    if not hasattr(model, "ent_coef") or not getattr(model, "backup_entropy", True):
        return 0.0
    log_ent_coef = getattr(model, "log_ent_coef", None)
    return float(model.ent_coef_tensor if log_ent_coef is None else log_ent_coef.detach().exp())


def _select(observations: Any, index: int) -> Any:
    if isinstance(observations, dict):
        return {key: value[index].copy() for key, value in observations.items()}
    return observations[index].copy()


def _stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def _repeat(observations: Any, times: int) -> Any:
    if isinstance(observations, dict):
        return {key: value.repeat_interleave(times, dim=0) for key, value in observations.items()}
    return observations.repeat_interleave(times, dim=0)


@contextmanager
def _random_streams_apart(seed: int) -> Iterator[None]:
    """Draw from streams of our own, so that looking at a model does not change what it learns next."""
    with random_states_kept():
        set_random_seed(seed)
        yield


__all__ = ["DiagnosticsCallback", "GapExpansion", "ValueBias", "gap_expansion", "value_bias"]
