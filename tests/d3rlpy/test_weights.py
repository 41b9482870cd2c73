"""Algorithms as weights and JSON: the same algorithm back, nothing unpickled, nothing believed that a file only claims."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import d3rlpy
import numpy as np
import pytest
import torch as th
from d3rlpy.dataset import Transition, TransitionMiniBatch

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save_file
from typing_extensions import TypeAliasType

from cql_plugins.d3rlpy import (
    CalQLConfig,
    CQLConfig,
    DiscreteCalQLConfig,
    DiscreteCQLConfig,
    WeightsError,
    load_weights,
    save_weights,
)
from cql_plugins.d3rlpy.weights import _kind_of

ACTION, BATCH, VECTOR, IMAGE = 2, 8, (5,), (3, 36, 36)
DISCRETE = (DiscreteCQLConfig, DiscreteCalQLConfig)
CONFIGS = (CQLConfig, CalQLConfig, *DISCRETE)
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def observe(shape: Any, n: int) -> Any:
    if len(shape) == 3:
        return np.random.randint(0, 255, size=(n, *shape)).astype(np.uint8)
    return np.random.random((n, *shape)).astype(np.float32)


def scalers(shape: Any, discrete: bool) -> dict[str, Any]:
    preprocessing = d3rlpy.preprocessing
    observation: Any = preprocessing.PixelObservationScaler()
    if shape == VECTOR:
        observation = preprocessing.StandardObservationScaler(mean=np.full(5, 1 / 3), std=np.linspace(0.1, 2.0, 5))
    action = {} if discrete else {"action_scaler": preprocessing.MinMaxActionScaler(np.full(2, -2.0), np.array([0.3, 2.0]))}
    return {
        "observation_scaler": observation,
        "reward_scaler": preprocessing.ClipRewardScaler(low=-1.0, multiplier=2.0),
        **action,
    }


def encoder(shape: Any) -> Any:
    if shape == IMAGE:
        return d3rlpy.models.PixelEncoderFactory(filters=[[4, 8, 4], [8, 4, 2]], feature_size=16)
    return d3rlpy.models.VectorEncoderFactory([16], use_layer_norm=True)


def make(config: Any, shape: Any = VECTOR, **options: Any) -> Any:
    discrete = config in DISCRETE
    names = ("encoder_factory",) if discrete else ("actor_encoder_factory", "critic_encoder_factory")
    arguments: dict[str, Any] = {name: encoder(shape) for name in names} | {"batch_size": BATCH} | scalers(shape, discrete)
    arguments |= {} if discrete else {"n_action_samples": 3, "alpha_learning_rate": 1e-4}
    algo = config(**(arguments | options)).create()
    algo.create_impl(shape, ACTION)
    return algo


def batch(algo: Any, seed: int = 0) -> TransitionMiniBatch:
    np.random.seed(seed)
    shape, discrete = algo.observation_shape, type(algo.config) in DISCRETE

    def act() -> Any:
        return np.random.randint(ACTION, size=1) if discrete else np.random.uniform(-1, 1, ACTION).astype(np.float32)

    return TransitionMiniBatch.from_transitions(
        [
            Transition(
                observation=observe(shape, 1)[0],
                action=act(),
                reward=np.random.random(1).astype(np.float32),
                next_observation=observe(shape, 1)[0],
                next_action=act(),
                terminal=float(i % 2),
                interval=1,
                rewards_to_go=np.random.random((4, 1)).astype(np.float32),
            )
            for i in range(BATCH)
        ]
    )


def trained(config: Any, shape: Any = VECTOR, steps: int = 2, **options: Any) -> Any:
    algo = make(config, shape, **options)
    train(algo, range(steps))
    return algo


def train(algo: Any, seeds: Any) -> None:
    for seed in seeds:
        th.manual_seed(seed)
        algo.update(batch(algo, seed))


def state(algo: Any) -> list[Any]:
    """Every number that d3rlpy itself saves."""
    return [list(_leaves(part.state_dict())) for part in vars(algo.impl.modules).values() if part is not None]


def _leaves(tree: Any) -> Any:
    if isinstance(tree, dict | list | tuple):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from ((key, *leaf) for leaf in _leaves(branch))
    else:
        yield (tree.tolist() if isinstance(tree, th.Tensor) else tree,)


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
    return tmp_path / "algo.safetensors"


_SAVED: list[bytes] = []


@pytest.fixture
def saved(place: Path) -> Path:
    """A file of a trained algorithm; trained once."""
    if not _SAVED:
        save_weights(trained(CalQLConfig), place, optimizer=True)
        _SAVED.append(place.read_bytes())
    place.write_bytes(_SAVED[0])
    return place


class TestTheSameAlgorithm:
    @by_config
    @pytest.mark.parametrize("shape", [VECTOR, IMAGE], ids=["vector", "image"])
    def test_predictions_and_config(self, config: Any, shape: Any, place: Path) -> None:
        algo = trained(config, shape)
        save_weights(algo, place)
        loaded = load_weights(place)
        assert type(loaded) is type(algo)
        assert (loaded.observation_shape, loaded.action_size, loaded.grad_step) == (shape, ACTION, algo.grad_step)
        assert json.loads(loaded.config.serialize()) == json.loads(algo.config.serialize())
        seen = observe(shape, 7)
        actions = algo.predict(seen)
        assert np.array_equal(loaded.predict(seen), actions)
        assert np.array_equal(loaded.predict_value(seen, actions), algo.predict_value(seen, actions))
        twin = make(config, shape)
        assert not np.array_equal(twin.predict_value(seen, actions), algo.predict_value(seen, actions))

    @by_config
    def test_training_goes_on_as_if_never_interrupted(self, config: Any, place: Path) -> None:
        algo = trained(config)
        save_weights(algo, place, optimizer=True)
        loaded = load_weights(place)
        assert state(loaded) == state(algo)
        save_weights(algo, place)
        without = load_weights(place)
        for one in (algo, loaded, without):
            train(one, range(5, 9))
        assert state(loaded) == state(algo)
        weights = [
            [list(_leaves(n.state_dict())) for n in one.impl.modules.get_torch_modules().values()] for one in (algo, without)
        ]
        assert weights[0] != weights[1]

    @pytest.mark.parametrize(
        "options",
        [
            {"critic_optim_factory": d3rlpy.optimizers.SGDFactory(momentum=0.5)},
            {"critic_optim_factory": d3rlpy.optimizers.AdamWFactory(betas=(0.8, 0.9), clip_grad_norm=1.0)},
            {"critic_optim_factory": d3rlpy.optimizers.RMSpropFactory()},
            {"actor_optim_factory": d3rlpy.optimizers.GPTAdamWFactory(weight_decay=0.1)},
            {
                "actor_optim_factory": d3rlpy.optimizers.AdamFactory(
                    lr_scheduler_factory=d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=50)
                ),
                "critic_optim_factory": d3rlpy.optimizers.AdamFactory(
                    lr_scheduler_factory=d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=50)
                ),
            },
            {"q_func_factory": d3rlpy.models.QRQFunctionFactory(n_quantiles=6)},
            {"q_func_factory": d3rlpy.models.IQNQFunctionFactory(n_quantiles=6, n_greedy_quantiles=6, embed_size=8)},
            {"critic_encoder_factory": d3rlpy.models.SimBaEncoderFactory(feature_size=8, hidden_size=8)},
            {"critic_encoder_factory": d3rlpy.models.VectorEncoderFactory([8], use_batch_norm=True, activation="tanh")},
            {"critic_encoder_factory": d3rlpy.models.DefaultEncoderFactory(dropout_rate=0.1)},
            {"cql_clip_diff": (-200.0, np.inf), "offline_fraction": "proportional", "n_critics": 3, "temp_learning_rate": 0.0},
            {"reward_scaler": d3rlpy.preprocessing.StandardRewardScaler(mean=0.1, std=2.0)},
        ],
        ids=lambda options: "-".join(type(value).__name__ for value in options.values()),
    )
    def test_options(self, options: dict[str, Any], place: Path) -> None:
        algo = trained(CQLConfig, **options)
        save_weights(algo, place, optimizer=True)
        loaded = load_weights(place)
        assert json.loads(loaded.config.serialize()) == json.loads(algo.config.serialize())
        assert state(loaded) == state(algo)
        train(algo, range(5, 8))
        train(loaded, range(5, 8))
        assert state(loaded) == state(algo)

    def test_several_observations(self, place: Path) -> None:
        """d3rlpy leaves their encoder to the user, and JSON cannot say it."""
        shape = ((4,), (6,))
        factory = _TupleEncoderFactory()
        options = {
            "observation_scaler": d3rlpy.preprocessing.TupleObservationScaler(
                [d3rlpy.preprocessing.StandardObservationScaler(mean=np.zeros(n), std=np.full(n, 3.0)) for (n,) in shape]
            ),
            "actor_encoder_factory": factory,
            "critic_encoder_factory": factory,
        }
        algo = make(CQLConfig, shape, **options)
        names = ["actor_encoder_factory", "critic_encoder_factory"]
        with pytest.raises(WeightsError, match=r"^actor_encoder_factory cannot be written.*omit=\['actor_encoder_factory'\]"):
            save_weights(algo, place)
        save_weights(algo, place, omit=names)
        with pytest.raises(WeightsError, match=r"saved without .*give them"):
            load_weights(place)
        loaded = load_weights(place, **dict.fromkeys(names, factory))
        seen = [observe((4,), 3), observe((6,), 3)]
        assert np.array_equal(loaded.predict(seen), algo.predict(seen))
        assert loaded.observation_shape == shape

    def test_moves_to_stable_baselines3(self, place: Path) -> None:
        import gymnasium as gym

        from cql_plugins.adapters import to_sb3_model

        class Env(gym.Env[Any, Any]):
            observation_space = gym.spaces.Box(-1.0, 1.0, VECTOR)
            action_space = gym.spaces.Box(np.full(2, -2.0, np.float32), np.array([0.3, 2.0], np.float32))

        algo = trained(
            CQLConfig,
            reward_scaler=None,
            critic_encoder_factory=d3rlpy.models.VectorEncoderFactory([16]),
            actor_encoder_factory=d3rlpy.models.VectorEncoderFactory([16]),
            alpha_learning_rate=0.0,
        )
        save_weights(algo, place)
        model, direct = (to_sb3_model(one, Env()) for one in (load_weights(place), algo))
        seen = observe(VECTOR, 4)
        assert np.array_equal(model.predict(seen, deterministic=True)[0], direct.predict(seen, deterministic=True)[0])

    def test_fields_of_the_loader_win(self, saved: Path) -> None:
        assert load_weights(saved).config.batch_size == BATCH
        assert load_weights(saved, batch_size=3).config.batch_size == 3
        with pytest.raises(WeightsError, match="batchsize"):
            load_weights(saved, batchsize=3)

    def test_what_cannot_be_saved(self, place: Path) -> None:
        with pytest.raises(WeightsError, match=r"got d3rlpy\..*CQL. Use algo.save"):
            save_weights(d3rlpy.algos.CQLConfig().create(), place)
        with pytest.raises(WeightsError, match="no networks yet"):
            save_weights(CQLConfig().create(), place)
        with pytest.raises(WeightsError, match=r"omit names fields of CQLConfig; got \['tow'\]"):
            save_weights(make(CQLConfig), place, omit=["tow"])


class _TupleEncoder(th.nn.Module):
    def __init__(self, shape: Any, extra: int = 0) -> None:
        super().__init__()
        self.layer = th.nn.Linear(sum(size for (size,) in shape) + extra, 16)

    def forward(self, x: Any, action: Any = None) -> th.Tensor:
        return th.relu(self.layer(th.cat([*x] if action is None else [*x, action], dim=1)))


class _TupleEncoderFactory(d3rlpy.models.EncoderFactory):
    def create(self, observation_shape: Any) -> Any:
        return _TupleEncoder(observation_shape)

    def create_with_action(self, observation_shape: Any, action_size: int, discrete_action: bool = False) -> Any:
        return _TupleEncoder(observation_shape, action_size)

    @staticmethod
    def get_type() -> str:
        return "cql_plugins.tests.weights_tuple"

    def serialize_to_dict(self) -> dict[str, Any]:
        return {}


def test_nothing_is_unpickled(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(CQLConfig).save(str(tmp_path / "algo.d3"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(th, "load", refuse)
    load_weights(saved)
    with pytest.raises(AssertionError, match="unpickled"):
        d3rlpy.load_learnable(str(tmp_path / "algo.d3"))


def set_option(name: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda document, _: document["options"].update({name: value})


def set_encoder(type_name: str = "vector", **params: Any) -> Callable[[dict[str, Any], Any], None]:
    return set_option("critic_encoder_factory", {"type": type_name, "params": params})


def critic(document: dict[str, Any]) -> Any:
    return document["optimizers"]["critic_optim"]


class TestStrangersFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d, _: d.update(algorithm="cql"), "algorithm.*expected one of"),
            (lambda d, _: d.update(extra=1), r"not known here: \['extra'\]"),
            (lambda d, _: d.update(observation_shape=[2**40]), "observation_shape"),
            (lambda d, _: d.update(observation_shape=[2**13, 2**13]), "observation_shape has 67108864 numbers"),
            (lambda d, _: d.update(observation_shape=[[3], 3]), "observation_shape"),
            (lambda d, _: d.update(observation_shape=[5, 5]), "options that CalQL does not take"),
            (lambda d, _: d.update(observation_shape=[6]), "the model that its options make has"),
            (lambda d, _: d.update(action_size=0), "action_size"),
            (lambda d, _: d.update(action_size=2**24), "larger networks"),
            (lambda d, _: d.update(grad_step=-1), "grad_step"),
            (lambda d, _: d.update(given_at_load=["__class__"]), "omit names"),
            (set_option("gamma", "high"), "options.gamma"),
            (set_option("compile_graph", 1), "options.compile_graph"),
            (set_option("batch_size", 10**12), "options.batch_size"),
            (set_option("cql_variant", "eval"), "options.cql_variant"),
            (set_option("cql_clip_diff", [1.0]), "options.cql_clip_diff"),
            (set_option("conservative_weight", -1), "options that CalQL does not take"),
            (set_option("unknown", 1), r"not known here: \['unknown'\]"),
            (set_option("observation_scaler", {"type": "os.system", "params": {}}), "options.observation_scaler"),
            (set_option("observation_scaler", {"type": "standard", "params": {"mean": ["a"]}}), "observation_scaler"),
            (set_option("observation_scaler", {"type": "standard", "params": {"call": 1}}), "observation_scaler"),
            (set_option("critic_encoder_factory", "vector"), "critic_encoder_factory"),
            (set_encoder(hidden_units=[16], use_layer_norm=True, activation="os.system"), "does not take"),
            (set_encoder(hidden_units=[16]), "tensors are not those"),
            (set_encoder(hidden_units=[17], use_layer_norm=True), "the model that its options make has"),
            (set_encoder(hidden_units=[10**9]), "larger networks"),
            (set_encoder(hidden_units=[30_000, 30_000]), "larger networks"),
            (set_encoder(hidden_units=[1] * 50_000), "larger networks"),
            (set_encoder("simba", n_blocks=10**9), "larger networks"),
            (set_encoder(hidden_units=[10**10]), "critic_encoder_factory"),
            (set_option("n_critics", 10**9), "larger networks"),
            (set_option("q_func_factory", {"type": "qr", "params": {"n_quantiles": 10**9}}), "q_func_factory"),
            (lambda d, _: d["optimizers"].pop("critic_optim"), "optimizers lacks"),
            (lambda d, _: critic(d)["optimizer"]["groups"][0].update(lr=-1), "does not take"),
            (lambda d, _: critic(d).update(lr_scheduler={"optimizer": 1}), "lr_scheduler"),
            (lambda _, t: t.update({"spare": th.zeros(3)}), r"belong to no part of the model"),
            (lambda _, t: t.pop("networks.log_temp._parameter"), "tensors are not those"),
            (lambda _, t: t["networks.log_temp._parameter"].fill_(th.nan), "NaN or infinity"),
            (lambda _, t: t.pop("optimizers.critic_optim.0.exp_avg"), "tensors are not those"),
        ],
    )
    def test_are_refused(self, saved: Path, change: Any, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            load_weights(forge(saved, change))

    def test_are_not_refused_as_such(self, saved: Path) -> None:
        load_weights(forge(saved, lambda *_: None))

    def test_only_d3rlpys_own_parts_go_by_a_name(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a program has registered for itself would be called with a stranger's arguments."""
        registered = d3rlpy.serializable_config.CONFIG_STORAGE[d3rlpy.models.EncoderFactory].config_list
        monkeypatch.setitem(registered, _TupleEncoderFactory.get_type(), _TupleEncoderFactory)
        with pytest.raises(WeightsError, match=r"critic_encoder_factory.*weights_tuple"):
            load_weights(forge(saved, set_encoder(_TupleEncoderFactory.get_type())))

    def test_a_schedule_is_numbers(self, place: Path) -> None:
        """torch would write whatever it says into the scheduler's attributes."""
        schedule = d3rlpy.optimizers.WarmupSchedulerFactory(warmup_steps=50)
        factory = d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=schedule)
        save_weights(trained(CQLConfig, critic_optim_factory=factory), place, optimizer=True)
        load_weights(place)
        for change in ({"step": 1}, {"last_epoch": "now"}, {"base_lrs": [1.0, 2.0]}):
            forged = forge(place, lambda d, _, change=change: critic(d)["lr_scheduler"].update(change))
            with pytest.raises(WeightsError, match="lr_scheduler"):
                load_weights(forged)

    def test_of_the_other_framework(self, saved: Path) -> None:
        forged = forge(saved, lambda document, _: document.update(framework="sb3"))
        with pytest.raises(WeightsError, match=r"cql_plugins.sb3.load_weights; cql_plugins.adapters.to_d3rlpy_model"):
            load_weights(forged)


def test_arrays_behind_a_named_type() -> None:
    """NumPy 2.5 makes its NDArray with a `type` statement."""
    item = TypeVar("item")
    alias = TypeAliasType("alias", np.ndarray[Any, np.dtype[item]], type_params=(item,))  # type: ignore[type-var]
    for hint in (alias[Any], np.ndarray[Any, Any]):
        kind = _kind_of("mean", hint)
        assert kind.read([[1.5, 2.0], [3.0, 4.0]]) == [[1.5, 2.0], [3.0, 4.0]]
        with pytest.raises(ValueError, match="a text"):
            kind.read("a text")
    with pytest.raises(TypeError, match=r"mean has the type .*, which the weights' format has no form for"):
        _kind_of("mean", TypeAliasType("other", dict[str, item], type_params=(item,))[int])
