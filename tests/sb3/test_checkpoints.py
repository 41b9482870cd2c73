"""A run that is stopped and started again is the run that was not: bit for bit, offline and online."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from cql_plugins._checkpoints import read_archive
from cql_plugins._env_state import capture_state, misfits, restore_state
from cql_plugins.adapters import OfflineDataset
from cql_plugins.sb3 import (
    CQL,
    CalQL,
    CheckpointError,
    Checkpoints,
    DiscreteCalQL,
    DiscreteCQL,
    ResumableEnv,
    load_checkpoint,
)
from cql_plugins.sb3.checkpoints import _restore_run, data_identity
from tests.sb3.conftest import build, collect, corridors, of_contrib, tiny

CQLQRDQN, CQLTQC = of_contrib("CQLQRDQN", "CQLTQC")

Builder = Callable[[], Any]


def fingerprint(model: Any) -> dict[str, Any]:
    """All that must be equal: parameters, optimisers, buffers, counters, and the numbers that would be drawn next."""
    streams = model._random_states
    with model._own_streams():
        found: dict[str, Any] = {"drawn": (random.random(), np.random.rand(), th.rand(1).item())}
    model._random_states = streams
    for name, state in model.get_parameters().items():
        _flatten(state, name, found)
    for name in model._get_torch_save_params()[1]:
        found[name] = getattr(model, name).detach().clone()
    for name in ("num_timesteps", "_n_updates", "_n_offline_steps", "_episode_num", "_n_calls", "exploration_rate"):
        found[name] = getattr(model, name, None)
    _flatten(
        {key: value for key, value in vars(model.replay_buffer).items() if isinstance(value, (np.ndarray, dict, int))},
        "buffer",
        found,
    )
    _flatten(model._last_obs, "last_obs", found)
    return found


def _flatten(tree: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{name}.{key}", found)
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            _flatten(value, f"{name}.{index}", found)
    else:
        found[name] = tree


def different(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not _same(value, second[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, th.Tensor):
        return th.equal(one, other)
    if isinstance(one, np.ndarray) and one.dtype.hasobject:
        return repr(one.tolist()) == repr(other.tolist())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one == other)


def stir() -> None:
    """What another process would have: other random numbers."""
    random.seed()
    np.random.seed()
    th.seed()


class StopError(Exception):
    pass


def stopping_at(step: int) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A callback that breaks off as a crash would: with no goodbye to other callbacks."""

    def stop(local: dict[str, Any], _: Any) -> bool:
        if local["self"].num_timesteps >= step:
            raise StopError
        return True

    return stop


def unseeded() -> Any:
    """A model that draws from the streams of the whole process, which stand somewhere."""
    random.seed(3)
    np.random.seed(3)
    th.manual_seed(3)
    return build(CQL, seed=None)


OFFLINE: dict[str, Builder] = {
    "CQL, no seed": unseeded,
    "CQL": lambda: build(CQL, seed=1, cql_lagrange_threshold=1.0),
    "CalQL, bootstrap": lambda: build(CalQL, seed=1, return_tail="bootstrap"),
    "CalQL, drawn rows": lambda: build(CalQL, seed=1, cql_n_backward=3, bc_steps=5),
    "CalQL, bf16": lambda: build(CalQL, seed=1, precision="bf16"),
    "CQLTQC": lambda: build(CQLTQC, seed=1),
    "DiscreteCQL": lambda: build(DiscreteCQL, corridors(discrete=True), seed=1),
    "DiscreteCalQL": lambda: build(DiscreteCalQL, corridors(discrete=True), seed=1),
    "CQLQRDQN": lambda: build(CQLQRDQN, corridors(discrete=True), seed=1),
    "VecNormalize": lambda: build(CalQL, VecNormalize(corridors()), seed=1),
}


def data_for(name: str) -> OfflineDataset:
    return collect(discrete=name in ("DiscreteCQL", "DiscreteCalQL", "CQLQRDQN"))


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_a_run_goes_on_bit_for_bit_from_any_step(tmp_path: Path, name: str) -> None:
    build_model, dataset = OFFLINE[name], data_for(name)
    undisturbed = Checkpoints(tmp_path / "whole", save_freq=3).learn_offline(build_model(), dataset, 11)
    expected = fingerprint(undisturbed)

    def start(folder: str, callback: Any = None) -> Any:
        stir()
        run = Checkpoints(tmp_path / folder, save_freq=3)
        return run.learn_offline(run.resume(build_model()), data_for(name), 11, callback=callback)

    for step in (5, 8):  # Two crashes in one run.
        with pytest.raises(StopError):
            start("cut", stopping_at(step))
    saved = [path.name for path in Checkpoints(tmp_path / "cut").files.paths()]
    assert saved == ["checkpoint_000001_offline_3.zip", "checkpoint_000002_offline_6.zip"]
    resumed = start("cut")
    assert different(fingerprint(resumed), expected) == set()
    # Without checkpoints at all, too.
    plain = build_model().learn_offline(dataset, 11)
    assert different(fingerprint(plain), expected) == set()
    # The twin: random states of another process.
    run = Checkpoints(tmp_path / "cut2", save_freq=3)
    with pytest.raises(StopError):
        run.learn_offline(run.resume(build_model()), dataset, 11, callback=stopping_at(5))
    other = load_checkpoint(build_model(), run.files.paths()[-1])
    other.set_random_seed(99)
    other.learn_offline(dataset, 8)
    assert "policy" in {name.split(".")[0] for name in different(fingerprint(other), expected)}


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    expected = fingerprint(run.learn_offline(build(CQL, seed=1), collect(), 4))
    again = Checkpoints(tmp_path)
    stir()
    model = again.resume(build(CQL, seed=1))
    again.learn_offline(model, collect(), 4)
    assert different(fingerprint(model), expected) == set()
    assert len(again.files.paths()) == 1


