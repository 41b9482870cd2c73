"""What RL Zoo's scripts for the Hugging Face Hub need: names that the Hub's packages have changed, and cards that name ours."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_sb3
from huggingface_hub.errors import EntryNotFoundError


def prepare(algorithms: tuple[str, ...]) -> None:
    """Make ``push_to_hub`` and ``load_from_hub`` work. Call it once, before they are run.

    RL Zoo 2.9.2 asks ``sb3-team-hf-integration`` for a function that is called ``_generate_metadata`` in its 3.2, and expects
    an error of ``requests`` for a file that the Hub does not have (the normalisation of a run that has none);
    ``huggingface_hub`` 2.4 raises one of its own.

    Args:
        algorithms: Names of those that RL Zoo alone does not know; the cards of such runs say how to load them.
    """
    from requests.exceptions import HTTPError

    upstream = importlib.import_module("huggingface_sb3.push_to_hub")  # The package has a function of that name.
    if not hasattr(upstream, "generate_metadata"):

        def generate_metadata(*arguments: Any) -> dict[str, Any]:
            found: dict[str, Any] = upstream._generate_metadata(*arguments).to_dict()
            return found

        setattr(upstream, "generate_metadata", generate_metadata)  # noqa: B010 (mypy knows no such name)

    load = huggingface_sb3.load_from_hub

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            path: str = load(repo_id, filename)
        except EntryNotFoundError as error:
            raise HTTPError(str(error)) from error
        return path

    huggingface_sb3.load_from_hub = load_from_hub

    class HfApi(huggingface_hub.HfApi):
        def upload_folder(self, *, folder_path: str | Path, **settings: Any) -> Any:
            correct_card(Path(folder_path) / "README.md", algorithms)
            return super().upload_folder(folder_path=folder_path, **settings)

    setattr(huggingface_hub, "HfApi", HfApi)  # noqa: B010 (mypy: a class is no variable)


def correct_card(path: Path, algorithms: tuple[str, ...]) -> None:
    """Where a model card's commands are for one of some algorithms, make them ours: RL Zoo alone cannot load it.

    Args:
        path: The card; one that is not there is left alone.
        algorithms: Their names.
    """
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    if re.search(rf"--algo ({'|'.join(algorithms)}) ", card):
        card = card.replace("python -m rl_zoo3.", "python -m cql_plugins.zoo ")
        card = card.replace("pip install rl_zoo3", 'pip install "cql-plugins[zoo]"')
        path.write_text(card, encoding="utf-8")
