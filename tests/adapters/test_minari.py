from __future__ import annotations

import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from cql_plugins import _files
from cql_plugins.adapters import DatasetError, OfflineDataset, from_minari, to_minari

minari = pytest.importorskip("minari")

STORAGES = ["hdf5", "arrow", "parquet"]


def _episode(start: float, n_steps: int, *, n_observations: int | None = None, end: str = "x") -> dict[str, Any]:
    """One episode whose observations count up from `start`; `end` is one letter per step from the end, as in "t" or "x"."""
    n_observations = n_steps + 1 if n_observations is None else n_observations
    letters = ("." * n_steps + end)[-n_steps:]
    return {
        "observations": start + np.arange(n_observations, dtype=np.float64)[:, None],
        "actions": np.full((n_steps, 1), 0.5, np.float32),
        "rewards": start + np.arange(n_steps, dtype=np.float64),
        "terminations": np.array([letter in "tb" for letter in letters]),
        "truncations": np.array([letter in "xb" for letter in letters]),
    }


@pytest.fixture(autouse=True)
def storage_library(request: pytest.FixtureRequest) -> Any:
    """What Minari stores with: HDF5 where a test does not name another. Without it the test is skipped."""
    from minari.dataset._storages import get_storage_keys

    named = getattr(request.node, "callspec", None)
    data_format = named.params.get("data_format", "hdf5") if named else "hdf5"
    if data_format not in get_storage_keys():
        pytest.skip(f"Minari {minari.__version__} has no storage {data_format}")
    return pytest.importorskip("h5py" if data_format == "hdf5" else "pyarrow")


