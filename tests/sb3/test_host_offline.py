"""The two phases together: models without an environment, the switch to online, the mixing of batches, bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins.adapters import DatasetError, from_arrays
from cql_plugins.sb3 import CQL, CalQL

ALGORITHMS = pytest.mark.parametrize("algorithm", [CQL, CalQL])
TAG = 500.0
"""Reward of every transition of a tagged dataset; no corridor pays it."""


def _offline_rows(model: Any, batch_size: int) -> int:
    """How many of a batch are from the tagged dataset; they come first."""
    tagged = (model.sample_batch(batch_size).rewards == TAG).flatten().tolist()
    assert tagged == sorted(tagged, reverse=True)
    return sum(tagged)


# No environment -------------------------------------------------------------------------------------------------------


@ALGORITHMS
@pytest.mark.parametrize("form", ["vector", "image", "dict", "goal"])
def test_from_dataset(algorithm: Any, host: Any, tmp_path: Any, form: str) -> None:
    dataset = host.collect(form)
    policy = "CnnPolicy" if form == "image" else None
    model = algorithm.from_dataset(dataset, policy, **host.tiny(algorithm, form))
    assert type(model) is algorithm
    assert model.get_env() is None
    assert model.offline_buffer.size() == len(dataset)
    assert isinstance(model.offline_buffer, DictReplayBuffer if form in ("dict", "goal") else ReplayBuffer)
    before = host.state(model)
    model.learn_offline(dataset, 3)
    assert host.networks(host.differing(before, host.state(model))) == {"actor", "critic", "critic_target"}

    env = host.Corridor(form)
    observation, _ = env.reset(seed=0)
    action, _ = model.predict(observation, deterministic=True)
    assert env.action_space.contains(action)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], action)
    again.learn_offline(dataset, 1)

    for learner in (model, again):
        with pytest.raises(AssertionError, match="must set the environment"):
            learner.learn(4)
        learner.set_env(host.Corridor(form))
        learner.learn(12)
        assert learner.num_timesteps == 12


@ALGORITHMS
def test_from_dataset_is_the_model_with_an_environment(algorithm: Any, host: Any, dataset: Any) -> None:
    alone = algorithm.from_dataset(dataset, **host.tiny(algorithm)).learn_offline(dataset, 3)
    beside = host.build(algorithm)
    beside.learn_offline(dataset, 3)
    assert not host.differing(host.state(alone), host.state(beside))
    assert alone.target_entropy == beside.target_entropy == -1.0


@ALGORITHMS
def test_from_a_replay_buffer(algorithm: Any, host: Any) -> None:
    sac = host.build(SAC, host.corridors(2))
    sac.learn(24)
    model = algorithm.from_dataset(sac.replay_buffer, **host.tiny(algorithm))
    model.learn_offline(sac.replay_buffer, 2)
    assert model.n_envs == 1
    assert model.sample_batch(8).actions.shape == (8, 1)


@ALGORITHMS
def test_from_dataset_refuses(algorithm: Any, host: Any, dataset: Any) -> None:
    with pytest.raises(ValueError, match="takes no env"):
        algorithm.from_dataset(dataset, env=host.corridors())
    assert algorithm.from_dataset(dataset, env=None, **host.tiny(algorithm)).get_env() is None

    def logged(action_space: Any, actions: Any) -> Any:
        flags = np.array([False, True])
        return from_arrays(
            np.zeros((2, 1), dtype=np.float32),
            actions,
            np.zeros(2),
            np.zeros(2, dtype=bool),
            flags,
            next_observations=np.zeros((2, 1), dtype=np.float32),
            observation_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
            action_space=action_space,
        )

    with pytest.raises(ValueError, match="needs a Box action space"):
        algorithm.from_dataset(logged(spaces.Discrete(2), np.array([0, 1])))
    unbounded = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    with pytest.raises(ValueError, match="needs finite bounds"):
        algorithm.from_dataset(logged(unbounded, np.zeros((2, 1), dtype=np.float32)))


# Learning offline ------------------------------------------------------------------------------------------------------


@ALGORITHMS
def test_learning_offline_twice_is_learning_on(algorithm: Any, host: Any, dataset: Any) -> None:
    once, twice = host.build(algorithm, bc_steps=3), host.build(algorithm, bc_steps=3)
    set_random_seed(1)
    once.learn_offline(dataset, 7)
    set_random_seed(1)
    assert twice.learn_offline(dataset, 2) is twice
    twice.learn_offline(dataset, 5)
    assert not host.differing(host.state(once), host.state(twice))
    assert once._n_offline_steps == twice._n_offline_steps == 7
    # Another dataset takes the first one's place.
    twice.learn_offline(host.collect(reward=TAG), 1)
    assert (twice.offline_buffer.rewards == TAG).all()


@ALGORITHMS
def test_the_target_moves_every_so_many_gradient_steps(algorithm: Any, host: Any, dataset: Any) -> None:
    """However they are spread over calls of `train`; SB3's SAC starts counting anew in each."""
    model = host.build(algorithm, target_update_interval=3)
    moved, last = [], [p.clone() for p in model.critic_target.parameters()]

    def watch(*_: Any) -> bool:
        now = [p.clone() for p in model.critic_target.parameters()]
        moved.append(not all(th.equal(a, b) for a, b in zip(last, now, strict=True)))
        last[:] = now
        return True

    model.learn_offline(dataset, 7, callback=watch)
    assert moved == [True, False, False, True, False, False, True]


