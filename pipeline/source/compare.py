"""Compares the pairs of a source with the newest version of their tokens table, one range of pair_ids at a time.

Prepare and the dry run find out with it which pairs are new. Writes nothing.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import polars as pl
import pyarrow as pa

from pipeline.source.external_sort import ExternalSort
from weights_store import Table
from weights_store.schemas import SIDES
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.metadata import SourceRecord


class Account(NamedTuple):
    """The source of a version, and where its rows went."""

    source: SourceRecord
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


def kept_version(newest: int | None, recorded: Account | None, source: SourceRecord) -> int | None:
    """Return the newest version if its rows can be kept: rows read in another way say nothing about the new ones."""
    return newest if recorded and recorded.source["reading"] == source["reading"] else None


class ComparedPair(NamedTuple):
    """A pair of the source, and how it stands to the newest version."""

    pair_id: str
    source_row: int
    split: str
    pair: str
    """The pair as JSON text."""
    chosen_score: float | None
    rejected_score: float | None
    standing: Literal["new", "stays", "moved", "duplicate"]
    """`moved`: the version has the pair from another row or split of the source, or with other scores. `duplicate`: an earlier
    row has the same pair."""


class ComparedRange(NamedTuple):
    """The pairs of the source in one range of pair_ids, against those of the version."""

    piece: KeyRange
    rows: pl.DataFrame
    """The pairs of the source, sorted by pair_id and row, with the columns of `ComparedPair`."""
    gone: pl.Series
    """The pair_ids of the version that have left the source."""


_SCORES = tuple(f"{side}_score" for side in SIDES)
_FOLLOWED = ("source_row", "split", *_SCORES)
_HAS_CHANGED = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"old_{name}")) for name in _FOLLOWED)
_STANDING = (
    pl.when(~pl.col("pair_id").is_first_distinct())
    .then(pl.lit("duplicate"))
    .when(pl.col("old_source_row").is_null())
    .then(pl.lit("new"))
    .when(_HAS_CHANGED)
    .then(pl.lit("moved"))
    .otherwise(pl.lit("stays"))
)


def compared_ranges(pairs: ExternalSort, tokens: Table, version: int | None) -> Iterator[ComparedRange]:
    """Yield the pairs of a source against a version of their tokens table; None: every pair is new."""
    for piece, rows in pairs.ranges():
        yield compared_range(piece, rows, tokens, version)


def compared_range(piece: KeyRange, sorted_rows: pa.Table, tokens: Table, version: int | None) -> ComparedRange:
    """Return the pairs of a source in one range, sorted by pair_id and row, against a version of their tokens table."""
    rows = pl.DataFrame(pl.from_arrow(sorted_rows))
    scanned = rows.clear().lazy() if version is None else tokens.scan(version, within=piece)
    old = scanned.select("pair_id", **{f"old_{name}": name for name in _FOLLOWED}).collect()
    joined = rows.join(old, on="pair_id", how="left", maintain_order="left")
    gone = old.join(rows, on="pair_id", how="anti")["pair_id"]
    fields = [name for name in ComparedPair._fields if name != "standing"]
    return ComparedRange(piece, joined.select(*fields, standing=_STANDING), gone)
