"""Models as weights and JSON: the same model back, nothing unpickled, and nothing believed that a file only claims."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save_file

import cql_plugins.sb3 as room
from cql_plugins.sb3 import CQL, CalQL, DiscreteCQL, WeightsError, load_weights, save_weights
from cql_plugins.sb3.weights import _ALGORITHMS, _OPTIONS, _arguments
from tests.sb3.conftest import of_contrib

CQLQRDQN, CQLTQC = of_contrib("CQLQRDQN", "CQLTQC")
CLASSES = [of_contrib(name)[0] if name in room._CONTRIB else getattr(room, name) for name in _ALGORITHMS]
by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def trained(host: Any, cls: Any, form: str = "vector", steps: int = 3, env: Any = None, **changes: Any) -> Any:
    """A model after a few offline steps, and its data."""
    discrete = "Discrete" in cls.__name__ or "QRDQN" in cls.__name__
    model = host.build(cls, env, form, **changes)
    return model.learn_offline(host.collect(form, discrete=discrete), steps)


def observations(model: Any, n: int = 5) -> Any:
    """Observations as the model's networks get them."""
    model.observation_space.seed(1)
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(model.observation_space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, th.Tensor]], Any]) -> Path:
    """Write a changed copy of a file."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["cql_plugins"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(document, tensors)
    save_file(tensors, path.with_name("forged.safetensors"), {"cql_plugins": json.dumps(document)})
    return path.with_name("forged.safetensors")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


_SAVED: list[bytes] = []


@pytest.fixture
def saved(host: Any, place: Path) -> Path:
    """A file of a trained model; trained once."""
    if not _SAVED:
        save_weights(trained(host, CQL), place, optimizer=True)
        _SAVED.append(place.read_bytes())
    place.write_bytes(_SAVED[0])
    return place


class TestTheSameModel:
    @pytest.mark.parametrize(
        ("cls", "form"),
        [*((cls, "vector") for cls in CLASSES), (CalQL, "dict"), (CQLTQC, "image"), (CQLQRDQN, "dict"), (DiscreteCQL, "image")],
    )
    def test_predictions_options_counters(self, host: Any, cls: Any, form: str, place: Path) -> None:
        model = trained(host, cls, form)
        save_weights(model, place)
        loaded = load_weights(place, device="cpu")
        assert type(loaded) is cls
        seen = observations(model)
        untrained = host.build(cls, form=form)
        for deterministic in (True, False):
            set_random_seed(0)
            expected, _ = model.predict(seen, deterministic=deterministic)
            set_random_seed(0)
            assert np.array_equal(loaded.predict(seen, deterministic=deterministic)[0], expected)
        if form == "vector" and isinstance(model, CQL):
            assert not np.array_equal(
                untrained.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
            )
        assert host.differing(model.policy.state_dict(), loaded.policy.state_dict()) == set()
        assert host.differing(model.policy.state_dict(), untrained.policy.state_dict())
        for name in ("log_ent_coef", "ent_coef_tensor", "log_cql_lagrange"):
            one, other = getattr(model, name, None), getattr(loaded, name, None)
            assert (one is None) is (other is None)
            assert one is None or th.equal(one, other)
        for name in ("_n_updates", "_n_offline_steps", "num_timesteps", "exploration_rate", "_current_progress_remaining"):
            assert getattr(loaded, name, None) == getattr(model, name, None)
        for name in set(_arguments(cls)) - {"stats_window_size", "policy_kwargs"}:
            assert getattr(loaded, name) == getattr(model, name), name
        assert loaded.policy_kwargs == model.policy_kwargs
        assert loaded.observation_space == model.observation_space
        assert list(getattr(loaded.observation_space, "spaces", ())) == list(getattr(model.observation_space, "spaces", ()))
        assert loaded.action_space == model.action_space

    @by_class
    @pytest.mark.parametrize("with_env", [False, True])
    def test_training_goes_on_as_if_never_interrupted(self, host: Any, cls: Any, with_env: bool, place: Path) -> None:
        options = {"cql_lagrange_threshold": 1.0} if hasattr(cls, "_update_lagrange") else {}
        model = trained(host, cls, **options)
        save_weights(model, place, optimizer=True)
        env = model.get_env() if with_env else None
        loaded = load_weights(place, env, device="cpu")
        assert host.differing(host.state(model), host.state(loaded)) == set()
        save_weights(model, place)
        without = load_weights(place, device="cpu")
        assert host.differing(host.state(model), host.state(without))
        data = model.offline_buffer
        for one in (model, loaded, without):
            one.set_random_seed(7)
            one.learn_offline(data, 4)
        assert host.differing(host.state(model), host.state(loaded)) == set()
        changed = host.differing(host.state(model), host.state(without))
        assert any(name.startswith("policy.") for name in changed)

    def test_online_too(self, host: Any, place: Path) -> None:
        model = trained(host, CalQL)
        save_weights(model, place, optimizer=True)
        loaded = load_weights(place, host.corridors(), device="cpu")
        loaded.set_offline_data(model.offline_buffer).learn(30)
        assert loaded.num_timesteps == 30
        assert loaded._n_updates > model._n_updates
        fresh = load_weights(place, device="cpu")
        fresh.set_env(host.corridors())
        fresh.learn(12)

    @pytest.mark.parametrize(
        "changes",
        [
            {"use_sde": True},
            {"n_steps": 3, "mode_q_backup": True},
            {"ent_coef": 0.2},
            {"ent_coef": "auto_0.3", "target_entropy": -2.0},
            {"learning_rate": LinearSchedule(1e-3, 1e-4, 1.0), "actor_learning_rate": None},
            {"train_freq": (2, "episode"), "gradient_steps": -1},
            {"cql_clip_diff": (-200.0, np.inf), "cql_variant": "rho", "precision": "bf16"},
            {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"betas": (0.8, 0.9), "eps": 1e-5}}},
            {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}},
            {"policy_kwargs": {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"centered": True}}},
            {"policy_kwargs": {"activation_fn": th.nn.Tanh, "net_arch": {"pi": [4], "qf": [6, 5]}, "n_critics": 3}},
            {"policy_kwargs": {"share_features_extractor": True, "net_arch": []}},
        ],
        ids=str,
    )
    def test_options(self, host: Any, changes: dict[str, Any], place: Path) -> None:
        model = trained(host, CQL, **changes)
        save_weights(model, place, optimizer=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "precision='bf16' is slow on this processor")  # where it is so
            loaded = load_weights(place, host.corridors(), device="cpu")
        different = host.differing(host.state(model), host.state(loaded))
        assert {name for name in different if "fused" not in name} == set()  # That one is the machine's.
        assert type(loaded.replay_buffer) is type(model.replay_buffer)
        assert isinstance(loaded.replay_buffer, NStepReplayBuffer) is (model.n_steps > 1)
        for name in (
            "cql_clip_diff",
            "train_freq",
            "gradient_steps",
            "ent_coef",
            "target_entropy",
            "policy_kwargs",
            "mode_q_backup",
        ):
            assert getattr(loaded, name) == getattr(model, name)
        assert [loaded.lr_schedule(x) for x in (1.0, 0.5)] == [model.lr_schedule(x) for x in (1.0, 0.5)]
        model.set_random_seed(3)
        model.learn_offline(model.offline_buffer, 3)
        loaded.set_random_seed(3)
        loaded.learn_offline(model.offline_buffer, 3)
        assert host.differing(host.state(model), host.state(loaded)) == set()

    def test_arguments_of_the_loader_win(self, saved: Path) -> None:
        assert load_weights(saved, device="cpu").batch_size == 8
        assert load_weights(saved, device="cpu", batch_size=16, verbose=0).batch_size == 16

    def test_hindsight(self, host: Any, place: Path) -> None:
        options = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
        model = host.build(CalQL, form="goal", **options)
        save_weights(model, place)
        loaded = load_weights(place, host.corridors(form="goal"), device="cpu")
        assert type(loaded.replay_buffer) is type(model.replay_buffer)
        assert loaded.replay_buffer.her_ratio == model.replay_buffer.her_ratio
        with pytest.raises(WeightsError, match="needs the environment"):
            load_weights(place, device="cpu")
        alone = load_weights(place, device="cpu", replay_buffer_class=None, replay_buffer_kwargs=None)
        assert np.array_equal(*(one.predict(observations(model), deterministic=True)[0] for one in (model, alone)))

    def test_in_the_middle_of_an_offline_run_the_clock_is_the_online_one(self, host: Any, place: Path) -> None:
        model = host.build(CQL)
        model.learn_offline(host.collect(), 2, callback=lambda *_: save_weights(model, place) or True)
        assert load_weights(place, device="cpu").num_timesteps == 0
        assert load_weights(place, device="cpu")._n_offline_steps == 2

    def test_number_of_environments(self, host: Any, place: Path) -> None:
        """Where there is no environment it still says how often the target network moves offline."""
        model = host.build(DiscreteCQL, host.corridors(4, discrete=True))
        save_weights(model, place)
        assert load_weights(place, device="cpu")._offline_interval == model._offline_interval
        assert host.build(DiscreteCQL)._offline_interval != model._offline_interval

    @by_class
    def test_every_argument_has_a_kind(self, cls: Any) -> None:
        assert set(_arguments(cls)) <= _OPTIONS.keys()

    def test_spaces(self, host: Any, place: Path) -> None:
        observed = spaces.Dict(
            [  # A sequence, whose order it keeps.
                ("z", spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([2.5, np.inf], np.float32))),
                ("b", spaces.MultiDiscrete([2, 3])),
                ("a", spaces.MultiBinary(3)),
                ("d", spaces.Discrete(4, start=2)),
            ]
        )
        env = host.Spaces(observed, spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 0.7], np.float32)))
        model = CQL("MultiInputPolicy", env, **host.tiny(CQL))
        save_weights(model, place)
        loaded = load_weights(place, env, device="cpu")
        assert (loaded.observation_space, loaded.action_space) == (model.observation_space, model.action_space)
        assert list(load_weights(place, device="cpu").observation_space.spaces) == ["z", "b", "a", "d"]
        other = host.Spaces(observed, spaces.Box(-1.0, 1.0, (2,)))
        with pytest.raises(ValueError, match="Action spaces do not match"):
            load_weights(place, other, device="cpu")


class TestNothingIsUnpickled:
    @pytest.fixture
    def no_pickle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import cloudpickle

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("something was unpickled")

        for module in (pickle, cloudpickle):
            for name in ("load", "loads"):
                monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr(pickle, "Unpickler", refuse)
        monkeypatch.setattr(th, "load", refuse)

    def test_load(self, host: Any, saved: Path, tmp_path: Path, no_pickle: None) -> None:
        load_weights(saved, host.corridors(), device="cpu")
        host.build(CQL).save(tmp_path / "model.zip")
        with pytest.raises(AssertionError, match="unpickled"):
            CQL.load(tmp_path / "model.zip", device="cpu")

    def test_the_file_has_no_pickle(self, saved: Path) -> None:
        with safe_open(saved, "pt") as file:
            text = file.metadata()["cql_plugins"]
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert "serialized" not in text


class TestNormalization:
    def normalized(self, host: Any, **changes: Any) -> VecNormalize:
        return VecNormalize(host.corridors(2), **{"clip_obs": 5.0, "norm_reward": True, "gamma": 0.9} | changes)

    @pytest.fixture
    def model(self, host: Any) -> Any:
        model = trained(host, CQL, env=self.normalized(host))
        model.learn(20)
        return model

    def test_statistics_cannot_be_left_behind(self, host: Any, model: Any, place: Path) -> None:
        save_weights(model, place)
        with pytest.warns(UserWarning, match="trained on normalised observations"):
            alone = load_weights(place, device="cpu")
        with pytest.raises(WeightsError, match=r"set_env\(VecNormalize\.load"):
            save_weights(alone, place.with_name("again.safetensors"))
        assert not place.with_name("again.safetensors").exists()
        with pytest.raises(ValueError, match="trained on normalised observations"):
            alone.learn_offline(host.collect(), 1)

    def test_comes_back_around_an_environment(self, host: Any, model: Any, place: Path) -> None:
        save_weights(model, place)
        ours = model.get_vec_normalize_env()
        for env in (host.Corridor(), host.corridors(3), self.normalized(host)):
            loaded = load_weights(place, env, device="cpu")
            theirs = loaded.get_vec_normalize_env()
            assert np.array_equal(theirs.obs_rms.mean, ours.obs_rms.mean)
            assert np.array_equal(theirs.obs_rms.var, ours.obs_rms.var)
            assert (theirs.obs_rms.count, theirs.ret_rms.count) == (ours.obs_rms.count, ours.ret_rms.count)
            assert (theirs.ret_rms.var, theirs.clip_obs, theirs.gamma) == (ours.ret_rms.var, 5.0, 0.9)
            assert ours.obs_rms.mean.any()
        load_weights(place, loaded.get_env(), device="cpu")  # the same statistics
        loaded.learn(12)
        with pytest.raises(WeightsError, match="statistics of its own"):
            load_weights(place, loaded.get_env(), device="cpu")

    def test_what_does_not_fit(self, host: Any, model: Any, place: Path) -> None:
        save_weights(model, place)
        with pytest.warns(UserWarning, match="expects such"):
            load_weights(place, device="cpu")
        with pytest.raises(WeightsError, match=r"other settings.*clip_obs.*\(7.0, 5.0\)"):
            load_weights(place, self.normalized(host, clip_obs=7.0), device="cpu")
        with pytest.raises(WeightsError, match="do not fit the environment"):
            load_weights(place, host.Spaces(spaces.Box(-1, 1, (4,)), model.action_space), device="cpu")
        negative = forge(place, lambda _, tensors: tensors["normalization.observations.var"].neg_())
        with pytest.raises(WeightsError, match="variances and counts"):
            load_weights(negative, host.corridors(), device="cpu")
        untouched = self.normalized(host)
        with pytest.raises(WeightsError, match="no part of the model"):
            load_weights(forge(place, lambda _, tensors: tensors.update(spare=th.zeros(1))), untouched, device="cpu")
        assert untouched.obs_rms.count < 1.0
        load_weights(place, untouched, device="cpu")
        assert untouched.obs_rms.count > 1.0
        save_weights(host.build(CQL), place)
        with pytest.raises(WeightsError, match="trained on raw observations"):
            load_weights(place, self.normalized(host), device="cpu")
        load_weights(place, self.normalized(host, norm_obs=False), device="cpu")

    def test_some_keys(self, host: Any, place: Path) -> None:
        env = VecNormalize(host.corridors(form="dict"), norm_obs_keys=["state"], norm_reward=False)
        model = trained(host, CQL, "dict", env=env)
        save_weights(model, place)
        loaded = load_weights(place, host.Corridor("dict"), device="cpu")
        theirs = loaded.get_vec_normalize_env()
        assert list(theirs.obs_rms) == ["state"]
        assert np.array_equal(theirs.obs_rms["state"].mean, env.obs_rms["state"].mean)


class Policy(SACPolicy):
    """A policy of the user's."""


