"""What in a data set makes training on it go otherwise than its owner may think."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._tree import extremes
from cql_plugins.adapters.report import DatasetSummary, describe_space, number, share_where, shorten

if TYPE_CHECKING:
    from cql_plugins.adapters.dataset import OfflineDataset

AT_BOUNDS = 0.05
"""Share of action values at their bounds from which on it is said."""
SPARSE = 0.95
"""Share of the most common reward from which on rewards are sparse."""
TAIL = 0.1
"""Weight of what follows a cut from which on a return-to-go counts as not known."""
HIGH = 50.0
"""Mean return-to-go from which on new critics have a long way to go."""


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Attributes:
        code: A short name that stays.
        message: What it is, and what follows from it.
    """

    code: str
    message: str


def find(dataset: "OfflineDataset", summary: DatasetSummary, gamma: float) -> list[Finding]:
    """Look for what a reader accepts but training suffers from.

    Args:
        dataset: The data set.
        summary: Its key figures.
        gamma: Discount factor that will be trained with.
    """
    found = [*_ends(summary), *_tails(dataset, gamma), *_scale(dataset, gamma), *_actions(dataset, summary)]
    return [*found, *inferred_spaces(dataset), *_columns(summary), *_rewards(dataset)]


def _ends(summary: DatasetSummary) -> Iterator[Finding]:
    if not summary.share_unflagged:
        return
    count = round(summary.share_unflagged * summary.n_episodes)
    which = f"{count:,} of {summary.n_episodes:,} episodes end"
    if count == summary.n_episodes:
        which = "no episode is flagged as terminated or truncated: each ends"
    yield Finding(
        "unflagged-ends",
        f"{which} where the record stops, which is read as a time-out: the target bootstraps from the last observation. Where "
        "an episode was really over (a fall, a goal), what never came counts as value; set its termination",
    )


def _tails(dataset: "OfflineDataset", gamma: float) -> Iterator[Finding]:
    cut = dataset.truncations[dataset.offsets[1:] - 1]
    lowest = float(dataset.rewards.min())
    if not cut.any() or lowest >= 0:
        return  # Without negative rewards the sum up to the cut is a lower bound, as Cal-QL wants it.
    lengths = dataset.episode_lengths[cut]
    reach = math.inf if gamma == 1 else math.floor(math.log(TAIL) / math.log(gamma)) if gamma > 0 else 0
    share = float(np.minimum(lengths, reach).sum()) / len(dataset)
    if not share:
        return
    steps = "all steps" if reach >= lengths.max() else f"the last {reach:,} steps"
    tail = "sparse" if len(np.unique(dataset.rewards)) <= 2 else "bootstrap"
    yield Finding(
        "return-tail",
        f"{int(cut.sum()):,} of {dataset.n_episodes:,} episodes were cut, and rewards go down to {number(lowest)}: what "
        f"would have come is not in the data, and weighs more than {_percent(TAIL, 0)} in the returns-to-go of {steps} "
        f"before a cut ({_percent(share, 1)} of all transitions). Cal-QL's default return_tail='zero' counts it as 0; where "
        f"it is less, Q is held up too high. Take return_tail='{tail}', or 'none' to switch the bound off there",
    )


def _scale(dataset: "OfflineDataset", gamma: float) -> Iterator[Finding]:
    mean = float(dataset.returns_to_go(gamma).mean())
    if mean < HIGH:
        return
    remedy = "Train for long"
    if not dataset.terminations.any():
        shift = f"{-float(dataset.rewards.max()):.6g}"
        remedy += (
            f", or, since no episode terminates, lower all rewards by the largest: dataset.scale_rewards(shift={shift}), "
            f"ScaleReward(env, shift={shift}) in the environment, and return_tail='sparse' or 'bootstrap'"
        )
    yield Finding(
        "high-returns",
        f"the returns-to-go average {number(mean)} with gamma {number(gamma)}, and new critics start near 0: Cal-QL's rose by "
        "some 10 to 40 in 1,000 gradient steps on PointMaze and door-human. Until they are there, its bound holds up nearly "
        f"all that CQL pushes down (train/bound_rate near 1), and the policy goes where SAC's would. {remedy}",
    )


