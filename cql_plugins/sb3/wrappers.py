"""Environment wrappers that make an environment agree with a dataset that was prepared for training."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from cql_plugins._env_state import capture_state, misfits, restore_state
from cql_plugins._nested import flatten_space, flatten_tree


class ScaleReward(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Give ``scale * reward + shift``, the counterpart of ``OfflineDataset.scale_rewards`` for the online phase.

    Unlike Gymnasium's ``TransformReward`` it changes ``compute_reward`` of a goal environment, too, so that rewards of goals
    relabelled in hindsight have the units of all others.

    Args:
        env: The environment.
        scale: Factor, finite and not zero; 10 on AntMaze.
        shift: Added after scaling, finite; -5 on AntMaze.

    Raises:
        ValueError: If scale or shift is out of range.
    """

    def __init__(self, env: gym.Env[Any, Any], scale: float = 1.0, shift: float = 0.0) -> None:
        if not (np.isfinite(scale) and np.isfinite(shift)) or scale == 0:
            raise ValueError(f"expected a finite, non-zero scale and a finite shift, got {scale} and {shift}")
        gym.utils.RecordConstructorArgs.__init__(self, scale=scale, shift=shift)
        super().__init__(env)
        self.scale, self.shift = scale, shift

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step, and scale the reward."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, self.scale * float(reward) + self.shift, terminated, truncated, info

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """Compute the environment's rewards for these goals, scaled.

        Args:
            achieved_goal: Goals reached, shape ``(..., D)``.
            desired_goal: Goals wanted, shape ``(..., D)``.
            info: What the environment wants beside them.

        Returns:
            Rewards, shape ``(...)``.

        Raises:
            AttributeError: If the environment has no ``compute_reward``.
        """
        rewards = self.env.get_wrapper_attr("compute_reward")(achieved_goal, desired_goal, info)
        return self.scale * np.asarray(rewards, dtype=np.float64) + self.shift


class FlattenNestedObservation(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Give each leaf of a nested Dict observation a key of its own, ``"desired_goal/microwave"``.

    Stable-Baselines3 refuses nested Dict spaces. A dataset with the nested space fits a model on the wrapped environment as
    it is: ``to_sb3`` flattens it in the same way.

    Args:
        env: An environment with a Dict observation space.

    Raises:
        ValueError: If the observation space is no Dict, or two leaves would have one key.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        if not isinstance(env.observation_space, spaces.Dict):
            raise ValueError(f"expected a Dict observation space, got {env.observation_space}; leave the wrapper out")
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = flatten_space(env.observation_space)

    def observation(self, observation: Any) -> dict[str, Any]:
        """Flatten one observation, in the order of the space."""
        flat = flatten_tree(observation)
        assert isinstance(self.observation_space, spaces.Dict)
        return {key: flat[key] for key in self.observation_space}


class ResumableEnv(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Let :class:`cql_plugins.sb3.Checkpoints` read and set the state of an environment in another process.

    The outermost wrapper of each environment of a ``SubprocVecEnv``, such as
    ``make_vec_env("HalfCheetah-v5", 4, vec_env_cls=SubprocVecEnv, wrapper_class=ResumableEnv)``; elsewhere it is not needed.

    Args:
        env: The environment.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def capture_state(self) -> tuple[Any, dict[str, Any], list[str]]:
        """Read the state.

        Returns:
            The state, the arrays in it by name, and what could not be read.
        """
        arrays: dict[str, Any] = {}
        state, problems = capture_state(self.env, arrays, "state")
        return state, arrays, problems

    def misfits(self, state: Any, arrays: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Look for what of a state has no place; nothing is changed.

        Args:
            state: From :meth:`capture_state`.
            arrays: From there, too.

        Returns:
            What has no place since this is another environment, and what may have after a reset.
        """
        return misfits(self.env, state, arrays)

    def restore_state(self, state: Any, arrays: dict[str, Any]) -> list[str]:
        """Set a state.

        Args:
            state: From :meth:`capture_state`.
            arrays: From there, too.

        Returns:
            What has no place in this environment.
        """
        return restore_state(self.env, state, arrays)
