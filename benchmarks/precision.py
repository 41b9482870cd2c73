"""What precision and the drawn backward pass do to learning: tables, and a figure of score, Q of the data and gap.

    out=benchmarks/results/precision; run="python benchmarks/train.py halfcheetah-replay --steps 20000 --seed 0"
    $run --precision f32 --results $out/f32
    $run --precision bf16 --results $out/bf16
    $run --n-backward 31 --results $out/drawn
    python benchmarks/precision.py

and the other seeds; `halfcheetah-medium-expert --steps 100000 --eval-every 5000 --precision bf16` is the long run. An arm is a
folder; runs that are not there are left out. An evaluation is of five episodes, in which the cheetah now and then falls on its
back: `--checkpoints runs/f32 runs/bf16` plays 50 with each trained policy, to tell the precision from the falls.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from summarize import table

RESULTS = Path(__file__).resolve().parent / "results" / "precision"
ARMS = {"f32": "float32", "bf16": "bfloat16 hidden layers", "drawn": "float32, drawn backward pass"}
TASKS = ("halfcheetah-replay", "halfcheetah-medium-expert")
PANELS = {"score": "normalised score", "q_data": "Q of the data", "cql_gap": "conservative gap"}
COLOURS = ("#4477aa", "#ee6677", "#228833")


Curves = dict[str, dict[str, list[dict[str, Any]]]]


def read(results: Path, task: str) -> Curves:
    """All curves of a task, by arm and seed."""
    curves: Curves = {}
    for arm in ARMS:
        for path in sorted((results / arm).glob(f"{task}_*.json")):
            result = json.loads(path.read_text())
            curves.setdefault(arm, {})[result["command"]["seed"]] = result["offline"]
    return curves


def draw(by_task: dict[str, Curves], path: Path, data_scores: dict[str, float]) -> None:
    """One row a task, one panel a quantity: each seed thin, the mean of the steps that all seeds reached thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, rows = plt.subplots(
        len(by_task), len(PANELS), figsize=(12, 3.8 * len(by_task)), layout="constrained", squeeze=False
    )
    for (task, curves), axes in zip(by_task.items(), rows, strict=True):
        for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
            for arm, colour in zip(ARMS, COLOURS, strict=True):
                by_seed = curves.get(arm, {})
                for curve in by_seed.values():
                    axis.plot([p["step"] for p in curve], [p[name] for p in curve], color=colour, alpha=0.35, linewidth=0.9)
                if by_seed:
                    steps = sorted(set.intersection(*({p["step"] for p in curve} for curve in by_seed.values())))
                    points = [p for curve in by_seed.values() for p in curve]
                    seeds = f"seed{'s' * (len(by_seed) > 1)} {', '.join(sorted(by_seed))}"
                    means = [np.mean([p[name] for p in points if p["step"] == step]) for step in steps]
                    axis.plot(steps, means, color=colour, linewidth=2.2, label=f"{ARMS[arm]}, {seeds}")
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_xlabel("gradient steps")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0].axhline(data_scores[task], color="#666666", linestyle=":", label=f"the data, {data_scores[task]:.1f}")
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
        axes[0].legend(fontsize=8)
        axes[0].set_title(task, loc="left", fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")


def play(folders: list[Path], episodes: int) -> None:
    """Score the trained policies over more episodes than an evaluation has."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from tasks import TASKS as SETS

    from cql_plugins.sb3 import CQL

    task = SETS[TASKS[0]]
    for folder in folders:
        for path in sorted(folder.glob(f"{TASKS[0]}_*.zip")):
            env = make_vec_env(task.make_env, seed=20_000)
            model = CQL.load(path, device="cpu")
            returns, _ = evaluate_policy(model, env, episodes, return_episode_rewards=True)
            scores = np.array([task.score([value]) for value in returns])
            error, low = scores.std(ddof=1) / np.sqrt(episodes), (scores < 15.0).sum()
            shown = f"mean {scores.mean():.1f} +- {error:.1f}, median {np.median(scores):.1f}, {low} of {episodes} below 15"
            print(f"{folder.name} {path.stem} after {model._n_offline_steps:,}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--checkpoints", type=Path, nargs="*", help="folders of train.py's checkpoints: play with these alone")
    parser.add_argument("--episodes", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.checkpoints:
        play(arguments.checkpoints, arguments.episodes)
        return
    by_task = {task: curves for task in TASKS if (curves := read(arguments.results, task))}
    if not by_task:
        raise SystemExit(f"No results under {arguments.results}: see --help for the commands that make them.")
    data_scores = {}
    for task, curves in by_task.items():
        for arm, by_seed in curves.items():
            for name, label in PANELS.items():
                renamed = {seed: [{"step": p["step"], "score": p[name]} for p in curve] for seed, curve in by_seed.items()}
                table(f"{task}, {ARMS[arm]}: {label}", renamed)
        some = next(iter(arguments.results.glob(f"*/{task}_*.json")))
        data_scores[task] = json.loads(some.read_text())["dataset"]["score"]
    draw(by_task, arguments.results / "learning.png", data_scores)


if __name__ == "__main__":
    main()
