"""Train offline in d3rlpy, fine-tune in SB3 with four environments; policy, critics and targets go over as they are.

python examples/d3rlpy_to_sb3.py
"""

from __future__ import annotations

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from cql_plugins.adapters import to_d3rlpy, to_sb3_model
from cql_plugins.d3rlpy import CalQLConfig

# After ours, which imports it without gym's notice.
import d3rlpy  # isort: skip
from quickstart import GAMMA, Bridge, make_log  # isort: skip  (the script beside this one)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train twice; returns the mean return of 20 walks after each phase, 10 for an arrival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=3000)
    parser.add_argument("--timesteps", type=int, default=2000)
    arguments = parser.parse_args(argv)

    log, encoder = make_log(seed=0), d3rlpy.models.VectorEncoderFactory([64, 64])
    algo = CalQLConfig(
        conservative_weight=1.0,
        max_q_backup=False,
        gamma=GAMMA,
        tau=0.01,
        batch_size=128,
        initial_temperature=0.1,
        actor_learning_rate=1e-3,
        critic_learning_rate=1e-3,
        temp_learning_rate=1e-3,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
    ).create(device="cpu")
    algo.fit(
        to_d3rlpy(log),
        n_steps=arguments.gradient_steps,
        n_steps_per_epoch=arguments.gradient_steps,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),  # writes no files
        show_progress=False,
    )

    model = to_sb3_model(algo, make_vec_env(Bridge, n_envs=4, seed=0))
    walks = make_vec_env(Bridge, n_envs=10, seed=1)
    offline, _ = evaluate_policy(model, walks, n_eval_episodes=20)
    model.set_offline_data(log)
    model.learn(arguments.timesteps)
    online, _ = evaluate_policy(model, walks, n_eval_episodes=20)
    print(f"mean return after d3rlpy {float(offline):.1f}, after SB3 {float(online):.1f}, of 10")
    return float(offline), float(online)


if __name__ == "__main__":
    main()