class Extractor(FlattenExtractor):
    """A features extractor of the user's."""


class Ours(CQL):
    """A subclass of the user's."""


class TestWhatJsonCannotSay:
    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("policy", {"policy": Policy}),
            ("learning_rate", {"learning_rate": lambda _: 1e-3}),
            ("actor_learning_rate", {"actor_learning_rate": lambda _: 1e-3}),
            ("action_noise", {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}),
            ("policy_kwargs.features_extractor_class", {"policy_kwargs": {"features_extractor_class": Extractor}}),
            ("policy_kwargs.activation_fn", {"policy_kwargs": {"activation_fn": lambda: th.nn.ReLU()}}),
        ],
    )
    def test_is_named_and_given_again(self, host: Any, name: str, changes: dict[str, Any], place: Path) -> None:
        model = trained(host, CQL, **changes)
        with pytest.raises(WeightsError, match=rf"^{name} cannot be written.*omit=\['{name}'\].*load_weights"):
            save_weights(model, place)
        assert not place.exists()
        save_weights(model, place, omit=[name], optimizer=True)
        with pytest.raises(WeightsError, match=f"saved without .*{name}.*give them"):
            load_weights(place, device="cpu")
        loaded = load_weights(place, device="cpu", **changes)
        assert host.differing(host.state(model), host.state(loaded)) == set()
        assert type(loaded.policy) is type(model.policy)

    def test_all_of_the_policys_arguments(self, host: Any, place: Path) -> None:
        model = trained(host, CQL)
        save_weights(model, place, omit=["policy_kwargs"])
        with pytest.raises(WeightsError, match="saved without"):
            load_weights(place, device="cpu")
        loaded = load_weights(place, device="cpu", policy_kwargs={"net_arch": [8]})
        assert host.differing(model.policy.state_dict(), loaded.policy.state_dict()) == set()
        with pytest.raises(WeightsError, match="the model that its options make has"):
            load_weights(place, device="cpu", policy_kwargs={"net_arch": [9]})

    def test_spaces(self, host: Any, place: Path) -> None:
        large = host.Spaces(spaces.Box(-1.0, 1.0, (2**12, 2**12 + 1)), spaces.Box(-1.0, 1.0, (1,)))
        with pytest.raises(WeightsError, match="observation_space has 16781312 numbers"):
            save_weights(CQL("MlpPolicy", large, buffer_size=1, policy_kwargs={"net_arch": [1]}), place)

        class Strange(spaces.Box):
            pass

        strange = host.Spaces(Strange(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (1,)))
        with pytest.raises(WeightsError, match="observation_space cannot be written"):
            save_weights(host.build(CQL, strange), place)

    def test_other_classes(self, host: Any, place: Path) -> None:
        with pytest.raises(WeightsError, match=r"got .*Ours\. Use model.save"):
            save_weights(host.build(Ours), place)

    @pytest.mark.parametrize("name", ["gama", "policy_kwargs.", "gamma.x", "device"])
    def test_unknown_names(self, host: Any, name: str, place: Path) -> None:
        with pytest.raises(WeightsError, match="omit names arguments of CQL"):
            save_weights(host.build(CQL), place, omit=[name])

    def test_machine_settings_stay_here(self, host: Any, place: Path, tmp_path: Path) -> None:
        """A file that chooses where logs are written would write there."""
        save_weights(host.build(CQL, tensorboard_log=str(tmp_path / "logs")), place)
        assert load_weights(place, device="cpu").tensorboard_log is None
        forged = forge(place, lambda document, _: document["options"].update(tensorboard_log="/etc"))
        with pytest.raises(WeightsError, match="tensorboard_log"):
            load_weights(forged, device="cpu")


