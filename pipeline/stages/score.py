"""Stage score: per-token log-probs of models over a tokens table, in a process of its own for each model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from pipeline.child import check_extra
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import ScoreSection
from pipeline.source.chat import Condition
from pipeline.workers.request import Executor, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs, stage_table
from weights_store import Table, TableVersion
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import SCHEMA_VERSION

REFERENCE = "ref"


@dataclass(frozen=True)
class Scorer:
    """A model, maybe behind a contrastive prompt."""

    model: Path
    condition: Condition | None = None

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype to score in, see `supervise.resolve_dtype`."""
        return resolve_dtype(self.model, dtype)

    def identity(self, dtype: str) -> dict[str, object]:
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
        scorers: By role in the build: `ref`, `positive` or `negative`.
        settings: Section `[score]` of the recipe.
        tokenizer_folder: Where the chat template for a contrastive prompt is; a trained model keeps that of its origin.
        chat_template: The recipe's own template file, if any.

    Raises:
        MissingExtraError: There is something to score, and no vLLM or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    jobs = [
        Job.of("score", tokens, role, scorer.model, identity_in(role, scorer, settings), scorer.condition)
        for role, scorer in scorers.items()
    ]
    for model, group in groupby([job for job in jobs if job.to_do], key=lambda job: job.model):
        check_engine(settings)
        of_model = list(group)
        request = Request(
            "score",
            tokens,
            str(model),
            [job.target(tokens) for job in of_model],
            settings.chunk_tokens,
            engine_settings(settings, resolve_dtype(model, settings.dtype)),
            executor_of(settings),
            tokenizer=str(tokenizer_folder),
            chat_template=chat_template,
        )
        run_jobs(request, of_model, settings.python)
    return {job.role: job.result() for job in jobs}


def check_engine(settings: ScoreSection) -> None:
    """Check that what runs the engine is installed.

    Raises:
        MissingExtraError: It is not.
    """
    check_extra(
        "ray" if settings.executor == "ray" else "vllm", settings.python
    )  # Ray's actors have vLLM where they run


def engine_settings(settings: ScoreSection, dtype: str) -> EngineSettings:
    """Return how the engine runs, in a resolved dtype."""
    return EngineSettings(
        dtype, settings.batch_tokens, settings.kv_cache_gib, settings.gpu_memory_share, settings.tensor_parallel
    )


def executor_of(settings: ScoreSection) -> Executor:
    """Return where the workers of a stage run."""
    return Executor(settings.executor, settings.num_actors, settings.cpus_per_actor, settings.ray_address)


def identity_in(role: str, scorer: Scorer, settings: ScoreSection) -> dict[str, object]:
    """Return what determines what a scorer writes in a role of a build.

    The most likely tokens are stored for the reference alone. `top_k` is part of its identity only if they are: tables
    without them keep their name.
    """
    identity = scorer.identity(scorer.resolve_dtype(settings.dtype))
    stores_top = role == REFERENCE and settings.top_k > 0
    return {**identity, "top_k": settings.top_k} if stores_top else identity


def logps_table(tokens: TableVersion, identity: dict[str, object]) -> Table:
    """Return the table of one scorer over one dataset."""
    return stage_table("score", tokens, identity)
