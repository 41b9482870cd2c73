"""One update of CQL, side by side: ours in both frameworks, d3rlpy's, the usual single file's, and SB3's SAC.

    python benchmarks/speed.py [--device cuda] [--shapes halfcheetah pen | all] [--state trained] [--growth 10000] [--quick]

**Order.** All contestants live in one process, hold the same data and start from the same weights. A round runs a block of
updates of each in turn, the order rotated by one from round to round; every ratio is taken within a round, so that a machine
whose speed drifts slows both sides alike. Printed are medians and quartiles over the rounds.

**What an update is.** Sampling included, as each contestant's own training loop does it: ``model.train(1, B)`` in SB3,
``algo.update(buffer.sample_transition_batch(B))`` in d3rlpy. d3rlpy's algorithms sample from d3rlpy's own buffer, ours from
ours. Its Lagrange multiplier is on and its target takes the policy's mean, which are its defaults; ours are at our defaults
but for ``max_q_backup``, which is off where a name does not say otherwise, so that CQL and Cal-QL differ by the bound alone.
The single file is this script's own: see :class:`SingleFileCQL`.

**The limit.** The machine's rate of matrix products is measured in every round, too: ``B (3N + 1) x width x width``, which is
the hidden layer's product, in f32 (the default BLAS, and oneDNN's product where there is one: the faster of the two is the
limit) and bf16. An update's operations are counted by :func:`count_operations` for the plain algorithm, the same number for
all of a kind: who leaves work out shows a higher rate by it.

**State.** Ours leaves rows of the soft maximum that weigh next to nothing out of the backward pass, on the CPU, so that its
speed depends on the critics. ``--state fresh`` starts from fresh networks, ``--state trained`` from ``--checkpoint`` or from
``--train-steps`` of ours. The data is a noisy linear system, or with ``--state trained`` and ``CQL_PLUGINS_DATA`` set the
halfcheetah replay set (see ``train.py``). The weights are carried into every contestant, except for images into d3rlpy's,
whose networks differ there.

**Parts.** A separate pass with a clock around the calls: sampling (``sample_batch``, ``sample_transition_batch``), making
tensors of it (SB3's ``to_torch``, d3rlpy's ``TorchMiniBatch.from_batch``; on CUDA that is the copy to the device), backward
(``Tensor.backward``, ``autograd.grad``), optimiser (torch's global step hooks, ``zero_grad`` and the targets' update where it
is a method of its own); the rest is forward passes, losses and Python, and whatever steps without torch's ``Optimizer``. On
CUDA the device is waited for at each switch, which slows small kernels; of captured updates only sampling and making tensors
are told apart. A second pass under ``torch.profiler`` says which operators the time goes to: by their time on the CPU, where
``no operator`` is Python and the profiler itself, or by their kernels on CUDA, where ``no operator`` is the device waiting
for the host.

**Memory.** On the CPU a process for each contestant: highest resident memory of five updates, after three, above what was
resident before them. On CUDA: highest memory allocated in the first updates (optimiser state and capture included) above what
the built contestant holds. ``--growth N`` trains ours for N updates in a process each and reads the memory ten times on the
way.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import inspect
import itertools
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from cql_plugins import d3rlpy as ours_d3rlpy  # isort: skip  (first: it imports d3rlpy and SB3 without gym's notice)
import d3rlpy
import gymnasium as gym
import numpy as np
import structlog
import torch as th
from d3rlpy.dataset import Episode, InfiniteBuffer
from d3rlpy.dataset import ReplayBuffer as D3rlpyBuffer
from d3rlpy.torch_utility import TorchMiniBatch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cql_plugins import ensembles
from cql_plugins.adapters import OfflineDataset, to_d3rlpy, to_d3rlpy_model
from cql_plugins.sb3 import CQL, CalQL

ROOT = Path(__file__).resolve().parents[1]
N_ACTIONS = 10
GAMMA, TAU, WEIGHT = 0.99, 0.005, 5.0
CRITIC_RATE, ACTOR_RATE = 3e-4, 1e-4
NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
FEATURES = 512
REFERENCES = ("d3rlpy CQL", "single file CQL")
MIB = 2**20


# Shapes and data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison."""

    observation: tuple[int, ...]
    n_actions: int
    hidden: tuple[int, ...] = (256, 256, 256)
    batch: int = 256
    n_critics: int = 2

    @property
    def is_image(self) -> bool:
        """Whether observations are pictures."""
        return len(self.observation) == 3


SHAPES = {
    "halfcheetah": Shape((17,), 6),
    "halfcheetah-2x256": Shape((17,), 6, hidden=(256, 256)),
    "pen": Shape((45,), 24),
    "ten-critics": Shape((17,), 6, n_critics=10),
    "batch-1024": Shape((17,), 6, batch=1024),
    "batch-4096": Shape((17,), 6, batch=4096),
    "images": Shape((3, 64, 64), 6, hidden=(256, 256), batch=64),
    "tiny": Shape((17,), 6, hidden=(64, 64), batch=64),
}


