"""Print the curves of `results/*.json` as Markdown tables: mean over seeds, and each seed.

python benchmarks/summarize.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def table(title: str, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Print one row a seed, one column an evaluation, and the mean of the steps that all seeds reached."""
    steps = sorted({point["step"] for curve in curves.values() for point in curve})
    print(f"\n{title}\n\n| | " + " | ".join(f"{step:,}" for step in steps) + " |\n|---|" + "---:|" * len(steps))
    scores: dict[int, list[float]] = defaultdict(list)
    for seed, curve in sorted(curves.items()):
        by_step = {point["step"]: point["score"] for point in curve}
        for step, score in by_step.items():
            scores[step].append(score)
        print(f"| seed {seed} | " + " | ".join(f"{by_step[s]:.1f}" if s in by_step else "" for s in steps) + " |")
    if len(curves) > 1:
        means = [f"{sum(scores[s]) / len(scores[s]):.1f}" if len(scores[s]) == len(curves) else "" for s in steps]
        print("| **mean** | " + " | ".join(means) + " |")


def main() -> None:
    runs: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        command = result["command"]
        task, seed = f"{command['task']}, {command['algorithm']}", command["seed"]
        runs[task]["offline gradient steps"][seed] = result["offline"]
        for algorithm, curve in result["online"].items():
            runs[task][f"then environment steps with {algorithm}"][seed] = curve
    for task, phases in runs.items():
        for phase, curves in phases.items():
            table(f"{task}: {phase}", curves)


if __name__ == "__main__":
    main()
