"""HDF5 files that somebody else made: what in them may be opened, and how large it may be. And ours, on a disk that fills.

An HDF5 file can name other files (external links, external storage, virtual data sets), reach one object by many names, and
declare rows that it does not hold. Each object is looked at through its link and its creation properties, which opens
nothing else, before anything reads it.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from cql_plugins.adapters._tree import named_leaves
from cql_plugins.adapters._untrusted import MAX_DEPTH, check_declared, check_memory, check_packed, memory_limit, parsing
from cql_plugins.adapters._validation import DatasetError

_GZIP, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_FILTERS = {_GZIP: "gzip", _SHUFFLE: "shuffle", _FLETCHER32: "fletcher32", _LZF: "lzf"}
_UNPACKED_AT_MOST = 1032
_HINT = "It may be cut off or of another format; fetch it again"


class PlainObjects:
    """Hands out those objects of an open file that are plain data in this file, each of them once.

    Attributes:
        source: What the file is called in messages.
        n_bytes: What all data sets that were handed out declare.
    """

    def __init__(self, file: Any, file_bytes: int, source: str) -> None:
        """Start on a file.

        Args:
            file: The open `h5py.File`.
            file_bytes: Its size.
            source: Source used in messages.
        """
        import h5py

        self.source = source
        self.n_bytes = 0
        self._h5py: Any = h5py
        self._file_bytes = file_bytes
        self._known = {self._address(file)}

    def names(self, group: Any) -> list[str]:
        """List the names in a group, without following any."""
        with parsing("expected a complete HDF5 file", self.source, hint=_HINT):
            return [str(name) for name in group]

    def has(self, group: Any, name: str) -> bool:
        """Tell whether a group has a link of this name, wherever it leads."""
        with parsing("expected a complete HDF5 file", self.source, name, _HINT):
            return bool(group.id.links.exists(name.encode()))  # `name in group` would follow the link

    def open(
        self,
        group: Any,
        name: str,
        field: str,
        *,
        strings: bool = False,
        images: bool = False,
        unused: str | None = None,
        any_values: bool = False,
        depth: int = 0,
    ) -> Any:
        """Open what a group has under a name: a data set, or a (nested) dict of them.

        Args:
            group: An open group of this file.
            name: Name in the group.
            field: What to call it in messages.
            strings: Whether text is expected as well as numbers.
            images: Whether rows of bytes of differing lengths (encoded images) are expected as well.
            unused: Name in the group of what nobody uses: its values may be of any kind, but are in this file, and fit.
            any_values: Whether this lies in what `unused` names.
            depth: How deep the group lies.

        Raises:
            DatasetError: If it leads elsewhere, is no plain data, or declares more than it holds.
        """
        if depth > MAX_DEPTH:
            raise self._error(f"expected groups nested at most {MAX_DEPTH} deep, got more", field)
        if "/" in name or name in ("", ".", ".."):
            raise self._error(f"expected a name without folders, got {name!r}", field)
        with parsing("expected a complete HDF5 file, got one that cannot be read", self.source, field, _HINT):
            kind = group.id.links.get_info(name.encode()).type
            if kind != self._h5py.h5l.TYPE_HARD:
                sort = {self._h5py.h5l.TYPE_SOFT: "soft", self._h5py.h5l.TYPE_EXTERNAL: "external"}.get(kind, "unknown")
                raise self._error(
                    f"expected data in this file, got a link ({sort})",
                    field,
                    "Links are not followed; copy what it points at into the file, with h5py's Group.copy",
                )
            opened = group[name]
            address = self._address(opened)
            if address in self._known:
                raise self._error("expected an object of its own, got one that the file has under two names", field)
            self._known.add(address)
            if isinstance(opened, self._h5py.Dataset):
                self._check_dataset(opened, field, strings, images, any_values)
                return opened
            if not isinstance(opened, self._h5py.Group):
                raise self._error(f"expected a data set or a group, got a {type(opened).__name__}", field)
            names = self.names(opened)
        return {
            key: self.open(
                opened,
                key,
                f"{field}.{key}",
                strings=strings,
                images=images,
                unused=unused,
                any_values=any_values or (depth == 0 and key == unused),
                depth=depth + 1,
            )
            for key in names
        }

    def _address(self, opened: Any) -> Any:
        return self._h5py.h5o.get_info(opened.id).addr

    def _error(self, problem: str, field: str, hint: str | None = None) -> DatasetError:
        return DatasetError(problem, source=self.source, field=field, hint=hint)

    # Data sets ---------------------------------------------------------------------------------------------------

    def _check_dataset(self, data: Any, field: str, strings: bool, images: bool, any_values: bool) -> None:
        properties = data.id.get_create_plist()
        layout = properties.get_layout()
        h5d = self._h5py.h5d
        if layout == h5d.VIRTUAL:
            raise self._error("expected data in this file, got a virtual data set", field, "Write its values into one file")
        if properties.get_external_count():
            raise self._error("expected data in this file, got external storage", field, "Write its values into one file")
        if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
            raise self._error("expected a compact, contiguous or chunked data set, got none of these", field)
        dtype, shape = data.dtype, data.shape
        if shape is None:
            raise self._error("expected an array, got an empty data space", field)
        if self._is_variable(dtype, strings, images):
            declared = math.prod(shape) * 16  # a length and a place for each
        elif (strings and dtype.kind == "S") or (any_values and not dtype.hasobject):
            declared = math.prod(shape) * dtype.itemsize
        else:
            declared = check_declared(shape, dtype, self.source, field)
        stored = data.id.get_storage_size()
        if stored > self._file_bytes:
            raise self._error(f"expected data in {self._file_bytes:,} bytes of file, {stored:,} are said to be stored", field)
        check_packed(declared, stored, self.source, field)
        if layout == h5d.CHUNKED:
            self._check_chunks(data, properties, field)
        elif declared > stored:
            raise self._error(f"expected {declared:,} bytes, {stored:,} were written", field)
        if dtype.kind == "O":
            declared = self._check_heap(data, properties, field)
            check_packed(declared, self._file_bytes, self.source, field)
        self.n_bytes += declared

    def _is_variable(self, dtype: np.dtype[Any], strings: bool, images: bool) -> bool:
        """Tell whether the elements have lengths of their own, for the kinds that are expected."""
        if strings and self._h5py.check_string_dtype(dtype) is not None:
            return dtype.kind == "O"
        return images and self._h5py.check_vlen_dtype(dtype) == np.uint8

    def _check_chunks(self, data: Any, properties: Any, field: str) -> None:
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        unknown = [code for code in filters if code not in _FILTERS]
        if unknown or len(set(filters)) != len(filters):
            raise self._error(
                f"expected the filters {', '.join(_FILTERS.values())}, each at most once, got those with numbers {filters}",
                field,
                "Repack the file: h5repack -f SHUF -f GZIP=4 IN OUT",
            )
        chunk = tuple(int(length) for length in properties.get_chunk())
        itemsize = int(data.id.get_type().get_size())
        chunk_bytes = math.prod(chunk) * itemsize
        check_memory(chunk_bytes, self.source, field, mapped=True)
        expected = math.prod(-(-length // size) for length, size in zip(data.shape, chunk, strict=True))
        # Counted here, not by the library's own count, since this also shows where each lies.
        limit = memory_limit()
        counted = _Chunks(expected, None if limit is None else limit // 4 // _UNPACKED_AT_MOST)
        if hasattr(data.id, "chunk_iter"):
            data.id.chunk_iter(counted)
        else:  # HDF5 before 1.14
            any(counted(data.id.get_chunk_info(index)) for index in range(data.id.get_num_chunks()))
        if counted.n_chunks != expected:
            found = "more" if counted.n_chunks > expected else f"{counted.n_chunks:,}"
            raise self._error(
                f"expected {expected:,} chunks for shape {data.shape}, got {found}", field, "Its rows were never written"
            )
        if counted.n_bytes > self._file_bytes or counted.end > self._file_bytes:
            raise self._error("expected chunks of their own in the file, got some that overlap or lie outside", field)
        # A filter that gains nothing is left out for a chunk; gzip may add a little.
        if counted.largest > chunk_bytes + chunk_bytes // 64 + 1024:
            raise self._error(f"expected chunks of {chunk_bytes:,} bytes, one is stored as {counted.largest:,}", field)
        if _GZIP in filters and counted.suspects:
            self._check_gzip(data, filters, counted.suspects, chunk_bytes, field)

    def _check_gzip(self, data: Any, filters: list[int], suspects: list[tuple[int, ...]], chunk_bytes: int, field: str) -> None:
        """Refuse a chunk that unpacks to more than a chunk: the library would unpack all of it.

        Only chunks that could fill a part of memory that matters are unpacked for this.
        """
        if any(code != _FLETCHER32 for code in filters[filters.index(_GZIP) + 1 :]):
            raise self._error(
                "expected gzip as the last filter of chunks of this size", field, "Repack the file: h5repack -f GZIP=4 IN OUT"
            )
        index = filters.index(_GZIP)
        for offset in suspects:
            mask, packed = data.id.read_direct_chunk(offset)
            if mask & (1 << index):
                continue
            unpacking = zlib.decompressobj()
            unpacking.decompress(packed, chunk_bytes + 64)
            if not unpacking.eof:
                raise self._error(f"expected chunks of {chunk_bytes:,} bytes, one unpacks to more", field)

    # Elements with lengths of their own ------------------------------------------------------------------------------

    def _check_heap(self, data: Any, properties: Any, field: str) -> int:
        """Look at the heap that elements with lengths of their own lie in; return the bytes of all elements.

        The library walks a damaged heap forever, and many elements can be one long one.
        """
        if len(data.shape) != 1 or properties.get_layout() == self._h5py.h5d.COMPACT or properties.get_nfilters():
            raise self._error("expected a vector without filters, as Minari writes text and images", field)
        if data.file.userblock_size:
            raise self._error("expected a file without a user block", field, "Repack the file: h5repack -u 0 IN OUT")
        heap: dict[int, dict[int, int]] = {}
        left = self._file_bytes
        with open(data.file.filename, "rb") as file:
            elements = np.concatenate([np.empty(0, _ELEMENT), *self._elements(data, properties, file)])
            elements = elements[elements["length"] > 0]
            for address in np.unique(elements["address"]).tolist():
                heap[address], n_bytes = _read_heap(file, address, left)
                left -= n_bytes
        for length, address, index in elements.tolist():
            if heap[address].get(index) != length:
                raise self._error(f"expected an element of {length:,} bytes, its place has another length", field)
        return int(elements["length"].sum(dtype=np.uint64))

    def _elements(self, data: Any, properties: Any, file: IO[bytes]) -> Iterator[Any]:
        """Read where the elements lie, a chunk at a time."""
        n_rows = int(data.shape[0])
        if properties.get_layout() == self._h5py.h5d.CONTIGUOUS:
            file.seek(data.id.get_offset())
            yield np.frombuffer(file.read(n_rows * _ELEMENT.itemsize), _ELEMENT)
            return
        chunk = int(properties.get_chunk()[0])
        for start in range(0, n_rows, chunk):
            _, raw = data.id.read_direct_chunk((start,))
            if len(raw) != chunk * _ELEMENT.itemsize:
                raise ValueError("an element has another size")
            yield np.frombuffer(raw, _ELEMENT)[: n_rows - start]


_ELEMENT = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
"""How a file says where an element with a length of its own lies."""


def _read_heap(file: IO[bytes], address: int, limit: int) -> tuple[dict[int, int], int]:
    """Read the lengths of the objects of one heap, by their numbers, and the bytes of the heap.

    Raises:
        ValueError: If it is none, or one that has no end.
        struct.error: If it is cut off.
    """
    file.seek(address)
    signature, version, n_bytes = struct.unpack("<4sB3xQ", file.read(16))
    if signature != b"GCOL" or version != 1 or not 16 <= n_bytes <= limit:
        raise ValueError("there is no heap where one is expected")
    content = file.read(n_bytes - 16)
    objects: dict[int, int] = {}
    place = 0
    while place + 16 <= len(content):
        index, length = struct.unpack_from("<H6xQ", content, place)
        # What is free, number 0, counts its own header; all others are filled up to whole words.
        place += length if index == 0 else 16 + -(-length // 8) * 8
        if place > len(content) or (index == 0 and length < 16) or index in objects:
            raise ValueError("a heap is damaged")
        objects[index] = length
    return objects, n_bytes


class _Chunks:
    """Counts the stored chunks of a data set; stops soon after there are more than there should be."""

    def __init__(self, limit: int, suspect_from: int | None) -> None:
        self.n_chunks = self.n_bytes = self.largest = self.end = 0
        self.suspects: list[tuple[int, ...]] = []
        self._limit = limit
        self._suspect_from = suspect_from

    def __call__(self, info: Any) -> bool | None:
        self.n_chunks += 1
        self.n_bytes += info.size
        self.largest = max(self.largest, info.size)
        self.end = max(self.end, (info.byte_offset or 0) + info.size)
        if self._suspect_from is not None and info.size > self._suspect_from:
            self.suspects.append(info.chunk_offset)
        return True if self.n_chunks > self._limit else None


def declared_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes that a (nested) dict of data sets declares."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in named_leaves(tree, ""))


def row_of_chunks(data: Any) -> int:
    """Bytes of the chunks that one row of a data set lies in."""
    if data.chunks is None:
        return 0
    across = math.prod(-(-length // size) for length, size in zip(data.shape[1:], data.chunks[1:], strict=True))
    return int(across * math.prod(data.chunks) * data.dtype.itemsize)


# Writing --------------------------------------------------------------------------------------------------------------


class Unfailing:
    """A file that tells HDF5 nothing of a full disk or an interrupt, and keeps the error.

    HDF5 writes much when objects go, where h5py can raise nothing, and after a write that failed it ends the process with a
    segmentation fault.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error

    def _try(self, method: str, *args: Any, otherwise: int = 0) -> Any:
        if self._error is None:
            try:
                return getattr(self._file, method)(*args)
            except BaseException as error:  # Ctrl-C too
                self._error = error
        return otherwise

    # What h5py calls.

    def read(self, size: int = -1) -> Any:
        return self._try("read", size) or b""

    def readinto(self, buffer: Any) -> Any:
        return self._try("readinto", buffer)

    def write(self, data: Any) -> Any:
        return self._try("write", data, otherwise=len(data))

    def seek(self, offset: int, whence: int = 0) -> Any:
        return self._try("seek", offset, whence, otherwise=offset)

    def tell(self) -> Any:
        return self._try("tell")

    def truncate(self, size: int | None = None) -> Any:
        return self._try("truncate", size)

    def flush(self) -> Any:
        return self._try("flush")
