"""The state of running environments, read from and written into objects that the same script built.

What Python can see is taken: numbers, text, arrays, tensors and random generators in the attributes of an environment, its
wrappers and the objects they hold, and MuJoCo's simulations. Written back, an environment goes on in the middle of an episode.
Where something cannot be seen (a physics engine in C, a server), it is named, and the caller has to reset.

A state is a table, ``{"root": reference, "objects": [...]}``: each object once, by number, so that what was one object is one
again, and that neither reading nor writing goes deep, however long a chain of objects is. A reference is a number, a value that
cannot change, or ``None`` for what is no state (functions, classes).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import random
import re
import sys
import types
import uuid
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from cql_plugins._checkpoints import Arrays, decode, encode
from cql_plugins._mujoco_state import misfits_of_data, misfits_of_model, read_data, read_model, set_data, set_model

_STATIC = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
    logging.Logger, io.IOBase, np.dtype, np.ufunc, re.Pattern, range, slice, property, th.device, th.dtype, th.layout, th.Size,
)  # fmt: skip
_FOR_SHOW = {
    "_cached_spec", "clock", "mujoco_renderer", "renderer", "results_writer", "screen", "spec", "surf", "viewer", "window",
}  # fmt: skip
"""Attributes that mostly show or describe an environment. A game's own clock is state, pygame's is not: see ``_shows``."""
_MODULES_FOR_SHOW = {
    "OpenGL", "PIL", "cv2", "dm_control", "glfw", "gymnasium", "gymnasium_robotics", "imageio", "matplotlib", "moviepy",
    "mujoco", "pygame", "pyglet", "stable_baselines3", "tkinter",
}  # fmt: skip
_OF_VECTORISED = {"buf_infos", "class_attributes", "reset_infos"}
"""Infos are of the step before, and made anew by the next; a wrapper lists what its class defines."""
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, tuple, deque, set, frozenset, dict)
_MADE_ANEW: dict[str, Any] = {
    "list": list, "deque": deque, "set": set, "dict": dict, "OrderedDict": OrderedDict, "Counter": Counter,
}  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools._lru_cache_wrapper)
_CONSTANTS = {
    range, slice, complex, datetime.date, datetime.datetime, datetime.time, datetime.timedelta, decimal.Decimal,
    fractions.Fraction, uuid.UUID,
}  # fmt: skip
_PLAIN = (type(None), bool, int, float, str, bytes)
_MOST_OBJECTS = 100_000
_NOTHING = object()
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a program made.
_SLOTS: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()

# The way to an object: the way to its holder, and one step more. Text is made of it only where it is told.
_Way = tuple[Any, str]


def capture_state(root: Any, arrays: Arrays, name: str = "environment") -> tuple[Any, list[str]]:
    """Read the state of an object and of all that it holds; nothing is changed.

    Args:
        root: An environment, a vectorised one, or any other object.
        arrays: Arrays of the archive; those of the state are added, as copies.
        name: What to call these.

    Returns:
        The state, as JSON can hold it, and what could not be read.
    """
    reader = _Reader(arrays, name)
    return reader.read(root), reader.problems


def misfits(root: Any, state: Any, arrays: Mapping[str, NDArray[Any]]) -> tuple[list[str], list[str]]:
    """Look for what of a state has no place; nothing is changed.

    Args:
        root: An object built as the one was that the state comes from.
        state: The state.
        arrays: The archive's arrays.

    Returns:
        What has no place in ``root`` since it is made of other environments, wrappers or simulations, whatever they do next;
        and what has none as they are now, but may have after a reset.
    """
    writer = _Writer(root, state, arrays)
    return writer.others, writer.unplaced


def restore_state(root: Any, state: Any, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Write a state back, in place.

    Args:
        root: An object built as the one was that the state comes from.
        state: The state.
        arrays: The archive's arrays.

    Returns:
        What has no place in ``root``; all else is written.
    """
    writer = _Writer(root, state, arrays)
    writer.write()
    return writer.others + writer.unplaced


