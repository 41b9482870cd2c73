"""Replay buffers: SB3's topics n_step_replay, her, buffers and the replay buffer half of save_load."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from cql_plugins.adapters import DatasetError, OfflineDataset
from cql_plugins.sb3 import CQL, CalQL

ALGORITHMS = pytest.mark.parametrize("algorithm", [CQL, CalQL])


# n-step ---------------------------------------------------------------------------------------------------------------

# Three steps that end in a terminal state, then two that are cut short.
LITERAL = {
    "observations": np.array([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0]], dtype=np.float32),
    "actions": np.zeros((5, 1), dtype=np.float32),
    "rewards": np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
    "terminations": np.array([False, False, True, False, False]),
    "truncations": np.array([False, False, False, False, True]),
    "observation_space": spaces.Box(-20.0, 20.0, (1,), np.float32),
    "action_space": spaces.Box(-1.0, 1.0, (1,), np.float32),
}
# gamma = 0.5, three steps: sum of rewards, gamma^k, done, and the observation that the target looks at.
THREE_STEPS = {
    0.0: (1.0 + 0.5 * 2.0 + 0.25 * 4.0, 0.125, 1.0, 3.0),
    1.0: (2.0 + 0.5 * 4.0, 0.25, 1.0, 3.0),
    2.0: (4.0, 0.5, 1.0, 3.0),
    10.0: (8.0 + 0.5 * 16.0, 0.25, 0.0, 12.0),
    11.0: (16.0, 0.5, 0.0, 12.0),
}
ONE_STEP = {0.0: (1.0, 1.0), 1.0: (2.0, 2.0), 2.0: (4.0, 3.0), 10.0: (8.0, 11.0), 11.0: (16.0, 12.0)}
# Returns-to-go do not depend on the number of steps: 1 + (2 + 4 / 2) / 2 and so on; after a time-out comes nothing.
RETURNS = {0.0: 3.0, 1.0: 4.0, 2.0: 4.0, 10.0: 16.0, 11.0: 16.0}


@ALGORITHMS
def test_n_step_targets_of_a_dataset(algorithm: Any, host: Any) -> None:
    dataset = OfflineDataset(**LITERAL, name="literal")
    arguments = host.tiny(algorithm, gamma=0.5, n_steps=3)
    model = algorithm.from_dataset(dataset, **arguments)
    assert isinstance(model.offline_buffer, NStepReplayBuffer)
    assert (model.offline_buffer.n_steps, model.offline_buffer.gamma) == (3, 0.5)
    batch = model.sample_batch(64)
    assert {float(start) for start in batch.observations} == set(THREE_STEPS)
    for row in range(64):
        reward, discount, done, target = THREE_STEPS[float(batch.observations[row])]
        assert float(batch.rewards[row]) == reward
        assert float(batch.discounts[row]) == discount
        assert float(batch.dones[row]) == done
        assert float(batch.next_observations[row]) == target
        assert float(batch.returns_to_go[row]) == RETURNS[float(batch.observations[row])]
    model.learn_offline(dataset, 2)

    single = algorithm.from_dataset(dataset, **host.tiny(algorithm, gamma=0.5))
    batch = single.sample_batch(64)
    assert batch.discounts is None
    for row in range(64):
        start = float(batch.observations[row])
        assert (float(batch.rewards[row]), float(batch.next_observations[row])) == ONE_STEP[start]
        assert float(batch.dones[row]) == (start == 2.0)
        assert float(batch.returns_to_go[row]) == RETURNS[start]


@ALGORITHMS
@pytest.mark.parametrize("n_envs", [1, 2])
def test_n_step_online(algorithm: Any, host: Any, dataset: Any, n_envs: int) -> None:
    model = host.build(algorithm, host.corridors(n_envs), n_steps=3, gamma=0.989, train_freq=4)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.989)
    model.learn_offline(dataset, 2).learn(40)
    batch = model.sample_batch(32)
    powers = [0.989**k for k in (1, 2, 3)]
    assert all(min(abs(float(discount) - power) for power in powers) < 1e-6 for discount in batch.discounts)


@ALGORITHMS
def test_n_step_is_refused_for_dicts(algorithm: Any, host: Any) -> None:
    for model_class in (SAC, algorithm):
        with pytest.raises(AssertionError, match="not supported for Dict"):
            host.build(model_class, form="goal", n_steps=3)
    with pytest.raises(AssertionError, match="not supported for Dict"):
        algorithm.from_dataset(host.collect("goal"), **host.tiny(algorithm, n_steps=3))
    model = host.build(algorithm, form="goal")
    with pytest.raises(DatasetError, match="no n-step buffer for dict"):
        host.collect("goal").to_sb3(model, n_steps=3)


@ALGORITHMS
def test_one_step_buffers_do_not_feed_an_n_step_model(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(algorithm, n_steps=3)
    with pytest.raises(ValueError, match="NStepReplayBuffer"):
        model.learn_offline(dataset.to_sb3(model, n_steps=1), 1)
    for changes in ({"n_steps": 2}, {"gamma": 0.5}):
        with pytest.raises(ValueError, match=r"The model sums 3 steps with gamma=0\.99, the replay buffer"):
            model.learn_offline(dataset.to_sb3(model, **changes), 1)
    model.learn_offline(dataset.to_sb3(model), 1)


@ALGORITHMS
def test_n_step_after_load(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    # SB3 finds the buffer class that it chose itself and takes it for the user's; so it does with SAC.
    # From some release on it says so.
    says_so = "is ignored because a custom" in inspect.getsource(OffPolicyAlgorithm._setup_model)
    for model_class in (SAC, algorithm):
        model = host.build(model_class, n_steps=3)
        model.save(tmp_path / "model")
        with pytest.warns(UserWarning, match="`n_steps=3` is ignored") if says_so else contextlib.nullcontext():
            again = model_class.load(tmp_path / "model", env=host.corridors())
        assert isinstance(again.replay_buffer, NStepReplayBuffer)
        assert again.replay_buffer.n_steps == 3
    again.learn_offline(dataset, 2).learn(14)


@ALGORITHMS
@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_full_buffer_wraps_around(algorithm: Any, host: Any, n_steps: int) -> None:
    model = host.build(algorithm, host.corridors(2), buffer_size=24, n_steps=n_steps)
    model.learn(60)
    assert model.replay_buffer.full
    assert model.replay_buffer.buffer_size == 12
    assert th.isfinite(model.sample_batch(32).rewards).all()


# Memory-efficient buffer -----------------------------------------------------------------------------------------------


@ALGORITHMS
@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_learning_twice_with_a_memory_efficient_buffer(
    algorithm: Any, host: Any, dataset: Any, optimize_memory_usage: bool
) -> None:
    model = host.build(
        algorithm,
        buffer_size=30,
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    )
    model.learn_offline(dataset, 2)
    model.learn(20)
    model.learn(20, reset_num_timesteps=False)
    model.learn_offline(dataset, 2)
    if optimize_memory_usage:
        with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
            model.learn(20)
    else:
        model.learn(20)


# Saving and loading ----------------------------------------------------------------------------------------------------


def _columns(buffer: Any) -> dict[str, np.ndarray]:
    names = ["actions", "rewards", "dones", "timeouts"]
    columns = {name: getattr(buffer, name) for name in names}
    for name in ("observations", "next_observations"):
        value = getattr(buffer, name)
        columns |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    if hasattr(buffer, "returns_to_go"):
        columns["returns_to_go"] = buffer.returns_to_go
    return columns


@ALGORITHMS
@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize(("form", "n_steps"), [("vector", 1), ("vector", 3), ("goal", 1)])
def test_a_saved_buffer_comes_back(algorithm: Any, host: Any, tmp_path: Path, n_envs: int, form: str, n_steps: int) -> None:
    model = host.build(algorithm, host.corridors(n_envs, form=form), form=form, n_steps=n_steps, gamma=0.9)
    model.learn(60)
    old = deepcopy(model.replay_buffer)
    model.save_replay_buffer(tmp_path / "buffer")
    model.replay_buffer = None
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    new = model.replay_buffer
    assert type(new) is type(old)
    assert new.device == model.device
    assert ("returns_to_go" in _columns(new)) is (algorithm is CalQL)
    for name, column in _columns(old).items():
        np.testing.assert_array_equal(_columns(new)[name], column, err_msg=name)

    if algorithm is CalQL:
        # Known where the episode has ended, unknown where it was running.
        for column in range(n_envs):
            ended = np.flatnonzero(new.dones[: new.pos, column]).max()
            assert np.isfinite(new.returns_to_go[: ended + 1, column]).all()
            assert np.isneginf(new.returns_to_go[ended + 1 : new.pos, column]).all()
        # A running episode goes on in the loaded buffer and gets its returns at its end.
        model.learn(12 * n_envs, reset_num_timesteps=False)
        first_row = old.pos - 1
        assert np.isfinite(new.returns_to_go[first_row]).all()
    else:
        model.learn(12 * n_envs, reset_num_timesteps=False)
    assert new.size() == old.size() + 12


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("how", ["learn anew", "another environment"])
def test_a_reset_cuts_the_running_episode(host: Any, n_envs: int, how: str) -> None:
    """What ran when the environments were reset is never continued: no return, and none of it in the next episode's."""
    model = host.build(CalQL, host.corridors(n_envs, limit=30, start=0.0), gamma=0.9, learning_starts=1000)
    model.learn(2 * n_envs)
    buffer = model.replay_buffer
    assert not buffer.dones[:2].any()  # the wall is three steps away at least
    if how == "learn anew":
        model.learn(60 * n_envs)
    else:
        model.set_env(host.corridors(n_envs, limit=30, start=0.0))
        model.learn(60 * n_envs, reset_num_timesteps=False)
    assert np.isneginf(buffer.returns_to_go[:2]).all()
    for column in range(n_envs):
        end = int(np.flatnonzero(buffer.dones[:, column])[0])
        expected = sum(0.9**k * buffer.rewards[2 + k, column] for k in range(end - 1))
        assert buffer.returns_to_go[2, column] == pytest.approx(expected, rel=1e-5)


