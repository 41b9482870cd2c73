"""The tables of the documents are those of `benchmarks/results/learning`, and these are what the raw files give."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
REPORTS = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "claims")


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import publish

    return publish


@pytest.fixture
def copy(publish: ModuleType, tmp_path: Path) -> Path:
    for name in publish.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results" / "learning")
    return tmp_path


def test_documents_are_up_to_date(publish: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["--check"]) == 0, capsys.readouterr().out + "Run: python benchmarks/publish.py"


def test_a_changed_figure_is_noticed_and_written(publish: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = copy / "benchmarks" / "results" / "learning" / "cartpole.md"
    report.write_text(report.read_text().replace("BC (d3rlpy) | 5", "BC (d3rlpy) | 6"))
    assert publish.main(["--check", "--root", str(copy)]) == 1
    assert capsys.readouterr().out == "out of date: docs/results.md\n"
    assert publish.main(["--root", str(copy)]) == 0
    assert "| BC (d3rlpy) | 6 |" in (copy / "docs" / "results.md").read_text()
    assert publish.main(["--check", "--root", str(copy)]) == 0


def test_columns_of_two_tables(publish: ModuleType) -> None:
    report = (
        "Offline.\n\n| | a | b |\n|---|--:|--:|\n| x | 1 | 2 |\n| y | 3 | 4 |\n\nOnline.\n\n| | a |\n|---|--:|\n| y | 5 |\n"
    )
    tables = publish.read_tables(report)
    rows = publish.condense(tables, ["b", "online: a"])
    assert rows == [["", "b", "online, a"], ["---", "---:", "---:"], ["x", "2", ""], ["y", "4", "5"]]
    assert publish.condense(tables, []) == tables["offline"]
    with pytest.raises(SystemExit, match="No column 'c': expected one of"):
        publish.condense(tables, ["c"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results" / "quickstart").glob("*.json")), ids=lambda path: path.stem
)
def test_the_quick_starts_table_is_what_its_runs_gave(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    found = run["algorithms"].values()
    cells = [
        f"{run['log']['arrived']:.0f} %",
        *(f"{one[phase]['arrived']:.0f} %" for phase in ("offline", "online") for one in found),
    ]
    cells += [f"{one['failed_walks']} of {one['walks']}" for one in found]
    assert list(run["algorithms"]) == ["SAC", "CQL", "Cal-QL"]
    row = " | ".join([str(run["seed"]), *cells])
    assert f"| {row} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def import_rliable() -> None:
    try:
        importlib.import_module("rliable.library")
    except Exception as error:  # ImportError, and TypeError with a pandas that its arch does not know
        pytest.skip(f"rliable cannot be imported: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_what_the_raw_files_give(name: str, publish: ModuleType) -> None:
    import_rliable()
    pytest.importorskip("cql_plugins.adapters", exc_type=ImportError)
    pytest.importorskip("cql_plugins.sb3", exc_type=ImportError)
    import report
    from learning import GRIDS
    from tasks import TASKS

    grid = GRIDS[name]
    try:
        TASKS[grid.task].load()
    except (FileNotFoundError, OSError, ValueError):
        pytest.skip("its data are not here")
    assert report.tables(name, grid, report.read(grid, RESULTS)) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_claims_are_what_the_raw_files_give(publish: ModuleType) -> None:
    import_rliable()
    import claims

    assert claims.decide_all(RESULTS) == (RESULTS / "claims.md").read_text(encoding="utf-8")
    assert claims.RULE in (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), "the page says how it decides"
