"""Stage publish: join ids, reference log-probs and weights into a weight dataset, and commit a version.

A version is a function of its lineage: the same tokens, log-probs and settings give the same fingerprint, and the newest
version with that fingerprint is returned as it is. Rows that are new are weighed and appended; changed settings write all rows
anew. The join goes range by range of pair_ids, in bounded memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.provenance import provenance
from pipeline.recipe import Recipe, WeightsSection
from pipeline.weigh import ClampSettings, Side, SideScores, SideWeights, select, token_keys, weigh
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError, MismatchError, StoreError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.key_ranges import KeyRange
from weights_store.location import one_line
from weights_store.schemas import FLOATS, SCHEMA_VERSION, TOKENS, WEIGHTS, Reason
from weights_store.shards import ShardRecord

_SIDES: tuple[Side, Side] = ("chosen", "rejected")
_LATER_COLUMNS = WEIGHTS.names[WEIGHTS.names.index("split") + 1 :]
"""Columns that came after the first stores were written."""
_RANGE_BYTES = 512 << 20
_MAX_TRIES = 5


@dataclass(frozen=True)
class Ingredients:
    """Versions of the tables a weight dataset is made of; the pair's only where the estimator needs them."""

    tokens: TableVersion
    ref_logps: TableVersion
    positive_logps: TableVersion | None = None
    negative_logps: TableVersion | None = None

    def by_role(self) -> dict[str, TableVersion]:
        """Return the references that are there, by role."""
        roles = ("tokens", "ref_logps", "positive_logps", "negative_logps")
        return {role: reference for role in roles if (reference := getattr(self, role)) is not None}


@dataclass(frozen=True)
class Published:
    """What publish hands on."""

    weights: TableVersion
    name: str
    statistics: dict[str, Any]
    changes: list[str]
    is_new: bool
    parity: dict[str, Any] | None = None
    """How the reference's log-probs compare with transformers', see `parity.check_stored`; None where nobody has looked."""


def publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool = False,
    report: Callable[[str], None] = print,
    check: Callable[[], dict[str, Any]] = dict,
) -> Published:
    """Weigh every pair that has all its scores and publish the result as `weights/<name>`.

    Args:
        recipe: The build, recorded as it is.
        weights: Name, estimator and settings; usually the recipe's own.
        ingredients: What to join.
        expect_same: Refuse to make a version with other settings than the newest one's.
        report: Gets a line or two.
        check: Called once a new version turns out to be needed, before anything is weighed. May refuse by raising; what it
            returns is recorded, see `parity.check_stored`.

    Raises:
        InputError: No pair has all its scores, or `expect_same` and the settings differ.
        MismatchError: A list of log-probs is not as long as its ids, or what `check` raises.
        ConflictError: Other builds of the same dataset kept winning the race for the next version.
    """
    for attempt in range(_MAX_TRIES):
        try:
            return _publish(recipe, weights, ingredients, expect_same, report, check)
        except ConflictError:  # another build was faster: it may have made this very version
            if attempt == _MAX_TRIES - 1:
                raise
    raise AssertionError("the loop above returns or raises")


def _publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool,
    report: Callable[[str], None],
    check: Callable[[], dict[str, Any]],
) -> Published:
    store = WeightStore(ingredients.tokens.store)
    wanted = Wanted.of(recipe, weights, ingredients)
    table, base, newest = wanted.table, wanted.base, wanted.newest
    tokens_metadata = store.table(ingredients.tokens.table).metadata(ingredients.tokens.version)
    if newest and wanted.is_there:
        # The pairs are the same, and bad rows may still have come or gone.
        statistics = _with_balance(newest["statistics"], tokens_metadata["statistics"])
        return Published(
            table.reference(base),
            weights.name,
            statistics,
            newest["changes"],
            is_new=False,
            parity=newest.get("parity"),
        )
    if wanted.made_differently and expect_same:
        raise InputError(
            f"weights/{weights.name}@{base} was made differently: {'; '.join(wanted.made_differently)}. "
            "Give the result another weights.name, or leave --expect-same out"
        )

    checked = check()
    join = _Join(store, ingredients)
    appended_to = wanted.appended_to(ingredients)
    shards, statistics = _write_rows(join, table, weights, appended_to)
    if newest and appended_to is not None:
        statistics = merge_statistics(newest["statistics"], statistics) if statistics else newest["statistics"]
    if not statistics:
        raise InputError(f"no pair of {ingredients.tokens} has all its scores; nothing to publish")
    metadata = {
        "fingerprint": wanted.fingerprint,
        "identity": wanted.identity,
        "recipe": recipe.model_copy(update={"weights": weights}).model_dump(),
        "parents": [{"role": role, **parent.as_parent()} for role, parent in ingredients.by_role().items()],
        "tokenizer": tokens_metadata["tokenizer"],
        **_reference(recipe, store.table(ingredients.ref_logps.table).metadata(ingredients.ref_logps.version)),
        **checked,
        "statistics": _with_balance(statistics, tokens_metadata["statistics"]),
        "changes": wanted.changes,
        **provenance(),
    }
    reference = table.commit(shards, metadata, base, mode="overwrite" if newest and appended_to is None else "append")
    report(
        f"published {reference}: {statistics['num_pairs']} pairs, {statistics['num_response_tokens']} response tokens, "
        f"{sum(shard.num_rows for shard in shards)} pairs weighed"
    )
    return Published(
        reference, weights.name, metadata["statistics"], wanted.changes, is_new=True, parity=checked.get("parity")
    )


