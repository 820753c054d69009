"""Stage publish: join ids, reference log-probs and scores, weigh the pairs, and commit a version of the weight dataset.

A version is a function of its lineage: the same tokens, log-probs and settings give the same fingerprint. If the newest version
has that fingerprint, it is returned. New pairs are weighed and appended; if settings change, all rows are written again.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.models.other_pairs import other_pairs, trained_prompts
from pipeline.provenance import provenance
from pipeline.recipe import Recipe
from pipeline.weighing.fits import with_fits
from pipeline.weighing.join import Join
from pipeline.weighing.margins import NONE_SEEN, Margins, SeenLabels, are_among
from pipeline.weighing.section import WeightsSection
from pipeline.weighing.statistics import count_up, merge_statistics
from pipeline.weighing.weigh import Weigher, one_chunk, pair_weights
from train.data.selection import Selection, prompt_hashes
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError, StoreError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.location import one_line
from weights_store.messages import logger
from weights_store.names import name_of, weights_path
from weights_store.schemas import ATTRIBUTIONS, FLOATS, SCHEMA_VERSION, WEIGHTS, Reason
from weights_store.tables.metadata import CommitMetadata, ContrastRecord, Identity, ParityRecord, Section, Statistics
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_MAX_TRIES = 5


@dataclass(frozen=True)
class Ingredients:
    """The table versions that a weight dataset is made of; None if the recipe does not need one."""

    tokens: TableVersion
    ref_logps: TableVersion
    positive_logps: TableVersion | None = None
    negative_logps: TableVersion | None = None
    attributions: TableVersion | None = None
    anchors: TableVersion | None = None
    more_logps: Mapping[str, TableVersion] = field(default_factory=dict)
    """Those of further contrastive pairs by role: `positive2_logps`, `negative2_logps` and so on."""

    @classmethod
    def of_scorers(
        cls,
        tokens: TableVersion,
        logps: Mapping[str, TableVersion],
        attributions: TableVersion | None = None,
        anchors: TableVersion | None = None,
    ) -> "Ingredients":
        """Return the ingredients, with log-probs by the role of their scorer; those of `ref` must be there."""
        more = {f"{role}_logps": version for role, version in logps.items()}
        ref, positive, negative = (more.pop(f"{role}_logps", None) for role in ("ref", "positive", "negative"))
        assert ref is not None, "no log-probs of the reference"
        return cls(tokens, ref, positive, negative, attributions, anchors, more)

    def by_role(self) -> dict[str, TableVersion]:
        """Return those that are there, by role."""
        found = {role: version for role, version in vars(self).items() if role != "more_logps" and version is not None}
        return found | dict(self.more_logps)


@dataclass(frozen=True)
class Published:
    """The result of publish."""

    weights: TableVersion
    name: str
    statistics: Statistics
    changes: list[str]
    is_new: bool
    parity: ParityRecord | None
    """How the reference's log-probs compare with those of transformers, see `parity.check_stored`; None if not compared."""
    settings: Section
    """The keys of the recipe's [weights] that determine the weights."""


def publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool = False,
    check: Callable[[], Mapping[str, ParityRecord]] = dict,
    tokenizer_folder: Path | None = None,
) -> Published:
    """Weigh every pair that has all its scores and publish the result as `weights/<name>`.

    `weights` is usually the recipe's own section. `check` is called before weighing if a new version is needed; it may raise,
    and its result is recorded, see `parity.check_stored`. `tokenizer_folder` is only read to smooth weights over words.

    Raises:
        InputError: No pair has all its scores, `expect_same` and the newest version was made with other settings, or the
            settings need annotators' scores or a tokenizer that are missing.
        MismatchError: A list is not as long as its ids, a value cannot be weighed, or `check` raises it.
        ConflictError: Other builds of the same dataset won the race for the next version every time.
    """
    for _ in range(_MAX_TRIES - 1):
        with suppress(ConflictError):  # another build was faster: it may have made this very version
            return _publish(recipe, weights, ingredients, expect_same, check, tokenizer_folder)
    return _publish(recipe, weights, ingredients, expect_same, check, tokenizer_folder)


