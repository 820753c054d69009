"""What the stages that run a model over all pairs have in common: find what is missing, and run a process until it is done.

Called by the stages score, attribute and anchors. The process is `process.py`: a process of its own, so that the model's memory
is free afterwards and its interpreter may have other packages. If it dies it is started again, with a smaller token budget if
it ran out of memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.chat.tokenizer import Condition
from pipeline.child import check_extra, run_child, running_model, temporary_folder
from pipeline.provenance import provenance
from pipeline.workers.missing import count_missing
from pipeline.workers.request import DOING, DONE, Request, Stage, Target
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import EngineError, KilledError, OutOfMemoryError, SequenceLengthError, StageError
from weights_store.fingerprint import explain_difference, fingerprint, load_json
from weights_store.messages import Progress, logger
from weights_store.names import name_of

_log = logger(__name__)

_MAX_RESTARTS = 3
"""In a row, without a commit in between."""
FOLDERS: dict[Stage, str] = {"score": "logps", "attribute": "attributions", "anchors": "anchors"}
"""Where the tables of each stage lie in a store."""
_PACKAGES: dict[Stage, str] = {"score": "vllm", "attribute": "torch", "anchors": "vllm"}
"""What each stage's process needs most."""


@dataclass(frozen=True)
class Filled:
    """What a stage hands on for one table."""

    output: TableVersion
    num_pairs: int = 0
    """Computed now, not before."""
    num_tokens: int = 0
    num_unscorable: int = 0
    wall_s: float = 0.0
    """Seconds of computing, without the model's start."""
    restarts: tuple[str, ...] = ()
    """Why the process was started again."""


def resolve_dtype(model: Path, dtype: str) -> str:
    """Return the dtype to compute in: for `auto`, the one that the model is stored in.

    vLLM's own `auto` would turn float32 into a 16-bit type.
    """
    config = load_json(model / "config.json")
    return dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "auto"


def stage_table(stage: Stage, tokens: TableVersion, identity: Mapping[str, object]) -> Table:
    """Return the table of a stage over one dataset, for a model with the settings that determine its numbers."""
    return WeightStore(tokens.store).table(
        f"{FOLDERS[stage]}/{name_of(tokens.table)}/{fingerprint(dict(identity))[:12]}"
    )


@dataclass
class Job:
    """One table to fill, and what it lacked when the stage began."""

    stage: Stage
    tokens: TableVersion
    role: str
    model: Path
    identity: dict[str, object]
    condition: Condition | None = None
    wall_s: float = 0.0
    restarts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Look up what the table of the identity lacks, and say why it is new if it is."""
        self.table = stage_table(self.stage, self.tokens, self.identity)
        exists = self.table.exists()
        missing = count_missing(self.tokens, self.table)
        self.num_missing, self.num_missing_tokens = missing.num_pairs, missing.num_tokens
        changed = None if exists else changed_identity(self.table, self.role, self.identity)
        if changed is not None:
            new = f"{self.stage} {self.role}: {self.table.path} is a new table"
            _log.info(f"{new}; unlike {changed[0]}: {'; '.join(changed[1])}")
        self.num_rows_before = self.table.num_rows() if exists else 0
        self.to_do = self.num_missing > 0 or not exists
        """Whether a process is needed."""

    def target(self) -> Target:
        """Return the Target for the worker request, with the job's own model."""
        top_k = self.identity.get("top_k", 0)
        assert isinstance(top_k, int)
        metadata: dict[str, object] = {
            "scorer": self.identity,
            "role": self.role,
            "parents": [self.tokens.as_parent()],
            "fingerprint": fingerprint({"scorer": self.identity, "tokens": self.tokens.fingerprint}),
            **provenance(),
        }
        return Target(self.role, self.table.path, self.condition, metadata, top_k, str(self.model))

    def num_filled(self) -> int:
        """Return how many pairs have been computed since the stage began."""
        return self.table.num_rows() - self.num_rows_before if self.table.exists() else 0

    def result(self) -> Filled:
        """Return what the stage hands on."""
        num_pairs = self.num_filled()
        num_unscorable, restarts = self.num_missing - num_pairs, tuple(self.restarts)
        return Filled(self.table.reference(), num_pairs, self.num_missing_tokens, num_unscorable, self.wall_s, restarts)


