"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cql_plugins._files import remove_leftovers, whole_file, whole_folder


class InterruptedWriteError(Exception):
    pass


def _write_half(place: Path) -> None:
    with whole_file(place) as file:
        file.write(b"half")
        raise InterruptedWriteError


def _write_half_a_folder(place: Path) -> None:
    with whole_folder(place) as folder:
        (folder / "a").write_bytes(b"half")
        raise InterruptedWriteError


def test_a_file_appears_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    place = tmp_path / "new" / "file.bin"
    with whole_file(place) as file:
        file.write(b"first")
        assert not place.exists()
    assert place.read_bytes() == b"first"
    with whole_file(place) as file:
        file.write(b"second")
        file.flush()
        assert place.read_bytes() == b"first"
    assert place.read_bytes() == b"second"
    assert [path.name for path in place.parent.iterdir()] == ["file.bin"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "file.bin"
    place.write_bytes(b"old")
    with pytest.raises(InterruptedWriteError):
        _write_half(place)
    assert place.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_what_the_disk_says_names_the_file_and_keeps_its_number(tmp_path: Path) -> None:
    place = tmp_path / "file.bin"
    place.write_bytes(b"old")
    with (
        pytest.raises(OSError, match=r"could not write .*file\.bin; the older one there is untouched") as raised,
        whole_file(place),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.errno == errno.ENOSPC
    blocked = tmp_path / "file.bin" / "under_a_file.bin"
    with pytest.raises(OSError, match="nothing was left there"), whole_file(blocked):
        pass


def test_a_folder_appears_when_it_is_whole_and_never_over_another(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    with pytest.raises(InterruptedWriteError):
        _write_half_a_folder(place)
    assert not list(tmp_path.iterdir())
    with whole_folder(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"all")
        assert not place.exists()
    assert (place / "sub" / "a").read_bytes() == b"all"
    with pytest.raises(FileExistsError, match="choose another name"), whole_folder(place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "folder"
    place.mkdir()
    (place / "old").write_bytes(b"old")

    def replaced() -> None:
        with whole_folder(place, replace=True) as folder:
            (folder / "new").write_bytes(b"new")
            assert [path.name for path in place.iterdir()] == ["old"]

    rename, calls = os.rename, 0

    def refuse_the_second(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the new one to its place; the old one has stepped aside
            assert not place.exists()
            raise PermissionError(errno.EPERM, "no")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse_the_second)
        with pytest.raises(PermissionError, match=r"could not write .*folder; the older one there is untouched"):
            replaced()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
    replaced()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]
    with pytest.raises(FileExistsError), whole_folder(place / "new", replace=True):
        pass


def _write_a_folder(place: Path, meanwhile: Callable[[], object]) -> None:
    with whole_folder(place) as folder:
        (folder / "mine").write_bytes(b"mine")
        meanwhile()


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path) -> None:
    place = tmp_path / "group" / "folder"

    def another() -> None:
        place.mkdir(parents=True)
        (place / "theirs").write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match=r"folder exists; remove it, or choose another name"):
        _write_a_folder(place, another)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "group", "theirs"]
    with pytest.raises(FileExistsError, match=r"a file exists; remove it, or choose another name"):
        _write_a_folder(tmp_path / "a file", lambda: (tmp_path / "a file").write_bytes(b"theirs"))
    # In the same group, another name: both are there.
    _write_a_folder(tmp_path / "new" / "first", lambda: _write_a_folder(tmp_path / "new" / "second", lambda: None))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["first", "second"]
    assert (place / "theirs").read_bytes() == (tmp_path / "a file").read_bytes() == b"theirs"


def test_leftovers_with_our_own_number_go_and_what_we_write_stays(tmp_path: Path) -> None:
    """A container's first process has the same number in each of its lives."""
    with whole_file(tmp_path / "new.bin") as file:
        (writing,) = tmp_path.iterdir()
        dead = writing.with_name(writing.name.replace("new.bin", "checkpoint.zip"))
        dead.write_bytes(b"half")
        assert remove_leftovers(tmp_path) == [dead]
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new.bin"]
    writing.write_bytes(b"half")
    assert remove_leftovers(tmp_path) == [writing], "it is not being written any more"


def test_a_folder_that_stepped_aside_goes_once_another_is_in_its_place(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "data") as folder:
        aside = tmp_path / folder.with_suffix(".old").name
    (tmp_path / "data").rename(aside)
    assert remove_leftovers(tmp_path) == [], "the only one there is"
    assert aside.is_dir()
    (tmp_path / "data").mkdir()
    assert remove_leftovers(tmp_path) == [aside]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


_WRITER = """
import sys
from cql_plugins._files import whole_file
with whole_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_leftovers_of_killed_writers_go_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    place = tmp_path / "file.bin"
    place.write_bytes(b"old")
    other = tmp_path / ".someone-elses.part"
    other.write_bytes(b"not ours")
    killed, running = (
        subprocess.Popen([sys.executable, "-c", _WRITER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    )
    try:
        for process in (killed, running):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.glob(".file.bin.*"))) == 2
        assert [f"-{killed.pid}-" in path.name for path in remove_leftovers(tmp_path)] == [True]
        assert place.read_bytes() == b"old"
        assert other.exists()
        running.communicate(b"", timeout=60)
        assert place.read_bytes() == b"half"
    finally:
        for process in (killed, running):
            process.kill()
            process.communicate()
    assert not list(tmp_path.glob(".file.bin.*"))
