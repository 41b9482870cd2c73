"""What is looked at before a file is believed: that it is a plain file, and that what it declares fits.

A file that was fetched from somewhere says how large its arrays are before it shows them. Each reader adds up what a file
declares and comes here with the sum before it allocates anything.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import stat
import sys
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cql_plugins.adapters._validation import DatasetError

MEMORY_VARIABLE = "CQL_PLUGINS_MAX_MEMORY"
"""Environment variable with the number of bytes that one data set may take in memory, in place of this machine's memory."""

PACKED_AT_MOST = 1100
"""How many bytes one stored byte can stand for: deflate, which all these formats use, packs 1032 zeros into one."""
SMALL = 64 * 2**20
"""Declared bytes up to which nobody asks how few bytes stand for them."""
MAX_DEPTH = 16
"""How deep dicts of observations may nest."""
_MAX_JSON = 64 * 2**20
_CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


# Files ----------------------------------------------------------------------------------------------------------------


def check_regular_file(path: "str | os.PathLike[str]", kind: str, source: str) -> int:
    """Refuse what is no regular file, before it is opened: opening a pipe would wait forever, a device might act.

    Args:
        path: The file; a link to one is followed, since the user named it.
        kind: What is expected, with its article, for the message.
        source: Source used in the message.

    Returns:
        Its size in bytes.

    Raises:
        DatasetError: If there is no such file, or it is something else.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"expected {kind}, there is no such file ({error})", source=source) from error
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(
            f"expected {kind}, there is no such file: it is a {_sort_of(status.st_mode)}", source=source, hint="Name a file"
        )
    return status.st_size


def _sort_of(mode: int) -> str:
    tests = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "link": stat.S_ISLNK}
    return next((name for name, test in tests.items() if test(mode)), "device")


def check_folder(folder: Path, source: str) -> int:
    """Refuse a folder in which a file lies elsewhere (a link that leads out of it) or is no regular file.

    Args:
        folder: The folder; it may itself be reached through links, since the user put it there.
        source: Source used in the message.

    Returns:
        The bytes of all its files.

    Raises:
        DatasetError: If one of its files is not in it.
    """
    home, n_bytes = folder.resolve(), 0
    for parent, folders, files in os.walk(home):
        for name in (*folders, *files):
            path = Path(parent, name)
            with parsing(f"{path} cannot be looked at", source):
                real = path.resolve(strict=True)
                status = real.stat()
            if not real.is_relative_to(home):
                raise DatasetError(
                    f"expected its files in {folder}, but {path.relative_to(home)} is a link to {real}",
                    source=source,
                    hint="Copy the file there if it belongs to the data set",
                )
            if stat.S_ISREG(status.st_mode):
                n_bytes += status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise DatasetError(
                    f"expected files in {folder}, but {path.relative_to(home)} is a {_sort_of(status.st_mode)}", source=source
                )
    return n_bytes


def read_json_object(path: Path, source: str) -> dict[str, Any]:
    """Read a JSON object from a regular file of a sane size.

    Raises:
        DatasetError: If it is absent, too large, no JSON, nested too deep, or not an object.
    """
    n_bytes = check_regular_file(path, f"the JSON file {path.name}", source)
    if n_bytes > _MAX_JSON:
        raise DatasetError(f"expected at most {_MAX_JSON:,} bytes in {path.name}, got {n_bytes:,}", source=source)
    with parsing(f"expected a JSON object in {path.name}", source):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise DatasetError(f"expected a JSON object in {path.name}, got {type(value).__name__}", source=source)
    return value


# Parsers --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parsing(expected: str, source: str, field: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Turn whatever a parser lets through into an error that names the source.

    The parsers of other packages raise nearly anything on a broken file (`TypeError`, `struct.error`, `RecursionError`,
    `MemoryError`, ...), so all of it counts as a file that cannot be read. Only calls of such parsers belong inside.
    """
    try:
        yield
    except (DatasetError, ImportError):
        raise
    except BlockingIOError as error:
        raise being_written(error, source, field) from error
    except Exception as error:
        raise DatasetError(f"{expected}: {said(error)}", source=source, field=field, hint=hint) from error


def being_written(error: BlockingIOError, source: str, field: str | None = None) -> DatasetError:
    """Say of a file that its writer has locked it."""
    return DatasetError(
        f"another process writes this file ({said(error)})", source=source, field=field, hint="Read it when that is done"
    )


