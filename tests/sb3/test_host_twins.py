"""With the conservative weight at zero CQL and CalQL are SAC to the last bit; and one seed gives one model.

The optimiser is SGD: Adam's first step is about `lr * sign(gradient)`, which hides any change of the gradient's size. Each
equality has a twin that must differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import MultiInputPolicy, SACPolicy

from cql_plugins.sb3 import CQL, CalQL

pytestmark = pytest.mark.parametrize("algorithm", [CQL, CalQL])

AS_SAC = {"backup_entropy": True, "actor_learning_rate": None, "max_q_backup": False}


class NormDropoutExtractor(BaseFeaturesExtractor):
    """Its forward passes draw random numbers and move running statistics: an extra pass, or another order, would show."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=2)
        self.layers = th.nn.Sequential(th.nn.BatchNorm1d(2), th.nn.Dropout(0.2))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)  # type: ignore[no-any-return]


class OwnCritic(ContinuousCritic):
    """What it says of an action is more than its networks say."""

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(3.0 * value + actions.sum(dim=1, keepdim=True) for value in super().forward(obs, actions))


class OwnCriticPolicy(SACPolicy):
    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        return OwnCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


HER = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
# Form of the environment, number of environments, inside VecNormalize, arguments of the model.
FORMS: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "plain": ("vector", 1, False, {}),
    "odd-batch": ("vector", 1, False, {"batch_size": 7}),
    "two-environments": ("vector", 2, False, {"gradient_steps": -1}),
    "action-noise": ("vector", 1, False, {"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))}),
    "fixed-ent_coef": ("vector", 1, False, {"ent_coef": 0.2}),
    "one-critic": ("vector", 1, False, {"policy_kwargs": {"n_critics": 1}}),
    "three-critics": ("vector", 1, False, {"policy_kwargs": {"n_critics": 3}}),
    "batch-norm": ("vector", 1, False, {"policy_kwargs": {"features_extractor_class": NormDropoutExtractor}}),
    "own-critic": ("vector", 1, False, {"policy": OwnCriticPolicy}),
    "n-step": ("vector", 1, False, {"n_steps": 3}),
    "gsde": ("vector", 1, False, {"use_sde": True, "sde_sample_freq": 2}),
    "normalised": ("vector", 1, True, {}),
    "normalised-n-step": ("vector", 2, True, {"n_steps": 3}),
    "dict": ("dict", 1, False, {}),
    "cnn": ("image", 1, False, {}),
    "cnn-shared": ("image", 1, False, {"policy_kwargs": {"share_features_extractor": True}}),
    "her": ("goal", 1, False, HER),
    "her-normalised": ("goal", 2, True, HER),
}


def _run(host: Any, model_class: Any, name: str, updates: int, **changes: Any) -> Any:
    """Train online for so many gradient steps (times the environments for the form that asks for it)."""
    form, n_envs, normalised, arguments = FORMS[name]
    env = host.corridors(n_envs, form=form)
    env = VecNormalize(env) if normalised else env
    policy_kwargs = {"optimizer_class": th.optim.SGD} | arguments.get("policy_kwargs", {})
    merged = {"learning_rate": 1e-2, "learning_starts": 10 * n_envs, **arguments, **changes, "policy_kwargs": policy_kwargs}
    model = host.build(model_class, env, form=form, **merged)
    model.learn((10 + updates) * n_envs)
    assert model._n_updates == (updates * n_envs if arguments.get("gradient_steps") == -1 else updates)
    return model


@pytest.mark.parametrize("name", FORMS)
def test_weight_zero_is_sac(algorithm: Any, host: Any, name: str) -> None:
    for updates in (1, 5):
        sac = _run(host, SAC, name, updates)
        twin = _run(host, algorithm, name, updates, cql_alpha=0.0, **AS_SAC)
        assert not host.differing(host.state(sac), host.state(twin)), updates
        # The two have also lived through the same: the policy's actions, drawn from the same random numbers.
        np.testing.assert_array_equal(sac.replay_buffer.actions, twin.replay_buffer.actions)
        np.testing.assert_array_equal(sac.replay_buffer.rewards, twin.replay_buffer.rewards)

    other = _run(host, algorithm, name, 1, cql_alpha=5.0, **AS_SAC)
    first = _run(host, SAC, name, 1)
    assert {"critic", "actor"} <= host.networks(host.differing(host.state(first), host.state(other)))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("form", ["vector", "dict"])
def test_the_gap_is_of_what_the_critic_says(algorithm: Any, host: Any, form: str, precision: Any) -> None:
    class MultiPolicy(OwnCriticPolicy, MultiInputPolicy):
        pass

    policy = {"vector": OwnCriticPolicy, "dict": MultiPolicy}[form]
    model = host.build(algorithm, host.corridors(form=form), form=form, policy=policy)
    batch = host.collect(form).to_sb3(model).sample(5)
    actions = th.linspace(-1.0, 1.0, 15).reshape(5, 3, 1)
    values = model._q_values(model._critic_outputs(model.critic, batch.observations, actions, precision))
    assert values.dtype == th.float32
    for k in range(3):
        expected = th.cat(model.critic(batch.observations, actions[:, k]), dim=1).T
        th.testing.assert_close(values[:, :, k], expected, atol=1e-6 if precision == "f32" else 5e-2, rtol=0.0)


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"backup_entropy": False}, "critic"),
        ({"actor_learning_rate": 1e-4}, "actor"),
        ({"max_q_backup": True}, "critic"),
        ({"bc_steps": 1}, "actor"),
        ({"gamma": 0.5}, "critic"),
    ],
)
def test_each_departure_from_sac_shows(algorithm: Any, host: Any, change: dict[str, Any], touched: str) -> None:
    sac = _run(host, SAC, "plain", 1)
    model = _run(host, algorithm, "plain", 1, **{"cql_alpha": 0.0, **AS_SAC, **change})
    assert touched in host.networks(host.differing(host.state(sac), host.state(model)))


