"""The Zoo's checkpoints where a run has two phases: files of the offline one have names of their own."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from rl_zoo3.utils import get_model_path as find

OFFLINE = "offline"
"""Behind the prefix of what is saved offline. There gradient steps are counted: numbers that online steps have, too."""


def get_model_path(
    exp_id: int,
    folder: str,
    algo: str,
    env_name: str,
    load_best: bool = False,
    load_checkpoint: str | None = None,
    load_last_checkpoint: bool = False,
) -> tuple[str, str, str]:
    """Find a model as the Zoo does, which knows online checkpoints; where there is none, the offline one is found.

    Args:
        exp_id: See the Zoo, as for all of them.
        folder: Logs.
        algo: Its name.
        env_name: The environment's.
        load_best: The best model.
        load_checkpoint: The number in its name.
        load_last_checkpoint: The last of the online phase, or of the offline one where no other was saved.

    Returns:
        A name, the model's file and its folder.

    Raises:
        ValueError: If there is no such model.
    """
    where = exp_id, folder, algo, env_name
    try:
        found: tuple[str, str, str] = find(*where, load_best, load_checkpoint, load_last_checkpoint)
    except ValueError:
        if load_checkpoint is not None and not load_best:
            with contextlib.suppress(ValueError):
                found = find(*where, load_checkpoint=f"{OFFLINE}_{load_checkpoint}")
                return found
        raise
    if Path(found[1]).name.startswith(f"rl_model_{OFFLINE}_"):  # The Zoo takes the largest number of both phases.
        names = (re.fullmatch(r"rl_model_(\d+)_steps\.zip", path.name) for path in Path(found[2]).iterdir())
        if online := [int(name[1]) for name in names if name]:
            found = find(*where, load_checkpoint=str(max(online)))
    return found


__all__ = ["OFFLINE", "get_model_path"]
