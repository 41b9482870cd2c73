"""One gradient step of CQL and Cal-QL against NumPy in float64, and what each step may and may not touch."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from cql_plugins import losses
from cql_plugins.ensembles import evaluate_actions
from cql_plugins.sb3 import CQL, CalQL, actor_critic
from cql_plugins.sb3.actor_critic import critic_outputs
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.buffers import with_returns_to_go

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
LEARNING_RATE = 0.01


def make_buffer(n: int = 60, seed: int = 0) -> ReplayBuffer:
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(n, OBSERVATIONS, ACTIONS, "cpu")
    buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.next_observations[:-1] = buffer.observations[1:]
    buffer.next_observations[9::10] = rng.normal(size=buffer.observations[9::10].shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = rng.normal(size=buffer.rewards.shape)
    buffer.dones[9::10] = 1
    buffer.timeouts[19::20] = 1
    buffer.full = True
    return buffer


def make_model(algorithm: type[CQL] = CQL, **kwargs: Any) -> CQL:
    arguments: dict[str, Any] = {
        "seed": 0,
        "device": "cpu",
        "batch_size": 12,
        "buffer_size": 100,
        "learning_rate": LEARNING_RATE,
        "cql_n_actions": 4,
        "policy_kwargs": {"net_arch": [8], "optimizer_class": th.optim.SGD},
    }
    return algorithm.from_dataset(make_buffer(), **(arguments | kwargs))


def numpy_q(critic_state: dict[str, th.Tensor], obs: np.ndarray, actions: np.ndarray, n_critics: int = 2) -> np.ndarray:
    """The critics by hand, in float64: one hidden layer. Observations (B, O), actions (B, M, A) -> (C, B, M)."""
    inputs = np.concatenate([np.repeat(obs[:, None], actions.shape[1], axis=1), actions], axis=2)
    values = []
    for c in range(n_critics):
        w1, b1, w2, b2 = (
            critic_state[f"qf{c}.{name}"].double().numpy() for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        values.append((np.maximum(inputs @ w1.T + b1, 0.0) @ w2.T + b2)[..., 0])
    return np.stack(values)


class Recorder:
    """Runs one critic update of a model and keeps everything random that went into it."""

    def __init__(self, model: CQL) -> None:
        self.model = model
        self.before = {k: v.clone() for k, v in model.critic.state_dict().items()}
        self.target_before = {k: v.clone() for k, v in model.critic_target.state_dict().items()}
        self.proposed: dict[str, losses.ProposedActions] = {}
        propose = model._propose

        def keep(*args: Any) -> dict[str, losses.ProposedActions]:
            self.proposed = propose(*args)
            return self.proposed

        model._propose = keep  # type: ignore[method-assign]
        with_target = model._update_critic

        def keep_target(batch: Batch, target: th.Tensor, *args: Any) -> Any:
            self.batch, self.target = batch, target
            return with_target(batch, target, *args)

        model._update_critic = keep_target  # type: ignore[method-assign]
        model.train(1, model.batch_size)
        self.after = {k: v.clone() for k, v in model.critic.state_dict().items()}
        self.metrics = model._metrics.pop()

    def loss(self, state: dict[str, th.Tensor], lagrange: float | None = None) -> dict[str, float]:
        """The critic's loss by the page: NumPy, float64, from the recorded batch and proposals."""
        m, batch = self.model, self.batch
        obs, data = (np.asarray(x, dtype=np.float64) for x in (batch.observations, batch.actions))
        y = self.target.double().numpy()[:, 0]
        q_data = numpy_q(state, obs, data[:, None])[:, :, 0]
        groups = {}
        for name, group in self.proposed.items():
            groups[name] = numpy_q(state, obs, group.actions.double().numpy())
        raw = {name: q.mean() for name, q in groups.items()}
        rate = float("nan")
        if isinstance(m, CalQL):
            assert batch.returns_to_go is not None
            reference = batch.returns_to_go.double().numpy()[None]
            bounded = [n for n in groups if n != "random" or m.calibrate_random]
            rate = float(np.mean([(groups[n] < reference).mean() for n in bounded]))
            groups |= {n: np.maximum(groups[n], reference) for n in bounded}
        density = np.concatenate([g.log_density.double().numpy() for g in self.proposed.values()], axis=1)
        q, t = np.concatenate(list(groups.values()), axis=2), m.cql_temperature
        if m.cql_variant == "H":
            gap = t * np.log(np.exp(q / t - density[None]).sum(axis=2)) - q_data
            if m.normalize_gap:
                gap -= t * (math.log(q.shape[2]) + 2 * math.log(2))
        elif m.cql_variant == "rho":
            gap = t * np.log(np.exp(q / t).mean(axis=2)) - q_data
        else:
            gap = q.mean(axis=2) - (q_data if m.cql_variant == "mu" else 0)
        gap = np.clip(gap, *m.cql_clip_diff)
        bellman = 0.5 * ((q_data - y) ** 2).mean(axis=1).sum()
        scale, tau = (1.0, 0.0) if lagrange is None else (lagrange, m.cql_lagrange_threshold)
        assert tau is not None
        conservative = 0.5 * m.cql_alpha * scale * (gap.mean(axis=1) - tau).sum()
        named = {"critic_loss": bellman + conservative, "bellman_loss": bellman, "cql_loss": conservative}
        named |= {"cql_gap": gap.mean(), "q_data": q_data.mean(), "q_policy": raw["current"]}
        named |= {"q_random": raw["random"]} if "random" in raw else {}
        return named | ({"bound_rate": rate} if isinstance(m, CalQL) else {})

    def gradient(self, name: str, index: tuple[int, ...], lagrange: float | None = None) -> float:
        """Central difference of the loss by one weight."""
        values = []
        for step in (1e-5, -1e-5):
            state = {k: v.double().clone() for k, v in self.before.items()}
            state[name][index] += step
            values.append(self.loss(state, lagrange)["critic_loss"])
        return (values[0] - values[1]) / 2e-5


