"""The matrix's own parts: its list of environments, what it counts, when it runs one again."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def matrix(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix_script", repo_root / "tests" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def extras(repo_root: Path) -> list[str]:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [extra for extra in project["optional-dependencies"] if extra not in ("all", "dev", "docs")]


def test_each_extra_is_alone_once_and_knows_its_tests(matrix: ModuleType, extras: list[str], repo_root: Path) -> None:
    cells = matrix.cells(["3.11", "3.13"], extras)
    alone = [cell for cell in cells if len(cell.extras) == 1]
    assert sorted(cell.extras[0] for cell in alone) == sorted(extras)
    assert all(cell.tests for cell in alone), "an extra is missing in OF_EXTRA"
    assert len({cell.name for cell in cells}) == len(cells)
    missing = [name for cell in cells for name in cell.tests if not (repo_root / name).exists()]
    assert missing == []
    assert {(cell.resolution, cell.python) for cell in cells} >= {
        (resolution, python) for resolution in ("lowest-direct", "highest") for python in ("3.11", "3.13")
    }
    # d3rlpy with robotics has no solution on 3.13; highest versions of the rest need an environment without d3rlpy.
    assert not [cell for cell in cells if cell.python == "3.13" and {"d3rlpy", "robotics"} <= set(cell.extras)]
    assert all("d3rlpy" not in cell.extras for cell in cells if cell.name.startswith("highest-3"))


JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"/>
<testcase classname="a" name="three"><skipped message="no GPU"/></testcase>
{more}
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("more", "state", "failures"),
    [
        ("", "passed", []),
        ('<testcase classname="b" name="four"><failure/></testcase>', "failed", ["b::four"]),
        ('<testcase classname="" name="b"><error/></testcase>', "failed", ["::b"]),
    ],
)
def test_outcome(matrix: ModuleType, tmp_path: Path, more: str, state: str, failures: list[str]) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT.format(more=more), encoding="utf-8")
    assert matrix.outcome(tmp_path / "junit.xml") == {
        "state": state,
        "passed": 2,
        "skipped": 1,
        "failed": len(failures),
        "failures": failures,
        "skip_reasons": {"no GPU": 1},
    }


def test_goes_on_where_it_was_cut_off(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    code = ["one"]

    def run_cell(cell: Any, *_: Any) -> dict[str, Any]:
        if cell.name == "only-plots" and not ran.count("only-plots"):
            ran.append(cell.name)
            raise KeyboardInterrupt
        ran.append(cell.name)
        counts = {"passed": 3, "skipped": 1, "failed": 0, "failures": []}
        return {"state": "passed", "cell": cell.name, "python": cell.python, "versions": {}, "seconds": 1, **counts}

    monkeypatch.setattr(matrix, "run_cell", run_cell)
    monkeypatch.setattr(matrix, "fingerprint", lambda: code[0])
    arguments = ["matrix.py", "--folder", str(tmp_path), "--python", "3.11", "--only", "only-onnx", "--only", "only-pl"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        matrix.main()
    assert matrix.main() == 0
    assert ran == ["only-onnx", "only-plots", "only-plots"]
    assert matrix.main() == 0
    assert len(ran) == 3, "both have a record of this code"
    code[0] = "two"
    assert matrix.main() == 0
    assert ran[3:] == ["only-onnx", "only-plots"], "and none of changed code"
    (written,) = (tmp_path / "out").glob("*.json")
    assert [record["code"] for record in json.loads(written.read_text())] == ["two", "two"]
    assert written.with_suffix(".md").read_text().count("only-") == capsys.readouterr().out.count("| only-") / 3 == 2


def test_one_run_at_a_time(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two would delete each other's environments."""
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--folder", str(tmp_path), "--python", "3.11", "--only", "nothing"])
    with (tmp_path / "lock").open("w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            matrix.main()
        assert "another run works in" in capsys.readouterr().err
    assert matrix.main() == 0


def test_a_pin_changes_the_fingerprint(matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("a", encoding="utf-8")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "tested_files", lambda: [tmp_path / "pyproject.toml"])
    first = matrix.fingerprint()
    assert matrix.fingerprint() == first
    (tmp_path / "pyproject.toml").write_text("b", encoding="utf-8")
    assert matrix.fingerprint() != first