# Reading ----------------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, arrays: Arrays, name: str) -> None:
        self._arrays, self._name = arrays, name
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # An id is an object's only while it lives.
        self._records: list[dict[str, Any]] = []
        self._waiting: deque[tuple[int, _Way]] = deque()
        self._shown: dict[int, _Way] = {}  # Read last: a viewer may lead to the simulation sooner than the environment does.
        self._memories: list[tuple[int, NDArray[Any]]] = []
        self.problems: list[str] = []

    def read(self, root: Any) -> dict[str, Any]:
        reference = self._refer(root, (None, ""), False)
        while self._waiting or self._shown:
            shown = not self._waiting
            if shown:
                number = next(iter(self._shown))
                way = self._shown.pop(number)
            else:
                number, way = self._waiting.popleft()
            value = self._kept[number]
            try:
                record = self._read(number, value, way, shown)
            except Exception:  # Whatever an object does when it is looked at: training goes on.
                record = {}
                self._report(value, way, shown)
            self._records[number] = {**record, "shown": True} if shown else record
        self._note_shared_memory()
        return {"root": reference, "objects": self._records}

    def _refer(self, value: Any, way: _Way, shown: bool) -> Any:
        if type(value) in weakref.ProxyTypes:  # Somebody else's object, which is read there.
            return None
        if not shown and (same := _identity(value)) is not None:
            return {"same": same}
        if isinstance(value, _STATIC) or (shown and _shows(value)):
            return None
        if isinstance(value, enum.Enum):
            return {"enum": [*_class_of(value), value.value if isinstance(value, enum.Flag) else value.name]}
        if _is_flat(value):
            return {"plain": encode(value, self._arrays, self._name)}
        if id(value) not in self._numbers:
            if len(self._records) == _MOST_OBJECTS:
                self._records.append({})
                self.problems.append(f"{_told(way)}: more than {_MOST_OBJECTS:,} objects")
            if len(self._records) > _MOST_OBJECTS:
                return None
            number = self._numbers[id(value)] = len(self._records)
            self._records.append({})
            self._kept.append(value)
            if shown:
                self._shown[number] = way
            else:
                self._waiting.append((number, way))
        number = self._numbers[id(value)]
        if not shown and self._shown.pop(number, None) is not None:
            self._waiting.append((number, way))
        return number

    def _read(self, number: int, value: Any, way: _Way, shown: bool) -> dict[str, Any]:
        name = f"{self._name}/{number}"
        if isinstance(value, np.ndarray) and not value.dtype.hasobject and not isinstance(value, np.ma.MaskedArray):
            return self._read_array(number, np.asarray(value), {"class": _class_of(value)})
        if _is_tensor(value):
            about = {"dtype": str(value.dtype), "device": str(value.device), "requires_grad": value.requires_grad}
            return self._read_array(number, _as_array(value), {"class": _class_of(value), "tensor": about})
        if type(value) in _GENERATORS:
            return {"generator": encode(value, self._arrays, name)}
        if _is_called(value, "mujoco", "MjData"):
            return {"mujoco": encode(read_data(value), self._arrays, name)}
        if _is_called(value, "mujoco", "MjModel"):
            return {"mujoco_model": encode(read_model(value), self._arrays, name)}
        if isinstance(value, _CONTAINERS):
            return self._read_container(number, value, way, shown)
        if _is_remote(value):
            return self._read_remote(value, way, number)
        if (attributes := _attributes(value)) is not None and not _hides(value):
            record = {"class": _class_of(value), "attributes": self._refer_to_attributes(attributes, value, way, shown)}
            return {**record, "environment": True} if _is_environment(value) else record
        self._report(value, way, shown)
        return {}

    def _report(self, value: Any, way: _Way, shown: bool) -> None:
        if not shown:
            self.problems.append(f"{_told(way)} ({'.'.join(_class_of(value))})")

    def _read_array(self, number: int, value: NDArray[Any], record: dict[str, Any]) -> dict[str, Any]:
        name = f"{self._name}/{number}"
        self._arrays[name] = value.copy(order="K")
        self._memories.append((number, value))
        return {**record, "array": name}

    def _read_container(self, number: int, value: Any, way: _Way, shown: bool) -> dict[str, Any]:
        record: dict[str, Any] = {"class": _class_of(value), "kind": _kind_of(value)}
        if isinstance(value, deque):
            record["maxlen"] = value.maxlen
        keys: list[Any] = []
        items = _items_of(value)
        if isinstance(value, dict):
            keys, items = items, [dict.__getitem__(value, key) for key in items]
        hashed = items if isinstance(value, (set, frozenset)) else keys
        if not all(_is_flat(key) or isinstance(key, enum.Enum) for key in hashed) or (
            isinstance(value, tuple) and _attributes(value)
        ):
            self._report(value, way, shown)
            return {}
        if keys:
            record["keys"] = [self._refer(key, way, shown) for key in keys]
        is_long = len(items) > 1000  # A history, say: what its entries share with others does not matter as much as its size.
        if all(
            _is_flat(item) or (is_long and _is_plain_tree(item)) for item in items
        ):  # Half the size of a list of references.
            record["plain"] = encode(items, self._arrays, f"{self._name}/{number}")
        else:
            steps = keys or range(len(items))
            record["items"] = [self._refer(item, (way, f"[{step!r}]"), shown) for step, item in zip(steps, items, strict=True)]
        if attributes := _attributes(value):
            record["attributes"] = self._refer_to_attributes(attributes, value, way, shown)
        return record

    def _refer_to_attributes(self, attributes: dict[str, Any], value: Any, way: _Way, shown: bool) -> dict[str, Any]:
        if _is_space(value):
            attributes = {key: item for key, item in attributes.items() if key in ("_np_random", "spaces")}
        if _is_environment(value):
            attributes = {key: item for key, item in attributes.items() if key not in _OF_VECTORISED}
        return {key: self._refer(item, (way, f".{key}"), shown or key in _FOR_SHOW) for key, item in attributes.items()}

    def _read_remote(self, value: Any, way: _Way, number: int) -> dict[str, Any]:
        """Ask environments in other processes for their states."""
        if not value.has_attr("capture_state"):
            self.problems.append(f"{_told(way)} (environments in other processes: wrap each in cql_plugins.sb3.ResumableEnv)")
            return {}
        states = []
        for index, (state, arrays, problems) in enumerate(value.env_method("capture_state")):
            prefix = f"{self._name}/{number}.{index}/"
            self._arrays.update({prefix + key: array for key, array in arrays.items()})
            states.append([state, {key: prefix + key for key in arrays}])
            self.problems += [f"{_told((way, f'[{index}]'))}.{problem}" for problem in problems]
        return {"remote": states, "environment": True}

    def _note_shared_memory(self) -> None:
        """Note where arrays lie in memory that they share, so that a view is a view of the same array again."""
        arrays = dict(self._memories)
        for group, numbers in enumerate(_overlapping((number, *_extent(array)) for number, array in self._memories)):
            start = min(_extent(arrays[number])[0] for number in numbers)
            size = max(_extent(arrays[number])[1] for number in numbers) - start
            for number in numbers if len(numbers) > 1 else ():
                array = arrays[number]
                offset = array.__array_interface__["data"][0] - start
                self._records[number]["memory"] = {
                    "group": group, "size": size, "offset": offset, "strides": list(array.strides),
                }  # fmt: skip


