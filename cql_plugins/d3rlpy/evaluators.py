"""Is the critic right, and is it conservative? As d3rlpy evaluators, for ours and for d3rlpy's own algorithms."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import ReplayBufferBase
from d3rlpy.interface import QLearningAlgoProtocol
from d3rlpy.metrics import EvaluatorProtocol
from d3rlpy.metrics.utility import evaluate_qlearning_with_environment

from cql_plugins._checkpoints import random_states, set_random_states

_BATCH = 1024


class ValueBiasEvaluator(EvaluatorProtocol):
    """What the critic predicts for the first action of an episode, minus its discounted return [CQL, Table 4].

    Above 0 the critic over-estimates its policy, below 0 it is conservative. The policy's mode acts, as in d3rlpy's
    ``EnvironmentEvaluator``; the prediction is d3rlpy's ``predict_value``, the mean over critics.

    Args:
        env: To play in. Rewards must be those that the algorithm is trained on: none with a ``reward_scaler``.
        n_trials: Episodes.

    Raises:
        ValueError: If ``n_trials`` is below 1, or, when called, if the algorithm scales rewards.
    """

    def __init__(self, env: gym.Env[Any, Any], n_trials: int = 10) -> None:
        if n_trials < 1:
            raise ValueError(f"n_trials: expected at least 1, got {n_trials}.")
        self._env = env
        self._n_trials = n_trials

    def __call__(self, algo: QLearningAlgoProtocol, dataset: ReplayBufferBase) -> float:
        """Play, and return the mean difference.

        Args:
            algo: Any Q-learning algorithm of d3rlpy.
            dataset: Not used.
        """
        if algo.reward_scaler is not None:
            raise ValueError(
                f"reward_scaler: expected none, got {type(algo.reward_scaler).__name__}: values in scaled rewards cannot be "
                "compared with returns. Scale the dataset's and the environment's rewards instead."
            )
        recorder = _Recorder(self._env)
        evaluate_qlearning_with_environment(algo, recorder, self._n_trials)
        predicted = algo.predict_value(_stack(recorder.starts), np.stack(recorder.actions))
        actual = [np.dot(rewards, algo.gamma ** np.arange(len(rewards))) for rewards in recorder.rewards]
        return float(np.mean(predicted) - np.mean(actual))


class QGapEvaluator(EvaluatorProtocol):
    """How far the values of uniform actions are below those of the data's actions [CQL, Figure 2].

    It grows while a conservative critic learns. Uniform actions are drawn between the bounds of the algorithm's
    ``action_scaler``, or between -1 and 1 without one; discrete actions are all taken.

    Args:
        n_states: Transitions of the data to draw.
        n_actions: Uniform actions in each.
        best: Whether the best of the uniform actions counts instead of their mean: minus the paper's figure.
        seed: Of the draws. Global random streams are left as they were.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, n_states: int = 4096, n_actions: int = 10, *, best: bool = False, seed: int = 0) -> None:
        for name, number in (("n_states", n_states), ("n_actions", n_actions)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}.")
        self._n_states = n_states
        self._n_actions = n_actions
        self._best = best
        self._seed = seed

    def __call__(self, algo: QLearningAlgoProtocol, dataset: ReplayBufferBase) -> float:
        """Draw, and return the mean gap.

        Args:
            algo: Any Q-learning algorithm of d3rlpy.
            dataset: The data, as ``fit`` passes them.
        """
        rng, before, total = np.random.default_rng(self._seed), random_states(), 0.0
        np.random.seed(self._seed)  # noqa: NPY002 (d3rlpy's buffers draw from NumPy's global stream)
        try:
            most = max(1, _BATCH // self._n_actions)
            for start in range(0, self._n_states, most):
                batch = dataset.sample_transition_batch(min(most, self._n_states - start))
                total += float(self._gaps(algo, batch.observations, batch.actions, rng).sum())
        finally:
            set_random_states(before)
        return total / self._n_states

    def _gaps(
        self, algo: Any, observations: Any, actions: npt.NDArray[Any], rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        n = len(actions)
        if algo.get_action_type() == ActionSpace.DISCRETE:
            tried = np.tile(np.arange(algo.action_size), n)[:, None]
        else:
            tried = rng.uniform(-1.0, 1.0, (n * self._n_actions, actions.shape[1])).astype(np.float32)
            if algo.action_scaler is not None:
                tried = algo.action_scaler.reverse_transform_numpy(tried)
        each = len(tried) // n
        values = algo.predict_value(_repeat(observations, each), tried).reshape(n, each).astype(np.float64)
        others = values.max(axis=1) if self._best else values.mean(axis=1)
        return cast("npt.NDArray[np.float64]", algo.predict_value(observations, actions).astype(np.float64) - others)


class _Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the first observation and action of each episode, and all rewards."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.starts: list[Any] = []
        self.actions: list[Any] = []
        self.rewards: list[list[float]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        self.starts.append(observation)
        self.rewards.append([])
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if not self.rewards[-1]:
            self.actions.append(np.atleast_1d(np.array(action)))
        result = self.env.step(action)
        self.rewards[-1].append(float(result[1]))
        return result


def _stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], (tuple, list)):
        return [np.stack(parts) for parts in zip(*observations, strict=True)]
    return np.stack(observations)


def _repeat(observations: Any, times: int) -> Any:
    if isinstance(observations, (tuple, list)):
        return [np.repeat(part, times, axis=0) for part in observations]
    return np.repeat(observations, times, axis=0)


__all__ = ["QGapEvaluator", "ValueBiasEvaluator"]
