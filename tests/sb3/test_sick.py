"""Sick runs of the SB3 algorithms: each stops at the step where it became so, with the model from before, and says why."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins import _guards, losses
from cql_plugins.sb3 import (
    CQL,
    CalQL,
    Checkpoints,
    DiscreteCalQL,
    DiscreteCQL,
    NonFiniteError,
    load_checkpoint,
)
from tests.sb3.conftest import of_contrib

CQLQRDQN, CQLTQC, CalQLTQC = of_contrib("CQLQRDQN", "CQLTQC", "CalQLTQC")
CONTINUOUS: list[Any] = [CQL, CalQL, CQLTQC, CalQLTQC]
DISCRETE: list[Any] = [DiscreteCQL, DiscreteCalQL, CQLQRDQN]
EVERY = [*CONTINUOUS, *DISCRETE]
BAD_ROW, AT = 9, 3


@pytest.fixture
def make(host: Any) -> Callable[..., Any]:
    """A model with its data; three good steps are done, so that optimisers have states."""

    def build(algorithm: Any, form: str = "vector", warm_up: int = 3, **changes: Any) -> Any:
        model = host.build(algorithm, form=form, **changes)
        model.set_offline_data(host.collect(form, discrete=algorithm in DISCRETE))
        if warm_up:
            model.train(warm_up, 8)
        return model

    return build


def run(model: Any, host: Any, steps: int = 60) -> tuple[NonFiniteError, dict[str, th.Tensor], list[Any]]:
    """Train until it is sick; return the error, the state before the last step, and what listeners saw."""
    told: list[Any] = []
    model._sick_listeners.append(lambda error: told.append((error, host.state(model), th.get_rng_state())))
    before, noise = host.state(model), th.get_rng_state()
    for _ in range(steps):
        batch = model.sample_batch(8)
        model.sample_batch = lambda _size, batch=batch: batch
        before, noise = host.state(model), th.get_rng_state()
        try:
            model.train(1, 8)
        except NonFiniteError as error:
            del model.sample_batch
            assert th.equal(noise, th.get_rng_state()), "the step could be done again"
            return error, before, told
        del model.sample_batch
    raise AssertionError("never sick")


def poison(model: Any, name: str, at: int) -> None:
    """Make a parameter's gradient not a number in one backward pass."""
    calls = itertools.count(1)
    parameter = dict(model.policy.named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient * np.nan if next(calls) == at else gradient)


# The batch ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize(("field", "value"), [("rewards", np.nan), ("observations", np.inf), ("next_observations", -np.inf)])
def test_a_sick_batch(algorithm: Any, field: str, value: float, make: Any, host: Any) -> None:
    model = make(algorithm)
    column = getattr(model.offline_buffer, field)
    column[BAD_ROW] = value
    error, before, told = run(model, host)
    assert error.tensor == f"batch.{field}"
    assert error.step == model._n_updates + 1
    assert error.rows
    assert (error.stepped, error.is_usable) == ((), True)
    assert f"Gradient step {error.step}: batch.{field} has" in str(error)
    assert f"offline_buffer.{field}[{BAD_ROW}, 0" in str(error)
    assert not host.differing(before, host.state(model))
    assert [each[0] for each in told] == [error]
    assert not host.differing(before, told[0][1])
    column[BAD_ROW] = 0.0
    model.train(20, 8)  # Repaired, it goes on.


def test_a_sick_entry_of_a_dict(make: Any, host: Any) -> None:
    model = make(CalQL, "dict")
    shared = model.offline_buffer.observations["state"]  # gathered from the dataset's own rows, one more in each episode
    shared._leaf = shared._leaf.copy()  # the dataset's own is read-only
    shared._leaf[BAD_ROW + np.searchsorted(shared._offsets, BAD_ROW, side="right") - 1, 1] = np.nan
    error, _, _ = run(model, host)
    assert error.tensor == "batch.observations.state"
    assert f"offline_buffer.observations['state'][{BAD_ROW}, 0, 1]" in str(error)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("algorithm", [CalQL, DiscreteCalQL])
def test_a_sick_return(algorithm: Any, value: float, make: Any, host: Any) -> None:
    model = make(algorithm)
    model.offline_buffer.returns_to_go[BAD_ROW] = value
    error, _, _ = run(model, host)
    assert error.tensor == "batch.returns_to_go"
    assert f"returns_to_go[{BAD_ROW}, 0]" in str(error)


