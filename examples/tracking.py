"""Curves in TensorBoard, and in Weights & Biases where it is installed: SB3's own logger and callbacks, both phases.

    python examples/tracking.py
    tensorboard --logdir examples/out/tensorboard

With ``pip install wandb`` and ``--wandb`` the same curves go there; ``WANDB_MODE=offline`` keeps them on this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log  # the script beside this one
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env

from cql_plugins.sb3 import CalQL, DiagnosticsCallback


def main(argv: list[str] | None = None) -> list[Path]:
    """Train with callbacks; returns the files that were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=2000)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--eval-freq", type=int, default=500)
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args(argv)

    callbacks = [DiagnosticsCallback(make_vec_env(Bridge, n_envs=10), n_eval_episodes=20, eval_freq=arguments.eval_freq)]
    if arguments.wandb:
        import wandb
        from wandb.integration.sb3 import WandbCallback

        arguments.out.mkdir(parents=True, exist_ok=True)
        wandb.tensorboard.patch(root_logdir=str(arguments.out / "tensorboard"))  # of both phases; patched once a process
        wandb.init(project="cql-plugins", dir=arguments.out)
        callbacks.append(WandbCallback())
    model = CalQL(
        "MlpPolicy",
        make_vec_env(Bridge, seed=0),
        seed=0,
        tensorboard_log=str(arguments.out / "tensorboard"),
        **SAC_ARGUMENTS,
        **CQL_ARGUMENTS,
    )
    model.learn_offline(make_log(seed=0), arguments.gradient_steps, callback=CallbackList(callbacks), log_interval=100)
    model.learn(arguments.timesteps, callback=CallbackList(callbacks))
    written = sorted((arguments.out / "tensorboard").glob("*/events*"))
    print(*(path.parent.name for path in written), sep="\n")
    return written


if __name__ == "__main__":
    main()
