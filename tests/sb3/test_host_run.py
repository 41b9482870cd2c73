"""What runs with SAC runs with CQL and CalQL: SB3's topics run, spaces, predict, custom policy, gSDE and train/eval mode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from stable_baselines3.sac.policies import SACPolicy

from cql_plugins.sb3 import CQL, CalQL

pytestmark = pytest.mark.parametrize("algorithm", [CQL, CalQL])

BOX32 = spaces.Box(-1.0, 1.0, (2,), np.float32)
BOX64 = spaces.Box(-1.0, 1.0, (2,), np.float64)


class Box(spaces.Box):
    """A space that is a Box by inheritance only."""


# Run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ent_coef", "start"), [("auto", 1.0), ("auto_0.01", 0.01), (0.01, 0.01)])
def test_entropy_coefficient(algorithm: Any, host: Any, dataset: Any, ent_coef: Any, start: float) -> None:
    model = host.build(algorithm, ent_coef=ent_coef, action_noise=NormalActionNoise(np.zeros(1), np.zeros(1)))
    learned = isinstance(ent_coef, str)
    begin = model.log_ent_coef.exp() if learned else model.ent_coef_tensor
    assert begin.item() == pytest.approx(start)
    model.learn_offline(dataset, 3)
    model.learn(14)
    assert model.logger.name_to_value["train/n_updates"] == 3 + 4
    if learned:
        assert model.log_ent_coef.exp().item() != pytest.approx(start, rel=1e-6)
    else:
        assert model.log_ent_coef is None
        assert model.ent_coef_optimizer is None
        assert model.ent_coef_tensor.item() == pytest.approx(start)


@pytest.mark.parametrize("n_critics", [1, 3])
def test_number_of_critics(algorithm: Any, host: Any, dataset: Any, n_critics: int) -> None:
    model = host.build(algorithm, policy_kwargs={"n_critics": n_critics})
    assert len(model.critic.q_networks) == len(model.critic_target.q_networks) == n_critics
    before = host.state(model)
    model.learn_offline(dataset, 2).learn(12)
    changed = host.differing(before, host.state(model))
    for owner in ("critic", "critic_target"):
        for j in range(n_critics):
            assert any(name.startswith(f"policy.{owner}.qf{j}.") for name in changed), (owner, j)


@pytest.mark.parametrize(
    "noise",
    [NormalActionNoise(np.zeros(1), 0.3 * np.ones(1)), OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.3 * np.ones(1))],
    ids=["normal", "ornstein-uhlenbeck"],
)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise(algorithm: Any, host: Any, noise: Any, n_envs: int) -> None:
    runs = []
    for action_noise in (noise, None):
        model = host.build(algorithm, host.corridors(n_envs), action_noise=action_noise)
        model.learn(16)
        stored = model.replay_buffer.actions[: model.replay_buffer.pos, :, 0]
        taken = np.stack([np.concatenate(env.unwrapped.taken) for env in model.get_env().envs], axis=1)
        assert np.abs(stored).max() <= 1.0
        np.testing.assert_allclose(taken, 1.0 + 2.0 * stored, atol=1e-6)
        runs.append(stored)
        if action_noise is not None and n_envs > 1:
            assert isinstance(model.action_noise, VectorizedActionNoise)
    assert not np.array_equal(*runs)


@pytest.mark.parametrize(("train_freq", "updates"), [(4, 2), ((4, "step"), 2), ((1, "episode"), 1)])
def test_train_frequency(algorithm: Any, host: Any, tmp_path: Any, train_freq: Any, updates: int) -> None:
    # Episodes are at most 8 steps long: after 16 steps the model has seen at least two of them.
    model = host.build(algorithm, train_freq=train_freq, gradient_steps=1)
    model.learn(16)
    assert model._n_updates >= updates if "episode" in str(train_freq) else model._n_updates == updates
    model.save(tmp_path / "model")
    for changes in ({}, {"train_freq": train_freq}):
        again = algorithm.load(tmp_path / "model", env=model.get_env(), **changes)
        done = again._n_updates
        again.learn(16)
        assert again._n_updates > done


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "often", (1, "week")])
def test_train_frequency_refused(algorithm: Any, host: Any, train_freq: Any) -> None:
    with pytest.raises(ValueError, match="train_freq"):
        host.build(algorithm, train_freq=train_freq)


def test_several_environments_with_noise_and_gsde(algorithm: Any, host: Any, dataset: Any) -> None:
    model = host.build(
        algorithm,
        host.corridors(2),
        train_freq=5,
        use_sde=True,
        sde_sample_freq=4,
        action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)),
        policy_kwargs={"n_critics": 1},
    )
    model.learn(30)
    assert model.num_timesteps == 30
    assert model._n_updates == 2
    model.learn_offline(dataset, 2).learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 50


@pytest.mark.parametrize(("gradient_steps", "updates"), [(-1, 6), (4, 4), (0, 0)])
def test_gradient_steps_for_each_rollout(algorithm: Any, host: Any, gradient_steps: int, updates: int) -> None:
    # -1: as many as transitions were collected, here three steps of two environments.
    model = host.build(algorithm, host.corridors(2), train_freq=3, gradient_steps=gradient_steps, learning_starts=0)
    model.learn(6)
    assert model._n_updates == updates


def test_an_id_or_a_bare_environment_is_wrapped(algorithm: Any, host: Any) -> None:
    for env in ("Pendulum-v1", gym.make("Pendulum-v1")):
        model = host.build(algorithm, env)
        assert isinstance(model.get_env(), DummyVecEnv)
        model.learn(13)
        assert model._n_updates == 3


def test_monitored_environments(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm, VecMonitor(host.corridors(2)), learning_starts=4, stats_window_size=3)
    model.learn(40)
    assert len(model.ep_info_buffer) == len(model.ep_success_buffer) == 3
    assert all(set(info) >= {"r", "l"} for info in model.ep_info_buffer)


# Spaces ---------------------------------------------------------------------------------------------------------------

OBSERVATION_SPACES = {
    "multi-discrete": spaces.MultiDiscrete([4, 3]),
    "multi-binary": spaces.MultiBinary(8),
    "multi-binary-matrix": spaces.MultiBinary((3, 2)),
    "discrete": spaces.Discrete(5),
    "float32": BOX32,
    "float64": BOX64,
    "dict": spaces.Dict({"a": BOX32, "b": BOX64, "c": spaces.Discrete(3)}),
    "subclass": Box(-1.0, 1.0, (2,), np.float32),
}
ACTION_SPACES = {
    "float32": BOX32,
    "float64": BOX64,
    "matrix": spaces.Box(-2.0, 2.0, (2, 2), np.float32),
    "subclass": Box(-1.0, 1.0, (2,), np.float32),
}


@pytest.mark.parametrize(
    ("observed", "acted"),
    [(name, "float32") for name in OBSERVATION_SPACES]
    + [("float32", name) for name in ("float64", "matrix", "subclass")]
    + [("dict", "float64"), ("float64", "float64")],
)
def test_spaces_online_and_offline(algorithm: Any, host: Any, observed: str, acted: str) -> None:
    env = host.Spaces(OBSERVATION_SPACES[observed], ACTION_SPACES[acted])
    policy = "MultiInputPolicy" if observed == "dict" else "MlpPolicy"
    online = host.build(algorithm, env, policy=policy, gamma=0.5)
    online.learn(14)
    # What one model collected is logged data for the next.
    model = host.build(algorithm, env, policy=policy, gamma=0.5)
    model.learn_offline(online.replay_buffer, 3).learn(14)
    for learned in (online, model):
        action, _ = learned.predict(env.reset(seed=0)[0])
        assert action.shape == env.action_space.shape
        assert action.dtype == env.action_space.dtype
        assert env.action_space.contains(action)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


def test_a_subclassed_box_takes_the_data_of_a_box(algorithm: Any, host: Any) -> None:
    plain = host.build(algorithm, host.Spaces(BOX32, BOX32))
    plain.learn(12)
    space = OBSERVATION_SPACES["subclass"]
    model = host.build(algorithm, host.Spaces(space, ACTION_SPACES["subclass"]))
    model.learn_offline(plain.replay_buffer, 2)
    assert model._n_updates == 2


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_only_box_actions(algorithm: Any, host: Any, action_space: Any) -> None:
    with pytest.raises(AssertionError, match="only supports"):
        host.build(algorithm, host.Spaces(BOX32, action_space))


# It learns ------------------------------------------------------------------------------------------------------------


def test_answering_with_what_is_seen(algorithm: Any, host: Any) -> None:
    """SB3's identity task, from logged random actions that get 44 of 100, then online; and online alone."""

    def identity() -> IdentityEnvBox:
        env = IdentityEnvBox(eps=0.5)
        env.action_space.seed(1)  # which draws the observations too
        return env

    def score(model: Any) -> float:
        return float(evaluate_policy(model, identity(), n_eval_episodes=3, warn=False)[0])

    data = host.build(SAC, identity(), buffer_size=600, learning_starts=1000)
    data.learn(600)
    assert 30 < 100 * data.replay_buffer.rewards.mean() < 60
    arguments = {
        "policy_kwargs": {"net_arch": [32, 32]},
        "learning_rate": 3e-3,
        "actor_learning_rate": None,
        "gamma": 0.4,
        "batch_size": 64,
        "ent_coef": 0.05,
        "cql_alpha": 0.5,
        "cql_n_actions": 4,
        "buffer_size": 600,
    }
    model = host.build(algorithm, identity(), **arguments)
    assert score(model) < 70
    model.learn_offline(data.replay_buffer, 120)
    assert score(model) > 90
    model.learn(60)
    assert score(model) > 90
    online = host.build(algorithm, identity(), **arguments)
    online.learn(200)
    assert score(online) > 90


