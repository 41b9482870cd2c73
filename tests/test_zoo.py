"""`python -m cql_plugins.zoo`: RL Zoo's scripts with our algorithms, on logged data first."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("rl_zoo3")

import rl_zoo3
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from cql_plugins import sb3
from cql_plugins.sb3 import CQL, CalQL
from cql_plugins.sb3.presets import PRESETS
from cql_plugins.zoo import ALGOS, register
from cql_plugins.zoo._checkpoints import get_model_path
from cql_plugins.zoo.manager import (
    HYPERPARAMS,
    OfflineExperimentManager,
    _count_from_switch,
    _scaled_like,
    _Trial,
    read_dataset,
)
from tests import hub

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)  # the Zoo's, Optuna's and matplotlib's
SHORT = ["--eval-freq", "20", "--eval-episodes", "1", "--seed", "1", "-params", "learning_starts:5", "batch_size:8"]


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OfflineExperimentManager, "from_command_line", {})
    monkeypatch.setattr(rl_zoo3.exp_manager, "ExperimentManager", rl_zoo3.exp_manager.ExperimentManager)
    monkeypatch.setattr(rl_zoo3.utils, "get_model_path", rl_zoo3.utils.get_model_path)
    for table in (rl_zoo3.ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
        for name in ALGOS:
            monkeypatch.setitem(table, name, None)


@pytest.fixture
def log(tmp_path: Path) -> str:
    """Two episodes of Pendulum with random actions."""
    env = gym.make("Pendulum-v1")
    env.action_space.seed(0)
    columns: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "rewards", "next_observations")}
    for episode in range(2):
        observation, _ = env.reset(seed=episode)
        for _ in range(200):
            action = env.action_space.sample()
            following, reward, *_ = env.step(action)
            for name, value in zip(columns, (observation, action, reward, following), strict=True):
                columns[name].append(value)
            observation = following
    flags = {"terminals": np.zeros(400, bool), "timeouts": np.arange(400) % 200 == 199}
    np.savez(tmp_path / "log.npz", **{name: np.array(values) for name, values in columns.items()}, **flags)
    return str(tmp_path / "log.npz")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
    runpy.run_module("cql_plugins.zoo", run_name="__main__")


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str, algo: str = "cql", env: str = "Pendulum-v1") -> Path:
    run(monkeypatch, "train", "--algo", algo, "--env", env, "-f", "logs", *SHORT, *arguments)
    return max(Path("logs", algo).iterdir(), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("algo", ["cql", "calqltqc"])
def test_trains_offline_then_online_then_goes_on(algo: str, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "60", "--save-replay-buffer", algo=algo)
    config = yaml.unsafe_load((folder / "Pendulum-v1" / "config.yml").read_text())
    assert (config["dataset"], config["offline_steps"]) == (log, 40)
    assert list(config) == sorted(config)
    evaluations = np.load(folder / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [-20, 0, 20, 40, 60], "before 0: gradient steps on the data"
    register()
    model: Any = rl_zoo3.ALGOS[algo].load(folder / "Pendulum-v1.zip")
    assert (model._n_offline_steps, model.num_timesteps, model._n_updates) == (40, 60, 40 + 55)
    again = train(monkeypatch, "--dataset", log, "-n", "30", "-i", str(folder / "Pendulum-v1.zip"), algo=algo)
    resumed: Any = rl_zoo3.ALGOS[algo].load(again / "Pendulum-v1.zip")
    assert resumed._n_offline_steps == 40, "the data is in its batches; it is not learnt anew"
    assert resumed._n_updates > model._n_updates
    more = train(
        monkeypatch, "--dataset", log, "-n", "0", "--offline-steps", "7", "-i", str(folder / "Pendulum-v1.zip"), algo=algo
    )
    assert rl_zoo3.ALGOS[algo].load(more / "Pendulum-v1.zip")._n_offline_steps == 47


@pytest.mark.parametrize(("calls", "expected"), [(None, [-20, 0, 20, 40]), (33, [-13, 7, 27])])
def test_evaluations_of_a_run_that_goes_on(
    calls: int | None, expected: list[int], log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient steps are counted on; a callback may end the phase before they are done."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls != calls

    first = train(monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "20")
    assert np.load(first / "evaluations.npz")["timesteps"].tolist() == [-20, 0, 20]
    create_callbacks = OfflineExperimentManager.create_callbacks
    monkeypatch.setattr(
        OfflineExperimentManager,
        "create_callbacks",
        lambda self: (create_callbacks(self), self.callbacks.append(Stop()))[0],
    )
    resume = ["--offline-steps", "40", "-n", "40", "-i", str(first / "Pendulum-v1.zip")]
    folder = train(monkeypatch, "--dataset", log, *resume)
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == expected


def test_offline_alone_and_enjoy_and_plot(log: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = train(monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "0")
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [-20, 0], "no online evaluation writes the file again"
    assert CQL.load(folder / "Pendulum-v1.zip").num_timesteps == 0
    capsys.readouterr()
    run(monkeypatch, "enjoy", "--algo", "cql", "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "200", "--seed", "2")
    out = capsys.readouterr().out
    assert "Loading logs/cql/Pendulum-v1_1/Pendulum-v1.zip" in out
    assert "Episode Length 200" in out


SCRIPTS = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["zoo", *arguments]
    runpy.run_module("cql_plugins.zoo", run_name="__main__")
"""  # in a process that has not read HF_ENDPOINT before


