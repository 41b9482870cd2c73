"""Hostile and broken inputs for each reader, made from a seed; `fuzz_readers.py` runs them by the thousand.

A target writes one input into an empty folder and returns the call that reads it. Many of the inputs are valid files with bytes
changed, the others are wrong in a way that only somebody who knows the format would choose. What leads out of the folder leads
to `canary/`, beside it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces

from cql_plugins.adapters import OfflineDataset, from_d4rl, from_minari, from_npz, to_minari

Rng = np.random.Generator
Read = Callable[[], OfflineDataset]
CANARY = 1234567.0
"""The value that every file outside the input holds: a data set that has it was read from there."""
GIANT = [2**31 - 1, 2**31, 2**32, 10**10, 10**12, 2**62, 2**63 - 1]


def make_canary(folder: Path) -> None:
    """Write the files that links out of an input lead to."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "canary.hdf5", "w") as file:
        for name in ("x", "observations", "actions"):
            file[name] = np.full((5, 2), CANARY, np.float32)
        file["vector"] = np.full(5, CANARY)
    np.full(64, CANARY).tofile(folder / "canary.raw")
    np.save(folder / "canary.npy", np.full(5, CANARY))
    (folder / "canary.json").write_text("{}")


def broken_already() -> Any:
    """Let a second change fail: what the first one broke cannot always be opened or changed again, and stays as it is."""
    return contextlib.suppress(Exception)


def steps(n_steps: int = 5, width: int = 2) -> dict[str, np.ndarray]:
    """A small valid record."""
    rng = np.random.default_rng(n_steps)
    observations = rng.normal(size=(n_steps + 1, width)).astype(np.float32)
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": rng.uniform(-1, 1, (n_steps, 1)).astype(np.float32),
        "rewards": rng.normal(size=n_steps),
        "terminals": np.zeros(n_steps, bool),
        "timeouts": np.arange(n_steps) == n_steps - 1,
    }


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def make_no_file(path: Path, kind: int, target: Path) -> None:
    """Put a pipe, a folder or a link in the place of a file."""
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        path.symlink_to(target)


