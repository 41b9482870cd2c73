"""The state of a MuJoCo simulation: its data, and what environments change in its model."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGE = 2**16
_STRUCTS = ("opt", "stat", "vis")
_DERIVED = "bvh_"
"""Bounding volumes of meshes: the largest arrays beside textures, and computed from what has a checksum."""
_NO_INDEX = re.compile(r".*(contype|conaffinity|group|priority|limited|active0?|castshadow|directional)")
"""Whole numbers that environments may change. The others point into arrays or tell kinds, and are never written: out of range,
they would end the process."""
_OF_WINDOWS = ("vis.global_.", "vis.quality.")
"""Sizes of windows and of what a graphics card gives: a script may ask for others when it goes on."""


def read_model(model: Any) -> dict[str, Any]:
    """All numbers of a model, and in place of its meshes and textures their checksums.

    Environments move bodies when they reset (all of Adroit's), and those that draw their physics at random change masses,
    friction or gravity. The model as it was compiled is gone by then, so all that is small is taken, some 100 kB. What is large
    rarely changes; by its checksum it is seen where it did.

    Args:
        model: An ``MjModel``.

    Returns:
        The arrays' bytes, one after the other, with their names, types and shapes; numbers and checksums by name.
    """
    layout, parts, numbers, checksums = [], [], {}, {}
    for name, value in _values(model):
        if not isinstance(value, np.ndarray):
            numbers[name] = value
        elif value.nbytes <= _LARGE or name == "hfield_data":  # Terrain is drawn at random, too.
            layout.append([name, value.dtype.str, list(value.shape)])
            parts.append(_bytes(value))
        elif not name.startswith(_DERIVED):
            checksums[name] = _checksum(value)
    return {
        "bytes": np.concatenate([np.empty(0, np.uint8), *parts]),
        "layout": layout,
        "numbers": numbers,
        "checksums": checksums,
    }


def misfits_of_model(model: Any, saved: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What of :func:`read_model` a model cannot take; nothing is changed.

    Args:
        model: The ``MjModel`` that is to take it.
        saved: What was read.

    Returns:
        Names of what has other sizes, since it is another model, and of what is too large to be in the state and has changed.
    """
    own = dict(_values(model))
    sizes = _other_sizes(own, saved)
    changed = [name for name, value in saved["checksums"].items() if name not in own or _checksum(own[name]) != value]
    changed += [
        name for name, array in _saved_arrays(saved) if name not in sizes and _points(name, array) and _differ(own[name], array)
    ]
    return sizes, changed


def set_model(model: Any, saved: dict[str, Any]) -> None:
    """Set what :func:`read_model` read; nothing of it where it is another model's.

    Args:
        model: An ``MjModel``.
        saved: What was read.
    """
    own = dict(_values(model))
    if _other_sizes(own, saved):
        return
    for name, array in _saved_arrays(saved):
        if not _points(name, array) and _differ(own[name], array):
            own[name][...] = array
    for name, number in saved["numbers"].items():
        if name in own and own[name] != number:
            *structs, last = name.split(".")
            target = model
            for struct in structs:
                target = getattr(target, struct)
            setattr(target, last, number)


def _values(model: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of a model, and the arrays and numbers of the structures in it, by name."""
    waiting = [("", model)]
    while waiting:
        prefix, owner = waiting.pop()
        for name in dir(owner):
            if name.startswith("_") or (prefix == "" and name in ("text_data", "names", "paths")):
                continue
            value = getattr(owner, name)
            if isinstance(value, np.ndarray):
                if value.size and value.dtype.kind in "biuf":
                    yield prefix + name, value
            elif prefix and type(value) in (bool, int, float):
                yield prefix + name, value
            elif f"{prefix}{name}." in _OF_WINDOWS or type(value).__module__.split(".")[0] != "mujoco":
                continue
            elif prefix or name in _STRUCTS:
                waiting.append((f"{prefix}{name}.", value))


def _other_sizes(own: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    return [name for name, array in _saved_arrays(saved) if name not in own or own[name].shape != array.shape]


def _saved_arrays(saved: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    start = 0
    for name, dtype, shape in saved["layout"]:
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        yield name, saved["bytes"][start:end].view(dtype).reshape(shape)
        start = end


def _points(name: str, array: NDArray[Any]) -> bool:
    return array.dtype.kind in "iu" and _NO_INDEX.fullmatch(name) is None


def _differ(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return not np.array_equal(_bytes(one), _bytes(other))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(_bytes(array).data)  # Three times as fast as SHA-256, and nobody forges a mesh.


def read_data(data: Any) -> dict[str, Any]:
    """All that the next step of a simulation may depend on: its own notion of a state, then everything derived from it.

    The derived arrays lag behind by a part of a step, and environments do read them: computing them anew gives others.

    Args:
        data: An ``MjData``.

    Returns:
        Arrays, as copies.
    """
    mujoco: Any = import_module("mujoco")
    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    names = (name for name in dir(data) if not name.startswith("_"))
    found = {name: value.copy() for name in names if isinstance(value := getattr(data, name), np.ndarray) and value.size}
    return {"state": state, "derived": found}


def misfits_of_data(data: Any, saved: dict[str, Any]) -> list[str]:
    """What of :func:`read_data` has another size in a simulation; nothing is changed.

    Args:
        data: The ``MjData`` that is to take it.
        saved: What was read.

    Returns:
        Names; ``state`` alone where it is another model's, and nothing fits.
    """
    mujoco: Any = import_module("mujoco")
    if len(saved["state"]) != mujoco.mj_stateSize(data.model, int(mujoco.mjtState.mjSTATE_INTEGRATION)):
        return ["state"]
    # What has rows for contacts is empty in it; every step makes those anew.
    without_contacts = mujoco.MjData(data.model)
    return [
        name
        for name, array in saved["derived"].items()
        if not hasattr(data, name) or ((own := getattr(without_contacts, name)).size and own.shape != array.shape)
    ]


def set_data(data: Any, saved: dict[str, Any]) -> None:
    """Set what :func:`read_data` read, but for what does not fit.

    Args:
        data: An ``MjData``.
        saved: What was read.
    """
    misfits = misfits_of_data(data, saved)
    if "state" in misfits:
        return
    mujoco: Any = import_module("mujoco")
    mujoco.mj_setState(data.model, data, saved["state"], int(mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_forward(data.model, data)
    for name, array in saved["derived"].items():
        if name not in misfits and (own := getattr(data, name)).shape == array.shape:
            own[...] = array


__all__ = ["misfits_of_data", "misfits_of_model", "read_data", "read_model", "set_data", "set_model"]