def said(error: Exception) -> str:
    """Cite an error in one line of bounded length: it may quote the file."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# NumPy's format -------------------------------------------------------------------------------------------------------


def read_npy_header(file: IO[bytes], source: str, field: str | None = None) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, Fortran order and dtype from the start of an `.npy` stream, which is left at the first value.

    Raises:
        DatasetError: If there is no valid header, or it declares anything but numbers.
    """
    with parsing("expected a plain array, got something else or a part of one", source, field), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's remark that Python 2 wrote a header.
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise ValueError(f"format {version[0]}.{version[1]} is not that of an array of numbers")
        try:
            shape, fortran, dtype = reader(file)
        except tokenize.TokenError as error:
            raise ValueError(f"Cannot parse header: {error}") from error
    check_declared(shape, dtype, source, field)
    return shape, fortran, dtype


def check_declared(shape: Sequence[int], dtype: np.dtype[Any], source: str, field: str | None) -> int:
    """Refuse a shape or dtype that no array of numbers in a file has.

    Returns:
        The bytes that the array takes.

    Raises:
        DatasetError: If a length is negative, rows have no entries, or the entries are no numbers.
    """
    if dtype.kind not in "biuf" or dtype.subdtype is not None:
        what = "Python objects" if dtype.hasobject else f"dtype {dtype}"
        raise DatasetError(
            f"expected a plain array of numbers, got {what}",
            source=source,
            field=field,
            hint="Python objects are not read, since unpickling runs code from the file" if dtype.hasobject else None,
        )
    if any(isinstance(length, bool) or length < 0 for length in shape) or 0 in shape[1:]:
        raise DatasetError(f"expected rows with at least one entry, got shape {tuple(shape)}", source=source, field=field)
    return math.prod(shape) * dtype.itemsize


# Sizes ----------------------------------------------------------------------------------------------------------------


def memory_limit() -> int | None:
    """Return the bytes that one data set may take in memory.

    That is `$CQL_PLUGINS_MAX_MEMORY` where set, else the least of this machine's memory and of the limits on this process
    (control group, address space); None where the system does not say.

    Raises:
        ValueError: If the variable is not a whole number of bytes.
    """
    configured = os.environ.get(MEMORY_VARIABLE, "")
    if not configured:
        return _limit_of_machine()
    if not configured.isascii() or not configured.isdigit():
        raise ValueError(
            f"${MEMORY_VARIABLE} must be a whole number of bytes, got {configured!r}; unset it, or set e.g. 8000000000"
        )
    return int(configured)


@functools.cache
def _limit_of_machine() -> int | None:
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CGROUP_FILES if sys.platform == "linux" else ():
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(soft)
    found = [limit for limit in found if limit > 0]
    return min(found) if found else None


def check_memory(n_bytes: int, source: str, field: str | None = None, *, mapped: bool = False) -> None:
    """Refuse what cannot fit in memory.

    Args:
        n_bytes: What reading it takes at its largest.
        source: Source used in the message.
        field: Field used in the message.
        mapped: Whether the data is being written to files already, so that these would be no way out.

    Raises:
        DatasetError: If it is more than `memory_limit`.
    """
    limit = memory_limit()
    if limit is not None and n_bytes > limit:
        other = "" if mapped else "storage='memmap' reads data that is larger than memory; "
        raise DatasetError(
            f"expected at most {limit:,} bytes, reading what is declared here takes {n_bytes:,}",
            source=source,
            field=field,
            hint=f"If it really is that large: {other}${MEMORY_VARIABLE} sets another limit, in bytes",
        )


def check_disk(n_bytes: int, folder: Path, source: str) -> None:
    """Refuse what cannot fit on the disk of a folder.

    Raises:
        DatasetError: If less is free there.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DatasetError(
            f"expected room for {n_bytes:,} bytes in {folder.parent}: {free:,} are free",
            source=source,
            hint="Free some, or pass another cache_dir",
        )


def check_packed(declared: int, stored: int, source: str, field: str | None = None) -> None:
    """Refuse a declared size that so few stored bytes cannot stand for.

    Raises:
        DatasetError: If it is more than the format's packing can reach.
    """
    if declared > max(SMALL, PACKED_AT_MOST * stored):
        raise DatasetError(
            f"expected at most {PACKED_AT_MOST} bytes for each one stored, got {declared:,} declared by {stored:,}",
            source=source,
            field=field,
            hint="The file is broken, or made to fill this machine",
        )
