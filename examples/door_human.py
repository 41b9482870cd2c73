"""Cal-QL on 25 human demonstrations of a robot hand opening a door: offline on the recordings, then online.

    pip install "cql-plugins[minari,robotics,progress]"
    minari download D4RL/door/human-v2
    python examples/door_human.py

Another dataset of the task is taken by its Minari id, or as the path of a D4RL HDF5 file. To see it run in a minute:

    python examples/door_human.py --gradient-steps 300 --online-steps 300 --eval-every 300 --eval-episodes 1

The full default takes hours on two CPU cores. Scores are D4RL's: 0 for a random policy, 100 for an expert. The demonstrations'
own score is out of reach here: CQL's published score on this dataset is 5 to 10, that of behaviour cloning about 2.
Writes ``door.zip``, ``door_vecnormalize.pkl``, ``door.json`` and SB3's ``evaluations.npz`` of each phase.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins.adapters import DatasetError, OfflineDataset, from_d4rl, from_minari, normalized_score, reference_scores
from cql_plugins.sb3 import CalQL

# The published choice for Adroit's human and cloned data: a small conservative weight, no maximum in the target.
# `return_tail` stays "zero": each demonstration ends with the door open and a positive reward, so what its policy got up to
# the end is no more than what it would have got in all, and a valid lower bound.
PRESET: dict[str, Any] = {
    "cql_alpha": 1.0,
    "max_q_backup": False,
    "actor_learning_rate": 1e-4,
    "policy_kwargs": {"net_arch": [256, 256, 256]},
}


class D4RLReward(gym.Wrapper[Any, Any, Any, Any]):
    """The door with the reward that the demonstrations were recorded with.

    D4RL subtracts a tenth of the hand's distance from the handle; gymnasium-robotics 1.2.1 to 1.4.2 adds it in task ``v1``.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and turn the sign of that term."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward) - 0.2 * float(np.linalg.norm(observation[35:38])), terminated, truncated, info


def make_door() -> gym.Env[Any, Any]:
    import gymnasium_robotics  # Here, so that missing data is refused before this slow import.

    gym.register_envs(gymnasium_robotics)
    return D4RLReward(gym.make("AdroitHandDoor-v1"))


def load(name: str, download: bool) -> OfflineDataset:
    if Path(name).suffix in (".hdf5", ".h5"):
        return from_d4rl(name)
    return from_minari(name, download=download)


def d4rl_scores(evaluation: EvalCallback) -> dict[int, float]:
    """D4RL's score at each evaluation, by step."""
    references = reference_scores("AdroitHandDoor-v1")
    assert references is not None
    means = np.mean(evaluation.evaluations_results, axis=1)
    return {
        int(t): float(normalized_score(r, references)) for t, r in zip(evaluation.evaluations_timesteps, means, strict=True)
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and save; returns what ``door.json`` has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="D4RL/door/human-v2", help="Minari id, or path of a D4RL HDF5 file")
    parser.add_argument("--download", action="store_true", help="fetch the Minari id where it is not on disk")
    parser.add_argument("--gradient-steps", type=int, default=50_000, help="offline; 0 for none")
    parser.add_argument("--online-steps", type=int, default=20_000, help="environment steps; 0 for none")
    parser.add_argument("--eval-every", type=int, default=5_000, help="steps between two evaluations")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args(argv)

    try:
        dataset = load(arguments.dataset, arguments.download)
    except (DatasetError, ImportError) as error:
        sys.exit(f"door_human: {error}")
    print(dataset.summary())

    # `env` has seen nothing yet, so `learn_offline` sets its statistics from the dataset. Rewards stay as they are.
    env = VecNormalize(make_vec_env(make_door, seed=arguments.seed), norm_reward=False)
    eval_env = VecNormalize(make_vec_env(make_door, seed=1000 + arguments.seed), norm_reward=False, training=False)
    model = CalQL("MlpPolicy", env, seed=arguments.seed, verbose=1, **PRESET)

    def evaluation(phase: str, steps: int) -> EvalCallback:
        """SB3's evaluation, by gradient steps offline and environment steps online; it takes over the statistics of `env`."""
        return EvalCallback(
            eval_env,
            eval_freq=min(arguments.eval_every, steps),
            n_eval_episodes=arguments.eval_episodes,
            log_path=str(arguments.out / f"door_{phase}"),  # SB3 keeps the results only where it may write them.
            verbose=0,
        )

    scores = {}
    # Without any offline steps the online phase has the dataset all the same.
    offline = evaluation("offline", arguments.gradient_steps) if arguments.gradient_steps else None
    model.learn_offline(dataset, arguments.gradient_steps, callback=offline, progress_bar=not arguments.no_progress)
    if offline:
        scores["offline"] = d4rl_scores(offline)
    if arguments.online_steps:
        online = evaluation("online", arguments.online_steps)
        model.learn(arguments.online_steps, callback=online, progress_bar=not arguments.no_progress)
        scores["online"] = d4rl_scores(online)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save(arguments.out / "door.zip")
    env.save(str(arguments.out / "door_vecnormalize.pkl"))
    (arguments.out / "door.json").write_text(json.dumps(scores, indent=1) + "\n")
    for phase, curve in scores.items():
        print(f"{phase}: " + ", ".join(f"{score:.1f} after {step}" for step, score in curve.items()))
    return {"dataset": dataset.name, "scores": scores}


if __name__ == "__main__":
    main()
