"""Predicted against real returns and the gap, against values that are known by construction."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from cql_plugins.adapters import from_arrays
from cql_plugins.sb3 import CQL, CalQL, DiscreteCQL
from cql_plugins.sb3.diagnostics import DiagnosticsCallback, gap_expansion, value_bias
from tests.sb3.conftest import QUANTILES, build, collect, corridors, differing, state

TQC: Any = next((one for one in QUANTILES if one.__name__ == "TQC"), None)
QRDQN: Any = next((one for one in QUANTILES if one.__name__ == "QRDQN"), None)
needs_contrib = pytest.mark.skipif(not QUANTILES, reason="sb3-contrib is not installed")
GAMMA = 0.5


class Payments(gym.Env[Any, Any]):
    """Pays 1, 2, 4 ... whatever is done; the n-th episode of an environment is n steps longer than its first."""

    def __init__(self, length: int = 3, terminates: bool = False, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space: spaces.Space[Any] = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 3.0, (1,), np.float32)
        self.length, self.terminates, self.clock = length - 1, terminates, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.length, self.clock = self.length + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.clock += 1
        over = self.clock == self.length
        return np.zeros(2, np.float32), 2.0 ** (self.clock - 1), over and self.terminates, over and not self.terminates, {}


def constant(network: th.nn.Module, values: Any) -> None:
    """Make the last layer's biases its output."""
    with th.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        linear = [module for module in network.modules() if isinstance(module, th.nn.Linear)][-1]
        linear.bias.copy_(th.as_tensor(values, dtype=th.float32).expand_as(linear.bias))


def make(algorithm: Any, env: Any = None, **changes: Any) -> Any:
    discrete = algorithm in (DQN, DiscreteCQL, QRDQN)
    return build(algorithm, DummyVecEnv([lambda: Payments(discrete=discrete)]) if env is None else env, gamma=GAMMA, **changes)


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("terminates", [False, True])
def test_bias_is_predicted_minus_discounted(n_envs: int, monitored: bool, terminates: bool) -> None:
    model = make(CQL)
    for critic, value in zip(model.critic.q_networks, (7.0, 5.0), strict=True):
        constant(critic, value)
    wrap: Callable[[Any], Any] = Monitor if monitored else lambda env: env
    env = DummyVecEnv([lambda: wrap(Payments(terminates=terminates)) for _ in range(n_envs)])
    found = value_bias(model, env, 4)
    # gamma^t 2^t = 1: an episode of k steps is worth k. One environment plays 3, 4, 5, 6 steps, two play 3, 4 each.
    lengths = [3, 4, 5, 6] if n_envs == 1 else [3, 4, 3, 4]
    assert found.predicted == 5.0, "the smaller critic"
    assert found.actual == np.mean(lengths)
    assert found.bias == 5.0 - np.mean(lengths)
    assert found.entropy == 0.0
    assert found.std_error == pytest.approx(np.std(lengths, ddof=1) / 2, rel=1e-12)
    assert found.tail == (0.0 if terminates else GAMMA ** min(lengths))
    assert sorted(found.returns) == sorted(2.0**length - 1 for length in lengths)


def test_one_episode_has_no_error() -> None:
    found = value_bias(make(CQL), Payments(), 1)
    assert found.actual == 3.0
    assert np.isnan(found.std_error)


@pytest.mark.parametrize(
    ("algorithm", "network", "biases", "predicted"),
    [
        (TD3, "critic", [2.0], 2.0),
        (DQN, "q_net", [1.0, 5.0, 2.0], 5.0),
        (DiscreteCQL, "q_net", [1.0, 5.0, 2.0], 5.0),
        # Both critics' five quantiles, or each of three actions' five.
        pytest.param(TQC, "critic", [0.0, 1.0, 2.0, 3.0, 14.0], 4.0, marks=needs_contrib),
        pytest.param(QRDQN, "quantile_net", [[0.0, 9.0, 1.0]] * 5, 9.0, marks=needs_contrib),
    ],
)
def test_hosts_without_conservatism(algorithm: Any, network: str, biases: Any, predicted: float) -> None:
    model = make(algorithm)
    networks = getattr(model, network)
    for one in getattr(networks, "q_networks", None) or getattr(networks, "quantile_critics", None) or [networks]:
        constant(one, np.ravel(biases))
    found = value_bias(model, Payments(discrete=algorithm in (DQN, DiscreteCQL, QRDQN)), 2)
    assert found.predicted == pytest.approx(predicted, abs=1e-6)
    assert found.actual == 3.5
    assert (found.entropy == 0.0) == (algorithm is not TQC)


