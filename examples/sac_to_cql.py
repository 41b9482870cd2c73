"""An SB3 script with SAC becomes one with CQL: the three lines marked with <--.

    python examples/sac_to_cql.py

The rest is what it was: the same arguments, ``learn``, ``save``, ``load`` and ``evaluate_policy``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log  # the script beside this one
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from cql_plugins.sb3 import CQL  # <-- was: from stable_baselines3 import SAC


def main(argv: list[str] | None = None) -> float:
    """Train and score; returns the mean return of 20 walks, 10 for an arrival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args(argv)

    env = make_vec_env(Bridge, seed=0)
    model = CQL("MlpPolicy", env, seed=0, **SAC_ARGUMENTS, **CQL_ARGUMENTS)  # <-- was: SAC(...)
    model.learn_offline(make_log(seed=0), arguments.gradient_steps)  # <-- new
    model.learn(arguments.timesteps)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save(arguments.out / "bridge.zip")
    policy = CQL.load(arguments.out / "bridge.zip", device="cpu")
    mean, _ = evaluate_policy(policy, make_vec_env(Bridge, n_envs=10, seed=1), n_eval_episodes=20)
    print(f"mean return {float(mean):.1f} of 10; the log's is {float(make_log(seed=0).episode_returns.mean()):.1f}")
    return float(mean)


if __name__ == "__main__":
    main()
