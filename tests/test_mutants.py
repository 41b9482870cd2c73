"""The mutation check runs by itself; here only that the code it breaks is still where it looks for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def load_mutants() -> dict[str, tuple[str, str, str]]:
    specification: Any = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
    module: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    mutants: dict[str, tuple[str, str, str]] = module.MUTANTS
    return mutants


@pytest.mark.parametrize(("name", "mutant"), [(name, mutant) for name, mutant in load_mutants().items() if name != "none"])
def test_a_mutant_has_one_place_and_changes_it(name: str, mutant: tuple[str, str, str]) -> None:
    path, old, new = mutant
    assert (HERE.parent / path).read_text(encoding="utf-8").count(old) == 1, f"{name}: the code has changed"
    assert old != new