# Writing ----------------------------------------------------------------------------------------------------------------


class _Writer:
    """First everything is looked at and gets its place, then it is written: what has none is known before."""

    def __init__(self, root: Any, state: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._records: list[dict[str, Any]] = state["objects"]
        self._places: dict[int, Any] = {}  # Objects to write into; _NOTHING where one is to be made.
        self._ways: dict[int, _Way] = {}
        self._fallbacks: dict[int, list[Any]] = {}  # What stands now where the items of a container belong.
        self._keys: dict[int, list[Any]] = {}
        self._taken: dict[int, Any] = {}
        self._constants = _Constants()
        self._waiting: deque[tuple[int, Any, _Way]] = deque()
        self.others: list[str] = []
        self.unplaced: list[str] = []
        self._look(root, state["root"])

    # Looking -------------------------------------------------------------------------------------------------------------

    def _look(self, root: Any, reference: Any) -> None:
        homeless: dict[int, tuple[Any, _Way]] = {}
        self._visit(reference, root, (None, ""))
        while self._waiting:
            number, current, way = self._waiting.popleft()
            if number in self._places:
                continue
            record = self._records[number]
            if not self._fits(record, current):
                if not _can_be_made(record, current):
                    homeless.setdefault(number, (current, way))
                    continue
                current = _NOTHING if record.get("kind") not in ("tuple", "frozenset") else current
            homeless.pop(number, None)
            self._places[number], self._ways[number] = current, way
            if current is not _NOTHING:
                self._taken[id(current)] = current
            self._look_into(number, record, current, way)
        for number, (current, way) in homeless.items():
            self._report(self._records[number], current, way)

    def _visit(self, reference: Any, current: Any, way: _Way, must_be: bool = False) -> None:
        if isinstance(reference, int):
            self._waiting.append((reference, current, way))
        elif reference is not None and "same" in reference:
            if _identity(current) != reference["same"]:
                self._report({}, current, way)
        elif (must_be and reference is None and current is _NOTHING) or (
            reference is not None and "enum" in reference and _member(reference["enum"], current) is None
        ):
            self._report({}, current, way)

    def _report(self, record: dict[str, Any], current: Any, way: _Way) -> None:
        if not record.get("shown"):
            # One that is not there may be made when the one around it resets.
            is_other = record.get("environment") and current is not _NOTHING and current is not None
            found = self.others if is_other else self.unplaced
            found.append(f"{_told(way)} ({'nothing' if current is _NOTHING else type(current).__name__})")

    def _fits(self, record: dict[str, Any], current: Any) -> bool:
        """Whether a state can be written into an object that is there."""
        if "remote" in record:
            return _is_remote(current) and len(record["remote"]) == current.num_envs and bool(current.has_attr("restore_state"))
        if current is _NOTHING or id(current) in self._taken:  # What were two objects stay two.
            return False
        if not record.keys() - {"shown"}:  # It could not be read, which was said then: what is there stays.
            return True
        if "array" in record:
            return _is_array_of(record, self._arrays[record["array"]], current)
        if "generator" in record:
            return _is_generator_of(decode(record["generator"], self._arrays), current)
        if "mujoco" in record:
            return _is_called(current, "mujoco", "MjData")
        if "mujoco_model" in record:
            return _is_called(current, "mujoco", "MjModel")
        if type(current).__qualname__ != record["class"][1]:
            return False
        if "kind" not in record:
            return _attributes(current) is not None
        return (
            _kind_of(current) == record["kind"]
            and record["kind"] not in ("tuple", "frozenset")
            and not self._constants.hold(current)
            # Others may start from the same one (a module's, a default argument): anew where nothing in it has to stay.
            and not ("plain" in record and _can_be_made(record, current) and not _has_members(record))
            and getattr(current, "maxlen", None) == record.get("maxlen")
        )

    def _look_into(self, number: int, record: dict[str, Any], current: Any, way: _Way) -> None:
        if "remote" in record:
            for index, found in self._of_remote("misfits", record, current, way):
                for problems, own in zip((self.others, self.unplaced), found, strict=True):
                    problems += [f"{index}.{problem}" for problem in own]
        if "mujoco" in record:
            saved = decode(record["mujoco"], self._arrays)
            self.others += [f"{_told(way, '')}.{name}" for name in misfits_of_data(current, saved)]
        if "mujoco_model" in record:
            sizes, changed = misfits_of_model(current, decode(record["mujoco_model"], self._arrays))
            self.others += [f"{_told(way, '')}.{name}" for name in sizes]
            self.unplaced += [f"{_told(way, '')}.{name}" for name in changed]
        if "kind" in record:
            self._look_into_container(number, record, current, way)
        if "attributes" in record:
            self._constants.add_those_of(type(current))
            own = _attributes(current) or {}
            for key, reference in record["attributes"].items():
                self._visit(reference, own.get(key, _NOTHING), (way, f".{key}"))

    def _look_into_container(self, number: int, record: dict[str, Any], current: Any, way: _Way) -> None:
        references = record.get("items", ())
        if "keys" in record:
            own = dict(current) if isinstance(current, dict) else {}
            keys = self._keys[number] = self._keys_of(record, own)
            if any(key is _NOTHING for key in keys):
                self._report(record, current, way)
            found, left = [own.pop(key, _NOTHING) for key in keys], list(own.values())
        else:
            keys = list(range(len(references)))
            own_items = list(current) if isinstance(current, (list, tuple, deque)) else []
            found = own_items[: len(keys)] + [_NOTHING] * (len(keys) - len(own_items))
            left = own_items[len(keys) :]
        self._fallbacks[number] = found
        # Whoever else holds an object that is to go would not know: it is another episode's.
        if any(not isinstance(item, (enum.Enum, th.Tensor, *_STATIC)) and _attributes(item) is not None for item in left):
            self._report(record, current, way)
        for key, reference, item in zip(keys, references, found, strict=False):
            self._visit(reference, item, (way, f"[{key!r}]"), must_be=True)

    def _keys_of(self, record: dict[str, Any], own: dict[Any, Any]) -> list[Any]:
        """The keys of a dict; members of enumerations that are known by name alone are those of the keys that stand there."""
        members = {type(key).__qualname__: key for key in own if isinstance(key, enum.Enum)}
        return [
            self._value(key, members.get(key["enum"][1], _NOTHING) if "enum" in key else _NOTHING, or_none=True)
            for key in record["keys"]
        ]

    # Writing -------------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        self._made: dict[int, Any] = {}
        for number, current in self._places.items():
            record = self._records[number]
            if "generator" in record:
                self._made[number] = _set_generator(current, decode(record["generator"], self._arrays))
            elif record.get("kind") not in ("tuple", "frozenset") and "array" not in record:
                self._made[number] = _shell(record, current)
        self._write_arrays()
        self._make_tuples()
        for number, current in self._made.items():
            record = self._records[number]
            if "kind" in record and record["kind"] not in ("tuple", "frozenset"):
                self._fill(number, record, current)
            own = _attributes(current) or {}
            for key, reference in record.get("attributes", {}).items():
                if reference is not None and (value := self._value(reference, own.get(key, _NOTHING))) is not _NOTHING:
                    _set_attribute(current, key, value)
        # A simulation computes with what else was set, and with its model before all.
        for kind, set_it in (("mujoco_model", set_model), ("mujoco", set_data)):
            for number, current in self._places.items():
                if kind in self._records[number]:
                    set_it(current, decode(self._records[number][kind], self._arrays))
        for number, current in self._places.items():
            if "remote" in self._records[number]:
                list(self._of_remote("restore_state", self._records[number], current, self._ways[number]))

    def _of_remote(self, method: str, record: dict[str, Any], current: Any, way: _Way) -> Iterator[tuple[str, Any]]:
        """Have each environment in another process do it."""
        for index, (own, names) in enumerate(record["remote"]):
            arrays = {key: self._arrays[name] for key, name in names.items()}
            (found,) = current.env_method(method, own, arrays, indices=[index])
            yield _told((way, f"[{index}]")), found

    def _value(self, reference: Any, fallback: Any, or_none: bool = False) -> Any:
        if reference is None or "same" in (reference if isinstance(reference, dict) else ()):
            return fallback
        if isinstance(reference, int):
            return self._made.get(reference, fallback)
        if "enum" in reference:
            if (member := _member(reference["enum"], fallback)) is not None:
                return member
            return _NOTHING if or_none else fallback
        return decode(reference["plain"], self._arrays)

    def _values(self, number: int, record: dict[str, Any]) -> list[Any]:
        if "plain" in record:
            return list(decode(record["plain"], self._arrays))
        fallbacks = self._fallbacks[number]
        return [self._value(item, fallback) for item, fallback in zip(record["items"], fallbacks, strict=True)]

    def _fill(self, number: int, record: dict[str, Any], current: Any) -> None:
        values = self._values(number, record)
        keys = self._keys.get(number, [])
        if any(value is _NOTHING for value in (*keys, *values)):  # It was reported.
            return
        # Not by the methods of a subclass, which may do more than store.
        if record["kind"] == "dict":
            kind: Any = OrderedDict if isinstance(current, OrderedDict) else dict
            kind.clear(current)
            for key, value in zip(keys, values, strict=True):
                kind.__setitem__(current, key, value)
        elif record["kind"] == "list":
            list.__setitem__(current, slice(None), values)
        else:
            kind = {"deque": deque, "set": set}[record["kind"]]
            kind.clear(current)
            getattr(kind, "extend" if kind is deque else "update")(current, values)

    def _make_tuples(self) -> None:
        """Make what cannot be filled later: inner ones first, and those were mostly found last."""
        kinds = ("tuple", "frozenset")
        left = [number for number in reversed(self._places) if self._records[number].get("kind") in kinds]
        while left:
            waiting = set(left)
            later = []
            for number in left:
                record = self._records[number]
                if any(isinstance(item, int) and item in waiting for item in record.get("items", ())):
                    later.append(number)
                    continue
                waiting.discard(number)
                values, current = self._values(number, record), self._places[number]
                kind = _class_for(record, current)
                if not any(value is _NOTHING for value in values):
                    base: Any = tuple if record["kind"] == "tuple" else frozenset
                    # A struct sequence, such as time.localtime() gives, is made in its own way.
                    self._made[number] = kind(values) if hasattr(kind, "n_sequence_fields") else base.__new__(kind, values)
            if len(later) == len(left):
                break  # One within itself, by way of C: there is no making it.
            left = later

    def _write_arrays(self) -> None:
        """Make new arrays, which share memory as those did that were read: others may hold those that are there.

        Only what must stay the same is written into: a simulation's own memory, and what cannot be made here. An array that the
        class or its module holds, too, is a constant to start from, and is left alone then as well.
        """
        numbers = [number for number in self._places if "array" in self._records[number]]
        groups: dict[Any, list[int]] = {}
        for number in numbers:
            memory = self._records[number].get("memory")
            groups.setdefault(number if memory is None else (memory["group"],), []).append(number)
        current = {number: _as_array(place) for number in numbers if (place := self._places[number]) is not _NOTHING}
        extents = [(number, *_extent(array)) for number, array in current.items()]
        shared = {
            number: set(cluster) for cluster in _overlapping([*extents, *self._constants.extents()]) for number in cluster
        }
        for group in groups.values():
            must_stay = any(
                number in current and (_is_foreign(current[number]) or not _can_be_made(self._records[number], None))
                for number in group
            )
            in_place = (
                must_stay
                and all(
                    number in current and current[number].flags.writeable and shared.get(number, {number}) <= set(group)
                    for number in group
                )
                and (len(group) == 1 or self._lie_alike(group, current))
            )
            buffer = np.empty(self._records[group[0]].get("memory", {}).get("size", 0), np.uint8)
            for number in group:
                record = self._records[number]
                saved = self._arrays[record["array"]]
                if in_place:
                    self._made[number] = self._places[number]
                    array = current[number]
                    if _is_elsewhere(self._places[number]):
                        self._made[number].detach().copy_(_as_tensor(saved.copy(), record))
                        continue
                elif "memory" in record:
                    memory = record["memory"]
                    array = np.ndarray(saved.shape, saved.dtype, buffer.data, memory["offset"], tuple(memory["strides"]))
                else:
                    array = np.empty_like(saved)
                array[...] = saved
                if not in_place:
                    self._made[number] = _as_tensor(array, record) if "tensor" in record else array

    def _lie_alike(self, group: list[int], current: dict[int, NDArray[Any]]) -> bool:
        memories = [self._records[number]["memory"] for number in group]
        starts = [current[number].__array_interface__["data"][0] for number in group]
        return all(
            start - starts[0] == memory["offset"] - memories[0]["offset"] and list(current[number].strides) == memory["strides"]
            for number, memory, start in zip(group, memories, starts, strict=True)
        )


class _Constants:
    """What classes of environments and their modules hold: an attribute may start as one of these, and must not change it."""

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._arrays: list[NDArray[Any]] = []
        self._done: set[type] = set()

    def add_those_of(self, kind: type) -> None:
        for base in kind.__mro__[:-1]:
            if base not in self._done:
                self._done.add(base)
                module = sys.modules.get(base.__module__)
                for value in [*vars(base).values(), *(() if module is None else list(vars(module).values()))]:
                    if isinstance(value, np.ndarray) or (_is_tensor(value) and value.device.type == "cpu"):
                        self._arrays.append(_as_array(value))
                    elif isinstance(value, _CONTAINERS):
                        self._ids.add(id(value))

    def hold(self, value: Any) -> bool:
        return id(value) in self._ids

    def extents(self) -> list[tuple[Any, int, int]]:
        return [(("constant", index), *_extent(array)) for index, array in enumerate(self._arrays)]


# Kinds of values --------------------------------------------------------------------------------------------------------


def _is_flat(value: Any, depth: int = 0) -> bool:
    """Whether it can neither change nor hold what can."""
    if type(value) in (tuple, frozenset):
        return depth < 10 and all(_is_flat(item, depth + 1) for item in value)
    if type(value) is int:
        return value.bit_length() < 10_000  # Python refuses to write longer ones as text.
    return type(value) in _PLAIN or _is_scalar(value)


def _is_plain_tree(value: Any, depth: int = 0) -> bool:
    """Whether it is flat, or a list or dict of what is."""
    if type(value) in (list, dict) and depth < 10:
        items = value if type(value) is list else [*value, *value.values()]
        return all(_is_plain_tree(item, depth + 1) for item in items)
    return _is_flat(value)


def _identity(value: Any) -> list[str] | None:
    """What tells apart a value that cannot change and is not stored, but may be exchanged; ``None`` for other values."""
    if isinstance(value, _FUNCTIONS):
        return [str(getattr(value, name, "")) for name in ("__module__", "__qualname__")]
    return [*_class_of(value), repr(value)] if type(value) in _CONSTANTS or isinstance(value, PurePath) else None


def _has_members(record: dict[str, Any]) -> bool:
    """Whether members of enumerations are among a dict's keys: what is there may be needed to find them."""
    return any(isinstance(key, dict) and "enum" in key for key in record.get("keys", ()))


def _items_of(value: Any) -> list[Any]:
    """The items of a container, the keys of a dict, whatever a subclass iterates over."""
    kinds: Any = (OrderedDict, *_CONTAINERS)
    return next(list(kind.__iter__(value)) for kind in kinds if isinstance(value, kind))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, np.generic) and not value.dtype.hasobject