def _reference(recipe: Recipe, scored: dict[str, Any]) -> dict[str, Any]:
    """Return whose log-probs stand in a version, from the commit of their table, where that says it."""
    scorer = scored.get("scorer")
    if scorer is None:
        return {}
    return {"reference": {"model_fingerprint": scorer["model"], "dtype": scorer["dtype"], "model": recipe.model.path}}


@dataclass(frozen=True)
class Wanted:
    """A version to be, against the newest one of the same name: what is there already, and what differs."""

    table: Table
    identity: dict[str, Any]
    base: int | None
    newest: dict[str, Any] | None
    """What version `base` recorded."""

    @classmethod
    def of(cls, recipe: Recipe, weights: WeightsSection, ingredients: Ingredients) -> "Wanted":
        """Look up the newest version of `weights.name`."""
        table = WeightStore(ingredients.tokens.store).table(f"weights/{weights.name}")
        parents = ingredients.by_role()
        identity = {
            "schema_version": SCHEMA_VERSION,
            "settings": recipe.model_copy(update={"weights": weights}).result_settings(),
            "tables": {role: parent.table for role, parent in parents.items()},
            "data": {role: parent.fingerprint for role, parent in parents.items()},
        }
        base = table.version()
        return cls(table, identity, base, table.metadata(base) if base is not None else None)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the version to be."""
        return fingerprint(self.identity)

    @property
    def is_there(self) -> bool:
        """Whether the newest version is this very one."""
        return self.newest is not None and self.newest["fingerprint"] == self.fingerprint and not self.lacks_columns

    @property
    def lacks_columns(self) -> bool:
        """Whether the newest version was written before tables had columns for scores and the reference's top k."""
        return self.newest is not None and "ref_top_k" not in self.newest["statistics"]

    @property
    def changes(self) -> list[str]:
        """What differs from the newest version, field by field."""
        if self.newest is None:
            return []
        columns = [f"columns: new are {', '.join(_LATER_COLUMNS)}"] if self.lacks_columns else []
        return [*explain_difference(self.newest["identity"], self.identity), *columns]

    @property
    def made_differently(self) -> list[str]:
        """The changes of settings: neither new pairs nor new columns bring them."""
        return [change for change in self.changes if not change.startswith(("data.", "columns:"))]

    def appended_to(self, ingredients: Ingredients) -> int | None:
        """Return the version whose rows all stay, to which new ones are added; None where all rows are written anew."""
        if self.newest is None or self.made_differently or self.lacks_columns:
            return None
        join = _Join(WeightStore(ingredients.tokens.store), ingredients)
        return self.base if join.has_all_of(self.table, self.base) else None


