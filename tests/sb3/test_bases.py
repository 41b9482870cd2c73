"""The other bases: DQN, QR-DQN and TQC with a conservative critic, beside their host classes, closed forms and NumPy."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize

pytest.importorskip("sb3_contrib")
from sb3_contrib import QRDQN, TQC
from sb3_contrib.tqc.policies import Critic, TQCPolicy

from cql_plugins import sb3
from cql_plugins.sb3 import (
    CQL,
    CQLQRDQN,
    CQLTQC,
    CalQL,
    CalQLQRDQN,
    CalQLTQC,
    DiscreteCalQL,
    DiscreteCQL,
)
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.q_learning import ConservativeQLearning

HOSTS: dict[Any, Any] = {
    DiscreteCQL: DQN,
    DiscreteCalQL: DQN,
    CQLQRDQN: QRDQN,
    CalQLQRDQN: QRDQN,
    CQLTQC: TQC,
    CalQLTQC: TQC,
}
DISCRETE = [DiscreteCQL, DiscreteCalQL, CQLQRDQN, CalQLQRDQN]
CALIBRATED = {DiscreteCalQL: DiscreteCQL, CalQLQRDQN: CQLQRDQN, CalQLTQC: CQLTQC}
SGD = {"optimizer_class": th.optim.SGD}


def as_host(algorithm: Any) -> dict[str, Any]:
    """Options that leave nothing of ours but the weight."""
    if issubclass(algorithm, TQC):
        return {"backup_entropy": True, "actor_learning_rate": None, "max_q_backup": False}
    return {}


def environment(host: Any, algorithm: Any, form: str = "vector", n_envs: int = 1) -> Any:
    return host.corridors(n_envs, form=form, discrete=not issubclass(algorithm, TQC))


# Form of the environment, number of environments, inside VecNormalize, arguments.
FORMS: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "plain": ("vector", 1, False, {}),
    "two-environments": ("vector", 2, False, {"gradient_steps": -1}),
    "n-step": ("vector", 1, False, {"n_steps": 3}),
    "normalised": ("vector", 1, True, {}),
    "dict": ("dict", 1, False, {}),
    "cnn": ("image", 1, False, {}),
}


def run(host: Any, model_class: Any, name: str, updates: int, **changes: Any) -> Any:
    """Train online for so many gradient steps."""
    form, n_envs, normalised, arguments = FORMS[name]
    env = environment(host, model_class, form, n_envs)
    env = VecNormalize(env) if normalised else env
    more = {} if issubclass(model_class, TQC) else {"target_update_interval": 2, "train_freq": 1}
    merged = {
        "learning_rate": 1e-2,
        "learning_starts": 10 * n_envs,
        **more,
        **arguments,
        **changes,
        "policy_kwargs": SGD.copy(),
    }
    model = host.build(model_class, env, form=form, **merged)
    model.learn((10 + updates) * n_envs)
    assert model._n_updates == (updates * n_envs if arguments.get("gradient_steps") == -1 else updates)
    return model


class OwnCritic(Critic):
    """What it says of an action is more than its networks say."""

    def forward(self, obs: th.Tensor, action: th.Tensor) -> th.Tensor:
        return 3.0 * super().forward(obs, action) + action.sum(dim=1).reshape(-1, 1, 1)


class OwnCriticPolicy(TQCPolicy):
    def make_critic(self, features_extractor: Any = None) -> Critic:
        return OwnCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class TestHosts:
    @pytest.mark.parametrize("name", FORMS)
    @pytest.mark.parametrize("algorithm", HOSTS)
    def test_weight_zero_is_the_host(self, algorithm: Any, host: Any, name: str) -> None:
        for updates in (1, 5):
            theirs = run(host, HOSTS[algorithm], name, updates)
            ours = run(host, algorithm, name, updates, cql_alpha=0.0, **as_host(algorithm))
            assert not host.differing(host.state(theirs), host.state(ours)), updates
            np.testing.assert_array_equal(theirs.replay_buffer.rewards, ours.replay_buffer.rewards)
        first, other = (run(host, m, name, 1, **c) for m, c in ((HOSTS[algorithm], {}), (algorithm, as_host(algorithm))))
        assert host.differing(host.state(first), host.state(other))

    @pytest.mark.parametrize("algorithm", [CQLTQC, CalQLTQC])
    def test_a_critic_of_ones_own_is_asked_as_the_host_asks_it(self, algorithm: Any, host: Any) -> None:
        theirs = run(host, TQC, "plain", 5, policy=OwnCriticPolicy)
        ours = run(host, algorithm, "plain", 5, policy=OwnCriticPolicy, cql_alpha=0.0, **as_host(algorithm))
        assert not host.differing(host.state(theirs), host.state(ours))
        batch = theirs.replay_buffer.sample(5)
        actions = th.linspace(-1.0, 1.0, 15).reshape(5, 3, 1)
        outputs = ours._critic_outputs(ours.critic, batch.observations, actions)
        for k in range(3):
            expected = ours.critic(batch.observations, actions[:, k]).transpose(0, 1)
            th.testing.assert_close(outputs[:, :, k], expected, atol=1e-6, rtol=0.0)

    @pytest.mark.parametrize("algorithm", HOSTS)
    def test_arguments_are_the_hosts_then_ours(self, algorithm: Any) -> None:
        theirs = list(inspect.signature(HOSTS[algorithm]).parameters.values())
        ours = list(inspect.signature(algorithm).parameters.values())
        for mine, their in zip(ours, theirs, strict=False):
            assert (mine.name, mine.default, mine.kind) == (their.name, their.default, their.kind)
        added = ours[len(theirs) :]
        assert {"cql_alpha", "offline_fraction"} <= {p.name for p in added}
        assert ("return_tail" in {p.name for p in added}) is (algorithm in CALIBRATED)
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not inspect.Parameter.empty for p in added)

    def test_the_continuous_pair_too(self) -> None:
        theirs = inspect.signature(SAC).parameters
        ours = inspect.signature(CalQL).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert ours["max_q_backup"].default is True
        assert inspect.signature(CQL).parameters["max_q_backup"].default is False

    def test_double_q_is_another_target(self, host: Any) -> None:
        for algorithm in (DiscreteCQL, CQLQRDQN):
            models = [host.build(algorithm, learning_rate=0.0, double_q=double_q) for double_q in (False, True)]
            batch = next(iter(batches(host, models[0])))
            with th.no_grad():
                single, double = (model._next_quantiles(batch.next_observations) for model in models)
                assert th.equal(single, double), "both networks are the same still"
                for model in models:
                    set_random_seed(1)
                    for parameter in model._networks[1].parameters():
                        parameter.add_(th.randn_like(parameter))
                single, double = (model._next_quantiles(batch.next_observations) for model in models)
                model = models[1]
                chosen = model._quantiles(model._networks[0], batch.next_observations).mean(1).argmax(1)
                table = model._quantiles(model._networks[1], batch.next_observations)
            assert not th.equal(single, double)
            assert th.equal(double, th.stack([table[i, :, a] for i, a in enumerate(chosen)]))
            assert th.equal(single.mean(1), table.mean(1).max(1).values)


def batches(host: Any, model: Any, n: int = 1, size: int = 7) -> list[Batch]:
    data = host.collect(discrete=isinstance(model.action_space, spaces.Discrete))
    model.set_offline_data(data)
    return [model.sample_batch(size) for _ in range(n)]


class TestDiscreteLoss:
    def literal_model(self, host: Any, algorithm: Any, **changes: Any) -> Any:
        """One state; the network is its bias: three actions of values 0.5, 5 and 2."""

        class One(host.Corridor):  # type: ignore[name-defined, misc]
            def _vector(self) -> np.ndarray:
                return np.zeros(2, np.float32)

        policy_kwargs = {"net_arch": [], **SGD}
        if issubclass(algorithm, QRDQN):
            policy_kwargs["n_quantiles"] = 1
        changes = {"max_grad_norm": None} | changes
        model = algorithm("MlpPolicy", One(discrete=True), learning_rate=0.1, policy_kwargs=policy_kwargs, seed=0, **changes)
        with th.no_grad():
            for network in model._networks:
                layer = next(m for m in network.modules() if isinstance(m, th.nn.Linear))
                layer.weight.zero_()
                layer.bias.copy_(th.tensor([0.5, 5.0, 2.0]))
        return model

    def step(self, model: Any, returns: float | None = None) -> np.ndarray:
        """A gradient step on a terminal transition whose reward is the value already: the Bellman error is zero."""
        zeros, ones = th.zeros(1, 2), th.ones(1, 1)
        bound = None if returns is None else th.full((1, 1), returns)
        batch = Batch(zeros, th.zeros(1, 1), zeros, ones, 0.5 * ones, None, bound)
        self.metrics = model._train_step(batch)
        return next(m for m in model._networks[0].modules() if isinstance(m, th.nn.Linear)).bias.detach().numpy()  # type: ignore[no-any-return]

    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_worked_example(self, host: Any, algorithm: Any) -> None:
        model = self.literal_model(host, algorithm, cql_alpha=1.0)
        stepped = self.step(model)
        assert self.metrics.cql_gap.item() == pytest.approx(4.5591, abs=5e-5)
        assert self.metrics.bellman_loss.item() == 0.0
        np.testing.assert_allclose(stepped, [0.599, 4.906, 1.995], atol=5e-4)
        twice = self.step(self.literal_model(host, algorithm, cql_alpha=2.0))
        np.testing.assert_allclose(twice, [0.698, 4.812, 1.991], atol=6e-4)

    @pytest.mark.parametrize("algorithm", [DiscreteCalQL, CalQLQRDQN])
    def test_worked_example_calibrated(self, host: Any, algorithm: Any) -> None:
        """G = 2.5 bounds the first and the third action inside the soft maximum: only the second is pushed down."""
        stepped = self.step(self.literal_model(host, algorithm, cql_alpha=1.0), returns=2.5)
        exps = np.exp([2.5, 5.0, 2.5])
        assert self.metrics.cql_gap.item() == pytest.approx(math.log(exps.sum()) - 0.5, rel=1e-6)
        assert self.metrics.bound_rate.item() == pytest.approx(2 / 3)
        np.testing.assert_allclose(stepped, [0.6, 5.0 - 0.1 * exps[1] / exps.sum(), 2.0], rtol=1e-6)
        unbounded = self.step(self.literal_model(host, algorithm, cql_alpha=1.0), returns=-math.inf)
        np.testing.assert_allclose(unbounded, [0.599, 4.906, 1.995], atol=5e-4)

    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_gradient_is_clipped_as_the_host_clips_it(self, host: Any, algorithm: Any) -> None:
        stepped = self.step(self.literal_model(host, algorithm, cql_alpha=1.0, max_grad_norm=0.1))
        assert np.linalg.norm(stepped - [0.5, 5.0, 2.0]) == pytest.approx(0.1 * 0.1, rel=1e-3)

    def test_quantile_reductions(self, host: Any) -> None:
        """Summed over quantiles, averaged over targets and batch, beside the gap of the mean over quantiles: by NumPy."""
        model = host.build(CQLQRDQN, cql_alpha=3.0, cql_temperature=0.7, gamma=0.9)
        batch = batches(host, model)[0]
        with th.no_grad():
            table = model.quantile_net(batch.observations).double().numpy()
            after = model.quantile_net_target(batch.next_observations).double().numpy()
        actions, rewards, dones = (x.double().numpy()[:, 0] for x in (batch.actions, batch.rewards, batch.dones))
        n, k = 7, 5
        loss = 0.0
        for i in range(n):
            greedy = after[i].mean(0).argmax()
            target = rewards[i] + 0.9 * (1 - dones[i]) * after[i][:, greedy]
            for j in range(k):
                delta = target - table[i, j, int(actions[i])]
                huber = np.where(np.abs(delta) > 1, np.abs(delta) - 0.5, 0.5 * delta**2)
                loss += (np.abs((j + 0.5) / k - (delta < 0)) * huber).mean() / n
        q = table.mean(axis=1)
        gap = 0.7 * np.log(np.exp(q / 0.7).sum(1)) - q[np.arange(n), actions.astype(int)]
        metrics = model._train_step(batch)
        assert metrics.bellman_loss.item() == pytest.approx(loss, rel=1e-5)
        assert metrics.cql_gap.item() == pytest.approx(gap.mean(), rel=1e-5)
        assert metrics.loss.item() == pytest.approx(loss + 3.0 * gap.mean(), rel=1e-5)
        assert metrics.q_policy.item() == pytest.approx(q.max(1).mean(), rel=1e-5)
        assert metrics.q_random.item() == pytest.approx(q.mean(), rel=1e-5)


class TestTruncatedLoss:
    @pytest.mark.parametrize("backup", [{}, {"max_q_backup": True}, {"mode_q_backup": True}], ids=str)
    def test_by_numpy(self, host: Any, backup: dict[str, bool]) -> None:
        """The gap of the mean over the kept quantiles, TQC's loss against the kept quantiles of the target."""
        model = host.build(CQLTQC, cql_alpha=3.0, ent_coef=0.3, gamma=0.9, top_quantiles_to_drop_per_net=2, **backup)
        batch = batches(host, model)[0]
        proposed: list[Any] = []
        propose, target_of = model._propose, model._compute_target
        model._propose = lambda *args: proposed.append(propose(*args)) or proposed[-1]
        targets: list[Any] = []
        model._compute_target = lambda *args: targets.append(target_of(*args)) or targets[-1]
        networks = [[p.detach().double().numpy().copy() for p in net.parameters()] for net in model.critic.q_networks]
        next_actions: list[th.Tensor] = []
        next_values = model._next_values
        model._next_values = lambda obs, actions: next_actions.append(actions) or next_values(obs, actions)
        mode = model.policy._predict(batch.next_observations, deterministic=True)
        metrics = model._train_step(batch)
        assert th.equal(next_actions[0][:, 0], mode) is ("mode_q_backup" in backup)

        def quantiles(observation: np.ndarray, action: np.ndarray) -> np.ndarray:
            x = np.concatenate([observation, action])
            return np.stack([np.maximum(x @ w1.T + b1, 0) @ w2.T + b2 for w1, b1, w2, b2 in networks])

        def kept(table: np.ndarray) -> np.ndarray:
            return np.sort(table.ravel())[: 2 * 5 - 2 * 2]

        obs, after, actions = (x.double().numpy() for x in (batch.observations, batch.next_observations, batch.actions))
        rewards, dones = batch.rewards.double().numpy()[:, 0], batch.dones.double().numpy()[:, 0]
        groups = proposed[0].values()
        sampled = np.concatenate([g.actions.double().numpy() for g in groups], axis=1)
        density = np.concatenate([g.log_density.double().numpy() for g in groups], axis=1)
        bellman, gaps, candidates = 0.0, [], next_actions[0].double().numpy()
        for i in range(len(obs)):
            values = [kept(quantiles(after[i], a)) for a in candidates[i]]
            best = int(np.argmax([v.mean() for v in values]))
            target = rewards[i] + 0.9 * (1 - dones[i]) * values[best]
            np.testing.assert_allclose(targets[0][0][i].numpy(), target, rtol=1e-5, atol=1e-6)
            delta = target[None, None] - quantiles(obs[i], actions[i])[:, :, None]
            huber = np.where(np.abs(delta) > 1, np.abs(delta) - 0.5, 0.5 * delta**2)
            tau = (np.arange(5) + 0.5)[None, :, None] / 5
            bellman += (np.abs(tau - (delta < 0)) * huber).mean() / len(obs)
            q = np.array([kept(quantiles(obs[i], a)).mean() for a in sampled[i]])
            gaps.append(np.log(np.exp(q - density[i]).sum()) - kept(quantiles(obs[i], actions[i])).mean())
        assert metrics.bellman_loss.item() == pytest.approx(bellman, rel=1e-5)
        assert metrics.cql_gap.item() == pytest.approx(np.mean(gaps), rel=1e-5)
        assert metrics.critic_loss.item() == pytest.approx(bellman + 1.5 * np.mean(gaps), rel=1e-5)