@pytest.fixture
def store() -> Callable[..., Any]:
    """Write episodes with Minari itself."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    def write(*episodes: dict[str, Any], data_format: str = "hdf5", env: Any = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return minari.create_dataset_from_buffers(
                "made/up-v0",
                [EpisodeBuffer(**episode) for episode in episodes],
                env=env,
                observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float64),
                action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
                data_format=data_format,
            )

    return write


class TestFromMinari:
    @pytest.mark.parametrize("data_format", STORAGES)
    def test_storages(self, store: Callable[..., Any], data_format: str) -> None:
        store(_episode(0, 3, end="t"), _episode(10, 2), data_format=data_format)
        dataset = from_minari("made/up-v0")
        assert dataset.observations[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12]
        assert dataset.observations.dtype == np.float64
        assert dataset.actions.dtype == np.float32
        assert dataset.rewards.tolist() == [0, 1, 2, 10, 11]
        assert dataset.terminations.tolist() == [False, False, True, False, False]
        assert dataset.truncations.tolist() == [False, False, False, False, True]
        assert dataset.transitions([2, 3]).next_observations[:, 0].tolist() == [3, 11]
        assert (dataset.name, dataset.env_id, dataset.references) == ("made/up-v0", None, None)
        assert dataset.inferred_spaces == frozenset()

    def test_dataset_object_and_a_part_of_it(self, store: Callable[..., Any]) -> None:
        stored = store(_episode(0, 3), _episode(10, 2), _episode(20, 1))
        assert len(from_minari(stored)) == 6
        part = from_minari(stored.filter_episodes(lambda episode: len(episode) < 3))
        assert part.rewards.tolist() == [10, 11, 20]

    @pytest.mark.parametrize("data_format", STORAGES)
    def test_folder_wherever_it_lies(
        self, store: Callable[..., Any], minari_home: Path, tmp_path: Path, assert_same: Any, data_format: str
    ) -> None:
        store(_episode(0, 3, end="t"), _episode(10, 2), data_format=data_format)
        expected = from_minari("made/up-v0")
        (minari_home / "made" / "up-v0").rename(tmp_path / "any name.at all")
        found = from_minari(tmp_path / "any name.at all")
        assert_same(found, expected)
        assert found.name == "made/up-v0"
        with pytest.raises(DatasetError, match=r"nowhere: expected the JSON file metadata.json, there is no such file"):
            from_minari(tmp_path / "nowhere")
        metadata = tmp_path / "any name.at all" / "data" / "metadata.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"observation_space": None}))
        with pytest.raises(DatasetError, match="Without one Minari builds the environment that the file names"):
            from_minari(tmp_path / "any name.at all")

    @pytest.mark.parametrize("data_format", STORAGES)
    def test_episode_longer_than_a_batch_of_rows(self, store: Callable[..., Any], data_format: str) -> None:
        """Minari's reader takes the batches of 32,768 (Arrow) or 131,072 rows (Parquet) for episodes."""
        store(_episode(0, 140_000, end="t"), _episode(1e6, 3), _episode(2e6, 4, end="t"), data_format=data_format)
        dataset = from_minari("made/up-v0")
        assert dataset.episode_lengths.tolist() == [140_000, 3, 4]
        np.testing.assert_array_equal(dataset.rewards[:140_000], np.arange(140_000))
        assert dataset.rewards[140_000:].tolist() == [1e6, 1e6 + 1, 1e6 + 2, 2e6, 2e6 + 1, 2e6 + 2, 2e6 + 3]
        assert np.flatnonzero(dataset.terminations).tolist() == [139_999, 140_006]
        assert np.flatnonzero(dataset.truncations).tolist() == [140_002]

    @pytest.mark.parametrize("data_format", STORAGES[1:])
    def test_several_batches_and_files(self, store: Callable[..., Any], minari_home: Path, data_format: str) -> None:
        store(_episode(0, 4, end="t"), _episode(10, 2), data_format=data_format)
        expected = from_minari("made/up-v0").observations[:, 0].tolist()
        (path,) = (minari_home / "made/up-v0/data/0").glob(f"*.{data_format}")
        pa, dataset = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.dataset")
        rows = dataset.dataset(str(path), format=data_format).to_table()
        path.unlink()
        for name, part in (("a", rows[:1]), ("b", rows[1:])):
            if data_format == "arrow":
                with pa.ipc.new_file(str(path.with_stem(name)), part.schema) as file:
                    file.write_table(part, max_chunksize=2)
                    file.write_table(part[:0])
            else:
                pytest.importorskip("pyarrow.parquet").write_table(part, path.with_stem(name), row_group_size=2)
        assert from_minari("made/up-v0").observations[:, 0].tolist() == expected

    @pytest.mark.parametrize(
        "values",
        [
            np.zeros((4, 0)),
            np.zeros(4, complex),
            np.zeros(4, [("a", "f4"), ("b", "i4")]),
            np.zeros(4, ">f8"),
            ["a", "b", "c", "d"],
        ],
        ids=["no entries", "complex", "compound", "other order", "text"],
    )
    def test_infos_of_any_kind(self, store: Callable[..., Any], values: Any) -> None:
        """They are not used."""
        store(_episode(0, 3) | {"infos": {"deep": {"x": values}}})
        assert len(from_minari("made/up-v0")) == 3

    def test_environment_id(self, store: Callable[..., Any]) -> None:
        store(_episode(0, 3), env=gym.make("Pendulum-v1"))
        assert from_minari("made/up-v0").env_id == "Pendulum-v1"

    def test_references_of_the_metadata_come_first(self, store: Callable[..., Any]) -> None:
        stored = store(_episode(0, 3))
        stored.storage.update_metadata({"ref_min_score": 1.0, "ref_max_score": 2})
        assert from_minari(stored, name="hopper-medium-v2").references == (1.0, 2.0)
        assert from_minari(stored, references=(0.0, 5.0)).references == (0.0, 5.0)

    @pytest.mark.parametrize("data_format", STORAGES)
    def test_neither_flag(self, store: Callable[..., Any], data_format: str) -> None:
        store(_episode(0, 3, end="."), _episode(10, 2, end="t"), data_format=data_format)
        with pytest.warns(UserWarning, match=r"made/up-v0: 1 episode\(s\) end with neither flag, taken as trunc") as w:
            dataset = from_minari("made/up-v0")
        assert Path(w[0].filename) == Path(__file__)
        assert dataset.truncations.tolist() == [False, False, True, False, False]
        assert dataset.unflagged_episodes.tolist() == [True, False]
        assert len(dataset) == 5

    def test_last_observation_missing(self, store: Callable[..., Any]) -> None:
        store(
            _episode(0, 3, n_observations=3),
            _episode(10, 2, n_observations=2, end="t"),
            _episode(20, 1, n_observations=1),
            _episode(30, 1),
        )
        with pytest.warns(UserWarning, match=r"2 transition\(s\) at the end of truncated episodes were dropped"):
            dataset = from_minari("made/up-v0")
        assert [episode.observations[:, 0].tolist() for episode in dataset] == [[0, 1, 2], [10, 11, 11], [30, 31]]
        assert dataset.truncations.tolist() == [False, True, False, False, True]
        assert dataset.terminations.tolist() == [False, False, False, True, False]

    def test_flag_inside_an_episode(self, store: Callable[..., Any]) -> None:
        store(_episode(0, 4, end="t.x."), _episode(10, 2))
        with pytest.warns(UserWarning, match=r"1 episode\(s\) end with neither flag.*; 2 flag\(s\) inside an episode"):
            dataset = from_minari("made/up-v0")
        pieces = [episode.observations[:, 0].tolist() for episode in dataset]
        assert pieces == [[0, 1], [1, 2, 3], [3, 4], [10, 11, 12]]
        assert dataset.terminations.tolist() == [True, False, False, False, False, False]
        assert dataset.truncations.tolist() == [False, False, True, True, False, True]
        assert dataset.unflagged_episodes.tolist() == [False, False, True, False]

    def test_many_splits_outgrow_the_estimate(self, store: Callable[..., Any]) -> None:
        store(_episode(0, 50, end="t" * 50))
        with pytest.warns(UserWarning, match="49 flag"):
            dataset = from_minari("made/up-v0")
        assert dataset.n_episodes == 50
        assert dataset.transitions(np.arange(50)).next_observations[:, 0].tolist() == list(range(1, 51))

    def test_metadata_that_miscounts(self, store: Callable[..., Any]) -> None:
        stored = store(_episode(0, 3))
        stored.storage.update_metadata({"total_steps": 8})
        with pytest.warns(UserWarning, match="the metadata counts 8 steps, the episodes hold 3"):
            assert len(from_minari("made/up-v0")) == 3

    def test_both_flags(self, store: Callable[..., Any]) -> None:
        store(_episode(0, 2), _episode(0, 3, end="b"))
        with pytest.raises(DatasetError, match="made/up-v0, field 'truncations', episode 1, row 2: expected at most one"):
            from_minari("made/up-v0")
        assert from_minari("made/up-v0", prefer_termination=True).terminations[-1]