def make_dataset(shape: Shape, size: int) -> OfflineDataset:
    """Episodes of a noisy linear system under a noisy linear policy; random bytes for images."""
    rng = np.random.default_rng(0)
    length = 100 if shape.is_image else 1000
    size = min(size, 2000) if shape.is_image else size
    n_episodes = max(size // length, 2)
    width = math.prod(shape.observation)
    actions = np.empty((n_episodes, length, shape.n_actions), np.float32)
    space: spaces.Space[Any]
    if shape.is_image:
        observations = rng.integers(0, 256, (n_episodes, length + 1, *shape.observation), dtype=np.uint8)
        actions[:] = rng.uniform(-1, 1, actions.shape)
        rewards = rng.normal(size=(n_episodes, length))
        space = spaces.Box(0, 255, shape.observation, np.uint8)
    else:
        turn = np.linalg.qr(rng.normal(size=(width, width)))[0] * 0.95
        push, gains = rng.normal(size=(shape.n_actions, width)) * 0.3, rng.normal(size=(width, shape.n_actions)) * 0.2
        states = np.empty((n_episodes, length + 1, width), np.float32)
        states[:, 0] = rng.normal(size=(n_episodes, width))
        for t in range(length):
            actions[:, t] = np.tanh(states[:, t] @ gains + 0.5 * rng.normal(size=(n_episodes, shape.n_actions)))
            states[:, t + 1] = states[:, t] @ turn + actions[:, t] @ push + 0.1 * rng.normal(size=(n_episodes, width))
        observations = states
        rewards = states[:, 1:, 0] - 0.1 * (actions**2).sum(axis=2)
        space = spaces.Box(-np.inf, np.inf, shape.observation, np.float32)
    last = np.arange(n_episodes * length) % length == length - 1
    even = np.arange(n_episodes * length) // length % 2 == 0
    return OfflineDataset(
        observations.reshape(-1, *shape.observation),
        actions.reshape(-1, shape.n_actions).clip(-0.999, 0.999),
        rewards.astype(np.float32).reshape(-1),
        last & even,
        last & ~even,
        observation_space=space,
        action_space=spaces.Box(-1, 1, (shape.n_actions,), np.float32),
    )


@dataclass
class Data:
    """The one data set, in the forms that the contestants keep."""

    dataset: OfflineDataset
    _made: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def columns(self) -> dict[str, np.ndarray]:
        """One row a transition."""

        def make() -> dict[str, np.ndarray]:
            episodes = list(self.dataset)
            return {
                "observations": np.concatenate([e.observations[:-1] for e in episodes]),
                "actions": self.dataset.actions,
                "rewards": self.dataset.rewards,
                "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
                "terminations": self.dataset.terminations,
                "truncations": self.dataset.truncations,
            }

        return self._once("columns", make)

    def sb3(self, device: str) -> ReplayBuffer:
        """SB3's own buffer."""

        def make() -> ReplayBuffer:
            columns = self.columns()
            buffer = ReplayBuffer(len(self.dataset), self.dataset.observation_space, self.dataset.action_space, device)
            for name in ("observations", "actions", "rewards", "next_observations"):
                getattr(buffer, name)[:, 0] = columns[name]
            buffer.dones[:, 0] = columns["terminations"] | columns["truncations"]
            buffer.timeouts[:, 0] = columns["truncations"]
            buffer.full = True
            return buffer

        return self._once("sb3", make)

    def d3rlpy(self) -> D3rlpyBuffer:
        """d3rlpy's own buffer; it has no place for the observation after a time-out."""

        def make() -> D3rlpyBuffer:
            episodes = [
                Episode(
                    np.asarray(e.observations[:-1], np.uint8 if e.observations.dtype == np.uint8 else np.float32),
                    np.asarray(e.actions, np.float32),
                    np.asarray(e.rewards, np.float32).reshape(-1, 1),
                    bool(e.terminated),
                )
                for e in self.dataset
            ]
            size = int(np.prod(self.dataset.action_space.shape))
            return D3rlpyBuffer(
                InfiniteBuffer(), episodes=episodes, action_space=d3rlpy.ActionSpace.CONTINUOUS, action_size=size
            )

        return self._once("d3rlpy", make)

    def ours_d3rlpy(self) -> Any:
        """Our buffer for d3rlpy."""
        return self._once("ours_d3rlpy", lambda: to_d3rlpy(self.dataset))


# The usual single file ---------------------------------------------------------------------------------------------------


class SingleFileBatch(NamedTuple):
    """Shapes ``(B, O)``, ``(B, A)``, ``(B, 1)``, ``(B, O)``, ``(B, 1)``."""

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor


class SingleFileProposals(NamedTuple):
    """Actions ``(B, N, A)`` with log-densities ``(B, N)``, and the target's actions ``(B, A)``."""

    random: th.Tensor
    current: th.Tensor
    current_log_prob: th.Tensor
    next: th.Tensor
    next_log_prob: th.Tensor
    target: th.Tensor


class SingleFileBuffer:
    """All transitions as tensors on the device, picked by NumPy's indices."""

    def __init__(self, columns: dict[str, np.ndarray], device: str) -> None:
        def tensor(values: np.ndarray) -> th.Tensor:
            return th.tensor(np.asarray(values, np.float32), device=device)

        self.device = device
        self.size = len(columns["rewards"])
        self.columns = SingleFileBatch(
            tensor(columns["observations"]),
            tensor(columns["actions"]),
            tensor(columns["rewards"]).unsqueeze(-1),
            tensor(columns["next_observations"]),
            tensor(columns["terminations"]).unsqueeze(-1),
        )

    def sample(self, batch_size: int) -> SingleFileBatch:
        """Draw a batch."""
        indices = np.random.randint(0, self.size, size=batch_size)  # noqa: NPY002  (what such scripts call)
        return SingleFileBatch(*(column[indices].to(self.device) for column in self.columns))


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(inputs, outputs)] if i == len(sizes) - 2 else [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class TanhGaussianPolicy(nn.Module):
    """One network with two outputs an action; to draw several actions it is given the observation several times."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.net = mlp((shape.observation[0], *shape.hidden, 2 * shape.n_actions))

    def forward(self, observations: th.Tensor, repeat: int | None = None) -> tuple[th.Tensor, th.Tensor]:
        """Draw actions ``(B, A)`` or ``(B, repeat, A)`` with their log-densities."""
        if repeat is not None:
            observations = observations.unsqueeze(1).repeat(1, repeat, 1)
        mean, log_std = th.chunk(self.net(observations), 2, dim=-1)
        normal = Normal(mean, th.exp(log_std.clamp(-20.0, 2.0)))
        distribution = TransformedDistribution(normal, TanhTransform(cache_size=1))
        actions = distribution.rsample()
        return actions, distribution.log_prob(actions).sum(dim=-1)


class SingleFileCritic(nn.Module):
    """One Q-function; several actions at a state are rows of their own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.net = mlp((shape.observation[0] + shape.n_actions, *shape.hidden, 1))

    def forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Values ``(B,)`` of actions ``(B, A)``, or ``(B, N)`` of actions ``(B, N, A)``."""
        batch_size, is_many = len(observations), actions.ndim == 3
        if is_many:
            observations = observations.unsqueeze(1).repeat(1, actions.shape[1], 1).view(-1, observations.shape[-1])
            actions = actions.reshape(-1, actions.shape[-1])
        values = self.net(th.cat([observations, actions], dim=-1)).squeeze(-1)
        return values.view(batch_size, -1) if is_many else values


class SingleFileCQL:
    """The CQL(H) update as single-file implementations write it, written anew for this benchmark.

    What they have in common, and what costs: the policy evaluates each observation N times to draw N actions; each critic is
    called once for the data's and once for each group of proposed actions, on observations repeated N times; nothing is kept
    between the steps of critic and actor, whose gradient also runs into the critics; targets and optimisers go network by
    network; and every number that is logged is read at once (``.item()``), which on a GPU waits for it each time.
    """

    def __init__(self, shape: Shape, device: str, temperature: float = 1.0) -> None:
        self.n_actions, self.temperature = shape.n_actions, temperature
        self.policy = TanhGaussianPolicy(shape).to(device)
        self.critics = [SingleFileCritic(shape).to(device) for _ in range(shape.n_critics)]
        self.targets = [SingleFileCritic(shape).to(device) for _ in range(shape.n_critics)]
        self.log_alpha = th.zeros(1, device=device, requires_grad=True)
        self.policy_optimizer = th.optim.Adam(self.policy.parameters(), ACTOR_RATE)
        self.critic_optimizers = [th.optim.Adam(critic.parameters(), CRITIC_RATE) for critic in self.critics]
        self.alpha_optimizer = th.optim.Adam([self.log_alpha], ACTOR_RATE)

    @th.no_grad()
    def load(self, source: Any) -> None:
        """Copy the weights of an SB3 model."""
        actor, critic, target = source.actor, source.critic, source.critic_target
        hidden, heads = _linears(actor.latent_pi), (actor.mu, actor.log_std)
        *copies, output = _linears(self.policy.net)
        for layer, other in zip(copies, hidden, strict=True):
            layer.load_state_dict(other.state_dict())
        output.weight.copy_(th.cat([head.weight for head in heads]))
        output.bias.copy_(th.cat([head.bias for head in heads]))
        for theirs, ours in ((self.critics, critic), (self.targets, target)):
            for one, other in zip(theirs, ours.q_networks, strict=True):
                one.net.load_state_dict(other.state_dict())
        if source.log_ent_coef is not None:
            self.log_alpha.copy_(source.log_ent_coef)

    def critic_loss(
        self, batch: SingleFileBatch, proposals: SingleFileProposals | None = None
    ) -> tuple[th.Tensor, dict[str, float]]:
        """``sum_j mean (Q_j - y)^2 + w mean gap_j``, which is twice ours.

        Args:
            batch: The batch.
            proposals: Actions to use in place of drawn ones.

        Returns:
            The loss, and what is logged.
        """
        observations, next_observations = batch.observations, batch.next_observations
        batch_size = len(observations)
        if proposals is None:
            random = observations.new_empty((batch_size, N_ACTIONS, self.n_actions)).uniform_(-1.0, 1.0)
            current, current_log_prob = self.policy(observations, repeat=N_ACTIONS)
            following, following_log_prob = self.policy(next_observations, repeat=N_ACTIONS)
            current, current_log_prob = current.detach(), current_log_prob.detach()
            following, following_log_prob = following.detach(), following_log_prob.detach()
            with th.no_grad():
                target_actions, _ = self.policy(next_observations)
        else:
            random, current, current_log_prob, following, following_log_prob, target_actions = proposals

        with th.no_grad():
            target_values = th.stack([target(next_observations, target_actions) for target in self.targets])
            target_value = target_values.min(dim=0).values.unsqueeze(-1)
            y = (batch.rewards + (1.0 - batch.dones) * GAMMA * target_value).squeeze(-1)

        random_density = math.log(0.5**self.n_actions)
        loss = th.zeros((), device=observations.device)
        logs = {"average_target_q": target_value.mean().item()}
        for j, critic in enumerate(self.critics, start=1):
            predicted = critic(observations, batch.actions)
            bellman = F.mse_loss(predicted, y)
            q_random, q_current, q_next = (
                critic(observations, random),
                critic(observations, current),
                critic(observations, following),
            )
            everything = th.cat([q_random, predicted.unsqueeze(1), q_next, q_current], dim=1)
            spread = th.std(everything, dim=1)
            weighted = th.cat(
                [q_random - random_density, q_next - following_log_prob, q_current - current_log_prob],
                dim=1,
            )
            soft_maximum = th.logsumexp(weighted / self.temperature, dim=1) * self.temperature
            gap = th.clamp(soft_maximum - predicted, -np.inf, np.inf).mean()
            loss = loss + bellman + WEIGHT * gap
            logs |= {
                f"qf{j}_loss": bellman.item(),
                f"average_qf{j}": predicted.mean().item(),
                f"cql_std_q{j}": spread.mean().item(),
                f"cql_q{j}_rand": q_random.mean().item(),
                f"cql_min_qf{j}_loss": (WEIGHT * gap).item(),
                f"cql_qf{j}_diff": gap.item(),
            }
        return loss, logs

    def update(self, batch: SingleFileBatch) -> dict[str, float]:
        """Do one update: entropy coefficient, policy, critics, targets."""
        actions, log_prob = self.policy(batch.observations)
        alpha_loss = -(self.log_alpha * (log_prob - self.n_actions).detach()).mean()
        alpha = self.log_alpha.exp().detach()
        values = th.stack([critic(batch.observations, actions) for critic in self.critics]).min(dim=0).values
        policy_loss = (alpha * log_prob - values).mean()
        critic_loss, logs = self.critic_loss(batch)

        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        self.policy_optimizer.step()
        for optimizer in self.critic_optimizers:
            optimizer.zero_grad()
        critic_loss.backward(retain_graph=True)
        for optimizer in self.critic_optimizers:
            optimizer.step()
        self.update_targets()
        return logs | {
            "log_pi": log_prob.mean().item(),
            "policy_loss": policy_loss.item(),
            "alpha_loss": alpha_loss.item(),
            "alpha": alpha.item(),
            "critic_loss": critic_loss.item(),
        }

    def update_targets(self) -> None:
        """Move the targets by tau, one parameter after the other."""
        for critic, target in zip(self.critics, self.targets, strict=True):
            for parameter, average in zip(critic.parameters(), target.parameters(), strict=True):
                average.data.copy_((1 - TAU) * average.data + TAU * parameter.data)


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


# Contestants ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Who takes part."""

    name: str
    kind: str
    """``single``, ``d3rlpy``, ``ours-d3rlpy``, ``ours-sb3`` or ``sac``."""
    calibrated: bool = False
    precision: str = "f32"
    captured: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contestant:
    """Somebody ready to do updates."""

    spec: Spec
    step: Callable[[], Any]
    model: Any
    hooks: list[tuple[Any, str, str]]
    """Object, method, and the part that the method's time belongs to."""
    operations: float
    block: int = 1
    peak_mib: float | None = None


def specs(device: str) -> list[Spec]:
    """All that may take part on a device."""
    found = [
        Spec("single file CQL", "single"),
        Spec("d3rlpy CQL", "d3rlpy"),
        Spec("d3rlpy Cal-QL", "d3rlpy", calibrated=True),
    ]
    on_cuda = device == "cuda"
    if on_cuda:
        found += [
            Spec("d3rlpy CQL, compile_graph", "d3rlpy", captured=True),
            Spec("d3rlpy Cal-QL, compile_graph", "d3rlpy", calibrated=True, captured=True),
        ]
    for kind, host, word in (("ours-d3rlpy", "d3rlpy", "compile_graph"), ("ours-sb3", "SB3", "compile")):
        for captured in (False, True) if on_cuda else (False,):
            suffix = f", {word}" if captured else ""
            for precision in ("f32", "bf16"):
                found += [
                    Spec(f"ours {host} CQL {precision}{suffix}", kind, False, precision, captured),
                    Spec(f"ours {host} Cal-QL {precision}{suffix}", kind, True, precision, captured),
                ]
    found.append(Spec("ours SB3 Cal-QL f32, max backup", "ours-sb3", True, options={"max_q_backup": True}))
    if not on_cuda:
        drawn = {"cql_n_backward": 3 * N_ACTIONS + 1}
        found += [Spec(f"ours SB3 CQL {p}, drawn", "ours-sb3", False, p, options=drawn) for p in ("f32", "bf16")]
    found.append(Spec("SB3 SAC", "sac"))
    return found


PAIRS = (
    ("ours SB3 Cal-QL {}", "ours SB3 CQL {}"),
    ("ours d3rlpy Cal-QL {}", "ours d3rlpy CQL {}"),
    ("ours SB3 CQL {}", "SB3 SAC"),
    ("ours SB3 CQL {}, compile", "ours SB3 CQL {}"),
    ("ours d3rlpy CQL {}, compile_graph", "d3rlpy CQL, compile_graph"),
    ("ours SB3 CQL {}, compile", "d3rlpy CQL, compile_graph"),
    ("ours SB3 CQL bf16", "ours SB3 CQL f32"),
    ("ours SB3 CQL {}, drawn", "ours SB3 CQL {}"),
    ("ours d3rlpy CQL bf16", "ours d3rlpy CQL f32"),
    ("ours SB3 Cal-QL f32, max backup", "ours SB3 Cal-QL f32"),
    ("d3rlpy Cal-QL", "d3rlpy CQL"),
    ("d3rlpy CQL", "single file CQL"),
)


class LeftOutError(Exception):
    """Why somebody does not take part."""


def _require(spec: Spec, known: set[str], wanted: dict[str, Any]) -> dict[str, Any]:
    """Options to pass; those that are the default need not exist."""
    defaults = {"precision": "f32", "compile": False, "compile_graph": False, "data_device": None}
    missing = [name for name, value in wanted.items() if name not in known and value != defaults.get(name, value)]
    if missing:
        raise LeftOutError(f"there is no option {' or '.join(missing)}")
    return {name: value for name, value in wanted.items() if name in known}


def build(spec: Spec, shape: Shape, data: Data, source: Any, device: str) -> Contestant:
    """Make a contestant with the source's weights.

    Raises:
        LeftOutError: If it cannot take part.
    """
    if spec.precision == "bf16" and device == "cpu" and not ensembles.multiplies_bf16():
        raise LeftOutError("this processor has no bfloat16 products")
    make = {"single": _single, "d3rlpy": _d3rlpy, "ours-d3rlpy": _d3rlpy, "ours-sb3": _ours_sb3, "sac": _sac}[spec.kind]
    return make(spec, shape, data, source, device)


def _operations(spec: Spec, shape: Shape, max_backup: bool = False) -> float:
    per_state = 1 if spec.kind == "sac" else 3 * N_ACTIONS + 1
    return sum(count_operations(shape, per_state, N_ACTIONS if max_backup else 1).values())


def _single(spec: Spec, shape: Shape, data: Data, source: Any, device: str) -> Contestant:
    if shape.is_image:
        raise LeftOutError("single files have no networks for images")
    buffer, algo = SingleFileBuffer(data.columns(), device), SingleFileCQL(shape, device)
    algo.load(source)
    hooks = [(buffer, "sample", "sampling"), (algo, "update_targets", "optimiser")]
    return Contestant(spec, lambda: algo.update(buffer.sample(shape.batch)), algo, hooks, _operations(spec, shape))


def _d3rlpy(spec: Spec, shape: Shape, data: Data, source: Any, device: str) -> Contestant:
    ours = spec.kind == "ours-d3rlpy"
    module: Any = ours_d3rlpy if ours else d3rlpy.algos
    config_class = module.CalQLConfig if spec.calibrated else module.CQLConfig
    known = {f.name for f in dataclasses.fields(config_class)}
    wanted = {"compile_graph": spec.captured, **({"precision": spec.precision} if ours else {})}
    if shape.is_image:
        factory: Any = d3rlpy.models.PixelEncoderFactory(feature_size=FEATURES)
        scaler = d3rlpy.preprocessing.PixelObservationScaler()
    else:
        factory, scaler = d3rlpy.models.VectorEncoderFactory(list(shape.hidden)), None
    algo = config_class(
        batch_size=shape.batch,
        gamma=GAMMA,
        tau=TAU,
        n_critics=shape.n_critics,
        n_action_samples=N_ACTIONS,
        conservative_weight=WEIGHT,
        actor_learning_rate=ACTOR_RATE,
        temp_learning_rate=ACTOR_RATE,
        critic_learning_rate=CRITIC_RATE,
        max_q_backup=False,
        actor_encoder_factory=factory,
        critic_encoder_factory=factory,
        observation_scaler=scaler,
        **_require(spec, known, wanted),
    ).create(device="cuda:0" if device == "cuda" else "cpu:0")
    algo.create_impl(shape.observation, shape.n_actions)
    if not shape.is_image:
        weights = to_d3rlpy_model(source).impl.modules.get_torch_modules()
        for name, module_ in algo.impl.modules.get_torch_modules().items():
            if name != "log_alpha":  # Each starts its Lagrange multiplier where it does by itself.
                module_.load_state_dict(weights[name].state_dict())
    buffer = data.ours_d3rlpy() if ours else data.d3rlpy()
    hooks = [
        (buffer, "sample_transition_batch", "sampling"),
        (TorchMiniBatch, "from_batch", "to tensors"),
        (algo.impl, "update_critic_target", "optimiser"),
    ]
    return Contestant(
        spec,
        lambda: algo.update(buffer.sample_transition_batch(shape.batch)),
        algo,
        hooks,
        _operations(spec, shape),
    )


def make_source(shape: Shape, dataset: OfflineDataset, device: str, cls: Any = CQL, **options: Any) -> Any:
    """One of our SB3 models on the data."""
    return cls.from_dataset(
        dataset,
        "CnnPolicy" if shape.is_image else "MlpPolicy",
        seed=0,
        device=device,
        batch_size=shape.batch,
        learning_rate=CRITIC_RATE,
        actor_learning_rate=ACTOR_RATE,
        gamma=GAMMA,
        tau=TAU,
        cql_alpha=WEIGHT,
        cql_n_actions=N_ACTIONS,
        policy_kwargs={"net_arch": list(shape.hidden), "n_critics": shape.n_critics},
        **options,
    )


def _load_sb3(model: Any, source: Any) -> None:
    model.policy.load_state_dict(source.policy.state_dict())
    if model.log_ent_coef is not None and source.log_ent_coef is not None:
        with th.no_grad():
            model.log_ent_coef.copy_(source.log_ent_coef)


def _ours_sb3(spec: Spec, shape: Shape, data: Data, source: Any, device: str) -> Contestant:
    cls: Any = CalQL if spec.calibrated else CQL
    known = set(inspect.signature(cls).parameters)
    wanted = {"precision": spec.precision, "compile": spec.captured, "data_device": "cuda" if spec.captured else None}
    max_backup = bool(spec.options.get("max_q_backup", False))
    model = make_source(
        shape, data.dataset, device, cls, **_require(spec, known, wanted), **({"max_q_backup": False} | spec.options)
    )
    _load_sb3(model, source)
    hooks = [
        (model, "sample_batch", "sampling"),
        (model.offline_buffer, "to_torch", "to tensors"),
        (model, "_update_targets", "optimiser"),
    ]
    return Contestant(spec, lambda: model.train(1, shape.batch), model, hooks, _operations(spec, shape, max_backup))


def _sac(spec: Spec, shape: Shape, data: Data, source: Any, device: str) -> Contestant:
    env: Any = gym.Env()
    env.observation_space, env.action_space = data.dataset.observation_space, data.dataset.action_space
    model = SAC(
        "CnnPolicy" if shape.is_image else "MlpPolicy",
        env,
        seed=0,
        device=device,
        buffer_size=1,
        batch_size=shape.batch,
        policy_kwargs={"net_arch": list(shape.hidden), "n_critics": shape.n_critics},
    )
    _load_sb3(model, source)
    model.replay_buffer = data.sb3(device)
    model.set_logger(Logger(folder=None, output_formats=[]))
    hooks = [(model.replay_buffer, "sample", "sampling"), (model.replay_buffer, "to_torch", "to tensors")]
    return Contestant(spec, lambda: model.train(1, shape.batch), model, hooks, _operations(spec, shape))


def rows_kept(contestant: Contestant, updates: int = 3) -> float | None:
    """The share of rows that went back through the critics in a few more updates of ours; ``None`` for the others."""
    find, shares = ensembles._rows_that_matter, []

    def watching(gradient: th.Tensor, *rest: Any) -> th.Tensor | None:
        rows = find(gradient, *rest)
        shares.append(1.0 if rows is None else len(rows) / gradient.shape[-2])
        return rows

    ensembles._rows_that_matter = watching
    try:
        for _ in range(updates):
            contestant.step()
    finally:
        ensembles._rows_that_matter = find
    return float(np.mean(shares)) if shares else None


# Operations ------------------------------------------------------------------------------------------------------------


def count_operations(shape: Shape, per_state: int = 3 * N_ACTIONS + 1, target_actions: int = 1) -> dict[str, float]:
    """Count the operations of the matrix products of one plain update, two for a multiplication and its addition.

    A layer from ``I`` to ``O`` on ``R`` rows is ``2 R I O`` forward, the same again for the gradient of its weights, and again
    for that of its inputs where somebody needs it (not in a first layer). What is not a product of matrices is left out.

    ============ ==================================================================================================
    critic       all critics on ``B per_state`` rows: forward, gradients of weights and inputs
    actor        forward at the states, both gradients; all critics on its ``B`` actions: forward, gradient of the inputs
    target       actor at the next states, all target critics on ``B target_actions`` rows: forward
    features     images: the convolutions of the critic (forward, both gradients, and forward again in the actor's step), of
                 the target (forward) and of the actor (forward, both gradients, and forward at the next states)
    ============ ==================================================================================================

    Args:
        shape: Sizes.
        per_state: Actions at each state in the critic's loss: ``3N + 1``, and 1 in SAC.
        target_actions: Actions at each next state: 1, and ``N`` with the maximum backup.

    Returns:
        Operations by part.
    """
    inputs = FEATURES if shape.is_image else shape.observation[0]
    critic = _layers((inputs + shape.n_actions, *shape.hidden, 1))
    actor = _layers((inputs, *shape.hidden, 2 * shape.n_actions))
    rows = 2.0 * shape.batch
    width = shape.hidden[0]
    # Whether the gradient goes on into features.
    into_features = inputs * width if shape.is_image else 0
    counts = {
        "critic": shape.n_critics * rows * per_state * (2 * sum(critic) + sum(critic[1:]) + into_features),
        "actor": rows * (2 * sum(actor) + sum(actor[1:]) + into_features)
        + shape.n_critics * rows * (sum(critic) + sum(critic[1:]) + shape.n_actions * width),
        "target": rows * sum(actor) + shape.n_critics * rows * target_actions * sum(critic),
    }
    if shape.is_image:
        side, channels, convolutions = shape.observation[1], shape.observation[0], []
        for filters, kernel, stride in NATURE_CNN:
            side = (side - kernel) // stride + 1
            convolutions.append(side * side * filters * channels * kernel * kernel)
            channels = filters
        convolutions.append(side * side * channels * FEATURES)
        forward, backward = sum(convolutions), sum(convolutions) + sum(convolutions[1:])
        counts["features"] = rows * (5 * forward + 2 * backward)
    return counts


def _layers(sizes: tuple[int, ...]) -> list[int]:
    return [inputs * outputs for inputs, outputs in itertools.pairwise(sizes)]


class Products:
    """The machine's rate of matrix products, measured beside the contestants."""

    def __init__(self, shape: Shape, device: str, seconds: float) -> None:
        rows, width = shape.batch * (3 * N_ACTIONS + 1), shape.hidden[0]
        self.operations = 2.0 * rows * width * width
        self.device, self.seconds = device, seconds
        x, w = th.randn(rows, width, device=device), th.randn(width, width, device=device)
        bias, y = th.zeros(width), th.empty_like(x)
        x16, w16 = x.bfloat16(), w.bfloat16()
        y16 = th.empty_like(x16)
        self.kinds: dict[str, Callable[[], Any]] = {
            "f32": lambda: th.mm(x, w, out=y),
            "bf16": lambda: th.mm(x16, w16, out=y16),
        }
        if device == "cpu":
            linear = getattr(th.ops.mkldnn, "_linear_pointwise", None)
            try:
                if linear is not None:
                    linear(x, w, bias, "none", [], "")
                    self.kinds["f32 oneDNN"] = lambda: linear(x, w, bias, "none", [], "")
            except (RuntimeError, NotImplementedError) as error:
                print(f"oneDNN's f32 product is not measured: {_first_line(error)}")
        self.repeats = {}
        for name, product in self.kinds.items():
            product(), product()
            self.repeats[name] = max(3, math.ceil(seconds / max(timed(product, 3, device), 1e-7)))

    def rates(self) -> dict[str, float]:
        """GFLOP/s of each kind, at this moment."""
        with th.no_grad():
            return {
                name: self.operations / timed(product, self.repeats[name], self.device) / 1e9
                for name, product in self.kinds.items()
            }


# Time ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        th.cuda.synchronize()


def timed(function: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def prepare(contestant: Contestant, device: str, block: int | None, seconds: float) -> None:
    """Warm up (and capture), and choose how many updates make a block."""
    if device == "cuda":
        th.cuda.reset_peak_memory_stats()
        held = th.cuda.memory_allocated()
    for _ in range(20 if device == "cuda" else 2):
        contestant.step()
    synchronize(device)
    if device == "cuda":
        contestant.peak_mib = (th.cuda.max_memory_allocated() - held) / MIB
    once = timed(contestant.step, 5 if device == "cuda" else 1, device)
    floor = 50 if device == "cuda" else 1
    contestant.block = block or max(floor, math.ceil(seconds / once))


def run_rounds(
    contestants: list[Contestant], products: Products, rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time everybody in turn; milliseconds an update, and rates of products, by round."""
    times: dict[str, list[float]] = {c.spec.name: [] for c in contestants}
    rates: dict[str, list[float]] = defaultdict(list)
    gc.collect()
    for i in range(rounds):
        start = i % len(contestants)
        for contestant in contestants[start:] + contestants[:start]:
            times[contestant.spec.name].append(timed(contestant.step, contestant.block, device) * 1e3)
        for name, rate in products.rates().items():
            rates[name].append(rate)
        print(f"  round {i + 1} of {rounds}", end="\r", flush=True)
    print(" " * 30, end="\r")
    return times, dict(rates)


class PartClock:
    """Time by part; what is entered inside another part does not count to that one."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self._stack = ["forward and rest"]
        self._last = 0.0

    def _switch(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def start(self) -> None:
        """Begin."""
        synchronize(self.device)
        self._last = time.perf_counter()

    def stop(self) -> None:
        """End."""
        self._switch()

    def enter(self, part: str) -> None:
        """A part begins."""
        self._switch()
        self._stack.append(part)

    def leave(self) -> None:
        """It ends."""
        self._switch()
        self._stack.pop()

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """A function whose time counts to a part."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return clocked


@contextlib.contextmanager
def clocked_calls(clock: PartClock, hooks: list[tuple[Any, str, str]], captured: bool) -> Iterator[None]:
    """Put the clock around the calls of the parts; everything is put back at the end."""
    every = [hook for hook in hooks if hasattr(hook[0], hook[1])]
    if captured:
        # What is called anew must not wait for the device while it is captured again: the host's parts alone.
        every = [hook for hook in every if hook[2] in ("sampling", "to tensors")]
    else:
        every += [
            (th.Tensor, "backward", "backward"),
            (th.autograd, "grad", "backward"),
            (th.optim.Optimizer, "zero_grad", "optimiser"),
        ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in every:
            own = vars(owner).get(name)
            setattr(owner, name, clock.wrap(getattr(owner, name), part))
            stack.callback(delattr, owner, name) if own is None else stack.callback(setattr, owner, name, own)
        if not captured:
            before = register_optimizer_step_pre_hook(lambda *_: clock.enter("optimiser"))
            stack.callback(before.remove)
            after = register_optimizer_step_post_hook(lambda *_: clock.leave())
            stack.callback(after.remove)
        yield


PARTS = ("sampling", "to tensors", "forward and rest", "backward", "optimiser")


def measure_parts(contestant: Contestant, device: str, updates: int) -> dict[str, float]:
    """Share of time in each part."""
    clock = PartClock(device)
    with clocked_calls(clock, contestant.hooks, contestant.spec.captured):
        clock.start()
        for _ in range(updates):
            contestant.step()
        clock.stop()
    total = sum(clock.seconds.values())
    return {part: clock.seconds[part] / total for part in PARTS}


OPERATORS = {
    "products": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "linear",
        "convolution",
        "conv2d",
        "gemm",
        "cutlass",
        "xmma",
        "cublas",
        "nvjet",
    ),
    "activations": ("relu", "clamp_min", "threshold", "tanh", "softplus"),
    "copies": (
        "copy",
        "cat",
        "index",
        "gather",
        "scatter",
        "select",
        "expand",
        "repeat",
        "clone",
        "fill",
        "zero",
        "memcpy",
        "memset",
    ),
    "sums": ("sum", "mean", "reduce", "logsumexp", "norm"),
    "Adam and targets": ("adam", "foreach", "multi_tensor", "lerp", "addcmul", "addcdiv"),
}
OTHERS = (*OPERATORS, "other operators", "no operator")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what libraries write to the file descriptor itself off the screen, as torch's profiler does."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _operator_class(name: str) -> str:
    name = name.lower().replace("aten::", "")
    return next((kind for kind, words in OPERATORS.items() if any(word in name for word in words)), "other operators")


def measure_operators(contestant: Contestant, device: str, updates: int) -> dict[str, float]:
    """Share of the wall clock in each class of operators under torch's profiler, of kernels on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with quiet_stderr(), profile(activities=activities) as profiler:
        wall = timed(contestant.step, updates, device) * updates * 1e6
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if device == "cuda":
            if on_device:
                seconds[_operator_class(event.key)] += getattr(event, "self_device_time_total", 0.0)
        elif event.key.startswith(("aten::", "mkldnn::")):
            seconds[_operator_class(event.key)] += event.self_cpu_time_total
    shares = {kind: seconds[kind] / wall for kind in OTHERS[:-1]}
    return shares | {"no operator": max(0.0, 1.0 - sum(shares.values()))}


# Memory --------------------------------------------------------------------------------------------------------------------


def _resident(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name + ":"))


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def child_memory(contestant: Contestant) -> dict[str, Any]:
    """Highest resident memory of updates above what was resident before."""
    for _ in range(3):
        contestant.step()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return {"peak_mib": None}
    before = _resident("VmRSS")
    for _ in range(5):
        contestant.step()
    return {"peak_mib": _resident("VmHWM") - before}


def child_growth(contestant: Contestant, updates: int, device: str) -> dict[str, Any]:
    """Memory after each tenth of the updates, in MiB, and the process's own time for an update in it."""
    points = []
    began = time.process_time()
    for i in range(1, updates + 1):
        contestant.step()
        if i % max(updates // 10, 1) == 0:
            spent = (time.process_time() - began) * 1e3 / max(updates // 10, 1)
            _trim()
            allocated = th.cuda.memory_allocated() / MIB if device == "cuda" else None
            memory = {"resident_mib": round(_resident("VmRSS"), 2), "cuda_mib": allocated}
            points.append({"updates": i, "cpu_ms": round(spent, 3), **memory})
            began = time.process_time()
    return {"growth": points}


def in_child(arguments: argparse.Namespace, task: str, shape_name: str, name: str, checkpoint: Path) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    command = [sys.executable, __file__, "--child", task, "--contestant", name, "--shapes", shape_name]
    for option in ("device", "threads", "size", "growth", "state"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--checkpoint", str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"{name}: no {task} ({_first_line(result.stderr.strip().splitlines()[-1] if result.stderr else '')})")
        return {}
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


# Reports -------------------------------------------------------------------------------------------------------------------


def quartiles(values: Any) -> list[float]:
    """First quartile, median, third."""
    return [float(q) for q in np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])]


def shown(values: list[float] | None, digits: int = 2, factor: float = 1.0) -> str:
    """``median [quartiles]``."""
    if values is None:
        return "-"
    low, median, high = (factor * value for value in values)
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|-" + "-" * widths[0] + "-|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _first_line(error: object) -> str:
    """What went wrong, without anybody's folders."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return kind + " ".join("<path>" if word.count("/") > 1 else word for word in text.split())[:200]


def summarize(
    contestants: list[Contestant], times: dict[str, list[float]], rates: dict[str, list[float]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is reported of each contestant, and the ratios of the named pairs."""
    arrays = {name: np.array(values) for name, values in times.items()}
    f32 = np.max([rates[name] for name in ("f32", "f32 oneDNN") if name in rates], axis=0)
    limits = {"f32": f32, "bf16": np.array(rates["bf16"])}
    rows = []
    for contestant in contestants:
        name, milliseconds = contestant.spec.name, arrays[contestant.spec.name]
        gflops = contestant.operations / milliseconds / 1e6
        row: dict[str, Any] = {
            "name": name,
            "precision": contestant.spec.precision,
            "block": contestant.block,
            "gflop": contestant.operations / 1e9,
            "ms": quartiles(milliseconds),
            "gflops": quartiles(gflops),
            "share_of_limit": quartiles(gflops / limits[contestant.spec.precision]),
            "peak_mib": contestant.peak_mib,
            "rounds_ms": [round(float(value), 4) for value in milliseconds],
        }
        for reference in REFERENCES:
            key = "times_" + reference.lower().replace(" ", "_")
            row[key] = quartiles(arrays[reference] / milliseconds) if reference in arrays else None
        rows.append(row)
    pairs = []
    for first, second in dict.fromkeys((a.format(p), b.format(p)) for a, b in PAIRS for p in ("f32", "bf16")):
        if first in arrays and second in arrays:
            pairs.append({"pair": f"{first} / {second}", "time": quartiles(arrays[first] / arrays[second])})
    return rows, pairs


def report(name: str, shape: Shape, result: dict[str, Any]) -> str:
    """The tables of one shape."""
    size = " x ".join(map(str, shape.observation))
    nets = f"{len(shape.hidden)} x {shape.hidden[0]}"
    lines = [
        f"### {name}: observations {size}, {shape.n_actions} action dimensions, nets {nets}, {shape.n_critics} critics, "
        f"batch {shape.batch}, N = {N_ACTIONS}",
        "",
        f"{result['rounds']} rounds, medians [quartiles]. State: {result['state']}. Products of this shape, GFLOP/s: "
        + ", ".join(f"{kind} {shown(rate, 0)}" for kind, rate in result["products"].items())
        + ".",
        "",
    ]
    rows = []
    for row in result["contestants"]:
        rows.append(
            [
                row["name"],
                shown(row["ms"]),
                shown(row["times_d3rlpy_cql"]),
                shown(row["times_single_file_cql"]),
                f"{row['gflops'][1]:.0f}",
                f"{100 * row['share_of_limit'][1]:.0f} %",
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                "-" if row.get("rows_kept") is None else f"{100 * row['rows_kept']:.0f} %",
            ]
        )
    header = ["", "ms an update", "times d3rlpy CQL's speed", "times the single file's"]
    header += ["GFLOP/s", "of the limit", "peak, MiB", "rows kept"]
    has_kept = any(row.get("rows_kept") is not None for row in result["contestants"])
    if not has_kept:
        header, rows = header[:-1], [row[:-1] for row in rows]
    lines += [table(header, rows), ""]
    if result["pairs"]:
        lines += [table(["time of / time of", "ratio"], [[p["pair"], shown(p["time"], 3)] for p in result["pairs"]]), ""]
    for key, names, title in (("parts", PARTS, "share of time, %"), ("operators", OTHERS, "share of time by operator, %")):
        measured = [row for row in result["contestants"] if row.get(key)]
        if measured:
            body = [[row["name"], *(f"{100 * row[key][n]:.1f}" for n in names)] for row in measured]
            lines += [table([title, *names], body), ""]
    grown = [row for row in result["contestants"] if row.get("growth")]
    if grown:
        body = []
        for row in grown:
            first, last = row["growth"][0], row["growth"][-1]
            body.append(
                [
                    row["name"],
                    f"{first['updates']:,} to {last['updates']:,}",
                    f"{first['resident_mib']:.1f}",
                    f"{last['resident_mib']:.1f}",
                    " ".join(f"{point['cpu_ms']:.2f}" for point in row["growth"]),
                    "-" if last["cuda_mib"] is None else f"{last['cuda_mib'] - first['cuda_mib']:+.2f}",
                ]
            )
        columns = [
            "memory over updates",
            "updates",
            "resident before, MiB",
            "after",
            "the process's own ms an update, by tenths",
            "on CUDA, change",
        ]
        lines += [table(columns, body), ""]
    if result["left_out"]:
        lines += [f"Left out: {'; '.join(f'{n} ({why})' for n, why in result['left_out'].items())}.", ""]
    return "\n".join(lines)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures depend on; nothing that tells whose machine it is."""
    model, flags = platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas = [part.strip() for part in th.__config__.show().replace("\n", ",").split(",") if "BLAS_INFO=" in part]
    found: dict[str, Any] = {
        "cpu": model,
        "cores": cores,
        "threads": threads,
        "flags": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile"}),
        "blas": blas[0].partition("=")[2] if blas else "unknown",
    }
    if device == "cuda":
        properties = th.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": th.version.cuda}
        found["tf32"] = th.backends.cuda.matmul.allow_tf32
    return found


def versions() -> dict[str, str]:
    """Versions of what was compared."""
    found = {"python": platform.python_version()}
    for package in ("torch", "stable-baselines3", "d3rlpy", "numpy", "gymnasium"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """The commit that ran, marked where the work tree differs."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def render(results: dict[str, Any]) -> str:
    """Everything as one Markdown page."""
    about, cpu = results["versions"], results["machine"]
    hardware = f"{cpu['cpu']}, {cpu['cores']} cores, {cpu['threads']} threads ({', '.join(cpu['flags'])}; BLAS: {cpu['blas']})"
    if "gpu" in cpu:
        hardware = f"{cpu['gpu']}, CUDA {cpu['cuda']}; " + hardware
    head = f"## Speed of one update, {results['device']}\n\n{results['date']}, {hardware}; "
    head += ", ".join(f"{name} {number}" for name, number in about.items()) + f"; commit {results['commit']}.\n\n"
    head += f"`python benchmarks/speed.py {results['command']}`\n\n"
    return head + "\n".join(shape["report"] for shape in results["shapes"].values())


# The run -------------------------------------------------------------------------------------------------------------------


def load_data(arguments: argparse.Namespace, name: str, shape: Shape) -> tuple[OfflineDataset, str]:
    """The data, and what it is."""
    if arguments.state == "trained" and os.environ.get("CQL_PLUGINS_DATA") and shape.observation == (17,):
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from train import TASKS

        return TASKS["halfcheetah-replay"].load(), "halfcheetah replay"
    return make_dataset(shape, arguments.size), "random bytes" if shape.is_image else "a noisy linear system"


def load_source(arguments: argparse.Namespace, name: str, shape: Shape, dataset: OfflineDataset) -> tuple[Any, str]:
    """The model whose weights everybody gets, and how it came about."""
    if arguments.checkpoint is None:
        source = make_source(shape, dataset, arguments.device)
        if arguments.state == "fresh":
            return source, "fresh networks"
        source.learn_offline(dataset, arguments.train_steps, log_interval=0)
        return source, f"ours after {arguments.train_steps:,} updates"
    source = CQL.load(arguments.checkpoint, device=arguments.device)
    fitting = make_source(shape, dataset, arguments.device)
    theirs, wanted = ({k: tuple(v.shape) for k, v in m.policy.state_dict().items()} for m in (source, fitting))
    if theirs != wanted:
        sizes = [layer.out_features for layer in _linears(source.actor.latent_pi)]
        raise SystemExit(
            f"The checkpoint's networks ({sizes}) are not those of the shape {name!r}: choose another with --shapes."
        )
    # Without the checkpoint's clock and schedules: the weights alone.
    _load_sb3(fitting, source)
    return fitting, "a checkpoint of ours"


def build_all(arguments: argparse.Namespace, shape: Shape, data: Data, source: Any) -> tuple[list[Contestant], dict[str, str]]:
    """Everybody who can take part, warmed up; and why the others cannot."""
    contestants: list[Contestant] = []
    left_out: dict[str, str] = {}
    for spec in specs(arguments.device):
        if arguments.only and not any(word in spec.name for word in arguments.only):
            continue
        try:
            contestant = build(spec, shape, data, source, arguments.device)
            prepare(contestant, arguments.device, arguments.block, arguments.block_seconds)
        except LeftOutError as reason:
            left_out[spec.name] = str(reason)
        except Exception as error:
            if arguments.strict:
                raise
            left_out[spec.name] = _first_line(error)
        else:
            contestants.append(contestant)
            print(f"  {spec.name}: blocks of {contestant.block}", flush=True)
            continue
        print(f"  {spec.name}: left out, {left_out[spec.name]}", flush=True)
    return contestants, left_out


def run_shape(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Everything for one shape."""
    shape, device = SHAPES[name], arguments.device
    dataset, kind = load_data(arguments, name, shape)
    source, origin = load_source(arguments, name, shape, dataset)
    state = f"{origin}, data: {kind}"
    print(f"\n{name}: {state}", flush=True)
    data = Data(dataset)
    contestants, left_out = build_all(arguments, shape, data, source)
    if not contestants:
        raise SystemExit("Nobody takes part.")
    products = Products(shape, device, arguments.block_seconds / 4)
    times, rates = run_rounds(contestants, products, arguments.rounds, device)
    rows, pairs = summarize(contestants, times, rates)
    for row, contestant in zip(rows, contestants, strict=True):
        kept = rows_kept(contestant)
        if kept is not None:
            row["rows_kept"] = kept
        updates = contestant.block if device == "cuda" else max(1, min(contestant.block, 20))
        for key, measure in (("parts", measure_parts), ("operators", measure_operators)):
            if key in arguments.without:
                continue
            try:
                row[key] = {part: round(share, 5) for part, share in measure(contestant, device, updates).items()}
            except Exception as error:
                if arguments.strict:
                    raise
                print(f"  {contestant.spec.name}: no {key}, {_first_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "source.zip"
        source.save(checkpoint)
        for row, contestant in zip(rows, contestants, strict=True):
            if device == "cpu" and "memory" not in arguments.without:
                row |= in_child(arguments, "memory", name, row["name"], checkpoint)
            if arguments.growth and contestant.spec.kind.startswith("ours"):
                row |= in_child(arguments, "growth", name, row["name"], checkpoint)
    result = {
        "shape": dataclasses.asdict(shape),
        "state": state,
        "rounds": arguments.rounds,
        "operations": count_operations(shape),
        "products": {kind: quartiles(rate) for kind, rate in rates.items()},
        "contestants": rows,
        "pairs": pairs,
        "left_out": left_out,
    }
    result["report"] = report(name, shape, result)
    return result


def run_child(arguments: argparse.Namespace) -> None:
    """Measure one contestant's memory, and print it."""
    (name,) = arguments.shapes
    shape = SHAPES[name]
    with contextlib.redirect_stdout(sys.stderr):
        dataset, _ = load_data(arguments, name, shape)
        source, _ = load_source(arguments, name, shape, dataset)
        spec = next(spec for spec in specs(arguments.device) if spec.name == arguments.contestant)
        contestant = build(spec, shape, Data(dataset), source, arguments.device)
        if arguments.child == "memory":
            result = child_memory(contestant)
        else:
            result = child_growth(contestant, arguments.growth, arguments.device)
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "all"], default=["halfcheetah"])
    parser.add_argument("--only", nargs="+", help="contestants whose name has one of these words in it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, help="updates in a block; chosen by --block-seconds where not given")
    parser.add_argument(
        "--block-seconds", type=float, default=0.5, help="how long a block should take (on CUDA at least 50 updates)"
    )
    parser.add_argument("--size", type=int, default=100_000, help="transitions of made data; 2,000 images at most")
    parser.add_argument("--state", choices=("fresh", "trained"), default="fresh")
    parser.add_argument("--train-steps", type=int, default=2000, help="for --state trained without a checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="weights for --state trained: a CQL of ours for SB3")
    parser.add_argument("--growth", type=int, default=0, help="updates over which to watch the memory of ours")
    parser.add_argument("--without", nargs="+", choices=("parts", "operators", "memory"), default=[])
    parser.add_argument("--strict", action="store_true", help="fail where somebody fails, instead of leaving it out")
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds of single updates, little data; writes nothing by itself"
    )
    parser.add_argument("--name", default="", help="goes into the names of the files")
    parser.add_argument("--results", type=Path, help="folder to write to; benchmarks/results/speed by default")
    parser.add_argument("--child", choices=("memory", "growth"), help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.block, arguments.block_seconds = min(arguments.rounds, 3), arguments.block or 1, 0.05
        arguments.size = min(arguments.size, 5000)
        arguments.without = [*arguments.without, "memory"]
    if arguments.checkpoint is not None and not arguments.child:
        arguments.state = "trained"
    if "all" in arguments.shapes:
        arguments.shapes = [name for name in SHAPES if name != "tiny"]
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not th.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; use --device cpu.")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    th.set_num_threads(arguments.threads)
    np.random.seed(0)  # noqa: NPY002  (SB3 and the single file draw from it)
    if arguments.child:
        run_child(arguments)
        return
    if arguments.device == "cuda":
        import torch._dynamo.config as dynamo

        # Each contestant compiles the same functions of d3rlpy's; past torch's limit it would fall back to eager, in silence.
        for name in ("recompile_limit", "cache_size_limit"):
            if hasattr(dynamo, name):
                setattr(dynamo, name, 256)
    folder = arguments.results or (None if arguments.quick else ROOT / "benchmarks" / "results" / "speed")
    # What was asked for; of files and folders nothing but that they were given.
    hidden = {"--checkpoint": "CHECKPOINT", "--results": "FOLDER"}
    words = sys.argv[1:]
    words = [hidden.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    results: dict[str, Any] = {
        "device": arguments.device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(words),
        "commit": commit(),
        "machine": machine(arguments.device, arguments.threads),
        "versions": versions(),
        "arguments": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path) and k not in ("child", "contestant")},
        "shapes": {},
    }
    trained = ["trained"] if arguments.state == "trained" else []
    stem = "_".join([arguments.device, *trained, *([arguments.name] if arguments.name else []), results["date"]])
    for name in arguments.shapes:
        results["shapes"][name] = run_shape(arguments, name)
        print("\n" + results["shapes"][name]["report"], flush=True)
        if folder is not None:
            write(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
            write(folder / f"{stem}.md", render(results))
        gc.collect()
        if arguments.device == "cuda":
            th._dynamo.reset()
            th.cuda.empty_cache()


if __name__ == "__main__":
    main()