class TestCalibration:
    @pytest.mark.parametrize("algorithm", CALIBRATED)
    def test_minus_infinity_is_cql(self, algorithm: Any, host: Any) -> None:
        states = {}
        plain = CALIBRATED[algorithm]
        data = host.collect(discrete=not issubclass(algorithm, TQC))
        for label, cls, returns in (("cql", plain, None), ("unbounded", algorithm, -math.inf), ("bounded", algorithm, 0.5)):
            changes = {"max_q_backup": False} if issubclass(algorithm, TQC) else {}
            model = host.build(cls, learning_rate=1e-2, **changes)
            model.set_offline_data(data)
            if returns is not None:
                model.offline_buffer.returns_to_go[:] = returns
            set_random_seed(3)
            model.train(1, 8)
            states[label] = host.state(model)
        assert not host.differing(states["cql"], states["unbounded"])
        assert host.differing(states["cql"], states["bounded"])

    @pytest.mark.parametrize("algorithm", CALIBRATED)
    @pytest.mark.parametrize("tail", ["zero", "sparse", "none", "bootstrap"])
    def test_every_tail_offline_and_online(self, algorithm: Any, host: Any, tail: str) -> None:
        model = host.build(algorithm, environment(host, algorithm, n_envs=2), return_tail=tail)
        model.learn_offline(host.collect(discrete=not issubclass(algorithm, TQC)), 3).learn(42)
        assert model.logger.name_to_value["train/n_updates"] > 3
        buffer = model.replay_buffer
        for column in range(2):
            stored, running = buffer.returns_to_go[: buffer.pos, column], buffer._running_length[column]
            ended = stored[: len(stored) - running]
            assert np.all(stored[len(stored) - running :] == -math.inf)
            assert len(ended)
            if tail in ("zero", "sparse"):
                assert np.isfinite(ended).all()

    def test_online_returns_by_hand(self, host: Any) -> None:
        class Listed(host.Corridor):  # type: ignore[name-defined, misc]
            def step(self, action: Any) -> Any:
                observation, *_, info = super().step(action)
                return observation, float(self.clock), False, self.clock == 3, info

        model = host.build(DiscreteCalQL, Listed(discrete=True), gamma=0.5, learning_starts=100)
        model.learn(4)
        assert model.replay_buffer.returns_to_go[:4, 0].tolist() == [1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3, -math.inf]


