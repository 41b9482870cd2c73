"""Models in one safetensors file: tensors, and a JSON document in its metadata that says what they belong to.

Nothing in such a file is code, and reading one runs none. It is read as a stranger's: the document is bounded and read field by
field, networks cannot be larger than the file that claims to hold them, names and shapes are compared before a value is read.
What a document says of a framework's models is written and read beside that framework.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode

from cql_plugins._files import whole_file

FORMAT = "cql_plugins.weights"
VERSION = 1
"""Of the format; a reader refuses later ones."""
_KEY = "cql_plugins"
"""Where in the metadata the document is."""
_MAX_HEADER = 16 * 2**20
_MAX_DOCUMENT = 4 * 2**20
_MAX_TENSORS = 100_000
_LARGEST_INTEGER = 2**53
_LOADERS = {
    "sb3": "cql_plugins.sb3.load_weights; cql_plugins.adapters.to_d3rlpy_model then moves it to d3rlpy",
    "d3rlpy": "cql_plugins.d3rlpy.load_weights; cql_plugins.adapters.to_sb3_model then moves it to Stable-Baselines3",
}
"""Framework, who reads its files."""


class WeightsError(ValueError):
    """A model that cannot be written as weights and JSON, or a file that is not such a model. The message says why."""


# Values in JSON ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of value: how it is written as JSON, and how it is read back from JSON that anybody may have written.

    Attributes:
        expected: What it is, for messages.
        write: From a value to JSON.
        read: From JSON to a value. Both raise ``ValueError`` for anything else.
    """

    expected: str
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _wrong(value: Any) -> ValueError:
    text = repr(value)
    return ValueError(text if len(text) <= 200 else f"{text[:200]}...")


def _has_shape(value: Any) -> bool:
    """Whether it is an array or a tensor of more than one number."""
    return bool(getattr(value, "shape", False))


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """Make the kind of a number between two, infinities and NaN included, which JSON does not have.

    Args:
        low: The smallest.
        high: The largest; with both infinite NaN is a number, too.
    """
    names = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
    unbounded = low == -math.inf and high == math.inf

    def is_inside(value: float) -> bool:
        return low <= value <= high or (unbounded and math.isnan(value))

    def write(value: Any) -> Any:
        if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str) or _has_shape(value):
            raise _wrong(value)
        plain = int(value) if isinstance(value, int) else float(value)
        if not is_inside(plain):
            raise _wrong(value)
        return plain if math.isfinite(plain) else str(plain)

    def read(value: Any) -> float:
        if isinstance(value, str) and value in names:
            value = names[value]
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _wrong(value)
        if not is_inside(value):
            raise _wrong(value)
        return value  # type: ignore[no-any-return]

    bounds = "" if unbounded else f" from {low:g} to {high:g}"
    return Kind(f"a number{bounds}", write, read)


