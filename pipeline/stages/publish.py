"""Stage publish: join ids, reference log-probs and weights into a weight dataset, and commit a version.

A version is a function of its lineage: the same tokens, log-probs and settings give the same fingerprint, and the newest
version with that fingerprint is returned as it is. Rows that are new are weighed and appended; changed settings write all rows
anew. The join goes range by range of pair_ids, in bounded memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.provenance import provenance
from pipeline.recipe import Recipe, WeightsSection
from pipeline.weighing.statistics import count_up, merge_statistics
from pipeline.weighing.weigh import SIDES, PositionCurves, Weigher, one_chunk, pair_weights
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError, MismatchError, StoreError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.location import one_line
from weights_store.messages import logger
from weights_store.schemas import ATTRIBUTIONS, FLOATS, SCHEMA_VERSION, TOKENS, WEIGHTS, Reason
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_LATER_COLUMNS = WEIGHTS.names[WEIGHTS.names.index("split") + 1 :]
"""Columns that came after the first stores were written."""
_LENGTHS_OF = {
    **{
        f"{side}_{what}": f"{side}_ids"
        for side in SIDES
        for what in ("ref_logps", "positive_logps", "negative_logps", "attributions", "activations")
    },
    "anchor_ref_logps": "anchor_ids",
}
"""Lists of a join, and the ids that each has one value for."""
_RANGE_BYTES = 512 << 20
_BATCH_PAIRS = 16_384
"""Pairs weighed at a time: what is computed on the way takes several times the space of what is stored."""
_MAX_TRIES = 5


@dataclass(frozen=True)
class Ingredients:
    """Versions of the tables a weight dataset is made of; those besides the first two only where the recipe needs them."""

    tokens: TableVersion
    ref_logps: TableVersion
    positive_logps: TableVersion | None = None
    negative_logps: TableVersion | None = None
    attributions: TableVersion | None = None
    anchors: TableVersion | None = None

    def by_role(self) -> dict[str, TableVersion]:
        """Return the references that are there, by role."""
        roles = ("tokens", "ref_logps", "positive_logps", "negative_logps", "attributions", "anchors")
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
    settings: dict[str, Any] | None = None
    """The recipe's [weights] as far as it determines the weights."""


def publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool = False,
    check: Callable[[], dict[str, Any]] = dict,
    tokenizer_folder: Path | None = None,
) -> Published:
    """Weigh every pair that has all its scores and publish the result as `weights/<name>`.

    Args:
        recipe: The build, recorded as it is.
        weights: Name, estimator and settings; usually the recipe's own.
        ingredients: What to join.
        expect_same: Refuse to make a version with other settings than the newest one's.
        check: Called once a new version turns out to be needed, before anything is weighed. May refuse by raising; what it
            returns is recorded, see `parity.check_stored`.
        tokenizer_folder: Where the tokenizer of the pairs is; only read to smooth weights over words.

    Raises:
        InputError: No pair has all its scores, `expect_same` and the settings differ, or the settings need annotators' scores
            or a tokenizer that are not there.
        MismatchError: A list is not as long as its ids, a value cannot be weighed, or what `check` raises.
        ConflictError: Other builds of the same dataset kept winning the race for the next version.
    """
    for attempt in range(_MAX_TRIES):
        try:
            return _publish(recipe, weights, ingredients, expect_same, check, tokenizer_folder)
        except ConflictError:  # another build was faster: it may have made this very version
            if attempt == _MAX_TRIES - 1:
                raise
    raise AssertionError("the loop above returns or raises")


