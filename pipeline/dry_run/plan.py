"""The dry run of a build: what each stage would reuse or compute, how much that is, and why. Writes nothing.

The stages themselves decide (`Preparation`, `missing_pairs`, `wanted_models`, `Wanted`); this file asks them in their order.
What a stage would make does not exist yet for the next one: its fingerprint reads "to be computed".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline.dry_run.amounts import Amount, Outlook
from pipeline.dry_run.device import find_device
from pipeline.dry_run.needs import Needs, Note
from pipeline.dry_run.source import survey
from pipeline.models.section import MODEL_SIDES
from pipeline.preflight import check_inputs
from pipeline.recipe import Recipe
from pipeline.stages.anchors import anchors_identity
from pipeline.stages.annotate import Annotation
from pipeline.stages.attribute import attribution_identity
from pipeline.stages.contrast import WantedModel, model_shelf, training_pairs, untrained_pair, wanted_models
from pipeline.stages.prepare import Preparation
from pipeline.stages.publish import TO_BE_COMPUTED, Ingredients, Wanted
from pipeline.stages.report import kept_findings, report_file
from pipeline.stages.score import REFERENCE, Scorer, identity_in
from pipeline.weighing.section import WeightsSection
from pipeline.workers.request import Stage
from pipeline.workers.supervise import FOLDERS, changed_identity, stage_table
from weights_store import TableVersion, WeightStore
from weights_store.checks.reports import REPORTS
from weights_store.fingerprint import explain_difference
from weights_store.inspection.page.kept import findings_key

_MEASURED_COMMITS = 20


@dataclass(frozen=True)
class StagePlan:
    """What a build would do in one stage."""

    stage: str
    action: Literal["reuse", "compute"]
    num_pairs: int = 0
    """Pairs to compute."""
    num_tokens: int = 0
    """Tokens to compute: of prompt, chosen and rejected, each once per pair. For publish: of the responses. For contrast: over
    all training steps of both models."""
    reasons: tuple[str, ...] = ()
    """What is reused, or how the new result differs from what the store has."""
    is_exact: bool = True
    """Whether pairs and tokens are counted, not estimated."""
    wall_s: float | None = None
    """Seconds at the rate that this store has recorded for the stage and the role of the model, without the start of the model;
    None if it has recorded none."""
    memory: str = ""
    """What a stage that runs a model needs on each device, by formula, and what is there."""
    memory_bytes: int | None = None
    """The former as a number; None where no model runs, or the formula does not cover it."""


def plan(recipe: Recipe) -> list[StagePlan]:
    """Return what a build of the recipe would do, stage by stage in its order.

    Reads the source if it is new or has changed, and tokenises a sample of the new pairs.

    Raises:
        InputError: The recipe's inputs cannot be used, as a build would say.
        StoreError: The store cannot be read, or a file is in its place.
    """
    model_folder = check_inputs(recipe, only_plan=True)
    outlook = survey(Preparation.of(recipe, model_folder))
    return list(_Plan(recipe, model_folder, outlook).stages())


@dataclass
class _Plan:
    recipe: Recipe
    model_folder: Path
    outlook: Outlook
    filled: dict[str, TableVersion] = field(default_factory=dict)
    """The results of the stages so far, by stage and role."""
    models: dict[str, Path] = field(default_factory=dict)
    """The scored models that are not the starting model nor trained from it, by role."""
    annotations: TableVersion | None = None

    def stages(self) -> Iterator[StagePlan]:
        """Yield the stages in their order; each needs the results of those before it."""
        for stage in self._stages():
            note = self._note(stage) if stage.action == "compute" else None
            yield replace(stage, memory=note.text, memory_bytes=note.num_bytes) if note else stage

    def _note(self, stage: StagePlan) -> Note | None:
        name, _, role = stage.stage.partition(" ")
        return self._needs.of(name, self.models.get(role, self.model_folder))

    @cached_property
    def _needs(self) -> Needs:
        return Needs(self.recipe, find_device())

    def _stages(self) -> Iterator[StagePlan]:
        recipe = self.recipe
        yield self._prepare()
        if recipe.needs_annotations:
            yield self._annotate()
        yield self._score(REFERENCE, Scorer(self.model_folder))
        if recipe.needs_pair:
            uniform, version = self._publish("publish uniform", recipe.uniform)
            contrast, scorers = self._contrast(version)
            self.models = {role: scorer.model for role, scorer in scorers.items()}
            yield from (uniform, contrast)
            roles = MODEL_SIDES if recipe.contrast.trains else scorers
            yield from (self._score(role, scorers.get(role)) for role in roles)
        if recipe.needs_attributions:
            yield self._fill("attribute", REFERENCE, attribution_identity(self.model_folder, recipe.attribute))
        if recipe.anchors is not None:
            yield self._fill("anchors", REFERENCE, anchors_identity(self.model_folder, recipe.anchors, recipe.score))
        published, version = self._publish("publish", recipe.weights)
        yield published
        file, folder = report_file(recipe.weights.name, version.version), self.outlook.start.store.root / REPORTS
        key = findings_key(self.outlook.start.store.root, version) if published.action == "reuse" else None
        found = kept_findings(folder, file, key)
        if isinstance(found, str):
            yield StagePlan("report", "compute", reasons=(found,))
        else:
            yield StagePlan("report", "reuse", reasons=(f"{REPORTS}/{file}",))

    def _prepare(self) -> StagePlan:
        start, found = self.outlook.start, self.outlook
        if found.is_same:
            return StagePlan("prepare", "reuse", reasons=(f"{self.outlook.tokens}: {found.num_pairs:,} pairs",))
        about = "" if found.is_exact else "≈"
        num_bad = found.num_rows - found.num_pairs
        reasons = [f"{found.num_rows:,} rows = {about}{found.num_pairs:,} pairs + {about}{num_bad:,} to quarantine"]
        if start.tokens.exists():
            how = "all rows are rewritten" if found.writes_all else "new rows are appended"
            new = f"{about}{found.num_new:,} pairs new, {found.num_gone:,} gone"
            reasons.append(f"{start.tokens.reference()}: {new}; {how}")
            reasons += explain_difference(start.tokens.metadata()["source"], start.source, "source")
        else:
            reasons.append(f"new table {start.tokens.path}")
            reasons += [f"unlike {path}: {'; '.join(changes)}" for path, changes in start.other_cuts()]
        num_tokens = round(found.num_new * sum(found.new_tokens))
        return StagePlan("prepare", "compute", found.num_new, num_tokens, tuple(reasons), found.is_exact)

    def _annotate(self) -> StagePlan:
        wanted = Annotation(self.recipe, self.outlook.tokens)
        table = wanted.table
        version = table.reference() if table.exists() else None
        if version is not None and self.outlook.is_same and wanted.is_there:
            self.annotations = version
            return StagePlan("annotate", "reuse", reasons=(f"{version}: {table.num_rows():,} pairs",))
        next_version = 0 if version is None else version.version + 1
        self.annotations = TableVersion(wanted.tokens.store, table.path, next_version, TO_BE_COMPUTED)
        reads = [f"columns {', '.join(map(repr, wanted.columns.values()))}"] if wanted.columns else []
        reads += ["roles of messages"] if wanted.roles else []
        how = f"new table {table.path}" if version is None else f"{version}: all rows are written again"
        num_tokens = round(self.outlook.num_tokens()[1])
        return StagePlan(
            "annotate", "compute", self.outlook.num_pairs, num_tokens, (how, *reads), self.outlook.is_exact
        )

    def _score(self, role: str, scorer: Scorer | None) -> StagePlan:
        return self._fill("score", role, identity_in(role, scorer, self.recipe.score) if scorer else None)

    def _fill(self, stage: Stage, role: str, identity: Mapping[str, object] | None) -> StagePlan:
        """Plan a stage that runs a model over all pairs. Without an identity the model is not trained yet."""
        name, tokens = f"{stage} {role}", self.outlook.tokens
        table = stage_table(stage, tokens, identity) if identity else None
        version = table.version() if table else None
        amount = self.outlook.missing_from(table)
        if table and version is not None and not amount.num_pairs:
            self.filled[name] = table.reference()
            return StagePlan(name, "reuse", reasons=(f"{table.reference()}: {table.num_rows():,} pairs",))
        path = table.path if table else TO_BE_COMPUTED
        for same, filled in self.filled.items():
            if table and filled.table == table.path:  # as of a given pair that has the starting model on one side
                self.filled[name] = filled
                return StagePlan(name, "reuse", reasons=(f"{path}, the table of {same}",))
        self.filled[name] = TableVersion(tokens.store, path, version or 0, TO_BE_COMPUTED)
        rate = _tokens_per_s(self.outlook.start.store, stage, role)
        wall_s = amount.num_tokens / rate if rate else None
        if table is None or identity is None:
            reasons = [f"the {role} model is not trained yet"]
        elif version is not None:
            reasons = [f"{table.reference()} lacks these pairs"]
        else:
            changed = changed_identity(table, role, identity)
            unlike = [f"unlike {changed[0]}: {'; '.join(changed[1])}"] if changed else []
            reasons = [f"new table {table.path}", *unlike]
        return StagePlan(name, "compute", amount.num_pairs, amount.num_tokens, tuple(reasons), amount.is_exact, wall_s)

    def _contrast(self, uniform: TableVersion) -> tuple[StagePlan, Mapping[str, Scorer]]:
        """Plan the contrastive pair, and return the scorers of its models, as far as they exist, by role."""
        settings = self.recipe.contrast_settings
        if not settings.trains:
            return self._untrained()
        wanted = wanted_models(settings, self.model_folder, uniform)
        scorers = {model.side: Scorer(model.folder) for model in wanted if model.folder is not None}
        untrained = [model for model in wanted if model.folder is None]
        if untrained:
            return self._train(untrained, uniform), scorers
        reasons = tuple(f"models/{model.name}, the {model.side} model" for model in wanted)
        return StagePlan("contrast", "reuse", reasons=reasons), scorers

    def _untrained(self) -> tuple[StagePlan, Mapping[str, Scorer]]:
        """Plan a pair that needs no training: two prompts, or given models."""
        settings, scorers = self.recipe.contrast, untrained_pair(self.recipe.contrast, self.model_folder).scorers
        if settings.method == "prompt":
            number = len(settings.prompt_pairs)
            what = "two prompts" if number == 1 else f"{number} pairs of prompts"
            reasons = [f"one model with {what}: nothing to train"]
        else:
            reasons = ["given models: nothing to train"]
            for side in MODEL_SIDES:
                behind = ", behind a prompt" if scorers[side].condition else ""
                reasons.append(f"{scorers[side].model}, the {side} model{behind}")
        return StagePlan("contrast", "reuse", reasons=tuple(reasons)), scorers

    def _train(self, models: list[WantedModel], uniform: TableVersion) -> StagePlan:
        settings, amount = self.recipe.contrast_settings, self.outlook.all()
        if settings.weights is not None:
            amount = _amount_of(training_pairs(settings, uniform))
        optim = settings.train.optim
        num_seen = optim.num_epochs * round(amount.num_pairs * (1 - settings.held_out))
        if optim.max_steps:
            num_seen = optim.max_steps * optim.pairs_per_step
        num_steps = -(-num_seen // optim.pairs_per_step)
        num_tokens = round(len(models) * num_seen * amount.num_tokens / max(1, amount.num_pairs))
        steps = f"{num_steps:,} steps of {optim.pairs_per_step} pairs each"
        pairs = "" if settings.weights is None else f", on the pairs of {settings.weights}"
        reasons = [f"{len(models)} models to train with {settings.method}, {steps}{pairs}"]
        stored = [record["identity"] for record in model_shelf(uniform.store).records()]
        for model in models:
            others = [explain_difference(other, model.identity) for other in stored if other["side"] == model.side]
            if others:
                changes = min(others, key=len)
                what = "; ".join(changes) or "trained on other pairs, or without the other side"
                reasons.append(f"unlike the {model.side} model that is there: {what}")
        trains_all = (
            not settings.held_out and settings.split is None
        )  # else how many pairs train is only known at the end
        is_exact = amount.is_exact and trains_all
        return StagePlan("contrast", "compute", amount.num_pairs, num_tokens, tuple(reasons), is_exact)

    def _publish(self, stage: str, section: WeightsSection) -> tuple[StagePlan, TableVersion]:
        """Plan a weight dataset, and return the version that the build will have."""
        ingredients = self._ingredients(section)
        wanted = Wanted.of(self.recipe, section, ingredients)
        path, base, newest = wanted.table.path, wanted.base, wanted.newest
        if newest and wanted.is_there:
            version = wanted.table.reference(base)
            reason = f"{version}: {newest['statistics']['num_pairs']:,} pairs"
            return StagePlan(stage, "reuse", reasons=(reason,)), version
        version = TableVersion(ingredients.tokens.store, path, 0 if base is None else base + 1, TO_BE_COMPUTED)
        reasons = (f"new version, after {path}@{base}:", *wanted.changes) if newest else (f"new table {path}",)
        amounts = self._rows_to_publish(wanted, ingredients)
        return StagePlan(stage, "compute", *amounts, reasons, self.outlook.all().is_exact), version

    def _ingredients(self, section: WeightsSection) -> Ingredients:
        """Return what the flow gives to publish: for the uniform weights only the log-probs of the reference."""
        roles = {name.partition(" ")[2]: version for name, version in self.filled.items() if name.startswith("score ")}
        if section is not self.recipe.weights:
            return Ingredients(self.outlook.tokens, roles[REFERENCE])
        attributions, anchors = (self.filled.get(f"{stage} {REFERENCE}") for stage in ("attribute", "anchors"))
        return Ingredients.of_scorers(self.outlook.tokens, roles, attributions, anchors, self.annotations)

    def _rows_to_publish(self, wanted: Wanted, ingredients: Ingredients) -> tuple[int, int]:
        """Return the pairs and the response tokens to weigh."""
        num_all = self.outlook.num_pairs
        filled = [version.table for role, version in ingredients.by_role().items() if role != "tokens"]
        num_pairs = num_all - self.outlook.num_unscorable(filled)
        num_tokens = round(self.outlook.num_tokens()[1] * num_pairs / max(1, num_all))
        keeps_rows = self.outlook.base is not None and not self.outlook.num_gone
        if wanted.newest and not wanted.made_differently and keeps_rows:
            tables = (self.outlook.start.store.table(version.table) for version in ingredients.by_role().values())
            if all(table.exists() for table in tables) and wanted.appended_to(ingredients) is not None:
                num_pairs -= wanted.newest["statistics"]["num_pairs"]
                num_tokens -= wanted.newest["statistics"]["num_response_tokens"]
        return max(0, num_pairs), max(0, num_tokens)


def _amount_of(weights: TableVersion) -> Amount:
    """Return the pairs and the tokens of a weight dataset."""
    statistics = WeightStore(weights.store).table(weights.table).metadata(weights.version)["statistics"]
    num_tokens = statistics["num_prompt_tokens"] + statistics["num_response_tokens"]
    return Amount(statistics["num_pairs"], num_tokens, is_exact=True)


def _tokens_per_s(store: WeightStore, stage: Stage, role: str) -> float | None:
    """Return the rate of a stage's last 20 commits for models in one role; None if the store has none.

    Tokens are those of prompt, chosen and rejected, each once per pair. The start of the model is not in the rate.
    """
    measured = []
    for table in store.tables(FOLDERS[stage]):
        for commit in table.history(limit=_MEASURED_COMMITS):
            metadata = commit.metadata or {}
            statistics = metadata.get("statistics", {})
            num_tokens, wall_s = statistics.get("num_tokens"), statistics.get("wall_s")
            is_compaction = bool(commit.removed)  # it repeats the statistics of the commit before it
            if metadata.get("role") == role and num_tokens and wall_s and commit.added and not is_compaction:
                measured.append((commit.timestamp_ms or 0, num_tokens, wall_s))
    last = sorted(measured, reverse=True)[:_MEASURED_COMMITS]
    return sum(num_tokens for _, num_tokens, _ in last) / sum(wall_s for _, _, wall_s in last) if last else None
