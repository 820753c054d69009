"""Compares the pairs of a source with the newest version of their tokens table, one range of pair_ids at a time.

Prepare and the dry run decide with it which pairs are new, in bounded memory. Writes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

import pyarrow as pa

from weights_store import Table
from weights_store.tables.key_ranges import KeyRange

ROWS_PER_BATCH = 2000
"""Rows of the source that are Python objects at a time."""

Standing = Literal["new", "stays", "moved", "duplicate"]
"""`moved`: the pair is in the version, from another row of the source. `duplicate`: an earlier row has the same pair."""


class PairRow(TypedDict):
    """A pair of the source before it is tokenised."""

    pair_id: str
    source_row: int
    pair: str
    """The pair as JSON text."""


class SourceSettings(TypedDict):
    """What a version records of its source: the content, and how its rows are read."""

    content: str | None
    """Fingerprint of the file; None for a folder or a hub dataset."""
    max_pairs: int | None
    reading: dict[str, str]
    """The columns that are read, and the name of the split."""


class Account(NamedTuple):
    """The source of a version, and where its rows went."""

    source: SourceSettings
    num_source_rows: int
    quarantined: dict[str, int]

    @classmethod
    def recorded(cls, tokens: Table, quarantine: Table) -> "Account | None":
        """Return the account of the newest version; None where a build has not finished one."""
        if not tokens.exists() or not quarantine.exists():
            return None
        metadata = tokens.metadata()
        statistics = metadata["statistics"]
        return cls(metadata["source"], statistics["num_source_rows"], statistics["quarantined"])


def kept_version(newest: int | None, recorded: Account | None, source: SourceSettings) -> int | None:
    """Return the newest version if its rows can be kept: rows read in another way say nothing about the new ones."""
    return newest if recorded and recorded.source["reading"] == source["reading"] else None


@dataclass
class ComparedRange:
    """The pairs of the source in one range of pair_ids, against those that the version has there."""

    piece: KeyRange
    rows: pa.Table
    known: dict[str, int]
    """The pairs of the version, with their row in the source."""
    _seen: set[str] = field(init=False, default_factory=set)

    def batches(self) -> Iterator[list[tuple[PairRow, Standing]]]:
        """Yield the pairs of the source, sorted by pair_id and row, each with its standing. To be called once."""
        for start in range(0, self.rows.num_rows, ROWS_PER_BATCH):
            rows: list[PairRow] = self.rows.slice(start, ROWS_PER_BATCH).to_pylist()
            yield [(row, self._standing(row)) for row in rows]

    def gone(self) -> set[str]:
        """Return the pairs of the version that have left the source; to be called after `batches`."""
        return self.known.keys() - self._seen

    def _standing(self, row: PairRow) -> Standing:
        pair_id = row["pair_id"]
        if pair_id in self._seen:
            return "duplicate"
        self._seen.add(pair_id)
        if pair_id not in self.known:
            return "new"
        return "stays" if self.known[pair_id] == row["source_row"] else "moved"


def compared_ranges(
    pairs: Iterator[tuple[KeyRange, pa.Table]], tokens: Table, version: int | None
) -> Iterator[ComparedRange]:
    """Yield the pairs of a source against a version of their tokens table; against nothing where the version is None."""
    for piece, rows in pairs:
        known: dict[str, int] = {}
        if version is not None:
            frame = piece.of(tokens.scan(version)).select("pair_id", "source_row").collect()
            known = dict(frame.iter_rows())
        yield ComparedRange(piece, rows, known)
