"""Models that move between d3rlpy and SB3: same action, same Q, same target values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins.sb3 import CQL, CalQL

pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)

import d3rlpy
from d3rlpy.optimizers import AdamFactory as Adam
from d3rlpy.optimizers import AdamWFactory as AdamW
from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory

from cql_plugins.adapters import ModelError, from_arrays, to_d3rlpy_model, to_sb3_model
from cql_plugins.d3rlpy import CalQLConfig, CQLConfig, DiscreteCQLConfig

COSINE = CosineAnnealingLRFactory(T_max=10)
LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32)


class Small(gym.Env[Any, Any]):
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, low: Any = LOW, high: Any = HIGH) -> None:
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, **_: Any) -> Any:  # type: ignore[override]
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.steps += 1
        return self.np_random.normal(size=3).astype(np.float32), -float(np.sum(action**2)), False, self.steps == 7, {}


def logged(n: int = 60) -> Any:
    rng = np.random.default_rng(0)
    return from_arrays(
        rng.normal(3.0, 5.0, size=(n, 3)).astype(np.float32),
        rng.uniform(LOW, HIGH, size=(n, 2)).astype(np.float32),
        rng.normal(size=n),
        np.arange(n) % 10 == 9,
        np.zeros(n, bool),
        observation_space=Small.observation_space,
        action_space=Small().action_space,
    )


OBSERVATIONS = np.random.default_rng(1).normal(3.0, 5.0, size=(20, 3)).astype(np.float32)
ENVIRONMENT_ACTIONS = np.random.default_rng(2).uniform(LOW, HIGH, size=(20, 2)).astype(np.float32)

ACTION_SCALER: dict[str, Any] = {"action_scaler": d3rlpy.preprocessing.MinMaxActionScaler(minimum=LOW, maximum=HIGH)}
STANDARD = d3rlpy.preprocessing.StandardObservationScaler(mean=np.array([3.0, 2.0, 3.1]), std=np.array([5.0, 0.4, 4.7]))
MIN_MAX = d3rlpy.preprocessing.MinMaxObservationScaler(minimum=np.array([-9.0, -8, -7]), maximum=np.array([15.0, 12, 14]))


def built(config: Any, **options: Any) -> Any:
    encoders = {
        "actor_encoder_factory": d3rlpy.models.VectorEncoderFactory([16, 8]),
        "critic_encoder_factory": d3rlpy.models.VectorEncoderFactory([12]),
    }
    rates = {"alpha_learning_rate": 3e-4} if config in (d3rlpy.algos.CQLConfig, d3rlpy.algos.CalQLConfig) else {}
    algo = config(**(encoders | rates | ACTION_SCALER | options)).create()
    algo.create_impl((3,), 2)
    th.manual_seed(0)
    with th.no_grad():  # the targets elsewhere than the critics, the scalars elsewhere than at their start
        for parameter in algo.impl.modules.targ_q_funcs.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
        next(algo.impl.modules.log_temp.parameters()).fill_(-0.7)
    return algo


def sb3_view(model: Any, observations: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Deterministic actions, then values of the critics and of their targets, (C, n), as SB3 computes them."""
    normalizer = model.get_vec_normalize_env()
    seen = observations if normalizer is None else normalizer.normalize_obs(observations)
    predicted, _ = model.predict(seen, deterministic=True)
    scaled = th.as_tensor(np.stack([model.policy.scale_action(a) for a in actions])).float()
    with th.no_grad():
        values = [th.cat(c(th.as_tensor(seen).float(), scaled), dim=1).T.numpy() for c in (model.critic, model.critic_target)]
    return predicted, *values