@contextlib.contextmanager
def forks_allowed() -> Iterator[None]:
    """Python 3.12 and later warn of forks of a process with threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        yield


def pendulum(n_envs: int, **kwargs: Any) -> VecEnv:
    return make_vec_env("Pendulum-v1", n_envs, env_kwargs=kwargs)


def normalized(env: VecEnv) -> VecNormalize:
    return VecNormalize(env, norm_obs=True, norm_reward=True, clip_reward=2.0)


_PLAIN: dict[str, Any] = {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
NOISE: dict[str, Builder] = {
    "normal": lambda: NormalActionNoise(np.zeros(1), 0.3 * np.ones(1)),
    "ou": lambda: OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.3 * np.ones(1)),
}
ONLINE: dict[str, tuple[Builder, str]] = {
    "CQL": (lambda: build(CQL, corridors(), seed=1, learning_starts=12), "vector"),
    "CalQL, 4": (lambda: build(CalQL, corridors(4), seed=1), "vector"),
    "CalQL, normalized, 4": (lambda: build(CalQL, normalized(corridors(4)), seed=1, return_tail="bootstrap"), "vector"),
    "CalQL, frames": (lambda: build(CQL, VecFrameStack(corridors(2), 3), seed=1), ""),
    "CalQL, steps": (lambda: build(CalQL, corridors(2), seed=1, n_steps=3), "vector"),
    "CQL, memory": (lambda: build(CQL, corridors(), seed=1, optimize_memory_usage=True, **_PLAIN), "vector"),
    "CQL, ou, 2": (lambda: build(CQL, corridors(2), seed=1, action_noise=NOISE["ou"]()), "vector"),
    "CQL, gSDE": (lambda: build(CQL, corridors(2), seed=1, use_sde=True, sde_sample_freq=3, train_freq=5), "vector"),
    "CalQL, dict": (lambda: build(CalQL, corridors(form="dict"), form="dict", seed=1), "dict"),
    "CalQL, episodes": (lambda: build(CalQL, corridors(), seed=1, train_freq=(1, "episode")), "vector"),
    "CalQL, small": (lambda: build(CalQL, corridors(2), seed=1, buffer_size=20), "vector"),
    "DiscreteCalQL": (lambda: build(DiscreteCalQL, corridors(2, discrete=True), seed=1), "discrete"),
    "CQLQRDQN": (lambda: build(CQLQRDQN, corridors(discrete=True), seed=1), "discrete"),
    "Hindsight": (
        lambda: build(
            CalQL,
            corridors(2, form="goal"),
            form="goal",
            seed=1,
            learning_starts=20,
            replay_buffer_class=HerReplayBuffer,
            replay_buffer_kwargs={"n_sampled_goal": 2, "copy_info_dict": True},
        ),
        "",
    ),
}


def online_data(form: str) -> OfflineDataset | None:
    if not form:
        return None
    return collect(discrete=True) if form == "discrete" else collect(form=form)


@pytest.mark.parametrize("name", ONLINE)
def test_online_a_run_goes_on_bit_for_bit_even_within_episodes(tmp_path: Path, name: str) -> None:
    build_model, form = ONLINE[name]

    def start(folder: str, offline_callback: Any = None, callback: Any = None) -> Any:
        stir()
        run = Checkpoints(tmp_path / folder, save_freq=7)
        model = run.resume(build_model())
        if (dataset := online_data(form)) is not None:
            run.learn_offline(model, dataset, 5, callback=offline_callback)
        return run.learn(model, 60, callback=callback)

    expected = fingerprint(start("whole"))
    with pytest.raises(StopError):
        start("cut", callback=stopping_at(4))  # The online phase has no checkpoint yet.
    with pytest.raises(StopError):
        start("cut", callback=stopping_at(27))
    with pytest.raises(StopError):
        start("cut", callback=stopping_at(44))
    assert different(fingerprint(start("cut")), expected) == set()
    if form and "memory" not in name:
        plain = build_model()
        plain.learn_offline(online_data(form), 5)
        plain.learn(60)
        assert different(fingerprint(plain), expected) == set()


@pytest.mark.parametrize("options", [{}, {"use_sde": True}, {"use_sde": True, "sde_sample_freq": 3, "train_freq": 5}])
def test_online_a_run_that_was_at_its_end_is_made_longer_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def start(folder: str, steps: int) -> Any:
        stir()
        run = Checkpoints(tmp_path / folder, save_freq=20)
        return run.learn(run.resume(build(CQL, corridors(2), seed=1, **options)), steps)

    expected = fingerprint(start("whole", 90))
    start("longer", 30)
    start("longer", 60)
    assert different(fingerprint(start("longer", 90)), expected) == set()


def test_a_checkpoint_from_before_noise_was_noted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = Checkpoints._contents

    def older(self: Any, model: Any) -> Any:
        document, arrays, tensors = contents(self, model)
        document.pop("noise_is_drawn")
        return document, arrays, tensors

    monkeypatch.setattr(Checkpoints, "_contents", older)
    Checkpoints(tmp_path).learn(build(CQL, seed=1, use_sde=True), 30)
    run = Checkpoints(tmp_path)
    model = run.resume(build(CQL, seed=1, use_sde=True))
    assert run.learn(model, 40).num_timesteps == 40


def test_a_checkpoint_with_states_in_their_former_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = Checkpoints._contents

    def older(self: Any, model: Any) -> Any:
        document, arrays, tensors = contents(self, model)
        former = {"environment": {"number": 0, "attributes": {}}, "action_noise": ["NoneType", {"plain": None}]}
        return document | former, arrays, tensors

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_contents", older)
        Checkpoints(tmp_path).learn(build(CQL, seed=1), 10)
    model = build(CQL, seed=1)
    with pytest.raises(CheckpointError, match=r"before 0\.1\.0.*start a run in another folder"):
        Checkpoints(tmp_path).resume(model)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Pendulum-v1", "CartPole-v1", "Acrobot-v1"])
def test_environments_go_on_within_an_episode(env_id: str) -> None:
    if env_id in ("HalfCheetah-v5", "Ant-v5"):
        pytest.importorskip("mujoco")
    first: Any = make_vec_env(env_id, 2, seed=3)
    second: Any = make_vec_env(env_id, 2, seed=4)
    steps = np.random.default_rng(0)
    actions = [
        [steps.uniform(-1, 1, first.action_space.shape) if first.action_space.shape else steps.integers(2) for _ in range(2)]
        for _ in range(60)
    ]
    first.reset()
    second.reset()
    for action in actions[:23]:
        first.step(np.asarray(action))
    arrays: dict[str, Any] = {}
    state, problems = capture_state(first, arrays)
    assert problems == []
    twin: Any = make_vec_env(env_id, 2, seed=5)
    twin.reset()
    assert restore_state(second, state, arrays) == []
    differs = False
    for action in actions[23:]:
        one, other, third = (env.step(np.asarray(action)) for env in (first, second, twin))
        for mine, theirs in zip(one[:3], other[:3], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        differs |= not np.array_equal(one[0], third[0])
    assert differs
    np.testing.assert_array_equal(np.asarray(first.reset()), np.asarray(second.reset()))


def test_another_mujoco_model_is_named() -> None:
    pytest.importorskip("mujoco")
    cheetah, ant = (gym.make(name).unwrapped for name in ("HalfCheetah-v5", "Ant-v5"))
    for env in (cheetah, ant):
        env.reset(seed=0)
    for _ in range(20):
        cheetah.step(np.ones(6))
    own, other = cheetah.data, ant.data  # type: ignore[attr-defined]
    assert own.efc_force.size, "it touches the ground"
    arrays: dict[str, Any] = {}
    state, _ = capture_state(own, arrays)
    for name, expected in (("qfrc_actuator", [".qfrc_actuator"]), ("efc_force", [])):  # the second has a row for each contact
        (key,) = (key for key in arrays if key.endswith(f".{name}"))
        assert restore_state(own, state, arrays | {key: arrays[key][:-1]}) == expected
    before = other.qpos.copy()
    assert restore_state(other, state, arrays) == [".state"]
    np.testing.assert_array_equal(other.qpos, before)


class Randomised(gym.Wrapper[Any, Any, Any, Any]):
    """Other masses, friction, gravity and time steps in each episode."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        found = super().reset(seed=seed, options=options)
        model, draw = self.unwrapped.model, self.unwrapped.np_random.uniform  # type: ignore[attr-defined]
        model.body_mass[:] *= draw(0.9, 1.1, model.body_mass.shape)
        model.geom_friction[:, 0] = draw(0.5, 1.5)
        model.opt.gravity[2] = draw(-12, -8)
        model.opt.timestep = draw(0.008, 0.012)
        return found


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Door", "Hammer", "Pen", "Relocate"])
def test_what_an_environment_changed_in_its_mujoco_model_goes_on(name: str) -> None:
    pytest.importorskip("mujoco")

    def make(seed: int) -> Any:
        env = Randomised(gym.make(name)) if name == "HalfCheetah-v5" else gym.make(f"AdroitHand{name}-v1")
        env.reset(seed=seed)
        return env

    if name != "HalfCheetah-v5":
        gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    one, other, twin = make(3), make(4), make(5)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, *one.action_space.shape))
    for action in actions[:7]:
        one.step(action)
    arrays: dict[str, Any] = {}
    state, problems = capture_state(one, arrays)
    assert problems == []
    assert restore_state(other, json.loads(json.dumps(state)), arrays) == []
    # The twin: all of the state but the model.
    (number,) = (index for index, record in enumerate(state["objects"]) if "mujoco_model" in record)
    state["objects"][number] = {}
    assert restore_state(twin, state, arrays) == []
    differs = False
    for action in actions[7:]:
        mine, theirs, third = (env.step(action) for env in (one, other, twin))
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1:4] == theirs[1:4]
        differs |= not np.array_equal(mine[0], third[0])
    assert differs
    np.testing.assert_array_equal(one.reset()[0], other.reset()[0])


