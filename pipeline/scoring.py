"""What the process of a stage does: score, attribute or sample chunk by chunk, each a commit. Started by `jobs.py`.

A chunk is a span of pair_ids of about `chunk_tokens`. The process looks by itself for what is missing, so whoever starts it
again goes on where it was; a kill loses one chunk at most. The parent decides about restarts. What is done with a chunk is the
worker's: `PairScorer` here, `AnchorSampler` (anchors.py), `PairAttributor` (attribution.py).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.chat import Condition
from pipeline.sharing import Reply, ScoredSequence, Scores, score_once
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import InputError, ScoringError
from weights_store.key_ranges import KeyRange
from weights_store.schemas import LOGPS, QUARANTINE, Reason

MESSAGE = "SCORING "
"""Begins every line that the process says to its parent: one JSON object."""
EXIT_OUT_OF_MEMORY, EXIT_ENGINE = 76, 75
RANGE_BYTES = 512 << 20
"""Memory for the pairs that are looked at together when what is missing is looked for."""
_PROGRESS_S = 0.5


Stage = Literal["score", "attribute", "anchors"]
"""The stages that run a model over all pairs."""


@dataclass(frozen=True)
class Target:
    """One table to fill with what the request's model says, maybe behind a contrastive prompt.

    With `top_k` > 0 log-probs come with those of the likeliest tokens at each place, that many.
    """

    role: str
    table: str
    condition: dict[str, str] | None
    metadata: dict[str, Any]
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """The contract between the stage and its process, one JSON file."""

    store: str
    tokens_table: str
    tokens_version: int
    model: str
    tokenizer: str
    chat_template: str | None
    targets: list[Target]
    chunk_tokens: int
    engine: dict[str, Any]
    executor: dict[str, Any]
    stage: Stage = "score"
    options: dict[str, Any] = field(default_factory=dict)
    """What the stage's worker is told besides: how anchors are sampled, what is attributed."""

    @classmethod
    def over(cls, tokens: TableVersion, model: Path, **settings: Any) -> "Request":
        """Return a request over the pairs of a tokens table; `settings` are the other fields."""
        defaults: dict[str, Any] = {"tokenizer": str(model), "chat_template": None}
        return cls(tokens.store, tokens.table, tokens.version, str(model), **{**defaults, **settings})

    @classmethod
    def load(cls, path: str | Path) -> "Request":
        """Read a request file."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**content, "targets": [Target(**target) for target in content["targets"]]})

    @property
    def tokens(self) -> TableVersion:
        """The pairs to score."""
        return TableVersion(self.store, self.tokens_table, self.tokens_version, "")


class Engine(Protocol):
    """What scores: `VllmEngine`, or a made-up one in tests."""

    max_tokens: int
    vocab_size: int
    way: str | None

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in that it has."""
        ...

    def why_not(self, way: str) -> str | None:
        """Return why it does not have a way; None where it has."""
        ...

    def score(self, sequences: Any, progress: Callable[[int], None] = ...) -> list[Reply]:
        """Return the wanted scores of each sequence."""
        ...

    def generate(
        self, prompts: Any, sampling: Any, seeds: Any, progress: Callable[[int], None] = ...
    ) -> list[list[int]]:
        """Return a sampled continuation of each prompt."""
        ...


