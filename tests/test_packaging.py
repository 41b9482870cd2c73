"""What a user gets when they install or import the package, apart from what it computes."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cql_plugins


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def pyproject(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[str, str]:
    """Distribution name -> pinned version, from constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (repo_root / "constraints.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


class TestImportCost:
    """Each import loads only what its own room is made of."""

    HEAVY = frozenset(
        {"torch", "stable_baselines3", "sb3_contrib", "d3rlpy", "minari", "h5py", "pyarrow", "mujoco", "safetensors"}
    )

    @staticmethod
    def _of_the_host(host: str, tmp_path: Path) -> set[str]:
        """What comes with the host anyway: SB3 before 2.9 loads pandas, which loads pyarrow where there is one."""
        return loaded_by(f"import warnings; warnings.simplefilter('ignore'); import {host}", tmp_path)

    def test_root_loads_nothing_heavy(self, tmp_path: Path) -> None:
        loaded = loaded_by("import cql_plugins", tmp_path)
        assert not loaded & (self.HEAVY | {"numpy", "gymnasium"})

    def test_adapters_load_neither_learners_nor_formats(self, tmp_path: Path) -> None:
        assert not loaded_by("import cql_plugins.adapters", tmp_path) & self.HEAVY

    def test_sb3_room_loads_no_other_framework_and_no_format(self, tmp_path: Path) -> None:
        loaded = loaded_by("import cql_plugins.sb3", tmp_path)
        assert "stable_baselines3" in loaded, "the check sees what is loaded"
        assert not loaded & self.HEAVY - self._of_the_host("stable_baselines3", tmp_path)

    def test_d3rlpy_room_loads_no_other_framework(self, tmp_path: Path) -> None:
        pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
        loaded = loaded_by("import cql_plugins.d3rlpy", tmp_path)
        assert "d3rlpy" in loaded, "the check sees what is loaded"
        assert not loaded & {"stable_baselines3", "sb3_contrib", "minari", "pyarrow"} - self._of_the_host("d3rlpy", tmp_path)

    @pytest.mark.parametrize(("room", "absent"), [("d3rlpy", "stable_baselines3"), ("sb3", "d3rlpy")])
    def test_one_room_works_without_the_others_framework(self, room: str, absent: str, tmp_path: Path) -> None:
        pytest.importorskip(f"cql_plugins.{room}", exc_type=ImportError)
        hidden = f"import sys; sys.modules['{absent}'] = None"
        loaded_by(f"{hidden}\nimport cql_plugins.{room}, cql_plugins.adapters; cql_plugins.{room}.CalQL", tmp_path)

    @pytest.mark.parametrize(
        ("absent", "statement", "extra"),
        [
            ("d3rlpy", "import cql_plugins.d3rlpy", "d3rlpy"),
            ("sb3_contrib", "from cql_plugins.sb3 import CQLTQC", "contrib"),
            ("sb3_contrib", "from cql_plugins.sb3 import CalQLQRDQN", "contrib"),
        ],
    )
    def test_a_missing_host_is_named_with_the_line_that_installs_it(
        self, absent: str, statement: str, extra: str, tmp_path: Path
    ) -> None:
        code = f"import sys; sys.modules['{absent}'] = None\n{statement}"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert f'pip install "cql-plugins[{extra}]"' in done.stderr

    def test_rooms_import_where_no_extra_is_installed(self, tmp_path: Path) -> None:
        """What `pip install cql-plugins` alone must be able to import."""
        extras: tuple[str, ...] = (
            *("d3rlpy", "gym", "gymnasium_robotics", "h5py", "matplotlib", "minari", "mujoco", "pandas", "PIL"),
            *("pyarrow", "rich", "safetensors", "sb3_contrib", "tensorboard", "tqdm", "typer"),
        )
        brought = {Requirement(text).name for text in metadata.requires("stable-baselines3") or () if "extra ==" not in text}
        if "matplotlib" in brought:  # and pandas, before 2.9; those bring Pillow
            extras = tuple(extra for extra in extras if extra not in ("matplotlib", "pandas", "PIL"))
        hidden = f"import sys; sys.modules.update(dict.fromkeys({extras}))"  # None there makes an import fail
        loaded_by(f"{hidden}\nimport cql_plugins.adapters, cql_plugins.sb3\nfrom cql_plugins.sb3 import *", tmp_path)


class TestMetadata:
    def test_version_is_the_installed_one(self) -> None:
        assert cql_plugins.__version__ == metadata.version("cql-plugins")

    def test_changelog_has_a_place_for_changes(self, repo_root: Path) -> None:
        assert "## [Unreleased]" in (repo_root / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_every_package_on_disk_is_listed(self, pyproject: dict, repo_root: Path) -> None:
        on_disk = set()
        for source, name in (
            (repo_root / "cql_plugins", "cql_plugins"),
            (repo_root / "adapters", "cql_plugins.adapters"),
        ):
            for init in source.rglob("__init__.py"):
                inner = init.parent.relative_to(source).parts
                if source.name == "adapters" or inner[:1] != ("adapters",):
                    on_disk.add(".".join((name, *inner)))
        assert set(pyproject["tool"]["setuptools"]["packages"]) == on_disk

    def test_all_is_every_extra_but_those_for_development(self, pyproject: dict) -> None:
        extras = pyproject["project"]["optional-dependencies"]
        named = [extra for text in extras["all"] for extra in Requirement(text).extras]
        assert sorted(named) == sorted(extras.keys() - {"all", "dev", "docs"})

    def test_scripts_lead_to_functions(self, pyproject: dict) -> None:
        assert pyproject["project"]["scripts"], "the check sees them"
        for target in pyproject["project"]["scripts"].values():
            module, _, function = target.partition(":")
            assert callable(getattr(importlib.import_module(module), function))

    def test_constraints_pin_every_dependency_within_its_bounds(self, pyproject: dict, pins: dict[str, str]) -> None:
        project = pyproject["project"]
        groups = [project["dependencies"], *project["optional-dependencies"].values()]
        for requirement in map(Requirement, (text for group in groups for text in group)):
            if requirement.name == project["name"]:
                continue
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin.removeprefix("==")), f"{requirement} against {pin}"

    def test_constraints_are_exact_and_portable(self, pins: dict[str, str], repo_root: Path) -> None:
        assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", pin) for pin in pins.values()), "no local builds, no ranges"
        assert "://" not in (repo_root / "constraints.txt").read_text()


def test_nothing_that_training_leaves_behind_is_tracked(repo_root: Path) -> None:
    if not (repo_root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or no git")
    tracked = subprocess.run(["git", "ls-files"], cwd=repo_root, capture_output=True, text=True, check=True).stdout
    folders = {name.partition("/")[0] for name in tracked.splitlines() if "/" in name}
    assert folders == {".ci", "adapters", "benchmarks", "cql_plugins", "docs", "examples", "tests"}


class TestAdaptersFolder:
    """`adapters/` is reached through a link and through a build mapping, and must be the same modules either way."""

    def test_link_points_at_the_folder(self, repo_root: Path) -> None:
        link = repo_root / "cql_plugins" / "adapters"
        assert link.is_symlink(), "a checkout without symlinks cannot run the type and import checks"
        assert os.readlink(link) == os.path.join("..", "adapters")

    def test_imports_inside_are_absolute(self, repo_root: Path) -> None:
        """A relative import, or one of a top-level `adapters`, would make a second copy of each class."""
        for path in (repo_root / "adapters").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path.name)):
                if isinstance(node, ast.ImportFrom):
                    names = ["." * node.level + (node.module or "")]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                wrong = [name for name in names if name.partition(".")[0] in ("", "adapters")]
                assert not wrong, f"{path.name}:{node.lineno} imports {wrong[0]}"

    def test_wheel_check_finds_a_lost_folder(self, tmp_path: Path, repo_root: Path) -> None:
        """The wheel check itself: it must refuse a wheel without the adapters."""
        import zipfile

        wheel = tmp_path / "cql_plugins-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in (repo_root / "cql_plugins").glob("*.py"):
                archive.write(path, f"cql_plugins/{path.name}")
        command = [sys.executable, str(repo_root / "tests" / "check_wheel.py"), str(wheel)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "missing ['cql_plugins/adapters/" in done.stderr

    def test_wheel_check_knows_every_file(self, repo_root: Path) -> None:
        """A file of a new kind is in the wheel, and the check would take it for a stray one."""
        command = [sys.executable, "-c", "from check_wheel import expected_files; print(*expected_files(), sep='\\n')"]
        done = subprocess.run(command, cwd=repo_root / "tests", capture_output=True, text=True, check=True)
        here = {
            f"{'cql_plugins/' if folder == 'adapters' else ''}{path.relative_to(repo_root).as_posix()}"
            for folder in ("cql_plugins", "adapters")
            for path in (repo_root / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert here == set(done.stdout.split())
