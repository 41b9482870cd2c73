"""Why conservative Q-learning: SAC, CQL and Cal-QL on the same log, first offline, then online. No download, a few minutes.

    python examples/quickstart.py [--seed 0] [--out examples/out]

The task is to cross a river by a narrow bridge. There is a log of careful walkers: most of them dawdle on the near bank until
time is up, some cross, and hardly anybody ever falls into the water, so the log does not tell what a step off the bridge
leads to. Each algorithm

1. learns from the log alone: Stable-Baselines3's own SAC by calling ``train``, CQL and CalQL by ``learn_offline``;
2. goes on in the environment, by SB3's ``learn``.

SAC gives actions that nobody took whatever value its critic extrapolates, takes those that look best, and drowns. CQL pushes
the values of such actions down, and crosses more often than the walkers it learned from. This prints a table and writes a
figure and ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from cql_plugins.adapters import OfflineDataset, from_arrays
from cql_plugins.sb3 import CQL, CalQL

GAMMA = 0.95
# One set of SAC's arguments for all three. The task is small and short: small networks, large steps, a short horizon.
SAC_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "gamma": GAMMA,
    "tau": 0.01,
    "batch_size": 128,
    "ent_coef": "auto_0.1",
    "learning_starts": 0,
    "buffer_size": 50_000,
    "policy_kwargs": {"net_arch": [64, 64]},
    "device": "cpu",
}
# The weight is a matter of the size of the rewards. The rest takes away what would blur the comparison: the actor learns at the
# rate of SAC's (`None`), and Cal-QL differs from CQL by its bound alone (its default would be a target with a maximum).
CQL_ARGUMENTS: dict[str, Any] = {"cql_alpha": 1.0, "actor_learning_rate": None, "max_q_backup": False}


# The task and the log ----------------------------------------------------------------------------------------------------


class Bridge(gym.Env[np.ndarray, np.ndarray]):
    """Walk from the left bank (x < -0.5) to the far right (x > 0.8), over a bridge in the middle of a river.

    Observation: where one stands. Action: the step to take; wind adds a little. Reward: 10 on arrival, else 0, so that no
    return is negative. Who steps into the water (beside the bridge, ``|y| > 0.15``) has lost; after 60 steps time is up.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    bank, bridge, goal, limit = 0.5, 0.15, 0.8, 60

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start anywhere along the left edge."""
        super().reset(seed=seed)
        self.steps, self.position = 0, np.array([-0.9, self.np_random.uniform(-0.8, 0.8)])
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step of at most 0.1 in each direction."""
        self.steps += 1
        wind = self.np_random.normal(0.0, 0.02, size=2)
        self.position = np.clip(self.position + 0.1 * np.clip(action, -1.0, 1.0) + wind, -1.0, 1.0)
        x, y = self.position
        drowned, arrived = abs(x) < self.bank and abs(y) > self.bridge, x > self.goal
        return self.position.astype(np.float32), 10.0 * arrived, bool(drowned or arrived), self.steps >= self.limit, {}


def walker(rng: np.random.Generator) -> Any:
    """Return the policy of one logged walker: dawdles on the near bank, for good or for a while, then crosses with care."""
    dawdling = rng.integers(0, 25) if rng.random() < 0.3 else np.inf
    pace, errand = rng.uniform(0.4, 1.0), np.array([-0.8, 0.0])

    def act(position: np.ndarray, step: int) -> np.ndarray:
        nonlocal errand
        x, y = position
        near_bank = x < -0.5
        if step < dawdling and near_bank:
            if np.linalg.norm(errand - position) < 0.1:
                errand = np.array([rng.uniform(-0.95, -0.65), rng.uniform(-0.8, 0.8)])
            target = errand
        elif near_bank and abs(y) > 0.06:
            target = np.array([-0.65, 0.0])  # The head of the bridge.
        else:
            target = np.array([x + 0.3, 0.0 if x < 0.5 else y])
        way = target - position
        noise = rng.normal(0.0, 0.15 if -0.6 < x < 0.55 else 0.3, size=2)
        return np.clip(pace * (way / max(np.linalg.norm(way), 0.1) + noise), -1.0, 1.0).astype(np.float32)

    return act


