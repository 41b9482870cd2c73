"""Train the grid: algorithms by tasks by seeds, each cell in a process of its own, and write one small file for each.

    python benchmarks/learning.py pendulum --jobs 2
    python benchmarks/learning.py pendulum --only d3rlpy --seeds 0 1 2
    python benchmarks/learning.py pendulum --ray              # the same cells on a Ray cluster, or a local one
    python benchmarks/report.py pendulum

A cell that is finished is never run again; one that was killed goes on from its last checkpoint, with random numbers of its own
(its online phase starts anew).
`--list` names the cells and what is there. Offline scores are of the policy's mode, and so are the values beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import distributions, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
PACKAGES = ("torch", "stable-baselines3", "d3rlpy", "gymnasium", "mujoco", "numpy")
CONTINUOUS = ("cql", "calql", "sac", "d3rlpy-cql", "d3rlpy-calql", "d3rlpy-iql", "d3rlpy-bc")
WEIGHTS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
BACKUPS = ("cql", "cql:max_q_backup=True", "calql", "calql:max_q_backup=False")
MODERN = (
    "cql",
    "cql:layer_norm=True",
    "cql:n_critics=10",
    "cql:n_critics=10,n_target_critics=2",
    "cql:batch_size=1024",
    "cql:batch_size=1024,layer_norm=True,learning_rate=2e-3",
)
"""What a modern CQL might have, and the plain one."""
DRAWN = ("cql", "cql:cql_n_backward=31")
"""The exact gradient, and one that goes back through so many drawn actions of a state."""
CLONED = "cql:bc_steps=2500"
"""The policy clones the data's actions for half of Adroit's budget; the authors' does for its first 40,000 steps."""


@dataclass(frozen=True)
class Grid:
    """Arms on a task; those in ``online`` are fine-tuned afterwards."""

    task: str
    arms: tuple[str, ...]
    online: tuple[str, ...] = ()
    n_seeds: int = 5


GRIDS = {
    "pendulum": Grid("pendulum", CONTINUOUS),
    "pendulum-weight": Grid("pendulum", tuple(f"cql:cql_alpha={weight}" for weight in WEIGHTS), n_seeds=3),
    "pendulum-variants": Grid(
        "pendulum",
        ("cql", "cql:mode_q_backup=True", "cql:cql_variant=pointwise", "cql:cql_variant=rho", "cql:cql_variant=mu", "sac"),
        n_seeds=3,
    ),
    "pendulum-reference": Grid(
        "pendulum",
        ("calql", "calql:return_tail=zero", "calql:return_tail=none", "calql:floor=50.0", "calql:floor=200.0", "cql"),
        n_seeds=3,
    ),
    "pendulum-modern": Grid("pendulum", MODERN, n_seeds=3),
    "pendulum-drawn": Grid("pendulum", DRAWN),
    "bridge": Grid("bridge", (*CONTINUOUS, "cql:cql_variant=pointwise"), online=("cql", "calql", "d3rlpy-cql", "d3rlpy-calql")),
    "bridge-weight": Grid(
        "bridge",
        ("sac", "d3rlpy-bc", *(f"cql:cql_alpha={weight}" for weight in WEIGHTS), "d3rlpy-cql:conservative_weight=10.0"),
    ),
    "bridge-backup": Grid(
        "bridge",
        (*BACKUPS, "cql:mode_q_backup=True", "ours-d3rlpy-cql", "ours-d3rlpy-cql:mode_q_backup=True", "d3rlpy-cql"),
        online=BACKUPS,
    ),
    "bridge-modern": Grid("bridge", MODERN, n_seeds=3),
    "bridge-drawn": Grid("bridge", DRAWN),
    "bridge-long": Grid("bridge-long", ("cql", "cql:mode_q_backup=True", "ours-d3rlpy-cql", "d3rlpy-cql")),
    "pointmaze": Grid(
        "pointmaze",
        (*CONTINUOUS, "calql:max_q_backup=False"),
        online=("cql", "calql", "calql:max_q_backup=False"),
        n_seeds=3,
    ),
    "pointmaze-unshifted": Grid("pointmaze-unshifted", ("cql", "calql", "calql:max_q_backup=False"), n_seeds=3),
    "cartpole": Grid(
        "cartpole",
        ("cql", "calql", "cql:cql_alpha=0.0", "d3rlpy-cql", "d3rlpy-dqn", "d3rlpy-bc"),
        online=("cql", "calql", "cql:cql_alpha=0.0", "d3rlpy-cql"),
    ),
    "halfcheetah-replay": Grid("halfcheetah-replay", CONTINUOUS, n_seeds=3),
    "halfcheetah-modern": Grid(
        "halfcheetah-replay", ("cql", "cql:layer_norm=True", "cql:n_critics=4,n_target_critics=2"), n_seeds=3
    ),
    "halfcheetah-drawn": Grid("halfcheetah-replay", DRAWN, n_seeds=3),
    "halfcheetah-medium-expert": Grid("halfcheetah-medium-expert", CONTINUOUS, n_seeds=3),
    "door-human": Grid("door-human", (*CONTINUOUS, "cql:mode_q_backup=True", CLONED), n_seeds=3),
    "pen-expert": Grid("pen-expert", (*CONTINUOUS, CLONED), n_seeds=3),
}


