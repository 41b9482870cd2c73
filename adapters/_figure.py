"""A data set in one picture."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins._files import whole_file
from cql_plugins.adapters.report import number, saturation
from cql_plugins.plots import themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cql_plugins.adapters.dataset import OfflineDataset

_BINS = 40
_COUNTS = ("episodes", "episode", "steps", "step of the episode", "action", "dimension of the action")
"""Names of axes that have whole numbers."""
_END_COLOURS = {"terminated": "policy", "truncated": "data", "no flag": "random"}


def draw(dataset: "OfflineDataset", path: "str | PathLike[str]", *, gamma: float, theme: str = "light") -> "Figure":
    """Draw returns, lengths, rewards, actions at their bounds and returns-to-go; written whole or not at all.

    Args:
        dataset: The data set.
        path: PNG, SVG or PDF, by its suffix.
        gamma: Discount factor of the returns-to-go.
        theme: `light` or `dark`.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: Without matplotlib.
        OSError: If the disk does not take it.
    """
    with themed(theme) as colours:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.4, 6.2), layout="constrained", dpi=150)
        axes = figure.subplots(2, 3).ravel()
        _draw_returns(axes[0], dataset, colours)
        _draw_episodes(axes[1], dataset, colours)
        _draw_lengths(axes[2], dataset, colours)
        _draw_rewards(axes[3], dataset, colours)
        _draw_actions(axes[4], dataset, colours)
        _draw_returns_to_go(axes[5], dataset, gamma, colours)
        for axis in axes:
            axis.grid(alpha=0.2)
            axis.set_axisbelow(True)
        title = dataset.name or dataset.env_id or "data set"
        figure.suptitle(f"{title}: {dataset.n_episodes:,} episodes, {len(dataset):,} transitions", fontsize=12)
        with whole_file(path) as file:
            figure.savefig(file, format=Path(path).suffix[1:].lower())
    return figure


def _name(axis: "Axes", title: str, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=10, loc="left", pad=18)  # room for a legend below, where no data is
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=(x if side is axis.xaxis else y) in _COUNTS))
        side.set_major_formatter("{x:,.10g}")


def _legend(axis: "Axes") -> None:
    axis.legend(
        fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderpad=0, columnspacing=1.2
    )


def _histogram(axis: "Axes", values: npt.NDArray[Any], colours: dict[str, str], **options: Any) -> None:
    values = np.asarray(values, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if low == high:  # One bar that says so, instead of one of a width out of the air.
        axis.bar([0], [len(values)], width=0.4, color=colours["data"], **options)
        axis.set_xticks([0], [number(low)])
        axis.set_xlim(-1, 1)
    else:
        axis.hist(values, bins=min(_BINS, max(10, len(values) // 5)), range=(low, high), color=colours["data"], **options)


def _draw_returns(axis: "Axes", dataset: "OfflineDataset", colours: dict[str, str]) -> None:
    _name(axis, "return of an episode", "undiscounted return, units of the reward", "episodes")
    _histogram(axis, dataset.episode_returns, colours)


def _draw_episodes(axis: "Axes", dataset: "OfflineDataset", colours: dict[str, str]) -> None:
    """In the order of the data, which shows parts that were joined, and a replay that gets better."""
    _name(axis, "in the order of the data", "episode", "undiscounted return")
    terminated = dataset.terminations[dataset.offsets[1:] - 1]
    unflagged = dataset.unflagged_episodes
    ends = {"terminated": terminated, "truncated": ~terminated & ~unflagged, "no flag": unflagged}
    for label, chosen in ends.items():
        if chosen.any():
            at = np.flatnonzero(chosen)
            shown = f"{label} ({len(at):,})"
            axis.plot(at, dataset.episode_returns[at], ".", markersize=4, color=colours[_END_COLOURS[label]], label=shown)
    _legend(axis)


def _draw_lengths(axis: "Axes", dataset: "OfflineDataset", colours: dict[str, str]) -> None:
    _name(axis, "length of an episode", "steps", "episodes")
    _histogram(axis, dataset.episode_lengths, colours)


def _draw_rewards(axis: "Axes", dataset: "OfflineDataset", colours: dict[str, str]) -> None:
    from matplotlib.ticker import NullFormatter

    low, high = float(dataset.rewards.min()), float(dataset.rewards.max())
    _name(axis, f"rewards, {number(low)} .. {number(high)}", "reward of a step", "steps (log scale)")
    _histogram(axis, dataset.rewards, colours, log=True)
    axis.set_ylim(bottom=0.7)  # from the bar of a single step on
    axis.yaxis.set_major_formatter("{x:,.10g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_actions(axis: "Axes", dataset: "OfflineDataset", colours: dict[str, str]) -> None:
    space = dataset.action_space
    if isinstance(space, spaces.Discrete):
        _name(axis, "actions taken", "action", "share of steps, %")
        taken, counts = np.unique(dataset.actions, return_counts=True)
        axis.bar(taken, 100 * counts / len(dataset), color=colours["data"])
        axis.set_xlim(int(space.start) - 0.7, int(space.start + space.n) - 0.3)
    else:
        assert isinstance(space, spaces.Box)
        _name(axis, "actions within 1 % of a bound", "dimension of the action", "share of values, %")
        lower, upper = (100 * share for share in saturation(dataset.actions, space))
        at = np.arange(len(lower))
        axis.bar(at, lower, color=colours["data"], label="lower")
        axis.bar(at, upper, bottom=lower, color=colours["policy"], label="upper")
        axis.set_ylim(0, max(1.0, 1.05 * float((lower + upper).max())))
        axis.set_xlim(-0.7, len(lower) - 0.3)
        _legend(axis)


def _draw_returns_to_go(axis: "Axes", dataset: "OfflineDataset", gamma: float, colours: dict[str, str]) -> None:
    """Quantiles over the episodes that are still running at each step."""
    cut = dataset.truncations.any()
    _name(
        axis,
        f"return-to-go, γ = {gamma:g}" + (", 0 after a cut" if cut else ""),
        "step of the episode",
        "discounted, units of the reward",
    )
    returns = dataset.returns_to_go(gamma)
    steps = np.arange(len(dataset)) - np.repeat(dataset.offsets[:-1], dataset.episode_lengths)
    ordered = returns[np.lexsort((returns, steps))]
    running = np.bincount(steps)
    first = np.concatenate(([0], np.cumsum(running)[:-1]))
    low, lower, median, upper, high = (
        ordered[first + np.rint(share * (running - 1)).astype(np.int64)] for share in (0, 0.25, 0.5, 0.75, 1)
    )
    at = np.arange(len(running))
    axis.fill_between(at, low, high, color=colours["data"], alpha=0.2, linewidth=0, label="all")
    axis.fill_between(at, lower, upper, color=colours["data"], alpha=0.45, linewidth=0, label="middle half")
    axis.plot(at, median, color=colours["policy"], linewidth=1.3, label="median")
    _legend(axis)