def test_entropy_of_later_states_only() -> None:
    """A squashed unit Gaussian's entropy is 1.4189 + E[log(1 - tanh(u)^2)], here by quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    squash = np.sum(weights * 2 * (np.log(2) - points - np.logaddexp(0, -2 * points))) / np.sqrt(2 * np.pi)
    entropy = 0.5 * np.log(2 * np.pi * np.e) + squash
    model = make(SAC, ent_coef=0.3)
    constant(model.actor, 0.0)
    n = 300
    env = DummyVecEnv([lambda: Payments() for _ in range(n)])  # three steps each
    found = value_bias(model, env, n)
    expected = 0.3 * entropy * (GAMMA + GAMMA**2)
    # One draw's log-density has a variance of about 1; two weighted ones an episode.
    error = 0.3 * np.sqrt((GAMMA**2 + GAMMA**4) / n)
    assert abs(found.entropy - expected) < 5 * error
    assert abs(found.entropy - 0.3 * entropy * (1 + GAMMA + GAMMA**2)) > 5 * error, "the first state's is not in its value"
    assert found.bias == found.predicted - found.actual - found.entropy
    assert value_bias(make(CQL, backup_entropy=True, ent_coef=0.3), env, n).entropy != 0.0
    assert value_bias(make(CQL, ent_coef=0.3), env, n).entropy == 0.0
    for _ in range(2):
        assert value_bias(model, DummyVecEnv([lambda: Payments(length=1) for _ in range(2)]), 2).entropy == 0.0


class Clock(Payments):
    """Observations that say which step it is."""

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        return observation + np.float32(self.clock / 4), *rest


def test_entropy_of_each_state_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(SAC, ent_coef=0.3)
    env = DummyVecEnv([lambda: Clock() for _ in range(2)])  # three steps: states 0, 1/4 and 2/4
    play = model.actor.action_log_prob
    monkeypatch.setattr(model.actor, "action_log_prob", lambda seen: (play(seen)[0], seen[:, 0]))
    assert value_bias(model, env, 2).entropy == pytest.approx(-0.3 * (GAMMA * 0.25 + GAMMA**2 * 0.5))


class LosesALife(gym.Wrapper[Any, Any, Any, Any]):
    """Says that an episode is over after its first step, and plays on at the next reset, as Atari's wrapper does."""

    over = True

    def reset(self, **kwargs: Any) -> Any:
        return self.env.reset(**kwargs) if self.over else (np.zeros(2, np.float32), {})

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.over = terminated or truncated
        return observation, reward, terminated or reward == 1.0, truncated, info


def test_a_lost_life_is_no_end() -> None:
    model, env = make(CQL), DummyVecEnv([lambda: LosesALife(Monitor(Payments()))])
    found = value_bias(model, env, 2)
    assert found.actual == 3.5
    assert found.returns == (7.0, 15.0)


def test_actions_reach_the_critic_scaled() -> None:
    """A critic that is the action itself, a policy at its middle: 0 as the network sees it, 1 in the environment."""
    model = make(CQL, policy_kwargs={"net_arch": {"pi": [4], "qf": []}})
    constant(model.actor, 0.0)
    for critic in model.critic.q_networks:
        with th.no_grad():
            critic[0].weight.copy_(th.tensor([[0.0, 0.0, 1.0]]))
            critic[0].bias.zero_()
    assert value_bias(model, Payments(), 2, deterministic=True).predicted == 0.0
    assert value_bias(model, Payments(), 2).predicted != 0.0, "by default the policy's actions are drawn"


@pytest.mark.parametrize(("shape", "dtype"), [((2,), np.float64), ((2, 2), np.float32)])
def test_actions_of_other_kinds(shape: tuple[int, ...], dtype: Any) -> None:
    """A critic that is the sum of the actions, a policy whose mode is 0.5: 0.5 times their number."""
    env = Payments()
    env.action_space = spaces.Box(-1.0, 1.0, shape, dtype)
    model = make(CQL, DummyVecEnv([lambda: env]), policy_kwargs={"net_arch": {"pi": [4], "qf": []}})
    constant(model.actor.mu, np.arctanh(0.5))
    size = int(np.prod(shape))
    for critic in model.critic.q_networks:
        with th.no_grad():
            critic[0].weight.copy_(th.tensor([[0.0, 0.0, *[1.0] * size]]))
            critic[0].bias.zero_()
    assert value_bias(model, env, 2, deterministic=True).predicted == pytest.approx(0.5 * size, rel=1e-6)