def cell_name(arm: str, seed: int) -> str:
    """Name a run's file."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "_", arm) + f"_seed{seed}"


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    arm: str
    seed: int
    online: bool
    precision: str | None
    results: Path
    checkpoints: Path
    fraction: float = 1.0

    @property
    def name(self) -> str:
        """What its file is called."""
        return cell_name(self.arm, self.seed)

    @property
    def result_path(self) -> Path:
        """Its file."""
        return self.results / self.task / f"{self.name}.json"

    @property
    def checkpoint_path(self) -> Path:
        """Folder of its checkpoints."""
        return self.checkpoints / self.task / self.name

    def read(self) -> dict[str, Any]:
        """What it has found until now."""
        return json.loads(self.result_path.read_text(encoding="utf-8")) if self.result_path.exists() else {}  # type: ignore[no-any-return]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: a grid without online phase may have run it before."""
        found = self.read()
        return bool(found.get("finished")) and (not self.online or "online" in found)


def cells(names: Iterable[str], arguments: argparse.Namespace) -> Iterator[Cell]:
    """List the cells of some grids, each once, seed by seed."""
    seen = set()
    grids = [GRIDS[name] for name in names]
    for seed in arguments.seeds if arguments.seeds is not None else range(max(grid.n_seeds for grid in grids)):
        for grid in grids:
            for arm in grid.arms:
                if arguments.seeds is None and seed >= grid.n_seeds:
                    continue
                online = arm in grid.online
                folders = (arguments.results, arguments.checkpoints)
                cell = Cell(grid.task, arm, seed, online, arguments.precision, *folders, arguments.fraction)
                if cell.name + grid.task not in seen and all(text in f"{grid.task}/{cell.name}" for text in arguments.only):
                    seen.add(cell.name + grid.task)
                    yield cell