def make_log(seed: int, n_walkers: int = 60) -> OfflineDataset:
    """Log one walk of each walker."""
    rng, env = np.random.default_rng(seed), Bridge()
    rows = []
    for index in range(n_walkers):
        act = walker(rng)
        observation, _ = env.reset(seed=1000 * seed + index)
        done = False
        while not done:
            action = act(observation, env.steps)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, terminated, truncated and not terminated, following))
            observation, done = following, terminated or truncated
    observations, actions, rewards, terminations, truncations, next_observations = map(np.array, zip(*rows, strict=True))
    return from_arrays(
        observations,
        actions,
        rewards,
        terminations,
        truncations,
        next_observations=next_observations,
        observation_space=env.observation_space,
        action_space=env.action_space,
        name="careful walkers",
    )


# The three algorithms ------------------------------------------------------------------------------------------------------


def train_sac(log: OfflineDataset, env: VecEnv, seed: int, steps: tuple[int, int], recorder: Recorder) -> SAC:
    """SB3's SAC, offline by hand: it fills SAC's own buffer with the log and calls ``train``; online as anyone does."""
    model = SAC("MlpPolicy", env, seed=seed, **SAC_ARGUMENTS)
    model.set_logger(Logger(folder=None, output_formats=[]))
    assert model.replay_buffer is not None
    t = log.transitions(np.arange(len(log)))  # The actions are within [-1, 1] already, the form that the buffer wants.
    fields = (t.observations, t.next_observations, t.actions, t.rewards, t.terminations | t.truncations, t.truncations)
    for observation, following, action, reward, done, truncated in zip(*fields, strict=True):
        model.replay_buffer.add(observation, following, action, reward, done, [{"TimeLimit.truncated": truncated}])
    recorder.init_callback(model)
    for _ in range(steps[0]):
        model.train(gradient_steps=1, batch_size=model.batch_size)
        recorder.on_step()
    recorder.end_phase()
    return model.learn(steps[1], callback=recorder)


def train_cql(
    algorithm: type[CQL], log: OfflineDataset, env: VecEnv, seed: int, steps: tuple[int, int], recorder: Recorder
) -> CQL:
    """CQL or Cal-QL: the same, in two lines."""
    model = algorithm("MlpPolicy", env, seed=seed, **SAC_ARGUMENTS, **CQL_ARGUMENTS)
    model.learn_offline(log, gradient_steps=steps[0], callback=recorder)
    recorder.end_phase()
    return model.learn(steps[1], callback=recorder)


# Measuring -------------------------------------------------------------------------------------------------------------------


class Recorder(BaseCallback):
    """Measures the model every so many steps: gradient steps offline, environment steps (one gradient step each) online."""

    def __init__(self, log: OfflineDataset, every: int, progress: Progress, bar: Any) -> None:
        super().__init__()
        self.every, self.progress, self.bar = every, progress, bar
        self.eval_env = make_vec_env(Bridge, n_envs=50)
        rng = np.random.default_rng(0)
        probe = log.transitions(rng.integers(len(log), size=1000))
        self.observations, self.actions = th.as_tensor(probe.observations), th.as_tensor(probe.actions)
        self.random_actions = th.as_tensor(rng.uniform(-1.0, 1.0, size=probe.actions.shape), dtype=th.float32)
        self.curve: list[dict[str, float]] = []
        self.phase_ends: list[dict[str, float]] = []
        self.walks: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.progress.advance(self.bar)
        if self.n_calls % self.every == 0:
            self._record()
        return True

    def end_phase(self) -> None:
        """Measure at the end of a phase, and keep that apart."""
        if not self.curve or self.curve[-1]["step"] != self.n_calls:
            self._record()
        self.phase_ends.append(self.curve[-1])
        if len(self.phase_ends) == 1:
            self.walks = [self._walk(seed) for seed in range(8)]

    def _record(self) -> None:
        # The same 50 walks each time. The value of their first steps is what the critic predicts that they will return.
        self.eval_env.seed(0)
        starts = th.as_tensor(self.eval_env.reset())
        self.eval_env.seed(0)
        returns, lengths = map(np.array, evaluate_policy(self.model, self.eval_env, 50, return_episode_rewards=True))
        arrived = returns > 0
        self.curve.append(
            {
                "step": self.n_calls,
                "arrived": 100.0 * float(arrived.mean()),
                "q_data": self._q_value(self.observations, self.actions),
                "q_policy": self._q_value(self.observations),
                "q_random": self._q_value(self.observations, self.random_actions),
                "predicted": self._q_value(starts),
                "actual": float(np.mean(returns * GAMMA ** (lengths - 1))),
            }
        )

    @th.no_grad()
    def _q_value(self, observations: th.Tensor, actions: th.Tensor | None = None) -> float:
        """The mean of ``min_j Q_j(s, a)``; of the policy's actions where none are given."""
        assert isinstance(self.model, SAC)
        chosen = self.model.actor(observations, deterministic=True) if actions is None else actions
        return float(th.cat(self.model.critic(observations, chosen), dim=1).min(dim=1).values.mean())

    def _walk(self, seed: int) -> np.ndarray:
        """One path of the policy, for the map."""
        env, done = Bridge(), False
        observation, _ = env.reset(seed=seed)
        path = [env.position]
        while not done:
            action, _ = self.model.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            path.append(env.position)
            done = terminated or truncated
        return np.array(path)


