"""One version of a weight dataset with the tables that it was made from, as one row per pair with lists of every measure.

Read range by range of `pair_id`, so that memory stays bounded; a table is opened only if a column of it is asked for.
"""

import operator
from collections.abc import Collection, Iterator
from functools import reduce
from typing import NamedTuple

import polars as pl

from weights_store.catalog import open_table
from weights_store.location import Location
from weights_store.names import base_role
from weights_store.schemas import SIDES, WEIGHTS
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion

_CONTRASTIVE = {"logp_pos": "positive_logps", "logp_neg": "negative_logps"}  # measure to role
_LIST = pl.List(pl.Float64)


class Source(NamedTuple):
    """One version of one table."""

    table: Table
    version: int

    def scan(self, within: KeyRange) -> pl.LazyFrame:
        """Return its rows in a range of pairs, checked."""
        return self.table.scan(self.version, within=within)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(record.num_bytes for record in self.table.records(self.version))


class PairTables:
    """One version of a weight dataset, and what its commit says it was made from.

    Raises:
        NotFoundError: When rows are read: a table that the weights were made from is gone.
    """

    def __init__(self, root: Location, weights: TableVersion) -> None:
        table = open_table(root, weights.table)
        self.metadata = table.metadata(weights.version)
        self.weights = Source(table, weights.version)
        parents = {
            parent["role"]: Source(open_table(root, parent["table"]), parent["version"])
            for parent in self.metadata.get("parents", [])
        }
        self._tokens, self._attributions = parents.get("tokens"), parents.get("attributions")
        self._logps = {
            measure: [source for role, source in parents.items() if base_role(role) == wanted]
            for measure, wanted in _CONTRASTIVE.items()
        }

    @property
    def has_contrast(self) -> bool:
        """Whether the weights were made with a contrastive pair."""
        return all(self._logps.values())

    @property
    def measures(self) -> list[str]:
        """The names of `MEASURES` that these pairs have, in their order."""
        contrast = ["logratio", *_CONTRASTIVE] if self.has_contrast else []
        return ["weight", *contrast, "ref_logp", "surprise", *(["attribution"] if self._attributions else [])]

    @property
    def columns(self) -> list[str]:
        """All columns of `scan` that a condition can name: those of the weights table, and what they are good for."""
        return [*WEIGHTS.names, *(["source_row"] if self._tokens else []), *self._made()]

    def ranges(self, names: Collection[str], *more: Source, max_bytes: int = 1 << 28) -> list[KeyRange]:
        """Cut the pairs into ranges of which one takes about `max_bytes`, read with `names` and from `more`."""
        sources = [self.weights, *more, *(source for _, found in self._wanted(names) for source in found)]
        largest = max((self.weights, *more), key=lambda source: source.num_bytes)
        num_bytes = sum(source.num_bytes for source in sources)
        return largest.table.key_ranges(max_bytes, largest.version, num_bytes=num_bytes)

    def scan(self, within: KeyRange, names: Collection[str]) -> pl.LazyFrame:
        """Return one row per pair with some columns of `columns`, or `{side}_{measure}` lists of log-probs and attributions.

        A pair that lacks a row in one of the tables has nulls there.
        """
        rows = self.weights.scan(within)
        for measure, sources in self._wanted(names):
            for number, source in enumerate(sources):
                rows = rows.join(_renamed(source.scan(within), measure, number), on="pair_id", how="left")
            if measure != "source_row":
                rows = rows.with_columns(
                    (
                        reduce(operator.add, (pl.col(f"{side}_{measure}{n}") for n in range(len(sources))))
                        / len(sources)
                    ).alias(f"{side}_{measure}")
                    for side in SIDES
                )
        made = {name: expression for name, expression in self._made().items() if name in names}
        return rows.with_columns(**made).select("pair_id", *(name for name in names if name != "pair_id"))

    def _made(self) -> dict[str, pl.Expr]:
        """Return the columns that no table has."""
        made = {f"num_{part}_tokens": pl.col(f"{part}_ids").list.len().cast(pl.Int64) for part in ("prompt", *SIDES)}
        made |= {f"mean_{side}_weight": pl.col(f"{side}_token_weights").cast(_LIST).list.mean() for side in SIDES}
        made["effective_share"] = pl.mean_horizontal(map(_effective_share, SIDES))
        if self.has_contrast:
            chosen, rejected = (
                pl.col(f"{side}_logp_pos").cast(_LIST).list.sum() - pl.col(f"{side}_logp_neg").cast(_LIST).list.sum()
                for side in SIDES
            )
            made["pair_logratio"] = chosen - rejected
        return made

    def _wanted(self, names: Collection[str]) -> Iterator[tuple[str, list[Source]]]:
        """Yield the measures that `names` need from other tables, with these tables."""
        text = " ".join(names)
        for measure, sources in self._logps.items():
            if sources and (measure in text or "pair_logratio" in names):
                yield measure, sources
        if self._attributions and "attribution" in text:
            yield "attribution", [self._attributions]
        if self._tokens and "source_row" in names:
            yield "source_row", [self._tokens]


def _renamed(rows: pl.LazyFrame, measure: str, number: int) -> pl.LazyFrame:
    if measure == "source_row":
        return rows.select("pair_id", "source_row")
    stored = "attributions" if measure == "attribution" else "logps"
    return rows.select("pair_id", *(pl.col(f"{side}_{stored}").alias(f"{side}_{measure}{number}") for side in SIDES))


def _effective_share(side: str) -> pl.Expr:
    """Return (Σw)² / (T Σw²) of one side's weights; 1 if all are 0, and so the same; null if there are none."""
    weights = pl.col(f"{side}_token_weights").cast(_LIST)
    share = weights.list.sum() ** 2 / (weights.list.len() * (weights * weights).list.sum())
    return pl.when(weights.list.len() > 0).then(share.fill_nan(1.0))
