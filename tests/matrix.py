"""Run the suite on the lowest and highest versions that pyproject.toml allows, and with one extra at a time.

    make matrix
    make matrix MATRIX_ARGS="--python 3.13=/opt/python3.13/bin/python3 --only highest"

Each cell is a fresh environment: what uv resolves from pyproject.toml (its lowest or highest versions, or the pins of
constraints.txt), this checkout in editable form, and the newest pytest. What a cell printed is kept as JSON in the
folder; a cell whose record is of the same code is not run again, so that a run that was cut short goes on. The
environment is deleted once its record is written.

On Linux torch's wheels from PyPI bring the CUDA libraries, several gigabytes for each version of torch: set
UV_TORCH_BACKEND=cpu, or UV_FIND_LINKS to a folder of CPU wheels, to do without them. Whatever uv reads from the
environment counts here.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    *("stable-baselines3", "sb3-contrib", "gymnasium", "torch", "numpy", "minari", "d3rlpy", "h5py", "pyarrow"),
    *("gymnasium-robotics", "mujoco", "onnx", "pandas"),
)
"""Distributions whose versions a record holds."""
COLUMNS = ("stable-baselines3", "gymnasium", "torch", "numpy", "minari", "d3rlpy")
"""Those of them that the table shows."""
TOOLS = ("pytest>=8", "pytest-xdist", "hypothesis", "packaging")
TESTED = ("adapters", "cql_plugins", "examples", "tests", "pyproject.toml", "constraints.txt", "README.md")
"""What a record is a record of."""
OF_A_RUN = {"matrix.py", "mutants.py", "host_suites.py"}
"""Scripts in tests/ that the suite does not run."""
SDIST_ONLY = ("gym", "rliable")
"""Dependencies that have no wheel. All others are taken as wheels: the lowest version is the lowest that installs."""


@dataclass(frozen=True)
class Cell:
    """One environment.

    Attributes:
        name: What the table and the record's file call it.
        python: Version of the interpreter, such as 3.11.
        extras: Extras of this package.
        resolution: `lowest-direct` or `highest`.
        pins: Constraints on top, such as a gymnasium in the middle of its range.
        constrained: Whether constraints.txt holds.
        tests: What pytest runs; the whole default suite where empty.
    """

    name: str
    python: str
    extras: tuple[str, ...]
    resolution: str = "highest"
    pins: tuple[str, ...] = ()
    constrained: bool = False
    tests: tuple[str, ...] = ()


D3RLPY = ("tests/d3rlpy", "tests/adapters/test_models.py", "tests/sb3/test_d3rlpy_parity.py", "tests/test_packaging.py")
DATA = ("tests/adapters", "tests/sb3/test_dict_layouts.py", "tests/test_packaging.py", "tests/test_readme.py")
SHOWING = ("tests/sb3/test_host_callbacks.py", "tests/test_examples.py", "tests/test_packaging.py", "tests/test_readme.py")
OF_EXTRA = {
    "safetensors": ("tests/sb3/test_weights.py", "tests/test_weights.py", "tests/test_packaging.py"),
    "cli": ("tests/test_cli.py", "tests/test_packaging.py"),
    "contrib": ("tests/sb3", "tests/test_packaging.py", "tests/test_readme.py"),
    "d3rlpy": D3RLPY,
    **dict.fromkeys(("arrow", "d4rl", "minari", "robotics"), DATA),
    "zoo": ("tests/test_zoo.py",),
    "onnx": ("tests/sb3/test_export.py", "tests/test_packaging.py", "tests/test_readme.py"),
    **dict.fromkeys(("progress", "tensorboard"), SHOWING),
    "plots": (*SHOWING, "tests/test_plots.py"),
}
"""What runs where one extra is installed alone: the core's own tests have a cell."""


def cells(pythons: Sequence[str], extras: Sequence[str]) -> list[Cell]:
    """List the environments, the most telling first."""
    main = pythons[0]
    # Each package brings the newest of its own dependencies, and a new pyparsing deprecates what matplotlib 3.8 calls.
    of_then = ("pyparsing<3.3",)
    without_pin = tuple(extra for extra in extras if extra != "d3rlpy")
    lowest, highest, pinned = [], [], []
    for python in pythons:
        # See `all` in pyproject.toml.
        everything = tuple(extra for extra in extras if extra != "robotics" or python in ("3.11", "3.12"))
        lowest.append(Cell(f"lowest-{python}", python, everything, "lowest-direct", of_then))
        highest.append(Cell(f"highest-{python}", python, without_pin))
        pinned.append(Cell(f"highest-d3rlpy-{python}", python, everything, tests=D3RLPY))  # gymnasium at 1.0.0
    # Between the ends; SB3 before 2.9 keeps gymnasium below 1.3. Minari 0.5.3 is the one that knows only JPEGs.
    some = tuple(extra for extra in extras if extra not in ("d3rlpy", "onnx", "robotics"))
    hosts = ("tests/sb3", "tests/adapters", "tests/test_packaging.py")
    middle = {
        "middle-2.7-1.1": ("stable-baselines3<2.8", "gymnasium<1.2", "torch<2.10", *of_then),
        "middle-2.8-1.2": ("stable-baselines3<2.9", "gymnasium<1.3", "torch<2.14", "minari<0.5.4"),
        "middle-2.9-1.3": ("gymnasium<1.4", "torch<2.14"),
    }
    return [
        lowest[0],
        highest[-1],
        Cell("core-lowest", main, (), "lowest-direct", of_then),
        Cell("core", main, (), constrained=True),
        *(Cell(name, main, some, pins=pins, tests=hosts) for name, pins in middle.items()),
        *(Cell(f"only-{extra}", main, (extra,), constrained=True, tests=OF_EXTRA.get(extra, ())) for extra in extras),
        Cell("constraints", main, tuple(extras), constrained=True),
        *pinned,
        *reversed(highest[:-1]),
        *lowest[1:],
    ]


