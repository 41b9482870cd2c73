"""Predicted against real returns and the gap, as d3rlpy evaluators, against values that are known by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from d3rlpy.algos import DQNConfig, SACConfig
from d3rlpy.dataset import MDPDataset
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.preprocessing import ConstantShiftRewardScaler, MinMaxActionScaler
from gymnasium import spaces

from cql_plugins.d3rlpy import (
    CalQLConfig,
    CQLConfig,
    DiscreteCQLConfig,
    QGapEvaluator,
    ValueBiasEvaluator,
    gap_expansion,
    value_bias,
)
from cql_plugins.d3rlpy.evaluators import _Recorder
from cql_plugins.plots import plot_run

GAMMA = 0.5


class Payments(gym.Env[Any, Any]):
    """Pays 1, 2, 4 whatever is done; the n-th episode has n + 2 steps."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, discrete: bool = False) -> None:
        self.action_space: spaces.Space[Any] = spaces.Discrete(3) if discrete else spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.length, self.clock = 2, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.length, self.clock = self.length + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.clock += 1
        return np.zeros(2, np.float32), 2.0 ** (self.clock - 1), False, self.clock == self.length, {}


def make(config: Any, **options: Any) -> Any:
    discrete = config in (DQNConfig, DiscreteCQLConfig)
    net = VectorEncoderFactory([4], activation="relu")
    nets = {"encoder_factory": net} if discrete else {"actor_encoder_factory": net, "critic_encoder_factory": net}
    algo = config(gamma=GAMMA, batch_size=4, **nets, **options).create(device="cpu")
    algo.create_impl((2,), 3 if discrete else 1)
    return algo


def set_outputs(algo: Any, *biases: Any) -> None:
    """Make the critics' last biases all that they say."""
    for critic, bias in zip(algo.impl.q_function, biases, strict=True):
        with th.no_grad():
            for parameter in critic.parameters():
                parameter.zero_()
            critic._fc.bias.copy_(th.as_tensor(bias, dtype=th.float32))


def dataset(discrete: bool = False, action: float = 0.5, n: int = 60) -> Any:
    ends = (np.arange(n) % 10 == 9).astype(np.float32)
    actions = (np.arange(n) % 3)[:, None] if discrete else np.full((n, 1), action, np.float32)
    space = d3rlpy.ActionSpace.DISCRETE if discrete else d3rlpy.ActionSpace.CONTINUOUS
    size = 3 if discrete else 1
    zeros = np.zeros(n, np.float32)
    return MDPDataset(np.zeros((n, 2), np.float32), actions, zeros, zeros, ends, action_space=space, action_size=size)


@pytest.mark.parametrize("config", [CQLConfig, CalQLConfig, SACConfig])
def test_bias(config: Any) -> None:
    algo = make(config, action_scaler=MinMaxActionScaler([-2.0], [2.0]))
    set_outputs(algo, [7.0], [5.0])
    # gamma^t 2^t = 1: an episode of k steps is worth k; 3, 4, 5 and 6 are played. d3rlpy's value is the critics' mean.
    assert ValueBiasEvaluator(Payments(), 4)(algo, dataset()) == pytest.approx(6.0 - 4.5, abs=1e-6)


@pytest.mark.parametrize("config", [DQNConfig, DiscreteCQLConfig])
def test_discrete(config: Any) -> None:
    algo = make(config)
    set_outputs(algo, [1.0, 5.0, 3.0])
    data = dataset(discrete=True)
    assert ValueBiasEvaluator(Payments(discrete=True), 2)(algo, data) == pytest.approx(5.0 - 3.5, abs=1e-6)
    np.random.seed(0)
    q_data = np.array([1.0, 5.0, 3.0])[data.sample_transition_batch(40).actions[:, 0].astype(int)].mean()
    assert QGapEvaluator(40)(algo, data) == pytest.approx(q_data - 3.0, abs=1e-6)
    assert QGapEvaluator(40, best=True)(algo, data) == pytest.approx(q_data - 5.0, abs=1e-6)


