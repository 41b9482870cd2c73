"""The files of a Minari data set, looked at before Minari opens them.

Minari trusts its files: metadata without spaces makes it build the environment that the metadata names, which imports and
calls what is written there; encoded images go to whichever decoder claims them; Arrow columns are read without validation.
"""

import contextlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._hdf5 import PlainObjects
from cql_plugins.adapters._tree import named_leaves, row_blocks, row_nbytes
from cql_plugins.adapters._untrusted import (
    MAX_DEPTH,
    PACKED_AT_MOST,
    being_written,
    check_declared,
    check_folder,
    check_memory,
    check_regular_file,
    parsing,
    read_json_object,
    said,
)
from cql_plugins.adapters._validation import DatasetError

_IDS = re.compile(r"[-\w]+(/[-\w]+)*")
_METADATA = "metadata.json"
_HDF5 = "main_data.hdf5"
TRANSFORM = "cql_plugins_reward_transform"
"""Key in the metadata: the scale and the shift that rewards were stored after, or null where they differ."""


@contextlib.contextmanager
def reading_episode(source: str, episode: int, folder: Path) -> Iterator[None]:
    """Turn whatever is raised while one episode is read into an error that names it; only reading belongs inside."""
    try:
        yield
    except DatasetError as error:
        raise error if error.episode is not None else error.in_episode(episode) from error
    except ImportError:
        raise
    except BlockingIOError as error:
        raise being_written(error, source).in_episode(episode) from error
    except Exception as error:
        raise DatasetError(
            f"Minari cannot read this episode ({said(error)})",
            source=source,
            episode=episode,
            hint=f"Files under {folder} may be cut off or lack a field; fetch them again",
        ) from error


def check_id(dataset_id: str, source: str = "from_minari") -> None:
    """Refuse an id that would lead out of Minari's folder.

    Args:
        dataset_id: The id.
        source: Source used in the message.

    Raises:
        DatasetError: If it has anything but words between slashes.
    """
    if not _IDS.fullmatch(dataset_id):
        raise DatasetError(
            f"expected an id of words between slashes, such as 'D4RL/door/human-v2', got {dataset_id[:200]!r}",
            source=source,
        )