def test_a_mujoco_model_keeps_checkpoints_small_and_a_texture_that_changed_is_named() -> None:
    pytest.importorskip("mujoco")
    cheetah, fresh, ant = (gym.make(name).unwrapped.model for name in ("HalfCheetah-v5", "HalfCheetah-v5", "Ant-v5"))  # type: ignore[attr-defined]
    (texture,) = {"tex_rgb", "tex_data"} & set(dir(cheetah))
    cheetah.body_mass[1] = 5.0
    for change, expected in ((0, []), (1, [f".{texture}"])):
        getattr(cheetah, texture)[7] += change
        arrays: dict[str, Any] = {}
        state, problems = capture_state(cheetah, arrays)
        assert problems == []
        assert sum(array.nbytes for array in arrays.values()) < 50_000 < getattr(cheetah, texture).nbytes
        assert restore_state(fresh, state, arrays) == expected
        assert fresh.body_mass[1] == 5.0
    before = ant.body_mass.copy()
    assert ".body_mass" in restore_state(ant, state, arrays)
    np.testing.assert_array_equal(ant.body_mass, before)


class Phase(enum.Enum):
    REACH = 0
    GRASP = 1


class Level(enum.IntEnum):
    LOW = 0
    HIGH = 1


class Touch(enum.Flag):
    NONE = 0
    LEFT = 1
    RIGHT = 2


class Motion(NamedTuple):
    x: float
    v: Any


@dataclasses.dataclass(frozen=True)
class Pose:
    angle: float


class Clock:
    def __init__(self) -> None:
        self.ticks = 0


class Number(int):
    pass


class InSlots:
    __slots__ = ("value",)


_HOME = np.zeros(2)
_REST = Pose(0.0)


class Everything:
    """State of each kind that Python programs keep it in."""

    START = np.zeros(3)

    def __init__(self) -> None:
        self.phase, self.level, self.touch = Phase.REACH, Level.LOW, Touch.NONE
        self.motion = Motion(0.0, np.zeros(2))
        self.pair: tuple[Any, ...] = (0, np.random.RandomState, [0])
        self.pose = _REST
        self.tensor, self.half = th.zeros(2), th.zeros((), dtype=th.bfloat16)
        self.visits: defaultdict[Any, int] = defaultdict(int)
        self.counts: Counter[str] = Counter()
        self.order = OrderedDict(a=1, b=2)
        self.window, self.screen = deque([0.0], maxlen=3), {"shown": 0}
        self.clock = Clock()
        self.slots = InSlots()
        self.slots.value = 0
        self.phases = {Phase.REACH}
        self.lists: Any = [[0], [1.0]]
        self.late: Any = None
        self.grids = [np.zeros(2), np.zeros(2)]
        self.grid = self.grids[0]
        self.all = np.zeros((3, 4))
        self.row, self.columns = self.all[1], self.all[:, ::-2]
        self.seen = th.from_numpy(self.all)
        self.position, self.home = _HOME, self.START
        self.first = self.second = np.zeros(2)
        self.generator = self.others = np.random.RandomState(0)
        self.draw = self.generator.normal  # A method: it holds the generator, and is not looked into.

    def step(self) -> None:
        self.phase, self.level, self.touch = Phase.GRASP, Level.HIGH, Touch.LEFT | Touch.RIGHT
        self.motion = Motion(self.motion.x + 1, self.motion.v + 1)
        self.pair = (self.pair[0] + 1, np.random.RandomState, [*self.pair[2], 1])
        self.pose = Pose(self.pose.angle + 1)
        self.tensor += 1
        self.half = self.half + 0.5
        self.visits[3, "x"] += 1
        self.counts["a"] += 2
        self.order.move_to_end("a")
        self.window.append(self.window[-1] + 1)
        self.screen["shown"] += 1
        self.clock.ticks += 1
        self.slots.value += 1
        self.phases.add(Phase.GRASP)
        self.lists[0].append(self.lists[1])
        self.late = [np.ones(2), Phase.GRASP, th.ones(1), {"x": deque([1])}]
        self.grid += 5
        self.all[1, 1] += 1
        self.position = self.position + 1  # From here on an array of its own.
        self.home = self.home + 1
        self.second = self.first + 1
        self.drawn = self.draw()

    def told(self) -> dict[str, str]:
        state = {
            key: value for key, value in vars(self).items() if key not in ("draw", "slots", "clock", "generator", "others")
        }
        state["phases"] = sorted(phase.name for phase in self.phases)
        return {key: repr(value) for key, value in state.items()} | {"slots": self.slots.value, "clock": str(self.clock.ticks)}


def test_state_of_each_kind_comes_back_as_what_it_was() -> None:
    one, other, twin = Everything(), Everything(), Everything()
    one.step()
    one.step()
    arrays: dict[str, Any] = {}
    state, problems = capture_state(one, arrays)
    assert problems == []
    assert restore_state(other, json.loads(json.dumps(state)), arrays) == []
    for _ in range(2):
        assert other.told() == one.told()
        assert all(one.told()[key] != value for key, value in twin.told().items() if key not in ("first", "lists"))
        one.step()
        other.step()
    assert other.lists[0][-1] is other.lists[1]
    assert (other.window.maxlen, type(other.visits), type(other.order)) == (3, defaultdict, OrderedDict)
    assert not _HOME.any()
    assert not Everything.START.any()
    assert Pose(0.0) == _REST


