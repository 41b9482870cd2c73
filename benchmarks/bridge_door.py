"""One model in two frameworks, on door-human: d3rlpy offline, carried to SB3, online there with four environments, and back.

    python benchmarks/bridge_door.py --steps 2000

Prints the largest difference of deterministic actions and of Q between the two on the data, both ways, and the returns
of the same episodes in both; then of SB3's model after 1,000 online steps.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import numpy as np
import structlog
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from tasks import load_minari, make_door

from cql_plugins.adapters import to_d3rlpy, to_d3rlpy_model, to_sb3_model
from cql_plugins.d3rlpy import CalQLConfig

import d3rlpy  # isort: skip  (after ours, which imports it without gym's notice)


def standard_scaler(dataset: Any) -> Any:
    """d3rlpy's own fit visits each transition in Python; this is the same."""
    rows = dataset.observation_rows(np.arange(len(dataset)))
    seen = dataset.observations[rows]
    return d3rlpy.preprocessing.StandardObservationScaler(mean=seen.mean(axis=0), std=seen.std(axis=0))


def largest_differences(model: Any, algo: Any, dataset: Any) -> tuple[float, float, float]:
    """Of deterministic actions, of Q and of Q relative to its largest value, over all observations of the data."""
    rows = dataset.observation_rows(np.arange(len(dataset)))
    observations, actions = dataset.observations[rows].astype(np.float32), dataset.actions.astype(np.float32)
    seen = model.get_vec_normalize_env().normalize_obs(observations)
    predicted, _ = model.predict(seen, deterministic=True)
    with th.no_grad():
        ours = th.cat(model.critic(th.as_tensor(seen).float(), th.as_tensor(actions)), dim=1).T.numpy()
        scaled = algo.observation_scaler.transform(th.as_tensor(observations))
        theirs = algo.impl._q_func_forwarder.compute_expected_q(scaled, th.as_tensor(actions), "none")[:, :, 0].numpy()
    difference = np.abs(ours - theirs).max()
    return (
        float(np.abs(predicted - algo.predict(observations)).max()),
        float(difference),
        float(difference / np.abs(theirs).max()),
    )


def d3rlpy_returns(algo: Any, seeds: list[int]) -> list[float]:
    env, returns = make_door(), []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(algo.predict(observation[None].astype(np.float32))[0])
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def sb3_returns(model: Any, seeds: list[int]) -> list[float]:
    returns = []
    normalizer = model.get_vec_normalize_env()
    for seed in seeds:
        env = make_vec_env(make_door, n_envs=1)
        env.seed(seed)
        wrapped = type(normalizer)(env, training=False, norm_reward=False, clip_obs=np.inf)
        wrapped.obs_rms = normalizer.obs_rms
        episode, _ = evaluate_policy(model, wrapped, n_eval_episodes=1, return_episode_rewards=True)
        returns += episode
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--online-steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    warnings.filterwarnings("ignore", module="gymnasium_robotics")
    d3rlpy.seed(arguments.seed)

    dataset = load_minari("dapg/door/human-replay-v0")()
    encoder = d3rlpy.models.VectorEncoderFactory([256, 256, 256])
    config = CalQLConfig(
        conservative_weight=1.0,
        max_q_backup=False,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        observation_scaler=standard_scaler(dataset),
    )
    algo = config.create(device="cpu")
    start = time.perf_counter()
    quiet: dict[str, Any] = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
    algo.fit(to_d3rlpy(dataset), n_steps=arguments.steps, n_steps_per_epoch=arguments.steps, **quiet)
    print(f"d3rlpy: {arguments.steps} steps offline in {time.perf_counter() - start:.0f} s")

    model: Any = to_sb3_model(algo, make_vec_env(make_door, n_envs=4), device="cpu", seed=arguments.seed)
    print(
        "to SB3:    actions differ by {:.2g}, Q by {:.2g} ({:.2g} of the largest)".format(
            *largest_differences(model, algo, dataset)
        )
    )
    back = to_d3rlpy_model(model)
    print(
        "and back:  actions differ by {:.2g}, Q by {:.2g} ({:.2g} of the largest)".format(
            *largest_differences(model, back, dataset)
        )
    )

    seeds = list(range(100, 100 + arguments.episodes))

    def show(name: str, returns: list[float]) -> None:
        scores = dataset.normalized_score(returns)
        print(f"{name:24} returns {np.round(returns, 1).tolist()}  normalised {scores.mean():.2f}")

    show("d3rlpy, offline", d3rlpy_returns(algo, seeds))
    show("SB3, carried", sb3_returns(model, seeds))
    model.set_offline_data(dataset)
    start = time.perf_counter()
    model.learn(arguments.online_steps)
    print(f"SB3: {model.num_timesteps} online steps with 4 environments in {time.perf_counter() - start:.0f} s")
    show("SB3, after them", sb3_returns(model, seeds))


if __name__ == "__main__":
    main()
