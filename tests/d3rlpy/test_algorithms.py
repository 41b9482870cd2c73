"""What d3rlpy's users do with an algorithm, done with ours: the topics of d3rlpy's own algorithm tests, and ONNX."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import pytest
import torch as th
from d3rlpy.dataset import Episode, Transition, TransitionMiniBatch, create_infinite_replay_buffer
from d3rlpy.logging import FileAdapterFactory, NoopAdapterFactory
from gymnasium import spaces

import cql_plugins.d3rlpy as room
from cql_plugins.adapters import OfflineDataset, to_d3rlpy
from cql_plugins.d3rlpy import CalQLConfig, CQLConfig, DiscreteCalQLConfig, DiscreteCQLConfig
from cql_plugins.d3rlpy.cql import register_once

ACTION, BATCH = 2, 8
VECTOR, IMAGE, TUPLE = (5,), (3, 36, 36), ((4,), (6,))
SHAPES = {"vector": VECTOR, "image": IMAGE, "tuple": TUPLE}
CONTINUOUS, DISCRETE = (CQLConfig, CalQLConfig), (DiscreteCQLConfig, DiscreteCalQLConfig)
CONFIGS = {config.__name__: config for config in (*CONTINUOUS, *DISCRETE)}
Q_FUNCS = {
    "mean": d3rlpy.models.MeanQFunctionFactory,
    "qr": lambda: d3rlpy.models.QRQFunctionFactory(n_quantiles=6),
    # d3rlpy's continuous IQN takes no two numbers: its forwarder asks for one in training and its target gives the other.
    "iqn": lambda: d3rlpy.models.IQNQFunctionFactory(n_quantiles=6, n_greedy_quantiles=6, embed_size=8),
}


def observe(shape: Any, n: int | None = None, rng: Any = np.random) -> Any:
    if isinstance(shape[0], tuple):
        return [observe(s, n, rng) for s in shape]
    size = shape if n is None else (n, *shape)
    if len(shape) == 3:
        return rng.randint(0, 255, size=size).astype(np.uint8)
    return rng.random_sample(size).astype(np.float32)


class TupleEncoder(th.nn.Module):
    """Joins the parts of a tuple observation; d3rlpy leaves that to the user."""

    def __init__(self, shape: Any, extra: int = 0) -> None:
        super().__init__()
        self.layer = th.nn.Linear(sum(int(np.prod(s)) for s in shape) + extra, 16)

    def forward(self, x: Any, action: Any = None) -> th.Tensor:
        return th.relu(self.layer(th.cat([*x] if action is None else [*x, action], dim=1)))


class TupleEncoderFactory(d3rlpy.models.EncoderFactory):
    def create(self, observation_shape: Any) -> Any:
        return TupleEncoder(observation_shape)

    def create_with_action(self, observation_shape: Any, action_size: int, discrete_action: bool = False) -> Any:
        return TupleEncoder(observation_shape, action_size)

    @staticmethod
    def get_type() -> str:
        return "cql_plugins.tests.tuple"


if "cql_plugins.tests.tuple" not in d3rlpy.serializable_config.CONFIG_STORAGE[d3rlpy.models.EncoderFactory].config_list:
    d3rlpy.models.register_encoder_factory(TupleEncoderFactory)


def encoder_for(shape: Any) -> Any:
    if shape == TUPLE:
        return TupleEncoderFactory()
    if shape == IMAGE:
        return d3rlpy.models.PixelEncoderFactory(filters=[[4, 8, 4], [8, 4, 2]], feature_size=16)
    return d3rlpy.models.VectorEncoderFactory([16])


def scalers_for(shape: Any, discrete: bool) -> dict[str, Any]:
    if shape == VECTOR:
        observation: Any = d3rlpy.preprocessing.StandardObservationScaler(mean=np.full(5, 0.5), std=np.full(5, 2.0))
    elif shape == IMAGE:
        observation = d3rlpy.preprocessing.PixelObservationScaler()
    else:
        observation = d3rlpy.preprocessing.TupleObservationScaler(
            [d3rlpy.preprocessing.StandardObservationScaler(mean=np.zeros(s), std=np.full(s, 3.0)) for s in TUPLE]
        )
    scalers: dict[str, Any] = {
        "observation_scaler": observation,
        "reward_scaler": d3rlpy.preprocessing.MultiplyRewardScaler(2.0),
    }
    if not discrete:
        scalers["action_scaler"] = d3rlpy.preprocessing.MinMaxActionScaler(minimum=np.full(2, -2.0), maximum=np.full(2, 2.0))
    return scalers


def make(config: Any, shape: Any = VECTOR, q_func: str = "mean", scaled: bool = False, **options: Any) -> Any:
    discrete = config in DISCRETE
    names = ("encoder_factory",) if discrete else ("actor_encoder_factory", "critic_encoder_factory")
    arguments: dict[str, Any] = {name: encoder_for(shape) for name in names}
    arguments |= {"q_func_factory": Q_FUNCS[q_func](), "batch_size": BATCH} | ({} if discrete else {"n_action_samples": 3})
    return config(**(arguments | (scalers_for(shape, discrete) if scaled else {}) | options)).create()


def act(algo: Any, n: int) -> Any:
    discrete = algo.get_action_type() == d3rlpy.ActionSpace.DISCRETE
    return np.random.randint(ACTION, size=(n, 1)) if discrete else np.random.uniform(-1, 1, (n, ACTION)).astype(np.float32)


def make_batch(algo: Any, shape: Any) -> TransitionMiniBatch:
    actions, next_actions = act(algo, BATCH), act(algo, BATCH)
    return TransitionMiniBatch.from_transitions(
        [
            Transition(
                observation=observe(shape),
                action=actions[i],
                reward=np.random.random(1).astype(np.float32),
                next_observation=observe(shape),
                next_action=next_actions[i],
                terminal=float(i % 2),
                interval=1,
                rewards_to_go=np.random.random((4, 1)).astype(np.float32),
            )
            for i in range(BATCH)
        ]
    )


def make_dataset(algo: Any, shape: Any) -> Any:
    n, rewards = 12, np.random.random((12, 1)).astype(np.float32)
    episodes = [Episode(observe(shape, n), act(algo, n), rewards, terminated) for terminated in (True, False)]
    return create_infinite_replay_buffer(episodes)


def fields(config: Any) -> Any:
    """A config as JSON has it, where 0 and 0.0 are one."""
    return json.loads(config.serialize())


def same(first: Any, second: Any) -> bool:
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


ALL = [
    pytest.param(config, shape, q_func, scaled, id=f"{name}-{kind}-{q_func}-{'scaled' if scaled else 'raw'}")
    for name, config in CONFIGS.items()
    for kind, shape in SHAPES.items()
    for q_func in Q_FUNCS
    for scaled in (False, True)
]


class TestHostTopics:
    @pytest.mark.parametrize(("config", "shape", "q_func", "scaled"), ALL)
    def test_everything(self, config: Any, shape: Any, q_func: str, scaled: bool, tmp_path: Path) -> None:
        algo = make(config, shape, q_func, scaled)
        dataset = make_dataset(algo, shape)

        results = algo.fit(dataset, n_steps=4, n_steps_per_epoch=2, logger_adapter=NoopAdapterFactory(), show_progress=False)
        assert [epoch for epoch, _ in results] == [1, 2]
        assert algo.grad_step == 4
        assert all(isinstance(v, float) and np.isfinite(v) for v in results[-1][1].values())

        observations = observe(shape, 7)
        actions = algo.predict(observations)
        assert actions.shape == ((7,) if config in DISCRETE else (7, ACTION))
        assert algo.sample_action(observations).shape == actions.shape
        values = algo.predict_value(observations, act(algo, 7).reshape(actions.shape))
        assert values.shape == (7,)

        metrics = algo.update(make_batch(algo, shape))
        assert metrics
        assert all(isinstance(value, float) for value in metrics.values())
        assert ("bound_rate" in metrics) is (config in (CalQLConfig, DiscreteCalQLConfig))

        twin = algo.config.create()
        twin.create_impl(algo.observation_shape, ACTION)
        value = algo.predict_value(observations, actions)
        assert not same(value, twin.predict_value(observations, actions))
        twin.copy_q_function_from(algo)
        assert q_func == "iqn" or same(value, twin.predict_value(observations, actions))
        assert not twin.impl.q_function_optim.state
        twin.copy_q_function_optim_from(algo)
        assert twin.impl.q_function_optim.state
        twin.reset_optimizer_states()
        assert not twin.impl.q_function_optim.state
        if config in CONTINUOUS:
            assert not same(algo.predict(observations), twin.predict(observations))
            twin.copy_policy_from(algo)
            assert same(algo.predict(observations), twin.predict(observations))
            twin.copy_policy_optim_from(algo)
            assert twin.impl.policy_optim.state

        algo.save_model(str(tmp_path / "model.pt"))
        twin = algo.config.create()
        twin.create_impl(algo.observation_shape, ACTION)
        twin.load_model(str(tmp_path / "model.pt"))
        assert q_func == "iqn" or same(algo.predict(observations), twin.predict(observations))

        algo.save(str(tmp_path / "algo.d3"))
        loaded = d3rlpy.load_learnable(str(tmp_path / "algo.d3"))
        assert type(loaded) is type(algo)
        assert fields(loaded.config) == fields(algo.config)
        assert q_func == "iqn" or same(algo.predict(observations), loaded.predict(observations))
        loaded.update(make_batch(loaded, shape))

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_logs_evaluators_callbacks_and_json(self, config: Any, tmp_path: Path) -> None:
        algo = make(config, scaled=True)
        steps: list[int] = []
        evaluators = {"td": d3rlpy.metrics.TDErrorEvaluator(), "value": d3rlpy.metrics.AverageValueEstimationEvaluator()}
        fitter = algo.fitter(
            make_dataset(algo, VECTOR),
            n_steps=4,
            n_steps_per_epoch=2,
            logger_adapter=FileAdapterFactory(root_dir=str(tmp_path)),
            experiment_name="run",
            with_timestamp=False,
            show_progress=False,
            evaluators=evaluators,
            callback=lambda _algo, _epoch, step: steps.append(step),
        )
        metrics = dict(fitter)
        assert steps == [1, 2, 3, 4]
        assert {"td", "value"} <= metrics[2].keys()
        folder = tmp_path / "run"
        assert (folder / "model_4.d3").exists()
        again = type(algo).from_json(str(folder / "params.json"))
        assert fields(again.config) == fields(algo.config)
        loaded = d3rlpy.load_learnable(str(folder / "model_4.d3"))
        observations = observe(VECTOR, 3)
        assert same(loaded.predict(observations), algo.predict(observations))

    def test_metrics_have_d3rlpys_names_and_ours(self) -> None:
        algo = make(CalQLConfig)
        algo.create_impl(VECTOR, ACTION)
        theirs = d3rlpy.algos.CalQLConfig(actor_encoder_factory=encoder_for(VECTOR), critic_encoder_factory=encoder_for(VECTOR))
        host = theirs.create()
        host.create_impl(VECTOR, ACTION)
        batch = make_batch(algo, VECTOR)
        extra = {"td_loss", "conservative_gap", "q_data", "q_policy", "q_random", "bound_rate"}
        assert algo.update(batch).keys() == host.update(batch).keys() | extra
        mean = make(CQLConfig, cql_variant="mu")
        mean.create_impl(VECTOR, ACTION)
        assert "q_random" not in mean.update(batch)

    @pytest.mark.parametrize("n_critics", [1, 3])
    def test_several_critics(self, n_critics: int) -> None:
        for config in CONFIGS.values():
            algo = make(config, n_critics=n_critics)
            algo.create_impl(VECTOR, ACTION)
            assert np.isfinite(list(algo.update(make_batch(algo, VECTOR)).values())).all()

    def test_discrete_gap_is_of_each_critic(self) -> None:
        """d3rlpy takes that of their mean, which is smaller."""
        algo = make(DiscreteCQLConfig, n_critics=2)
        algo.create_impl(VECTOR, ACTION)
        batch = make_batch(algo, VECTOR)
        values = [q(th.as_tensor(batch.observations)).q_value.detach() for q in algo.impl.modules.q_funcs]
        actions = th.as_tensor(batch.actions).long()
        by_hand = sum(float((v.logsumexp(1, keepdim=True) - v.gather(1, actions)).mean()) for v in values)
        assert algo.update(batch)["conservative_loss"] == pytest.approx(by_hand, rel=1e-5)

    def test_quantile_bellman_error_is_summed_over_quantiles(self) -> None:
        """The paper's weights 4.0 and 1.0 belong to this reduction: sum over quantiles, mean over targets and batch."""
        algo = make(DiscreteCQLConfig, q_func="qr", alpha=0.0, gamma=0.9)
        algo.create_impl(VECTOR, ACTION)
        batch = make_batch(algo, VECTOR)
        q_func, target = algo.impl.modules.q_funcs[0], algo.impl.modules.targ_q_funcs[0]
        with th.no_grad():
            quantiles = q_func(th.as_tensor(batch.observations)).quantiles.double().numpy()
            after = q_func(th.as_tensor(batch.next_observations)).q_value
            next_quantiles = target(th.as_tensor(batch.next_observations)).quantiles.double().numpy()
        rows = np.arange(BATCH)
        current = quantiles[rows, batch.actions[:, 0].astype(int)]
        best = next_quantiles[rows, after.argmax(1).numpy()]
        y = batch.rewards + 0.9 * (1 - batch.terminals) * best
        n = current.shape[1]
        taus = (np.arange(n) + 0.5) / n
        difference = y[:, :, None] - current[:, None, :]
        huber = np.where(np.abs(difference) < 1, 0.5 * difference**2, np.abs(difference) - 0.5)
        by_hand = (np.abs(taus - (difference < 0)) * huber).sum(2).mean(1).mean()
        assert algo.update(batch)["td_loss"] == pytest.approx(by_hand, rel=1e-5)


