"""Sick runs of the d3rlpy algorithms: each stops at the step where it became so, with the model from before, and says why."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import pytest
import torch as th
from d3rlpy.dataset import create_fifo_replay_buffer
from d3rlpy.logging import NoopAdapterFactory
from gymnasium import spaces

from cql_plugins import _guards
from cql_plugins.adapters import from_arrays, to_d3rlpy
from cql_plugins.d3rlpy import (
    CalQLConfig,
    Checkpoints,
    CQLConfig,
    DiscreteCalQLConfig,
    DiscreteCQLConfig,
    NonFiniteError,
    load_checkpoint,
    save_checkpoint,
)
from cql_plugins.d3rlpy.online import OfflineOnlineReplayBuffer, ReturnsToGoReplayBuffer

CONTINUOUS: list[Any] = [CQLConfig, CalQLConfig]
DISCRETE: list[Any] = [DiscreteCQLConfig, DiscreteCalQLConfig]
EVERY = [*CONTINUOUS, *DISCRETE]
BATCH, BAD_ROW = 8, 13


def data_for(config: Any, n: int = 40) -> Any:
    """Four episodes of ten steps, each second one cut off."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(n // 10, 11, 3)).astype(np.float32)
    last, cut = np.arange(n) % 10 == 9, np.arange(n) % 20 == 19
    dataset = from_arrays(
        states[:, :-1].reshape(n, 3),
        rng.integers(3, size=n) if config in DISCRETE else rng.uniform(-1, 1, size=(n, 2)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        last & ~cut,
        cut,
        next_observations=states[:, 1:].reshape(n, 3),
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=spaces.Discrete(3) if config in DISCRETE else spaces.Box(-1.0, 1.0, (2,), np.float32),
    )
    buffer = to_d3rlpy(dataset)
    buffer._rewards, buffer._observations = buffer._rewards.copy(), buffer._observations.copy()
    return buffer


def make(config: Any, data: Any, warm_up: int = 3, **changes: Any) -> Any:
    """A small algorithm; some good updates are done, so that optimisers have states."""
    encoder = d3rlpy.models.VectorEncoderFactory([8])
    sizes: dict[str, Any] = {"batch_size": BATCH}
    if config in CONTINUOUS:
        sizes |= {"actor_encoder_factory": encoder, "critic_encoder_factory": encoder, "n_action_samples": 2}
    else:
        sizes |= {"encoder_factory": encoder}
    algo = config(**(sizes | changes)).create(device="cpu")
    algo.build_with_dataset(data)
    algo.set_offline_data(data)
    for _ in range(warm_up):
        algo.update(data.sample_transition_batch(BATCH))
    return algo


def state(algo: Any) -> dict[str, th.Tensor]:
    """Copy every tensor that training changes."""

    def leaves(tree: Any, name: str) -> Iterator[tuple[str, th.Tensor]]:
        if isinstance(tree, th.Tensor):
            yield name, tree.detach().clone()
        elif isinstance(tree, (dict, list)):
            for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
                yield from leaves(branch, f"{name}.{key}")

    modules = algo.impl.modules.create_checkpointer("cpu").modules
    return dict(leaf for name, module in modules.items() for leaf in leaves(module.state_dict(), name))


def changed(before: dict[str, th.Tensor], after: dict[str, th.Tensor]) -> set[str]:
    """The modules whose tensors are not the same to the last bit."""
    names = {name for name in before.keys() & after.keys() if not th.equal(before[name], after[name])}
    return {name.split(".")[0] for name in names | (before.keys() ^ after.keys())}


def run(algo: Any, data: Any, updates: int = 60) -> tuple[NonFiniteError, dict[str, th.Tensor], list[Any]]:
    told: list[Any] = []
    algo._sick_listeners.append(lambda error: told.append((error, state(algo))))
    for _ in range(updates):
        batch = data.sample_transition_batch(BATCH)
        before, noise = state(algo), th.get_rng_state()
        try:
            algo.update(batch)
        except NonFiniteError as error:
            assert th.equal(noise, th.get_rng_state()), "the step could be done again"
            return error, before, told
    raise AssertionError("never sick")


def poison(algo: Any, module: str, parameter: str, at: int) -> None:
    """Make a parameter's gradient not a number in one backward pass.

    The actor's pass goes through critic and temperature, too: they have two in each update.
    """
    calls = itertools.count(1)
    found = dict(getattr(algo.impl.modules, module).named_parameters())[parameter]
    found.register_hook(lambda gradient: gradient * np.nan if next(calls) == at else gradient)


# The batch ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", EVERY)
@pytest.mark.parametrize(("field", "value"), [("rewards", np.nan), ("observations", np.inf)])
def test_a_sick_batch(config: Any, field: str, value: float) -> None:
    data = data_for(config)
    algo = make(config, data)
    column = getattr(data, f"_{field}")
    column[BAD_ROW + (field == "observations")] = value  # each episode has one observation more
    if field == "rewards":
        data._returns = data.returns_to_go  # what is known of them is not what is tested
        data._look_up = lambda rows, _: np.zeros(len(rows), dtype=np.float32)
    error, before, told = run(algo, data)
    assert error.tensor in ({f"batch.{field}", "batch.next_observations"} if field == "observations" else {f"batch.{field}"})
    assert error.step == algo._grad_step + 1
    assert "step 3 of episode 1)" in str(error) or (field == "observations" and "step 2 of episode 1)" in str(error))
    assert (error.stepped, error.is_usable) == ((), True)
    assert not changed(before, state(algo))
    assert [each[0] for each in told] == [error]
    assert not changed(before, told[0][1])
    column[:] = 0.0
    algo.update(data.sample_transition_batch(BATCH))


@pytest.mark.parametrize("config", [CalQLConfig, DiscreteCalQLConfig])
@pytest.mark.parametrize(("value", "is_sick"), [(np.nan, True), (np.inf, True), (-np.inf, False)])
def test_returns(config: Any, value: float, is_sick: bool) -> None:
    data = data_for(config)
    algo = make(config, data)
    data._look_up = lambda rows, _: np.where(rows == BAD_ROW, value, 0.0).astype(np.float32)
    if is_sick:
        error, _, _ = run(algo, data)
        assert error.tensor == "batch.returns_to_go"
        assert f"row {BAD_ROW} (step 3 of episode 1)" in str(error)
    else:
        for _ in range(20):
            algo.update(data.sample_transition_batch(BATCH))


def test_rows_of_d3rlpys_own_buffer_are_searched_for() -> None:
    data = data_for(CQLConfig)
    own = d3rlpy.dataset.create_infinite_replay_buffer(
        [d3rlpy.dataset.Episode(e.observations, e.actions, e.rewards.copy(), e.terminated) for e in data.episodes]
    )
    algo = make(CQLConfig, own)
    own.episodes[1].rewards[3] = np.nan
    error, _, _ = run(algo, own)
    assert error.tensor == "batch.rewards"
    assert "episodes[1].rewards[3, 0]" in str(error)


def test_rows_of_a_mixture_are_those_of_their_buffer() -> None:
    data = data_for(CQLConfig)
    online = ReturnsToGoReplayBuffer(create_fifo_replay_buffer(100, episodes=list(data.episodes)))
    mixed = OfflineOnlineReplayBuffer(online, data, 0.5)
    batch = mixed.sample_transition_batch(BATCH)
    assert "of episode" in batch.place_of(0)
    assert "of this buffer" in batch.place_of(3)
    assert batch.place_of(4).startswith("row ")
    row = int(batch.place_of(7).split()[1])
    np.testing.assert_array_equal(batch.rewards[7], data._rewards[row])


# Losses and gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", EVERY)
def test_a_loss_beyond_all_numbers(config: Any) -> None:
    data = data_for(config)
    algo = make(config, data)
    data._rewards[:] = 3e38
    error, before, _ = run(algo, data)
    assert error.tensor == ("loss" if config in DISCRETE else "critic_loss")
    assert "reward 3e+38" in str(error)
    assert "of episode" in str(error)
    assert not changed(before, state(algo))


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("conventions", ["paper", "d3rlpy"])
@pytest.mark.parametrize("config", CONTINUOUS)
def test_a_sick_gradient_of_the_critic(config: Any, conventions: Any, warm_up: int) -> None:
    data = data_for(config)
    # Where d3rlpy's conventions step the multiplier first, it is brought back.
    algo = make(config, data, warm_up, conventions=conventions, alpha_learning_rate=1e-2)
    poison(algo, "q_funcs", "0._encoder._layers.0.weight", 5)
    error, before, _ = run(algo, data)
    assert (error.step, error.tensor) == (warm_up + 3, "q_funcs.0._encoder._layers.0.weight.grad")
    assert algo._grad_step == warm_up + 2
    assert (error.stepped, len(error.rows)) == ((), 3)
    assert not changed(before, state(algo))
    algo.update(data.sample_transition_batch(BATCH))


@pytest.mark.parametrize("config", CONTINUOUS)
def test_a_sick_gradient_of_the_actor(config: Any) -> None:
    data = data_for(config)
    algo = make(config, data, alpha_learning_rate=1e-2)
    poison(algo, "policy", "_mu.weight", 3)
    error, before, told = run(algo, data)
    assert (error.step, error.tensor) == (6, "policy._mu.weight.grad")
    assert error.stepped == ("critic",)
    assert changed(before, state(algo)) == {"q_funcs", "critic_optim"}, "temperature and multiplier were brought back"
    assert all(value.isfinite().all() for value in told[0][1].values())


@pytest.mark.parametrize("config", DISCRETE)
def test_a_sick_gradient_of_a_discrete_critic(config: Any) -> None:
    data = data_for(config)
    algo = make(config, data)
    poison(algo, "q_funcs", "0._fc.weight", 3)
    error, before, _ = run(algo, data)
    assert (error.step, error.tensor) == (6, "q_funcs.0._fc.weight.grad")
    assert not changed(before, state(algo))


def test_a_sick_temperature() -> None:
    data = data_for(CQLConfig)
    algo = make(CQLConfig, data)
    poison(algo, "log_temp", "_parameter", 3)
    error, before, _ = run(algo, data)
    assert (error.step, error.tensor) == (5, "actor_loss"), "which uses the temperature after its step"
    assert changed(before, state(algo)) == {"q_funcs", "critic_optim"}


@pytest.mark.parametrize("config", EVERY)
def test_a_healthy_run_is_what_it_was(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_for(config)
    ours, plain = (make(config, data, warm_up=0) for _ in range(2))
    for module, twin in zip(
        ours.impl.modules.get_torch_modules().values(), plain.impl.modules.get_torch_modules().values(), strict=True
    ):
        twin.load_state_dict(module.state_dict())
    batches = [data.sample_transition_batch(BATCH) for _ in range(6)]
    for algo in (ours, plain):
        if algo is plain:
            monkeypatch.setattr("cql_plugins.d3rlpy.watch.Watch.step", lambda _, update, batch, n: update(batch, n))
            for name in ("_compute_critic_grad", "_compute_actor_grad", "_compute_grad"):
                if hasattr(algo.impl, name):
                    setattr(algo.impl, name, getattr(algo.impl, name).args[1])
        th.manual_seed(3)
        for batch in batches[:5]:
            algo.update(batch)
    assert not changed(state(ours), state(plain))
    plain.update(batches[5])
    assert changed(state(ours), state(plain))


# Parameters ----------------------------------------------------------------------------------------------------------------


def test_sick_parameters_are_not_saved(tmp_path: Path) -> None:
    data = data_for(CQLConfig)
    algo = make(CQLConfig, data)
    algo.save(str(tmp_path / "algo.d3"))
    kept = (tmp_path / "algo.d3").read_bytes()
    algo.impl.modules.targ_q_funcs[1]._fc.bias.data[0] = np.nan
    for save in (algo.save, algo.save_model, lambda path: save_checkpoint(algo, f"{path}.zip")):
        with pytest.raises(NonFiniteError, match=r"After gradient step 3, .* not worth saving") as caught:
            save(str(tmp_path / "algo.d3"))
        assert (caught.value.tensor, caught.value.is_usable) == ("targ_q_funcs.1._fc.bias", False)
    assert (tmp_path / "algo.d3").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["algo.d3"]
    with pytest.raises(NonFiniteError, match=r"targ_q_funcs\.1\._fc\.bias"):
        algo.update(data.sample_transition_batch(BATCH))


def test_parameters_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cql_plugins.d3rlpy.watch._PARAMETER_INTERVAL", 5)
    data = data_for(CQLConfig)
    algo = make(CQLConfig, data)
    update = type(algo.impl).update_critic_target

    def breaks(impl: Any) -> None:
        update(impl)
        impl.modules.targ_q_funcs[0]._fc.bias.data[0] = np.nan

    algo.update(data.sample_transition_batch(BATCH))
    monkeypatch.setattr(type(algo.impl), "update_critic_target", breaks)
    with pytest.raises(NonFiniteError, match="After gradient step 5"):
        algo.update(data.sample_transition_batch(BATCH))


def test_fit_stops_and_a_copy_goes_on() -> None:
    data = data_for(CQLConfig)
    algo = make(CQLConfig, data)
    twin = copy.deepcopy(algo)
    assert twin.impl.watch.data_values.__self__ is twin.impl
    assert twin.impl._compute_critic_grad.args[1].__self__ is twin.impl
    rewards = data._rewards.copy()
    data._rewards[:] = np.nan
    quiet = {"n_steps": 5, "n_steps_per_epoch": 5, "logger_adapter": NoopAdapterFactory(), "show_progress": False}
    with pytest.raises(NonFiniteError, match="Gradient step 4"):
        algo.fit(data, **quiet)
    data._rewards[:] = rewards
    twin.fit(data, **quiet)


# As on a GPU, and Q ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "kind"), [(CQLConfig, "critic_loss"), (DiscreteCQLConfig, "loss")])
def test_a_device_is_read_with_the_losses(config: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cql_plugins.d3rlpy.watch.Watch._defers", True)
    data = data_for(config)
    algo = make(config, data)
    data._rewards[:] = 3e38
    told: list[Any] = []
    algo._sick_listeners.append(told.append)
    with pytest.raises(NonFiniteError, match=f"Gradient step 4: {kind} or its gradient .* seen after the step") as caught:
        algo.update(data.sample_transition_batch(BATCH))
    assert (caught.value.step, caught.value.tensor) == (4, kind)
    assert told == ([caught.value] if caught.value.is_usable else [])


def test_a_gradient_on_a_device_is_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cql_plugins.d3rlpy.watch.Watch._defers", True)
    monkeypatch.setattr(_guards, "LOOK_INTERVAL", 10)
    data = data_for(DiscreteCQLConfig)
    algo = make(DiscreteCQLConfig, data, warm_up=0)
    # A gradient that is not finite, of a layer whose output is not used later: the losses stay finite.
    calls = itertools.count(1)
    fc = algo.impl.modules.q_funcs[0]._fc
    fc.bias.register_hook(lambda gradient: gradient * np.nan if next(calls) == 4 else gradient)
    step = type(algo.impl._modules.optim).step
    monkeypatch.setattr(type(algo.impl._modules.optim), "step", lambda own: fc.bias.grad.nan_to_num_(0.0) is None or step(own))
    for _ in range(9):
        algo.update(data.sample_transition_batch(BATCH))
    with pytest.raises(NonFiniteError, match="Gradient step 4: loss or its gradient") as caught:
        algo.update(data.sample_transition_batch(BATCH))
    assert caught.value.is_usable


@pytest.mark.parametrize("config", [CQLConfig, DiscreteCQLConfig])
def test_impossible_values_are_said_once(config: Any) -> None:
    data = data_for(config)
    algo = make(config, data, warm_up=0)
    algo._grad_step = 98
    for _ in range(2):
        algo.update(data.sample_transition_batch(BATCH))
    assert algo.impl.watch.q_range.high > 10.0
    for q_func in algo.impl.modules.q_funcs:
        q_func._fc.bias.data += 1e5
    algo._grad_step = 199
    name = "conservative_weight" if config is CQLConfig else "alpha"
    with pytest.warns(UserWarning, match=rf"q_data is .* at gradient step 200, .* Try a larger {name}"):
        algo.update(data.sample_transition_batch(BATCH))
    algo._grad_step = 299
    algo.update(data.sample_transition_batch(BATCH))


def test_scaled_rewards_have_a_range_of_their_own() -> None:
    data = data_for(CQLConfig)
    ranges = []
    for scaler in (None, d3rlpy.preprocessing.MultiplyRewardScaler(10.0)):
        np.random.seed(1)
        algo = make(CQLConfig, data, warm_up=0, reward_scaler=scaler)
        algo._grad_step = 99
        np.random.seed(2)
        algo.update(data.sample_transition_batch(BATCH))
        ranges.append(algo.impl.watch.q_range.high)
    assert ranges[1] == pytest.approx(10 * ranges[0], rel=1e-5)


@pytest.mark.parametrize("config", [CalQLConfig, DiscreteCQLConfig])
def test_a_run_with_checkpoints_keeps_the_state_from_before(config: Any, tmp_path: Path) -> None:
    data = data_for(config)
    algo = make(config, data)
    checkpoints = Checkpoints(tmp_path, every_steps=2)
    data._rewards[BAD_ROW] = np.nan
    arguments = {"n_steps": 60, "n_steps_per_epoch": 60, "logger_adapter": NoopAdapterFactory(), "show_progress": False}
    with pytest.warns(UserWarning, match="The state before the failed step"), pytest.raises(NonFiniteError):
        algo.fit(data, callback=checkpoints, **arguments)
    (path,) = tmp_path.glob("before_failure_*.zip")
    assert path not in checkpoints.paths()
    found = load_checkpoint(path)
    assert found.grad_step == algo.grad_step
    assert found.resume_point is None
    names = algo.impl.modules.q_funcs.state_dict()
    assert all(th.equal(value, found.impl.modules.q_funcs.state_dict()[name]) for name, value in names.items())
    assert all(value.isfinite().all() for value in names.values())


def test_a_run_with_checkpoints_keeps_nothing_of_sick_parameters(tmp_path: Path) -> None:
    data = data_for(CQLConfig)
    algo = make(CQLConfig, data)
    algo.impl.modules.q_funcs[0]._fc.bias.data[:] = np.nan
    arguments = {"n_steps": 4, "n_steps_per_epoch": 4, "logger_adapter": NoopAdapterFactory(), "show_progress": False}
    with pytest.raises(NonFiniteError, match="not worth saving") as caught:
        algo.fit(data, callback=Checkpoints(tmp_path, every_steps=2), **arguments)
    assert caught.value.__context__ is None, "told once"
    assert not list(tmp_path.glob("*.zip"))
