"""Updates beside d3rlpy's CQL with its conventions, and beside the SB3 side with ours: same weights, batches and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from d3rlpy.torch_utility import TorchMiniBatch

from cql_plugins.adapters import to_sb3_model
from cql_plugins.d3rlpy import CalQLConfig, CQLConfig, DiscreteCQLConfig
from cql_plugins.sb3.batches import Batch

OBSERVATION, ACTION, BATCH, N = 3, 2, 16, 4
UNITS = d3rlpy.models.VectorEncoderFactory([32, 32])


def mini_batch(
    seed: int, discrete: bool = False, shape: tuple[int, ...] = (OBSERVATION,)
) -> d3rlpy.dataset.TransitionMiniBatch:
    rng = np.random.default_rng(seed)

    def observation() -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def action() -> np.ndarray:
        return rng.integers(ACTION, size=1) if discrete else rng.uniform(-1, 1, ACTION).astype(np.float32)

    return d3rlpy.dataset.TransitionMiniBatch.from_transitions(
        [
            d3rlpy.dataset.Transition(
                observation=observation(),
                action=action(),
                reward=rng.normal(size=1).astype(np.float32),
                next_observation=observation(),
                next_action=action(),
                terminal=float(rng.random() < 0.2),
                interval=1,
                rewards_to_go=rng.normal(size=(5, 1)).astype(np.float32),
            )
            for _ in range(BATCH)
        ]
    )


def built(config: Any, shape: tuple[int, ...] = (OBSERVATION,)) -> Any:
    algo = config.create()
    algo.create_impl(shape, ACTION)
    return algo


def same_weights(source: Any, target: Any) -> None:
    for name, module in source.impl.modules.get_torch_modules().items():
        getattr(target.impl.modules, name).load_state_dict(module.state_dict())


def parameters(algo: Any) -> dict[str, th.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in algo.impl.modules.get_torch_modules().items()
        for key, value in module.state_dict().items()
    }


def run(
    algo: Any, noise: Any, updates: int = 10, discrete: bool = False, shape: tuple[int, ...] = (OBSERVATION,)
) -> dict[str, th.Tensor]:
    with noise.injected():
        for step in range(updates):
            algo.update(mini_batch(step, discrete, shape))
    return parameters(algo)


def largest_difference(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


HOST_CONFIGS = {
    "defaults": {},  # Lagrange on, target of the mean action
    "no Lagrange": {"alpha_learning_rate": 0.0},
    "max backup": {"max_q_backup": True},
    "soft backup": {"soft_q_backup": True, "n_critics": 3},
    "quantiles": {"q_func_factory": d3rlpy.models.QRQFunctionFactory(n_quantiles=8)},
}


IMAGE = (1, 36, 36)
PIXELS: dict[str, Any] = {"filters": [[4, 8, 4], [8, 4, 2]], "feature_size": 16}
DEPENDENT: dict[str, tuple[Any, Any, bool]] = {
    "batch norm": ((OBSERVATION,), d3rlpy.models.VectorEncoderFactory([8, 8], use_batch_norm=True), True),
    "dropout": ((OBSERVATION,), d3rlpy.models.VectorEncoderFactory([8, 8], dropout_rate=0.3), False),
    "images": (IMAGE, d3rlpy.models.PixelEncoderFactory(**PIXELS, use_batch_norm=True), True),
}
"""Shape of an observation, encoder, and whether the actor has it, too."""


class TestBesideD3rlpysOwn:
    """Ten updates of everything: critics, actor, temperature, multiplier."""

    @pytest.mark.parametrize("options", HOST_CONFIGS.values(), ids=HOST_CONFIGS)
    @pytest.mark.parametrize(
        "optimizer", [d3rlpy.optimizers.SGDFactory(), d3rlpy.optimizers.AdamFactory()], ids=["sgd", "adam"]
    )
    def test_ten_updates(self, options: dict[str, Any], optimizer: Any, noise: Callable[[int], Any]) -> None:
        common = {
            "n_action_samples": N,
            "actor_encoder_factory": UNITS,
            "critic_encoder_factory": UNITS,
            "critic_optim_factory": optimizer,
            "critic_learning_rate": 1e-3,
        } | options
        theirs = built(d3rlpy.algos.CQLConfig(**common))
        config = CQLConfig.from_d3rlpy(theirs.config)
        ours, other = built(config), built(CQLConfig.from_d3rlpy(theirs.config, conservative_weight=20.0))
        same_weights(theirs, ours)
        same_weights(theirs, other)
        expected = run(theirs, noise(7))
        assert largest_difference(run(ours, noise(7)), expected) < 1e-5
        critics = [key for key in expected if key.startswith("q_funcs")]
        changed = run(other, noise(7))
        assert max(float((changed[key] - expected[key]).abs().max()) for key in critics) > 1e-4, "the weight is looked at"

    @pytest.mark.parametrize("cal_ql", [False, True], ids=["CQL", "Cal-QL"])
    @pytest.mark.parametrize(("shape", "encoder", "same_in_actor"), DEPENDENT.values(), ids=DEPENDENT)
    def test_networks_that_look_at_the_batch(
        self, shape: tuple[int, ...], encoder: Any, same_in_actor: bool, cal_ql: bool, noise: Callable[[int], Any]
    ) -> None:
        """The statistics of a batch, and the draws of a pass, are of the rows that d3rlpy gives to the critic together."""
        host, own = (d3rlpy.algos.CalQLConfig, CalQLConfig) if cal_ql else (d3rlpy.algos.CQLConfig, CQLConfig)
        plain = d3rlpy.models.DefaultEncoderFactory()
        theirs = built(
            host(
                n_action_samples=3,
                actor_encoder_factory=encoder if same_in_actor else plain,
                critic_encoder_factory=encoder,
            ),
            shape,
        )
        ours, other = built(own.from_d3rlpy(theirs.config), shape), built(own.from_d3rlpy(theirs.config), shape)
        same_weights(theirs, ours)
        same_weights(theirs, other)
        start, ends = parameters(theirs), {}
        other.impl._looks_at_the_batch = False
        for name, algo in (("theirs", theirs), ("ours", ours), ("other", other)):
            th.manual_seed(3)
            ends[name] = run(algo, noise(7), updates=6, shape=shape)
        assert largest_difference(ends["ours"], ends["theirs"]) < 1e-6
        assert largest_difference(ends["other"], ends["theirs"]) > 1e-4, "one pass over all actions is not the same"
        for key in [key for key in start if key.startswith("q_funcs") and "num_batches" in key]:
            assert int(ends["ours"][key] - start[key]) == 6 * 5
            assert int(ends["other"][key] - start[key]) == 6 * 2

    def test_the_papers_convention_differs(self, noise: Callable[[int], Any]) -> None:
        theirs = built(d3rlpy.algos.CQLConfig(n_action_samples=N, critic_optim_factory=d3rlpy.optimizers.SGDFactory()))
        ours = built(CQLConfig.from_d3rlpy(theirs.config, conventions="paper"))
        same_weights(theirs, ours)
        assert largest_difference(run(ours, noise(7)), run(theirs, noise(7))) > 1e-4

    @pytest.mark.parametrize("is_adam", [False, True], ids=["sgd", "adam"])
    def test_the_mode_is_what_differs(self, is_adam: bool, noise: Callable[[int], Any]) -> None:
        """With the mode in the target the paper's convention is d3rlpy's, but for half the loss.

        SGD's rate makes up for the half; Adam sees it in its epsilon alone.
        """

        def optimized(scale: float, **more: Any) -> dict[str, Any]:
            optimizer = d3rlpy.optimizers.AdamFactory(eps=1e-8 * scale) if is_adam else d3rlpy.optimizers.SGDFactory()
            rate = 1e-3 if is_adam else 1e-3 / scale
            return {"critic_optim_factory": optimizer, "critic_learning_rate": rate, **more}

        options: dict[str, Any] = {"n_action_samples": N, "alpha_learning_rate": 0.0, "initial_alpha": 1.0}
        theirs = built(d3rlpy.algos.CQLConfig(**options, **optimized(1.0)))
        ends = {}
        for mode in (True, False):
            ours = built(CQLConfig(**options, **optimized(0.5, mode_q_backup=mode)))
            same_weights(theirs, ours)
            ends[mode] = run(ours, noise(7))
        expected = run(theirs, noise(7))
        assert largest_difference(ends[True], expected) < 1e-5
        assert largest_difference(ends[False], expected) > 1e-4

    def test_cal_ql(self, noise: Callable[[int], Any]) -> None:
        theirs = built(d3rlpy.algos.CalQLConfig(n_action_samples=N))
        ours = built(CalQLConfig.from_d3rlpy(theirs.config))
        assert not ours.config.max_q_backup, "d3rlpy's default is taken over"
        plain = built(CQLConfig.from_d3rlpy(d3rlpy.algos.CQLConfig(n_action_samples=N)))
        same_weights(theirs, ours)
        same_weights(theirs, plain)
        expected = run(theirs, noise(7))
        assert largest_difference(run(ours, noise(7)), expected) < 1e-5
        assert largest_difference(run(plain, noise(7)), expected) > 1e-4, "the bound is at work in this batch"

    @pytest.mark.parametrize("q_func", [d3rlpy.models.MeanQFunctionFactory(), d3rlpy.models.QRQFunctionFactory(n_quantiles=8)])
    def test_discrete(self, q_func: Any, noise: Callable[[int], Any]) -> None:
        options: dict[str, Any] = {"q_func_factory": q_func, "learning_rate": 1e-3, "alpha": 2.0, "target_update_interval": 3}
        theirs = built(d3rlpy.algos.DiscreteCQLConfig(**options))
        ours, other = built(DiscreteCQLConfig(**options)), built(DiscreteCQLConfig(**(options | {"alpha": 3.0})))
        same_weights(theirs, ours)
        same_weights(theirs, other)
        expected = run(theirs, noise(7), discrete=True)
        assert largest_difference(run(ours, noise(7), discrete=True), expected) < 1e-6
        assert largest_difference(run(other, noise(7), discrete=True), expected) > 1e-5


SIDES: dict[str, tuple[Any, dict[str, Any]]] = {
    "CQL(H)": (CQLConfig, {}),
    "rho": (CQLConfig, {"cql_variant": "rho"}),
    "mu": (CQLConfig, {"cql_variant": "mu"}),
    "pointwise": (CQLConfig, {"cql_variant": "pointwise"}),
    "temperature, clip": (CQLConfig, {"cql_temperature": 2.0, "cql_clip_diff": (7.0, 8.0)}),
    "normalised": (CQLConfig, {"normalize_gap": True, "n_critics": 3}),
    "max backup": (CQLConfig, {"max_q_backup": True}),
    "soft backup": (CQLConfig, {"soft_q_backup": True}),
    "mode backup": (CQLConfig, {"mode_q_backup": True}),
    "Lagrange": (CQLConfig, {"alpha_learning_rate": 3e-4, "alpha_threshold": 2.0, "initial_alpha": 2.7}),
    "fixed multiplier": (CQLConfig, {"initial_alpha": 0.7}),
    "Cal-QL": (CalQLConfig, {}),
    "Cal-QL, random too": (CalQLConfig, {"calibrate_random": True, "max_q_backup": False}),
}


class Box(gym.Env[Any, Any]):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        return np.zeros(OBSERVATION, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(OBSERVATION, np.float32), 0.0, False, False, {}


class TestBesideTheSB3Side:
    """One critic loss, its value and its gradients."""

    def both(self, algo: Any, noise: Callable[[int], Any], **changes: Any) -> tuple[list[th.Tensor], list[th.Tensor]]:
        numpy_batch = mini_batch(3)
        batch = TorchMiniBatch.from_batch(numpy_batch, algo.gamma, compute_returns_to_go=True, device="cpu")
        impl = algo.impl
        for parameter in impl.modules.q_funcs.parameters():
            parameter.grad = None
        with noise(5).injected():
            loss = impl.compute_critic_loss(batch, impl.compute_target(batch)).critic_loss
        loss.backward()
        theirs = [loss.detach(), *(p.grad for q in impl.modules.q_funcs for p in q.parameters())]

        model: Any = to_sb3_model(algo, Box(), device="cpu", **changes)
        # SB3's density has 1e-6 inside its logarithm, which moves the soft target by as much; d3rlpy's and ours are exact.
        model.actor.action_dist.epsilon = 0.0
        sb3_batch = Batch(
            batch.observations,
            batch.actions,
            batch.next_observations,
            batch.terminals,
            batch.rewards,
            None,
            batch.returns_to_go,
        )
        with th.no_grad():
            policy = model._policy_gaussian(sb3_batch.observations)
        with noise(5).injected():
            target, next_policy = model._compute_target(sb3_batch, model.log_ent_coef.detach().exp())
            step = model._update_critic(sb3_batch, target, policy, next_policy)
        return theirs, [step.critic_loss.detach(), *(p.grad for q in model.critic.q_networks for p in q.parameters())]

    @pytest.mark.parametrize(("config", "options"), SIDES.values(), ids=SIDES)
    def test_same_loss_and_gradients(self, config: Any, options: dict[str, Any], noise: Callable[[int], Any]) -> None:
        algo = built(
            config(**({"n_action_samples": N, "actor_encoder_factory": UNITS, "critic_encoder_factory": UNITS} | options))
        )
        # Away from where the targets equal the critics and every bound holds.
        th.manual_seed(1)
        with th.no_grad():
            for parameter in algo.impl.modules.targ_q_funcs.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
        theirs, ours = self.both(algo, noise)
        for first, second in zip(theirs, ours, strict=True):
            th.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
        assert max(float(gradient.abs().max()) for gradient in theirs[1:]) > 1e-2
        _, changed = self.both(algo, noise, cql_alpha=6.0)
        assert not th.allclose(theirs[0], changed[0], rtol=1e-6, atol=1e-6)
