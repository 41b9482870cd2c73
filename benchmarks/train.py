"""Train CQL or Cal-QL on a real dataset, offline and then online, and write the curve to a JSON file.

    python benchmarks/train.py halfcheetah-replay --seed 0 --steps 20000 --online-steps 5000

The datasets are looked for under ``CQL_PLUGINS_DATA`` (default: ``../shared/data`` beside the repository). A run that was
stopped goes on from its last checkpoint when the same command is given again (the online phase starts anew).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tasks import ROOT, load_minari, make_door, medium_expert

from cql_plugins.adapters import OfflineDataset
from cql_plugins.ensembles import PRECISIONS
from cql_plugins.sb3 import CQL, CQLTQC, CalQL
from cql_plugins.sb3.actor_critic import ConservativeActorCritic

ALGORITHMS: dict[str, type[ConservativeActorCritic]] = {"cql": CQL, "calql": CalQL, "cqltqc": CQLTQC, "tqc": CQLTQC}
# Without conservatism ours are their hosts, number for number.
AS_HOST: dict[str, Any] = {"cql_alpha": 0.0, "backup_entropy": True, "actor_learning_rate": None}


@dataclass(frozen=True)
class Task:
    """A dataset, the environment to evaluate in, and the preset."""

    load: Callable[[], OfflineDataset]
    make_env: Callable[[], gym.Env[Any, Any]]
    score_id: str
    normalize_observations: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "halfcheetah-replay": Task(
        load_minari("published-policies/halfcheetah/replay-v0"),
        lambda: gym.make("HalfCheetah-v5"),
        "halfcheetah",
        arguments={"cql_alpha": 5.0, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
    "halfcheetah-medium-expert": Task(
        medium_expert,
        lambda: gym.make("HalfCheetah-v5"),
        "halfcheetah",
        arguments={"cql_alpha": 5.0, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
    "door-human": Task(
        load_minari("dapg/door/human-replay-v0"),
        make_door,
        "door",
        normalize_observations=True,
        arguments={
            "cql_alpha": 1.0,
            "max_q_backup": False,
            "actor_learning_rate": 1e-4,
            "policy_kwargs": {"net_arch": [256, 256, 256]},
        },
    ),
}


class RecordEvaluations(EvalCallback):
    """SB3's evaluation, written to the result file and followed by a checkpoint each time."""

    def __init__(self, *args: Any, record: Callable[[int, list[float], ConservativeActorCritic], None], **kwargs: Any) -> None:
        super().__init__(*args, verbose=0, **kwargs)
        self.record = record
        self.returns: list[float] = []

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        super()._log_success_callback(locals_, globals_)
        if locals_["done"] and "episode" in locals_["info"]:
            self.returns.append(float(locals_["info"]["episode"]["r"]))

    def _on_step(self) -> bool:
        going_on = super()._on_step()
        if self.returns:
            assert isinstance(self.model, ConservativeActorCritic)
            self.record(self.num_timesteps, self.returns, self.model)
            self.returns = []
        return going_on


def make_vec(task: Task, seed: int, training: bool) -> VecEnv:
    """One environment, normalised where the preset says so."""
    env: VecEnv = make_vec_env(task.make_env, n_envs=1, seed=seed)
    if task.normalize_observations:
        env = VecNormalize(env, training=training, norm_obs=True, norm_reward=False)
    return env