@ALGORITHMS
def test_a_buffer_in_a_file_object(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm)
    model.learn(12)
    with tempfile.TemporaryFile() as file:
        model.save_replay_buffer(file)
        file.seek(0)
        model.load_replay_buffer(file)
        assert not file.closed
    assert model.replay_buffer.size() == 12


@ALGORITHMS
def test_a_loaded_buffer_can_be_extended(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm)
    model.learn(16)
    model.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer")
    old, buffer = deepcopy(model.replay_buffer), model.replay_buffer
    rows = slice(0, 16)
    infos = [[{"TimeLimit.truncated": bool(cut)}] for cut in old.timeouts[rows, 0]]
    parts = (old.observations, old.next_observations, old.actions, old.rewards, old.dones)
    buffer.extend(*(part[rows] for part in parts), infos)
    assert buffer.size() == 32
    np.testing.assert_array_equal(buffer.rewards[16:32], old.rewards[rows])
    if algorithm is CalQL:
        ended = np.flatnonzero(old.dones[rows, 0]).max() + 1
        np.testing.assert_array_equal(buffer.returns_to_go[16 : 16 + ended], old.returns_to_go[:ended])


@ALGORITHMS
@pytest.mark.parametrize("form", ["vector", "goal"])
def test_a_buffer_saved_by_sac(algorithm: Any, host: Any, tmp_path: Path, form: str) -> None:
    sac = host.build(SAC, form=form, gamma=0.9)
    sac.learn(24)
    save_to_pkl(tmp_path / "sac.pkl", sac.replay_buffer)
    model = host.build(algorithm, form=form, gamma=0.9)
    model.load_replay_buffer(tmp_path / "sac.pkl")
    for name, column in _columns(sac.replay_buffer).items():
        np.testing.assert_array_equal(_columns(model.replay_buffer)[name], column)
    if algorithm is CalQL:
        rewards, dones = sac.replay_buffer.rewards[:24, 0], sac.replay_buffer.dones[:24, 0]
        expected, running = np.full(24, -np.inf), -np.inf
        for row in reversed(range(24)):
            running = rewards[row] + (0.0 if dones[row] else 0.9 * running)
            expected[row] = running
        np.testing.assert_allclose(model.replay_buffer.returns_to_go[:24, 0], expected, rtol=1e-5)
    model.learn(12, reset_num_timesteps=False)