class TestOfflinePhase:
    @pytest.mark.parametrize(
        ("arguments", "interval"),
        [
            ({"target_update_interval": 12, "train_freq": 4}, 3),
            ({"target_update_interval": 12, "train_freq": 4, "gradient_steps": 2}, 6),
            ({"target_update_interval": 12, "train_freq": 4, "gradient_steps": -1}, 12),
            ({"target_update_interval": 5, "train_freq": (1, "episode")}, 5),
            ({"target_update_interval": 12, "offline_target_update_interval": 2}, 2),
            ({"target_update_interval": 1, "train_freq": 4}, 1),
        ],
    )
    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_targets_follow_gradient_steps(self, algorithm: Any, host: Any, arguments: dict[str, Any], interval: int) -> None:
        model = host.build(algorithm, tau=1.0, **arguments)
        moved: list[int] = []

        class Watch(BaseCallback):
            def _on_training_start(self) -> None:
                self.last = {k: v.clone() for k, v in model._networks[1].state_dict().items()}

            def _on_step(self) -> bool:
                now = model._networks[1].state_dict()
                if any(not th.equal(now[k], self.last[k]) for k in now):
                    moved.append(self.num_timesteps)
                    assert all(th.equal(now[k], v) for k, v in model._networks[0].state_dict().items())
                self.last = {k: v.clone() for k, v in now.items()}
                return True

        model.learn_offline(host.collect(discrete=True), 13, callback=Watch())
        assert moved == list(range(interval, 14, interval))

    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_as_often_as_online(self, algorithm: Any, host: Any) -> None:
        """The default gives as many gradient steps between two updates as the host's own loop does."""
        model = host.build(algorithm, target_update_interval=12, train_freq=4, learning_starts=0)
        steps: list[int] = []
        moved = model._on_step

        def count() -> None:
            before = [p.clone() for p in model._networks[1].parameters()]
            moved()
            if any(not th.equal(a, b) for a, b in zip(before, model._networks[1].parameters(), strict=True)):
                steps.append(model._n_updates)

        model._on_step = count
        model.learn(80)
        assert set(np.diff(steps)) == {model._offline_interval}

    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_no_random_actions_after_it(self, algorithm: Any, host: Any) -> None:
        model = host.build(algorithm, exploration_initial_eps=1.0, exploration_final_eps=0.0, exploration_fraction=0.9)
        greedy = host.build(algorithm, exploration_initial_eps=1.0, exploration_final_eps=0.0, exploration_fraction=0.9)
        model.learn_offline(host.collect(discrete=True), 2)
        taken = []
        for one in (model, greedy):
            one.learning_rate, one.lr_schedule = 0.0, lambda _: 0.0
            one.learn(30)
            buffer = one.replay_buffer
            predicted, _ = one.predict(buffer.observations[:30, 0], deterministic=True)
            taken.append((predicted == buffer.actions[:30, 0, 0]).mean())
        assert taken[0] == 1.0
        assert taken[1] < 1.0, "the twin explores"

    @pytest.mark.parametrize("algorithm", HOSTS)
    def test_without_an_environment(self, algorithm: Any, host: Any, tmp_path: Path) -> None:
        data = host.collect(discrete=not issubclass(algorithm, TQC))
        model = algorithm.from_dataset(data, **host.tiny(algorithm)).learn_offline(data, 3)
        model.save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", device="cpu")
        assert not host.differing(host.state(model), host.state(loaded))
        for one in (model, loaded):
            env = environment(host, algorithm)
            env.seed(2)
            one.set_env(env)
            one.set_offline_data(data)
            one.set_random_seed(4)
            one.learn(20)
        assert not host.differing(host.state(model), host.state(loaded))

    def test_data_of_the_other_kind_is_refused(self, host: Any) -> None:
        with pytest.raises(ValueError, match="needs a Discrete action space"):
            DiscreteCQL.from_dataset(host.collect())
        with pytest.raises(ValueError, match="needs a Box action space"):
            CQLTQC.from_dataset(host.collect(discrete=True))

    @pytest.mark.parametrize("algorithm", HOSTS)
    @pytest.mark.parametrize("fraction", [0.25, 0.5, "proportional"])
    def test_shares_online(self, algorithm: Any, host: Any, fraction: Any) -> None:
        model = host.build(algorithm, offline_fraction=fraction, learning_starts=20)
        data = host.collect(discrete=not issubclass(algorithm, TQC), reward=777.0)
        shares = []
        sample = model.sample_batch
        model.learn_offline(data, 1)

        def record(size: int) -> Batch:
            batch = sample(size)
            shares.append(((batch.rewards == 777.0).float().mean().item(), len(data) / (len(data) + model.replay_buffer.pos)))
            return batch

        model.sample_batch = record
        model.learn(30)
        assert shares
        for share, proportional in shares:
            assert share == pytest.approx(round(8 * (proportional if fraction == "proportional" else fraction)) / 8)

    @pytest.mark.parametrize("algorithm", HOSTS)
    def test_what_is_logged(self, algorithm: Any, host: Any) -> None:
        model = host.build(algorithm)
        model.set_logger(Logger(folder=None, output_formats=[]))
        recorded: dict[str, Any] = {}
        record = model.logger.record
        model.logger.record = lambda key, value, exclude=None: recorded.update({key: value}) or record(key, value, exclude)
        model.learn_offline(host.collect(discrete=not issubclass(algorithm, TQC)), 4, log_interval=2)
        expected = {"q_data", "q_policy", "q_random", "cql_gap", "cql_loss", "bellman_loss", "learning_rate", "n_updates"}
        expected |= {"critic_loss", "actor_loss", "ent_coef"} if issubclass(algorithm, TQC) else {"loss"}
        expected |= {"bound_rate"} if algorithm in CALIBRATED else set()
        assert {f"train/{name}" for name in expected} <= recorded.keys()
        assert all(math.isfinite(recorded[f"train/{name}"]) for name in expected)


