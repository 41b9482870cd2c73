"""Checkpoints: N steps, a new start, M steps are N + M steps to the bit, in both phases, and what does not fit is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from d3rlpy.dataset import (
    FIFOBuffer,
    InfiniteBuffer,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    create_fifo_replay_buffer,
)
from d3rlpy.logging import NoopAdapterFactory
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from cql_plugins import _checkpoints
from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.d3rlpy import (
    CalQLConfig,
    CheckpointError,
    Checkpoints,
    CQLConfig,
    DiscreteCalQLConfig,
    DiscreteCQLConfig,
    OfflineOnlineReplayBuffer,
    ReturnsToGoReplayBuffer,
    load_checkpoint,
    save_checkpoint,
    with_returns_to_go,
)
from cql_plugins.d3rlpy import offline as offline_module
from cql_plugins.d3rlpy.stored import identity_of

ALL = [CQLConfig, CalQLConfig, DiscreteCQLConfig, DiscreteCalQLConfig]
SMALL = d3rlpy.models.VectorEncoderFactory([8])
QUIET: dict[str, Any] = {"logger_adapter": NoopAdapterFactory(), "show_progress": False}


def make(config: Any, **options: Any) -> Any:
    encoders = (
        {"encoder_factory": SMALL}
        if "encoder_factory" in config.__dataclass_fields__
        else {"actor_encoder_factory": SMALL, "critic_encoder_factory": SMALL, "n_action_samples": 2}
    )
    return config(**({"gamma": 0.9, "batch_size": 4} | encoders | options)).create()


def is_discrete(config: Any) -> bool:
    return "Discrete" in config.__name__


class Walk(gym.Env[Any, Any]):
    """A noisy walk that begins anywhere and ends beyond 1.5: all its chance comes from its own generator."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-9, 9, (2,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self.state = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=2)
        return self.state.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        push = float(np.asarray(action).reshape(-1)[0])
        self.state = np.clip(self.state + 0.3 * push + 0.2 * self.np_random.normal(size=2), -9, 9)
        terminated = bool(abs(self.state[0]) > 1.5)
        return self.state.astype(np.float32), -abs(float(self.state[1])), terminated, False, {}


def walk(config: Any, seed: int = 7) -> Any:
    env: Any = TimeLimit(Walk(is_discrete(config)), 6)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    return env


