"""Saving and loading: SB3's topic save_load, and what a model that also learns offline adds to it."""

from __future__ import annotations

import inspect
import io
import json
import math
import tempfile
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from cql_plugins.sb3 import CQL, CalQL

pytestmark = pytest.mark.parametrize("algorithm", [CQL, CalQL])


def _observations(host: Any, form: str = "vector", n: int = 6) -> Any:
    env = host.Corridor(form)
    env.reset(seed=2)
    return np.stack([env.step(np.array([0.3 * k], dtype=np.float32))[0] for k in range(n)])


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"ent_coef": 0.1}, {"cql_lagrange_threshold": 1.0}, {"use_sde": True}])
@pytest.mark.parametrize("phases", ["online", "offline"])
def test_a_loaded_model_is_the_saved_one(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, arguments: dict[str, Any], phases: str
) -> None:
    model = host.build(algorithm, learning_rate=1e-3, **arguments)
    fresh = host.state(model)
    if phases == "online":
        model.learn(16)
    else:
        model.learn_offline(dataset, 6)
    observations = _observations(host)
    expected = model.predict(observations, deterministic=True)[0]
    model.save(tmp_path / "model.zip")

    for env in (None, model.get_env()):
        again = algorithm.load(str(tmp_path / "model.zip"), env=env, device="cpu")
        # Networks, targets, optimiser states, entropy and Lagrange variables: everything that training changes.
        assert not host.differing(host.state(model), host.state(again))
        np.testing.assert_array_equal(again.predict(observations, deterministic=True)[0], expected)
        assert (again._n_updates, again.num_timesteps) == (model._n_updates, model.num_timesteps)
    assert host.differing(fresh, host.state(again))

    # It goes on as the model that was never saved.
    for learner in (model, again):
        learner.set_random_seed(1)
        learner.learn_offline(dataset, 4)
    assert not host.differing(host.state(model), host.state(again))
    again.learn(20)
    assert again._n_updates > model._n_updates


@pytest.mark.parametrize("form", ["image", "dict", "goal"])
def test_a_loaded_model_of_other_observations(algorithm: Any, host: Any, tmp_path: Path, form: str) -> None:
    model = host.build(algorithm, form=form)
    model.learn_offline(host.collect(form), 2)
    observation, _ = host.Corridor(form).reset(seed=1)
    expected = model.predict(observation, deterministic=True)[0]
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=host.corridors(form=form))
    assert not host.differing(host.state(model), host.state(again))
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)
    again.learn(12)


def test_every_option_survives(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "actor_learning_rate": 2e-4,
        "cql_alpha": 3.0,
        "cql_n_actions": 4,
        "cql_variant": "rho",
        "cql_temperature": 2.0,
        "cql_lagrange_threshold": 7.0,
        "cql_clip_diff": (-200.0, math.inf),
        "normalize_gap": True,
        "max_q_backup": algorithm is CQL,  # not its default
        "backup_entropy": True,
        "bc_steps": 9,
        "offline_fraction": "proportional",
        "cql_alpha_online": 0.5,
    }
    if algorithm is CalQL:
        options |= {"return_tail": "none", "calibrate_random": True}
    model = host.build(algorithm, **options)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    # SB3's files are JSON, which has no tuples.
    options["cql_clip_diff"] = list(options["cql_clip_diff"])
    assert {name: getattr(again, name) for name in options} == options
    again.learn_offline(dataset, 1)
    host.build(algorithm, max_q_backup=False, mode_q_backup=True).save(tmp_path / "mode")
    assert algorithm.load(tmp_path / "mode").mode_q_backup
    # An option given to load() replaces the saved one.
    assert algorithm.load(tmp_path / "model", cql_alpha=1.0).cql_alpha == 1.0


