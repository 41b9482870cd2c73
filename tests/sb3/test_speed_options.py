"""precision, compile, data_device, cql_n_backward: what they change, and what they must not."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from cql_plugins import ensembles
from cql_plugins.sb3 import CQL, CalQL, DiscreteCalQL, DiscreteCQL
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.buffers import with_returns_to_go
from cql_plugins.sb3.captured import CapturedSteps, make_capturable, make_fused, portable_state
from cql_plugins.sb3.device_data import DeviceData
from cql_plugins.sb3.metrics import MetricsVector
from tests.sb3.conftest import of_contrib

CQLQRDQN, CQLTQC, CalQLQRDQN, CalQLTQC = of_contrib("CQLQRDQN", "CQLTQC", "CalQLQRDQN", "CalQLTQC")
CONTINUOUS: list[Any] = [CQL, CalQL, CQLTQC, CalQLTQC]
DISCRETE: list[Any] = [DiscreteCQL, DiscreteCalQL, CQLQRDQN, CalQLQRDQN]
OBSERVATIONS = spaces.Box(-10, 10, (3,), np.float32)
ROWS = 40


def make_buffer(base: type[ReplayBuffer] = ReplayBuffer, discrete: bool = False, **kwargs: Any) -> ReplayBuffer:
    """Rows of random numbers; ends at 9, 19, ..., of which every other is a time-out."""
    rng = np.random.default_rng(0)
    actions: Any = spaces.Discrete(4) if discrete else spaces.Box(-1, 1, (2,), np.float32)
    space: Any = spaces.Dict({"a": OBSERVATIONS, "b": OBSERVATIONS}) if base is DictReplayBuffer else OBSERVATIONS
    buffer = base(ROWS, space, actions, "cpu", **kwargs)
    keys = list(buffer.observations) if isinstance(buffer.observations, dict) else [slice(None)]
    for key in keys:
        buffer.observations[key][:] = rng.normal(size=buffer.observations[key].shape)
        buffer.next_observations[key][:] = np.roll(buffer.observations[key], -1, axis=0)
    buffer.actions[:] = rng.integers(4, size=buffer.actions.shape) if discrete else rng.uniform(-1, 1, buffer.actions.shape)
    buffer.rewards[:] = rng.normal(size=buffer.rewards.shape)
    buffer.dones[9::10] = 1
    buffer.timeouts[19::20] = 1
    buffer.full = True
    return buffer


def make_model(algorithm: Any, buffer: ReplayBuffer | None = None, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {"seed": 0, "device": "cpu", "batch_size": 16, "buffer_size": 100}
    arguments["policy_kwargs"] = {"net_arch": [16, 16]}
    if buffer is None:
        buffer = make_buffer(discrete=algorithm in DISCRETE)
    return algorithm.from_dataset(buffer, **(arguments | kwargs))


def parameters(model: Any) -> th.Tensor:
    return th.cat([p.detach().flatten().double() for p in model.policy.parameters()])


class TestPrecision:
    @pytest.mark.parametrize("algorithm", CONTINUOUS + DISCRETE)
    def test_is_near_single_precision_and_not_the_same(self, algorithm: Any) -> None:
        """Under plain gradient descent, so that parameters move by the gradient and not by its sign."""
        after = []
        for precision in ("f32", "bf16"):
            kwargs = {"net_arch": [16, 16], "optimizer_class": th.optim.SGD}
            model = make_model(algorithm, precision=precision, policy_kwargs=kwargs, learning_rate=1e-2)
            before = parameters(model)
            set_random_seed(1)
            model.train(1, 16)
            after.append(parameters(model) - before)
        exact, rough = after
        assert not th.equal(exact, rough)
        assert th.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99
        assert 0.95 < float(rough.norm() / exact.norm()) < 1.05

    @pytest.mark.parametrize("algorithm", CONTINUOUS + DISCRETE)
    def test_parameters_and_optimisers_stay_single_precision(self, algorithm: Any) -> None:
        model = make_model(algorithm, precision="bf16")
        model.train(2, 16)
        for optimizer in model._all_optimizers():
            tensors = [t for state in optimizer.state.values() for t in state.values()]
            assert {t.dtype for t in tensors} == {th.float32}
        assert {p.dtype for p in model.policy.parameters()} == {th.float32}

    @pytest.mark.parametrize("algorithm", CONTINUOUS)
    def test_target_is_single_precision(self, algorithm: Any) -> None:
        targets = []
        for precision in ("f32", "bf16"):
            model = make_model(algorithm, precision=precision)
            batch = model.sample_batch(16)
            set_random_seed(1)
            targets.append(model._compute_target(batch, th.tensor(0.1))[0])
        assert th.equal(*targets)

    @pytest.mark.parametrize("algorithm", DISCRETE)
    @pytest.mark.parametrize("double_q", [False, True])
    def test_discrete_target_is_single_precision(self, algorithm: Any, double_q: bool) -> None:
        targets = []
        for precision in ("f32", "bf16"):
            model = make_model(algorithm, precision=precision, double_q=double_q)
            set_random_seed(1)
            with th.no_grad():
                targets.append(model._compute_target(model.sample_batch(16)))
        assert th.equal(*targets)

    def test_images(self) -> None:
        space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        buffer = ReplayBuffer(20, space, spaces.Box(-1, 1, (2,), np.float32), "cpu")
        buffer.observations[:] = np.random.default_rng(0).integers(0, 255, size=buffer.observations.shape)
        buffer.full = True
        model = make_model(CQL, buffer, policy="CnnPolicy", precision="bf16", policy_kwargs={"net_arch": [8]})
        seen = []
        model.critic.features_extractor.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        model.train(1, 6)
        # The pass of the penalty, then the actor's loss.
        assert seen == [th.bfloat16, th.float32]
        assert parameters(model).isfinite().all()

    @pytest.mark.parametrize("algorithm", [CQL, DiscreteCQL])
    def test_refuses_other_names(self, algorithm: Any) -> None:
        with pytest.raises(ValueError, match=r"precision must be one of .* got 'fp16'"):
            make_model(algorithm, precision="fp16")

    @pytest.mark.parametrize("algorithm", [CQL, DiscreteCQL])
    def test_warns_where_it_is_slow(self, algorithm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        make_model(algorithm, precision="bf16").save(tmp_path / "model")
        monkeypatch.setattr(ensembles, "multiplies_bf16", lambda: False)
        with pytest.warns(UserWarning, match="precision='bf16' is slow on this processor"):
            make_model(algorithm, precision="bf16")
        with pytest.warns(UserWarning, match="precision='bf16' is slow on this processor"):
            algorithm.load(tmp_path / "model", device="cpu")

    def test_is_saved(self, tmp_path: Path) -> None:
        make_model(CQL, precision="bf16", cql_n_backward=5).save(tmp_path / "model")
        loaded = CQL.load(tmp_path / "model", device="cpu")
        assert (loaded.precision, loaded.cql_n_backward) == ("bf16", 5)


class Dueling(QNetwork):
    """A network with a forward pass of its own, as users write them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value = th.nn.Linear(self.features_dim, 1)

    def forward(self, obs: Any) -> th.Tensor:
        features = self.extract_features(obs, self.features_extractor)
        advantage = self.q_net(features)
        return self.value(features) + advantage - advantage.mean(dim=1, keepdim=True)  # type: ignore[no-any-return]


