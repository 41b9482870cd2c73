"""Run SB3's and sb3-contrib's own tests of DQN, QR-DQN and TQC with our classes in their place.

    git clone --branch v2.9.2 https://github.com/DLR-RM/stable-baselines3
    git clone --branch v2.9.2 https://github.com/Stable-Baselines-Team/stable-baselines3-contrib
    python tests/host_suites.py stable-baselines3 stable-baselines3-contrib [--calibrated] [--cql-alpha 0.01]

Needs pandas, with which SB3's tests read logs. With the default weight ``test_identity`` of DQN and QR-DQN fails: it trains
from scratch online, and a critic that prefers what was done does not explore. TQC's actor follows ``learning_rate`` here,
since one test sets that to 0 and expects nothing to move. The exit status is the number of suites that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SUITES = {
    "stable-baselines3": (
        "callbacks cnn custom_policy deterministic dict_env her identity logger n_step_replay predict run save_load spaces "
        "train_eval_mode",
        "DiscreteCQL or DiscreteCalQL or dqn",
    ),
    "sb3-contrib": (
        "cnn deterministic dict_env identity run save_load train_eval_mode",
        "QRDQN or TQC or qrdqn or tqc",
    ),
}
SETTINGS = "CQL_PLUGINS_IN_HOSTS_PLACE"


def pytest_configure() -> None:
    """Put our classes in the hosts' place; pytest calls it where this file is loaded as a plugin."""
    import sb3_contrib
    import stable_baselines3

    from cql_plugins import sb3 as ours

    calibrated, weight = os.environ[SETTINGS].split()

    def standing_in(plain: str, calibrated_form: str, **changes: Any) -> Any:
        base: Any = getattr(ours, plain if calibrated == "0" else calibrated_form)
        if weight != "default":
            changes["cql_alpha"] = float(weight)

        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, *args, **(changes | kwargs))

        return type(base.__name__, (base,), {"__init__": initialise})

    stable_baselines3.DQN = stable_baselines3.dqn.DQN = standing_in("DiscreteCQL", "DiscreteCalQL")
    sb3_contrib.QRDQN = standing_in("CQLQRDQN", "CalQLQRDQN")
    sb3_contrib.TQC = standing_in("CQLTQC", "CalQLTQC", actor_learning_rate=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stable_baselines3", type=Path, help="a checkout")
    parser.add_argument("sb3_contrib", type=Path, help="a checkout")
    parser.add_argument("--calibrated", action="store_true", help="the Cal-QL forms")
    parser.add_argument("--cql-alpha", type=float, help="another weight than the default")
    arguments = parser.parse_args()
    here = Path(__file__).resolve()
    weight = "default" if arguments.cql_alpha is None else str(arguments.cql_alpha)
    environment = os.environ | {
        SETTINGS: f"{int(arguments.calibrated)} {weight}",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    failed = 0
    folders = {"stable-baselines3": arguments.stable_baselines3, "sb3-contrib": arguments.sb3_contrib}
    for name, (topics, chosen) in SUITES.items():
        files = [f"tests/test_{topic}.py" for topic in topics.split()]
        command = [sys.executable, "-m", "pytest", "-p", here.stem, "-p", "no:cacheprovider", "-q", "-k", chosen, *files]
        failed += subprocess.run(command, cwd=folders[name], env=environment, check=False).returncode != 0
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
