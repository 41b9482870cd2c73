"""Coverage-guided fuzzing of the readers whose parsing is Python: `from_npz`, and the manifest and columns of the cache.

    pip install atheris                                       # not a dependency: it has wheels for Linux only
    python tests/fuzz_guided.py npz -max_total_time=300       # options of libFuzzer
    python tests/fuzz_guided.py manifest -max_total_time=300
    python tests/fuzz_guided.py column -max_total_time=300

An exception other than `DatasetError` from `from_npz`, and any exception from the cache (which is written again instead), stops
the run and leaves the input in a file. The corpus starts with valid files.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["cql_plugins.adapters", "json", "numpy.lib._format_impl", "zipfile"]):
    import json
    import zipfile  # noqa: F401

    import numpy as np
    import numpy.lib.format

    from cql_plugins.adapters import DatasetError, _storage, from_npz

from fuzz_cases import steps

MEMORY = Path("/dev/shm")
FOLDER = "FUZZ_GUIDED_FOLDER"


def npz(folder: Path, corpus: Path) -> Any:
    for number, save in enumerate((np.savez, np.savez_compressed)):
        for suffix, names in {"": ("observations",), "n": ("observations", "next_observations")}.items():
            fields = {name: value for name, value in steps().items() if name in names or "observations" not in name}
            buffer = io.BytesIO()
            save(buffer, **fields)  # type: ignore[arg-type]
            (corpus / f"{number}{suffix}").write_bytes(buffer.getvalue())
    path = folder / "log.npz"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(DatasetError):
            from_npz(path)

    return one


def entry_of_the_cache(folder: Path) -> tuple[Path, Path, Any]:
    """Make an entry; return its manifest, one of its columns, and what it was made from."""
    path = folder / "log.npz"
    np.savez(path, **steps())  # type: ignore[arg-type]
    from_npz(path, storage="memmap", cache_dir=folder / "cache")
    (entry,) = (folder / "cache").iterdir()
    manifest = json.loads((entry / "manifest.json").read_text())
    return entry / "manifest.json", entry / manifest["arrays"]["rewards"]["file"], manifest["source"]


def read_entry(entry: Path, state: Any) -> None:
    found = _storage._read(entry, state)
    if found is not None:
        len(found[0].transitions(np.arange(len(found[0]))).rewards)


def manifest(folder: Path, corpus: Path) -> Any:
    path, _, state = entry_of_the_cache(folder)
    (corpus / "manifest").write_text(json.dumps(json.loads(path.read_text())))

    def one(data: bytes) -> None:
        path.write_bytes(data)
        read_entry(path.parent, state)

    return one


def column(folder: Path, corpus: Path) -> Any:
    _, path, state = entry_of_the_cache(folder)
    (corpus / "rewards").write_bytes(path.read_bytes())

    def one(data: bytes) -> None:
        path.write_bytes(data)
        read_entry(path.parent, state)

    return one


def main() -> None:
    name, *options = sys.argv[1:]
    if FOLDER not in os.environ:
        # libFuzzer ends the process without a word to Python, so another one has to clean up.
        with tempfile.TemporaryDirectory(prefix="guided-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            raise SystemExit(
                subprocess.run([sys.executable, *sys.argv], env=os.environ | {FOLDER: folder}, check=False).returncode
            )
    warnings.simplefilter("ignore")
    os.environ.setdefault("CQL_PLUGINS_MAX_MEMORY", str(2**28))
    folder = Path(os.environ[FOLDER])
    corpus = folder / "corpus"
    corpus.mkdir()
    one = {"npz": npz, "manifest": manifest, "column": column}[name](folder, corpus)
    dictionary = folder / "words"
    words = [
        "PK\\x03\\x04",
        "PK\\x01\\x02",
        "PK\\x05\\x06",
        "\\x93NUMPY\\x01\\x00",
        "'descr': ",
        "'shape': ",
        "<f8",
        "|O",
        "(5,)",
    ]
    words += [
        "observations.npy",
        "observations/x.npy",
        "rewards.npy",
        '\\"keys\\": ',
        '\\"file\\": ',
        '\\"shape\\": ',
        '\\"n\\": ',
    ]
    dictionary.write_text("".join(f'"{word}"\n' for word in words))
    limits = ["-timeout=30", "-rss_limit_mb=2048", "-len_control=0", "-max_len=4096"]
    atheris.Setup([sys.argv[0], str(corpus), f"-dict={dictionary}", *limits, *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
