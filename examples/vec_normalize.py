"""Observations in metres and degrees: ``VecNormalize`` takes its statistics from the log, and keeps them online.

python examples/vec_normalize.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log  # the script beside this one
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL

SCALE, SHIFT = np.array([1000.0, 0.01], np.float32), np.array([300.0, 5.0], np.float32)
SPACE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class OddUnits(gym.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """The bridge, its two coordinates in units of very different size."""

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        self.observation_space = SPACE

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Change the units."""
        return SCALE * observation + SHIFT


def odd_log() -> OfflineDataset:
    """The quick start's log in these units."""
    rows = (log := make_log(seed=0)).transitions(np.arange(len(log)))
    return from_arrays(
        SCALE * rows.observations + SHIFT,
        rows.actions,
        rows.rewards,
        rows.terminations,
        rows.truncations,
        next_observations=SCALE * rows.next_observations + SHIFT,
        observation_space=SPACE,
        action_space=log.action_space,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with and without; returns the mean return of 20 walks of each, 10 for an arrival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    arguments = parser.parse_args(argv)
    found = {}
    for name in ("as they are", "normalised"):
        env, walks = (make_vec_env(Bridge, n, seed=n, wrapper_class=OddUnits) for n in (1, 10))
        if name == "normalised":
            env = VecNormalize(env, norm_reward=False)
        model = CQL("MlpPolicy", env, seed=0, **SAC_ARGUMENTS, **CQL_ARGUMENTS)
        model.learn_offline(odd_log(), arguments.gradient_steps)
        if isinstance(env, VecNormalize):
            print(f"mean of the observations {env.obs_rms.mean}, from {env.obs_rms.count:,.0f} logged steps")
            walks = VecNormalize(walks, training=False, norm_reward=False)
            walks.obs_rms = env.obs_rms
        mean, _ = evaluate_policy(model, walks, n_eval_episodes=20)
        found[name] = float(mean)
        print(f"observations {name}: mean return {found[name]:.1f} of 10")
    return found


if __name__ == "__main__":
    main()
