from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset

# Two episodes written out by hand: three steps that end in a terminal state, two that are cut short.
OBSERVATIONS = np.array([[0, 0], [1, 10], [2, 20], [3, 30], [100, 5], [101, 6], [102, 7]], dtype=np.float32)
ACTIONS = np.array([[0.1], [0.2], [0.3], [-0.4], [-0.5]], dtype=np.float32)
REWARDS = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
TERMINATIONS = np.array([False, False, True, False, False])
TRUNCATIONS = np.array([False, False, False, False, True])
CURRENT = OBSERVATIONS[[0, 1, 2, 4, 5]]
NEXT = OBSERVATIONS[[1, 2, 3, 5, 6]]
OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (1,), np.float32)


def golden_arguments() -> dict[str, Any]:
    return {
        "observations": OBSERVATIONS.copy(),
        "actions": ACTIONS.copy(),
        "rewards": REWARDS.copy(),
        "terminations": TERMINATIONS.copy(),
        "truncations": TRUNCATIONS.copy(),
        "observation_space": OBSERVATION_SPACE,
        "action_space": ACTION_SPACE,
        "name": "golden",
    }


def golden_steps() -> dict[str, Any]:
    """The same with one row per step."""
    return golden_arguments() | {"observations": CURRENT.copy(), "next_observations": NEXT.copy()}


@pytest.fixture
def arguments() -> dict[str, Any]:
    return golden_arguments()


@pytest.fixture
def steps() -> dict[str, Any]:
    return golden_steps()


@pytest.fixture
def golden() -> OfflineDataset:
    return OfflineDataset(**golden_arguments())


@pytest.fixture
def quietly() -> Callable[..., Any]:
    """Call a reader whose warning another test looks at."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return function(*args, **kwargs)

    return call