def d3rlpy_view(algo: Any, observations: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same, as d3rlpy computes them."""
    x, a = th.as_tensor(observations), th.as_tensor(actions)
    if algo.observation_scaler:
        x = algo.observation_scaler.transform(x)
    if algo.action_scaler:
        a = algo.action_scaler.transform(a)
    forwarders = algo.impl._q_func_forwarder, algo.impl._targ_q_func_forwarder
    with th.no_grad():
        values = [forwarder.compute_expected_q(x, a, "none")[:, :, 0].numpy() for forwarder in forwarders]
    return algo.predict(observations), *values


def assert_same_model(model: Any, algo: Any, observations: np.ndarray = OBSERVATIONS) -> None:
    ours, theirs = (
        sb3_view(model, observations, ENVIRONMENT_ACTIONS),
        d3rlpy_view(algo, observations, ENVIRONMENT_ACTIONS),
    )
    for first, second in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)
    assert np.abs(ours[1] - ours[2]).max() > 1e-3, "the targets are not the critics"


class TestToSB3:
    @pytest.mark.parametrize("scaler", [None, STANDARD, MIN_MAX], ids=["raw", "standard", "min_max"])
    @pytest.mark.parametrize("config", [CQLConfig, CalQLConfig, d3rlpy.algos.CQLConfig, d3rlpy.algos.CalQLConfig])
    def test_same_actions_and_values(self, config: Any, scaler: Any) -> None:
        algo = built(config, observation_scaler=scaler, n_critics=3)
        model = to_sb3_model(algo, Small(), device="cpu")
        assert type(model) is (CalQL if "Cal" in config.__name__ else CQL)
        assert_same_model(model, algo)

    def test_a_column_that_never_changes(self) -> None:
        """There the scaler's own epsilon is all there is to divide by, and VecNormalize's must not be added to it."""
        scaler = d3rlpy.preprocessing.StandardObservationScaler(mean=np.array([3.0, 2.0, 3.1]), std=np.array([5.0, 0.0, 4.7]))
        algo = built(CQLConfig, observation_scaler=scaler)
        observations = OBSERVATIONS.copy()
        observations[:, 1] = np.linspace(2.0, 2.01, len(observations))
        assert_same_model(to_sb3_model(algo, Small(), device="cpu"), algo, observations)

    def test_the_twin_is_another_model(self) -> None:
        algo = built(CQLConfig, observation_scaler=STANDARD)
        model = to_sb3_model(algo, Small(), device="cpu")
        with th.no_grad():
            next(iter(algo.impl.modules.q_funcs.parameters())).mul_(1.01)
        with pytest.raises(AssertionError):
            assert_same_model(model, algo)

    def test_plain_sac(self) -> None:
        algo = built(d3rlpy.algos.SACConfig)
        model = to_sb3_model(algo, Small(), device="cpu")
        assert type(model) is SAC
        assert_same_model(model, algo)
        with pytest.warns(UserWarning, match="one learning rate"):
            to_sb3_model(built(d3rlpy.algos.SACConfig, actor_learning_rate=1e-5), Small(), device="cpu")

    @pytest.mark.parametrize("activation", ["tanh", "gelu", "swish"])
    def test_activations(self, activation: str) -> None:
        encoder = d3rlpy.models.VectorEncoderFactory([8, 8], activation)
        algo = built(CQLConfig, actor_encoder_factory=encoder, critic_encoder_factory=encoder)
        assert_same_model(to_sb3_model(algo, Small(), device="cpu"), algo)

    def test_options_and_scalars(self) -> None:
        algo = built(
            CalQLConfig,
            conservative_weight=2.0,
            alpha_learning_rate=1e-4,
            alpha_threshold=4.0,
            temp_learning_rate=2e-5,
            initial_alpha=math.e,
            n_action_samples=7,
            cql_variant="rho",
            cql_temperature=0.5,
            cql_clip_diff=(-3.0, 9.0),
            normalize_gap=True,
            max_q_backup=False,
            soft_q_backup=True,
            offline_fraction=0.25,
            return_tail="none",
            calibrate_random=True,
            gamma=0.9,
            tau=0.1,
            batch_size=32,
            critic_learning_rate=1e-4,
            actor_learning_rate=2e-5,
        )
        algo.set_grad_step(123)
        model: Any = to_sb3_model(algo, Small(), device="cpu")
        expected = {
            "cql_alpha": 2.0, "cql_lagrange_threshold": 4.0, "cql_n_actions": 7, "cql_variant": "rho", "cql_temperature": 0.5,
            "cql_clip_diff": (-3.0, 9.0), "normalize_gap": True, "max_q_backup": False, "backup_entropy": True,
            "offline_fraction": 0.25, "return_tail": "none", "calibrate_random": True, "gamma": 0.9, "tau": 0.1,
            "batch_size": 32, "learning_rate": 1e-4, "actor_learning_rate": 2e-5, "_n_updates": 123,
        }  # fmt: skip
        assert {name: getattr(model, name) for name in expected} == expected
        assert model.log_ent_coef.item() == pytest.approx(-0.7)
        assert model.log_cql_lagrange.item() == pytest.approx(1.0)
        fixed: Any = to_sb3_model(built(CQLConfig, initial_alpha=3.0, temp_learning_rate=0.0), Small(), device="cpu")
        assert fixed.cql_alpha == pytest.approx(15.0), "the multiplier is part of the weight where it is not learned"
        assert fixed.ent_coef == pytest.approx(math.exp(-0.7))
        assert to_sb3_model(algo, Small(), device="cpu", tau=0.5).tau == 0.5

    @pytest.mark.parametrize(
        ("config", "options", "expected"),
        [
            (d3rlpy.algos.CQLConfig, {}, True),
            (d3rlpy.algos.CalQLConfig, {}, True),
            (d3rlpy.algos.CQLConfig, {"soft_q_backup": True}, False),
            (d3rlpy.algos.CQLConfig, {"max_q_backup": True}, False),
            (CQLConfig, {"conventions": "d3rlpy"}, True),
            (CQLConfig, {"mode_q_backup": True}, True),
            (CQLConfig, {}, False),
            (CalQLConfig, {"max_q_backup": False}, False),
        ],
    )
    def test_the_targets_action(self, config: Any, options: dict[str, Any], expected: bool) -> None:
        """d3rlpy's own target takes the policy's mode; a model that came from it goes on so, and comes back so."""
        model: Any = to_sb3_model(built(config, **options), Small(), device="cpu")
        assert model.mode_q_backup is expected
        assert to_d3rlpy_model(model).config.mode_q_backup is expected

    def test_precision(self) -> None:
        """Ours have it on both sides; d3rlpy's own algorithms compute in single precision."""
        model: Any = to_sb3_model(built(CalQLConfig, precision="bf16"), Small(), device="cpu")
        assert model.precision == "bf16"
        assert to_d3rlpy_model(model).config.precision == "bf16"  # type: ignore[attr-defined]
        assert to_sb3_model(built(CalQLConfig, precision="bf16"), Small(), device="cpu", precision="f32").precision == "f32"  # type: ignore[attr-defined]
        single: Any = to_sb3_model(built(d3rlpy.algos.CalQLConfig), Small(), device="cpu")
        assert single.precision == to_d3rlpy_model(single).config.precision == "f32"  # type: ignore[attr-defined]

    @pytest.mark.parametrize("config", [CQLConfig, d3rlpy.algos.CQLConfig, d3rlpy.algos.SACConfig])
    @pytest.mark.parametrize(
        ("factories", "lost"),
        [
            ({"critic_optim_factory": AdamW(weight_decay=0.1)}, r"^critic_optim_factory=AdamWFactory\(weight_decay=0.1\): not"),
            (
                {"actor_optim_factory": Adam(clip_grad_norm=1.0), "critic_optim_factory": Adam(betas=(0.5, 0.9))},
                r"actor_optim_factory=AdamFactory\(clip_grad_norm=1.0\); critic_optim_factory=AdamFactory\(betas=\(0.5, 0.9",
            ),
            ({"temp_optim_factory": Adam(lr_scheduler_factory=COSINE)}, "temp_optim_factory=AdamFactory.lr_scheduler_factory="),
        ],
    )
    def test_optimizers_are_said(self, config: Any, factories: dict[str, Any], lost: str) -> None:
        with pytest.warns(UserWarning, match=lost) as said:
            to_sb3_model(built(config, **factories), Small(), device="cpu")
        assert len(said) == 1
        assert said[0].filename == __file__

    def test_optimizers_that_need_not_be_said(self, tmp_path: Path) -> None:
        algo = built(CQLConfig, alpha_learning_rate=0.0, alpha_optim_factory=AdamW(weight_decay=0.1))
        to_sb3_model(algo, Small(), device="cpu")  # never used
        decaying = built(CQLConfig, critic_optim_factory=AdamW(weight_decay=0.1))
        own: dict[str, Any] = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
        model = to_sb3_model(decaying, Small(), device="cpu", policy_kwargs=own)
        assert model.critic.optimizer.param_groups[0]["weight_decay"] == 0.1
        built(CQLConfig).save(str(tmp_path / "algo.d3"))
        to_sb3_model(d3rlpy.load_learnable(str(tmp_path / "algo.d3")), Small(), device="cpu")  # type: ignore[arg-type]
        clipped = built(CQLConfig, critic_optim_factory=AdamW(clip_grad_norm=1.0, weight_decay=0.1))
        with pytest.warns(UserWarning, match=r"AdamWFactory\(clip_grad_norm=1.0\)"):
            to_sb3_model(clipped, Small(), device="cpu", policy_kwargs=own)

    def test_goes_on_online_with_four_environments(self) -> None:
        algo = built(CalQLConfig, observation_scaler=STANDARD, n_action_samples=2, batch_size=16)
        env = make_vec_env(Small, n_envs=4)
        model: Any = to_sb3_model(algo, env, device="cpu", learning_starts=10_000, seed=0)
        before = sb3_view(model, OBSERVATIONS, ENVIRONMENT_ACTIONS)
        model.learn(40)
        assert model.num_timesteps == 40
        np.testing.assert_array_equal(sb3_view(model, OBSERVATIONS, ENVIRONMENT_ACTIONS)[0], before[0])
        # The first actions are the policy's: random ones would fill the space.
        model.learning_starts = 0
        model.set_offline_data(logged())
        model.learn(40, reset_num_timesteps=False)
        assert model.get_vec_normalize_env().obs_rms.mean.tolist() == pytest.approx([3.0, 2.0, 3.1]), "not set anew"
        assert not np.array_equal(sb3_view(model, OBSERVATIONS, ENVIRONMENT_ACTIONS)[0], before[0])

    def test_the_first_actions_are_the_policys(self) -> None:
        algo = built(CQLConfig)
        with th.no_grad():  # a policy that always does nearly the same
            for layer, value in ((algo.impl.modules.policy._mu, 2.0), (algo.impl.modules.policy._logstd, -10.0)):
                layer.weight.zero_()
                layer.bias.fill_(value)
        model: Any = to_sb3_model(algo, Small(), device="cpu", learning_starts=1000)
        model.learn(8)
        assert np.allclose(model.replay_buffer.actions[:8, 0], np.tanh(2.0), atol=1e-3)
        model = CQL("MlpPolicy", Small(), device="cpu", learning_starts=1000)
        model.learn(8)
        assert not np.allclose(model.replay_buffer.actions[:8, 0], np.tanh(2.0), atol=1e-1)


LOST: list[tuple[dict[str, Any], str]] = [
    ({"n_steps": 3, "gamma": 0.9}, r"n_steps=3 .*MultiStepTransitionPicker\(3, 0.9\)"),
    ({"learning_rate": lambda left: 1e-3 * left}, "^learning_rate: a schedule"),
    ({"target_update_interval": 2}, "target_update_interval=2"),
    ({"policy_kwargs": {"optimizer_class": th.optim.AdamW}}, r"AdamW\(\)"),
    ({"policy_kwargs": {"optimizer_kwargs": {"eps": 1e-3, "weight_decay": 0.1}}}, r"Adam\(eps=0.001, weight_decay=0.1\)"),
]
LOST_OF_OURS: list[tuple[dict[str, Any], str]] = [
    ({"bc_steps": 7}, "bc_steps=7 .*the 5 gradient steps"),
    ({"actor_learning_rate": lambda left: 1e-3 * left}, "^actor_learning_rate: a schedule"),
    ({"cql_alpha_online": 0.0}, "cql_alpha_online=0.0"),
]


class TestToD3rlpy:
    @pytest.mark.parametrize("kind", [CQL, CalQL, SAC])
    @pytest.mark.parametrize("normalized", [False, True])
    def test_same_actions_and_values(self, kind: Any, normalized: bool) -> None:
        env: Any = DummyVecEnv([Small])
        if normalized:
            env = VecNormalize(env, norm_reward=False, clip_obs=np.inf)
            env.obs_rms.mean, env.obs_rms.var = np.array([3.0, -1.0, 2.0]), np.array([4.0, 30.0, 9.0])
        model = kind("MlpPolicy", env, device="cpu", policy_kwargs={"net_arch": {"pi": [16, 8], "qf": [12]}, "n_critics": 3})
        with th.no_grad():
            for parameter in model.critic_target.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
            model.log_ent_coef.fill_(-0.3)
        model._n_updates = 77
        algo = to_d3rlpy_model(model)
        assert type(algo).__name__ == kind.__name__
        assert algo.grad_step == 77
        assert next(algo.impl.modules.log_temp.parameters()).item() == pytest.approx(-0.3)
        assert_same_model(model, algo)

    def test_there_and_back(self) -> None:
        model: Any = CalQL(
            "MlpPolicy",
            Small(),
            device="cpu",
            cql_alpha=2.0,
            cql_lagrange_threshold=3.0,
            cql_clip_diff=(-5.0, 5.0),
            return_tail="sparse",
            policy_kwargs={"net_arch": [9], "activation_fn": th.nn.Tanh},
        )
        model.log_cql_lagrange.data.fill_(0.4)
        again: Any = to_sb3_model(to_d3rlpy_model(model), Small(), device="cpu")
        for name in (
            "cql_alpha",
            "cql_lagrange_threshold",
            "cql_clip_diff",
            "return_tail",
            "max_q_backup",
            "actor_learning_rate",
        ):
            assert getattr(again, name) == getattr(model, name)
        assert again.log_cql_lagrange.item() == pytest.approx(0.4)
        first, second = model.policy.state_dict(), again.policy.state_dict()
        assert all(th.equal(first[key], second[key]) for key in first)

    def test_a_fixed_entropy_coefficient(self) -> None:
        algo: Any = to_d3rlpy_model(CQL("MlpPolicy", Small(), device="cpu", ent_coef=0.2))
        assert algo.config.temp_learning_rate == 0.0
        assert algo.config.initial_temperature == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("kind", "options", "lost"), [(SAC, *case) for case in LOST] + [(CQL, *case) for case in LOST + LOST_OF_OURS]
    )
    def test_what_is_lost_is_said(self, kind: Any, options: dict[str, Any], lost: str) -> None:
        model = kind("MlpPolicy", Small(), device="cpu", **options)
        model._n_updates = 2
        with pytest.warns(UserWarning, match=lost) as said:
            to_d3rlpy_model(model)
        assert len(said) == 1
        assert said[0].filename == __file__

    def test_what_need_not_be_said(self) -> None:
        """Cloning that is over, a schedule that is a number, an optimiser that only runs otherwise, and an answer."""
        options: dict[str, Any] = {
            "bc_steps": 7,
            "learning_rate": lambda left: 1e-3,
            "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-8, "foreach": False}},
        }
        model = CQL("MlpPolicy", Small(), device="cpu", **options)
        model._n_updates = 7
        assert to_d3rlpy_model(model).config.critic_learning_rate == 1e-3  # type: ignore[attr-defined]
        decaying = CQL("MlpPolicy", Small(), device="cpu", policy_kwargs={"optimizer_kwargs": {"weight_decay": 0.1}})
        algo: Any = to_d3rlpy_model(decaying, critic_optim_factory=Adam(weight_decay=0.1), batch_size=32)
        assert algo.impl.modules.critic_optim.optim.param_groups[0]["weight_decay"] == 0.1
        assert algo.config.batch_size == 32

    def test_clipping_is_said(self) -> None:
        env = VecNormalize(DummyVecEnv([Small]), norm_reward=False)
        with pytest.warns(UserWarning, match="clips observations to"):
            to_d3rlpy_model(CQL("MlpPolicy", env, device="cpu"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            (CQLConfig, {"action_scaler": None}, "SB3 scales actions by the bounds"),
            (
                CQLConfig,
                {"action_scaler": d3rlpy.preprocessing.MinMaxActionScaler(minimum=LOW, maximum=HIGH + 1)},
                "RescaleAction",
            ),
            (CQLConfig, {"reward_scaler": d3rlpy.preprocessing.MultiplyRewardScaler(2.0)}, "reward scaler 'multiply'"),
            (CQLConfig, {"observation_scaler": d3rlpy.preprocessing.PixelObservationScaler()}, "observation scaler 'pixel'"),
            (CQLConfig, {"q_func_factory": d3rlpy.models.QRQFunctionFactory()}, "has a distribution"),
            (CQLConfig, {"q_func_factory": d3rlpy.models.MeanQFunctionFactory(share_encoder=True)}, "share an encoder"),
            (
                CQLConfig,
                {"actor_encoder_factory": d3rlpy.models.VectorEncoderFactory([8], use_layer_norm=True)},
                "actor's layers",
            ),
            (
                CQLConfig,
                {"critic_encoder_factory": d3rlpy.models.VectorEncoderFactory([8], "tanh")},
                "one activation for actor and critics",
            ),
            (CQLConfig, {"critic_encoder_factory": d3rlpy.models.SimBaEncoderFactory()}, "SimBaEncoderWithAction cannot"),
        ],
    )
    def test_what_sb3_cannot_have(self, config: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            to_sb3_model(built(config, **options), Small(), device="cpu")

    def test_rates_of_their_own_are_told(self) -> None:
        with pytest.warns(UserWarning, match="no temp_learning_rate of its own"):
            to_sb3_model(built(CQLConfig, temp_learning_rate=1e-2), Small(), device="cpu")
        with pytest.warns(UserWarning, match="no alpha_learning_rate of its own"):
            to_sb3_model(built(CQLConfig, alpha_learning_rate=1e-2), Small(), device="cpu")

    def test_policy_arguments_of_the_users_stay(self) -> None:
        kwargs = {"optimizer_kwargs": {"weight_decay": 0.1}}
        model = to_sb3_model(built(CQLConfig), Small(), device="cpu", policy_kwargs=kwargs)
        assert model.actor.optimizer.param_groups[0]["weight_decay"] == 0.1
        assert kwargs == {"optimizer_kwargs": {"weight_decay": 0.1}}

    def test_other_algorithms_and_environments(self) -> None:
        with pytest.raises(ModelError, match="no networks yet"):
            to_sb3_model(CQLConfig().create(), Small())
        for config in (DiscreteCQLConfig, d3rlpy.algos.TD3Config):
            algo = config().create()
            algo.create_impl((3,), 2)
            with pytest.raises(ModelError, match="no counterpart"):
                to_sb3_model(algo, Small())
        for scaler, message in ((None, "raw observations"), (STANDARD, "own observation scaler")):
            with pytest.raises(ModelError, match=message):
                to_sb3_model(built(CQLConfig, observation_scaler=scaler), VecNormalize(DummyVecEnv([Small])))
        quiet = VecNormalize(DummyVecEnv([Small]), norm_obs=False)
        assert to_sb3_model(built(CQLConfig), quiet, device="cpu").get_vec_normalize_env() is quiet

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_sde": True}, "gSDE"),
            ({"target_entropy": -1.0}, "target entropy"),
            ({"ent_coef": 0.0}, "logarithm"),
            ({"policy_kwargs": {"activation_fn": th.nn.ELU}}, "no activation ELU"),
            ({"policy_kwargs": {"net_arch": []}}, "at least one hidden layer"),
            ({"max_q_backup": True, "backup_entropy": True}, "both"),
        ],
    )
    def test_what_d3rlpy_cannot_have(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            to_d3rlpy_model(CQL("MlpPolicy", Small(), device="cpu", **options))

    @pytest.mark.parametrize(("part", "name"), [("actor", "get_action_dist_params"), ("critic", "forward")])
    def test_networks_that_do_more_than_the_hosts(self, part: str, name: str) -> None:
        model = CQL("MlpPolicy", Small(), device="cpu")
        network = getattr(model, part)
        network.__class__ = type("Own", (type(network),), {})
        to_d3rlpy_model(model)
        setattr(network.__class__, name, lambda self, *args: None)
        with pytest.raises(ModelError, match=f"Own has a {name} of its own"):
            to_d3rlpy_model(model)

    def test_images_rewards_and_other_algorithms(self) -> None:
        env = VecNormalize(DummyVecEnv([Small]), norm_obs=False)
        with pytest.raises(ModelError, match="norm_reward=False"):
            to_d3rlpy_model(CQL("MlpPolicy", env, device="cpu"))
        with pytest.raises(ModelError, match="no counterpart"):
            to_d3rlpy_model(DQN("MlpPolicy", "CartPole-v1", device="cpu"))  # type: ignore[arg-type]


def test_trained_here_goes_on_there() -> None:
    """d3rlpy offline, SB3 online, back to d3rlpy: one policy all the way."""
    from cql_plugins.adapters import to_d3rlpy

    data = logged()
    algo = built(CQLConfig, observation_scaler=STANDARD, n_action_samples=2, batch_size=16)
    algo.fit(
        to_d3rlpy(data), n_steps=5, n_steps_per_epoch=5, show_progress=False, logger_adapter=d3rlpy.logging.NoopAdapterFactory()
    )
    model: Any = to_sb3_model(algo, make_vec_env(Small, n_envs=2), device="cpu", learning_starts=0)
    assert_same_model(model, algo)
    model.set_offline_data(data)
    model.learn(20)
    assert_same_model(model, to_d3rlpy_model(model))


def test_the_networks_are_the_models() -> None:
    import gymnasium as gym

    from cql_plugins.adapters import to_d3rlpy_model
    from cql_plugins.sb3 import CQL

    model = CQL("MlpPolicy", gym.make("Pendulum-v1"), policy_kwargs={"net_arch": [4]}, buffer_size=10, device="cpu")
    assert to_d3rlpy_model(model, batch_size=7).config.batch_size == 7
    for name in ("n_critics", "actor_encoder_factory", "critic_encoder_factory"):
        with pytest.raises(TypeError, match=name):
            to_d3rlpy_model(model, **{name: 4})
