"""Figures of a training run from the files that it logged: Stable-Baselines3's CSV output and d3rlpy's."""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Phase = Literal["offline", "online"]
PHASES: tuple[Phase, Phase] = ("offline", "online")
UNITS: dict[Phase, str] = {"offline": "gradient steps", "online": "environment steps"}


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        label: In the legend.
        names: What the frameworks call it; the first that was logged is drawn.
        colour: Key of a theme's colours.
    """

    label: str
    names: tuple[str, ...]
    colour: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its name with the unit, and its curves."""

    title: str
    lines: tuple[Line, ...]
    zero: bool = False
    """Whether a line at 0 helps."""


SCORE = Panel("normalised score", (Line("score", ("eval/normalized_score",), "data"),))
RETURN = Panel(
    "return of an episode",
    (
        Line("evaluated", ("eval/mean_reward", "environment", "evaluation"), "data"),
        Line("while collecting", ("rollout/ep_rew_mean", "rollout_return"), "random"),
    ),
)
PANELS = (
    Panel(
        "Q, in units of the reward",
        (
            Line("data's actions", ("train/q_data", "q_data"), "data"),
            Line("policy's actions", ("train/q_policy", "q_policy"), "policy"),
            Line("uniform actions", ("train/q_random", "q_random"), "random"),
        ),
    ),
    Panel("conservative gap", (Line("gap", ("train/cql_gap", "conservative_gap"), "data"),)),
    Panel("bound rate, share of values", (Line("bound rate", ("train/bound_rate", "bound_rate"), "data"),)),
    Panel(
        "start of an episode, in units of the reward",
        (
            Line("predicted", ("eval/predicted_return",), "policy"),
            Line("discounted return", ("eval/discounted_return",), "data"),
            Line("predicted minus real", ("eval/value_bias", "value_bias"), "random"),
        ),
        zero=True,
    ),
    Panel("Q of the data's actions minus uniform ones'", (Line("gap", ("eval/q_gap", "q_gap"), "data"),), zero=True),
    Panel(
        "best of uniform actions minus data's, Q",
        (Line("delta", ("eval/q_random_max_minus_data",), "data"),),
        zero=True,
    ),
)
THEMES: dict[str, dict[str, str]] = {
    "light": {"back": "#ffffff", "text": "#1f2328", "data": "#2b6cb0", "policy": "#c2410c", "random": "#6b7280"},
    "dark": {"back": "#0d1117", "text": "#d6dde5", "data": "#6cb2ff", "policy": "#ff9d66", "random": "#a3acb8"},
}


@dataclass
class Run:
    """What a run logged: for each phase and name the steps and the values."""

    series: dict[Phase, dict[str, tuple[list[float], list[float]]]] = field(
        default_factory=lambda: {"offline": {}, "online": {}}
    )

    def add(self, phase: Phase, name: str, step: float, value: str) -> None:
        """Add a value as it was written; what is no number, such as an empty field, is none."""
        if (number := _number(value)) is not None:
            steps, values = self.series[phase].setdefault(name, ([], []))
            steps.append(step)
            values.append(number)

    def end(self, phase: Phase) -> float:
        """Find the largest step of a phase; 0 without any."""
        return max((max(steps) for steps, _ in self.series[phase].values()), default=0.0)

    def append(self, part: Run) -> None:
        """Add what came later.

        A phase that begins anew goes on where it ended before; one that goes back a little, to a checkpoint, takes the place of
        what was there from then on.
        """
        for phase in PHASES:
            known, new = self.series[phase], part.series[phase]
            starts = [(known[name][0][0], new[name][0][0]) for name in known.keys() & new.keys()]
            begins_anew = bool(starts) and min(start for _, start in starts) <= min(start for start, _ in starts)
            offset = self.end(phase) if begins_anew else 0.0
            if starts and not begins_anew:
                # One cut for all curves: one that the new part has not logged yet was thrown away from there on, too. Parts
                # without a curve in common are files of one run, neither of which takes the place of the other.
                cut = min(min(steps) for steps, _ in new.values())
                for name, column in list(known.items()):
                    kept = [point for point in zip(*column, strict=True) if point[0] < cut]
                    known[name] = [step for step, _ in kept], [value for _, value in kept]
                    if not kept:
                        del known[name]
            for name, (steps, values) in new.items():
                before = known.setdefault(name, ([], []))
                before[0].extend(step + offset for step in steps)
                before[1].extend(values)

    def find(self, phase: Phase, names: Iterable[str]) -> tuple[list[float], list[float]]:
        """Find the first of some names."""
        return next((self.series[phase][name] for name in names if name in self.series[phase]), ([], []))

    def has(self, line: Line) -> bool:
        """Whether a curve has a finite point."""
        return any(math.isfinite(value) for phase in PHASES for value in self.find(phase, line.names)[1])


