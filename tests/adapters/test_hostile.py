"""Files made to harm: each attack on a reader is refused, and nothing outside the file is opened, run or filled.

`tests/fuzz_readers.py` does this by the thousand, in a process of its own; a few dozen of its inputs run here.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from cql_plugins.adapters import DatasetError, OfflineDataset, _arrow, _untrusted, from_d4rl, from_minari, from_npz, to_minari

h5py, minari, pa = (pytest.importorskip(name) for name in ("h5py", "minari", "pyarrow"))
pq = pytest.importorskip("pyarrow.parquet")
get_storage_keys = pytest.importorskip("minari.dataset._storages").get_storage_keys
HAS_PARQUET = "parquet" in get_storage_keys()
HAS_IMAGES = hasattr(pytest.importorskip("minari.dataset.minari_storage"), "is_image_space")

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader that opens a pipe waits forever: let it fail instead."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("the reader waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bringing hundreds of small files to the disk takes longer than all the rest, and nothing here is about that."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(4 * 2**20))


@pytest.fixture(scope="module")
def cases() -> Any:
    return _load("fuzz_cases")


def _load(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        return importlib.import_module(name)


@pytest.fixture
def canary(tmp_path: Path, cases: Any) -> Path:
    """Files outside the input, beside its folder."""
    cases.make_canary(tmp_path / "canary")
    return tmp_path / "canary"


# npz ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_npz(tmp_path: Path, steps: dict[str, Any], cases: Any) -> Callable[..., Path]:
    """Write the golden steps with some members replaced, by arrays or by the bytes of a member."""

    def write(changes: dict[str, Any], packing: int = zipfile.ZIP_DEFLATED) -> Path:
        names = ("observations", "next_observations", "actions", "rewards", "terminations", "truncations")
        fields = {name: steps[name] for name in names} | changes
        members = [
            (f"{key}.npy", value if isinstance(value, bytes) else cases.npy_bytes(value))
            for key, value in fields.items()
            if value is not None
        ]
        cases.write_zip(tmp_path / "log.npz", members, packing)
        return tmp_path / "log.npz"

    return write


def _header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text


@pytest.fixture(params=["memory", "memmap"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"storage": "memory"} if request.param == "memory" else {"storage": "memmap", "cache_dir": tmp_path / "cache"}


class TestNpz:
    @pytest.mark.parametrize("field", ["rewards", "observations"])
    def test_objects_are_not_unpickled(
        self, write_npz: Any, canary: Path, cases: Any, field: str, storage: dict[str, Any]
    ) -> None:
        path = write_npz({field: np.array([cases.Trap(canary / "unpickled")] * 5, dtype=object)})
        with pytest.raises(
            DatasetError, match=rf"log\.npz, field '{field}': expected a plain array of numbers, got Python obj"
        ):
            from_npz(path, **storage)
        assert not (canary / "unpickled").exists()

    def test_members_that_are_no_fields_are_left_alone(self, write_npz: Any, quietly: Any, canary: Path, cases: Any) -> None:
        trap = np.array([cases.Trap(canary / "unpickled")], dtype=object)
        path = write_npz({"infos": trap, "../../x": np.zeros(3), "notes": b"no array", "actions/y": b""})
        assert len(quietly(from_npz, path)) == 5
        assert not (canary / "unpickled").exists()

    @pytest.mark.parametrize(
        "shape", ["(10000000000,)", "(4611686018427387904, 4)", "(10000000000000, 0)", "(-5,)", "(5, True)"]
    )
    def test_declared_sizes(self, write_npz: Any, shape: str, storage: dict[str, Any]) -> None:
        with pytest.raises(DatasetError, match=r"log\.npz, field 'rewards': expected"):
            from_npz(write_npz({"rewards": _header(shape) + bytes(40)}), **storage)

    def test_single_array_of_any_size(self, tmp_path: Path) -> None:
        (tmp_path / "log.npz").write_bytes(_header("(10000000000000,)"))
        with pytest.raises(DatasetError, match="got a single"):
            from_npz(tmp_path / "log.npz")

    @pytest.mark.parametrize(
        ("descr", "said"),
        [
            ("[('a', '<f8'), ('b', '|O')]", "Python objects"),
            ("'<U9'", "dtype <U9"),
            ("'|V8'", "dtype"),
            ("'<c16'", "dtype complex128"),
            ("'<M8[s]'", "dtype datetime64"),
            ("('<f8', (2, 2))", "dtype"),
            ("'<f8', 'x': {[]: 1}", "TypeError"),
            ("(" * 3000, "something else or a part of one"),
        ],
    )
    def test_headers(self, write_npz: Any, descr: str, said: str) -> None:
        with pytest.raises(DatasetError, match=rf"field 'actions': expected a plain array.*{said}"):
            from_npz(write_npz({"actions": _header("(5,)", descr) + bytes(400)}))

    def test_zip_bomb(self, write_npz: Any, tmp_path: Path, little_memory: None) -> None:
        path = write_npz({"rewards": np.zeros(2**20)})
        assert path.stat().st_size < 20_000
        with pytest.raises(DatasetError, match=r"expected at most 4,194,304 bytes, .* takes 8,\d{3},\d{3}\..*storage='memmap'"):
            from_npz(path)

    def test_zip_bomb_that_would_fill_the_disk(self, write_npz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_npz({"rewards": np.zeros(2**20)})
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
        with pytest.raises(DatasetError, match=r"log\.npz: expected room for 8,\d{3},\d{3} bytes .*: 1,048,576 are free"):
            from_npz(path, storage="memmap", cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    @pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_packing(self, write_npz: Any, packing: int) -> None:
        """These unpack a block at once, whatever its size."""
        with pytest.raises(DatasetError, match="field 'observations': expected a member that is stored or deflated"):
            from_npz(write_npz({}, packing))

    def test_more_than_declared(self, write_npz: Any, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"field 'rewards': .*\(5,\) and float64 take 40 bytes, 1,000,040 are there"):
            from_npz(write_npz({"rewards": _header("(5,)") + bytes(1_000_040)}), storage="memmap", cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize(
        "name", ["observations/../x", "observations/", "observations//x", "observations/./x", "observations" + "/a" * 2000]
    )
    def test_names(self, write_npz: Any, name: str) -> None:
        with pytest.raises(DatasetError, match="field 'observations': expected names as in observations/key"):
            from_npz(write_npz({name: np.zeros((5, 1))}))

    def test_duplicates(self, write_npz: Any) -> None:
        path = write_npz({})
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("rewards.npy", archive.read("rewards.npy"))
        with pytest.raises(DatasetError, match="field 'rewards': expected one array of this name, the file has several"):
            from_npz(path)

    @pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
    def test_array_and_arrays_below_it(self, write_npz: Any, names: tuple[str, str]) -> None:
        members = {f"observations/{name}": np.zeros((5, 1)) for name in names}
        with pytest.raises(DatasetError, match="expected an array or arrays below this name, got both"):
            from_npz(write_npz({"observations": None, **members}))

    def test_more_actions_than_can_be_counted(self, write_npz: Any, quietly: Any) -> None:
        dataset = quietly(from_npz, write_npz({"actions": np.array([0, 2**60, 0, 0, 0])}))
        assert dataset.summary().action_counts is None

    def test_integers_too_large_to_count(self, write_npz: Any) -> None:
        with pytest.raises(DatasetError, match=r"field 'actions', row 1: expected integers below 2 \*\* 63 - 1"):
            from_npz(write_npz({"actions": np.array([0, 2**63, 0, 0, 0], np.uint64)}))


@pytest.mark.parametrize("reader", [from_npz, from_d4rl])
@pytest.mark.parametrize("sort", ["pipe", "folder", "device", "loop"])
def test_no_file(tmp_path: Path, cases: Any, reader: Callable[..., Any], sort: str, storage: dict[str, Any]) -> None:
    path = tmp_path / "log"
    cases.make_no_file(path, ["pipe", "folder", "device", "loop"].index(sort), path if sort == "loop" else Path("/dev/zero"))
    with pytest.raises(DatasetError, match=r"log: expected an .* file, there is no such file"):
        reader(path, **storage)


class TestMemory:
    def test_limit_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CQL_PLUGINS_MAX_MEMORY", raising=False)
        limit = _untrusted.memory_limit()
        assert limit is not None
        assert 2**28 < limit <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def test_another_limit(self, write_npz: Any, quietly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_npz({})
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "100")
        with pytest.raises(DatasetError, match=r"at most 100 bytes.*\$CQL_PLUGINS_MAX_MEMORY sets another limit"):
            from_npz(path)
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "1000")
        assert len(quietly(from_npz, path)) == 5

    @pytest.mark.parametrize("wrong", ["8GB", "-1", "1e9", "٣"])
    def test_no_number(self, write_npz: Any, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", wrong)
        with pytest.raises(ValueError, match="CQL_PLUGINS_MAX_MEMORY must be a whole number of bytes"):
            from_npz(write_npz({}))


# D4RL -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_hdf5(tmp_path: Path, steps: dict[str, Any]) -> Callable[..., Path]:
    """Write the golden steps, with one field left to a function of the file."""

    def write(field: str, replace: Callable[[Any], Any], name: str = "log.hdf5") -> Path:
        names = {"terminations": "terminals", "truncations": "timeouts"}
        with h5py.File(tmp_path / name, "w") as file:
            for key in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations"):
                if names.get(key, key) != field:
                    file[names.get(key, key)] = steps[key]
            replace(file)
        return tmp_path / name

    return write


def _virtual(file: Any, canary: Path) -> None:
    layout = h5py.VirtualLayout(shape=(5,), dtype="f8")
    layout[...] = h5py.VirtualSource(str(canary / "canary.hdf5"), "vector", shape=(5,))
    file.create_virtual_dataset("rewards", layout)


def _many_ways(file: Any) -> None:
    group = file.create_group("rewards")
    for _ in range(14):
        child = group.create_group("a")
        group["b"] = child
        group = child
    group["a"] = np.zeros(5)


def _filters(file: Any, *codes: int) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((5,))
    for code in codes:
        properties.set_deflate(9) if code == 1 else properties.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((5,)), properties)
    file["rewards"].id.write_direct_chunk((0,), zlib.compress(bytes(40)))


def _stuffed_chunk(file: Any, n_bytes: int, n_values: int) -> None:
    file.create_dataset("rewards", (n_values,), "f8", chunks=(n_values,), compression="gzip")
    file["rewards"].id.write_direct_chunk((0,), zlib.compress(bytes(n_bytes), 9))


def _nested(file: Any, depth: int) -> None:
    group = file.create_group("rewards")
    for _ in range(depth):
        group = group.create_group("a")
    group["a"] = np.zeros(5)


HDF5_ATTACKS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "external-link": (
        lambda file, canary: file.__setitem__("rewards", h5py.ExternalLink(str(canary / "canary.hdf5"), "vector")),
        r"expected data in this file, got a link \(external\)",
    ),
    "soft-link": (lambda file, _: file.__setitem__("rewards", h5py.SoftLink("/actions")), r"got a link \(soft\)"),
    "virtual": (_virtual, "got a virtual data set"),
    "external-storage": (
        lambda file, canary: file.create_dataset(
            "rewards", (5,), "f8", external=[(str(canary / "canary.raw"), 0, h5py.h5f.UNLIMITED)]
        ),
        "got external storage",
    ),
    "below-a-group": (
        lambda file, canary: file.__setitem__("rewards/x", h5py.ExternalLink(str(canary / "canary.hdf5"), "vector")),
        r"\.x.*: .*link \(external\)",
    ),
    "circle": (lambda file, _: file.create_group("rewards").__setitem__("x", file), "the file has under two names"),
    "many-ways": (lambda file, _: _many_ways(file), "the file has under two names"),
    "deep": (lambda file, _: _nested(file, 40), "nested at most 16 deep"),
    "never-written": (
        lambda file, _: file.create_dataset("rewards", (10**12,), "f8", chunks=(1024,)),
        "expected at most 1100 bytes for each one stored, got 8,000,000,000,000 declared by 0",
    ),
    "half-written": (
        lambda file, _: file.create_dataset("rewards", (100,), "f8", chunks=(10,)).__setitem__(slice(0, 10), 1.0),
        r"expected 10 chunks for shape \(100,\), got 1. Its rows were never written",
    ),
    "contiguous-never-written": (
        lambda file, _: file.create_dataset("rewards", (5,), "f8"),
        "expected 40 bytes, 0 were written",
    ),
    "empty-rows": (lambda file, _: file.create_dataset("rewards", (10**12, 0), "f8"), "expected rows with at least one entry"),
    "giant-chunk": (
        lambda file, _: file.create_dataset("rewards", (5,), "f8", maxshape=(None,), chunks=(2**26,)),
        "expected at most 4,194,304 bytes, .* takes 536,870,912",
    ),
    "stuffed-chunk": (lambda file, _: _stuffed_chunk(file, 2**22, 5), "expected chunks of 40 bytes, one is stored as 4,"),
    "gzip-bomb": (lambda file, _: _stuffed_chunk(file, 2**23, 1024), "expected chunks of 8,192 bytes, one unpacks to more"),
    "gzip-twice": (lambda file, _: _filters(file, 1, 1), "each at most once"),
    "unknown-filter": (lambda file, _: _filters(file, 32015), r"expected the filters gzip, .* got .*\[32015\]. Repack"),
    "text": (lambda file, _: file.create_dataset("rewards", data=["a"] * 5), "expected a plain array of numbers"),
    "own-lengths": (lambda file, _: file.create_dataset("rewards", (5,), h5py.vlen_dtype("u1")), "plain array of numbers, got"),
    "compound": (lambda file, _: file.create_dataset("rewards", (5,), [("a", "f8")]), "plain array of numbers, got"),
    "reference": (lambda file, _: file.create_dataset("rewards", (5,), h5py.ref_dtype), "plain array of numbers, got"),
    "no-space": (lambda file, _: file.create_dataset("rewards", data=h5py.Empty("f8")), "got an empty data space"),
    "type": (lambda file, _: file.__setitem__("rewards", np.dtype("f8")), "expected a data set or a group, got a Datatype"),
}


class TestD4rl:
    @pytest.mark.parametrize("attack", HDF5_ATTACKS)
    def test_attack(self, write_hdf5: Any, canary: Path, attack: str, storage: dict[str, Any], little_memory: None) -> None:
        make, said = HDF5_ATTACKS[attack]
        path = write_hdf5("rewards", lambda file: make(file, canary))
        with pytest.raises(DatasetError, match=rf"log\.hdf5, field 'rewards.*{said}"):
            from_d4rl(path, **storage)

    def test_too_large_for_memory_and_read_from_files(
        self, write_hdf5: Any, steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch, quietly: Any, tmp_path: Path
    ) -> None:
        """The same file is refused or read as the limit and the storage say: what is held at once is what counts."""
        path = write_hdf5("rewards", lambda file: file.create_dataset("rewards", data=steps["rewards"]))
        held = {"memory": 2 * (40 + 20) + 40 + 40 + 10, "memmap": 40 + 10}
        for name, n_bytes in held.items():
            options: dict[str, Any] = {"storage": name} | ({"cache_dir": tmp_path / "cache"} if name == "memmap" else {})
            monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(n_bytes - 1))
            with pytest.raises(DatasetError, match=f"expected at most {n_bytes - 1} bytes, .* takes {n_bytes}"):
                from_d4rl(path, **options)
            monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(n_bytes))
            assert len(quietly(from_d4rl, path, **options)) == 5

    def test_one_number_for_all_actions(self, write_hdf5: Any) -> None:
        with pytest.raises(DatasetError, match="field 'actions': expected floats of rank 2 or more"):
            from_d4rl(write_hdf5("actions", lambda file: file.create_dataset("actions", data=0.5)))

    def test_filters_that_are_known(self, write_hdf5: Any, steps: dict[str, Any], quietly: Any, little_memory: None) -> None:
        def compressed(file: Any) -> None:
            file.create_dataset("rewards", data=steps["rewards"], compression="gzip", shuffle=True, fletcher32=True)
            del file["actions"]
            file.create_dataset("actions", data=steps["actions"], compression="lzf")

        assert quietly(from_d4rl, write_hdf5("rewards", compressed)).rewards.tolist() == [1, 2, 4, 8, 16]

    def test_other_members_are_left_alone(self, write_hdf5: Any, steps: dict[str, Any], canary: Path, quietly: Any) -> None:
        def more(file: Any) -> None:
            file["rewards"] = steps["rewards"]
            file["infos/x"] = h5py.ExternalLink(str(canary / "canary.hdf5"), "vector")
            file.create_dataset("metadata", data="text")

        assert len(quietly(from_d4rl, write_hdf5("rewards", more))) == 5


# Minari ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(golden: OfflineDataset, minari_home: Path) -> Callable[..., Path]:
    """Store the golden data set, and return its folder."""

    def store(data_format: str = "hdf5") -> Path:
        to_minari(golden, "made/up-v0", data_format=data_format)
        return minari_home / "made/up-v0/data"

    return store


def _change_metadata(data: Path, **changes: Any) -> None:
    metadata = json.loads((data / "metadata.json").read_text()) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    (data / "metadata.json").write_text(json.dumps(metadata))


class TestMinari:
    @pytest.mark.parametrize("missing", [("observation_space",), ("action_space",), ("observation_space", "action_space")])
    def test_environment_of_the_file_is_not_built(self, stored: Any, tmp_path: Path, missing: tuple[str, ...]) -> None:
        """Minari alone would call what `entry_point` names."""
        entry = {"id": "x-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}, "additional_wrappers": []}
        _change_metadata(data := stored(), env_spec=json.dumps(entry), **dict.fromkeys(missing))
        with pytest.raises(DatasetError, match=f"made/up-v0, field '{missing[0]}': expected a space .*can run any code"):
            from_minari("made/up-v0")
        assert not (tmp_path / "ran").exists()
        with pytest.raises(Exception, match="Env"):  # the twin: this is what is prevented
            minari.MinariDataset(data)
        assert (tmp_path / "ran").exists()

    def test_environment_that_is_only_named(self, stored: Any, tmp_path: Path) -> None:
        entry = {"id": "x-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}, "additional_wrappers": []}
        _change_metadata(stored(), env_spec=json.dumps(entry))
        assert from_minari("made/up-v0").env_id == "x-v0"
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("dataset_id", ["../up-v0", "made/../made/up-v0", "/etc-v0", "", "made//up-v0", "x\0-v0", "a\n-v0"])
    def test_ids(self, stored: Any, dataset_id: str) -> None:
        stored()
        with pytest.raises(DatasetError, match="expected an id of words between slashes"):
            from_minari(dataset_id)

    def test_absolute_id(self, stored: Any) -> None:
        folder = stored().parent
        with pytest.raises(DatasetError, match="expected an id of words between slashes"):
            from_minari(str(folder))

    @pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json", "more"])
    def test_link_out_of_the_folder(self, stored: Any, tmp_path: Path, name: str) -> None:
        data = stored()
        moved = tmp_path / "elsewhere"
        (data / name).rename(moved) if (data / name).exists() else moved.write_text("")
        (data / name).symlink_to(moved)
        with pytest.raises(DatasetError, match=f"expected its files in .*data, but {name} is a link to .*elsewhere"):
            from_minari("made/up-v0")

    def test_links_that_the_user_made(self, stored: Any, tmp_path: Path) -> None:
        """The data set may lie on another disk, and a file may be a link to another of the same folder."""
        data = stored()
        shutil.move(data.parent, tmp_path / "disk")
        data.parent.symlink_to(tmp_path / "disk")
        (data / "main_data.hdf5").rename(data / "file")
        (data / "main_data.hdf5").symlink_to("file")
        assert len(from_minari("made/up-v0")) == 5

    @pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json", "more"])
    def test_pipe(self, stored: Any, name: str) -> None:
        data = stored()
        (data / name).unlink(missing_ok=True)
        os.mkfifo(data / name)
        with pytest.raises(DatasetError, match=rf"expected files in .*data, but {name} is a pipe"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[" * 100_000, "RecursionError"),
            ("[]", "expected a JSON object in metadata.json, got list"),
            ("\0", "JSONDecodeError"),
            ('{"total_steps": ' + "9" * 5000 + "}", "ValueError"),
        ],
    )
    def test_metadata_that_is_no_object(self, stored: Any, text: str, said: str) -> None:
        (stored() / "metadata.json").write_text(text)
        with pytest.raises(DatasetError, match=rf"made/up-v0: expected .*metadata\.json.*{said}|made/up-v0: {said}"):
            from_minari("made/up-v0")

    def test_metadata_of_any_size(self, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        stored()
        monkeypatch.setattr(_untrusted, "_MAX_JSON", 100)
        with pytest.raises(DatasetError, match=r"made/up-v0: expected at most 100 bytes in metadata\.json, got"):
            from_minari("made/up-v0")

    def test_id_in_the_metadata(self, stored: Any, tmp_path: Path) -> None:
        """It names the result, and nothing more."""
        _change_metadata(stored(), dataset_id="../../etc/passwd")
        dataset = from_minari("made/up-v0", storage="memmap", cache_dir=tmp_path / "cache")
        assert dataset.name == "../../etc/passwd"
        assert [path.name.startswith("passwd-") for path in (tmp_path / "cache").iterdir()] == [True]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"total_episodes": 10**12}, "field 'total_episodes': expected a number in the metadata that [0-9,]+ bytes"),
            ({"total_steps": 10**12}, "field 'total_steps': expected a number"),
            ({"total_steps": -1}, "field 'total_steps': expected a number"),
            ({"total_episodes": "2"}, "field 'total_episodes': expected a number"),
            ({"total_steps": 2_000_000}, "field 'total_steps': expected at most 4,194,304 bytes"),
            ({"ref_min_score": {}}, "field 'ref_min_score': expected a finite number"),
            ({"ref_max_score": float("nan")}, "field 'ref_max_score': expected a finite number"),
            ({"jpeg_encoding": "x"}, "field 'jpeg_encoding': expected true or false"),
            ({"data_format": "../x"}, "Minari cannot open it: KeyError"),
            ({"dataset_id": 3}, "Minari cannot open it: AssertionError"),
        ],
    )
    def test_metadata_values(self, stored: Any, changes: dict[str, Any], said: str, little_memory: None) -> None:
        _change_metadata(stored(), **changes)
        with pytest.raises(DatasetError, match=f"made/up-v0.*{said}"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize(
        ("space", "said"),
        [
            (
                {"type": "Box", "dtype": "float32", "shape": [10**12], "low": -1.0, "high": 1.0},
                "expected a low and a high for each",
            ),
            (
                {"type": "Box", "dtype": "U100000000", "shape": [1], "low": ["x"], "high": ["y"]},
                "plain array of numbers, got dtype",
            ),
            ({"type": "Box", "dtype": "object", "shape": [1], "low": [0], "high": [1]}, "got Python objects"),
            ({"type": "MultiBinary", "n": 10**12}, "expected a space of type Box, Discrete or Dict, got 'MultiBinary'"),
            ({"type": "Discrete", "n": -1, "start": 0}, "Minari cannot open it: (Assertion|Value)Error"),
            ("x", "expected a space in the metadata"),
        ],
    )
    def test_spaces(self, stored: Any, space: Any, said: str) -> None:
        _change_metadata(stored(), observation_space=json.dumps(space))
        with pytest.raises(DatasetError, match=f"made/up-v0.*{said}"):
            from_minari("made/up-v0")

    def test_nested_spaces(self, stored: Any) -> None:
        text = '{"type": "Dict", "subspaces": {"a": ' * 30 + '{"type": "Discrete", "n": 2, "start": 0}' + "}}" * 30
        _change_metadata(stored(), observation_space=text)
        with pytest.raises(DatasetError, match="expected spaces nested at most 16 deep"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize("attack", sorted(set(HDF5_ATTACKS) - {"text", "own-lengths", "compound", "reference"}))
    @pytest.mark.parametrize("given", ["id", "object"])
    def test_hdf5(self, stored: Any, canary: Path, attack: str, given: str, little_memory: None) -> None:
        """The same attacks on an episode's member, also where Minari has loaded the data set already."""
        make, said = HDF5_ATTACKS[attack]
        data = stored()
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_1/rewards"]
            make(file["episode_1"], canary)
        said = said.replace("field 'rewards", "field 'episode_1\\.rewards")
        with pytest.raises(DatasetError, match=rf"made/up-v0, field 'episode_1\.rewards.*episode 1: .*{said.split(': ')[-1]}"):
            from_minari("made/up-v0" if given == "id" else minari.load_dataset("made/up-v0"))

    def test_episode_that_is_a_link(self, stored: Any, canary: Path) -> None:
        data = stored()
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_1"]
            file["episode_1"] = h5py.ExternalLink(str(canary / "canary.hdf5"), "/")
        with pytest.raises(DatasetError, match=r"field 'episode_1', episode 1: .*link \(external\)"):
            from_minari("made/up-v0")

    def test_episode_that_is_asked_for_twice(self, stored: Any) -> None:
        whole = minari.MinariDataset(stored())
        twice = minari.MinariDataset(whole.storage, episode_indices=np.array([1, 0, 1]))
        assert from_minari(twice).rewards.tolist() == [8, 16, 1, 2, 4, 8, 16]

    def test_text_only_in_infos(self, stored: Any) -> None:
        data = stored()
        with h5py.File(data / "main_data.hdf5", "a") as file:
            file["episode_0/infos/names"] = ["a", "bb", "ccc"]
        assert len(from_minari("made/up-v0")) == 5
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_0/rewards"]
            file["episode_0/rewards"] = ["a", "bb", "ccc"]
        with pytest.raises(
            DatasetError, match="field 'rewards', episode 0: expected a plain array of numbers, got dtype object"
        ):
            from_minari("made/up-v0")

    @pytest.fixture
    def texts(self, stored: Any) -> Callable[..., Path]:
        """Store a hundred texts beside the data, and return the file."""

        def store(**options: Any) -> Path:
            path = Path(stored() / "main_data.hdf5")
            with h5py.File(path, "a") as file:
                file.create_dataset("episode_0/infos/text", (100,), h5py.string_dtype(), **options)[:] = ["word" * 200] * 100
            return path

        return store

    @pytest.mark.parametrize("chunks", [None, (100,), (7,)])
    def test_texts(self, texts: Any, chunks: Any) -> None:
        texts(chunks=chunks)
        assert len(from_minari("made/up-v0")) == 5

    def test_one_long_text_many_times(self, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        texts(chunks=(100,))
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "100000")
        with pytest.raises(DatasetError, match="field 'episode_0', episode 0: expected at most 100,000 bytes"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            # Number 0 is free space: of no bytes, the library walks it forever.
            (lambda heap: heap[:16] + bytes(16) + heap[32:], "a heap is damaged"),
            (lambda heap: heap[:24] + b"\xff" * 8 + heap[32:], "a heap is damaged"),
            (lambda heap: heap[:8] + b"\xff" * 8 + heap[16:], "there is no heap where one is expected"),
            (lambda heap: b"COLG" + heap[4:], "there is no heap where one is expected"),
            (lambda heap: heap[:16] + b"\x99" + heap[17:], "expected an element of 800 bytes, its place has another length"),
            (lambda heap: heap[:24] + b"\x19" + heap[25:], "a heap is damaged|its place has another length"),
        ],
    )
    def test_damaged_heap(self, texts: Any, change: Callable[[bytes], bytes], said: str) -> None:
        path = texts(chunks=(100,))
        content = path.read_bytes()
        place = content.index(b"GCOL")
        path.write_bytes(content[:place] + change(content[place:]))
        with pytest.raises(DatasetError, match=rf"field 'episode_0\.infos\.text', episode 0: .*({said})"):
            from_minari("made/up-v0")

    def test_packed_texts(self, texts: Any) -> None:
        texts(chunks=(100,), compression="gzip")
        with pytest.raises(DatasetError, match="expected a vector without filters, as Minari writes text and images"):
            from_minari("made/up-v0")


