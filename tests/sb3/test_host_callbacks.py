"""Callbacks, loggers and TensorBoard, in `learn` and with gradient steps as the clock in `learn_offline`.

SB3's topics callbacks, logger and tensorboard.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import HParam, configure
from stable_baselines3.common.utils import LinearSchedule

from cql_plugins.sb3 import CQL, CalQL

pytestmark = pytest.mark.parametrize("algorithm", [CQL, CalQL])


class Journal(BaseCallback):
    """Writes down what a callback can see."""

    def __init__(self, stop_at: int | None = None, answer: Any = False) -> None:
        super().__init__()
        self.events: list[str] = []
        self.clock: list[int] = []
        self.rates: list[tuple[float, ...]] = []
        self.updates: list[int] = []
        self.stop_at, self.answer = stop_at, answer

    def _on_training_start(self) -> None:
        self.events.append("start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout")

    def _on_training_end(self) -> None:
        self.events.append("end")

    def _on_step(self) -> Any:
        assert self.locals["self"] is self.model
        self.clock.append(self.num_timesteps)
        self.updates.append(self.model._n_updates)
        optimizers = (self.model.critic.optimizer, self.model.actor.optimizer)
        self.rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers))
        return self.answer if self.num_timesteps == self.stop_at else True


# The whole set at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["learn", "learn_offline"])
def test_all_of_sb3s_callbacks(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, phase: str, quiet_progress_bar: Any
) -> None:
    model = host.build(algorithm, train_freq=4, learning_starts=4)
    checkpoint = CheckpointCallback(save_freq=12, save_path=str(tmp_path))
    improvement = StopTrainingOnNoModelImprovement(max_no_improvement_evals=50, min_evals=1)
    evaluation = EvalCallback(
        host.Corridor(),
        callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=1e6),
        callback_after_eval=improvement,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        eval_freq=8,
        n_eval_episodes=1,
        warn=False,
        verbose=0,
    )
    on_event = CheckpointCallback(save_freq=1, save_path=str(tmp_path), name_prefix="event")
    event = EveryNTimesteps(n_steps=10, callback=on_event)
    log = LogEveryNTimesteps(n_steps=6)
    episodes = StopTrainingOnMaxEpisodes(max_episodes=100)
    callbacks = CallbackList([checkpoint, evaluation, event, log, episodes])
    learn = model.learn if phase == "learn" else lambda *args, **kwargs: model.learn_offline(dataset, *args, **kwargs)
    learn(24, callback=callbacks)

    # One event for each tick of the phase's clock.
    assert evaluation.evaluations_timesteps == [8, 16, 24]
    assert improvement.n_calls == 3
    assert (on_event.n_calls, log.last_time_trigger) == (2, 24)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved >= {"rl_model_12_steps.zip", "rl_model_24_steps.zip", "event_10_steps.zip", "event_20_steps.zip"}
    assert saved >= {"best_model.zip", "evaluations.npz"}
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [8, 16, 24]
    assert event.n_calls == event.num_timesteps == 24
    # Children share the parents' local variables.
    assert checkpoint.locals["infos"] is callbacks.locals["infos"] is on_event.locals["infos"]
    if phase == "learn":
        assert model.observation_space.contains(callbacks.locals["new_obs"][0])
    algorithm.load(tmp_path / "best_model", env=host.corridors()).learn(8)

    learn(8, callback=None)
    learn(8, callback=[CheckpointCallback(4, str(tmp_path / "list")), Journal()], progress_bar=True)
    assert len(list((tmp_path / "list").iterdir())) == 2
    (bar,) = quiet_progress_bar()
    assert bar.closed
    seen = []
    learn(8, callback=lambda local, _: seen.append(local["self"]._n_updates) or True)
    assert len(seen) == 8


# The clock of learn_offline --------------------------------------------------------------------------------------------


def test_gradient_steps_are_the_clock(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    model.learn(12)
    journal = Journal()
    model.learn_offline(dataset, 5, callback=journal)
    assert journal.clock == [1, 2, 3, 4, 5]
    assert journal.updates == [3, 4, 5, 6, 7]
    assert journal.events == ["start", "end"]
    assert journal.n_calls == 5
    # Environment steps are counted on their own.
    assert model.num_timesteps == 12

    again = Journal()
    model.learn_offline(dataset, 3, callback=again)
    assert again.clock == [6, 7, 8]
    online = Journal()
    model.learn(4, callback=online, reset_num_timesteps=False)
    assert online.clock == [13, 14, 15, 16]
    assert "rollout" in online.events


def test_nothing_steps_the_environment(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    model.learn_offline(dataset, 5)
    assert model.get_env().envs[0].unwrapped.taken == []
    assert model.replay_buffer.size() == 0
    assert model._last_obs is None


def test_no_gradient_steps(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    before, journal = host.state(model), Journal()
    assert model.learn_offline(dataset, 0, callback=journal) is model
    assert journal.events == ["start", "end"]
    assert not host.differing(before, host.state(model))
    with pytest.raises(ValueError, match="gradient_steps must not be negative; got -1"):
        model.learn_offline(dataset, -1)


def test_schedules_follow_the_clock(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(
        algorithm,
        learning_rate=LinearSchedule(1e-2, 0.0, 1.0),
        actor_learning_rate=lambda left: 1e-3 * left,
        cql_lagrange_threshold=1.0,
    )
    journal = Journal()
    model.learn_offline(dataset, 4, callback=journal)
    # The first gradient step has the whole run before it.
    expected = [(1e-2 * left, 1e-3 * left) for left in (1.0, 0.75, 0.5, 0.25)]
    np.testing.assert_allclose(journal.rates, expected)
    assert model.cql_lagrange_optimizer.param_groups[0]["lr"] == journal.rates[-1][0]
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == journal.rates[-1][1]
    # A second run goes on in one count, as SB3's `learn(reset_num_timesteps=False)` does: 4 of 8 are done.
    again = Journal()
    model.learn_offline(dataset, 4, callback=again)
    np.testing.assert_allclose(again.rates, [(1e-2 * left, 1e-3 * left) for left in (0.5, 0.375, 0.25, 0.125)])


def test_schedules_online(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm, learning_rate=LinearSchedule(1e-2, 0.0, 1.0), actor_learning_rate=None, learning_starts=0)
    journal = Journal()
    model.learn(5, callback=journal)
    # The callback of a step comes before its update.
    np.testing.assert_allclose(journal.rates[1:], [(1e-2 * left,) * 2 for left in (0.8, 0.6, 0.4, 0.2)])


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, np.bool_(False), th.tensor(False)])
@pytest.mark.parametrize("phase", ["learn", "learn_offline"])
def test_a_callback_stops_the_run(algorithm: Any, host: Any, dataset: Any, answer: Any, phase: str) -> None:
    model = host.build(algorithm, learning_starts=0)
    journal = Journal(stop_at=3, answer=answer)
    if phase == "learn":
        model.learn(10, callback=journal)
    else:
        model.learn_offline(dataset, 10, callback=journal)
        assert model._n_updates == 3
        assert model.num_timesteps == 0
    assert journal.n_calls == 3
    assert journal.events[-1] == "end"


def test_reward_threshold_stops_an_offline_run(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1e6)
    evaluation = EvalCallback(host.Corridor(), callback_on_new_best=stop, eval_freq=4, n_eval_episodes=1, warn=False, verbose=0)
    model.learn_offline(dataset, 20, callback=evaluation)
    assert model._n_updates == 4


def test_no_improvement_stops_an_offline_run(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm, learning_rate=0.0, actor_learning_rate=0.0)
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    evaluation = EvalCallback(
        host.Corridor(start=0.5), callback_after_eval=stop, eval_freq=2, n_eval_episodes=1, warn=False, verbose=0
    )
    model.learn_offline(dataset, 40, callback=evaluation)
    # The first evaluation is the best; the next two that are no better end it.
    assert model._n_updates == 6


def test_episodes_stop_an_online_run_only(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm, host.corridors(2), learning_starts=100)
    stop = StopTrainingOnMaxEpisodes(max_episodes=1)
    model.learn_offline(dataset, 12, callback=stop)
    assert (model._n_updates, stop.n_episodes) == (12, 0)
    model.learn(100, callback=stop)
    assert stop.n_episodes == 2
    assert 2 <= model.num_timesteps <= 32


def test_an_error_in_a_callback_leaves_the_clock_right(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    model.learn(12)

    def fail(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps == 2:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        model.learn_offline(dataset, 5, callback=fail)
    assert model.num_timesteps == 12
    model.learn_offline(dataset, 5).learn(2, reset_num_timesteps=False)
    assert model.num_timesteps == 14


# Local variables -------------------------------------------------------------------------------------------------------


def test_local_variables(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    seen: list[dict[str, Any]] = []

    def look(local: dict[str, Any], everything: dict[str, Any]) -> bool:
        assert isinstance(everything, dict)
        seen.append(dict(local))
        return True

    model.learn_offline(dataset, 3, callback=look, tb_log_name="name", log_interval=7)
    # No environment took a step, so there is nothing in the lists, but they are there to look at.
    for local in seen:
        assert local["self"] is model
        assert local["infos"] == []
        assert len(local["dones"]) == 0
        assert (local["total_timesteps"], local["tb_log_name"], local["log_interval"]) == (3, "name", 7)
    seen.clear()
    model.learn(3, callback=look)
    assert {"self", "infos", "dones", "rewards", "new_obs", "actions", "replay_buffer"} <= seen[0].keys()


def test_callbacks_that_need_an_environment(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = algorithm.from_dataset(dataset, **host.tiny(algorithm))
    model.learn_offline(dataset, 4, callback=[CheckpointCallback(2, str(tmp_path)), LogEveryNTimesteps(2), Journal()])
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(AssertionError, match="initialize the model with an environment"):
        model.learn_offline(dataset, 4, callback=EvalCallback(host.Corridor(), warn=False))
    assert model.num_timesteps == 0
    model.learn_offline(dataset, 1)


def test_progress_bar(algorithm: Any, host: Any, dataset: Any, quiet_progress_bar: Any) -> None:
    model = host.build(algorithm, host.corridors(2))
    model.learn_offline(dataset, 6, progress_bar=True)
    model.learn_offline(dataset, 4, callback=lambda *_: True, progress_bar=True)
    model.learn(16, progress_bar=True)
    assert [(bar.total, bar.n, bar.closed) for bar in quiet_progress_bar()] == [(6, 6, True), (4, 4, True), (16, 16, True)]
    alone = algorithm.from_dataset(dataset, **host.tiny(algorithm))
    alone.learn_offline(dataset, 3, progress_bar=True)
    assert quiet_progress_bar()[-1].n == 3
    # SB3's own callback, given by hand, counts environments' steps.
    host.build(algorithm).learn_offline(dataset, 3, callback=ProgressBarCallback())
    assert quiet_progress_bar()[-1].n == 3


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_the_real_progress_bar(algorithm: Any, host: Any, dataset: Any) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    host.build(algorithm).learn_offline(dataset, 2, progress_bar=True).learn(2, progress_bar=True)


# Loggers --------------------------------------------------------------------------------------------------------------


def _log_to(model: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    model.set_logger(configure(str(folder), ["csv"]))
    request.addfinalizer(model.logger.close)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


ALWAYS = ["critic_loss", "bellman_loss", "q_data", "actor_loss", "ent_coef", "learning_rate", "actor_learning_rate"]
OF_THE_GAP = ["cql_gap", "cql_loss", "q_policy", "q_random"]


@pytest.mark.parametrize("phase", ["learn", "learn_offline"])
def test_what_is_logged(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, phase: str, request: pytest.FixtureRequest
) -> None:
    model = host.build(algorithm, host.Corridor(), cql_lagrange_threshold=1.0, learning_starts=0)
    _log_to(model, tmp_path, request)
    if phase == "learn":
        model.learn(40, log_interval=2)
    else:
        model.learn_offline(dataset, 10, log_interval=4)
    names = [*ALWAYS, *OF_THE_GAP, "cql_alpha", "ent_coef_loss", "n_updates"] + ["bound_rate"] * (algorithm is CalQL)
    rows = _rows(tmp_path / "progress.csv")
    for row in rows:
        values = {name: float(row[f"train/{name}"]) for name in names}
        assert all(np.isfinite(value) for value in values.values())
        np.testing.assert_allclose(values["critic_loss"], values["bellman_loss"] + values["cql_loss"], rtol=1e-4, atol=1e-6)
        assert (values["learning_rate"], values["actor_learning_rate"]) == (3e-4, 1e-4)
    assert "train/bound_rate" in rows[0] or algorithm is CQL
    if phase == "learn":
        assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/episodes"} <= rows[0].keys()
    else:
        # At every interval, and what is left at the end.
        assert [int(row["time/gradient_steps"]) for row in rows] == [4, 8, 10]
        assert [int(row["train/n_updates"]) for row in rows] == [4, 8, 10]


def test_without_a_gap_nothing_of_it_is_logged(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = host.build(algorithm, cql_alpha_online=0.0, ent_coef=0.1)
    for folder, run in (("offline", lambda: model.learn_offline(dataset, 4)), ("online", lambda: model.learn(40))):
        _log_to(model, tmp_path / folder, request)
        run()
        logged = _rows(tmp_path / folder / "progress.csv")[-1].keys()
        assert {f"train/{name}" for name in ALWAYS} <= logged
        assert {f"train/{name}" for name in OF_THE_GAP} & logged == (
            {f"train/{name}" for name in OF_THE_GAP} if folder == "offline" else set()
        )
        assert not {"train/ent_coef_loss", "train/cql_alpha"} & logged


def test_speed_of_a_clock_that_stands_still(algorithm: Any, host: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems' clocks tick so coarsely that a short run takes no time."""
    model = host.build(algorithm, host.Corridor(), learning_starts=0)
    monkeypatch.setattr("time.time_ns", lambda: 1)
    monkeypatch.setattr("time.time", lambda: 1.0)
    model.learn_offline(dataset, 3, log_interval=1).learn(10, log_interval=1)


