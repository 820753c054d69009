"""Laws between the rows of tables: each key once, one number per id, and weights that agree with the tables they come from.

Tables are joined one range of keys at a time. Damaged shards are left out, and nothing is concluded about a row that may be in
one of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import polars as pl

from weights_store.checks.files import SoundTable
from weights_store.checks.findings import Finding
from weights_store.processes.spread import Spread, in_turn
from weights_store.schemas import SIDES
from weights_store.tables.checksums import sum_checksums
from weights_store.tables.key_ranges import KeyRange

JOIN_BYTES = 256 << 20
"""About how much memory one range of a join takes."""
_BYTES_PER_KEY = 64
TOKEN_COLUMNS = {name: name for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_score", "rejected_score")}
REF_COLUMNS = {f"{side}_ref_{what}": f"{side}_{what}" for side in SIDES for what in ("logps", "top_ids", "top_logps")}
ANCHOR_COLUMNS = {"anchor_ids": "anchor_ids", "anchor_ref_logps": "anchor_logps"}
"""Columns of weights, and the columns of tokens, reference log-probs and anchors that they are copied from."""
PER_TOKEN_COLUMNS = {f"{side}_{what}": f"{side}_ids" for side in SIDES for what in ("logps", "attributions", "values")}
"""Columns with one number per id, and the column of the ids."""
_THEIRS = "_of_parent"
_Found = tuple[str, int, Finding]  # a kind of problem, how many pairs have it, and the first of them


def check_keys(table: SoundTable, spread: Spread = in_turn) -> Iterator[Finding]:
    """Yield the first key that occurs more than once, and how many do."""
    num_bytes = _BYTES_PER_KEY * sum(record.num_rows for record in table.records())
    pieces = table.key_ranges(JOIN_BYTES, num_bytes=num_bytes)
    yield from _one_of_each(list(chain.from_iterable(spread(partial(_repeated_keys, table), pieces))))


def _repeated_keys(table: SoundTable, piece: KeyRange) -> list[_Found]:
    counts = table.scan(within=piece).select(table.key).group_by(table.key).agg(count=pl.len())
    with table.reading():
        frame = counts.filter(pl.col("count") > 1).sort(table.key).collect()
    if frame.is_empty():
        return []
    row = frame.row(0, named=True)
    problem = f"occurs {row['count']} times, expected once; build the table again"
    if table.key != ("pair_id",):
        problem = f"{', '.join(f'{name} {row[name]!r}' for name in table.key)} {problem}"
    return [("", frame.height, Finding(table.path, problem, table.version_number, pair_id=row.get("pair_id")))]


def _one_of_each(found: list[_Found]) -> Iterator[Finding]:
    for kind in dict.fromkeys(kind for kind, _, _ in found):
        same = [(count, finding) for other, count, finding in found if other == kind]
        more, first = sum(count for count, _ in same) - 1, same[0][1]
        yield replace(first, problem=f"{first.problem} ({more} more like this)") if more else first


def compare(
    child: SoundTable,
    parents: list[SoundTable],
    columns: Mapping[str, str],
    by_length: bool = False,
    spread: Spread = in_turn,
) -> Iterator[Finding]:
    """Yield, for each column, the first pair that differs from its parent, and the first pair that no parent has.

    Each pair is compared with the first parent that has it. `columns` are those of the child, if it has them, and of the
    parents. With `by_length` the lengths of lists are compared instead of their values.
    """
    columns = {name: theirs for name, theirs in columns.items() if name in child.schema.names}
    if not by_length and len(parents) == 1 and _hold_the_same(child, parents[0], columns):
        return
    largest = max((child, *parents), key=lambda table: table.num_bytes)
    num_bytes = child.num_bytes + max(parent.num_bytes for parent in parents)
    work = _Comparison(child, parents, columns, by_length)
    found = spread(work, largest.key_ranges(JOIN_BYTES, num_bytes=num_bytes))
    yield from _one_of_each(list(chain.from_iterable(found)))


@dataclass(frozen=True)
class _Comparison:
    """Compares the pairs of one range, see `compare`."""

    child: SoundTable
    parents: list[SoundTable]
    columns: Mapping[str, str]
    by_length: bool

    def __call__(self, piece: KeyRange) -> list[_Found]:
        """Return the first pair of each kind of problem in a range."""
        child, found = self.child, list[_Found]()
        ours = _values(child, piece, list(self.columns), self.by_length, "").filter(pl.col("pair_id").is_not_null())
        with child.reading():
            left = ours.collect()
        for parent in self.parents:
            if left.is_empty():
                break
            right = _values(parent, piece, list(self.columns.values()), self.by_length, _THEIRS)
            with parent.reading():
                joined = left.lazy().join(right, on="pair_id").sort("pair_id").collect()
            for name, theirs in self.columns.items():
                bad = joined.filter(pl.col(name).ne_missing(pl.col(f"{theirs}{_THEIRS}")))
                if bad.height:
                    finding = _unlike(child, parent, name, theirs, bad.row(0, named=True), self.by_length)
                    found.append((name, bad.height, finding))
            left = left.join(joined.select("pair_id"), on="pair_id", how="anti")
        if left.height and all(parent.is_whole for parent in self.parents):
            names = " or ".join(parent.name for parent in self.parents)
            problem = f"has no row in {names}, which the table was made from"
            first = str(left["pair_id"].min())
            found.append(("lost", left.height, Finding(child.path, problem, child.version_number, pair_id=first)))
        return found


def _hold_the_same(child: SoundTable, parent: SoundTable, columns: Mapping[str, str]) -> bool:
    """Return whether the checksums in the commits say that both have the same pairs with the same values.

    A column's checksum is a sum over (key, position, value), so it depends on neither the order of rows nor the column's name.
    """
    ours, theirs = (sum_checksums(record.sums for record in table.records()) for table in (child, parent))
    both = {"pair_id": "pair_id", **columns}
    return child.is_whole and parent.is_whole and all(ours.get(a, 0) == theirs.get(b, 1) for a, b in both.items())


def _values(table: SoundTable, piece: KeyRange, names: list[str], by_length: bool, suffix: str) -> pl.LazyFrame:
    columns = [(pl.col(name).list.len() if by_length else pl.col(name)).alias(f"{name}{suffix}") for name in names]
    return table.scan(within=piece).select("pair_id", *columns)


def _unlike(
    child: SoundTable, parent: SoundTable, name: str, theirs: str, row: Mapping[str, Any], is_length: bool
) -> Finding:
    """Describe one row that differs; its values are lists, single values, or lengths of lists."""
    here, there = row[name], row[f"{theirs}{_THEIRS}"]
    if isinstance(here, list) and isinstance(there, list):
        at = next((at for at, (left, right) in enumerate(zip(here, there, strict=False)) if left != right), None)
        if at is not None:
            problem = f"{name}[{at}] is {here[at]}, in {parent.name} it is {there[at]}"
            return Finding(child.path, problem, child.version_number, pair_id=row["pair_id"])
        here, there, is_length = len(here), len(there), True
    if is_length:
        problem = f"{here} {name} for {there} {theirs} of {parent.name}"
    else:
        here, there = (f"a list of {len(v)}" if isinstance(v, list) else v for v in (here, there))
        problem = f"{name} is {here}, in {parent.name} it is {there}"
    return Finding(child.path, problem, child.version_number, pair_id=row["pair_id"])
