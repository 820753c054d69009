"""Stage anchors: one response per prompt, sampled from the reference policy with vLLM, and its log-probs (TI-DPO).

Runs in a process of its own, like scoring; `workers/anchor_sampler.py` samples.
"""

from dataclasses import replace
from pathlib import Path

from pipeline.recipe import AnchorsSection, ScoreSection
from pipeline.stages.score import engine_settings, executor_of
from pipeline.workers.anchor_sampler import config_stop_ids
from pipeline.workers.request import AnchorOptions, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs
from train.model.sampling import AnchorSampling
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION


def sample_anchors(tokens: TableVersion, model: Path, settings: AnchorsSection, engine: ScoreSection) -> Filled:
    """Bring a model's anchors up to a version of the tokens table; returns at once when nothing is missing.

    `model` is the folder of the reference policy. The engine that samples is the one that scores.

    Raises:
        MissingExtraError: There is something to sample, and no vLLM or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    job = Job("anchors", tokens, "ref", model, anchors_identity(model, settings, engine))
    if job.to_do:
        sampling = AnchorSampling(**settings.model_dump(exclude={"seed"}))
        request = Request(
            "anchors",
            tokens,
            str(model),
            [job.target()],
            engine.chunk_tokens,
            replace(engine_settings(engine, resolve_dtype(model, engine.dtype)), samples=True),
            executor_of(engine),
            options=AnchorOptions(sampling, settings.seed),
        )
        run_jobs(request, [job], engine.python)
    return job.result()


def anchors_identity(model: Path, settings: AnchorsSection, engine: ScoreSection) -> dict[str, object]:
    """Return what determines the anchors, up to rounding.

    The fingerprint of a model leaves generation_config.json out, which may end an anchor: so the stop ids are part of this.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint_model(model),
        "dtype": resolve_dtype(model, engine.dtype),
        "sampling": {**settings.model_dump(), "stop_ids": sorted(config_stop_ids(model))},
    }
