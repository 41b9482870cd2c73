from __future__ import annotations

import numpy as np
import pytest

from cql_plugins.adapters import normalized_score, reference_scores
from cql_plugins.adapters.scores import find_task


@pytest.mark.parametrize(
    ("identifier", "task"),
    [
        ("halfcheetah-medium-expert-v2", "halfcheetah"),
        ("halfcheetah-medium-expert", "halfcheetah"),
        ("hopper-full-replay-v2", "hopper"),
        ("walker2d-random-v0", "walker2d"),
        ("ant-medium-v2", "ant"),
        ("mujoco/halfcheetah/expert-v0", "halfcheetah"),
        ("published-policies/halfcheetah/replay-v0", "halfcheetah"),
        ("mujoco/ant/simple-v0", "ant"),
        ("HalfCheetah-v5", "halfcheetah"),
        ("Walker2d-v5", "walker2d"),
        ("Ant-v5", "ant"),
        ("door-human-v1", "door"),
        ("door-human", "door"),
        ("pen-cloned-v1", "pen"),
        ("D4RL/door/human-v2", "door"),
        ("dapg/door/human-replay-v0", "door"),
        ("D4RL/pen/expert-v2", "pen"),
        ("D4RL/relocate/cloned-v2", "relocate"),
        ("AdroitHandDoor-v1", "door"),
        ("AdroitHandHammer-v1", "hammer"),
        ("antmaze-umaze-v0", "antmaze"),
        ("antmaze-large-diverse-v2", "antmaze"),
        ("D4RL/antmaze/large-play-v1", "antmaze"),
        ("AntMaze_UMaze-v5", "antmaze"),
        ("AntMaze_Large_Diverse_GR-v4", "antmaze"),
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse", "antmaze"),
        ("Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed", "antmaze"),
        ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed", "antmaze"),
        ("kitchen-mixed-v0", "kitchen"),
        ("D4RL/kitchen/mixed-v2", "kitchen"),
        ("FrankaKitchen-v1", "kitchen"),
        ("maze2d-umaze-v1", "maze2d-umaze"),
        ("maze2d-umaze-dense-v1", "maze2d-umaze-dense"),
        ("D4RL/pointmaze/large-dense-v2", "maze2d-large-dense"),
        ("PointMaze_MediumDense-v3", "maze2d-medium-dense"),
        ("PointMaze_Medium-v3", "maze2d-medium"),
        ("minigrid-fourrooms-v0", "minigrid-fourrooms"),
        ("D4RL/minigrid/fourrooms-v0", "minigrid-fourrooms"),
        ("MiniGrid-FourRooms-v0", "minigrid-fourrooms"),
        # Names that only look alike.
        ("Pendulum-v1", None),
        ("InvertedPendulum-v5", None),
        ("door-open-v2", None),
        ("AdroitHandDoorSparse-v1", None),
        ("AntMaze_UMazeDense-v5", None),
        ("AntMaze_Large_Diverse_GRDense-v4", None),
        ("D4RL/antmaze/large-dense-v1", None),
        ("antmaze-umaze-dense-v0", None),
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_dense", None),
        ("elephant-medium-v0", None),
        ("maze2d-open-v0", None),
        ("CartPole-v1", None),
        ("", None),
    ],
)
def test_task_of_an_id(identifier: str, task: str | None) -> None:
    assert find_task(identifier) == task


def test_reference_scores() -> None:
    assert reference_scores("maze2d-umaze-dense-v1") == (68.537689, 193.66285642381482)
    assert reference_scores("maze2d-umaze-v1") == (23.85, 161.86)
    assert reference_scores("unknown") is None
    assert reference_scores(None) is None


def test_formula() -> None:
    references = (-280.178953, 12135.0)
    assert normalized_score(-280.178953, references) == 0.0
    assert normalized_score(12135.0, references) == 100.0
    np.testing.assert_allclose(normalized_score([5927.4105235], references), [50.0], rtol=1e-9)