def _is_called(value: Any, module: str, name: str) -> bool:
    """Whether it is an instance of a class of a module that need not be installed."""
    return type(value).__name__ == name and type(value).__module__.split(".")[0] == module


def _is_space(value: Any) -> bool:
    return any(base.__name__ == "Space" and base.__module__.startswith("gymnasium") for base in type(value).__mro__)


def _is_environment(value: Any) -> bool:
    return all(callable(getattr(type(value), name, None)) for name in ("reset", "step", "close"))


def _is_remote(value: Any) -> bool:
    """Whether it is a vectorised environment whose parts live in other processes."""
    # By its own attributes: a wrapper shows those of what it wraps as if it had them.
    return "remotes" in getattr(value, "__dict__", {}) and hasattr(value, "env_method")


def _shows(value: Any) -> bool:
    """Whether what stands in an attribute for show is no more than that: no plain value, no object of the environment's own."""
    if _is_flat(value) or isinstance(value, (enum.Enum, np.ndarray, th.Tensor, *_GENERATORS, *_CONTAINERS)):
        return False
    return type(value).__module__.split(".")[0] in _MODULES_FOR_SHOW or _attributes(value) is None


def _hides(value: Any) -> bool:
    """Whether it is an instance of a subclass of what is written in C, and has more to it than attributes."""
    bases = [
        base for base in type(value).__mro__ if not base.__flags__ & _HEAP_TYPE and base.__basicsize__ > object.__basicsize__
    ]
    in_c = (np.ndarray, th.Tensor, *_GENERATORS)
    return isinstance(value, in_c) or any(not issubclass(base, (types.SimpleNamespace, BaseException)) for base in bases)


