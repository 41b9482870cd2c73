"""The documentation: its Python runs, its links lead somewhere, menu and reference are complete, tables are true."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins import sb3
from tests.documents import Block, marked, run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *PAGES]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "chain"),
    [pytest.param(page, *chain.values, id=f"{name_of(page)}-{chain.id}") for page in PAGES for chain in marked(page)],
)
def test_code_runs(page: Path, chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(chain, page)


# Links ----------------------------------------------------------------------------------------------------------------

CODE = re.compile(r"^[ \t]*(?P<fence>```+).*?^[ \t]*(?P=fence)[ \t]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)", re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?\)")
DOCUMENTED = re.compile(r"^::: (\S+)", re.MULTILINE)


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them; those they do not agree on are left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+[ \t]+(.+?)[ \t]*$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        github = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        if github == re.sub(r"-{2,}", "-", github).strip("-"):
            found.add(github)
    return found | set(DOCUMENTED.findall(text))


def broken_links(page: Path, text: str) -> list[str]:
    found = []
    for link in LINK.finditer(CODE.sub("", text)):
        if "://" in link["target"] or link["target"].startswith("mailto:"):
            continue
        target = (page.parent / link["target"]).resolve() if link["target"] else page
        leads = target.is_file() and target.is_relative_to(ROOT)  # MkDocs does not follow links to folders.
        if leads and link["anchor"] and link["anchor"] not in ("only-light", "only-dark"):  # the theme's words for pictures
            leads = link["anchor"] in slugs(text if target == page else target.read_text("utf-8"))
        if not leads:
            found.append(link[0])
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in LINKED])
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](docs/index.md) [b](docs/index.md#install) [c](https://example.org/x) [d](#a-heading)\n## A heading", 0),
        ("[a](docs/nowhere.md)", 1),
        ("[a](docs)", 1),
        ("[a](docs/index.md#nowhere)", 1),
        ("[a](#nowhere)", 1),
        ("[a](../outside.md)", 1),
        ("`x[0](nowhere)`\n```\n[a](nowhere)\n```\n", 0),
    ],
)
def test_the_check_of_links_tells_good_from_bad(text: str, broken: int) -> None:
    assert len(broken_links(ROOT / "README.md", text)) == broken


# The menu and the reference --------------------------------------------------------------------------------------------


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", menu, re.MULTILINE)
    assert len(listed) == len(set(listed))
    here = {page.relative_to(DOCS).as_posix() for page in PAGES}
    from_elsewhere = {"guide.md", "CHANGELOG.md", "benchmarks/README.md"}  # docs/_hooks.py brings them in
    assert set(listed) == here | from_elsewhere


def exported(room: str) -> set[str]:
    """The names in a room's `__all__`, installed or not, and those it has for an extra."""
    path = ROOT / "cql_plugins" / Path(*room.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        for part in ast.walk(node):
            if isinstance(part, ast.Assign | ast.AugAssign):
                target = part.targets[0] if isinstance(part, ast.Assign) else part.target
                if isinstance(target, ast.Name) and target.id in ("__all__", "_CONTRIB"):
                    names |= set(ast.literal_eval(part.value))
    return names


@pytest.mark.parametrize("room", ["sb3", "d3rlpy", "adapters", "plots"])
def test_every_exported_name_is_in_the_reference(room: str) -> None:
    text = (DOCS / "reference" / f"{room}.md").read_text("utf-8")
    names = exported(room)
    assert len(names) >= (1 if room == "plots" else 20)
    documented = DOCUMENTED.findall(text)
    assert len(documented) == len(set(documented))
    assert {f"cql_plugins.{room}.{name}" for name in names} <= set(documented)


def test_every_public_function_of_the_maths_is_in_the_reference() -> None:
    """Modules whole, but where a list of members chooses."""
    for room in ("losses", "returns"):
        assert DOCUMENTED.findall((DOCS / "reference" / f"{room}.md").read_text("utf-8")) == [f"cql_plugins.{room}"]
    page = (DOCS / "reference" / "ensembles.md").read_text("utf-8")
    members = re.search(r"members: \[(.*?)\]", page)
    assert members is not None
    assert exported("ensembles") - {"Precision", "PRECISIONS"} == set(members[1].split(", "))


# "Can I use?" ---------------------------------------------------------------------------------------------------------

SPACES: dict[str, Any] = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
    "Dict": spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,), np.float32), "b": spaces.Discrete(2)}),
}
CLASSES = {
    "cql": ["CQL"],
    "calql": ["CalQL"],
    "discrete_cql": ["DiscreteCQL"],
    "discrete_calql": ["DiscreteCalQL"],
    "cqlqrdqn": ["CQLQRDQN", "CalQLQRDQN"],
    "cqltqc": ["CQLTQC", "CalQLTQC"],
}


class Noise(gym.Env[Any, Any]):
    """Samples of its spaces, five steps an episode."""

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space, self.steps = observations, actions, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), 1.0, False, self.steps >= 5, {}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in CLASSES.items() for name in names])
def test_can_i_use_says_what_the_code_does(page: str, name: str) -> None:
    if name not in sb3.__all__:
        pytest.skip("sb3-contrib is not installed")
    algorithm = getattr(sb3, name)
    text = (DOCS / "algorithms" / f"{page}.md").read_text("utf-8")
    table = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| (yes|no) \| (yes|no) \|$", text, re.MULTILINE)}
    assert table.keys() == SPACES.keys()

    def build(observations: str, actions: str) -> Any:
        policy = "MultiInputPolicy" if observations == "Dict" else "MlpPolicy"
        options = {"batch_size": 4, "buffer_size": 40, "learning_starts": 0, "policy_kwargs": {"net_arch": [4]}}
        return algorithm(policy, Noise(SPACES[observations], SPACES[actions]), **options)

    takes = [actions for actions, (answer, _) in table.items() if answer == "yes"]
    assert len(takes) == 1
    for actions in table.keys() - takes:
        with pytest.raises(AssertionError, match="only supports"):
            build("Box", actions)
    for observations, (_, answer) in table.items():
        assert answer == "yes"
        log = build(observations, takes[0]).learn(7).replay_buffer
        build(observations, takes[0]).learn_offline(log, 1).learn(5)
    assert ("* gSDE: yes" in text) == ("use_sde" in inspect.signature(algorithm).parameters)
