"""The docs' claims: each row of docs/conformance.md has its test, the defaults that docs/migration.md names are the defaults.

The tests at the end are rows of that page that had none elsewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from cql_plugins.returns import returns_to_go
from cql_plugins.sb3 import CQL, CalQL, DiscreteCalQL, DiscreteCQL
from tests.test_examples import load_example

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CITED = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)+)`")
SETTING = re.compile(r"`(\w+)=([^`{]+)`")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a Markdown table: its cells by the table's header, and the section it is in."""

    line: int
    section: str
    cells: dict[str, str]


def rows(page: str) -> Iterator[Row]:
    """All rows of all tables of a page."""
    section, header = "", None
    for number, line in enumerate((DOCS / page).read_text("utf-8").splitlines(), start=1):
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if header is None:
            header = cells
        elif not re.fullmatch(r"[-: ]+", cells[0]):
            assert len(cells) == len(header), f"{page}, line {number}: {len(cells)} cells under {len(header)} names"
            yield Row(number, section, dict(zip(header, cells, strict=True)))


def is_there(test: str) -> bool:
    """Whether a test exists, by its name in pytest: a file, then classes, then a function."""
    path, *names = test.split("::")
    if not (ROOT / path).is_file():
        return False
    node: Any = ast.parse((ROOT / path).read_text("utf-8"))
    for name in names:
        node = next((n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None)
        if node is None:
            return False
    return isinstance(node, ast.FunctionDef)


def test_every_row_of_the_page_ends_in_a_test_that_exists() -> None:
    found = list(rows("conformance.md"))
    assert len(found) > 50
    for row in found:
        cited = CITED.fullmatch(row.cells["test"])
        assert cited, f"docs/conformance.md, line {row.line}: expected one test, got {row.cells['test']!r}"
        assert is_there(cited[1]), f"docs/conformance.md, line {row.line}: no such test: {cited[1]}"


@pytest.mark.parametrize(
    "test",
    [
        "tests/test_absent.py::test_literal",
        "tests/test_losses.py::TestBound::test_absent",
        "tests/test_losses.py::TestAbsent::test_literal",
        "tests/test_losses.py::test_literal",  # it is in a class
        "tests/test_losses.py::TestBound",
    ],
)
def test_a_test_that_is_not_there_is_missed(test: str) -> None:
    assert is_there("tests/test_losses.py::TestBound::test_literal")
    assert not is_there(test)


# Defaults -------------------------------------------------------------------------------------------------------------


def settings(column: str, where: tuple[str, ...]) -> list[tuple[Row, str, Any]]:
    """What a column of docs/migration.md says of defaults: name and value, in the sections whose title has one of the words."""
    found = []
    for row in rows("migration.md"):
        if column in row.cells and any(word in row.section for word in where):
            for name, value in SETTING.findall(row.cells[column]):
                found.append((row, name, eval(value, {"inf": math.inf})))  # our own page
    return found


CONTINUOUS = ("`CQLConfig`", "Training", "From CORL", "From Cal-QL", "From torchrl")
DISCRETE = ("discrete",)


def of_signatures(*classes: type) -> list[dict[str, Any]]:
    return [{name: p.default for name, p in inspect.signature(cls).parameters.items()} for cls in classes]


def of_configs(*configs: type) -> list[dict[str, Any]]:
    return [{field.name: field.default for field in dataclasses.fields(config)} for config in configs]  # type: ignore[arg-type]


def check(found: list[tuple[Row, str, Any]], defaults: list[dict[str, Any]], at_least: int) -> None:
    assert len(found) >= at_least
    for row, name, value in found:
        known = [own[name] for own in defaults if name in own]
        assert known, f"docs/migration.md, line {row.line}: there is no {name}"
        assert value in known, f"docs/migration.md, line {row.line}: {name} is {known}, not {value!r}"


def test_our_defaults_are_those_of_the_page() -> None:
    in_sb3 = "`cql_plugins.sb3`"
    check(settings(in_sb3, CONTINUOUS), of_signatures(CQL, CalQL), 50)
    check(settings(in_sb3, DISCRETE), of_signatures(DiscreteCQL, DiscreteCalQL), 4)
    named = {(name, value) for _, name, value in settings(in_sb3, CONTINUOUS)}
    assert {("cql_lagrange_threshold", None), ("backup_entropy", False)} <= named
    with pytest.raises(AssertionError, match="not 1"):
        check([(next(rows("migration.md")), "cql_alpha", 1)], of_signatures(CQL), 1)


def test_defaults_in_d3rlpy_are_those_of_the_page() -> None:
    pytest.importorskip("d3rlpy")
    import d3rlpy

    from cql_plugins.d3rlpy import CalQLConfig, CQLConfig, DiscreteCalQLConfig, DiscreteCQLConfig

    in_d3rlpy = "`cql_plugins.d3rlpy`"
    check(settings(in_d3rlpy, CONTINUOUS), of_configs(CQLConfig, CalQLConfig), 14)
    check(settings(in_d3rlpy, DISCRETE), of_configs(DiscreteCQLConfig, DiscreteCalQLConfig), 4)

    # And d3rlpy's own, where the release that the page names is installed.
    if d3rlpy.__version__ != "2.8.1":
        pytest.skip(f"the page is about d3rlpy 2.8.1, this is {d3rlpy.__version__}")
    algos = d3rlpy.algos
    theirs = {"`CQLConfig`": of_configs(algos.CQLConfig, algos.CalQLConfig), "discrete": of_configs(algos.DiscreteCQLConfig)}
    compared = 0
    for row in rows("migration.md"):
        defaults = next((own for word, own in theirs.items() if word in row.section and "d3rlpy" in row.cells), [])
        names, values = (re.findall(r"`([^`]+)`", row.cells.get(key, "")) for key in ("d3rlpy", "default there"))
        if defaults and len(names) == len(values):
            for name, value in zip(names, values, strict=True):
                assert all(own[name] == ast.literal_eval(value) for own in defaults), (
                    f"docs/migration.md, line {row.line}: {name}"
                )
                compared += 1
    assert compared >= 17


def test_gaps_of_a_flat_critic_are_those_of_the_page() -> None:
    found = [row.cells for row in rows("alpha.md") if "flat gap, N = 10" in row.cells]
    assert len(found) == 10
    for cells in found:
        gap = int(cells["action dimension"]) * math.log(2) + math.log(3 * 10)
        assert f"{gap:.1f}" == cells["flat gap, N = 10"], cells["task"]


# Rows that had no test elsewhere --------------------------------------------------------------------------------------


def test_every_critic_has_the_layers_that_were_asked_for() -> None:
    networks = {"pi": [4], "qf": [8, 7, 6, 5, 4]}
    model = CalQL("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": networks, "n_critics": 3})
    for critic in (model.critic, model.critic_target):
        sizes = [[layer.out_features for layer in q if isinstance(layer, th.nn.Linear)] for q in critic.q_networks]
        assert sizes == [[*networks["qf"], 1]] * 3


