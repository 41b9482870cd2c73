"""Data sets as column files in a cache folder: written once, mapped into memory, reused while their source is unchanged.

An entry is a folder with one `.npy` file for each array and a manifest. It is written beside its place and renamed, so
that it is there whole or not at all; of two processes that write it at once the second takes what the first one wrote.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._tree import Array, named_leaves
from cql_plugins.adapters._untrusted import check_disk, read_json_object, read_npy_header
from cql_plugins.adapters._validation import DatasetError, Where, check_flags, check_supported_space, check_tree
from cql_plugins.adapters.dataset import OfflineDataset

Storage: TypeAlias = Literal["memory", "memmap"]
Allocate: TypeAlias = Callable[[tuple[int, ...], Any], Array]
"""From shape and dtype to an array to be filled."""

_FORMAT = 2
"""Of the files, and of what readers make of a source: raise it where either changes, and old entries are not used."""
_MANIFEST = "manifest.json"
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations", "unflagged")
_WRITING = ".writing-"
_LOCK = "lock"


def in_memory(shape: tuple[int, ...], dtype: Any) -> Array:
    """Allocate in memory."""
    return np.empty(shape, dtype=dtype)


def check_storage(storage: str, cache_dir: Any) -> bool:
    """Tell whether to store in files.

    Raises:
        ValueError: If `storage` is not a known word, or a folder is given that is not used.
    """
    if storage not in ("memory", "memmap"):
        raise ValueError(f"storage must be 'memory' or 'memmap', got {storage!r}")
    if storage == "memory" and cache_dir is not None:
        raise ValueError("cache_dir is used with storage='memmap' only")
    return storage == "memmap"


def default_cache_dir() -> Path:
    """Return the folder for data sets in the user's cache, `$XDG_CACHE_HOME` where that is set."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    return base / "cql-plugins" / "datasets"


@dataclass(frozen=True)
class Origin:
    """What a data set is read from.

    Attributes:
        name: What the source is called, for messages and as a part of the folder's name.
        files: All its files.
        options: What else the result depends on, as JSON can write it.
        folder: Folder that belongs to the source alone, in which nothing is written.
    """

    name: str
    files: Sequence[Path]
    options: dict[str, Any]
    folder: Path | None = None

    def folder_name(self) -> str:
        """Name the place in the cache: one for each set of paths and options."""
        key = json.dumps([_FORMAT, sorted(str(path.resolve()) for path in self.files), self.options], sort_keys=True)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.name.replace("\\", "/").rsplit("/", 3)[-1]).strip("-.") or "data"
        return f"{slug[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def state(self) -> list[list[Any]]:
        """List path, size and time of change of each file.

        Raises:
            DatasetError: If there are none.
        """
        if not self.files:
            raise DatasetError("expected files to read from, there are none", source=self.name)
        found = []
        for path in sorted(path.resolve() for path in self.files):
            status = path.stat()
            found.append([str(path), status.st_size, status.st_mtime_ns])
        return found


class ColumnFiles:
    """Arrays that are files in one folder."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self._source = source
        self._count = 0

    def new_path(self) -> Path:
        """Return a name that is not taken."""
        self._count += 1
        return self.folder / f"{self._count:04d}.npy"

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Make a file of the given shape and return it as an array to be filled.

        Raises:
            DatasetError: If the disk has no room for it.
        """
        if 0 in shape:
            return in_memory(shape, dtype)
        path = self.new_path()
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        check_disk(n_bytes, self.folder, self._source)
        with self._room(n_bytes):
            array: Array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        with path.open("r+b") as file:
            self.reserve(file, path.stat().st_size)  # Else a full disk would kill the process when a page is written.
        return array

    def reserve(self, file: IO[bytes], n_bytes: int) -> None:
        """Take the room that a file of this folder will need, where the system can do that.

        Raises:
            DatasetError: If the disk has none.
        """
        if hasattr(os, "posix_fallocate"):
            with self._room(n_bytes):
                os.posix_fallocate(file.fileno(), 0, n_bytes)

    @contextlib.contextmanager
    def _room(self, n_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DatasetError(
                f"expected room for {n_bytes:,} bytes in {self.folder.parent}: {error}",
                source=self._source,
                hint="Free some, or pass another cache_dir",
            ) from error

    def keep(self, array: Array) -> dict[str, Any]:
        """Return the manifest's entry for an array; one that is not a whole file of this folder is written to a new one."""
        owner: Any = array
        while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
            owner = owner.base
        path = None
        while isinstance(owner, np.memmap):
            path = Path(str(owner.filename))
            starts_there = array.ctypes.data == owner.ctypes.data and array.flags.c_contiguous
            owner = owner.base
        if path is None or path.parent != self.folder or not starts_there or array.dtype != np.load(path, "r").dtype:
            path = self.new_path()
            np.save(path, array, allow_pickle=False)
        return {"file": path.name, "dtype": array.dtype.str, "shape": list(array.shape)}


# Manifests ------------------------------------------------------------------------------------------------------------


def _write(dataset: OfflineDataset, notes: list[str], state: list[list[Any]], columns: ColumnFiles) -> None:
    """Write what is not in files yet, then the manifest, and remove everything else."""
    parts = dataset._parts()
    manifest = {
        "format": _FORMAT,
        "source": state,
        "arrays": {field: _tree_entry(parts[field], columns) for field in _ARRAYS},
        "observation_space": _space_entry(parts["observation_space"], columns),
        "action_space": _space_entry(parts["action_space"], columns),
        "inferred": sorted(parts["inferred"]),
        "notes": notes,
    }
    text = json.dumps(manifest, indent=1)
    kept = {_LOCK, *re.findall(r'"file": "([^"]+)"', text)}
    for path in columns.folder.iterdir():
        if path.name not in kept:
            path.unlink()
    (columns.folder / _MANIFEST).write_text(text, encoding="utf-8")
    for path in columns.folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _tree_entry(tree: Any, columns: ColumnFiles) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {"keys": [[key, _tree_entry(branch, columns)] for key, branch in tree.items()]}
    return columns.keep(tree)


def _space_entry(space: spaces.Space[Any], columns: ColumnFiles) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        return {"keys": [[key, _space_entry(subspace, columns)] for key, subspace in space.items()]}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start), "dtype": np.dtype(space.dtype).str}
    assert isinstance(space, spaces.Box)
    return {"low": columns.keep(np.asarray(space.low)), "high": columns.keep(np.asarray(space.high))}


