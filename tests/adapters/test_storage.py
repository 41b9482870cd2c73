"""`storage="memmap"`: column files written once, whole or not at all, and read back as they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import (
    DatasetError,
    OfflineDataset,
    StackedFrames,
    _storage,
    from_arrays,
    from_d4rl,
    from_minari,
    from_npz,
    to_d3rlpy,
    to_minari,
    to_sb3,
)
from cql_plugins.adapters._tree import is_mapped


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "cql-plugins" / "datasets"


def as_npz(folder: Path, steps: dict[str, Any], **changes: Any) -> Path:
    fields = {key: steps[key] for key in ("observations", "next_observations", "actions", "rewards")}
    fields |= {key: steps[key] for key in ("terminations", "truncations")}
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "log.npz", **fields | changes)
    return folder / "log.npz"


def as_hdf5(folder: Path, steps: dict[str, Any], **changes: Any) -> Path:
    names = {"terminations": "terminals", "truncations": "timeouts"}
    fields = {names.get(key, key): value for key, value in steps.items() if isinstance(value, np.ndarray)} | changes
    folder.mkdir(exist_ok=True)
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in fields.items():
            file.create_dataset(key, data=value, compression="gzip")
    return folder / "log.hdf5"


def minari_with(data_format: str = "hdf5") -> Any:
    """Minari, if it is installed and has what it stores with."""
    pytest.importorskip("h5py" if data_format == "hdf5" else "pyarrow")
    minari = pytest.importorskip("minari")
    from minari.dataset._storages import get_storage_keys

    if data_format not in get_storage_keys():
        pytest.skip(f"Minari {minari.__version__} has no storage {data_format}")
    return minari


def leaves(dataset: OfflineDataset) -> list[np.ndarray]:
    observations = dataset.observations
    trees = list(observations.values()) if isinstance(observations, dict) else [observations]
    return [*trees, dataset.actions, dataset.rewards, dataset.terminations, dataset.truncations]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


class TestSameAsInMemory:
    @pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
    def test_minari(self, arguments: dict[str, Any], cache: Path, data_format: str, assert_same: Any) -> None:
        if minari_with(data_format).__version__ == "0.5.3":
            pytest.skip("Minari 0.5.3 makes JPEGs of bytes")
        space = {"eye": spaces.Box(0, 255, (4, 5, 1), np.uint8), "room": spaces.Discrete(9), "x": spaces.Box(-9, 999, (2,))}
        eye = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 1), dtype=np.uint8)
        observations = {"eye": eye, "room": np.arange(7), "x": arguments["observations"]}
        dataset = OfflineDataset(**arguments | {"observations": observations, "observation_space": spaces.Dict(space)})
        to_minari(dataset, "made/rich-v0", data_format=data_format)
        mapped = from_minari("made/rich-v0", storage="memmap")
        assert_same(mapped, from_minari("made/rich-v0"))
        assert all(is_mapped(leaf) for leaf in leaves(mapped))
        assert not any(is_mapped(leaf) for leaf in leaves(from_minari("made/rich-v0")))
        assert (mapped.name, mapped.inferred_spaces) == ("made/rich-v0", frozenset())
        assert len(entries(cache)) == 1

    def test_npz(self, tmp_path: Path, steps: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        path = as_npz(tmp_path / "data", steps)
        spaces_of = {key: steps[key] for key in ("observation_space", "action_space")}
        mapped = from_npz(path, **spaces_of, storage="memmap", references=(0.0, 7.0))
        assert_same(mapped, golden)
        assert all(is_mapped(leaf) for leaf in leaves(mapped))
        assert (mapped.name, mapped.references) == ("log", (0.0, 7.0))

    def test_large_npz_is_unpacked_and_mapped(self, tmp_path: Path, assert_same: Any) -> None:
        n = 20_000
        rng = np.random.default_rng(0)
        fields = {
            "observations/x": rng.normal(size=(n, 3)),
            "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
            "rewards": rng.normal(size=n),
            "terminals": np.arange(n) % 100 == 99,
            "timeouts": np.zeros(n, bool),
        }
        np.savez(tmp_path / "large.npz", **fields)
        options: dict[str, Any] = {
            "observation_space": spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (3,), np.float64)}),
            "action_space": spaces.Box(-1, 1, (2,)),
        }
        assert_same(from_npz(tmp_path / "large.npz", storage="memmap", **options), from_npz(tmp_path / "large.npz", **options))

    @pytest.mark.parametrize("drop", [(), ("next_observations",), ("truncations",), ("next_observations", "truncations")])
    def test_d4rl(self, tmp_path: Path, steps: dict[str, Any], drop: tuple[str, ...], quietly: Any, assert_same: Any) -> None:
        path = as_hdf5(tmp_path / "data", {key: value for key, value in steps.items() if key not in drop})
        limit = 2 if len(drop) == 2 else None
        mapped, plain = (quietly(from_d4rl, path, max_episode_steps=limit, storage=s) for s in ("memmap", "memory"))
        assert_same(mapped, plain)
        assert mapped.inferred_spaces == {"observation_space", "action_space"}
        assert all(is_mapped(leaf) for leaf in leaves(mapped)[:2])

    def test_what_the_user_is_told_is_said_each_time(self, tmp_path: Path, steps: dict[str, Any]) -> None:
        del steps["next_observations"]
        path = as_hdf5(tmp_path / "data", steps)
        for storage in ("memory", "memmap", "memmap"):
            with pytest.warns(UserWarning, match=r"log\.hdf5: 1 transition\(s\) at the end of truncated") as caught:
                from_d4rl(path, storage=storage)
            assert Path(caught[0].filename) == Path(__file__)

    def test_stacked_from_files(self, arguments: dict[str, Any]) -> None:
        if minari_with().__version__ == "0.5.3":
            pytest.skip("Minari 0.5.3 makes JPEGs of bytes")
        frames = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1) * np.ones((1, 36, 37, 1), np.uint8)
        space = spaces.Box(0, 255, (36, 37, 1), np.uint8)
        to_minari(OfflineDataset(**arguments | {"observations": frames, "observation_space": space}), "made/film-v0")
        stacked = from_minari("made/film-v0", storage="memmap").stack_frames(2)
        assert isinstance(stacked.observations, StackedFrames)
        assert is_mapped(stacked.observations.frames)
        assert stacked.observations[:, 0, 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [0, 4], [4, 5], [5, 6]]
        assert is_mapped(stacked[1:].observations.frames)

    def test_trains_from_files(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        from cql_plugins.sb3 import CalQL

        dataset = quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap")
        model = CalQL.from_dataset(dataset, batch_size=4, cql_n_actions=2, device="cpu", policy_kwargs={"net_arch": [4]})
        model.learn_offline(dataset, gradient_steps=2)
        assert is_mapped(model.offline_buffer.observations._leaf)
        assert to_sb3(dataset, model).sample(3).observations.shape == (3, 2)

    def test_d3rlpy_shares_the_files(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        pytest.importorskip("cql_plugins.d3rlpy", exc_type=ImportError)
        buffer = to_d3rlpy(quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap"))
        assert is_mapped(buffer._observations)
        assert buffer.transition_batch(np.array([4])).next_observations.tolist() == [[102, 7]]

    def test_nothing_but_views_until_it_is_picked_apart(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        dataset = quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap")
        for part in (dataset[1:], dataset.scale_rewards(2.0), dataset[1:].stack_frames(2)):
            leaf = part.observations
            assert is_mapped(leaf.frames if isinstance(leaf, StackedFrames) else leaf)
        assert not is_mapped(dataset[[1, 0]].observations)


class TestReuse:
    @pytest.fixture
    def path(self, tmp_path: Path, steps: dict[str, Any]) -> Path:
        return as_npz(tmp_path / "data", steps)

    def _read(self, path: Path, quietly: Any, **options: Any) -> OfflineDataset:
        dataset: OfflineDataset = quietly(from_npz, path, storage="memmap", **options)
        return dataset

    def test_unchanged_source_is_not_read(
        self, path: Path, quietly: Any, monkeypatch: pytest.MonkeyPatch, assert_same: Any
    ) -> None:
        first = self._read(path, quietly)
        monkeypatch.setattr("cql_plugins.adapters.arrays._read_npz", lambda *_: pytest.fail("read again"))
        second = self._read(path, quietly, name="other")
        assert_same(second, first)
        assert (first.name, second.name) == ("log", "other")
        assert second.inferred_spaces == first.inferred_spaces

    def test_changed_source_is_read_again(self, path: Path, steps: dict[str, Any], quietly: Any, cache: Path) -> None:
        first = self._read(path, quietly)
        as_npz(path.parent, steps, rewards=np.arange(5.0))
        assert self._read(path, quietly).rewards.tolist() == [0, 1, 2, 3, 4]
        assert first.rewards.tolist() == [1, 2, 4, 8, 16]  # what is mapped stays as it was
        assert len(entries(cache)) == 1  # the old files are gone

    def test_only_its_time_changed(self, path: Path, quietly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read(path, quietly)
        os.utime(path, ns=(1, 1))
        monkeypatch.setattr("cql_plugins.adapters.arrays._read_npz", lambda *_: ({}, []))
        with pytest.raises(DatasetError, match="expected this field"):
            self._read(path, quietly)

    def test_options_have_entries_of_their_own(self, path: Path, quietly: Any, cache: Path) -> None:
        wide = self._read(path, quietly, action_space=spaces.Box(-2, 2, (1,)))
        wider = self._read(path, quietly, action_space=spaces.Box(-3, 3, (1,)))
        assert (wide.action_space.high.tolist(), wider.action_space.high.tolist()) == ([2], [3])
        assert len(entries(cache)) == 2
        assert self._read(path, quietly, action_space=spaces.Box(-2, 2, (1,))).action_space == wide.action_space

    def test_part_of_a_minari_dataset(self, golden: OfflineDataset, cache: Path) -> None:
        minari = minari_with()
        to_minari(golden, "made/up-v0")
        stored = minari.load_dataset("made/up-v0")
        part = from_minari(stored.filter_episodes(lambda episode: len(episode) < 3), storage="memmap")
        assert part.rewards.tolist() == [8, 16]
        assert from_minari(stored, storage="memmap").rewards.tolist() == [1, 2, 4, 8, 16]
        assert len(entries(cache)) == 2

    def test_changed_minari_dataset(self, golden: OfflineDataset) -> None:
        minari = minari_with()
        to_minari(golden, "made/up-v0")
        assert from_minari("made/up-v0", storage="memmap").rewards[0] == 1
        minari.delete_dataset("made/up-v0")
        to_minari(golden.scale_rewards(3.0), "made/up-v0")
        assert from_minari("made/up-v0", storage="memmap").rewards[0] == 3

    @pytest.mark.parametrize("damage", ["cut", "empty", "gone", "shape", "json", "format", "outside", "object"])
    def test_damaged_entry_is_written_again(self, path: Path, quietly: Any, cache: Path, damage: str, assert_same: Any) -> None:
        first = self._read(path, quietly)
        (folder,) = cache.iterdir()
        manifest = json.loads((folder / "manifest.json").read_text())
        column = folder / manifest["arrays"]["rewards"]["file"]
        if damage == "cut":
            shutil.copy(column, tmp := column.with_suffix(".tmp"))
            os.truncate(tmp, column.stat().st_size - 1)
            tmp.replace(column)
        elif damage == "empty":
            column.unlink()
            column.touch()
        elif damage == "gone":
            column.unlink()
        elif damage == "object":
            column.unlink()
            np.save(column, np.array([_Trap()] * 5, dtype=object), allow_pickle=True)
        elif damage == "shape":
            manifest["arrays"]["rewards"]["shape"] = [6]
        elif damage == "format":
            manifest["format"] = 0
        elif damage == "outside":
            manifest["arrays"]["rewards"]["file"] = f"../{folder.name}/{column.name}"
        text = "{" if damage == "json" else json.dumps(manifest)
        (folder / "manifest.json").write_text(text)
        assert_same(self._read(path, quietly), first)
        assert entries(cache) == [folder.name]
        assert json.loads((folder / "manifest.json").read_text())["format"] == 2


class _Trap:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("moment", ["allocate", "keep", "_write", "_put_in_place"])
    def test_failure_in_the_middle(
        self, tmp_path: Path, steps: dict[str, Any], cache: Path, moment: str, monkeypatch: pytest.MonkeyPatch, quietly: Any
    ) -> None:
        path = as_npz(tmp_path / "data", steps)
        owner = _storage.ColumnFiles if hasattr(_storage.ColumnFiles, moment) else _storage

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, fail)
            with pytest.raises(KeyboardInterrupt):
                quietly(from_npz, path, storage="memmap")
        assert entries(cache) == []
        assert len(quietly(from_npz, path, storage="memmap")) == 5

    def test_invalid_data_leaves_nothing(self, tmp_path: Path, steps: dict[str, Any], cache: Path, quietly: Any) -> None:
        path = as_npz(tmp_path / "data", steps, rewards=np.full(5, np.nan))
        with pytest.raises(DatasetError, match="field 'rewards', row 0: expected finite"):
            quietly(from_npz, path, storage="memmap")
        assert entries(cache) == []

    def test_killed_in_the_middle(self, tmp_path: Path, steps: dict[str, Any], cache: Path, quietly: Any) -> None:
        path = as_npz(tmp_path / "data", steps)
        code = (
            "import sys, time, warnings; warnings.simplefilter('ignore')\n"
            "from cql_plugins.adapters import _storage, from_npz\n"
            "_storage._write = lambda *_: (print('writing', flush=True), time.sleep(60))\n"
            "from_npz(sys.argv[1], storage='memmap')\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"writing\n"
            (left,) = cache.glob(".writing-*")
            assert list(left.glob("*.npy"))
            # While it lives its folder is not touched.
            assert len(quietly(from_npz, path, storage="memmap", name="mine")) == 5
            assert left.exists()
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        os.utime(path, ns=(1, 1))
        assert len(quietly(from_npz, path, storage="memmap")) == 5
        assert not list(cache.glob(".writing-*"))

    def test_of_two_at_once_the_second_takes_the_first_ones(
        self, tmp_path: Path, steps: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, quietly: Any
    ) -> None:
        path = as_npz(tmp_path / "data", steps)
        write, winners = _storage._write, []

        def overtaken(*args: Any) -> None:
            monkeypatch.setattr(_storage, "_write", write)
            quietly(from_npz, path, storage="memmap")
            winners.append(next(cache.glob("log*/manifest.json")).stat().st_ino)
            write(*args)

        monkeypatch.setattr(_storage, "_write", overtaken)
        assert len(quietly(from_npz, path, storage="memmap")) == 5
        (entry,) = cache.iterdir()
        assert [(entry / "manifest.json").stat().st_ino] == winners

    def test_two_processes(self, tmp_path: Path, steps: dict[str, Any], cache: Path) -> None:
        path = as_npz(tmp_path / "data", steps)
        code = (
            "import sys, time, warnings; warnings.simplefilter('ignore')\n"
            "from cql_plugins.adapters import from_npz\n"
            "time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
            "print(from_npz(sys.argv[1], storage='memmap').rewards.tolist())\n"
        )
        arguments = [sys.executable, "-c", code, str(path), str(time.time() + 2.0)]
        children = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [child.communicate()[0] for child in children] == ["[1.0, 2.0, 4.0, 8.0, 16.0]\n"] * 2
        assert len(entries(cache)) == 1

    @pytest.mark.parametrize("killed", [False, True])
    def test_two_processes_that_write_at_once(self, tmp_path: Path, steps: dict[str, Any], cache: Path, killed: bool) -> None:
        """Both have written all columns before either puts them in place; the second takes what the first one wrote.

        Where the first is killed at that moment the second puts its own in place, and what the first left goes.
        """
        path = as_npz(tmp_path / "data", steps)
        code = (
            "import os, sys, warnings; warnings.simplefilter('ignore')\n"
            "from cql_plugins.adapters import _storage, from_npz\n"
            "put, keep = _storage._put_in_place, {}\n"
            "def wait(folder, *rest):\n"
            "    keep['written'] = os.stat(folder / 'manifest.json').st_ino\n"
            "    print('written', flush=True); sys.stdin.readline(); put(folder, *rest)\n"
            "_storage._put_in_place = wait\n"
            "dataset = from_npz(sys.argv[1], storage='memmap')\n"
            "owner = dataset.rewards\n"
            "while not hasattr(owner, 'filename'): owner = owner.base\n"
            "entry = os.path.dirname(owner.filename)\n"
            "mapped = os.stat(os.path.join(entry, 'manifest.json')).st_ino\n"
            "print(dataset.rewards.tolist(), keep['written'], mapped, flush=True)\n"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            for _ in range(2)
        ]
        try:
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == "written\n"
            assert len(list(cache.glob(".writing-*"))) == 2
            if killed:
                children[0].send_signal(signal.SIGKILL)
                children[0].wait()
            said = [child.communicate("\n")[0].rsplit("] ") for child in children[killed:]]
        finally:
            for child in children:
                child.kill()
                child.communicate()
        assert [values for values, _ in said] == ["[1.0, 2.0, 4.0, 8.0, 16.0"] * len(said)
        written, mapped = zip(*(numbers.split() for _, numbers in said), strict=True)
        assert set(mapped) == {written[0]}  # the loser reads the winner's
        assert len(set(written)) == len(said)
        if killed:
            (left,) = cache.glob(".writing-*")
            os.utime(path, ns=(1, 1))
            code = "import sys; from cql_plugins.adapters import from_npz; from_npz(sys.argv[1], storage='memmap')"
            subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=True)
            assert not left.exists()
        assert len(entries(cache)) == 1

    def test_two_processes_read_one_minari_dataset(self, golden: OfflineDataset, cache: Path) -> None:
        pytest.importorskip("minari")
        pytest.importorskip("h5py")  # to_minari's own storage
        to_minari(golden, "made/up-v0")
        code = (
            "import sys; from cql_plugins.adapters import from_minari\n"
            "import minari; sys.stdin.readline()\n"
            "for storage in ('memory', 'memmap'): print(from_minari('made/up-v0', storage=storage).rewards.tolist())\n"
        )
        children = [
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        assert [child.communicate()[0] for child in children] == ["[1.0, 2.0, 4.0, 8.0, 16.0]\n" * 2] * 2
        assert len(entries(cache)) == 1

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved here")
    def test_disk_that_fills_while_an_archive_is_unpacked(self, tmp_path: Path, steps: dict[str, Any], cache: Path) -> None:
        """In a process of its own, since the limit stays."""
        steps |= {"observations": np.zeros((5, 10_000), np.float32), "next_observations": np.zeros((5, 10_000), np.float32)}
        code = f"""