def test_arrays_that_share_memory_share_it_again() -> None:
    def strided() -> Any:
        found = types.SimpleNamespace(all=np.zeros((3, 4)))
        found.row = found.all[1]
        found.tensor = th.from_numpy(found.row)
        return found

    one = strided()
    one.all[:] = np.arange(12).reshape(3, 4)
    arrays: dict[str, Any] = {}
    state, problems = capture_state(one, arrays)
    assert problems == []
    apart = types.SimpleNamespace(all=np.zeros((3, 4)), row=np.zeros(4), tensor=th.zeros(4, dtype=th.float64))
    together, absent = strided(), types.SimpleNamespace()
    held = together.all
    for other in (together, apart, absent):
        assert restore_state(other, state, arrays) == []
        np.testing.assert_array_equal(other.all, one.all)
        other.all[1, 2] = 50.0
        assert other.row.tolist() == other.tensor.tolist() == [4.0, 5.0, 50.0, 7.0]
    assert together.all is not held
    assert not held.any(), "whoever else holds it may start from it"
    # The twin: what does not share memory in the run does not share it afterwards.
    state, _ = capture_state(types.SimpleNamespace(first=np.zeros(2), second=np.ones(2)), arrays := {})
    other = types.SimpleNamespace(first=held[0, :2])
    other.second = other.first
    assert restore_state(other, state, arrays) == []
    assert (other.first.tolist(), other.second.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_what_has_no_place_or_cannot_be_read_is_named_by_where_it_is() -> None:
    unreadable = {
        "number": Number(3),
        "masked": np.ma.masked_array([1.0], [True]),
        "sparse": th.zeros(2).to_sparse(),
        "keys": {InSlots(): 1},
        "objects": np.array([None, 1]),
        "count": itertools.count(),
    }
    state, problems = capture_state(types.SimpleNamespace(**unreadable, viewer=itertools.count()), {})
    assert [problem.split(" (")[0] for problem in problems] == list(unreadable)
    assert restore_state(types.SimpleNamespace(**unreadable), state, {}) == []
    state, problems = capture_state(types.SimpleNamespace(a=[Clock(), Clock()], b=defaultdict(int), viewer=Clock()), {})
    assert problems == []
    wrong = {"a": [Clock()], "b": None, "viewer": None}
    assert restore_state(types.SimpleNamespace(**wrong), state, {}) == ["b (NoneType)", "a[1] (nothing)"]
    wrong = {"a": [Clock(), Clock(), Clock()], "b": defaultdict(int), "viewer": None}
    assert restore_state(types.SimpleNamespace(**wrong), state, {}) == ["a (list)"]
    shared = Clock()
    assert restore_state(types.SimpleNamespace(a=[shared, shared], b=defaultdict(int)), state, {}) == ["a[1] (Clock)"]


class Part:
    def __init__(self, x: float, behind: Part | None) -> None:
        self.x, self.behind = x, behind


_SPACE = spaces.Box(-1.0, 1.0, (2,))
_LAYOUTS = {"walls": np.zeros(3), "goals": [1, 2]}


class Borrower:
    """Starts from what others hold, and never changes these."""

    def __init__(self, start: NDArray[Any] = np.zeros(2)) -> None:  # noqa: B008 (that is the point)
        self.action, self.walls, self.goals, self.position = _SPACE.low, _LAYOUTS["walls"], _LAYOUTS["goals"], start

    def move(self) -> None:
        self.action = np.full(2, 0.5, np.float32)
        self.walls, self.goals, self.position = self.walls + 1, [*self.goals, 3], self.position + 2


def handed_over(one: Any, other: Any) -> tuple[list[str], list[str]]:
    """Write the state of an object into another; what could not be read, and what had no place."""
    arrays: dict[str, Any] = {}
    state, problems = capture_state(one, arrays)
    return problems, restore_state(other, json.loads(json.dumps(state)), arrays)


def test_what_others_hold_too_stays_as_it_is() -> None:
    one, other = Borrower(), Borrower()
    one.move()
    assert handed_over(one, other) == ([], [])
    assert [other.action.tolist(), other.walls.tolist(), other.goals] == [[0.5, 0.5], [1, 1, 1], [1, 2, 3]]
    assert other.position.tolist() == [2.0, 2.0]
    fresh = Borrower()
    assert [fresh.action.tolist(), fresh.walls.tolist(), fresh.goals] == [[-1.0, -1.0], [0, 0, 0], [1, 2]]
    assert fresh.position.tolist() == [0.0, 0.0]


def test_a_simulation_that_a_viewer_shows_is_read_as_what_it_is() -> None:
    def make(steps: int) -> Any:
        env = gym.make("Pendulum-v1")
        env.reset(seed=1)
        for _ in range(steps):
            env.step(np.ones(1, np.float32))
        # Reached by way of the viewer before the wrappers are.
        return types.SimpleNamespace(viewer=types.SimpleNamespace(shown=env.unwrapped, noise=itertools.count()), env=env)

    one, other = make(7), make(2)
    assert handed_over(one, other) == ([], [])
    assert other.env.unwrapped.state.tolist() == one.env.unwrapped.state.tolist() != make(2).env.unwrapped.state.tolist()
    one.viewer.shown.unwrapped.noise = itertools.count()
    assert handed_over(one, other)[0] == ["env.env.env.env.noise (itertools.count)"], "what the environment holds is no show"


class Repeated(InSlots):
    __slots__ = ("other", "value")


class Agents(dict):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([[1], [2]])


class Odd:
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_odd_objects_are_read_or_named_and_training_goes_on() -> None:
    def make(on: int) -> Any:
        class Local(enum.Enum):
            A = 0
            B = 1

        slots = Repeated()
        slots.value, slots.other = on, [on]
        found = types.SimpleNamespace(
            slots=slots, agents=Agents(a=on), odd=Odd(), last=on, when=time.localtime(on), keeper=Clock(),
            best=th.tensor([[on, 9.0 - on]]).max(1),
            walls={((0, 0), (0, on))}, counts={Local.A: on, Local.B: 2 * on}, path=Path("here"), day=datetime.date(2026, 1, 1),
            history=[{"step": index, "where": [on]} for index in range(1001)], act=max,
        )  # fmt: skip
        found.parent = weakref.proxy(found.keeper)
        return found

    one, other = make(3), make(1)
    assert handed_over(one, other) == ([], [])
    assert (other.slots.value, other.slots.other, dict.__getitem__(other.agents, "a"), other.last) == (3, [3], 3, 3)
    assert (other.when.tm_sec, other.best.values.tolist(), other.best.indices.tolist()) == (one.when.tm_sec, [6.0], [1])
    assert other.walls == {((0, 0), (0, 3))}
    assert other.history == one.history
    assert {key.name: value for key, value in other.counts.items()} == {"A": 3, "B": 6}
    assert not other.counts.keys() & one.counts.keys(), "members of a class of its own"
    one.path, one.act, one.day = Path("there"), min, datetime.date(2026, 1, 2)
    assert handed_over(one, other) == ([], ["path (PosixPath)", "day (date)", "act (builtin_function_or_method)"])
    one.big, one.hits = 1 << 20_000, [itertools.count()]
    problems, left = handed_over(one, make(1))
    assert problems == ["big (builtins.int)", "hits[0] (itertools.count)"]
    assert "hits[0] (nothing)" in left


def test_an_environment_that_another_makes_in_its_reset_may_come_yet() -> None:
    arrays: dict[str, Any] = {}
    state, _ = capture_state(types.SimpleNamespace(inner=gym.make("Pendulum-v1")), arrays)
    assert misfits(types.SimpleNamespace(inner=None), state, arrays) == ([], ["inner (NoneType)"])
    others, _ = misfits(types.SimpleNamespace(inner=gym.make("CartPole-v1").unwrapped), state, arrays)
    assert others == ["inner (CartPoleEnv)"]


def test_numbers_of_a_mujoco_model_that_point_into_it_are_never_written() -> None:
    pytest.importorskip("mujoco")
    one, other = (gym.make("HalfCheetah-v5").unwrapped.model for _ in range(2))  # type: ignore[attr-defined]
    before = other.jnt_qposadr.copy()
    one.jnt_qposadr[1], one.geom_contype[1] = 1 << 29, 3
    assert handed_over(one, other) == ([], [".jnt_qposadr"])
    np.testing.assert_array_equal(other.jnt_qposadr, before)
    assert other.geom_contype[1] == 3


class Snake(gym.Env[Any, Any]):
    """An environment whose state is a chain of objects that grows with every step."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.head = Part(0.0, None)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.head = Part(float(action[0]), self.head)
        return np.asarray(action, np.float32), 0.0, False, False, {}


def test_a_long_chain_of_objects_is_no_obstacle(tmp_path: Path) -> None:
    def chain(x: float) -> Any:
        head = None
        for index in range(3 * sys.getrecursionlimit()):
            head = Part(x * index, head)
        nested: Any = ()
        for _ in range(3 * sys.getrecursionlimit()):
            nested = (nested, [x])
        return types.SimpleNamespace(head=head, nested=nested)

    def flat(found: Any) -> list[Any]:
        parts, here, nested = [], found.head, found.nested
        while here is not None:
            parts.append(here.x)
            here = here.behind
        while nested:
            nested, x = nested
            parts.append(x)
        return parts

    one, other = chain(1.0), chain(2.0)
    arrays: dict[str, Any] = {}
    state, problems = capture_state(one, arrays)
    assert problems == []
    assert flat(other) != flat(one)
    assert restore_state(other, json.loads(json.dumps(state)), arrays) == []
    assert flat(other) == flat(one)
    run = Checkpoints(tmp_path, save_freq=100)
    steps = sys.getrecursionlimit() // 2
    run.learn(build(CQL, Snake(), learning_starts=10_000, buffer_size=2_000), steps)
    assert (tmp_path / f"checkpoint_{steps // 100:06d}_online_{steps}.zip").exists()


def test_environments_in_other_processes_go_on_with_their_wrapper(tmp_path: Path) -> None:
    def start(folder: str, callback: Any = None, wrapper: Any = ResumableEnv) -> Any:
        stir()
        run = Checkpoints(tmp_path / folder, save_freq=10)
        with forks_allowed():
            env = make_vec_env(
                "Pendulum-v1", 2, vec_env_cls=SubprocVecEnv, wrapper_class=wrapper, vec_env_kwargs={"start_method": "fork"}
            )
        try:
            return fingerprint(run.learn(run.resume(build(CQL, env, seed=1, learning_starts=5)), 40, callback=callback))
        finally:
            env.close()

    expected = start("whole")
    with pytest.raises(StopError):
        start("cut", stopping_at(25))
    assert different(start("cut"), expected) == set()
    with pytest.raises(StopError):
        start("bare", stopping_at(25), wrapper=None)
    with pytest.warns(UserWarning, match="wrap each in cql_plugins.sb3.ResumableEnv"):
        start("bare", wrapper=None)


def test_a_wrapper_around_environments_in_other_processes_is_read_here() -> None:
    with forks_allowed():
        make = {"vec_env_cls": SubprocVecEnv, "wrapper_class": ResumableEnv, "vec_env_kwargs": {"start_method": "fork"}}
        one, other = (VecNormalize(make_vec_env("Pendulum-v1", 1, **make)) for _ in range(2))  # type: ignore[arg-type]
    try:
        one.reset()
        for _ in range(5):
            one.step(np.ones((1, 1)))
        arrays: dict[str, Any] = {}
        state, problems = capture_state(one, arrays)
        assert problems == []
        assert not np.array_equal(one.obs_rms.mean, other.obs_rms.mean)  # type: ignore[union-attr]
        assert restore_state(other, json.loads(json.dumps(state)), arrays) == []
        np.testing.assert_array_equal(one.obs_rms.mean, other.obs_rms.mean)  # type: ignore[union-attr]
        for mine, theirs in zip(one.step(np.ones((1, 1)))[:3], other.step(np.ones((1, 1)))[:3], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    finally:
        one.close()
        other.close()


class Hidden(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with something that Python cannot look into."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.engine = memoryview(b"state")


def test_what_cannot_be_read_is_named_and_starts_anew(tmp_path: Path) -> None:
    def model() -> Any:
        return build(CalQL, DummyVecEnv([lambda: Hidden(gym.make("Pendulum-v1"))]), seed=1, learning_starts=5)

    run = Checkpoints(tmp_path, save_freq=10)
    with pytest.raises(StopError):
        run.learn(model(), 40, callback=stopping_at(25))
    again = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"start anew.*envs\[0\]\.engine \(builtins\.memoryview\)"):
        resumed = again.resume(model())
    again.learn(resumed, 40)
    assert resumed.num_timesteps == 40
    assert resumed.replay_buffer._cuts[:40].sum() == 1  # The episode that ran was broken off, and no return is known for it.
    assert np.isneginf(resumed.replay_buffer.returns_to_go[:20]).all()


class Rocks(gym.Env[Any, Any]):
    """An environment whose objects there are only after a reset: one, three, or as many as it draws."""

    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rock: Part | None = None
        self.rocks: list[Part] = []
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.steps = 0.0, 0
        self.rock = Part(float(self.np_random.normal()), None)
        count = {"one": 0, "three": 3}.get(self.kind) or int(self.np_random.integers(1_000))
        self.rocks = [Part(float(x), None) for x in self.np_random.normal(size=0 if self.kind == "one" else count)]
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.x += float(action[0]) / 10
        self.steps += 1
        return self._observe(), self.x, False, self.steps == 20, {}

    def _observe(self) -> Any:
        assert self.rock is not None
        return np.array([self.x, min(rock.x for rock in [self.rock, *self.rocks])], np.float32)


@pytest.mark.parametrize("kind", ["one", "three"])
@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_objects_that_an_environment_makes_when_it_resets_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, vec_env: Any
) -> None:
    def start(folder: str, callback: Any = None) -> Any:
        stir()
        run = Checkpoints(tmp_path / folder, save_freq=10)
        kwargs = {"start_method": "fork"} if vec_env is SubprocVecEnv else {}
        with forks_allowed():
            inner = vec_env([lambda: ResumableEnv(Rocks(kind))] * 2, **kwargs)
        env = VecNormalize(inner)
        try:
            return fingerprint(run.learn(run.resume(build(CQL, env, seed=1, learning_starts=5)), 60, callback=callback))
        finally:
            env.close()

    expected = start("whole")
    with pytest.raises(StopError):
        start("cut", stopping_at(30))
    assert different(start("cut"), expected) == set()
    # The twin: as if a part of them could not be read.
    monkeypatch.setattr("cql_plugins.sb3.checkpoints.capture_state", lambda *args: (capture_state(*args)[0], ["hidden"]))
    with pytest.raises(StopError):
        start("reset", stopping_at(30))
    with pytest.warns(UserWarning, match="start anew"):
        assert different(start("reset"), expected)


def test_environments_that_have_other_objects_in_each_episode_start_anew(tmp_path: Path) -> None:
    def model() -> Any:
        return build(CalQL, VecNormalize(DummyVecEnv([lambda: Rocks("drawn")])), seed=1, learning_starts=5)

    with pytest.raises(StopError):
        Checkpoints(tmp_path, save_freq=10).learn(stopped := model(), 40, callback=stopping_at(31))
    run = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"start anew.* no place .* after a reset: .*envs\[0\].*\.rocks"):
        resumed = run.resume(model())
    assert resumed.num_timesteps == 30 == resumed.replay_buffer.size()
    assert round(resumed.env.obs_rms.count) == 31 == round(stopped.env.obs_rms.count) - 1, "statistics are not of an episode"
    run.learn(resumed, 40)
    assert resumed.num_timesteps == 40


def test_other_environments_are_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    def model(env: Any, seed: int) -> Any:
        return build(CQL, DummyVecEnv([lambda: env]), learning_starts=5, seed=seed)

    Checkpoints(tmp_path).learn(model(gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1), seed=1), 30)
    other = gym.make("Pendulum-v1")
    wrong = model(other, seed=2)
    before = {name: value.clone() for name, value in wrong.policy.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"cannot take: envs\[0\] \((Patched)?TimeLimit\)\. Build them .* with the same"):
        Checkpoints(tmp_path).resume(wrong)
    assert all(th.equal(value, before[name]) for name, value in wrong.policy.state_dict().items())
    assert wrong.num_timesteps == wrong._n_updates == wrong.replay_buffer.size() == 0
    assert not hasattr(other.unwrapped, "state"), "not even reset"
    right = model(gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1), seed=2)
    assert Checkpoints(tmp_path).resume(right).num_timesteps == 30


# Another number of environments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["CalQL", "steps", "hindsight", "DiscreteCQL"])
def test_a_run_goes_on_with_another_number_of_environments(tmp_path: Path, before: int, after: int, kind: str) -> None:
    def model(n_envs: int) -> Any:
        if kind == "DiscreteCQL":
            return build(DiscreteCQL, corridors(n_envs, discrete=True), seed=1)
        if kind == "hindsight":
            options = {"replay_buffer_class": HerReplayBuffer, "learning_starts": 20}
            return build(CalQL, corridors(n_envs, form="goal"), form="goal", seed=1, **options)
        return build(CalQL, corridors(n_envs), seed=1, n_steps=3 if kind == "steps" else 1)

    run = Checkpoints(tmp_path, save_freq=1000)
    old = run.learn(model(before), 60)
    again = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=f"the run had {before} environment.*the model has {after}"):
        new = again.resume(model(after))
    assert new.num_timesteps == old.num_timesteps
    rows = transitions(new.replay_buffer)
    assert rows <= transitions(old.replay_buffer)
    finished = transitions(old.replay_buffer, finished=True)
    assert len(rows) > 0.8 * len(finished if kind == "hindsight" else transitions(old.replay_buffer))
    again.learn(new, 100)
    assert new.num_timesteps >= 100


class LateNoise(NormalActionNoise):
    helper: Any = None

    def __call__(self) -> NDArray[Any]:
        self.helper = Clock()
        return super().__call__()


def test_environments_are_not_reset_where_something_else_is_refused(tmp_path: Path) -> None:
    def model() -> Any:
        noise = LateNoise(np.zeros(1), np.ones(1))
        return build(CalQL, VecNormalize(DummyVecEnv([lambda: Rocks("one")])), seed=1, learning_starts=5, action_noise=noise)

    Checkpoints(tmp_path, save_freq=10).learn(model(), 20)
    fresh = model()
    before = fresh.env.obs_rms.count
    with pytest.raises(CheckpointError, match="helper"):
        Checkpoints(tmp_path).resume(fresh)
    assert fresh.env.obs_rms.count == before


@pytest.mark.parametrize("form", ["vector", "goal"])
def test_the_networks_inputs_are_normalised_as_before_with_another_number_of_environments(tmp_path: Path, form: str) -> None:
    def model(n_envs: int) -> Any:
        return build(CalQL, VecNormalize(corridors(n_envs, form=form)), form=form, seed=1)

    run = Checkpoints(tmp_path, save_freq=1000)
    old = run.learn(model(3), 60).get_vec_normalize_env()
    fresh = model(2)
    with pytest.warns(UserWarning, match="the run had 3 environment"):
        new = Checkpoints(tmp_path).resume(fresh).get_vec_normalize_env()
    assert new is fresh.get_vec_normalize_env()
    for name in ("obs_rms", "ret_rms"):
        one, other, untouched = (getattr(env, name) for env in (old, new, model(2).get_vec_normalize_env()))
        for key in one if isinstance(one, dict) else [None]:
            here, there, before = (value if key is None else value[key] for value in (one, other, untouched))
            assert (here.mean.tolist(), here.var.tolist(), here.count) == (there.mean.tolist(), there.var.tolist(), there.count)
            assert here.count != before.count
    assert new.returns.shape == (2,)


def transitions(buffer: Any, finished: bool = False) -> set[tuple[Any, ...]]:
    """What a buffer holds, each transition with its return-to-go, as a set."""
    found = set()
    for row in range(buffer.size()):
        for env in range(buffer.n_envs):
            if isinstance(buffer, HerReplayBuffer) and buffer.ep_length[row, env] == 0:
                continue
            if finished and np.isneginf(getattr(buffer, "returns_to_go", buffer.rewards)[row, env]):
                continue
            before, after = buffer.observations, buffer.next_observations
            observations = (
                [part[key][row, env].tobytes() for part in (before, after) for key in sorted(part)]
                if isinstance(before, dict)
                else [before[row, env].tobytes(), after[row, env].tobytes()]
            )
            returns = getattr(buffer, "returns_to_go", None)
            found.add(
                (
                    *observations,
                    buffer.actions[row, env].tobytes(),
                    float(buffer.rewards[row, env]),
                    None if returns is None else float(returns[row, env]),
                )
            )
    return found


def test_sb3_s_own_buffer_file_goes_on_with_another_number_of_environments(tmp_path: Path) -> None:
    old = build(CalQL, corridors(1), seed=1).learn(60)
    old.save(tmp_path / "model")
    old.save_replay_buffer(tmp_path / "buffer")
    new: Any = CalQL.load(tmp_path / "model", env=corridors(4))
    new.load_replay_buffer(tmp_path / "buffer")
    assert new.replay_buffer.n_envs == 4
    own, theirs = transitions(new.replay_buffer), transitions(old.replay_buffer)
    assert {row[:-1] for row in own} <= {row[:-1] for row in theirs}
    assert len(own) >= 57
    # Where a column ends within an episode, its returns are not known any more.
    assert {row for row in own if row[-1] > -np.inf} <= theirs
    assert len(own & theirs) > 30
    new.learn(20, reset_num_timesteps=False)


def test_rows_that_are_each_other_s_next_observations_cannot_be_rearranged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimize_memory_usage": True, **_PLAIN}
    run = Checkpoints(tmp_path)
    run.learn(build(CQL, corridors(1), seed=1, **options), 30)
    model = build(CQL, corridors(2), seed=1, **options)
    with pytest.raises(CheckpointError, match="each other's next observations"):
        Checkpoints(tmp_path).resume(model)


# What does not belong together --------------------------------------------------------------------------------------------


def test_another_dataset_is_refused_and_the_same_one_built_anew_is_not(tmp_path: Path) -> None:
    dataset = collect()
    Checkpoints(tmp_path).learn_offline(build(CQL, seed=1), dataset, 3)
    rewards = np.array(dataset.rewards)
    rewards[7] += 1e-3
    changed = OfflineDataset(
        dataset.observations,
        dataset.actions,
        rewards,
        dataset.terminations,
        dataset.truncations,
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
    )
    for other, steps in ((changed, 5), (changed, 3), (dataset[::-1], 5)):
        run = Checkpoints(tmp_path)
        model = run.resume(build(CQL, seed=1))
        with pytest.raises(CheckpointError, match="not the one that this run had"):
            run.learn_offline(model, other, steps)
        assert model._n_updates == 3
    run = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="call set_offline_data"):
        run.learn(run.resume(build(CQL, seed=1)), 10)
    run = Checkpoints(tmp_path)
    run.learn_offline(run.resume(build(CQL, seed=1)), collect(), 5)


def test_the_identity_is_of_the_data_and_not_of_what_was_computed_from_it() -> None:
    def identity(**options: Any) -> str:
        model = build(CalQL, seed=1, **options).set_offline_data(collect())
        model.learn_offline(model.offline_buffer, 2)
        return data_identity(model.offline_buffer)

    first = identity()
    assert identity(return_tail="bootstrap", gamma=0.5) == first
    model = build(CalQL, seed=1).set_offline_data(collect())
    model.offline_buffer.observations  # noqa: B018
    model.offline_buffer.actions[3, 0, 0] += 1e-3
    assert data_identity(model.offline_buffer) != first


def test_a_run_without_an_environment_at_first_keeps_what_it_collected(tmp_path: Path) -> None:
    data = collect()

    def script(total: int) -> Any:
        run = Checkpoints(tmp_path, save_freq=10)
        model = run.resume(CalQL.from_dataset(data, **tiny(CalQL)))
        run.learn_offline(model, data, 3)
        model.set_env(corridors())
        return run.learn(model, total)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the environment starts anew
        first, second = script(30), script(60)
    assert first.replay_buffer.size() == 30
    assert second.replay_buffer.size() == 60
    assert second.replay_buffer.buffer_size == first.replay_buffer.buffer_size == 200
    assert transitions(first.replay_buffer, finished=True) <= transitions(second.replay_buffer)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"return_tail": "zero"}, {"return_tail": "none"}),
        ({"return_tail": "zero"}, {"return_tail": "bootstrap"}),
        ({"return_tail": "bootstrap", "gamma": 0.99}, {"return_tail": "bootstrap", "gamma": 0.5}),
        ({"gamma": 0.99}, {"gamma": 0.5}),
        ({"n_steps": 3}, {"n_steps": 5}),
    ],
)
def test_a_run_goes_on_with_the_options_that_it_is_told(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    def script(total: int, options: dict[str, Any]) -> Any:
        run = Checkpoints(tmp_path, save_freq=10)
        return run.learn(run.resume(build(CalQL, corridors(limit=3), seed=1, **options)), total)

    script(30, before)
    with pytest.warns(UserWarning, match="other options than it had"):
        model = script(60, after)
    buffer = model.replay_buffer
    assert buffer.has_settings(model.gamma, model.return_tail)
    assert getattr(buffer, "n_steps", 1) == model.n_steps
    if model.n_steps > 1:
        assert buffer.gamma == model.gamma
    found = buffer.returns_to_go[:60].copy()
    ends = np.flatnonzero(buffer.timeouts[:60, 0])
    assert {end < 30 for end in ends} == {True, False}, "some were collected before, some since"
    if model.return_tail == "none":
        assert np.isneginf(found[ends]).all()
    elif model.return_tail == "bootstrap":
        before_it = ends[ends < 30]  # the others wait for the next estimate
        assert np.isfinite(found[before_it]).all()
        assert not np.allclose(found[before_it], buffer.rewards[before_it])
    else:
        buffer.recompute_returns()
        np.testing.assert_array_equal(buffer.returns_to_go[:60], found)


def test_a_run_goes_on_with_its_data_where_it_is_told(tmp_path: Path) -> None:
    for steps, device in ((3, None), (6, "cpu")):
        run = Checkpoints(tmp_path)
        model = run.learn_offline(run.resume(build(CQL, seed=1, data_device=device)), collect(), steps)
    assert model._n_offline_steps == 6
    assert model._device_data is not None


def test_a_used_model_samples_the_returns_of_the_checkpoint(tmp_path: Path) -> None:
    """Those on a device, too, although both were estimated as often."""
    data = collect()
    first, used = (build(CalQL, seed=seed, return_tail="bootstrap", data_device="cpu") for seed in (1, 2))
    first.learn_offline(data, 3, callback=Checkpoints(tmp_path, save_freq=0))
    used.learn_offline(data, 3)
    load_checkpoint(used, next(tmp_path.iterdir()))
    for model in (first, used):
        model.learn_offline(data, 1)
        on_device = model._device_data._columns["returns_to_go"]
        np.testing.assert_array_equal(first.offline_buffer.returns_to_go, on_device)


def test_what_belongs_to_a_process_is_neither_written_nor_read(tmp_path: Path) -> None:
    """The processes that train together, and recorded steps; older files say that there are none."""
    run = Checkpoints(tmp_path)
    model = run.learn_offline(build(CQL, seed=1), collect(), 2)
    own = {"_ranks": object(), "_captured_steps": object()}
    archive = read_archive(run.files.paths()[-1])
    assert not own.keys() & archive.document["counters"].keys()
    archive.document["counters"] |= dict.fromkeys(own)
    for name, value in own.items():
        setattr(model, name, value)
        _restore_run(model, archive)
        assert getattr(model, name) is value


def test_an_empty_memory_efficient_buffer_needs_no_moving(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimize_memory_usage": True, **_PLAIN}
    data = collect()
    run = Checkpoints(tmp_path)
    run.learn_offline(run.resume(CQL.from_dataset(data, **tiny(CQL, **options))), data, 3)
    model = Checkpoints(tmp_path).resume(build(CQL, **options))
    assert model._n_offline_steps == 3
    assert model.replay_buffer.buffer_size == 200


@pytest.mark.parametrize("fraction", [0, 1, 0.5])
def test_whole_numbers_are_not_another_option(tmp_path: Path, fraction: float) -> None:
    run = Checkpoints(tmp_path)
    run.learn_offline(run.resume(build(CQL, offline_fraction=fraction)), collect(), 2)
    assert Checkpoints(tmp_path).resume(build(CQL, offline_fraction=fraction)).offline_fraction == fraction
    assert repr(build(CQL, offline_fraction=fraction).offline_fraction) == repr(fraction)


def test_a_checkpoint_of_another_buffer_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimize_memory_usage": True, **_PLAIN}
    for folder, n_envs, more in (("plain", 1, {}), ("efficient", 1, options)):
        run = Checkpoints(tmp_path / folder)
        run.learn(build(CQL, corridors(n_envs), seed=1, **more), 30)
    wrong = [
        ("plain", "ReplayBuffer, the model a NStepReplayBuffer", build(CQL, seed=2, n_steps=3)),
        ("efficient", "each other's next observations", build(CQL, corridors(2), seed=2, **options)),
        ("plain", "next_observations in its replay buffer", build(CQL, seed=2, **options)),
    ]
    for folder, message, model in wrong:
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(tmp_path / folder).resume(model)
        assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
        assert model.num_timesteps == model._n_updates == model.replay_buffer.size() == 0


def test_a_checkpoint_of_something_else_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    run.learn_offline(build(CQL, seed=1), collect(), 3)
    wrong = {
        "is of CQL; the model is a CalQL": build(CalQL, seed=2),
        "shape": build(CQL, seed=2, policy_kwargs={"net_arch": [5]}),
        "build it with the same options": build(CQL, seed=2, cql_lagrange_threshold=1.0),
    }
    for message, model in wrong.items():
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(tmp_path).resume(model)
        assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    with pytest.warns(UserWarning, match=r"gamma was 0\.\d+ and is 0\.5"):
        Checkpoints(tmp_path).resume(build(CQL, seed=1, gamma=0.5))
    with pytest.raises(TypeError, match="SAC"):
        SAC("MlpPolicy", corridors()).learn(1, callback=Checkpoints(tmp_path))
    for arguments in ({"save_freq": -1}, {"save_minutes": 0.0}, {"keep_last": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Checkpoints(tmp_path, **arguments)


# When and where -----------------------------------------------------------------------------------------------------------


def test_checkpoints_come_by_steps_by_time_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(folder: str, **options: Any) -> list[str]:
        run = Checkpoints(tmp_path / folder, keep_last=None, **options)
        model = run.learn_offline(build(CQL, seed=1), collect(), 10)
        run.learn(model, 20)
        return [path.stem.split("_", 2)[2] for path in run.files.paths()]

    assert names("steps", save_freq=4) == ["offline_4", "offline_8", "offline_10", *[f"online_{n}" for n in (4, 8, 12, 16, 20)]]
    assert names("none", save_freq=0) == ["offline_10", "online_20"]
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr("cql_plugins.sb3.checkpoints.time.monotonic", lambda: float(next(clock)))
    by_time = names("minutes", save_freq=0, save_minutes=1.0)
    assert "offline_3" in by_time
    assert 4 < len(by_time) < 20


# When things go wrong ---------------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class FullDisk(Checkpoints):
    """A run that may write so many bytes to a file and no more."""

    room: int | None = None

    def save(self) -> Path:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if self.room is None else self.room, hard))
        try:
            return super().save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on files")
@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_disk_without_room_is_said_and_nothing_is_lost(tmp_path: Path, room: int) -> None:
    expected = fingerprint(build(CQL, seed=1).learn_offline(collect(), 10))
    run = FullDisk(tmp_path, save_freq=3)
    model = build(CQL, seed=1)
    run.learn_offline(model, collect(), 6)
    before = _contents(tmp_path)
    assert len(before) == 2
    run.room = room
    with pytest.raises(OSError, match=r"could not write .*checkpoint_000003_offline_9\.zip; nothing was left there") as raised:
        run.learn_offline(model, collect(), 10)
    assert raised.value.errno == errno.EFBIG
    assert _contents(tmp_path) == before
    # With room again the same process goes on, as does another one.
    run.room = None
    assert model._n_offline_steps == 9
    run.learn_offline(model, collect(), 10)
    assert different(fingerprint(model), expected) == set()
    for name in set(_contents(tmp_path)) - before.keys():
        (tmp_path / name).unlink()
    stir()
    again = Checkpoints(tmp_path)
    assert different(fingerprint(again.learn_offline(again.resume(build(CQL, seed=1)), collect(), 10)), expected) == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of another user")
def test_a_folder_that_cannot_be_written_is_said_and_older_checkpoints_stay(tmp_path: Path) -> None:
    """As another user where the tests run as root, to whom nothing is forbidden."""
    run = Checkpoints(tmp_path / "run", save_freq=3)
    run.learn_offline(build(CQL, seed=1), collect(), 3)
    before = _contents(tmp_path)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    model = again = None
    (tmp_path / "run").chmod(0o555)
    try:
        again = Checkpoints(tmp_path / "run", save_freq=3)
        model = again.resume(build(CQL, seed=1))
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"Permission denied: could not write .*offline_6\.zip"):
                again.learn_offline(model, collect(), 10)
        finally:
            os.seteuid(user)
    finally:
        (tmp_path / "run").chmod(0o755)
    assert _contents(tmp_path) == before
    again.learn_offline(model, collect(), 10)
    assert different(fingerprint(model), fingerprint(build(CQL, seed=1).learn_offline(collect(), 10))) == set()


_SCRIPT = """
import sys, time
from stable_baselines3.common.callbacks import BaseCallback
from tests.sb3.conftest import build, collect, corridors
from cql_plugins.sb3 import CalQL, Checkpoints

class Slow(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 5:
            print("ready", flush=True)
        time.sleep(0.02)
        return True

run = Checkpoints(sys.argv[1], save_freq=0)
model = run.resume(build(CalQL, corridors(), seed=1))
print("from", model._n_offline_steps, model.num_timesteps, flush=True)
slow = Slow() if sys.argv[2] != "fast" else None
run.learn_offline(model, collect(), 40, callback=slow if sys.argv[2] == "offline" else None)
run.learn(model, 40, callback=slow if sys.argv[2] == "online" else None)
model.save(sys.argv[1] + "/final")
"""


def _start(folder: Path, phase: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(folder), phase]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def _wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(line):
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_signals_end_a_run_with_a_checkpoint_and_it_goes_on(tmp_path: Path) -> None:
    whole, cut, twice = (tmp_path / name for name in ("whole", "cut", "twice"))
    undisturbed = _start(whole, "fast")
    first = _start(cut, "offline")
    _wait_for(first, "ready")
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 143, first.communicate()[1]
    second = _start(cut, "online")
    _wait_for(second, "from")
    _wait_for(second, "ready")
    second.send_signal(signal.SIGINT)
    errors = second.communicate(timeout=300)[1]
    assert "KeyboardInterrupt" in errors
    steps = [path.stem.split("_", 2)[2] for path in Checkpoints(cut).files.paths()]
    assert steps[0].startswith("offline")
    assert 5 <= int(steps[0].split("_")[1]) < 40
    assert steps[-2] == "offline_40"
    assert 5 <= int(steps[-1].split("_")[1]) < 40
    third = _start(cut, "fast")
    assert third.wait(300) == 0, third.communicate()[1]
    assert undisturbed.wait(300) == 0, undisturbed.communicate()[1]
    one, other = (CalQL.load(folder / "final", env=corridors()) for folder in (whole, cut))
    assert all(th.equal(value, other.policy.state_dict()[name]) for name, value in one.policy.state_dict().items())
    # Twice SIGINT: at once, with what there was and nothing half-written.
    fourth = _start(twice, "offline")
    _wait_for(fourth, "ready")
    fourth.send_signal(signal.SIGSTOP)
    fourth.send_signal(signal.SIGINT)
    fourth.send_signal(signal.SIGCONT)
    fourth.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in fourth.communicate(timeout=300)[1]
    assert not [path for path in _contents(twice) if path.startswith(".")]
    for process in (undisturbed, first, second, third, fourth):
        process.communicate()


def test_two_runs_in_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    """They draw from the same streams, by SB3's design; what is stored of one is not changed by the other."""
    one, other = Checkpoints(tmp_path / "one", save_freq=3), Checkpoints(tmp_path / "other", save_freq=3)
    first, second = build(CQL, seed=1), build(CalQL, seed=2)
    one.learn_offline(first, collect(), 3)
    other.learn_offline(second, collect(), 3)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "other").iterdir()}
    resumed = Checkpoints(tmp_path / "one").resume(build(CQL, seed=9))
    assert different(_flat(resumed.get_parameters()), _flat(first.get_parameters())) == set()