def _class_of(value: Any) -> list[str]:
    return [type(value).__module__, type(value).__qualname__]


def _kind_of(value: Any) -> str:
    return next((kind.__name__ for kind in _CONTAINERS if isinstance(value, kind)), "")


def _told(way: _Way, otherwise: str = "it") -> str:
    steps = []
    here: _Way | None = way
    while here is not None:
        here, step = here
        steps.append(step)
    return "".join(reversed(steps)).removeprefix(".") or otherwise


def _found_class(name: list[str], base: type) -> Any:
    """A class that this process has loaded already; nothing is imported for it, and nothing of it is called."""
    module, path = name
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if isinstance(found, (type, types.ModuleType)) else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _member(saved: list[Any], current: Any) -> enum.Enum | None:
    """The member of an enumeration: of the class that stands there, else of the one of that name."""
    *name, member = saved
    is_same = isinstance(current, enum.Enum) and type(current).__qualname__ == name[1]
    kind: Any = type(current) if is_same else _found_class(name, enum.Enum)
    if kind is None:
        return None
    try:
        found: enum.Enum = kind(member) if issubclass(kind, enum.Flag) else kind[member]
    except (KeyError, ValueError):
        return None
    return found


def _class_for(record: dict[str, Any], current: Any) -> Any:
    """The class that a tuple or frozenset is made of; ``None`` where there is none."""
    base = tuple if record["kind"] == "tuple" else frozenset
    if record["class"] == ["builtins", base.__name__]:
        return base
    if type(current).__qualname__ == record["class"][1] and isinstance(current, base):
        return type(current)
    return _found_class(record["class"], base)