def _read(folder: Path, state: list[list[Any]]) -> tuple[OfflineDataset, list[str]] | None:
    """Map an entry; None where there is none, its source has changed, or it is damaged."""
    if not _is_plain(folder, stat.S_ISDIR):
        return None
    try:
        manifest = read_json_object(_plain_file(folder, _MANIFEST), str(folder))
        if manifest["format"] != _FORMAT or manifest["source"] != state:
            return None
        parts = {field: _read_tree(manifest["arrays"][field], folder) for field in _ARRAYS}
        spaces_ = {kind: _read_space(manifest[kind], folder) for kind in ("observation_space", "action_space")}
        _check_parts(parts, spaces_, str(folder))
        inferred = frozenset(manifest["inferred"])
        if not inferred <= set(spaces_):
            return None
        dataset = OfflineDataset._trusted(**parts, **spaces_, inferred=inferred)
        return dataset, [str(note) for note in manifest["notes"]]
    except Exception:  # Whatever is wrong with it: it is written again.
        return None


def _is_plain(path: Path, test: Callable[[int], bool]) -> bool:
    """Tell whether there is something of a kind itself, not a link to it: a link would lead out of the cache."""
    try:
        return test(os.lstat(path).st_mode)
    except OSError:
        return False


def _plain_file(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not _is_plain(folder / name, stat.S_ISREG):
        raise ValueError(f"expected a file of this folder, got {name!r}")
    return folder / name


def _check_parts(parts: dict[str, Any], spaces_: dict[str, spaces.Space[Any]], source: str) -> None:
    """Refuse arrays that do not belong together; their values were looked at when they were written."""
    where = Where(source)
    n_steps = len(parts["rewards"])
    for field, kind in (("rewards", "f"), ("terminations", "b"), ("truncations", "b"), ("unflagged", "b")):
        if getattr(parts[field], "ndim", 0) != 1 or parts[field].dtype.kind != kind:
            raise where.error(f"expected a vector of kind {kind}", field=field)
    terminations, truncations = (check_flags(parts[field], n_steps, field, where) for field in ("terminations", "truncations"))
    ends = terminations | truncations
    if not n_steps or not ends[-1] or (terminations & truncations).any() or len(parts["unflagged"]) != ends.sum():
        raise where.error("expected episodes with one end each", field="terminations")
    for field, space, n_rows in (
        ("observations", spaces_["observation_space"], n_steps + int(ends.sum())),
        ("actions", spaces_["action_space"], n_steps),
    ):
        check_supported_space(space, field, where)
        check_tree(parts[field], space, n_rows, field, where, read=False)


def _read_tree(entry: dict[str, Any], folder: Path) -> Any:
    if "keys" in entry:
        return {str(key): _read_tree(branch, folder) for key, branch in entry["keys"]}
    path, shape = _plain_file(folder, entry["file"]), tuple(entry["shape"])
    with path.open("rb") as file:
        held, fortran, dtype = read_npy_header(file, str(path))
        if len(held) != len(shape) or held[1:] != shape[1:] or held[:1] < shape[:1] or dtype.str != entry["dtype"]:
            raise ValueError(f"expected shape {shape} and dtype {entry['dtype']}, got {held} and {dtype.str}")
        if math.prod(held) * dtype.itemsize != path.stat().st_size - file.tell():
            raise ValueError(f"expected {held} values of {dtype.str}, the file is of another size")
        if 0 in shape:
            return np.empty(shape, dtype=dtype)  # An empty file cannot be mapped.
        order: Any = "F" if fortran else "C"
        array = np.asarray(np.memmap(path, mode="r", dtype=dtype, shape=held, offset=file.tell(), order=order))
    return array[: shape[0]] if shape else array


def _read_space(entry: dict[str, Any], folder: Path) -> spaces.Space[Any]:
    if "keys" in entry:
        return spaces.Dict([(str(key), _read_space(subspace, folder)) for key, subspace in entry["keys"]])
    if "n" in entry:
        return spaces.Discrete(entry["n"], start=entry["start"])
    low, high = (np.array(_read_tree(entry[side], folder)) for side in ("low", "high"))
    dtype: Any = low.dtype.type
    return spaces.Box(low, high, dtype=dtype)


# The cache ------------------------------------------------------------------------------------------------------------


def stored(
    origin: Origin,
    cache_dir: "str | os.PathLike[str] | None",
    read: Callable[[ColumnFiles], tuple[OfflineDataset, list[str]]],
) -> tuple[OfflineDataset, list[str]]:
    """Map a data set from the cache, after reading it into the cache where it is not there yet.

    Args:
        origin: What it is read from.
        cache_dir: Folder of the cache; the user's where None.
        read: Reads it into arrays that the `ColumnFiles` allocate; returns it, and what to tell the user.

    Returns:
        The data set (without a name), its arrays mapped read-only, and what to tell the user.

    Raises:
        DatasetError: If it cannot be read or written, or the cache would lie inside the source.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if origin.folder is not None and cache.resolve().is_relative_to(origin.folder.resolve()):
        raise DatasetError(
            f"expected a cache outside the data set's own folder {origin.folder}, got {cache}",
            source=origin.name,
            hint="Pass another cache_dir",
        )
    place, state = cache / origin.folder_name(), origin.state()
    found = _read(place, state)
    if found is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _folder_beside(place) as folder:
            columns = ColumnFiles(folder, origin.name)
            try:
                dataset, notes = read(columns)
            except OSError as error:
                raise DatasetError(f"expected a source that can be read: {error}", source=origin.name) from error
            _write(dataset, notes, state, columns)
            del dataset  # Mapped files cannot be renamed everywhere.
            _put_in_place(folder, place, state)
        found = _read(place, state)
    except OSError as error:
        raise DatasetError(
            f"expected a cache folder that can be written, got {cache}: {error}",
            source=origin.name,
            hint="Pass another cache_dir",
        ) from error
    if found is None:
        raise DatasetError(
            f"expected what was just written to {place}, it is gone or changed", source=origin.name, hint="Read it again"
        )
    return found


@contextlib.contextmanager
def _folder_beside(place: Path) -> Iterator[Path]:
    """Make a folder to write in, gone at the end whatever happens; those of processes that were killed go, too."""
    for left in place.parent.glob(f"{_WRITING}*"):
        if not (_is_plain(left, stat.S_ISDIR) and _is_plain(left / _LOCK, stat.S_ISREG)):
            continue
        with contextlib.suppress(OSError), (left / _LOCK).open("rb+") as lock:
            if _acquire(lock):
                shutil.rmtree(left)
    for _ in range(3):  # Another process may take a folder for a left one before it is locked.
        folder = place.parent / f"{_WRITING}{secrets.token_hex(8)}"
        folder.mkdir()  # with the rights that the user gives to new folders, since others may share the cache
        try:
            with (folder / _LOCK).open("wb") as lock:
                if _acquire(lock) is not False and (folder / _LOCK).exists():
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise OSError(f"no folder in {place.parent} could be locked")


def _acquire(lock: IO[bytes]) -> bool | None:
    """Lock a file for as long as it is open; false where another process has it, None where locks are not known."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _put_in_place(folder: Path, place: Path, state: list[list[Any]]) -> None:
    """Rename a written folder; an entry that another process wrote meanwhile stays, an outdated or damaged one goes."""
    for _ in range(2):
        try:
            os.rename(folder, place)
            (place / _LOCK).unlink()
            return
        except OSError:
            if not place.exists():
                raise
        if _read(place, state) is not None:
            return
        outdated = tempfile.mkdtemp(prefix=_WRITING, dir=place.parent)
        with contextlib.suppress(OSError):
            os.rename(place, Path(outdated) / "outdated")
        # What has it mapped keeps it: the files go when the last of them is closed.
        shutil.rmtree(outdated, ignore_errors=True)
    os.rename(folder, place)


def fingerprint(tree: Any) -> str:
    """Hash a space, or a (nested) dict of arrays, for the options of an `Origin`."""
    if tree is None:
        return "none"
    if isinstance(tree, spaces.Dict):
        return json.dumps([[key, fingerprint(subspace)] for key, subspace in tree.items()])
    if isinstance(tree, spaces.Discrete):
        return f"Discrete({tree.n}, {tree.start})"
    if isinstance(tree, spaces.Box):
        return "Box" + fingerprint({"low": np.asarray(tree.low), "high": np.asarray(tree.high)})
    if isinstance(tree, spaces.Space):
        return repr(tree)  # Refused when it is read.
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree, ""):
        digest.update(f"{name} {leaf.dtype.str} {leaf.shape} ".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
