"""The Zoo's own scripts, run with our algorithms among its own: ``python -m cql_plugins.zoo SCRIPT ...``."""

from __future__ import annotations

import argparse
import runpy
import sys

from cql_plugins.zoo import ALGOS, register
from cql_plugins.zoo.manager import OfflineExperimentManager

SCRIPTS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
    "all_plots": "rl_zoo3.plots.all_plots",
    "record_video": "rl_zoo3.record_video",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "load_from_hub": "rl_zoo3.load_from_hub",
}


def main() -> None:
    """Run one script. What it does not know of (``train``'s ``--dataset`` and ``--offline-steps``) is taken out first."""
    names = ", ".join(SCRIPTS)
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        given = f"got {sys.argv[1]!r}" if len(sys.argv) > 1 else "got nothing"
        sys.exit(f"usage: python -m cql_plugins.zoo SCRIPT [options]: expected SCRIPT to be one of {names}; {given}.")
    script = sys.argv.pop(1)
    sys.argv[0] = f"cql_plugins.zoo {script}"
    register()
    if script == "train":
        ours = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, usage="python -m cql_plugins.zoo train [options of RL Zoo] [options below]"
        )
        ours.add_argument(
            "--dataset",
            metavar="FILE_OR_ID",
            help="logged data: a D4RL file (.hdf5), an archive (.npz), or a Minari set's id; learned from first",
        )
        ours.add_argument("--offline-steps", type=int, metavar="N", help="gradient steps on it; default: the YAML file's")
        if {"-h", "--help"} & set(sys.argv):
            ours.print_help()
            print("\nThe Zoo's own:\n")
        arguments, sys.argv[1:] = ours.parse_known_args(sys.argv[1:])
        OfflineExperimentManager.from_command_line = {
            name: value for name, value in vars(arguments).items() if value is not None
        }
    if script.endswith("_hub"):
        from cql_plugins.zoo import _hub

        _hub.prepare(tuple(ALGOS))
    runpy.run_module(SCRIPTS[script], run_name="__main__")


if __name__ == "__main__":
    main()
