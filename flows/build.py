"""The build as a Prefect flow. It reads like a table of contents; the work is in `pipeline`.

Tasks pass references (table, version), never tables. The store decides what is already done, not Prefect's cache: a second
run of a finished build computes nothing and takes seconds.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from prefect import flow, task

from flows.artifacts import show_costs, show_published, show_rows, show_versions
from flows.events import announce
from flows.limits import holding_gpus
from flows.lineage_events import lineage_of
from flows.repeating import AGAIN
from flows.run_logs import progress_artifacts, run_logs
from pipeline.parity.check import check_stored
from pipeline.preflight import check_inputs
from pipeline.recipe import Recipe, load_recipe
from pipeline.stages.anchors import sample_anchors
from pipeline.stages.annotate import annotate
from pipeline.stages.attribute import attribute
from pipeline.stages.contrast import ContrastivePair, contrast, untrained_pair
from pipeline.stages.prepare import Prepared, prepare
from pipeline.stages.publish import Ingredients, Published, publish
from pipeline.stages.report import write_report
from pipeline.stages.score import Scorer, executor_of, score
from pipeline.weighing.section import WeightsSection
from pipeline.workers.request import Stage
from pipeline.workers.supervise import Filled
from weights_store import TableVersion
from weights_store.inspection.doctor import Diagnosis
from weights_store.messages import logger

_log = logger(__name__)


@dataclass
class BuildResult:
    """What a build made: references, the path of the report, what looks wrong, and how long each stage took in seconds."""

    prepared: Prepared
    published: Published
    report: str
    diagnoses: list[Diagnosis]
    model_folder: Path
    scored: dict[str, Filled] = field(default_factory=dict)
    attributed: Filled | None = None
    anchors: Filled | None = None
    num_trained: int = 0
    stage_s: dict[str, float] = field(default_factory=dict)

    def filled(self) -> dict[str, Filled]:
        """Return the result of every stage that ran a model over the pairs, by stage and role."""
        others = {"attribute ref": self.attributed, "anchors ref": self.anchors}
        scored = {f"score {role}": result for role, result in self.scored.items()}
        return scored | {what: result for what, result in others.items() if result is not None}


@flow(name="build-weights")
def build_weights(recipe: Recipe, expect_same: bool = False) -> BuildResult:
    """Build the weight dataset of a recipe: prepare, annotate, score, contrast, score, attribute, anchors, publish, report."""
    stage_s: dict[str, float] = {}
    clock = partial(_record_time, stage_s)
    with run_logs():
        with clock("model"):
            model_folder = find_model(recipe)
        with clock("prepare"):
            prepared = prepare_tokens(recipe, model_folder)
        annotations = None
        if recipe.needs_annotations:  # before a model starts: it tells within minutes whether they can be used
            with clock("annotate"):
                annotations = annotate_pairs(prepared, recipe, model_folder)
        scorers = {"ref": Scorer(model_folder)}
        if recipe.needs_pair and not recipe.contrast.trains:  # at once: scorers of one model share an engine
            scorers |= untrained_pair(recipe.contrast, model_folder).scorers
        with clock("score " + " ".join(scorers)):
            scored = score_tokens(prepared, scorers, recipe, model_folder)
        num_trained = 0
        if recipe.needs_pair:
            with clock("publish uniform"):
                ingredients = Ingredients(prepared.tokens, scored["ref"].output)
                uniform = publish_weights(recipe, recipe.uniform, ingredients, model_folder)
            if "positive" not in scored:
                with clock("contrast"):
                    pair = build_contrast(recipe, model_folder, uniform)
                num_trained = pair.num_trained
                with clock("score pair"):
                    scored |= score_tokens(prepared, dict(pair.scorers), recipe, model_folder)
        attributed = anchors = None
        if recipe.needs_attributions:
            with clock("attribute"):
                attributed = attribute_tokens(prepared, recipe, model_folder)
        if recipe.anchors is not None:
            with clock("anchors"):
                anchors = sample_anchor_responses(prepared, recipe, model_folder)
        ingredients = Ingredients.of_scorers(
            prepared.tokens,
            {role: result.output for role, result in scored.items()},
            attributions=attributed.output if attributed else None,
            anchors=anchors.output if anchors else None,
            annotations=annotations,
        )
        with clock("publish"):
            published = publish_weights(recipe, recipe.weights, ingredients, model_folder, expect_same)
        with clock("report"):
            report, diagnoses = report_weights(published, ingredients, model_folder)
        result = BuildResult(
            prepared, published, report, diagnoses, model_folder, scored, attributed, anchors, num_trained, stage_s
        )
        show_costs(published, stage_s, result.filled())
    return result


@flow(name="refresh-weights")
def refresh_weights(recipe_file: str, overrides: list[str] | None = None, store: str | None = None) -> str:
    """Read a recipe from its file and build it; return the version, `name@version`, new or the one that was there.

    The file is read when the flow runs, so that each run of a schedule sees new pairs and changes of the recipe.
    """
    result = build_weights(load_recipe(recipe_file, overrides or [], store))
    return f"{result.published.name}@{result.published.weights.version}"


@task(name="find model", task_run_name="find model", **AGAIN)
def find_model(recipe: Recipe) -> Path:
    """Check the recipe's inputs, which a schedule finds as they are by now, and resolve the starting model to a folder."""
    return check_inputs(recipe)