class TestFittedScalers:
    """d3rlpy fits the scaler of tuple observations on episodes of its own class alone."""

    ALGOS = CONFIGS | {"d3rlpy's CQL": d3rlpy.algos.CQLConfig, "d3rlpy's discrete": d3rlpy.algos.DiscreteCQLConfig}

    def buffers(self, discrete: bool) -> tuple[Any, Any]:
        """Two episodes of 6 steps, of which the second is truncated, in our buffer and as d3rlpy keeps them."""
        rng = np.random.default_rng(4)
        ends = np.arange(12) % 6 == 5
        space = {f"{i}": spaces.Box(-np.inf, np.inf, shape, np.float32) for i, shape in enumerate(TUPLE)}
        data = OfflineDataset(
            {key: rng.normal(size=(14, *box.shape)).astype(np.float32) for key, box in space.items()},
            rng.integers(ACTION, size=12) if discrete else rng.uniform(-1, 1, (12, ACTION)).astype(np.float32),
            rng.normal(size=12).astype(np.float32),
            ends & (np.arange(12) < 6),
            ends & (np.arange(12) >= 6),
            observation_space=spaces.Dict(space),
            action_space=spaces.Discrete(ACTION) if discrete else spaces.Box(-1, 1, (ACTION,), np.float32),
        )
        ours = to_d3rlpy(data)
        theirs = [Episode(e.observations, e.actions, e.rewards, e.terminated) for e in ours.episodes]
        return ours, create_infinite_replay_buffer(theirs)

    def scaler(self) -> Any:
        own = d3rlpy.preprocessing
        return own.TupleObservationScaler([own.StandardObservationScaler(), own.MinMaxObservationScaler()])

    @pytest.mark.parametrize("config", ALGOS.values(), ids=ALGOS)
    def test_tuples(self, config: Any) -> None:
        discrete = "Discrete" in config.__name__
        fitted = []
        for buffer in self.buffers(discrete):
            names = ("encoder_factory",) if discrete else ("actor_encoder_factory", "critic_encoder_factory")
            options = {name: encoder_for(TUPLE) for name in names}
            algo = config(**options, batch_size=BATCH, observation_scaler=self.scaler()).create()
            algo.fit(buffer, n_steps=1, n_steps_per_epoch=1, logger_adapter=NoopAdapterFactory(), show_progress=False)
            fitted.append(algo.config.observation_scaler)
        assert fitted[0].built
        assert fitted[0].serialize() == fitted[1].serialize()

    def test_tuples_of_trajectories(self) -> None:
        fitted = []
        for buffer in self.buffers(discrete=False):
            scaler = self.scaler()
            scaler.fit_with_trajectory_slicer(buffer.episodes, buffer.trajectory_slicer)
            fitted.append(scaler.serialize())
        assert fitted[0] == fitted[1]