@ALGORITHMS
def test_online_without_a_dataset(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm, host.Corridor())
    before = host.state(model)
    model.learn(20, log_interval=1)
    assert model.offline_buffer is None
    assert model._n_updates == 10
    assert host.networks(host.differing(before, host.state(model))) == {"actor", "critic", "critic_target"}
    batch = model.sample_batch(8)
    assert (batch.returns_to_go is None) is (algorithm is CQL)


# The switch -----------------------------------------------------------------------------------------------------------


def _is_of_the_policy(model: Any, env: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[bool]:
    """Learn online and tell for each action of the environment whether it is what the policy answered."""
    answers: list[np.ndarray] = []
    predict = type(model).predict

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        answers.append(predict(self, *args, **kwargs)[0].copy())
        return answers[-1], None

    env.taken.clear()
    monkeypatch.setattr(type(model), "predict", record)
    model.learn(steps)
    given = iter(answers)
    expected, result = next(given, None), []
    for taken in env.taken:
        same = expected is not None and np.allclose(taken, expected[0], atol=1e-6)
        result.append(same)
        expected = next(given, None) if same else expected
    return result


@ALGORITHMS
def test_no_random_actions_after_an_offline_phase(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> tuple[Any, Any]:
        env = host.Corridor()
        return host.build(algorithm, env, learning_starts=10), env

    # The twin that never saw data acts at random for `learning_starts` steps.
    model, env = fresh()
    assert _is_of_the_policy(model, env, monkeypatch, 14) == [False] * 10 + [True] * 4
    monkeypatch.undo()

    model, env = fresh()
    model.learn_offline(dataset, 3)
    updates = model._n_updates
    assert _is_of_the_policy(model, env, monkeypatch, 14) == [True] * 14
    # `learning_starts` still delays the first update.
    assert model._n_updates == updates + 4
    monkeypatch.undo()

    # As after saving and loading it.
    model, env = fresh()
    model.learn_offline(dataset, 3)
    model.save(tmp_path / "model")
    env = host.Corridor()
    model = algorithm.load(tmp_path / "model", env=env)
    assert _is_of_the_policy(model, env, monkeypatch, 12) == [True] * 12
    monkeypatch.undo()

    # Data alone is no policy.
    model, env = fresh()
    model.set_offline_data(dataset)
    assert _is_of_the_policy(model, env, monkeypatch, 12) == [False] * 10 + [True] * 2


@ALGORITHMS
def test_optimisers_and_entropy_go_on(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm, cql_lagrange_threshold=1.0, learning_starts=0)
    model.learn_offline(dataset, 4)
    before = host.state(model)
    model.learn(1)
    # The first update of an online run is after its first step: nothing was reset on the way.
    after = host.state(model)
    for name in ("critic..state.0.step", "actor..state.0.step", "ent_coef..state.0.step", "lagrange..state.0.step"):
        assert (before[name], after[name]) == (4, 5)
    assert 0 < abs(float(after["log_ent_coef"] - before["log_ent_coef"])) < 1e-3
    assert 0 < abs(float(after["log_cql_lagrange"] - before["log_cql_lagrange"])) < 1e-2
    for name in before:
        if name.startswith("policy.actor"):
            assert (after[name] - before[name]).abs().max() < 1e-2


@ALGORITHMS
def test_weight_of_the_online_phase(algorithm: Any, host: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []
    update = algorithm._update_critic

    def record(self: Any, *args: Any) -> Any:
        weights.append(self._cql_weight)
        step = update(self, *args)
        assert (step.penalty is None) is (weights[-1] == 0.0)
        return step

    monkeypatch.setattr(algorithm, "_update_critic", record)
    for online, expected in ((None, 5.0), (0.0, 0.0), (1.5, 1.5)):
        weights.clear()
        model = host.build(algorithm, cql_alpha_online=online, learning_starts=2)
        model.learn_offline(dataset, 2).learn(4).learn_offline(dataset, 1)
        assert weights == [5.0, 5.0, expected, expected, 5.0]


@ALGORITHMS
def test_weight_zero_online_is_sac_after_pre_training(algorithm: Any, host: Any, dataset: Any, tmp_path: Any) -> None:
    """From the same pre-trained networks, online with weight 0 and no data in the batches, one step is SAC's."""
    sgd = {"optimizer_class": th.optim.SGD}
    as_sac = {"backup_entropy": True, "actor_learning_rate": None, "max_q_backup": False}
    model = host.build(
        algorithm, learning_starts=8, cql_alpha_online=0.0, offline_fraction=0.0, ent_coef=0.1, policy_kwargs=sgd, **as_sac
    )
    model.learn_offline(dataset, 3)
    sac = host.build(SAC, learning_starts=8, ent_coef=0.1, policy_kwargs=sgd)
    sac.set_parameters(model.get_parameters())
    states = {}
    for learner in (model, sac):
        learner._sample_action = SAC._sample_action.__get__(learner)  # random warm-up in both
        learner.set_random_seed(3)
        learner.learn(11)
        states[learner] = host.state(learner)
    assert not host.differing(states[model], states[sac])


@ALGORITHMS
def test_many_gradient_steps_for_each_environment_step(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm, host.corridors(2), gradient_steps=3, learning_starts=0)
    model.learn_offline(dataset, 2).learn(8)
    assert model._n_updates == 2 + 3 * 4


# Shares of a batch ----------------------------------------------------------------------------------------------------


@ALGORITHMS
@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 8), (0.0, 0), (1.0, 16), (0.25, 4), (0.3, 5), (1, 16)])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_offline_fraction(algorithm: Any, host: Any, fraction: float, expected: int, n_envs: int) -> None:
    model = host.build(algorithm, host.corridors(n_envs), batch_size=16, offline_fraction=fraction, learning_starts=4)
    model.learn_offline(host.collect(reward=TAG), 2)
    # While there is nothing online, a batch is all data.
    assert _offline_rows(model, 16) == 16
    counts: list[int] = []
    model.learn(16 * n_envs, callback=lambda *_: counts.append(_offline_rows(model, 16)) or True)
    # The callback of a step comes before the step is stored.
    assert counts == [16] + [expected] * 15
    assert _offline_rows(model, 16) == expected
    # Offline again: all data again.
    counts.clear()
    model.learn_offline(host.collect(reward=TAG), 2, callback=lambda *_: counts.append(_offline_rows(model, 16)) or True)
    assert counts == [16, 16]


