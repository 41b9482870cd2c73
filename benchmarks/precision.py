"""What precision and the drawn backward pass do to learning: tables, and a figure of score, Q of the data and gap.

    out=benchmarks/results/precision; run="python benchmarks/train.py halfcheetah-replay --steps 20000 --seed 0"
    $run --precision f32 --results $out/f32
    $run --precision bf16 --results $out/bf16
    $run --n-backward 31 --results $out/drawn
    python benchmarks/precision.py

and the other seeds. An arm is a folder; runs that are not there are left out.
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
PANELS = {"score": "normalised score", "q_data": "Q of the data", "cql_gap": "conservative gap"}
COLOURS = ("#4477aa", "#ee6677", "#228833")


def read(results: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All curves, by arm and seed."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm in ARMS:
        for path in sorted((results / arm).glob("*.json")):
            result = json.loads(path.read_text())
            curves.setdefault(arm, {})[result["command"]["seed"]] = result["offline"]
    return curves


def draw(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path, data_score: float) -> None:
    """One panel a quantity: each seed thin, the mean of the steps that all seeds reached thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.8), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for (arm, by_seed), colour in zip(curves.items(), COLOURS, strict=False):
            for curve in by_seed.values():
                axis.plot([p["step"] for p in curve], [p[name] for p in curve], color=colour, alpha=0.35, linewidth=0.9)
            steps = sorted(set.intersection(*({p["step"] for p in curve} for curve in by_seed.values())))
            means = [np.mean([p[name] for curve in by_seed.values() for p in curve if p["step"] == step]) for step in steps]
            axis.plot(steps, means, color=colour, linewidth=2.2, label=f"{ARMS[arm]}, seeds {', '.join(sorted(by_seed))}")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("gradient steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].axhline(data_score, color="#666666", linestyle=":", label=f"the data, {data_score:.1f}")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    curves = read(arguments.results)
    if not curves:
        raise SystemExit(f"No results under {arguments.results}: see --help for the commands that make them.")
    for arm, by_seed in curves.items():
        for name, label in PANELS.items():
            renamed = {seed: [{"step": p["step"], "score": p[name]} for p in curve] for seed, curve in by_seed.items()}
            table(f"{ARMS[arm]}: {label}", renamed)
    some = next(iter(arguments.results.glob("*/*.json")))
    draw(curves, arguments.results / "learning.png", json.loads(some.read_text())["dataset"]["score"])


if __name__ == "__main__":
    main()
