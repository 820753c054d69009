"""Stage anchors: another response to each prompt, and its log-probs under the reference.

It is sampled from the reference (TI-DPO), or is a response to another prompt (KTO). Runs in a process of its own, like scoring;
`workers/anchors/` does it.
"""

from dataclasses import replace
from pathlib import Path

from pipeline.recipe import ScoreSection
from pipeline.stage_sections import AnchorsSection
from pipeline.stages.score import engine_settings, executor_of
from pipeline.workers.anchors.sampler import config_stop_ids, longest_response
from pipeline.workers.request import AnchorOptions, MismatchOptions, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION


def sample_anchors(tokens: TableVersion, model: Path, settings: AnchorsSection, engine: ScoreSection) -> Filled:
    """Bring a model's anchors up to a version of the tokens table; returns at once when nothing is missing.

    `model` is the folder of the reference policy. The engine that samples is the one that scores. Anchors stay as they are when
    pairs are added, though a response to another prompt may then be nearer.

    Raises:
        MissingExtraError: There is something to do, and no vLLM or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    job = Job("anchors", tokens, "ref", model, anchors_identity(model, settings, engine))
    if job.to_do:
        request = Request(
            "anchors",
            tokens,
            str(model),
            [job.target()],
            engine.chunk_tokens,
            replace(engine_settings(engine, resolve_dtype(model, engine.dtype)), samples=settings.source == "sampled"),
            executor_of(engine),
            options=_options(tokens, settings),
        )
        run_jobs(request, [job], engine.python)
    return job.result()


def _options(tokens: TableVersion, settings: AnchorsSection) -> AnchorOptions | MismatchOptions:
    if settings.source == "mismatched":
        return MismatchOptions(longest_response(tokens))
    return AnchorOptions(settings.sampling, settings.seed)


def anchors_identity(model: Path, settings: AnchorsSection, engine: ScoreSection) -> dict[str, object]:
    """Return what determines the anchors, up to rounding.

    The fingerprint of a model leaves generation_config.json out, which may end an anchor: so the stop ids are part of this.
    """
    is_sampled = settings.source == "sampled"
    stop_ids = {"stop_ids": sorted(config_stop_ids(model))} if is_sampled else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint_model(model),
        "dtype": resolve_dtype(model, engine.dtype),
        "sampling": {**settings.result_settings(), **stop_ids},
    }