def linear_model(weight: float, action: float, algorithm: Any = CQL, n: int = 500) -> tuple[Any, Any]:
    """Q = weight a + 1, and data whose every action is the same."""
    zeros = np.zeros((n, 2), np.float32)
    space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    data = from_arrays(
        zeros,
        np.full((n, 1), action, np.float32),
        np.zeros(n),
        np.zeros(n, bool),
        np.arange(n) % 10 == 9,
        next_observations=zeros,
        observation_space=spaces.Box(-1.0, 1.0, (2,), np.float32),
        action_space=space,
    )
    env = Payments()
    env.action_space = space
    model = build(algorithm, DummyVecEnv([lambda: env]), policy_kwargs={"net_arch": {"pi": [4], "qf": []}})
    for critic in model.critic.q_networks:
        with th.no_grad():
            critic[0].weight.copy_(th.tensor([[0.0, 0.0, weight]]))
            critic[0].bias.fill_(1.0)
    return model, data


@pytest.mark.parametrize("algorithm", [CQL, SAC])
def test_gap_of_a_linear_critic(algorithm: Any) -> None:
    model, data = linear_model(2.0, 0.75, algorithm)
    constant(model.actor, [0.0])
    n = 20_000
    found = gap_expansion(model, data, n_states=n, n_actions=4)
    assert found.q_data == pytest.approx(2.5, abs=1e-6)
    # Uniform on [-1, 1]: mean 0, variance 1/3; the largest of four has mean 3/5 and variance 4 * 4 / (25 * 6).
    assert abs(found.q_random - 1.0) < 5 * 2 * np.sqrt(1 / 3 / (4 * n))
    assert abs(found.q_random_max - (1.0 + 2.0 * 3 / 5)) < 5 * 2 * np.sqrt(16 / 150 / n)
    assert abs(found.q_policy - 1.0) < 5 * 2 * np.sqrt(1 / n)
    assert found.gap == found.q_data - found.q_random
    assert found.delta == found.q_random_max - found.q_data
    assert found.delta < 0
    assert gap_expansion(linear_model(2.0, -0.75, algorithm)[0], linear_model(2.0, -0.75)[1]).delta > 0


@pytest.mark.parametrize("algorithm", [DQN, pytest.param(QRDQN, marks=needs_contrib)])
def test_gap_of_discrete_actions(algorithm: Any) -> None:
    model, data = build(algorithm, corridors(discrete=True)), collect(discrete=True)
    values = np.array([1.0, 5.0, 3.0])
    if algorithm is DQN:
        constant(model.q_net, values)
    else:
        constant(model.quantile_net, np.tile(values, 5))
    found = gap_expansion(model, data, n_states=64)
    assert (found.q_policy, found.q_random, found.q_random_max) == pytest.approx((5.0, 3.0, 5.0))
    buffer = data.to_sb3(model)
    np.random.seed(0)
    assert found.q_data == pytest.approx(values[buffer.sample(64).actions[:, 0].long().numpy()].mean(), abs=1e-6)


@pytest.mark.parametrize("form", ["image", "dict"])
def test_other_observations(form: str) -> None:
    model, data = build(CQL, corridors(form=form), form=form), collect(form)
    found, bias = gap_expansion(model, data, n_states=20, n_actions=3), value_bias(model, corridors(form=form), 2)
    assert np.isfinite([found.q_data, found.q_policy, found.q_random, found.q_random_max, bias.bias]).all()
    assert found == gap_expansion(model, data, n_states=20, n_actions=3)
    assert found != gap_expansion(model, data, n_states=20, n_actions=3, seed=1)


def test_observations_are_normalised_as_in_training() -> None:
    env = VecNormalize(corridors(), norm_reward=False)
    model = build(CQL, env)
    model.learn_offline(collect(), 2)
    assert model.offline_buffer is not None
    plain = gap_expansion(model, model.offline_buffer)
    env.obs_rms.mean = env.obs_rms.mean + 1.0
    assert gap_expansion(model, model.offline_buffer).q_data != plain.q_data


def streams() -> tuple[Any, ...]:
    _, numpy, *position = np.random.get_state()
    return random.getstate(), numpy.tolist(), position, th.get_rng_state().tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(("algorithm", "seed"), [(CalQL, None), (CalQL, 1), (SAC, 1)])
def test_looking_changes_nothing(algorithm: Any, seed: int | None) -> None:
    def train(look: bool) -> dict[str, th.Tensor]:
        np.random.seed(0)
        th.manual_seed(0)
        model = build(algorithm, seed=seed)
        with th.no_grad():
            for position, parameter in enumerate(model.policy.parameters()):
                parameter.fill_(0.01 * (position % 7 - 3))
        data = collect()
        for _ in range(3):
            if algorithm is CalQL:
                model.learn_offline(data, 2)
            else:
                model.learn(30)
            if look:
                before = streams()
                gap_expansion(model, data, n_states=9)
                value_bias(model, corridors(), 2)
                assert streams() == before
        return state(model)

    assert not differing(train(True), train(False))