@pytest.mark.parametrize("algorithm", [CalQL, DiscreteCalQL, CalQLTQC])
def test_unknown_returns_are_well(algorithm: Any, make: Any) -> None:
    model = make(algorithm)
    model.offline_buffer.returns_to_go[:] = -np.inf
    model.train(20, 8)
    assert model._n_updates == 23


def test_statistics_that_are_not_finite(make: Any, host: Any) -> None:
    model = make(CQL, env=VecNormalize(host.corridors(), norm_reward=False))
    model._vec_normalize_env.obs_rms.mean[:] = np.nan
    error, _, _ = run(model, host)
    assert error.tensor == "batch.observations"
    assert "What is stored in the buffers is finite." in str(error)
    assert "VecNormalize" in str(error)


def test_online_rows_are_found_in_their_buffer(host: Any) -> None:
    model = host.build(CQL)
    model.learn(30)
    model.replay_buffer.rewards[4] = np.nan
    with pytest.raises(NonFiniteError, match=r"replay_buffer\.rewards\[4, 0\]") as caught:
        model.learn(60, reset_num_timesteps=False)
    assert caught.value.step == model._n_updates + 1


# Losses and gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_loss_beyond_all_numbers(algorithm: Any, make: Any, host: Any) -> None:
    """A reward that is finite, and whose loss or the loss's gradient is not."""
    model = make(algorithm)
    model.offline_buffer.rewards[BAD_ROW] = 3e38
    model.offline_buffer.rewards[BAD_ROW + 1] = 3e38
    if algorithm in DISCRETE:  # Their loss grows linearly: two of these in one batch make a sum that overflows.
        model.offline_buffer.rewards[:] = 3e38
    error, before, told = run(model, host)
    assert error.tensor == ("loss" if algorithm in DISCRETE else "critic_loss")
    assert "3e+38" in str(error)
    if algorithm not in DISCRETE:
        assert f"offline_buffer[{BAD_ROW}, 0]" in str(error) or f"offline_buffer[{BAD_ROW + 1}, 0]" in str(error)
    assert error.stepped == ()
    assert not host.differing(before, host.state(model)), "the temperature, too, is as it was"
    assert not host.differing(before, told[0][1])


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize(
    ("algorithm", "parameter"),
    [
        (CQL, "critic.qf0.2.weight"),
        (CalQL, "critic.qf1.0.bias"),
        (CQLTQC, "critic.qf0.2.weight"),
        (DiscreteCQL, "q_net.q_net.0.weight"),
        (CQLQRDQN, "quantile_net.quantile_net.2.bias"),
    ],
)
def test_a_sick_gradient_of_the_critic(algorithm: Any, parameter: str, warm_up: int, make: Any, host: Any) -> None:
    model = make(algorithm, warm_up=warm_up)
    poison(model, parameter, AT)
    error, before, _ = run(model, host)
    assert (error.step, error.tensor) == (warm_up + AT, f"{parameter}.grad")
    assert model._n_updates == warm_up + AT - 1
    assert error.stepped == ()
    assert len(error.rows) == 3
    assert "offline_buffer[" in str(error)
    assert not host.differing(before, host.state(model))
    model.train(2, 8)


@pytest.mark.parametrize("algorithm", CONTINUOUS)
@pytest.mark.parametrize("multiplier", [None, 1.0])
def test_a_sick_gradient_of_the_actor(algorithm: Any, multiplier: float | None, make: Any, host: Any) -> None:
    model = make(algorithm, cql_lagrange_threshold=multiplier)
    poison(model, "actor.mu.weight", AT)
    error, before, told = run(model, host)
    assert (error.step, error.tensor) == (3 + AT, "actor.mu.weight.grad")
    assert error.stepped == ("critic",)
    assert "of this step, critic had been done, all else is as before" in str(error)
    changed = host.differing(before, host.state(model))
    assert host.networks(changed) == {"critic"}
    assert not any(name.startswith(("actor", "ent_coef", "log_", "lagrange")) for name in changed)
    assert all(value.isfinite().all() for value in told[0][1].values() if value.is_floating_point())


def test_a_sick_multiplier(make: Any, host: Any) -> None:
    model = make(CQL, cql_lagrange_threshold=1.0)
    model.log_cql_lagrange.register_hook(lambda gradient: gradient * np.inf)
    error, before, _ = run(model, host)
    assert error.tensor == "log_cql_lagrange.grad"
    assert error.stepped == ("critic",)
    assert host.networks(host.differing(before, host.state(model))) == {"critic"}


