"""Stage score: per-token log-probs of models over a tokens table, in a process of its own for each model.

`score` finds what is missing, writes a request and starts `python -m pipeline.score REQUEST`, so that the engine's memory is
gone afterwards and its requirements need not be the caller's. A process that dies is started again, with a smaller token
budget when it died for want of memory. What it does is in `scoring.py`.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.chat import Condition
from pipeline.child import check_extra, end_with_parent, run_child
from pipeline.provenance import provenance
from pipeline.recipe import ScoreSection
from pipeline.scoring import (
    EXIT_ENGINE,
    EXIT_OUT_OF_MEMORY,
    MESSAGE,
    Request,
    Target,
    count_missing,
    run,
)
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import EngineError, KilledError, OutOfMemoryError, StageError, TokenweightsError
from weights_store.fingerprint import explain_difference, fingerprint, fingerprint_model, load_json
from weights_store.schemas import SCHEMA_VERSION

_MAX_RESTARTS = 3
"""In a row, without a commit in between."""
REFERENCE = "ref"
_MIN_BATCH_TOKENS = 256


@dataclass(frozen=True)
class Scorer:
    """A model, maybe behind a contrastive prompt: what a column of log-probs comes from."""

    model: Path
    condition: Condition | None = None

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype to score in: for `auto` the one the model is stored in.

        vLLM's own `auto` would quietly turn float32 into a 16-bit type.
        """
        config = load_json(self.model / "config.json")
        return dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "auto"

    def identity(self, dtype: str) -> dict[str, Any]:
        """Return what determines this scorer's numbers."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": fingerprint_model(self.model),
            "condition": asdict(self.condition) if self.condition else None,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class Scored:
    """What score hands on for one scorer."""

    logps: TableVersion
    num_scored_pairs: int = 0
    num_scored_tokens: int = 0
    num_unscorable: int = 0
    wall_s: float = 0.0
    """Seconds of scoring, without the engine's start."""
    restarts: tuple[str, ...] = ()
    """Why the engine was started again."""


@dataclass(frozen=True)
class Progress:
    """How far the scoring of one role is."""

    role: str
    done: int
    """Tokens: prompt, chosen and rejected, each once per pair."""
    total: int
    wall_s: float

    @property
    def percent(self) -> float:
        """Share done, 0 to 100."""
        return 100 * self.done / self.total if self.total else 100.0

    def __str__(self) -> str:
        if not self.done:
            return f"score {self.role}: {self.total:,} tokens to do"
        rate = self.done / max(self.wall_s, 1e-9)
        left = (self.total - self.done) / rate
        return f"score {self.role}: {self.done:,}/{self.total:,} tokens, {rate:,.0f} tokens/s, {duration(left)} left"


def duration(seconds: float) -> str:
    """Return seconds as people read them: `<1 s`, `12 s`, `3 min 05 s`, `1,204 h 07 min`."""
    if seconds < 1:
        return "<1 s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {rest_min:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


def score(
    tokens: TableVersion,
    scorers: Mapping[str, Scorer],
    settings: ScoreSection,
    tokenizer_folder: Path,
    chat_template: str | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Scored]:
    """Bring the scorers' logps tables up to a version of the tokens table; returns at once when nothing is missing.

    Scorers that share a model, like the two prompts of construction P, share one process: the engine starts once.

    Args:
        tokens: The pairs to cover.
        scorers: By what they are to the build: `ref`, `positive` or `negative`.
        settings: Engine settings of the recipe.
        tokenizer_folder: Where the chat template for a contrastive prompt is; a trained model keeps its origin's.
        chat_template: The recipe's own template file, if any.
        report: Gets one line now and then.
        progress: Gets the state of the role that is being scored, at least at every commit.

    Raises:
        MissingExtraError: There is something to score, and no vLLM or, for actors, no Ray.
        StageError: A scoring process failed, also when started again; carries its message. What it had committed stays.
    """
    jobs = [_Job.of(tokens, role, scorer, settings) for role, scorer in scorers.items()]
    for job in jobs:
        if job.is_new:
            _report_new_table(job, report)
    for model, group in groupby([job for job in jobs if job.to_do], key=lambda job: job.scorer.model):
        if settings.executor == "ray":  # vLLM is needed where the actors run
            check_extra("ray", "pip install 'tokenweights[ray]'", settings.python)
        else:
            check_extra("vllm", "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'", settings.python)
        of_model = list(group)
        request = Request(
            store=tokens.store,
            tokens_table=tokens.table,
            tokens_version=tokens.version,
            model=str(model),
            tokenizer=str(tokenizer_folder),
            chat_template=chat_template,
            targets=[job.target(tokens) for job in of_model],
            chunk_tokens=settings.chunk_tokens,
            engine=settings.engine_settings(of_model[0].identity["dtype"]),
            executor=settings.executor_settings(),
        )
        start = partial(_run_process, jobs=of_model, python=settings.python, report=report, progress=progress)
        _run_to_the_end(request, of_model, start, report)
    return {job.role: job.result() for job in jobs}