class TestRefused:
    def test_id_not_on_disk(self) -> None:
        with pytest.raises(DatasetError, match=r"D4RL/door/human-v2: expected .*`minari download D4RL/door/human-v2`"):
            from_minari("D4RL/door/human-v2")

    def test_download_is_left_to_minari(self, store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def download_dataset(dataset_id: str) -> None:
            calls.append(dataset_id)
            store(_episode(0, 3))

        monkeypatch.setattr(minari, "download_dataset", download_dataset)
        assert len(from_minari("made/up-v0", download=True)) == 3
        assert len(from_minari("made/up-v0", download=True)) == 3
        assert calls == ["made/up-v0"]

    def test_not_a_number(self, store: Callable[..., Any]) -> None:
        spoiled = _episode(0, 3)
        spoiled["observations"][2] = np.nan
        store(_episode(0, 3), spoiled)
        with pytest.raises(DatasetError, match="made/up-v0, field 'observations', episode 1, row 2: expected finite"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize(("field", "length"), [("actions", 2), ("terminations", 5), ("observations", 2)])
    def test_lengths_disagree(self, store: Callable[..., Any], field: str, length: int) -> None:
        spoiled = _episode(0, 3)
        spoiled[field] = np.resize(spoiled[field], (length, *spoiled[field].shape[1:]))
        store(_episode(0, 2), spoiled)
        with pytest.raises(DatasetError, match=f"field '{field}', episode 1: expected . rows, got {length}"):
            from_minari("made/up-v0")

    def test_empty_episode(self, store: Callable[..., Any], minari_home: Path, storage_library: Any) -> None:
        store(_episode(0, 2), _episode(0, 1))
        with storage_library.File(minari_home / "made/up-v0/data/main_data.hdf5", "a") as file:
            for field in ("rewards", "actions", "terminations", "truncations"):
                file[f"episode_1/{field}"].resize(0, axis=0)
        with pytest.raises(DatasetError, match="field 'rewards', episode 1: expected at least one step, got an empty ep"):
            from_minari("made/up-v0")

    def test_missing_key(self, store: Callable[..., Any], minari_home: Path, storage_library: Any) -> None:
        store(_episode(0, 2), _episode(0, 1))
        with storage_library.File(minari_home / "made/up-v0/data/main_data.hdf5", "a") as file:
            del file["episode_1/rewards"]
        with pytest.raises(DatasetError, match=r"made/up-v0, episode 1: Minari cannot read this episode .*rewards"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize("content", [b"", b"not HDF5", None])
    def test_file_cut_off_or_of_another_kind(self, store: Callable[..., Any], minari_home: Path, content: bytes | None) -> None:
        store(_episode(0, 2))
        path = minari_home / "made/up-v0/data/main_data.hdf5"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(DatasetError, match=r"made/up-v0, episode 0: Minari cannot read .* may be cut off"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
    def test_metadata_lost(self, store: Callable[..., Any], minari_home: Path, damage: Callable[[Path], Any]) -> None:
        store(_episode(0, 2))
        damage(minari_home / "made/up-v0/data/metadata.json")
        with pytest.raises(DatasetError, match=r"made/up-v0: expected .* metadata\.json"):
            from_minari("made/up-v0")

    def test_episodes_lost(self, store: Callable[..., Any]) -> None:
        stored = store(_episode(0, 2))
        stored.storage.update_metadata({"total_episodes": 2})
        with pytest.raises(DatasetError, match="episode 1: Minari cannot read"):
            from_minari("made/up-v0")

    def test_nothing_usable(self, store: Callable[..., Any]) -> None:
        store(_episode(0, 1, n_observations=1))
        with pytest.raises(DatasetError, match="at least one usable transition"):
            from_minari("made/up-v0")

    def test_dtype_that_changes(self, store: Callable[..., Any]) -> None:
        single = _episode(0, 3)
        single["observations"] = single["observations"].astype(np.float32)
        store(_episode(0, 2), single)
        with pytest.raises(DatasetError, match="'observations', episode 1: expected dtype float64 as in the first"):
            from_minari("made/up-v0")

    def test_file_that_is_being_written(self, store: Callable[..., Any], minari_home: Path, storage_library: Any) -> None:
        store(_episode(0, 2))
        path = minari_home / "made/up-v0/data/main_data.hdf5"
        code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'a'); print('open', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            try:
                from_minari("made/up-v0")
            except DatasetError as error:
                assert re.search("episode 0: another process writes this file.* Read it when that is done", str(error))  # noqa: PT017
            else:
                pytest.skip("files are not locked here")
            finally:
                writer.communicate()
        assert len(from_minari("made/up-v0")) == 2

    def test_minari_missing(self, monkeypatch: pytest.MonkeyPatch, golden: OfflineDataset) -> None:
        monkeypatch.setitem(sys.modules, "minari", None)
        for call in (lambda: from_minari("made/up-v0"), lambda: to_minari(golden, "made/up-v0")):
            with pytest.raises(ImportError, match=r'pip install "cql-plugins\[minari\]"'):
                call()


def _rich() -> OfflineDataset:
    """Nested dict observations with an image that JPEG would spoil, and discrete actions."""
    rng = np.random.default_rng(0)
    space = spaces.Dict(
        {
            "state": spaces.Dict({"room": spaces.Discrete(4), "speed": spaces.Box(-9, 9, (2,), np.float32)}),
            "image": spaces.Box(0, 255, (32, 40, 3), np.uint8),
        }
    )
    return OfflineDataset(
        {
            "image": rng.integers(0, 256, (7, 32, 40, 3), dtype=np.uint8),
            "state": {"speed": rng.normal(size=(7, 2)).astype(np.float32), "room": rng.integers(0, 4, 7)},
        },
        np.array([0, 2, 1, 0, 2]),
        rng.normal(size=5),
        [False, True, False, False, False],
        [False, False, False, False, True],
        observation_space=space,
        action_space=spaces.Discrete(3),
        references=(-3.0, 4.0),
        env_id="CartPole-v1",
    )


class TestToMinari:
    @pytest.mark.parametrize("data_format", STORAGES)
    def test_round_trip(self, golden: OfflineDataset, assert_same: Any, data_format: str) -> None:
        golden.to_minari("deep/er/golden-v3", data_format=data_format)
        back = from_minari("deep/er/golden-v3")
        assert_same(back, golden)
        assert (back.name, back.env_id, back.references) == ("deep/er/golden-v3", None, None)

    @pytest.mark.parametrize("data_format", STORAGES)
    def test_round_trip_of_everything(self, assert_same: Any, data_format: str) -> None:
        if minari.__version__ == "0.5.3":
            pytest.skip("Minari 0.5.3 makes JPEGs of bytes")
        dataset = _rich()
        to_minari(dataset, "rich-v0", data_format=data_format)
        back = from_minari("rich-v0")
        assert_same(back, dataset)
        assert (back.env_id, back.references) == ("CartPole-v1", (-3.0, 4.0))

    def test_progress(self, golden: OfflineDataset) -> None:
        shares: list[float] = []
        to_minari(golden, "golden-v0", progress=shares.append)
        assert shares == [0.6, 1.0]

    def test_twin_that_differs(self, golden: OfflineDataset, assert_same: Any) -> None:
        to_minari(golden.scale_rewards(1.0, 1e-12), "golden-v0")
        with pytest.raises(AssertionError):
            assert_same(from_minari("golden-v0"), golden)

    def test_scaled_rewards(self, arguments: dict[str, Any], minari_home: Path) -> None:
        """The references are of other rewards; what was done to these comes back."""
        original = OfflineDataset(**arguments | {"references": (0.0, 10.0)})
        scaled = original.scale_rewards(10, -5)
        joined = OfflineDataset.concatenate([original, scaled])
        for name, dataset in (("scaled", scaled), ("joined", joined)):
            with pytest.warns(UserWarning, match="rewards are stored as they are now, after scale_rewards") as caught:
                to_minari(dataset, f"{name}-v0")
            assert Path(caught[0].filename) == Path(__file__)
            metadata = json.loads((minari_home / f"{name}-v0/data/metadata.json").read_text())
            assert not metadata.keys() & {"ref_min_score", "ref_max_score"}
            np.testing.assert_array_equal(from_minari(f"{name}-v0").rewards, dataset.rewards)
        assert from_minari("scaled-v0").references is None
        back = from_minari("scaled-v0", references=(0.0, 10.0))
        np.testing.assert_allclose(back.normalized_score(), original.normalized_score())
        with pytest.raises(DatasetError, match="differently scaled"):
            from_minari("joined-v0", references=(0.0, 10.0)).normalized_score()
        to_minari(original.scale_rewards(np.float32(2))._replaced(references=None), "narrow-v0")
        assert from_minari("narrow-v0")._reward_transform == (2.0, 0.0)
        to_minari(OfflineDataset(**arguments)._replaced(reward_transform=(np.inf, 0.0)), "endless-v0")
        assert from_minari("endless-v0")._reward_transform is None
        to_minari(scaled.scale_rewards(0.1, 0.5), "undone-v0")
        assert from_minari("undone-v0").references == (0.0, 10.0)

    @pytest.mark.parametrize("stored", [1.0, [1.0], [0.0, 1.0], [1.0, None], [True, 1.0], "ab", [float("nan"), 0.0], {}])
    def test_transform_that_cannot_be(self, golden: OfflineDataset, minari_home: Path, stored: Any) -> None:
        to_minari(golden, "golden-v0")
        path = minari_home / "golden-v0/data/metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cql_plugins_reward_transform": stored}))
        with pytest.raises(DatasetError, match="expected a scale and a shift in the metadata"):
            from_minari("golden-v0")

    def test_metadata(self, golden: OfflineDataset, minari_home: Path) -> None:
        stored = to_minari(golden, "golden-v0", author="A. Name", description="Two episodes", algorithm_name="by hand")
        metadata = json.loads((minari_home / "golden-v0/data/metadata.json").read_text())
        assert (metadata["author"], metadata["description"]) == (["A. Name"], "Two episodes")
        assert stored.total_steps == 5
        assert list(minari.list_local_datasets()) == ["golden-v0"]

    def test_narrower_values_take_the_dtype_of_the_space(self, arguments: dict[str, Any]) -> None:
        pytest.importorskip("pyarrow")
        arguments["observation_space"] = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        to_minari(OfflineDataset(**arguments), "golden-v0", data_format="arrow")
        assert from_minari("golden-v0").observations.dtype == np.float64

    @pytest.mark.parametrize("data_format", STORAGES)
    def test_keys_with_slashes(self, arguments: dict[str, Any], minari_home: Path, assert_same: Any, data_format: str) -> None:
        leaf = spaces.Box(-9, 9, (2,), np.float32)
        space = spaces.Dict({"goal": spaces.Dict({"kettle": leaf, "light": leaf}), "x": leaf})
        rows = np.arange(14, dtype=np.float32).reshape(7, 2) / 2
        seen = {"goal": {"kettle": rows, "light": -rows}, "x": rows}
        nested = OfflineDataset(**arguments | {"observations": seen, "observation_space": space})
        flat = nested.flatten_observations()
        if data_format == "hdf5":
            message = r"""'observations': expected keys .*, got 'goal/kettle'\. Store it with data_format="arrow" or "parq"""
            with pytest.raises(DatasetError, match=message):
                to_minari(flat, "deep/flat-v0")
            assert list(minari_home.iterdir()) == []
        else:
            to_minari(flat, "deep/flat-v0", data_format=data_format)
            assert_same(from_minari("deep/flat-v0"), flat)
        to_minari(nested, "deep/nested-v0", data_format=data_format)
        assert_same(from_minari("deep/nested-v0"), nested)

    @pytest.mark.parametrize("key", ["", ".", "..", "a\0b", "/"])
    def test_keys_that_hdf5_takes_for_paths(self, arguments: dict[str, Any], minari_home: Path, key: str) -> None:
        leaf = spaces.Box(-9, 9, (1,), np.float32)
        seen = {"in": {key: np.zeros((7, 1), np.float32)}}
        space = spaces.Dict({"in": spaces.Dict({key: leaf})})
        with pytest.raises(DatasetError, match=r"golden-v0, field 'observations\.in': expected keys that HDF5 can hold"):
            to_minari(OfflineDataset(**arguments | {"observations": seen, "observation_space": space}), "golden-v0")
        assert list(minari_home.iterdir()) == []

    def test_id_taken(self, golden: OfflineDataset, assert_same: Any) -> None:
        to_minari(golden, "golden-v0")
        with pytest.raises(DatasetError, match="golden-v0: expected an id that is not taken"):
            to_minari(golden[:1], "golden-v0")
        assert_same(from_minari("golden-v0"), golden)

    @pytest.mark.parametrize("dataset_id", ["no version", "deep/er/no version"])
    def test_malformed_id(self, golden: OfflineDataset, minari_home: Path, dataset_id: str) -> None:
        with pytest.raises(DatasetError, match="Malformed dataset ID"):
            to_minari(golden, dataset_id)
        assert list(minari_home.iterdir()) == []

    @pytest.mark.parametrize("dataset_id", ["noversion", "made/noversion", "v0", "-v0", "made/-v0", "made/thing-v", "x-v0\n"])
    def test_id_without_a_version(self, golden: OfflineDataset, minari_home: Path, dataset_id: str) -> None:
        with pytest.raises(DatasetError, match="expected a name that ends in a version, such as 'mine/door-v0', got"):
            to_minari(golden, dataset_id)
        assert list(minari_home.iterdir()) == []

    def test_unknown_storage(self, golden: OfflineDataset, minari_home: Path) -> None:
        with pytest.raises(DatasetError, match="No storage implemented for csv"):
            to_minari(golden, "golden-v0", data_format="csv")
        assert list(minari_home.iterdir()) == []

    def test_wider_values_are_refused(self, arguments: dict[str, Any], minari_home: Path) -> None:
        arguments["actions"] = arguments["actions"].astype(np.float64)
        with pytest.raises(DatasetError, match=r"expected values of the dtype of Box.*got float64"):
            to_minari(OfflineDataset(**arguments), "deep/er/golden-v0")
        assert list(minari_home.iterdir()) == []

    @pytest.mark.parametrize(("dtype", "knows_images"), [(np.uint8, True), (np.uint8, False), (np.int16, True)])
    def test_images_that_would_become_jpegs(
        self, arguments: dict[str, Any], minari_home: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, knows_images: bool
    ) -> None:
        """Minari 0.5.3 cannot be asked to leave them; before it Minari knows no images."""
        create, taken = minari.create_dataset_from_buffers, []

        def before_0_5_4(dataset_id: str, buffer: Any, **options: Any) -> Any:
            taken.append(sorted(options))
            return create(dataset_id, buffer, **options)

        before_0_5_4.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        monkeypatch.setattr(minari, "create_dataset_from_buffers", before_0_5_4)
        if knows_images:
            monkeypatch.setattr("minari.dataset.minari_storage.is_image_space", lambda _: False, raising=False)
        else:
            monkeypatch.delattr("minari.dataset.minari_storage.is_image_space", raising=False)
        space = spaces.Dict({"x": spaces.Discrete(9), "in": spaces.Dict({"eye": spaces.Box(0, 255, (4, 5, 3), dtype)})})
        seen = {"x": np.arange(7), "in": {"eye": np.zeros((7, 4, 5, 3), dtype)}}
        dataset = OfflineDataset(**arguments | {"observations": seen, "observation_space": space})
        if knows_images and dtype is np.uint8:
            with pytest.raises(DatasetError, match=r"golden-v0: .* bytes of observations.in.eye as they are.*minari>=0.5.4"):
                to_minari(dataset, "golden-v0")
            assert (taken, list(minari_home.iterdir())) == ([], [])
        else:
            to_minari(dataset, "golden-v0")
            assert len(taken) == 1
            assert "jpeg_encoding" not in taken[0]

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_nothing_half_written(
        self, golden: OfflineDataset, minari_home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        to_minari(golden, "deep/first-v0")
        before = sorted(path.relative_to(minari_home) for path in minari_home.rglob("*"))
        from minari.dataset._storages.hdf5_storage import HDF5Storage

        write = HDF5Storage.update_episodes

        def fail_half_way(self: Any, episodes: Any) -> None:
            taken = list(itertools.islice(episodes, 1))
            write(self, taken)
            if taken:
                raise error

        monkeypatch.setattr(HDF5Storage, "update_episodes", fail_half_way)
        with pytest.raises((DatasetError, KeyboardInterrupt)):
            to_minari(golden, "deep/er/second-v0")
        assert sorted(path.relative_to(minari_home) for path in minari_home.rglob("*")) == before

    def test_what_others_write_meanwhile_stays(self, golden: OfflineDataset, minari_home: Path, assert_same: Any) -> None:
        """In the same new namespace, by another process, while this one is interrupted; then under the same id."""

        def interrupted(share: float) -> None:
            to_minari(golden, "deep/er/theirs-v0")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            to_minari(golden, "deep/er/mine-v0", progress=interrupted)
        assert_same(from_minari("deep/er/theirs-v0"), golden)
        assert list(minari.list_local_datasets()) == ["deep/er/theirs-v0"]
        assert minari.namespace.list_local_namespaces() == ["deep", "deep/er"]

        def first(share: float) -> None:
            if not (minari_home / "deep" / "same-v0").exists():
                to_minari(golden, "deep/same-v0")

        with pytest.raises(DatasetError, match=r"same-v0: expected an id that is not taken, there is a data set at"):
            to_minari(golden[:1], "deep/same-v0", progress=first)
        assert_same(from_minari("deep/same-v0"), golden)
        assert not list(minari_home.rglob(".*"))

    def test_leftovers_of_killed_runs_go(self, golden: OfflineDataset, minari_home: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait()
        left = minari_home / f".deep.{_files._machine()}-{gone.pid}-00ff{_files._WRITING}"
        (left / "data").mkdir(parents=True)
        to_minari(golden, "deep/mine-v0")
        assert [path.name for path in minari_home.iterdir()] == ["deep"]

    @pytest.mark.parametrize("data_format", STORAGES)
    @pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
    def test_full_disk(self, tmp_path: Path, minari_home: Path, data_format: str) -> None:
        """In a process of its own: HDF5 used to take it down."""
        code = f"""
import resource, sys
import numpy as np
from cql_plugins.adapters import DatasetError, from_arrays, to_minari
rows, ends = np.random.default_rng(0).normal(size=(3000, 60)), np.arange(3000) % 1000 == 999
dataset = from_arrays(rows, np.tanh(rows), rows[:, 0], ends, ~ends & False)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    to_minari(dataset, "deep/mine-v0", data_format="{data_format}")
except DatasetError as error:
    print(error)
    sys.exit(7)
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (7, "")
        assert re.search(r"deep/mine-v0: Minari cannot store it: .*(File too large|could not write)", done.stdout)
        assert list(minari_home.iterdir()) == []

    def test_storage_library_missing(self, golden: OfflineDataset, minari_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ImportError("pyarrow is not installed")

        monkeypatch.setattr(minari, "create_dataset_from_buffers", refuse)
        with pytest.raises(ImportError, match=r"cql-plugins\[arrow\]"):
            to_minari(golden, "golden-v0", data_format="arrow")

    @pytest.mark.parametrize("env_id", [None, "Pendulum-v1"])
    def test_environment_that_is_given(self, arguments: dict[str, Any], env_id: str | None) -> None:
        spec = EnvSpec("Nowhere-v7", entry_point="nowhere:Env", kwargs={"goal": "left"})
        stored = to_minari(OfflineDataset(**arguments | {"env_id": env_id}), "golden-v0", env_spec=spec)
        assert stored.env_spec == spec
        assert from_minari("golden-v0").env_id == "Nowhere-v7"

    def test_environment_that_is_not_registered(self, arguments: dict[str, Any]) -> None:
        to_minari(OfflineDataset(**arguments | {"env_id": "Nowhere-v7"}), "golden-v0")
        assert from_minari("golden-v0").env_id is None


def test_home_of_the_tests_is_empty(minari_home: Path) -> None:
    """The user's own data sets are out of reach."""
    assert minari.list_local_datasets() == {}
    shutil.rmtree(minari_home)
