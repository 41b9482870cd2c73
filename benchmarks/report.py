"""Tables and figures of what `learning.py` found: last and best scores, value bias, gap, regret, each with an interval.

    pip install -r benchmarks/requirements.txt
    python benchmarks/report.py pendulum cartpole

Scores are means over the episodes of an evaluation; over seeds the mean, the interquartile mean and its 95 % interval by
rliable's stratified bootstrap [Agarwal et al. 2021]. *Best* is the best mean of any evaluation, with hindsight that nobody has
offline. Regret is the mean of ``1 - score / 100`` over the evaluations of the online phase [Cal-QL, Section 7]. Writes
``results/learning/<grid>.md`` and two figures, on light and on dark ground.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learning import GRIDS, RESULTS, Grid, cell_name
from tasks import TASKS

from cql_plugins.plots import THEMES

LABELS = {
    "cql": "CQL (ours, SB3)",
    "calql": "Cal-QL (ours, SB3)",
    "sac": "SAC (SB3)",
    "cql:cql_alpha=0.0": "without conservatism",
    "cql:cql_variant=pointwise": "Eq. 1 (ours, pointwise)",
    "d3rlpy-cql": "CQL (d3rlpy)",
    "d3rlpy-calql": "Cal-QL (d3rlpy)",
    "ours-d3rlpy-cql": "CQL (ours, d3rlpy)",
    "d3rlpy-iql": "IQL (d3rlpy)",
    "d3rlpy-bc": "BC (d3rlpy)",
    "d3rlpy-dqn": "double DQN (d3rlpy)",
}
COLOURS = {
    "light": ("#1f5fa8", "#c2410c", "#6b7280", "#7ab0e6", "#f2a67e", "#2f855a", "#a3489c", "#b7950b", "#111111"),
    "dark": ("#6cb2ff", "#ff9d66", "#a3acb8", "#3b6ea5", "#b0623a", "#68d391", "#d991d2", "#f0d060", "#ffffff"),
}
REPETITIONS = 5000


def read(grid: Grid, results: Path) -> dict[str, list[dict[str, Any]]]:
    """All finished runs by arm; an arm without one is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in grid.arms:
        paths = [results / grid.task / f"{cell_name(arm, seed)}.json" for seed in range(100)]
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        if finished := [run for run in runs if run.get("finished")]:
            found[arm] = finished
    return found


def interval(values: Sequence[float], of: str = "iqm") -> tuple[float, float, float]:
    """The interquartile mean (or the mean) and its 95 % interval, by rliable."""
    from rliable import library, metrics

    aggregate = {"iqm": metrics.aggregate_iqm, "mean": metrics.aggregate_mean}[of]
    scores = np.asarray(values, float).reshape(-1, 1)
    if len(scores) < 2:
        return float(scores.mean()), float("nan"), float("nan")
    state = np.random.get_state()  # noqa: NPY002 (rliable draws from NumPy's global generator, whatever it is given)
    np.random.seed(0)  # noqa: NPY002
    try:
        points, intervals = library.get_interval_estimates({"": scores}, lambda x: np.array([aggregate(x)]), reps=REPETITIONS)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return float(points[""][0]), float(intervals[""][0, 0]), float(intervals[""][1, 0])


def shown(values: Sequence[float], of: str = "iqm", digits: int = 1) -> str:
    """As text."""
    point, low, high = interval(values, of)
    return f"{point:.{digits}f}" if np.isnan(low) else f"{point:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def label(arm: str) -> str:
    name, _, options = arm.partition(":")
    plain = LABELS[name].partition(" (")[0]
    host = " (ours, d3rlpy)" if name.startswith("ours-d3rlpy") else " (d3rlpy)" if name.startswith("d3rlpy") else ""
    return LABELS.get(arm) or f"{plain}, {options.replace(',', ', ')}{host}"


def curve(runs: list[dict[str, Any]], name: str, phase: str = "offline") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, ``(n_seeds, n_steps)``."""
    points = [[(point["step"], point.get(name, np.nan)) for point in run[phase]] for run in runs]
    return np.array([step for step, _ in points[0]]), np.array([[value for _, value in one] for one in points], float)


def bias(run: dict[str, Any], at: int = -1) -> float:
    """Predicted minus real return. SAC's critic promises entropy, too; that is left out, since it has hardly learnt it yet."""
    point = run["offline"][at]
    return float(point["predicted"] - point["actual"]) if "predicted" in point else float("nan")