# Predict --------------------------------------------------------------------------------------------------------------


def test_predict_shapes(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm)
    assert model.policy.device.type == "cpu"
    single, several = host.Corridor(), host.corridors(3)
    observation, batch = single.reset(seed=1)[0], several.reset()
    for deterministic in (True, False):
        action, hidden = model.predict(observation, deterministic=deterministic)
        assert isinstance(action, np.ndarray)
        assert single.action_space.contains(action)
        assert hidden is None
        assert model.predict(batch, deterministic=deterministic)[0].shape == (3, 1)
    fixed = [model.predict(observation, deterministic=True)[0] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(single.reset(seed=1))


# Custom policies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net_arch", [[], [4], [4, 4], {"qf": [8], "pi": [8, 4]}])
def test_network_sizes(algorithm: Any, host: Any, dataset: Any, net_arch: Any) -> None:
    model = host.build(algorithm, policy_kwargs={"net_arch": net_arch}, train_freq=2)
    model.learn_offline(dataset, 2).learn(14)
    assert model.policy.net_arch == net_arch


@pytest.mark.parametrize("optimizer_kwargs", [None, {"weight_decay": 0.0}])
def test_optimizer(algorithm: Any, host: Any, dataset: Any, optimizer_kwargs: Any) -> None:
    policy_kwargs = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": optimizer_kwargs}
    model = host.build(algorithm, policy_kwargs=policy_kwargs, learning_rate=1e-3, actor_learning_rate=2e-4)
    model.learn_offline(dataset, 2).learn(12)
    assert isinstance(model.critic.optimizer, th.optim.AdamW)
    assert isinstance(model.actor.optimizer, th.optim.AdamW)
    assert model.critic.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.actor.optimizer.param_groups[0]["lr"] == 2e-4
    assert model.actor.optimizer.param_groups[0]["weight_decay"] == (0.01 if optimizer_kwargs is None else 0.0)


class WiderPolicy(SACPolicy):
    """A user's own policy class, passed as a class instead of a name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "net_arch": [12], "activation_fn": th.nn.Tanh})


def test_policy_class(algorithm: Any, host: Any, dataset: Any, tmp_path: Any) -> None:
    model = host.build(algorithm, policy=WiderPolicy)
    model.learn_offline(dataset, 2).learn(12)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    assert isinstance(again.policy, WiderPolicy)
    assert not host.differing(host.state(model), host.state(again))


def test_policy_that_does_not_fit_the_observations(algorithm: Any, host: Any) -> None:
    for policy in ("MlpPolicy", "CnnPolicy"):
        with pytest.raises(ValueError, match="MultiInputPolicy"):
            host.build(algorithm, form="goal", policy=policy)
    with pytest.raises(ValueError, match="Policy Unheard unknown"):
        host.build(algorithm, policy="Unheard")


# gSDE -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_expln", [False, True])
@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
def test_gsde(algorithm: Any, host: Any, dataset: Any, use_expln: bool, sde_sample_freq: int) -> None:
    model = host.build(
        algorithm,
        use_sde=True,
        sde_sample_freq=sde_sample_freq,
        learning_starts=0,
        policy_kwargs={"log_std_init": -2, "use_expln": use_expln},
    )
    before = host.state(model)
    model.learn_offline(dataset, 3).learn(10, log_interval=1)
    assert "policy.actor.log_std" in host.differing(before, host.state(model))
    env = model.get_env().envs[0].unwrapped
    stored = model.replay_buffer.actions[:10, 0, 0]
    assert np.abs(stored).max() <= 1.0
    np.testing.assert_allclose(np.concatenate(env.taken), 1.0 + 2.0 * stored, atol=1e-6)
    model.policy.reset_noise()
    assert (model.actor.get_std() > 0).all()


def test_gsde_at_warm_up(algorithm: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = host.Spaces(BOX32, ACTION_SPACES["matrix"])
    model = host.build(algorithm, env, use_sde=True, sde_sample_freq=2, use_sde_at_warmup=True)

    def refuse(*args: Any) -> None:
        raise AssertionError("a uniform action")

    monkeypatch.setattr(model.action_space, "sample", refuse)
    model.learn(20)
    assert model._n_updates == 10
    model.use_sde_at_warmup = False
    with pytest.raises(AssertionError, match="a uniform action"):
        model.learn(20)


# Train and eval mode --------------------------------------------------------------------------------------------------


class NormDropoutExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout, which behave differently in training and in evaluation."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=int(np.prod(observation_space.shape)))
        self.layers = th.nn.Sequential(th.nn.Flatten(), th.nn.BatchNorm1d(self.features_dim), th.nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)  # type: ignore[no-any-return]


def _normalisation(model: Any) -> dict[str, th.Tensor]:
    parts = {"actor": model.actor, "critic": model.critic, "target": model.critic_target}
    norms = {name: part.features_extractor.layers[1] for name, part in parts.items()}
    biases = {f"{name}.bias": norm.bias.detach().clone() for name, norm in norms.items()}
    return biases | {f"{name}.mean": norm.running_mean.clone() for name, norm in norms.items()}


@pytest.mark.parametrize("phase", ["online", "offline"])
def test_batch_norm_trains(algorithm: Any, host: Any, dataset: Any, phase: str) -> None:
    policy_kwargs = {"features_extractor_class": NormDropoutExtractor}
    model = host.build(algorithm, learning_starts=0, tau=0.0, seed=1, policy_kwargs=policy_kwargs)
    before = _normalisation(model)
    if phase == "online":
        model.learn(12)
    else:
        model.learn_offline(dataset, 12)
    after = _normalisation(model)
    for name in ("actor.bias", "actor.mean", "critic.bias", "critic.mean"):
        assert not th.equal(before[name], after[name]), name
    # With tau = 0 the targets' weights stay, their running statistics are copied all the same.
    assert th.equal(before["target.bias"], after["target.bias"])
    assert th.equal(after["critic.mean"], after["target.mean"])
    assert not th.equal(before["target.mean"], after["target.mean"])


def test_collecting_and_predicting_leave_batch_norm_alone(algorithm: Any, host: Any) -> None:
    policy_kwargs = {"features_extractor_class": NormDropoutExtractor}
    model = host.build(algorithm, gradient_steps=0, policy_kwargs=policy_kwargs)
    before = _normalisation(model)
    model.learn(20)
    observation = model.get_env().reset()
    first = model.predict(observation, deterministic=True)[0]
    for _ in range(3):
        np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], first)
    after = _normalisation(model)
    assert all(th.equal(before[name], after[name]) for name in before)
