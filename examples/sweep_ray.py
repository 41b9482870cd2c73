"""Which weight? Several values and seeds as tasks of Ray, on this machine's cores or a cluster's.

    pip install ray
    python examples/sweep_ray.py [--alphas 0.1 1 10] [--seeds 2]
    RAY_ADDRESS=head:6379 python examples/sweep_ray.py

Scores a policy in its environment, which whoever only has a log cannot do: then compare ``value_bias`` and the gap instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


def score(alpha: float, seed: int, gradient_steps: int) -> float:
    """Train one model; returns the mean return of 20 walks, 10 for an arrival. Runs in a worker."""
    sys.path.insert(0, HERE)
    import torch as th
    from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from cql_plugins.sb3 import CQL

    th.set_num_threads(1)
    options = SAC_ARGUMENTS | CQL_ARGUMENTS | {"cql_alpha": alpha}
    model = CQL("MlpPolicy", make_vec_env(Bridge, seed=seed), seed=seed, **options)
    model.learn_offline(make_log(seed=0), gradient_steps)
    mean, _ = evaluate_policy(model, make_vec_env(Bridge, n_envs=10, seed=1), n_eval_episodes=20)
    return float(mean)


def main(argv: list[str] | None = None) -> dict[float, float]:
    """Run all; returns the mean over seeds of each weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--gradient-steps", type=int, default=2000)
    arguments = parser.parse_args(argv)
    try:
        import ray
    except ImportError as error:
        raise SystemExit(f"ray is needed here: {error}. Install it with: pip install ray") from error

    # What a local Ray hands out by default are the machine's own cores.
    ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else os.cpu_count(), include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1)(score)
    running = {
        (alpha, seed): task.remote(alpha, seed, arguments.gradient_steps)
        for alpha in arguments.alphas
        for seed in range(arguments.seeds)
    }
    found = {}
    for alpha in arguments.alphas:
        scores = ray.get([running[alpha, seed] for seed in range(arguments.seeds)])
        found[alpha] = sum(scores) / len(scores)
        print(f"cql_alpha {alpha:g}: mean return {found[alpha]:.1f} of 10 {[round(one, 1) for one in scores]}", flush=True)
    ray.shutdown()
    return found


if __name__ == "__main__":
    main()
