"""Compares two weight datasets: settings field by field, pairs, weights token by token, pair weights and anchors.

Both are read range by range of `pair_id`, so memory stays bounded however large they are.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from weights_store.errors import DamageError
from weights_store.fingerprint import explain_difference
from weights_store.schemas import SIDES
from weights_store.tables.table import Table

_PAIR = "pair"
"""Used like a side: the weight of a pair is compared like that of a response with one token."""
_NUM_LARGEST = 10
_ROUNDING = 1e-12
_CHANGES = {
    "pair_id": pl.String,
    "side": pl.String,
    "mean_a": pl.Float64,
    "mean_b": pl.Float64,
    "mean_abs_change": pl.Float64,
    "max_abs_change": pl.Float64,
}
_SUMS = ("num_tokens", "num_tokens_changed", "total", "a", "b", "aa", "bb", "ab")
"""Per side: tokens, those whose weight changed, and sums of |b - a|, a, b, a², b² and ab."""


@dataclass(frozen=True)
class SideDiff:
    """Changes of one side's weights over the pairs that can be compared, or of pair weights: a pair counts as one token.

    The means and the maximum are None if there was no token, and Pearson's correlation also if the weights of `a` or of `b` are
    all equal.
    """

    num_tokens: int
    num_tokens_changed: int
    mean_abs_change: float | None = None
    max_abs_change: float | None = None
    mean_a: float | None = None
    mean_b: float | None = None
    correlation: float | None = None


@dataclass(frozen=True)
class Diff:
    """The difference of two versions of weight datasets, from `a` to `b`.

    `settings` has one line per field of their identities that differs. `num_not_comparable` counts the common pairs whose
    response ids differ: their weights belong to other tokens. Of the others, `num_anchors_changed` have an anchor with other
    tokens, or in one dataset only. `largest` has the (pair, side)s whose token weights changed most, by mean.
    """

    a: str
    b: str
    settings: list[str]
    num_common: int
    num_only_in_a: int
    num_only_in_b: int
    num_not_comparable: int
    chosen: SideDiff
    rejected: SideDiff
    pair_weights: SideDiff
    num_anchors_changed: int
    largest: pl.DataFrame

    @property
    def is_empty(self) -> bool:
        """Whether both hold the same pairs with the same weights and anchors; settings may still differ."""
        weights = sum(side.num_tokens_changed for side in (self.chosen, self.rejected, self.pair_weights))
        pairs = self.num_only_in_a + self.num_only_in_b + self.num_not_comparable
        return not (weights or pairs or self.num_anchors_changed)


def diff_tables(a: Table, version_a: int, b: Table, version_b: int, max_bytes: int = 1 << 30) -> Diff:
    """Compare two versions, see `WeightStore.diff`. `max_bytes` is the memory for one range of pairs."""
    counts: Counter[str] = Counter()
    sums: list[pl.DataFrame] = []
    largest = pl.DataFrame(schema=_CHANGES)
    for old, new in _ranges(a, version_a, b, version_b, max_bytes):
        common = old.join(new, on="pair_id", suffix="_b")
        same_ids = pl.all_horizontal(pl.col(f"{side}_ids") == pl.col(f"{side}_ids_b") for side in SIDES)
        comparable = common.filter(same_ids)
        counts["common"] += common.height
        counts["only_in_a"] += old.height - common.height
        counts["only_in_b"] += new.height - common.height
        counts["not_comparable"] += common.height - comparable.height
        counts["anchors_changed"] += comparable.filter(pl.col("anchor_ids").ne_missing(pl.col("anchor_ids_b"))).height
        changes = pl.concat([_changes(comparable, side) for side in (*SIDES, _PAIR)])
        sums.append(_sum(changes))
        changed = changes.filter(pl.col("max_abs_change") > 0, pl.col("side") != _PAIR).select(*_CHANGES)
        order = ["mean_abs_change", "max_abs_change", "pair_id", "side"]
        ranked = pl.concat([largest, changed]).sort(order, descending=[True, True, False, False])
        largest = ranked.head(_NUM_LARGEST)
    sides = {row["side"]: row for row in _sum(pl.concat(sums)).to_dicts()}
    names = f"{a.path}@{version_a}", f"{b.path}@{version_b}"
    chosen, rejected, pair_weights = (_side_diff(sides.get(side), *names) for side in (*SIDES, _PAIR))
    return Diff(
        *names,
        settings=explain_difference(
            a.metadata(version_a).get("identity", {}), b.metadata(version_b).get("identity", {})
        ),
        num_common=counts["common"],
        num_only_in_a=counts["only_in_a"],
        num_only_in_b=counts["only_in_b"],
        num_not_comparable=counts["not_comparable"],
        chosen=chosen,
        rejected=rejected,
        pair_weights=pair_weights,
        num_anchors_changed=counts["anchors_changed"],
        largest=largest,
    )


def _sum(changes: pl.DataFrame) -> pl.DataFrame:
    """Return one row per side: `_SUMS` and the largest change."""
    return changes.group_by("side").agg(pl.sum(*_SUMS), pl.max("max_abs_change"))


def _side_diff(sums: Mapping[str, Any] | None, a: str, b: str) -> SideDiff:
    if sums is None or not sums["num_tokens"]:
        return SideDiff(0, 0)
    number = sums["num_tokens"]
    if not math.isfinite(sums["aa"] + sums["bb"]):
        raise DamageError(
            f"{sums['side']} weights of {a} or {b} are not all finite numbers; `tokenweights verify --rows` names the pairs"
        )
    return SideDiff(
        num_tokens=number,
        num_tokens_changed=sums["num_tokens_changed"],
        mean_abs_change=sums["total"] / number,
        max_abs_change=sums["max_abs_change"],
        mean_a=sums["a"] / number,
        mean_b=sums["b"] / number,
        correlation=correlation(number, sums),
    )


def correlation(number: int, sums: Mapping[str, float]) -> float | None:
    """Return Pearson's correlation of `number` pairs of numbers, from their sums `a`, `b`, `aa`, `bb` and `ab`.

    None if there are none, or if all of `a` or all of `b` are equal but for rounding.
    """
    if not number:
        return None
    spread_a, spread_b = (sums[2 * name] - sums[name] ** 2 / number for name in "ab")
    if spread_a <= _ROUNDING * sums["aa"] or spread_b <= _ROUNDING * sums["bb"]:
        return None
    return float((sums["ab"] - sums["a"] * sums["b"] / number) / math.sqrt(spread_a * spread_b))


def _ranges(
    a: Table, version_a: int, b: Table, version_b: int, max_bytes: int
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Yield both tables' ids and weights, one range of pairs after the other."""
    names = ["pair_id", "anchor_ids", *(f"{side}_{what}" for side in SIDES for what in ("ids", "token_weights"))]
    columns = [*names, pl.concat_list("pair_weight").alias(f"{_PAIR}_token_weights")]
    sizes = [sum(record.num_bytes for record in t.records(v)) for t, v in ((a, version_a), (b, version_b))]
    larger, version = (a, version_a) if sizes[0] >= sizes[1] else (b, version_b)
    for piece in larger.key_ranges(max_bytes, version, num_bytes=sum(sizes)):
        old, new = (t.scan(v, within=piece).select(columns).collect() for t, v in ((a, version_a), (b, version_b)))
        yield old, new


def _changes(comparable: pl.DataFrame, side: str) -> pl.DataFrame:
    """Return one row per pair with tokens on a side: `_SUMS` over them, the means of both, mean and maximum of the changes."""
    wide = pl.List(pl.Float64)
    a, b = (pl.col(f"{side}_token_weights{suffix}").cast(wide) for suffix in ("", "_b"))
    change = (b - a).list.eval(pl.element().abs())
    return comparable.select(
        "pair_id",
        side=pl.lit(side),
        num_tokens=change.list.len(),
        num_tokens_changed=change.list.eval(pl.element() > 0).list.sum(),
        total=change.list.sum(),
        a=a.list.sum(),
        b=b.list.sum(),
        aa=(a * a).list.sum(),
        bb=(b * b).list.sum(),
        ab=(a * b).list.sum(),
        mean_a=a.list.mean(),
        mean_b=b.list.mean(),
        mean_abs_change=change.list.mean(),
        max_abs_change=change.list.max(),
    ).filter(pl.col("num_tokens") > 0)