def uv(folder: Path) -> Path:
    """Find uv, or put it into the folder: it resolves to lowest versions, and links files instead of copying them."""
    found = shutil.which("uv")
    if found:
        return Path(found)
    home = folder / "tools"
    if not (home / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", "uv"], check=True)
    return home / "bin" / "uv"


def tested_files() -> Iterable[Path]:
    """List what decides a cell's result, apart from the environment."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *TESTED],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in sorted(filter(None, listed.split("\0"))):
        path = ROOT / name
        if path.is_file() and path.name not in OF_A_RUN:
            yield path


def fingerprint() -> str:
    """Hash the code and the tests as they are on disk."""
    digest = hashlib.sha256()
    for path in tested_files():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run_cell(cell: Cell, interpreter: str, folder: Path, tests: Sequence[str], keep: bool) -> dict[str, Any]:
    """Make the environment, run the suite in it, return the record."""
    started = time.perf_counter()
    work = folder / "cells" / cell.name
    venv = folder / "venvs" / cell.name
    shutil.rmtree(venv, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    binary, python = str(uv(folder)), str(venv / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.setdefault("UV_CACHE_DIR", str(folder / "cache"))  # on one disk with the environments, to link
    if "PIP_FIND_LINKS" in environment:
        environment.setdefault("UV_FIND_LINKS", environment["PIP_FIND_LINKS"])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def call(*command: str, log: str) -> int:
        with (work / log).open("w", encoding="utf-8") as out:
            return subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode

    def failed(step: str, log: str) -> dict[str, Any]:
        tail = (work / log).read_text(encoding="utf-8").strip().splitlines()[-12:]
        return {"state": f"{step} failed", "tail": tail}

    (work / "pins.txt").write_text("\n".join(cell.pins) + "\n", encoding="utf-8")
    resolve = [binary, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "pyproject.toml"]
    resolve += [
        "--constraint",
        str(work / "pins.txt"),
        "--python",
        python,
        "--resolution",
        cell.resolution,
        "--only-binary",
        ":all:",
    ]
    resolve += [option for name in SDIST_ONLY for option in ("--no-binary", name)]
    resolve += [option for extra in cell.extras for option in ("--extra", extra)]
    if cell.constrained:
        resolve += ["--constraint", "constraints.txt"]
    resolve += ["--output-file", str(work / "requirements.txt")]
    (work / "requirements.txt").unlink(missing_ok=True)  # uv prefers what it finds there
    install = [binary, "pip", "install", "--python", python, "--requirement", str(work / "requirements.txt"), *TOOLS]
    if "onnx" in cell.extras:
        install.append("onnxruntime")
    steps = {
        "making": [binary, "venv", "--python", interpreter, str(venv)],
        "resolving": resolve,
        "installing": install,
        "installing the checkout": [binary, "pip", "install", "--python", python, "--no-deps", "--editable", "."],
    }
    record: dict[str, Any] = {}
    for number, (step, command) in enumerate(steps.items()):
        if call(*command, log=f"{number}.log") != 0:
            record = failed(step, f"{number}.log")
            break
    else:
        report = work / "junit.xml"
        report.unlink(missing_ok=True)
        command = ["nice", python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "auto"]
        command += ["--maxprocesses", "8", f"--junitxml={report}", *cell.tests, *tests]
        status = call(*command, log="pytest.log")
        record = outcome(report) if report.exists() else failed("collecting", "pytest.log")
        if status != 0 and record["state"] == "passed":
            record["state"] = f"pytest left with {status}"
        record["versions"] = versions(python, environment)
    if not keep:
        shutil.rmtree(venv, ignore_errors=True)
    return record | {
        "cell": cell.name,
        "python": cell.python,
        "extras": list(cell.extras),
        "resolution": "constraints.txt" if cell.constrained else cell.resolution,
        "pins": list(cell.pins),
        "scope": list(cell.tests) or ["tests"],
        "seconds": round(time.perf_counter() - started),
    }


def outcome(report: Path) -> dict[str, Any]:
    """Count what pytest wrote: passed, failed, and skipped with the reasons."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif (skip := case.find("skipped")) is not None:
            counts["skipped"] += 1
            reasons[(skip.get("message") or "").replace(str(ROOT), ".")] += 1
        else:
            counts["passed"] += 1
    state = "failed" if counts["failed"] else "passed" if counts["passed"] else "ran nothing"
    return {
        "state": state,
        **{name: counts[name] for name in ("passed", "skipped", "failed")},
        "failures": failures,
        "skip_reasons": dict(reasons.most_common()),
    }


def versions(python: str, environment: dict[str, str]) -> dict[str, str]:
    """Ask the environment itself what it has."""
    code = (
        "import json, platform; from importlib import metadata; found = {'python': platform.python_version()}\n"
        f"for name in {SHOWN}:\n"
        "    try: found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, check=True, text=True, env=environment)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Draw the records as a Markdown table, which reads well on a terminal, too."""
    short = {"stable-baselines3": "SB3"}
    named = [short.get(name, name) for name in COLUMNS]
    head = ["cell", "Python", *named, "passed", "skipped", "failed", "seconds", "commit"]
    rows = [head, ["---"] * len(head)]
    for record in records:
        found = record.get("versions", {})
        row = [record["cell"], found.get("python", record["python"]), *(found.get(name, "-") for name in COLUMNS)]
        counts = [str(record.get(name, "-")) for name in ("passed", "skipped", "failed")]
        if "passed" not in record:
            counts[0] = record["state"]
        rows.append([*row, *counts, str(record["seconds"]), record["commit"]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        cells_ = (text.ljust(width, fill) for text, width in zip(row, widths, strict=True))
        lines.append("| " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def interpreters(asked: Sequence[str]) -> dict[str, str]:
    """Map versions to interpreters: those asked for, else all that are on the path from 3.11 on."""
    if asked:
        pairs = (item.partition("=") for item in asked)
        return {version: path or f"python{version}" for version, _, path in pairs}
    folders = [*os.environ.get("PATH", "").split(os.pathsep)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    folders += [str(path) for path in sorted(pyenv.glob("3.*/bin"))]
    found = {}
    for minor in range(11, 20):
        for folder in folders:
            path = Path(folder) / f"python3.{minor}"
            # A shim may be there without the interpreter it stands for.
            if path.exists() and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
                found[f"3.{minor}"] = str(path)
                break
    return found or {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}


def main() -> int:
    """Run what has no record yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="for environments, logs and records")
    parser.add_argument("--python", action="append", default=[], metavar="3.13=/path/to/python", help="repeatable")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cells with this in their name; repeatable")
    parser.add_argument("--again", action="store_true", help="run cells that have a record, too")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--report", action="store_true", help="run nothing, draw the records there are, of whatever commit")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--out", type=Path, help="also write matrix_DATE.json and .md to this folder")
    parser.add_argument("tests", nargs="*", help="passed on to pytest, after `--`")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [extra for extra in project["optional-dependencies"] if extra not in ("all", "dev", "docs")]
    pythons = interpreters(arguments.python)
    code = fingerprint()
    chosen = [
        cell for cell in cells(list(pythons), extras) if not arguments.only or any(text in cell.name for text in arguments.only)
    ]
    if arguments.list:
        print(*(f"{cell.name}: {', '.join(cell.extras) or 'no extra'}" for cell in chosen), sep="\n")
        return 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    records = []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (arguments.folder / "lock").open("w", encoding="utf-8") as lock:
        try:
            if not arguments.report:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another run works in {arguments.folder}: wait for it, or give --folder another")
        for cell in chosen:
            kept = arguments.folder / "results" / f"{cell.name}.json"
            if kept.exists() and not arguments.again:
                record = json.loads(kept.read_text(encoding="utf-8"))
                same = record["code"] == code and record["tests"] == arguments.tests
                if arguments.report or (same and "passed" in record):  # what could not be installed is tried again
                    records.append(record)
                    continue
            if arguments.report:
                continue
            print(f"{cell.name} ...", end=" ", flush=True)
            record = run_cell(cell, pythons[cell.python], arguments.folder, arguments.tests, arguments.keep)
            record |= {
                "code": code,
                "commit": commit,
                "tests": arguments.tests,
                "date": datetime.date.today().isoformat(),
                "platform": platform.platform(),
            }
            kept.parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(kept)
            print(
                record["state"],
                f"({record['seconds']} s)",
                *record.get("failures", [])[:8],
                *record.get("tail", []),
                sep="\n  ",
            )
            records.append(record)
    drawn = table(records)
    print(drawn)
    if arguments.out is not None and records:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"matrix_{max(record['date'] for record in records)}"
        (arguments.out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        (arguments.out / f"{name}.md").write_text(drawn + "\n", encoding="utf-8")
    return int(any(record["state"] != "passed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
