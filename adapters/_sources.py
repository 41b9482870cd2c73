"""What a user means who names data by one word: a file, a folder, or the id of a Minari data set."""

from enum import StrEnum
from pathlib import Path

from cql_plugins.adapters._validation import DatasetError


class Kind(StrEnum):
    """How a data set is stored."""

    MINARI = "minari"
    D4RL = "d4rl"
    NPZ = "npz"


SUFFIXES = {".hdf5": Kind.D4RL, ".h5": Kind.D4RL, ".npz": Kind.NPZ}
_SIGNATURES = {b"\x89HDF": Kind.D4RL, b"PK\x03\x04": Kind.NPZ}


def locate(source: str) -> tuple[Kind, str | Path]:
    """Find how a data set is stored, and where.

    Raises:
        DatasetError: If it is none of what can be read.
    """
    path = Path(source).expanduser()
    wanted = "expected a .hdf5, .h5 or .npz file, a folder with Minari data, or the id of a Minari data set"
    if path.name == "main_data.hdf5" and (path.parent / "metadata.json").exists():
        path = path.parent  # Minari's own file: what it means is said beside it.
    if path.is_dir():
        home = path.absolute().parent if path.name == "data" and not is_minari(path) else path
        if not is_minari(home):
            raise DatasetError(f"{wanted}; this folder has no data/metadata.json", source=source)
        return Kind.MINARI, home
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()], path
    if path.is_file():
        with path.open("rb") as file:
            kind = _SIGNATURES.get(file.read(4))
        if kind is None:
            raise DatasetError(f"{wanted}; this is another kind of file", source=source)
        return kind, path
    if path.exists() or is_path(source):
        raise DatasetError(f"{wanted}; there is no such file or folder", source=source)
    return Kind.MINARI, source


def is_minari(folder: Path) -> bool:
    """Tell a folder of Minari data from another."""
    return (folder / "data" / "metadata.json").is_file()


def is_path(text: str) -> bool:
    """Tell a path from an id of Minari, where nothing is there."""
    return text.startswith((".", "~")) or Path(text).is_absolute()