@pytest.mark.skipif(not HAS_IMAGES, reason="this Minari encodes no images")
class TestImages:
    @pytest.fixture(params=["hdf5", "arrow"])
    def data(self, request: pytest.FixtureRequest, cases: Any, minari_home: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases._with_images("eye-v0", request.param)
        return minari_home / "eye-v0/data"

    def _replace(self, data: Path, frame: bytes) -> None:
        if (data / "main_data.hdf5").exists():
            with h5py.File(data / "main_data.hdf5", "a") as file:
                group = file["episode_0/observations"]
                del group["eye"]
                group.create_dataset("eye", (4,), h5py.vlen_dtype("u1"))
                for row in range(4):
                    group["eye"][row] = np.frombuffer(frame, np.uint8)
            return
        (path,) = (data / "0").glob("*.arrow")
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        column = table["observations"].combine_chunks()
        eyes = pa.array([frame] * len(column), pa.binary())
        table = table.set_column(
            table.column_names.index("observations"),
            "observations",
            pa.StructArray.from_arrays([eyes, column.field("room")], ["eye", "room"]),
        )
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    def _encoded(self, kind: str, size: tuple[int, int] = (33, 32)) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, kind)
        return buffer.getvalue()

    def test_valid(self, data: Path) -> None:
        self._replace(data, self._encoded("JPEG"))
        assert from_minari("eye-v0").observations["eye"].shape == (8, 32, 33, 3)

    @pytest.mark.parametrize("storage", ["memory", "memmap"])
    def test_more_than_fits_when_decoded(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Any
    ) -> None:
        """Refused before it is decoded, also where the data set itself goes to files."""
        self._replace(data, self._encoded("JPEG"))
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(2 * 4 * 32 * 33 * 3))
        monkeypatch.setattr("PIL.Image.open", lambda *args, **kwargs: pytest.fail("it is decoded"))
        where = {} if storage == "memory" else {"cache_dir": tmp_path / "cache"}
        with pytest.raises(DatasetError, match=r"episode 0: expected at most 25,344 bytes, reading .* takes 3\d,\d{3}"):
            from_minari("eye-v0", storage=storage, **where)

    @pytest.mark.parametrize("kind", ["PNG", "BMP", "EPS"])
    def test_other_decoders(self, data: Path, kind: str) -> None:
        """Pillow would start a program for EPS."""
        self._replace(data, self._encoded(kind))
        with pytest.raises(DatasetError, match=r"field 'observations\.eye', episode 0: expected a JPEG image: .* starts with"):
            from_minari("eye-v0")

    def test_other_size(self, data: Path) -> None:
        self._replace(data, self._encoded("JPEG", (34, 32)))
        with pytest.raises(DatasetError, match=r"row 0: expected a JPEG image of \(32, 33\) pixels, got \(32, 34\)"):
            from_minari("eye-v0")

    @pytest.mark.parametrize("frame", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\0\x00", b"\xff\xd8\xff\xff" + b"\xff" * 40])
    def test_cut_off(self, data: Path, frame: bytes) -> None:
        self._replace(data, frame)
        with pytest.raises(DatasetError, match="expected a JPEG image"):
            from_minari("eye-v0")


class TestArrow:
    def _rewrite(self, data: Path, change: Callable[[Any], Any], **options: Any) -> None:
        (path,) = (data / "0").glob("*.arrow")
        with pa.OSFile(str(path)) as source:
            table = change(pa.ipc.open_file(source).read_all())
        how = pa.ipc.IpcWriteOptions(**options)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=how) as writer:
            writer.write_table(table)

    def test_rewritten(self, stored: Any) -> None:
        self._rewrite(stored("arrow"), lambda table: table)
        assert len(from_minari("made/up-v0")) == 5

    @pytest.mark.parametrize("compression", ["zstd", "lz4"])
    def test_compressed_buffers(self, stored: Any, compression: str) -> None:
        self._rewrite(stored("arrow"), lambda table: table, compression=compression)
        with pytest.raises(DatasetError, match=r"made/up-v0, episode 0: Minari cannot read .*its buffers are compressed"):
            from_minari("made/up-v0")

    @pytest.mark.parametrize(
        ("column", "said"),
        [
            (lambda n: pa.array([1.0] * n).dictionary_encode(), "it has dictionaries"),
            (lambda n: pa.nulls(n), "field 'rewards', episode 0: expected a column of numbers, got null"),
            (
                lambda n: pa.RunEndEncodedArray.from_buffers(
                    pa.run_end_encoded(pa.int32(), pa.float64()),
                    n,
                    [None],
                    children=[pa.array([n], pa.int32()), pa.array([1.0])],
                ),
                "a column of numbers, got run_end",
            ),
            (lambda n: pa.array(["x"] * n), "expected a column of numbers, got string"),
        ],
    )
    def test_types(self, stored: Any, column: Callable[[int], Any], said: str) -> None:
        def change(table: Any) -> Any:
            return table.set_column(table.column_names.index("rewards"), "rewards", column(table.num_rows))

        self._rewrite(stored("arrow"), change)
        with pytest.raises(DatasetError, match=said):
            from_minari("made/up-v0")

    @pytest.mark.skipif(not hasattr(pa, "ListViewArray"), reason="this pyarrow has no views")
    def test_views_in_infos(self, stored: Any) -> None:
        def change(table: Any) -> Any:
            n = table.num_rows
            return table.append_column("infos", pa.ListViewArray.from_arrays([0] * n, [50] * n, pa.array([0.0] * 50)))

        self._rewrite(stored("arrow"), change)
        with pytest.raises(
            DatasetError, match="field 'infos', episode 0: expected numbers, text or lists of them, got list_view"
        ):
            from_minari("made/up-v0")

    def test_offsets_out_of_range(self, stored: Any) -> None:
        """Arrow itself would read beyond the buffer."""
        data = stored("arrow")
        self._rewrite(data, lambda table: table.append_column("infos", pa.array(["abcd"] * table.num_rows)))
        (path,) = (data / "0").glob("*.arrow")
        content, offsets = path.read_bytes(), struct.pack("<5i", 0, 4, 8, 12, 16)
        assert content.count(offsets) == 1
        path.write_bytes(content.replace(offsets, struct.pack("<5i", 0, 4, 8, 12, 2**30)))
        with pytest.raises(DatasetError, match=r"episode 0: Minari cannot read this episode .*ArrowInvalid"):
            from_minari("made/up-v0")

    def test_values_that_are_missing(self, stored: Any) -> None:
        def change(table: Any) -> Any:
            width = pa.list_(pa.float32(), 1)
            return table.set_column(table.column_names.index("actions"), "actions", pa.array([None] * table.num_rows, width))

        self._rewrite(stored("arrow"), change)
        with pytest.raises(DatasetError, match="field 'actions', episode 0: expected a value in each row, got none in some"):
            from_minari("made/up-v0")

    def test_one_part_many_times(self, stored: Any, cases: Any) -> None:
        data = stored("arrow")
        (path,) = (data / "0").glob("*.arrow")
        with pa.OSFile(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            for _ in range(9):
                writer.write_batch(batch)
        content = bytearray(path.read_bytes())
        length = struct.unpack("<i", content[-10:-6])[0]
        start = len(content) - 10 - length
        # Blocks are 24 bytes: let all of them be the first, which is said to be as long as all.
        footer = bytes(content[start:])
        lengths = sorted(
            struct.unpack_from("<qi4xq", footer, at) for at in range(length - 24) if footer[at : at + 2] != b"\0\0"
        )
        block = next(entry for entry in lengths if 0 < entry[1] < 5000 and 0 < entry[2] < 5000 and 8 <= entry[0] < start)
        for at in range(start, start + length - 24):
            entry = struct.unpack_from("<qi4xq", content, at)
            if entry[1:] == block[1:]:
                struct.pack_into("<qi4xq", content, at, block[0], block[1], start)
        path.write_bytes(bytes(content))
        with pytest.raises(DatasetError, match="its parts are larger than the file"):
            from_minari("made/up-v0")

    @pytest.mark.skipif(not HAS_PARQUET, reason="this Minari has no Parquet")
    def test_parquet_that_declares_more(self, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        data = stored("parquet")
        assert len(from_minari("made/up-v0")) == 5
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", "100")
        with pytest.raises(DatasetError, match="made/up-v0, episode 0: expected at most 100 bytes"):
            from_minari("made/up-v0")
        (path,) = (data / "0").glob("*.parquet")
        n = 10**6
        table = pq.read_table(path)
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.nulls(n * kind.list_size, kind.value_type).fill_null(0), type=kind)
            if pa.types.is_fixed_size_list(kind)
            else pa.nulls(n, kind).fill_null(0 if pa.types.is_floating(kind) else False)
            for kind in table.schema.types
        ]
        pq.write_table(pa.table(columns, names=table.column_names), path)
        monkeypatch.delenv("CQL_PLUGINS_MAX_MEMORY")
        monkeypatch.setattr(_untrusted, "SMALL", 1000)
        monkeypatch.setattr(_untrusted, "PACKED_AT_MOST", 400)
        with pytest.raises(DatasetError, match="episode 0: expected at most 400 bytes for each one stored, got 22,000,000"):
            from_minari("made/up-v0")

    @pytest.mark.skipif(not HAS_PARQUET, reason="this Minari has no Parquet")
    @pytest.mark.parametrize("nested", [False, True])
    def test_parquet_that_packs_well(self, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
        """Bytes of images are counted as bytes, also those in dicts."""
        space: spaces.Space[Any] = spaces.Box(0, 255, (50, 40), np.uint8)
        seen: Any = np.zeros((1001, 50, 40), np.uint8)
        if nested:
            space, seen = spaces.Dict({"eye": space}), {"eye": seen}
        ends = np.arange(1000) == 999
        dataset = OfflineDataset(
            seen,
            np.zeros(1000, int),
            np.zeros(1000),
            ~ends & False,
            ends,
            observation_space=space,
            action_space=spaces.Discrete(2),
        )
        to_minari(dataset, "made/up-v0", data_format="parquet")
        n_bytes, asked = 1001 * 50 * 40, []
        monkeypatch.setattr(_arrow, "check_packed", lambda declared, *_: asked.append(declared))
        assert len(from_minari("made/up-v0")) == 1000
        assert [n_bytes < declared < 1.1 * n_bytes for declared in asked] == [True]

    def test_arrow_that_is_larger_than_memory(self, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = stored("arrow")
        (path,) = (data / "0").glob("*.arrow")
        monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(2 * path.stat().st_size - 1))
        with pytest.raises(DatasetError, match=r"made/up-v0, episode 0: expected at most .* bytes, reading what is declared"):
            from_minari("made/up-v0", storage="memmap", cache_dir=tmp_path / "cache")

    def test_pipe_in_an_episode(self, stored: Any) -> None:
        os.mkfifo(stored("arrow") / "0" / "pipe")
        with pytest.raises(DatasetError, match="is a pipe"):
            from_minari("made/up-v0")


# The cache ------------------------------------------------------------------------------------------------------------


class TestCache:
    """Whatever is in the place of an entry is written again; nothing else is opened or removed."""

    @pytest.fixture
    def read(self, write_npz: Any, tmp_path: Path, quietly: Any) -> Callable[[], OfflineDataset]:
        path = write_npz({})
        return lambda: quietly(from_npz, path, storage="memmap", cache_dir=tmp_path / "cache")

    @pytest.fixture
    def entry(self, read: Any, tmp_path: Path) -> Path:
        read()
        (entry,) = (tmp_path / "cache").iterdir()
        return entry

    def _is_written_again(self, read: Any, entry: Path) -> None:
        before = (entry / "manifest.json").lstat().st_ino if (entry / "manifest.json").exists() else None
        assert read().rewards.tolist() == [1, 2, 4, 8, 16]
        assert [path.name for path in entry.parent.iterdir() if not path.name.startswith(".")] == [entry.name]
        assert entry.is_dir()
        assert not entry.is_symlink()
        assert not any(path.is_symlink() for path in entry.iterdir())
        assert (entry / "manifest.json").stat().st_ino != before

    @pytest.mark.parametrize("name", ["manifest.json", "rewards"])
    @pytest.mark.parametrize("sort", ["pipe", "folder", "link", "nothing"])
    def test_no_plain_file(self, read: Any, entry: Path, name: str, sort: str, tmp_path: Path) -> None:
        name = json.loads((entry / "manifest.json").read_text())["arrays"][name]["file"] if name == "rewards" else name
        (entry / name).rename(tmp_path / "moved")
        if sort == "pipe":
            os.mkfifo(entry / name)
        elif sort == "folder":
            (entry / name).mkdir()
        elif sort == "link":
            (entry / name).symlink_to(tmp_path / "moved")
        self._is_written_again(read, entry)
        assert (tmp_path / "moved").exists()

    def test_entry_that_is_a_link(self, read: Any, entry: Path, tmp_path: Path) -> None:
        shutil.move(entry, tmp_path / "moved")
        entry.symlink_to(tmp_path / "moved")
        self._is_written_again(read, entry)
        assert (tmp_path / "moved" / "manifest.json").exists()

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("arrays", "rewards", "shape"), [4]),
            (("arrays", "rewards", "shape"), [-1]),
            (("arrays", "rewards", "shape"), [10**12]),
            (("arrays", "rewards", "shape"), [5, 0]),
            (("arrays", "rewards", "shape"), None),
            (("arrays", "rewards", "file"), "/etc/passwd"),
            (("arrays", "rewards", "file"), ".."),
            (("arrays", "rewards", "file"), "\0"),
            (("arrays", "rewards", "file"), 7),
            (("arrays", "rewards", "dtype"), "|O"),
            (("arrays", "actions"), {"keys": []}),
            (("arrays", "observations"), {"keys": [["a", {"keys": []}]]}),
            (("arrays",), []),
            (("action_space",), {"n": -1, "start": 0, "dtype": "<i8"}),
            (("action_space",), {"n": 5, "start": 0, "dtype": "<i8"}),
            (("observation_space", "low"), {}),
            (("inferred",), [[]]),
            (("notes",), 3),
        ],
    )
    def test_manifest(self, read: Any, entry: Path, place: tuple[str, ...], value: Any) -> None:
        manifest = json.loads((entry / "manifest.json").read_text())
        parent = manifest
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        (entry / "manifest.json").write_text(json.dumps(manifest))
        self._is_written_again(read, entry)

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"arrays": ' + '{"keys": [["a", ' * 3000, "[]", "", "\ud800"])
    def test_manifest_that_is_none(self, read: Any, entry: Path, text: str) -> None:
        (entry / "manifest.json").write_text(text, errors="surrogatepass")
        self._is_written_again(read, entry)

    @pytest.mark.parametrize(
        "content", [_header("(10000000000,)"), _header("(5,)", "'|O'") + bytes(40), b"", _header("(5,)") + bytes(39)]
    )
    def test_column(self, read: Any, entry: Path, content: bytes) -> None:
        name = json.loads((entry / "manifest.json").read_text())["arrays"]["rewards"]["file"]
        (entry / name).unlink()
        (entry / name).write_bytes(content)
        self._is_written_again(read, entry)

    @pytest.mark.parametrize(
        ("field", "values"), [("terminations", [False] * 5), ("truncations", [True] * 5), ("unflagged", [False])]
    )
    def test_columns_that_do_not_belong_together(self, read: Any, entry: Path, field: str, values: list[bool]) -> None:
        manifest = json.loads((entry / "manifest.json").read_text())
        name = manifest["arrays"][field]["file"]
        (entry / name).unlink()
        np.save(entry / name, np.array(values))
        manifest["arrays"][field]["shape"] = [len(values)]
        (entry / "manifest.json").write_text(json.dumps(manifest))
        self._is_written_again(read, entry)

    def test_what_killed_writers_left_is_not_followed(self, read: Any, entry: Path, tmp_path: Path, cases: Any) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "lock").write_text("")
        (entry.parent / ".writing-link").symlink_to(outside)
        for kind in (0, 2):
            (entry.parent / f".writing-{kind}").mkdir()
            cases.make_no_file(entry.parent / f".writing-{kind}" / "lock", kind, outside / "lock")
        left = entry.parent / ".writing-left"
        left.mkdir()
        (left / "lock").write_text("")
        (left / "link").symlink_to(outside)
        shutil.rmtree(entry)
        self._is_written_again(read, entry)
        assert (outside / "lock").exists()
        assert not left.exists()


# Fuzzing --------------------------------------------------------------------------------------------------------------


class _Unwatched:
    """An audit hook would stay for the rest of the suite."""

    on = False

    def skip(self) -> None:
        pass

    def collect(self) -> list[str]:
        return []


@pytest.mark.parametrize("reader", ["npz", "d4rl", "minari-hdf5", "minari-arrow", "cache"])
def test_fuzz(
    reader: str, tmp_path: Path, cases: Any, canary: Path, monkeypatch: pytest.MonkeyPatch, minari_home: Path
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("CQL_PLUGINS_MAX_MEMORY", str(2**28))
    readers = importlib.import_module("fuzz_readers")
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_home))  # put back at the end
    target = cases.TARGETS[reader](tmp_path / "base", canary)
    number = list(cases.TARGETS).index(reader)
    outcomes = [
        readers.run_case(target, [7, number, index], tmp_path / f"case{index}", canary, _Unwatched()) for index in range(40)
    ]
    assert {kind for kind, _ in outcomes} <= {"valid", "valid, with a warning", "refused"}, outcomes
    # Most are refused, for more than a few reasons; an entry of the cache is written again instead.
    assert len(set(outcomes)) > (10 if reader != "cache" else 0)
