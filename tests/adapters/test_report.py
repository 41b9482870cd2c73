from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.adapters.report import saturation


def test_figures(arguments: dict[str, Any]) -> None:
    arguments["actions"][:2, 0] = [1.0, -1.0]
    arguments["observations"][:, 1] = 3.0
    summary = OfflineDataset(**arguments | {"references": (0.0, 100.0), "env_id": "Some-v0"}).summary()
    assert (summary.n_episodes, summary.n_transitions) == (2, 5)
    assert (summary.lengths.minimum, summary.lengths.median, summary.lengths.maximum) == (2, 2.5, 3)
    assert (summary.share_terminated, summary.share_truncated, summary.share_unflagged) == (0.5, 0.5, 0.0)
    assert (summary.returns.mean, summary.returns.lower_quartile, summary.returns.upper_quartile) == (15.5, 11.25, 19.75)
    assert summary.scores == summary.returns
    assert summary.reward_range == (1.0, 16.0)
    assert summary.share_actions_at_bounds == 0.4
    assert summary.action_counts is None
    assert summary.constant_columns == ("observations[1]",)
    assert summary.non_finite_columns == ()
    assert summary.nbytes == 7 * 2 * 4 + 5 * 4 + 5 * 8 + 5 + 5


def test_unflagged(steps: dict[str, Any], quietly: Any) -> None:
    steps["truncations"][-1] = False
    summary = quietly(from_arrays, **steps).summary()
    assert (summary.share_terminated, summary.share_truncated, summary.share_unflagged) == (0.5, 0.0, 0.5)


def test_discrete_actions_and_images(arguments: dict[str, Any]) -> None:
    image_space = spaces.Box(0, 255, (2, 2, 3), np.uint8)
    images = np.zeros((7, 2, 2, 3), np.uint8)
    images[1] = 9
    images[:, 0, 0] = 5
    arguments |= {
        "observations": {"image": images, "room": np.full(7, 2)},
        "observation_space": spaces.Dict({"image": image_space, "room": spaces.Discrete(3)}),
        "actions": np.array([3, 4, 4, 5, 5]),
        "action_space": spaces.Discrete(4, start=3),
    }
    summary = OfflineDataset(**arguments).summary()
    assert summary.action_counts == (1, 2, 2, 0)
    assert summary.share_actions_at_bounds is None
    assert summary.constant_columns == ("observations.image: 3 of 12 entries", "observations.room")
    assert "Dict(image: Box(0 .. 255, (2, 2, 3), uint8), room: Discrete(3))" in str(summary)
    assert "3: 1, 4: 2, 5: 2, 6: 0" in str(summary)


def test_saturation_by_dimension() -> None:
    space = spaces.Box(np.array([-1, 0, -np.inf], np.float32), np.array([1, 10, np.inf], np.float32))
    actions = np.array([[-1.5, 0.1, 0], [-0.98, 0.11, -1e9], [-0.9799, 9.9, 1e9], [0.98, 9.89, 5]], np.float64)
    lower, upper = saturation(actions, space)
    assert lower.tolist() == [0.5, 0.25, 0], "1 % of the range 2 is 0.02, of 10 it is 0.1"
    assert upper.tolist() == [0.25, 0.25, 0]
    lower, upper = saturation(actions, space, margin=0.0)
    assert (lower.tolist(), upper.tolist()) == ([0.25, 0, 0], [0, 0, 0])


@pytest.mark.parametrize("rich", [True, False])
def test_table(golden: OfflineDataset, monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = str(golden.summary())
    assert ("│" in text) == rich
    for expected in ("golden", "2 / 5", "15.5  (7, 11.25, 15.5, 19.75, 24)", "50.0 % / 50.0 % / 0.0 %", "1 .. 16"):
        assert expected in text
    assert "Box(-1 .. 1, (1,), float32)" in text
    assert "(inferred)" not in text
    assert "normalised score" not in text


def test_inferred_spaces_are_said(steps: dict[str, Any], quietly: Any) -> None:
    del steps["observation_space"]
    assert "Box(-inf .. inf, (2,), float32)  (inferred)" in str(quietly(from_arrays, **steps).summary())


def test_no_score_for_differently_scaled_parts(golden: OfflineDataset, arguments: dict[str, Any]) -> None:
    dataset = OfflineDataset(**arguments | {"references": (0.0, 1.0)})
    assert (dataset + dataset.scale_rewards(2.0)).summary().scores is None


def test_many_constant_columns_are_shortened(arguments: dict[str, Any]) -> None:
    space = spaces.Box(-1, 1, (20,), np.float32)
    dataset = OfflineDataset(**arguments | {"observations": np.zeros((7, 20), np.float32), "observation_space": space})
    assert "12 more" in str(dataset.summary())