def _with_balance(statistics: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """Add where every source row went: rows in = published + quarantined."""
    quarantined = dict(prepared["quarantined"])
    unscorable = prepared["num_pairs"] - statistics["num_pairs"]
    if unscorable:
        quarantined[Reason.UNSCORABLE.value] = unscorable
    return {**statistics, "num_source_rows": prepared["num_source_rows"], "quarantined": quarantined}


class _Join:
    """The pairs that have all their scores, ids and log-probs side by side, one range of pair_ids at a time."""

    def __init__(self, store: WeightStore, ingredients: Ingredients) -> None:
        self.tokens = store.table(ingredients.tokens.table)
        self.version = ingredients.tokens.version
        self.logps = {
            role: (store.table(reference.table), reference.version)
            for role in ("ref", "positive", "negative")
            if (reference := getattr(ingredients, f"{role}_logps")) is not None
        }

    def ranges(self) -> list[KeyRange]:
        """Return ranges that fit into memory."""
        tables = [(self.tokens, self.version), *self.logps.values()]
        num_bytes = sum(record.num_bytes for table, version in tables for record in table.records(version))
        return self.tokens.key_ranges(_RANGE_BYTES, self.version, num_bytes)

    def read(self, piece: KeyRange, without: pl.LazyFrame | None = None) -> pl.DataFrame:
        """Return the pairs of a range by pair_id, apart from those in `without`.

        Raises:
            MismatchError: A list of log-probs is not as long as its ids.
        """
        columns = [name for name in WEIGHTS.names if name in TOKENS.names]
        frame = piece.of(self.tokens.scan(self.version)).select(columns)
        if without is not None:
            frame = frame.join(piece.of(without).select("pair_id"), on="pair_id", how="anti")
        for role, (table, version) in self.logps.items():
            frame = frame.join(_named_for(role, piece.of(table.scan(version))), on="pair_id", how="inner")
        joined = frame.sort("pair_id").collect()
        for role in self.logps:
            for side in _SIDES:
                _check_lengths(joined, f"{side}_ids", f"{side}_{role}_logps")
        return joined

    def has_all_of(self, table: Table, version: int | None) -> bool:
        """Return whether every pair of another table is still here."""
        for piece in table.key_ranges(_RANGE_BYTES, version):
            left = piece.of(table.scan(version)).select("pair_id")
            for here, at in ((self.tokens, self.version), *self.logps.values()):
                lost = left.join(piece.of(here.scan(at)).select("pair_id"), on="pair_id", how="anti")
                if not lost.head(1).collect().is_empty():
                    return False
        return True


def _named_for(role: str, logps: pl.LazyFrame) -> pl.LazyFrame:
    """Return what a weight dataset takes from the log-probs of one role, under the names that it has there."""
    names = {f"{side}_logps": f"{side}_{role}_logps" for side in _SIDES}
    if role == "ref":  # tables written before top k had columns do not have them
        there = logps.collect_schema().names()
        tops = [f"{side}_top_{what}" for side in _SIDES for what in ("ids", "logps")]
        names |= {name: name.replace("_top_", "_ref_top_") for name in tops if name in there}
    return logps.select("pair_id", *names).rename(names)


def _write_rows(
    join: _Join, table: Table, weights: WeightsSection, appended_to: int | None
) -> tuple[list[ShardRecord], dict[str, Any]]:
    """Weigh and write the pairs that version `appended_to` does not have yet, all by default; nothing is visible yet."""
    writer = table.writer()
    statistics: dict[str, Any] = {}
    present = table.scan(appended_to) if appended_to is not None else None
    try:
        for piece in join.ranges():
            joined = join.read(piece, without=present)
            if joined.is_empty():
                continue
            rows, of_piece = _weighed_rows(joined, weights)
            statistics = merge_statistics(statistics, of_piece) if statistics else of_piece
            writer.write(rows)
        return writer.finish(), statistics
    except OSError as error:
        raise StoreError(
            f"cannot write {table.path} in {table.root}: {one_line(error)}; nothing became visible"
        ) from error


def _weighed_rows(joined: pl.DataFrame, weights: WeightsSection) -> tuple[pa.Table, dict[str, Any]]:
    lists = joined.to_arrow().cast(_arrow_schema(joined)).combine_chunks()
    columns = {name: lists[name] for name in WEIGHTS.names if name in lists.column_names}
    per_side: dict[str, tuple[SideScores, SideWeights]] = {}
    for side in _SIDES:
        scores = _side_scores(lists, side, with_keys=weights.estimator == "random")
        weighed = _weigh(scores, weights)
        per_side[side] = (scores, weighed)
        offsets = np.asarray(_one(lists[f"{side}_ids"]).offsets)
        columns[f"{side}_token_weights"] = pa.ListArray.from_arrays(
            pa.array(offsets - offsets[0]), pa.array(weighed.token_weights), type=FLOATS
        )
    columns["pair_weight"] = pa.array(np.ones(joined.height, dtype=np.float32))
    for field in WEIGHTS:
        if field.nullable and field.name not in columns:  # nothing has made it
            columns[field.name] = pa.nulls(joined.height, field.type)
    rows = pa.table({name: columns[name] for name in WEIGHTS.names}).cast(WEIGHTS)
    return rows, _statistics(joined, per_side)


def _weigh(scores: SideScores, weights: WeightsSection) -> SideWeights:
    if weights.estimator == "sepo":
        return select(scores, weights.share)
    settings = ClampSettings(weights.k, weights.mu, weights.lower, weights.upper, weights.seed)
    return weigh(scores, weights.estimator, settings)


def _arrow_schema(joined: pl.DataFrame) -> pa.Schema:
    """Return the types of the store for the columns of a join: Polars hands out 64-bit offsets."""
    kinds = {field.name: field.type for field in WEIGHTS}
    return pa.schema([(name, kinds.get(name, FLOATS)) for name in joined.columns])


def _one(column: pa.ChunkedArray) -> pa.Array:
    assert column.num_chunks == 1, "combined above, and never empty"
    return column.chunk(0)


def _check_lengths(joined: pl.DataFrame, ids: str, logps: str) -> None:
    bad = joined.filter(pl.col(ids).list.len() != pl.col(logps).list.len())
    if bad.height:
        row = bad.row(0, named=True)
        raise MismatchError(
            f"pair {row['pair_id']}: {len(row[logps])} values in {logps} for {len(row[ids])} {ids}; "
            f"{bad.height} such pairs. Delete the logps table and build again"
        )


def _top_k(joined: pl.DataFrame) -> int:
    """Return how many of the reference's likeliest tokens are stored for each place, 0 where none are.

    Raises:
        MismatchError: The lists are not one whole number times as long as the ids, the same for all pairs.
    """
    names = [name for name in joined.columns if "_ref_top_" in name]
    if not names:
        return 0
    lengths = (
        (pl.col(name).list.len() / pl.col(f"{name.split('_')[0]}_ids").list.len()).fill_null(0) for name in names
    )
    counts = joined.select("pair_id", *lengths).unpivot(index="pair_id", value_name="k")
    k = counts["k"][0]
    bad = counts.filter((pl.col("k") != k) | (pl.col("k") % 1 != 0))
    if bad.height:
        pair_id, name, found = bad.row(0)
        raise MismatchError(
            f"pair {pair_id}: {found:g} values per token in {name}, expected {k:g} as elsewhere, a whole number; "
            f"{bad.height} such lists. Delete the reference's logps table and build again"
        )
    return int(k)


def _side_scores(lists: pa.Table, side: Side, with_keys: bool) -> SideScores:
    """Return the flat arrays of one side, without copying."""

    def flat(role: str) -> np.ndarray | None:
        column = f"{side}_{role}_logps"
        return _one(lists[column]).flatten().to_numpy() if column in lists.column_names else None

    ids = _one(lists[f"{side}_ids"])
    lengths = np.diff(np.asarray(ids.offsets))
    keys = token_keys(lists["pair_id"].to_pylist(), side, lengths) if with_keys else None
    return SideScores(side, len(ids.flatten()), flat("positive"), flat("negative"), lengths, keys)


def _statistics(joined: pl.DataFrame, per_side: dict[str, tuple[SideScores, SideWeights]]) -> dict[str, Any]:
    statistics: dict[str, Any] = {
        "num_pairs": joined.height,
        "num_prompt_tokens": int(joined["prompt_ids"].list.len().sum()),
        "num_response_tokens": sum(len(weighed.token_weights) for _, weighed in per_side.values()),
        "num_scored_pairs": joined.drop_nulls(["chosen_score", "rejected_score"]).height,
        "ref_top_k": _top_k(joined),
    }
    for side, (scores, weighed) in per_side.items():
        num_tokens = len(weighed.token_weights)
        statistics[side] = {
            "num_tokens": num_tokens,
            "mean_weight": float(weighed.token_weights.mean(dtype=np.float64)),
            "min_weight": float(weighed.token_weights.min()),
            "max_weight": float(weighed.token_weights.max()),
            "share_at_lower": weighed.num_at_lower / num_tokens,
            "share_at_upper": weighed.num_at_upper / num_tokens,
        }
        if scores.positive_logps is not None and scores.negative_logps is not None:
            means = (logps.mean(dtype=np.float64) for logps in (scores.positive_logps, scores.negative_logps))
            statistics[side]["mean_logratio"] = float(next(means) - next(means))
    return {**statistics, "constant_weights": _are_constant(statistics)}


_COUNTS = ("num_pairs", "num_prompt_tokens", "num_response_tokens", "num_scored_pairs")


def merge_statistics(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return the statistics of the pairs of both, which have none in common."""
    merged = {name: left[name] + right[name] for name in _COUNTS}
    merged["ref_top_k"] = min(left["ref_top_k"], right["ref_top_k"])  # the same in all rows of one reference's table
    for side in _SIDES:
        one, other = left[side], right[side]
        num_tokens = one["num_tokens"] + other["num_tokens"]
        means = [name for name in one if name.startswith(("mean_", "share_"))]
        merged[side] = {
            "num_tokens": num_tokens,
            "min_weight": min(one["min_weight"], other["min_weight"]),
            "max_weight": max(one["max_weight"], other["max_weight"]),
            **{n: (one[n] * one["num_tokens"] + other[n] * other["num_tokens"]) / num_tokens for n in means},
        }
    return {**merged, "constant_weights": _are_constant(merged)}


def _are_constant(statistics: dict[str, Any]) -> bool:
    return len({statistics[side][end] for side in _SIDES for end in ("min_weight", "max_weight")}) == 1
