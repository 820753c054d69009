"""What every kind of source gives: its columns, and its rows as Python values.

The kinds are in `json_files.py` and `arrow_files.py`; `load.py` chooses.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

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
    read: Callable[[Collection[str] | None], Iterator[RawRow]]
    """Reads the rows from the first one; given columns, only these where the format allows it."""
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
        rows = islice(self.read(columns), self.max_rows)
        if not self.split:
            return rows
        # Not with `replace`, which takes ten times as long.
        return (RawRow(row.source_row, row.value, row.reason, row.detail, row.raw, self.split) for row in rows)


def joined(name: str, sources: list[Source]) -> Source:
    """Return several sources as one; its rows are counted through."""
    if len(sources) == 1:
        return sources[0]

    def read(columns: Collection[str] | None) -> Iterator[RawRow]:
        start = 0
        for source in sources:
            num_rows = 0
            for row in source.rows(columns):
                num_rows += 1
                yield replace(row, source_row=start + row.source_row)
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
