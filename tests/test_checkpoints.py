"""The parts that checkpoints of both frameworks are made of."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from cql_plugins._checkpoints import (
    CheckpointError,
    CheckpointFolder,
    ContentHash,
    StopSignals,
    decode,
    encode,
    random_states,
    read_archive,
    set_random_states,
    write_archive,
)

VALUES = [
    None,
    True,
    3,
    2**200,
    0.1,
    float("inf"),
    "text",
    b"\x00\xff",
    np.float32(0.1),
    np.bool_(True),
    (1, (2.5, "x")),
    [1, [None]],
    {"a": 1, "b": {"c": (1,)}},
    {None: 1, ("x", 2): 3},
    {"$": "not a tag"},
    deque([{"r": 1.5, "l": 3}], maxlen=4),
    {1, 2},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_survive_json(value: Any) -> None:
    arrays: dict[str, Any] = {}
    found = decode(json.loads(json.dumps(encode(value, arrays, "value"))), arrays)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, deque):
        assert found.maxlen == value.maxlen


def test_arrays_and_generators_survive_json() -> None:
    value: dict[str, Any] = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "generator": np.random.default_rng(3),
        "state": np.random.RandomState(3),
        "python": random.Random(3),
    }
    value["generator"].normal(size=3)
    arrays: dict[str, Any] = {}
    encoded = json.loads(json.dumps(encode(value, arrays, "value")))
    found = decode(encoded, arrays)
    np.testing.assert_array_equal(found["array"], value["array"])
    assert found["array"].dtype == np.int16
    assert found["generator"].normal() == value["generator"].normal() != np.random.default_rng(3).normal()
    assert found["state"].normal() == value["state"].normal()
    assert found["python"].random() == value["python"].random()


@pytest.mark.parametrize(
    "value", [object(), np.array([object()]), len, {"a": [object()]}], ids=["object", "array", "function", "nested"]
)
def test_what_is_not_plain_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^here"):
        encode(value, {}, "here")


def test_random_states_come_back() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), th.rand(1).item(), np.random.normal()

    np.random.normal()  # leaves half a pair in the generator
    states = random_states()
    arrays: dict[str, Any] = {}
    plain = {"python": states["python"], "numpy": states["numpy"]}
    first = draw()
    assert draw() != first
    set_random_states(
        {**decode(json.loads(json.dumps(encode(plain, arrays, "s"))), arrays), "torch": states["torch"], "cuda": []}
    )
    assert draw() == first


def test_the_content_hash_sees_every_number_and_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(array: Any, rows: Any = None, name: str = "x") -> str:
        content = ContentHash()
        content.add(name, array, rows)
        return content.hexdigest()

    data = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    whole = digest(data)
    changed = data.copy()
    changed[999, 2] = np.nextafter(changed[999, 2], np.float32(9))
    others = [digest(changed), digest(data[::-1]), digest(data, name="y"), digest(data.reshape(500, 6)), digest(data[:999])]
    assert len({whole, *others}) == 6
    assert digest(data.T.copy().T) == digest(data, np.arange(1000)) == digest(data[::-1], np.arange(999, -1, -1)) == whole
    monkeypatch.setattr("cql_plugins._checkpoints._BLOCK", 100)
    assert digest(data) == whole


def _write(folder: CheckpointFolder, number: int) -> Path:
    return folder.write(f"offline_{number}", {"number": number}, {"a": np.arange(number)}, {"t": th.arange(number)})


def test_a_folder_keeps_the_last_whole_ones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep_last=2)
    assert folder.newest() is None
    for number in range(1, 12):
        _write(folder, number)
    assert [path.name for path in folder.paths()] == ["checkpoint_000010_offline_10.zip", "checkpoint_000011_offline_11.zip"]
    newest = CheckpointFolder(tmp_path / "run").newest()
    assert newest is not None
    assert newest.document == {"number": 11}
    np.testing.assert_array_equal(newest.arrays["a"], np.arange(11))
    assert th.equal(newest.tensors["t"], th.arange(11))
    everything = CheckpointFolder(tmp_path / "run", keep_last=None)
    for number in (12, 13):
        _write(everything, number)
    assert len(everything.paths()) == 4
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointFolder(tmp_path, keep_last=0)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    _write(folder, 50)
    newest = _write(folder, 60)
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "flip":
        content[content.index(np.arange(60).tobytes()) + 77] ^= 1
    elif damage == "empty":
        content.clear()
    else:
        content[:] = b"something else"
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        read_archive(newest)
    with pytest.warns(UserWarning, match=r"Going on from checkpoint_000001_offline_50\.zip.*000002"):
        found = folder.newest()
    assert found is not None
    assert found.document == {"number": 50}
    folder.paths()[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        folder.newest()


def test_nothing_in_an_archive_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    write_archive(tmp_path / "a.zip", {}, {}, {"bomb": Bomb()})
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_archive(tmp_path / "a.zip")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        write_archive(tmp_path / "b.zip", {}, {"bomb": np.array([Bomb()], dtype=object)}, None)
    assert not (tmp_path / "b.zip").exists()


def test_signals_are_noted_then_obeyed_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    with signals:
        signals.obey()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit, match="143"):
            signals.obey()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signals.obey()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
