"""`to_npz` and `to_d4rl`: what was written is read back, equal, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import DatasetError, OfflineDataset, from_d4rl, from_npz, to_d4rl, to_npz
from cql_plugins.adapters._steps import StepColumn

FORMATS: dict[str, tuple[Callable[..., None], Callable[..., OfflineDataset]]] = {
    "npz": (to_npz, from_npz),
    "hdf5": (to_d4rl, from_d4rl),
}


@pytest.fixture(params=FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == "hdf5":
        pytest.importorskip("h5py")
    return str(request.param)


def _back(dataset: OfflineDataset, path: Path) -> OfflineDataset:
    """Write, then read with the spaces that no file holds."""
    FORMATS[path.suffix[1:]][0](dataset, path)
    return _read(dataset, path)


def _read(dataset: OfflineDataset, path: Path) -> OfflineDataset:
    read = FORMATS[path.suffix[1:]][1]
    return read(path, observation_space=dataset.observation_space, action_space=dataset.action_space)


def _many(arguments: dict[str, Any], n_steps: int = 3000) -> OfflineDataset:
    """Rows for several blocks, none of them of the first one's size."""
    rng = np.random.default_rng(0)
    space = spaces.Box(-np.inf, np.inf, (60,), np.float64)
    ends = (np.arange(n_steps) % 7 == 6) | (np.arange(n_steps) == n_steps - 1)
    terminations = ends & (rng.random(n_steps) < 0.5)
    return OfflineDataset(
        observations=rng.normal(size=(n_steps + int(ends.sum()), 60)),
        actions=rng.uniform(-1, 1, size=(n_steps, 1)).astype(np.float32),
        rewards=rng.normal(size=n_steps).astype(np.float32),
        terminations=terminations,
        truncations=ends & ~terminations,
        observation_space=space,
        action_space=arguments["action_space"],
    )