class MinariFiles:
    """The folder `data` of one Minari data set.

    Attributes:
        folder: The folder.
        n_bytes: Bytes of all its files.
        metadata: What its metadata says.
    """

    def __init__(self, folder: Path, source: str, *, loaded: bool = False) -> None:
        """Look at the folder and its metadata.

        Args:
            folder: The folder with the data.
            source: Source used in messages.
            loaded: Whether the user had Minari load it already.

        Raises:
            DatasetError: If a file lies elsewhere, or the metadata would make Minari run something or cannot be right.
        """
        self.folder, self._source = folder, source
        self.n_bytes = check_folder(folder, source)
        self.metadata = read_json_object(folder / _METADATA, source)
        if not loaded:
            self._check_spaces()
        self._check_numbers()

    def _check_spaces(self) -> None:
        for key in ("observation_space", "action_space"):
            text = self.metadata.get(key)
            if not isinstance(text, str):
                raise self._error(
                    f"expected a space in the metadata, got {type(text).__name__}",
                    key,
                    "Without one Minari builds the environment that the file names, which can run any code. If you trust the "
                    "file, call minari.load_dataset yourself and pass what it returns",
                )
            with parsing("expected a space in the metadata", self._source, key):
                self._check_space(json.loads(text), key, len(text), 0)

    def _check_space(self, entry: Any, field: str, n_characters: int, depth: int) -> None:
        """Refuse a space that is not one of ours, or that is larger than its text can say."""
        sort = entry["type"]
        if depth > MAX_DEPTH:
            raise self._error(f"expected spaces nested at most {MAX_DEPTH} deep, got more", field)
        if sort == "Dict":
            for key, subspace in entry["subspaces"].items():
                self._check_space(subspace, f"{field}.{key}", n_characters, depth + 1)
        elif sort == "Box":
            check_declared(entry["shape"], np.dtype(entry["dtype"]), self._source, field)
            if math.prod(entry["shape"]) > n_characters:
                raise self._error(f"expected a low and a high for each entry of shape {entry['shape']}, got fewer", field)
        elif sort != "Discrete":
            raise self._error(
                f"expected a space of type Box, Discrete or Dict, got {sort!r:.100}",
                field,
                "Flatten it first, for instance with gymnasium.spaces.flatten_space",
            )

    def _check_numbers(self) -> None:
        for key in ("total_episodes", "total_steps"):
            count = self.metadata.get(key)
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= PACKED_AT_MOST * self.n_bytes:
                raise self._error(
                    f"expected a number in the metadata that {self.n_bytes:,} bytes of files can hold, got {count!r:.100}", key
                )
        for key in ("ref_min_score", "ref_max_score"):
            score = self.metadata.get(key)
            if score is not None and not (isinstance(score, int | float) and abs(score) <= 1e300):
                raise self._error(f"expected a finite number in the metadata, got {score!r:.100}", key)
        transform = self.metadata.get(TRANSFORM)
        if transform is not None:
            numbers = transform if isinstance(transform, list) else []
            if [type(number) for number in numbers] != [float, float] or not all(map(math.isfinite, numbers)) or not numbers[0]:
                raise self._error(f"expected a scale and a shift in the metadata, got {transform!r:.100}", TRANSFORM)
        if not isinstance(self.metadata.get("jpeg_encoding", True), bool):
            raise self._error("expected true or false in the metadata", "jpeg_encoding")

    def _error(self, problem: str, field: str, hint: str | None = None) -> DatasetError:
        return DatasetError(problem, source=self._source, field=field, hint=hint)

    def beside_episodes(self) -> set[str]:
        """Tell which of `infos`, `seed` and `options` are stored with an episode; for files that `episodes` has read."""
        data_format, found = str(self.metadata.get("data_format")), set[str]()
        episodes = range(self.metadata["total_episodes"])
        if data_format == "hdf5":
            import h5py

            with h5py.File(self.folder / _HDF5, "r") as file:
                for episode in episodes:
                    group = file[f"episode_{episode}"]
                    found |= {name.partition("/")[0] for name in group.attrs}  # as in options/goal
                    found |= {"infos"} if len(group.get("infos", ())) else set()
        else:
            import pyarrow.dataset

            for episode in episodes:
                folder = self.folder / str(episode)
                if (folder / _METADATA).exists():
                    found |= set(read_json_object(folder / _METADATA, self._source))
                columns = pyarrow.dataset.dataset(str(folder), format=data_format, ignore_prefixes=["_", ".", _METADATA])
                found |= set(columns.schema.names)
        return found & {"infos", "seed", "options"}

    # Data -------------------------------------------------------------------------------------------------------------

    def episodes(self, dataset: Any) -> Iterator[Any]:
        """Read one episode after the other, each after a look at its data.

        Args:
            dataset: The Minari data set.

        Yields:
            Minari's `EpisodeData`, or what has its fields.

        Raises:
            DatasetError: If an episode is anything but plain data in its own files, or cannot be read; it is named.
        """
        data_format = self.metadata.get("data_format")
        space_of = {"observations": dataset.observation_space, "actions": dataset.action_space}
        if data_format == "hdf5":
            yield from self._read_hdf5(dataset, self._images(space_of))
        elif data_format in ("arrow", "parquet"):
            yield from self._read_arrow(dataset, space_of, str(data_format))
        else:
            raise self._error(f"expected hdf5, arrow or parquet in the metadata, got {data_format!r:.100}", "data_format")

    def _images(self, space_of: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
        """List the fields that hold encoded images, with the shape of one."""
        if not self.metadata.get("jpeg_encoding", True):
            return []
        is_image_space = getattr(import_module("minari.dataset.minari_storage"), "is_image_space", None)
        if is_image_space is None:  # Before 0.5.3 Minari encodes none.
            return []
        leaves = [leaf for field, space in space_of.items() for leaf in _space_leaves(space, field)]
        return [(name, tuple(leaf.shape or ())) for name, leaf in leaves if is_image_space(leaf)]

    def _read_hdf5(self, dataset: Any, images: list[tuple[str, tuple[int, ...]]]) -> Iterator[Any]:
        import h5py

        path, seen, episodes = self.folder / _HDF5, set[str](), None
        with contextlib.ExitStack() as stack:
            with reading_episode(self._source, 0, self.folder):
                n_bytes = check_regular_file(path, f"the file {_HDF5}", self._source)
                file = stack.enter_context(h5py.File(path, "r"))
                objects = PlainObjects(file, n_bytes, self._source)
            for index, episode in enumerate(dataset.episode_indices):
                with reading_episode(self._source, index, self.folder):
                    name = f"episode_{int(episode)}"
                    if name not in seen and objects.has(file, name):  # where it is missing Minari says so
                        seen.add(name)
                        self._check_episode(objects, file, name, images)
                    episodes = episodes or iter(dataset.iterate_episodes())
                    read = next(episodes)
                yield read

    def _check_episode(self, objects: PlainObjects, file: Any, name: str, images: list[tuple[str, tuple[int, ...]]]) -> None:
        before = objects.n_bytes
        leaves = list(named_leaves(objects.open(file, name, name, strings=True, images=bool(images), unused="infos"), ""))
        image_shapes = {f".{field}": shape for field, shape in images}
        decoded = sum(math.prod((*leaf.shape[:1], *image_shapes[field])) for field, leaf in leaves if field in image_shapes)
        # As Minari reads it, and as it is copied.
        check_memory(2 * (objects.n_bytes - before + decoded), self._source, name, mapped=True)
        for field, leaf in leaves:
            if field in image_shapes:
                check_images(_rows(leaf), image_shapes[field], self._source, field[1:])
            elif leaf.dtype.kind in "OS" and not field.startswith(".infos."):
                raise self._error(f"expected a plain array of numbers, got dtype {leaf.dtype}", field[1:])

    def _read_arrow(self, dataset: Any, space_of: dict[str, Any], data_format: str) -> Iterator[Any]:
        from cql_plugins.adapters._arrow import EpisodeFolder

        images = dict(self._images(space_of))
        for index, episode in enumerate(dataset.episode_indices):
            with reading_episode(self._source, index, self.folder):
                folder = EpisodeFolder(self.folder / str(int(episode)), data_format, space_of, images, self._source)
                for name, frames in folder.check():
                    check_images(frames, images[name], self._source, name)
                read = folder.read()
            yield read


def _space_leaves(space: spaces.Space[Any], name: str) -> Iterator[tuple[str, spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, subspace in space.spaces.items():
            yield from _space_leaves(subspace, f"{name}.{key}")
    else:
        yield name, space


def _rows(leaf: Any) -> Iterator[Any]:
    """Read the rows of a data set: by blocks, or one by one where each has a length of its own."""
    if leaf.dtype.kind == "O":
        for index in np.ndindex(leaf.shape):
            yield leaf[index]
    else:
        for start, stop in row_blocks(leaf.shape[0] if leaf.shape else 0, row_nbytes(leaf)):
            yield from leaf[start:stop]


# Images ---------------------------------------------------------------------------------------------------------------


def check_images(frames: Iterable[Any], shape: tuple[int, ...], source: str, field: str) -> None:
    """Refuse encoded images that are not JPEG files of the given shape.

    Pillow would hand other formats to other decoders (one of them starts a program), and would believe any size.

    Args:
        frames: Bytes, or arrays of bytes.
        shape: Shape that the space gives to one image.
        source: Source used in the message.
        field: Field used in the message.

    Raises:
        DatasetError: If one of them is something else.
    """
    for row, frame in enumerate(frames):
        with parsing("expected a JPEG image", source, field):
            size = _jpeg_size(memoryview(bytes(frame)))
        if size != shape[:2]:
            raise DatasetError(f"expected a JPEG image of {shape[:2]} pixels, got {size}", source=source, field=field, row=row)


def _jpeg_size(content: memoryview) -> tuple[int, int]:
    """Read height and width from the headers of a JPEG file."""
    if bytes(content[:3]) != b"\xff\xd8\xff":
        raise ValueError(f"it starts with {bytes(content[:3])!r}")
    place, size = 2, None
    while True:
        mark, kind, length = struct.unpack_from(">BBH", content, place)
        if mark != 0xFF:
            raise ValueError(f"there is no marker at byte {place}")
        if kind == 0xFF:
            place += 1  # padding
            continue
        if kind == 0xDA:  # the pixels follow
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            found = struct.unpack_from(">HH", content, place + 5)
            if size is not None:
                raise ValueError("it has several sizes")
            size = (int(found[0]), int(found[1]))
        if length < 2:
            raise ValueError(f"the marker at byte {place} has no length")
        place += 2 + length
    if size is None:
        raise ValueError("it has no size")
    return size