def _publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool,
    check: Callable[[], Mapping[str, ParityRecord]],
    tokenizer_folder: Path | None,
) -> Published:
    wanted = Wanted.of(recipe, weights, ingredients)
    if wanted.newest and wanted.is_there:  # its pairs are the same, but bad rows may have come or gone
        balanced = _with_balance(wanted.newest["statistics"], ingredients.tokens)
        metadata: CommitMetadata = {**wanted.newest, "statistics": balanced}
        return _published(wanted, wanted.table.reference(wanted.base), metadata, is_new=False)
    if expect_same and wanted.made_differently:
        raise InputError(
            f"{wanted.table.path}@{wanted.base} was made differently: {'; '.join(wanted.made_differently)}. "
            "Give the result another weights.name, or leave --expect-same out"
        )
    join = Join(ingredients.by_role(), weights)
    join.check_annotations()
    seen = _seen_labels(recipe, ingredients)
    weigher = Weigher.of(weights, tokenizer_folder, seen, recipe.labels)
    checked = check()
    appended_to = wanted.appended_to(ingredients)
    shards, statistics = _weigh_rows(join, weigher, wanted, appended_to)
    if statistics is None:
        raise InputError(f"no pair of {ingredients.tokens} has all its scores; nothing to publish")
    metadata = _metadata(recipe.model_copy(update={"weights": weights}), ingredients, wanted, statistics)
    if ingredients.positive_logps is not None and recipe.contrast.trains:
        metadata["contrast"] = _contrast_record(recipe, ingredients.tokens, seen)
    elif "labels" in weights.inputs():
        metadata["contrast"] = {"held_out": recipe.labels.share, "split": recipe.labels.split or None, "is_head": True}
    if "parity" in checked:
        metadata["parity"] = checked["parity"]
    reference = wanted.table.commit(
        shards, metadata, wanted.base, "append" if appended_to == wanted.base else "overwrite"
    )
    _log.info(
        f"published {reference}: {statistics['num_pairs']} pairs, {statistics['num_response_tokens']} response tokens, "
        f"{sum(shard.num_rows for shard in shards)} pairs weighed"
    )
    return _published(wanted, reference, metadata, is_new=True)


def _published(wanted: "Wanted", weights: TableVersion, metadata: CommitMetadata, is_new: bool) -> Published:
    section, statistics, parity = wanted.section, metadata["statistics"], metadata.get("parity")
    return Published(weights, section.name, statistics, metadata["changes"], is_new, parity, section.result_settings())


# --- what a version records -------------------------------------------------------------------------------------------


def _recorded(version: TableVersion) -> CommitMetadata:
    return WeightStore(version.store).table(version.table).metadata(version.version)


def _metadata(recipe: Recipe, ingredients: Ingredients, wanted: "Wanted", statistics: Statistics) -> CommitMetadata:
    """Return what a version records of how it was made, and of what."""
    software = provenance()
    metadata: CommitMetadata = {
        "fingerprint": wanted.fingerprint,
        "identity": wanted.identity,
        "recipe": recipe.model_dump(),
        "parents": [{"role": role, **parent.as_parent()} for role, parent in ingredients.by_role().items()],
        "tokenizer": _recorded(ingredients.tokens)["tokenizer"],
        "statistics": _with_balance(statistics, ingredients.tokens),
        "changes": wanted.changes,
        "packages": software["packages"],
        "python": software["python"],
        "git_commit": software["git_commit"],
    }
    scorer = _recorded(ingredients.ref_logps).get("scorer")
    if scorer is not None:
        model = scorer["model"]
        metadata["reference"] = {"model_fingerprint": model, "dtype": scorer["dtype"], "model": recipe.model.path}
    return metadata


def _seen_labels(recipe: Recipe, ingredients: Ingredients) -> SeenLabels:
    """Return which labels the models of the contrastive pair have been trained on."""
    settings = recipe.contrast_settings
    if ingredients.positive_logps is None:
        return NONE_SEEN
    if not settings.trains:
        is_given = settings.method == "given"
        return SeenLabels(assumption="the given models were not trained on these labels") if is_given else NONE_SEEN
    selection = Selection(settings.split or "", settings.held_out)
    if settings.weights is None:
        return SeenLabels(selection, by_dpo=settings.method == "dpo")
    # Plain DPO on this dataset does not see the labels of the other one, so it is no comparison.
    pairs = other_pairs(ingredients.tokens.store, settings.weights)
    return SeenLabels(other_prompts=trained_prompts(pairs, selection), other=f"{name_of(pairs.table)}@{pairs.version}")


def _contrast_record(recipe: Recipe, tokens: TableVersion, seen: SeenLabels) -> ContrastRecord:
    """Return which pairs the models of the contrastive pair have been trained on, for trainings that hold some out."""
    settings = recipe.contrast_settings
    record: ContrastRecord = {"held_out": settings.held_out, "split": settings.split}
    if seen.other_prompts is None:
        return record
    pair_ids = WeightStore(tokens.store).table(tokens.table).pair_ids(tokens.version)
    record["weights"] = seen.other
    record["num_seen_pairs"] = int(are_among(prompt_hashes(pair_ids.to_list()), seen.other_prompts).sum())
    return record


