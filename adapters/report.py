"""What is in a data set, as numbers and as a table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from cql_plugins.adapters._tree import Array, extremes, named_leaves, row_blocks, row_nbytes

if TYPE_CHECKING:
    from rich.table import Table

    from cql_plugins.adapters.dataset import OfflineDataset

_MOST_ACTIONS = 10_000
_SHOWN_COLUMNS = 8


@dataclass(frozen=True)
class Quantiles:
    """Spread of a quantity over the episodes."""

    mean: float
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> "Quantiles":
        """Compute mean, extremes and quartiles."""
        values = np.asarray(values, dtype=np.float64)
        return cls(float(values.mean()), *(float(q) for q in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))))

    def __str__(self) -> str:
        """Write mean, then minimum, quartiles and maximum."""
        spread = (self.minimum, self.lower_quartile, self.median, self.upper_quartile, self.maximum)
        return f"{number(self.mean)}  ({', '.join(map(number, spread))})"


@dataclass(frozen=True)
class DatasetSummary:
    """Key figures of an `OfflineDataset`. `print` shows them as a table.

    Attributes:
        name: Name of the data set.
        env_id: Id of its environment, where known.
        observation_space: Space of one observation.
        action_space: Space of one action.
        inferred_spaces: Which of the two were inferred from the values.
        n_episodes: Number of episodes.
        n_transitions: Number of transitions.
        lengths: Steps per episode.
        share_terminated: Share of episodes that ended in a terminal state.
        share_truncated: Share of episodes that their source marked as cut short.
        share_unflagged: Share of episodes that their source ended without a flag; the three shares sum to 1.
        returns: Undiscounted return per episode.
        scores: D4RL-normalised score per episode; None where no reference returns are known.
        reward_range: Smallest and largest reward.
        share_actions_at_bounds: Share of action values at or beyond a bound of the space; None for discrete actions.
        action_counts: How often each action occurs; None for continuous actions, and for more than 10,000.
        constant_columns: Columns of observations and actions that never change, as `field[index]`.
        non_finite_columns: Columns with NaN or infinity; empty for validated data.
        nbytes: Memory of all arrays, in bytes.
    """

    name: str | None
    env_id: str | None
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    inferred_spaces: frozenset[str]
    n_episodes: int
    n_transitions: int
    lengths: Quantiles
    share_terminated: float
    share_truncated: float
    share_unflagged: float
    returns: Quantiles
    scores: Quantiles | None
    reward_range: tuple[float, float]
    share_actions_at_bounds: float | None
    action_counts: tuple[int, ...] | None
    constant_columns: tuple[str, ...]
    non_finite_columns: tuple[str, ...]
    nbytes: int

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the table's rows as label and value."""
        if self.env_id:
            yield "environment", self.env_id
        for kind in ("observation_space", "action_space"):
            note = "  (inferred)" if kind in self.inferred_spaces else ""
            yield kind.replace("_", " "), f"{describe_space(getattr(self, kind))}{note}"
        yield "episodes / transitions", f"{self.n_episodes:,} / {self.n_transitions:,}"
        yield "memory", f"{self.nbytes / 2**20:,.1f} MiB"
        yield "", "mean  (min, 25 %, median, 75 %, max)"
        yield "episode length", str(self.lengths)
        yield "return", str(self.returns)
        if self.scores is not None:
            yield "normalised score", str(self.scores)
        shares = (self.share_terminated, self.share_truncated, self.share_unflagged)
        yield "terminated / truncated / unflagged", " / ".join(f"{100 * share:.1f} %" for share in shares)
        yield "reward range", " .. ".join(map(number, self.reward_range))
        if self.share_actions_at_bounds is not None:
            yield "action values at their bounds", f"{100 * self.share_actions_at_bounds:.2f} %"
        if self.action_counts is not None:
            start = int(getattr(self.action_space, "start", 0))
            yield "actions taken", shorten([f"{action}: {count:,}" for action, count in enumerate(self.action_counts, start)])
        yield "constant columns", shorten(self.constant_columns)
        yield "non-finite columns", shorten(self.non_finite_columns)

    def __str__(self) -> str:
        """Render the table, with rich where it is installed."""
        try:
            from rich.console import Console
        except ImportError:
            width = max(len(label) for label, _ in self.rows())
            lines = [f"  {label:<{width}}  {printable(value)}" for label, value in self.rows()]
            return "\n".join([self._title, *lines])
        text = StringIO()
        Console(file=text, width=110, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def __rich__(self) -> "Table":
        """Render the table for a rich console."""
        from rich.table import Table
        from rich.text import Text

        # As plain text, since rich would read square brackets as markup.
        table = Table(title=Text(self._title), show_header=False)
        for label, value in self.rows():
            table.add_row(Text(label), Text(printable(value)))
        return table

    @property
    def _title(self) -> str:
        return printable(self.name or "OfflineDataset")


def summarize(dataset: "OfflineDataset") -> DatasetSummary:
    """Compute the key figures of a data set."""
    n_episodes = dataset.n_episodes
    n_terminated, n_unflagged = int(dataset.terminations.sum()), int(dataset.unflagged_episodes.sum())
    space = dataset.action_space
    discrete = isinstance(space, spaces.Discrete)
    leaves = [*named_leaves(dataset.observations, "observations"), ("actions", dataset.actions)]
    ranges = [(name, extremes(leaf)) for name, leaf in leaves]
    arrays = [*(leaf for _, leaf in leaves), dataset.rewards, dataset.terminations, dataset.truncations]
    return DatasetSummary(
        name=dataset.name,
        env_id=dataset.env_id,
        observation_space=dataset.observation_space,
        action_space=space,
        inferred_spaces=dataset.inferred_spaces,
        n_episodes=n_episodes,
        n_transitions=len(dataset),
        lengths=Quantiles.of(dataset.episode_lengths),
        share_terminated=n_terminated / n_episodes,
        share_truncated=(n_episodes - n_terminated - n_unflagged) / n_episodes,
        share_unflagged=n_unflagged / n_episodes,
        returns=Quantiles.of(dataset.episode_returns),
        scores=_scores(dataset),
        reward_range=(float(dataset.rewards.min()), float(dataset.rewards.max())),
        share_actions_at_bounds=None if discrete else _share_at_bounds(dataset.actions, space),
        action_counts=_action_counts(dataset.actions, space) if isinstance(space, spaces.Discrete) else None,
        constant_columns=_columns(ranges, lambda low, high: low == high),
        non_finite_columns=_columns(ranges, lambda low, high: ~(np.isfinite(low) & np.isfinite(high))),
        nbytes=sum(array.nbytes for array in arrays),
    )


def _scores(dataset: "OfflineDataset") -> Quantiles | None:
    if dataset.references is None:
        return None
    # The data may be a joint of differently scaled rewards, which has no score.
    try:
        return Quantiles.of(dataset.normalized_score())
    except ValueError:
        return None


def _columns(ranges: list[tuple[str, tuple[Array, Array]]], test: Any) -> tuple[str, ...]:
    """Name the columns whose minimum and maximum pass `test`; for images only the number of pixels that do."""
    found: list[str] = []
    for name, (low, high) in ranges:
        hits = np.argwhere(test(low, high))
        if low.ndim == 0:
            found += [name] * len(hits)
        elif low.ndim == 1:
            found += [f"{name}[{index[0]}]" for index in hits]
        elif len(hits):
            found.append(f"{name}: {len(hits)} of {low.size} entries")
    return tuple(found)


def _share_at_bounds(actions: Array, space: Any) -> float:
    return float(share_where(actions, lambda block: (block <= space.low) | (block >= space.high)).mean())


def share_where(values: Array, test: Callable[[Array], Array]) -> npt.NDArray[np.float64]:
    """Compute the share of the rows for which a test holds, entry by entry; reads in blocks."""
    count = np.zeros(values.shape[1:])
    for start, stop in row_blocks(len(values), row_nbytes(values)):
        count += test(values[start:stop]).sum(axis=0)
    return count / len(values)


def saturation(actions: Array, space: spaces.Box, margin: float = 0.01) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute the share of continuous actions at the bounds of each dimension, or near them.

    Args:
        actions: Shape `(N, ...)`.
        space: Their space.
        margin: What counts as near, as a share of the range between the bounds.

    Returns:
        Shares at the lower and at the upper bounds, one for each dimension, flat; 0 where there is no bound.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(invalid="ignore"):  # where there are no bounds
        near = margin * np.where(np.isfinite(low) & np.isfinite(high), high - low, 0.0)
    below, above = low + near, high - near
    lower, upper = share_where(actions, lambda block: block <= below), share_where(actions, lambda block: block >= above)
    return lower.reshape(-1), upper.reshape(-1)


def _action_counts(actions: Array, space: spaces.Discrete) -> tuple[int, ...] | None:
    if space.n > _MOST_ACTIONS:
        return None
    return tuple(int(count) for count in np.bincount(actions - int(space.start), minlength=int(space.n)))


def printable(text: str) -> str:
    """Escape what a terminal would act on: names come from files."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def number(value: float) -> str:
    """Write a number as people read it, with four digits that count."""
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole and abs(value) < 1e9 else f"{value:,.4g}"


def describe_space(space: spaces.Space[Any]) -> str:
    """Describe a space in one short line; bounds that differ between dimensions are given as a range."""
    if isinstance(space, spaces.Dict):
        return "Dict(" + ", ".join(f"{key}: {describe_space(sub)}" for key, sub in space.spaces.items()) + ")"
    if isinstance(space, spaces.Box):
        low, high = number(float(space.low.min())), number(float(space.high.max()))
        return f"Box({low} .. {high}, {space.shape}, {space.dtype})"
    return str(space)


def shorten(items: Any) -> str:
    """List the first items, and count the others."""
    shown = ", ".join(items[:_SHOWN_COLUMNS])
    return (shown or "none") + (f" and {len(items) - _SHOWN_COLUMNS} more" if len(items) > _SHOWN_COLUMNS else "")