def plot_run(
    *log_folders: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    title: str = "",
    theme: Literal["light", "dark"] = "light",
) -> Figure:
    """Draw the dashboard of a run: score, Q of the data's, the policy's and uniform actions, gap, bound rate, value bias.

    Only what was logged is drawn. Offline training comes first, over gradient steps; a vertical line marks where online
    training begins, over environment steps.

    Args:
        log_folders: Folders with SB3's ``progress.csv`` (``model.set_logger(configure(folder, ["csv"]))``) or the files of
            d3rlpy's ``FileAdapterFactory``. Several are parts of one run, such as an offline and an online one, in order;
            of one phase, the steps of the next are counted on where its log, like that of each ``fit`` of d3rlpy's, begins
            anew.
        path: Also write the figure there, as PNG, SVG or PDF by its suffix.
        title: Above the figure.
        theme: ``"dark"`` for light text on a dark ground.

    Returns:
        A matplotlib figure, which a notebook shows.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If a folder holds no such logs, or nothing in them can be drawn.
    """
    if not log_folders:
        raise ValueError("log_folders: expected at least one folder, got none.")
    with themed(theme) as colours:
        from matplotlib.figure import Figure

        run = Run()
        for folder in map(Path, log_folders):
            part = Run()
            _read(folder, part)
            run.append(part)
        first = SCORE if run.has(SCORE.lines[0]) else RETURN
        panels = [panel for panel in (first, *PANELS) if any(run.has(line) for line in panel.lines)]
        if not panels:
            shown = ", ".join(map(str, log_folders))
            raise ValueError(
                f"log_folders: nothing to draw in {shown}: the logs hold neither evaluations nor training metrics yet."
            )
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(3.6 * columns + 0.4, 2.6 * rows + 0.3 * bool(title)), layout="constrained", dpi=130)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, axis in zip(panels, axes, strict=False):
            _draw(panel, axis, run, colours)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if title:
            figure.suptitle(title)
        if path is not None:
            figure.savefig(path)
    return figure


@contextlib.contextmanager
def themed(theme: str) -> Iterator[dict[str, str]]:
    """Draw and save in the colours of a theme, inside the context.

    Args:
        theme: A key of `THEMES`.

    Yields:
        The theme's colours, by name.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there is no such theme.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError(f'matplotlib is needed here: {error}. Install it with: pip install "cql-plugins[plots]"') from error
    if theme not in THEMES:
        raise ValueError(f"theme: expected one of {', '.join(THEMES)}, got {theme!r}.")
    colours = THEMES[theme]
    rc = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colours["text"])
    rc |= {"figure.facecolor": colours["back"], "axes.facecolor": colours["back"], "savefig.facecolor": colours["back"]}
    settings: Mapping[str, Any] = {**rc, "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(settings):  # type: ignore[arg-type]
        yield colours


def _draw(panel: Panel, axis: Axes, run: Run, colours: dict[str, str]) -> None:
    """Draw a panel's curves, each phase where the one before it ended."""
    from matplotlib.ticker import MaxNLocator

    ends = {phase: run.end(phase) for phase in PHASES}
    switch = ends["offline"]
    for line in panel.lines:
        for phase, offset in (("offline", 0.0), ("online", switch)):
            steps, values = run.find(phase, line.names)  # type: ignore[arg-type]
            label = line.label if phase == "offline" or not run.find("offline", line.names)[0] else None
            marker = "." if len(steps) <= 30 else None
            if steps:
                x = [step + offset for step in steps]
                axis.plot(x, values, color=colours[line.colour], linewidth=1.4, marker=marker, markersize=4, label=label)
    if panel.zero:
        axis.axhline(0.0, color=colours["text"], linewidth=0.6, alpha=0.6)
    units = [UNITS[phase] for phase in PHASES if ends[phase]]
    if len(units) == 2:
        axis.axvline(switch, color=colours["text"], linestyle="--", linewidth=0.9)
        axis.annotate(
            "online", (switch, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points", fontsize=8
        )
    axis.set_xlabel(", then ".join(units))
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.2)
    if len([line for line in panel.lines if run.has(line)]) > 1:
        axis.legend(fontsize=8, framealpha=0.6)