@dataclass
class _Job:
    """One role: its table, and what was missing from it when the stage began."""

    role: str
    scorer: Scorer
    identity: dict[str, Any]
    table: Table
    num_missing: int
    num_missing_tokens: int
    num_rows_before: int
    is_new: bool
    wall_s: float = 0.0
    restarts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: TableVersion, role: str, scorer: Scorer, settings: ScoreSection) -> "_Job":
        identity = identity_in(role, scorer, settings)
        table = logps_table(tokens, identity)
        exists = table.exists()
        return cls(
            role, scorer, identity, table, *count_missing(tokens, table), table.num_rows() if exists else 0, not exists
        )

    @property
    def to_do(self) -> bool:
        return bool(self.num_missing) or self.is_new

    def target(self, tokens: TableVersion) -> Target:
        metadata = {
            "scorer": self.identity,
            "role": self.role,
            "parents": [tokens.as_parent()],
            "fingerprint": fingerprint({"scorer": self.identity, "tokens": tokens.fingerprint}),
            **provenance(),
        }
        condition = asdict(self.scorer.condition) if self.scorer.condition else None
        return Target(self.role, self.table.path, condition, metadata, self.identity.get("top_k", 0))

    def num_scored(self) -> int:
        return self.table.num_rows() - self.num_rows_before if self.table.exists() else 0

    def result(self) -> Scored:
        num_scored = self.num_scored()
        return Scored(
            self.table.reference(),
            num_scored,
            self.num_missing_tokens,
            self.num_missing - num_scored,
            self.wall_s,
            tuple(self.restarts),
        )


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
    key = tokens.table.removeprefix("tokens/")
    return WeightStore(tokens.store).table(f"logps/{key}/{fingerprint(identity)[:12]}")


def changed_scorer(table: Table, role: str, identity: dict[str, Any]) -> tuple[str, list[str]] | None:
    """Return the table last scored in this role over the same pairs, and what differs from it; None if there is none."""
    folder = table.path.rpartition("/")[0]
    others = [t for t in WeightStore(str(table.root)).tables("logps") if t.path.startswith(f"{folder}/")]
    newest = {other.path: other.history(limit=1)[0] for other in others}
    same_role = [
        (c.timestamp_ms, path, c.metadata)
        for path, c in newest.items()
        if c.metadata and c.metadata.get("role") == role
    ]
    if not same_role:
        return None
    _, path, metadata = max(same_role)
    return path, explain_difference(metadata["scorer"], identity)


def _report_new_table(job: _Job, report: Callable[[str], None]) -> None:
    """Say why pairs that were scored in this role before are scored anew."""
    changed = changed_scorer(job.table, job.role, job.identity)
    if changed is not None:
        path, changes = changed
        report(f"score {job.role}: {job.table.path} is a new table; unlike {path}: {'; '.join(changes)}")


# --- the process -------------------------------------------------------------------------------------------------------


def _run_to_the_end(
    request: Request, jobs: list[_Job], start: Callable[[Request], None], report: Callable[[str], None]
) -> None:
    """Run the scoring process, and start it again when it dies, with half the budget when that was for want of memory.

    Raises:
        StageError: It failed for another reason, or died `_MAX_RESTARTS` times in a row without getting anything done.
    """
    budget, num_fruitless, restarts = int(request.engine["batch_tokens"]), 0, list[str]()
    while True:
        before = sum(job.num_scored() for job in jobs)
        engine = {**request.engine, "batch_tokens": budget, "restarts": restarts}
        try:
            start(replace(request, engine=engine))
            return
        except (KilledError, EngineError) as error:
            if not any(count_missing(request.tokens, job.table)[0] for job in jobs):
                return  # it died after its work
            num_scored = sum(job.num_scored() for job in jobs)
            num_fruitless = 0 if num_scored > before else num_fruitless + 1
            if num_fruitless > _MAX_RESTARTS:
                raise StageError(
                    f"scoring gave up after {num_fruitless} starts in a row without a result; the last: {error}. {num_scored} "
                    f"of {sum(job.num_missing for job in jobs)} pairs are scored and stay; run again to go on"
                ) from error
            # A plain kill may have been the kernel's, for want of memory; when it comes again without progress, it was.
            if isinstance(error, OutOfMemoryError) or (isinstance(error, KilledError) and num_fruitless > 1):
                budget = max(_MIN_BATCH_TOKENS, budget // 2)
            restarts = [*restarts, f"{error}; batch_tokens {budget}"]
            for job in jobs:
                job.restarts = restarts
            report(f"{error}. Starting again with batch_tokens {budget}; {num_scored} pairs are scored and stay")


def _run_process(
    request: Request,
    jobs: list[_Job],
    python: str | None,
    report: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> None:
    job_of = {job.role: job for job in jobs}
    started_at = {job.role: job.wall_s for job in jobs}

    def heard(line: str) -> None:
        message = json.loads(line)
        if "line" in message:
            report(message["line"])
            return
        state = Progress(**message)
        job_of[state.role].wall_s = started_at[state.role] + state.wall_s
        progress(state)

    with _request_file(request) as path:
        command = [python or sys.executable, "-m", "pipeline.score", str(path)]
        failures = {EXIT_OUT_OF_MEMORY: OutOfMemoryError, EXIT_ENGINE: EngineError}
        run_child(command, f"scoring with {request.model}", heard, MESSAGE, failures)


@contextmanager
def _request_file(request: Request) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="score-", delete=False) as file:
        json.dump(asdict(request), file)
    try:
        yield Path(file.name)
    finally:
        Path(file.name).unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    """Score one request file; what `python -m pipeline.score` runs."""
    end_with_parent()
    try:
        run(Request.load(argv[0]))
    except TokenweightsError as error:
        print(f"error: {error}", flush=True)
        if isinstance(error, OutOfMemoryError):
            return EXIT_OUT_OF_MEMORY
        return EXIT_ENGINE if isinstance(error, EngineError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