def test_cql_and_calql_load_each_others_files(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = host.build(algorithm)
    model.learn_offline(dataset, 2)
    model.save(tmp_path / "model")
    other = {CQL: CalQL, CalQL: CQL}[algorithm].load(tmp_path / "model", env=model.get_env())
    assert not host.differing(host.state(model), host.state(other))
    other.learn_offline(dataset, 2).learn(12)


# Parameters -----------------------------------------------------------------------------------------------------------


def test_get_and_set_parameters(algorithm: Any, host: Any) -> None:
    model = host.build(algorithm, cql_lagrange_threshold=1.0)
    model.learn(14)
    original = deepcopy(model.get_parameters())
    names = {"policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer", "cql_lagrange_optimizer"}
    assert set(original) == names

    for exact_match in (True, False):
        with pytest.raises(ValueError, match="invalid object name"):
            model.set_parameters({**original, "nobody": {}}, exact_match=exact_match)
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({name: original[name] for name in list(original)[:-1]}, exact_match=True)
    incomplete = {**original, "policy": dict(list(original["policy"].items())[:-1])}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters(incomplete, exact_match=True)

    last = list(original["policy"])[-1]
    drawn = {name: th.rand_like(value) for name, value in original["policy"].items() if name != last}
    model.set_parameters({"policy": drawn}, exact_match=False)
    now = model.get_parameters()["policy"]
    assert {name for name in now if not th.equal(now[name], original["policy"][name])} == set(drawn)
    model.set_parameters(original, exact_match=True)
    assert not any(not th.equal(value, original["policy"][name]) for name, value in model.policy.state_dict().items())


def test_parameters_of_a_file(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = host.build(algorithm)
    model.learn_offline(dataset, 3)
    model.save(tmp_path / "model.zip")
    other = host.build(algorithm, seed=4)
    other.set_parameters(str(tmp_path / "model.zip"))
    # SB3 keeps log_ent_coef apart from the parameters.
    assert host.differing(host.state(model), host.state(other)) == {"log_ent_coef"}


def test_the_actor_of_cql_starts_sac_and_back(algorithm: Any, host: Any) -> None:
    model, sac = host.build(algorithm, seed=1), host.build(SAC, seed=2)
    sac.set_parameters(model.get_parameters())
    assert not host.differing(dict(model.policy.state_dict()), dict(sac.policy.state_dict()))
    model.set_parameters(host.build(SAC, seed=3).get_parameters())


def test_a_compiled_policy_is_saved(algorithm: Any, host: Any, tmp_path: Path) -> None:
    if "_orig_mod" not in inspect.getsource(SAC.get_parameters):
        pytest.skip("this Stable-Baselines3 saves a compiled policy under other names")
    model = host.build(algorithm)
    plain = host.state(model)
    model.policy = th.compile(model.policy, backend="eager")  # compiles nothing before its first call
    model.save(tmp_path / "model")
    assert not host.differing(plain, host.state(algorithm.load(tmp_path / "model")))


# Torch variables ------------------------------------------------------------------------------------------------------


def test_entropy_coefficient(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm)
    model.learn(16)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=model.get_env())
    saved = model.log_ent_coef.item()
    assert again.log_ent_coef.item() == saved != 0.0
    again.learn(16)
    assert again.log_ent_coef.item() != saved

    fixed = host.build(algorithm, ent_coef=0.02)
    fixed.learn(12)
    fixed.save(tmp_path / "fixed")
    again = algorithm.load(tmp_path / "fixed", env=fixed.get_env())
    again.learn(12)
    assert again.log_ent_coef is None
    assert again.ent_coef_tensor.item() == pytest.approx(0.02)


def test_lagrange_multiplier(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = host.build(algorithm, cql_lagrange_threshold=1.0)
    assert model.log_cql_lagrange.item() == 1.0
    model.learn_offline(dataset, 5)
    saved = model.log_cql_lagrange.item()
    assert saved != 1.0
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    assert again.log_cql_lagrange.item() == saved
    assert again.log_cql_lagrange.requires_grad
    again.learn_offline(dataset, 2)
    assert again.log_cql_lagrange.item() != saved
    # The loaded optimiser steps the loaded variable, with the moments of the five steps before.
    (moments,) = again.cql_lagrange_optimizer.state.values()
    assert moments["step"] == 7


def test_the_lagrange_threshold_can_be_set_and_taken_away(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    """A model that was built without it trains on as one that had it from there on, and the other way round."""
    model = host.build(algorithm).learn_offline(dataset, 3)
    plain = host.state(model)
    model.cql_lagrange_threshold = 1.0
    assert model.log_cql_lagrange.item() == 1.0
    model.learn_offline(dataset, 3)
    multiplier = model.log_cql_lagrange
    assert multiplier.item() != 1.0
    model.cql_lagrange_threshold = 2.0
    assert model.log_cql_lagrange is multiplier, "another number goes on with the multiplier"
    model.save(tmp_path / "with")
    assert algorithm.load(tmp_path / "with").log_cql_lagrange.item() == multiplier.item()

    model.cql_lagrange_threshold = None
    assert model.log_cql_lagrange is None
    assert host.state(model).keys() >= plain.keys()
    model.learn_offline(dataset, 3)
    model.save(tmp_path / "without")
    assert algorithm.load(tmp_path / "without").cql_lagrange_threshold is None
    assert "cql_lagrange_optimizer" not in model.get_parameters()


@pytest.mark.parametrize(("saved", "asked"), [(None, 5.0), (5.0, None), (5.0, 7.0)])
def test_the_lagrange_threshold_given_to_load(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, saved: float | None, asked: float | None
) -> None:
    model = host.build(algorithm, cql_lagrange_threshold=saved).learn_offline(dataset, 3)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", cql_lagrange_threshold=asked)
    assert again.cql_lagrange_threshold == asked
    assert {name for name in host.differing(host.state(model), host.state(again)) if "lagrange" not in name} == set()
    assert (again.log_cql_lagrange is None) == (asked is None)
    if saved is not None and asked is not None:
        assert again.log_cql_lagrange.item() == model.log_cql_lagrange.item()
    again.learn_offline(dataset, 2)


# Schedules ------------------------------------------------------------------------------------------------------------


def test_schedules_survive(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    schedules = {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "actor_learning_rate": lambda left: 1e-4 + 1e-3 * left}
    model = host.build(algorithm, cql_lagrange_threshold=1.0, **schedules)
    model.learn_offline(dataset, 2)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=model.get_env())
    for left in (1.0, 0.5, 0.0):
        assert type(again.lr_schedule(left)) is type(again.actor_lr_schedule(left)) is float
        assert again.lr_schedule(left) == pytest.approx(1e-3 + 9e-3 * left)
        assert again.actor_lr_schedule(left) == pytest.approx(1e-4 + 1e-3 * left)
    again.learn(20)
    assert again.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert again.cql_lagrange_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert again.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert again.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("actor_learning_rate", [1e-4, None])
def test_learning_rates_given_to_load(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, actor_learning_rate: Any
) -> None:
    model = host.build(algorithm, actor_learning_rate=actor_learning_rate)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (model.critic.optimizer, model.actor.optimizer)]
    assert [*rates, model.ent_coef_optimizer.param_groups[0]["lr"]] == [3e-4] + [actor_learning_rate or 3e-4] * 2
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", learning_rate=2e-3)
    again.learn_offline(dataset, 1)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (again.critic.optimizer, again.actor.optimizer)]
    assert rates == [2e-3, actor_learning_rate or 2e-3]


# What goes into the file -----------------------------------------------------------------------------------------------


def test_exclude_include_and_custom_objects(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm, verbose=0, cql_alpha=2.5)
    model.verbose = 2
    model.save(tmp_path / "model", exclude=["verbose", "cql_alpha"])
    again = algorithm.load(tmp_path / "model")
    assert (again.verbose, again.cql_alpha) == (0, 5.0)

    model.save(tmp_path / "model", exclude=["verbose"], include=["verbose"])
    again = algorithm.load(tmp_path / "model", custom_objects={"learning_rate": 2e-5, "unknown": 1.0}, print_system_info=True)
    assert (again.verbose, again.learning_rate) == (2, 2e-5)
    assert not hasattr(again, "unknown")


def test_file_objects(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm)
    with tempfile.TemporaryFile() as file:
        model.save(file)
        assert not host.differing(host.state(model), host.state(algorithm.load(file)))
        assert not file.closed
    memory = io.BytesIO()
    model.save(memory)
    assert not host.differing(host.state(model), host.state(algorithm.load(memory)))
    for path in (tmp_path / "as-path", str(tmp_path / "as-text")):
        model.save(path)
        assert not host.differing(host.state(model), host.state(algorithm.load(path)))


def test_the_data_is_not_in_the_file(algorithm: Any, host: Any, tmp_path: Path) -> None:
    mark = 123456.75  # a reward that stands for the data: its bytes are searched in the file
    model = host.build(algorithm)
    model.save(tmp_path / "before.zip")
    model.learn_offline(host.collect(steps=10_000, reward=mark), 1)
    model.learn(3)
    model.save(tmp_path / "after.zip")

    sizes = [(tmp_path / name).stat().st_size for name in ("before.zip", "after.zip")]
    # One gradient step gives the optimisers their moments: two numbers for each of the few hundred parameters.
    assert sizes[1] - sizes[0] < 40_000 < model.offline_buffer.observations.nbytes
    with zipfile.ZipFile(tmp_path / "after.zip") as archive:
        names = set(json.loads(archive.read("data")))
        assert all(np.float32(mark).tobytes() not in archive.read(name) for name in archive.namelist())
    assert not {"offline_buffer", "replay_buffer", "env", "_metrics"} & names
    again = algorithm.load(tmp_path / "after.zip")
    assert again.offline_buffer is None
    assert again.replay_buffer.size() == 0


def test_go_on_after_load(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = host.build(algorithm, learning_starts=4)
    model.learn_offline(dataset, 3)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=host.corridors())
    again.set_offline_data(host.collect(reward=77.0))
    sampled = []
    again.learn(8, callback=lambda *_: sampled.append(again.sample_batch(8).rewards) or True)
    # Half of each batch is from the data once there is something else.
    assert [int((rewards == 77.0).sum()) for rewards in sampled] == [8] + [4] * 7
    assert again._n_updates == 3 + 4


def test_a_model_without_environment(algorithm: Any, host: Any, dataset: Any, tmp_path: Path) -> None:
    model = algorithm.from_dataset(dataset, **host.tiny(algorithm))
    model.learn_offline(dataset, 3).save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model")
    assert again.get_env() is None
    assert not host.differing(host.state(model), host.state(again))
    again.learn_offline(dataset, 2)
    again.set_env(host.corridors())
    again.learn(14)
    # Two environments are possible where they come with load().
    pair = algorithm.load(tmp_path / "model", env=host.corridors(2))
    pair.learn_offline(dataset, 2).learn(14)
    assert pair.replay_buffer.n_envs == 2


# Environments ---------------------------------------------------------------------------------------------------------


def test_set_env(algorithm: Any, host: Any, tmp_path: Path) -> None:
    model = host.build(algorithm, train_freq=4)
    model.learn(16)
    model.set_env(host.corridors(), force_reset=True)
    assert model._last_obs is None
    model.learn(16, reset_num_timesteps=True)
    assert model.num_timesteps == 16
    model.set_env(host.Corridor())
    model.learn(16)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(host.corridors(2))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(host.corridors(form="goal"))
    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is not None
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps == 32

    model.save(tmp_path / "model")
    kept = algorithm.load(tmp_path / "model", env=model.get_env(), force_reset=False)
    assert kept._last_obs is not None
    kept.learn(16, reset_num_timesteps=False)
    changed = algorithm.load(tmp_path / "model", env=host.Corridor(), force_reset=True)
    assert changed._last_obs is None
    changed.learn(16, reset_num_timesteps=False)
    assert kept.num_timesteps == changed.num_timesteps == 48


@pytest.mark.parametrize(("saved", "loaded"), [(1, 4), (4, 1)])
def test_load_with_another_number_of_environments(
    algorithm: Any, host: Any, dataset: Any, tmp_path: Path, saved: int, loaded: int
) -> None:
    model = host.build(algorithm, host.corridors(saved))
    model.learn_offline(dataset, 2).learn(16)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=host.corridors(loaded))
    assert again.replay_buffer.n_envs == loaded
    again.learn_offline(dataset, 2).learn(16)
    assert again.replay_buffer.size() == 16 // loaded