@ALGORITHMS
@pytest.mark.parametrize(("saved", "wanted"), [(1, 4), (4, 1)])
def test_a_buffer_of_another_number_of_environments(algorithm: Any, host: Any, tmp_path: Path, saved: int, wanted: int) -> None:
    collector = host.build(algorithm, host.corridors(saved))
    collector.learn(40)
    collector.save_replay_buffer(tmp_path / "buffer")

    # As offline data it serves any model.
    model = host.build(algorithm, host.corridors(wanted))
    model.learn_offline(collector.replay_buffer, 2).learn(16)
    assert model.replay_buffer.n_envs == wanted
    assert model.offline_buffer.n_envs == saved

    # Loaded as the buffer to collect into, it is rearranged.
    model = host.build(algorithm, host.corridors(wanted))
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer.n_envs == wanted
    assert model.replay_buffer.size() * wanted == collector.replay_buffer.size() * saved
    model.learn(8)

    # Assigned by hand, it does not fit: said before the first step, not by NumPy in the middle of it.
    model.replay_buffer = collector.replay_buffer
    with pytest.raises(ValueError, match=rf"{saved} environment.* {wanted}:.*set_offline_data"):
        model.learn(8)


@ALGORITHMS
def test_a_buffer_of_ones_own_class(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm, replay_buffer_class=CountingBuffer, replay_buffer_kwargs={"mark": 3})
    model.learn(20)
    assert isinstance(model.replay_buffer, CountingBuffer)
    assert model.replay_buffer.mark == 3
    assert model.replay_buffer.added == 20
    copy = deepcopy(model.replay_buffer)
    assert isinstance(copy, CountingBuffer)
    assert (copy.added, copy.mark, copy.size()) == (20, 3, 20)