VARIANTS = {
    "H": (CQL, {}),
    "rho": (CQL, {"cql_variant": "rho"}),
    "mu": (CQL, {"cql_variant": "mu"}),
    "pointwise": (CQL, {"cql_variant": "pointwise"}),
    "temperature": (CQL, {"cql_temperature": 0.2}),
    "rho with temperature": (CQL, {"cql_variant": "rho", "cql_temperature": 3.0}),
    "normalized": (CQL, {"normalize_gap": True, "cql_temperature": 2.0}),
    "clipped": (CQL, {"cql_clip_diff": (4.5, 4.9)}),
    "lagrange": (CQL, {"cql_lagrange_threshold": 4.0}),
    "Cal-QL": (CalQL, {}),
    "Cal-QL with random bounded": (CalQL, {"calibrate_random": True, "cql_temperature": 2.0}),
    "Cal-QL rho": (CalQL, {"cql_variant": "rho"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_critic_update_is_the_page_in_numpy(name: str) -> None:
    algorithm, kwargs = VARIANTS[name]
    record = Recorder(make_model(algorithm, **kwargs))
    lagrange = math.e if "cql_lagrange_threshold" in kwargs else None
    expected = record.loss(record.before, lagrange)
    for key, value in expected.items():
        assert record.metrics[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    if algorithm is CalQL:
        assert 0.05 < expected["bound_rate"] < 0.95, "the bound bites for some and not for others"
    for weight, index in (("qf0.0.weight", (3, 4)), ("qf1.0.bias", (2,)), ("qf0.2.weight", (0, 5)), ("qf1.2.bias", (0,))):
        step = (record.after[weight] - record.before[weight]).double()[index].item()
        assert step == pytest.approx(-LEARNING_RATE * record.gradient(weight, index, lagrange), rel=2e-3, abs=2e-7), weight


def test_variants_step_differently() -> None:
    """The twin of the equalities: with one seed, no two variants leave the same critic."""
    ends = {name: Recorder(make_model(a, **k)).after["qf0.0.weight"] for name, (a, k) in VARIANTS.items()}
    names = list(ends)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not th.allclose(ends[first], ends[second], rtol=0, atol=1e-7), (first, second)


class TestTarget:
    """Targets by hand, from the recorded actions of the policy at the next states."""

    def recorded(self, **kwargs: Any) -> tuple[CQL, Batch, th.Tensor, list[Any]]:
        model = make_model(ent_coef=0.3, **kwargs)
        batch, drawn = model.sample_batch(12), []
        action_log_prob, propose = model.actor.action_log_prob, losses.propose_from_policy

        def keep(obs: Any) -> Any:
            drawn.append(action_log_prob(obs))
            return drawn[-1]

        def keep_proposed(*args: Any) -> Any:
            drawn.append(propose(*args))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.actor, "action_log_prob", keep)
            patch.setattr(losses, "propose_from_policy", keep_proposed)
            target, _ = model._compute_target(batch, model.ent_coef_tensor)
        return model, batch, target, drawn

    @pytest.mark.parametrize("backup_entropy", [False, True])
    def test_sampled_target(self, backup_entropy: bool) -> None:
        model, batch, target, [(actions, log_prob)] = self.recorded(backup_entropy=backup_entropy)
        q = numpy_q(model.critic_target.state_dict(), np.asarray(batch.next_observations), actions.detach().numpy()[:, None])
        value = q[:, :, 0].min(axis=0) - (0.3 * log_prob.detach().numpy() if backup_entropy else 0)
        done = batch.dones.numpy()[:, 0]
        assert 0 < done.sum() < 12
        assert np.allclose(target[:, 0], batch.rewards.numpy()[:, 0] + 0.99 * (1 - done) * value, atol=1e-5)
        assert not target.requires_grad

    @pytest.mark.parametrize("backup_entropy", [False, True])
    def test_max_backup(self, backup_entropy: bool) -> None:
        model, batch, target, [drawn] = self.recorded(max_q_backup=True, backup_entropy=backup_entropy)
        q = numpy_q(model.critic_target.state_dict(), np.asarray(batch.next_observations), drawn.actions.numpy()).min(axis=0)
        best = q.argmax(axis=1)
        value = q.max(axis=1)
        if backup_entropy:
            value = value - 0.3 * drawn.log_density.numpy()[np.arange(12), best]
        expected = batch.rewards.numpy()[:, 0] + 0.99 * (1 - batch.dones.numpy()[:, 0]) * value
        assert np.allclose(target[:, 0], expected, atol=1e-5)

    @pytest.mark.parametrize("use_sde", [False, True])
    def test_mode_backup(self, use_sde: bool) -> None:
        model, batch, target, drawn = self.recorded(mode_q_backup=True, use_sde=use_sde)
        assert drawn == [], "nothing is sampled"
        mode = model.predict(np.asarray(batch.next_observations), deterministic=True)[0]
        q = numpy_q(model.critic_target.state_dict(), np.asarray(batch.next_observations), mode[:, None])
        done = batch.dones.numpy()[:, 0]
        expected = batch.rewards.numpy()[:, 0] + 0.99 * (1 - done) * q[:, :, 0].min(axis=0)
        assert np.allclose(target[:, 0], expected, atol=1e-5)
        sampled = self.recorded(use_sde=use_sde)[2]
        assert not np.allclose(target[:, 0], sampled[:, 0], atol=1e-3), "the twin's target is another"

    def test_proposals_of_the_next_state_are_drawn_from_the_policy_there(self) -> None:
        """Whatever the target's action: the soft maximum has samples, not the mode."""
        gaussians = []
        for mode_q_backup in (False, True):
            model = make_model(ent_coef=0.3, mode_q_backup=mode_q_backup)
            gaussians.append(model._compute_target(model.sample_batch(12), model.ent_coef_tensor)[1])
        assert all(th.equal(*pair) for pair in zip(*gaussians, strict=True))
        assert (gaussians[1].std > 0).all()

    @pytest.mark.parametrize(
        ("algorithm", "options", "message"),
        [
            (CQL, {"max_q_backup": True}, "max_q_backup cannot be on as well. Set max_q_backup=False."),
            (CQL, {"backup_entropy": True}, "backup_entropy cannot be on as well. Set backup_entropy=False."),
            (CalQL, {}, "Set max_q_backup=False."),
        ],
    )
    def test_one_target_at_a_time(self, algorithm: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            make_model(algorithm, mode_q_backup=True, **options)

    def test_time_outs_bootstrap(self) -> None:
        model = make_model()
        assert model.offline_buffer is not None
        model.offline_buffer.dones[:] = 1
        model.offline_buffer.timeouts[:] = 1
        assert model.sample_batch(50).dones.sum() == 0
        model.offline_buffer.timeouts[:] = 0
        assert model.sample_batch(50).dones.sum() == 50


class TestCalibrationLimits:
    """G = -inf is CQL; with G far above every Q the policy's values have no gradient."""

    def stepped(self, algorithm: type[CQL], reference: float | None, **kwargs: Any) -> dict[str, th.Tensor]:
        model = make_model(algorithm, max_q_backup=False, **kwargs)
        if reference is not None:
            assert model.offline_buffer is not None
            model.offline_buffer.returns_to_go[:] = reference  # type: ignore[attr-defined]
        model.train(1, 12)
        return {k: v.clone() for k, v in model.policy.state_dict().items()}

    def test_minus_infinity_is_cql(self) -> None:
        cql, calql = self.stepped(CQL, None), self.stepped(CalQL, -math.inf)
        assert all(th.equal(cql[k], calql[k]) for k in cql)
        bounded = self.stepped(CalQL, 0.3)
        assert not th.equal(cql["critic.qf0.0.weight"], bounded["critic.qf0.0.weight"])

    def test_high_returns_leave_the_bellman_error_and_the_datas_term(self) -> None:
        """All weight of the soft maximum is on the bounded values, so its gradient is zero: what is left is -w Q(s, a)."""
        far = self.stepped(CalQL, 1e4, calibrate_random=True)

        class OnlyData(CQL):
            def _compute_penalty(self, batch: Batch, q_values: Any, groups: Any) -> Any:
                penalty = super()._compute_penalty(batch, q_values, groups)
                return penalty._replace(gap=-penalty.q_data)

        only_data = self.stepped(OnlyData, None)
        names = [k for k in far if k.startswith("critic.")]
        assert all(th.allclose(far[k], only_data[k], atol=1e-6) for k in names)
        cql = self.stepped(CQL, None)
        assert not all(th.allclose(far[k], cql[k], atol=1e-6) for k in names)


class TestWhatAStepTouches:
    def test_critics_are_evaluated_once_per_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Data action and 3N proposals go through the critics together."""
        sizes = []

        def counting(networks: Any, features: th.Tensor, actions: th.Tensor, *rest: Any) -> th.Tensor:
            sizes.append((len(networks), *actions.shape[:2]))
            return evaluate_actions(networks, features, actions, *rest)

        monkeypatch.setattr(actor_critic, "evaluate_actions", counting)
        make_model().train(1, 12)
        assert sizes == [(2, 12, 13)]

    def test_unknown_networks_run_once_per_pass(self) -> None:
        """The same where something watches the networks, and they have to run as modules."""
        model = make_model()
        sizes: dict[int, list[int]] = {}
        for i, network in enumerate(model.critic.q_networks):
            network.register_forward_hook(lambda _m, args, _out, i=i: sizes.setdefault(i, []).append(len(args[0])))
        model.train(1, 12)
        # The penalty's pass, then the actor's loss.
        assert sizes == {0: [12 * 13, 12], 1: [12 * 13, 12]}

    @pytest.mark.parametrize("share", [False, True])
    def test_image_features_are_extracted_once_per_observation(self, share: bool) -> None:
        space = spaces.Dict({"image": spaces.Box(0, 255, (1, 36, 36), np.uint8), "vector": spaces.Box(-1, 1, (2,), np.float32)})
        buffer = DictReplayBuffer(20, space, ACTIONS, "cpu")
        buffer.rewards[:], buffer.full = 1.0, True
        buffer.observations["image"][:] = np.random.default_rng(0).integers(0, 255, size=(20, 1, 1, 36, 36))
        model = CQL.from_dataset(
            buffer,
            buffer_size=10,
            batch_size=6,
            device="cpu",
            policy_kwargs={"net_arch": [8], "share_features_extractor": share},
        )
        seen: list[int] = []
        extractors = {id(m): m for m in (model.actor.features_extractor, model.critic.features_extractor)}
        for extractor in extractors.values():
            extractor.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0]["image"])))
        model.train(1, 6)
        assert set(seen) == {6}, "never the batch times the sampled actions"
        # Actor at s and s', critic in the penalty and in the actor's loss.
        assert len(seen) == 4

    def test_penalty_does_not_train_the_actor_nor_the_actor_the_critic(self) -> None:
        model = make_model(actor_learning_rate=0.0)
        actor = {k: v.clone() for k, v in model.actor.state_dict().items()}
        model.train(3, 12)
        assert all(th.equal(v, actor[k]) for k, v in model.actor.state_dict().items())
        model = make_model(learning_rate=0.0, actor_learning_rate=0.1)
        critic = {k: v.clone() for k, v in model.critic.state_dict().items()}
        model.train(3, 12)
        assert all(th.equal(v, critic[k]) for k, v in model.critic.state_dict().items())

    @pytest.mark.parametrize("algorithm", [CQL, CalQL])
    def test_no_value_is_read_from_the_device_in_a_step(self, algorithm: type[CQL], monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model(algorithm, ent_coef=0.1)
        model._do_not_check_the_policy()  # as on a GPU
        monkeypatch.setattr(algorithm, "_defers", True)
        model.train(1, 12)

        def refuse(*_: Any) -> None:
            raise AssertionError("a gradient step waited for the device")

        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            monkeypatch.setattr(th.Tensor, name, refuse)
        model.train(5, 12)
        with pytest.raises(AssertionError, match="waited"):
            model._record_metrics()

    @pytest.mark.parametrize("activation", [th.nn.ReLU, th.nn.Tanh])
    def test_many_actions_at_once_equal_one_at_a_time(self, activation: type[th.nn.Module]) -> None:
        model = make_model(policy_kwargs={"net_arch": [8], "activation_fn": activation})
        batch = model.sample_batch(5)
        actions = th.rand(5, 7, 2) * 2 - 1
        together = critic_outputs(model.critic, batch.observations, actions)[..., 0]
        assert together.shape == (2, 5, 7)
        for i in range(7):
            alone = th.stack([q[:, 0] for q in model.critic(batch.observations, actions[:, i])])
            assert th.allclose(together[:, :, i], alone, atol=1e-6)


class TestActor:
    def test_loss_is_soft_actor_critic(self) -> None:
        """With the critic frozen, from the sampled actions by hand."""
        model = make_model(learning_rate=0.0, actor_learning_rate=0.0, ent_coef=0.3)
        drawn, batches = [], []
        original, sample = model.actor.action_log_prob, model.sample_batch

        def keep(obs: Any) -> Any:
            drawn.append([x.detach().numpy() for x in original(obs)])
            return tuple(th.as_tensor(x).requires_grad_() for x in drawn[-1])

        model.sample_batch = lambda n: batches.append(sample(n)) or batches[-1]  # type: ignore[func-returns-value, method-assign]
        model.actor.action_log_prob = keep  # type: ignore[method-assign]
        model.train(1, 12)
        actions, log_prob = drawn[0]
        q = numpy_q(model.critic.state_dict(), np.asarray(batches[0].observations), actions[:, None])[:, :, 0].min(axis=0)
        assert model._metrics.pop()["actor_loss"] == pytest.approx((0.3 * log_prob - q).mean(), abs=1e-5)

    def test_behaviour_cloning_lasts_bc_steps(self) -> None:
        """The clone follows one data action; after `bc_steps` the loss is the critic's again."""
        kwargs = {"net_arch": [8], "optimizer_class": th.optim.Adam}
        model = make_model(bc_steps=300, actor_learning_rate=0.02, ent_coef=0.0, learning_rate=0.0, policy_kwargs=kwargs)
        assert model.offline_buffer is not None
        model.offline_buffer.actions[:] = np.array([0.5, -0.25])
        model.train(299, 12)
        obs = np.asarray(model.offline_buffer.observations[:, 0])
        assert np.abs(model.predict(obs, deterministic=True)[0] - [0.5, -0.25]).mean() < 0.05
        model._metrics.pop()
        model.train(1, 12)
        cloned = model._metrics.pop()["actor_loss"]
        model.train(1, 12)
        after = model._metrics.pop()["actor_loss"]
        assert cloned < -2, "the likelihood of the data's action is far above one: the clone is sharp"
        assert abs(after) < 1, "minus the value, which is small in a fresh critic"


class TestLagrange:
    def stepped(self, threshold: float, steps: int = 20) -> CQL:
        model = make_model(cql_lagrange_threshold=threshold)
        model.train(steps, 12)
        return model

    def test_multiplier_falls_where_the_gap_is_below_and_rises_where_above(self) -> None:
        for threshold, rises in ((50.0, False), (-50.0, True)):
            model = self.stepped(threshold)
            assert model.log_cql_lagrange is not None
            # Adam's steps are of the size of its rate: 20 steps of 0.01.
            assert model.log_cql_lagrange.item() == pytest.approx(1.2 if rises else 0.8, abs=0.02)

    def test_clamp_is_said_once(self) -> None:
        model = self.stepped(-50.0, steps=1)
        assert model.log_cql_lagrange is not None
        model._q_range.has_warned = True  # Such a weight drags Q to -1e6, which is said, too.
        model._record_metrics()
        model.log_cql_lagrange.data.fill_(20.0)
        model.train(1, 12)
        with pytest.warns(UserWarning, match="clamp"):
            model._record_metrics()
        model.train(1, 12)
        model._record_metrics()


def test_target_networks_move_every_interval_across_calls() -> None:
    """SB3 counts gradient steps within one call of train(): one at a time, an interval above 1 would never be kept."""
    model = make_model(target_update_interval=3)
    moved = []
    for _ in range(7):
        before = model.critic_target.state_dict()["qf0.0.weight"].clone()
        model.train(1, 12)
        moved.append(not th.equal(before, model.critic_target.state_dict()["qf0.0.weight"]))
    assert moved == [True, False, False, True, False, False, True]


def test_learning_rates_of_critic_and_actor_are_apart() -> None:
    model = make_model(learning_rate=lambda p: 0.1 * p, actor_learning_rate=lambda p: 0.01 * p)
    model._current_progress_remaining = 0.5
    model.train(1, 12)
    rates = [model.critic.optimizer, model.actor.optimizer, model.ent_coef_optimizer]
    assert [o.param_groups[0]["lr"] for o in rates if o is not None] == pytest.approx([0.05, 0.005, 0.005])
    logged = model.logger.name_to_value
    assert (logged["train/learning_rate"], logged["train/actor_learning_rate"]) == pytest.approx((0.05, 0.005))


def test_a_buffer_without_returns_gets_them() -> None:
    model = make_model(CalQL)
    expected = with_returns_to_go(make_buffer(), 0.99).returns_to_go
    assert model.offline_buffer is not None
    assert np.array_equal(model.offline_buffer.returns_to_go, expected)  # type: ignore[attr-defined]
    assert np.isfinite(expected).all()
