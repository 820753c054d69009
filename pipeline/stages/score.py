"""Stage score: per-token log-probs of models over a tokens table, in a process of its own for each model (`jobs.py`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.child import check_extra
from pipeline.recipe import ScoreSection
from pipeline.source.chat import Condition
from pipeline.workers.request import Request
from pipeline.workers.supervise import Filled, Job, report_new_tables, resolve_dtype, run_jobs, stage_table
from weights_store import Table, TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION

REFERENCE = "ref"


@dataclass(frozen=True)
class Scorer:
    """A model, maybe behind a contrastive prompt: what a column of log-probs comes from."""

    model: Path
    condition: Condition | None = None

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype to score in: for `auto` the one the model is stored in."""
        return resolve_dtype(self.model, dtype)

    def identity(self, dtype: str) -> dict[str, Any]:
        """Return what determines this scorer's numbers."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": fingerprint_model(self.model),
            "condition": asdict(self.condition) if self.condition else None,
            "dtype": dtype,
        }


def score(
    tokens: TableVersion,
    scorers: Mapping[str, Scorer],
    settings: ScoreSection,
    tokenizer_folder: Path,
    chat_template: str | None = None,
) -> dict[str, Filled]:
    """Bring the scorers' logps tables up to a version of the tokens table; returns at once when nothing is missing.

    Scorers that share a model, like the two prompts of construction P, share one process: the engine starts once.

    Args:
        tokens: The pairs to cover.
        scorers: By what they are to the build: `ref`, `positive` or `negative`.
        settings: Engine settings of the recipe.
        tokenizer_folder: Where the chat template for a contrastive prompt is; a trained model keeps its origin's.
        chat_template: The recipe's own template file, if any.

    Raises:
        MissingExtraError: There is something to score, and no vLLM or, for actors, no Ray.
        StageError: A scoring process failed, also when started again; carries its message. What it had committed stays.
    """
    jobs = [_job(tokens, role, scorer, settings) for role, scorer in scorers.items()]
    report_new_tables(jobs)
    for model, group in groupby([job for job in jobs if job.to_do], key=lambda job: job.model):
        check_engine(settings)
        of_model = list(group)
        request = Request.over(
            tokens,
            model,
            tokenizer=str(tokenizer_folder),
            chat_template=chat_template,
            targets=[job.target(tokens) for job in of_model],
            chunk_tokens=settings.chunk_tokens,
            engine=settings.engine_settings(of_model[0].identity["dtype"]),
            executor=settings.executor_settings(),
        )
        run_jobs(request, of_model, settings.python)
    return {job.role: job.result() for job in jobs}


def check_engine(settings: ScoreSection) -> None:
    """Check that what runs the engine is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if settings.executor == "ray":  # vLLM is needed where the actors run
        check_extra("ray", "pip install 'tokenweights[ray]'", settings.python)
    else:
        check_extra("vllm", "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'", settings.python)


def _job(tokens: TableVersion, role: str, scorer: Scorer, settings: ScoreSection) -> Job:
    condition = asdict(scorer.condition) if scorer.condition else None
    return Job.of("score", tokens, role, scorer.model, identity_in(role, scorer, settings), condition)


def identity_in(role: str, scorer: Scorer, settings: ScoreSection) -> dict[str, Any]:
    """Return what determines what a scorer writes in a role of a build.

    Likeliest tokens are the reference's alone, and part of this only where they are stored: tables without them stay as
    they are.
    """
    identity = scorer.identity(scorer.resolve_dtype(settings.dtype))
    stores_top = role == REFERENCE and settings.top_k > 0
    return {**identity, "top_k": settings.top_k} if stores_top else identity


def logps_table(tokens: TableVersion, identity: dict[str, Any]) -> Table:
    """Return the table of one scorer over one dataset."""
    return stage_table("score", tokens, identity)
