"""Time and memory from files to a Stable-Baselines3 replay buffer.

    python benchmarks/bench_conversion.py [--data FOLDER] [--tile 1000000] [--json FILE]

For each data set: the time to read it, the time to turn it into a buffer, and the highest extra memory of each step, as
a multiple of the buffer's own bytes. Memory is what `tracemalloc` sees (all of NumPy's) in a second, untimed run, since
tracing slows the code down. Targets: conversion at 1M transitions/s or better, peak at most 1.3 times the buffer itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from cql_plugins.adapters import OfflineDataset, from_d4rl, from_minari, to_sb3

MINARI_IDS = ("dapg/door/human-replay-v0", "published-policies/halfcheetah/replay-v0")
D4RL_FILES = ("door-human.hdf5", "halfcheetah-medium-expert.hdf5")


class Target(gym.Env[Any, Any]):
    """The spaces to convert for."""

    def __init__(self, dataset: OfflineDataset) -> None:
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space


@dataclass
class Figures:
    """One row of the table; memory as a multiple of the buffer's bytes."""

    name: str
    episodes: int
    transitions: int
    read_seconds: float | None
    convert_seconds: float
    convert_cpu_seconds: float
    transitions_per_second: float
    buffer_mib: float
    read_peak: float | None
    convert_peak: float


def buffer_bytes(buffer: Any) -> int:
    """Bytes of SB3's own arrays and of the returns-to-go."""
    arrays = [buffer.observations, buffer.next_observations]
    leaves = [leaf for tree in arrays for leaf in (tree.values() if isinstance(tree, dict) else [tree])]
    flat = (buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts, buffer.returns_to_go)
    return sum(array.nbytes for array in (*leaves, *flat))


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """Return the last result, the shortest time and the shortest processor time, in seconds."""
    result, best, best_cpu = None, float("inf"), float("inf")
    for _ in range(repeats):
        result = None  # so that two results are never in memory together
        start, start_cpu = time.perf_counter(), time.process_time()
        result = function()
        best, best_cpu = min(best, time.perf_counter() - start), min(best_cpu, time.process_time() - start_cpu)
    return result, best, best_cpu


def peak_bytes(function: Callable[[], Any]) -> int:
    """Highest memory above what is held at the start, the result included."""
    tracemalloc.start()
    try:
        result = function()
        peak = tracemalloc.get_traced_memory()[1]
        del result
        return peak
    finally:
        tracemalloc.stop()


def measure(name: str, read: Callable[[], OfflineDataset] | OfflineDataset, repeats: int) -> Figures:
    """Measure reading (where `read` is a function) and converting."""
    read_seconds = read_peak = None
    if isinstance(read, OfflineDataset):
        dataset = read
    else:
        dataset, read_seconds, _ = timed(read, repeats)
        read_peak = peak_bytes(read)

    def convert() -> Any:
        # A fresh view of the data: returns-to-go are kept by a data set, and their cost belongs here.
        return to_sb3(dataset[:], Target(dataset))

    convert()  # the first call imports torch and Stable-Baselines3
    buffer, convert_seconds, convert_cpu_seconds = timed(convert, repeats)
    size = buffer_bytes(buffer)
    del buffer
    return Figures(
        name=name,
        episodes=dataset.n_episodes,
        transitions=len(dataset),
        read_seconds=read_seconds,
        convert_seconds=convert_seconds,
        convert_cpu_seconds=convert_cpu_seconds,
        transitions_per_second=len(dataset) / convert_seconds,
        buffer_mib=size / 2**20,
        read_peak=None if read_peak is None else read_peak / size,
        convert_peak=peak_bytes(convert) / size,
    )


def tiled(dataset: OfflineDataset, n_transitions: int) -> OfflineDataset:
    """Repeat a data set until it has at least `n_transitions`."""
    return OfflineDataset.concatenate([dataset] * -(-n_transitions // len(dataset)))


def main() -> None:
    default_data = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CQL_PLUGINS_DATA", default_data)))
    parser.add_argument("--tile", type=int, default=1_000_000, help="transitions of the tiled data sets")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="the shortest of so many times is shown (on a shared machine see the processor time)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.exit(message=f"No data at {options.data}: nothing to measure. Pass --data or set CQL_PLUGINS_DATA.\n")
    os.environ["MINARI_DATASETS_PATH"] = str(options.data / "minari")
    warnings.simplefilter("ignore", UserWarning)  # the counts of dropped transitions are in the table

    rows = [measure(f"Minari {name}", lambda name=name: from_minari(name), options.repeats) for name in MINARI_IDS]
    rows += [
        measure(f"HDF5 {name}", lambda name=name: from_d4rl(options.data / "d4rl" / name), options.repeats)
        for name in D4RL_FILES
    ]
    for name in MINARI_IDS:
        dataset = tiled(from_minari(name), options.tile)
        rows.append(measure(f"tiled {name}", dataset, options.repeats))

    print(f"{'':52}{'episodes':>9}{'transitions':>12}{'read s':>8}{'convert s':>10}{'(cpu)':>8}{'M/s':>7}", end="")
    print(f"{'buffer MiB':>11}{'peak read':>10}{'peak convert':>13}")
    for row in rows:
        read = "-" if row.read_seconds is None else f"{row.read_seconds:.2f}"
        peak = "-" if row.read_peak is None else f"{row.read_peak:.2f}"
        print(
            f"{row.name:52}{row.episodes:9,}{row.transitions:12,}{read:>8}{row.convert_seconds:10.3f}"
            f"{row.convert_cpu_seconds:8.3f}"
            f"{row.transitions_per_second / 1e6:7.2f}{row.buffer_mib:11.1f}{peak:>10}{row.convert_peak:13.2f}"
        )
    print(f"highest resident memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
