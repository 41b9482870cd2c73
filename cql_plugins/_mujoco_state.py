"""The state of a MuJoCo simulation: its data."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np


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


__all__ = ["misfits_of_data", "read_data", "set_data"]
