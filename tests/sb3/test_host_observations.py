"""Images, dicts and normalised observations: SB3's topics cnn, dict_env and vec_normalize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from cql_plugins.sb3 import CQL, CalQL

pytestmark = pytest.mark.parametrize("algorithm", [CQL, CalQL])


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_first", [False, True])
def test_cnn(algorithm: Any, host: Any, tmp_path: Path, channels_first: bool) -> None:
    env = host.Corridor("image", channels_first=channels_first)
    model = host.build(algorithm, env, form="image")
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) is not channels_first
    model.learn_offline(host.collect("image"), 2).learn(12)
    # The images of the dataset and those of the environment are the same pictures to the networks.
    assert model.offline_buffer.observations.shape[2:] == model.replay_buffer.observations.shape[2:] == (1, 36, 36)
    for buffer in (model.offline_buffer, model.replay_buffer):
        assert buffer.observations.dtype == np.uint8
        first = buffer.observations[0, 0, 0]
        np.testing.assert_array_equal(first, np.broadcast_to(first[0], (36, 36)))  # a lit column, not a lit row
        assert first[0].sum() == 255

    observation, _ = env.reset(seed=0)
    model.predict(observation, deterministic=False)
    expected = model.predict(observation, deterministic=True)[0]
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("form", ["image", "dict"])
def test_features_extractor_and_target(algorithm: Any, host: Any, share: bool, form: str) -> None:
    model = host.build(algorithm, form=form, learning_rate=1e-3, policy_kwargs={"share_features_extractor": share})
    assert (model.actor.features_extractor is model.critic.features_extractor) is share
    assert model.critic.features_extractor is not model.critic_target.features_extractor

    def equal(first: Any, second: Any) -> set[bool]:
        return {th.equal(a, b) for a, b in zip(first, second, strict=True)}

    def copy(part: Any) -> list[th.Tensor]:
        return [parameter.detach().clone() for parameter in part.parameters()]

    assert equal(model.critic.parameters(), model.critic_target.parameters()) == {True}
    dataset = host.collect(form)
    model.learn_offline(dataset, 2)
    critic, target, features = copy(model.critic), copy(model.critic_target), copy(model.critic.features_extractor)
    assert False in equal(critic, target)

    # Without tau the target stays, the critic moves.
    model.tau = 0.0
    model.learn_offline(dataset, 1)
    assert equal(target, model.critic_target.parameters()) == {True}
    assert False in equal(critic, model.critic.parameters())
    assert False in equal(features, model.critic.features_extractor.parameters())

    # With tau and without a learning rate the target moves, the critic stays.
    critic, model.tau = copy(model.critic), 0.01
    model.lr_schedule = model.actor_lr_schedule = lambda _: 0.0
    model.learn_offline(dataset, 1)
    assert equal(critic, model.critic.parameters()) == {True}
    assert False in equal(target, model.critic_target.parameters())


@pytest.mark.parametrize("share", [True, False])
def test_who_trains_the_features(algorithm: Any, host: Any, share: bool) -> None:
    """With a shared extractor the critic's loss, whose gap is a second way to it, does not reach it: SB3's rule."""
    model = host.build(algorithm, form="image", policy_kwargs={"share_features_extractor": share})
    model.set_offline_data(host.collect("image"))
    features = model.critic.features_extractor
    touched = []
    step = model.critic.optimizer.step
    model.critic.optimizer.step = lambda: touched.append(any(p.grad is not None for p in features.parameters())) or step()
    model.train(1, 8)
    assert touched == [not share]


def test_features_are_extracted_once_per_observation(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm, form="image", cql_n_actions=7)
    model.set_offline_data(host.collect("image"))
    rows: list[int] = []
    for part in (model.actor, model.critic, model.critic_target):
        part.features_extractor.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    model.train(1, 8)
    # Actor at s and s', target at s', critic at s for the whole critic loss, critic at s for the actor's: as in SAC.
    assert rows == [8] * 5


@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_that_were_normalised_before(algorithm: Any, host: Any, normalize_images: bool) -> None:
    env = VecNormalize(DummyVecEnv([lambda: host.Corridor("image", channels_first=True)]))
    policy_kwargs = {"normalize_images": normalize_images, "features_extractor_kwargs": {"features_dim": 8}}
    if normalize_images:
        with pytest.raises(AssertionError, match="NatureCNN"):
            host.build(algorithm, env, form="image", policy_kwargs=policy_kwargs)
    else:
        host.build(algorithm, env, form="image", policy_kwargs=policy_kwargs).learn(12)


# Dicts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_first", [False, True])
def test_dict_observations(algorithm: Any, host: Any, channels_first: bool) -> None:
    env = host.Corridor("dict", channels_first=channels_first)
    model = host.build(algorithm, env, form="dict")
    dataset = host.collect("dict")
    model.learn_offline(dataset, 2).learn(12)
    assert isinstance(model.replay_buffer, DictReplayBuffer)
    for buffer in (model.offline_buffer, model.replay_buffer):
        assert buffer.observations["camera"].shape[2:] == (1, 36, 36)
        assert buffer.observations["camera"].dtype == np.uint8
        assert buffer.observations["state"].dtype == np.float32
    assert model.sample_batch(8).observations["camera"].shape == (8, 1, 36, 36)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


def test_a_dict_of_one_vector_learns_as_the_vector(algorithm: Any, host: Any) -> None:
    class Named(gym.ObservationWrapper):  # type: ignore[type-arg]
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.observation_space = spaces.Dict({"state": env.observation_space})

        def observation(self, observation: Any) -> Any:
            return {"state": observation}

    observation, _ = host.Corridor().reset(seed=1)
    actions = []
    for env, seen, policy in (
        (host.Corridor(), observation, "MlpPolicy"),
        (Named(host.Corridor()), {"state": observation}, "MultiInputPolicy"),
    ):
        model = host.build(algorithm, env, policy=policy, gamma=0.5)
        before = model.predict(seen, deterministic=True)[0]
        model.learn(16)
        actions.append([before, model.predict(seen, deterministic=True)[0]])
    np.testing.assert_array_equal(*actions)
    assert not np.array_equal(*actions[0])


def test_nested_dicts_are_refused(algorithm: Any, host: Any) -> None:
    inner = spaces.Dict({"b": spaces.Box(-1.0, 1.0, (2,))})
    env = host.Spaces(spaces.Dict({"a": inner}), spaces.Box(-1.0, 1.0, (2,)))
    with pytest.raises(NotImplementedError, match=r"[Nn]ested"):
        host.build(algorithm, env, policy="MultiInputPolicy")


def test_stacked_frames(algorithm: Any, host: Any) -> None:
    plain = DummyVecEnv([lambda: SimpleMultiObsEnv(random_start=True, discrete_actions=False)])
    env = VecFrameStack(plain, n_stack=3, channels_order={"img": "last", "vec": None})
    model = host.build(algorithm, env, form="dict")
    model.learn(13)
    assert model.replay_buffer.observations["img"].shape[2:] == (3, 64, 64)
    assert model.replay_buffer.observations["vec"].shape[2:] == (15,)
    # What was logged with stacked frames can be learned from.
    again = host.build(algorithm, env, form="dict")
    again.learn_offline(model.replay_buffer, 2)
    with pytest.raises(ValueError, match="does not fit"):
        again.learn_offline(host.collect("dict"), 2)


class _Hallway(gym.Env):  # type: ignore[type-arg]
    """Importable by a child process under any name of this module: it closes over nothing."""

    observation_space = spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,), np.float32)})
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return {"a": np.zeros(2, dtype=np.float32)}, {}

    def step(self, action: Any) -> Any:
        return {"a": np.ones(2, dtype=np.float32)}, 1.0, False, True, {}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_environments_in_other_processes(algorithm: Any, host: Any) -> None:
    env = SubprocVecEnv([_Hallway, _Hallway], start_method="fork")
    try:
        model = host.build(algorithm, env, policy="MultiInputPolicy")
        model.learn(14)
        assert model.replay_buffer.n_envs == 2
    finally:
        env.close()


# VecNormalize ---------------------------------------------------------------------------------------------------------


def test_normalised_online(algorithm: Any, host: Any) -> None:
    env = VecNormalize(host.corridors(2))
    model = host.build(algorithm, env)
    model.learn(20)
    # Raw in the buffer, normalised in the batch.
    stored = model.replay_buffer.observations[:10]
    assert env.obs_rms.count == pytest.approx(22, abs=1e-3)
    np.random.seed(1)
    batch = model.sample_batch(8)
    np.random.seed(1)
    raw = model.replay_buffer.sample(8)
    np.testing.assert_allclose(batch.observations, env.normalize_obs(raw.observations.numpy()), rtol=1e-5)
    np.testing.assert_allclose(batch.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-5)
    assert np.abs(stored).max() > 0
    assert not np.allclose(batch.observations, raw.observations)


@pytest.mark.parametrize("form", ["vector", "dict", "goal"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_statistics_come_from_the_dataset(algorithm: Any, host: Any, form: str, n_envs: int) -> None:
    keys = {"vector": None, "dict": ["state"], "goal": ["observation", "desired_goal"]}[form]
    # SB3 itself wants images inside VecNormalize to be channels-first; the dataset's are channels-last.
    env = VecNormalize(host.corridors(n_envs, form=form, channels_first=True), norm_obs_keys=keys, gamma=0.9)
    model = host.build(algorithm, env, form=form, gamma=0.9)
    dataset = host.collect(form)
    model.learn_offline(dataset, 2)

    # One observation before each step, as the wrapper would have seen them.
    rows = np.arange(len(dataset))
    before = dataset.observation_rows(rows)
    for key in keys or [None]:
        values = dataset.observations[before] if key is None else dataset.observations[key][before]
        statistics = env.obs_rms if key is None else env.obs_rms[key]
        np.testing.assert_allclose(statistics.mean, values.mean(axis=0), atol=1e-3)
        np.testing.assert_allclose(statistics.var, values.var(axis=0), atol=1e-2)
        assert statistics.count == pytest.approx(len(dataset), abs=1e-3)
    running, seen = 0.0, []
    for reward, end in zip(dataset.rewards, dataset.terminations | dataset.truncations, strict=True):
        running = 0.9 * running + float(reward)
        seen.append(running)
        running = 0.0 if end else running
    assert env.ret_rms.var == pytest.approx(np.var(seen), rel=1e-3)

    # A second phase adds nothing; the environment's own steps do.
    model.learn_offline(dataset, 1)
    assert env.ret_rms.count == pytest.approx(len(dataset), abs=1e-3)
    model.learn(12)
    assert env.ret_rms.count > len(dataset) + 5
    assert model._n_updates == 3 + (1 if n_envs == 2 else 2)


def test_statistics_that_are_there_or_frozen_are_left_alone(algorithm: Any, host: Any, dataset: Any) -> None:
    warm = VecNormalize(host.corridors())
    warm.reset()
    for _ in range(5):
        warm.step(np.zeros((1, 1), dtype=np.float32))
    mean, variance = warm.obs_rms.mean.copy(), warm.ret_rms.var
    model = host.build(algorithm, warm)
    model.learn_offline(dataset, 2)
    np.testing.assert_array_equal(warm.obs_rms.mean, mean)
    assert warm.ret_rms.var == variance

    frozen = VecNormalize(host.corridors(), training=False)
    host.build(algorithm, frozen).learn_offline(dataset, 2)
    np.testing.assert_array_equal(frozen.obs_rms.mean, 0.0)
    unscaled = VecNormalize(host.corridors(), norm_reward=False)
    host.build(algorithm, unscaled).learn_offline(dataset, 2)
    assert unscaled.ret_rms.count < 1
    assert unscaled.obs_rms.count > 1


def test_returns_to_go_are_those_of_the_rewards_the_critic_sees(algorithm: Any, host: Any, dataset: Any) -> None:
    env = VecNormalize(host.corridors(), gamma=0.9)
    model = host.build(algorithm, env, gamma=0.9)
    model.set_offline_data(dataset)
    # Sum the normalised rewards by hand.
    rewards = env.normalize_reward(dataset.rewards.astype(np.float64))
    ends = dataset.terminations | dataset.truncations
    expected, running = np.zeros(len(dataset)), 0.0
    for row in reversed(range(len(dataset))):
        running = rewards[row] + (0.0 if ends[row] else 0.9 * running)
        expected[row] = running
    pairs = {round(float(r), 4): g for r, g in zip(rewards, expected, strict=True)}
    batch = model.sample_batch(32)
    for reward, value in zip(batch.rewards.flatten().tolist(), batch.returns_to_go.flatten().tolist(), strict=True):
        assert value == pytest.approx(pairs[round(reward, 4)], abs=1e-4)
    # Another scale: no new sum is needed.
    env.ret_rms.var *= 4.0
    np.random.seed(0)
    first = model.sample_batch(8)
    env.ret_rms.var /= 4.0
    np.random.seed(0)
    second = model.sample_batch(8)
    np.testing.assert_allclose(2.0 * first.returns_to_go, second.returns_to_go, rtol=1e-4)


def test_evaluation_gets_the_statistics(algorithm: Any, host: Any, dataset: Any) -> None:
    env, evaluation = VecNormalize(host.corridors()), VecNormalize(host.corridors(), training=False, norm_reward=False)
    model = host.build(algorithm, env)
    model.learn_offline(dataset, 4, callback=EvalCallback(evaluation, eval_freq=4, n_eval_episodes=1, warn=False, verbose=0))
    np.testing.assert_array_equal(env.obs_rms.mean, evaluation.obs_rms.mean)
    assert evaluation.obs_rms.count > 1
    with (
        pytest.warns(UserWarning, match="not of the same type"),
        pytest.raises(AssertionError, match="not being wrapped the same way"),
    ):
        model.learn_offline(dataset, 1, callback=EvalCallback(host.Corridor(), eval_freq=1, warn=False, verbose=0))
    assert model.num_timesteps == 0


def test_saved_statistics(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    env = VecNormalize(host.corridors())
    model = host.build(algorithm, env)
    model.learn_offline(dataset, 2).learn(12)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    again = VecNormalize.load(str(tmp_path / "statistics.pkl"), host.corridors())
    loaded = algorithm.load(tmp_path / "model", env=again)
    loaded.learn_offline(dataset, 2).learn(12)
    assert again.obs_rms.count > env.obs_rms.count


def test_normalised_goals_with_hindsight(algorithm: Any, host: Any) -> None:
    env = VecNormalize(host.corridors(2, form="goal"))
    model = host.build(algorithm, env, form="goal", replay_buffer_class=HerReplayBuffer, learning_starts=20)
    model.learn_offline(host.collect("goal"), 2).learn(30)
    batch = model.sample_batch(8)
    assert np.isfinite(batch.rewards.numpy()).all()


def test_networks_of_raw_observations_are_not_given_normalised_ones(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path
) -> None:
    def normalized(**options: Any) -> VecNormalize:
        return VecNormalize(host.corridors(), norm_reward=False, **options)

    raw = algorithm.from_dataset(dataset, **host.tiny(algorithm)).learn_offline(dataset, 2)
    raw.save(tmp_path / "raw")
    raw.set_env(normalized())
    for go_on in (lambda: raw.learn(20), lambda: raw.learn_offline(dataset, 1)):
        with pytest.raises(ValueError, match=r"trained on raw observations.*set_env\(\)"):
            go_on()
    raw.set_env(normalized(norm_obs=False))
    raw.learn(20)
    with pytest.raises(ValueError, match="trained on raw observations"):
        algorithm.load(tmp_path / "raw", env=normalized()).learn(20)

    scaled = host.build(algorithm, normalized()).learn_offline(dataset, 2)
    scaled.set_env(host.corridors())
    with pytest.raises(ValueError, match=r"trained on normalised observations.*VecNormalize\.load"):
        scaled.learn(20)
    scaled.set_env(normalized())
    scaled.learn(20)

    # Nothing is known of how SB3's own were trained.
    host.build(SAC, normalized()).learn(20).save(tmp_path / "sac")
    algorithm.load(tmp_path / "sac", env=normalized(), device="cpu").learn(20)
    algorithm.load(tmp_path / "sac", env=host.corridors(), device="cpu").learn(20)


def test_statistics_come_from_the_data_of_a_model_without_an_environment(algorithm: Any, host: Any, dataset: Any) -> None:
    model = algorithm.from_dataset(dataset, **host.tiny(algorithm))
    env = VecNormalize(host.corridors(), norm_reward=False)
    model.set_env(env)
    other = VecNormalize(host.corridors(), norm_reward=False)
    host.build(algorithm, other).set_offline_data(dataset)
    np.testing.assert_array_equal(env.obs_rms.mean, other.obs_rms.mean)
    assert env.obs_rms.count == other.obs_rms.count > len(dataset) - 1