@task(name="prepare", task_run_name="prepare {recipe.dataset.name}", **AGAIN)
def prepare_tokens(recipe: Recipe, model_folder: Path) -> Prepared:
    """Tokenise new pairs; put unusable rows into quarantine."""
    with lineage_of("prepare", recipe.weights.name, [recipe.dataset.source, str(model_folder)]) as outputs:
        prepared = prepare(recipe, model_folder)
        outputs.append(prepared.tokens)
    num_quarantined = sum(prepared.quarantined.values())
    _log.info(
        f"{prepared.num_source_rows} rows = {prepared.num_pairs} pairs + {num_quarantined} quarantined "
        f"{prepared.quarantined or ''}; {prepared.num_new_pairs} pairs are new"
    )
    return prepared


@task(name="annotate", task_run_name="annotate", **AGAIN)
def annotate_pairs(prepared: Prepared, recipe: Recipe, model_folder: Path) -> TableVersion:
    """Read the user's own weights of every pair; put pairs whose weights cannot be used into quarantine."""
    with lineage_of("annotate", recipe.weights.name, [prepared.tokens, recipe.dataset.source]) as outputs:
        annotations = annotate(recipe, prepared.tokens, model_folder)
        outputs.append(annotations)
        return annotations


@task(name="score", task_run_name="score")
def score_tokens(
    prepared: Prepared, scorers: dict[str, Scorer], recipe: Recipe, model_folder: Path
) -> dict[str, Filled]:
    """Score the pairs that have no log-probs yet. Prefect retries nothing: `score` restarts its process itself."""
    models = dict.fromkeys(str(scorer.model) for scorer in scorers.values())
    with (
        _gpus(recipe, recipe.score.tensor_parallel),
        _progress("score", scorers, prepared),
        lineage_of("score", recipe.weights.name, [prepared.tokens, *models]) as outputs,
    ):
        scored = score(prepared.tokens, scorers, recipe.score, model_folder, recipe.model.chat_template)
        outputs += [result.output for result in scored.values()]
    for role, result in scored.items():
        if result.num_pairs == 0:
            _log.info(f"score {role}: {result.output}: nothing to score")
    return scored


@task(name="attribute", task_run_name="attribute {recipe.attribute.target}")
def attribute_tokens(prepared: Prepared, recipe: Recipe, model_folder: Path) -> Filled:
    """Compute the attributions of the pairs that have none yet."""
    with (
        _gpus(recipe, 1),
        _progress("attribute", ["ref"], prepared),
        lineage_of("attribute", recipe.weights.name, [prepared.tokens, str(model_folder)]) as outputs,
    ):
        attributed = attribute(prepared.tokens, model_folder, recipe.attribute, executor_of(recipe.score))
        outputs.append(attributed.output)
        return attributed


@task(name="anchors", task_run_name="anchors")
def sample_anchor_responses(prepared: Prepared, recipe: Recipe, model_folder: Path) -> Filled:
    """Make an anchor for every pair that has none yet."""
    assert recipe.anchors is not None, "the flow calls this task only for a recipe with [anchors]"
    with (
        _gpus(recipe, recipe.score.tensor_parallel),
        _progress("anchors", ["ref"], prepared),
        lineage_of("anchors", recipe.weights.name, [prepared.tokens, str(model_folder)]) as outputs,
    ):
        anchors = sample_anchors(prepared.tokens, model_folder, recipe.anchors, recipe.score)
        outputs.append(anchors.output)
        return anchors


@task(name="contrast", task_run_name="contrast {recipe.contrast.method}", **AGAIN)
def build_contrast(recipe: Recipe, model_folder: Path, uniform: Published) -> ContrastivePair:
    """Build the contrastive pair, or find the one that the store has already."""
    settings = recipe.contrast_settings
    with (
        holding_gpus(settings.train.num_processes),
        lineage_of("contrast", recipe.weights.name, [uniform.weights, str(model_folder)]) as outputs,
    ):
        pair = contrast(settings, model_folder, uniform.weights)
        outputs += [str(scorer.model) for scorer in pair.scorers.values()]
        return pair


@task(name="publish", task_run_name="publish {weights.name}", **AGAIN)
def publish_weights(
    recipe: Recipe, weights: WeightsSection, ingredients: Ingredients, model_folder: Path, expect_same: bool = False
) -> Published:
    """Compute weights and publish them. With all weights 1: for contrastive training and the plain DPO baseline.

    The check of stored log-probs runs a model, on a GPU if there is one.
    """
    check = partial(check_stored, recipe, ingredients.tokens, ingredients.ref_logps, model_folder)
    with holding_gpus(1), lineage_of("publish", weights.name, [*ingredients.by_role().values()]) as outputs:
        published = publish(recipe, weights, ingredients, expect_same, check, model_folder)
        outputs.append(published.weights)
        return published


@task(name="report", task_run_name="report {published.name}", **AGAIN)
def report_weights(published: Published, ingredients: Ingredients, model_folder: Path) -> tuple[str, list[Diagnosis]]:
    """Write the page, announce a new version, and show both; return the path of the page, and what looks wrong."""
    report = write_report(published, model_folder, on_new=partial(announce, published))
    show_published(published, report)
    show_rows(published)
    show_versions(published, ingredients.by_role())
    return report.path, report.diagnoses


def _progress(stage: Stage, roles: Iterable[str], prepared: Prepared) -> AbstractContextManager[None]:
    return progress_artifacts([f"{stage} {role}" for role in roles], str(prepared.tokens))


def _gpus(recipe: Recipe, number: int) -> AbstractContextManager[None]:
    """Hold the GPUs that a stage uses here, as soon as it runs a model; Ray has its own book."""
    return holding_gpus(number if recipe.score.executor == "process" else 0)


@contextmanager
def _record_time(stage_s: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    stage_s[stage] = time.monotonic() - started