@pytest.mark.parametrize("name", ["plain", "n-step", "gsde", "dict", "cnn"])
def test_offline_weight_zero_is_sac_on_the_same_buffer(algorithm: Any, host: Any, name: str) -> None:
    form, _, _, arguments = FORMS[name]
    dataset = host.collect(form)
    states = {}
    for label, model_class, changes in (
        ("sac", SAC, {}),
        ("zero", algorithm, {"cql_alpha": 0.0, **AS_SAC}),
        ("five", algorithm, {"cql_alpha": 5.0, **AS_SAC}),
    ):
        policy_kwargs = {"optimizer_class": th.optim.SGD}
        merged = {"learning_rate": 1e-2, "target_update_interval": 2, **arguments, **changes, "policy_kwargs": policy_kwargs}
        model = host.build(model_class, form=form, **merged)
        if model_class is SAC:
            model.replay_buffer = dataset.to_sb3(model)
            model.set_logger(Logger(folder=None, output_formats=[]))
            model.set_random_seed(5)
            model.train(gradient_steps=5, batch_size=model.batch_size)
        else:
            model.set_offline_data(dataset)
            model.set_random_seed(5)
            model.learn_offline(dataset, 5)
        states[label] = host.state(model)
    assert not host.differing(states["sac"], states["zero"])
    assert "critic" in host.networks(host.differing(states["sac"], states["five"]))


# Determinism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", ["online", "offline", "offline, online", "no environment"])
@pytest.mark.parametrize("use_sde", [False, True])
def test_one_seed_gives_one_model(algorithm: Any, host: Any, dataset: Any, phases: str, use_sde: bool) -> None:
    models = []
    for seed in (0, 0, 1):
        noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
        arguments = {"seed": seed, "action_noise": noise, "train_freq": 4, "use_sde": use_sde, "gradient_steps": 2}
        if phases == "no environment":
            model = algorithm.from_dataset(dataset, **host.tiny(algorithm, **arguments))
        else:
            model = host.build(algorithm, **arguments)
        if phases != "online":
            model.learn_offline(dataset, 6)
        if "online" in phases:
            model.learn(24)
        models.append(model)
    first, second, third = (host.state(model) for model in models)
    assert not host.differing(first, second)
    assert host.networks(host.differing(first, third)) == {"actor", "critic", "critic_target"}
    # The policies then go on alike, whatever they draw.
    rollouts = []
    for model in models:
        set_random_seed(2)
        env = host.corridors()
        env.seed(4)
        observation, actions = env.reset(), []
        for _ in range(20):
            action, _ = model.predict(observation, deterministic=False)
            observation = env.step(action)[0]
            actions.append(action)
        rollouts.append(np.concatenate(actions))
    np.testing.assert_array_equal(rollouts[0], rollouts[1])
    assert not np.array_equal(rollouts[0], rollouts[2])
