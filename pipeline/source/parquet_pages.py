"""How much a row group of a Parquet file needs when it is read, told before a value is read.

A page is decompressed whole, and 29 KB may hold a text of 800 MB. The file's metadata has only sums of a column. The sizes of
pages stand in front of them, in Thrift's compact protocol, of which this reads as much as that takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

_HEADER_BYTES = (1 << 14, 64 << 20)
"""How much is read for a header: usually a few bytes, but some writers put the smallest and largest text of a page there."""
_KIND, _DECOMPRESSED, _COMPRESSED = 1, 2, 3
"""Fields of a page header. A fourth, a checksum, may be negative."""
_DICTIONARY_PAGE = 2
_BOOLEANS = (1, 2)
_LISTS = (9, 10)
_STRUCT = 12


@dataclass(frozen=True, slots=True)
class ColumnSize:
    """What reading one column of a row group takes."""

    name: str
    num_bytes: int
    """Of all pages, decompressed."""
    largest_page_bytes: int
    """Decompressed: no value is longer."""
    longest_shared_bytes: int
    """No value that may stand many times in the same bytes of a page is longer; 0 if each value has its own."""


def column_sizes(path: Path, group: pq.RowGroupMetaData, columns: list[str]) -> Iterator[ColumnSize]:
    """Yield the sizes of columns of a row group, each by the name of its outermost column.

    Raises:
        ValueError: A page has no readable header.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for index in range(group.num_columns):
            chunk = group.column(index)
            name = chunk.path_in_schema.partition(".")[0]
            if name in columns:
                pages = list(_pages(file, chunk))
                is_delta = "DELTA_BYTE_ARRAY" in chunk.encodings
                shared = (size for kind, size in pages if is_delta or kind == _DICTIONARY_PAGE)
                largest = max((size for _, size in pages), default=0)
                yield ColumnSize(name, chunk.total_uncompressed_size, largest, max(shared, default=0))


def _pages(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> Iterator[tuple[int, int]]:
    """Yield the kind and the decompressed size of each page of a column."""
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset]
    position = min(start for start in starts if start is not None and start > 0)
    end = position + chunk.total_compressed_size
    while position < end:
        fields, num_bytes = _header(file, position)
        if not {_KIND, _DECOMPRESSED, _COMPRESSED} <= fields.keys() or fields[_COMPRESSED] < 0:
            raise ValueError(f"no page header at byte {position}")
        yield fields[_KIND], fields[_DECOMPRESSED]
        position += num_bytes + fields[_COMPRESSED]


def _header(file: BinaryIO, position: int) -> tuple[dict[int, int], int]:
    """Return the integers of a page header by their field, and its length."""
    for num_bytes in _HEADER_BYTES:
        file.seek(position)
        header = _Thrift(file.read(num_bytes))
        try:
            return header.integers(), header.position
        except EOFError:
            continue
        except RecursionError:
            break
    raise ValueError(f"no page header at byte {position}")


class _Thrift:
    """Reads one struct in the compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def integers(self) -> dict[int, int]:
        """Return the integers of the struct by their field; what else it has is skipped.

        Raises:
            ValueError: The data is no such struct.
            EOFError: It ends before the struct does.
        """
        found: dict[int, int] = {}
        field = 0
        while first := self._byte():
            field = field + (first >> 4) if first >> 4 else self._zigzag()
            kind = first & 0x0F
            if 4 <= kind <= 6:
                found[field] = self._zigzag()
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int) -> None:
        if kind in _BOOLEANS:
            return
        if kind == 3:
            self._byte()
        elif 4 <= kind <= 6:
            self._varint()
        elif kind == 7:
            self.position += 8
        elif kind == 8:
            num_bytes = self._varint()
            self.position += num_bytes
        elif kind in _LISTS:
            first = self._byte()
            num_items = first >> 4 if first >> 4 < 15 else self._varint()
            item_kind = first & 0x0F
            for _ in range(num_items):
                self._skip(3 if item_kind in _BOOLEANS else item_kind)  # in a list, a boolean is a byte
        elif kind == _STRUCT:
            self.integers()
        else:
            raise ValueError(f"unknown type {kind} in a page header")

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise EOFError("the data ends before the header does")
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number in a page header is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
