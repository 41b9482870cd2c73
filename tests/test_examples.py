"""The examples run, write what they say, and (slow) the quick start's outcome is what its docstring claims."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DATA = Path(os.environ.get("CQL_PLUGINS_DATA", EXAMPLES.parents[1] / "shared" / "data"))


def load_example(name: str) -> ModuleType:
    """Import an example from its file, as `python examples/<name>.py` would, without running its main."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    return load_example("quickstart")


# The quick start ---------------------------------------------------------------------------------------------------------


def test_quickstart_writes_figure_and_numbers(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--gradient-steps", "20", "--online-steps", "70", "--eval-every", "30"]
    summary = quickstart.main([*budget, "--seed", "3", "--out", str(tmp_path / "out")])

    assert (tmp_path / "out" / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == summary
    assert list(summary["algorithms"]) == ["SAC", "CQL", "Cal-QL"]
    for result in summary["algorithms"].values():
        assert [point["step"] for point in result["curve"]] == [20, 30, 60, 90]
        assert result["offline"] == result["curve"][0]
        assert result["online"] == result["curve"][-1]
        for point in result["curve"]:
            assert all(math.isfinite(value) for value in point.values())
            assert 0 <= point["arrived"] <= 100
            assert 0 <= point["actual"] <= 10
        # 70 steps of an environment that stops walks after 60.
        assert 0 <= result["failed_walks"] <= result["walks"]
        assert result["walks"] >= 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("careful walkers", "SAC", "CQL", "Cal-QL", "after offline training"))


def test_quickstart_trains_nothing_where_there_are_no_online_steps(quickstart: ModuleType, tmp_path: Path) -> None:
    arguments = ["--gradient-steps", "3", "--online-steps", "0", "--eval-every", "2", "--out", str(tmp_path), "--no-progress"]
    results = quickstart.main(arguments)["algorithms"]
    assert all(result["offline"] == result["online"] and result["walks"] == 0 for result in results.values())


@pytest.mark.parametrize("seed", range(5))
def test_quickstart_log_is_what_it_claims(quickstart: ModuleType, seed: int) -> None:
    log = quickstart.make_log(seed)
    assert log.n_episodes == 60
    # Nobody drowns: who was terminated has arrived. Most walks run out of time.
    assert [episode.terminated for episode in log] == [value == 10.0 for value in log.episode_returns]
    assert 0.1 <= log.episode_returns.mean() / 10.0 <= 0.5
    assert set(log.episode_returns) == {0.0, 10.0}
    again = quickstart.make_log(seed)
    np.testing.assert_array_equal(log.observations, again.observations)


def test_quickstart_bridge_is_a_gymnasium_environment(quickstart: ModuleType) -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(quickstart.Bridge(), skip_render_check=True)


@pytest.mark.parametrize(
    ("position", "action", "reward", "terminated"),
    [
        pytest.param((-0.45, 0.0), (1.0, 0.0), 0.0, False, id="on the bridge"),
        pytest.param((-0.45, 0.3), (1.0, 0.0), 0.0, True, id="in the water"),
        pytest.param((0.78, 0.9), (1.0, 0.0), 10.0, True, id="arrived"),
        pytest.param((-0.9, 0.9), (-1.0, 1.0), 0.0, False, id="in the corner"),
    ],
)
def test_quickstart_bridge_rules(
    quickstart: ModuleType, position: tuple[float, float], action: tuple[float, float], reward: float, terminated: bool
) -> None:
    env = quickstart.Bridge()
    env.reset(seed=0)
    env.position = np.array(position)
    observation, got, ended, truncated, _ = env.step(np.array(action, dtype=np.float32))
    assert (got, ended, truncated) == (reward, terminated, False)
    assert env.observation_space.contains(observation)


@pytest.mark.slow
def test_quickstart_outcome(quickstart: ModuleType, tmp_path: Path) -> None:
    """The claim: offline SAC fails on the log; CQL and Cal-QL do better than the log, then and after online training."""
    summary = quickstart.main(["--out", str(tmp_path), "--no-progress"])
    of_log, results = summary["log"]["arrived"], summary["algorithms"]
    assert results["SAC"]["offline"]["arrived"] < of_log
    for name in ("CQL", "Cal-QL"):
        offline, online = results[name]["offline"], results[name]["online"]
        assert offline["arrived"] > 2 * of_log
        assert online["arrived"] > 2 * of_log
        assert offline["q_policy"] > offline["q_random"] + 0.5
        assert results[name]["failed_walks"] < results["SAC"]["failed_walks"]
    # SAC promises what it cannot keep.
    assert results["SAC"]["offline"]["predicted"] > results["SAC"]["offline"]["actual"] + 1.0


# The others ----------------------------------------------------------------------------------------------------------------


def test_no_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("no_environment")
    printed = example.main(["--gradient-steps", "60", "--out", str(tmp_path), "--no-progress"])

    assert {path.name for path in tmp_path.iterdir()} == {"heating.zip", "heating_scale.npz"}
    assert all(0.0 <= power <= 1.0 for power in printed["power"].values())
    # It has learned what every operator knew: a cold room is heated more.
    assert printed["power"][18.0] > printed["power"][24.0] + 0.2
    assert printed["q"]["log"] > printed["q"]["dice"]
    assert "heat at" in capsys.readouterr().out


def test_torchrun_cql(tmp_path: Path) -> None:
    """By its command line, on two processes."""
    if not pytest.importorskip("torch").distributed.is_gloo_available():
        pytest.skip("torch without Gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "torchrun_cql.py"), "--gradient-steps", "200", "--out", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["push.zip"]
    said = re.findall(r"at \(0.8, -0.8\) push \((-?[\d.]+), (-?[\d.]+)\)", done.stdout)
    assert len(said) == done.stdout.count("Using cpu device") == 1
    assert float(said[0][0]) < 0.0 < float(said[0][1])  # towards the origin


def test_d3rlpy_baselines(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)  # the script beside it
    results = load_example("d3rlpy_baselines").main(["--steps", "2", "--walks", "1"])
    assert list(results) == ["BC", "BCQ", "TD3+BC", "IQL", "Decision Transformer", "CQL (d3rlpy's)", "CQL", "Cal-QL"]
    assert all(0.0 <= result["arrived"] + result["drowned"] <= 100.0 for result in results.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("sac_to_cql", ["--gradient-steps", "3", "--timesteps", "3", "--out", "{out}"], "mean return"),
        ("d3rlpy_to_sb3", ["--gradient-steps", "3", "--timesteps", "8"], "after SB3"),
        ("vec_normalize", ["--gradient-steps", "3"], "observations normalised: mean return"),
        ("images", ["--gradient-steps", "2", "--episodes", "3"], "of 20; the log's is"),
        ("goals_her", ["--gradient-steps", "2"], "goals in hindsight: mean return"),
        ("custom_network", ["--gradient-steps", "3"], "SiLU()"),
        ("tracking", ["--gradient-steps", "4", "--timesteps", "65", "--eval-freq", "4", "--out", "{out}"], "CalQL_offline_1"),
    ],
)
def test_recipe(
    name: str,
    arguments: list[str],
    said: str,
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "d3rlpy_to_sb3":
        pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
    if name == "tracking":
        pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)  # the script beside it
    monkeypatch.chdir(tmp_path)
    result = load_example(name).main([argument.format(out=tmp_path) for argument in arguments])
    assert said in capsys.readouterr().out
    if name == "tracking":
        assert [path.parent.name for path in result] == ["CalQL_1", "CalQL_offline_1"]
    elif name == "vec_normalize":
        assert set(result) == {"as they are", "normalised"}
    elif name == "goals_her":
        assert result["as logged"] != result["in hindsight"]


def test_weights_and_biases(quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offline mode writes the curves of both phases, each under its run's name."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)
    monkeypatch.setenv("WANDB_MODE", "offline")
    budget = ["--gradient-steps", "200", "--timesteps", "250", "--eval-freq", "150"]
    load_example("tracking").main([*budget, "--wandb", "--out", str(tmp_path / "out")])
    wandb.finish()
    (found,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    for phase in ("CalQL_offline_1", "CalQL_1"):
        assert f"{phase}/train/cql_gap".encode() in found.read_bytes()


def test_sweep_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install ray"):
        load_example("sweep_ray").main([])


def test_images_of_a_dot_need_two_frames() -> None:
    """The environment is what the recipe says: a frame alone does not tell the speed."""
    from gymnasium.utils.env_checker import check_env

    example = load_example("images")
    env = example.Dot()
    check_env(env, skip_render_check=True)
    env.reset(seed=0)
    env.place, env.speed = 0.5, 0.1
    frame = env._frame()
    env.speed = -0.1
    np.testing.assert_array_equal(frame, env._frame())
    assert frame.sum() == 6 * 5 * 255
    assert example.make_log(3).episode_returns.mean() > 5.0


def test_goals_are_rewarded_where_they_are() -> None:
    from gymnasium.utils.env_checker import check_env

    example = load_example("goals_her")
    env = example.Reach()
    check_env(env, skip_render_check=True)
    assert env.compute_reward(np.zeros((2, 2)), np.array([[0.1, 0.1], [0.2, 0.0]]), None).tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("argument", "said"),
    [("D4RL/door/human-v2", "minari download D4RL/door/human-v2"), ("absent.hdf5", "absent.hdf5: expected an HDF5 file")],
)
def test_door_human_refuses_absent_data(argument: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said) as refusal:
        load_example("door_human").main([argument])
    assert isinstance(refusal.value.code, str)  # Goes to stderr, with exit status 1.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "steps"), [("minari", 2), ("hdf5", 2), ("minari", 0)])
def test_door_human(source: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("minari", "h5py", "gymnasium_robotics"):
        pytest.importorskip(module)
    dataset, path = {
        "minari": ("dapg/door/human-replay-v0", DATA / "minari" / "dapg" / "door" / "human-replay-v0"),
        "hdf5": (str(DATA / "d4rl" / "door-human.hdf5"), DATA / "d4rl" / "door-human.hdf5"),
    }[source]
    if source == "minari" and "0.5.4" not in pytest.importorskip("minari").supported_dataset_versions:
        pytest.skip("the real data was written by Minari 0.5.4")
    if not path.exists():
        pytest.skip(f"no {path.name} under {DATA}; CQL_PLUGINS_DATA says where to look")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(DATA / "minari"))
    example = load_example("door_human")

    arguments = [
        "--gradient-steps",
        str(steps),
        "--online-steps",
        "2",
        "--eval-episodes",
        "1",
        "--out",
        str(tmp_path),
        "--no-progress",
    ]
    # The HDF5 layout lacks the last next observation of each of the 25 episodes.
    notice = pytest.warns(UserWarning, match="25 transition") if source == "hdf5" else contextlib.nullcontext()
    with notice:
        result: dict[str, Any] = example.main([dataset, *arguments])

    written = {path.name for path in tmp_path.iterdir()}
    phases = {"offline": [2], "online": [2]} if steps else {"online": [2]}
    assert written == {"door.zip", "door_vecnormalize.pkl", "door.json", *(f"door_{phase}" for phase in phases)}
    assert {phase: list(curve) for phase, curve in result["scores"].items()} == phases
    assert all(-5.0 < score < 110.0 for curve in result["scores"].values() for score in curve.values())
    # The statistics are the dataset's, and were not lost on the way to the file.
    model = example.CalQL.load(tmp_path / "door.zip", device="cpu")
    normalization = example.VecNormalize.load(str(tmp_path / "door_vecnormalize.pkl"), example.make_vec_env(example.make_door))
    assert model.cql_alpha == 1.0
    assert normalization.obs_rms.count > 6_700
