"""Scoring on Ray: many engines, each in an actor of Ray Data; started by `scoring.run` where `score.executor` is "ray".

First tasks cut what is missing into chunks, then actors score them. A chunk travels as a span of pair_ids; the actor reads its
rows, and writes its log-probs as shards into the table's folder. Nothing of that is visible until this process, the driver, has
committed the shards. It does so once per table at the end, and in between after `_ROUND_CHUNKS` chunks or `_ROUND_S` seconds:
that much is lost when it dies. It holds a line per chunk, `_MAX_CHUNKS` at most, and no pair_ids: chunks of a large table
are larger than `score.chunk_tokens`, and all that more pairs need is more actors.

An actor that dies is restarted by Ray and its chunk scored again; what the dead one had written is an orphan, which no commit
names and `tokenweights vacuum` finds. Errors of ours come back from tasks and actors as data: Ray Data would wrap them, lose
their type and add to their message.

Not here: how Ray is reached (`ray_cluster.py`), and how a cluster is started (docs/scale.md).
"""

import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.workers.commit import check_filled, commit_metadata
from pipeline.workers.missing import RANGE_BYTES, cut, missing_within, rows_of
from pipeline.workers.quarantine import quarantine
from pipeline.workers.ray_cluster import as_ours, connected
from pipeline.workers.request import Request, Target, Worker
from pipeline.workers.start import start_worker
from pipeline.workers.tally import Tally
from weights_store import WeightStore
from weights_store.errors import SettingsError, TokenweightsError
from weights_store.messages import collect_lines, logger
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_ROUND_CHUNKS, _ROUND_S = 4096, 600.0
_MAX_CHUNKS = 65_536
"""Chunks cost the driver about 8 KB and 12 ms each (Ray 2.60)."""
_MAX_ACTOR_RESTARTS, _MAX_CHUNK_RETRIES = 8, 3
"""What takes more than that (a chunk that kills every actor, a machine that is gone) ends the process; the next one goes on."""


@dataclass(frozen=True)
class Chunk:
    """A span of pair_ids to score for one target, `low` included, `high` not; an empty text is an open end."""

    target_idx: int
    low: str
    high: str
    num_pairs: int
    num_tokens: int

    @property
    def span(self) -> KeyRange:
        """The span as a range of keys."""
        return KeyRange(self.low or None, self.high or None)


@dataclass(frozen=True)
class ScoredChunk:
    """What an actor hands back: records of the shards that it has written, and what could not be scored."""

    chunk: Chunk
    shards: list[ShardRecord]
    unscorable: list[dict[str, Any]]
    wall_s: float
    engine: dict[str, Any]
    lines: list[str]


def run_on_ray(request: Request) -> None:
    """Fill the targets of a request with `executor["num_actors"]` engines.

    Raises:
        ScoringError: Of one target no pair could be scored.
        OutOfMemoryError: An engine ran out of memory, or actors kept dying before anything was scored.
        EngineError: An engine failed, or Ray did; starting again goes on where it was.
        StageError: An actor failed otherwise.
        SettingsError: There is no such cluster, or a Ray of our own has no room for the actors.
        MissingExtraError: Ray, or vLLM in an actor, is not installed.
        TokenweightsError: The store failed. Whatever the error is, chunks that had come back are committed.
    """
    fillings = [_Filling(request, target) for target in request.targets]
    with connected(request.executor["ray_address"]) as is_ours:
        from ray.exceptions import RayError

        try:
            chunks = _find_chunks(request)
            for target_idx, filling in enumerate(fillings):
                filling.expect([chunk for chunk in chunks if chunk.target_idx == target_idx])
            for scored in _score(request, chunks, is_ours):
                fillings[scored.chunk.target_idx].add(scored)
        except RayError as error:
            raise as_ours(error, any(filling.done for filling in fillings)) from error
        finally:
            for filling in fillings:
                filling.commit()
    for filling in fillings:
        check_filled(request, filling.target, filling.num_pairs)


# --- tasks and actors --------------------------------------------------------------------------------------------------