def _read(folder: Path, run: Run) -> None:
    """Add a folder's logs to the run."""
    progress = folder / "progress.csv"
    if progress.is_file():
        _read_progress(progress, run)
        return
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"log_folders: {folder}: expected SB3's progress.csv, from model.set_logger(configure(folder, ['csv'])), or the "
            "CSV files of d3rlpy's FileAdapterFactory; found neither."
        )
    files = [file for file in files if not file.stem.endswith("_grad")]  # The size of gradients, which is not drawn.
    # Only d3rlpy's online loop steps through an environment, and logs episodes that end there. Its evaluations tell nothing: an
    # evaluator of `fit` may have their name.
    online = any(file.stem in ("rollout_return", "time_environment_step") for file in files)
    for file in files:
        for line, row in enumerate(csv.reader(_whole_lines(file)), start=1):
            if len(row) != 3:
                raise ValueError(f"log_folders: {file}, line {line}: expected epoch, step and value, got {row}.")
            if (step := _number(row[1])) is not None:
                run.add("online" if online else "offline", file.stem, step, row[2])


def _read_progress(progress: Path, run: Run) -> None:
    rows = list(csv.DictReader(_whole_lines(progress)))
    part, last = Run(), dict.fromkeys(PHASES, -math.inf)
    for phase, row in zip(_phases(rows), rows, strict=True):
        clocks = [row.get("time/gradient_steps") if phase == "offline" else None, row.get("time/total_timesteps")]
        step = next((found for clock in clocks if (found := _number(clock)) is not None), None)
        if step is None:
            continue
        if step < last[phase]:  # Another call of learn() that began anew.
            run.append(part)
            part, last = Run(), dict.fromkeys(PHASES, -math.inf)
        last[phase] = step
        for name, value in row.items():
            if name and not name.startswith("time/"):
                part.add(phase, name, step, value)
    run.append(part)


def _phases(rows: Sequence[Mapping[str, str | None]]) -> list[Phase]:
    """Find the phase of each line: offline ones count gradient steps.

    Logs of older versions have evaluations among them with SB3's own clock alone, which shows the same. They are told from
    those of an online phase between two offline ones by what stands between the same two lines: evaluations and nothing else,
    in gradient steps that these two allow.
    """
    steps = {number: _number(count) or 0.0 for number, row in enumerate(rows) if (count := row.get("time/gradient_steps"))}
    phases: list[Phase] = ["offline" if number in steps else "online" for number in range(len(rows))]
    for before, after in itertools.pairwise([-1, *steps]):
        between = rows[before + 1 : after]
        clocks = [_number(row.get("time/total_timesteps")) or 0.0 for row in between if _is_evaluation(row)]
        if len(clocks) == len(between) and all(steps.get(before, 0.0) <= clock <= steps[after] for clock in clocks):
            phases[before + 1 : after] = ["offline"] * len(between)
    return phases


def _is_evaluation(row: Mapping[str, str | None]) -> bool:
    """Whether a line has the results of an evaluation, SB3's clock, and nothing else."""
    names = {name for name, value in row.items() if name and value} - {"time/total_timesteps"}
    return bool(names) and all(name.startswith("eval/") for name in names)


def _whole_lines(file: Path) -> list[str]:
    """Read a log without a last line that was not written to its end, as where the run was killed."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [line for line in lines if line.endswith("\n")]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


__all__ = ["plot_run"]