def commit() -> str:
    """The commit that ran, marked where the work tree differs."""
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Run one configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="cql")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cql-alpha", type=float, help="another weight than the task's")
    parser.add_argument("--steps", type=int, default=20_000, help="offline gradient steps")
    parser.add_argument("--online-steps", type=int, default=0, help="environment steps afterwards, for each --online-algorithm")
    parser.add_argument("--online-algorithm", choices=sorted(ALGORITHMS), nargs="*", default=["cql", "calql"])
    parser.add_argument("--eval-every", type=int, default=2500)
    parser.add_argument("--online-eval-every", type=int, default=1000)
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default="f32")
    parser.add_argument("--n-backward", type=int, help="actions of a state that the critics' gradient goes back through")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "runs")
    arguments = parser.parse_args()

    th.set_num_threads(arguments.threads)
    task, algorithm = TASKS[arguments.task], ALGORITHMS[arguments.algorithm]
    name = f"{arguments.task}_{arguments.algorithm}_seed{arguments.seed}"
    arguments.results.mkdir(parents=True, exist_ok=True)
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    result_path, checkpoint = arguments.results / f"{name}.json", arguments.checkpoints / f"{name}.zip"

    dataset = task.load()
    env = make_vec(task, arguments.seed, training=True)
    eval_env = make_vec(task, 1000 + arguments.seed, training=False)
    result: dict[str, Any]
    if checkpoint.exists() and result_path.exists():
        result = json.loads(result_path.read_text())
        model = algorithm.load(checkpoint, env=env, device="cpu")
        print(f"{name}: goes on after {model._n_offline_steps} gradient steps")
    else:
        result = {
            "command": {key: str(value) for key, value in vars(arguments).items() if key not in ("results", "checkpoints")},
            "commit": commit(),
            "versions": {p: version(p) for p in ("torch", "stable-baselines3", "gymnasium", "mujoco", "numpy")},
            "python": platform.python_version(),
            "device": "CPU",
            "dataset": {
                "name": dataset.name,
                "transitions": len(dataset),
                "score": float(np.mean(dataset.normalized_score())),
            },
            "offline": [],
            "online": {},
        }
        options = copy.deepcopy(task.arguments) | {"precision": arguments.precision, "cql_n_backward": arguments.n_backward}
        if arguments.cql_alpha is not None:
            options["cql_alpha"] = arguments.cql_alpha
        if arguments.algorithm == "tqc":
            options |= AS_HOST
        result["arguments"] = options
        model = algorithm("MlpPolicy", env, seed=arguments.seed, device="cpu", **copy.deepcopy(options))

    def recorder(
        curve: list[dict[str, float]], path: Path | None
    ) -> Callable[[int, list[float], ConservativeActorCritic], None]:
        start = time.time()

        def record(step: int, returns: list[float], trained: ConservativeActorCritic) -> None:
            logged = trained.logger.name_to_value
            trained._record_metrics()
            curve.append(
                {
                    "step": step,
                    "score": float(np.mean(dataset.normalized_score(returns))),
                    "returns": returns,
                    "seconds": round(time.time() - start, 1),
                    **{key.removeprefix("train/"): round(v, 4) for key, v in logged.items() if key.startswith("train/")},
                }
            )
            result_path.write_text(json.dumps(result, indent=1))
            if path is not None:
                trained.save(path)
            print(
                f"{name} {step:>7} score {curve[-1]['score']:6.1f}  q_data {curve[-1].get('q_data', float('nan')):8.1f}",
                flush=True,
            )

        return record

    remaining = arguments.steps - model._n_offline_steps
    if remaining > 0:
        # The clock of callbacks starts with the call: keep evaluations on multiples of `eval_every`.
        callback = RecordEvaluations(
            eval_env,
            n_eval_episodes=arguments.eval_episodes,
            eval_freq=arguments.eval_every,
            record=recorder(result["offline"], checkpoint),
        )
        model.learn_offline(dataset, remaining, callback=callback, log_interval=0)

    for online_name in arguments.online_algorithm if arguments.online_steps else ():
        # Both start from the same offline checkpoint; Cal-QL adds its bound, the rest is equal.
        online_env = make_vec(task, arguments.seed, training=True)
        online = ALGORITHMS[online_name].load(checkpoint, env=online_env, device="cpu")
        online.set_random_seed(arguments.seed)
        online.set_offline_data(dataset)
        result["online"][online_name] = []
        callback = RecordEvaluations(
            eval_env,
            n_eval_episodes=arguments.eval_episodes,
            eval_freq=arguments.online_eval_every,
            record=recorder(result["online"][online_name], None),
        )
        online.learn(arguments.online_steps, callback=callback, log_interval=10**9)
    result["finished"] = time.strftime("%Y-%m-%d", time.gmtime())
    result_path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