def test_a_policy_that_overflows(make: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses its distribution, before there is any loss."""
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", True)
    model = make(CQL)
    model.actor.mu.weight.data[:, ::2], model.actor.mu.weight.data[:, 1::2] = 3e38, -3e38
    model.actor.latent_pi[0].bias.data[:] = 1e5
    error, before, told = run(model, host)
    assert error.tensor == "actor.mean(observations)"
    assert error.step == 4
    assert isinstance(error.__cause__, ValueError)
    assert not host.differing(before, host.state(model))
    assert told


def test_another_value_error_is_passed_on(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CQL)

    def fails(*_: Any) -> None:
        raise ValueError("the user's own")

    monkeypatch.setattr(model, "_sample_policy", fails)
    with pytest.raises(ValueError, match="the user's own"):
        model.train(1, 8)


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_healthy_run_is_what_it_was(algorithm: Any, make: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the watch and without it: not a bit is different, and no warning is given (the suite makes them errors)."""
    model, plain = make(algorithm, warm_up=0, seed=1), make(algorithm, warm_up=0, seed=1)
    assert not host.differing(host.state(model), host.state(plain))
    np.random.seed(5)
    th.manual_seed(5)
    model.learn_offline(model.offline_buffer, 12, log_interval=4)
    monkeypatch.setattr(algorithm, "_watched_step", lambda self, batch: self._train_step(batch))
    monkeypatch.setattr(algorithm, "_watch_gradients", lambda *_: None)
    np.random.seed(5)
    th.manual_seed(5)
    plain.learn_offline(plain.offline_buffer, 12, log_interval=4)
    assert not host.differing(host.state(model), host.state(plain))
    plain.train(1, 8)
    assert host.differing(host.state(model), host.state(plain))


# Parameters ----------------------------------------------------------------------------------------------------------------


def test_a_sick_parameter_stops_at_the_log_line_and_is_not_saved(make: Any, tmp_path: Path) -> None:
    model = make(CQL, warm_up=0)
    told: list[Any] = []
    model._sick_listeners.append(told.append)
    model.save(tmp_path / "model")
    kept = (tmp_path / "model.zip").read_bytes()
    from stable_baselines3.common.callbacks import BaseCallback

    class Breaks(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 4:
                self.model.critic_target.qf1[0].bias.data[2] = np.nan
            return True

    with pytest.raises(NonFiniteError, match=r"After gradient step 4, critic_target\.qf1\.0\.bias") as caught:
        model.learn_offline(model.offline_buffer, 20, callback=Breaks(), log_interval=4)
    assert (caught.value.step, caught.value.tensor, caught.value.is_usable) == (4, "critic_target.qf1.0.bias", False)
    assert model._n_updates == 4
    assert not told, "nothing to save"
    with pytest.raises(NonFiniteError, match="not worth saving"):
        model.save(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="not worth saving"):
        model.learn_offline(model.offline_buffer, 0, callback=Checkpoints(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.zip"))
    assert (tmp_path / "model.zip").read_bytes() == kept
    assert CQL.load(tmp_path / "model", device="cpu").actor.mu.weight.isfinite().all()


def test_a_loss_of_sick_parameters_blames_the_parameter(make: Any) -> None:
    model = make(CQL)
    model.critic.qf0[0].weight.data[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"qf0\.0\.weight has 1 of") as caught:
        model.train(1, 8)
    assert (caught.value.tensor, caught.value.is_usable) == ("critic.qf0.0.weight", False)


def test_what_the_watch_keeps_is_not_saved_and_can_be_copied(make: Any, tmp_path: Path) -> None:
    model = make(CalQL)
    model._sick_listeners.append(lambda _: None)
    copy.deepcopy(model).train(1, 8)
    model.save(tmp_path / "model")
    loaded = CalQL.load(tmp_path / "model", device="cpu")
    assert loaded._sick_listeners == []
    assert loaded._q_range.high == 0.0


def test_a_checkpoint_from_before_is_written(make: Any, host: Any, tmp_path: Path) -> None:
    """What it holds goes on as the run would have gone on, had the step been well."""
    dataset = host.collect()
    model = make(CalQL, warm_up=0)
    model.set_offline_data(dataset)
    poison(model, "critic.qf0.2.weight", 6)
    with pytest.warns(UserWarning, match="The state before the failed step is in"), pytest.raises(NonFiniteError) as caught:
        model.learn_offline(dataset, 20, callback=Checkpoints(tmp_path, save_freq=0))
    assert caught.value.step == 6
    (path,) = tmp_path.glob("before_failure_*.zip")
    loaded = make(CalQL, warm_up=0, seed=7)
    load_checkpoint(loaded, path)
    assert (loaded._n_updates, loaded._n_offline_steps) == (5, 5)
    assert not host.differing(host.state(model), host.state(loaded))
    loaded.learn_offline(dataset, 2)
    assert host.differing(host.state(model), host.state(loaded))


# As on a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that only note what they meet, with fused optimisers, whose steps can be left out: precision="bf16" has them."""
    for algorithm in EVERY:
        monkeypatch.setattr(algorithm, "_defers", True, raising=False)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(
    ("algorithm", "kind", "parameter"),
    [
        (CQL, "batch", ""),
        (CalQL, "critic_loss", "critic.qf0.2.weight"),
        (CQL, "actor_loss", "actor.mu.weight"),
        (DiscreteCQL, "batch", ""),
        (DiscreteCQL, "loss", "q_net.q_net.0.weight"),
    ],
)
def test_a_device_notes_and_leaves_out(
    algorithm: Any, kind: str, parameter: str, make: Any, host: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(_guards, "LOOK_INTERVAL", 10)
    model = make(algorithm, precision="bf16", warm_up=2)
    if hasattr(model, "_do_not_check_the_policy"):
        model._do_not_check_the_policy()
    told: list[Any] = []
    model._sick_listeners.append(told.append)
    states, batches = [host.state(model)], []
    if parameter:
        poison(model, parameter, 4)
    sample = model.sample_batch

    def sampled(size: int) -> Any:
        batch = sample(size)
        states.append(host.state(model))
        if kind == "batch" and len(batches) == 3:
            batch.rewards[2] = np.nan
        batches.append(batch)
        return batch

    monkeypatch.setattr(model, "sample_batch", sampled)
    with pytest.raises(NonFiniteError) as caught:
        model.train(30, 8)
    error = caught.value
    assert len(batches) == 8, "looked at after ten steps, two of them before"
    assert (error.step, error.tensor, error.is_usable) == (6, kind, True)
    assert model._n_updates == 5
    assert told == [error]
    before = states[4]  # of the fourth step's start
    # What comes before it in a step is done, once; target networks go on towards critics that stand still.
    done = {"batch": [], "loss": [], "critic_loss": ["ent_coef"], "actor_loss": ["ent_coef", "critic"]}[kind]
    assert error.stepped == (*done, "targets")
    changed = host.differing(before, host.state(model))
    assert host.networks(changed) - {"critic_target", "q_net_target"} == ({"critic"} if "critic" in done else set())
    others = {name.split(".")[0] for name in changed if not name.startswith("policy.")}
    assert others == set(done) | ({"log_ent_coef"} if done else set())
    monkeypatch.setattr(model, "sample_batch", sample)
    model.train(10, 8)
    assert model._n_updates == 15, "read, it goes on"


@pytest.mark.usefixtures("deferred")
def test_a_device_is_asked_at_log_lines(make: Any) -> None:
    model = make(CQL, precision="bf16", warm_up=0)
    poison(model, "critic.qf0.2.weight", 3)
    with pytest.raises(NonFiniteError, match="Gradient step 3: critic_loss or its gradient"):
        model.learn_offline(model.offline_buffer, 20, log_interval=5)
    assert model._n_offline_steps == 5


@pytest.mark.usefixtures("deferred")
@pytest.mark.filterwarnings("ignore:The state before the failed step is in")
@pytest.mark.parametrize("end", ["save", "callback", "learn_offline", "learn", "rank"])
def test_a_device_is_asked_before_a_model_is_saved_and_at_the_end(end: str, make: Any, tmp_path: Path) -> None:
    """A model that stands still since a step that was not finite looks as healthy as any."""
    model = make(CQL, precision="bf16", warm_up=0)
    if end == "rank":
        model._ranks = SimpleNamespace(average=lambda _: None)  # The others are not there when one saves: they cannot be asked.
    poison(model, "critic.qf0.2.weight", 5)
    path = tmp_path / "model.zip"
    model.train(4, 8)
    model.save(path)
    kept = path.read_bytes()
    data = model.offline_buffer
    train = {
        "callback": lambda: model.learn_offline(data, 9, callback=Checkpoints(tmp_path, save_freq=3)),
        "learn_offline": lambda: model.learn_offline(data, 9, callback=Checkpoints(tmp_path, save_freq=0)),
        "learn": lambda: model.learn(20, log_interval=1000),
    }.get(end, lambda: model.train(4, 8) or model.save(path))
    with pytest.raises(NonFiniteError, match="Gradient step 5: critic_loss or its gradient"):
        train()
    assert model._n_updates == 4
    assert path.read_bytes() == kept
    assert {file.name.rpartition("_")[0] for file in tmp_path.glob("*_*.zip")} <= {"before_failure_offline"}
    model._ranks = None
    model.save(path)  # It was said; the model is the one from before.


@pytest.mark.usefixtures("deferred")
def test_optimisers_that_cannot_wait_are_said_to_have_gone_on(make: Any) -> None:
    model = make(CQL, warm_up=0)  # single precision: not fused
    model._do_not_check_the_policy()
    poison(model, "critic.qf0.2.weight", 3)
    with pytest.raises(NonFiniteError, match="load a checkpoint") as caught:
        model.learn_offline(model.offline_buffer, 20, log_interval=5)
    assert (caught.value.step, caught.value.is_usable) == (3, False)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("algorithm", EVERY)
def test_noting_changes_nothing(algorithm: Any, make: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for watched in (True, False):
        model = make(algorithm, precision="bf16", warm_up=0, seed=1)
        if not watched:
            monkeypatch.setattr(algorithm, "_watched_step", lambda self, batch: self._train_step(batch))
            monkeypatch.setattr(algorithm, "_watch_gradients", lambda *_: None)
            monkeypatch.setattr(algorithm, "_prepare_watch", lambda _: None)
        model.train(5, 8)
        assert model._watch.stepped == [], "nothing is kept on the host"
        states.append(host.state(model))
    assert not host.differing(*states)


# Q and the multiplier --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [CQL, DiscreteCQL])
def test_impossible_values_are_said_once(algorithm: Any, make: Any) -> None:
    model = make(algorithm)
    layer = model.critic.qf0[-1] if algorithm is CQL else model.q_net.q_net[-1]
    limit = 3 * (np.abs(model.offline_buffer.rewards).max() / 0.01) + 1
    model._record_metrics()
    layer.bias.data[:] = float(4 * limit)
    if algorithm is CQL:
        model.critic.qf1[-1].bias.data[:] = float(4 * limit)
    model.train(1, 8)
    with pytest.warns(UserWarning, match=r"q_data is .* at gradient step 4, .* Try a larger cql_alpha"):
        model._record_metrics()
    model.train(1, 8)
    model._record_metrics()


def test_normalised_rewards_have_a_range_of_their_own(make: Any, host: Any) -> None:
    """Rewards of 100 that VecNormalize divides by 100: a Q of 1000 is far too much, a range of raw rewards would allow it."""
    env = VecNormalize(host.corridors(), norm_obs=False)
    model = make(CQL, env=env)
    env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count = np.zeros(()), np.full((), 1e4), 1e6
    model.offline_buffer.rewards[:] = 100.0
    model._record_metrics()
    assert model._q_range.high == pytest.approx(100.0, rel=1e-3)
    env.norm_reward = False
    model.train(1, 8)
    model._record_metrics()
    assert model._q_range.high == pytest.approx(1e4, rel=1e-3)


def test_an_entropy_bonus_widens_the_range(make: Any) -> None:
    plain, soft = make(CQL), make(CQL, backup_entropy=True)
    for model in (plain, soft):
        model.train(1, 8)
        model._record_metrics()
    assert plain._entropy_bonus() == 0.0
    # One action: log 2 or the target of -1, times the coefficient, over 1 - gamma.
    assert soft._entropy_bonus() == pytest.approx(soft.logger.name_to_value["train/ent_coef"])
    assert soft._q_range.high == pytest.approx(plain._q_range.high + 100 * soft._entropy_bonus())


def test_the_clamp_is_said_after_many_steps(make: Any) -> None:
    """The mean of many float32 numbers is off by their rounding."""
    model = make(CQL, cql_lagrange_threshold=-50.0)
    model._q_range.has_warned = True
    model._record_metrics()
    model.logger.record("train/cql_alpha", losses.LAGRANGE_MAX * (1 - 1e-5))
    with pytest.warns(UserWarning, match="Raise the threshold, or set normalize_gap=True"):
        model._record_metrics()
