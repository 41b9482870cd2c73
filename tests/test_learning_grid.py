"""`benchmarks/learning.py`: a finished cell is not run again, a killed one goes on from its checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("stable_baselines3")
pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning

    return learning


def run(tmp_path: Path, *more: str, fraction: float = 0.002, check: bool = True) -> subprocess.CompletedProcess[str]:
    folders = ["--results", str(tmp_path / "results"), "--checkpoints", str(tmp_path / "runs")]
    command = [sys.executable, str(BENCHMARKS / "learning.py"), "cartpole", "--fraction", str(fraction), "--jobs", "1"]
    return subprocess.run([*command, *folders, *more], capture_output=True, text=True, check=check)


def read(tmp_path: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*/*.json"))}


def test_a_killed_cell_goes_on(learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import learners
    from tasks import TASKS

    task = TASKS["cartpole"].cut(0.002)
    assert (task.steps, task.eval_every, task.online_steps) == (20, 2, 10)
    cell = learning.Cell("cartpole", "calql", 0, True, "f32", tmp_path / "results", tmp_path / "runs", 0.002)
    train, trained = learners.SB3Learner.train, []

    def counting(self: Any, steps: int) -> None:
        trained.append(steps)
        if len(trained) == 4:
            raise KeyboardInterrupt
        train(self, steps)

    monkeypatch.setattr(learners.SB3Learner, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        learning.run_cell(cell)
    cut = cell.read()
    assert [point["step"] for point in cut["offline"]] == [2, 4, 6]
    assert not cell.finished
    assert [path.name for path in cell.checkpoint_path.iterdir()] == [cut["checkpoint"]] == ["00000006"]
    learning.run_cell(cell)
    found = cell.read()
    assert cell.finished
    assert found["offline"][:3] == cut["offline"], "what was measured stays"
    assert [point["step"] for point in found["offline"]] == list(range(2, 21, 2))
    assert trained == [2] * 11, "three, the one cut short, and the seven that were missing"
    assert [point["step"] for point in found["online"]] == [0, 2, 4, 6, 8, 10]
    assert all(len(point["returns"]) == task.eval_episodes for point in found["offline"] + found["online"])
    assert {"predicted", "actual", "q_data", "q_random", "score", "bound_rate"} <= set(found["offline"][-1])


def test_another_grid_adds_the_online_phase(learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import learners

    rest = ("f32", tmp_path / "results", tmp_path / "runs", 0.002)
    offline, online = (learning.Cell("cartpole", "cql", 0, is_online, *rest) for is_online in (False, True))
    learning.run_cell(offline)
    assert offline.finished
    assert not online.finished
    before = offline.read()
    monkeypatch.setattr(learners.SB3Learner, "train", None)  # not called again
    learning.run_cell(online)
    assert online.finished
    assert online.read()["offline"] == before["offline"]
    assert [point["step"] for point in online.read()["online"]] == [0, 2, 4, 6, 8, 10]


def test_from_the_command_line(tmp_path: Path) -> None:
    only = ["--seeds", "0", "--only", "d3rlpy-bc"]
    assert run(tmp_path, *only, "--list").stdout == "cartpole/d3rlpy-bc_seed0: 0 gradient steps\n"
    first = run(tmp_path, *only)
    assert first.stdout.startswith("1 cells, 0 finished before\n")
    assert "\n[1/1] cartpole/d3rlpy-bc_seed0: score " in first.stdout  # what d3rlpy says when imported may stand between
    before = read(tmp_path)
    assert list(before) == ["d3rlpy-bc_seed0"]
    assert "predicted" not in before["d3rlpy-bc_seed0"]["offline"][-1], "behaviour cloning has no values"
    assert run(tmp_path, *only).stdout == "1 cells, 1 finished before\n"
    assert read(tmp_path) == before
    assert run(tmp_path, *only, "--list").stdout == "cartpole/d3rlpy-bc_seed0: finished\n"


def test_a_cell_that_fails_says_so_and_the_others_run(tmp_path: Path, learning: ModuleType) -> None:
    cell = learning.Cell("cartpole", "d3rlpy-iql", 0, False, "f32", tmp_path / "results", tmp_path / "runs", 0.002)
    other = learning.Cell("cartpole", "d3rlpy-bc", 0, False, "f32", tmp_path / "results", tmp_path / "runs", 0.002)
    outcomes = {done.arm: error for done, error in learning.run_locally([cell, other], 2)}
    assert isinstance(outcomes["d3rlpy-iql"], KeyError), "d3rlpy has no discrete IQL"
    assert outcomes["d3rlpy-bc"] is None
    assert other.finished


def test_data_that_are_not_here_are_not_made(learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    monkeypatch.setattr(tasks, "DATA", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="set CQL_PLUGINS_DATA"):
        tasks.load_minari("dapg/door/human-replay-v0")()
    assert list(tmp_path.iterdir()) == []


def test_arms(learning: ModuleType) -> None:
    from learners import parse
    from tasks import TASKS

    assert parse("cql") == ("cql", {})
    assert parse("cql:cql_alpha=20,cql_variant=rho") == ("cql", {"cql_alpha": 20, "cql_variant": "rho"})
    for name, grid in learning.GRIDS.items():
        assert grid.task in TASKS, name
        assert set(grid.online) <= set(grid.arms), name


@pytest.mark.parametrize(
    "arm",
    [
        "cql",
        "cql:layer_norm=True,n_critics=3,n_target_critics=2",
        "calql:floor=5.0",
        "cql:mode_q_backup=True",
        "sac",
        "d3rlpy-cql",
        "d3rlpy-calql",
        "d3rlpy-iql",
        "d3rlpy-bc",
        "ours-d3rlpy-cql",
        "ours-d3rlpy-calql:max_q_backup=False",
    ],
)
def test_every_arm_goes_on_from_its_checkpoint(arm: str, learning: ModuleType, tmp_path: Path) -> None:
    import learners
    from tasks import TASKS

    task = TASKS["pendulum"]
    learner = learners.make(arm, task, 0, "f32")
    learner.train(2)
    learner.save(tmp_path)
    found = learner.evaluate(1)
    again = learners.make(arm, task, 0, "f32")
    again.load(tmp_path)
    other = again.evaluate(1)
    assert {key: other[key] for key in ("q_data", "returns") if key in other} == {
        key: found[key] for key in ("q_data", "returns") if key in found
    }
    again.train(2)
    assert again.evaluate(1)["returns"] != found["returns"], "it learns on"


def test_evaluations_begin_in_the_same_states_whoever_plays(learning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import learners
    from tasks import TASKS

    starts: list[Any] = []
    reset = learners.SameStarts.reset

    def watched(self: Any, **kwargs: Any) -> Any:
        observation, info = reset(self, **kwargs)
        starts.append(observation.tolist())
        return observation, info

    monkeypatch.setattr(learners.SameStarts, "reset", watched)
    found = {}
    for arm, seed in (("cql", 0), ("sac", 0), ("d3rlpy-cql", 0), ("d3rlpy-bc", 0), ("cql", 1)):
        learner = learners.make(arm, TASKS["pendulum"], seed, "f32")
        learner.train(1)
        for again in range(2):
            starts.clear()
            learner.evaluate(2)
            found[arm, seed, again] = starts[:2]
    other = found.pop(("cql", 1, 0))
    assert found.pop(("cql", 1, 1)) == other
    assert all(those == found["cql", 0, 0] != other for those in found.values())


def test_target_networks_of_discrete_arms_are_copied_alike(learning: ModuleType) -> None:
    import learners
    from tasks import TASKS

    model = learners.make("cql", TASKS["cartpole"], 0, "f32").model
    config = learners.make("d3rlpy-cql", TASKS["cartpole"], 0, "f32").algo.config
    assert model.offline_target_update_interval == model.target_update_interval == config.target_update_interval == 200


@pytest.mark.parametrize("arm", ["cql", "calql", "sac", "d3rlpy-cql", "d3rlpy-calql", "d3rlpy-iql", "ours-d3rlpy-cql"])
def test_settings_of_the_host_reach_everyone(arm: str, learning: ModuleType) -> None:
    import learners
    from tasks import TASKS

    task = TASKS["bridge"]
    learner = learners.make(arm, task, 0, "f32")
    if "d3rlpy" in arm:
        assert type(learner.algo).__module__.startswith("cql_plugins" if arm.startswith("ours") else "d3rlpy")
        assert learner.algo.config.tau == task.host["tau"] == 0.01
        if arm != "d3rlpy-iql":
            assert learner.algo.config.initial_temperature == 0.1
    else:
        assert learner.model.tau == task.host["tau"] == 0.01
        assert learner.model.log_ent_coef.exp().item() == pytest.approx(0.1)
    plain = learners.make(arm, TASKS["pendulum"], 0, "f32")
    assert (plain.algo.config if "d3rlpy" in arm else plain.model).tau == 0.005


@pytest.mark.parametrize(
    ("task", "has_products", "asked", "expected"),
    [
        ("halfcheetah-replay", True, None, "bf16"),
        ("halfcheetah-replay", False, None, "f32"),
        ("halfcheetah-replay", False, "bf16", "bf16"),
        ("pendulum", True, None, "f32"),
    ],
)
def test_bfloat16_where_the_processor_has_it(
    task: str,
    has_products: bool,
    asked: str | None,
    expected: str,
    learning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import learners

    from cql_plugins import ensembles

    class MadeError(Exception):
        pass

    def make(arm: str, task: Any, seed: int, precision: str) -> Any:
        raise MadeError(precision)

    monkeypatch.setattr(learners, "make", make)
    monkeypatch.setattr(ensembles, "multiplies_bf16", lambda: has_products)
    with pytest.raises(MadeError, match=expected):
        learning.run_cell(learning.Cell(task, "cql", 0, False, asked, tmp_path, tmp_path))


def test_verdicts(learning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import claims

    monkeypatch.setattr(claims, "interval", lambda values: (sum(values) / len(values), min(values), max(values)))

    def verdict(values: list[float], against: list[float] | None = None, **options: Any) -> tuple[str, str, int]:
        arms = {"a": values, "b": against or []}
        found = {arm: [{"seed": seed, "x": x} for seed, x in enumerate(column)] for arm, column in arms.items()}
        other = "b" if against else None
        return claims.Claim("", "", "", "a", lambda run: run["x"], "u", against=other, **options).decide(found)

    assert verdict([1.0, 2.0]) == ("holds", "1.50 [1.00, 2.00] u", 2)
    assert verdict([1.0, 2.0], positive=False)[0] == "does not hold"
    assert verdict([-1.0, -2.0], positive=False)[0] == "holds"
    assert verdict([-1.0, 2.0])[0] == verdict([-1.0, 2.0], positive=False)[0] == "undecided"
    assert verdict([1.0])[::2] == ("not run", 1)
    assert verdict([5.0, 5.0, 9.0], [1.0, 2.0]) == ("holds", "3.50 [3.00, 4.00] u", 2), "seeds that both have"
    tuned = [{"seed": seed, "online": 1.0} for seed in range(3)] + [{"seed": 3}]
    assert claims.Claim("", "", "", "a", lambda run: run["online"], "u").decide({"a": tuned})[2] == 3, "not all were fine-tuned"
    with pytest.raises(KeyError, match="onlin'"):
        claims.Claim("", "", "", "a", lambda run: run["onlin"], "u").decide({"a": tuned})
    assert verdict([-4.0, 1.0], margin=5.0)[0] == "holds"
    assert verdict([-6.0, 1.0], margin=5.0)[0] == "undecided"
    assert verdict([-6.0, -7.0], margin=5.0)[0] == "does not hold"
    arms = {arm for grid in learning.GRIDS.values() for arm in grid.arms}
    for claim in claims.claims():
        assert {claim.arm, claim.against or claim.arm} <= arms, claim.text


def test_intervals_are_students(learning: ModuleType) -> None:
    import claims

    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)  # of two degrees of freedom
    assert claims.interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("predicted", "real", "on_its_way"),
    [
        ([0.0, 10.0, 20.0, 30.0], 31.0, True),  # nearly there, a third of it lately
        ([0.0, 10.0, 20.0, 30.0], 300.0, True),  # far away, and still rising
        ([0.0, 28.0, 29.0, 30.0], 300.0, False),  # far away, and no longer rising
        ([0.0, 10.0, 20.0, 30.0], 25.0, False),  # above it, and leaving it
        ([-150.0, -140.0, -130.0, -120.0], -100.0, True),  # below it, and rising
        ([-150.0, -102.0, -101.0, -100.96], -100.0, False),  # below it, and there for long
        ([0.0, -10.0, -20.0, -30.0], -90.0, True),  # from where critics start down to it
    ],
)
def test_levels_of_critics_that_are_on_their_way(
    predicted: list[float], real: float, on_its_way: bool, learning: ModuleType
) -> None:
    import claims

    run = {"seed": 0, "offline": [{"predicted": value, "actual": real} for value in predicted]}
    runs = [run, run | {"seed": 1}]
    assert claims.is_on_its_way(runs) == on_its_way
    level = claims.Claim("", "", "", "a", claims.bias, "u", of_level=True)
    assert (level.decide({"a": runs})[0] == "not settled") == on_its_way
    assert claims.Claim("", "", "", "a", claims.bias, "u").decide({"a": runs})[0] in ("holds", "does not hold")


def test_a_dip_is_none_where_the_score_only_rises(learning: ModuleType) -> None:
    import claims

    def run(*scores: float) -> dict[str, Any]:
        return {"online": [{"score": score} for score in scores]}

    assert claims.dip(run(50.0, 40.0, 60.0)) == 10.0
    assert claims.dip(run(50.0, 60.0, 70.0)) == 0.0


def test_tables_of_the_online_phase_have_the_runs_that_had_one(learning: ModuleType) -> None:
    import report

    offline: dict[str, Any] = {"offline": [{"score": 1.0}]}
    tuned = offline | {"online": [{"score": 1.0}, {"score": 2.0}]}
    assert report.with_online({"a": [tuned, offline], "b": [offline], "c": [tuned]}) == {"a": [tuned], "c": [tuned]}


def test_pointmaze_pays_the_same_in_the_log_and_in_the_environment(
    learning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gymnasium_robotics")
    import numpy as np
    import pointmaze
    import tasks

    log = pointmaze.collect(4, seed=0)
    assert 0 < log.rewards.sum() < len(log), "steps at the goal and others"
    monkeypatch.setattr(pointmaze, "collect", lambda n_episodes, seed: log)
    tasks.pointmaze_log.cache_clear()
    try:
        for name, paid in (("pointmaze", {-1.0, 0.0}), ("pointmaze-unshifted", {0.0, 1.0})):
            task = tasks.TASKS[name]
            data, env = task.load(), task.make_env()
            assert set(np.unique(data.rewards)) == paid
            np.testing.assert_array_equal(data.observations, _flat(log.observations))
            observation, _ = env.reset(seed=0)
            np.testing.assert_allclose(data.observations[0], observation, err_msg="the environment's order of the parts")
            rewards = []
            for action in data.actions[:300]:
                rewards.append(env.step(action)[1])
            np.testing.assert_array_equal(rewards, data.rewards[:300])
            assert task.score(list(data.episode_returns)) == pytest.approx(100 * log.rewards.sum() / len(log))
    finally:
        tasks.pointmaze_log.cache_clear()


def _flat(observations: Any) -> Any:
    import numpy as np

    return np.concatenate([np.asarray(observations[key]) for key in sorted(observations)], axis=1)
