"""What every kind of source gives: its columns, and its rows as Python values.

The kinds are in `json_files.py` and `arrow_files.py`; `load.py` chooses.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, TypeVar

import pyarrow as pa

from weights_store.schemas import Reason

MAX_ROW_BYTES = 16 << 20
"""Longest row that is read: several times what any model takes. In Parquet and Arrow the columns that are needed count."""
ROWS_PER_BATCH = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of the source: either its `value`, or the `reason` why it cannot be read."""

    source_row: int
    value: dict[str, object] | None
    reason: Reason | None = None
    detail: str = ""
    raw: str = ""
    """The text of the row, if the source is text."""
    split: str = ""

    num_rows: ClassVar[int] = 1

    # Neither with `replace`, which takes ten times as long.
    def in_split(self, split: str) -> "RawRow":
        """Return the row, of that split."""
        return RawRow(self.source_row, self.value, self.reason, self.detail, self.raw, split)

    def moved(self, by: int) -> "RawRow":
        """Return the row, that many places later in the source."""
        return RawRow(self.source_row + by, self.value, self.reason, self.detail, self.raw, self.split)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that follow each other, as columns: for work that would take longer with a Python object for each row."""

    first_row: int
    """Its place in the source."""
    columns: pa.RecordBatch | pa.Table
    read: Callable[[pa.RecordBatch | pa.Table, int], Iterator[RawRow]]
    """Makes rows of the columns and the place of the first one."""
    split: str = ""

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return int(self.columns.num_rows)

    def in_split(self, split: str) -> "Block":
        """Return the rows, of that split."""
        return replace(self, split=split)

    def moved(self, by: int) -> "Block":
        """Return the rows, that many places later in the source."""
        return replace(self, first_row=self.first_row + by)

    def first(self, num_rows: int) -> "Block":
        """Return the first rows."""
        return replace(self, columns=self.columns.slice(0, num_rows))

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows one by one."""
        rows = self.read(self.columns, self.first_row)
        return (row.in_split(self.split) for row in rows) if self.split else rows


Piece = RawRow | Block


def too_large(source_row: int, what: str, raw: str = "(not read)") -> RawRow:
    """Return a row that is not read, for its size."""
    return RawRow(source_row, None, Reason.ROW_TOO_LARGE, what, raw)


def checked_size(row: RawRow, columns: Collection[str] | None = None) -> RawRow:
    """Return a row of Python values, or that it is too large; only these columns count."""
    num_characters = 0
    waiting: list[object] = [value for name, value in (row.value or {}).items() if columns is None or name in columns]
    while waiting and num_characters <= MAX_ROW_BYTES:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            num_characters += len(value)
        elif isinstance(value, Mapping):
            num_characters += len(value)
            waiting += value.values()
        elif isinstance(value, list | tuple):
            num_characters += len(value)
            waiting += value
    if num_characters <= MAX_ROW_BYTES:
        return row
    return too_large(row.source_row, f"the row has more than {MAX_ROW_BYTES:,} characters, the limit", row.raw)


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source, which can be read several times."""

    name: str
    """As the recipe names it."""
    read: Callable[[Collection[str] | None], Iterator[Piece]]
    """Reads all rows from the first one; given columns, only these where the format allows it."""
    columns: list[str] | None = None
    """All columns, in order; None if only the rows say."""
    texts: frozenset[str] | None = None
    """The columns that may hold text; None if only the rows say."""
    doubled: frozenset[str] = frozenset()
    """The columns whose name stands twice, so that they cannot be told apart."""
    max_looked_at: int | None = None
    """How many rows a first look may read; None: all."""
    max_rows: int | None = None
    split: str = ""
    """Of all rows; empty if each says its own."""

    def rows(self, columns: Collection[str] | None = None) -> Iterator[RawRow]:
        """Yield the rows, at most `max_rows`, each with its split.

        Raises:
            InputError: The source is damaged.
        """
        for piece in self.pieces(columns):
            if isinstance(piece, RawRow):
                yield piece
            else:
                yield from piece.rows()

    def pieces(self, columns: Collection[str] | None = None) -> Iterator[Piece]:
        """Yield the same rows, in blocks where the format has columns.

        Raises:
            InputError: The source is damaged.
        """
        num_left = sys.maxsize if self.max_rows is None else self.max_rows
        for piece in self.read(columns) if num_left else ():
            of_split = piece.in_split(self.split) if self.split else piece
            yield of_split.first(num_left) if isinstance(of_split, Block) and of_split.num_rows > num_left else of_split
            num_left -= piece.num_rows
            if num_left <= 0:  # before the next one is read, which may be damaged
                return


def joined(name: str, sources: list[Source]) -> Source:
    """Return several sources as one; its rows are counted through."""
    if len(sources) == 1:
        return sources[0]

    def read(columns: Collection[str] | None) -> Iterator[Piece]:
        start = 0
        for source in sources:
            num_rows = 0
            for piece in source.pieces(columns):
                num_rows += piece.num_rows
                yield piece.moved(start)
            start += num_rows

    known = [source.columns for source in sources]
    columns = None if None in known else list(dict.fromkeys(chain(*filter(None, known))))
    texts = [source.texts for source in sources]
    all_texts = None if None in texts else frozenset(chain(*filter(None, texts)))
    doubled = frozenset(chain(*(source.doubled for source in sources)))
    looked_at = [source.max_looked_at for source in sources if source.max_looked_at is not None]
    return Source(name, read, columns, all_texts, doubled, sum(looked_at) or None)


def with_split(row: RawRow, column: str | None) -> RawRow:
    """Return a row with the split that its column names, or with the reason why it has none; no column: as it is."""
    if column is None or row.value is None:
        return row
    split = row.value.get(column)
    if split is None or split == "":
        return replace(row, reason=Reason.MISSING_VALUE, detail=f"column {column!r} has no value")
    if not isinstance(split, str):
        detail = f"column {column!r} is a {type(split).__name__}, expected the name of a split"
        return replace(row, reason=Reason.NOT_TEXT, detail=detail)
    return replace(row, split=split)


def batches(items: Iterable[T], max_items: int, max_size: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut items into lists of at most `max_items`, each closed as soon as the sizes in it add up to more than `max_size`."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == max_items or total > max_size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