def _can_be_made(record: dict[str, Any], current: Any) -> bool:
    """Whether a value needs no object that is there."""
    if "generator" in record:
        return True
    if "tensor" in record:
        return record["class"][1] == "Tensor" and (record["tensor"]["device"] == "cpu" or th.cuda.is_available())
    if "array" in record:
        return record["class"][1] in ("ndarray", "memmap")
    if record.get("kind") in ("tuple", "frozenset"):
        return _class_for(record, current) is not None
    return "kind" in record and record["class"][1] in _MADE_ANEW and "attributes" not in record


def _shell(record: dict[str, Any], current: Any) -> Any:
    """What is to be filled: the object that is there, but for what cannot be changed."""
    if current is _NOTHING:
        made = _MADE_ANEW[record["class"][1]]
        return made(maxlen=record["maxlen"]) if made is deque else made()
    parameters = getattr(type(current), "__dataclass_params__", None)
    if parameters is not None and parameters.frozen and dataclasses.is_dataclass(current):
        # It may be a constant that others start from, too.
        made = object.__new__(type(current))
        for key, value in (_attributes(current) or {}).items():
            _set_attribute(made, key, value)
        return made
    return current


def _is_generator_of(saved: Any, current: Any) -> bool:
    if isinstance(saved, np.random.Generator) and isinstance(current, np.random.Generator):
        return type(saved.bit_generator) is type(current.bit_generator)
    return type(saved) is type(current)