def _flat(tree: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _flatten(tree, "", found)
    return found


def test_models_with_seeds_do_not_disturb_each_other_in_one_process(tmp_path: Path) -> None:
    """In SB3 all models draw from one stream, so that training in turns is not what training alone is."""

    def model(seed: int | None) -> Any:
        return build(CalQL, corridors(), seed=seed)

    alone = model(1)
    alone.learn_offline(collect(), 4).learn(20)
    alone.learn_offline(collect(), 4)
    one, other = model(1), model(2)
    one.learn_offline(collect(), 4)
    other.learn_offline(collect(), 3)
    one.learn(20)
    stir()
    other.learn(10)
    one.learn_offline(collect(), 4)
    assert different(_flat(one.get_parameters()), _flat(alone.get_parameters())) == set()
    # What others draw from is where it would be without them, too.
    np.random.seed(7)
    th.manual_seed(7)
    expected = th.rand(1).item(), np.random.rand()
    np.random.seed(7)
    th.manual_seed(7)
    one.learn_offline(collect(), 1).learn(5)
    assert (th.rand(1).item(), np.random.rand()) == expected
    # Going on from a checkpoint leaves them alone, too.
    run = Checkpoints(tmp_path)
    run.learn_offline(model(1), collect(), 2)
    again = Checkpoints(tmp_path)
    resumed = model(1)
    np.random.seed(7)
    th.manual_seed(7)
    again.learn_offline(again.resume(resumed), collect(), 4)
    assert (th.rand(1).item(), np.random.rand()) == expected
    # Without a seed it is SB3's one stream for all.
    unseeded = model(None)
    np.random.seed(7)
    th.manual_seed(7)
    unseeded.learn_offline(collect(), 1)
    assert th.rand(1).item() != expected[0]
    # A seed set later starts the model's own streams anew.
    first, second = model(1), model(2)
    second.policy.load_state_dict(first.policy.state_dict())
    for each in (first, second):
        each.set_random_seed(5)
        stir()
        each.learn_offline(collect(), 3)
    assert different(_flat(first.get_parameters()), _flat(second.get_parameters())) == set()
