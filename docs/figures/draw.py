"""Draw the pictures of docs/data.md, each for a light and for a dark page.

    python docs/figures/draw.py [--folder docs/figures] [--format svg]

The returns-to-go are computed by the library, not drawn by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cql_plugins.plots import THEMES
from cql_plugins.returns import ReturnTail, returns_to_go

Colours = dict[str, str]
Point = tuple[float, float]

STEPS = 3
GAMMA = 0.9


def canvas(width: float, height: float, columns: float, rows: float) -> tuple[Figure, Axes]:
    """Make an empty figure whose units are columns and rows, counted from the top left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, text: str, colour: str, size: Point = (0.72, 0.62), dashed: bool = False) -> None:
    """Draw a labelled box around a point."""
    width, height = size
    style = "round,pad=0,rounding_size=0.08"
    edge = FancyBboxPatch((x - width / 2, y - height / 2), width, height, style, facecolor="none", edgecolor=colour)
    edge.set(linewidth=1.4, linestyle="--" if dashed else "-")
    axes.add_patch(edge)
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes: Axes, start: Point, end: Point, colour: str) -> None:
    """Draw an arrow from one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1.1, shrinkA=0))


# Alignment ------------------------------------------------------------------------------------------------------------


def alignment(colours: Colours) -> Figure:
    """Two episodes of three steps: the log, its transitions, and the transitions of arrays that were joined first."""
    figure, axes = canvas(8.0, 5.6, 10.1, 9.7)
    first, second, grey = colours["data"], colours["policy"], colours["random"]

    def title(y: float, text: str) -> None:
        axes.text(0.05, y, text, fontweight="bold", va="center")

    def row(y: float, name: str) -> None:
        axes.text(1.55, y, name, ha="right", va="center", color=grey)

    title(0.35, "The log: T steps, T + 1 observations")
    row(1.15, "observations")
    row(1.95, "actions, rewards")
    for episode, (prime, colour) in enumerate((("", first), ("'", second))):
        left = 2.15 + 4.4 * episode
        for t in range(STEPS + 1):
            box(axes, left + t, 1.15, f"$o{prime}_{t}$", colour)
        for t in range(STEPS):
            box(axes, left + t + 0.5, 1.95, f"$a{prime}_{t}, r{prime}_{t}$", colour, (0.86, 0.62))
        end = "terminated" if episode == 0 else "cut by a time limit"
        axes.text(left + 1.5, 2.55, end, ha="center", va="center", color=grey, fontsize=8)

    def transitions(
        top: float, columns: list[tuple[str, str, str]], edges: list[tuple[str, str, str]], wrong: set[int]
    ) -> None:
        names = ("observation", "action, reward", "next observation")
        for i, (texts, borders) in enumerate(zip(columns, edges, strict=True)):
            x = 2.5 + 1.2 * i + (0.8 if i >= STEPS else 0.0)
            for j, (text, border) in enumerate(zip(texts, borders, strict=True)):
                dashed = text in ("0", "dropped")
                box(axes, x, top + 0.72 * j, text, border, (1.0, 0.6), dashed=dashed)
            mark = "\u2717" if i in wrong else "\u2713"
            axes.text(x, top + 2.1, mark, ha="center", va="center", color=second if i in wrong else first, fontsize=11)
        for j, name in enumerate(names):
            row(top + 0.72 * j, name)

    o, a, p, b = ([f"${letter}_{t}$" for t in range(STEPS + 1)] for letter in ("o", "a", "o'", "a'"))
    a = [f"$a_{t}, r_{t}$" for t in range(STEPS)]
    b = [f"$a'_{t}, r'_{t}$" for t in range(STEPS)]
    title(3.2, "Six transitions, as they happened")
    right = [(o[t], a[t], o[t + 1]) for t in range(STEPS)] + [(p[t], b[t], p[t + 1]) for t in range(STEPS)]
    transitions(3.95, right, [(first,) * 3] * STEPS + [(second,) * 3] * STEPS, set())

    title(6.65, "Observations joined first, then cut where the actions end")
    shifted = [
        (o[0], a[0], o[1]), (o[1], a[1], o[2]), (o[2], a[2], "0"),
        (o[3], b[0], p[0]), (p[0], b[1], p[1]), (p[1], b[2], "dropped"),
    ]  # fmt: skip
    edges = [(first,) * 3, (first,) * 3, (first, first, grey)]
    edges += [(first, second, second), (second,) * 3, (second, second, grey)]
    transitions(7.4, shifted, edges, {3, 4, 5})
    return figure


# Returns-to-go --------------------------------------------------------------------------------------------------------

LENGTH = 12
VALUE = -6.0
"""What the target critics say of the last observation, for the bootstrap tail."""


def returns(colours: Colours) -> Figure:
    """Returns-to-go of an episode of failures that a time limit cut, and of one that reached its goal."""
    figure = Figure(figsize=(8.0, 3.5), layout="constrained")
    cut, ended = figure.subplots(1, 2, sharey=True)
    t = np.arange(LENGTH)
    failures, last = np.full(LENGTH, -1.0), t == LENGTH - 1
    nothing = np.zeros(LENGTH, dtype=bool)

    def of(rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, tail: ReturnTail) -> np.ndarray:
        values = [VALUE] * int(truncated.sum())
        return returns_to_go(
            rewards,
            terminated,
            truncated,
            GAMMA,
            tail,
            failure_reward=-1.0,
            tail_values=values if tail == "bootstrap" else None,
        )

    lines: tuple[tuple[ReturnTail, str, str, str, Point], ...] = (
        ("zero", colours["policy"], "--", "zero: nothing follows", (-0.1, -4.7)),
        ("bootstrap", colours["random"], "-.", f"bootstrap: $V(o_{{12}})={VALUE:g}$ follows", (4.6, -9.3)),
        ("sparse", colours["data"], "-", "sparse: failure goes on for ever", (-0.1, -10.95)),
    )
    for tail, colour, style, label, place in lines:
        cut.plot(t, of(failures, nothing, last, tail), style, color=colour, marker="o", markersize=3.5, linewidth=1.5)
        cut.text(*place, label, color=colour)
    assert np.all(of(failures, nothing, last, "none") == -np.inf)
    cut.text(-0.1, -12.2, "none: $-\\infty$ at every step, no bound", color=colours["text"])
    cut.set_title(f"cut by a time limit: {LENGTH} rewards of $-1$", fontsize=9.5, loc="left")

    reached = np.where(last, 0.0, failures)
    same = [of(reached, last, nothing, tail) for tail in ("zero", "sparse", "none", "bootstrap")]
    assert all(np.array_equal(same[0], other) for other in same)
    ended.plot(t, same[0], color=colours["data"], marker="o", markersize=3.5, linewidth=1.5)
    ended.text(2.2, -8.0, "all four tails", color=colours["data"])
    ended.set_title(f"terminated: {LENGTH - 1} rewards of $-1$, then 0 at the goal", fontsize=9.5, loc="left")
    cut.set_ylabel(f"return-to-go $G_t$, discount {GAMMA:g}")
    for axes in (cut, ended):
        axes.set(xlim=(-0.6, LENGTH - 0.4), ylim=(-12.7, 0.8), xlabel="step t")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# What goes where ------------------------------------------------------------------------------------------------------


def fields(colours: Colours) -> Figure:
    """The dataset's fields, the columns of an SB3 replay buffer, and what a batch has of them."""
    figure, axes = canvas(8.4, 5.0, 14.0, 9.6)
    blue, orange, grey = colours["data"], colours["policy"], colours["random"]
    left, middle, right = 1.75, 7.0, 12.2
    wide = (3.3, 0.86)
    for x, text in ((left, "OfflineDataset"), (middle, "SB3 replay buffer"), (right, "a batch")):
        axes.text(x, 0.4, text, ha="center", va="center", fontweight="bold")
    axes.text(left, 1.0, "episode after episode", ha="center", va="center", color=grey, fontsize=8)
    axes.text(middle, 1.0, "one row a step, unnormalised", ha="center", va="center", color=grey, fontsize=8)
    axes.text(right, 1.0, "what is trained on", ha="center", va="center", color=grey, fontsize=8)

    sources = {"observations": 2.2, "actions": 3.9, "rewards": 5.1, "truncations": 6.3, "terminations": 7.5}
    targets = {
        "observations": 1.75, "next_observations": 2.75, "actions": 3.9, "rewards": 5.1,
        "timeouts": 6.3, "dones": 7.5, "returns_to_go": 8.8,
    }  # fmt: skip
    batch = {
        "observations": 1.75,
        "next_observations": 2.75,
        "actions": 3.9,
        "rewards": 5.1,
        "dones": 6.9,
        "returns_to_go": 8.8,
    }
    for name, y in sources.items():
        box(axes, left, y, name, blue, wide)
    for name, y in targets.items():
        box(axes, middle, y, name, orange if name in ("actions", "dones", "timeouts") else blue, wide)
    for name, y in batch.items():
        box(axes, right, y, name, orange if name == "dones" else blue, wide)

    def link(start: Point, end: Point, text: str = "", above: float = -0.22) -> None:
        arrow(axes, (start[0] + wide[0] / 2, start[1]), (end[0] - wide[0] / 2, end[1]), grey)
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + above, text, ha="center", va="center", fontsize=7.5)

    link((left, 2.2), (middle, 1.75), "$o_0 \\ldots o_{T-1}$", -0.32)
    link((left, 2.2), (middle, 2.75), "$o_1 \\ldots o_T$", 0.38)
    link((left, 3.9), (middle, 3.9), "scaled to [-1, 1]")
    link((left, 5.1), (middle, 5.1), "as they are")
    link((left, 6.3), (middle, 6.3))
    link((left, 6.3), (middle, 7.35))
    link((left, 7.5), (middle, 7.5), "either of the two", 0.25)
    axes.text(left, 8.8, "rewards, both flags,\ngamma, return_tail", ha="center", va="center", fontsize=8)
    arrow(axes, (left + 1.4, 8.8), (middle - wide[0] / 2, 8.8), grey)
    axes.text((left + middle) / 2 - 0.1, 8.55, "summed once", ha="center", va="center", fontsize=7.5)
    for name in ("observations", "next_observations"):
        link((middle, targets[name]), (right, batch[name]), "VecNormalize")
    link((middle, 3.9), (right, 3.9))
    link((middle, 5.1), (right, 5.1), "VecNormalize")
    link((middle, 6.3), (right, 6.75))
    link((middle, 7.5), (right, 7.05))
    axes.text(right, 7.6, "1 only where terminated", ha="center", va="center", fontsize=7.5)
    link((middle, 8.8), (right, 8.8), "VecNormalize")
    return figure


FIGURES: dict[str, Callable[[Colours], Figure]] = {"alignment": alignment, "returns": returns, "fields": fields}


def draw(folder: Path, suffix: str) -> list[Path]:
    """Write every figure for both themes.

    Args:
        folder: Where to.
        suffix: ``svg`` or ``png``.

    Returns:
        The files.
    """
    written = []
    for theme, colours in THEMES.items():
        text = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colours["text"])
        fixed = {
            "font.size": 9.0,
            "mathtext.fontset": "dejavusans",
            "svg.hashsalt": "cql-plugins",
            "axes.titlecolor": colours["text"],
        }
        # A picture to look at needs a ground; on a page it has the page's.
        ground = {"savefig.facecolor": colours["back"], "axes.facecolor": colours["back"]} if suffix == "png" else {}
        with mpl.rc_context({**text, **fixed, **ground}):  # type: ignore[arg-type]
            for name, make in FIGURES.items():
                path = folder / f"{name}-{theme}.{suffix}"
                make(colours).savefig(
                    path, transparent=suffix == "svg", dpi=110, metadata={"Date": None} if suffix == "svg" else None
                )
                written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    print(*draw(options.folder, options.format), sep="\n")
