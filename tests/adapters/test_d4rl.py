from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import DatasetError, OfflineDataset, d4rl, from_d4rl

h5py = pytest.importorskip("h5py")


@pytest.fixture
def fields(steps: dict[str, Any]) -> dict[str, Any]:
    """The golden steps under D4RL's names."""
    names = {"terminations": "terminals", "truncations": "timeouts"}
    wanted = ("observations", "next_observations", "actions", "rewards", *names)
    return {names.get(key, key): steps[key] for key in wanted}


def _write(path: Path, fields: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in fields.items():
            file.create_dataset(key, data=value, compression="gzip")
        file.create_dataset("infos/goal", data=np.zeros(3))
    return path


class TestFromD4rl:
    def test_with_next_observations(
        self, tmp_path: Path, fields: dict[str, Any], golden: OfflineDataset, assert_same: Any
    ) -> None:
        dataset = from_d4rl(_write(tmp_path / "hopper-medium-v2.hdf5", fields))
        assert_same(dataset, golden)
        assert dataset.name == "hopper-medium-v2"
        assert dataset.references == (-20.272305, 3234.3)
        assert dataset.inferred_spaces == {"observation_space", "action_space"}

    def test_without_next_observations(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        del fields["next_observations"]
        with pytest.warns(UserWarning, match=r"data\.hdf5: 1 transition\(s\) at the end of truncated"):
            dataset = from_d4rl(_write(tmp_path / "data.hdf5", fields))
        assert dataset.rewards.tolist() == [1, 2, 4, 8]
        assert dataset.truncations.tolist() == [False, False, False, True]

    def test_mapping(self, fields: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        dataset = from_d4rl(fields, name="door-human-v1", env_id="AdroitHandDoor-v1")
        assert_same(dataset, golden)
        assert (dataset.name, dataset.env_id) == ("door-human-v1", "AdroitHandDoor-v1")

    @pytest.mark.parametrize("storage", ["memory", "memmap"])
    def test_columns_of_one(
        self, tmp_path: Path, fields: dict[str, Any], golden: OfflineDataset, assert_same: Any, storage: Any
    ) -> None:
        """Such files are around; D4RL's own `get_dataset` takes them."""
        for field in ("rewards", "terminals", "timeouts"):
            fields[field] = np.asarray(fields[field])[:, None]
        where = {} if storage == "memory" else {"cache_dir": tmp_path / "cache"}
        assert_same(from_d4rl(_write(tmp_path / "data.hdf5", fields), storage=storage, **where), golden)
        fields["rewards"] = np.repeat(fields["rewards"], 2, axis=1)
        with pytest.raises(DatasetError, match="field 'rewards': expected rank 1"):
            from_d4rl(fields)

    def test_group_of_observations(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        for field in ("observations", "next_observations"):
            fields[f"{field}/state"] = fields.pop(field)
        dataset = from_d4rl(_write(tmp_path / "data.hdf5", fields))
        assert dataset.observations["state"].shape == (7, 2)

    def test_chunks_larger_than_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are kept unpacked while they are read by blocks: else reading them takes quadratic time."""
        values, path = np.zeros((1000, 6), np.float32), tmp_path / "data.hdf5"
        with h5py.File(path, "w") as file:
            file.create_dataset("observations", data=values, chunks=(1000, 2), compression="gzip")
            for field in ("actions", "rewards", "terminals"):
                file[field] = values[:, :1] if field == "actions" else values[:, 0]
            file["timeouts"] = np.arange(1000) % 10 == 9
        for cache, expected in ((10_000, values.nbytes), (50_000, 50_000)):
            monkeypatch.setattr(d4rl, "_CHUNK_CACHE", cache)
            with d4rl._open_hdf5(str(path), streaming=True) as (fields, _):
                assert fields["observations"].file.id.get_access_plist().get_cache()[2] == expected
                assert (fields["observations"][()] == values).all()
        monkeypatch.setattr(d4rl, "_CHUNK_CACHE", 10_000)
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(values.nbytes - 1))
        with pytest.raises(DatasetError, match="expected at most 23,999 bytes"), d4rl._open_hdf5(str(path), streaming=True):
            pass

    def test_spaces_given(self, fields: dict[str, Any]) -> None:
        space = spaces.Box(-2.0, 2.0, (1,), np.float32)
        assert from_d4rl(fields, action_space=space).action_space == space

    def test_actions_outside_the_convention_are_said(self, fields: dict[str, Any]) -> None:
        fields["actions"] = 4 * fields["actions"]
        with pytest.warns(UserWarning, match="inferred from the values: action_space"):
            dataset = from_d4rl(fields)
        assert dataset.action_space.low.tolist() == [-2.0]

    def test_unfinished_last_episode(self, fields: dict[str, Any]) -> None:
        del fields["next_observations"]
        fields["timeouts"][-1] = False
        with pytest.warns(UserWarning, match=r"1 episode\(s\) end with the record and no flag.*; 1 transition"):
            dataset = from_d4rl(fields)
        assert dataset.rewards.tolist() == [1, 2, 4, 8]


class TestWithoutTimeouts:
    """The first D4RL files do not say where a time limit ended an episode."""

    def test_observations_show_it(self, fields: dict[str, Any], golden: OfflineDataset, assert_same: Any) -> None:
        del fields["timeouts"]
        fields["terminals"][2] = False
        with pytest.warns(UserWarning, match="1 step.*without a flag.*split there"):
            dataset = from_d4rl(fields)
        assert dataset.offsets.tolist() == golden.offsets.tolist()
        assert dataset.truncations.tolist() == [False, False, True, False, True]

    def test_time_limit_given(self) -> None:
        values = np.arange(10, dtype=np.float32)
        terminals = np.zeros(10, bool)
        terminals[3] = True  # then rows 4 .. 6 and 7 .. 9 reach the limit
        fields = {"observations": values[:, None], "actions": 0 * values[:, None], "rewards": values, "terminals": terminals}
        with pytest.warns(UserWarning, match="3 transition"):
            dataset = from_d4rl(fields, max_episode_steps=3)
        assert [episode.observations[:, 0].tolist() for episode in dataset] == [[0, 1, 2], [3, 3], [4, 5, 6], [7, 8, 9]]
        assert dataset.terminations.tolist() == [False, False, True, False, False, False, False]

    @pytest.mark.parametrize("limit", [3, 10])
    def test_time_limit_given_beside_timeouts(self, limit: int) -> None:
        """They come first, filled in or not: what is then not done is said."""
        values = np.arange(11, dtype=np.float32)
        fields = {"observations": values[:, None], "actions": 0 * values[:, None], "rewards": values, "terminals": values < 0}
        with pytest.warns(UserWarning, match="1 transition") as caught:
            dataset = from_d4rl(fields | {"timeouts": values < 0}, max_episode_steps=limit)
        assert dataset.episode_lengths.tolist() == [10]
        said = "max_episode_steps=3 did not end an episode of 10 steps, since timeouts are given"
        assert (said in str(caught[0].message)) == (limit == 3)

    def test_time_limit_of_another_task(self) -> None:
        """An AntMaze file is none of Ant's."""
        values = np.zeros((2000, 1), np.float32)
        fields = {"observations": values, "actions": values, "rewards": values[:, 0], "terminals": values[:, 0]}
        with pytest.raises(DatasetError, match="Pass max_episode_steps"):
            from_d4rl(fields, name="Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse")

    def test_time_limit_known(self) -> None:
        values = np.zeros((2000, 1), np.float32)
        fields = {"observations": values, "actions": values, "rewards": values[:, 0], "terminals": values[:, 0]}
        with pytest.warns(UserWarning, match="2 transition"):
            assert from_d4rl(fields, name="hopper-medium-v0").episode_lengths.tolist() == [999, 999]

    def test_nothing_tells(self, fields: dict[str, Any]) -> None:
        del fields["timeouts"], fields["next_observations"]
        with pytest.raises(DatasetError, match=r"field 'timeouts': expected this field.* Pass max_episode_steps"):
            from_d4rl(fields)


class TestRefused:
    @pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminals"])
    def test_missing_key(self, tmp_path: Path, fields: dict[str, Any], field: str) -> None:
        del fields[field]
        with pytest.raises(DatasetError, match=rf"data\.hdf5, field '{field}': expected this field, got only \["):
            from_d4rl(_write(tmp_path / "data.hdf5", fields))

    def test_both_flags(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        fields["timeouts"][2] = True
        with pytest.raises(DatasetError, match=r"data\.hdf5, field 'timeouts', row 2: expected at most one of 'terminals'"):
            from_d4rl(_write(tmp_path / "data.hdf5", fields))
        assert from_d4rl(fields, prefer_termination=True).terminations[2]

    def test_not_a_number(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        fields["rewards"][3] = np.nan
        with pytest.raises(DatasetError, match=r"data\.hdf5, field 'rewards', row 3: expected finite") as caught:
            from_d4rl(_write(tmp_path / "data.hdf5", fields))
        assert (caught.value.field, caught.value.row) == ("rewards", 3)

    def test_lengths_disagree(self, fields: dict[str, Any]) -> None:
        with pytest.raises(DatasetError, match="D4RL mapping, field 'observations': expected 5 rows, got 4"):
            from_d4rl(fields | {"observations": fields["observations"][:4]})

    def test_file_absent(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"absent\.hdf5: expected an HDF5 file, there is no such file"):
            from_d4rl(tmp_path / "absent.hdf5")

    def test_file_cut_off_or_of_another_kind(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        content = _write(tmp_path / "whole.hdf5", fields).read_bytes()
        for name, part in {"cut": content[: len(content) // 2], "text": b"not HDF5", "empty": b""}.items():
            path = tmp_path / f"{name}.hdf5"
            path.write_bytes(part)
            with pytest.raises(DatasetError, match=rf"{name}\.hdf5.*expected a complete HDF5 file"):
                from_d4rl(path)

    def test_damaged_chunk_names_the_field(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        path = _write(tmp_path / "data.hdf5", fields)
        with h5py.File(path) as file:
            offset = file["actions"].id.get_chunk_info(0).byte_offset
        content = bytearray(path.read_bytes())
        content[offset : offset + 8] = b"\0" * 8
        path.write_bytes(bytes(content))
        with pytest.raises(DatasetError, match=r"data\.hdf5, field 'actions': expected a complete HDF5 file"):
            from_d4rl(path)

    def test_h5py_missing(self, tmp_path: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        path = _write(tmp_path / "data.hdf5", fields)
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r'pip install "cql-plugins\[d4rl\]"'):
            from_d4rl(path)