class Terminates(Payments):
    """Ends by itself, and at the same step by a time-out in every second episode."""

    def step(self, action: Any) -> Any:
        observation, reward, _, over, info = super().step(action)
        return observation, reward, over, over and self.length % 2 == 0, info


def test_what_the_functions_say() -> None:
    algo = make(SACConfig, action_scaler=MinMaxActionScaler([-2.0], [2.0]))
    set_outputs(algo, [7.0], [5.0])
    found = value_bias(algo, Payments(), 3)
    assert (found.predicted, found.actual, found.entropy) == pytest.approx((6.0, 4.0, 0.0), abs=1e-6)
    assert found.returns == (7.0, 15.0, 31.0)  # 3, 4 and 5 payments
    assert found.tail == GAMMA**3, "the shortest episode that a time-out cut"
    assert found.std_error == pytest.approx(1 / np.sqrt(3))
    assert value_bias(algo, Terminates(), 3).tail == 0.0, "an end of its own is no time-out"
    gap = gap_expansion(algo, dataset(), n_states=8)
    assert (gap.q_data, gap.q_policy, gap.q_random, gap.q_random_max) == pytest.approx((6.0,) * 4)
    assert gap_expansion(linear(False, 3.0), dataset(), n_states=64).q_policy != pytest.approx(1.0 + 3.0 * 2.5), (
        "not the data's"
    )


def linear(scaled: bool, weight: float) -> Any:
    """Q = relu(weight (a + 2)) + 1 with a in [-1, 1], as the network sees it: linear there."""
    algo = make(CQLConfig, action_scaler=MinMaxActionScaler([-2.0], [2.0]) if scaled else None)
    set_outputs(algo, [1.0], [1.0])
    for critic in algo.impl.q_function:
        first = next(module for module in critic.modules() if isinstance(module, th.nn.Linear) and module.in_features == 3)
        with th.no_grad():
            first.weight[0, 2], first.bias[0] = 1.0, 2.0
            critic._fc.weight[0, 0] = weight
    return algo


@pytest.mark.parametrize("scaled", [False, True])
def test_gap_of_a_linear_critic(scaled: bool) -> None:
    algo, n = linear(scaled, 3.0), 10_000
    seen = 0.25 if scaled else 0.5  # 0.5 of [-2, 2] is 0.25 of [-1, 1]
    found = QGapEvaluator(n, 4)(algo, dataset())
    # Uniform on [-1, 1]: mean 0, variance 1/3; the largest of four has mean 3/5 and variance 4 * 4 / (25 * 6).
    assert abs(found - 3.0 * seen) < 5 * 3 * np.sqrt(1 / 3 / (4 * n))
    best = QGapEvaluator(n, 4, best=True)(algo, dataset())
    assert abs(best - 3.0 * (seen - 3 / 5)) < 5 * 3 * np.sqrt(16 / 150 / n)
    assert abs(QGapEvaluator(n, 4)(linear(not scaled, 3.0), dataset()) - found) > 0.5


def test_actions_are_tried_in_their_own_state() -> None:
    """A critic of the observation alone: no action is better than another."""
    algo = linear(False, 3.0)
    for critic in algo.impl.q_function:
        first = next(module for module in critic.modules() if isinstance(module, th.nn.Linear) and module.in_features == 3)
        with th.no_grad():
            first.weight[0] = th.tensor([1.0, 0.0, 0.0])
    n, ends = 60, (np.arange(60) % 10 == 9).astype(np.float32)
    observations, zeros = np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32), np.zeros(n, np.float32)
    data = MDPDataset(
        observations, zeros[:, None], zeros, zeros, ends, action_space=d3rlpy.ActionSpace.CONTINUOUS, action_size=1
    )
    found = gap_expansion(algo, data, n_states=200)
    assert found.delta == pytest.approx(0.0, abs=1e-5)
    assert found.gap == pytest.approx(0.0, abs=1e-5)


class InPlace(Payments):
    """Hands out its own state, which the next step changes; the twin hands out copies."""

    def __init__(self, copies: bool, parts: bool = False) -> None:
        super().__init__()
        self.state, self.copies, self.parts = np.zeros(2, np.float32), copies, parts

    def observe(self) -> Any:
        seen = self.state.copy() if self.copies else self.state
        return (seen, seen[:1]) if self.parts else seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state[:] = 0.25
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        _, *rest = super().step(action)
        self.state[:] = 0.75
        return self.observe(), *rest


