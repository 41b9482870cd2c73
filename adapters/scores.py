"""D4RL's reference returns, found by the ids of D4RL, of Minari or of the environments.

`score = 100 * (return - minimum) / (maximum - minimum)`, where the minimum is the return of a random policy and the
maximum that of an expert [D4RL, Fu et al. 2020, arXiv 2004.07219, Appendix C].
"""

import re
from typing import overload

import numpy as np
import numpy.typing as npt

REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "minigrid-fourrooms": (0.01442, 2.89685),
}
"""Minimum and maximum undiscounted return per task."""

_END = r"(?:-v\d+)?$"
_LOCOMOTION = r"(?P<task>halfcheetah|hopper|walker2d|ant)"
_ADROIT = r"(?P<task>pen|door|hammer|relocate)"
# Ids are lower-cased with "_" read as "-", and "ant-maze", as D4RL names its files, as "antmaze". Whole ids are matched, since
# "ant" is also in "antmaze" and "pen" in "pendulum".
_PATTERNS = [
    re.compile(rf"^{_LOCOMOTION}(?:-[a-z-]+)?{_END}"),  # D4RL and environment ids
    re.compile(rf"(?:^|/){_LOCOMOTION}/[^/]+$"),  # Minari ids
    re.compile(rf"^{_ADROIT}-(?:human|cloned|expert)(?:-longhorizon)?{_END}"),
    re.compile(rf"(?:^|/){_ADROIT}/(?:human|cloned|expert)[^/]*$"),
    re.compile(rf"^adroithand{_ADROIT}{_END}"),  # the sparse-reward environments have other returns, so they do not match
    re.compile(r"(?:^|/)(?P<task>antmaze)[-/](?!.*dense)"),  # those with a dense reward have no reference
    re.compile(r"(?:^|/)(?:franka)?(?P<task>kitchen)[-/]"),
    re.compile(rf"(?:^|/)(?:maze2d|pointmaze)[-/](?P<maze>umaze|medium|large)-?(?P<dense>dense|sparse)?{_END}"),
    re.compile(r"(?:^|/)(?P<task>minigrid[-/]fourrooms)\b"),
]


def find_task(dataset_or_env_id: str) -> str | None:
    """Find the task in `REFERENCE_SCORES` that an id belongs to.

    Args:
        dataset_or_env_id: For instance `halfcheetah-medium-expert-v2`, `D4RL/door/human-v2` or `AntMaze_UMaze-v5`.

    Returns:
        A key of `REFERENCE_SCORES`, or None where the id belongs to none of them.
    """
    text = dataset_or_env_id.strip().lower().replace("_", "-").replace("ant-maze", "antmaze")
    for pattern in _PATTERNS:
        match = pattern.search(text)
        if match is None:
            continue
        groups = match.groupdict()
        if groups.get("maze"):
            return f"maze2d-{groups['maze']}" + ("-dense" if groups["dense"] == "dense" else "")
        return groups["task"].replace("/", "-")
    return None


def reference_scores(dataset_or_env_id: str | None) -> tuple[float, float] | None:
    """Look up the reference returns of an id.

    Args:
        dataset_or_env_id: An id of D4RL, of Minari or of an environment; None finds nothing.

    Returns:
        Returns of the random and of the expert policy, or None where the id is not in the table.
    """
    task = None if dataset_or_env_id is None else find_task(dataset_or_env_id)
    return None if task is None else REFERENCE_SCORES[task]


@overload
def normalized_score(returns: float, references: tuple[float, float]) -> float: ...
@overload
def normalized_score(returns: npt.ArrayLike, references: tuple[float, float]) -> npt.NDArray[np.float64]: ...
def normalized_score(returns: npt.ArrayLike, references: tuple[float, float]) -> float | npt.NDArray[np.float64]:
    """Express undiscounted returns in percent of the way from the random to the expert policy.

    Args:
        returns: One return or an array of them, in the environment's reward units.
        references: Returns of the random and of the expert policy, as `reference_scores` gives them.

    Returns:
        Scores of the same shape; 0 is the random policy, 100 the expert.
    """
    low, high = references
    scores = 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)
    return float(scores) if scores.ndim == 0 else scores