def _with_balance(statistics: Statistics, tokens: TableVersion) -> Statistics:
    """Add where every source row went: rows in = published + quarantined."""
    prepared = _recorded(tokens)["statistics"]
    quarantined = dict(prepared["quarantined"])
    unscorable = prepared["num_pairs"] - statistics["num_pairs"]
    if unscorable:
        quarantined[Reason.UNSCORABLE.value] = unscorable
    return {**statistics, "num_source_rows": prepared["num_source_rows"], "quarantined": quarantined}


@dataclass(frozen=True)
class Wanted:
    """The version to publish, compared with the newest one."""

    table: Table
    section: WeightsSection
    identity: Identity
    base: int | None
    """The newest version; `newest` is its metadata."""
    newest: CommitMetadata | None

    @classmethod
    def of(cls, recipe: Recipe, weights: WeightsSection, ingredients: Ingredients) -> "Wanted":
        """Look up the newest version of `weights.name`."""
        table = WeightStore(ingredients.tokens.store).table(weights_path(weights.name))
        parents = ingredients.by_role()
        update: dict[str, object] = {"weights": weights}
        if "anchors" not in parents:  # the by-product has none, even if the recipe samples them
            update["anchors"] = None
        identity: Identity = {
            "schema_version": SCHEMA_VERSION,
            "settings": recipe.model_copy(update=update).result_settings(),
            "tables": {role: parent.table for role, parent in parents.items()},
            "data": {role: parent.fingerprint for role, parent in parents.items()},
        }
        base = table.version()
        return cls(table, weights, identity, base, table.metadata(base) if base is not None else None)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the version to publish."""
        return fingerprint(self.identity)

    @property
    def is_there(self) -> bool:
        """Whether the newest version is the one to publish."""
        return self.newest is not None and self.newest["fingerprint"] == self.fingerprint

    @property
    def changes(self) -> list[str]:
        """The differences from the newest version, field by field."""
        return explain_difference(self.newest["identity"], self.identity) if self.newest else []

    @property
    def made_differently(self) -> list[str]:
        """The changes that new pairs do not explain."""
        return [change for change in self.changes if not change.startswith("data.")]

    def appended_to(self, ingredients: Ingredients) -> int | None:
        """Return the version whose rows stay, so that only new rows are added; None if all rows must be written again.

        Where weights depend on the whole dataset, every new pair changes all of them.
        """
        if self.newest is None or self.made_differently or self.section.looks_at_all_pairs:
            return None
        join = Join(ingredients.by_role(), self.section)
        stays = join.has_all_of(self.table, self.base) and join.has_scores_of(self.table, self.base)
        return self.base if stays else None


# --- rows -------------------------------------------------------------------------------------------------------------


def _weigh_rows(
    join: Join, weigher: Weigher, wanted: Wanted, appended_to: int | None
) -> tuple[list[ShardRecord], Statistics | None]:
    """Weigh and write all pairs that version `appended_to` lacks; return shards that nobody sees yet.

    The statistics are those of the whole version; None if it has no pairs.
    """
    weigher = with_fits(weigher, lambda: map(_lists, join.batches()))
    margins = Margins(weigher.section.estimators, weigher.seen)
    table = wanted.table
    writer = table.writer()
    statistics: Statistics | None = None
    try:
        for joined in join.batches(without=None if appended_to is None else (table, appended_to)):
            rows, of_batch = _weigh_batch(joined, weigher, None if appended_to is not None else margins)
            statistics = merge_statistics(statistics, of_batch) if statistics else of_batch
            writer.write(rows)
        shards = writer.finish()
    except OSError as error:
        raise StoreError(
            f"cannot write {table.path} in {table.root}: {one_line(error)}; nothing became visible"
        ) from error
    if wanted.newest and appended_to is not None:
        before = wanted.newest["statistics"]
        statistics = merge_statistics(before, statistics) if statistics else before
    if statistics and weigher.curves:
        statistics["mean_weight_by_position"] = {side: curve.tolist() for side, curve in weigher.curves.items()}
    if statistics and weigher.head is not None:
        statistics["head"] = weigher.head.record
    if statistics and weigher.spreads:
        statistics["spread"] = dict(weigher.spreads)
    if statistics and margins.estimators:
        if appended_to is not None and margins.can_measure:
            # Figures of two sets of pairs cannot be merged exactly: the fit needs all margins, and a version keeps none.
            for lists in map(_lists, join.batches(logps_only=True)):
                margins.add(lists, weigher.scores(lists))
        statistics["held_out"] = margins.records(weigher.scales, weigher.section.spreads)
    return shards, statistics


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
    kinds = {field.name: field.type for schema in (WEIGHTS, ATTRIBUTIONS) for field in schema}
    schema = pa.schema([(name, kinds.get(name, FLOATS)) for name in joined.columns])
    return joined.to_arrow().cast(schema).combine_chunks()
