"""What publish does with one range of pair_ids: join its tables, weigh the pairs, write shards, and count.

`publish.py` does this with one range after the other, or with many at once on Ray, and commits. The results of the ranges are
merged in their order, so it makes no difference, not even in the last bit, where they come from.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.weighing.fits import Batches, collect_margins, margins_of, with_fits
from pipeline.weighing.join import Join
from pipeline.weighing.margins import Collected, Margins
from pipeline.weighing.statistics import count_up, merge_statistics
from pipeline.weighing.weigh import Weigher, one_chunk, pair_weights
from weights_store import Table
from weights_store.messages import Progress, show
from weights_store.processes.spread import Spread
from weights_store.schemas import ANNOTATIONS, ATTRIBUTIONS, FLOATS, WEIGHTS
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.metadata import HeldOutRecord, Statistics
from weights_store.tables.shards import ShardRecord, Written

_Part = TypeVar("_Part")
_NO_MARGINS: HeldOutRecord = {"not_measured": "its rows have one response each, so none was preferred to another"}


class WeighedRange(NamedTuple):
    """The weights of the pairs of one range."""

    written: Written
    statistics: Statistics | None
    """None if there is no pair."""
    margins: Collected | None


@dataclass(frozen=True)
class RangeWeigher:
    """Weighs the pairs of one range that version `without` of `table` lacks, if one is given.

    Margins are collected if all pairs are weighed: otherwise they need a pass of their own.
    """

    join: Join
    weigher: Weigher
    table: Table
    without: int | None

    def __call__(self, piece: KeyRange) -> WeighedRange:
        """Return the weights of a range."""
        writer = self.table.writer()
        statistics: Statistics | None = None
        margins = margins_of(self.weigher) if self.without is None else None
        for joined in self.join.batches(piece, None if self.without is None else (self.table, self.without)):
            rows, of_batch = _weigh_batch(joined, self.weigher, margins)
            statistics = merge_statistics(statistics, of_batch) if statistics else of_batch
            writer.write(rows)
        return WeighedRange(writer.finish_part(), statistics, None if margins is None else margins.collected)


@dataclass(frozen=True)
class _RangeCollector(Generic[_Part]):
    """Makes something of the joined columns of one range."""

    join: Join
    collect: Callable[[Batches], _Part]
    logps_only: bool = False

    def __call__(self, piece: KeyRange) -> _Part:
        return self.collect(map(_lists, self.join.batches(piece, logps_only=self.logps_only)))


def still_has_all(join: Join, table: Table, version: int, spread: Spread) -> bool:
    """Return whether every pair of a weight dataset is still in all tables of the join, as it was published."""
    return all(spread(partial(join.still_has, table, version), join.ranges()))


class WeighedRows(NamedTuple):
    """The rows of a new version in shards that nobody sees yet."""

    appended_to: int | None
    """The version whose rows stay; None if the shards are all there is."""
    shards: list[ShardRecord]
    statistics: Statistics | None
    """Of the whole version; None if it has no pairs."""


def weigh_rows(
    join: Join, weigher: Weigher, table: Table, base: int | None, before: Statistics | None, spread: Spread
) -> WeighedRows:
    """Weigh and write all pairs, or those that version `base` lacks if its own are still as they were published.

    `before` are the statistics of that version.

    Raises:
        InputError: As `with_fits`.
        MismatchError: A list is not as long as its ids, or a value cannot be weighed.
        StoreError: The table cannot be written.
    """
    ranges = join.ranges()
    appended_to = base if base is not None and still_has_all(join, table, base, spread) else None

    def over_all(collect: Callable[[Batches], _Part]) -> Iterator[_Part]:
        return spread(_RangeCollector(join, collect), ranges)

    weigher = with_fits(weigher, over_all)
    margins, writer = margins_of(weigher), table.writer()
    statistics = before.copy() if before is not None and appended_to is not None else None
    started = time.monotonic()
    for num_done, found in enumerate(spread(RangeWeigher(join, weigher, table, appended_to), ranges), 1):
        writer.take(found.written)
        if len(ranges) > 1:
            show(Progress("weigh", num_done, len(ranges), time.monotonic() - started, "ranges of pairs"))
        if found.margins is not None:
            margins.merge(found.margins)
        if found.statistics is not None:
            statistics = merge_statistics(statistics, found.statistics) if statistics else found.statistics
    shards = writer.finish()
    if statistics is None:
        return WeighedRows(appended_to, shards, None)
    if weigher.curves:
        statistics["mean_weight_by_position"] = {side: curve.tolist() for side, curve in weigher.curves.items()}
    if weigher.head is not None:
        statistics["head"] = weigher.head.record
    if weigher.spreads:
        statistics["spread"] = dict(weigher.spreads)
    if margins.estimators and statistics.get("num_unpaired_rows") == statistics["num_pairs"]:
        statistics["held_out"] = dict.fromkeys(margins.estimators, _NO_MARGINS)
    elif margins.estimators:
        if appended_to is not None and margins.can_measure:
            # Figures of two sets of pairs cannot be merged exactly: the fit needs all margins, and a version keeps none.
            for part in spread(_RangeCollector(join, partial(collect_margins, weigher, None), logps_only=True), ranges):
                margins.merge(part)
        statistics["held_out"] = margins.records(weigher.scales, weigher.section.spreads)
    return WeighedRows(appended_to, shards, statistics)


def _weigh_batch(joined: pl.DataFrame, weigher: Weigher, margins: Margins | None) -> tuple[pa.Table, Statistics]:
    lists = _lists(joined)
    columns = {name: lists[name] for name in WEIGHTS.names if name in lists.column_names}
    sides = weigher.sides(lists)
    for side, (_, weighed) in sides.items():
        offsets = np.asarray(one_chunk(lists[f"{side}_ids"]).offsets)
        columns[f"{side}_token_weights"] = pa.ListArray.from_arrays(
            pa.array(offsets - offsets[0]), pa.array(weighed.token_weights)
        )
    if margins is not None:
        margins.add(lists, {side: scores for side, (scores, _) in sides.items()})
    of_pairs = pair_weights(weigher.section, lists, sides)
    columns["pair_weight"] = pa.array(of_pairs)
    for column in WEIGHTS:
        if column.nullable and column.name not in columns:
            columns[column.name] = pa.nulls(joined.height, column.type)
    return pa.table(columns), count_up(joined, sides, of_pairs if weigher.section.pair_weight != "none" else None)


def _lists(joined: pl.DataFrame) -> pa.Table:
    """Return a join as an Arrow table with the types of the store: Polars hands out 64-bit offsets."""
    kinds = {field.name: field.type for schema in (WEIGHTS, ATTRIBUTIONS, ANNOTATIONS) for field in schema}
    schema = pa.schema([(name, kinds.get(name, FLOATS)) for name in joined.columns])
    return joined.to_arrow().cast(schema).combine_chunks()