# Reporting -----------------------------------------------------------------------------------------------------------------

COLORS = {"SAC": "#d1495b", "CQL": "#2e6f95", "Cal-QL": "#3a9d5d"}


def print_table(log: OfflineDataset, results: dict[str, Any]) -> None:
    """Two columns for the log, one for each algorithm."""
    table = Table(title="50 walks each; values and returns are discounted")
    table.add_column("")
    for name in ("log,\nmean", "log,\nbest"):
        table.add_column(name, justify="right")
    for name in results:
        table.add_column(name, justify="right", style=COLORS[name])

    def row(label: str, cells: Iterable[str], of_log: Iterable[str] = ("", "")) -> None:
        table.add_row(label, *of_log, *cells)

    offline = [result["offline"] for result in results.values()]
    arrived = 10.0 * log.episode_returns  # An arrival pays 10: the mean return times ten is the share of arrivals.
    discounted = log.returns_to_go(GAMMA)[log.offsets[:-1]]
    row(
        "arrive after offline training",
        (f"{r['arrived']:.0f} %" for r in offline),
        (f"{f(arrived):.0f} %" for f in (np.mean, np.max)),
    )
    row("arrive after online training", (f"{r['online']['arrived']:.0f} %" for r in results.values()))
    row("walks failed while online", (f"{r['failed_walks']} of {r['walks']}" for r in results.values()))
    table.add_section()
    row("Q, data's actions (offline)", (f"{r['q_data']:.2f}" for r in offline))
    row("Q, policy's actions", (f"{r['q_policy']:.2f}" for r in offline))
    row("Q, random actions", (f"{r['q_random']:.2f}" for r in offline))
    row("predicted return of a walk", (f"{r['predicted']:.2f}" for r in offline))
    row("actual return of a walk", (f"{r['actual']:.2f}" for r in offline), (f"{f(discounted):.2f}" for f in (np.mean, np.max)))
    row("predicted - actual", (f"{r['predicted'] - r['actual']:+.2f}" for r in offline))
    table.add_section()
    row("seconds", (f"{r['seconds']:.0f}" for r in results.values()))
    Console().print(table)