def _publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool,
    check: Callable[[], dict[str, Any]],
    tokenizer_folder: Path | None,
) -> Published:
    store = WeightStore(ingredients.tokens.store)
    wanted = Wanted.of(recipe, weights, ingredients)
    table, base, newest = wanted.table, wanted.base, wanted.newest
    prepared = dict(store.table(ingredients.tokens.table).metadata(ingredients.tokens.version)["statistics"])
    if newest and wanted.is_there:
        return _as_it_stands(wanted, newest, weights.name, prepared)
    if wanted.made_differently and expect_same:
        raise InputError(
            f"weights/{weights.name}@{base} was made differently: {'; '.join(wanted.made_differently)}. "
            "Give the result another weights.name, or leave --expect-same out"
        )

    join = _Join(store, ingredients, weights)
    join.check_annotations()
    weigher = Weigher.of(weights, tokenizer_folder)
    checked = check()
    appended_to = wanted.appended_to(ingredients)
    if "position" in weights.transforms:
        weigher = _with_curves(weigher, join)
    shards, statistics = _write_rows(join, table, weigher, appended_to)
    if newest and appended_to is not None:
        statistics = merge_statistics(newest["statistics"], statistics) if statistics else newest["statistics"]
    if not statistics:
        raise InputError(f"no pair of {ingredients.tokens} has all its scores; nothing to publish")
    if weigher.curves is not None:
        statistics["mean_weight_by_position"] = {side: curve.tolist() for side, curve in weigher.curves.items()}
    metadata = {
        **_lineage(recipe.model_copy(update={"weights": weights}), ingredients, wanted),
        **checked,
        "statistics": _with_balance(statistics, prepared),
        "changes": wanted.changes,
        **provenance(),
    }
    reference = table.commit(shards, metadata, base, mode="overwrite" if newest and appended_to is None else "append")
    _log.info(
        f"published {reference}: {statistics['num_pairs']} pairs, {statistics['num_response_tokens']} response tokens, "
        f"{sum(shard.num_rows for shard in shards)} pairs weighed"
    )
    return Published(
        reference,
        weights.name,
        metadata["statistics"],
        wanted.changes,
        is_new=True,
        parity=checked.get("parity"),
        settings=wanted.settings,
    )


def _as_it_stands(wanted: "Wanted", newest: dict[str, Any], name: str, prepared: dict[str, Any]) -> Published:
    """Return the newest version. Its pairs are the same, and bad rows may still have come or gone."""
    return Published(
        wanted.table.reference(wanted.base),
        name,
        _with_balance(newest["statistics"], prepared),
        newest["changes"],
        is_new=False,
        parity=newest.get("parity"),
        settings=wanted.settings,
    )


