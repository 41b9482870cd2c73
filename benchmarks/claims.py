"""Decide the papers' claims on what `learning.py` found: holds, does not hold, or undecided, each with figure and interval.

    python benchmarks/learning.py pendulum pendulum-weight pendulum-variants pendulum-reference cartpole halfcheetah-replay
    python benchmarks/claims.py

A claim is a difference between arms of the same seed (or a mean over seeds) with the side of 0 on which it should lie.
Intervals are Student's, of the mean over seeds: with three seeds a bootstrap's covers the truth in three cases of four, not in
95 %. How they decide is in `RULE`, which heads the table. Writes ``results/learning/claims.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from learning import GRIDS, RESULTS, WEIGHTS, Grid
from report import bias, read, shown
from scipy import stats

Runs = dict[str, list[dict[str, Any]]]
Quantity = Callable[[dict[str, Any]], float]
RULE = """*Holds*: the 95 % interval of the mean over seeds (Student's t) lies on the claimed side of 0. *Does not hold*: it lies on the other side. *Undecided*: 0 is inside. Where a claim names a margin in brackets,
-5 points take the place of 0: it holds where the whole interval is above, even if it is below 0. *Not settled*: values are still on their way, so that their level says nothing yet: during the last quarter of the
training the prediction came nearer to the real value by more than a tenth of what is left, or of what it has come from 0, where critics start.
"""  # noqa: E501 (a paragraph of Markdown)


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        source: Where the claim is from.
        text: What it says.
        task: On what.
        arm: Whose quantity.
        against: From which this arm's is subtracted, if any.
        quantity: Of one run.
        unit: Of the figure.
        positive: Whether the figure should be above 0.
        margin: What counts as no harm, for claims of that kind.
        of_level: Whether it is about how high the critic's values are, which takes training that is done.
    """

    source: str
    text: str
    task: str
    arm: str
    quantity: Quantity
    unit: str
    against: str | None = None
    positive: bool = True
    margin: float = 0.0
    of_level: bool = False

    def _measured(self, runs: list[dict[str, Any]]) -> dict[int, float]:
        """The quantity by seed; not all runs were fine-tuned online."""
        measured = {}
        for run in runs:
            try:
                measured[run["seed"]] = self.quantity(run)
            except KeyError as missing:
                if missing.args != ("online",):
                    raise
        return measured

    def decide(self, found: Runs) -> tuple[str, str, int]:
        """Verdict, figure and number of seeds."""
        own = self._measured(found.get(self.arm, []))
        others = self._measured(found.get(self.against, [])) if self.against else dict.fromkeys(own, 0.0)
        seeds = sorted(own.keys() & others.keys())
        if len(seeds) < 2:
            return "not run", "-", len(seeds)
        point, low, high = interval([own[seed] - others[seed] for seed in seeds])
        sign = 1 if self.positive else -1
        near, far = sorted((sign * low, sign * high))
        verdict = "holds" if near > -self.margin else "does not hold" if far < -self.margin else "undecided"
        if self.of_level and any(is_on_its_way(found[arm]) for arm in (self.arm, self.against) if arm):
            verdict = "not settled"
        return verdict, f"{point:.2f} [{low:.2f}, {high:.2f}] {self.unit}", len(seeds)


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval by Student's t."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def is_on_its_way(runs: list[dict[str, Any]]) -> bool:
    """Whether predictions still came nearer to the real values in the last quarter, on average over seeds; see `RULE`."""
    points = [run["offline"] for run in runs]
    at = round(0.75 * len(points[0])) - 1
    before, now = (float(np.mean([one[index]["predicted"] for one in points])) for index in (at, -1))
    real = float(np.mean([one[-1]["actual"] for one in points]))
    step = (now - before) * np.sign(real - now)
    is_between = min(0.0, real) < now < max(0.0, real)
    return bool(step > 0.1 * abs(real - now) or (is_between and step > 0.1 * abs(now)))


def last(name: str, phase: str = "offline") -> Quantity:
    """The value at the last evaluation."""
    return lambda run: float(run[phase][-1][name])


def gap(run: dict[str, Any], at: int = -1) -> float:
    """How far uniform actions are below the data's."""
    return float(run["offline"][at]["q_data"] - run["offline"][at]["q_random"])


def delta(run: dict[str, Any]) -> float:
    """How far the best of ten uniform actions is above the data's."""
    return float(run["offline"][-1]["q_random_max"] - run["offline"][-1]["q_data"])


def dip(run: dict[str, Any]) -> float:
    """How far the score falls below that at the switch, at its lowest, when fine-tuning starts; 0 where it only rises."""
    scores = [point["score"] for point in run["online"]]
    return float(scores[0] - min(scores))


def relative_bias(run: dict[str, Any]) -> float:
    """How far Q is from the return that it predicts, in units of it."""
    return abs(bias(run)) / max(abs(run["offline"][-1]["actual"]), 1e-9)


LARGER = ("halfcheetah-replay", "halfcheetah-medium-expert", "door-human", "pen-expert")
"""Tasks of published data sets."""
NEWER = {
    "LayerNorm critics (Ball et al., 2023)": "cql:layer_norm=True",
    "ten critics, two in the target (Chen et al., 2021),": "cql:n_critics=10,n_target_critics=2",
    "batches of 1,024 instead of 128 (Nikulin et al., 2022)": "cql:batch_size=1024",
    "batches of 1,024, twice the critics' rate and LayerNorm": "cql:batch_size=1024,layer_norm=True,learning_rate=2e-3",
}
"""What newer work adds to critics, as arms of the grid."""


def _beside_d3rlpy(task: str, text: str, arm: str) -> Claim:
    return Claim("this project", text, task, arm, last("score"), "points", against="d3rlpy-cql", margin=5.0)


def claims() -> list[Claim]:
    """All that are tested."""
    found = []
    for task in ("bridge", "pendulum", "pointmaze", *LARGER):
        found += [
            Claim(
                "CQL, Table 4", "CQL(H) under-estimates its policy", task, "cql", bias, "reward", positive=False, of_level=True
            ),
            Claim("CQL, Table 4", "SAC offline over-estimates its policy", task, "sac", bias, "reward", of_level=True),
            Claim(
                "CQL, Figure 2", "the gap widens from the first evaluation on", task, "cql", lambda r: gap(r) - gap(r, 0), "Q"
            ),
            Claim("CQL, Figure 2", "the best uniform action is below the data's", task, "cql", delta, "Q", positive=False),
            Claim("CQL, Figure 2", "and not so for SAC", task, "sac", delta, "Q"),
        ]
    for task in ("bridge", "pendulum"):
        text, eq_1 = "Eq. 1 under-estimates more than CQL(H)", "cql:cql_variant=pointwise"
        found.append(Claim("CQL, Table 4", text, task, eq_1, bias, "reward", against="cql", positive=False))
    for task in ("bridge", "pendulum", "cartpole", "pointmaze", *LARGER):
        plain = ("itself with weight 0", "cql:cql_alpha=0.0") if task == "cartpole" else ("SAC", "sac")
        found += [
            Claim("CQL, Table 1", f"CQL is above {other}", task, "cql", last("score"), "points", against=arm)
            for other, arm in (("BC", "d3rlpy-bc"), plain)
        ]
        found.append(_beside_d3rlpy(task, "ours is not below d3rlpy's CQL (5 points)", "cql"))
    found.append(_beside_d3rlpy("bridge-long", "after twice the steps ours is not below d3rlpy's CQL (5 points)", "cql"))
    for task in ("bridge", "bridge-long", "pendulum", "door-human"):
        text = "with the mode in the target ours is not below d3rlpy's CQL (5 points)"
        found.append(_beside_d3rlpy(task, text, "cql:mode_q_backup=True"))
    text = "with d3rlpy's networks and the mode ours is not below d3rlpy's CQL (5 points)"
    found.append(_beside_d3rlpy("bridge", text, "ours-d3rlpy-cql:mode_q_backup=True"))
    for task in ("bridge", "pendulum", "halfcheetah-replay"):
        text = "with a drawn backward pass CQL is not below the exact one (5 points)"
        found.append(Claim("this project", text, task, "cql:cql_n_backward=31", last("score"), "points", "cql", margin=5.0))
    for text, arm in NEWER.items():
        found.append(Claim("newer work", f"{text} improve CQL", "bridge", arm, last("score"), "points", against="cql"))
    source = "CQL, Section 5"
    none, little, much = (f"cql:cql_alpha={weight}" for weight in (0.0, 0.1, 50.0))
    one = "cql"  # both tasks' own weight
    for task in ("bridge", "pendulum"):
        found += [
            Claim(source, "a weight of 0 over-estimates", task, none, bias, "reward", of_level=True),
            Claim(source, "a weight of 0.1 over-estimates", task, little, bias, "reward", of_level=True),
            Claim(source, "a weight of 50 under-estimates", task, much, bias, "reward", positive=False, of_level=True),
            Claim(source, "a weight of 0 is worse than 1", task, none, last("score"), "points", one, positive=False),
            Claim(source, "a weight of 50 is worse than 1", task, much, last("score"), "points", one, positive=False),
            Claim(
                source,
                "a weight of 50 is no better than BC (5 points)",
                task,
                much,
                last("score"),
                "points",
                "d3rlpy-bc",
                positive=False,
                margin=5.0,
            ),
        ]
    plain = ("Cal-QL", "calql")
    mean_backup = ("Cal-QL without the target's maximum", "calql:max_q_backup=False")
    online = [("bridge", plain), ("bridge", mean_backup), ("cartpole", plain)]
    online += [("pointmaze", plain), ("pointmaze", mean_backup)]
    for task, (name, arm) in online:
        found += [
            Claim("Cal-QL, Figure 1", f"{name} dips less", task, "cql", dip, "points", against=arm),
            Claim(
                "Cal-QL, Figure 1",
                f"{name} has Q nearer the right scale",
                task,
                "cql",
                relative_bias,
                "x",
                against=arm,
                of_level=True,
            ),
        ]
    for floor in ("50.0", "200.0"):
        found.append(
            Claim(
                "Cal-QL, Section 5",
                f"a floor {float(floor):.0f} above the returns does no harm (5 points)",
                "pendulum",
                f"calql:floor={floor}",
                last("score"),
                "points",
                against="calql",
                margin=5.0,
            )
        )
    for tail in ("zero", "none"):
        found.append(
            Claim(
                "Cal-QL, Section 7.3",
                f"bootstrapped tails are no worse than {tail!r} (5 points)",
                "pendulum",
                "calql",
                last("score"),
                "points",
                against=f"calql:return_tail={tail}",
                margin=5.0,
            )
        )
    return found


def decide_all(results: Path) -> str:
    """Markdown."""
    arms: dict[str, tuple[str, ...]] = {}
    for grid in GRIDS.values():
        arms[grid.task] = tuple(dict.fromkeys((*arms.get(grid.task, ()), *grid.arms)))
    found = {task: read(Grid(task, names), results) for task, names in arms.items()}
    lines = ["# The papers' claims", "", "`python benchmarks/claims.py`", "", RULE]
    lines += ["| source | claim | task | verdict | figure [95 %] | seeds |", "|---|---|---|---|---:|---:|"]
    missing: dict[str, int] = {}
    for claim in claims():
        verdict, figure, seeds = claim.decide(found[claim.task])
        if verdict == "not run":
            missing[claim.task] = missing.get(claim.task, 0) + 1
            continue
        lines.append(f"| {claim.source} | {claim.text} | {claim.task} | {verdict} | {figure} | {seeds} |")
    if missing:
        lines += ["", "Not run with two seeds yet: " + ", ".join(f"{count} on {task}" for task, count in missing.items()) + "."]
    for task in ("bridge", "pendulum"):
        by_weight = {weight: runs for weight in WEIGHTS if (runs := found[task].get(f"cql:cql_alpha={weight}"))}
        if by_weight:
            lines += ["", f"The weight, {task}: mean and 95 % interval over seeds at the last evaluation.", ""]
            lines += ["| weight | seeds | score | predicted minus real | Q data - uniform |", "|---|---:|---:|---:|---:|"]
        for weight, runs in by_weight.items():
            row = (
                f"{weight:g}",
                str(len(runs)),
                *(shown([of(run) for run in runs], "mean") for of in (last("score"), bias, gap)),
            )
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    text = decide_all(arguments.results)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "claims.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
