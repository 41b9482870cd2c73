"""Memory of image data: what is held for stacked frames, and training from a data set larger than memory.

    python benchmarks/bench_memory.py [--frames 100000] [--limit 512] [--steps 100] [--folder FOLDER] [--json FILE]

Two measurements, each in processes of their own; files go to a temporary folder that is removed at the end (at most
about 4 GiB at the default sizes).

1. `--frames` observations of 84 x 84, to be stacked by four, as Minari files, read and turned into a buffer for a
   model, from which batches of 32 are drawn. Memory is what the process holds beyond its state before reading
   (`RssAnon`, its own memory, and `RssFile`, pages of files that the system can take back), and the highest resident
   memory on the way (`VmHWM`), over one byte for each pixel of each frame. Target: at most 1.1, data set and buffer
   together.
2. A data set of four times `--limit` MiB trains CQL for `--steps` gradient steps in a process with that limit. The limit
   is RLIMIT_DATA, set before Python starts: the kernel counts against it all private writable memory (heap, NumPy's and
   torch's arrays), the imports too, but not files that are mapped to be read, which RLIMIT_AS would count though they
   take no memory that cannot be taken back. As a control the same data read with `storage="memory"` must fail.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SIDE, STACK, EPISODE = 84, 4, 1000
FRAME_BYTES = SIDE * SIDE
MINARI_ID, WARM_UP_ID = "bench/frames-v0", "bench/few-v0"


def frames(rng: np.random.Generator, n: int) -> np.ndarray:
    """Pictures of bright bars that move, so that files of them can be packed."""
    pictures = np.zeros((n, SIDE, SIDE, 1), dtype=np.uint8)
    starts = rng.integers(0, SIDE - 8, n)
    for column in range(8):
        pictures[np.arange(n), :, starts + column, 0] = rng.integers(1, 256, (n, 1))
    return pictures


# The children: each prints one line of JSON -----------------------------------------------------------------------------


def child_write_minari(dataset_id: str, n_frames: int) -> dict[str, Any]:
    """Write episodes of 1000 steps with Minari's own storage, one at a time."""
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.storage.datasets_root_dir import get_dataset_path

    path = get_dataset_path(dataset_id) / "data"
    path.mkdir(parents=True)
    space, action_space = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8), spaces.Box(-1, 1, (2,), np.float32)
    storage = MinariStorage.new(
        path, observation_space=space, action_space=action_space, data_format="hdf5", jpeg_encoding=False
    )
    storage.update_metadata({"dataset_id": dataset_id, "minari_version": version("minari")})
    rng = np.random.default_rng(0)
    for _ in range(n_frames // EPISODE):
        ends = np.arange(EPISODE) == EPISODE - 1
        storage.update_episodes(
            [
                EpisodeBuffer(
                    observations=frames(rng, EPISODE + 1),
                    actions=rng.uniform(-1, 1, (EPISODE, 2)).astype(np.float32),
                    rewards=rng.normal(size=EPISODE),
                    terminations=np.zeros(EPISODE, bool),
                    truncations=ends,
                )
            ]
        )
    return {"bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())}


def child_hold(storage: str, cache: str) -> dict[str, Any]:
    """Read the Minari files, make the model's buffer, and say what that holds."""
    from cql_plugins.adapters import from_minari

    model = _model(STACK)
    options: dict[str, Any] = {"storage": "memmap", "cache_dir": cache} if storage == "memmap" else {}

    def hold(dataset_id: str) -> Any:
        dataset = from_minari(dataset_id, **options)
        buffer = dataset.to_sb3(model)
        for _ in range(50):
            batch = buffer.sample(model.batch_size)
        assert tuple(batch.observations.shape) == (model.batch_size, STACK, SIDE, SIDE)
        return dataset, buffer

    hold(WARM_UP_ID)  # what the libraries and the sampling of batches take, whatever the data, is not counted
    before = _status(trim=True)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    dataset, buffer = hold(MINARI_ID)
    after = _status(trim=True)
    seconds = time.perf_counter()
    for _ in range(50):
        buffer.sample(256)
    seconds = (time.perf_counter() - seconds) / 50
    columns = (dataset.actions, dataset.rewards, dataset.terminations, dataset.truncations)
    columns += (buffer._wide_actions, buffer.rewards, buffer.dones, buffer.timeouts, buffer._cuts)
    return {
        "transitions": len(dataset),
        "pixel_bytes": (len(dataset) + dataset.n_episodes) * FRAME_BYTES,
        "array_bytes": dataset.stack_frames(STACK).observations.nbytes + sum(array.nbytes for array in columns),
        "own": after["RssAnon"] - before["RssAnon"],
        "file": after["RssFile"] - before["RssFile"],
        "peak": after["VmHWM"] - before["VmRSS"],
        "sample_ms": 1000 * seconds,
    }


def child_write_hdf5(path: str, n_bytes: int) -> dict[str, Any]:
    """Write a packed D4RL file whose observations have `n_bytes`, a thousand rows at a time."""
    import h5py

    n = n_bytes // FRAME_BYTES // EPISODE * EPISODE
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        observations = file.create_dataset(
            "observations", (n, SIDE, SIDE, 1), np.uint8, chunks=(50, SIDE, SIDE, 1), compression="lzf"
        )
        for start in range(0, n, EPISODE):
            observations[start : start + EPISODE] = frames(rng, EPISODE)
        file["actions"] = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        file["rewards"] = rng.normal(size=n).astype(np.float32)
        file["terminals"] = np.zeros(n, bool)
        file["timeouts"] = np.arange(n) % EPISODE == EPISODE - 1
    return {"bytes": Path(path).stat().st_size, "rows": n}


def child_train(path: str, storage: str, cache: str, steps: int) -> dict[str, Any]:
    """Read, stack and train; what the process was allowed to use is set by whoever starts it."""
    from gymnasium import spaces

    from cql_plugins.adapters import from_d4rl

    space = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
    options: dict[str, Any] = {"observation_space": space, "action_space": spaces.Box(-1, 1, (2,), np.float32)}
    if storage == "memmap":
        options |= {"storage": "memmap", "cache_dir": cache}
    start = time.perf_counter()
    try:
        dataset = from_d4rl(path, **options)
        read = time.perf_counter()
        model = _model(STACK)
        model.learn_offline(dataset, gradient_steps=steps)
    except MemoryError as error:
        return {"failed": f"MemoryError: {error}"}
    status = _status()
    return {
        "observation_bytes": dataset.observations.nbytes,
        "read_seconds": read - start,
        "train_seconds": time.perf_counter() - read,
        "gradient_steps": model._n_updates,
        "own": status["RssAnon"],
        "data": status["VmData"],
        "file": status["RssFile"],
    }


def _model(stack: int) -> Any:
    """CQL on stacks of images, with small networks and no room for an online phase."""
    import gymnasium as gym
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

    from cql_plugins.sb3 import CQL

    class Screen(gym.Env[Any, Any]):
        observation_space = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
        action_space = spaces.Box(-1, 1, (2,), np.float32)

    return CQL(
        "CnnPolicy",
        VecFrameStack(DummyVecEnv([Screen]), stack),
        buffer_size=1,
        batch_size=32,
        cql_n_actions=4,
        device="cpu",
        policy_kwargs={"net_arch": [32], "features_extractor_kwargs": {"features_dim": 32}},
    )


def _status(*, trim: bool = False) -> dict[str, int]:
    """Memory of this process in bytes, by the kernel's names; with `trim` after the heap gave back what it does not hold."""
    if trim:
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = ("VmData", "VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.split(":")[0] in wanted}


# The parent -------------------------------------------------------------------------------------------------------------


def run(name: str, *arguments: Any, limit: int | None = None, folder: Path) -> dict[str, Any]:
    """Run a child of this file, with at most `limit` bytes of private writable memory; return what it printed."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([name, *arguments])],
        preexec_fn=restrict,
        env=os.environ | {"MINARI_DATASETS_PATH": str(folder / "minari")},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    except (IndexError, ValueError):
        return {"failed": f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}"}


def measure_held(n_frames: int, folder: Path) -> dict[str, Any]:
    """Measure what a data set of stacks and its buffer hold."""
    run("write_minari", WARM_UP_ID, EPISODE, folder=folder)
    print(f"Minari files: {run('write_minari', MINARI_ID, n_frames, folder=folder)}")
    rows = {storage: run("hold", storage, str(folder / "cache"), folder=folder) for storage in ("memory", "memmap")}
    print(f"{'':8}{'transitions':>12}{'arrays':>8}{'own':>8}{'file':>8}{'peak':>8}{'ms per 256':>12}")
    for storage, row in rows.items():
        if "failed" in row:
            print(f"{storage:8}{row['failed']}")
            continue
        shares = [row[key] / row["pixel_bytes"] for key in ("array_bytes", "own", "file", "peak")]
        print(
            f"{storage:8}{row['transitions']:12,}" + "".join(f"{share:8.3f}" for share in shares) + f"{row['sample_ms']:12.1f}"
        )
    print("in bytes per stored pixel per frame; a buffer that copies stacks takes 8\n")
    return rows


def measure_limited(limit_mib: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train from a data set of four times the memory that the process may use."""
    limit = limit_mib * 2**20
    path = str(folder / "frames.hdf5")
    print(f"HDF5 file: {run('write_hdf5', path, 4 * limit + EPISODE * FRAME_BYTES, folder=folder)}")
    rows = {
        storage: run("train", path, storage, str(folder / "cache"), steps, limit=limit, folder=folder)
        for storage in ("memmap", "memory")
    }
    row = rows["memmap"]
    if "failed" in row:
        print(f"memmap, limit {limit_mib} MiB: {row['failed']}")
    else:
        print(
            f"memmap, limit {limit_mib} MiB: {row['observation_bytes'] / limit:.2f} times the limit; read and written in "
            f"{row['read_seconds']:.0f} s, {row['gradient_steps']} gradient steps in {row['train_seconds']:.0f} s; at the end "
            f"{row['data'] / 2**20:.0f} MiB counted, {row['own'] / 2**20:.0f} MiB of its own resident, "
            f"{row['file'] / 2**20:.0f} MiB of files"
        )
    print(f"memory (control), limit {limit_mib} MiB: {rows['memory'].get('failed', 'did not fail')}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="observations of the first measurement")
    parser.add_argument("--limit", type=int, default=512, help="MiB that the training process may use")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps under the limit")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore", UserWarning)
        name, *arguments = json.loads(options.child)
        print(json.dumps(globals()[f"child_{name}"](*arguments)))
        return
    if not sys.platform.startswith("linux"):
        parser.exit(message="The figures are Linux's: nothing measured.\n")
    with tempfile.TemporaryDirectory(prefix="cql-plugins-", dir=options.folder) as folder:
        held = measure_held(options.frames, Path(folder))
    with tempfile.TemporaryDirectory(prefix="cql-plugins-", dir=options.folder) as folder:
        limited = measure_limited(options.limit, options.steps, Path(folder))
    if options.json:
        options.json.write_text(json.dumps({"held": held, "limited": limited}, indent=2) + "\n")


if __name__ == "__main__":
    main()