class WeightedSamples(NamedTuple):
    """A tuple of the user's: its fields are SB3's by name, not by place."""

    observations: Any
    actions: Any
    next_observations: Any
    dones: Any
    rewards: Any
    weights: Any
    discounts: Any = None


class WeightedBuffer(ReplayBuffer):
    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(*args, **kwargs)
        return WeightedSamples(*samples[:5], weights=th.full_like(samples.rewards, 5.0))


@ALGORITHMS
def test_samples_of_ones_own_are_read_by_name(algorithm: Any, host: Any) -> None:
    as_sac = {"cql_alpha": 0.0, "backup_entropy": True, "actor_learning_rate": None, "max_q_backup": False}
    states = []
    for model_class, changes in ((SAC, {}), (algorithm, as_sac)):
        model = host.build(model_class, replay_buffer_class=WeightedBuffer, **changes)
        model.learn(20)
        states.append(host.state(model))
    assert not host.differing(*states)
    assert model.sample_batch(4).discounts is None


class CountingBuffer(ReplayBuffer):
    def __init__(self, *args: Any, mark: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mark, self.added = mark, 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)
        self.added += 1


# Hindsight ------------------------------------------------------------------------------------------------------------


def _goal_model(host: Any, algorithm: Any, n_envs: int = 1, **changes: Any) -> Any:
    kwargs = {"n_sampled_goal": 2, "goal_selection_strategy": "future", **changes.pop("replay_buffer_kwargs", {})}
    arguments = {"gradient_steps": n_envs, "learning_starts": 10 * n_envs, **changes}
    env = host.corridors(n_envs, form="goal")
    return host.build(
        algorithm, env, form="goal", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs, **arguments
    )


