"""A network of one's own: a features extractor, critics wider than the actor, another activation, weight decay.

    python examples/custom_network.py

All of it is SB3's ``policy_kwargs``; saved models know it.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import torch as th
from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log  # the script beside this one
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from cql_plugins.sb3 import CQL


class Waves(BaseFeaturesExtractor):
    """Sines and cosines of the position at several frequencies."""

    def __init__(self, observation_space: gym.spaces.Box, n_frequencies: int = 4) -> None:
        super().__init__(observation_space, 2 * n_frequencies * observation_space.shape[0])
        self.register_buffer("frequencies", 2.0 ** th.arange(n_frequencies))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Encode, ``(B, F)``."""
        angles = (observations.unsqueeze(-1) * self.frequencies).flatten(1)
        return th.cat((angles.sin(), angles.cos()), dim=1)


def main(argv: list[str] | None = None) -> float:
    """Train and score; returns the mean return of 20 walks, 10 for an arrival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    arguments = parser.parse_args(argv)
    networks: dict[str, Any] = {
        "features_extractor_class": Waves,
        "features_extractor_kwargs": {"n_frequencies": 4},
        "net_arch": {"pi": [64, 64], "qf": [128, 128]},
        "activation_fn": th.nn.SiLU,
        "optimizer_class": th.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": 1e-4},
    }
    options = SAC_ARGUMENTS | {"policy_kwargs": networks}
    model = CQL("MlpPolicy", make_vec_env(Bridge, seed=0), seed=0, **options, **CQL_ARGUMENTS)
    model.learn_offline(make_log(seed=0), arguments.gradient_steps)
    mean, _ = evaluate_policy(model, make_vec_env(Bridge, n_envs=10, seed=1), n_eval_episodes=20)
    print(model.critic.qf0)
    print(f"mean return {float(mean):.1f} of 10")
    return float(mean)


if __name__ == "__main__":
    main()
