"""The state of running environments, read from and written into objects that the same script built.

What Python can see is taken: numbers, text, arrays and random generators in the attributes of an environment, its wrappers and
the objects they hold, and MuJoCo's data. Written back, an environment goes on in the middle of an episode.
Where something cannot be seen (a physics engine in C, a server), it is named, and the caller has to reset.
"""

from __future__ import annotations

import enum
import functools
import io
import logging
import re
import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cql_plugins._checkpoints import Arrays, decode, encode

_STATIC = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
    logging.Logger, io.IOBase, enum.Enum, np.dtype, np.ufunc, re.Pattern, range, slice, property,
)  # fmt: skip
_FOR_SHOW = {
    "_cached_spec", "class_attributes", "clock", "mujoco_renderer", "renderer", "results_writer", "screen", "spec", "surf",
    "viewer", "window",
}  # fmt: skip
"""Attributes that show or describe an environment and have no part in what it does next, unless they hold plain numbers."""
_MOST_OBJECTS = 20_000


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
    return reader.read(root, ""), reader.problems


def restore_state(root: Any, state: Any, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Write a state back, in place.

    Args:
        root: An object built as the one was that the state comes from.
        state: The state.
        arrays: The archive's arrays.

    Returns:
        What has no place in ``root``.
    """
    writer = _Writer(arrays)
    writer.write(root, state, "")
    return writer.problems


class _Reader:
    def __init__(self, arrays: Arrays, name: str) -> None:
        self._arrays, self._name = arrays, name
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # An id is an object's only while it lives.
        self.problems: list[str] = []

    def read(self, value: Any, path: str) -> Any:
        if isinstance(value, _STATIC) or _is_called(value, "mujoco", "MjModel") or _is_called(value, "torch", "device"):
            return None
        if _is_immutable(value):
            return {"plain": encode(value, self._arrays, self._name)}
        if id(value) in self._seen:
            return {"same": self._seen[id(value)]}
        if len(self._seen) == _MOST_OBJECTS:
            self.problems.append(f"{path or 'it'}: more than {_MOST_OBJECTS:,} objects")
        if len(self._seen) >= _MOST_OBJECTS:
            return None
        number = self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return {"number": number, **self._read_new(value, path, number)}

    def _read_new(self, value: Any, path: str, number: int) -> dict[str, Any]:
        own: Arrays = {}
        try:
            plain = encode(value, own, f"{self._name}/{number}")
        except TypeError:
            pass
        else:
            self._arrays.update({key: array.copy() for key, array in own.items()})
            return {"plain": plain}
        if _is_called(value, "mujoco", "MjData"):
            return {"mujoco": encode(_mujoco_arrays(value), self._arrays, f"{self._name}/{number}")}
        if isinstance(value, (list, tuple)):
            return {"items": [self.read(item, f"{path}[{index}]") for index, item in enumerate(value)]}
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            return {"entries": [[key, self.read(item, f"{path}[{key!r}]")] for key, item in value.items()]}
        if _is_remote(value):
            return self._read_remote(value, path, number)
        if hasattr(value, "__dict__"):
            attributes = vars(value)
            if _is_space(value):
                attributes = {key: item for key, item in attributes.items() if key in ("_np_random", "spaces")}
            return {
                "attributes": {
                    key: self.read(item, f"{path}.{key}" if path else key)
                    for key, item in attributes.items()
                    if key not in _FOR_SHOW or _is_immutable(item) or isinstance(item, (np.ndarray, list))
                }
            }
        self.problems.append(f"{path or 'it'} ({type(value).__module__}.{type(value).__qualname__})")
        return {}

    def _read_remote(self, value: Any, path: str, number: int) -> dict[str, Any]:
        """Ask environments in other processes for their states."""
        if not value.has_attr("capture_state"):
            self.problems.append(f"{path or 'it'} (environments in other processes: wrap each in cql_plugins.sb3.ResumableEnv)")
            return {}
        states = []
        for index, (state, arrays, problems) in enumerate(value.env_method("capture_state")):
            prefix = f"{self._name}/{number}.{index}/"
            self._arrays.update({prefix + key: array for key, array in arrays.items()})
            states.append([state, {key: prefix + key for key in arrays}])
            self.problems += [f"{path}[{index}].{problem}" for problem in problems]
        return {"remote": states}


class _Writer:
    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._done: dict[int, Any] = {}
        self.problems: list[str] = []

    def write(self, current: Any, state: Any, path: str) -> Any:
        """Bring an object to a state, in place where that can be; return what belongs in its place."""
        if state is None:
            return current
        if "same" in state:
            return self._done.get(state["same"], current)
        if "number" not in state:
            return decode(state["plain"], self._arrays)
        self._done[state["number"]] = current
        found = self._done[state["number"]] = self._write_new(current, state, path)
        return found

    def _write_new(self, current: Any, state: Any, path: str) -> Any:
        if "plain" in state:
            value = decode(state["plain"], self._arrays)
            generators = [one for one in (value, current) if isinstance(one, np.random.Generator)]
            if len({type(one.bit_generator) for one in generators}) == 1 and len(generators) == 2:
                current.bit_generator.state = value.bit_generator.state  # Others may hold the same generator.
                return current
            return value.copy() if isinstance(value, np.ndarray) else value
        if "mujoco" in state:
            if _is_called(current, "mujoco", "MjData"):
                self.problems += [
                    f"{path}.{name}" for name in _set_mujoco_arrays(current, decode(state["mujoco"], self._arrays))
                ]
                return current
        elif "items" in state:
            if isinstance(current, (list, tuple)) and len(current) == len(state["items"]):
                pairs = zip(current, state["items"], strict=True)
                items = [self.write(item, saved, f"{path}[{index}]") for index, (item, saved) in enumerate(pairs)]
                if isinstance(current, list):
                    current[:] = items
                return current
        elif "entries" in state:
            if isinstance(current, dict) and list(current) == [key for key, _ in state["entries"]]:
                for key, saved in state["entries"]:
                    current[key] = self.write(current[key], saved, f"{path}[{key!r}]")
                return current
        elif "remote" in state:
            if _is_remote(current) and len(state["remote"]) == current.num_envs:
                for index, (own, names) in enumerate(state["remote"]):
                    arrays = {key: self._arrays[name] for key, name in names.items()}
                    (problems,) = current.env_method("restore_state", own, arrays, indices=[index])
                    self.problems += [f"{path}[{index}].{problem}" for problem in problems]
                return current
        elif "attributes" in state:
            if hasattr(current, "__dict__"):
                for key, saved in state["attributes"].items():
                    if saved is not None:
                        own_path = f"{path}.{key}" if path else key
                        vars(current)[key] = self.write(vars(current).get(key), saved, own_path)
                return current
        else:
            return current  # It could not be read.
        self.problems.append(f"{path or 'it'} ({type(current).__name__})")
        return current


def _is_immutable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes, np.generic))


def _is_called(value: Any, module: str, name: str) -> bool:
    """Whether it is an instance of a class of a module that need not be installed."""
    return type(value).__name__ == name and type(value).__module__.split(".")[0] == module


def _is_space(value: Any) -> bool:
    return any(base.__name__ == "Space" and base.__module__.startswith("gymnasium") for base in type(value).__mro__)


def _is_remote(value: Any) -> bool:
    """Whether it is a vectorised environment whose parts live in other processes."""
    return hasattr(value, "env_method") and hasattr(value, "remotes")


def _mujoco_arrays(data: Any) -> dict[str, Any]:
    """All that the next step of a simulation may depend on: its own notion of a state, then everything derived from it.

    The derived arrays lag behind by a part of a step, and environments do read them: computing them anew gives others.
    """
    mujoco: Any = import_module("mujoco")
    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    names = (name for name in dir(data) if not name.startswith("_"))
    found = {name: value.copy() for name in names if isinstance(value := getattr(data, name), np.ndarray) and value.size}
    return {"state": state, "derived": found}


def _set_mujoco_arrays(data: Any, saved: dict[str, Any]) -> list[str]:
    """Set what :func:`_mujoco_arrays` read; return the names of what has another size by now."""
    mujoco: Any = import_module("mujoco")
    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    if len(saved["state"]) != mujoco.mj_stateSize(data.model, kind):  # Another model: nothing of it fits.
        return ["state"]
    mujoco.mj_setState(data.model, data, saved["state"], kind)
    mujoco.mj_forward(data.model, data)
    without_contacts = mujoco.MjData(data.model)
    problems = []
    for name, array in saved["derived"].items():
        own = getattr(data, name)
        if own.shape == array.shape:
            own[...] = array
        elif getattr(without_contacts, name).size:  # The others have rows for contacts; every step makes them anew.
            problems.append(name)
    return problems


__all__ = ["capture_state", "restore_state"]