import resource, sys
from cql_plugins.adapters import DatasetError, from_npz
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    from_npz({str(as_npz(tmp_path, steps))!r}, storage="memmap")
except DatasetError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert "expected room for 200,128 bytes" in done.stdout
        assert "File too large. Free some, or pass another cache_dir" in done.stdout
        assert list(cache.iterdir()) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="other rights")
    def test_entries_have_the_rights_of_new_folders(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        """Others may share the cache."""
        quietly(from_npz, as_npz(tmp_path, steps), storage="memmap", cache_dir=tmp_path / "shared")
        (tmp_path / "new").mkdir()
        (entry,) = (tmp_path / "shared").iterdir()
        assert entry.stat().st_mode == (tmp_path / "new").stat().st_mode

    def test_disk_full(self, tmp_path: Path, steps: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        path = as_hdf5(tmp_path / "data", steps)
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(DatasetError, match=r"log\.hdf5: expected room for 184 bytes in .*No space left.*cache_dir"):
            from_d4rl(path, storage="memmap")
        assert entries(cache) == []


class TestFolder:
    def test_read_only(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        dataset = quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap")
        for leaf in leaves(dataset):
            with pytest.raises(ValueError, match="read-only"):
                leaf[0] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                leaf.flags.writeable = True

    def test_given_folder(self, tmp_path: Path, steps: dict[str, Any], cache: Path, quietly: Any) -> None:
        quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap", cache_dir=tmp_path / "mine")
        assert len(entries(tmp_path / "mine")) == 1
        assert not cache.exists()
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["log.npz"]

    @pytest.mark.parametrize("configured", ["", "relative/folder"])
    def test_users_folder(self, tmp_path: Path, configured: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", configured)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert _storage.default_cache_dir() == tmp_path / ".cache" / "cql-plugins" / "datasets"

    def test_never_inside_the_source(self, golden: OfflineDataset, minari_home: Path) -> None:
        minari_with()
        to_minari(golden, "made/up-v0")
        with pytest.raises(DatasetError, match=r"made/up-v0: expected a cache outside the data set's own folder"):
            from_minari("made/up-v0", storage="memmap", cache_dir=minari_home / "made" / "up-v0" / "cache")

    def test_not_writable(self, tmp_path: Path, steps: dict[str, Any], quietly: Any) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DatasetError, match=r"log\.npz: expected a cache folder that can be written, got .*file"):
            quietly(from_npz, as_npz(tmp_path / "data", steps), storage="memmap", cache_dir=tmp_path / "file")

    @pytest.mark.parametrize("reader", [from_npz, from_d4rl, from_minari])
    def test_refused(self, reader: Callable[..., Any], golden: OfflineDataset, tmp_path: Path, steps: dict[str, Any]) -> None:
        if reader is from_minari:
            minari_with()
            to_minari(golden, "made/up-v0")
        source = {from_npz: as_npz, from_d4rl: as_hdf5}.get(reader, lambda *_: "made/up-v0")(tmp_path / "data", steps)
        with pytest.raises(ValueError, match="storage must be 'memory' or 'memmap', got 'disk'"):
            reader(source, storage="disk")
        with pytest.raises(ValueError, match="cache_dir is used with storage='memmap' only"):
            reader(source, cache_dir=tmp_path)

    def test_sources_that_are_no_files(self, steps: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="D4RL mapping: expected a file to keep in column files, got a mapping"):
            from_d4rl({"observations": steps["observations"]}, storage="memmap")
        for reader, end in ((from_npz, "npz"), (from_d4rl, "hdf5")):
            with pytest.raises(DatasetError, match="there is no such file"):
                reader(tmp_path / f"none.{end}", storage="memmap")
        with pytest.raises(TypeError, match="storage"):
            from_arrays(**steps, storage="memmap")
        (tmp_path / "cut.hdf5").write_bytes(as_hdf5(tmp_path / "data", steps).read_bytes()[:900])
        with pytest.raises(DatasetError, match="expected a complete HDF5 file"):
            from_d4rl(tmp_path / "cut.hdf5", storage="memmap")