def _find_chunks(request: Request) -> list[Chunk]:
    """Return what the targets' tables lack as chunks, one target after the other; a task looks at each range of pair_ids."""
    import ray.data

    ranges = WeightStore(request.store).table(request.tokens_table).key_ranges(RANGE_BYTES, request.tokens_version)
    spans = [
        asdict(Chunk(target_idx, span.low or "", span.high or "", 0, 0))  # type: ignore[arg-type]
        for target_idx in range(len(request.targets))
        for span in ranges
    ]
    max_chunks = max(1, _MAX_CHUNKS // len(spans))
    found = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        _cut_span, fn_args=(request, max_chunks), batch_size=1, batch_format="pyarrow", memory=RANGE_BYTES
    )
    return sorted((chunk for chunks in _replies(found) for chunk in chunks), key=lambda c: (c.target_idx, c.low))


def _cut_span(batch: pa.Table, request: Request, max_chunks: int) -> pa.Table:
    return _reply(lambda: _chunks_of(Chunk(**batch.to_pylist()[0]), request, max_chunks))


def _chunks_of(whole: Chunk, request: Request, max_chunks: int) -> list[Chunk]:
    table = WeightStore(request.store).table(request.targets[whole.target_idx].table)
    missing = missing_within(whole.span, request.tokens, table)
    chunk_tokens = max(request.chunk_tokens, -(-int(missing["num_tokens"].sum()) // max_chunks))
    parts = list(cut(missing, chunk_tokens))
    lows = [str(part["pair_id"][0]) for part in parts]
    return [
        Chunk(whole.target_idx, low, high, part.height, int(part["num_tokens"].sum()))
        for part, low, high in zip(parts, lows, [*lows[1:], whole.high], strict=True)
    ]


def _score(request: Request, chunks: list[Chunk], is_ours: bool) -> Iterator[ScoredChunk]:
    """Yield the chunks as the actors bring them back, in any order."""
    import ray.data

    if not chunks:
        return
    num_actors = min(request.executor["num_actors"], len(chunks))
    scored = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks)).map_batches(
        ChunkScorer,
        fn_constructor_args=(request,),
        batch_size=1,
        batch_format="pyarrow",
        # One at a time: a chunk that waits behind another would be waiting at the end, while other actors are idle.
        compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
        max_restarts=_MAX_ACTOR_RESTARTS,
        max_task_retries=_MAX_CHUNK_RETRIES,
        **_resources(request, num_actors, is_ours),
    )
    _log.info(f"scoring {len(chunks)} chunks with {request.model} on Ray, actors: {num_actors}")
    yield from _replies(scored)