def integer(low: int = -_LARGEST_INTEGER, high: int = _LARGEST_INTEGER) -> Kind:
    """Make the kind of an integer between two.

    Args:
        low: The smallest.
        high: The largest.
    """

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(value)
        return value

    def write(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__") or _has_shape(value):
            raise _wrong(value)
        return read(int(value))

    return Kind(f"an integer from {low} to {high}", write, read)


def _same(expected: str, accepts: Callable[[Any], bool]) -> Kind:
    """Make a kind whose values are in JSON what they are."""

    def check(value: Any) -> Any:
        if not accepts(value):
            raise _wrong(value)
        return value

    return Kind(expected, check, check)


NUMBER = number()
FLAG = _same("true or false", lambda value: isinstance(value, bool))
TEXT = _same("a text of at most 1000 characters", lambda value: isinstance(value, str) and len(str(value)) <= 1000)


def choice(*texts: str) -> Kind:
    """Make the kind of one of some texts.

    Args:
        *texts: The texts.
    """
    return _same(f"one of {list(texts)}", lambda value: isinstance(value, str) and value in texts)


def named(things: Mapping[str, Any]) -> Kind:
    """Make the kind of one of some objects that go by a name; no other name means anything.

    Args:
        things: Name, object.
    """

    def write(value: Any) -> str:
        for name, thing in things.items():
            if thing is value:
                return name
        raise _wrong(value)

    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in things:
            raise _wrong(value)
        return things[value]

    return Kind(f"one of {list(things)}", write, read)


def either(*kinds: Kind) -> Kind:
    """Make the kind of what is of one of several kinds; the first that fits counts.

    Args:
        *kinds: The kinds.
    """

    def first(way: str, value: Any) -> Any:
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return getattr(kind, way)(value)
        raise _wrong(value)

    expected = " or ".join(kind.expected for kind in kinds)
    return Kind(expected, lambda value: first("write", value), lambda value: first("read", value))


def optional(kind: Kind) -> Kind:
    """Make the kind of what may be ``None``.

    Args:
        kind: Of what it is otherwise.
    """
    return either(_same("null", lambda value: value is None), kind)


def sequence(kind: Kind, make: type[list[Any]] | type[tuple[Any, ...]] = list, length: int | None = None) -> Kind:
    """Make the kind of a list or a tuple; as JSON both are arrays.

    Args:
        kind: Of each element.
        make: What is read is made one of these.
        length: How many there must be.
    """

    def check(value: Any, types: tuple[type[Sequence[Any]], ...]) -> Any:
        if not isinstance(value, types) or (length is not None and len(value) != length):
            raise _wrong(value)
        return value

    return Kind(
        f"a list of {'' if length is None else f'{length} times '}{kind.expected}",
        lambda value: [kind.write(element) for element in check(value, (list, tuple))],
        lambda value: make(kind.read(element) for element in check(value, (list,))),
    )


def mapping(kind: Kind) -> Kind:
    """Make the kind of a dict from texts to values of one kind.

    Args:
        kind: Of each value.
    """

    def check(value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wrong(value)
        return value

    return Kind(
        f"an object with {kind.expected} for each name",
        lambda value: {key: kind.write(element) for key, element in check(value).items()},
        lambda value: {key: kind.read(element) for key, element in check(value).items()},
    )


def write_field(name: str, kind: Kind, value: Any, hint: str = "") -> Any:
    """Write one field, or say which it is that cannot be written.

    Args:
        name: Its name.
        kind: Its kind.
        value: Its value.
        hint: What to do if it cannot.

    Raises:
        WeightsError: If it cannot.
    """
    try:
        return kind.write(value)
    except (ValueError, OverflowError) as error:
        raise WeightsError(
            f"{name} cannot be written as JSON: expected {kind.expected}, got {error}. {hint}".rstrip()
        ) from error


def read_field(name: str, kind: Kind, value: Any) -> Any:
    """Read one field, or say which it is that is not what it should be.

    Args:
        name: Its name.
        kind: Its kind.
        value: What the document has.

    Raises:
        WeightsError: If it is something else.
    """
    try:
        return kind.read(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise WeightsError(f"The file's {name} is not what it must be: expected {kind.expected}, got {error}.") from error


def read_record(name: str, kinds: Mapping[str, Kind], value: Any, optional_ones: Collection[str] = ()) -> dict[str, Any]:
    """Read an object with fixed fields.

    Args:
        name: Its name, for messages.
        kinds: Field, kind.
        value: What the document has.
        optional_ones: Fields that may be missing.

    Returns:
        The fields that are there.

    Raises:
        WeightsError: If a field is missing, unknown or not what it should be.
    """
    if not isinstance(value, dict):
        raise WeightsError(f"The file's {name} is not what it must be: expected an object, got {_wrong(value)}.")
    unknown = sorted(value.keys() - kinds.keys())
    if unknown:
        raise WeightsError(f"The file's {name} has fields that are not known here: {unknown[:10]}. Is it a later version's?")
    missing = sorted(kinds.keys() - value.keys() - set(optional_ones))
    if missing:
        raise WeightsError(f"The file's {name} lacks {missing[:10]}.")
    return {field: read_field(f"{name}.{field}", kinds[field], value[field]) for field in value}


# The file ----------------------------------------------------------------------------------------------------------------


def write_weights(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, th.Tensor]) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Where to.
        document: What the tensors belong to; JSON.
        tensors: By name.

    Raises:
        WeightsError: If the document is too long, or there are too many tensors.
        ImportError: If safetensors is not installed.
    """
    _, save = _import_safetensors()
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **document}, allow_nan=False)
    if len(text) > _MAX_DOCUMENT:
        raise WeightsError(
            f"The options of this model take {len(text)} characters of JSON, and {_MAX_DOCUMENT} are allowed. Long ones are "
            "the bounds of a space or the statistics of a scaler, given for each element."
        )
    if len(tensors) > _MAX_TENSORS:
        raise WeightsError(f"The model has {len(tensors)} tensors, and {_MAX_TENSORS} are allowed.")
    # Copies: a features extractor that two networks share has two names, and safetensors refuses shared memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    written = save(plain, metadata={_KEY: text})
    if int.from_bytes(written[:8], "little") > _MAX_HEADER:
        raise WeightsError(f"The names and options of this model take more than {_MAX_HEADER} bytes.")
    with whole_file(path) as file:
        file.write(written)


class WeightsFile:
    """An open file: its document, and its tensors, read one by one.

    Attributes:
        path: Where it is.
        document: What the tensors belong to; JSON that nobody has checked yet.
        shapes: Shape of each tensor.
    """

    def __init__(self, path: Path, handle: Any, document: dict[str, Any], allow_non_finite: bool) -> None:
        self.path, self.document = path, document
        self._handle, self._allow_non_finite = handle, allow_non_finite
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._expected: set[str] = set()
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    @property
    def n_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def names(self, prefix: str) -> set[str]:
        """Name the tensors of a part.

        Args:
            prefix: What their names begin with.
        """
        return {name for name in self.shapes if name.startswith(prefix)}

    def expect(self, prefix: str, expected: Mapping[str, th.Tensor]) -> None:
        """Compare names, shapes and types of a part with those of what was built. No value is read.

        Args:
            prefix: What the names begin with.
            expected: Rest of the name, tensor.

        Raises:
            WeightsError: If they differ.
        """
        ours = {f"{prefix}{name}": tensor for name, tensor in expected.items()}
        there = self.names(prefix) if prefix else self.shapes.keys() & ours.keys()
        if ours.keys() != there:
            missing, unknown = sorted(ours.keys() - there)[:5], sorted(there - ours.keys())[:5]
            raise WeightsError(f"The file's tensors are not those of the model that its options make: {missing=}, {unknown=}.")
        for name, tensor in ours.items():
            if self.shapes[name] != tuple(tensor.shape):
                raise WeightsError(
                    f"The file's tensor {name!r} has shape {self.shapes[name]}, and the model that its options make has "
                    f"{tuple(tensor.shape)}."
                )
            stored = self._handle.get_slice(name).get_dtype()
            if _DTYPES.get(stored) is not tensor.dtype:
                raise WeightsError(f"The file's tensor {name!r} has numbers of type {stored}, the model has {tensor.dtype}.")
        self._expected |= ours.keys()

    def expect_no_more(self) -> None:
        """Refuse tensors that belong to nothing.

        Raises:
            WeightsError: If there are some.
        """
        unknown = sorted(self.shapes.keys() - self._expected)
        if unknown:
            raise WeightsError(f"The file has tensors that belong to no part of the model: {unknown[:5]}.")

    def read(self, name: str) -> th.Tensor:
        """Read one tensor that :meth:`expect` has seen.

        Args:
            name: Its whole name.

        Raises:
            WeightsError: If it has NaN or infinity, and these are not allowed.
        """
        tensor: th.Tensor = self._handle.get_tensor(name).clone()  # Its memory may be the file.
        if not self._allow_non_finite and tensor.is_floating_point() and not bool(th.isfinite(tensor).all()):
            raise WeightsError(
                f"The file's tensor {name!r} has NaN or infinity in it: the training that it comes from has diverged, or the "
                "file is broken. Pass allow_non_finite=True to load it all the same."
            )
        return tensor

    def read_all(self, prefix: str) -> dict[str, th.Tensor]:
        """Read the tensors of a part, by the rest of their names.

        Args:
            prefix: What their names begin with.
        """
        return {name.removeprefix(prefix): self.read(name) for name in sorted(self.names(prefix))}


@contextlib.contextmanager
def open_weights(path: str | os.PathLike[str], framework: str, allow_non_finite: bool = False) -> Iterator[WeightsFile]:
    """Open a file and check that it is one of a framework's models. Nothing but the header is read.

    Args:
        path: The file.
        framework: ``"sb3"`` or ``"d3rlpy"``.
        allow_non_finite: Whether tensors may have NaN and infinity.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: If there is none.
        WeightsError: If it is something else.
        ImportError: If safetensors is not installed.
    """
    open_safely, _ = _import_safetensors()
    from safetensors import SafetensorError

    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"Expected a file of weights at {place}, there is none.")
    _check_header_length(place)
    try:
        handle = open_safely(place, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{place} is not a safetensors file, or not a whole one: {error}.") from error
    with handle as opened:
        document = _parse(place, (opened.metadata() or {}).get(_KEY))
        theirs = document.pop("framework", None)
        if theirs != framework:
            where = _LOADERS.get(theirs) if isinstance(theirs, str) else None
            told = f"Load it with {where}." if where else f"It says it is of {_wrong(theirs)}."
            raise WeightsError(f"{place} is not a model of {framework!r}. {told}")
        if len(opened.keys()) > _MAX_TENSORS:
            raise WeightsError(f"{place} has {len(opened.keys())} tensors, and {_MAX_TENSORS} are allowed.")
        yield WeightsFile(place, opened, document, allow_non_finite)


def _check_header_length(path: Path) -> None:
    """Look at the length that the file claims for its header before anybody reads so much."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise WeightsError(f"{path} is not a safetensors file, or not a whole one: it has {size} bytes.")
    if length > _MAX_HEADER:
        raise WeightsError(f"{path} claims a header of {length} bytes, and {_MAX_HEADER} are allowed.")


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    """Parse the document and check that it is of this format."""
    if text is None:
        raise WeightsError(
            f"{path} is a safetensors file without a model's options: it was not written by save_weights of cql_plugins."
        )
    if len(text) > _MAX_DOCUMENT:
        raise WeightsError(f"{path} has {len(text)} characters of options, and {_MAX_DOCUMENT} are allowed.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a name occurs twice")
        return made

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has options that cannot be read: {error}.") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise WeightsError(f"{path} does not hold a model of the format {FORMAT!r}.")
    version = document.pop("format_version", None)
    if version != VERSION or isinstance(version, bool):
        raise WeightsError(f"{path} is of version {_wrong(version)} of the format, this reads {VERSION}. Update cql-plugins.")
    return document


def _import_safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            f'safetensors is needed here: {error}. Install it with: pip install "cql-plugins[safetensors]"'
        ) from error
    return safe_open, save


_DTYPES = {
    "F64": th.float64,
    "F32": th.float32,
    "F16": th.float16,
    "BF16": th.bfloat16,
    "I64": th.int64,
    "I32": th.int32,
    "I16": th.int16,
    "I8": th.int8,
    "U8": th.uint8,
    "BOOL": th.bool,
}
"""safetensors' name, torch's type."""


# Networks no larger than the file ----------------------------------------------------------------------------------------


class Budget(TorchFunctionMode):
    """Lets this thread make no more tensors, and no larger ones, than networks that a file holds can need.

    Options in a file say how large networks are; a few bytes can ask for terabytes. Sizes are looked at before the memory is
    asked for.

    Args:
        file: The file.
        more: Elements that building needs beside the parameters, such as an observation to try a network on.
    """

    def __init__(self, file: WeightsFile, more: int = 0) -> None:
        super().__init__()
        # Some builders make a network twice, or a tensor to start from; none makes it four times.
        self._elements = 4 * (file.n_elements + more) + 2**16
        self._tensors = 8 * len(file.shapes) + 256
        self._path = file.path

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the size of a new tensor."""
        name = getattr(func, "__name__", "")
        if name in ("empty", "zeros", "ones", "rand", "randn", "full"):
            first = (kwargs or {}).get("size", args[0] if args else ())
            sizes = first if isinstance(first, Sequence) else args
            self._spend(math.prod(size for size in sizes if isinstance(size, int)))
        elif name in ("arange", "linspace", "eye", "randint", "randperm"):
            self._spend(max((abs(value) for value in args if isinstance(value, int)), default=0))
        return func(*args, **(kwargs or {}))

    def _spend(self, elements: int) -> None:
        self._elements -= elements
        self._tensors -= 1
        if self._elements < 0 or self._tensors < 0:
            raise WeightsError(
                f"The options in {self._path} ask for larger networks than the file holds: nothing of that size was made."
            )


# Optimisers --------------------------------------------------------------------------------------------------------------

_OF_THE_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")
"""Entries of a parameter group that are not the optimiser's mathematics; a loaded one has those it was built with."""
_OBJECT = _same("an object", lambda value: isinstance(value, dict))
_ENTRY = either(optional(FLAG), NUMBER, sequence(NUMBER, tuple))


def describe_optimizer(name: str, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """Split an optimiser's state into JSON and tensors.

    Args:
        name: Of the optimiser, for messages.
        state: Its ``state_dict()``.

    Returns:
        The document and the tensors, ``<index>.<key>``.

    Raises:
        WeightsError: If it has a part that is neither.
    """
    groups = []
    for group in state["param_groups"]:
        entries = {key: value for key, value in group.items() if key not in _OF_THE_MACHINE}
        groups.append(
            {
                key: write_field(f"{name}.{key}", _ENTRY, value.item() if isinstance(value, th.Tensor) else value)
                for key, value in entries.items()
            }
        )
    tensors: dict[str, th.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        numbers[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, th.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers[str(index)][key] = write_field(f"{name}.{index}.{key}", optional(NUMBER), value)
    return {"groups": groups, "numbers": numbers}, tensors


def read_optimizer(
    file: WeightsFile, prefix: str, document: Any, optimizer: th.optim.Optimizer
) -> Callable[[], dict[str, Any]]:
    """Check an optimiser's state against the optimiser that was built.

    Args:
        file: The file.
        prefix: What the names of its tensors begin with.
        document: Its document.
        optimizer: The optimiser.

    Returns:
        What reads the tensors and returns what ``optimizer.load_state_dict`` takes.

    Raises:
        WeightsError: If it does not fit.
    """
    name = prefix.removesuffix(".")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = {"groups": sequence(_OBJECT), "numbers": mapping(_OBJECT)}
    parts = read_record(name, kinds, document)
    fresh = optimizer.state_dict()
    if len(parts["groups"]) != len(fresh["param_groups"]):
        raise WeightsError(
            f"The file's {name} has {len(parts['groups'])} groups of parameters, expected {len(fresh['param_groups'])}."
        )
    groups = []
    for own, theirs in zip(fresh["param_groups"], parts["groups"], strict=True):
        expected = {key: value for key, value in own.items() if key not in _OF_THE_MACHINE}
        groups.append(own | read_like(name, expected, theirs))

    numbers: dict[int, dict[str, Any]] = {}
    expected_tensors: dict[str, th.Tensor] = {}
    kept = _state_after_a_step(name, optimizer, groups)
    for text, values in parts["numbers"].items():
        if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) < len(parameters)):
            raise WeightsError(f"The file's {name} has a state for parameter {_wrong(text)}, there are {len(parameters)}.")
        parameter = parameters[int(text)]
        plain = {key: value for key, value in kept.items() if not isinstance(value, th.Tensor)}
        numbers[int(text)] = read_like(f"{name}.{text}", plain, values)
        for key, value in kept.items():
            if isinstance(value, th.Tensor):
                shaped = th.empty_like(parameter, device="meta") if value.shape == (1,) else value
                expected_tensors[f"{text}.{key}"] = shaped
    file.expect(prefix, expected_tensors)

    def read() -> dict[str, Any]:
        states: dict[int, dict[str, Any]] = {index: dict(values) for index, values in numbers.items()}
        for key in expected_tensors:
            index, _, entry = key.partition(".")
            states[int(index)][entry] = file.read(prefix + key)
        return {"state": states, "param_groups": groups}

    return read


def read_like(name: str, fresh: Any, value: Any) -> Any:
    """Read JSON that must have the form of a value that was just made: the same names, numbers where it has numbers.

    Args:
        name: For messages.
        fresh: The value.
        value: What the document has.

    Raises:
        WeightsError: If it is something else.
    """
    if isinstance(fresh, dict):
        if not isinstance(value, dict) or value.keys() != fresh.keys():
            got = sorted(map(str, value)) if isinstance(value, dict) else _wrong(value)
            raise WeightsError(f"The file's {name} is not what it must be: expected {sorted(map(str, fresh))}, got {got}.")
        return {key: read_like(f"{name}.{key}", fresh[key], value[key]) for key in fresh}
    if isinstance(fresh, list | tuple):
        if not isinstance(value, list) or len(value) != len(fresh):
            raise WeightsError(f"The file's {name} is not what it must be: expected {len(fresh)} values, got {_wrong(value)}.")
        return type(fresh)(
            read_like(f"{name}.{i}", one, other) for i, (one, other) in enumerate(zip(fresh, value, strict=True))
        )
    kind = FLAG if isinstance(fresh, bool) else NUMBER
    return read_field(name, optional(kind) if fresh is None else kind, value)


def _state_after_a_step(name: str, optimizer: th.optim.Optimizer, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What such an optimiser keeps for a parameter: shape (1,) stands for the parameter's."""
    parameter = th.nn.Parameter(th.zeros(1))
    parameter.grad = th.zeros(1)
    options = {key: value for key, value in groups[0].items() if key not in _OF_THE_MACHINE}
    checked = {key: value for key, value in options.items() if key in inspect.signature(type(optimizer)).parameters}
    try:
        # Options of a group are not looked at by torch, those of the constructor are.
        probe = type(optimizer)([{"params": [parameter], **options}], **checked)
        probe.step()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"The file's {name} has options that {type(optimizer).__name__} does not take: {error}.") from error
    return dict(probe.state[parameter])


__all__ = [
    "FLAG",
    "NUMBER",
    "TEXT",
    "Budget",
    "Kind",
    "WeightsError",
    "WeightsFile",
    "choice",
    "describe_optimizer",
    "either",
    "integer",
    "mapping",
    "named",
    "number",
    "open_weights",
    "optional",
    "read_field",
    "read_like",
    "read_optimizer",
    "read_record",
    "sequence",
    "write_field",
    "write_weights",
]