@pytest.mark.parametrize("copies", [True, False])
def test_the_first_observation_is_kept_as_it_was(copies: bool) -> None:
    algo = linear(False, 1.0)
    for critic in algo.impl.q_function:
        first = next(module for module in critic.modules() if isinstance(module, th.nn.Linear) and module.in_features == 3)
        with th.no_grad():
            first.weight[0] = th.tensor([4.0, 0.0, 0.0])
    # Q = 1 + relu(4 s + 2) in the first state, where s is 0.25; later it is 0.75.
    assert value_bias(algo, InPlace(copies), 2).predicted == pytest.approx(4.0)
    recorder = _Recorder(InPlace(copies, parts=True))
    recorder.reset()
    recorder.step(np.zeros(1))
    assert [part.tolist() for part in recorder.starts[0]] == [[0.25, 0.25], [0.25]]


def test_in_fit_and_nothing_else_changes() -> None:
    rng = np.random.default_rng(0)
    observations, rewards = rng.normal(size=(60, 2)).astype(np.float32), rng.normal(size=60).astype(np.float32)
    ends = (np.arange(60) % 10 == 9).astype(np.float32)
    data = MDPDataset(observations, rng.uniform(-1, 1, (60, 1)).astype(np.float32), rewards, np.zeros(60, np.float32), ends)

    def train(evaluators: Any) -> Any:
        d3rlpy.seed(1)
        algo = make(CQLConfig)
        logged: dict[str, list[float]] = {}
        for _ in range(2):
            for _, metrics in algo.fitter(
                data, 4, 2, evaluators=evaluators, logger_adapter=NoopAdapterFactory(), show_progress=False
            ):
                for name, value in metrics.items():
                    logged.setdefault(name, []).append(value)
        return [p.detach().clone() for p in algo.impl.q_function.parameters()], logged

    looked, logged = train({"q_gap": QGapEvaluator(8), "value_bias": ValueBiasEvaluator(Payments(), 1)})
    plain, _ = train(None)
    other, _ = train({"stream": lambda algo, dataset: float(np.random.random())})
    assert not all(th.equal(one, another) for one, another in zip(other, plain, strict=True))
    assert all(th.equal(one, other) for one, other in zip(looked, plain, strict=True))
    assert {"q_gap", "value_bias"} <= set(logged)
    assert len(set(logged["q_gap"])) > 1
    assert QGapEvaluator(8)(make(CQLConfig), dataset()) != QGapEvaluator(8, seed=1)(make(CQLConfig), dataset())


@pytest.mark.parametrize("config", [CQLConfig, SACConfig])
def test_the_files_of_a_fit_are_drawn(config: Any, tmp_path: Path) -> None:
    """d3rlpy's logger also writes files of other columns, on the gradients of each parameter."""
    pytest.importorskip("matplotlib")
    factory = d3rlpy.logging.FileAdapterFactory(str(tmp_path))
    evaluators = {"environment": d3rlpy.metrics.EnvironmentEvaluator(Payments(), 1), "q_gap": QGapEvaluator(8)}
    make(config).fit(dataset(), 4, 2, evaluators=evaluators, logger_adapter=factory, show_progress=False)
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("*_grad.csv"))
    titles = {axis.get_title(loc="left") for axis in plot_run(folder).axes}
    assert {"return of an episode", "Q of the data's actions minus uniform ones'"} <= titles


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n_trials: expected at least 1, got 0"):
        ValueBiasEvaluator(Payments(), 0)
    for name in ("n_states", "n_actions"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            QGapEvaluator(**{name: 0})
    algo = make(CQLConfig, reward_scaler=ConstantShiftRewardScaler(1.0))
    with pytest.raises(ValueError, match="reward_scaler: expected none, got ConstantShiftRewardScaler"):
        ValueBiasEvaluator(Payments(), 1)(algo, dataset())
