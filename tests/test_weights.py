"""The file that both frameworks' weights are in: what is written, and what is refused before it is read."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save, save_file

from cql_plugins import _weights
from cql_plugins._weights import (
    FLAG,
    NUMBER,
    Budget,
    Kind,
    WeightsError,
    choice,
    either,
    integer,
    mapping,
    named,
    number,
    open_weights,
    optional,
    read_field,
    read_like,
    read_record,
    sequence,
    write_field,
    write_weights,
)

DOCUMENT = {"framework": "sb3", "answer": 42}
TENSORS = {"part.a": th.arange(6.0).reshape(2, 3), "part.b": th.tensor(7), "other": th.zeros(2, dtype=th.float64)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "model.safetensors"


@pytest.fixture
def written(place: Path) -> Path:
    write_weights(place, DOCUMENT, TENSORS)
    return place


def with_text(path: Path, text: str) -> Path:
    """A file with this text for a document."""
    path.parent.mkdir(exist_ok=True)
    save_file(TENSORS, path, {"cql_plugins": text})
    return path


def opened(path: Path, framework: str = "sb3") -> Any:
    with open_weights(path, framework) as file:
        return file.document


class TestFile:
    def test_comes_back(self, written: Path) -> None:
        with open_weights(written, "sb3") as file:
            assert file.document == {"answer": 42}
            assert file.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
            assert file.n_elements == 9
            file.expect("part.", {"a": TENSORS["part.a"], "b": TENSORS["part.b"]})
            with pytest.raises(WeightsError, match=r"no part of the model: \['other'\]"):
                file.expect_no_more()
            file.expect("", {"other": TENSORS["other"]})
            file.expect_no_more()
            read = file.read_all("part.")
            assert read.keys() == {"a", "b"}
            assert all(th.equal(read[name], TENSORS[f"part.{name}"]) for name in read)

    def test_is_plain_safetensors_and_strict_json(self, written: Path) -> None:
        with safe_open(written, "np") as file:
            document = json.loads(file.metadata()["cql_plugins"])
            assert np.array_equal(file.get_tensor("part.a"), TENSORS["part.a"].numpy())
        assert document == DOCUMENT | {"format": "cql_plugins.weights", "format_version": 1}
        with pytest.raises(ValueError, match="Out of range float values"):
            write_weights(written, {"framework": "sb3", "x": math.inf}, {})

    def test_shared_and_strided_tensors_have_copies(self, place: Path) -> None:
        base = th.arange(6.0).reshape(2, 3)
        write_weights(place, DOCUMENT, {"a": base, "b": base, "c": base.T, "d": base[1]})
        with open_weights(place, "sb3") as file:
            assert all(th.equal(file.read(name), t) for name, t in (("a", base), ("b", base), ("c", base.T), ("d", base[1])))

    def test_what_is_read_is_no_part_of_the_file(self, written: Path) -> None:
        with open_weights(written, "sb3") as file:
            before = written.read_bytes()
            tensor = file.read("part.a")
            tensor.fill_(1.0)
            assert th.equal(file.read("part.a"), TENSORS["part.a"])
        assert written.read_bytes() == before
        written.write_bytes(b"")
        assert th.equal(tensor, th.ones(2, 3))

    @pytest.mark.parametrize(
        ("expected", "message"),
        [
            ({"a": th.zeros(2, 3)}, r"missing=\[\], unknown=\['part.b'\]"),
            ({"a": th.zeros(2, 3), "b": th.tensor(1), "c": th.zeros(1)}, r"missing=\['part.c'\], unknown=\[\]"),
            ({"a": th.zeros(3, 2), "b": th.tensor(1)}, r"'part.a' has shape \(2, 3\).* has \(3, 2\)"),
            ({"a": th.zeros(2, 3), "b": th.tensor(1.0)}, r"'part.b' has numbers of type I64, the model has torch.float32"),
        ],
    )
    def test_other_tensors_than_expected(self, written: Path, expected: dict[str, th.Tensor], message: str) -> None:
        with open_weights(written, "sb3") as file, pytest.raises(WeightsError, match=message):
            file.expect("part.", expected)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_values(self, place: Path, value: float) -> None:
        write_weights(place, DOCUMENT, {"a": th.tensor([0.0, value])})
        with open_weights(place, "sb3") as file, pytest.raises(WeightsError, match="allow_non_finite=True"):
            file.read("a")
        with open_weights(place, "sb3", allow_non_finite=True) as file:
            assert file.read("a")[0] == 0.0

    def test_too_long_to_write(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(WeightsError, match="characters of JSON"):
            write_weights(place, {"framework": "sb3", "x": "a" * 2**22}, {})
        with pytest.raises(WeightsError, match="100001 tensors"):
            write_weights(place, DOCUMENT, dict.fromkeys(map(str, range(100_001)), th.zeros(1)))
        monkeypatch.setattr(_weights, "_MAX_HEADER", 64)
        with pytest.raises(WeightsError, match="names and options"):
            write_weights(place, DOCUMENT, TENSORS)
        assert not place.exists()


class TestStrangersFiles:
    def test_no_file(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(FileNotFoundError, match="there is none"):
                opened(path)

    def test_a_part_of_a_file(self, written: Path) -> None:
        whole = written.read_bytes()
        for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
            written.write_bytes(whole[:length])
            with pytest.raises(WeightsError, match="not a safetensors file, or not a whole one"):
                opened(written)
        written.write_bytes(whole + b"\0")
        with pytest.raises(WeightsError, match="not a safetensors file"):
            opened(written)
        written.write_bytes(whole)
        opened(written)

    def test_anything_else(self, written: Path) -> None:
        for content in (b"PK\x03\x04" + b"\0" * 60, b"\x80\x05" * 40, bytes(range(256)) * 4, b"\0" * 64):
            written.write_bytes(content)
            with pytest.raises(WeightsError, match="not a safetensors file"):
                opened(written)

    def test_a_header_that_claims_to_be_long(self, written: Path) -> None:
        written.write_bytes(struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 100))
        with pytest.raises(WeightsError, match="claims a header of 16777217 bytes"):
            opened(written)
        written.write_bytes(struct.pack("<Q", 2**60) + b" " * 100)
        with pytest.raises(WeightsError, match="not a whole one"):
            opened(written)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]},
            {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            {"dtype": "object", "shape": [2], "data_offsets": [0, 8]},
        ],
        ids=str,
    )
    def test_a_tensor_that_claims_what_the_file_has_not(self, written: Path, entry: dict[str, Any]) -> None:
        header = json.dumps({"__metadata__": {"cql_plugins": "{}"}, "a": entry}).encode()
        written.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
        with pytest.raises(WeightsError, match="not a safetensors file"):
            opened(written)

    def test_of_somebody_else(self, written: Path) -> None:
        written.write_bytes(save(TENSORS))
        with pytest.raises(WeightsError, match="not written by save_weights"):
            opened(written)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "cannot be read"),
            ("[]", "does not hold a model"),
            ("{}", "does not hold a model"),
            ("NaN", "NaN is not JSON"),
            ('{"a": Infinity}', "Infinity is not JSON"),
            ('{"a": 1, "a": 2}', "a name occurs twice"),
            ("[" * 100_000 + "]" * 100_000, "cannot be read"),
            ('{"a": ' + "1" * 10_000 + "}", "cannot be read"),
            ("[" + "1," * 2**21 + "1]", "characters of options"),
            ('{"format": "cql_plugins.weights", "format_version": 2}', "version 2 of the format, this reads 1. Update"),
            ('{"format": "cql_plugins.weights", "format_version": true}', "version True"),
            ('{"format": "cql_plugins.weights", "format_version": 1}', "says it is of None"),
            ('{"format": "cql_plugins.weights", "format_version": 1, "framework": ["sb3"]}', r"says it is of \['sb3'\]"),
        ],
        ids=lambda text: text[:30],
    )
    def test_documents(self, written: Path, text: str, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            opened(with_text(written, text))

    def test_numbers_of_tensors(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_weights, "_MAX_TENSORS", 2)
        with pytest.raises(WeightsError, match="has 3 tensors, and 2 are allowed"):
            opened(written)

    @pytest.mark.parametrize(
        ("framework", "told"), [("sb3", "cql_plugins.d3rlpy.load_weights"), ("d3rlpy", "cql_plugins.sb3.load_weights")]
    )
    def test_the_other_framework(self, place: Path, framework: str, told: str) -> None:
        other = {"sb3": "d3rlpy", "d3rlpy": "sb3"}[framework]
        write_weights(place, {"framework": other}, {})
        assert opened(place, other) == {}
        with pytest.raises(WeightsError, match=told):
            opened(place, framework)


class TestBudget:
    @pytest.fixture
    def file(self, written: Path) -> Any:
        with open_weights(written, "sb3") as file:
            yield file

    @pytest.mark.parametrize(
        "make",
        [
            lambda: th.empty(10**15),
            lambda: th.empty((10**7, 10**8)),
            lambda: th.zeros(size=(10**9, 10)),
            lambda: th.full((10**9,), 1.0),
            lambda: th.linspace(0, 1, 10**9),
            lambda: th.nn.Linear(10**6, 10**6),
            lambda: th.nn.Conv2d(10**6, 10**6, 3),
            lambda: [th.nn.Linear(1, 1) for _ in range(10**9)],
        ],
    )
    def test_stops_before_the_memory_is_asked_for(self, file: Any, make: Any) -> None:
        with Budget(file), pytest.raises(WeightsError, match="nothing of that size was made"):
            make()

    def test_lets_through_what_the_file_can_hold(self, file: Any) -> None:
        with Budget(file):
            th.nn.Linear(100, 100)
        with pytest.raises(WeightsError), Budget(file):
            th.nn.Linear(300, 300)
        with Budget(file, more=10**5):
            th.nn.Linear(300, 300)
        th.nn.Linear(300, 300)


class TestKinds:
    @pytest.mark.parametrize(
        ("kind", "value", "text"),
        [
            (NUMBER, 0.1, "0.1"),
            (NUMBER, np.float32(0.1), "0.10000000149011612"),
            (NUMBER, -math.inf, '"-inf"'),
            (NUMBER, 3, "3"),
            (integer(0), np.int64(4), "4"),
            (FLAG, False, "false"),
            (choice("a", "b"), "b", '"b"'),
            (optional(integer()), None, "null"),
            (either(integer(), choice("all")), "all", '"all"'),
            (sequence(NUMBER, tuple, 2), (-math.inf, 2.0), '["-inf", 2.0]'),
            (mapping(sequence(integer())), {"pi": [1, 2]}, '{"pi": [1, 2]}'),
            (named({"ReLU": th.nn.ReLU}), th.nn.ReLU, '"ReLU"'),
        ],
    )
    def test_there_and_back(self, kind: Kind, value: Any, text: str) -> None:
        assert json.dumps(write_field("x", kind, value), allow_nan=False) == text
        read = read_field("x", kind, json.loads(text))
        assert read == value
        assert isinstance(value, np.generic) or type(read) is type(value)

    def test_nan(self) -> None:
        assert math.isnan(read_field("x", NUMBER, write_field("x", NUMBER, math.nan)))

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (NUMBER, True),
            (NUMBER, "1"),
            (NUMBER, "infinity"),
            (NUMBER, None),
            (NUMBER, float("1e999")),
            (number(0.0, 1.0), 1.5),
            (number(0.0), "nan"),
            (integer(), 1.0),
            (integer(), True),
            (integer(), 2**60),
            (integer(0, 5), 6),
            (FLAG, 1),
            (choice("a"), ["a"]),
            (named({"ReLU": th.nn.ReLU}), "Linear"),
            (named({"ReLU": th.nn.ReLU}), {}),
            (sequence(NUMBER), "ab"),
            (sequence(NUMBER), {"a": 1}),
            (sequence(NUMBER, length=2), [1]),
            (sequence(NUMBER), ["x"]),
            (mapping(NUMBER), [1]),
            (mapping(NUMBER), {"a": "b"}),
            (either(integer(), FLAG), "x"),
        ],
    )
    def test_what_is_not_of_a_kind(self, kind: Kind, value: Any) -> None:
        with pytest.raises(WeightsError, match=r"^The file's x is not what it must be: expected"):
            read_field("x", kind, value)

    def test_long_values_are_not_repeated(self) -> None:
        with pytest.raises(WeightsError) as caught:
            read_field("x", NUMBER, "a" * 10**6)
        assert len(str(caught.value)) < 500

    def test_records(self) -> None:
        kinds = {"a": NUMBER, "b": FLAG}
        assert read_record("x", kinds, {"a": 1, "b": True}) == {"a": 1, "b": True}
        assert read_record("x", kinds, {"a": 1}, optional_ones=["b"]) == {"a": 1}
        for value in ({"a": 1}, {"a": 1, "b": True, "c": 1}, {"a": 1, "b": 1}, [], None):
            with pytest.raises(WeightsError):
                read_record("x", kinds, value)

    @pytest.mark.parametrize(
        ("fresh", "value", "fits"),
        [
            ({"a": (0.1, 2), "b": None}, {"a": [1, 2.0], "b": 3}, True),
            ({"a": (0.1, 2)}, {"a": [1]}, False),
            ({"a": 1}, {"b": 1}, False),
            ({"a": 1}, {"a": "1"}, False),
            ({"a": True}, {"a": 1}, False),
            ({"a": {}}, {"a": []}, False),
            ([1], 1, False),
        ],
    )
    def test_the_form_of_a_value(self, fresh: Any, value: Any, fits: bool) -> None:
        if fits:
            assert read_like("x", fresh, value) == {"a": (1, 2.0), "b": 3}
        else:
            with pytest.raises(WeightsError):
                read_like("x", fresh, value)


@pytest.mark.parametrize("room", ["sb3", "d3rlpy"])
def test_safetensors_is_named_where_it_is_missing(room: str, tmp_path: Path) -> None:
    pytest.importorskip(f"cql_plugins.{room}", exc_type=ImportError)
    code = (
        f"import sys; sys.modules['safetensors'] = None\nfrom cql_plugins.{room} import load_weights\nload_weights('nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: safetensors is needed here" in done.stderr
    assert 'pip install "cql-plugins[safetensors]"' in done.stderr
