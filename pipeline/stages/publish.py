"""Stage publish: join ids, reference log-probs and scores, weigh the pairs, and commit a version of the weight dataset.

A version is a function of its lineage: the same tokens, log-probs and settings give the same fingerprint. If the newest version
has that fingerprint, it is returned. New pairs are weighed and appended; if settings change, all rows are written again.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.models.other_pairs import other_pairs, trained_prompts
from pipeline.provenance import provenance
from pipeline.recipe import Recipe
from pipeline.weighing.join import Join
from pipeline.weighing.margins import NONE_SEEN, SeenLabels, are_among
from pipeline.weighing.ranges import still_has_all, weigh_rows
from pipeline.weighing.section import WeightsSection
from pipeline.weighing.weigh import Weigher
from pipeline.workers.driver import drive
from pipeline.workers.missing import column_sum
from train.data.selection import Selection, prompt_hashes
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.messages import logger
from weights_store.names import name_of, weights_path
from weights_store.processes.spread import Spread, in_turn
from weights_store.schemas import SCHEMA_VERSION, SIDES, Reason
from weights_store.tables.metadata import CommitMetadata, ContrastRecord, Identity, ParityRecord, Section, Statistics

_log = logger(__name__)

TO_BE_COMPUTED = "to be computed"
"""In a dry run the fingerprint of a version that does not exist yet."""
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
    annotations: TableVersion | None = None
    more_logps: Mapping[str, TableVersion] = field(default_factory=dict)
    """Those of further contrastive pairs by role: `positive2_logps`, `negative2_logps` and so on."""

    @classmethod
    def of_scorers(
        cls,
        tokens: TableVersion,
        logps: Mapping[str, TableVersion],
        attributions: TableVersion | None = None,
        anchors: TableVersion | None = None,
        annotations: TableVersion | None = None,
    ) -> "Ingredients":
        """Return the ingredients, with log-probs by the role of their scorer; those of `ref` must be there."""
        more = {f"{role}_logps": version for role, version in logps.items()}
        ref, positive, negative = (more.pop(f"{role}_logps", None) for role in ("ref", "positive", "negative"))
        assert ref is not None, "no log-probs of the reference"
        return cls(tokens, ref, positive, negative, attributions, anchors, annotations, more)

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
    spread: Spread | None = None,
) -> Published:
    """Weigh every pair that has all its scores and publish the result as `weights/<name>`.

    `weights` is usually the recipe's own section. `check` is called before weighing if a new version is needed; it may raise,
    and its result is recorded, see `parity.check_stored`. `tokenizer_folder` is only read for weights that depend on texts.
    `spread` does the work on the ranges of pair_ids; None: on Ray if the recipe says so, which a child process drives, else
    here, one after the other.

    Raises:
        InputError: No pair has all its scores, `expect_same` and the newest version was made with other settings, or the
            settings need annotators' scores or a tokenizer that are missing.
        MismatchError: A list is not as long as its ids, a value cannot be weighed, or `check` raises it.
        ConflictError: Other builds of the same dataset won the race for the next version every time.
        StageError: The Ray failed.
    """
    for _ in range(_MAX_TRIES - 1):
        with suppress(ConflictError):  # another build was faster: it may have made this very version
            return _publish(recipe, weights, ingredients, expect_same, check, tokenizer_folder, spread)
    return _publish(recipe, weights, ingredients, expect_same, check, tokenizer_folder, spread)


def _publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool,
    check: Callable[[], Mapping[str, ParityRecord]],
    tokenizer_folder: Path | None,
    spread: Spread | None,
) -> Published:
    wanted = Wanted.of(recipe, weights, ingredients)
    if wanted.newest and wanted.is_there:  # its pairs are the same, but bad rows may have come or gone
        balanced = _with_balance(wanted.newest["statistics"], ingredients)
        metadata: CommitMetadata = {**wanted.newest, "statistics": balanced}
        return _published(wanted, wanted.table.reference(wanted.base), metadata, is_new=False)
    if expect_same and wanted.made_differently:
        raise InputError(
            f"{wanted.table.path}@{wanted.base} was made differently: {'; '.join(wanted.made_differently)}. "
            "Give the result another weights.name, or leave --expect-same out"
        )
    join = Join(ingredients.by_role(), weights)
    join.check_scores()
    seen = _seen_labels(recipe, ingredients)
    weigher = Weigher.of(weights, tokenizer_folder, seen, recipe.labels)
    checked = check()
    before = wanted.newest["statistics"] if wanted.newest else None
    task = (join, weigher, wanted.table, wanted.may_append_to, before)
    if spread is None and recipe.score.executor == "ray":
        appended_to, shards, statistics = drive("weighing pairs", recipe.score, weigh_rows, *task)
    else:
        appended_to, shards, statistics = weigh_rows(*task, spread or in_turn)
    if statistics is None:
        raise InputError(f"no pair of {ingredients.tokens} has all its scores; nothing to publish")
    _warn_of_idle_patterns(weights, statistics)
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


def _warn_of_idle_patterns(weights: WeightsSection, statistics: Statistics) -> None:
    """Name the patterns that match nothing in any response: they are misspelt, or were written for another template."""
    counts = [statistics[side].get("num_matches") for side in SIDES]
    totals = [sum(each) for each in zip(*filter(None, counts), strict=True)]
    for (pattern, _), total in zip(getattr(weights, "patterns", ()) if totals else (), totals, strict=True):
        if not total:
            _log.warning(f"publish: pattern {pattern!r} of weights.patterns matches nothing in any response")


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
        "statistics": _with_balance(statistics, ingredients),
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
    record["weights"], record["num_seen_pairs"] = seen.other, 0
    for rows in WeightStore(tokens.store).table(tokens.table).batches(tokens.version, ["pair_id"]):
        record["num_seen_pairs"] += int(are_among(prompt_hashes(rows["pair_id"].to_pylist()), seen.other_prompts).sum())
    return record


def _with_balance(statistics: Statistics, ingredients: Ingredients) -> Statistics:
    """Add where every source row went: rows in = published + quarantined."""
    prepared = _recorded(ingredients.tokens)["statistics"]
    quarantined = dict(prepared["quarantined"])
    annotations, num_left_out = ingredients.annotations, prepared["num_pairs"] - statistics["num_pairs"]
    num_bad = 0 if annotations is None else prepared["num_pairs"] - _recorded(annotations)["statistics"]["num_pairs"]
    for reason, count in ((Reason.BAD_WEIGHTS, num_bad), (Reason.UNSCORABLE, num_left_out - num_bad)):
        if count:
            quarantined[reason.value] = count
    return {**statistics, "num_source_rows": prepared["num_source_rows"], "quarantined": quarantined}


def _fingerprints(recipe: Recipe, weights: WeightsSection, parents: Mapping[str, TableVersion]) -> dict[str, str]:
    """Return the fingerprint of each table by role, with what its numbers owe to the rows that there were when it began."""
    found = {role: parent.fingerprint for role, parent in parents.items()}
    known = {
        role: WeightStore(parent.store).table(parent.table)
        for role, parent in parents.items()
        if parent.fingerprint != TO_BE_COMPUTED
    }
    if "anchors" in known and recipe.anchors is not None and recipe.anchors.source == "mismatched":  # chosen among them
        chosen = column_sum(known["anchors"], "anchor_ids", parents["anchors"].version)
        found["anchors"] = fingerprint([found["anchors"], chosen])
    if "attributions" in known and "contexts" in weights.inputs():  # the axes of contexts are theirs
        first = known["attributions"].metadata(0).get("fingerprint")
        if first != found["attributions"]:
            found["attributions"] = fingerprint([found["attributions"], first])
    return found


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
            "data": _fingerprints(recipe, weights, parents),
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

    @property
    def may_append_to(self) -> int | None:
        """The version that new rows can be added to if all its pairs are still there; None if all rows must be written again.

        Where weights depend on the whole dataset, every new pair changes all of them. Of the user's own weights nobody knows
        without a comparison which ones have changed: to weigh all pairs again is as quick.
        """
        has_own = any(change.startswith("data.annotations:") for change in self.changes)
        return None if self.made_differently or self.section.looks_at_all_pairs or has_own else self.base

    def appended_to(self, ingredients: Ingredients) -> int | None:
        """Return the version whose rows stay, so that only new rows are added; None if all rows must be written again."""
        base = self.may_append_to
        is_kept = base is not None and still_has_all(
            Join(ingredients.by_role(), self.section), self.table, base, in_turn
        )
        return base if is_kept else None
