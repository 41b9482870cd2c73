"""Fuzz the readers: thousands of hostile and broken inputs each, every outcome counted.

    python tests/fuzz_readers.py                            # 10,000 inputs for each reader
    python tests/fuzz_readers.py npz cache --cases 500      # some readers, fewer inputs
    python tests/fuzz_readers.py d4rl --only 4711           # one input again, with its traceback; the input is kept

An outcome is a valid load, or a refusal: a `DatasetError` whose message names the source. Everything else is a finding: another
exception, a crash, more than `TIME_LIMIT` seconds, more than `GROWTH_LIMIT` bytes, a file opened outside the input, or anything
run. The inputs (`fuzz_cases.py`) depend on the seed and their number alone. They are read in a child process with a limit on
its address space, which is started again where it dies. Opened files are seen by an audit hook (what Python opens) and, where
there is a C compiler, by a library loaded before libc's `open` (what HDF5 and Arrow open).

The exit status is 1 where there are findings. With `--out FOLDER` the counts go to `fuzz.json` and `fuzz.md` there.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIME_LIMIT = 30.0
"""Seconds for one input; four times that for the child's start."""
MEMORY_LIMIT = 256 * 2**20
"""What the readers are told to keep to, with `$CQL_PLUGINS_MAX_MEMORY`."""
GROWTH_LIMIT = 2 * MEMORY_LIMIT
"""Bytes by which the child's resident memory may grow over what it was before the first input."""
ADDRESS_SPACE = 3 * 2**30
"""Bytes that the child's address space may grow (threads of Arrow reserve much that they do not use)."""
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void note(const char *path) {
    static int log = -2;
    static int (*real)(const char *, int, ...);
    if (log == -2) {
        const char *name = getenv("FUZZ_OPENED");
        real = dlsym(RTLD_NEXT, "open");
        log = name ? real(name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    }
    if (log >= 0 && path) {
        char line[4200];
        int n = snprintf(line, sizeof line, "%.4100s\n", path);
        if (write(log, line, n) < 0) return;
    }
}
#define REAL(name, ...) ((int (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name))
#define MODE va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); note(path)
#define OPEN(name) int name(const char *path, int flags, ...) \
    { MODE; return REAL(#name, const char *, int, ...)(path, flags, mode); }
#define OPEN_AT(name) int name(int at, const char *path, int flags, ...) \
    { MODE; return REAL(#name, int, const char *, int, ...)(at, path, flags, mode); }
#define OPEN_STREAM(name) FILE *name(const char *path, const char *kind) \
    { note(path); return ((FILE *(*)(const char *, const char *)) dlsym(RTLD_NEXT, #name))(path, kind); }
OPEN(open) OPEN(open64) OPEN_AT(openat) OPEN_AT(openat64) OPEN_STREAM(fopen) OPEN_STREAM(fopen64)
"""
SYSTEM = ("/proc/", "/sys/", "/usr/", "/lib", "/etc/ld.so", "/etc/localtime", "/etc/timezone", "/dev/null", "/dev/urandom")
"""What an interpreter opens of a system by itself."""


# The child ------------------------------------------------------------------------------------------------------------


class Watch:
    """What is opened and run while an input is read."""

    def __init__(self, work: Path, opened: Path | None) -> None:
        import numpy as np

        import cql_plugins

        self.allowed = [
            str(Path(cql_plugins.__file__).resolve().parents[1]),
            *SYSTEM,
            str(work),
            sys.prefix,
            sys.base_prefix,
            str(Path(__file__).resolve().parents[1]),
        ]
        self.allowed.append(str(Path(np.__file__).resolve().parents[1]))
        self.canary = str(work / "canary")
        self.found: list[str] = []
        self.on = False
        self._opened = None if opened is None else opened.open("r", errors="replace")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            self._see(arguments[0])
        elif event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "subprocess.Popen",
            "pickle.find_class",
            "ctypes.dlopen",
        ):
            self.found.append(f"{event} {arguments!r:.100}")
        elif event.startswith("socket.connect"):
            self.found.append(event)

    def _see(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        if name.startswith(self.canary) or not name.startswith(tuple(self.allowed)):
            self.found.append(f"opened {name}")

    def skip(self) -> None:
        if self._opened is not None:
            self._opened.seek(0, os.SEEK_END)

    def collect(self) -> list[str]:
        """Return what was found since the last time."""
        if self._opened is not None:
            for line in self._opened.read().splitlines():
                self._see(line)
        found, self.found = self.found, []
        return found


def look_through(dataset: Any, canary: float) -> str | None:
    """Use all of a data set; return what is wrong with it."""
    import numpy as np

    rows = np.arange(len(dataset))
    picked = dataset.transitions(rows)
    _ = (
        [len(episode) for episode in dataset],
        dataset.episode_returns,
        dataset.summary() if hasattr(dataset, "summary") else None,
    )

    def leaves(tree: Any) -> Iterator[Any]:
        if isinstance(tree, dict):
            for branch in tree.values():
                yield from leaves(branch)
        else:
            yield tree

    for leaf in (*leaves(picked.observations), *leaves(picked.next_observations), picked.actions, picked.rewards):
        if len(leaf) != len(rows):
            return "lengths disagree"
        if leaf.dtype.kind == "f" and (leaf == canary).any():
            return "holds values from outside the input"
    return None


def sort_of_refusal(error: Exception) -> str:
    """Say what was refused, without names and numbers."""
    problem = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.,]*\d", "_", str(error).removeprefix(str(getattr(error, "source", ""))))
    problem = re.sub(r"(?<!\w)/[\w/-]+", "PATH", problem)
    problem = re.sub(r"^, field _|, episode _|, row _|^: ", "", problem)
    return problem.removeprefix(": ").split(" in the metadata")[0][:70]


def run_case(target: Any, seed: list[int], folder: Path, canary: Path, watch: Watch, show: bool = False) -> tuple[str, str]:
    """Write and read one input; return the kind of outcome and a detail."""
    import numpy as np
    from fuzz_cases import CANARY

    from cql_plugins.adapters import DatasetError

    folder.mkdir()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = target.write(folder, np.random.default_rng(seed))
    watch.skip()
    watch.on = True
    outcome = ("valid", "")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = read()
            watch.on = False
            problem = look_through(dataset, CANARY)
            if problem:
                outcome = ("finding", problem)
            elif caught:
                outcome = ("valid, with a warning", "")
    except DatasetError as error:
        watch.on = False
        if show:
            traceback.print_exc()
        names_source = error.source and str(error).startswith(error.source)
        outcome = ("refused", sort_of_refusal(error)) if names_source else ("finding", f"names no source: {str(error)[:200]}")
    except BaseException as error:
        watch.on = False
        if show:
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "adapters" in frame.filename] or where
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        outcome = ("finding", f"{type(error).__name__} at {place}: {str(error)[:150]}")
    seen = watch.collect()
    for mark in ("ran", "unpickled"):
        if (canary / mark).exists():
            seen.append(f"the file was {mark}")
            shutil.rmtree(canary / mark) if (canary / mark).is_dir() else (canary / mark).unlink()
    return ("finding", "; ".join(sorted(set(seen))[:3])) if seen else outcome


def child(arguments: argparse.Namespace) -> None:
    """Read the inputs of a range of numbers, and report each in a line of JSON."""
    import fuzz_cases

    import cql_plugins.adapters as adapters

    _ = [getattr(adapters, name) for name in adapters.__all__ if name.startswith("from_")]
    import h5py  # noqa: F401
    import minari  # noqa: F401

    if arguments.target == "minari-arrow":
        import pyarrow.dataset
        import pyarrow.parquet  # noqa: F401
    setattr(os, "fsync", lambda _: None)  # noqa: B010 - the disk is not what is tried here
    work = Path(arguments.work)
    canary, base = work / "canary", Path(tempfile.mkdtemp(prefix="base-", dir=work))
    fuzz_cases.make_canary(canary)
    target = fuzz_cases.TARGETS[arguments.target](base, canary)
    watch = Watch(work, Path(os.environ["FUZZ_OPENED"]) if "FUZZ_OPENED" in os.environ else None)
    number = list(fuzz_cases.TARGETS).index(arguments.target)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(arguments.start, arguments.stop):
        print(json.dumps({"begin": index}), flush=True)
        folder = work / f"case-{index}"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        kind, detail = run_case(target, [arguments.seed, number, index], folder, canary, watch, arguments.show)
        seconds = time.process_time() - began
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_start) * 1024
        if kind != "finding" and growth > GROWTH_LIMIT:
            kind, detail = "finding", f"memory grew by {growth:,} bytes"
        report = {"case": index, "kind": kind, "detail": detail, "seconds": seconds, "growth": growth}
        print(json.dumps(report), flush=True)
        if kind != "finding" and not arguments.show:
            shutil.rmtree(folder, ignore_errors=True)
        if growth > GROWTH_LIMIT:
            return  # The peak is never forgotten: a new child begins anew.


# The parent -----------------------------------------------------------------------------------------------------------


def build_shim(work: Path) -> Path | None:
    """Compile the library that notes what is opened, where there is a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    (work / "shim.c").write_text(SHIM)
    library = work / "shim.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, work / "shim.c", "-ldl"], capture_output=True, check=False
    )
    return library if done.returncode == 0 else None


def fuzz(target: str, cases: range, seed: int, work: Path, shim: Path | None) -> dict[str, Any]:
    """Run a target's inputs; return the counts and the findings."""
    counts: collections.Counter[str] = collections.Counter()
    details: collections.Counter[str] = collections.Counter()
    findings: list[dict[str, Any]] = []
    slowest = growth = 0.0
    began, index = time.monotonic(), cases.start
    while index < cases.stop:
        with started(target, index, cases.stop, seed, work, shim) as process:
            current = None
            for line in process.lines(TIME_LIMIT):
                report = json.loads(line)
                if "begin" in report:
                    current = report["begin"]
                    continue
                current, index = None, report["case"] + 1
                slowest, growth = max(slowest, report["seconds"]), max(growth, report["growth"])
                counts[report["kind"]] += 1
                if report["kind"] == "refused":
                    details[report["detail"]] += 1
                if report["kind"] == "finding":
                    findings.append(report)
                    print(f"  {target} {report['case']}: {report['detail']}", flush=True)
        if index < cases.stop and (current is not None or process.hung):
            what = f"no answer in {TIME_LIMIT:.0f} s" if process.hung else f"the process died: {process.status()}"
            counts["finding"] += 1
            findings.append({"case": current if current is not None else index, "kind": "finding", "detail": what})
            print(f"  {target} {findings[-1]['case']}: {what}", flush=True)
            index = findings[-1]["case"] + 1
        elif index < cases.stop and not process.answered:
            raise SystemExit(f"the child did not start:\n{process.errors()}")
    return {
        "inputs": len(cases),
        "counts": dict(counts),
        "refused": dict(details.most_common()),
        "findings": findings,
        "slowest_cpu_seconds": round(slowest, 3),
        "largest_growth_bytes": int(growth),
        "wall_seconds": round(time.monotonic() - began, 1),
    }


class Child:
    """A running child, watched."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self._process, self._errors = process, errors
        self.hung = self.answered = False

    def lines(self, limit: float) -> Iterator[str]:
        """Yield its lines; kill it where one takes too long."""
        assert self._process.stdout is not None
        lines: list[str] = []
        ready = threading.Condition()
        over = False

        def collect() -> None:
            nonlocal over
            assert self._process.stdout is not None
            for line in self._process.stdout:
                with ready:
                    lines.append(line)
                    ready.notify()
            with ready:
                over = True
                ready.notify()

        threading.Thread(target=collect, daemon=True).start()
        while True:
            with ready:
                if not ready.wait_for(lambda: lines or over, 4 * limit if not self.answered else limit):
                    self.hung = True
                    self._process.kill()
                    return
                if not lines:
                    return
                taken, lines[:] = list(lines), []
            self.answered = True
            yield from taken

    def status(self) -> str:
        status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"status {status}, {self.errors()[-300:]}"

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")


@contextlib.contextmanager
def started(target: str, start: int, stop: int, seed: int, work: Path, shim: Path | None) -> Iterator[Child]:
    environment = os.environ | {
        "CQL_PLUGINS_MAX_MEMORY": str(MEMORY_LIMIT),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    if shim is not None:
        opened = work / "opened"
        opened.write_text("")
        environment |= {"LD_PRELOAD": str(shim), "FUZZ_OPENED": str(opened)}
    command = [sys.executable, __file__, target, "--child", "--start", str(start), "--stop", str(stop), "--seed", str(seed)]
    errors = work / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--work", str(work)], stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        )
        try:
            yield Child(process, errors)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def write_report(results: dict[str, Any], arguments: argparse.Namespace, shim: bool, folder: Path) -> None:
    """Write the counts as JSON and as a table."""
    packages = ("numpy", "h5py", "minari", "pyarrow", "pillow", "gymnasium")
    import h5py

    about = {
        "date": datetime.date.today().isoformat(),
        "seed": arguments.seed,
        "command": re.sub(r" --(out|keep)[ =]\S+", "", " ".join(["python tests/fuzz_readers.py", *sys.argv[1:]])),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"HDF5": h5py.version.hdf5_version},
        "seconds_an_input_may_take": TIME_LIMIT,
        "memory_limit": MEMORY_LIMIT,
        "growth_limit": GROWTH_LIMIT,
        "opened_files_seen": "by Python and by C" if shim else "by Python",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fuzz.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    kinds = ("valid", "valid, with a warning", "refused", "finding")
    lines = [
        "| reader | inputs | " + " | ".join(kinds) + " | slowest (CPU s) | largest growth (MiB) |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for name, result in results.items():
        counted = " | ".join(f"{result['counts'].get(kind, 0):,}" for kind in kinds)
        growth = result["largest_growth_bytes"] / 2**20
        lines.append(f"| {name} | {result['inputs']:,} | {counted} | {result['slowest_cpu_seconds']:.2f} | {growth:.0f} |")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"`{about['command']}`, {about['date']}, seed {about['seed']}, Python {about['python']}, {versions}.\n\n"
    (folder / "fuzz.md").write_text("# Hostile and broken files\n\n" + text + "\n".join(lines) + "\n")


def main() -> None:
    names = ["npz", "d4rl", "minari-hdf5", "minari-arrow", "cache"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", choices=[*names, []], metavar="reader", help=f"of {', '.join(names)}; all by default"
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one input")
    parser.add_argument("--jobs", type=int, default=1, help="readers at once")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for inputs with findings; a temporary one by default")
    for name in ("--start", "--stop"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.show = arguments.only is not None
    if arguments.child:
        arguments.target = arguments.targets[0]
        arguments.show = bool(os.environ.get("FUZZ_SHOW"))
        child(arguments)
        return
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    keep = keep.resolve()
    if arguments.show:
        os.environ["FUZZ_SHOW"] = "1"
    shim = build_shim(keep)
    cases = range(arguments.cases) if arguments.only is None else range(arguments.only, arguments.only + 1)

    def run(target: str) -> dict[str, Any]:
        (keep / target).mkdir(exist_ok=True)
        result = fuzz(target, cases, arguments.seed, keep / target, shim)
        counted = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(result["counts"].items()))
        print(
            f"{target}: {result['inputs']:,} inputs in {result['wall_seconds']:.0f} s; {counted}; slowest "
            f"{result['slowest_cpu_seconds']:.2f} s, growth {result['largest_growth_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
        if arguments.show:
            print((keep / target / "errors").read_text())
        return result

    targets = arguments.targets or names
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(targets, pool.map(run, targets), strict=True))
    if arguments.out:
        write_report(results, arguments, shim is not None, arguments.out)
    n_findings = sum(len(result["findings"]) for result in results.values())
    print(f"{n_findings} findings" + (f"; the inputs are in {keep}" if n_findings or arguments.show else ""))
    if not n_findings and not arguments.show and arguments.keep is None:
        shutil.rmtree(keep)
    raise SystemExit(n_findings > 0)


if __name__ == "__main__":
    main()