@pytest.mark.parametrize(("known", "rate"), [(1e6, 1.0), (-math.inf, 0.0)])
def test_the_bound_stays_on_online(known: float, rate: float) -> None:
    """In steps that `learn` does: returns far above Q bound every value of the policy's actions, unknown ones none."""

    class Known(CalQL):
        def sample_batch(self, batch_size: int) -> Any:
            batch = super().sample_batch(batch_size)
            return batch._replace(returns_to_go=th.full_like(batch.rewards, known))

    arguments: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "batch_size": 4, "buffer_size": 50, "learning_starts": 0}
    model = Known("MlpPolicy", "Pendulum-v1", cql_n_actions=2, seed=0, device="cpu", **arguments)
    model.learn(6)
    assert not model._is_offline_phase
    assert model._n_updates == 6
    assert model._metrics.pop()["bound_rate"] == rate


def test_a_success_on_the_way_is_no_failure() -> None:
    """An episode that was cut, reached its goal and left it again: the sum of what it got, not failure for ever."""
    rewards, cut = [-1.0, 0.0, -1.0], [0, 0, 1]
    left = returns_to_go(rewards, [0] * 3, cut, 0.5, "sparse", failure_reward=-1.0)
    assert left.tolist() == [-1.25, -0.5, -1.0]
    never = returns_to_go([-1.0] * 3, [0] * 3, cut, 0.5, "sparse", failure_reward=-1.0)
    assert never.tolist() == [-2.0] * 3


def test_the_example_has_d4rls_reward_for_the_door() -> None:
    """gymnasium-robotics adds 0.1 d for the distance d from hand to handle where D4RL subtracts it."""
    example = load_example("door_human")

    class Hand(gym.Env[Any, Any]):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation = np.arange(39.0)
            observation[35:38] = (3.0, 0.0, 4.0)  # distance 5
            return observation, 7.0 + 0.1 * 5.0, False, True, {}

    _, reward, terminated, truncated, _ = example.D4RLReward(Hand()).step(np.zeros(28))
    assert reward == pytest.approx(7.0 - 0.1 * 5.0)
    assert (terminated, truncated) == (False, True)