# Policies alone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vector", "image"])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_policy_alone(algorithm: Any, host: Any, tmp_path: Path, form: str, use_sde: bool) -> None:
    model = host.build(algorithm, form=form, use_sde=use_sde)
    model.learn_offline(host.collect(form), 2)
    observations = _observations(host, form)
    for part in (model.policy, model.policy.actor):
        expected = part.predict(observations, deterministic=True)[0]
        part.save(tmp_path / "part.pkl")
        again = type(part).load(tmp_path / "part.pkl")
        assert not host.differing(dict(part.state_dict()), dict(again.state_dict()))
        np.testing.assert_array_equal(again.predict(observations, deterministic=True)[0], expected)


# Checkpoints in the middle of an offline run ---------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["learn_offline", "learn"])
def test_a_checkpoint_of_an_offline_run_goes_on(algorithm: Any, host: Any, dataset: Any, tmp_path: Path, then: str) -> None:
    env = VecNormalize(host.corridors())
    model = host.build(algorithm, env, learning_starts=2)
    model.learn(12)
    checkpoint = CheckpointCallback(3, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model.learn_offline(dataset, 6, callback=checkpoint)

    env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_3_steps.pkl"), host.corridors())
    again = algorithm.load(tmp_path / "rl_model_3_steps", env=env)
    again.load_replay_buffer(tmp_path / "rl_model_replay_buffer_3_steps.pkl")
    assert again.replay_buffer.size() == 12
    assert again._n_updates == 10 + 3
    if then == "learn_offline":
        again.learn_offline(dataset, 3)
        assert again._n_updates == model._n_updates
    # Environment steps and gradient steps are counted apart, whichever of the two clocks ran when it was saved.
    again.set_offline_data(dataset).learn(4, reset_num_timesteps=False)
    assert again.num_timesteps == 12 + 4
