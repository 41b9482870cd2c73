"""The algorithms that are compared, each trained by its own package, behind one face: train, fine-tune, evaluate, save.

An arm is a name and options in our words: ``cql``, ``cql:cql_alpha=20``, ``d3rlpy-iql``. Networks, batch size, discount and
data are the task's for all of them.
"""

from __future__ import annotations

import ast
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import candidates
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from tasks import Task

from cql_plugins.adapters import OfflineDataset
from cql_plugins.sb3 import CQL, CalQL, DiscreteCalQL, DiscreteCQL, GapExpansion, ValueBias, gap_expansion, value_bias
from cql_plugins.sb3.batches import Batch
from cql_plugins.sb3.offline import fill_normalization

Point = dict[str, Any]
"""What one evaluation found."""


class Learner(Protocol):
    """One algorithm on one task."""

    def train(self, steps: int) -> None:
        """Make offline gradient steps."""

    def collect(self, steps: int) -> None:
        """Make environment steps, with one gradient step each."""

    def evaluate(self, n_episodes: int) -> Point:
        """Play, and look at the critic."""

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` goes on from."""

    def load(self, folder: Path) -> None:
        """Go on from there."""


def as_point(bias: ValueBias, gap: GapExpansion) -> Point:
    """Put both figures into one record."""
    return asdict(bias) | {"returns": list(bias.returns)} | asdict(gap)


def parse(arm: str) -> tuple[str, dict[str, Any]]:
    """Split an arm into its name and options."""
    name, _, rest = arm.partition(":")
    pairs = (item.partition("=") for item in rest.split(",") if item)
    options = {}
    for key, _, text in pairs:
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return name, options


def make(arm: str, task: Task, seed: int, precision: str) -> Learner:
    """Make an arm's learner."""
    name, options = parse(arm)
    if name.startswith(("d3rlpy-", "ours-d3rlpy-")):
        return D3RLPyLearner(name, task, seed, options)
    if name == "sac":
        return SACLearner(task, seed, options)
    return SB3Learner(name, task, seed, {"precision": precision} | options)


class SameStarts(gym.Wrapper[Any, Any, Any, Any]):
    """Begin the n-th episode of every evaluation in one and the same state, whichever package plays.

    The packages reset more or less often: with one stream of random numbers each would be measured on starts of its own.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        super().__init__(env)
        self.first = self.next = 1000 * (10 + seed)

    def begin(self) -> None:
        """The next episode is an evaluation's first."""
        self.next = self.first

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset to the episode's start; another seed is not looked at."""
        start, self.next = self.next, self.next + 1
        return self.env.reset(seed=start, options=options)


# Ours, and SB3's SAC ------------------------------------------------------------------------------------------------------


def normalized(env: VecEnv, task: Task, training: bool) -> VecEnv:
    return VecNormalize(env, training=training, norm_reward=False) if task.normalize_observations else env


class KeepBoundRate(BaseCallback):
    """Read a mean of the phase before its last log line takes it away."""

    value: float | None = None

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model._record_metrics()  # type: ignore[attr-defined]
        self.value = self.logger.name_to_value.get("train/bound_rate")


class FlooredCalQL(CalQL):
    """Cal-QL with returns-to-go that are higher than they were: what if the floor is above the true values?"""

    floor = 0.0

    def sample_batch(self, batch_size: int) -> Batch:
        batch = super().sample_batch(batch_size)
        assert batch.returns_to_go is not None
        return batch._replace(returns_to_go=batch.returns_to_go + self.floor)


class SB3Learner:
    """CQL or Cal-QL of this package, on SAC or DQN."""

    def __init__(self, name: str, task: Task, seed: int, options: dict[str, Any]) -> None:
        self.task, self.seed, self.dataset = task, seed, task.load()
        self.env = normalized(make_vec_env(task.make_env, seed=seed), task, training=True)
        self.starts = SameStarts(task.make_env(), seed)
        self.eval_env = normalized(make_vec_env(lambda: self.starts), task, training=False)
        floor = options.pop("floor", 0.0)
        classes: dict[str, Any] = (
            {"cql": DiscreteCQL, "calql": DiscreteCalQL} if task.is_discrete else {"cql": CQL, "calql": CalQL}
        )
        if name not in classes:
            raise SystemExit(f"No arm {name!r}: expected cql, calql, sac, d3rlpy-cql, d3rlpy-calql, d3rlpy-iql or d3rlpy-bc.")
        settings = {"return_tail": task.return_tail} if name == "calql" else {}
        settings |= (
            task.host | task.common | {"gamma": task.gamma, "batch_size": task.batch_size, "learning_starts": 0} | options
        )
        if task.is_discrete:
            intervals = {"offline_target_update_interval": 200, "target_update_interval": 200}
            settings = intervals | {"exploration_final_eps": 0.05, "train_freq": 1} | settings
        self.settings, self.kept = settings | {"floor": floor}, KeepBoundRate()
        settings = dict(settings)
        candidate, policy, nets = candidates.build(settings)
        algorithm = FlooredCalQL if floor else candidate if name == "cql" and not task.is_discrete else classes[name]
        nets |= {"net_arch": list(task.net_arch)}
        self.model: Any = algorithm(policy, self.env, seed=seed, device="cpu", policy_kwargs=nets, **settings)
        if floor:
            self.model.floor = floor

    def train(self, steps: int) -> None:
        self.model.learn_offline(self.dataset, steps, callback=self.kept, log_interval=0)

    def collect(self, steps: int) -> None:
        self.model.set_offline_data(self.dataset)
        first = self.model._num_timesteps_online is None and self.model.num_timesteps == 0
        self.model.learn(steps, callback=self.kept, reset_num_timesteps=first, log_interval=10**9)

    def evaluate(self, n_episodes: int) -> Point:
        self.starts.begin()
        if self.task.normalize_observations:
            self.eval_env.obs_rms = self.env.obs_rms  # type: ignore[attr-defined]
        bias = value_bias(self.model, self.eval_env, n_episodes, deterministic=True)
        gap = gap_expansion(self.model, self._data())
        return as_point(bias, gap) | ({} if self.kept.value is None else {"bound_rate": float(self.kept.value)})

    def _data(self) -> Any:
        self.model.set_offline_data(self.dataset)
        return self.model.offline_buffer

    def save(self, folder: Path) -> None:
        self.model.save(folder / "model.zip")
        if isinstance(self.env, VecNormalize):
            self.env.save(str(folder / "normalization.pkl"))

    def load(self, folder: Path) -> None:
        if isinstance(self.env, VecNormalize):
            self.env = VecNormalize.load(str(folder / "normalization.pkl"), self.env.venv)
        self.model = type(self.model).load(folder / "model.zip", env=self.env, device="cpu")


class SACLearner(SB3Learner):
    """SB3's own SAC, its replay buffer filled with the data: what happens without conservatism."""

    def __init__(self, task: Task, seed: int, options: dict[str, Any]) -> None:
        self.task, self.seed, self.dataset, self.kept = task, seed, task.load(), KeepBoundRate()
        self.env = normalized(make_vec_env(task.make_env, seed=seed), task, training=True)
        self.starts = SameStarts(task.make_env(), seed)
        self.eval_env = normalized(make_vec_env(lambda: self.starts), task, training=False)
        self.settings = {"gamma": task.gamma, "batch_size": task.batch_size, **task.host, **options}
        rate = {"learning_rate": task.common["learning_rate"]} if "learning_rate" in task.common else {}
        nets = {"net_arch": list(task.net_arch)}
        self.model = SAC("MlpPolicy", self.env, seed=seed, device="cpu", policy_kwargs=nets, **rate, **self.settings)
        self._fill()

    def _fill(self) -> None:
        self.model.set_logger(configure(None, []))
        self.model.replay_buffer = self.dataset.to_sb3(self.model)
        if isinstance(self.env, VecNormalize):
            fill_normalization(self.env, self.model.replay_buffer)

    def _data(self) -> Any:
        return self.model.replay_buffer

    def train(self, steps: int) -> None:
        self.model.train(steps, self.task.batch_size)

    def collect(self, steps: int) -> None:
        raise SystemExit("sac: this arm is offline only.")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._fill()


# d3rlpy's own, and ours on its side ---------------------------------------------------------------------------------------


class D3RLPyLearner:
    """CQL, CalQL, IQL, BC and DoubleDQN of d3rlpy, and ours for it, with its data set class, buffers and loops."""

    def __init__(self, name: str, task: Task, seed: int, options: dict[str, Any]) -> None:
        import logging

        import structlog

        import cql_plugins.d3rlpy  # first: it imports d3rlpy without gym's notice

        import d3rlpy  # isort: skip

        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        self.d3rlpy: Any = d3rlpy
        self.quiet = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
        self.task, self.seed, self.name = task, seed, name.rpartition("d3rlpy-")[2]
        self.algos: Any = cql_plugins.d3rlpy if name.startswith("ours-") else d3rlpy.algos
        self.dataset = task.load()
        self.data = as_mdp_dataset(self.dataset)
        self.settings = options
        d3rlpy.seed(seed)
        self.algo = self._config(options).create(device="cpu")
        self.algo.build_with_dataset(self.data)
        self.env, self.eval_env = task.make_env(), SameStarts(task.make_env(), seed)
        self.env.reset(seed=seed)

    def _config(self, options: dict[str, Any]) -> Any:
        algos, task = self.algos, self.task
        nets = self.d3rlpy.models.encoders.VectorEncoderFactory(list(task.net_arch))
        scalers: dict[str, Any] = {}
        if task.normalize_observations:
            scalers["observation_scaler"] = self.d3rlpy.preprocessing.StandardObservationScaler()
        if not task.is_discrete:
            scalers["action_scaler"] = self.d3rlpy.preprocessing.MinMaxActionScaler()
        shared = {"batch_size": task.batch_size, "gamma": task.gamma, **scalers, **options}
        critic_lr = task.common.get("learning_rate", 3e-4)
        if task.is_discrete:
            classes = {"cql": "DiscreteCQLConfig", "dqn": "DoubleDQNConfig", "bc": "DiscreteBCConfig"}
            extra: dict[str, Any] = {"learning_rate": critic_lr, "encoder_factory": nets}
            if self.name != "bc":
                extra["target_update_interval"] = 200
            if self.name == "cql":
                extra["alpha"] = task.common["cql_alpha"]
            if self.name == "bc":
                shared.pop("gamma")
            return getattr(algos, classes[self.name])(**extra, **shared)
        if self.name == "bc":
            shared.pop("gamma")
            return algos.BCConfig(learning_rate=critic_lr, encoder_factory=nets, **shared)
        actor_critic = {"actor_encoder_factory": nets, "critic_encoder_factory": nets}
        shared |= {"tau": task.host["tau"]} if "tau" in task.host else {}
        if self.name == "iql":
            rates = {"actor_learning_rate": critic_lr, "critic_learning_rate": critic_lr, "value_encoder_factory": nets}
            return algos.IQLConfig(**actor_critic, **rates, **task.iql, **shared)
        actor_lr = task.common.get("actor_learning_rate", 1e-4)
        conservative = {
            "actor_learning_rate": actor_lr,
            "critic_learning_rate": critic_lr,
            "temp_learning_rate": actor_lr,
            "alpha_learning_rate": 0.0,
            "conservative_weight": task.common["cql_alpha"],
            "initial_temperature": float(str(task.host.get("ent_coef", "auto_1")).removeprefix("auto_")),
        }
        configs = {"cql": algos.CQLConfig, "calql": algos.CalQLConfig}
        return configs[self.name](**actor_critic, **(conservative | shared))

    def train(self, steps: int) -> None:
        self.algo.fit(self.data, n_steps=steps, n_steps_per_epoch=steps, save_interval=2, **self.quiet)

    def collect(self, steps: int) -> None:
        dataset = self.d3rlpy.dataset
        start = 0
        if not hasattr(self, "online"):
            start = min(500, steps // 2)  # Its buffer has nothing to sample before the first episode has ended.
            fifo = dataset.create_fifo_replay_buffer(limit=100_000, env=self.env)
            self.online = dataset.MixedReplayBuffer(fifo, self.data, secondary_mix_ratio=0.5)
        explorer = self.d3rlpy.algos.ConstantEpsilonGreedy(0.05) if self.task.is_discrete else None
        self.algo.fit_online(
            self.env,
            self.online,
            explorer,
            n_steps=steps,
            n_steps_per_epoch=steps,
            update_start_step=start,
            save_interval=2,
            **self.quiet,
        )

    def evaluate(self, n_episodes: int) -> Point:
        self.eval_env.begin()
        if self.name == "bc":
            recorder = gym.wrappers.RecordEpisodeStatistics(self.eval_env, buffer_length=n_episodes)
            self.d3rlpy.metrics.evaluate_qlearning_with_environment(self.algo, recorder, n_episodes)
            return {"returns": [float(total) for total in recorder.return_queue]}
        from cql_plugins.d3rlpy import gap_expansion, value_bias

        return as_point(value_bias(self.algo, self.eval_env, n_episodes), gap_expansion(self.algo, self.data))

    def save(self, folder: Path) -> None:
        self.algo.save(os.fspath(folder / "model.d3"))

    def load(self, folder: Path) -> None:
        self.algo = self.d3rlpy.load_learnable(os.fspath(folder / "model.d3"), device="cpu")


def as_mdp_dataset(dataset: OfflineDataset) -> Any:
    """The data as d3rlpy's users would give them."""
    from d3rlpy.constants import ActionSpace
    from d3rlpy.dataset import MDPDataset

    discrete = isinstance(dataset.action_space, spaces.Discrete)
    ends = np.isin(np.arange(len(dataset)), dataset.offsets[1:] - 1)
    return MDPDataset(
        dataset.observations[dataset.observation_rows(np.arange(len(dataset)))].astype(np.float32),
        dataset.actions if discrete else dataset.actions.astype(np.float32),
        dataset.rewards.astype(np.float32),
        dataset.terminations.astype(np.float32),
        (ends & ~dataset.terminations).astype(np.float32),
        action_space=ActionSpace.DISCRETE if discrete else ActionSpace.CONTINUOUS,
        action_size=int(dataset.action_space.n) if discrete else None,  # type: ignore[attr-defined]
    )
