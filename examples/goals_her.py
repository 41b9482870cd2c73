"""Goals: logged episodes that failed are relabelled in hindsight by SB3's ``HerReplayBuffer``, offline as online.

    python examples/goals_her.py

A point in the plane is to be brought to a goal, -1 a step until it is there. The log's walkers had other things in mind.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CalQL

PLANE = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
LIMIT = 25


class Reach(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Steps of at most 0.2; arrived within 0.15 of the goal."""

    observation_space = gym.spaces.Dict({"observation": PLANE, "achieved_goal": PLANE, "desired_goal": PLANE})
    action_space = PLANE

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start and goal anywhere."""
        super().reset(seed=seed)
        self.clock, self.place, self.goal = 0, *self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move."""
        self.clock += 1
        self.place = np.clip(self.place + 0.2 * np.clip(action, -1, 1), -1, 1).astype(np.float32)
        reward = float(self.compute_reward(self.place, self.goal, {}))
        return self._seen(), reward, False, self.clock >= LIMIT, {"is_success": reward == 0.0}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """0 at the goal, else -1, for one pair or a batch of them."""
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.15).astype(np.float32)

    def _seen(self) -> dict[str, np.ndarray]:
        return {"observation": self.place.copy(), "achieved_goal": self.place.copy(), "desired_goal": self.goal.copy()}


def make_log(episodes: int) -> OfflineDataset:
    """Log walkers with a direction of their own."""
    env, rng, rows = Reach(), np.random.default_rng(0), []
    for episode in range(episodes):
        seen, _ = env.reset(seed=episode)
        direction, done = rng.uniform(-1, 1, 2), False
        while not done:
            action = np.clip(direction + rng.normal(0, 0.5, 2), -1, 1).astype(np.float32)
            following, reward, _, done, _ = env.step(action)
            rows.append((seen, action, reward, done, following))
            seen = following
    seen, actions, rewards, ends, after = zip(*rows, strict=True)
    before, following = ({key: np.stack([one[key] for one in column]) for key in column[0]} for column in (seen, after))
    flags = (np.zeros(len(ends), bool), np.array(ends))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return from_arrays(before, np.stack(actions), np.array(rewards), *flags, next_observations=following, **spaces)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train with and without hindsight; returns the mean return of 40 episodes of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    arguments = parser.parse_args(argv)
    log, found = make_log(200), {}
    print(f"the log: mean return {float(log.episode_returns.mean()):.1f}, of -{LIMIT} to 0")
    for name in ("as logged", "in hindsight"):
        hindsight = {"replay_buffer_class": HerReplayBuffer} if name == "in hindsight" else {}
        model = CalQL(
            "MultiInputPolicy",
            make_vec_env(Reach, seed=0),
            gamma=0.95,
            learning_rate=1e-3,
            actor_learning_rate=None,
            cql_alpha=1.0,
            max_q_backup=False,
            batch_size=128,
            learning_starts=0,
            policy_kwargs={"net_arch": [64, 64]},
            seed=0,
            device="cpu",
            **hindsight,
        )
        model.learn_offline(log, arguments.gradient_steps)
        mean, _ = evaluate_policy(model, make_vec_env(Reach, n_envs=10, seed=1), n_eval_episodes=40)
        found[name] = float(mean)
        print(f"goals {name}: mean return {found[name]:.1f}")
    return found


if __name__ == "__main__":
    main()
