"""What checkpoints of either framework are made of: one archive a checkpoint, a folder of the last few, random states.

An archive is a zip file of a JSON document, NumPy arrays and tensors. Nothing in it is unpickled, and it appears in the folder
only when it is whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import signal
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from cql_plugins._files import remove_leftovers, whole_file

Arrays = dict[str, NDArray[Any]]

_FORMAT = "cql-plugins checkpoint"
_VERSION = 1
_BLOCK = 2**22
_BIT_GENERATORS = {name: getattr(np.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to what it is to be loaded into. The message says which and why."""


# Plain values as JSON ---------------------------------------------------------------------------------------------------


def encode(value: Any, arrays: Arrays, name: str) -> Any:
    """Write a plain value as JSON can hold it.

    Args:
        value: Numbers, text, arrays, NumPy's generators, and tuples, lists, deques, sets and dicts of these.
        arrays: Arrays of the archive; those of the value are added.
        name: What to call these; not taken yet.

    Raises:
        TypeError: If there is something else in it. ``arrays`` may have got a part then.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, np.ndarray) and value.dtype.hasobject is False:
        arrays[name] = value
        return {"$": "array", "name": name}
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return {"$": "scalar", "dtype": value.dtype.str, "value": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, bytes):
        return {"$": "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, np.random.Generator):
        return {"$": "generator", "state": encode(value.bit_generator.state, arrays, name)}
    if isinstance(value, np.random.RandomState):
        return {"$": "random_state", "state": encode(value.get_state(legacy=False), arrays, name)}
    if type(value) is random.Random:
        return {"$": "random", "state": encode(value.getstate(), arrays, name)}
    if type(value) is list:
        return [encode(item, arrays, f"{name}.{index}") for index, item in enumerate(value)]
    if type(value) in (tuple, deque, set, frozenset):
        items = [encode(item, arrays, f"{name}.{index}") for index, item in enumerate(value)]
        extra = {"maxlen": value.maxlen} if isinstance(value, deque) else {}
        return {"$": type(value).__name__, "items": items, **extra}
    if isinstance(value, dict):
        if all(type(key) is str and key != "$" for key in value):
            return {key: encode(item, arrays, f"{name}.{key}") for key, item in value.items()}
        pairs = enumerate(value.items())
        return {
            "$": "dict",
            "items": [[encode(key, arrays, f"{name}.{i}k"), encode(item, arrays, f"{name}.{i}")] for i, (key, item) in pairs],
        }
    raise TypeError(f"{name} is a {type(value).__name__}")


def decode(encoded: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Undo :func:`encode`.

    Args:
        encoded: What it returned.
        arrays: The archive's arrays.

    Raises:
        KeyError: If an array is missing.
        ValueError: If it is nothing that :func:`encode` writes.
    """
    if isinstance(encoded, list):
        return [decode(item, arrays) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    kind = encoded.get("$")
    if kind is None:
        return {key: decode(item, arrays) for key, item in encoded.items()}
    if kind == "array":
        return arrays[encoded["name"]]
    if kind == "scalar":
        return np.frombuffer(base64.b64decode(encoded["value"]), dtype=np.dtype(encoded["dtype"]))[0]
    if kind == "bytes":
        return base64.b64decode(encoded["value"])
    if kind == "dict":
        return {decode(key, arrays): decode(item, arrays) for key, item in encoded["items"]}
    if kind in ("tuple", "set", "frozenset", "deque"):
        items = [decode(item, arrays) for item in encoded["items"]]
        if kind == "deque":
            return deque(items, maxlen=encoded["maxlen"])
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
    if kind == "generator":
        state = decode(encoded["state"], arrays)
        generator = np.random.Generator(_BIT_GENERATORS[state["bit_generator"]]())
        generator.bit_generator.state = state
        return generator
    if kind == "random_state":
        found = np.random.RandomState()
        found.set_state(decode(encoded["state"], arrays))
        return found
    if kind == "random":
        python = random.Random()
        python.setstate(decode(encoded["state"], arrays))
        return python
    raise ValueError(f"unknown kind {kind!r}")


# Random states ----------------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of the global random streams: Python's, NumPy's, torch's, and of all GPUs that were used.

    Returns:
        A dict that :func:`encode` takes but for the tensors under ``"torch"`` and ``"cuda"``.
    """
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 -- SB3 and d3rlpy draw from it
        "torch": th.get_rng_state(),
        "cuda": cuda,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what :func:`random_states` returned.

    Args:
        states: The states; those of GPUs that are not here are left out.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    th.set_rng_state(states["torch"])
    if states["cuda"] and th.cuda.is_available():
        for device, state in enumerate(states["cuda"][: th.cuda.device_count()]):
            th.cuda.set_rng_state(state, device)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random streams back to where they were, whatever is drawn inside."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


# Content ----------------------------------------------------------------------------------------------------------------


class ContentHash:
    """SHA-256 of named arrays, in the order given, whatever their layout in memory."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, array: Any, rows: NDArray[np.int64] | None = None) -> None:
        """Add an array.

        Args:
            name: Its name.
            array: An array, or what gives arrays for slices and indices of rows.
            rows: The rows to take, in this order; all where ``None``.
        """
        length = len(array) if rows is None else len(rows)
        self._digest.update(f"{name} {np.dtype(array.dtype).str} {(length, *array.shape[1:])};".encode())
        step = max(1, _BLOCK // max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * np.dtype(array.dtype).itemsize))
        for start in range(0, length, step):
            part = array[start : start + step] if rows is None else array[rows[start : start + step]]
            self._digest.update(np.ascontiguousarray(part).data)

    def hexdigest(self) -> str:
        """The hash of what was added so far."""
        return self._digest.hexdigest()


# Archives ---------------------------------------------------------------------------------------------------------------


class Archive:
    """A checkpoint that was read.

    Attributes:
        path: Its file.
        document: The JSON document.
        arrays: Arrays by name.
        tensors: What was given as tensors, on the CPU.
        unplaced: What of its environments has no place in those that it is loaded into.
    """

    def __init__(self, path: Path, document: dict[str, Any], arrays: Arrays, tensors: Any) -> None:
        self.path, self.document, self.arrays, self.tensors = path, document, arrays, tensors
        self.unplaced: list[str] = []

    def decoded(self, key: str) -> Any:
        """Decode a part of the document.

        Args:
            key: Its name.

        Raises:
            CheckpointError: If it is not there or damaged.
        """
        try:
            return decode(self.document[key], self.arrays)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.path} has no readable {key!r}: {type(error).__name__} {error}.") from error


def write_archive(path: Path, document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], tensors: Any) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: Its file.
        document: What JSON can hold.
        arrays: Arrays without objects.
        tensors: Anything that ``torch.load(weights_only=True)`` reads.

    Raises:
        OSError: If the disk does not take it.
    """
    names = {name: f"arrays/{index:04d}.npy" for index, name in enumerate(arrays)}
    head = {"format": _FORMAT, "version": _VERSION, "arrays": names, "document": dict(document)}
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("checkpoint.json", json.dumps(head))
        for name, member in names.items():
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(arrays[name]), allow_pickle=False)
        with archive.open("tensors.pt", "w", force_zip64=True) as stream:
            th.save(tensors, stream)


def read_archive(path: str | Path) -> Archive:
    """Read a checkpoint; every byte of it is checked against its checksum.

    Args:
        path: Its file.

    Raises:
        FileNotFoundError: If it is not there.
        CheckpointError: If it is damaged or something else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            head = json.loads(archive.read("checkpoint.json"))
            if head["format"] != _FORMAT or head["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} is {head['format']!r} version {head['version']}; expected {_FORMAT!r} version {_VERSION}. "
                    "Load it with the release of cql-plugins that wrote it."
                )
            arrays = {}
            for name, member in head["arrays"].items():
                with archive.open(member) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                    if stream.read(1):
                        raise ValueError(f"{member} is longer than its array")
            with archive.open("tensors.pt") as stream:
                tensors = th.load(stream, map_location="cpu", weights_only=True)
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} does not fit its checksum")
            return Archive(path, head["document"], arrays, tensors)
    except FileNotFoundError:
        raise
    except CheckpointError:
        raise
    except Exception as error:  # Whatever the parsers make of bytes that are no checkpoint.
        raise CheckpointError(f"{path} is not a whole checkpoint: {type(error).__name__}: {error}") from error


