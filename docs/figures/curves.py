"""Draw the curves of docs/metrics.md: a healthy run and a sick one, by `plot_run` from their own logs.

    python docs/figures/curves.py

Both learn from the quick start's log: CQL, and the same without its penalty. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))


def main() -> None:
    """Train twice and draw each run on light and on dark ground."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-steps", type=int, default=5000)
    parser.add_argument("--timesteps", type=int, default=2000)
    arguments = parser.parse_args()
    import torch as th
    from quickstart import CQL_ARGUMENTS, SAC_ARGUMENTS, Bridge, make_log
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    from cql_plugins.plots import plot_run
    from cql_plugins.sb3 import CQL, DiagnosticsCallback

    th.set_num_threads(1)
    for name, alpha, title in (("healthy", 1.0, "CQL, cql_alpha 1"), ("sick", 0.0, "the same, cql_alpha 0")):
        model = CQL("MlpPolicy", make_vec_env(Bridge, seed=0), seed=0, **SAC_ARGUMENTS | CQL_ARGUMENTS | {"cql_alpha": alpha})
        look = DiagnosticsCallback(
            make_vec_env(Bridge, n_envs=10, seed=1), n_eval_episodes=50, eval_freq=250, verbose=0,
            score=lambda returns: [10.0 * value for value in returns],
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            model.set_logger(configure(folder, ["csv"]))
            model.learn_offline(make_log(seed=0), arguments.gradient_steps, callback=look, log_interval=100)
            model.learn(arguments.timesteps, callback=look)
            model.logger.close()
            for theme in ("light", "dark"):
                plot_run(folder, path=HERE / f"{name}-{theme}.png", title=title, theme=theme)


if __name__ == "__main__":
    main()
