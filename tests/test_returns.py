"""Returns-to-go against literals and a plain reverse loop in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cql_plugins.returns import RETURN_TAILS, discounted_suffix_sum, returns_to_go

INF = np.inf


def loop(rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, gamma: float) -> np.ndarray:
    """The definition, one row at a time; a running end is -inf."""
    result, following = np.zeros(len(rewards)), -INF
    for t in reversed(range(len(rewards))):
        if terminated[t] or truncated[t]:
            following = 0.0
        result[t] = rewards[t] + gamma * following if np.isfinite(following) else -INF
        following = result[t]
    return result


class TestLiterals:
    """Two episodes: rewards 1, 2, 4 terminated; 8, 16 truncated; then 32 of one that runs."""

    rewards = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    terminated = (0, 0, 1, 0, 0, 0)
    truncated = (0, 0, 0, 0, 1, 0)

    def test_zero(self) -> None:
        assert returns_to_go(self.rewards, self.terminated, self.truncated, 0.5).tolist() == [3, 4, 4, 16, 16, -INF]

    def test_none_switches_truncated_episodes_off(self) -> None:
        result = returns_to_go(self.rewards, self.terminated, self.truncated, 0.5, "none")
        assert result.tolist() == [3, 4, 4, -INF, -INF, -INF]

    def test_bootstrap_adds_the_value_of_the_last_observation(self) -> None:
        result = returns_to_go(self.rewards, self.terminated, self.truncated, 0.5, "bootstrap", tail_values=[100.0])
        assert result.tolist() == [3, 4, 4, 41, 66, -INF]

    def test_a_terminated_row_does_not_bootstrap(self) -> None:
        result = returns_to_go([1.0], [1], [1], 0.5, "bootstrap", tail_values=[])
        assert result.tolist() == [1.0], "where both flags are set, the episode terminated"

    def test_sparse_worked_value_of_antmaze(self) -> None:
        """gamma 0.99, reward 10 r - 5: a failed episode has -500 at every step, a solved one its own sum."""
        rewards = [-5.0, -5.0, -5.0, -5.0, 5.0]
        result = returns_to_go(rewards, [0] * 5, [0, 0, 1, 0, 1], 0.99, "sparse")
        assert result[:3] == pytest.approx([-500.0] * 3, rel=1e-6)
        assert result[3:] == pytest.approx([-5 + 0.99 * 5, 5.0], abs=1e-6)

    def test_sparse_uses_the_failure_reward_it_is_given(self) -> None:
        solved = returns_to_go([5.0, 5.0], [0, 0], [0, 1], 0.9, "sparse", failure_reward=-5.0)
        assert solved == pytest.approx([9.5, 5.0])
        assert returns_to_go([5.0, 5.0], [0, 0], [0, 1], 0.9, "sparse") == pytest.approx([50.0, 50.0])

    def test_sparse_does_not_prolong_a_terminated_episode(self) -> None:
        assert returns_to_go([-1.0, -1.0], [0, 1], [0, 0], 0.5, "sparse").tolist() == [-1.5, -1.0]

    def test_cut_episode_is_unknown_and_does_not_reach_over(self) -> None:
        result = returns_to_go([1.0, 2.0, 4.0], [0, 0, 1], [0, 0, 0], 0.5, cuts=[0, 1, 0])
        for ends in (
            {"terminations": [0, 1, 1], "truncations": [0, 0, 0]},
            {"terminations": [0, 0, 1], "truncations": [0, 1, 0]},
        ):
            # SB3 marks the last row of a broken-off record as an end.
            np.testing.assert_array_equal(returns_to_go([1.0, 2.0, 4.0], **ends, gamma=0.5, cuts=[0, 1, 0]), result)
            tail = returns_to_go([1.0, 2.0, 4.0], **ends, gamma=0.5, cuts=[0, 1, 0], tail="bootstrap", tail_values=[])
            np.testing.assert_array_equal(tail, result)
            assert np.isfinite(returns_to_go([1.0, 2.0, 4.0], **ends, gamma=0.5)).all()
        assert result.tolist() == [-INF, -INF, 4.0]

    def test_environments_do_not_mix(self) -> None:
        """Time first, environments as columns: 1, 2 terminated then 3 running; 10 terminated, then 20, 40 truncated."""
        rewards = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 40.0]])
        terminated = np.array([[0, 1], [1, 0], [0, 0]])
        truncated = np.array([[0, 0], [0, 0], [0, 1]])
        result = returns_to_go(rewards, terminated, truncated, 0.5)
        assert result.tolist() == [[2.0, 10.0], [2.0, 40.0], [-INF, 40.0]]
        bootstrapped = returns_to_go(rewards, terminated, truncated, 0.5, "bootstrap", tail_values=[8.0])
        assert bootstrapped.tolist() == [[2.0, 10.0], [2.0, 42.0], [-INF, 44.0]]

    def test_nothing_in_nothing_out(self) -> None:
        assert returns_to_go([], [], [], 0.9).shape == (0,)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_loop(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    rewards = np.array(data.draw(st.lists(st.floats(-100, 100), min_size=n, max_size=n)))
    ends = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    gamma = data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    expected = loop(rewards, ends == 0, ends == 1, gamma)
    result = returns_to_go(rewards, ends == 0, ends == 1, gamma)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-4)


def test_one_long_episode_needs_few_passes_and_stays_exact() -> None:
    n = 200_000
    rewards = np.random.default_rng(0).normal(size=n)
    ends = np.arange(n) == n - 1
    result = returns_to_go(rewards, ends, np.zeros(n, bool), 0.99)
    np.testing.assert_allclose(result, loop(rewards, ends, np.zeros(n, bool), 0.99), atol=1e-5)


def test_suffix_sum_with_factors_of_its_own() -> None:
    values, factors = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0.5, 2.0, 1.0, 3.0, 0.0])
    # From the end: 5; 4 + 3*5; 3 + 19; 2 + 2*22; 1 + 0.5*46
    assert discounted_suffix_sum(values, factors, 5).tolist() == [24.0, 46.0, 22.0, 19.0, 5.0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"tail": "nothing"}, "tail"),
        ({"terminations": [0]}, "shape"),
        ({"tail": "bootstrap"}, "one value for each truncated end"),
        ({"tail": "sparse", "gamma": 1.0}, "gamma must be below 1"),
    ],
)
def test_bad_arguments_are_named(changed: dict, named: str) -> None:
    arguments: dict = {"rewards": [1.0, 2.0], "terminations": [0, 0], "truncations": [0, 1], "gamma": 0.9} | changed
    with pytest.raises(ValueError, match=named):
        returns_to_go(**arguments)


def test_tails_are_the_four_of_the_reference() -> None:
    assert RETURN_TAILS == ("zero", "sparse", "none", "bootstrap")