def _resources(request: Request, num_actors: int, is_ours: bool) -> dict[str, Any]:
    """Return what Ray sets aside for an actor, and the actor's environment.

    Raises:
        SettingsError: A Ray of our own does not have it; a cluster may grow.
    """
    import ray

    there = ray.cluster_resources()
    num_cpus = request.executor["cpus_per_actor"]
    num_gpus = request.engine.get("tensor_parallel", 1) if there.get("GPU") else 0
    asked = {"CPU": num_actors * num_cpus, "GPU": num_actors * num_gpus}
    short = [f"{asked[kind]:g} {kind}s of {there.get(kind, 0):g}" for kind in asked if asked[kind] > there.get(kind, 0)]
    if short:
        text = f"{num_actors} engines on Ray ask for {' and '.join(short)}"
        if is_ours:
            raise SettingsError(f"{text} on this machine; lower score.num_actors or score.cpus_per_actor")
        _log.info(f"{text} that the cluster has now; those without a place wait for one")
    num_threads = str(max(1, int(num_cpus)))
    environment = {
        "OMP_NUM_THREADS": num_threads,
        "POLARS_MAX_THREADS": num_threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine on a machine takes the same cores
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": environment}}


class ChunkScorer:
    """The actor: one engine, and what it takes to read and write chunks."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lines: list[str] = []
        self._worker: Worker | TokenweightsError
        collect_lines(self._lines)  # for as long as the actor lives: it has no terminal and no parent
        try:
            self._worker = start_worker(request)
        except TokenweightsError as error:
            self._worker = error  # for the first chunk to bring back

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score the one chunk of a batch."""
        return _reply(lambda: self._score(Chunk(**batch.to_pylist()[0])))

    def _score(self, chunk: Chunk) -> ScoredChunk:
        if isinstance(self._worker, TokenweightsError):
            raise self._worker
        started = time.monotonic()
        target = self._request.targets[chunk.target_idx]
        store = WeightStore(self._request.store)
        table = store.table(target.table)
        missing = missing_within(chunk.span, self._request.tokens, table)
        shards: list[ShardRecord] = []
        unscorable: list[dict[str, Any]] = []
        if not missing.is_empty():  # else somebody else has scored them meanwhile
            rows = rows_of(store.table(self._request.tokens_table).scan(self._request.tokens_version), missing)
            filled, unscorable = self._worker.fill_in(self._worker.under_condition(rows, target), target)
            shards = table.write_shards(filled) if filled.num_rows else []
        lines, self._lines[:] = list(self._lines), []
        return ScoredChunk(chunk, shards, unscorable, time.monotonic() - started, self._worker.record, lines)


def _reply(work: Callable[[], Any]) -> pa.Table:
    """Return what `work` returns, or our own error that it raises, as a batch of one row."""
    try:
        reply = work()
    except TokenweightsError as error:
        reply = error
    return pa.table({"reply": pa.array([pickle.dumps(reply)], pa.binary())})


def _replies(dataset: Any) -> Iterator[Any]:
    """Yield what `_reply` has packed, as soon as it is there.

    Raises:
        TokenweightsError: A task or an actor raised it.
    """
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for packed in batch["reply"].to_pylist():
            reply = pickle.loads(packed)
            if isinstance(reply, TokenweightsError):
                raise reply
            yield reply


# --- the driver --------------------------------------------------------------------------------------------------------


class _Filling:
    """One target's table, and what the actors have brought for it since its last commit."""

    def __init__(self, request: Request, target: Target) -> None:
        self.target = target
        self.num_pairs = 0
        self.done: set[Chunk] = set()
        self._request = request
        self._table = WeightStore(request.store).table(target.table)
        self._known = self._table.version()  # holds none of the pairs to come
        self._num_tokens = 0
        self._waiting: list[ScoredChunk] = []
        self._tally: Tally | None = None
        self._since = 0.0
        self._lines: set[str] = set()

    def expect(self, chunks: list[Chunk]) -> None:
        """Learn what is to come."""
        self.num_pairs = sum(chunk.num_pairs for chunk in chunks)
        self._num_tokens = sum(chunk.num_tokens for chunk in chunks)

    def add(self, scored: ScoredChunk) -> None:
        """Take what an actor has brought, once, and commit when it is time."""
        if scored.chunk in self.done:
            return
        self.done.add(scored.chunk)
        for line in scored.lines:
            if line not in self._lines:  # every actor says the same
                self._lines.add(line)
                _log.info(line)
        if self._tally is None:
            self._since = time.monotonic() - scored.wall_s
            self._tally = Tally(self._request.stage, self.target.role, self.num_pairs, self._num_tokens, scored.wall_s)
        self._waiting.append(scored)
        self._tally.add(scored.chunk.num_tokens)
        if len(self._waiting) >= _ROUND_CHUNKS or time.monotonic() - self._since >= _ROUND_S:
            self.commit()

    def commit(self) -> None:
        """Make what is waiting visible as one version, each pair once."""
        scored, self._waiting = self._waiting, []
        unscorable = [row for part in scored for row in part.unscorable]
        if unscorable:
            quarantine(self._request, self.target, unscorable)
        shards = [shard for part in scored for shard in part.shards]
        now = time.monotonic()
        if shards:
            num_tokens = sum(part.chunk.num_tokens for part in scored)
            engine = {**scored[-1].engine, "executor": "ray", "num_actors": self._request.executor["num_actors"]}
            num_pairs = sum(shard.num_rows for shard in shards)
            metadata = commit_metadata(self.target, num_pairs, num_tokens, now - self._since, engine)
            reference = self._table.append_shards(shards, metadata, self._known)
            if reference.version == (0 if self._known is None else self._known + 1):
                self._known = reference.version  # nobody else has written
        self._since = now
