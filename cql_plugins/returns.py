"""Returns-to-go: arrays in, arrays out.

The return-to-go of a transition is what the policy that collected it went on to get, the reference value ``G(s)`` of
Cal-QL (Nakamoto et al. 2023, arXiv 2303.05479, Eq. 5.1). What follows an episode that was cut short is not in the data, so it
is a named choice, :data:`ReturnTail`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

ReturnTail = Literal["zero", "sparse", "none", "bootstrap"]
"""What follows a truncated end.

* ``zero``: nothing (the authors' code); a lower bound for non-negative rewards only.
* ``sparse``: an episode whose every reward is the failure reward never ends; otherwise as ``zero``.
* ``none``: unknown; the episode's returns are ``-inf``, which switches the bound off.
* ``bootstrap``: a value estimate of the last observation, one number for each truncated end.
"""
RETURN_TAILS: tuple[str, ...] = get_args(ReturnTail)


def discounted_suffix_sum(values: NDArray[np.float64], factors: NDArray[np.float64], longest: int) -> NDArray[np.float64]:
    """Solve ``x[t] = values[t] + factors[t] * x[t + 1]`` for all ``t`` at once.

    The recurrence is doubled: after pass ``k`` each ``x[t]`` holds the sum of its next ``2**k`` terms, and ``factors[t]`` the
    product of as many factors. The cost is ``log2(longest)`` passes over the array, whatever the number of episodes.

    Args:
        values: Terms, shape ``(n,)``.
        factors: Factors, shape ``(n,)``; zero at the last row of each episode.
        longest: Length of the longest run without a zero factor, in rows; at least 1.

    Returns:
        The sums, shape ``(n,)``.
    """
    sums, products, reach = values.copy(), factors.copy(), 1
    while reach < longest:
        sums[:-reach] += products[:-reach] * sums[reach:]
        products[:-reach] *= products[reach:]
        products[-reach:] = 0.0
        reach *= 2
    return sums


def returns_to_go(
    rewards: ArrayLike,
    terminations: ArrayLike,
    truncations: ArrayLike,
    gamma: float,
    tail: ReturnTail = "zero",
    *,
    failure_reward: float | None = None,
    tail_values: ArrayLike | None = None,
    cuts: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Compute ``G[t] = r[t] + gamma * (1 - terminated[t]) * G[t + 1]`` within each episode [Cal-QL, section 5].

    An episode ends at a row that is terminated or truncated; where both are set it is terminated. Rows whose episode has not
    ended (those after the last end, or before a cut) are given ``-inf``: a partial sum is not a lower bound. A row with a cut
    has not ended, whatever else is said of it.

    Args:
        rewards: The rewards trained on, shape ``(n,)``, or ``(n, n_envs)`` with time first.
        terminations: Whether the row ended its episode for good, shape of ``rewards``.
        truncations: Whether the row ended its episode by a time-out, shape of ``rewards``.
        gamma: Discount factor, in ``[0, 1]`` (below 1 for the ``sparse`` tail).
        tail: What follows a truncated end, see :data:`ReturnTail`.
        failure_reward: The reward of a step without success, for the ``sparse`` tail; the smallest reward where ``None``.
        tail_values: For the ``bootstrap`` tail, the value of the observation after each truncated end, in the order of the rows
            (environment by environment where there are several).
        cuts: Rows after which the record breaks off although the episode had not ended, shape of ``rewards``.

    Returns:
        Returns-to-go, shape of ``rewards``.

    Raises:
        ValueError: If shapes disagree, ``gamma`` or ``tail`` is out of range, or ``tail_values`` do not match the ends.
    """
    rewards_ = np.asarray(rewards, dtype=np.float64)
    terminated = np.asarray(terminations, dtype=bool)
    truncated = np.asarray(truncations, dtype=bool)
    cut = np.zeros_like(terminated) if cuts is None else np.asarray(cuts, dtype=bool)
    if not rewards_.shape == terminated.shape == truncated.shape == cut.shape or rewards_.ndim not in (1, 2):
        raise ValueError(
            "rewards, terminations, truncations and cuts must have one shape, (n,) or (n, n_envs); got "
            f"{rewards_.shape}, {terminated.shape}, {truncated.shape}, {cut.shape}."
        )
    terminated = terminated & ~cut
    truncated = truncated & ~terminated & ~cut
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1]; got {gamma}.")
    if tail not in RETURN_TAILS:
        raise ValueError(f"tail must be one of {RETURN_TAILS}; got {tail!r}.")
    if rewards_.size == 0:
        return np.zeros(rewards_.shape, dtype=np.float32)
    shape = rewards_.T.shape

    # One row after another, environment by environment; an environment's last row always ends its record.
    ends = terminated | truncated
    last = ends | cut
    last[-1] = True
    flat_rewards, flat_truncated, flat_ends, flat_last = (a.T.reshape(-1) for a in (rewards_, truncated, ends, last))
    episode = np.concatenate(([0], np.cumsum(flat_last[:-1])))
    last_rows = np.flatnonzero(flat_last)

    terms = flat_rewards.copy()
    if tail == "sparse":
        if gamma == 1.0:
            raise ValueError("the sparse tail divides by 1 - gamma; gamma must be below 1.")
        failure = float(flat_rewards.min()) if failure_reward is None else failure_reward
        successes = np.bincount(episode, weights=np.logical_not(np.isclose(flat_rewards, failure, rtol=1e-6, atol=1e-8)))
        never_ends = last_rows[(successes == 0) & flat_truncated[last_rows]]
        terms[never_ends] += gamma * failure / (1.0 - gamma)
    elif tail == "bootstrap":
        values = np.asarray([] if tail_values is None else tail_values, dtype=np.float64).reshape(-1)
        if len(values) != flat_truncated.sum():
            raise ValueError(
                f"the bootstrap tail needs one value for each truncated end; got {len(values)} values for "
                f"{int(flat_truncated.sum())} ends."
            )
        terms[flat_truncated] += gamma * values

    longest = int(np.diff(last_rows, prepend=-1).max())
    returns = discounted_suffix_sum(terms, np.where(flat_last, 0.0, gamma), longest)
    unknown = np.logical_not(flat_ends[last_rows])
    if tail == "none":
        unknown = np.logical_or(unknown, flat_truncated[last_rows])
    if unknown.any():
        returns[unknown[episode]] = -np.inf
    return returns.astype(np.float32).reshape(shape).T