class Worker(Protocol):
    """What a stage does with rows of the tokens table; holds a loaded model."""

    @property
    def record(self) -> dict[str, Any]:
        """How it runs, for the lineage: none of it but the dtype changes numbers."""
        ...

    def under_condition(self, rows: pl.DataFrame, target: Target) -> pl.DataFrame:
        """Return the rows as the model will see them; called in a thread, ahead of `fill_in`."""
        ...

    def fill_in(
        self, rows: pl.DataFrame, target: Target, progress: Callable[[float], None] = ...
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the rows of the target's table, by pair_id, and a quarantine row for each pair that has none.

        Args:
            rows: From `under_condition`.
            target: The table to fill.
            progress: Gets the share of the rows that is done, 0 to 1.
        """
        ...


def start_worker(request: Request, report: Callable[[str], None] | None = None) -> Worker:
    """Load the model of a request for what its stage does.

    Args:
        request: The work.
        report: Gets lines for people; `say` by default.

    Raises:
        InputError: The model cannot be loaded, or cannot do this.
        OutOfMemoryError: There is not enough memory for it.
    """
    if request.stage == "anchors":
        from pipeline.anchor_sampling import AnchorSampler

        return AnchorSampler(request, report)
    if request.stage == "attribute":
        from pipeline.attribution import PairAttributor

        return PairAttributor(request, report)
    return PairScorer(request, report)


def run(request: Request) -> None:
    """Fill the targets of a request.

    Raises:
        ScoringError: Nothing came of any pair of one target.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    if request.executor["kind"] == "ray":
        from pipeline.scoring_ray import run_on_ray

        run_on_ray(request)
        return
    worker = start_worker(request)
    for target in request.targets:
        fill(request, target, worker)


def fill(request: Request, target: Target, worker: Worker) -> None:
    """Compute what one target lacks, chunk by chunk.

    Raises:
        ScoringError: Nothing came of any pair.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    store = WeightStore(request.store)
    table = store.table(target.table)
    tally = Tally(request.stage, target.role, *count_missing(request.tokens, table))
    known = table.version()  # holds none of the pairs to come, so an append looks only at what others have added since
    for chunk, rows in ahead(_chunks_with_rows(request, target, worker)):
        num_tokens = int(chunk["num_tokens"].sum())
        started = time.monotonic()
        filled, unscorable = worker.fill_in(rows, target, tally.within(num_tokens))
        if unscorable:
            quarantine(request, target, unscorable)
        if filled.num_rows:
            metadata = commit_metadata(target, filled.num_rows, num_tokens, time.monotonic() - started, worker.record)
            reference = table.append(filled, metadata, known)
            if reference.version == (0 if known is None else known + 1):
                known = reference.version  # nobody else has written: the next append need not look at ours
        tally.add(num_tokens)
    check_filled(request, target, tally.num_pairs)


def check_filled(request: Request, target: Target, num_pairs: int) -> None:
    """Refuse to go on with nothing at all.

    Raises:
        ScoringError: The target's table does not exist.
    """
    if not WeightStore(request.store).table(target.table).exists():
        done = {"score": "scored", "attribute": "attributed", "anchors": "given an anchor"}[request.stage]
        raise ScoringError(f"none of {num_pairs} pairs could be {done}; see {quarantine_path(request.tokens_table)}")


def commit_metadata(
    target: Target, num_pairs: int, num_tokens: int, wall_s: float, engine: dict[str, Any]
) -> dict[str, Any]:
    """Return what a commit records: identity and lineage, counts, seconds of computing, how the engine ran."""
    statistics = {"num_pairs": num_pairs, "num_tokens": num_tokens, "wall_s": round(wall_s, 3)}
    return {**target.metadata, "statistics": statistics, "engine": engine}


# --- what is missing ---------------------------------------------------------------------------------------------------


def missing_pairs(tokens: TableVersion, table: Table) -> Iterator[pl.DataFrame]:
    """Yield the pairs that have no row yet, by pair_id, one range at a time: `pair_id` and `num_tokens` to compute."""
    for piece in WeightStore(tokens.store).table(tokens.table).key_ranges(RANGE_BYTES, tokens.version):
        yield missing_within(piece, tokens, table)


def missing_within(piece: KeyRange, tokens: TableVersion, table: Table) -> pl.DataFrame:
    """Return the pairs of one range that have no row yet, by pair_id: `pair_id` and `num_tokens` to compute."""
    pairs = piece.of(WeightStore(tokens.store).table(tokens.table).scan(tokens.version))
    lengths = pl.sum_horizontal(pl.col(c).list.len() for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
    wanted = pairs
    for done in (_known_unscorable(tokens, table), *([table.scan().select("pair_id")] if table.exists() else [])):
        wanted = wanted.join(piece.of(done), on="pair_id", how="anti")
    ids = wanted.select("pair_id").collect()
    if ids.is_empty():  # the usual case of a second build: no list has been read
        return ids.with_columns(num_tokens=pl.lit(0, pl.UInt32))
    return (
        pairs.join(ids.lazy(), on="pair_id", how="semi")
        .select("pair_id", lengths.alias("num_tokens"))
        .sort("pair_id")
        .collect()
    )


def count_missing(tokens: TableVersion, table: Table) -> tuple[int, int]:
    """Return how many pairs have no row yet, and their tokens."""
    parts = [(part.height, int(part["num_tokens"].sum())) for part in missing_pairs(tokens, table)]
    num_pairs, num_tokens = (sum(counts) for counts in zip(*parts, strict=True))
    return num_pairs, num_tokens


def _known_unscorable(tokens: TableVersion, table: Table) -> pl.LazyFrame:
    """Return the pairs that this very scorer has put into quarantine: trying them again would change nothing."""
    quarantined = WeightStore(tokens.store).table(quarantine_path(tokens.table))
    if not quarantined.exists():
        return pl.LazyFrame(schema={"pair_id": pl.String})
    by_this = (pl.col("reason") == Reason.UNSCORABLE.value) & pl.col("detail").str.starts_with(f"{table.path}: ")
    return quarantined.scan().filter(by_this).select("pair_id")


def missing_chunks(tokens: TableVersion, table: Table, chunk_tokens: int) -> Iterator[pl.DataFrame]:
    """Cut what is missing into spans of pair_ids of about `chunk_tokens`."""
    for part in missing_pairs(tokens, table):
        yield from cut(part, chunk_tokens)


def cut(part: pl.DataFrame, chunk_tokens: int) -> Iterator[pl.DataFrame]:
    """Cut missing pairs, sorted by pair_id, into spans of about `chunk_tokens`."""
    numbered = part.with_columns(((pl.col("num_tokens").cum_sum() - 1) // chunk_tokens).alias("chunk"))
    for chunk in numbered.partition_by("chunk", maintain_order=True):
        yield chunk.select("pair_id", "num_tokens")


def rows_of(pairs: pl.LazyFrame, chunk: pl.DataFrame) -> pl.DataFrame:
    """Read the pairs of a chunk; its span of pair_ids is what reaches the files."""
    span = pl.col("pair_id").is_between(pl.lit(chunk["pair_id"].min()), pl.lit(chunk["pair_id"].max()))
    return pairs.filter(span).join(chunk.lazy().select("pair_id"), on="pair_id", how="semi").collect()


def _chunks_with_rows(request: Request, target: Target, worker: Worker) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    store = WeightStore(request.store)
    pairs = store.table(request.tokens_table).scan(request.tokens_version)
    for chunk in missing_chunks(request.tokens, store.table(target.table), request.chunk_tokens):
        yield chunk, worker.under_condition(rows_of(pairs, chunk), target)


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items, each fetched in a thread while the one before it is worked on: reading hides behind scoring."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item


# --- scoring -----------------------------------------------------------------------------------------------------------


class PairScorer:
    """The request's engine and tokenizer: rows of the tokens table in, rows of a logps table out.

    Args:
        request: What is scored with what.
        report: Gets lines for people; `say` by default.

    Raises:
        InputError: vLLM cannot load the model, or a target wants more likely tokens than the vocabulary has.
        OutOfMemoryError: There is not enough memory for the engine.
    """

    def __init__(self, request: Request, report: Callable[[str], None] | None = None) -> None:
        from pipeline.chat import ChatTokenizer
        from pipeline.engine import EngineSettings, VllmEngine

        conditioned = any(target.condition for target in request.targets)
        self._tokenizer = ChatTokenizer(Path(request.tokenizer), request.chat_template) if conditioned else None
        report = report or say
        report(f"starting the engine for {request.model}")
        self._settings = {key: value for key, value in request.engine.items() if key != "restarts"}
        self._restarts = request.engine.get("restarts", [])
        self.engine: Engine = VllmEngine(Path(request.model), EngineSettings(**self._settings), report)
        top_k = max((target.top_k for target in request.targets), default=0)
        if top_k > self.engine.vocab_size:
            raise InputError(
                f"score.top_k is {top_k}, the vocabulary of {request.model} has {self.engine.vocab_size} ids"
            )

    @property
    def record(self) -> dict[str, Any]:
        """How the engine runs, for the lineage: none of it but the dtype changes numbers."""
        return {**self._settings, "way": self.engine.way, "restarts": self._restarts}

    def under_condition(self, rows: pl.DataFrame, target: Target) -> pl.DataFrame:
        """Put the target's contrastive prompt into the prompts; null where the chat has no place for it."""
        if target.condition is None or self._tokenizer is None:
            return rows
        condition = Condition(**target.condition)  # type: ignore[arg-type]
        prompt_ids = self._tokenizer.conditioned_prompt_ids(rows["prompt"].to_list(), condition)
        return rows.with_columns(pl.Series("prompt_ids", prompt_ids, pl.List(pl.Int32)))

    def fill_in(
        self, rows: pl.DataFrame, target: Target, progress: Callable[[float], None] = lambda share: None
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the log-probs of the pairs that could be scored, and a quarantine row for each other."""
        return self.score(rows, progress, target.top_k)

    def score(
        self, rows: pl.DataFrame, progress: Callable[[float], None] = lambda share: None, top_k: int = 0
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the log-probs of the pairs that could be scored, and a quarantine row for each other.

        Args:
            rows: Of the tokens table.
            progress: Gets the share of the rows that is done, 0 to 1.
            top_k: How many of the likeliest tokens at each place are scored as well.
        """
        good: list[dict[str, Any]] = []
        unscorable: list[dict[str, Any]] = []
        for row in rows.iter_rows(named=True):
            problem = why_not(row, self.engine.max_tokens, self.engine.vocab_size)
            if problem is None:
                good.append(row)
            else:
                unscorable.append(unscorable_row(row, problem))
        sequences = [
            ScoredSequence(row["prompt_ids"], row[f"{side}_ids"], top_k=top_k)
            for row in good
            for side in ("chosen", "rejected")
        ]
        replies = score_once(sequences, lambda wanted: self.engine.score(wanted, _counter(wanted, progress)))
        scored: list[dict[str, Any]] = []
        for row, chosen, rejected in zip(good, replies[::2], replies[1::2], strict=True):
            if isinstance(chosen, ScoringError) or isinstance(rejected, ScoringError):
                sides = (("chosen", chosen), ("rejected", rejected))
                refused = [f"{side}: {reply}" for side, reply in sides if isinstance(reply, ScoringError)]
                unscorable.append(unscorable_row(row, "; ".join(refused)))
                continue
            scored.append({"pair_id": row["pair_id"], **_columns("chosen", chosen), **_columns("rejected", rejected)})
        columns = {name: [row[name] for row in scored] for name in LOGPS.names}
        return pa.Table.from_pydict(columns, LOGPS), unscorable


def why_not(row: dict[str, Any], max_tokens: int, vocab_size: int) -> str | None:
    """Return why a pair cannot be computed. The model must not see it: some of these would kill an engine."""
    if row["prompt_ids"] is None:
        return "the chat has no place for the contrastive prompt"
    ids = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    if not all(ids):
        return "prompt or response has no tokens"
    longest = len(ids[0]) + max(len(ids[1]), len(ids[2]))
    if longest > max_tokens:
        return f"prompt and response have {longest} tokens, the model takes {max_tokens}"
    if min(map(min, ids)) < 0 or max(map(max, ids)) >= vocab_size:
        return f"a token id is outside the model's vocabulary of {vocab_size}"
    return None


def _columns(side: str, scores: Scores) -> dict[str, np.ndarray | None]:
    """Return the columns of one response; those of the likeliest tokens are flat, null where there are none."""
    has_top = scores.top_ids.shape[1] > 0
    return {
        f"{side}_logps": scores.logps,
        f"{side}_top_ids": scores.top_ids.ravel() if has_top else None,
        f"{side}_top_logps": scores.top_logps.ravel() if has_top else None,
    }


def _counter(sequences: list[ScoredSequence], progress: Callable[[float], None]) -> Callable[[int], None]:
    total, done = sum(sequence.num_wanted for sequence in sequences), 0

    def count(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        progress(min(1.0, done / total))

    return count


# --- quarantine --------------------------------------------------------------------------------------------------------


def unscorable_row(row: dict[str, Any], detail: str) -> dict[str, Any]:
    """Return the quarantine row of a pair of the tokens table."""
    return {
        "source_row": row["source_row"],
        "pair_id": row["pair_id"],
        "reason": Reason.UNSCORABLE.value,
        "detail": detail,
        "raw": row["prompt"][:2000],
    }


def quarantine_path(tokens_table: str) -> str:
    """Return the quarantine that belongs to a tokens table."""
    return tokens_table.replace("tokens/", "quarantine/", 1)


def quarantine(request: Request, target: Target, rows: list[dict[str, Any]]) -> None:
    """Put unscorable pairs into quarantine, once each, however often scoring is repeated."""
    table = WeightStore(request.store).table(quarantine_path(request.tokens_table))
    marked = [{**row, "detail": f"{target.table}: {row['detail']}"} for row in rows]
    table.append(pa.Table.from_pylist(marked, QUARANTINE), table.metadata())


# --- talking to the parent ---------------------------------------------------------------------------------------------


class Tally:
    """Counts tokens and tells the parent now and then; the work began `since_s` seconds ago."""

    def __init__(self, stage: Stage, role: str, num_pairs: int, num_tokens: int, since_s: float = 0.0) -> None:
        self.num_pairs = num_pairs
        self._stage, self._role, self._total, self._done = stage, role, num_tokens, 0
        self._started = self._said = time.monotonic() - since_s
        self._say(0)

    def within(self, num_tokens: int) -> Callable[[float], None]:
        """Return a function that shows a share of the next `num_tokens` as done."""

        def show(share: float) -> None:
            if time.monotonic() - self._said >= _PROGRESS_S:
                self._say(self._done + int(share * num_tokens))

        return show

    def add(self, num_tokens: int) -> None:
        """Count tokens that are done and committed."""
        self._done += num_tokens
        self._say(self._done)

    def _say(self, done: int) -> None:
        self._said = time.monotonic()
        wall_s = self._said - self._started
        _send({"stage": self._stage, "role": self._role, "done": done, "total": self._total, "wall_s": wall_s})


def say(line: str) -> None:
    """Say a line for people."""
    _send({"line": line})


def _send(message: dict[str, Any]) -> None:
    # One write, on a line of its own: logs of Ray and vLLM go the same way, from other threads and processes.
    sys.stdout.write(f"\n{MESSAGE}{json.dumps(message)}\n")
    sys.stdout.flush()