def test_a_base_that_says_too_little_is_refused_at_once(host: Any) -> None:
    class Unfinished(ConservativeQLearning, DQN):
        def _bellman_loss(self, current: th.Tensor, target: th.Tensor) -> th.Tensor:
            return (current - target).mean()

    with pytest.raises(TypeError, match=r"abstract.*_networks.*_quantiles"):
        host.build(Unfinished)


class TestOptions:
    @pytest.mark.parametrize(
        ("algorithm", "options", "message"),
        [
            (DiscreteCQL, {"cql_alpha": -1.0}, "cql_alpha must be a number >= 0"),
            (DiscreteCQL, {"cql_temperature": 0.0}, "cql_temperature"),
            (CQLQRDQN, {"offline_target_update_interval": 0}, "offline_target_update_interval"),
            (DiscreteCalQL, {"return_tail": "long"}, "return_tail must be one of"),
            (CQLTQC, {"cql_variant": "x"}, "cql_variant must be one of"),
            (CQLTQC, {"offline_fraction": 2.0}, "offline_fraction"),
        ],
    )
    def test_out_of_range(self, algorithm: Any, options: dict[str, Any], message: str, host: Any) -> None:
        with pytest.raises(ValueError, match=message):
            host.build(algorithm, **options)

    def test_unknown_names(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'CQLTD3'"):
            sb3.CQLTD3  # noqa: B018
        assert set(sb3.__all__) >= {cls.__name__ for cls in HOSTS}

    @pytest.mark.parametrize("algorithm", [DiscreteCQL, CQLQRDQN])
    def test_normalised_gap_of_a_flat_network_is_zero(self, algorithm: Any, host: Any) -> None:
        model = host.build(algorithm, normalize_gap=True)
        batch = batches(host, model)[0]
        with th.no_grad():
            for parameter in model._networks[0].parameters():
                parameter.zero_()
        assert model._train_step(batch).cql_gap.item() == pytest.approx(0.0, abs=1e-6)