class DuelingPolicy(DQNPolicy):
    def make_q_net(self) -> Dueling:
        return Dueling(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


class TestNetworksOfUsers:
    @pytest.mark.parametrize("precision", ["f32", "bf16"])
    def test_a_network_is_trained_as_it_is_used(self, precision: str) -> None:
        model = make_model(DiscreteCQL, policy=DuelingPolicy, precision=precision)
        before = model.q_net.value.weight.clone()
        batch = model.sample_batch(16)
        values = model._quantiles(model.q_net, batch.observations).squeeze(1)
        assert th.allclose(values, model.q_net(batch.observations), atol=0 if precision == "f32" else 2e-2)
        model.train(3, 16)
        assert not th.equal(model.q_net.value.weight, before)

    def test_doubles_are_trained_as_doubles(self) -> None:
        """What SAC takes: a policy of float64 in an environment of float64, here without a penalty."""
        for activation in (th.nn.ReLU, th.nn.Tanh):
            model = make_model(CQL, policy_kwargs={"net_arch": [8], "activation_fn": activation})
            model.policy.double()
            batch = model.sample_batch(6).map(th.Tensor.double)
            actions = batch.actions.unsqueeze(1).expand(-1, 3, -1)
            assert model._critic_outputs(model.critic, batch.observations, actions).dtype == th.float64
            assert model._critic_outputs(model.critic, batch.observations, actions[:, :1]).dtype == th.float64

    def test_a_critic_that_is_no_sequence_runs_in_both_precisions(self) -> None:
        class Own(th.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = th.nn.Linear(5, 1)

            def forward(self, inputs: th.Tensor) -> th.Tensor:
                return self.layer(inputs)  # type: ignore[no-any-return]

        for precision in ("f32", "bf16"):
            model = make_model(CQL, precision=precision)
            model.critic.q_networks = [Own(), Own()]
            batch = model.sample_batch(4)
            actions = batch.actions.unsqueeze(1).expand(-1, 3, -1)
            outputs = model._critic_outputs(model.critic, batch.observations, actions, precision)
            assert (outputs.shape, outputs.dtype) == ((2, 4, 3, 1), th.float32)

    def test_sick_policies_are_seen_on_the_cpu_as_in_sac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # torch's compiler, which an export by another test may have loaded, turns the check off for the whole process.
        monkeypatch.setattr(th.distributions.Distribution, "_validate_args", True)
        model = make_model(CQL)
        model.actor.mu.weight.data[:] = np.nan
        batch = model.sample_batch(16)
        with pytest.raises(ValueError, match="Expected parameter loc"):
            model._train_step(batch)
        model._do_not_check_the_policy()
        with pytest.raises(Exception, match="ent_coef_loss is nan"):
            model._train_step(batch)

    @pytest.mark.parametrize("algorithm", [CQL, CalQL, CalQLTQC])
    def test_a_trained_model_can_be_copied(self, algorithm: Any) -> None:
        model = make_model(algorithm)
        model.train(2, 16)
        assert th.equal(parameters(copy.deepcopy(model)), parameters(model))
        assert copy.deepcopy(model.policy) is not None


class TestDrawnBackward:
    @pytest.mark.parametrize("algorithm", [CQL, CalQL])
    def test_changes_the_gradient_and_not_the_loss(self, algorithm: Any) -> None:
        critics, losses = [], []
        for n_backward in (None, 2):
            kwargs = {"net_arch": [16, 16], "optimizer_class": th.optim.SGD}
            model = make_model(algorithm, cql_n_backward=n_backward, policy_kwargs=kwargs, learning_rate=1e-2)
            set_random_seed(1)
            losses.append(model._train_step(model.sample_batch(16)).critic_loss)
            critics.append(model.critic.state_dict()["qf0.0.weight"])
        assert th.equal(*losses), "the value of the loss is of all actions"
        assert not th.equal(*critics)
        assert th.allclose(*critics, atol=1e-2)

    @pytest.mark.parametrize("value", [0, 2.5])
    def test_refuses_other_numbers(self, value: Any) -> None:
        with pytest.raises(ValueError, match="cql_n_backward must be None or an integer >= 1"):
            make_model(CQL, cql_n_backward=value)


class Replay:
    """Stands for a CUDA graph: runs the function that was recorded again."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, function: Any) -> tuple[Any, MetricsVector]:
        self.recorded += 1
        replay = self
        static = MetricsVector(("x",), th.zeros(1))

        class Graph:
            def replay(self) -> None:
                replay.result = function()
                static.values.copy_(replay.result.values[:1])

        return Graph(), static


class TestCapturedSteps:
    """On the CPU, with a stand-in for the graph: what is copied, what is recorded when, and that a step is a step."""

    def test_equals_steps_one_by_one(self) -> None:
        eager, captured = make_model(CalQL), make_model(CalQL)
        replay = Replay()
        steps = CapturedSteps(captured._measured_step, captured._step_kind, replay.record)
        for i in range(8):
            set_random_seed(i)
            eager.train(1, 16)
            set_random_seed(i)
            steps(captured.sample_batch(16))
            captured._n_updates += 1
        assert replay.recorded == 1
        assert th.equal(parameters(eager), parameters(captured))

    def test_each_kind_of_step_has_a_graph_of_its_own(self) -> None:
        model = make_model(CQL, bc_steps=5, target_update_interval=2)
        replay = Replay()
        steps = CapturedSteps(model._measured_step, model._step_kind, replay.record)
        for _ in range(20):
            steps(model.sample_batch(16))
            model._n_updates += 1
        # Cloning with and without a target update occurs too rarely; afterwards both do.
        assert replay.recorded == 2
        for _ in range(4):
            steps(model.sample_batch(8))
        assert replay.recorded == 3, "another batch size"
        model.cql_alpha = 1.0
        for _ in range(4):
            steps(model.sample_batch(8))
        assert replay.recorded == 4, "another weight"

    def test_every_option_of_a_step_is_part_of_its_kind(self) -> None:
        changes: dict[str, Any] = {
            "calibrate_random": True,
            "cql_temperature": 2.0,
            "cql_n_actions": 3,
            "cql_variant": "rho",
            "gamma": 0.5,
            "tau": 0.1,
            "target_entropy": -9.0,
            "top_quantiles_to_drop_per_net": 5,
        }
        model = make_model(CalQLTQC)
        for name, value in changes.items():
            before = model._step_kind()
            assert getattr(model, name) != value
            setattr(model, name, value)
            assert model._step_kind() != before, name
        discrete = make_model(DiscreteCQL)
        for name, value in {"double_q": True, "max_grad_norm": 1.0, "cql_alpha": 9.0}.items():
            before = discrete._step_kind()
            setattr(discrete, name, value)
            assert discrete._step_kind() != before, name

    def test_only_the_last_kinds_are_kept(self) -> None:
        model = make_model(CQL)
        replay = Replay()
        steps = CapturedSteps(model._measured_step, model._step_kind, replay.record)
        for weight in range(1, 13):
            model.cql_alpha = float(weight)
            for _ in range(4):
                steps(model.sample_batch(4))
        assert replay.recorded == 12
        assert len(steps._recordings) == len(steps._warm_ups) == 8
        steps(model.sample_batch(4))
        assert replay.recorded == 12, "the last one is there still"

    def test_graphs_go_where_tensors_do(self) -> None:
        model = make_model(CQL)
        replay = Replay()
        steps = CapturedSteps(model._measured_step, model._step_kind, replay.record)

        def run() -> int:
            for _ in range(5):
                steps.require_same(model._step_tensors(), model._all_optimizers())
                steps(model.sample_batch(4))
            return replay.recorded

        model.train(1, 4)  # The optimisers' state is made in the first step.
        assert run() == 1
        assert run() == 1, "nothing moved"
        model.actor.mu.weight.requires_grad_(False)
        assert run() == 2, "a layer was frozen"
        model.critic.optimizer.load_state_dict(copy.deepcopy(model.critic.optimizer.state_dict()))
        assert run() == 3, "an optimiser has other tensors"
        model.critic.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        assert run() == 4, "an optimiser has another option"
        model.log_ent_coef = model.log_ent_coef.detach().clone().requires_grad_()
        assert run() == 5
        model.critic.optimizer.param_groups[0]["lr"] = 1e-5
        assert run() == 5, "rates are read anew by a graph"

    def test_graphs_read_the_entropy_coefficient_that_there_is(self) -> None:
        model = make_model(CQL, ent_coef=0.2)
        replay = Replay()
        steps = CapturedSteps(model._measured_step, model._step_kind, replay.record)
        model.train(1, 4)
        for recorded, coefficient in enumerate((model.ent_coef_tensor, th.tensor(0.01)), start=1):
            model.ent_coef_tensor = coefficient
            for _ in range(5):
                steps.require_same(model._step_tensors(), model._all_optimizers())
                steps(model.sample_batch(4))
            assert replay.recorded == recorded

    def test_dict_observations_are_copied_too(self) -> None:
        model = make_model(CalQL, make_buffer(DictReplayBuffer))
        replay, seen = Replay(), []

        def step(batch: Batch) -> MetricsVector:
            seen.append(batch.map(th.clone))
            return MetricsVector(("x",), batch.rewards.mean().reshape(1))

        steps = CapturedSteps(step, lambda: 0, replay.record)
        batches = [model.sample_batch(5) for _ in range(6)]
        results = [steps(batch).values.clone() for batch in batches]
        for batch, own, result in zip(batches, seen, results, strict=True):
            ours, theirs = own.tensors(), batch.tensors()
            assert "observations.a" in ours
            assert all(th.equal(ours[name], theirs[name]) for name in theirs)
            assert result == batch.rewards.mean()

    def test_compile_on_the_cpu_changes_nothing(self) -> None:
        results = []
        for compiled in (False, True):
            model = make_model(CQL, compile=compiled)
            set_random_seed(3)
            model.train(6, 16)
            results.append(parameters(model))
        assert th.equal(*results)

    def test_refuses_what_cannot_be_captured(self) -> None:
        kwargs = {"net_arch": [8], "optimizer_class": th.optim.SGD}
        with pytest.raises(ValueError, match=r"compile=True needs optimisers .* got SGD"):
            make_model(CQL, compile=True, policy_kwargs=kwargs)
        with pytest.raises(ValueError, match="got use_sde=True"):
            make_model(CQL, compile=True, use_sde=True)

    @pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("algorithm", CONTINUOUS + DISCRETE)
    def test_graphs_equal_eager_steps(self, algorithm: Any) -> None:
        results = []
        for compiled, seed in ((False, 1), (True, 1), (False, 2)):
            model = make_model(algorithm, device="cuda", compile=compiled, data_device="cuda")
            th.cuda.manual_seed(seed)
            model.train(100, 16)
            results.append(parameters(model).cpu())
        assert th.allclose(results[0], results[1], rtol=0, atol=1e-5)
        assert not th.allclose(results[0], results[2], rtol=0, atol=1e-5)

    @pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("algorithm", CONTINUOUS + DISCRETE)
    def test_a_step_does_not_wait_for_the_gpu(self, algorithm: Any) -> None:
        model = make_model(algorithm, device="cuda", data_device="cuda")
        model.train(3, 16)
        th.cuda.set_sync_debug_mode("error")
        try:
            model.train(3, 16)
        finally:
            th.cuda.set_sync_debug_mode("default")


class TestOptimisers:
    def test_rates_go_through_one_tensor(self) -> None:
        parameter = th.nn.Parameter(th.ones(3))
        optimizer = th.optim.Adam([parameter], lr=0.1)
        make_capturable(optimizer)
        group = optimizer.param_groups[0]
        rate = group["lr"]
        assert float(rate) == pytest.approx(0.1)
        assert group["capturable"]
        group["lr"] = 0.05  # as SB3's schedules set it
        make_capturable(optimizer)
        assert group["lr"] is rate
        assert float(rate) == pytest.approx(0.05)

    @pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD, th.optim.RMSprop])
    def test_fused_steps_are_the_plain_ones_up_to_rounding(self, optimizer_class: Any) -> None:
        after = []
        for fused in (False, True):
            parameter = th.nn.Parameter(th.linspace(-1, 1, 30))
            optimizer = optimizer_class([parameter], lr=0.01)
            for i in range(6):
                if fused and i == 3:  # In the middle of a run.
                    make_fused(optimizer)
                parameter.grad = th.linspace(1, 2, 30) * (i + 1)
                optimizer.step()
            after.append(parameter.detach())
            assert bool(optimizer.param_groups[0].get("fused")) == (fused and optimizer_class is not th.optim.RMSprop)
        assert th.allclose(*after, rtol=0, atol=1e-6)

    def test_a_choice_of_the_users_stays(self) -> None:
        for options in ({"fused": False}, {"foreach": True}, {"fused": True}):
            optimizer = th.optim.Adam([th.nn.Parameter(th.ones(2))], lr=0.1, **options)
            make_fused(optimizer)
            group = optimizer.param_groups[0]
            assert {name: group[name] for name in options} == options
            assert {name: portable_state(optimizer.state_dict())["param_groups"][0][name] for name in options} == options

    def test_counts_move_with_every_kind_of_adam(self) -> None:
        for optimizer_class in (th.optim.NAdam, th.optim.RAdam, th.optim.Adamax, th.optim.AdamW):
            optimizer = optimizer_class([th.nn.Parameter(th.ones(2))], lr=0.1)
            optimizer.param_groups[0]["params"][0].grad = th.ones(2)
            optimizer.step()
            state = next(iter(optimizer.state.values()))
            state["step"] = state["step"].double()
            make_capturable(optimizer)
            assert state["step"].dtype == th.float32, "taken to the device in the form that a graph needs"

    def test_only_bf16_fuses_on_the_cpu(self) -> None:
        for precision, fused in (("f32", False), ("bf16", True)):
            model = make_model(CQL, precision=precision)
            model.train(1, 16)
            assert {bool(group["fused"]) for o in model._all_optimizers() for group in o.param_groups} == {fused}

    def test_saved_state_is_the_plain_one(self) -> None:
        def trained(capturable: bool) -> tuple[Any, dict[str, Any]]:
            parameter = th.nn.Parameter(th.arange(3.0))
            optimizer = th.optim.Adam([parameter], lr=0.1)
            for _ in range(2):
                parameter.grad = th.ones(3)
                optimizer.step()
            plain = optimizer.state_dict()
            if capturable:
                make_capturable(optimizer)
            return plain, portable_state(optimizer.state_dict())

        (_, plain), (_, restored) = trained(False), trained(True)
        assert plain["param_groups"] == restored["param_groups"]
        assert type(restored["param_groups"][0]["lr"]) is float
        assert all(th.equal(plain["state"][0][key], restored["state"][0][key]) for key in plain["state"][0])
        # The base class can go on with it.
        optimizer = th.optim.Adam([th.nn.Parameter(th.arange(3.0))], lr=0.1)
        optimizer.load_state_dict(restored)

    def test_sac_loads_ours_and_we_load_sacs(self, tmp_path: Path, host: Any) -> None:
        env = host.corridors(1)
        model = CQL("MlpPolicy", env, device="cpu", seed=0, buffer_size=100, precision="bf16")
        for optimizer in model._all_optimizers():
            make_capturable(optimizer)
        model.save(tmp_path / "ours")
        sac = SAC("MlpPolicy", env, device="cpu", buffer_size=100)
        sac.set_parameters(str(tmp_path / "ours.zip"), device="cpu")
        assert th.equal(parameters(sac), parameters(model))
        sac.save(tmp_path / "sac")
        other = CQL("MlpPolicy", env, device="cpu", seed=1, buffer_size=100)
        other.set_parameters(str(tmp_path / "sac.zip"), device="cpu")
        assert th.equal(parameters(other), parameters(model))


class TestDeviceData:
    """On the CPU as the device: the rows and the arithmetic are the same on any."""

    @pytest.mark.parametrize("base", [ReplayBuffer, DictReplayBuffer])
    @pytest.mark.parametrize("returns", [False, True])
    def test_rows_are_the_buffers(self, base: type[ReplayBuffer], returns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = make_buffer(base)
        buffer = with_returns_to_go(buffer, 0.9) if returns else buffer
        state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
        data = DeviceData(buffer, th.device("cpu"))
        assert (np.random.get_state()[1] == state).all(), "NumPy's random numbers are left alone"  # type: ignore[union-attr]
        rows = th.tensor([0, 9, 19, 39, 5])
        monkeypatch.setattr(th, "randint", lambda *_, **__: rows)
        drawn = data.sample(5, th.device("cpu")).tensors()
        monkeypatch.setattr(np.random, "randint", lambda low, high, size: rows.numpy() if high == ROWS else np.zeros(size, int))
        expected = buffer.sample(5)._asdict()
        for name, value in expected.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for key, tensor in parts:
                full = f"{name}.{key}" if key else name
                if tensor is not None:
                    assert th.equal(drawn[full], tensor), full
        assert ("returns_to_go" in drawn) == returns

    def test_n_step_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = make_buffer(NStepReplayBuffer, n_steps=3, gamma=0.9)
        data = DeviceData(buffer, th.device("cpu"))
        rows = th.arange(ROWS)
        monkeypatch.setattr(th, "randint", lambda *_, **__: rows)
        drawn = data.sample(ROWS, th.device("cpu"))
        expected = buffer._get_samples(rows.numpy())
        assert th.equal(drawn.rewards, expected.rewards)
        assert th.equal(drawn.discounts, expected.discounts)  # type: ignore[arg-type]
        assert len(drawn.discounts.unique()) > 1  # type: ignore[union-attr]

    def test_every_row_is_drawn_alike(self) -> None:
        data = DeviceData(make_buffer(), th.device("cpu"))
        th.manual_seed(0)
        drawn = data.sample(40_000, th.device("cpu"))
        stored = th.as_tensor(make_buffer().rewards[:, 0])
        counts = (drawn.rewards == stored).sum(0).double()
        # Chi-square with 39 degrees of freedom: mean 39, standard deviation 8.8.
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 39 + 5 * 8.8

    @pytest.mark.parametrize("algorithm", CONTINUOUS + DISCRETE)
    def test_trains(self, algorithm: Any) -> None:
        model = make_model(algorithm, data_device="cpu")
        model.learn_offline(make_buffer(discrete=algorithm in DISCRETE), 5)
        assert model._device_data is not None
        assert parameters(model).isfinite().all()

    def test_bootstrapped_returns_follow(self) -> None:
        model = make_model(CalQL, data_device="cpu", return_tail="bootstrap")
        unknown = model._device_data._columns["returns_to_go"].clone()
        assert unknown.isinf().any()
        model.train(1, 16)
        known = model._device_data._columns["returns_to_go"]
        assert known.isfinite().all()
        assert th.equal(known[:, 0], th.as_tensor(model.offline_buffer.returns_to_go[:, 0]))

    @pytest.mark.parametrize("base", [ReplayBuffer, DictReplayBuffer])
    def test_normalises_as_vec_normalize_does(self, base: type[ReplayBuffer], monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = make_buffer(base)
        env = make_normalized(buffer)
        data = DeviceData(buffer, th.device("cpu"))
        rows = th.tensor([3, 1, 4])
        monkeypatch.setattr(th, "randint", lambda *_, **__: rows)
        for shift in (0.0, 1.0):
            for rms in env.obs_rms.values() if isinstance(env.obs_rms, dict) else (env.obs_rms,):
                # The count stays, as it does for other statistics that were loaded.
                rms.mean, rms.var, rms.count = np.full(3, 0.3 + shift), np.array([0.5, 1.0, 1e-4]), 10.0
            drawn = data.sample(3, th.device("cpu"), env).tensors()
            expected = buffer._get_samples(rows.numpy(), env)
            parts = expected.observations.items() if base is DictReplayBuffer else [("", expected.observations)]
            for key, tensor in parts:
                ours = drawn[f"observations.{key}" if key else "observations"]
                assert th.allclose(ours, tensor, rtol=1e-6, atol=1e-6)
                assert (ours.abs() == env.clip_obs).any(), "the clip is met"

    def test_refuses_what_it_cannot_hold(self) -> None:
        many = make_buffer(n_envs=2)
        with pytest.raises(ValueError, match=r"n_envs=2.*Leave data_device=None"):
            make_model(CQL, data_device="cpu").set_offline_data(many)
        frugal = ReplayBuffer(
            8, OBSERVATIONS, spaces.Box(-1, 1, (2,), np.float32), optimize_memory_usage=True, handle_timeout_termination=False
        )
        frugal.pos = 4
        with pytest.raises(ValueError, match="optimize_memory_usage=True"):
            DeviceData(frugal, th.device("cpu"))
        env = make_normalized(make_buffer(), norm_reward=True)
        with pytest.raises(ValueError, match=r"VecNormalize\(norm_reward=True\)"):
            DeviceData(make_buffer(), th.device("cpu")).sample(3, th.device("cpu"), env)

    def test_refuses_buffers_with_a_way_of_their_own(self) -> None:
        class First(ReplayBuffer):
            def sample(self, batch_size: int, env: Any = None) -> Any:
                return self._get_samples(np.zeros(batch_size, int), env)

        for algorithm in (CQL, CalQL):
            model = make_model(algorithm, data_device="cpu")
            with pytest.raises(ValueError, match="has its own sample"):
                model.set_offline_data(make_buffer(First))

    def test_refuses_the_buffer_that_grows(self, host: Any) -> None:
        for algorithm in (CQL, CalQL):
            model = algorithm(
                "MlpPolicy", host.corridors(1), device="cpu", buffer_size=100, data_device="cpu", learning_starts=30
            )
            model.learn(20)
            with pytest.raises(ValueError, match="the model's own replay buffer"):
                model.set_offline_data(model.replay_buffer)

    def test_a_device_that_is_not_there_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(th.cuda, "is_available", lambda: False)
        with pytest.warns(UserWarning, match="data_device='cuda' is not there"):
            model = make_model(CQL, data_device="cuda")
        model.train(1, 16)

    def test_gpus_by_number_and_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On two GPUs that are not there: what is asked of them."""
        monkeypatch.setattr(th.cuda, "is_available", lambda: True)
        monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
        monkeypatch.setattr("cql_plugins.sb3.offline.DeviceData", lambda _, device: device)
        model = make_model(CQL)
        model.device = th.device("cuda:1")
        for asked, device in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
            model.data_device = asked
            assert model._place_on_device(model.offline_buffer, th.device(asked)) == th.device(device)
        model.data_device = "cuda:2"
        with pytest.raises(ValueError, match="data_device='cuda:2' is not there: expected one of cuda:0 to cuda:1"):
            model._place_on_device(model.offline_buffer, th.device("cuda:2"))

    def test_refused_data_leave_the_old_ones(self) -> None:
        model = make_model(CQL, data_device="cpu")
        before = model.offline_buffer, model._device_data
        with pytest.raises(ValueError, match="n_envs=2"):
            model.set_offline_data(make_buffer(n_envs=2))
        assert (model.offline_buffer, model._device_data) == before

    def test_can_be_chosen_and_left_later(self, host: Any) -> None:
        model, data = host.build(CQL), host.collect()
        for device in (None, "cpu", None):
            model.data_device = device
            model.learn_offline(data, 1)
            assert (model._device_data is None) == (device is None)

    def test_mixes_with_online_rows(self, host: Any) -> None:
        env = host.corridors(1)
        model = CalQL("MlpPolicy", env, device="cpu", seed=0, buffer_size=200, batch_size=8, learning_starts=0)
        model.data_device = "cpu"
        model.learn(60)
        buffer = copy.deepcopy(model.replay_buffer)
        model.learn_offline(buffer, 2)
        assert model._device_data is not None
        model.learn(20)
        batch = model.sample_batch(8)
        assert batch.actions.shape[0] == 8
        assert math.isfinite(float(batch.rewards.sum()))

    def test_is_not_saved(self, tmp_path: Path) -> None:
        model = make_model(CQL, data_device="cpu")
        model.save(tmp_path / "model")
        assert CQL.load(tmp_path / "model", device="cpu")._device_data is None


def make_normalized(buffer: ReplayBuffer, norm_reward: bool = False) -> VecNormalize:
    """A VecNormalize of the buffer's spaces around an environment that is never stepped."""
    import gymnasium as gym

    class Still(gym.Env[Any, Any]):
        observation_space = buffer.observation_space
        action_space = buffer.action_space

    return VecNormalize(DummyVecEnv([Still]), norm_reward=norm_reward, clip_obs=2.0)
