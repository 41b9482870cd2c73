"""Checks a built wheel from outside the repository: python tests/check_wheel.py dist/<name>.whl

The wheel must hold every module of the source tree, its settings and nothing else, and each module must import from it. A
wheel that lost `cql_plugins.adapters` passes every test that runs in a checkout, which is why this unpacks the thing itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]

# Runs in a fresh interpreter, away from the checkout. `-I` keeps the working directory and PYTHONPATH out of sys.path;
# the unpacked wheel goes in front of the editable install, and the last lines prove that it was the one imported.
IMPORT_ALL = """
import importlib, pathlib, sys
target = pathlib.Path(sys.argv[1]).resolve()
sys.path.insert(0, str(target))
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    origin = pathlib.Path(module.__file__).resolve()
    if not origin.is_relative_to(target):
        sys.exit(f"{name} was imported from {origin}, not from the wheel")
"""


def expected_files() -> set[str]:
    """The paths, as a wheel writes them, of all modules, type markers and settings in the source tree."""
    found = set()
    for source, inside in (
        (REPO_ROOT / "cql_plugins", "cql_plugins"),
        (REPO_ROOT / "adapters", "cql_plugins/adapters"),
    ):
        for path in (path for kind in ("*.py", "py.typed", "*.yml") for path in source.rglob(kind)):
            relative = path.relative_to(source)
            # Whether rglob walks through the link depends on the Python version; its files come in the second turn.
            if source.name == "adapters" or relative.parts[0] != "adapters":
                found.add(f"{inside}/{relative.as_posix()}")
    return found


def module_name(path: str) -> str:
    """`cql_plugins/sb3/__init__.py` -> `cql_plugins.sb3`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def main(wheel: Path) -> None:
    """Exits with a message at the first difference or failing import."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        missing, surplus = expected_files() - files, files - expected_files()
        if missing or surplus:
            sys.exit(f"{wheel.name}: missing {sorted(missing)}, surplus {sorted(surplus)}")
        archive.extractall(scratch)
        modules = sorted(module_name(name) for name in files if name.endswith(".py"))
        subprocess.run([sys.executable, "-I", "-c", IMPORT_ALL, scratch, *modules], cwd=scratch, check=True)
    print(f"{wheel.name}: {len(modules)} modules, each imports from outside the repository")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