def data(discrete: bool, n: int = 40, change: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Any:
    source = np.random.default_rng(5)
    ends = np.arange(1, n + 1) % 8 == 0
    arrays: dict[str, Any] = {
        "observations": source.normal(size=(n + n // 8, 2)).astype(np.float32),
        "actions": source.integers(2, size=n) if discrete else source.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": source.normal(size=n).astype(np.float32),
        "terminations": ends & (np.arange(n) % 16 < 8),
        "truncations": ends & (np.arange(n) % 16 >= 8),
    }
    if change is not None:
        change(arrays)
    env = Walk(discrete)
    dataset = OfflineDataset(**arrays, observation_space=env.observation_space, action_space=env.action_space)
    return to_d3rlpy(dataset, **options)


def state_of(algo: Any) -> dict[str, Any]:
    """All that training changes, flat."""
    found: dict[str, Any] = {"grad_step": algo.grad_step}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flatten(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                flatten(f"{name}.{key}", item)
        else:
            found[name] = value

    for name, module in algo.impl._checkpointer.modules.items():
        flatten(name, dict(module.state_dict()))
    return found


def differences(first: Any, second: Any) -> list[str]:
    left, right = state_of(first), state_of(second)
    assert left.keys() == right.keys()
    return [
        name
        for name, value in left.items()
        if not (th.equal(value, right[name]) if isinstance(value, th.Tensor) else value == right[name])
    ]


def stream() -> tuple[float, ...]:
    """The next numbers of each global stream."""
    return random.random(), float(np.random.random()), float(th.rand(1))


class Batches:
    """A callback of sorts: notes what an algorithm is given."""

    def __init__(self, algo: Any) -> None:
        self.seen: list[Any] = []
        update = algo.update

        def noted(batch: Any) -> Any:
            self.seen.append((batch.observations.copy(), batch.rewards.copy()))
            return update(batch)

        algo.update = noted


def same_batches(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(*pair) for left, right in zip(first, second, strict=True) for pair in zip(left, right, strict=True)
    )


def other_random_states() -> None:
    """As in a new process."""
    random.seed(99)
    np.random.seed(99)
    th.manual_seed(99)


class TestOffline:
    @pytest.mark.parametrize("config", ALL)
    @pytest.mark.parametrize("step", [1, 5, 7, 10])
    def test_a_resumed_run_is_the_whole_run(self, config: Any, step: int, tmp_path: Path) -> None:
        """At any step, within an epoch and at its end."""
        options: dict[str, Any] = {"n_steps": 15, "n_steps_per_epoch": 5, **QUIET}
        whole = make(config, **({} if is_discrete(config) else {"alpha_learning_rate": 1e-3}))
        all_batches = Batches(whole)
        path = tmp_path / "c.zip"

        def save(algo: Any, epoch: int, total_step: int) -> None:
            if total_step == step:
                save_checkpoint(algo, path)

        results = whole.fit(data(is_discrete(config)), callback=save, **options)
        after = stream()
        resumed = load_checkpoint(path)
        other_random_states()  # as a script that seeds after it has loaded
        assert (resumed.resume_point.phase, resumed.resume_point.step, resumed.grad_step) == ("offline", step, step)
        batches = Batches(resumed)
        steps: list[tuple[int, int]] = []
        rest = resumed.fit(data(is_discrete(config)), callback=lambda _, *at: steps.append(at), **options)
        assert differences(whole, resumed) == []
        assert same_batches(batches.seen, all_batches.seen[step:])
        assert stream() == after
        assert steps == [((total - 1) // 5 + 1, total) for total in range(step + 1, 16)]
        assert [epoch for epoch, _ in rest] == [1, 2, 3][(step - 1) // 5 :]
        losses = [{name: value for name, value in metrics.items() if "time" not in name} for _, metrics in results]
        assert losses[-1] == {name: value for name, value in rest[-1][1].items() if "time" not in name}
        assert resumed.resume_point is None

    @pytest.mark.parametrize("left_out", ["random", "torch", "optimiser", "target", "grad_step"])
    def test_what_is_left_out_shows(self, left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The twin: with any part missing the rest is another."""
        options: dict[str, Any] = {"n_steps": 12, "n_steps_per_epoch": 6, **QUIET}
        config = DiscreteCQLConfig if left_out == "grad_step" else CQLConfig
        whole = make(config, **({"target_update_interval": 4} if left_out == "grad_step" else {}))
        path = tmp_path / "c.zip"
        dataset = data(is_discrete(config))
        whole.fit(dataset, callback=lambda algo, _, step: save_checkpoint(algo, path) if step == 5 else None, **options)
        read = _checkpoints.read_archive

        def damaged(place: Any) -> Any:
            archive = read(place)
            modules = archive.tensors["modules"]
            if left_out == "random":
                archive.arrays[archive.document["random"]["numpy"]["state"]["key"]["name"]][:] ^= 1
            elif left_out == "torch":
                archive.tensors["torch"] = th.Generator().manual_seed(1).get_state()
            elif left_out == "optimiser":
                modules["critic_optim"]["optim"]["state"][0]["exp_avg_sq"] *= 1.001
            elif left_out == "target":
                next(iter(modules["targ_q_funcs"].values())).add_(1e-3)
            else:
                archive.document["grad_step"] = 6
            return archive

        monkeypatch.setattr("cql_plugins.d3rlpy.checkpoints.read_archive", damaged)
        resumed = load_checkpoint(path)
        resumed.fit(dataset, **options)
        assert differences(whole, resumed) != []

    def test_evaluators_and_logs_fall_where_they_fell(self, tmp_path: Path) -> None:
        """An evaluator steps an environment and draws from NumPy: were it called once more or less, all that follows moves."""
        options: dict[str, Any] = {"n_steps": 12, "n_steps_per_epoch": 4, "show_progress": False, "with_timestamp": False}

        def train(algo: Any, name: str, callback: Any = None) -> tuple[Any, list[Any]]:
            evaluator = d3rlpy.metrics.EnvironmentEvaluator(walk(CQLConfig), n_trials=2, epsilon=0.5)
            logs = d3rlpy.logging.FileAdapterFactory(str(tmp_path / "logs"))
            scores: list[Any] = []
            evaluated: list[int] = []

            def note(algo: Any, dataset: Any) -> float:
                evaluated.append(algo.grad_step)
                return 0.0

            epochs = algo.fitter(
                data(False),
                evaluators={"return": evaluator, "note": note},
                experiment_name=name,
                logger_adapter=logs,
                callback=callback,
                epoch_callback=lambda _, epoch, step: scores.append((epoch, step)),
                **options,
            )
            for epoch, metrics in epochs:
                scores.append((epoch, metrics["return"]))
                if callback is not None and epoch == 2:
                    save_checkpoint(algo, tmp_path / "epoch.zip")
            assert evaluated == [4, 8, 12][-len(scores) // 2 :]
            return algo, scores

        def save(algo: Any, epoch: int, total_step: int) -> None:
            if total_step in (6, 8):
                save_checkpoint(algo, tmp_path / f"{total_step}.zip")

        whole, scores = train(make(CQLConfig), "whole", save)
        for name, begun in (("6", 2), ("8", 2), ("epoch", 4)):
            other_random_states()
            resumed, rest = train(load_checkpoint(tmp_path / f"{name}.zip"), name)
            assert differences(whole, resumed) == []
            assert rest == scores[begun:]
            models = sorted(path.name for path in (tmp_path / "logs" / name).glob("*.d3"))
            assert models == ["model_12.d3", "model_8.d3"][: 2 if begun == 2 else 1]
            rows = (tmp_path / "logs" / name / "return.csv").read_text().splitlines()
            assert rows == (tmp_path / "logs" / "whole" / "return.csv").read_text().splitlines()[begun // 2 :]

    def test_plain_buffers_schedules_and_scalers(self, tmp_path: Path) -> None:
        """d3rlpy's own buffer, learning rates that change, data that is scaled."""
        factory = d3rlpy.optimizers.AdamFactory(
            lr_scheduler_factory=d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=20), clip_grad_norm=1.0
        )
        warm = d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=9))

        def fresh() -> Any:
            return make(
                CalQLConfig,
                observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
                action_scaler=d3rlpy.preprocessing.MinMaxActionScaler(),
                reward_scaler=d3rlpy.preprocessing.StandardRewardScaler(),
                critic_optim_factory=factory,
                actor_optim_factory=warm,
            )

        plain = ReplayBuffer(InfiniteBuffer(), episodes=data(False).episodes)
        options: dict[str, Any] = {"n_steps": 12, "n_steps_per_epoch": 12, **QUIET}
        whole = fresh()
        whole.fit(plain, callback=Checkpoints(tmp_path, every_steps=5, keep_last=None), **options)
        first = tmp_path / "checkpoint_000001_offline_5.zip"
        for algo in (None, fresh()):
            resumed = load_checkpoint(first, algo)
            resumed.fit(plain, **options)
            assert differences(whole, resumed) == []

    @pytest.mark.parametrize("kind", ["ours", "d3rlpy's"])
    def test_bootstrapped_returns_are_those_of_then(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are the critics' values at the last estimate, which the critics at the checkpoint no longer give."""
        monkeypatch.setattr(offline_module, "_BOOTSTRAP_INTERVAL", 100)
        dataset = data(False)
        if kind != "ours":
            dataset = ReplayBuffer(InfiniteBuffer(), episodes=dataset.episodes)
        options: dict[str, Any] = {"n_steps": 14, "n_steps_per_epoch": 14, **QUIET}
        rates = {"critic_learning_rate": 0.1, "actor_learning_rate": 0.1, "tau": 0.5}
        whole = make(CalQLConfig, return_tail="bootstrap", **rates)
        path = tmp_path / "c.zip"
        whole.fit(dataset, callback=lambda algo, _, step: save_checkpoint(algo, path) if step == 7 else None, **options)
        resumed = load_checkpoint(path)
        resumed.fit(dataset, **options)
        assert differences(whole, resumed) == []
        forgetful = load_checkpoint(path)
        begin = forgetful.resume_point.begin

        def forget(algo: Any, run: Any) -> None:
            begin(algo, run)
            algo._tail_values = None

        forgetful.resume_point.begin = forget
        forgetful.fit(dataset, **options)
        assert differences(whole, forgetful) != []

    def test_a_loop_of_ones_own(self, tmp_path: Path) -> None:
        dataset = with_returns_to_go(data(False))
        whole = make(CalQLConfig)
        whole.create_impl((2,), 1)
        whole.set_offline_data(dataset)
        for step in range(9):
            if step == 4:
                save_checkpoint(whole, tmp_path / "c.zip")
            whole.update(dataset.sample_transition_batch(4))
        other_random_states()
        resumed = load_checkpoint(tmp_path / "c.zip", dataset=dataset)
        assert resumed.resume_point is None
        for _ in range(5):
            resumed.update(dataset.sample_transition_batch(4))
        assert differences(whole, resumed) == []

    def test_fewer_steps_than_are_done_are_refused(self, tmp_path: Path) -> None:
        algo = make(CQLConfig)
        checkpoints = Checkpoints(tmp_path, every_steps=6)
        algo.fit(data(False), n_steps=6, n_steps_per_epoch=6, callback=checkpoints, **QUIET)
        resumed = load_checkpoint(tmp_path)
        with pytest.raises(ValueError, match=r"after 6 steps, and n_steps asks for 5"):
            resumed.fit(data(False), n_steps=5, n_steps_per_epoch=5, **QUIET)
        with pytest.warns(UserWarning, match=r"n_steps_per_epoch=3 \(was 6\)"):
            assert resumed.fit(data(False), n_steps=6, n_steps_per_epoch=3, **QUIET) != []
        assert resumed.grad_step == 6


def online_options(config: Any, **changes: Any) -> dict[str, Any]:
    return {
        "n_steps": 70,
        "n_steps_per_epoch": 20,
        "update_start_step": 8,
        "random_steps": 40,
        "update_interval": 3,
        "n_updates": 2,
        **QUIET,
    } | changes


def test_another_way_to_sample_is_said(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_steps_per_epoch": 2, **QUIET}

    def picked(n: int) -> Any:
        return data(False, transition_picker=MultiStepTransitionPicker(n, 0.99))

    path = tmp_path / "offline.zip"
    make(CalQLConfig).fit(picked(3), n_steps=4, callback=lambda algo, *_: save_checkpoint(algo, path), **options)
    load_checkpoint(path).fit(picked(3), n_steps=6, **options)
    with pytest.warns(UserWarning, match=r"dataset\.transition_picker=.*n_steps=5\) \(was .*n_steps=3\)"):
        load_checkpoint(path).fit(picked(5), n_steps=6, **options)

    def mixed(fraction: float) -> Any:
        online = create_fifo_replay_buffer(100, env=walk(CalQLConfig))
        return OfflineOnlineReplayBuffer(online, data(False), fraction)

    folder, more = tmp_path / "online", online_options(CalQLConfig)
    make(CalQLConfig).fit_online(walk(CalQLConfig), mixed(0.5), callback=Checkpoints(folder, every_steps=15), **more)
    load_checkpoint(folder).fit_online(walk(CalQLConfig), mixed(0.5), **more)
    with pytest.warns(UserWarning, match=r"buffer\.offline_fraction=0\.75 \(was 0\.5\)"):
        load_checkpoint(folder).fit_online(walk(CalQLConfig), mixed(0.75), **more)


class TestOnline:
    @pytest.mark.parametrize("mixed", [True, False])
    @pytest.mark.parametrize("config", ALL)
    def test_a_resumed_run_is_the_whole_run(self, config: Any, mixed: bool, tmp_path: Path) -> None:
        """After the offline phase: random steps, intervals, evaluations, returns and the mixture go on where they were."""
        discrete = is_discrete(config)
        dataset = data(discrete)

        def train(algo: Any, callback: Any) -> None:
            explorer = d3rlpy.algos.LinearDecayEpsilonGreedy(duration=60) if discrete else None
            options = online_options(config, eval_env=walk(config, 3), eval_n_trials=1, eval_epsilon=0.3, explorer=explorer)
            algo.fit_online(walk(config), callback=callback, **options)

        whole = make(config)
        if mixed:
            whole.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
        all_batches = Batches(whole)
        checkpoints = Checkpoints(tmp_path, every_steps=15, keep_last=None)
        counts: list[tuple[int, int]] = []

        def watched(algo: Any, epoch: int, total_step: int) -> None:
            checkpoints(algo, epoch, total_step)
            counts.append((len(all_batches.seen), total_step))

        train(whole, watched)
        after = stream()
        assert len(checkpoints.paths()) == 4
        for path in checkpoints.paths():
            other_random_states()
            resumed = load_checkpoint(path, dataset=dataset if mixed else None)
            assert resumed.resume_point.exact
            done = next(n for n, step in counts if step == resumed.resume_point.step)
            batches = Batches(resumed)
            first: list[int] = []
            train(resumed, lambda _algo, _epoch, step, first=first: first.append(step))
            assert differences(whole, resumed) == []
            assert same_batches(batches.seen, all_batches.seen[done:])
            assert stream() == after
            assert first[0] == int(path.stem.rsplit("_", 1)[1]) + 1

    @pytest.mark.parametrize("capacity", [1000, 23])
    @pytest.mark.parametrize("at_termination", [False, True])
    def test_a_given_buffer_gets_its_content_back(self, capacity: int, at_termination: bool, tmp_path: Path) -> None:
        """Also one that has dropped the beginning of an episode."""

        def buffer() -> Any:
            plain = create_fifo_replay_buffer(capacity, env=walk(CalQLConfig), write_at_termination=at_termination)
            return with_returns_to_go(plain)

        options = online_options(CalQLConfig, random_steps=0)
        stored: Any = buffer()
        whole = make(CalQLConfig, return_tail="sparse")
        whole.fit_online(walk(CalQLConfig), stored, callback=Checkpoints(tmp_path, every_steps=50), **options)
        resumed, again = load_checkpoint(tmp_path), buffer()
        again.append_episode(data(False).episodes[0])  # as a script that fills it each time
        resumed.fit_online(walk(CalQLConfig), again, **options)
        assert differences(whole, resumed) == []
        rows = [[(e.rewards.tolist(), i) for e, i in one.buffer._transitions] for one in (stored, again)]
        assert rows[0] == rows[1]
        assert again._reward_range == stored._reward_range, "dropped episodes count, the filling does not"

    @pytest.mark.parametrize("left_out", ["environment", "action space", "buffer"])
    def test_what_is_left_out_shows(self, left_out: str, tmp_path: Path) -> None:
        options = online_options(CQLConfig, random_steps=60)
        whole = make(CQLConfig)
        whole.fit_online(walk(CQLConfig), callback=Checkpoints(tmp_path, every_steps=20, keep_last=None), **options)
        first = Checkpoints(tmp_path).paths()[0]
        resumed = load_checkpoint(first)
        point, env = resumed.resume_point, walk(CQLConfig, 8)
        go_on = point.go_on

        def without_environment(run: Any) -> None:
            run.recorder = None
            go_on(run)

        def without_action_space(run: Any) -> None:
            go_on(run)
            run.recorder.env.action_space.seed(8)

        if left_out == "environment":
            point.reset, point.go_on = (lambda recorder: recorder.reset()[0]), without_environment
        elif left_out == "action space":
            point.go_on = without_action_space
        else:
            point.begin = lambda algo, run: None
        resumed.fit_online(env, **options)
        assert differences(whole, resumed) != []

    def test_bootstrapped_returns_of_collected_episodes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(offline_module, "_BOOTSTRAP_INTERVAL", 1000)
        rates = {"critic_learning_rate": 0.1, "tau": 0.5, "return_tail": "bootstrap"}
        options = online_options(CalQLConfig, random_steps=0, update_interval=1)
        whole, dataset = make(CalQLConfig, **rates), data(False)
        whole.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
        whole.fit_online(walk(CalQLConfig), callback=Checkpoints(tmp_path, every_steps=40), **options)
        resumed = load_checkpoint(tmp_path, dataset=data(False))
        resumed.fit_online(walk(CalQLConfig), **options)
        assert differences(whole, resumed) == []

    def test_a_mixed_buffer_of_ones_own(self, tmp_path: Path) -> None:
        def mixture(change: Any = None) -> Any:
            online = with_returns_to_go(create_fifo_replay_buffer(100, env=walk(CalQLConfig)))
            return MixedReplayBuffer(online, data(False, change=change), 0.25)

        options = online_options(CalQLConfig)
        whole = make(CalQLConfig)
        whole.fit_online(walk(CalQLConfig), mixture(), callback=Checkpoints(tmp_path, every_steps=30), **options)
        resumed = load_checkpoint(tmp_path)
        resumed.fit_online(walk(CalQLConfig), mixture(), **options)
        assert differences(whole, resumed) == []
        resumed = load_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=r"rewards \(sha256"):
            resumed.fit_online(walk(CalQLConfig), mixture(one_reward), **options)

    def test_an_environment_with_a_memory_is_told_of(self, tmp_path: Path) -> None:
        """The limit: what an environment carries from one episode to the next besides its generators is not saved."""

        class Harder(Walk):
            episodes = 0.0

            def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
                self.episodes += 0.01
                observation, info = super().reset(**options)
                return observation + np.float32(self.episodes), info

        def env() -> Any:
            made: Any = TimeLimit(Harder(), 6)
            made.reset(seed=7)
            return made

        options = online_options(CQLConfig)
        whole, checkpoints = make(CQLConfig), Checkpoints(tmp_path, every_steps=30, keep_last=None)
        whole.fit_online(env(), callback=checkpoints, **options)
        resumed = load_checkpoint(checkpoints.paths()[0])
        with pytest.warns(UserWarning, match="did not begin the episode"):
            resumed.fit_online(env(), **options)
        assert differences(whole, resumed) != []

    def test_in_the_middle_of_an_episode(self, tmp_path: Path) -> None:
        """It is broken off: kept in the buffer without returns, as at the end of training."""
        seen = {}

        def save(algo: Any, epoch: int, total_step: int) -> None:
            if total_step == 20:
                save_checkpoint(algo, tmp_path / "c.zip")
                seen["running"] = algo._run.collecting.has_running_episode
                raise KeyboardInterrupt

        whole = make(CalQLConfig)
        stored: Any = create_fifo_replay_buffer(1000, env=walk(CalQLConfig))
        options = online_options(CalQLConfig, random_steps=0)
        with pytest.raises(KeyboardInterrupt):
            whole.fit_online(walk(CalQLConfig), stored, callback=save, **options)
        assert seen["running"]
        resumed = load_checkpoint(tmp_path / "c.zip")
        again: Any = create_fifo_replay_buffer(1000, env=walk(CalQLConfig))
        assert not resumed.resume_point.exact
        with pytest.warns(UserWarning, match="in the middle of an episode"):
            resumed.fit_online(walk(CalQLConfig), again, **(options | {"n_steps": 20}))
        # What the loop itself breaks off at its end is what the checkpoint holds.
        rows = [
            [(e.rewards.tolist(), e.observations.tolist(), i) for e, i in one.buffer._transitions] for one in (stored, again)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 20
        batch = ReturnsToGoReplayBuffer(again).sample_transition_batch(200)
        returns = batch.returns_to_go(resumed._returns_settings())
        assert np.isinf(returns).any()
        assert np.isfinite(returns).any()

    def test_when_it_is_time(self, tmp_path: Path) -> None:
        """At the end of the running episode; where none ends before it is time again, then."""
        ends: list[int] = []

        def callback(algo: Any, epoch: int, total_step: int) -> None:
            if not algo._run.collecting.has_running_episode:
                ends.append(total_step)
            checkpoints(algo, epoch, total_step)

        def steps() -> list[int]:
            return [int(path.stem.rsplit("_", 1)[1]) for path in checkpoints.paths()]

        options = {"n_steps": 40, "update_start_step": 99, **QUIET}
        checkpoints = Checkpoints(tmp_path / "short", every_steps=10, keep_last=None)
        make(CQLConfig).fit_online(walk(CQLConfig), callback=callback, **options)
        assert steps() == [next(end for end in ends if end >= due) for due in (10, 20, 30, 40) if ends[-1] >= due]
        checkpoints = Checkpoints(tmp_path / "long", every_steps=10, keep_last=None)
        env = Walk()
        env.step = lambda action, step=env.step: (*step(action)[:2], False, False, {})  # type: ignore[method-assign, misc]
        make(CQLConfig).fit_online(env, callback=callback, **options)
        assert steps() == [20, 40]

    def test_other_arguments_are_told_of(self, tmp_path: Path) -> None:
        whole = make(CQLConfig)
        whole.fit_online(walk(CQLConfig), callback=Checkpoints(tmp_path, every_steps=30), **online_options(CQLConfig))
        resumed = load_checkpoint(tmp_path)
        with pytest.warns(UserWarning, match=r"n_updates=1 \(was 2\)"):
            resumed.fit_online(walk(CQLConfig), **online_options(CQLConfig, n_updates=1))

    def test_fit_does_not_train_offline_again(self, tmp_path: Path) -> None:
        whole, dataset = make(CQLConfig), data(False)
        whole.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
        whole.fit_online(walk(CQLConfig), callback=Checkpoints(tmp_path, every_steps=30), **online_options(CQLConfig))
        resumed = load_checkpoint(tmp_path, dataset=dataset)
        with pytest.raises(ValueError, match="of fit_online, and fit would train offline once more"):
            resumed.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
        resumed.resume_point = None
        resumed.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)

    def test_missing_data_is_asked_for(self, tmp_path: Path) -> None:
        whole, dataset = make(CQLConfig), data(False)
        whole.fit(dataset, n_steps=4, n_steps_per_epoch=4, **QUIET)
        whole.fit_online(walk(CQLConfig), callback=Checkpoints(tmp_path, every_steps=30), **online_options(CQLConfig))
        with pytest.raises(CheckpointError, match=r"had logged data \(5 episodes, 40 transitions\), this one has none"):
            load_checkpoint(tmp_path).fit_online(walk(CQLConfig), **online_options(CQLConfig))

    def test_another_buffer_or_environment_is_refused(self, tmp_path: Path) -> None:
        whole = make(CQLConfig)
        options = online_options(CQLConfig)
        whole.fit_online(walk(CQLConfig), callback=Checkpoints(tmp_path, every_steps=30), **options)
        small = create_fifo_replay_buffer(50, env=walk(CQLConfig))
        with pytest.raises(CheckpointError, match="room for 1000000 transitions, this one for 50"):
            load_checkpoint(tmp_path).fit_online(walk(CQLConfig), small, **options)
        other = ReplayBuffer(
            FIFOBuffer(1_000_000),
            observation_signature=d3rlpy.dataset.Signature([np.dtype(np.float32)], [(3,)]),
            action_signature=d3rlpy.dataset.Signature([np.dtype(np.float32)], [(1,)]),
            reward_signature=d3rlpy.dataset.Signature([np.dtype(np.float32)], [(1,)]),
            action_space=d3rlpy.ActionSpace.CONTINUOUS,
            action_size=1,
        )
        with pytest.raises(CheckpointError, match=r"observations float32\[2\].*this one observations float32\[3\]"):
            load_checkpoint(tmp_path).fit_online(walk(CQLConfig), other, **options)
        with pytest.raises(ValueError, match="Make the environment with the same wrappers"):
            load_checkpoint(tmp_path).fit_online(walk(CQLConfig).env, **options)


def one_reward(arrays: dict[str, Any]) -> None:
    arrays["rewards"][17] = np.nextafter(arrays["rewards"][17], np.float32(9))


def other_order(arrays: dict[str, Any]) -> None:
    arrays["observations"] = np.roll(arrays["observations"], 18, axis=0)
    for name in ("actions", "rewards", "terminations", "truncations"):
        arrays[name] = np.roll(arrays[name], 16, axis=0)


def one_observation(arrays: dict[str, Any]) -> None:
    arrays["observations"][44, 1] += 1e-3  # the last of all, after the last step


def an_end(arrays: dict[str, Any]) -> None:
    arrays["terminations"][7], arrays["truncations"][7] = arrays["truncations"][7], arrays["terminations"][7]


class TestWhatIsRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        algo = make(CQLConfig)
        algo.fit(data(False), n_steps=6, n_steps_per_epoch=3, callback=Checkpoints(tmp_path, every_steps=2), **QUIET)
        assert [path.name for path in Checkpoints(tmp_path).paths()] == [
            f"checkpoint_00000{number}_offline_{2 * number}.zip" for number in (1, 2, 3)
        ]
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (one_reward, r"differs in rewards \(sha256 \w{12} then, \w{12} now\)\."),
            (other_order, "the same episodes in another order"),
            (one_observation, r"differs in observations \("),
            (an_end, r"differs in terminated \("),
        ],
    )
    def test_other_data(self, change: Any, message: str, folder: Path) -> None:
        other = data(False, change=change)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder, dataset=other)
        algo = load_checkpoint(folder)
        with pytest.raises(CheckpointError, match=message):
            algo.fit(other, n_steps=6, n_steps_per_epoch=3, **QUIET)
        assert algo.resume_point is not None
        algo.fit(data(False), n_steps=6, n_steps_per_epoch=3, **QUIET)

    def test_less_data_is_counted(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="5 episodes then, 3 now; 40 transitions then, 24 now"):
            load_checkpoint(folder, dataset=data(False, 24))

    def test_the_same_data_in_other_memory_is_the_same(self) -> None:
        def other_layout(arrays: dict[str, Any]) -> None:
            arrays["observations"] = np.asfortranarray(arrays["observations"])

        assert identity_of(data(False)) == identity_of(data(False, change=other_layout))

    def test_another_algorithm_or_config(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is of 'cql_plugins\.cql', the algorithm is 'cql_plugins\.cal_ql'"):
            load_checkpoint(folder, make(CalQLConfig))
        with pytest.raises(CheckpointError, match=r"another config: batch_size was 4, is 5"):
            load_checkpoint(folder, make(CQLConfig, batch_size=5))
        wide = make(CQLConfig)
        wide.create_impl((3,), 1)
        before = {name: value.clone() for name, value in state_of(wide).items() if isinstance(value, th.Tensor)}
        with pytest.raises(CheckpointError, match=r"observation_shape was \[2\], is \[3\]"):
            load_checkpoint(folder, wide)
        assert all(th.equal(value, state_of(wide)[name]) for name, value in before.items())
        with pytest.raises(TypeError, match="must be CQL, CalQL"):
            load_checkpoint(folder, d3rlpy.algos.SACConfig().create())

    @pytest.mark.parametrize("kept", [0, 1, 500, -1])
    def test_a_part_of_a_file(self, kept: int, folder: Path) -> None:
        """The newest is cut off: alone it is refused, in a folder the one before it is taken."""
        newest = Checkpoints(folder).paths()[-1]
        whole = newest.read_bytes()
        newest.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            load_checkpoint(newest)
        with pytest.warns(UserWarning, match=r"Going on from checkpoint_000002_offline_4\.zip"):
            algo = load_checkpoint(folder)
        assert algo.resume_point.step == 4

    def test_a_changed_byte(self, folder: Path) -> None:
        newest = Checkpoints(folder).paths()[-1]
        with zipfile.ZipFile(newest) as archive:
            entry = archive.getinfo("tensors.pt")
        content = bytearray(newest.read_bytes())
        content[entry.header_offset + entry.file_size // 2] ^= 1
        newest.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            load_checkpoint(newest)

    def test_something_else(self, folder: Path, tmp_path: Path) -> None:
        algo = load_checkpoint(folder)
        algo.save(str(tmp_path / "model.d3"))
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            load_checkpoint(tmp_path / "model.d3")
        _checkpoints.write_archive(tmp_path / "other.zip", {"framework": "something"}, {}, {})
        with pytest.raises(CheckpointError, match="written by 'something'"):
            load_checkpoint(tmp_path / "other.zip")
        with pytest.raises(FileNotFoundError):
            load_checkpoint(tmp_path / "none.zip")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            load_checkpoint(tmp_path / "empty")

    def test_other_versions_are_told_of(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from cql_plugins.d3rlpy import checkpoints

        now = checkpoints._versions()
        monkeypatch.setattr(checkpoints, "_versions", lambda: now | {"torch": "9.9"})
        with pytest.warns(UserWarning, match=r"written with torch .* \(now 9\.9\)"):
            load_checkpoint(folder)

    def test_nothing_is_unpickled(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Refusing(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                raise AssertionError(f"unpickles {module}.{name}")

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("unpickles")

        monkeypatch.setattr(pickle, "load", refuse)
        monkeypatch.setattr(pickle, "loads", refuse)
        monkeypatch.setattr(pickle, "Unpickler", Refusing)
        load_checkpoint(folder)
        with zipfile.ZipFile(Checkpoints(folder).paths()[0]) as archive:
            json.loads(archive.read("checkpoint.json"))
            kinds = {Path(name).suffix for name in archive.namelist()}
        assert kinds == {".json", ".npy", ".pt"}


class TestWriting:
    def test_only_the_last_are_kept(self, tmp_path: Path) -> None:
        algo = make(CQLConfig)
        checkpoints = Checkpoints(tmp_path, every_steps=2, keep_last=2)
        assert not checkpoints.resume(algo)
        algo.fit(data(False), n_steps=9, n_steps_per_epoch=9, callback=checkpoints, **QUIET)
        assert [path.name for path in checkpoints.paths()] == [
            "checkpoint_000003_offline_6.zip",
            "checkpoint_000004_offline_8.zip",
        ]
        again = make(CQLConfig)
        assert checkpoints.resume(again, data(False))
        assert again.resume_point.step == 8

    def test_by_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        checkpoints = Checkpoints(tmp_path, every_steps=None, every_minutes=2, keep_last=None)

        def callback(algo: Any, epoch: int, total_step: int) -> None:
            now[0] += 50.0
            checkpoints(algo, epoch, total_step)

        with checkpoints:
            make(CQLConfig).fit(data(False), n_steps=8, n_steps_per_epoch=8, callback=callback, **QUIET)
        assert [path.stem[-9:] for path in checkpoints.paths()] == ["offline_3", "offline_6"]

    def test_numbers_out_of_range(self, tmp_path: Path) -> None:
        for options in ({"every_steps": 0}, {"every_minutes": -1.0}, {"keep_last": 0}):
            with pytest.raises(ValueError, match=next(iter(options))):
                Checkpoints(tmp_path, **options)

    def test_only_ours_and_only_built(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"must be CQL, CalQL.*got SAC"):
            save_checkpoint(d3rlpy.algos.SACConfig().create(), tmp_path)
        with pytest.raises(ValueError, match="not built yet"):
            save_checkpoint(make(CQLConfig), tmp_path)

    def _broken_off(self, folder: Path, breaks: Callable[[], None], mends: Callable[[], None]) -> OSError:
        """Let the third checkpoint fail; check that nothing is lost, and that training goes on from there."""
        options: dict[str, Any] = {"n_steps": 12, "n_steps_per_epoch": 12, **QUIET}
        whole = make(CQLConfig)
        whole.fit(data(False), **options)
        np.random.seed(0)
        th.manual_seed(0)
        algo = make(CQLConfig)
        checkpoints = Checkpoints(folder, every_steps=3)

        def callback(algo: Any, epoch: int, total_step: int) -> None:
            if total_step == 9:
                breaks()
            checkpoints(algo, epoch, total_step)

        try:
            with pytest.raises(OSError, match="could not write") as raised:
                algo.fit(data(False), callback=callback, **options)
        finally:
            mends()
        assert [path.stem[-9:] for path in checkpoints.paths()] == ["offline_3", "offline_6"]
        assert sorted(folder.iterdir()) == checkpoints.paths(), "nothing is left beside them"
        assert load_checkpoint(folder).resume_point.step == 6
        algo_state = state_of(algo)
        assert algo_state["grad_step"] == 9
        assert all(bool(th.isfinite(value).all()) for value in algo_state.values() if isinstance(value, th.Tensor))
        return raised.value

    def test_a_full_disk(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            error = self._broken_off(
                tmp_path,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard)),
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
            )
        finally:
            signal.signal(signal.SIGXFSZ, before)
        assert error.errno == errno.EFBIG

    def test_the_disk_is_full_at_the_flush(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        error = self._broken_off(
            tmp_path, lambda: monkeypatch.setattr(os, "fsync", full), lambda: monkeypatch.setattr(os, "fsync", real)
        )
        assert error.errno == errno.ENOSPC

    def test_a_lost_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root writes wherever it likes, so the system's refusal is played."""
        import builtins

        real = builtins.open

        def refuse(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "x" in mode:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(file, mode, *args, **kwargs)

        error = self._broken_off(
            tmp_path, lambda: monkeypatch.setattr(builtins, "open", refuse), lambda: monkeypatch.setattr(builtins, "open", real)
        )
        assert isinstance(error, PermissionError)

    def test_what_could_not_be_written_can_be_written_later(self, tmp_path: Path) -> None:
        """The state is that of the step at which the disk failed, and goes on from there to the bit."""
        options: dict[str, Any] = {"n_steps": 12, "n_steps_per_epoch": 6, **QUIET}
        whole = make(CQLConfig)
        whole.create_impl((2,), 1)
        save_checkpoint(whole, tmp_path / "begin.zip")
        whole.fit(data(False), **options)
        algo = load_checkpoint(tmp_path / "begin.zip")
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match="could not write"):
            algo.fit(data(False), callback=Checkpoints(tmp_path / "file" / "folder", every_steps=9), **options)
        path = save_checkpoint(algo, tmp_path / "folder")
        assert path.name == "checkpoint_000001_offline_9.zip"
        resumed = load_checkpoint(path)
        resumed.fit(data(False), **options)
        assert differences(whole, resumed) == []

    def test_after_the_loop_there_is_no_run(self, tmp_path: Path) -> None:
        algo = make(CQLConfig)
        algo.fit(data(False), n_steps=3, n_steps_per_epoch=3, **QUIET)
        assert save_checkpoint(algo, tmp_path).name == "checkpoint_000001_step_3.zip"
        assert load_checkpoint(tmp_path).resume_point is None


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_checkpoints as t
class Slow(t.Checkpoints):
    def __call__(self, algo, epoch, step):
        if step == 20:
            print("ready", flush=True)
        if step >= 20:
            t.time.sleep(0.02)
        super().__call__(algo, epoch, step)
algo = t.make(t.CalQLConfig)
try:
    algo.fit_online(t.walk(t.CalQLConfig), n_steps=50_000, callback=Slow({folder!r}, every_steps=None), **t.QUIET)
finally:
    print("handler", t.signal.getsignal(t.signal.SIGTERM) is t.signal.SIG_DFL, algo.grad_step, flush=True)
"""


class TestSignals:
    def test_a_process_that_is_terminated_leaves_a_checkpoint(self, tmp_path: Path) -> None:
        script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = iter(process.stdout)
        assert any("ready" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143, errors
        _, default, grad_step = next(line for line in rest if line.startswith("handler")).split()
        assert default == "True"
        algo = load_checkpoint(tmp_path / "run")
        assert algo.grad_step == int(grad_step)
        assert algo.resume_point.phase == "online"
        assert algo.resume_point.step >= 20

    @pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
    def test_the_step_is_finished_and_the_rest_is_the_same(
        self, number: signal.Signals, error: type[BaseException], tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"n_steps": 10, "n_steps_per_epoch": 5, **QUIET}
        whole = make(CQLConfig)
        whole.create_impl((2,), 1)
        save_checkpoint(whole, tmp_path / "begin.zip")
        whole.fit(data(False), **options)
        algo = load_checkpoint(tmp_path / "begin.zip")
        update, before = algo.update, signal.getsignal(number)

        def interrupted(batch: Any) -> Any:
            if algo.grad_step == 6:
                os.kill(os.getpid(), number)
            return update(batch)

        algo.update = interrupted
        with pytest.raises(error) as raised:
            algo.fit(data(False), callback=Checkpoints(tmp_path / "run"), **options)
        assert number == signal.SIGINT or raised.value.code == 143  # type: ignore[attr-defined]
        assert signal.getsignal(number) is before
        resumed = load_checkpoint(tmp_path / "run")
        assert resumed.resume_point.step == 7
        resumed.fit(data(False), **options)
        assert differences(whole, resumed) == []

    def test_after_the_last_step(self, tmp_path: Path) -> None:
        """A signal during the last evaluation is not lost: what would follow fit does not begin."""

        def evaluate(algo: Any, dataset: Any) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0.0

        options: dict[str, Any] = {"n_steps": 5, "n_steps_per_epoch": 5, **QUIET}
        with pytest.raises(SystemExit):
            make(CQLConfig).fit(data(False), evaluators={"e": evaluate}, callback=Checkpoints(tmp_path), **options)
        resumed = load_checkpoint(tmp_path)
        assert resumed.fit(data(False), evaluators={"e": evaluate}, **options) == []

    def test_inside_another_callback(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path)

        def callback(algo: Any, epoch: int, total_step: int) -> None:
            if total_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            checkpoints(algo, epoch, total_step)

        with checkpoints, pytest.raises(SystemExit):
            make(CQLConfig).fit(data(False), n_steps=5, n_steps_per_epoch=5, callback=callback, **QUIET)
        assert load_checkpoint(tmp_path).resume_point.step == 2
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
