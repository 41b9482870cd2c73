"""Is the critic right, and is it conservative? Functions and evaluators for ours and for d3rlpy's own algorithms."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import ReplayBufferBase
from d3rlpy.interface import QLearningAlgoProtocol
from d3rlpy.metrics import EvaluatorProtocol
from d3rlpy.metrics.utility import evaluate_qlearning_with_environment

from cql_plugins._checkpoints import random_states_kept
from cql_plugins._diagnostics import GapExpansion, ValueBias, batches, require_positive

_BATCH = 1024


def value_bias(algo: QLearningAlgoProtocol, env: gym.Env[Any, Any], n_trials: int = 10) -> ValueBias:
    """Compare the critic's values in the first states of episodes with their discounted returns [CQL, Section 6, Table 4].

    The policy's mode acts, as in d3rlpy's ``EnvironmentEvaluator``; the values are d3rlpy's ``predict_value``, the mean over
    critics. An entropy bonus in them (d3rlpy's SAC; CQL with ``soft_q_backup``) is not taken off.

    Args:
        algo: Any Q-learning algorithm of d3rlpy.
        env: To play in, with the rewards that the algorithm is trained on.
        n_trials: Episodes.

    Raises:
        ValueError: If ``n_trials`` is below 1, or the algorithm scales rewards.
    """
    require_positive(n_trials=n_trials)
    if algo.reward_scaler is not None:
        raise ValueError(
            f"reward_scaler: expected none, got {type(algo.reward_scaler).__name__}: values in scaled rewards cannot be "
            "compared with returns. Scale the dataset's and the environment's rewards instead."
        )
    recorder = _Recorder(env)
    with random_states_kept():  # d3rlpy's loop draws from NumPy's stream at each step, and batches come from there.
        evaluate_qlearning_with_environment(algo, recorder, n_trials)
    predicted = algo.predict_value(_stack(recorder.starts), np.stack(recorder.actions))
    return ValueBias.of(predicted, recorder.rewards, recorder.truncated, algo.gamma)


def gap_expansion(
    algo: QLearningAlgoProtocol, dataset: ReplayBufferBase, *, n_states: int = 4096, n_actions: int = 10, seed: int = 0
) -> GapExpansion:
    """Compare the values of the data's actions with others' in the same states [CQL, Figure 2].

    Uniform actions are drawn between the bounds of the algorithm's ``action_scaler``, or between -1 and 1 without one;
    discrete actions are all taken.

    Args:
        algo: Any Q-learning algorithm of d3rlpy.
        dataset: The data.
        n_states: Transitions to draw.
        n_actions: Uniform actions in each state.
        seed: Of the draws. Global random streams are left as they were.

    Raises:
        ValueError: If a number is below 1.
    """
    require_positive(n_states=n_states, n_actions=n_actions)
    rng, sums = np.random.default_rng(seed), np.zeros(4)
    with random_states_kept():
        np.random.seed(seed)  # noqa: NPY002 (d3rlpy's buffers draw from NumPy's global stream)
        for rows in batches(n_states, max(1, _BATCH // n_actions)):
            batch = dataset.sample_transition_batch(rows)
            sums += rows * np.array(_compare(algo, batch.observations, batch.actions, n_actions, rng))
    return GapExpansion(*(float(total) / n_states for total in sums))


class ValueBiasEvaluator(EvaluatorProtocol):
    """:func:`value_bias` for ``fit``'s ``evaluators``: above 0 where the critic over-estimates its policy.

    Args:
        env: To play in.
        n_trials: Episodes.

    Raises:
        ValueError: If ``n_trials`` is below 1; see :func:`value_bias` for what a call refuses.
    """

    def __init__(self, env: gym.Env[Any, Any], n_trials: int = 10) -> None:
        require_positive(n_trials=n_trials)
        self._env = env
        self._n_trials = n_trials

    def __call__(self, algo: QLearningAlgoProtocol, dataset: ReplayBufferBase) -> float:
        """Return the bias; ``dataset`` is not used."""
        return value_bias(algo, self._env, self._n_trials).bias


class QGapEvaluator(EvaluatorProtocol):
    """:func:`gap_expansion` for ``fit``'s ``evaluators``: how far uniform actions are below the data's.

    Args:
        n_states: Transitions of the data to draw.
        n_actions: Uniform actions in each.
        best: Whether the best of the uniform actions counts instead of their mean: minus the paper's figure.
        seed: Of the draws.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, n_states: int = 4096, n_actions: int = 10, *, best: bool = False, seed: int = 0) -> None:
        require_positive(n_states=n_states, n_actions=n_actions)
        self._options = {"n_states": n_states, "n_actions": n_actions, "seed": seed}
        self._best = best

    def __call__(self, algo: QLearningAlgoProtocol, dataset: ReplayBufferBase) -> float:
        """Return the gap in ``dataset``."""
        found = gap_expansion(algo, dataset, **self._options)
        return -found.delta if self._best else found.gap


def _compare(
    algo: Any, observations: Any, actions: Any, n_actions: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Means over a batch of the four values of :class:`GapExpansion`."""
    n = len(actions)
    discrete = algo.get_action_type() == ActionSpace.DISCRETE
    if discrete:
        tried = np.tile(np.arange(algo.action_size), n)[:, None]
    else:
        tried = rng.uniform(-1.0, 1.0, (n * n_actions, actions.shape[1])).astype(np.float32)
        if algo.action_scaler is not None:
            tried = algo.action_scaler.reverse_transform_numpy(tried)
    each = len(tried) // n
    values = algo.predict_value(_repeat(observations, each), tried).reshape(n, each).astype(np.float64)
    largest = float(values.max(axis=1).mean())
    q_policy = largest if discrete else float(algo.predict_value(observations, algo.sample_action(observations)).mean())
    return float(algo.predict_value(observations, actions).mean()), q_policy, float(values.mean()), largest


class _Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the first observation and action of each episode, all rewards, and whether a time-out ended it."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.starts: list[Any] = []
        self.actions: list[Any] = []
        self.rewards: list[list[float]] = []
        self.truncated: list[bool] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        self.starts.append(_copy(observation))
        self.rewards.append([])
        self.truncated.append(False)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if not self.rewards[-1]:
            self.actions.append(np.atleast_1d(np.array(action)))
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.rewards[-1].append(float(reward))
        self.truncated[-1] = bool(truncated and not terminated)
        return observation, reward, terminated, truncated, info


def _copy(observation: Any) -> Any:
    """A copy, since an environment may hand out its own array and change it at the next step."""
    if isinstance(observation, (tuple, list)):
        return [np.array(part) for part in observation]
    return np.array(observation)


def _stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], (tuple, list)):
        return [np.stack(parts) for parts in zip(*observations, strict=True)]
    return np.stack(observations)


def _repeat(observations: Any, times: int) -> Any:
    if isinstance(observations, (tuple, list)):
        return [np.repeat(part, times, axis=0) for part in observations]
    return np.repeat(observations, times, axis=0)


__all__ = ["QGapEvaluator", "ValueBiasEvaluator", "gap_expansion", "value_bias"]