def changed_identity(table: Table, role: str, identity: Mapping[str, object]) -> tuple[str, list[str]] | None:
    """Return the table last filled in this role over the same pairs, and what differs from it; None if there is none."""
    folder = table.path.rpartition("/")[0]
    others = WeightStore(str(table.root)).tables(folder.partition("/")[0])
    newest = [(other.path, other.history(limit=1)[0]) for other in others if other.path.startswith(f"{folder}/")]
    same_role = [
        (c.timestamp_ms, path, c.metadata) for path, c in newest if c.metadata and c.metadata.get("role") == role
    ]
    if not same_role:
        return None
    _, path, metadata = max(same_role)
    return path, explain_difference(metadata["scorer"], dict(identity))


# --- the process -------------------------------------------------------------------------------------------------------


def run_jobs(request: Request, jobs: Sequence[Job], python: str | None) -> None:
    """Run the process of a stage; start it again if it dies, with half the token budget if it ran out of memory.

    The targets of the request are those of the jobs. `python` is the interpreter of the process; None for this one.

    Raises:
        MissingExtraError: vLLM, torch or, for actors, Ray is not installed here; actors have the others where they run.
        StageError: It failed for another reason, or died more than `_MAX_RESTARTS` times in a row without any result. What it
            had committed stays.
    """
    check_extra("ray" if request.executor.kind == "ray" else _PACKAGES[request.stage], python)
    num_fruitless, restarts = 0, list[str]()
    doing, done = DOING[request.stage], DONE[request.stage]
    while True:
        before = sum(job.num_filled() for job in jobs)
        try:
            _run_process(replace(request, restarts=restarts), jobs, python)
            return
        except (KilledError, EngineError) as error:
            if not any(count_missing(request.tokens, job.table).num_pairs for job in jobs):
                return  # it died after its work
            num_filled = sum(job.num_filled() for job in jobs)
            num_fruitless = 0 if num_filled > before else num_fruitless + 1
            if num_fruitless > _MAX_RESTARTS:
                raise StageError(
                    f"{doing} gave up after {num_fruitless} starts in a row without a result; the last: {error}. {num_filled} "
                    f"of {sum(job.num_missing for job in jobs)} pairs are {done} and stay; run again to go on"
                ) from error
            # The kernel may have killed it to free memory; if it is killed again without any result, assume that.
            if isinstance(error, OutOfMemoryError) or (isinstance(error, KilledError) and num_fruitless > 1):
                engine = replace(request.engine, num_halvings=request.engine.num_halvings + 1)
                request = replace(request, engine=engine)
            request = replace(request, any_length=request.any_length or isinstance(error, SequenceLengthError))
            restarts = [*restarts, f"{error}; {request.engine.budget}"]
            for job in jobs:
                job.restarts = restarts
            _log.info(f"{error}. Starting again with {request.engine.budget}; {num_filled} pairs are {done} and stay")


def _run_process(request: Request, jobs: Sequence[Job], python: str | None) -> None:
    job_of = {f"{request.stage} {job.role}": job for job in jobs}
    started_at = {name: job.wall_s for name, job in job_of.items()}

    def heard(progress: Progress) -> None:
        job_of[progress.name].wall_s = started_at[progress.name] + progress.wall_s

    with temporary_folder(f"{request.stage}-") as folder:
        path = folder / "request.json"
        request.save(path)
        models = dict.fromkeys(request.model_of(target) for target in request.targets)
        what = f"{DOING[request.stage]} with {' and '.join(models)}"
        with running_model():
            run_child("pipeline.workers.process", [str(path)], what, python, heard, _PACKAGES[request.stage])