def test_refusals() -> None:
    model = build(CQL)
    with pytest.raises(ValueError, match="n_episodes: expected at least 1, got 0"):
        value_bias(model, corridors(), 0)
    for name in ("n_states", "n_actions"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            gap_expansion(model, collect(), **{name: 0})
    ppo: Any = PPO("MlpPolicy", corridors(), device="cpu", n_steps=8, batch_size=8)
    for look in (lambda: value_bias(ppo, corridors()), lambda: gap_expansion(ppo, collect())):
        with pytest.raises(ValueError, match=r"expected an off-policy algorithm with a critic .* got PPO"):
            look()


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("algorithm", [CalQL, DiscreteCQL])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_callback_offline_and_online(tmp_path: Path, algorithm: Any, n_envs: int) -> None:
    discrete = algorithm is DiscreteCQL
    model, data = build(algorithm, corridors(discrete=discrete)), collect(discrete=discrete)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    eval_env = make_vec_env(lambda: corridors(discrete=discrete).envs[0], n_envs)  # with Monitor
    callback = DiagnosticsCallback(
        eval_env,
        n_eval_episodes=3,
        eval_freq=4,
        verbose=0,
        n_states=16,
        score=lambda returns: 100.0 * np.asarray(returns),
    )
    model.learn_offline(data, 8, callback=callback)
    expected = value_bias(model, eval_env, 3, deterministic=True), gap_expansion(model, data, n_states=16)
    model.learn(24, callback=callback)
    model.logger.close()
    rows = [row for row in read(tmp_path) if row["eval/mean_reward"]]
    assert [row["time/gradient_steps"] for row in rows] == ["4", "8", *[""] * 6]
    assert [row["time/total_timesteps"] for row in rows] == ["4", "8", "4", "8", "12", "16", "20", "24"]
    for row in rows:
        assert float(row["eval/normalized_score"]) == pytest.approx(100 * float(row["eval/mean_reward"]), rel=1e-4)
        bias = float(row["eval/predicted_return"]) - float(row["eval/discounted_return"])
        assert float(row["eval/value_bias"]) == pytest.approx(bias, abs=1e-6)
    assert float(rows[1]["eval/q_gap"]) == pytest.approx(expected[1].gap, abs=1e-6)
    assert float(rows[1]["eval/q_random_max_minus_data"]) == pytest.approx(expected[1].delta, abs=1e-6)
    assert float(rows[0]["eval/q_gap"]) != float(rows[1]["eval/q_gap"])
    assert len(expected[0].returns) == 3


def test_lines_of_the_offline_phase_say_so(tmp_path: Path) -> None:
    """Those of SB3's own callbacks too, and those of the online phase do not."""
    model = build(CQL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = EvalCallback(Monitor(corridors().envs[0]), eval_freq=3, verbose=0, warn=False)
    model.learn_offline(collect(), 7, callback=callback, log_interval=None)
    assert not model.logger.name_to_value
    model.learn(12, callback=callback)
    model.logger.close()
    rows = [row for row in read(tmp_path) if row["eval/mean_reward"]]
    assert [row["time/gradient_steps"] for row in rows] == ["3", "6", *[""] * 4]


class Interrupting(Payments):
    """Ctrl-C in the second episode, once."""

    is_over = False

    def step(self, action: Any) -> Any:
        if self.length == 4 and not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt
        return super().step(action)


def test_callback_after_an_interrupted_evaluation(tmp_path: Path) -> None:
    model = make(CQL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = DiagnosticsCallback(
        Monitor(Interrupting(), allow_early_resets=True), dataset=None, n_eval_episodes=2, eval_freq=6, verbose=0
    )
    with pytest.raises(KeyboardInterrupt):
        model.learn(6, callback=callback)
    model.learn(6, callback=callback)
    model.logger.close()
    (row,) = [row for row in read(tmp_path) if row["eval/mean_reward"]]
    # An episode of k steps is worth k; the first evaluation played 3 and broke off one of 4.
    assert float(row["eval/discounted_return"]) == 5.5


def test_callback_with_data_of_its_own(tmp_path: Path) -> None:
    """On plain SAC, which holds no data; and without any."""
    for name, data in (("with", collect()), ("without", None)):
        model = build(SAC)
        model.set_logger(configure(str(tmp_path / name), ["csv"]))
        model.learn(12, callback=DiagnosticsCallback(Monitor(corridors().envs[0]), dataset=data, eval_freq=6, verbose=0))
        model.logger.close()
        rows = [row for row in read(tmp_path / name) if row["eval/mean_reward"]]
        assert ("eval/q_gap" in rows[0]) == (data is not None)
        assert "eval/normalized_score" not in rows[0]
        assert float(rows[-1]["eval/predicted_return"]) != 0.0