class TestPickle:
    """d3rlpy's own can be sent to a process or kept by ``torch.save``."""

    OURS = CONFIGS | {"d3rlpy's discrete": d3rlpy.algos.DiscreteCQLConfig}

    @pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
    @pytest.mark.parametrize("config", OURS.values(), ids=OURS)
    def test_there_and_back(self, config: Any, trained: bool) -> None:
        if config is d3rlpy.algos.DiscreteCQLConfig:
            algo = config(encoder_factory=encoder_for(VECTOR), batch_size=BATCH).create()
        else:
            algo = make(config)
        algo.create_impl(VECTOR, ACTION)
        if trained:
            fitting = {"n_steps": 3, "n_steps_per_epoch": 3, "logger_adapter": NoopAdapterFactory(), "show_progress": False}
            algo.fit(make_dataset(algo, VECTOR), **fitting)
        again = pickle.loads(pickle.dumps(algo))
        observations = observe(VECTOR, 9)
        assert np.array_equal(again.predict(observations), algo.predict(observations))
        batch = make_batch(algo, VECTOR)
        th.manual_seed(5)
        metrics, values = algo.update(batch), algo.predict_value(observations, act(algo, 9) * 0)
        assert not np.array_equal(again.predict_value(observations, act(algo, 9) * 0), values), "the copy stands alone"
        th.manual_seed(5)
        assert again.update(batch) == metrics
        assert np.array_equal(again.predict_value(observations, act(algo, 9) * 0), values)


