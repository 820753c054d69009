"""Stage attribute: how much each response token matters to the reference policy, by gradients (TI-DPO).

Runs in a process of its own like scoring (`jobs.py`); the gradients are in `attribution.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.child import check_extra
from pipeline.recipe import AttributeSection
from pipeline.workers.request import Request
from pipeline.workers.supervise import Filled, Job, report_new_tables, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION


def attribute(
    tokens: TableVersion,
    model: Path,
    settings: AttributeSection,
    executor: Mapping[str, Any],
) -> Filled:
    """Bring a model's attributions up to a version of the tokens table; returns at once when nothing is missing.

    Args:
        tokens: The pairs to cover.
        model: Folder of the reference policy.
        settings: Section `[attribute]` of the recipe.
        executor: Where it runs, see `ScoreSection.executor_settings`.

    Raises:
        MissingExtraError: There is something to do, and no torch or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    identity = attribution_identity(model, settings)
    job = Job.of("attribute", tokens, "ref", model, identity)
    report_new_tables([job])
    if job.to_do:
        if executor["kind"] == "ray":
            check_extra("ray", "pip install 'tokenweights[ray]'", settings.python)
        else:
            check_extra("torch", "pip install 'tokenweights[score]' or 'tokenweights[train]'", settings.python)
        request = Request.over(
            tokens,
            model,
            targets=[job.target(tokens)],
            chunk_tokens=settings.chunk_tokens,
            engine={"dtype": identity["dtype"], "batch_tokens": settings.batch_tokens},
            executor=dict(executor),
            stage="attribute",
            options=settings.model_dump(include={"target", "prompts", "activations"}),
        )
        run_jobs(request, [job], settings.python)
    return job.result()


def attribution_identity(model: Path, settings: AttributeSection) -> dict[str, Any]:
    """Return what determines the numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint_model(model),
        **settings.result_settings(),
        "dtype": resolve_dtype(model, settings.dtype),
    }
