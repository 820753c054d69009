"""Stage anchors: one response per prompt, sampled from the reference policy with vLLM, and its log-probs (TI-DPO).

Runs in a process of its own like scoring (`jobs.py`); the sampling is in `anchor_sampling.py`.
"""

from pathlib import Path
from typing import Any

from pipeline.recipe import AnchorsSection, ScoreSection
from pipeline.stages.score import check_engine
from pipeline.workers.anchor_sampler import config_stop_ids
from pipeline.workers.request import Request
from pipeline.workers.supervise import Filled, Job, report_new_tables, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION


def sample_anchors(
    tokens: TableVersion,
    model: Path,
    settings: AnchorsSection,
    engine: ScoreSection,
) -> Filled:
    """Bring a model's anchors up to a version of the tokens table; returns at once when nothing is missing.

    Args:
        tokens: The pairs to cover.
        model: Folder of the reference policy.
        settings: How it is sampled.
        engine: Section `[score]` of the recipe: the engine that samples is the one that scores.

    Raises:
        MissingExtraError: There is something to sample, and no vLLM or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    identity = anchors_identity(model, settings, engine)
    job = Job.of("anchors", tokens, "ref", model, identity)
    report_new_tables([job])
    if job.to_do:
        check_engine(engine)
        request = Request.over(
            tokens,
            model,
            targets=[job.target(tokens)],
            chunk_tokens=engine.chunk_tokens,
            engine=engine.engine_settings(identity["dtype"]),
            executor=engine.executor_settings(),
            stage="anchors",
            options=settings.model_dump(),
        )
        run_jobs(request, [job], engine.python)
    return job.result()


def anchors_identity(model: Path, settings: AnchorsSection, engine: ScoreSection) -> dict[str, Any]:
    """Return what determines the anchors, as far as sampling can be repeated: the make-up of a batch moves rounding.

    A model's fingerprint says nothing of generation_config.json, which may end an anchor.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint_model(model),
        "dtype": resolve_dtype(model, engine.dtype),
        "sampling": {**settings.model_dump(), "stop_ids": sorted(config_stop_ids(model))},
    }
