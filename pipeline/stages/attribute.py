"""Stage attribute: how much each response token matters to the reference policy, by gradients (TI-DPO).

Runs in a process of its own, like scoring; `workers/pair_attributor.py` computes the gradients.
"""

from pathlib import Path

from pipeline.engine.contract import EngineSettings
from pipeline.stage_sections import AttributeSection
from pipeline.workers.request import AttributionOptions, Executor, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION


def attribute(tokens: TableVersion, model: Path, settings: AttributeSection, executor: Executor) -> Filled:
    """Bring a model's attributions up to a version of the tokens table; returns at once when nothing is missing.

    `model` is the folder of the reference policy.

    Raises:
        MissingExtraError: There is something to do, and no torch or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    job = Job("attribute", tokens, "ref", model, attribution_identity(model, settings))
    if job.to_do:
        request = Request(
            "attribute",
            tokens,
            str(model),
            [job.target()],
            settings.chunk_tokens,
            EngineSettings(resolve_dtype(model, settings.dtype), settings.batch_tokens),
            executor,
            options=AttributionOptions(settings.target, settings.prompts, settings.activations, settings.contexts),
        )
        run_jobs(request, [job], settings.python)
    return job.result()


def attribution_identity(model: Path, settings: AttributeSection) -> dict[str, object]:
    """Return what determines the numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint_model(model),
        **settings.result_settings(),
        "dtype": resolve_dtype(model, settings.dtype),
    }