def tables(name: str, grid: Grid, found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    task = TASKS[grid.task]
    lines = [f"# {name}", "", f"`python benchmarks/learning.py {name}`, then `python benchmarks/report.py {name}`."]
    trained = sorted({f"{run['offline'][-1]['step']:,}" for runs in found.values() for run in runs})
    sizes = f"networks {' x '.join(map(str, task.net_arch))}, batches of {task.batch_size}"
    lines.append(f"{', '.join(trained)} gradient steps, {sizes}, {task.eval_episodes} episodes an evaluation.")
    head = [
        "",
        "seeds",
        "last, mean",
        "last, IQM [95 %]",
        "best, mean",
        "at step",
        "predicted minus real [95 %]",
        "Q data - uniform",
    ]
    head += ["best uniform - data", "minutes"]
    lines += ["", "Offline.", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, runs in found.items():
        steps, scores = curve(runs, "score")
        means = scores.mean(axis=0)
        best = int(means.argmax())
        row = [label(arm), str(len(runs)), f"{means[-1]:.1f}", shown(scores[:, -1]), f"{means[best]:.1f}", f"{steps[best]:,}"]
        if np.isnan(bias(runs[0])):
            row += ["-", "-", "-"]
        else:
            last = [run["offline"][-1] for run in runs]
            row.append(shown([bias(run) for run in runs], "mean"))
            row.append(f"{np.mean([point['q_data'] - point['q_random'] for point in last]):.2f}")
            row.append(f"{np.mean([point['q_random_max'] - point['q_data'] for point in last]):.2f}")
        row.append(f"{np.mean([sum(point['seconds'] for point in run['offline']) for run in runs]) / 60:.1f}")
        lines.append("| " + " | ".join(row) + " |")
    if online := with_online(found):
        steps = curve(next(iter(online.values())), "score", "online")[0]
        shown_steps = [step for step in steps if step]
        head = [
            "",
            "seeds",
            "at the switch",
            *(f"{step:,}" for step in shown_steps),
            "lowest after it",
            "last, IQM [95 %]",
            "regret [95 %]",
        ]
        lines += ["", "Online, scores after so many environment steps, means over seeds.", ""]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for arm, runs in online.items():
            scores = curve(runs, "score", "online")[1]
            row = [label(arm), str(len(runs)), *(f"{value:.1f}" for value in scores.mean(axis=0))]
            row += [f"{scores[:, 1:].mean(axis=0).min():.1f}", shown(scores[:, -1]), shown(regret(runs), "mean", 3)]
            lines.append("| " + " | ".join(row) + " |")
    commits = sorted({run["commit"] for runs in found.values() for run in runs})
    versions = next(iter(found.values()))[0]["versions"]
    lines += [
        "",
        "Score of the data: " + f"{task.score(list(task.load().episode_returns)):.1f}. Commits {', '.join(commits)}; ",
    ]
    lines[-1] += ", ".join(f"{package} {number}" for package, number in versions.items()) + ". Ours in "
    lines[-1] += ", ".join(
        sorted({run["precision"] for arm, runs in found.items() if arm.split(":")[0] in ("cql", "calql") for run in runs})
    )
    lines[-1] += ", the others in f32."
    return "\n".join(lines) + "\n"


def with_online(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Those runs that were fine-tuned, of the arms that have any."""
    tuned = {arm: [run for run in runs if "online" in run] for arm, runs in found.items()}
    return {arm: runs for arm, runs in tuned.items() if runs}


def regret(runs: list[dict[str, Any]]) -> list[float]:
    """Of each run's online phase."""
    return [float(np.mean([1 - point["score"] / 100 for point in run["online"][1:]])) for run in runs]


def style(theme: str) -> dict[str, Any]:
    """Settings of matplotlib."""
    ground = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    rc: dict[str, Any] = dict.fromkeys(names, ground["text"])
    rc |= {"figure.facecolor": ground["back"], "axes.facecolor": ground["back"], "savefig.facecolor": ground["back"]}
    return rc | {"font.size": 10.0, "axes.spines.top": False, "axes.spines.right": False}


def draw_weights(name: str, grid: Grid, found: dict[str, list[dict[str, Any]]], theme: str, path: Path) -> None:
    """Score, value bias and gap at the last evaluation against the weight: means, their intervals, and all seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ground, task = THEMES[theme], TASKS[grid.task]
    weights = {arm: float(arm.partition("=")[2]) for arm in found if arm.startswith("cql:cql_alpha=")}
    unit = f"return, discounted by {task.gamma:g}"
    panels: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("score of the policy's mode", "normalised score", lambda run: run["offline"][-1]["score"]),
        ("predicted minus real value", unit, bias),
        (
            "Q of the data minus uniform actions'",
            unit,
            lambda run: run["offline"][-1]["q_data"] - run["offline"][-1]["q_random"],
        ),
    )
    with mpl.rc_context(style(theme)):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.9), layout="constrained", dpi=130)
        for (title, quantity, of), axis in zip(panels, axes, strict=True):
            values = {weight: [of(run) for run in found[arm]] for arm, weight in weights.items()}
            points = np.array([interval(column, "mean") for column in values.values()])
            for weight, column in values.items():
                axis.plot([weight] * len(column), column, ".", color=COLOURS[theme][0], alpha=0.35, markersize=5)
            axis.fill_between(list(values), points[:, 1], points[:, 2], color=COLOURS[theme][0], alpha=0.2, linewidth=0)
            axis.plot(list(values), points[:, 0], "o-", color=COLOURS[theme][0], linewidth=2.0, markersize=4, label="CQL")
            for arm, colour in (("sac", 1), ("d3rlpy-bc", 5)):
                if arm in found and not np.isnan(level := float(np.mean([of_safe(of, run) for run in found[arm]]))):
                    axis.axhline(level, color=COLOURS[theme][colour], linestyle="--", linewidth=1.3, label=label(arm))
            axis.set_xscale("symlog", linthresh=0.1, linscale=0.5)
            axis.set_xticks(list(values), [f"{weight:g}" for weight in values])
            axis.minorticks_off()
            axis.set_xlim(left=-0.03)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel("weight, cql_alpha")
            axis.set_ylabel(quantity)
            axis.grid(alpha=0.2)
        axes[1].axhline(0.0, color=ground["text"], linewidth=0.7)
        n_seeds = sorted({len(found[arm]) for arm in weights})
        seeds = f"{n_seeds[0]}" if len(n_seeds) == 1 else f"{n_seeds[0]} to {n_seeds[-1]}"
        steps = next(iter(found.values()))[0]["offline"][-1]["step"]
        figure.suptitle(f"{grid.task}, {steps:,} gradient steps, {seeds} seeds: means, 95 % intervals, each seed", fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
        figure.savefig(path)
        plt.close(figure)


def of_safe(of: Callable[[dict[str, Any]], float], run: dict[str, Any]) -> float:
    """What a run without values (behaviour cloning) lacks is not a number."""
    try:
        return of(run)
    except KeyError:
        return float("nan")


def show_beside(axis: Any, largest: list[float], titles: dict[str, str]) -> None:
    """Keep curves readable beside one that is far larger than all others: logarithmic beyond them."""
    if len(largest) > 1 and largest[-1] > 50 * largest[-2] and axis.dataLim.ymax >= largest[-1]:
        digit = 10 ** np.floor(np.log10(largest[-2]))
        threshold = float(digit * np.ceil(largest[-2] / digit))
        axis.set_yscale("symlog", linthresh=threshold, linscale=2.0)
        powers = 10.0 ** np.arange(np.ceil(np.log10(threshold)), np.log10(largest[-1]) + 1)
        axis.set_yticks([-threshold, 0.0, threshold, *powers[powers > 2 * threshold]])
        axis.set_ylim(-1.2 * threshold, 1.5 * largest[-1])
        axis.yaxis.set_major_formatter("{x:,.0f}")
        titles["bias"] += f",\nlogarithmic beyond {threshold:,.0f}"


def draw(name: str, grid: Grid, found: dict[str, list[dict[str, Any]]], theme: str, path: Path) -> None:
    """Scores over gradient steps, values beside them, and the online phase where there is one: means and all seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ground = THEMES[theme]
    task, n_seeds = TASKS[grid.task], sorted({len(runs) for runs in found.values()})
    online = with_online(found)
    panels = [("score", "offline"), ("bias", "offline"), *([("score", "online")] if online else [])]
    titles = {"score": "normalised score", "bias": "predicted minus real return of the first action"}
    with mpl.rc_context(style(theme)):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", dpi=130)
        for (quantity, phase), axis in zip(panels, axes, strict=True):
            largest = []
            for arm, colour in zip(found, COLOURS[theme], strict=False):
                if (phase == "online" and arm not in online) or (quantity == "bias" and np.isnan(bias(found[arm][0]))):
                    continue
                runs = (found if phase == "offline" else online)[arm]
                if quantity == "bias":
                    steps = curve(runs, "score")[0]
                    values = np.array([[bias(run, at) for at in range(len(steps))] for run in runs])
                else:
                    steps, values = curve(runs, "score", phase)
                axis.plot(steps, values.T, color=colour, alpha=0.2, linewidth=0.8)
                axis.plot(steps, values.mean(axis=0), color=colour, linewidth=2.0, label=label(arm))
                largest.append(float(np.abs(values.mean(axis=0)).max()))
            if quantity == "bias":
                axis.axhline(0.0, color=ground["text"], linewidth=0.7)
                show_beside(axis, sorted(largest), titles)
            elif phase == "offline":
                data = task.score(list(task.load().episode_returns))
                axis.axhline(data, color=ground["text"], linestyle=":", linewidth=1.0, label=f"the data, {data:.0f}")
            axis.set_title(titles[quantity], fontsize=10, loc="left")
            axis.set_xlabel("gradient steps, offline" if phase == "offline" else "environment steps, online")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.grid(alpha=0.2)
        seeds = str(n_seeds[0]) if len(n_seeds) == 1 else f"{n_seeds[0]} to {n_seeds[-1]}"
        figure.suptitle(f"{grid.task}: means (thick) and each of {seeds} seeds", fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", choices=sorted(GRIDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.grid:
        grid = GRIDS[name]
        found = read(grid, arguments.results)
        if not found:
            raise SystemExit(f"{name}: no finished run under {arguments.results}. Run: python benchmarks/learning.py {name}")
        text = tables(name, grid, found)
        print(text)
        (arguments.results / f"{name}.md").write_text(text, encoding="utf-8")
        for theme in THEMES:
            (draw_weights if name.endswith("-weight") else draw)(
                name, grid, found, theme, arguments.results / f"{name}_{theme}.png"
            )


if __name__ == "__main__":
    main()