def write(path: Path, result: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    return {name: version(name) for name in PACKAGES if any(distributions(name=name))}


def run_cell(cell: Cell) -> str:
    """Train one cell to its end; returns its name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # where another process or machine runs it
    import warnings

    import torch as th

    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    import cql_plugins.sb3  # noqa: F401, I001  (first: it imports SB3 without gym's notice)
    import learners
    from tasks import TASKS
    from train import commit

    from cql_plugins.ensembles import multiplies_bf16

    task = TASKS[cell.task].cut(cell.fraction)
    precision = cell.precision or (task.precision if multiplies_bf16() else "f32")
    learner = learners.make(cell.arm, task, cell.seed, precision)
    result = cell.read()
    checkpoint = cell.checkpoint_path / result.get("checkpoint", "none")
    if result and checkpoint.is_dir():
        learner.load(checkpoint)
    else:
        result = {
            "task": cell.task,
            "arm": cell.arm,
            "seed": cell.seed,
            "precision": "f32" if cell.arm.startswith("d3rlpy") or cell.arm == "sac" else precision,
            "settings": {key: repr(value) for key, value in getattr(learner, "settings", {}).items()},
            "commit": commit(),
            "versions": versions(),
            "python": platform.python_version(),
            "offline": [],
        }

    def measure(step: int, started: float) -> dict[str, Any]:
        found = learner.evaluate(task.eval_episodes)
        point = {"step": step, "score": task.score(found["returns"]), **found, "seconds": time.process_time() - started}
        return {key: _rounded(value) for key, value in point.items()}

    done = result["offline"][-1]["step"] if result["offline"] else 0
    while done < task.steps:
        started = time.process_time()
        learner.train(min(task.eval_every, task.steps - done))
        done += min(task.eval_every, task.steps - done)
        point = measure(done, started)
        folder = cell.checkpoint_path / f"{done:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        learner.save(folder)
        before = result.get("checkpoint")
        result["offline"].append(point)
        result["checkpoint"] = folder.name
        write(cell.result_path, result)  # The checkpoint that it names is there.
        if before is not None:
            shutil.rmtree(cell.checkpoint_path / before, ignore_errors=True)
    if cell.online:
        result["online"] = [{**result["offline"][-1], "step": 0}]
        for step in range(task.online_eval_every, task.online_steps + 1, task.online_eval_every):
            started = time.process_time()
            learner.collect(task.online_eval_every)
            result["online"].append(measure(step, started))
            write(cell.result_path, result)
    result["finished"] = time.strftime("%Y-%m-%d", time.gmtime())
    write(cell.result_path, result)
    return f"{cell.task}/{cell.name}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def run_locally(todo: list[Cell], jobs: int) -> Iterator[tuple[Cell, BaseException | None]]:
    """Run cells in processes of this machine, each started anew."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_cell, cell): cell for cell in todo}
        for future in as_completed(futures):
            yield futures[future], future.exception()


def run_on_ray(todo: list[Cell], jobs: int) -> Iterator[tuple[Cell, BaseException | None]]:
    """Run cells on the Ray cluster that RAY_ADDRESS names, or on a local one; results must lie on a disk that all share."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit(f"ray is needed for --ray: {error}. Install it with: pip install ray") from error

    # What it hands out by default are the machine's own cores.
    ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else jobs, include_dashboard=False, log_to_driver=False)
    remote: Callable[[Cell], Any] = ray.remote(num_cpus=1, max_calls=1)(run_cell).remote
    running = {remote(cell): cell for cell in todo}
    while running:
        (ready, *_), _ = ray.wait(list(running))
        cell = running.pop(ready)
        try:
            ray.get(ready)
            yield cell, None
        except Exception as error:  # whatever the cell raised
            yield cell, error
    ray.shutdown()


def main() -> int:
    """Run what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", choices=sorted(GRIDS))
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cells with all of these in their names")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: those of the grid")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, of one thread each")
    parser.add_argument("--ray", action="store_true", help="hand the cells to Ray")
    parser.add_argument(
        "--precision", choices=("f32", "bf16"), help="of our algorithms; default: the task's where the processor has it"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps, to try things; use other folders")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    arguments = parser.parse_args()
    every = list(cells(arguments.grid, arguments))
    if arguments.list:
        for cell in every:
            found = cell.read()
            steps = found["offline"][-1]["step"] if found.get("offline") else 0
            print(f"{cell.task}/{cell.name}: {'finished' if cell.finished else f'{steps:,} gradient steps'}")
        return 0
    todo = [cell for cell in every if not cell.finished]
    print(f"{len(every)} cells, {len(every) - len(todo)} finished before", flush=True)
    failed = 0
    run = run_on_ray if arguments.ray else run_locally
    for number, (cell, error) in enumerate(run(todo, arguments.jobs), start=1):
        score = "failed" if error else f"score {cell.read()['offline'][-1]['score']:.1f}"
        print(f"[{number}/{len(todo)}] {cell.task}/{cell.name}: {score}", flush=True)
        if error is not None:
            failed += 1
            traceback.print_exception(error)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