# Any bytes ------------------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, rng: Rng) -> bytes:
    """Flip, overwrite, cut, repeat or move some bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            break
        # Headers are where the decisions are, and they are mostly at the start or the end.
        region = rng.choice(["all", "all", "start", "end"])
        low, high = {"all": (0, len(data)), "start": (0, min(512, len(data))), "end": (max(0, len(data) - 512), len(data))}[
            region
        ]
        at = int(rng.integers(low, high))
        kind = rng.choice(["flip", "bit", "word", "cut", "delete", "repeat", "splice", "junk", "zero"])
        size = int(rng.integers(1, 64))
        if kind == "flip":
            data[at] = int(rng.integers(256))
        elif kind == "bit":
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == "word":
            word = rng.choice(
                [b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0" * 8, b"\x01\0\0\0\0\0\0\0", b"\xfe\xff\xff\xff"]
            )
            data[at : at + len(word)] = word
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "splice":
            source = int(rng.integers(len(data)))
            data[at : at + size] = data[source : source + size]
        elif kind == "junk":
            data[at:at] = rng.bytes(size)
        else:
            data[at : at + size] = bytes(size)
    return bytes(data)


def any_value(rng: Rng) -> Any:
    """Something that is not expected in JSON."""
    values: list[Any] = [
        None,
        True,
        False,
        -1,
        0,
        1,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x" * 300,
        "../../canary",
        [],
        {},
    ]
    values += [*GIANT, -(2**63), [[]], {"type": "Box"}, "object", "U100000000", "/etc/passwd", "\0", [1] * 50, {"keys": []}]
    return values[int(rng.integers(len(values)))]


def change_json(text: str, rng: Rng) -> str:
    """Change one value anywhere in a JSON text, or the text itself."""
    kind = rng.integers(10)
    if kind == 0:
        return change_bytes(text.encode(), rng).decode("utf-8", "replace")
    if kind == 1:
        depth = int(rng.choice([20, 500, 100_000]))
        nested = rng.choice(["[", '{"keys":[["a",', '{"type":"Dict","subspaces":{"a":', '{"a":'])
        value = str(nested) * depth
        return value if rng.integers(2) else text.replace("{", '{"source":' + value + "1" + "]" * depth + ",", 1)
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):  # broken already
        return change_bytes(text.encode(), rng).decode("utf-8", "replace")
    for _ in range(int(rng.integers(1, 3))):
        node, parents = root, []
        while isinstance(node, dict | list) and node:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[int(rng.integers(len(keys)))]
            parents.append((node, key))
            node = node[key]
            if rng.integers(3) == 0:
                break
        if not parents:
            return json.dumps(any_value(rng))
        parent, key = parents[-1]
        if rng.integers(4) == 0:
            del parent[key]
        elif isinstance(node, str) and node.startswith("{") and rng.integers(2):
            parent[key] = change_json(node, rng)  # Minari keeps JSON in its JSON
        else:
            parent[key] = any_value(rng)
    return json.dumps(root)


def change_array(array: np.ndarray, rng: Rng) -> np.ndarray:
    """Change values, shape or dtype of one array, so that it stays an array of numbers."""
    kind = rng.integers(12)
    if kind == 0:
        return array[: int(rng.integers(len(array) + 1))]
    if kind == 1:
        return np.concatenate((array, array))
    if kind == 2:
        return array.reshape(-1)
    if kind == 3:
        return array[..., None]
    if kind == 4:
        return array[:, None, :0] if array.ndim > 1 else array[:, None][:, :0]
    if kind == 5:
        return np.asarray(array[0] if len(array) else 0.0)
    if kind == 6:
        return np.zeros(int(rng.integers(3)) * (0,) + (0,) if rng.integers(2) else (0, 5), array.dtype)
    if kind in (7, 8):
        dtype = rng.choice(["<f2", ">f4", "<f8", "<f16", "<i1", ">i8", "<u8", "<i4", "?", "<u2", "|u1"])
        with np.errstate(all="ignore"):
            return array.astype(str(dtype))
    changed = array.astype(np.float64 if array.dtype.kind == "f" else array.dtype).copy().reshape(-1)
    if changed.size:
        value = rng.choice([np.nan, np.inf, -np.inf, 1e308, -1.0, 2.0, 0.0, 1e-320])
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed[int(rng.integers(changed.size))] = np.array(value).astype(changed.dtype)
    return changed.reshape(array.shape)


# npz ------------------------------------------------------------------------------------------------------------------


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_with_header(header: str, values: bytes = b"\0" * 40, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1", "replace") + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text) % 65536) + text + values


def hostile_npy(rng: Rng, canary: Path) -> bytes:
    """A member that is no plain array of numbers, or says that it is larger than it is."""
    giant = int(rng.choice(GIANT))
    headers = [
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({giant},)}}",
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({giant}, {giant})}}",
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({giant}, 0)}}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-5,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 5)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (5.0,)}",
        "{'descr': '<f8', 'fortran_order': 3, 'shape': (5,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (5,)}",
        "{'descr': [('a', '<f8'), ('b', '|O')], 'fortran_order': False, 'shape': (2,)}",
        f"{{'descr': '|V{min(giant, 2**31 - 1)}', 'fortran_order': False, 'shape': (1,)}}",
        f"{{'descr': '<U{2**28}', 'fortran_order': False, 'shape': (1,)}}",
        "{'descr': ('<f8', (2, 2)), 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (5,)",
        "(" * 5000,
        "[" * 9000 + "]" * 9000,
        "{[]: 1}",
        "-" * 8000 + "1",
        "'" + "x" * 60000 + "'",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (5,)}",
        "{'descr': {'names': ['a'], 'formats': ['<f8']}, 'fortran_order': False, 'shape': (5,)}",
        "{'descr': [], 'fortran_order': False, 'shape': (5,)}",
        "{'descr': '', 'fortran_order': False, 'shape': (5L,)}",
        "\x00",
    ]
    choice = int(rng.integers(len(headers) + 3))
    if choice == len(headers):
        return npy_bytes(np.array([Trap(canary / "unpickled")] * 5, dtype=object))
    if choice == len(headers) + 1:
        return b"not an array"
    if choice == len(headers) + 2:
        return npy_bytes(np.arange(5.0))[: int(rng.integers(40))]
    version = [(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)][int(rng.integers(5))]
    return npy_with_header(headers[choice], version=version)


def zip_bomb(member: str, n_bytes: int = 3 * 10**8) -> tuple[str, bytes, int]:
    """A member of zeros: header and all, packed here in pieces, to a thousandth of its size."""
    header = npy_with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({n_bytes // 8},)}}", b"")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [packer.compress(header)]
    parts += [packer.compress(bytes(10**6)) for _ in range(n_bytes // 10**6)]
    return member, b"".join([*parts, packer.flush()]), len(header) + n_bytes // 10**6 * 10**6


def write_zip(path: Path, members: list[tuple[str, bytes]], packing: int) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Duplicate names are meant.
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, packing)


class Npz:
    """`from_npz`."""

    def __init__(self, base: Path, canary: Path) -> None:
        self.canary = canary
        self.bomb = functools.cache(lambda: zip_bomb("rewards.npy"))  # a second's work
        self.valid = []
        for number, save in enumerate((np.savez, np.savez_compressed)):
            for fields in (steps(), steps(40, 3)):
                save(base / f"{number}.npz", **fields)  # type: ignore[arg-type]
                self.valid.append((base / f"{number}.npz").read_bytes())

    def write(self, folder: Path, rng: Rng) -> Read:
        path = folder / "log.npz"
        kind = int(rng.integers(10))
        if kind < 5:
            path.write_bytes(change_bytes(self.valid[int(rng.integers(len(self.valid)))], rng))
        elif kind == 5 and rng.integers(3) == 0:
            self._special(path, rng)
        else:
            self._members(path, rng)
        options: dict[str, Any] = {}
        if rng.integers(4) == 0:
            options = {"storage": "memmap", "cache_dir": folder / "cache"}
        return lambda: from_npz(path, **options)

    def _special(self, path: Path, rng: Rng) -> None:
        kind = int(rng.integers(5))
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to("/dev/zero")
        elif kind == 3:
            name, packed, n_bytes = self.bomb()
            write_zip(path, [(f"{key}.npy", npy_bytes(value)) for key, value in steps().items() if key != "rewards"], 8)
            _append_deflated(path, name, packed, n_bytes)
        else:
            path.write_bytes(npy_with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**40},)}}"))

    def _members(self, path: Path, rng: Rng) -> None:
        fields: dict[str, Any] = dict(steps())
        for _ in range(int(rng.integers(1, 4))):
            key = str(rng.choice(list(fields)))
            kind = int(rng.integers(12))
            if kind < 4:
                if isinstance(fields[key], np.ndarray):
                    with broken_already():
                        fields[key] = change_array(fields[key], rng)
            elif kind < 6:
                fields[key] = hostile_npy(rng, self.canary)
            elif kind == 6:
                del fields[key]
            elif kind == 7:
                names = [
                    "../observations",
                    "/etc/passwd",
                    "observations/../x",
                    "observations//x",
                    "observations/",
                    "x\0y",
                    "observations/x",
                ]
                names += [
                    "observations/x/y",
                    "observations/" + "a/" * 400 + "b",
                    "actions/x",
                    "terminations",
                    "truncations",
                    "..",
                    "C:\\x",
                ]
                fields[names[int(rng.integers(len(names)))]] = fields[key]
            elif kind == 8:
                for branch in ("observations", "next_observations"):
                    if branch in fields:
                        fields |= {f"{branch}/a": fields[branch], f"{branch}/b/c": fields.pop(branch)}
            elif kind == 9:
                fields["observations"] = np.arange(5) if rng.integers(2) else np.array([2**63 - 1] * 5)
                fields.pop("next_observations", None)
            elif kind == 10:
                fields["other"] = hostile_npy(rng, self.canary)
            else:
                fields[key] = change_bytes(npy_bytes(fields[key]), rng) if isinstance(fields[key], np.ndarray) else fields[key]
            if not fields:
                break
        members = [(f"{key}.npy", value if isinstance(value, bytes) else npy_bytes(value)) for key, value in fields.items()]
        if members and rng.integers(8) == 0:
            members.append(members[int(rng.integers(len(members)))])
        packing = int(rng.choice([0, 8, 8, 8, 12, 14]))
        write_zip(path, members, packing)
        if rng.integers(5) == 0:
            path.write_bytes(_change_zip(path.read_bytes(), rng))


def _append_deflated(path: Path, name: str, packed: bytes, n_bytes: int) -> None:
    """Add a member whose packed bytes are given."""
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        archive.writestr(info, packed)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, n_bytes
        archive._didModify = True  # type: ignore[attr-defined]


def _change_zip(content: bytes, rng: Rng) -> bytes:
    """Change a field of one entry in the directory at the end: flags, packing, sizes, place."""
    data = bytearray(content)
    entries = [at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"]
    if entries:
        at = entries[int(rng.integers(len(entries)))]
        offset, size = [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4), (34, 2)][int(rng.integers(8))]
        choices = [b"\xff" * size, b"\0" * size, b"\x01" + b"\0" * (size - 1), rng.bytes(size)]
        data[at + offset : at + offset + size] = choices[int(rng.integers(4))]
    return bytes(data)


# HDF5 -----------------------------------------------------------------------------------------------------------------


def chunk_bomb(group: Any, name: str, n_bytes: int) -> None:
    """A small data set whose one chunk unpacks to far more than a chunk."""
    data = group.create_dataset(name, shape=(5,), chunks=(5,), dtype="f8", compression="gzip")
    data.id.write_direct_chunk((0,), zlib.compress(bytes(n_bytes), 9))


def hostile_member(group: Any, name: str, rng: Rng, canary: Path, shape: tuple[int, ...] = (5,)) -> None:
    """Replace a member of a group by one that leads elsewhere, is no plain data, or is not what it says."""
    if name in group:
        del group[name]
    relative = f"../{canary.name}" if rng.integers(2) else str(canary)
    outside, raw = f"{relative}/canary.hdf5", f"{relative}/canary.raw"
    giant = int(rng.choice(GIANT[2:5]))
    low = h5py.h5d
    kind = int(rng.integers(31))
    if kind == 0:
        group[name] = h5py.ExternalLink(outside, "vector" if len(shape) == 1 else "x")
    elif kind == 1:
        group[name] = h5py.SoftLink("/rewards" if rng.integers(2) else f"/{name}")
    elif kind == 2:
        layout = h5py.VirtualLayout(shape=shape, dtype="f8")
        layout[...] = h5py.VirtualSource(outside, "vector" if len(shape) == 1 else "x", shape=shape)
        group.create_virtual_dataset(name, layout)
    elif kind == 3:
        group.create_dataset(name, shape=shape, dtype="f8", external=[(raw, 0, h5py.h5f.UNLIMITED)])
    elif kind == 4:
        group.create_dataset(name, shape=(giant, *shape[1:]), chunks=(64, *shape[1:]), dtype="f8", compression="gzip")
    elif kind == 5:
        group.create_dataset(name, shape=(giant, *shape[1:]), dtype="f8")  # never written
    elif kind == 6:
        group.create_dataset(name, shape=shape, maxshape=(None, *shape[1:]), chunks=(2**27, *shape[1:]), dtype="f8")
    elif kind == 7:
        chunk_bomb(group, name, 2**24)
    elif kind == 8:
        group.create_dataset(name, data=[b"text"] * 5 if rng.integers(2) else ["text"] * 5)
    elif kind == 9:
        data = group.create_dataset(name, shape=(5,), dtype=h5py.vlen_dtype(np.uint8))
        data[0] = np.arange(9, dtype=np.uint8)
    elif kind == 10:
        group.create_dataset(name, data=np.zeros(shape, dtype=[("a", "f8"), ("b", "i4")]))
    elif kind == 11:
        data = group.create_dataset(name, shape=(5,), dtype=h5py.ref_dtype)
        data[0] = group.ref
    elif kind == 12:
        group.create_dataset(name, data=h5py.Empty("f8"))
    elif kind == 13:
        group.create_dataset(name, data=3.0)
    elif kind == 14:
        group.create_group(name)[name] = group  # a circle
    elif kind == 15:
        if len(group):
            group[name] = group[next(iter(group))]  # two names
    elif kind == 16:
        parent = group.create_group(name)
        for _ in range(24):  # 2 ** 24 ways to one array
            child = parent.create_group("a")
            parent["b"] = child
            parent = child
        parent["a"] = np.zeros(shape)
    elif kind == 17:
        group[name] = np.dtype("f8")
    elif kind == 18:
        group.create_dataset(name, data=np.zeros(shape, complex))
    elif kind == 19:
        group.create_dataset(name, data=np.zeros(shape, "i1"), dtype=h5py.enum_dtype({"a": 0, "b": 1}, "i1"))
    elif kind == 20:
        group.create_dataset(name, data=np.zeros(shape, h5py.opaque_dtype("M8[s]")))
    elif kind == 21:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(shape)
        properties.set_filter(int(rng.choice([32015, 32001, 305, 1, 6, 65535])), h5py.h5z.FLAG_OPTIONAL, (5,))
        low.create(group.id, name.encode(), h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple(shape), properties)
    elif kind == 22:
        group.create_dataset(name, data=np.zeros(shape), compression="lzf", fletcher32=True, shuffle=True)
    elif kind == 23:
        group.create_dataset(name, data=np.zeros(shape, "i4"), scaleoffset=0)
    elif kind == 24:
        data = group.create_dataset(name, shape=shape, chunks=shape, dtype="f8", compression="gzip")
        data.id.write_direct_chunk((0,) * len(shape), rng.bytes(40))
    elif kind == 25:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(shape)
        for _ in range(2):
            properties.set_deflate(9)
        low.create(group.id, name.encode(), h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple(shape), properties)
    elif kind == 26:
        group.create_dataset(name, data=np.zeros((5, *(1,) * int(rng.integers(2, 31)))))
    elif kind == 27:
        group.create_dataset(name, shape=(giant, 0), maxshape=(None, None), chunks=(4, 4), dtype="f8")
    elif kind == 28:
        nested = group
        for _ in range(int(rng.choice([3, 40]))):
            nested = nested.require_group(name if nested is group else "a")
        nested["a"] = np.zeros(shape)
    elif kind == 29:
        group.create_dataset(name, data=np.zeros(shape, "f8"), track_times=True).attrs["x"] = h5py.Empty("f4")
    else:
        group.create_dataset(name, shape=(10_000, *shape[1:]), chunks=(10, *shape[1:]), dtype="f8")[:10] = 1.0


class D4rl:
    """`from_d4rl` on files."""

    def __init__(self, base: Path, canary: Path) -> None:
        self.canary = canary
        self.valid = []
        variants: list[tuple[Any, dict[str, Any]]] = [
            (None, {}),
            (None, {"compression": "gzip", "chunks": True}),
            ("latest", {}),
        ]
        for number, (version, options) in enumerate(variants):
            path = base / f"{number}.hdf5"
            with h5py.File(path, "w", libver=version) as file:
                for key, value in steps(40, 3).items():
                    file.create_dataset(key, data=value, **options)
            self.valid.append(path.read_bytes())

    def write(self, folder: Path, rng: Rng) -> Read:
        path = folder / "log.hdf5"
        kind = int(rng.integers(20))
        if kind < 9:
            path.write_bytes(change_bytes(self.valid[int(rng.integers(len(self.valid)))], rng))
        elif kind == 9 and rng.integers(2):
            make_no_file(path, int(rng.integers(3)), Path("/dev/zero"))
        else:
            self._members(path, rng)
        options: dict[str, Any] = {}
        if rng.integers(4) == 0:
            options = {"storage": "memmap", "cache_dir": folder / "cache"}
        return lambda: from_d4rl(path, **options)

    def _members(self, path: Path, rng: Rng) -> None:
        fields: dict[str, Any] = dict(steps())
        chosen = str(rng.choice(list(fields)))
        if rng.integers(2):
            fields[chosen] = change_array(fields[chosen], rng)
        with broken_already(), h5py.File(path, "w", libver=str(rng.choice(["earliest", "latest"]))) as file:
            for key, value in fields.items():
                file.create_dataset(key, data=value, **({"compression": "gzip"} if rng.integers(2) and value.ndim else {}))
            for _ in range(int(rng.integers(3))):
                name = str(rng.choice([*fields, "other", "infos"]))
                hostile_member(
                    file, name, rng, self.canary, fields[name].shape if name in fields and fields[name].size else (5,)
                )
            if rng.integers(10) == 0:
                for key in ("observations", "next_observations"):
                    if isinstance(file.get(key, getlink=True), h5py.HardLink):
                        file.move(key, "moved")
                        file[f"{key}/x"] = fields[key]
                        del file["moved"]
        if rng.integers(8) == 0:
            path.write_bytes(change_bytes(path.read_bytes(), rng))


# Minari ---------------------------------------------------------------------------------------------------------------


def _plain() -> OfflineDataset:
    fields = steps(6)
    return OfflineDataset(
        np.concatenate((fields["observations"], fields["observations"][:2])),
        fields["actions"],
        fields["rewards"],
        np.array([False, False, True, False, False, False]),
        fields["timeouts"],
        observation_space=spaces.Box(-np.inf, np.inf, (2,)),
        action_space=spaces.Box(-1, 1, (1,)),
        env_id="Pendulum-v1",
        references=(0.0, 1.0),
    )


def _with_images(dataset_id: str, data_format: str) -> None:
    """Dict observations with an image, as JPEG files, and infos."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rng = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations={"eye": rng.integers(0, 256, (4, 32, 33, 3), dtype=np.uint8), "room": np.arange(4)},
            actions=[0, 1, 0],
            rewards=[0.0, 1.0, 2.0],
            terminations=[False, False, True],
            truncations=[False] * 3,
            infos={"text": ["a", "bb", "ccc", "d"], "deep": {"x": np.arange(4.0)}}
            if data_format == "hdf5"
            else {"x": np.ones((4, 2))},
        )
        for _ in range(2)
    ]
    minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        observation_space=spaces.Dict({"eye": spaces.Box(0, 255, (32, 33, 3), np.uint8), "room": spaces.Discrete(4)}),
        action_space=spaces.Discrete(2),
        data_format=data_format,
    )


