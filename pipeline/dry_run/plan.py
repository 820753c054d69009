"""The dry run of a build: for each stage whether it is reused or computed, how much that is, and why. Writes nothing.

The decisions are those of the stages themselves (`prepare.Preparation`, `scoring.missing_pairs`, `contrast.wanted_models`,
`publish.Wanted`); here they are only put in a row. What one stage would make is not there yet for the next: its fingerprint
reads "to be computed".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.dry_run import rates
from pipeline.dry_run.amounts import TO_BE_COMPUTED, Amount, Outlook
from pipeline.models.resolve import resolve_model
from pipeline.preflight import check_inputs
from pipeline.recipe import AnchorsSection, Recipe
from pipeline.stages.anchors import anchors_identity
from pipeline.stages.attribute import attribution_identity
from pipeline.stages.contrast import WantedModel, model_shelf, prompt_pair, wanted_models
from pipeline.stages.prepare import Preparation
from pipeline.stages.publish import Ingredients, Wanted
from pipeline.stages.report import REPORTS, report_file
from pipeline.stages.score import REFERENCE, Scorer, identity_in
from pipeline.weighing.section import WeightsSection
from pipeline.workers.request import Stage
from pipeline.workers.supervise import changed_identity, stage_table
from weights_store import Table, TableVersion
from weights_store.fingerprint import explain_difference

Action = Literal["reuse", "compute"]
_SIDES = ("positive", "negative")


@dataclass(frozen=True)
class StagePlan:
    """What a build would do in one stage.

    Args:
        stage: Its name in the build.
        action: Whether what is there is taken, or something has to be computed.
        num_pairs: Pairs to compute.
        num_tokens: Tokens to compute: of prompt, chosen and rejected, each once per pair; where weights are published, of
            responses; where models are trained, over all steps of both.
        seconds: Estimated.
        rate_source: Whether `seconds` comes from a measured rate or a stated one; None where there is nothing to do.
        num_bytes: What the store grows by, estimated.
        reasons: What is reused, or what differs from what is there.
        is_exact: Whether pairs and tokens are counted, not estimated.
    """

    stage: str
    action: Action
    num_pairs: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    rate_source: rates.RateSource | None = None
    num_bytes: int = 0
    reasons: tuple[str, ...] = ()
    is_exact: bool = True


def plan(recipe: Recipe) -> list[StagePlan]:
    """Return what a build of the recipe would do, stage by stage in its order.

    Reads the source where it is new or has changed, and tokenises a sample of the new pairs.

    Args:
        recipe: The build.

    Raises:
        InputError: The recipe's inputs cannot be used: what a build would say.
        StoreError: The store cannot be read.
    """
    check_inputs(recipe)
    model_folder = resolve_model(recipe.model)
    return list(_Plan(recipe, model_folder, Outlook.of(Preparation.of(recipe, model_folder))).stages())


@dataclass
class _Plan:
    recipe: Recipe
    model_folder: Path
    outlook: Outlook
    filled: dict[str, TableVersion] = field(default_factory=dict)
    """What the stages so far have come to, by stage and role."""
    started_engines: set[Path | str] = field(default_factory=set)

    def stages(self) -> Iterator[StagePlan]:
        """Yield the stages; each looks at what those before it leave."""
        yield self._prepare()
        yield self._score(REFERENCE, Scorer(self.model_folder))
        if self.recipe.needs_pair:
            uniform, version = self._publish("publish uniform", self.recipe.uniform)
            contrast, scorers = self._contrast(version)
            yield from (uniform, contrast)
            yield from (self._score(role, scorers.get(role)) for role in _SIDES)
        if self.recipe.needs_attributions:
            yield self._attribute()
        if self.recipe.anchors is not None:
            yield self._anchors(self.recipe.anchors)
        published, version = self._publish("publish", self.recipe.weights)
        yield published
        yield self._report(published.action, version.version)

    # --- prepare -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> StagePlan:
        start, found = self.outlook.start, self.outlook.found
        if found is None or found.is_same:
            return StagePlan("prepare", "reuse", reasons=(f"{self.outlook.tokens}: {self.outlook.num_pairs:,} pairs",))
        num_tokens = round(found.num_new * sum(found.new_tokens))
        num_written = found.num_pairs if found.writes_all else found.num_new
        per_pair = rates.bytes_per_pair(start.tokens) or rates.TOKENS_BYTES * sum(found.new_tokens)
        per_row = rates.bytes_per_pair(start.quarantine) or rates.QUARANTINE_BYTES
        num_bytes = num_written * per_pair + (found.num_rows - found.num_pairs) * per_row + 2 * rates.COMMIT_BYTES
        return StagePlan(
            "prepare",
            "compute",
            found.num_new,
            num_tokens,
            found.seconds,
            "measured",
            round(num_bytes),
            tuple(self._why_prepare()),
            found.is_exact,
        )

    def _why_prepare(self) -> Iterator[str]:
        start, found = self.outlook.start, self.outlook.found
        assert found is not None, "else there is nothing to do"
        about = "" if found.is_exact else "≈"
        num_bad = found.num_rows - found.num_pairs
        yield f"{found.num_rows:,} rows = {about}{found.num_pairs:,} pairs + {about}{num_bad:,} to quarantine"
        if not start.tokens.exists():
            yield f"new table {start.tokens.path}"
            for path, changes in start.other_cuts():
                yield f"unlike {path}: {'; '.join(changes)}"
            return
        how = "all rows are written anew" if found.writes_all else "new rows are added"
        yield f"{start.tokens.reference()}: {about}{found.num_new:,} pairs new, {found.num_gone:,} gone; {how}"
        yield from explain_difference(start.tokens.metadata()["source"], start.source, "source")

    # --- score, attribute, anchors -----------------------------------------------------------------------------------

    def _score(self, role: str, scorer: Scorer | None) -> StagePlan:
        """Plan the scoring in one role; without a scorer its model is yet to be trained."""
        identity = identity_in(role, scorer, self.recipe.score) if scorer else None
        top_k = identity.get("top_k", 0) if identity else 0
        per_token = rates.LOGPS_BYTES + top_k * rates.TOP_BYTES
        model = scorer.model if scorer else role
        # One start of the engine for all scorers of a model.
        start_s = 0.0 if model in self.started_engines else rates.ENGINE_START_S
        found = self._fill("score", role, identity, start_s, self._response_bytes(per_token))
        if found.action == "compute":
            self.started_engines.add(model)
        return found

    def _attribute(self) -> StagePlan:
        settings = self.recipe.attribute
        identity = attribution_identity(self.model_folder, settings)
        per_token = rates.ATTRIBUTION_BYTES * (2 if settings.activations else 1)
        size = self._response_bytes(per_token)
        return self._fill("attribute", REFERENCE, identity, rates.ATTRIBUTE_START_S, size)

    def _anchors(self, settings: AnchorsSection) -> StagePlan:
        """Plan the sampling; how long the anchors will be nobody knows: as long as they may be."""
        identity = anchors_identity(self.model_folder, settings, self.recipe.score)
        per_pair = settings.max_new_tokens * rates.ANCHOR_BYTES
        return self._fill(
            "anchors", REFERENCE, identity, rates.ENGINE_START_S, lambda amount: amount.num_pairs * per_pair
        )

    def _response_bytes(self, per_token: float) -> Callable[[Amount], float]:
        return lambda amount: amount.num_tokens * self.outlook.response_share() * per_token

    def _fill(
        self,
        stage: Stage,
        role: str,
        identity: dict[str, Any] | None,
        start_s: float,
        num_bytes: Callable[[Amount], float],
    ) -> StagePlan:
        """Plan what a model does over all pairs; without an identity the model is yet to be trained."""
        name, tokens = f"{stage} {role}", self.outlook.tokens
        table = stage_table(stage, tokens, identity) if identity else None
        amount = self.outlook.missing_from(table)
        is_there = table is not None and table.exists()
        if table is not None and is_there and not amount.num_pairs:
            self.filled[name] = table.reference()
            return StagePlan(name, "reuse", reasons=(f"{table.reference()}: {table.num_rows():,} pairs",))
        path = table.path if table is not None else TO_BE_COMPUTED
        version = table.version() if table is not None and is_there else 0
        self.filled[name] = TableVersion(tokens.store, path, version or 0, TO_BE_COMPUTED)
        history = rates.StageHistory(self.outlook.start.store, stage)
        rate, source = history.tokens_per_s(identity["model"] if identity else None)
        chunk_tokens = (self.recipe.attribute if stage == "attribute" else self.recipe.score).chunk_tokens
        num_commits = 1 + amount.num_tokens // chunk_tokens
        return StagePlan(
            name,
            "compute",
            amount.num_pairs,
            amount.num_tokens,
            start_s + amount.num_tokens / rate,
            source,
            round(num_bytes(amount)) + num_commits * rates.COMMIT_BYTES,
            tuple(self._why_fill(role, table, identity)),
            amount.is_exact,
        )

    def _why_fill(self, role: str, table: Table | None, identity: dict[str, Any] | None) -> Iterator[str]:
        if table is None or identity is None:
            yield f"the {role} model is not trained yet"
        elif table.exists():
            yield f"{table.reference()} lacks these pairs"
        else:
            yield f"new table {table.path}"
            changed = changed_identity(table, role, identity)
            if changed is not None:
                yield f"unlike {changed[0]}: {'; '.join(changed[1])}"

    # --- contrast ----------------------------------------------------------------------------------------------------

    def _contrast(self, uniform: TableVersion) -> tuple[StagePlan, dict[str, Scorer]]:
        settings = self.recipe.contrast
        if settings.method == "prompt":
            reason = "one model behind two prompts: nothing to train"
            return StagePlan("contrast", "reuse", reasons=(reason,)), prompt_pair(settings, self.model_folder).scorers
        wanted = wanted_models(settings, self.model_folder, uniform)
        scorers = {model.side: Scorer(model.folder) for model in wanted if model.folder is not None}
        untrained = [model for model in wanted if model.folder is None]
        if not untrained:
            reasons = tuple(f"models/{model.name}, the {model.side} model" for model in wanted)
            return StagePlan("contrast", "reuse", reasons=reasons), scorers
        amount = self.outlook.all()
        num_seen = settings.num_epochs * amount.num_pairs
        if settings.max_steps:
            num_seen = settings.max_steps * settings.pairs_per_step
        num_steps = -(-num_seen // settings.pairs_per_step)
        num_tokens = round(len(untrained) * num_seen * amount.num_tokens / max(1, amount.num_pairs))
        start_s = len(untrained) * rates.TRAINING_START_S
        steps = f"{len(untrained)} to train by {settings.method}: {num_steps:,} steps of {settings.pairs_per_step} pairs each"
        return StagePlan(
            "contrast",
            "compute",
            amount.num_pairs,
            num_tokens,
            start_s + num_tokens / rates.TRAINED_TOKENS_PER_S,
            "stated",
            len(untrained) * _model_bytes(self.model_folder),
            (steps, *(reason for model in untrained for reason in self._why_train(model, uniform))),
            amount.is_exact,
        ), scorers

    def _why_train(self, model: WantedModel, uniform: TableVersion) -> Iterator[str]:
        """Say what differs from the most similar model of this side."""
        others = [r["identity"] for r in model_shelf(uniform.store).records() if r["identity"]["side"] == model.side]
        if not others:
            return
        changes = min((explain_difference(other, model.identity) for other in others), key=len)
        what = "; ".join(changes) or "trained on other pairs, or without the other side"
        yield f"unlike the {model.side} model that is there: {what}"

    # --- publish, report ---------------------------------------------------------------------------------------------

    def _publish(self, stage: str, section: WeightsSection) -> tuple[StagePlan, TableVersion]:
        """Plan a weight dataset, and return its version to be."""
        ingredients = self._ingredients(section)
        wanted = Wanted.of(self.recipe, section, ingredients)
        if wanted.is_there:
            version = wanted.table.reference(wanted.base)
            num_pairs = wanted.newest["statistics"]["num_pairs"] if wanted.newest else 0
            return StagePlan(stage, "reuse", reasons=(f"{version}: {num_pairs:,} pairs",)), version
        num_pairs, num_tokens, per_token = self._rows_to_publish(wanted, ingredients)
        version = TableVersion(
            ingredients.tokens.store, wanted.table.path, 0 if wanted.base is None else wanted.base + 1, TO_BE_COMPUTED
        )
        why = (f"new version, after {wanted.table.path}@{wanted.base}:", *wanted.changes)
        return StagePlan(
            stage,
            "compute",
            num_pairs,
            num_tokens,
            num_tokens / rates.WEIGHED_TOKENS_PER_S,
            "stated",
            round(num_tokens * per_token) + rates.COMMIT_BYTES,
            why if wanted.newest else (f"new table {wanted.table.path}",),
            self.outlook.all().is_exact,
        ), version

    def _ingredients(self, section: WeightsSection) -> Ingredients:
        """Return what the flow hands to publish: for the by-product of weights 1 the reference's log-probs alone."""
        names = {"positive_logps": "score positive", "negative_logps": "score negative"}
        names |= {"attributions": "attribute ref", "anchors": "anchors ref"}
        if section is not self.recipe.weights:
            names = {}
        there = {role: self.filled[name] for role, name in names.items() if name in self.filled}
        return Ingredients(self.outlook.tokens, self.filled[f"score {REFERENCE}"], **there)

    def _rows_to_publish(self, wanted: Wanted, ingredients: Ingredients) -> tuple[int, int, float]:
        """Return the pairs and response tokens to weigh, and the bytes of one such token."""
        newest, num_all, top_k = wanted.newest, self.outlook.num_pairs, self.recipe.score.top_k
        filled = [version.table for role, version in ingredients.by_role().items() if role != "tokens"]
        num_pairs = num_all - self.outlook.num_unscorable(filled)
        num_tokens = round(self.outlook.num_response_tokens() * num_pairs / max(1, num_all))
        anchor_bytes, before = 0.0, newest["identity"]["tables"] if newest else ()
        if self.recipe.anchors and ingredients.anchors and "anchors" not in before:
            anchor_bytes = self.recipe.anchors.max_new_tokens * rates.ANCHOR_BYTES * num_pairs / max(1, num_tokens)
        if newest is None or wanted.base is None:
            return num_pairs, num_tokens, rates.WEIGHTS_BYTES + top_k * rates.TOP_BYTES + anchor_bytes
        statistics = newest["statistics"]
        num_bytes = sum(record.num_bytes for record in wanted.table.records(wanted.base))
        per_token = num_bytes / statistics["num_response_tokens"] + anchor_bytes
        per_token += (top_k - statistics.get("ref_top_k", 0)) * rates.TOP_BYTES
        if self._is_appended(wanted, ingredients):
            num_pairs -= statistics["num_pairs"]
            num_tokens -= statistics["num_response_tokens"]
        return max(0, num_pairs), max(0, num_tokens), per_token

    def _is_appended(self, wanted: Wanted, ingredients: Ingredients) -> bool:
        """Return whether the rows that are there stay: their tables are the same, and hold each of them still."""
        if wanted.made_differently or (self.outlook.found and self.outlook.found.num_gone):
            return False
        tables = [self.outlook.start.store.table(version.table) for version in ingredients.by_role().values()]
        return all(table.exists() for table in tables) and wanted.appended_to(ingredients) is not None

    def _report(self, action: Action, version: int) -> StagePlan:
        file = report_file(self.recipe.weights.name, version)
        folder = self.outlook.start.store.root / REPORTS
        if action == "reuse" and folder.exists(file):
            return StagePlan("report", "reuse", reasons=(f"{REPORTS}/{file}",))
        reasons = (f"new file {REPORTS}/{file}",)
        return StagePlan("report", "compute", 0, 0, rates.REPORT_S, "stated", rates.REPORT_BYTES, reasons)


def _model_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights and tokenizer; a trained one is written in the dtype of its origin."""
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(path.stat().st_size for path in (*weights, *folder.glob("tokenizer*")))