class CheckpointFolder:
    """The checkpoints of one run, numbered in the order in which they were written.

    Args:
        folder: Where they lie; made when the first is written. One run each.
        keep_last: How many to keep; older ones go when a new one is whole. ``None`` keeps all.

    Raises:
        ValueError: If ``keep_last`` is not positive.
    """

    def __init__(self, folder: str | Path, keep_last: int | None = 3) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, or None to keep all; got {keep_last}.")
        self.folder, self.keep_last = Path(folder), keep_last

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return [path for _, path in sorted(self._numbered())]

    def _numbered(self) -> list[tuple[int, Path]]:
        matches = ((re.fullmatch(r"checkpoint_(\d+)_\w+\.zip", path.name), path) for path in self.folder.glob("*.zip"))
        return [(int(match[1]), path) for match, path in matches if match]

    def write(self, label: str, document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], tensors: Any) -> Path:
        """Write the next checkpoint, then remove those that are too many.

        Args:
            label: Goes into the name, such as ``offline_5000``.
            document: See :func:`write_archive`.
            arrays: See :func:`write_archive`.
            tensors: See :func:`write_archive`.

        Returns:
            Its path.

        Raises:
            OSError: If the disk does not take it; the older ones are as they were.
        """
        number = max((number for number, _ in self._numbered()), default=0) + 1
        path = self.folder / f"checkpoint_{number:06d}_{label}.zip"
        if self.folder.is_dir():
            remove_leftovers(self.folder)
        write_archive(path, document, arrays, tensors)
        if self.keep_last is not None:
            for old in self.paths()[: -self.keep_last]:
                old.unlink(missing_ok=True)
        return path

    def newest(self) -> Archive | None:
        """Read the newest checkpoint that is whole; damaged ones are passed over with a warning.

        Returns:
            The checkpoint; ``None`` where there is none at all.

        Raises:
            CheckpointError: If there are some and none is whole.
        """
        problems = []
        for path in reversed(self.paths()):
            try:
                found = read_archive(path)
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"Going on from {path.name}, since what is newer is damaged: {'; '.join(problems)}", stacklevel=3)
            return found
        if problems:
            raise CheckpointError(f"No checkpoint in {self.folder} is whole: {'; '.join(problems)}")
        return None


# Signals ----------------------------------------------------------------------------------------------------------------


class StopSignals:
    """While active, SIGTERM and a first SIGINT are noted instead of obeyed; a second SIGINT interrupts at once.

    Only in the main thread, which alone gets signals in Python; elsewhere nothing is noted.

    Attributes:
        received: The signal's number, ``None`` for none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def obey(self) -> None:
        """Do what the noted signal asked for; nothing where there was none.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with the status that shells expect (143).
        """
        number, self.received = self.received, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SystemExit(128 + number)


__all__ = [
    "Archive",
    "CheckpointError",
    "CheckpointFolder",
    "ContentHash",
    "StopSignals",
    "decode",
    "encode",
    "random_states",
    "read_archive",
    "set_random_states",
    "write_archive",
]