@ALGORITHMS
@pytest.mark.parametrize(
    ("strategy", "n_envs"), [("future", 1), ("final", 1), ("episode", 2), *((member, 2) for member in GoalSelectionStrategy)]
)
def test_goal_strategies(algorithm: Any, host: Any, strategy: Any, n_envs: int) -> None:
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    kwargs = {"goal_selection_strategy": strategy, "copy_info_dict": True}
    model = _goal_model(host, algorithm, n_envs, action_noise=noise, replay_buffer_kwargs=kwargs)
    model.learn(16 * n_envs)
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    assert model._n_updates == 6 * n_envs
    batch = model.sample_batch(30)
    relabelled = batch.observations["desired_goal"][:, 0] != 0.0
    assert int(relabelled.sum()) == 20
    # Rewards of relabelled goals are computed anew.
    distance = (batch.next_observations["achieved_goal"] - batch.observations["desired_goal"])[:, 0].abs()
    th.testing.assert_close(batch.rewards[:, 0], -(distance > 0.5).float())


@pytest.mark.parametrize("n_envs", [1, 2])
def test_relabelled_goals_have_returns(host: Any, n_envs: int) -> None:
    model = _goal_model(host, CalQL, n_envs)
    model.learn(30 * n_envs)
    batch = model.sample_batch(60)
    relabelled = batch.observations["desired_goal"][:, 0] != 0.0
    assert int((~relabelled).sum()) == 20
    assert th.isfinite(batch.returns_to_go).all()
    # A goal that was reached at once, in the last step of its episode, costs nothing; the logged one may.
    assert batch.returns_to_go[relabelled].max() == 0.0


@ALGORITHMS
@pytest.mark.parametrize("image", [False, True])
def test_bits(algorithm: Any, host: Any, image: bool) -> None:
    """SB3's own goal environment: observations of bits, or of images."""
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True, image_obs_space=image)])
    arguments = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}, "train_freq": 4}
    model = host.build(algorithm, env, form="dict" if image else "goal", **arguments)
    model.learn(20)
    again = host.build(algorithm, env, form="dict" if image else "goal", **arguments)
    again.learn_offline(model.replay_buffer, 2).learn(20)


@ALGORITHMS
def test_a_batch_of_data_and_hindsight(algorithm: Any, host: Any) -> None:
    logged = host.collect("goal")
    tagged = np.full_like(logged.actions, 3.0)  # 1 after scaling, which the policy's tanh does not reach
    dataset = OfflineDataset(
        logged.observations,
        tagged,
        logged.rewards,
        logged.terminations,
        logged.truncations,
        observation_space=logged.observation_space,
        action_space=logged.action_space,
    )
    model = _goal_model(host, algorithm, learning_starts=2)
    # Until an episode has ended there is nothing to relabel; batches are from the data alone.
    shares = []
    model.learn_offline(dataset, 2).learn(
        20, callback=lambda *_: shares.append(int((model.sample_batch(8).actions == 1.0).sum())) or True
    )
    first_end = int(np.flatnonzero(model.replay_buffer.dones[:20, 0])[0])
    assert shares == [8] * (first_end + 1) + [4] * (19 - first_end)


@ALGORITHMS
def test_hindsight_on_logged_goals(algorithm: Any, host: Any) -> None:
    """A hindsight buffer that one model filled is offline data for another, goals relabelled."""
    collector = _goal_model(host, algorithm, 2)
    collector.learn(40)
    model = _goal_model(host, algorithm)
    model.learn_offline(collector.replay_buffer, 2)
    assert isinstance(model.offline_buffer, HerReplayBuffer)
    assert (model.sample_batch(30).observations["desired_goal"] != 0.0).sum() == 20
    model.learn(20)