def draw(path: Path, log: OfflineDataset, recorders: dict[str, Recorder], switch: int) -> None:
    figure = plt.figure(figsize=(13, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    plan, curves = top.subplots(1, 2, width_ratios=(1, 1.45))

    plan.axvspan(-Bridge.bank, Bridge.bank, color="#cfe6f5", lw=0)
    plan.fill_between((-Bridge.bank, Bridge.bank), -Bridge.bridge, Bridge.bridge, color="#efe3cf", lw=0)
    plan.axvline(Bridge.goal, color="0.4", lw=1, ls=":")
    for episode in log:
        plan.plot(*episode.observations.T, color="0.45", lw=0.5, alpha=0.35)
    for name, recorder in recorders.items():
        for walk in recorder.walks:
            plan.plot(*walk.T, color=COLORS[name], lw=1.3, alpha=0.85)
            end = "o" if walk[-1, 0] > Bridge.goal else "X"
            plan.plot(*walk[-1], marker=end, color=COLORS[name], ms=6, mec="white", mew=0.6)
    for x, text in ((-0.95, "near bank"), (0.0, "river"), (0.9, "goal")):
        plan.text(x, -0.93, text, ha="left" if x < -0.5 else "center", color="0.25", style="italic")
    plan.plot([], [], color="0.45", lw=1, label="the log")
    for name, color in COLORS.items():
        plan.plot([], [], color=color, label=name)
    plan.set(title="Walks after offline training", xlabel="x", ylabel="y", xlim=(-1, 1), ylim=(-1, 1))
    plan.legend(loc="upper right", framealpha=0.9)

    arrived = 10.0 * log.episode_returns
    curves.axhline(arrived.mean(), color="0.35", ls="--", lw=1.2, label="mean of the log")
    curves.axhline(arrived.max(), color="0.35", ls=":", lw=1.2, label="best walk of the log")
    for name, recorder in recorders.items():
        steps, values = ([point[key] for point in recorder.curve] for key in ("step", "arrived"))
        curves.plot(steps, values, color=COLORS[name], lw=2, label=name)
    curves.axvline(switch, color="black", lw=1)
    for side, text in (("right", "offline: gradient steps "), ("left", " online: environment steps")):
        curves.text(switch, 107, text, ha=side, va="center")
    curves.set(title="Walks that arrive", xlabel="steps", ylabel="% of 50 walks", ylim=(-3, 112), xlim=(0, None))
    curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, frameon=False)

    kinds = {
        "q_policy": ("-", "the policy's actions"),
        "q_data": ("--", "the log's actions"),
        "q_random": (":", "random actions"),
    }
    axes = bottom.subplots(1, 3, sharey=True)
    for ax, (name, recorder) in zip(axes, recorders.items(), strict=True):
        points = [point for point in recorder.curve if point["step"] <= switch]
        steps = [point["step"] for point in points]
        for key, (style, _) in kinds.items():
            ax.plot(steps, [point[key] for point in points], color=COLORS[name], ls=style, lw=2)
        ax.plot(steps, [point["predicted"] for point in points], color="black", lw=1, label="Q at the start: predicted return")
        ax.fill_between(steps, [point["actual"] for point in points], color="black", alpha=0.12, lw=0, label="actual return")
        ax.set(title=f"{name}, offline", xlabel="gradient steps", xlim=(0, switch))
    for style, label in kinds.values():
        axes[0].plot([], [], color="0.3", ls=style, lw=2, label=f"Q of {label}")
    axes[0].set_ylabel("discounted return")
    bottom.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the log, train, report; returns what ``results.json`` has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-steps", type=int, default=4000, help="offline, for each algorithm")
    parser.add_argument("--online-steps", type=int, default=2000, help="environment steps, for each algorithm")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between two measurements")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # Networks this small lose more by a second thread than they gain.

    log = make_log(arguments.seed)
    print(log.summary())
    steps = (arguments.gradient_steps, arguments.online_steps)
    recorders, results = {}, {}
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=arguments.no_progress) as progress:
        bars = {name: progress.add_task(name, total=sum(steps), start=False) for name in COLORS}
        for name, algorithm in (("SAC", None), ("CQL", CQL), ("Cal-QL", CalQL)):
            began = time.perf_counter()
            progress.start_task(bars[name])
            env = make_vec_env(Bridge, seed=arguments.seed)
            recorder = recorders[name] = Recorder(log, arguments.eval_every, progress, bars[name])
            if algorithm is None:
                train_sac(log, env, arguments.seed, steps, recorder)
            else:
                train_cql(algorithm, log, env, arguments.seed, steps, recorder)
            recorder.end_phase()
            online_returns = env.env_method("get_episode_rewards")[0]
            results[name] = {
                "offline": recorder.phase_ends[0],
                "online": recorder.phase_ends[1],
                "walks": len(online_returns),
                "failed_walks": sum(value == 0.0 for value in online_returns),
                "seconds": round(time.perf_counter() - began, 1),
                "curve": recorder.curve,
            }

    print_table(log, results)
    draw(arguments.out / "quickstart.png", log, recorders, arguments.gradient_steps)
    summary = {
        "seed": arguments.seed,
        "gradient_steps": arguments.gradient_steps,
        "online_steps": arguments.online_steps,
        "log": {"walks": log.n_episodes, "steps": len(log), "arrived": 10.0 * float(log.episode_returns.mean())},
        "algorithms": results,
    }
    (arguments.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"Figure and numbers: {arguments.out}/quickstart.png, {arguments.out}/results.json")
    return summary


if __name__ == "__main__":
    main()
