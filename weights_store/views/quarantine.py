"""The rows of a dataset that could not be used: which, why, and one example of each reason."""

from itertools import chain

import polars as pl

from weights_store.catalog import check_store, list_tables
from weights_store.errors import NotFoundError, SettingsError
from weights_store.location import Location
from weights_store.names import name_of
from weights_store.schemas import QUARANTINE, Reason


def scan_quarantine(root: Location, dataset: str) -> pl.LazyFrame:
    """Return the unusable rows of a dataset, see `WeightStore.quarantine`."""
    check_store(root)
    dataset = name_of(dataset) if dataset.startswith("quarantine/") else dataset.partition("/")[0]
    tables = {table.path: table for table in list_tables(root, "quarantine")}
    found = [table for path, table in tables.items() if dataset in (name_of(path), _dataset_of(path))]
    if not found:
        known = sorted({_dataset_of(path) for path in chain(tables, _paths(root, "tokens"))})
        raise NotFoundError(
            f"no quarantine of a dataset {dataset!r} in {root}; "
            + (f"it has datasets {', '.join(known)}" if known else "no build has read a source yet")
        )
    frames = [table.scan().select(pl.lit(str(table.reference())).alias("table"), *QUARANTINE.names) for table in found]
    return pl.concat(frames)


def reasons_of(rows: pl.LazyFrame) -> pl.DataFrame:
    """Return one row per table and reason, the most frequent first: `num_rows`, and the columns of its first row."""
    keys = ["table", "reason"]
    counts = rows.group_by(keys).agg(pl.len().alias("num_rows"), pl.col("source_row").min())
    first = rows.join(counts, on=[*keys, "source_row"]).unique([*keys], keep="any")
    order = [*keys, "num_rows", "source_row", "pair_id", "detail", "raw"]
    return first.select(order).collect().sort("table", "num_rows", "reason", descending=[False, True, False])


def rows_of(rows: pl.LazyFrame, reason: str, limit: int) -> tuple[pl.DataFrame, int]:
    """Return the first rows with one reason, at most `limit`, and how many there are.

    Raises:
        SettingsError: There is no such reason, or the limit is below 1.
    """
    if limit < 1:
        raise SettingsError(f"--limit {limit}: expected at least 1 row")
    known = [known.value for known in Reason]
    if reason not in known:
        raise SettingsError(f"no reason {reason!r}: expected one of {', '.join(known)}")
    found = rows.filter(reason=reason)
    first = found.sort("table", "source_row", "detail").head(limit)
    return first.collect(), found.select(pl.len()).collect().item()


def _paths(root: Location, kind: str) -> list[str]:
    return [table.path for table in list_tables(root, kind)]


def _dataset_of(path: str) -> str:
    """Return the dataset of a tokens or quarantine table, whose name ends with a hash of the limits."""
    return name_of(path).rpartition("-")[0]
