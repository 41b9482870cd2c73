"""The README's Python runs; how, and what its comments mean, is in `documents.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import Block, chains, marked, parse, run

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize("chain", marked(README))
def test_readme_code_runs(chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(chain, README)


EXAMPLE = """\
text
```python
a = 1
```
<!-- not run: needs a download -->

```python
b = 2
```

<!-- an ordinary comment -->
<!-- continues -->
<!-- in tests: 100_000 -> 20; "door" -> "tmp" -->
```python
c(100_000, "door")
```
```bash
make test
```
"""


def test_parser_reads_blocks_and_comments() -> None:
    assert parse(EXAMPLE) == [
        Block(3, "a = 1\n", None, False),
        Block(8, "b = 2\n", "needs a download", False),
        Block(15, 'c(20, "tmp")\n', None, True),
    ]
    assert [len(chain) for chain in chains(parse(EXAMPLE))] == [1, 2]


@pytest.mark.parametrize("comment", ["in tests: 7 -> 8", "in tests: a", "not run:"])
def test_parser_refuses_a_comment_that_does_nothing(comment: str) -> None:
    with pytest.raises(ValueError, match="line 3"):
        parse(f"<!-- {comment} -->\n```python\na = 1\n```\n")