def test_no_logging_during_an_offline_run(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = host.build(algorithm)
    _log_to(model, tmp_path, request)
    model.learn_offline(dataset, 5, log_interval=0)
    assert [int(row["time/gradient_steps"]) for row in _rows(tmp_path / "progress.csv")] == [5]


def test_means_are_those_of_the_steps_between_two_lines(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    runs = []
    for log_interval in (1, 3):
        model = host.build(algorithm)
        _log_to(model, tmp_path / str(log_interval), request)
        model.learn_offline(dataset, 6, log_interval=log_interval)
        runs.append([float(row["train/q_data"]) for row in _rows(tmp_path / str(log_interval) / "progress.csv")])
    # A run that ends with a line has no second one.
    every, third = (np.array(run) for run in runs)
    np.testing.assert_allclose(third, every.reshape(2, 3).mean(axis=1), rtol=1e-4)


def test_train_before_learn(algorithm: Any, host: Any, dataset: Any) -> None:
    """SB3's `train()` before `learn()` has no logger; here it makes one."""
    model = host.build(algorithm).set_offline_data(dataset)
    model.train(gradient_steps=2, batch_size=8)
    assert model._n_updates == 2


class Hyperparameters(BaseCallback):
    def _on_training_start(self) -> None:
        values = HParam({"algorithm": type(self.model).__name__, "gamma": self.model.gamma}, {"train/cql_gap": 0})
        self.logger.record("hparams", values, exclude=("stdout", "log", "json", "csv"))

    def _on_step(self) -> bool:
        return True


def test_tensorboard_folders(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    name = algorithm.__name__
    model = host.build(algorithm, tensorboard_log=str(tmp_path))

    def folders() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    model.learn_offline(dataset, 4, callback=Hyperparameters(), log_interval=2)
    assert folders() == {f"{name}_offline_1"}
    model.learn_offline(dataset, 2, log_interval=2)  # goes on in the same curve
    model.learn(12, callback=Hyperparameters())
    model.learn(12, reset_num_timesteps=False)
    assert folders() == {f"{name}_offline_1", f"{name}_1"}
    model.learn(4)
    model.learn(4, tb_log_name="named")
    model.learn_offline(dataset, 2, tb_log_name="named_offline")
    # "_0": how SB3 counts a new name of a run that goes on.
    assert folders() == {f"{name}_offline_1", f"{name}_1", f"{name}_2", "named_1", "named_offline_0"}

    model.logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / f"{name}_offline_1"))
    events.Reload()
    assert sorted({event.step for event in events.Scalars("train/cql_gap")}) == [2, 4, 6]


def test_evaluations_are_written_at_gradient_steps(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = host.build(algorithm, tensorboard_log=str(tmp_path))
    evaluation = EvalCallback(host.Corridor(), eval_freq=3, n_eval_episodes=1, warn=False, verbose=0)
    model.learn_offline(dataset, 7, callback=evaluation)
    model.logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / f"{algorithm.__name__}_offline_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [3, 6]
