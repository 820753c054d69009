"""What every kind of source gives: its columns, and its rows as Python values.

The kinds are in `json_files.py` and `arrow_files.py`; `load.py` chooses.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

from weights_store.schemas import Reason


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of the source: either its `value`, or the `reason` why it cannot be read."""

    source_row: int
    value: dict[str, object] | None
    reason: Reason | None = None
    detail: str = ""
    raw: str = ""
    """The text of the row, if the source is text."""


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

    def rows(self, columns: Collection[str] | None = None) -> Iterator[RawRow]:
        """Yield the rows, at most `max_rows`.

        Raises:
            InputError: The source is damaged.
        """
        return islice(self.read(columns), self.max_rows)


def joined(name: str, sources: list[Source]) -> Source:
    """Return several sources as one; its rows are counted through."""

    def read(columns: Collection[str] | None) -> Iterator[RawRow]:
        start = 0
        for source in sources:
            num_rows = 0
            for row in source.read(columns):
                num_rows += 1
                yield replace(row, source_row=start + row.source_row)
            start += num_rows

    known = [source.columns for source in sources]
    columns = None if None in known else list(dict.fromkeys(chain(*filter(None, known))))
    texts = None if columns is None else frozenset(chain(*(source.texts or () for source in sources)))
    return Source(name, read, columns, texts, frozenset(chain(*(source.doubled for source in sources))))
