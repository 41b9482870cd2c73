"""Images and discrete actions: single frames in the log, stacks of them for the model, each frame in memory once.

    python examples/images.py

A dot runs along a line and is to be stopped in the middle. One frame does not tell which way it runs; two do.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import DiscreteCQL

SIZE = 36  # the smallest that SB3's network for images takes


class Dot(gym.Env[np.ndarray, int]):
    """A dot with speed; actions push it left, not at all, or right. Pays 1 in the middle third, for 20 steps."""

    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start anywhere, at any speed."""
        super().reset(seed=seed)
        self.clock, self.place, self.speed = 0, *self.np_random.uniform((0.2, -0.1), (0.8, 0.1))
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Push."""
        self.clock += 1
        self.speed = float(np.clip(self.speed + 0.05 * (int(action) - 1), -0.15, 0.15))
        self.place = float(np.clip(self.place + self.speed, 0.05, 0.95))
        return self._frame(), float(abs(self.place - 0.5) < 1 / 6), False, self.clock >= 20, {}

    def _frame(self) -> np.ndarray:
        frame = np.zeros(self.observation_space.shape, np.uint8)
        column = int(self.place * SIZE)
        frame[15:21, max(column - 2, 0) : column + 3] = 255
        return frame


def make_log(episodes: int) -> OfflineDataset:
    """Log a player who pushes towards the middle and brakes, with every third push at random."""
    env, rng, rows = Dot(), np.random.default_rng(0), []
    for episode in range(episodes):
        frame, _ = env.reset(seed=episode)
        done = False
        while not done:
            wanted = 0.3 * (0.5 - env.place) - env.speed
            action = int(rng.integers(3)) if rng.random() < 1 / 3 else 1 + int(np.sign(wanted)) * (abs(wanted) > 0.02)
            following, reward, _, done, _ = env.step(action)
            rows.append((frame, action, reward, False, done, following))
            frame = following
    frames, actions, rewards, terminations, truncations, after = (np.stack(column) for column in zip(*rows, strict=True))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return from_arrays(frames, actions, rewards, terminations, truncations, next_observations=after, **spaces)


def main(argv: list[str] | None = None) -> float:
    """Train and score; returns the mean return of 20 episodes, at most 20."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=150)
    arguments = parser.parse_args(argv)
    log = make_log(arguments.episodes)
    env, games = (VecFrameStack(make_vec_env(Dot, n, seed=n), n_stack=2) for n in (1, 10))
    model = DiscreteCQL("CnnPolicy", env, learning_rate=3e-4, gamma=0.9, batch_size=64, buffer_size=1000, seed=0, device="cpu")
    model.learn_offline(log, arguments.gradient_steps)  # single frames are stacked as VecFrameStack does
    mean, _ = evaluate_policy(model, games, n_eval_episodes=20)
    print(f"mean return {float(mean):.1f} of 20; the log's is {float(log.episode_returns.mean()):.1f}")
    return float(mean)


if __name__ == "__main__":
    main()