def _set_generator(current: Any, saved: Any) -> Any:
    """Bring a generator to a state in place, since others may hold it."""
    if current is _NOTHING:
        return saved
    if isinstance(current, np.random.Generator):
        current.bit_generator.state = saved.bit_generator.state
    elif isinstance(current, np.random.RandomState):
        current.set_state(saved.get_state(legacy=False))
    else:
        current.setstate(saved.getstate())
    return current


# Attributes -------------------------------------------------------------------------------------------------------------


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, those in slots too; ``None`` where Python cannot see them."""
    found = dict(vars(value)) if hasattr(value, "__dict__") else None
    for name, member in _slots(type(value)).items():
        found = {} if found is None else found
        if hasattr(value, name):
            found[name] = member.__get__(value)
    return found


def _slots(kind: type) -> dict[str, Any]:
    """What classes written in Python keep in slots; those of the standard library are not looked into, as those in C."""
    if kind not in _SLOTS:
        _SLOTS[kind] = {
            member.__name__: member
            for base in reversed(kind.__mro__)  # A slot that is declared again is the subclass's.
            if "__slots__" in vars(base) and base.__module__.split(".")[0] not in sys.stdlib_module_names
            for member in vars(base).values()
            if isinstance(member, types.MemberDescriptorType)
        }
    return _SLOTS[kind]


def _set_attribute(target: Any, key: str, value: Any) -> None:
    """Set it past properties and what ``__setattr__`` would do besides."""
    if (slot := _slots(type(target)).get(key)) is not None:
        slot.__set__(target, value)
    else:
        vars(target)[key] = value


# Arrays in memory -------------------------------------------------------------------------------------------------------


def _as_array(value: Any) -> NDArray[Any]:
    """An array of the memory of an array or tensor; of a copy where that is on a device."""
    if not isinstance(value, th.Tensor):
        return np.asarray(value)
    value = value.detach().resolve_conj().resolve_neg().cpu()
    found: NDArray[Any]
    try:
        found = value.numpy()
    except TypeError:  # A type that NumPy has not, such as bfloat16.
        found = value.view({1: th.uint8, 2: th.int16, 4: th.int32, 8: th.int64}[value.element_size()]).numpy()
    return found


def _as_tensor(array: NDArray[Any], record: dict[str, Any]) -> th.Tensor:
    """A tensor of the memory of an array, as it was read."""
    about = record["tensor"]
    dtype = getattr(th, about["dtype"].removeprefix("torch."))
    return th.from_numpy(array).view(dtype).to(about["device"]).requires_grad_(about["requires_grad"])


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor with numbers of its own, one beside the other."""
    return isinstance(value, th.Tensor) and value.layout == th.strided and not (value.is_quantized or value.is_meta)


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, th.Tensor) and value.device.type != "cpu"


