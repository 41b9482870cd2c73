"""What MkDocs and mkdocstrings need to be told beside mkdocs.yml.

As an MkDocs hook: pages link to files of the repository outside of ``docs/`` (the README, benchmarks, scripts) with the links
that work in a checkout. Those files become part of the site, and the links are bent to where they are there.

As an extension of Griffe (:class:`Roles`): docstrings name other objects in Sphinx's way, which Markdown does not know.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<head>\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<tail>\))")
RENAMED = {"README.md": "guide.md"}
"""Where files of the repository are in the site: beside ``docs/index.md`` MkDocs takes no README.md."""
ENTRIES = ("README.md", "CHANGELOG.md")
"""Pages of the site whoever links to them."""


def _in_site(path: str) -> str:
    """Where a file of the repository, named by its path there, is in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else RENAMED.get(path, path)


def _in_repository(uri: str) -> str:
    """Where a file of the site is in the repository."""
    path = next((path for path, renamed in RENAMED.items() if renamed == uri), uri)
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else path


def _target(link: re.Match[str], path: str) -> str | None:
    """The path in the repository that a link on a page there leads to; None for what is no file of it."""
    if "://" in link["target"]:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["target"]))
    return None if target.startswith("..") or not (ROOT / target).is_file() else target


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked outside of ``docs/``, and what is linked from there."""
    outside = list(ENTRIES)
    for page in files.documentation_pages():
        outside += _linked(f"docs/{page.src_uri}", known=outside)
    for path in outside:  # grows on the way
        outside += _linked(path, known=outside)
    for path in outside:
        files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    return files


def _linked(path: str, known: list[str]) -> list[str]:
    if not path.endswith(".md"):
        return []
    targets = (_target(link, path) for link in LINK.finditer((ROOT / path).read_text(encoding="utf-8")))
    return [target for target in dict.fromkeys(targets) if target and not target.startswith("docs/") and target not in known]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links between files of the repository to where they are in the site."""
    path = _in_repository(page.file.src_uri)

    def bend(link: re.Match[str]) -> str:
        target = _target(link, path)
        if target is None:
            return link[0]
        relative = posixpath.relpath(_in_site(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link['head']}{relative}{link['anchor'] or ''}{link['tail']}"

    return LINK.sub(bend, markdown)


class Roles(griffe.Extension):
    """Turns Sphinx's roles into links where the reference has the object, and into code where it has not."""

    ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
    LITERAL = re.compile(r"^::\n\n(?=    )", re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings of a package.

        Args:
            pkg: The package, loaded.
        """
        self._visit(pkg)

    def _visit(self, own: griffe.Object) -> None:
        if own.docstring is not None:
            text = self.LITERAL.sub("", own.docstring.value)
            own.docstring.value = self.ROLE.sub(lambda role: self._link(role, own), text)
        for member in own.members.values():
            if not member.is_alias:
                self._visit(member)

    @staticmethod
    def _link(role: re.Match[str], own: griffe.Object) -> str:
        name = role["name"]
        shown = name.rpartition(".")[2] if role["short"] else name
        head, dot, rest = name.partition(".")
        scope: Any = own
        while scope is not None and head not in scope.all_members:
            scope = scope.parent
        path = name if scope is None else scope.all_members[head].canonical_path + dot + rest
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