def _lineage(recipe: Recipe, ingredients: Ingredients, wanted: "Wanted") -> dict[str, Any]:
    """Return what a version records of how it was made, and of what."""
    tokens, ref_logps = (
        dict(WeightStore(version.store).table(version.table).metadata(version.version))
        for version in (ingredients.tokens, ingredients.ref_logps)
    )
    return {
        "fingerprint": wanted.fingerprint,
        "identity": wanted.identity,
        "recipe": recipe.model_dump(),
        "parents": [{"role": role, **parent.as_parent()} for role, parent in ingredients.by_role().items()],
        "tokenizer": tokens["tokenizer"],
        **_reference(recipe, ref_logps),
    }


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
        if "anchors" not in parents:  # the by-product has none, whatever the recipe says of them
            recipe = recipe.model_copy(update={"anchors": None})
        identity = {
            "schema_version": SCHEMA_VERSION,
            "settings": recipe.model_copy(update={"weights": weights}).result_settings(),
            "tables": {role: parent.table for role, parent in parents.items()},
            "data": {role: parent.fingerprint for role, parent in parents.items()},
        }
        base = table.version()
        return cls(table, identity, base, dict(table.metadata(base)) if base is not None else None)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the version to be."""
        return fingerprint(self.identity)

    @property
    def settings(self) -> dict[str, Any]:
        """The part of [weights] that determines the weights."""
        settings: dict[str, Any] = self.identity["settings"]["weights"]
        return settings

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
        """Return the version whose rows all stay, to which new ones are added; None where all rows are written anew.

        A weight that is divided by the dataset's mean at its position changes with every pair that comes.
        """
        if self.newest is None or self.made_differently or self.lacks_columns:
            return None
        if "position" in self.settings.get("transforms", ()):
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
    """The pairs that have all their scores, ids and scores side by side, one range of pair_ids at a time.

    Args:
        store: Where the ingredients are.
        ingredients: What to join.
        weights: Says which columns are wanted; None where none are read.
    """

    def __init__(self, store: WeightStore, ingredients: Ingredients, weights: WeightsSection | None = None) -> None:
        self.tokens = store.table(ingredients.tokens.table)
        self.version = ingredients.tokens.version
        self.weights = weights
        self.others = {
            role: (store.table(reference.table), reference.version)
            for role, reference in ingredients.by_role().items()
            if role != "tokens"
        }

    def ranges(self) -> list[KeyRange]:
        """Return ranges that fit into memory."""
        tables = [(self.tokens, self.version), *self.others.values()]
        num_bytes = sum(record.num_bytes for table, version in tables for record in table.records(version))
        return self.tokens.key_ranges(_RANGE_BYTES, self.version, num_bytes)

    def batches(self, without: pl.LazyFrame | None = None) -> Iterator[pl.DataFrame]:
        """Yield all pairs by pair_id, apart from those in `without`, some at a time and never none.

        Raises:
            MismatchError: A list is not as long as its ids, or a column that is read is not there.
        """
        for piece in self.ranges():
            yield from self._read(piece, without).iter_slices(_BATCH_PAIRS)

    def _read(self, piece: KeyRange, without: pl.LazyFrame | None) -> pl.DataFrame:
        columns = [name for name in WEIGHTS.names if name in TOKENS.names]
        frame = piece.of(self.tokens.scan(self.version)).select(columns)
        if without is not None:
            frame = frame.join(piece.of(without).select("pair_id"), on="pair_id", how="anti")
        for role, (table, version) in self.others.items():
            wanted = self._wanted(role, piece.of(table.scan(version)))
            frame = frame.join(wanted, on="pair_id", how="inner")
        joined = frame.sort("pair_id").collect()
        for values, ids in _LENGTHS_OF.items():
            if values in joined.columns:
                _check_lengths(joined, ids, values)
        return joined

    def _wanted(self, role: str, rows: pl.LazyFrame) -> pl.LazyFrame:
        """Return what is wanted of one ingredient, under the names that it has in a join."""
        if role == "anchors":
            return rows.select("pair_id", "anchor_ids", pl.col("anchor_logps").alias("anchor_ref_logps"))
        if role == "attributions":
            inputs = self.weights.inputs() if self.weights is not None else set()
            kinds = {"attributions": "attributions", "prompts": "prompt_attribution", "activations": "activations"}
            return rows.select(
                "pair_id", *(f"{side}_{what}" for kind, what in kinds.items() if kind in inputs for side in SIDES)
            )
        role = role.removesuffix("_logps")
        names = {f"{side}_logps": f"{side}_{role}_logps" for side in SIDES}
        if role == "ref":  # tables written before top k had columns do not have them
            there = rows.collect_schema().names()
            tops = [f"{side}_top_{what}" for side in SIDES for what in ("ids", "logps")]
            names |= {name: name.replace("_top_", "_ref_top_") for name in tops if name in there}
        return rows.select("pair_id", *names).rename(names)

    def check_annotations(self) -> None:
        """Refuse to weigh pairs by annotators' scores that some do not have.

        Raises:
            InputError: Some do not.
        """
        if self.weights is None or self.weights.pair_weight != "quality":
            return
        lacks = pl.any_horizontal(pl.col(f"{side}_score").is_null() for side in SIDES)
        num_pairs, num_lacking = self.tokens.scan(self.version).select(pl.len(), lacks.sum()).collect().row(0)
        if num_lacking:
            raise InputError(
                f"weights.pair_weight 'quality' needs annotators' scores of both responses, and {num_lacking} of {num_pairs} "
                f"pairs of {self.tokens.path}@{self.version} lack one. Name the columns that hold them in "
                "dataset.chosen_score_column and dataset.rejected_score_column, leave such pairs out of the source, or set "
                "weights.pair_weight to 'margin' or 'none'"
            )

    def has_all_of(self, table: Table, version: int | None) -> bool:
        """Return whether every pair of another table is still here."""
        for piece in table.key_ranges(_RANGE_BYTES, version):
            left = piece.of(table.scan(version)).select("pair_id")
            for here, at in ((self.tokens, self.version), *self.others.values()):
                lost = left.join(piece.of(here.scan(at)).select("pair_id"), on="pair_id", how="anti")
                if not lost.head(1).collect().is_empty():
                    return False
        return True


def _with_curves(weigher: Weigher, join: _Join) -> Weigher:
    """Return the weigher with mean weights by position over all pairs of the join."""
    curves = PositionCurves(weigher)
    for joined in join.batches():
        curves.add(_lists(joined))
    return curves.weigher()


def _write_rows(
    join: _Join, table: Table, weigher: Weigher, appended_to: int | None
) -> tuple[list[ShardRecord], dict[str, Any]]:
    """Weigh and write the pairs that version `appended_to` does not have yet, all by default; nothing is visible yet."""
    writer = table.writer()
    statistics: dict[str, Any] = {}
    present = table.scan(appended_to) if appended_to is not None else None
    try:
        for joined in join.batches(without=present):
            rows, of_batch = _weighed_rows(joined, weigher)
            statistics = merge_statistics(statistics, of_batch) if statistics else of_batch
            writer.write(rows)
        return writer.finish(), statistics
    except OSError as error:
        raise StoreError(
            f"cannot write {table.path} in {table.root}: {one_line(error)}; nothing became visible"
        ) from error


def _weighed_rows(joined: pl.DataFrame, weigher: Weigher) -> tuple[pa.Table, dict[str, Any]]:
    lists = _lists(joined)
    columns = {name: lists[name] for name in WEIGHTS.names if name in lists.column_names}
    sides = weigher.sides(lists)
    for side, (_, weighed) in sides.items():
        offsets = np.asarray(one_chunk(lists[f"{side}_ids"]).offsets)
        columns[f"{side}_token_weights"] = pa.ListArray.from_arrays(
            pa.array(offsets - offsets[0]), pa.array(weighed.token_weights), type=FLOATS
        )
    of_pairs = pair_weights(weigher.section, lists, sides)
    columns["pair_weight"] = pa.array(of_pairs)
    for field in WEIGHTS:
        if field.nullable and field.name not in columns:  # nothing has made it
            columns[field.name] = pa.nulls(joined.height, field.type)
    rows = pa.table({name: columns[name] for name in WEIGHTS.names}).cast(WEIGHTS)
    return rows, count_up(joined, sides, of_pairs if weigher.section.pair_weight != "none" else None)


def _lists(joined: pl.DataFrame) -> pa.Table:
    """Return a join as Arrow has it, in the types of the store: Polars hands out 64-bit offsets."""
    kinds = {field.name: field.type for schema in (WEIGHTS, ATTRIBUTIONS) for field in schema}
    schema = pa.schema([(name, kinds.get(name, FLOATS)) for name in joined.columns])
    return joined.to_arrow().cast(schema).combine_chunks()


def _check_lengths(joined: pl.DataFrame, ids: str, values: str) -> None:
    bad = joined.filter(pl.col(ids).list.len().ne_missing(pl.col(values).list.len()))
    if bad.height:
        row = bad.row(0, named=True)
        raise MismatchError(
            f"pair {row['pair_id']}: {len(row[values] or ())} values in {values} for {len(row[ids])} {ids}; "
            f"{bad.height} such pairs. Delete the table that they come from and build again"
        )