class TestRoundTrip:
    def test_golden(self, golden: OfflineDataset, tmp_path: Path, suffix: str, assert_same: Any) -> None:
        back = _back(golden, tmp_path / f"data.{suffix}")
        assert_same(back, golden)
        assert back.name == "data"
        assert back.unflagged_episodes.tolist() == [False, False]

    def test_twin_that_differs(self, arguments: dict[str, Any], tmp_path: Path, suffix: str, assert_same: Any) -> None:
        """The last observation of the truncated episode: without next observations in the file it would be lost."""
        golden = OfflineDataset(**arguments)
        arguments["observations"][-1, 0] += 1
        with pytest.raises(AssertionError):
            assert_same(_back(OfflineDataset(**arguments), tmp_path / f"data.{suffix}"), golden)

    def test_several_blocks(self, arguments: dict[str, Any], tmp_path: Path, suffix: str, assert_same: Any) -> None:
        dataset = _many(arguments)
        shares: list[float] = []
        FORMATS[suffix][0](dataset, tmp_path / f"data.{suffix}", progress=shares.append)
        assert_same(_read(dataset, tmp_path / f"data.{suffix}"), dataset)
        assert len(shares) > 10
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    def test_everything_observations_can_be(
        self, arguments: dict[str, Any], tmp_path: Path, suffix: str, assert_same: Any, rng: np.random.Generator
    ) -> None:
        image = spaces.Box(0, 255, (4, 5, 3), np.uint8)
        space = spaces.Dict(
            {
                "room": spaces.Discrete(9, start=2),
                "in": spaces.Dict({"eye": image, "half": spaces.Box(-9, 9, (2,), np.float16)}),
                "a b.c": spaces.Box(-np.inf, np.inf, (1,), np.float64),
            }
        )
        arguments |= {
            "observation_space": space,
            "observations": {
                "room": np.arange(2, 9),
                "in": {"eye": rng.integers(0, 256, (7, 4, 5, 3), np.uint8), "half": np.ones((7, 2), np.float16)},
                "a b.c": rng.normal(size=(7, 1)),
            },
            "actions": np.array([0, 1, 2, 0, 1]),
            "action_space": spaces.Discrete(4),
        }
        dataset = OfflineDataset(**arguments)
        assert_same(_back(dataset, tmp_path / f"data.{suffix}"), dataset)

    def test_spaces_are_not_in_the_file(self, arguments: dict[str, Any], tmp_path: Path, suffix: str) -> None:
        arguments["action_space"] = spaces.Box(-0.5, 0.5, (1,), np.float32)
        write, read = FORMATS[suffix]
        write(OfflineDataset(**arguments), tmp_path / f"data.{suffix}")
        if suffix == "npz":
            with pytest.warns(UserWarning, match=r"inferred from the values: action_space Box\(-1.0, 1.0, \(1,\)"):
                back = read(tmp_path / f"data.{suffix}")
        else:
            back = read(tmp_path / f"data.{suffix}")
        assert back.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32)

    def test_stacked_frames_become_stacks(self, arguments: dict[str, Any], tmp_path: Path, suffix: str) -> None:
        frames = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
        arguments |= {"observations": frames, "observation_space": spaces.Box(0, 255, (2, 2, 1), np.uint8)}
        stacked = OfflineDataset(**arguments).stack_frames(3)
        back = _back(stacked, tmp_path / f"data.{suffix}")
        np.testing.assert_array_equal(back.observations, np.asarray(stacked.observations))
        assert back.observations.shape == (7, 2, 2, 3)

    def test_an_end_without_a_flag_is_stored_as_a_truncation(
        self, steps: dict[str, Any], tmp_path: Path, suffix: str, quietly: Any
    ) -> None:
        from cql_plugins.adapters import from_arrays

        steps["truncations"][-1] = False
        dataset = quietly(from_arrays, **steps)
        back = _back(dataset, tmp_path / f"data.{suffix}")
        assert dataset.unflagged_episodes.tolist() == [False, True]
        assert back.unflagged_episodes.tolist() == [False, False]
        assert back.truncations.tolist() == dataset.truncations.tolist()

    def test_from_mapped_files(self, arguments: dict[str, Any], tmp_path: Path, suffix: str, assert_same: Any) -> None:
        write, read = FORMATS[suffix]
        dataset = _many(arguments)
        given = {"observation_space": dataset.observation_space, "action_space": dataset.action_space}
        write(dataset, tmp_path / f"data.{suffix}")
        mapped = read(tmp_path / f"data.{suffix}", **given, storage="memmap", cache_dir=tmp_path / "cache")
        write(mapped, tmp_path / f"again.{suffix}")
        assert_same(read(tmp_path / f"again.{suffix}", **given), dataset)
        assert (tmp_path / f"again.{suffix}").read_bytes() == (tmp_path / f"data.{suffix}").read_bytes()


