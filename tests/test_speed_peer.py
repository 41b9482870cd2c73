"""The single-file CQL of `benchmarks/speed.py` computes what ours does, and its count of operations is torch's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("stable_baselines3")
pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)

from cql_plugins import losses
from cql_plugins.losses import Gaussian

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"
BATCH, ACTIONS = 32, 3


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


class Pair(NamedTuple):
    """Ours, the single file with the same weights, a batch, and the same actions for both."""

    ours: Any
    peer: Any
    batch: Any
    groups: dict[str, losses.ProposedActions]
    target_actions: th.Tensor


@pytest.fixture
def pair(speed: ModuleType) -> Pair:
    shape = speed.Shape((5,), ACTIONS, hidden=(16, 16), batch=BATCH, n_critics=3)
    data = speed.Data(speed.make_dataset(shape, 2000))
    ours = speed.make_source(shape, data.dataset, "cpu")
    with th.no_grad():
        # Values and deviations that differ from row to row, and targets that are not the critics.
        for parameter in ours.policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    peer = speed.SingleFileCQL(shape, "cpu")
    peer.load(ours)
    np.random.seed(0)
    batch = speed.SingleFileBuffer(data.columns(), "cpu").sample(BATCH)
    with th.no_grad():
        mean, log_std, _ = ours.actor.get_action_dist_params(batch.observations)
        next_mean, next_log_std, _ = ours.actor.get_action_dist_params(batch.next_observations)
    policy, next_policy = Gaussian(mean, log_std.exp()), Gaussian(next_mean, next_log_std.exp())
    groups = losses.propose_actions("H", batch.actions, policy, next_policy, speed.N_ACTIONS)
    return Pair(ours, peer, batch, groups, th.rand(BATCH, ACTIONS) * 2 - 1)


def our_loss(speed: ModuleType, pair: Pair, temperature: float) -> th.Tensor:
    """The critic's loss of `cql_plugins.losses` with SB3's own forward pass of each action."""
    ours, batch = pair.ours, pair.batch
    actions = th.cat([batch.actions.unsqueeze(1), *(group.actions for group in pair.groups.values())], dim=1)
    values = [th.cat(ours.critic(batch.observations, actions[:, i]), dim=1).T for i in range(actions.shape[1])]
    q_values = th.stack(values, dim=2)
    next_values = (
        th.cat(ours.critic_target(batch.next_observations, pair.target_actions), dim=1).min(dim=1, keepdim=True).values
    )
    target = losses.td_target(batch.rewards, batch.dones, speed.GAMMA, next_values.detach())
    bellman_error = ((q_values[:, :, 0] - target.T) ** 2).mean(dim=1)
    penalty = losses.conservative_penalty(q_values, pair.groups, temperature=temperature)
    return losses.critic_loss(bellman_error, penalty.gap, speed.WEIGHT)


def peer_loss(speed: ModuleType, pair: Pair, temperature: float) -> th.Tensor:
    current, following = pair.groups["current"], pair.groups["next"]
    proposals = speed.SingleFileProposals(
        pair.groups["random"].actions,
        current.actions,
        current.log_density,
        following.actions,
        following.log_density,
        pair.target_actions,
    )
    pair.peer.temperature = temperature
    loss: th.Tensor = pair.peer.critic_loss(pair.batch, proposals)[0]
    return loss


def test_the_peers_loss_and_gradient_are_twice_ours(speed: ModuleType, pair: Pair) -> None:
    """Its Bellman error is not halved, so with the same weight its loss is twice ours."""
    ours, theirs = our_loss(speed, pair, 1.0), peer_loss(speed, pair, 1.0)
    assert theirs.item() == pytest.approx(2 * ours.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    for network, critic in zip(pair.ours.critic.q_networks, pair.peer.critics, strict=True):
        for parameter, other in zip(network.parameters(), critic.parameters(), strict=True):
            th.testing.assert_close(other.grad, 2 * parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


def test_with_another_temperature_they_differ(speed: ModuleType, pair: Pair) -> None:
    """As published codes do, the peer divides the density by the temperature, too; ours divides Q alone."""
    ours, theirs = our_loss(speed, pair, 2.0), peer_loss(speed, pair, 2.0)
    assert theirs.item() != pytest.approx(2 * ours.item(), rel=1e-3)


def test_the_peers_policy_is_ours(pair: Pair) -> None:
    mean, log_std, _ = pair.ours.actor.get_action_dist_params(pair.batch.observations)
    their_mean, their_log_std = th.chunk(pair.peer.policy.net(pair.batch.observations), 2, dim=-1)
    th.testing.assert_close(their_mean, mean)
    th.testing.assert_close(their_log_std.clamp(-20, 2), log_std)
    actions, log_prob = pair.peer.policy(pair.batch.observations, repeat=4)
    # Back from an action in float32 to what it came from only far from the bounds.
    inside = (actions.abs() < 0.99).all(dim=2)
    expected = losses.squashed_gaussian_log_density(th.atanh(actions), mean.unsqueeze(1), log_std.exp().unsqueeze(1))
    assert int(inside.sum()) >= 10
    th.testing.assert_close(log_prob[inside], expected[inside], rtol=1e-3, atol=1e-3)


def test_an_update_moves_every_network(pair: Pair) -> None:
    peer = pair.peer
    parameters = [peer.log_alpha, *peer.policy.parameters()]
    parameters += [p for network in (*peer.critics, *peer.targets) for p in network.parameters()]
    before = [p.detach().clone() for p in parameters]
    metrics = peer.update(pair.batch)
    assert all(np.isfinite(list(metrics.values())))
    assert all(not th.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("n_critics", [2, 3])
def test_operations_are_those_that_torch_counts(speed: ModuleType, n_critics: int) -> None:
    shape = speed.Shape((5,), ACTIONS, hidden=(16, 8), batch=BATCH, n_critics=n_critics)
    counted = speed.count_operations(shape)
    peer = speed.SingleFileCQL(shape, "cpu")
    observations, next_observations = th.randn(2, BATCH, 5)
    proposed = th.rand(BATCH, 3 * speed.N_ACTIONS + 1, ACTIONS)
    with FlopCounterMode(display=False) as counter:
        sum(critic(observations, proposed).sum() for critic in peer.critics).backward()
    assert counter.get_total_flops() == counted["critic"]
    with FlopCounterMode(display=False) as counter, th.no_grad():
        actions, _ = peer.policy(next_observations)
        for target in peer.targets:
            target(next_observations, actions)
    assert counter.get_total_flops() == counted["target"]
    for critic in peer.critics:
        critic.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        actions, _ = peer.policy(observations)
        sum(critic(observations, actions).sum() for critic in peer.critics).backward()
    # torch's gradient of the first layer's inputs has the observations' columns, too, which nobody needs.
    unneeded = n_critics * 2 * BATCH * 5 * 16
    assert counter.get_total_flops() == counted["actor"] + unneeded


def test_nothing_stays_patched(speed: ModuleType) -> None:
    class Sampler:
        def sample(self) -> int:
            return 1

    backward, zero_grad, grad, sampler = th.Tensor.backward, th.optim.Optimizer.zero_grad, th.autograd.grad, Sampler()
    clock = speed.PartClock("cpu")
    clock.start()
    with speed.clocked_calls(clock, [(sampler, "sample", "sampling"), (sampler, "missing", "sampling")], False):
        assert sampler.sample() == 1
        parameter = th.ones(2, requires_grad=True)
        optimizer = th.optim.SGD([parameter], 0.1)
        (parameter**2).sum().backward()
        optimizer.step()
    clock.stop()
    assert all(clock.seconds[part] > 0 for part in ("sampling", "backward", "optimiser", "forward and rest"))
    assert (th.Tensor.backward, th.optim.Optimizer.zero_grad, th.autograd.grad) == (backward, zero_grad, grad)
    assert "sample" not in vars(sampler)


def test_options_that_do_not_exist_leave_their_row_out(speed: ModuleType) -> None:
    spec = speed.Spec("ours", "ours-sb3")
    wanted = {"precision": "bf16", "compile": False, "data_device": None}
    assert speed._require(spec, {"precision", "compile"}, wanted) == {"precision": "bf16", "compile": False}
    assert speed._require(spec, set(), wanted | {"precision": "f32"}) == {}
    with pytest.raises(speed.LeftOutError, match="no option precision"):
        speed._require(spec, {"compile"}, wanted)


def test_no_bfloat16_where_the_processor_has_none(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(speed, "_ours_sb3", lambda spec, *_: built.append(spec.precision))
    monkeypatch.setattr(speed.ensembles, "multiplies_bf16", lambda: False)
    with pytest.raises(speed.LeftOutError, match="no bfloat16 products"):
        speed.build(speed.Spec("ours", "ours-sb3", False, "bf16"), speed.SHAPES["halfcheetah"], None, None, "cpu")
    speed.build(speed.Spec("ours", "ours-sb3", False, "f32"), speed.SHAPES["halfcheetah"], None, None, "cpu")
    speed.build(speed.Spec("ours", "ours-sb3", False, "bf16"), speed.SHAPES["halfcheetah"], None, None, "cuda")
    monkeypatch.setattr(speed.ensembles, "multiplies_bf16", lambda: True)
    speed.build(speed.Spec("ours", "ours-sb3", False, "bf16"), speed.SHAPES["halfcheetah"], None, None, "cpu")
    assert built == ["f32", "bf16", "bf16"]