def _actions(dataset: "OfflineDataset", summary: DatasetSummary) -> Iterator[Finding]:
    space, actions = dataset.action_space, dataset.actions
    if not isinstance(space, spaces.Box):
        return
    if not space.is_bounded():
        yield Finding(
            "unbounded-actions",
            f"the action space {describe_space(space)} has no bounds: CQL and SAC squash actions between bounds, and refuse to "
            "start. Read the data with action_space=..., the bounds of the environment",
        )
    outside = float(share_where(actions, lambda block: (block < space.low) | (block > space.high)).mean())
    if outside:
        yield Finding(
            "actions-outside",
            f"{_percent(outside, 2)} of action values lie outside the bounds {describe_space(space)}: to_sb3 clips them, and "
            "trains on an action that reward and next observation do not belong to",
        )
    share = summary.share_actions_at_bounds or 0.0
    if share >= AT_BOUNDS:
        yield Finding(
            "actions-at-bounds",
            f"{_percent(share, 1)} of action values are at their bounds, which a squashed (tanh) policy reaches only in the "
            "limit: their log-density is infinite, or whatever it is clipped to (behaviour cloning, advantage weighting), "
            "and a policy that goes there saturates, where tanh has no gradient left",
        )


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def inferred_spaces(dataset: "OfflineDataset") -> Iterator[Finding]:
    """Say what a reader had to guess about spaces, where the guess may be wrong.

    Args:
        dataset: The data set.
    """
    for kind in sorted(dataset.inferred_spaces):
        space = getattr(dataset, kind)
        if isinstance(space, spaces.Discrete):
            yield Finding(
                f"inferred-{kind.replace('_', '-')}",
                f"{kind} {space} was inferred from the largest value: one that was never logged is missing in models "
                f"made from these data. Read the data with {kind}=...",
            )
    space = dataset.action_space
    if "action_space" not in dataset.inferred_spaces or not isinstance(space, spaces.Box):
        return
    low, high = extremes(dataset.actions)
    largest = max(float(high.max()), -float(low.min()))
    advice = "Read the data with action_space=..., the bounds of the environment"
    if largest > 1:
        yield Finding(
            "inferred-action-space",
            f"actions are not normalised, and their bounds {describe_space(space)} were inferred from the extremes of the "
            f"data: the policy of a model made from these data (from_dataset) can never do more. {advice}",
        )
    elif largest < 0.5:
        yield Finding(
            "inferred-action-space",
            f"action bounds were taken as -1 and 1, and no action is larger than {number(largest)}: if the real bounds are "
            f"smaller, the policy and CQL's uniform actions are mostly where the environment takes none. {advice}",
        )


def _columns(summary: DatasetSummary) -> Iterator[Finding]:
    # Pixels that never change are no news.
    columns = [name for name in summary.constant_columns if not name.endswith(" entries")]
    observed = [name for name in columns if name.startswith("observations")]
    acted = [name for name in columns if name.startswith("actions")]
    if observed:
        yield Finding(
            "constant-observations",
            f"{len(observed)} observation column(s) never change ({shorten(observed)}): normalisation divides by a variance "
            "of 0 (VecNormalize by the square root of 1e-8), so that a change of 0.001 online arrives as 10, which no "
            "network has seen. Drop the columns, or do not normalise them",
        )
    if acted:
        yield Finding(
            "constant-actions",
            f"{len(acted)} action column(s) never change ({shorten(acted)}): nothing is known of any other value, and Q "
            "there is a guess that only the penalty holds down",
        )


def _rewards(dataset: "OfflineDataset") -> Iterator[Finding]:
    values, counts = np.unique(dataset.rewards, return_counts=True)
    common, share = float(values[counts.argmax()]), float(counts.max()) / len(dataset)
    if len(values) == 1 and (common == 0 or not dataset.terminations.any()):
        yield Finding(
            "constant-rewards",
            f"every reward is {number(common)}{' and no episode terminates' if common else ''}: all policies are worth the "
            "same, Q has nothing to tell them apart by, and what is learnt is to imitate the data",
        )
    elif len(values) > 1 and share >= SPARSE:
        others = np.add.reduceat(dataset.rewards != common, dataset.offsets[:-1], dtype=np.int64)
        yield Finding(
            "sparse-rewards",
            f"{_percent(share, 2)} of rewards are {number(common)}, and {int((others == 0).sum()):,} of {dataset.n_episodes:,} "
            f"episodes have no other: a batch of 256 holds {256 * (1 - share):.1f} others on average, from which value "
            "spreads one step an update. Expect to train long; the presets antmaze and adroit-binary scale rewards and set "
            "return_tail='sparse'",
        )
