"""Copy tables of `results/learning` into the documents, between the marks that name them.

    python benchmarks/publish.py            # --check: only say which are out of date, exit status 1

A mark is `<!-- table: pendulum; seeds; last, IQM [95 %]; online: regret [95 %] -->`: a file there and the columns wanted, all
of the first table's where none is named. What lies between it and `<!-- end of table -->` is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/results.md", "docs/alpha.md")
MARK = re.compile(r"(<!-- table: (?P<asked>[^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """All tables of a file of `report.py` or `claims.py`, heads first, by what stands before them, which may be nothing."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line[1:-1].split("|")])
        elif match := re.match(r"(Offline|Online|The weight, \w+)\b", line):
            title = match[1].lower()
    return found


def condense(tables: dict[str, list[list[str]]], columns: list[str]) -> list[list[str]]:
    """Choose columns; rows that another table lacks are empty there."""
    main = next(iter(tables.values()))
    if not columns:
        return main
    rows = [[row[0]] for row in main]
    for column in columns:
        title, _, name = column.rpartition(": ")
        table = tables[title] if title else main
        if name not in table[0]:
            raise SystemExit(f"No column {name!r}: expected one of {table[0]}.")
        index = table[0].index(name)
        values = {row[0]: row[index] for row in table[2:]}
        head = f"{title}, {name}" if title else name
        for row, value in zip(rows, [head, "---:", *(values.get(row[0], "") for row in main[2:])], strict=True):
            row.append(value)
    return rows


def fill(document: str, results: Path) -> str:
    """Return a document with its tables as they are now."""

    def table(match: re.Match[str]) -> str:
        source, *columns = match["asked"].split("; ")
        name, _, part = source.partition("/")
        tables = read_tables((results / f"{name}.md").read_text(encoding="utf-8"))
        if part:
            tables = {part: tables[part]}
        lines = ["| " + " | ".join(row) + " |" for row in condense(tables, columns)]
        return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[3]

    return MARK.sub(table, document)


def main(arguments: list[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    parsed = parser.parse_args(arguments)
    stale = []
    for name in DOCUMENTS:
        path = parsed.root / name
        before = path.read_text(encoding="utf-8")
        after = fill(before, parsed.root / "benchmarks" / "results" / "learning")
        if before != after:
            stale.append(name)
            if not parsed.check:
                path.write_text(after, encoding="utf-8")
    print(f"{'out of date' if parsed.check else 'written'}: {', '.join(stale) or 'none'}")
    return int(parsed.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