def set_option(name: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda document, _: document["options"].update({name: value})


def set_policy_kwarg(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda document, _: document["options"]["policy_kwargs"].update(values)


def set_space(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda document, _: document.update(observation_space={"type": "Box", "dtype": "float32"} | values)


class TestStrangersFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d, _: d.update(algorithm="os.system"), "algorithm.*expected one of"),
            (lambda d, _: d.update(policy="builtins.eval"), "no policy 'builtins.eval'"),
            (lambda d, _: d.update(extra=1), r"not known here: \['extra'\]"),
            (lambda d, _: d.pop("n_envs"), r"lacks \['n_envs'\]"),
            (lambda d, _: d.update(n_envs=10**9), "n_envs"),
            (lambda d, _: d.update(framework="jax"), "It says it is of 'jax'"),
            (lambda d, _: d["counters"].update(n_updates=-1), r"counters.n_updates"),
            (lambda d, _: d["counters"].update(policy=1), "counters has fields"),
            (lambda d, _: d.update(given_at_load=["__class__"]), "omit names"),
            (set_option("gamma", "high"), r"options.gamma.*a number from 0 to 1, got 'high'"),
            (set_option("gamma", True), "options.gamma"),
            (set_option("gamma", "nan"), "options.gamma"),
            (set_option("batch_size", 10**12), "options.batch_size"),
            (set_option("cql_alpha", {"__reduce__": []}), "options.cql_alpha"),
            (set_option("cql_variant", "eval"), "options.cql_variant"),
            (set_option("learning_rate", {"function": "os.system"}), "options.learning_rate"),
            (set_option("action_noise", "NormalActionNoise"), "options.action_noise"),
            (set_option("replay_buffer_class", "os.PathLike"), "options.replay_buffer_class"),
            (set_option("replay_buffer_kwargs", {"env": 1}), "options.replay_buffer_kwargs"),
            (set_option("replay_buffer_kwargs", [1]), "options.replay_buffer_kwargs"),
            (set_option("_init_setup_model", False), r"not known here: \['_init_setup_model'\]"),
            (set_option("train_freq", [1, 2, 3]), "options.train_freq"),
            (set_option("train_freq", ["step", "step"]), "options that CQL does not take"),
            (set_policy_kwarg(activation_fn="os.system"), r"policy_kwargs.activation_fn"),
            (set_policy_kwarg(optimizer_class="subprocess.Popen"), r"policy_kwargs.optimizer_class"),
            (set_policy_kwarg(features_extractor_class="a.b"), r"policy_kwargs.features_extractor_class"),
            (set_policy_kwarg(policy_class="a.b"), r"not known here: \['policy_class'\]"),
            (set_policy_kwarg(n_quantiles=3), "options that CQL does not take"),
            (set_policy_kwarg(optimizer_kwargs={"nope": 1}), "options that CQL does not take"),
            (set_policy_kwarg(net_arch=[9]), r"tensor 'policy.*' has shape .*, and the model that its options make has"),
            (set_policy_kwarg(net_arch=[8, 8]), "tensors are not those of the model"),
            (set_space(shape=[-3], low=0, high=1), "observation_space.shape"),
            (set_space(shape=[2**13, 2**13], low=0, high=1), "numbers are allowed"),
            (set_space(shape=[2**40], low=0, high=1), "observation_space.shape"),
            (set_space(shape=[2], low=[0, 0, 0], high=1), "observation_space is not what it must be"),
            (set_space(shape=[2], low="a", high=1), "observation_space.low"),
            (set_space(shape=[2], low=0, high=300, dtype="uint8"), "observation_space is not what it must be"),
            (set_space(shape=[2], low=0, high=300, dtype="object"), "observation_space.dtype"),
            (lambda d, _: d.update(observation_space={"type": "Tuple"}), "no type that is known"),
            (lambda d, _: d.update(observation_space=None), "no type that is known"),
            (lambda d, _: d["action_space"].update(type=["Box"]), "no type that is known"),
            (
                lambda d, _: d.update(observation_space={"type": "Dict", "spaces": [["a", {"type": "Dict", "spaces": []}]]}),
                "no type",
            ),
            (lambda d, _: d.update(observation_space={"type": "Discrete", "n": 2**50, "start": 0}), "larger networks"),
            (
                lambda d, _: d.update(observation_space={"type": "MultiDiscrete", "nvec": [2**50] * 2, "start": [0]}),
                "observation",
            ),
            (lambda d, _: d["optimizers"].pop("critic.optimizer"), r"optimizers lacks"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["groups"].append({}), "2 groups of parameters"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["groups"][0].update(lr="x"), r"critic.optimizer.lr"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["groups"][0].update(lr=-1), "does not take"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["groups"][0].update(weight_decay=1e300), "does not take"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["groups"][0].update(hook=1), "critic.optimizer"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["numbers"].update({"99": {}}), "state for parameter '99'"),
            (lambda d, _: d["optimizers"]["critic.optimizer"]["numbers"].pop("0"), "tensors are not those"),
            (lambda _, t: t.update({"optimizers.critic.optimizer.0.exp_avg": th.zeros(3)}), "has shape"),
            (lambda _, t: t.pop("optimizers.critic.optimizer.0.step"), "tensors are not those"),
            (lambda _, t: t.update({"spare": th.zeros(3)}), r"belong to no part of the model: \['spare'\]"),
            (lambda _, t: t.update({"policy.spare": th.zeros(3)}), "tensors are not those"),
            (lambda _, t: t.pop("variables.log_ent_coef"), "tensors are not those"),
            (lambda _, t: t.update({"variables.log_ent_coef": th.zeros(2)}), "has shape"),
            (lambda _, t: t.update({"variables.log_ent_coef": th.zeros(1).double()}), "numbers of type F64"),
            (lambda _, t: t["variables.log_ent_coef"].fill_(th.nan), "NaN or infinity"),
            (lambda _, t: t["policy.actor.mu.bias"].fill_(th.inf), "NaN or infinity"),
            (lambda _, t: t["optimizers.actor.optimizer.0.exp_avg"].fill_(th.inf), "NaN or infinity"),
        ],
    )
    def test_are_refused(self, saved: Path, change: Any, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            load_weights(forge(saved, change), device="cpu")

    def test_are_not_refused_as_such(self, saved: Path) -> None:
        load_weights(forge(saved, lambda *_: None), device="cpu")

    @pytest.mark.parametrize(
        "values",
        [
            {"net_arch": [10**9, 10**9]},
            {"net_arch": [30_000, 30_000]},  # 3.6 GB: a machine may have them
            {"net_arch": {"pi": [8], "qf": [8, 10**12]}},
            {"net_arch": [1] * 100_000},
            {"n_critics": 10**9},
        ],
        ids=["terabytes", "gigabytes", "one-of-two", "many-layers", "many-critics"],
    )
    def test_networks_are_no_larger_than_the_file(
        self, saved: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, empty = [], th.empty

        def watch(*size: Any, **kwargs: Any) -> th.Tensor:
            tensor = empty(*size, **kwargs)
            made.append(tensor.numel())
            return tensor

        watch.__name__ = "empty"
        monkeypatch.setattr(th, "empty", watch)
        load_weights(saved, device="cpu")
        usual = len(made)
        assert usual
        made.clear()
        forged = forge(saved, set_policy_kwarg(**values))
        with pytest.raises(WeightsError, match="larger networks than the file holds"):
            load_weights(forged, device="cpu")
        assert sum(made) < 2**20
        assert len(made) < 100 * usual

    def test_quantiles_too(self, host: Any, place: Path) -> None:
        save_weights(host.build(CQLQRDQN), place)
        with pytest.raises(WeightsError, match="larger networks"):
            load_weights(forge(place, set_policy_kwarg(n_quantiles=10**12)), device="cpu")

    def test_images_too(self, host: Any, place: Path) -> None:
        save_weights(host.build(DiscreteCQL, form="image"), place)
        with pytest.raises(WeightsError, match="larger networks"):
            load_weights(forge(place, set_policy_kwarg(features_extractor_kwargs={"features_dim": 10**11})), device="cpu")

    def test_numbers_that_are_none_can_be_asked_for(self, saved: Path) -> None:
        forged = forge(saved, lambda _, tensors: tensors["policy.actor.mu.bias"].fill_(th.nan))
        assert bool(load_weights(forged, device="cpu", allow_non_finite=True).actor.mu.bias.isnan().all())

    def test_of_the_other_framework(self, saved: Path) -> None:
        forged = forge(saved, lambda document, _: document.update(framework="d3rlpy"))
        with pytest.raises(WeightsError, match=r"cql_plugins.d3rlpy.load_weights; cql_plugins.adapters.to_sb3_model"):
            load_weights(forged)


def test_written_whole_or_not_at_all(host: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="could not write"):
        save_weights(host.build(CQL), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_environment_by_name(place: Path) -> None:
    model = CQL("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [4]})
    save_weights(model, place)
    assert isinstance(load_weights(place, "Pendulum-v1").get_env().envs[0].unwrapped, type(gym.make("Pendulum-v1").unwrapped))
