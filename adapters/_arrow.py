"""Arrow and Parquet files that somebody else made, looked at before Minari reads them.

Arrow takes the offsets and lengths in a file as they are unless it is asked to validate them, and unpacks buffers to whatever
size they declare.
"""

import io
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from cql_plugins.adapters._tree import Array
from cql_plugins.adapters._untrusted import check_memory, check_packed, check_regular_file
from cql_plugins.adapters._validation import DatasetError

_COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")
_IGNORED = ("_", ".", "metadata.json")
"""Prefixes of files that Minari does not read as data."""
_MAGIC = b"ARROW1"
_RECORD_BATCH = 3


@dataclass(frozen=True)
class Columns:
    """One episode, named as Minari's own `EpisodeData`."""

    observations: Any
    actions: Any
    rewards: Array
    terminations: Array
    truncations: Array


class EpisodeFolder:
    """The files of one episode."""

    def __init__(
        self, folder: Path, data_format: str, space_of: dict[str, Any], images: dict[str, tuple[int, ...]], source: str
    ) -> None:
        """Take note of what is expected.

        Args:
            folder: The episode's folder.
            data_format: `arrow` or `parquet`.
            space_of: Spaces of `observations` and `actions`.
            images: Those of their leaves that hold encoded images, with the shape of one.
            source: Source used in messages.
        """
        self._folder, self._format, self._space_of, self._images, self._source = folder, data_format, space_of, images, source
        self._image_bytes = sum(math.prod(shape) for shape in images.values())
        self._n_bytes = 0

    def check(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Look at all files; yield the name and the frames of each column of images, for the caller to look at.

        Raises:
            DatasetError: If a file is anything but plain columns of the expected types, or the episode cannot fit in memory.
        """
        for parent, _, names in os.walk(self._folder):
            for name in names:
                if not name.startswith(_IGNORED):
                    yield from self._check_file(Path(parent, name))

    def read(self) -> Columns:
        """Read all rows as one episode; after `check`.

        Minari takes each batch of rows for an episode, and there are several where an episode is longer than 32,767 rows or a
        file has several groups of rows: the rest of the data set would be lost.
        """
        import pyarrow.dataset

        stored = pyarrow.dataset.dataset(str(self._folder), format=self._format, ignore_prefixes=list(_IGNORED))
        table = stored.to_table(columns=list(_COLUMNS))
        column = {name: _joined(table.column(name)) for name in _COLUMNS}
        return Columns(
            observations=self._decode(column["observations"], self._space_of["observations"], "observations"),
            # The other columns have a row more than there are steps, as observations have.
            actions=self._decode(column["actions"][:-1], self._space_of["actions"], "actions"),
            **{name: column[name][:-1].to_numpy(zero_copy_only=False) for name in _COLUMNS[2:]},
        )

    def _decode(self, values: Any, space: spaces.Space[Any], name: str) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._decode(values.field(key), subspace, f"{name}.{key}") for key, subspace in space.spaces.items()}
        if name in self._images:
            return _decode_images(values, tuple(space.shape or ()))
        if isinstance(space, spaces.Discrete):
            return values.to_numpy(zero_copy_only=False)
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), *(space.shape or ()))

    def _check_file(self, path: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
        n_bytes = check_regular_file(path, f"a file with {self._format} columns", self._source)
        for batch in self._parquet_batches(path, n_bytes) if self._format == "parquet" else self._arrow_batches(path, n_bytes):
            batch.validate(full=True)
            self._count(batch.num_rows * self._image_bytes)
            for field, space in self._space_of.items():
                yield from self._frames(batch.column(field), space, field)

    def _count(self, n_bytes: int) -> None:
        """Count what is read, and that it is copied."""
        self._n_bytes += n_bytes
        check_memory(2 * self._n_bytes, self._source, mapped=True)

    def _arrow_batches(self, path: Path, n_bytes: int) -> Iterator[Any]:
        import pyarrow as pa

        check_plain_buffers(path, n_bytes)
        self._count(n_bytes)
        with pa.OSFile(str(path), "rb") as file, pa.ipc.open_file(file) as reader:
            self._check_schema(reader.schema)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def _parquet_batches(self, path: Path, n_bytes: int) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(str(path)) as file:
            self._check_schema(file.schema_arrow)
            # What is said of single columns is not asked for: pyarrow ends the process where that is damaged.
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            n_rows = sum(abs(group.num_rows) for group in groups)
            declared = max(sum(abs(group.total_byte_size) for group in groups), n_rows * _row_bytes(file.schema_arrow.types))
            check_packed(declared, n_bytes, self._source)
            self._count(declared)
            yield from file.iter_batches()

    # Types ------------------------------------------------------------------------------------------------------------

    def _check_schema(self, schema: Any) -> None:
        import pyarrow as pa

        names = list(schema.names)
        for name in _COLUMNS:
            if names.count(name) != 1:
                raise self._error(f"expected one column of this name, got {names.count(name)}", name)
        for name, space in self._space_of.items():
            self._check_type(schema.field(name).type, space, name)
        for name in _COLUMNS[2:]:
            kind = schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                raise self._error(f"expected a column of numbers, got {str(kind)[:100]}", name)
        for name in set(names) - set(_COLUMNS):
            _check_info_type(schema.field(name).type, name, self._source)

    def _check_type(self, kind: Any, space: spaces.Space[Any], name: str) -> None:
        import pyarrow as pa

        if isinstance(space, spaces.Dict):
            names = [field.name for field in kind] if pa.types.is_struct(kind) else []
            for key, subspace in space.spaces.items():
                if names.count(key) != 1:
                    raise self._error(f"expected one column of this name, got {names.count(key)}", f"{name}.{key}")
                self._check_type(kind.field(key).type, subspace, f"{name}.{key}")
            return
        if name in self._images:
            expected, fits = "binary", pa.types.is_binary(kind)
        elif isinstance(space, spaces.Discrete):
            expected, fits = "integers", pa.types.is_integer(kind)
        else:
            width = math.prod(space.shape or ())
            expected = f"lists of {width} numbers"
            fits = pa.types.is_fixed_size_list(kind) and kind.list_size == width and _is_number(kind.value_type)
        if not fits:
            raise self._error(f"expected a column of {expected}, got {str(kind)[:100]}", name)

    def _frames(self, column: Any, space: spaces.Space[Any], name: str) -> Iterator[tuple[str, Iterator[bytes]]]:
        if column.null_count:
            raise self._error("expected a value in each row, got none in some", name)
        if isinstance(space, spaces.Dict):
            for key, subspace in space.spaces.items():
                yield from self._frames(column.field(key), subspace, f"{name}.{key}")
        elif name in self._images:
            n_rows = len(column)
            # Rows that Minari adds to the shorter columns are empty, and cut off again before they are decoded.
            yield name, (value.as_py() for value in column[: n_rows - 1 if name.startswith("actions") else n_rows])

    def _error(self, problem: str, field: str) -> DatasetError:
        return DatasetError(problem, source=self._source, field=field)


def _joined(column: Any) -> Any:
    """Return the rows of all batches as one array."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _decode_images(frames: Any, shape: tuple[int, ...]) -> Array:
    """Decode JPEG files that `check_images` has looked at."""
    from PIL import Image

    images = np.empty((len(frames), *shape), np.uint8)
    for row, frame in enumerate(frames):
        images[row] = np.asarray(Image.open(io.BytesIO(frame.as_py()), formats=("JPEG",)))
    return images


def _row_bytes(kinds: Iterable[Any]) -> int:
    """Bytes of a row as NumPy holds it, at eight for what has no width of its own."""
    import pyarrow as pa

    n_bytes = 0
    for kind in kinds:
        if pa.types.is_struct(kind):
            n_bytes += _row_bytes(field.type for field in kind)
        elif pa.types.is_fixed_size_list(kind):
            n_bytes += kind.list_size * _row_bytes([kind.value_type])
        else:
            n_bytes += max(kind.bit_width // 8, 1) if _is_number(kind) else 8
    return n_bytes


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _check_info_type(kind: Any, name: str, source: str, *, in_list: bool = False) -> None:
    """Refuse types whose rows can be more than what is stored for them: views, dictionaries, runs, lists of nothing."""
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind) and not in_list:
        for field in kind:
            _check_info_type(field.type, f"{name}.{field.name}", source)
    elif types.is_list(kind) or types.is_fixed_size_list(kind):
        _check_info_type(kind.value_type, name, source, in_list=True)
    elif not (_is_number(kind) or types.is_string(kind) or types.is_binary(kind) or (types.is_null(kind) and not in_list)):
        raise DatasetError(f"expected numbers, text or lists of them, got {str(kind)[:100]}", source=source, field=name)


# Arrow's file format ---------------------------------------------------------------------------------------------------


def check_plain_buffers(path: Path, n_bytes: int) -> None:
    """Refuse an Arrow file whose buffers are compressed, or that refers to one place many times.

    Minari writes buffers as they are. Compressed ones would be unpacked to the size that they declare; pyarrow cannot be asked
    what that is, so the few bytes that say it are read here.

    Raises:
        ValueError: If it is such a file, or none.
        struct.error: If it ends too early.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC or n_bytes < 18:
            raise ValueError("it is no Arrow file")
        file.seek(-10, os.SEEK_END)
        (length,) = struct.unpack("<i", file.read(4))
        if file.read(6) != _MAGIC or not 0 < length <= n_bytes - 18:
            raise ValueError("it is cut off")
        file.seek(-10 - length, os.SEEK_END)
        footer = _Table.root(file.read(length))
        if footer.vector(2)[0]:
            raise ValueError("it has dictionaries")
        n_blocks, place = footer.vector(3)
        total = 0
        for index in range(n_blocks):
            offset, n_header, n_body = struct.unpack_from("<qi4xq", footer.content, place + 24 * index)
            total += n_header + n_body
            if min(offset, n_header, n_body) < 0 or total > n_bytes:
                raise ValueError("its parts are larger than the file")
            file.seek(offset)
            content = file.read(n_header)
            start = 8 if content[:4] == b"\xff\xff\xff\xff" else 4
            message = _Table.root(content[start:])
            if message.byte(1) != _RECORD_BATCH:
                raise ValueError("a part of it is no batch of rows")
            if message.table(2).has(3):
                raise ValueError("its buffers are compressed; write it again without compression")


class _Table:
    """A table in a flatbuffer, the format of Arrow's own headers."""

    def __init__(self, content: bytes, place: int) -> None:
        self.content, self._place = content, place
        self._fields = place - self._read("<i", place)
        self._n_bytes = self._read("<H", self._fields)

    @classmethod
    def root(cls, content: bytes) -> "_Table":
        return cls(content, struct.unpack_from("<I", content)[0])

    def _read(self, kind: str, place: int) -> int:
        if place < 0:
            raise ValueError("a header refers to a place before itself")
        return int(struct.unpack_from(kind, self.content, place)[0])

    def _find(self, field: int) -> int | None:
        if 6 + 2 * field > self._n_bytes:
            return None
        offset = self._read("<H", self._fields + 4 + 2 * field)
        return self._place + offset if offset else None

    def has(self, field: int) -> bool:
        return self._find(field) is not None

    def byte(self, field: int) -> int:
        place = self._find(field)
        return 0 if place is None else self._read("<B", place)

    def table(self, field: int) -> "_Table":
        place = self._find(field)
        if place is None:
            raise ValueError("a header lacks a part")
        return _Table(self.content, place + self._read("<I", place))

    def vector(self, field: int) -> tuple[int, int]:
        """Return number and place of the elements of a vector."""
        place = self._find(field)
        if place is None:
            return 0, 0
        start = place + self._read("<I", place)
        return self._read("<I", start), start + 4