@ALGORITHMS
@pytest.mark.parametrize("n_envs", [1, 2])
def test_proportional_offline_fraction(algorithm: Any, host: Any, n_envs: int) -> None:
    model = host.build(algorithm, host.corridors(n_envs), offline_fraction="proportional", learning_starts=1000)
    dataset = host.collect(reward=TAG)
    model.learn_offline(dataset, 1)
    n = len(dataset)
    for steps in (2, 20, 60):
        model.learn(steps * n_envs, reset_num_timesteps=False)
        online = model.replay_buffer.size() * n_envs
        assert online == model.num_timesteps
        assert _offline_rows(model, 64) == round(64 * n / (n + online))


@ALGORITHMS
def test_fraction_in_training(algorithm: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what `sample_batch` gives when asked: what `train` trained on."""
    model = host.build(algorithm, batch_size=16, offline_fraction=0.25, learning_starts=4)
    seen: list[int] = []
    sample = algorithm.sample_batch

    def record(self: Any, batch_size: int) -> Any:
        batch = sample(self, batch_size)
        seen.append(int((batch.rewards == TAG).sum()))
        assert batch.rewards.shape == batch.dones.shape == (16, 1)
        assert batch.actions.shape == (16, 1)
        return batch

    monkeypatch.setattr(algorithm, "sample_batch", record)
    model.learn_offline(host.collect(reward=TAG), 2).learn(8)
    assert seen == [16] * 2 + [4] * 4


@ALGORITHMS
@pytest.mark.parametrize("form", ["goal", "dict"])
def test_mixed_batches_of_dicts(algorithm: Any, host: Any, form: str) -> None:
    model = host.build(algorithm, form=form)
    model.learn_offline(host.collect(form, reward=TAG), 1).learn(12)
    batch = model.sample_batch(8)
    assert int((batch.rewards == TAG).sum()) == 4
    assert {len(value) for value in batch.observations.values()} == {8}
    assert batch.observations.keys() == batch.next_observations.keys() == model.observation_space.spaces.keys()


@ALGORITHMS
@pytest.mark.parametrize("n_steps", [1, 3])
def test_mixed_batches_of_one_and_many_steps(algorithm: Any, host: Any, n_steps: int) -> None:
    model = host.build(algorithm, n_steps=n_steps, gamma=0.9)
    model.learn_offline(host.collect(), 1).learn(14)
    batch = model.sample_batch(8)
    assert (batch.discounts is None) is (n_steps == 1)
    if n_steps > 1:
        assert batch.discounts.shape == (8, 1)
        assert ((batch.discounts >= 0.9**3 - 1e-6) & (batch.discounts <= 0.9 + 1e-6)).all()


# Data that does not fit --------------------------------------------------------------------------------------------------


@ALGORITHMS
def test_data_of_another_kind(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm)
    for wrong in ("data.hdf5", None, {"observations": np.zeros((3, 2))}, np.zeros(3)):
        with pytest.raises(TypeError, match=r"OfflineDataset.*ReplayBuffer; got"):
            model.learn_offline(wrong, 1)
    with pytest.raises(DatasetError, match="does not fit"):
        model.learn_offline(host.collect("goal"), 1)
    other = host.build(SAC, host.Spaces(spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 3.0, (1,), np.float32)))
    with pytest.raises(ValueError, match=r"observation_space does not fit the model's: expected .*2.* got .*3"):
        model.learn_offline(other.replay_buffer, 1)
    other = host.build(SAC, host.Spaces(model.observation_space, spaces.Box(-1.0, 3.0, (2,), np.float32)))
    with pytest.raises(ValueError, match="action_space does not fit"):
        model.learn_offline(other.replay_buffer, 1)
    with pytest.raises(ValueError, match="empty"):
        model.learn_offline(host.build(SAC).replay_buffer, 1)
    # Nothing of it stays behind.
    assert model.offline_buffer is None
    assert model._n_updates == 0


@dataclass
class OwnData:
    """A dataset of the user's: two of them cannot be compared, nor one of them weakly referenced where it has slots."""

    rewards: np.ndarray
    buffer: ReplayBuffer

    def to_sb3(self, model_or_env: Any, **_: Any) -> ReplayBuffer:
        return self.buffer


@dataclass(slots=True)
class OwnSlots:
    buffer: ReplayBuffer

    def to_sb3(self, model_or_env: Any, **_: Any) -> ReplayBuffer:
        return self.buffer


@ALGORITHMS
def test_datasets_of_ones_own_are_told_apart_by_what_they_are(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm)
    buffers = [dataset.to_sb3(model), host.collect(reward=TAG).to_sb3(model)]
    first, second = (OwnData(np.zeros(3), buffer) for buffer in buffers)
    model.set_offline_data(first)
    adopted = model.offline_buffer
    assert model.set_offline_data(first).offline_buffer is adopted
    assert (model.set_offline_data(second).sample_batch(8).rewards == TAG).all()
    for buffer, is_tagged in zip(buffers, (False, True), strict=True):
        batch = model.set_offline_data(OwnSlots(buffer)).sample_batch(8)
        assert (batch.rewards == TAG).all() == is_tagged


@ALGORITHMS
@pytest.mark.parametrize("copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_model_in_training_can_be_sent_to_another_process(algorithm: Any, host: Any, dataset: Any, copied: Any) -> None:
    model = host.build(algorithm).learn_offline(dataset, 3)
    twin = copied(model)
    assert not host.differing(host.state(model), host.state(twin))
    for one in (model, twin):
        one.learn_offline(dataset, 3).learn(15)
    assert not host.differing(host.state(model), host.state(twin))


@ALGORITHMS
def test_a_refused_dataset_leaves_the_statistics_alone(algorithm: Any, host: Any) -> None:
    env = VecNormalize(host.corridors())
    model = host.build(algorithm, env)
    with pytest.raises(DatasetError):
        model.set_offline_data(host.collect("goal"))
    assert env.obs_rms.count < 1


@ALGORITHMS
def test_discrete_observations_of_another_range(algorithm: Any, host: Any) -> None:
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    small, large = (host.build(algorithm, host.Spaces(spaces.Discrete(n), action_space)) for n in (3, 5))
    small.learn(12)
    with pytest.raises(ValueError, match=r"expected Discrete\(5\), got Discrete\(3\)"):
        large.learn_offline(small.replay_buffer, 1)


# Bad arguments --------------------------------------------------------------------------------------------------------

NAN = float("nan")
BAD = [
    ({"cql_alpha": -1.0}, r"cql_alpha must be a number >= 0; got -1"),
    ({"cql_alpha": NAN}, r"cql_alpha must be"),
    ({"cql_alpha": math.inf}, r"cql_alpha must be"),
    ({"cql_alpha_online": -0.1}, r"cql_alpha_online must be None or a number >= 0; got -0.1"),
    ({"cql_alpha_online": NAN}, r"cql_alpha_online must be"),
    ({"cql_n_actions": 0}, r"cql_n_actions must be an integer >= 1; got 0"),
    ({"cql_n_actions": 2.5}, r"cql_n_actions must be"),
    ({"cql_variant": "h"}, r"cql_variant must be one of .*'H'.*; got 'h'"),
    ({"cql_temperature": 0.0}, r"cql_temperature must be a number > 0; got 0"),
    ({"cql_temperature": NAN}, r"cql_temperature must be"),
    ({"cql_clip_diff": (1.0, -1.0)}, r"smallest < largest; got \(1.0, -1.0\)"),
    ({"cql_clip_diff": (0.0,)}, r"cql_clip_diff must be"),
    ({"bc_steps": -1}, r"bc_steps must be an integer >= 0; got -1"),
    ({"bc_steps": 1.5}, r"bc_steps must be"),
    ({"offline_fraction": 1.1}, r"offline_fraction must be in \[0, 1\] or 'proportional'; got 1.1"),
    ({"offline_fraction": -0.1}, r"offline_fraction must be"),
    ({"offline_fraction": NAN}, r"offline_fraction must be"),
    ({"offline_fraction": "half"}, r"offline_fraction must be .*'half'"),
]


@ALGORITHMS
def test_numbers_of_numpy_are_numbers(algorithm: Any, host: Any) -> None:
    options = {"cql_n_actions": np.int64(3), "bc_steps": np.int32(2), "offline_fraction": np.float32(0.25)}
    model = host.build(algorithm, **options)
    for name, value in options.items():
        assert getattr(model, name) == value
        assert type(getattr(model, name)) in (int, float)


@ALGORITHMS
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[f"{name}={value}" for bad, _ in BAD for name, value in bad.items()])
def test_bad_arguments(algorithm: Any, host: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.build(algorithm, **wrong)


def test_bad_return_tail(host: Any) -> None:
    with pytest.raises(ValueError, match=r"return_tail must be one of .*'zero'.*; got 'nothing'"):
        host.build(CalQL, return_tail="nothing")
    with pytest.raises(TypeError, match="return_tail"):
        host.build(CQL, return_tail="zero")


@ALGORITHMS
def test_options_are_keywords_only(algorithm: Any) -> None:
    with pytest.raises(TypeError, match="positional"):
        algorithm("MlpPolicy", "Pendulum-v1", *range(27))


@pytest.mark.parametrize("tail", ["zero", "sparse", "none", "bootstrap"])
@pytest.mark.parametrize("replay_buffer_class", [None, HerReplayBuffer])
def test_every_tail_runs_in_both_phases(host: Any, tail: str, replay_buffer_class: Any) -> None:
    form = "vector" if replay_buffer_class is None else "goal"
    model = host.build(CalQL, form=form, return_tail=tail, replay_buffer_class=replay_buffer_class)
    model.learn_offline(host.collect(form), 2).learn(14)
    assert model.replay_buffer._return_tail == model.offline_buffer._return_tail == tail
    assert model._n_updates == 6
