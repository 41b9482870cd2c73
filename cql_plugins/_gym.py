"""Imports the unmaintained `gym` without the notice that it prints about itself.

d3rlpy imports it for its type checks, Stable-Baselines3 where it is installed; the user of either can do nothing about it.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata


def import_quietly() -> None:
    """Import ``gym``, where it is installed and not imported yet.

    Its notice is looked up by version in the package ``gym_notices``; it is taken out there for as long as the import lasts.
    Warnings are left alone.
    """
    if "gym" in sys.modules:
        return
    try:
        notices = import_module("gym_notices.notices").notices
        version = metadata.version("gym")
    except (ImportError, AttributeError):
        return  # No gym, or another than the one that prints.
    notice = notices.pop(version, None)
    try:
        import_module("gym")
    finally:
        if notice is not None:
            notices[version] = notice