def test_to_the_hub_and_back(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client against a hub of this machine; one run with normalised observations, one without."""
    train(monkeypatch, "--dataset", log, "--offline-steps", "5", "-n", "10")
    normalised = ["-n", "10", "-params", "normalize:True", "learning_starts:5"]
    train(monkeypatch, *normalised, algo="discrete_cql", env="CartPole-v1")
    runs = (("cql", "Pendulum-v1", False), ("discrete_cql", "CartPole-v1", True))
    commands = []
    for algo, env, _ in runs:
        names = ["--algo", algo, "--env", env]
        commands.append(["push_to_hub", *names, "-orga", "someone", "-f", "logs", "--no-render"])
        commands.append(["load_from_hub", *names, "-orga", "someone", "-f", "downloads"])
        commands.append(["enjoy", *names, "-f", "downloads", "--no-render", "-n", "10"])
    commands.append(["load_from_hub", "--algo", "cql", "--env", "Acrobot-v1", "-orga", "someone", "-f", "downloads"])
    with hub.serve() as server:
        settings = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_none", "HF_HOME": "home", "TRUST_REMOTE_CODE": "True"}
        paths = os.pathsep.join(sys.path)
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPTS, json.dumps(commands)],
            env={**os.environ, **settings, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "Acrobot-v1/resolve/main/cql-Acrobot-v1.zip" in child.stderr.splitlines()[-1], child.stderr
    for algo, env, is_normalised in runs:
        held = server.repositories[f"someone/{algo}-{env}"]
        assert held[f"{algo}-{env}.zip"][:2] == b"PK"
        assert ("vec_normalize.pkl" in held) == is_normalised
        card = held["README.md"].decode()
        assert f"python -m cql_plugins.zoo load_from_hub --algo {algo} --env {env} -orga someone" in card
        assert "rl_zoo3." not in card
        assert f"Loading downloads/{algo}/{env}_1/{env}.zip" in child.stdout
        assert (tmp_path / "downloads" / algo / f"{env}_1" / env / "vecnormalize.pkl").exists() == is_normalised
        files = (Path(at, algo, f"{env}_1", f"{env}.zip") for at in ("logs", "downloads"))
        ours, theirs = (getattr(sb3, ALGOS[algo]).load(file).policy.state_dict() for file in files)
        assert all(value.equal(theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("algo", "changed"), [("cql", True), ("calql", True), ("sac", False), ("cqlish", False)])
def test_model_cards_name_what_can_load_them(algo: str, changed: bool, tmp_path: Path) -> None:
    from cql_plugins.zoo._hub import correct_card

    card = tmp_path / "README.md"
    written = f"pip install rl_zoo3\npython -m rl_zoo3.enjoy --algo {algo} --env Pendulum-v1 -f logs\n"
    card.write_text(written)
    correct_card(card, tuple(ALGOS))
    ours = f'pip install "cql-plugins[zoo]"\npython -m cql_plugins.zoo enjoy --algo {algo} --env Pendulum-v1 -f logs\n'
    assert card.read_text() == (ours if changed else written)
    correct_card(tmp_path / "none.md", tuple(ALGOS))
    assert not (tmp_path / "none.md").exists()


def test_a_dataset_changes_what_is_learnt(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_data = train(monkeypatch, "--dataset", log, "--offline-steps", "5", "-n", "10")
    without = train(monkeypatch, "-n", "10")
    assert "dataset" not in yaml.unsafe_load((without / "Pendulum-v1" / "config.yml").read_text())
    first, second = (CQL.load(folder / "Pendulum-v1.zip") for folder in (with_data, without))
    assert (first._n_offline_steps, second._n_offline_steps) == (5, 0)
    assert second.num_timesteps == 10


@pytest.mark.parametrize("n_timesteps", ["0", "40"])
def test_tuning(n_timesteps: str, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, float]] = []
    learn_offline = CQL.learn_offline

    def watched(self: Any, dataset: Any, steps: int, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(dataset), steps, self.cql_alpha))
        return learn_offline(self, dataset, steps, *args, **kwargs)

    monkeypatch.setattr(CQL, "learn_offline", watched)
    run(
        monkeypatch, "train", "--algo", "cql", "--env", "Pendulum-v1", "-f", "logs", "--seed", "1", "-n", n_timesteps,
        "--dataset", log, "--offline-steps", "20", "-optimize", "--n-trials", "3", "--n-evaluations", "2",
        "--eval-episodes", "1", "--sampler", "random", "--pruner", "none", "--no-optim-plots",
    )  # fmt: skip
    (report,) = Path("logs", "cql").glob("report_*.csv")
    lines = report.read_text().splitlines()
    assert len(lines) == 4
    assert "params_cql_alpha" in lines[0]
    assert [row[:2] for row in seen] == [(400, 20)] * 3
    assert len({row[2] for row in seen}) == 3, "each trial has a weight of its own"
    assert all(0.1 <= row[2] <= 20.0 for row in seen)
    assert rl_zoo3.ALGOS["cql"] is CQL, "the class of the trials is gone"


def test_a_pruned_trial_ends_with_its_offline_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        def __init__(self) -> None:
            self.phases: list[tuple[str, int]] = []

        def learn_offline(self, dataset: Any, steps: int, **kwargs: Any) -> None:
            self.phases.append(("offline", steps))

        def learn(self, steps: int, **kwargs: Any) -> None:
            self.phases.append(("online", steps))

    trial = type("Trial", (_Trial, Host), {"trial_dataset": None, "trial_offline_steps": 20})
    callback = type("Callback", (BaseCallback,), {"_on_step": lambda self: True, "is_pruned": False})()
    for pruned, phases in ((False, [("offline", 20), ("online", 30)]), (True, [("offline", 20)])):
        model, callback.is_pruned = trial(), pruned
        assert model.learn(50, callback=[callback]) is model
        assert model.phases == phases


@pytest.mark.parametrize("n_envs", [1, 2])
def test_trials_are_evaluated_as_often_with_several_environments(
    n_envs: int, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate = TrialEvalCallback._on_step

    def watched(self: Any) -> bool:
        before = self.eval_idx
        goes_on = evaluate(self)
        seen.extend([(self.model._n_offline_steps, self.num_timesteps)] * (self.eval_idx - before))
        return goes_on

    monkeypatch.setattr(TrialEvalCallback, "_on_step", watched)
    train(
        monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "40", "-optimize", "--n-trials", "1",
        "--n-evaluations", "4", "--sampler", "random", "--pruner", "none", "--no-optim-plots",
        "-params", "learning_starts:5", f"n_envs:{n_envs}",
    )  # fmt: skip
    assert seen == [(20, 20), (40, 40), (40, 20), (40, 40)]


@pytest.mark.parametrize(("call", "evaluations"), [(4, None), (24, [-3])])
def test_ctrl_c_keeps_what_was_learnt_offline(
    call: int, evaluations: list[int] | None, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = CQL.train, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        done.append(1)
        if len(done) == call:
            raise KeyboardInterrupt
        step(self, *args, **kwargs)

    monkeypatch.setattr(CQL, "train", interrupted)
    folder = train(monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "60")
    model = CQL.load(folder / "Pendulum-v1.zip")
    assert (model._n_offline_steps, model.num_timesteps, model._n_updates) == (call - 1, 0, call - 1)
    assert (folder / "evaluations.npz").exists() == (evaluations is not None)
    if evaluations is not None:
        assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == evaluations


def test_evaluations_are_counted_anew_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evaluation(EvalCallback):
        def __init__(self, log_path: str | None) -> None:
            self.log_path, self.evaluations_timesteps = log_path, [20, 40]

    file = tmp_path / "evaluations.npz"
    written = {"timesteps": [20, 40], "results": [[1.5], [2.5]], "ep_lengths": [[3], [4]], "successes": [[True], [False]]}
    np.savez(file, **written)  # type: ignore[arg-type]

    def is_there(steps: list[int]) -> bool:
        found = np.load(file)
        return {name: found[name].tolist() for name in found.files} == written | {"timesteps": steps}

    savez = np.savez

    def fails(place: Any, **columns: Any) -> None:
        place.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="No space left on device"):
        _count_from_switch(Evaluation(str(tmp_path / "evaluations")), 40)
    assert is_there([20, 40])
    assert list(tmp_path.glob("*eval*")) == [file]
    monkeypatch.setattr(np, "savez", savez)
    _count_from_switch(Evaluation(str(tmp_path / "evaluations")), 40)
    assert is_there([-20, 0])
    interrupted = Evaluation(str(tmp_path / "evaluations"))
    interrupted.evaluations_timesteps.append(60)
    _count_from_switch(interrupted, 63)
    assert is_there([-43, -23])
    whole = file.read_bytes()
    for part in (None, b"", whole[:2], whole[:99]):  # The model has to be saved all the same.
        file.unlink() if part is None else file.write_bytes(part)
        _count_from_switch(Evaluation(str(tmp_path / "evaluations")), 40)
        assert (file.read_bytes() if file.exists() else None) == part
    file.write_bytes(whole)
    alone = Evaluation(None)
    _count_from_switch(alone, 41)
    assert alone.evaluations_timesteps == [-21, -1]
    assert is_there([-43, -23])


CALLBACKS = """callback:[
    {'stable_baselines3.common.callbacks.CheckpointCallback':
        {'save_freq': 20, 'save_path': 'own', 'save_replay_buffer': True, 'save_vecnormalize': True}},
    {'rl_zoo3.callbacks.SaveVecNormalizeCallback': {'save_freq': 20, 'save_path': 'own', 'name_prefix': 'scales'}},
    {'rl_zoo3.callbacks.SaveVecNormalizeCallback': {'save_freq': 20, 'save_path': 'own'}},
]"""


@pytest.mark.parametrize("n_envs", [1, 2])
def test_checkpoints_and_evaluations_of_both_phases(n_envs: int, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None overwrites another; the Zoo's own come as often as asked, whatever the number of environments."""
    folder = train(
        monkeypatch, "--dataset", log, "--offline-steps", "40", "-n", "40", "--save-freq", "20",
        "-params", "batch_size:8", "learning_starts:5", "buffer_size:200", f"n_envs:{n_envs}",
        "normalize:'dict(norm_obs=True, norm_reward=False)'", CALLBACKS,
    )  # fmt: skip
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [-20, 0, 20, 40]
    saved = {path.name: CQL.load(path) for path in folder.glob("rl_model*")}
    assert {name: model._n_offline_steps for name, model in saved.items()} == {
        "rl_model_offline_20_steps.zip": 20,
        "rl_model_offline_40_steps.zip": 40,
        "rl_model_20_steps.zip": 40,
        "rl_model_40_steps.zip": 40,
    }
    offline, online = ["offline_20", "offline_40"], ["20", "40"] if n_envs == 1 else ["40"]  # A user's own count calls.
    expected = {"vecnormalize.pkl", *(f"scales_{steps}_steps.pkl" for steps in offline + online)}
    expected |= {f"rl_model_{steps}_steps.zip" for steps in offline + online}
    for kind in ("replay_buffer_", "vecnormalize_"):
        expected |= {f"rl_model_{steps.replace('offline_', f'offline_{kind}')}_steps.pkl" for steps in offline}
        expected |= {f"rl_model_{kind}{steps}_steps.pkl" for steps in online}
    assert {path.name for path in Path("own").iterdir()} == expected


def test_checkpoints_are_found(log: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The online one where both phases have that number, and for the last; the offline one where there is no other."""
    steps = ["--offline-steps", "40", "-n", "20", "--save-freq", "20", "--eval-freq", "-1"]
    both = train(monkeypatch, "--dataset", log, *steps)
    steps[3] = "0"
    offline = train(monkeypatch, "--dataset", log, *steps, algo="calql")
    enjoy = ["enjoy", "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "2"]
    for folder, which, found in [
        (both, ["--load-checkpoint", "20"], "rl_model_20_steps"),
        (both, ["--load-checkpoint", "40"], "rl_model_offline_40_steps"),
        (both, ["--load-last-checkpoint"], "rl_model_20_steps"),
        (offline, ["--load-checkpoint", "20"], "rl_model_offline_20_steps"),
        (offline, ["--load-last-checkpoint"], "rl_model_offline_40_steps"),
    ]:
        capsys.readouterr()
        run(monkeypatch, *enjoy, "--algo", folder.parent.name, *which)
        assert f"Loading {folder / found}.zip" in capsys.readouterr().out
    Path("logs", "none", "Pendulum-v1_1").mkdir(parents=True)
    for algo, *asked in [("cql", False, 60, False), ("cql", True, 40, False), ("none", False, None, True)]:
        with pytest.raises(ValueError, match=r"No (model|checkpoint) found for .*, path: (?!.*offline)"):
            get_model_path(1, "logs", algo, EnvironmentName("Pendulum-v1"), *asked)


@pytest.mark.parametrize(("given", "offline", "online"), [("-2", 0, None), ("-1", 1000, "none given"), ("7", 7, 7)])
def test_log_interval(given: str, offline: int, online: Any, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    learn_offline, learn = CQL.learn_offline, CQL.learn

    def watched_offline(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["log_interval"])
        return learn_offline(self, *args, **kwargs)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("log_interval", "none given"))
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(CQL, "learn_offline", watched_offline)
    monkeypatch.setattr(CQL, "learn", watched)
    train(monkeypatch, "--dataset", log, "--offline-steps", "2", "-n", "2", "--eval-freq", "-1", "--log-interval", given)
    assert seen == [offline, online]


def yaml_entries(algo: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((HYPERPARAMS / f"{algo}.yml").read_text())


FAMILIES = [
    ("cql", "HalfCheetah-v5", "locomotion"), ("cql", "Ant-v5", "locomotion"), ("cql", "AdroitHandDoor-v1", "adroit-human"),
    ("calql", "AntMaze_UMaze-v5", "antmaze"), ("cql", "PointMaze_Large-v3", "antmaze"),
    ("calql", "PointMaze_UMaze-v3", "antmaze"), ("cql", "FrankaKitchen-v1", "kitchen"),
    ("calql", "FrankaKitchen-v1", "kitchen"),
]  # fmt: skip


@pytest.mark.parametrize(("algo", "env", "family"), FAMILIES)
def test_published_settings(algo: str, env: str, family: str) -> None:
    entry, preset = yaml_entries(algo)[env], PRESETS[family]
    algorithm = {"cql": CQL, "calql": CalQL}[algo]
    expected = preset.arguments(algorithm)
    found = {name: entry[name] for name in expected if name != "policy_kwargs"}
    found["cql_clip_diff"] = tuple(found["cql_clip_diff"]) if "cql_clip_diff" in found else None
    assert found == {"cql_clip_diff": None} | {name: value for name, value in expected.items() if name != "policy_kwargs"}
    assert eval(entry["policy_kwargs"]) == expected["policy_kwargs"]
    assert entry["offline_steps"] == preset.offline_steps
    normalized = eval(entry.get("normalize", "dict(norm_obs=False)"))
    assert normalized["norm_obs"] == preset.normalize_observations
    assert not normalized.get("norm_reward", False)
    wrappers = [wrapper for wrapper in entry.get("env_wrapper", []) if isinstance(wrapper, dict)]
    (scale,) = (wrappers or [{"": {"scale": 1.0, "shift": 0.0}}])[0].values()
    assert (scale["scale"], scale["shift"]) == (preset.reward_scale, preset.reward_shift)


@pytest.mark.parametrize("algo", ["cqlqrdqn", "calqlqrdqn"])
def test_published_settings_of_atari(algo: str) -> None:
    entry, expected = yaml_entries(algo)["atari"], dict(PRESETS["atari-10"].values)
    assert eval(entry["policy_kwargs"]) == expected.pop("policy_kwargs")
    assert {name: entry[name] for name in expected} == expected


@pytest.mark.parametrize("algo", sorted(ALGOS))
def test_every_entry_makes_a_model(algo: str) -> None:
    import inspect

    register()
    assert rl_zoo3.ALGOS[algo] is getattr(sb3, ALGOS[algo])
    taken = inspect.signature(rl_zoo3.ALGOS[algo]).parameters
    of_the_zoo = {"n_timesteps", "offline_steps", "normalize", "env_wrapper", "frame_stack"}
    entries = yaml_entries(algo)
    assert "default" in entries
    for env, entry in entries.items():
        assert set(entry) - of_the_zoo <= set(taken), env


def test_rewards_are_scaled_like_the_environment(log: str) -> None:
    dataset = read_dataset(log)
    scaled = _scaled_like([{"cql_plugins.sb3.ScaleReward": {"scale": 10.0, "shift": -5.0}}], dataset)
    np.testing.assert_allclose(scaled.rewards, 10.0 * dataset.rewards - 5.0)
    for other in (None, "gymnasium.wrappers.FlattenObservation", ["gymnasium.wrappers.FlattenObservation"]):
        assert _scaled_like(other, dataset) is dataset


def test_refusals(log: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"expected SCRIPT to be one of train, enjoy.*; got 'trian'"):
        run(monkeypatch, "trian")
    with pytest.raises(SystemExit, match="got nothing"):
        run(monkeypatch)
    with pytest.raises(ValueError, match="--offline-steps: expected --dataset beside it"):
        train(monkeypatch, "--offline-steps", "3")
    with pytest.raises(ValueError, match="--dataset: sac cannot learn from logged data; take --algo cql"):
        train(monkeypatch, "--dataset", log, algo="sac")
    with pytest.raises(SystemExit):
        run(monkeypatch, "train", "--help")
    out = capsys.readouterr().out
    assert "--offline-steps N" in out
    assert "--optimize-hyperparameters" in out