class Minari:
    """`from_minari`; the formats that share a kind of storage are one target."""

    def __init__(self, base: Path, canary: Path, formats: tuple[str, ...]) -> None:
        self.canary = canary
        storages = importlib.import_module("minari.dataset._storages").get_storage_keys()
        self.formats = formats = tuple(each for each in formats if each in storages)
        self.home = base / "minari"
        os.environ["MINARI_DATASETS_PATH"] = str(self.home)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data_format in formats:
                to_minari(_plain(), f"{data_format}/plain-v0", data_format=data_format)
                _with_images(f"{data_format}/images-v0", data_format)

    def write(self, folder: Path, rng: Rng) -> Read:
        data_format, kind = str(rng.choice(self.formats)), str(rng.choice(["plain", "plain", "images"]))
        dataset_id = f"{data_format}/{kind}-v0"
        data = folder / dataset_id / "data"
        shutil.copytree(self.home / dataset_id / "data", data)
        for _ in range(int(rng.choice([1, 1, 1, 2]))):
            choice = int(rng.integers(20))
            if choice < 5:
                path = data / "metadata.json"
                path.write_text(change_json(path.read_text(), rng))
            elif choice == 5:
                self._run_code(data / "metadata.json", rng)
            elif choice == 6:
                dataset_id = self._folder(folder, data, dataset_id, rng)
            elif choice < 13:
                files = sorted(path for path in data.rglob("*") if path.is_file() and path.name != "metadata.json")
                path = files[int(rng.integers(len(files)))] if files else data / "x"
                path.write_bytes(change_bytes(path.read_bytes(), rng) if files else b"x")
            elif not (data / ("main_data.hdf5" if data_format == "hdf5" else "0")).exists():
                pass
            elif data_format == "hdf5":
                with broken_already():
                    self._hdf5(data / "main_data.hdf5", rng)
            else:
                with broken_already():
                    self._columns(data, data_format, rng)
            if not data.is_dir() or not (data / "metadata.json").is_file():
                break
        options: dict[str, Any] = {}
        if rng.integers(6) == 0:
            options = {"storage": "memmap", "cache_dir": folder / "cache"}

        def read() -> OfflineDataset:
            os.environ["MINARI_DATASETS_PATH"] = str(folder)
            return from_minari(dataset_id, **options)

        return read

    def _run_code(self, path: Path, rng: Rng) -> None:
        """Metadata that would make Minari build, hence call, what it names."""
        try:
            metadata = json.loads(path.read_text())
        except (ValueError, RecursionError):
            return
        if not isinstance(metadata, dict):
            return
        for key in ("observation_space", "action_space"):
            if rng.integers(4):
                metadata.pop(key, None)
        mark = str(self.canary / "ran")
        entry: dict[str, Any] = {"entry_point": "os:mkdir", "kwargs": {"path": mark}}
        if rng.integers(2):
            entry = {"entry_point": "os:system", "kwargs": {"command": f"touch {mark}"}}
        metadata["env_spec"] = json.dumps({"id": "x-v0", **entry, "additional_wrappers": []})
        path.write_text(json.dumps(metadata))

    def _folder(self, folder: Path, data: Path, dataset_id: str, rng: Rng) -> str:
        kind = int(rng.integers(9))
        files = sorted(path for path in data.rglob("*") if path.is_file())
        victim = files[int(rng.integers(len(files)))]
        if kind == 0:
            return str(
                rng.choice(
                    ["../canary-v0", "/etc-v0", "..", "a/../../canary-v0", "", "x\0-v0", "~", f"{folder}/{dataset_id}", "a-v0"]
                )
            )
        if kind == 1:
            victim.unlink()
            os.mkfifo(victim)
        elif kind == 2:
            victim.unlink()
            victim.symlink_to(self.canary / ("canary.json" if victim.suffix == ".json" else "canary.hdf5"))
        elif kind == 3:
            victim.unlink()
        elif kind == 4:
            (data / "loop").symlink_to(data / "loop")
        elif kind == 5:
            victim.unlink()
            victim.mkdir()
        elif kind == 6:
            os.mkfifo(data / "pipe")
        elif kind == 7:
            (data / "linked").symlink_to(self.canary)
        else:
            victim.write_bytes(b"")
        return dataset_id

    def _hdf5(self, path: Path, rng: Rng) -> None:
        with h5py.File(path, "r+") as file:
            episode = file.get("episode_0" if rng.integers(2) else "episode_1")
            if not isinstance(episode, h5py.Group):
                return
            image = "eye" if isinstance(episode.get("observations"), h5py.Group) else None
            choice = int(rng.integers(8))
            if choice == 0:
                hostile_member(file, "episode_0", rng, self.canary)
            elif choice == 1 and image is not None:
                self._image(episode["observations"], rng)
            elif choice == 2:
                infos = episode.require_group("infos")
                if rng.integers(2):
                    infos["self"] = episode
                else:
                    data = (
                        infos.create_dataset("text", shape=(200,), dtype=h5py.string_dtype()) if "text" not in infos else None
                    )
                    if data is not None:
                        data[0] = "x" * 100_000
            elif choice < 5:
                hostile_member(episode.require_group("infos") if rng.integers(4) == 0 else episode, "actions", rng, self.canary)
            else:
                name = str(rng.choice(["observations", "rewards", "terminations", "truncations", "actions"]))
                if isinstance(episode.get(name), h5py.Dataset) and rng.integers(2):
                    changed = change_array(episode[name][()], rng)
                    del episode[name]
                    episode[name] = changed
                else:
                    hostile_member(episode, name, rng, self.canary, (3, 2) if name == "observations" else (3,))

    def _image(self, group: Any, rng: Rng) -> None:
        from PIL import Image

        frames = []
        for _ in range(4):
            buffer = io.BytesIO()
            size = (33, 32) if rng.integers(2) else (300, 200)
            Image.new("RGB", size).save(buffer, str(rng.choice(["JPEG", "PNG", "BMP", "GIF"])))
            content = buffer.getvalue()
            if rng.integers(3) == 0:
                content = (
                    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 33 32\n" if rng.integers(2) else change_bytes(content, rng)
                )
            frames.append(np.frombuffer(content, np.uint8))
        del group["eye"]
        data = group.create_dataset("eye", shape=(4,), dtype=h5py.vlen_dtype(np.uint8))
        for index, frame in enumerate(frames):
            data[index] = frame

    def _columns(self, data: Path, data_format: str, rng: Rng) -> None:
        """Write other columns in the place of the first episode's."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = sorted(path for path in (data / "0").rglob("*") if path.is_file() and path.suffix != ".json")
        if not paths:
            return
        if data_format == "parquet":
            table = pq.read_table(paths[0])
        else:
            with pa.OSFile(str(paths[0])) as source:
                table = pa.ipc.open_file(source).read_all()
        n = table.num_rows
        name = str(rng.choice(table.column_names))
        columns: list[Any] = [
            pa.nulls(n),
            pa.array([None] * n, pa.float64()),
            pa.array(["x"] * n),
            pa.array(["x"] * n).dictionary_encode(),
            pa.array([[1.0] * 3] * n),
            pa.array([[]] * n, pa.list_(pa.float64(), 0)),
            pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32(), 2)),
            pa.array([1] * n, pa.int64()),
            pa.array([{"eye": b"x", "room": 1}] * n),
            pa.array([float("nan")] * n),
            pa.array([[0.0] * 1000] * n, pa.list_(pa.float64(), 1000)),
            pa.array([1] * n, pa.timestamp("s")),
        ]
        if data_format == "arrow":
            with contextlib.suppress(TypeError):  # Older ones cannot make one.
                columns.append(pa.RunEndEncodedArray.from_arrays(pa.array([n], pa.int32()), pa.array([1.0])))
            if hasattr(pa, "ListViewArray"):
                columns.append(pa.ListViewArray.from_arrays([0] * n, [1000] * n, pa.array([0.0] * 1000)))
        choice = int(rng.integers(6))
        if choice == 0:
            table = table.drop_columns([name])
        elif choice == 1:
            table = table.append_column(name, table.column(name))
        elif choice == 2:
            table = table.slice(0, int(rng.integers(n + 1)))
        elif choice == 3:
            table = table.append_column("infos", columns[int(rng.integers(len(columns)))])
        else:
            index = table.column_names.index(name)
            table = table.set_column(index, name, columns[int(rng.integers(len(columns)))])
        if data_format == "parquet":
            pq.write_table(table, paths[0], compression=str(rng.choice(["snappy", "zstd", "none"])))
            return
        options = pa.ipc.IpcWriteOptions(compression=[None, None, "zstd", "lz4"][int(rng.integers(4))])
        with pa.OSFile(str(paths[0]), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
            for _ in range(int(rng.choice([1, 1, 2]))):
                writer.write_table(table)


# The cache ------------------------------------------------------------------------------------------------------------


class Cache:
    """An entry of the cache of `storage="memmap"`, changed between two reads."""

    def __init__(self, base: Path, canary: Path) -> None:
        self.canary = canary
        self.base = base
        for number in range(2):
            fields: dict[str, Any] = dict(steps())
            if number:
                for key in ("observations", "next_observations"):
                    fields |= {f"{key}/a": fields[key], f"{key}/b/c": fields.pop(key)}
            np.savez(base / f"{number}.npz", **fields)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from_npz(base / f"{number}.npz", storage="memmap", cache_dir=base / f"cache{number}")

    def write(self, folder: Path, rng: Rng) -> Read:
        number = int(rng.integers(2))
        cache, source = folder / "cache", self.base / f"{number}.npz"
        shutil.copytree(self.base / f"cache{number}", cache)
        (entry,) = cache.iterdir()
        for _ in range(int(rng.choice([1, 1, 2]))):
            choice = int(rng.integers(12))
            manifest = entry / "manifest.json"
            if not manifest.is_file():
                break
            columns = sorted(path for path in entry.glob("*.npy") if path.is_file())
            if choice < 6 or not columns:
                manifest.write_text(change_json(manifest.read_text(), rng))
                continue
            column = columns[int(rng.integers(len(columns)))]
            if choice < 9:
                column.write_bytes(change_bytes(column.read_bytes(), rng))
            elif choice == 9:
                column.write_bytes(hostile_npy(rng, self.canary))
            elif choice == 10:
                with broken_already():
                    np.save(column, change_array(np.load(column, allow_pickle=False), rng))
            else:
                self._place(cache, entry, [column, manifest][int(rng.integers(2))], rng)
                break
        return lambda: from_npz(source, storage="memmap", cache_dir=cache)

    def _place(self, cache: Path, entry: Path, victim: Path, rng: Rng) -> None:
        kind = int(rng.integers(7))
        if kind == 0:
            victim.unlink()
            os.mkfifo(victim)
        elif kind == 1:
            victim.unlink()
            victim.symlink_to(self.canary / ("canary.npy" if victim.suffix == ".npy" else "canary.json"))
        elif kind == 2:
            shutil.copytree(entry, self.canary / "entry", dirs_exist_ok=True)
            shutil.rmtree(entry)
            entry.symlink_to(self.canary / "entry")
        elif kind == 3:
            shutil.rmtree(entry)
            entry.write_bytes(b"x")
        elif kind == 4:
            left = cache / ".writing-x"
            left.mkdir()
            [os.mkfifo, lambda path: path.symlink_to(self.canary / "canary.json"), Path.mkdir][int(rng.integers(3))](
                left / "lock"
            )
        elif kind == 5:
            (cache / ".writing-y").symlink_to(self.canary)
        else:
            victim.unlink()
            victim.mkdir()


TARGETS: dict[str, Callable[[Path, Path], Any]] = {
    "npz": Npz,
    "d4rl": D4rl,
    "minari-hdf5": lambda base, canary: Minari(base, canary, ("hdf5",)),
    "minari-arrow": lambda base, canary: Minari(base, canary, ("arrow", "parquet")),
    "cache": Cache,
}
