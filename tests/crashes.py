"""Kill an offline-to-online run at random moments, again and again, and compare what comes out with an undisturbed run.

    python tests/crashes.py [--kills 100] [--seed 0] [--runs 10] [--results FILE]

Each run trains Cal-QL offline and then online on Pendulum with several environments and a checkpoint every few steps. It is
killed with SIGKILL at random moments and started again until it has had its share of kills, then finishes. A third of the kills
are aimed inside the writing of a checkpoint: the child says when it begins to write one, and is killed some random share of a
writing's time later. At the end every parameter, optimiser state and counter must equal the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

OFFLINE_STEPS, ONLINE_STEPS = 300, 900
SAVE_FREQ = 25


def child(folder: Path) -> None:
    """Train to the end, from wherever the folder's newest checkpoint is."""
    import gymnasium as gym
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    from cql_plugins.adapters import from_arrays
    from cql_plugins.sb3 import CalQL, Checkpoints

    class Announcing(Checkpoints):
        def save(self) -> Path:
            print("saving", flush=True)
            path = super().save()
            print("saved", flush=True)
            return path

    env = gym.make("Pendulum-v1")
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for episode in range(10):
        observation, _ = env.reset(seed=episode)
        for _ in range(200):
            action = rng.uniform(-2, 2, 1).astype(np.float32)
            following, reward, _, truncated, _ = env.step(action)
            rows.append((observation, action, reward, truncated, following))
            observation = following
    before, actions, rewards, truncations, after = (np.stack(column) for column in zip(*rows, strict=True))
    dataset = from_arrays(
        before,
        actions,
        rewards,
        np.zeros(len(rows), dtype=bool),
        truncations,
        next_observations=after,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    th.set_num_threads(1)
    run = Announcing(folder / "checkpoints", save_freq=SAVE_FREQ, keep_last=3)
    model = run.resume(
        CalQL(
            "MlpPolicy",
            make_vec_env("Pendulum-v1", 2),
            seed=0,
            batch_size=32,
            policy_kwargs={"net_arch": [32, 32]},
            buffer_size=100_000,
            return_tail="bootstrap",
        )
    )
    print("resumed", model._n_offline_steps, model.num_timesteps, flush=True)

    def tell(variables: dict[str, Any], _: dict[str, Any]) -> bool:
        print("step", variables["self"].num_timesteps, flush=True)
        return True

    run.learn_offline(model, dataset, OFFLINE_STEPS, callback=tell)
    run.learn(model, ONLINE_STEPS, callback=tell)
    leaves: dict[str, Any] = {}
    _flatten(model.get_parameters(), "", leaves)
    assert model.log_ent_coef is not None
    leaves["log_ent_coef"] = model.log_ent_coef.detach().numpy()
    leaves["counters"] = np.array([model.num_timesteps, model._n_updates, model._n_offline_steps, model._episode_num])
    with model._own_streams():
        leaves["next"] = np.array([th.rand(1).item(), np.random.rand(), random.random()])
    assert model.replay_buffer is not None
    leaves["rows"] = np.asarray(model.replay_buffer.observations)[: model.replay_buffer.size()]
    np.savez(folder / "writing.npz", **leaves)
    os.replace(folder / "writing.npz", folder / "final.npz")
    print("done", flush=True)


def _flatten(tree: Any, name: str, leaves: dict[str, Any]) -> None:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _flatten(value, f"{name}.{key}", leaves)
    else:
        array = np.asarray(tree)
        leaves[name.strip(".")] = np.asarray(repr(tree)) if array.dtype.hasobject else array


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: How many processes were killed.
        inside_a_save: How many of them between the announcements before and after a checkpoint.
        offline: How many in the offline phase.
        lost_steps: Steps after the newest checkpoint that had to be done again, for each kill after which they are known.
        leftovers: Half-written files that the next start found.
        runs: Runs that finished.
        mismatches: Finished runs whose final state differs from the undisturbed one.
        failures: What else went wrong.
    """

    kills: int = 0
    inside_a_save: int = 0
    offline: int = 0
    lost_steps: list[int] = field(default_factory=list)
    leftovers: int = 0
    runs: int = 0
    mismatches: int = 0
    failures: list[str] = field(default_factory=list)


def start(folder: Path) -> subprocess.Popen[str]:
    """Start a child on a folder."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def read_until(process: subprocess.Popen[str], word: str) -> str | None:
    """Read lines until one starts with a word; ``None`` where the child ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line
    return None


def newest_steps(folder: Path) -> tuple[str, int] | None:
    """Phase and step of the newest checkpoint that has its name."""
    names = sorted(path.stem for path in (folder / "checkpoints").glob("checkpoint_*.zip"))
    if not names:
        return None
    phase, step = names[-1].split("_")[2:]
    return phase, int(step)


def kill_once(folder: Path, rng: random.Random, aim_at_save: bool, durations: list[float], outcome: Outcome) -> bool:
    """Start, kill once, and note what happened; false where the run finished before."""
    process = start(folder)
    try:
        resumed = read_until(process, "resumed")
        if resumed is None:
            outcome.failures.append(f"exit {process.wait()} at the start in {folder.name}")
            return False
        phase_before = newest_steps(folder)
        if phase_before is not None:
            clock = int(resumed.split()[2])
            if clock != phase_before[1]:
                outcome.failures.append(f"resumed at {resumed.strip()}, newest is {phase_before}")
        saves = rng.randrange(1, 8)
        for number in range(saves):
            if read_until(process, "saving") is None:
                return False
            if not aim_at_save or number < saves - 1:
                began = time.perf_counter()
                if read_until(process, "saved") is None:
                    return False
                durations.append(time.perf_counter() - began)
        typical = sorted(durations)[len(durations) // 2] if durations else 0.01
        # Between two checkpoints, or between the two announcements of one.
        time.sleep(rng.random() * (typical if aim_at_save else 0.5))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0] or ""
        if "done" in rest:
            return False
        outcome.kills += 1
        outcome.inside_a_save += bool(aim_at_save and "saved" not in rest)
        left = {path.name for path in (folder / "checkpoints").glob(".*.part")}
        outcome.leftovers += len(left)
        newest = newest_steps(folder)
        outcome.offline += bool(newest is None or newest[0] == "offline")
        steps = [int(line.split()[1]) for line in rest.splitlines() if line.startswith("step")]
        if newest is not None and steps:
            outcome.lost_steps.append(max(0, steps[-1] - newest[1]))
        return True
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs between two final states."""
    first, second = np.load(one), np.load(other)
    if set(first.files) != set(second.files):
        return ["names"]
    return [name for name in first.files if not np.array_equal(first[name], second[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", type=int, default=10, help="runs that share the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file to write the figures to")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    rng = random.Random(arguments.seed)
    outcome = Outcome()
    durations: list[float] = []
    work = Path(tempfile.mkdtemp(prefix="crashes-"))
    try:
        undisturbed = start(work / "undisturbed")
        if read_until(undisturbed, "done") is None:
            sys.exit("the undisturbed run failed")
        undisturbed.communicate()
        for number in range(arguments.runs):
            folder = work / f"run{number}"
            share = (arguments.kills - outcome.kills + arguments.runs - number - 1) // (arguments.runs - number)
            killed = 0
            while killed < share:
                aim_at_save = rng.random() < 0.4
                if not kill_once(folder, rng, aim_at_save, durations, outcome):
                    if outcome.failures:
                        break
                    # It came to its end before the kill: once more from the start.
                    outcome.runs += 1
                    outcome.mismatches += bool(differing(work / "undisturbed" / "final.npz", folder / "final.npz"))
                    shutil.rmtree(folder)
                    continue
                killed += 1
                print(
                    f"\rrun {number + 1} of {arguments.runs}, {outcome.kills} kills, {outcome.inside_a_save} inside a save",
                    end="",
                )
            process = start(folder)
            if read_until(process, "done") is None:
                outcome.failures.append(f"exit {process.wait()} at the end of {folder.name}")
            process.communicate()
            if (folder / "final.npz").exists():
                outcome.runs += 1
                if names := differing(work / "undisturbed" / "final.npz", folder / "final.npz"):
                    outcome.mismatches += 1
                    print(f"\n{folder.name} differs: {names[:5]}")
            if list((folder / "checkpoints").glob(".*.part")):
                outcome.failures.append(f"{folder.name}: a half-written file is left at the end")
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print()
    report = {
        "command": " ".join(["python", "tests/crashes.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        **asdict(outcome),
    }
    print(json.dumps(report, indent=1))
    if arguments.results is not None:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(outcome.mismatches or outcome.failures))


if __name__ == "__main__":
    main()
