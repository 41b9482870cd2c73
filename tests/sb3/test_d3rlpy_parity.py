"""Ten critic updates beside d3rlpy's CQL: same weights, batches, targets and proposals, its conventions switched on.

d3rlpy halves neither the Bellman error nor the penalty, so its learning rate is half of ours, and SGD makes that visible. Its
penalty is checked through its own `compute_critic_loss`, its own Q-function forward included.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from cql_plugins import losses
from cql_plugins.sb3 import CQL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # d3rlpy imports packages that warn on import; that is not ours to fix
    d3rlpy = pytest.importorskip("d3rlpy", exc_type=ImportError, reason="d3rlpy is not installed")

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
N, RATE, BATCH = 4, 1e-2, 16


def our_model(weight: float) -> CQL:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(200, OBSERVATIONS, ACTIONS, "cpu")
    buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.next_observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = rng.normal(size=buffer.rewards.shape)
    buffer.full = True
    return CQL.from_dataset(
        buffer,
        seed=0,
        device="cpu",
        buffer_size=10,
        learning_rate=2 * RATE,
        cql_alpha=weight,
        cql_n_actions=N,
        policy_kwargs={"net_arch": [32, 32], "optimizer_class": th.optim.SGD},
    )


def their_impl(weight: float, ours: CQL) -> Any:
    encoder = d3rlpy.models.VectorEncoderFactory([32, 32])
    algo = d3rlpy.algos.CQLConfig(
        conservative_weight=weight,
        alpha_threshold=0.0,
        initial_alpha=1.0,
        alpha_learning_rate=0.0,  # Lagrange off: its multiplier stays exp(0)
        n_action_samples=N,
        critic_learning_rate=RATE,
        critic_optim_factory=d3rlpy.optimizers.SGDFactory(),
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
    ).create(device="cpu")
    algo.create_impl((3,), 2)
    theirs = [p for q in algo.impl.modules.q_funcs for p in q.parameters()]
    own = [p for q in ours.critic.q_networks for p in q.parameters()]
    assert sorted(map(tuple, (p.shape for p in theirs))) == sorted(map(tuple, (p.shape for p in own)))
    for pair in zip(algo.impl.modules.q_funcs, ours.critic.q_networks, strict=True):
        copy_network(*pair)
    return algo.impl


def copy_network(theirs: th.nn.Module, ours: th.nn.Module) -> None:
    """Match layers by shape: hidden layers in order, then the head."""
    linears = [m for m in theirs.modules() if isinstance(m, th.nn.Linear)]
    linears.sort(key=lambda m: (m.out_features == 1, m.in_features != 5))
    for target, source in zip(linears, (m for m in ours.modules() if isinstance(m, th.nn.Linear)), strict=True):
        target.load_state_dict(source.state_dict())


def run(their_weight: float, our_weight: float, updates: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Q-values of both at fresh points after the same updates, shape (2, n)."""
    ours = our_model(our_weight)
    impl = their_impl(their_weight, ours)
    for _ in range(updates):
        batch = ours.sample_batch(BATCH)
        with th.no_grad():
            policy = ours._policy_gaussian(batch.observations)
            next_policy = ours._policy_gaussian(batch.next_observations)
        groups = ours._propose(batch, policy, next_policy)
        target, _ = ours._compute_target(batch, th.tensor(0.0))

        ours._propose = lambda *_, groups=groups: groups  # type: ignore[method-assign, misc]
        step_policy = type("Step", (), {"mean": policy.mean, "std": policy.std})()
        ours._update_critic(batch, target, step_policy, next_policy)
        del ours._propose  # type: ignore[attr-defined]

        def q_of(group: losses.ProposedActions, obs: th.Tensor) -> th.Tensor:
            flat_obs = obs.repeat_interleave(N, dim=0)
            values = impl._q_func_forwarder.compute_expected_q(flat_obs, group.actions.reshape(-1, 2), "none")
            return values.view(-1, len(obs), N)

        def policy_values(policy_obs: th.Tensor, value_obs: th.Tensor, returns_to_go: Any, groups=groups, batch=batch) -> Any:
            group = groups["current" if policy_obs is batch.observations else "next"]
            return q_of(group, value_obs), group.log_density[None]

        def random_values(obs: th.Tensor, groups=groups) -> Any:
            return q_of(groups["random"], obs), -2 * np.log(2.0)

        impl._compute_policy_is_values, impl._compute_random_is_values = policy_values, random_values
        their_batch = d3rlpy.torch_utility.TorchMiniBatch(
            observations=batch.observations,
            actions=batch.actions,
            # d3rlpy adds reward and discount to the next value it is given: with the target as reward and a next value of
            # zero, its target is ours.
            rewards=target,
            next_observations=batch.next_observations,
            next_actions=batch.actions,
            returns_to_go=th.zeros(BATCH, 1),
            terminals=th.zeros(BATCH, 1),
            intervals=th.ones(BATCH, 1),
            device="cpu",
        )
        loss = impl.compute_critic_loss(their_batch, th.zeros(BATCH, 1)).critic_loss
        impl.modules.critic_optim.zero_grad()
        loss.backward()
        impl.modules.critic_optim.step()

    rng = np.random.default_rng(1)
    obs = th.as_tensor(rng.normal(size=(50, 3)).astype(np.float32))
    act = th.as_tensor(rng.uniform(-1, 1, size=(50, 2)).astype(np.float32))
    with th.no_grad():
        mine = th.cat(ours.critic(obs, act), dim=1).T.numpy()
        theirs = impl._q_func_forwarder.compute_expected_q(obs, act, "none")[:, :, 0].numpy()
    return mine, theirs


@pytest.mark.filterwarnings("ignore")
def test_ten_updates_equal_d3rlpys_critic_and_another_weight_does_not() -> None:
    start, their_start = run(5.0, 5.0, updates=0)
    np.testing.assert_allclose(start, their_start, atol=1e-6)
    mine, theirs = run(5.0, 5.0)
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert np.abs(mine - start).max() > 0.01, "ten updates moved the critic"
    other, theirs = run(5.0, 2.5)
    assert np.abs(other - theirs).max() > 1e-3
