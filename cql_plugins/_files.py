"""Files and folders that are there whole or not at all.

What is written lies beside its place under another name, is flushed to the disk, and takes the place by one rename: a reader,
or the next start after a crash, finds the old one or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_WRITING, _ASIDE = ".part", ".old"
_ours: set[str] = set()
"""Names of what this process is writing: a killed one may have had its number, as every first process of a container has."""
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What systems say of a rename onto something; `ENOTDIR` of a folder onto a file."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at its place only when all of it is on the disk.

    Args:
        path: Its place; what is there stays until the new one is whole. The folder is made where it is missing.
        replace: Whether it may take the place of another file.

    Yields:
        The open file, binary, readable and seekable too.

    Raises:
        FileExistsError: If something is there at the end, and not to be replaced.
        OSError: If the folder or the disk does not take it (full, read-only, no permission), with the number of the cause; the
            place is as it was, and nothing is left beside it.
    """
    place = Path(path)
    with _explained(place), _beside(place) as temporary:
        with open(temporary, "xb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, place)
        else:
            _put_in_free_place(temporary, place)
        _sync_folder(place.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Make a folder that appears at its place only when all its files are on the disk.

    Args:
        path: Its place, where nothing must be. Folders above it that are missing are made when it takes its place.
        replace: Whether a folder may be there. It stays until the new one is whole, then steps aside under another name, comes
            back if the new one cannot take its place, and is removed.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If something is there already, or at the end because another process wrote it meanwhile; that stays.
        OSError: If the disk does not take it, as for :func:`whole_file`.
    """
    place = Path(path)
    if place.exists() and not (replace and place.is_dir()):
        raise _taken(place)
    with _explained(place), _beside(outermost_missing(place)) as temporary:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        _sync_folder(temporary)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Until the new one is there, this is the only one, and no leftover.
        aside = temporary.with_suffix(_ASIDE) if replace and place.exists() else None
        if aside is not None:
            os.rename(place, aside)
        try:
            os.rename(temporary, place)
        except BaseException as error:
            if aside is not None:
                os.rename(aside, place)
            elif isinstance(error, OSError) and error.errno in _TAKEN:
                raise _taken(place) from error
            raise
        _sync_folder(place.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def outermost_missing(path: Path) -> Path:
    """Return the topmost folder that has to be made for `path` to exist; `path` itself where it or its parent exists."""
    while not path.parent.exists():
        path = path.parent
    return path


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what writers on this machine that were killed left in a folder; what running processes write stays.

    So does a folder that stepped aside for one that never took its place: it is the only one there is.

    Args:
        folder: Where files were written.

    Returns:
        What was removed.
    """
    removed = []
    names = re.compile(rf"\.(.*)\.{_machine()}-(\d+)-[0-9a-f]+({re.escape(_WRITING)}|{re.escape(_ASIDE)})")
    for path in [path for ending in (_WRITING, _ASIDE) for path in Path(folder).glob(f".*{ending}")]:
        found = names.fullmatch(path.name)
        if not found or _is_written(path, int(found[2])):
            continue
        if found[3] == _WRITING or (path.parent / found[1]).exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _put_in_free_place(temporary: Path, place: Path) -> None:
    """Give a file its place unless another one is there; unlike a rename, a link does not replace."""
    try:
        os.link(temporary, place)
    except FileExistsError as error:
        raise _taken(place) from error
    except OSError:  # a file system without links
        if os.path.lexists(place):
            raise _taken(place) from None
        os.rename(temporary, place)


def _taken(place: Path) -> FileExistsError:
    return FileExistsError(f"{place} exists; remove it, or choose another name.")


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Name something beside a place, removed at the end whatever happens."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f".{place.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{_WRITING}"
    _ours.add(temporary.stem)
    try:
        yield temporary
    finally:
        _ours.discard(temporary.stem)
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Say of what the disk refuses which file it was, and what there is still."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        kept = "the older one there is untouched" if place.exists() else "nothing was left there"
        raise type(error)(error.errno, f"{os.strerror(error.errno)}: could not write {place}; {kept}") from error


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _machine() -> str:
    """Name this machine: process numbers mean nothing on another one that shares the folder."""
    return re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "here"


def _is_written(path: Path, process: int) -> bool:
    """Whether a running process is at it."""
    if process == os.getpid():
        return path.stem in _ours
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = ["outermost_missing", "remove_leftovers", "whole_file", "whole_folder"]