def _is_array_of(record: dict[str, Any], saved: NDArray[Any], current: Any) -> bool:
    """Whether an array or tensor is one that was saved, but for its numbers."""
    if type(current).__qualname__ != record["class"][1]:
        return False
    if "tensor" in record:
        about = record["tensor"]
        return (
            _is_tensor(current)
            and (str(current.dtype), str(current.device)) == (about["dtype"], about["device"])
            and tuple(current.shape) == saved.shape
        )
    return isinstance(current, np.ndarray) and (current.dtype, current.shape) == (saved.dtype, saved.shape)


def _is_foreign(array: NDArray[Any]) -> bool:
    """Whether its memory is that of a program in C, such as a simulation's."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return type(base).__name__ == "PyCapsule"


def _extent(array: NDArray[Any]) -> tuple[int, int]:
    """Where an array begins and ends in memory."""
    start = array.__array_interface__["data"][0]
    if not array.size:
        return start, start
    spans = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    return start + sum(span for span in spans if span < 0), start + sum(span for span in spans if span > 0) + array.itemsize


def _overlapping(extents: Iterable[tuple[Any, int, int]]) -> Iterator[list[Any]]:
    """Group what lies in the same memory."""
    group: list[Any] = []
    end = 0
    for name, start, stop in sorted((one for one in extents if one[1] < one[2]), key=lambda one: one[1]):
        if group and start >= end:
            yield group
            group = []
        end = max(end, stop) if group else stop
        group.append(name)
    if group:
        yield group


__all__ = ["capture_state", "misfits", "restore_state"]