@ALGORITHMS
def test_a_full_hindsight_buffer_leaves_the_running_episode_out(algorithm: Any, host: Any) -> None:
    model = _goal_model(host, algorithm, 2, buffer_size=40, learning_starts=16)
    model.learn(100)
    assert model.replay_buffer.full
    assert model.replay_buffer.buffer_size == 20


@ALGORITHMS
@pytest.mark.parametrize("use_sde", [False, True])
def test_a_hindsight_model_saved_and_loaded(algorithm: Any, host: Any, tmp_path: Path, use_sde: bool) -> None:
    model = _goal_model(host, algorithm, 2, use_sde=use_sde)
    model.learn(30)
    observation = model.get_env().reset()
    expected = model.predict(observation, deterministic=True)[0]
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=model.get_env(), custom_objects={"learning_rate": 2e-5, "unknown": 1})
    assert again.learning_rate == 2e-5
    assert not hasattr(again, "unknown")
    assert not host.differing(host.state(model), host.state(again))
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)
    again.learn(30)


@ALGORITHMS
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_hindsight_buffer_saved_and_loaded(algorithm: Any, host: Any, tmp_path: Path, n_envs: int, truncate: bool) -> None:
    model = _goal_model(host, algorithm, n_envs)
    steps = 30
    model.learn(steps * n_envs)
    while model.replay_buffer.dones[model.replay_buffer.pos - 1].any():  # end in the middle of an episode
        model.learn(n_envs, reset_num_timesteps=False)
        steps += 1
    old = deepcopy({name: column[:steps] for name, column in _columns(model.replay_buffer).items()})
    model.save_replay_buffer(tmp_path / "buffer")
    del model.replay_buffer
    if truncate:
        with pytest.warns(UserWarning, match="will be truncated"):
            model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=True)
    else:
        model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    buffer = model.replay_buffer
    assert buffer.pos == steps
    last = {"dones", "timeouts", "returns_to_go"} if truncate else set()  # changed for the episode that was cut
    for name, column in old.items():
        rows = slice(0, steps - 8) if name in last else slice(0, steps)
        np.testing.assert_array_equal(_columns(buffer)[name][rows], column[rows], err_msg=name)
    if truncate:
        assert (buffer.dones[steps - 1] == 1).all()
        assert (buffer.timeouts[steps - 1] == 1).all()
    model.learn(20 * n_envs, reset_num_timesteps=truncate)
    if algorithm is CalQL:
        # No episode was joined to the one before it.
        fresh = deepcopy(buffer)
        fresh.recompute_returns()
        np.testing.assert_allclose(buffer.returns_to_go, fresh.returns_to_go, rtol=1e-5)


@ALGORITHMS
def test_success_is_logged(algorithm: Any, host: Any) -> None:
    model = _goal_model(host, algorithm)
    evaluation = EvalCallback(host.corridors(2, form="goal"), eval_freq=5, n_eval_episodes=4, warn=False, verbose=0)
    dataset = host.collect("goal")
    model.learn_offline(dataset, 5, callback=evaluation)
    assert len(evaluation._is_success_buffer) == 4
    model.learn(20)
    assert len(model.ep_success_buffer) > 0


@ALGORITHMS
def test_hindsight_needs_an_environment(algorithm: Any, host: Any) -> None:
    with pytest.raises(AssertionError, match="must pass an environment"):
        algorithm.from_dataset(host.collect("goal"), **host.tiny(algorithm, replay_buffer_class=HerReplayBuffer))
    assert isinstance(algorithm.from_dataset(host.collect("goal"), **host.tiny(algorithm)).replay_buffer, DictReplayBuffer)