class TestFile:
    def test_bytes_do_not_depend_on_the_clock(
        self, golden: OfflineDataset, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, _ = FORMATS[suffix]
        write(golden, tmp_path / f"now.{suffix}")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 1e8)
        time.sleep(1.1)  # HDF5 has its own clock, of whole seconds
        write(golden, tmp_path / f"then.{suffix}")
        assert (tmp_path / f"now.{suffix}").read_bytes() == (tmp_path / f"then.{suffix}").read_bytes()
        write(golden[::-1], tmp_path / f"other.{suffix}")
        assert (tmp_path / f"now.{suffix}").read_bytes() != (tmp_path / f"other.{suffix}").read_bytes()

    def test_others_read_the_npz(self, golden: OfflineDataset, tmp_path: Path) -> None:
        to_npz(golden, tmp_path / "data.npz")
        with np.load(tmp_path / "data.npz", allow_pickle=False) as file:
            assert sorted(file) == [
                *("actions", "next_observations", "observations", "rewards", "terminations", "truncations"),
            ]
            assert file["next_observations"][:, 0].tolist() == [1, 2, 3, 101, 102]
        with zipfile.ZipFile(tmp_path / "data.npz") as archive:
            assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

    def test_others_read_the_hdf5(self, golden: OfflineDataset, tmp_path: Path) -> None:
        h5py = pytest.importorskip("h5py")
        to_d4rl(golden, tmp_path / "data.hdf5")
        with h5py.File(tmp_path / "data.hdf5") as file:
            assert sorted(file) == ["actions", "next_observations", "observations", "rewards", "terminals", "timeouts"]
            assert file["observations"][:, 0].tolist() == [0, 1, 2, 100, 101]
            assert file["timeouts"][()].tolist() == [False, False, False, False, True]
            assert file["terminals"][()].tolist() == [False, False, True, False, False]

    def test_taken_names(self, golden: OfflineDataset, tmp_path: Path, suffix: str, assert_same: Any) -> None:
        write, _ = FORMATS[suffix]
        path = tmp_path / f"data.{suffix}"
        path.write_bytes(b"mine")
        with pytest.raises(DatasetError, match=rf"data\.{suffix}: expected a name that is not taken.*overwrite=True"):
            write(golden, path)
        assert path.read_bytes() == b"mine"
        write(golden, path, overwrite=True)
        assert_same(_read(golden, path), golden)

    @pytest.mark.parametrize("links", [True, False])
    def test_names_taken_meanwhile(
        self, golden: OfflineDataset, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        """The file that was whole first stays, also on a file system without links."""
        write, path = FORMATS[suffix][0], tmp_path / f"data.{suffix}"

        def refuse(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "no links here")

        if not links:
            monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(DatasetError, match=rf"data\.{suffix}: expected a name that is not taken.*overwrite=True"):
            write(golden, path, progress=lambda share: path.write_bytes(b"theirs"))
        assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(path.name, b"theirs")]
        write(golden, tmp_path / f"other.{suffix}")
        assert sorted(one.name for one in tmp_path.iterdir()) == [path.name, f"other.{suffix}"]

    @pytest.mark.parametrize("key", ["a/b", "..", ""])
    def test_keys_that_are_no_names(self, arguments: dict[str, Any], tmp_path: Path, suffix: str, key: str) -> None:
        arguments["observation_space"] = spaces.Dict({"in": spaces.Dict({key: arguments["observation_space"]})})
        arguments["observations"] = {"in": {key: arguments["observations"]}}
        with pytest.raises(DatasetError, match=r"field 'observations/in': expected keys without slashes.*data_format=.arrow"):
            FORMATS[suffix][0](OfflineDataset(**arguments), tmp_path / f"data.{suffix}")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), DatasetError("broken")])
    @pytest.mark.parametrize("there", [False, True])
    def test_nothing_half_written(
        self,
        arguments: dict[str, Any],
        tmp_path: Path,
        suffix: str,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        there: bool,
    ) -> None:
        path = tmp_path / f"data.{suffix}"
        if there:
            path.write_bytes(b"old")

        def fail_half_way(self: StepColumn) -> Any:
            yield 0, self.block_rows, self.read(0, self.block_rows)
            raise error

        monkeypatch.setattr(StepColumn, "blocks", fail_half_way)
        with pytest.raises(type(error)):
            FORMATS[suffix][0](_many(arguments), path, overwrite=True)
        assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == ([(path.name, b"old")] if there else [])

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
    @pytest.mark.parametrize("limit", [2_000, 200_000, 2_000_000])
    def test_full_disk(self, tmp_path: Path, suffix: str, limit: int) -> None:
        """In a process of its own: HDF5 used to take it down at its end."""
        code = f"""
import resource, signal, sys
import numpy as np
from cql_plugins.adapters import from_arrays, to_d4rl, to_npz
rng = np.random.default_rng(0)
rows, ends = rng.normal(size=(3000, 60)), np.arange(3000) % 10 == 9
dataset = from_arrays(rows, np.tanh(rows), rows[:, 0], ends, ~ends & False, next_observations=rows + 1)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    {"to_npz" if suffix == "npz" else "to_d4rl"}(dataset, "data.{suffix}")
except OSError as error:
    print(error)
    sys.exit(7)
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (7, "")
        assert f"{os.strerror(errno.EFBIG)}: could not write data.{suffix}; nothing was left there" in done.stdout
        assert list(tmp_path.iterdir()) == []

    def test_h5py_missing(self, golden: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r"cql-plugins\[d4rl\]"):
            to_d4rl(golden, tmp_path / "data.hdf5")
        assert list(tmp_path.iterdir()) == []