class TestSavedPolicies:
    # d3rlpy's way of saving; the category depends on torch's version.
    @pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported in Python 3.14)")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # its scalers check shapes
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("config", [CQLConfig, DiscreteCalQLConfig])
    def test_torchscript(self, config: Any, shape: Any, tmp_path: Path) -> None:
        algo = make(config, shape, scaled=True)
        algo.create_impl(shape, ACTION)
        algo.save_policy(str(tmp_path / "policy.pt"))
        policy = th.jit.load(str(tmp_path / "policy.pt"))
        observations = observe(shape, 9)
        inputs = [th.as_tensor(o).float() for o in (observations if shape == TUPLE else [observations])]
        np.testing.assert_allclose(policy(*inputs).detach().numpy(), algo.predict(observations), atol=1e-5)
        assert [p.name for p in tmp_path.iterdir()] == ["policy.pt"]

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("config", [CQLConfig, DiscreteCalQLConfig])
    def test_onnx(self, config: Any, shape: Any, tmp_path: Path) -> None:
        if shape == TUPLE and sys.version_info >= (3, 14) and th.__version__.startswith("2.9."):
            pytest.skip("torch 2.9 cannot export several observations with Python 3.14")
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package)
        runtime = pytest.importorskip("onnxruntime")
        algo = make(config, shape, scaled=True)
        algo.create_impl(shape, ACTION)
        path = tmp_path / "policy.onnx"
        algo.save_policy(str(path))
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for n in (1, 9):
            observations = observe(shape, n)
            parts = observations if shape == TUPLE else [observations]
            inputs = {f"input_{i}": part.astype(np.float32) for i, part in enumerate(parts)}
            (actions,) = session.run(None, inputs)
            np.testing.assert_allclose(actions, algo.predict(observations), atol=1e-5)
        assert [p.name for p in tmp_path.iterdir()] == ["policy.onnx"]
        algo.update(make_batch(algo, shape))  # and training goes on

    @pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="torch without gloo")
    @pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported in Python 3.14)")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("suffix", ["pt", "onnx"])
    @pytest.mark.parametrize("config", [CQLConfig, DiscreteCalQLConfig])
    def test_of_one_that_several_processes_train(self, config: Any, suffix: str, tmp_path: Path) -> None:
        if suffix == "onnx":
            for package in ("onnx", "onnxscript", "onnxruntime"):
                pytest.importorskip(package)
        th.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            options = make(config, scaled=True, q_func="qr" if config in DISCRETE else "mean").config
            algo = options.create(device="cpu:0", enable_ddp=True)
            algo.create_impl(VECTOR, ACTION)
            algo.update(make_batch(algo, VECTOR))
            impl, modules, parts = algo.impl, algo.impl.modules, algo.impl.modules.get_torch_modules()
            before = {f"{name}.{key}": v.clone() for name, part in parts.items() for key, v in part.state_dict().items()}
            assert any(".module." in name for name in before), "DistributedDataParallel's"
            path = tmp_path / f"policy.{suffix}"
            algo.save_policy(str(path))
            observations = observe(VECTOR, 9)
            if suffix == "pt":
                actions = th.jit.load(str(path))(th.tensor(observations)).numpy()
            else:
                session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
                (actions,) = session.run(None, {"input_0": observations})
            np.testing.assert_allclose(actions, algo.predict(observations), atol=1e-5)
            assert algo.impl is impl
            assert impl.modules is modules
            after = {f"{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}
            assert before.keys() == after.keys()
            assert all(th.equal(before[name], after[name]) for name in before)
            assert all(p.requires_grad for p in parts["q_funcs"].parameters())
            algo.update(make_batch(algo, VECTOR))  # and training goes on
            assert not all(th.equal(before[name], after[name]) for name in before)
        finally:
            th.distributed.destroy_process_group()

    def test_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        algo = make(CQLConfig)
        algo.create_impl(VECTOR, ACTION)
        target = tmp_path / "policy.onnx"
        target.write_bytes(b"the last good one")

        def fail(_module: Any, _examples: Any, path: str) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr("cql_plugins.d3rlpy.offline.export_onnx", fail)
        with pytest.raises(OSError, match="No space"):
            algo.save_policy(str(target))
        assert target.read_bytes() == b"the last good one"
        assert list(tmp_path.iterdir()) == [target]
        with pytest.raises(ValueError, match="must end in"):
            algo.save_policy(str(tmp_path / "policy.h5"))


class TestConfigs:
    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            (CQLConfig, {"conservative_weight": -1.0}, "conservative_weight must be a number >= 0; got -1.0"),
            (CQLConfig, {"initial_alpha": 0.0}, "initial_alpha must be a number > 0, .*; got 0.0"),
            (CalQLConfig, {"initial_alpha": -1.0}, "initial_alpha must be a number > 0, .*; got -1.0"),
            (CalQLConfig, {"initial_temperature": 0}, "initial_temperature must be a number > 0, .*; got 0"),
            (CQLConfig, {"n_action_samples": 0}, "n_action_samples must be an integer >= 1; got 0"),
            (CQLConfig, {"cql_variant": "h"}, "cql_variant must be one of"),
            (CQLConfig, {"cql_temperature": 0.0}, "cql_temperature must be a number > 0; got 0.0"),
            (CQLConfig, {"cql_clip_diff": (1.0, 0.0)}, "cql_clip_diff must be"),
            (CQLConfig, {"offline_fraction": 1.5}, "offline_fraction must be in"),
            (CQLConfig, {"conventions": "mine"}, 'conventions must be "paper" or "d3rlpy"'),
            (CQLConfig, {"soft_q_backup": True, "max_q_backup": True}, "exclude each other"),
            (CQLConfig, {"soft_q_backup": True, "mode_q_backup": True}, "mode_q_backup and soft_q_backup exclude each other"),
            (
                CalQLConfig,
                {"conventions": "d3rlpy", "q_func_factory": d3rlpy.models.QRQFunctionFactory()},
                "whose values are quantiles",
            ),
            (CalQLConfig, {"mode_q_backup": True}, "mode_q_backup and max_q_backup exclude each other"),
            (CalQLConfig, {"return_tail": "open"}, "return_tail must be one of"),
            (DiscreteCQLConfig, {"alpha": float("nan")}, "alpha must be a number >= 0; got nan"),
            (DiscreteCalQLConfig, {"return_tail": "open"}, "return_tail must be one of"),
        ],
    )
    def test_out_of_range(self, config: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            config(**options)

    def test_types_are_our_own_and_safe_to_register_again(self) -> None:
        names = {config.get_type() for config in CONFIGS.values()}
        assert names == {f"cql_plugins.{n}" for n in ("cql", "cal_ql", "discrete_cql", "discrete_cal_ql")}
        registered = d3rlpy.serializable_config.CONFIG_STORAGE[d3rlpy.base.LearnableConfig].config_list
        for config in CONFIGS.values():
            register_once(config)
            assert registered[config.get_type()] is config
        assert registered["cql"] is d3rlpy.algos.CQLConfig, "d3rlpy's own is untouched"

    def test_a_config_of_another_algorithm_is_not_taken_over(self) -> None:
        for ours, theirs in ((CQLConfig, d3rlpy.algos.CalQLConfig), (CalQLConfig, d3rlpy.algos.CQLConfig)):
            with pytest.raises(TypeError, match="each take over their own"):
                ours.from_d3rlpy(theirs())

    def test_a_d3rlpy_config_stays_what_it_is(self) -> None:
        theirs = d3rlpy.algos.CQLConfig(alpha_threshold=3.0, gamma=0.9)
        for given in (theirs, theirs.serialize_to_dict()):
            ours = CQLConfig.from_d3rlpy(given)
            assert (ours.alpha_learning_rate, ours.alpha_threshold, ours.gamma, ours.conventions) == (1e-4, 3.0, 0.9, "d3rlpy")
        assert CQLConfig().alpha_learning_rate == 0.0
        assert CQLConfig.from_d3rlpy(theirs, conventions="paper").conventions == "paper"

    def test_json_keeps_everything(self) -> None:
        config = CalQLConfig(cql_clip_diff=(-200.0, float("inf")), offline_fraction="proportional", return_tail="sparse")
        assert CalQLConfig.deserialize(config.serialize()) == config
        assert json.loads(config.serialize())["return_tail"] == "sparse"


class TestLagrange:
    def test_off_by_default(self) -> None:
        algo = make(CQLConfig)
        algo.create_impl(VECTOR, ACTION)
        assert algo.impl.modules.alpha_optim is None
        assert algo.update(make_batch(algo, VECTOR))["alpha"] == 1.0

    @pytest.mark.parametrize(("threshold", "direction"), [(-100.0, 1.0), (100.0, -1.0)])
    def test_moves_towards_the_threshold(self, threshold: float, direction: float) -> None:
        algo = make(CQLConfig, alpha_learning_rate=0.1, alpha_threshold=threshold)
        algo.create_impl(VECTOR, ACTION)
        batch = make_batch(algo, VECTOR)
        first, second = algo.update(batch)["alpha"], algo.update(batch)["alpha"]
        assert first == 1.0, "used before it is stepped"
        assert np.sign(second - first) == direction

    def test_the_clamp_is_told_once(self) -> None:
        algo = make(CQLConfig, initial_alpha=2e6)
        algo.create_impl(VECTOR, ACTION)
        batch = make_batch(algo, VECTOR)
        with pytest.warns(UserWarning, match="clamp of 1e\\+06"):
            assert algo.update(batch)["alpha"] == pytest.approx(1e6)
        algo.update(batch)


def test_import_prints_no_notice_and_hides_no_warning() -> None:
    for room_name in ("d3rlpy", "sb3"):
        code = f"import warnings; warnings.simplefilter('error'); import cql_plugins.{room_name}; warnings.warn('seen')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "Gym has been unmaintained" not in done.stderr
        assert "UserWarning: seen" in done.stderr
    plain = subprocess.run([sys.executable, "-c", "import d3rlpy"], capture_output=True, text=True, check=False)
    assert "Gym has been unmaintained" in plain.stderr, "the twin: d3rlpy alone prints it"


def test_names() -> None:
    assert set(room.__all__) >= {*CONFIGS, "CQL", "CalQL", "DiscreteCQL", "DiscreteCalQL"}
