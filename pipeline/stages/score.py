"""Stage score: per-token log-probs of models over a tokens table, in a process of its own for each model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import ScoreSection
from pipeline.workers.request import Executor, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import fingerprint, fingerprint_model
from weights_store.schemas import SCHEMA_VERSION

REFERENCE = "ref"


@dataclass(frozen=True)
class Scorer:
    """A model, maybe behind a contrastive prompt."""

    model: Path
    condition: Condition | None = None

    def identity(self, dtype: str) -> dict[str, object]:
        """Return what determines this scorer's numbers, in a resolved dtype."""
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

    The scorers are given by their role: `ref`, `positive` or `negative`, `positive2` … of further pairs. Those that share a
    model, like the two prompts of construction P, share one process: the engine starts once. Those that are one and the same,
    like the reference and a given pair's starting model, share one table. The chat template for their prompts is that of
    `tokenizer_folder`, or the recipe's own file `chat_template`.

    Raises:
        MissingExtraError: There is something to score, and no vLLM or, for actors, no Ray.
        StageError: The process failed, also when started again; carries its message. What it had committed stays.
    """
    identities = {role: identity_in(role, scorer, settings) for role, scorer in scorers.items()}
    tables = {role: fingerprint(identity) for role, identity in identities.items()}
    jobs: dict[str, Job] = {}
    for role, scorer in scorers.items():
        if tables[role] not in jobs:
            jobs[tables[role]] = Job("score", tokens, role, scorer.model, identities[role], scorer.condition)
    by_model: dict[Path, list[Job]] = {}
    for job in jobs.values():
        if job.to_do:
            by_model.setdefault(job.model, []).append(job)
    for model, of_model in by_model.items():
        request = Request(
            "score",
            tokens,
            str(model),
            [job.target() for job in of_model],
            settings.chunk_tokens,
            engine_settings(settings, resolve_dtype(model, settings.dtype)),
            executor_of(settings),
            tokenizer=str(tokenizer_folder),
            chat_template=chat_template,
        )
        run_jobs(request, of_model, settings.python)
    results = {table: job.result() for table, job in jobs.items()}
    return {
        role: results[table] if jobs[table].role == role else Filled(results[table].output)
        for role, table in tables.items()
    }


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
    identity = scorer.identity(resolve_dtype(scorer.model, settings.dtype))
    stores_top = role == REFERENCE and settings.top_k > 0
    return {**identity, "top_k": settings.top_k} if stores_top else identity
