"""Stage score: per-token log-probs of models over a tokens table, in a process of its own for each architecture."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import ScoreSection
from pipeline.workers.request import Executor, Request
from pipeline.workers.supervise import Filled, Job, resolve_dtype, run_jobs
from weights_store import TableVersion
from weights_store.fingerprint import WEIGHT_FILE, fingerprint, fingerprint_model, load_json
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

    The scorers are given by their role: `ref`, `positive` or `negative`, `positive2` … of further pairs. Those that one engine
    can run share a process, see `engine_key`: it starts once. Those that are one and the same, like the reference and a given
    pair's starting model, share one table. The chat template for their prompts is that of
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
    to_do = [job for job in jobs.values() if job.to_do]
    by_engine: dict[str, list[Job]] = {}
    for job in sorted(to_do, key=lambda job: str(job.model)):  # all of one model, then all of the next
        by_engine.setdefault(engine_key(job.model, settings), []).append(job)
    for of_engine in by_engine.values():
        model = of_engine[0].model
        request = Request(
            "score",
            tokens,
            str(model),
            [job.target() for job in of_engine],
            settings.chunk_tokens,
            engine_settings(settings, resolve_dtype(model, settings.dtype)),
            executor_of(settings),
            tokenizer=str(tokenizer_folder),
            chat_template=chat_template,
        )
        run_jobs(request, of_engine, settings.python)
    results = {table: job.result() for table, job in jobs.items()}
    return {
        role: results[table] if jobs[table].role == role else Filled(results[table].output)
        for role, table in tables.items()
    }


def engine_key(model: Path, settings: ScoreSection) -> str:
    """Return what models have in common that one engine can run, one after the other, by exchanging its weights.

    They have the same dtype, config and tensors. On Ray, where an actor computes chunks of any target, and for weights that are
    quantized, each model has engines of its own.
    """
    config = load_json(model / "config.json")
    if settings.executor == "ray" or "quantization_config" in config:
        return str(model)
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    same = {key: value for key, value in config.items() if key not in ignored}
    try:
        shapes = _tensor_shapes(model)
    except (ValueError, AttributeError):  # not safetensors: the engine says what is wrong with the files
        return str(model)
    return fingerprint([resolve_dtype(model, settings.dtype), same, shapes])


def _tensor_shapes(model: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of a model folder, from the headers of its safetensors files."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob(WEIGHT_FILE)):
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > path.stat().st_size:
                raise ValueError(f"{path} is not a whole safetensors file")
            header = json.loads(file.read(num_bytes))
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    return shapes


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
