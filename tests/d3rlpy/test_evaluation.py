"""Many actions at once: against d3rlpy's own forward passes on repeated observations."""

from __future__ import annotations

from typing import Any

import d3rlpy
import numpy as np
import pytest
import torch as th

from cql_plugins import ensembles
from cql_plugins.d3rlpy import CalQLConfig, CQLConfig
from cql_plugins.d3rlpy.impl import _critics

ACTION, BATCH, N = 2, 6, 5
ENCODERS: dict[str, tuple[tuple[int, ...], Any]] = {
    "vector": ((4,), lambda: d3rlpy.models.VectorEncoderFactory([16, 12])),
    "image": ((3, 36, 36), lambda: d3rlpy.models.PixelEncoderFactory(filters=[[4, 8, 4], [8, 4, 2]], feature_size=16)),
    "layer norm": ((4,), lambda: d3rlpy.models.VectorEncoderFactory([16], use_layer_norm=True)),
    "image, batch norm": (
        (3, 36, 36),
        lambda: d3rlpy.models.PixelEncoderFactory(filters=[[4, 8, 4]], feature_size=16, use_batch_norm=True),
    ),
    "other activation": ((4,), lambda: d3rlpy.models.VectorEncoderFactory([16], activation="tanh")),
}
TAKEN_APART = {"vector", "image"}


def make(name: str, config: Any = CQLConfig, **options: Any) -> Any:
    shape, encoder = ENCODERS[name]
    th.manual_seed(0)
    algo = config(actor_encoder_factory=encoder(), critic_encoder_factory=encoder(), **options).create()
    algo.create_impl(shape, ACTION)
    return algo


def inputs(name: str) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(1)
    return th.rand(BATCH, *ENCODERS[name][0], generator=generator), th.rand(BATCH, N, ACTION, generator=generator) * 2 - 1


def parameters(algo: Any) -> list[th.Tensor]:
    return list(algo.impl.modules.q_funcs.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_values_and_gradients_are_d3rlpys(name: str) -> None:
    algo = make(name)
    observations, actions = inputs(name)
    repeated = observations.repeat_interleave(N, dim=0)
    theirs = algo.impl._q_func_forwarder.compute_expected_q(repeated, actions.reshape(-1, ACTION), "none").view(-1, BATCH, N)
    ours = algo.impl._q_values(algo.impl._q_func_forwarder, observations, actions)
    assert th.allclose(ours, theirs, rtol=0, atol=1e-6)
    gradients = [th.autograd.grad(th.logsumexp(q, 2).mean(), parameters(algo)) for q in (ours, theirs)]
    for own, their in zip(*gradients, strict=True):
        assert th.allclose(own, their, rtol=0, atol=1e-6 * max(1.0, float(their.abs().max())))
    shifted = algo.impl._q_values(algo.impl._q_func_forwarder, observations, actions + 0.1)
    assert not th.allclose(shifted, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_only_what_is_known_is_taken_apart(name: str) -> None:
    assert (_critics(make(name).impl._q_func_forwarder) is not None) == (name in TAKEN_APART)


def test_convolutions_see_an_image_once() -> None:
    algo = make("image")
    observations, actions = inputs("image")
    seen: list[int] = []
    for critic in algo.impl.modules.q_funcs:
        critic.encoder._cnn_layers[0].register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    algo.impl._q_values(algo.impl._q_func_forwarder, observations, actions)
    assert seen == [BATCH, BATCH]


@pytest.mark.parametrize("name", sorted(TAKEN_APART))
@pytest.mark.parametrize("config", [CQLConfig, CalQLConfig])
def test_bfloat16_is_near_and_not_the_same(config: Any, name: str) -> None:
    observations, actions = inputs(name)
    values = {}
    for precision in ("f32", "bf16"):
        algo = make(name, config, precision=precision)
        values[precision] = algo.impl._q_values(algo.impl._q_func_forwarder, observations, actions, algo.config.precision)
    assert values["bf16"].dtype == th.float32
    assert not th.equal(*values.values())
    assert th.allclose(*values.values(), rtol=0, atol=2**-6 * float(values["f32"].detach().abs().max()))


def test_precision_is_saved_and_checked() -> None:
    config = CQLConfig(precision="bf16")
    assert CQLConfig.deserialize(config.serialize()).precision == "bf16"
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'fp16'"):
        CQLConfig(precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [CQLConfig, CalQLConfig])
def test_warns_where_the_precision_is_slow(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensembles, "multiplies_bf16", lambda: False)
    with pytest.warns(UserWarning, match="precision='bf16' is slow on this processor"):
        make("vector", config, precision="bf16")


def test_update_uses_the_precision() -> None:
    def updated(precision: Any) -> np.ndarray:
        algo = make("vector", precision=precision, batch_size=BATCH)
        rng = np.random.default_rng(0)
        batch = d3rlpy.dataset.TransitionMiniBatch.from_transitions(
            [
                d3rlpy.dataset.Transition(
                    observation=rng.normal(size=4).astype(np.float32),
                    action=rng.uniform(-1, 1, ACTION).astype(np.float32),
                    reward=np.ones(1, np.float32),
                    next_observation=rng.normal(size=4).astype(np.float32),
                    next_action=rng.uniform(-1, 1, ACTION).astype(np.float32),
                    terminal=0.0,
                    interval=1,
                    rewards_to_go=np.ones((1, 1), np.float32),
                )
                for _ in range(BATCH)
            ]
        )
        th.manual_seed(0)
        algo.update(batch)
        return th.cat([p.detach().flatten() for p in parameters(algo)]).numpy()

    exact, again, rough = updated("f32"), updated("f32"), updated("bf16")
    assert (exact == again).all()
    assert (exact != rough).any()
