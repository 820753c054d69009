"""Runs a request on Ray: many workers, each in an actor of Ray Data.

First, tasks cut what is missing into chunks; then actors compute them. A chunk travels as a span of pair_ids: the actor reads
its pairs, and writes its results as shards into the table's folder. They become visible when this process, the driver, commits
them: once per table at the end, and before that after every `_ROUND_CHUNKS` chunks or `_ROUND_S` seconds, which bounds what a
dead driver loses. The driver holds one line per chunk, at most `_MAX_CHUNKS`, and no pair_ids: the chunks of a large table
exceed `score.chunk_tokens`, so that more pairs need nothing but more actors.

Ray restarts an actor that dies, and its chunk is computed again. The shards of the dead actor become orphans: no commit names
them, and `tokenweights vacuum` finds them. Our own errors come back from tasks and actors as data, because Ray Data would wrap
them, lose their type and add to their message.

Not here: how Ray is reached (`ray_cluster.py`), and how a cluster is started (docs/scale.md).
"""

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.workers.commit import Tally, check_filled, commit_metadata, quarantine
from pipeline.workers.missing import RANGE_BYTES, Backlog, cut, missing_within, pairs_of, sized
from pipeline.workers.pair_row import QuarantineRow
from pipeline.workers.ray_cluster import as_ours, connected
from pipeline.workers.request import DOING, Request, Target, Worker
from pipeline.workers.start import start_worker
from weights_store import WeightStore
from weights_store.errors import SettingsError, TokenweightsError
from weights_store.messages import collect_lines, logger
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import ShardRecord

if TYPE_CHECKING:
    from ray.data import Dataset

_log = logger(__name__)

_ROUND_CHUNKS, _ROUND_S = 4096, 600.0
_MAX_CHUNKS = 65_536
"""Each chunk costs the driver about 8 KB and 12 ms (Ray 2.60)."""


@dataclass(frozen=True)
class Chunk:
    """A span of pair_ids to compute for one target, from `low` to below `high`; an empty text is an open end."""

    target_idx: int
    low: str
    high: str
    num_pairs: int = 0
    num_tokens: int = 0
    longest_prompt: int = 0
    longest: int = 0

    @property
    def backlog(self) -> Backlog:
        """What there is to compute."""
        return Backlog(self.num_pairs, self.num_tokens, self.longest_prompt, self.longest)

    @property
    def span(self) -> KeyRange:
        """The span as a range of keys."""
        return KeyRange(self.low or None, self.high or None)


@dataclass(frozen=True)
class ScoredChunk:
    """What an actor returns: records of the shards that it has written, and the pairs that could not be computed."""

    chunk: Chunk
    shards: list[ShardRecord]
    unscorable: list[QuarantineRow]
    wall_s: float
    engine: dict[str, object]
    lines: list[str]


def run_on_ray(request: Request) -> None:
    """Fill the targets of a request with `executor.num_actors` workers.

    Raises:
        ScoringError: No pair of one target could be computed.
        OutOfMemoryError: An engine ran out of memory, or actors kept dying before anything was computed.
        EngineError: An engine failed, or Ray did; starting again continues from the last commit.
        StageError: An actor failed for another reason.
        SettingsError: There is no such cluster, or the local Ray has no room for the actors.
        MissingExtraError: Ray, or vLLM in an actor, is not installed.
        TokenweightsError: The store failed. Whatever the error is, the chunks that came back are committed.
    """
    request = _with_absolute_paths(request)
    fillings = [Filling(request, target) for target in request.targets]
    with connected(request.executor.ray_address) as is_local:
        from ray.exceptions import RayError

        try:
            chunks = _find_chunks(request)
            for target_idx, filling in enumerate(fillings):
                filling.expect([chunk.backlog for chunk in chunks if chunk.target_idx == target_idx])
            for scored in _score(sized(request, [filling.backlog for filling in fillings]), chunks, is_local):
                fillings[scored.chunk.target_idx].add(scored)
        except RayError as error:
            raise as_ours(error, any(filling.done for filling in fillings)) from error
        finally:
            for filling in fillings:
                filling.commit()
    for filling in fillings:
        check_filled(request, filling.target, filling.backlog.num_pairs)


def _with_absolute_paths(request: Request) -> Request:
    """Return the request with paths that mean the same in every folder: Ray's workers run in another one than we do."""
    store = WeightStore(request.tokens.store).root
    return replace(
        request,
        tokens=replace(request.tokens, store=str(store.path.absolute() if store.is_local else store)),
        model=str(Path(request.model).absolute()),
        tokenizer=str(Path(request.tokenizer).absolute()),
        chat_template=request.chat_template and str(Path(request.chat_template).absolute()),
    )


# --- tasks and actors --------------------------------------------------------------------------------------------------


def _find_chunks(request: Request) -> list[Chunk]:
    """Return what the targets' tables lack as chunks, target by target; a task looks at each range of pair_ids."""
    import ray.data

    tokens = WeightStore(request.tokens.store).table(request.tokens.table)
    spans = [
        {"target_idx": target_idx, "low": span.low or "", "high": span.high or ""}
        for target_idx in range(len(request.targets))
        for span in tokens.key_ranges(RANGE_BYTES, request.tokens.version)
    ]
    max_chunks = max(1, _MAX_CHUNKS // len(spans))
    found = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        _cut_span, fn_args=(request, max_chunks), batch_size=1, batch_format="pyarrow", memory=RANGE_BYTES
    )
    return sorted((chunk for chunks in replies(found) for chunk in chunks), key=lambda c: (c.target_idx, c.low))


def _cut_span(batch: pa.Table, request: Request, max_chunks: int) -> pa.Table:
    return _reply(lambda: chunks_of(Chunk(**batch.to_pylist()[0]), request, max_chunks))


def chunks_of(whole: Chunk, request: Request, max_chunks: int) -> list[Chunk]:
    """Cut what a target lacks within a span into chunks of about `request.chunk_tokens`, `max_chunks` at most."""
    table = WeightStore(request.tokens.store).table(request.targets[whole.target_idx].table)
    missing = missing_within(whole.span, request.tokens, table)
    chunk_tokens = max(request.chunk_tokens, -(-int(missing["num_tokens"].sum()) // max_chunks))
    parts = list(cut(missing, chunk_tokens))
    lows = [str(part["pair_id"][0]) for part in parts]
    return [
        Chunk(whole.target_idx, low, high, *astuple(Backlog.of(part)))
        for part, low, high in zip(parts, lows, [*lows[1:], whole.high], strict=True)
    ]


def _score(request: Request, chunks: list[Chunk], is_local: bool) -> Iterator[ScoredChunk]:
    """Yield the chunks as the actors return them, in any order."""
    import ray.data

    if not chunks:
        return
    num_actors = min(request.executor.num_actors, len(chunks))
    scored = ray.data.from_items([vars(chunk) for chunk in chunks], override_num_blocks=len(chunks)).map_batches(
        ChunkScorer,
        fn_constructor_args=(request,),
        batch_size=1,
        batch_format="pyarrow",
        # One at a time: at the end, no chunk waits behind another while an actor is idle.
        compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
        # Beyond these (a chunk kills every actor, or a machine is gone) this process ends, and its parent starts the next.
        max_restarts=8,
        max_task_retries=3,
        **_resources(request, num_actors, is_local),
    )
    _log.info(f"{DOING[request.stage]}: {len(chunks)} chunks with {request.model} on Ray, actors: {num_actors}")
    yield from replies(scored)


def _resources(request: Request, num_actors: int, is_local: bool) -> dict[str, object]:
    """Return what Ray sets aside for an actor, and the actor's environment. A local Ray that has less is a `SettingsError`."""
    import ray

    there = ray.cluster_resources()
    num_cpus = request.executor.cpus_per_actor
    num_gpus = request.engine.tensor_parallel if there.get("GPU") else 0
    asked = {"CPU": num_actors * num_cpus, "GPU": num_actors * num_gpus}
    short = [f"{asked[kind]:g} {kind}s of {there.get(kind, 0):g}" for kind in asked if asked[kind] > there.get(kind, 0)]
    if short:
        text = f"{num_actors} actors on Ray ask for {' and '.join(short)}"
        if is_local:
            raise SettingsError(f"{text} on this machine; lower score.num_actors or score.cpus_per_actor")
        _log.info(f"{text} that the cluster has now; the others wait for a place")  # it may grow
    num_threads = str(max(1, int(num_cpus)))
    environment = {
        "OMP_NUM_THREADS": num_threads,
        "POLARS_MAX_THREADS": num_threads,
        "PYTHONSAFEPATH": "1",  # vLLM starts Python processes itself
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine on a machine takes the same cores
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": environment}}


class ChunkScorer:
    """The actor: one worker, which reads and writes chunks."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lines: list[str] = []
        self._worker: Worker | TokenweightsError
        collect_lines(self._lines)  # for as long as the actor lives: it has no terminal and no parent
        try:
            self._worker = start_worker(request)
        except TokenweightsError as error:
            self._worker = error  # the first chunk returns it

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Compute the one chunk of a batch."""
        return _reply(lambda: self._score(Chunk(**batch.to_pylist()[0])))

    def _score(self, chunk: Chunk) -> ScoredChunk:
        if isinstance(self._worker, TokenweightsError):
            raise self._worker
        started = time.monotonic()
        target = self._request.targets[chunk.target_idx]
        table = WeightStore(self._request.tokens.store).table(target.table)
        missing = missing_within(chunk.span, self._request.tokens, table)
        shards: list[ShardRecord] = []
        unscorable: list[QuarantineRow] = []
        if not missing.is_empty():  # else somebody else has computed them in the meantime
            filled, unscorable = self._worker.fill_in(pairs_of(self._request, target, missing), target)
            shards = table.write_shards(filled) if filled.num_rows else []
        lines, self._lines[:] = list(self._lines), []
        return ScoredChunk(chunk, shards, unscorable, time.monotonic() - started, self._worker.record, lines)


def _reply(work: Callable[[], object]) -> pa.Table:
    """Return what `work` returns, or our own error that it raises, as a batch of one row."""
    try:
        reply = work()
    except TokenweightsError as error:
        reply = error
    return pa.table({"reply": pa.array([pickle.dumps(reply)], pa.binary())})


def replies(dataset: "Dataset") -> Iterator[Any]:
    """Yield what tasks or actors returned, as soon as it arrives.

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


class Filling:
    """One target's table, and what the actors have returned for it since its last commit.

    Commits when `round_chunks` chunks wait, or when the last commit is `round_s` seconds old.
    """

    def __init__(
        self, request: Request, target: Target, round_chunks: int = _ROUND_CHUNKS, round_s: float = _ROUND_S
    ) -> None:
        self.target = target
        self.backlog = Backlog()
        self.done: set[Chunk] = set()
        self._request = request
        self._round_chunks, self._round_s = round_chunks, round_s
        self._table = WeightStore(request.tokens.store).table(target.table)
        self._known = self._table.version()  # holds none of the pairs to come
        self._waiting: list[ScoredChunk] = []
        self._tally: Tally | None = None
        self._since = 0.0
        self._lines: set[str] = set()

    def expect(self, backlogs: Sequence[Backlog]) -> None:
        """Count what is to come."""
        self.backlog = sum(backlogs, Backlog())

    def add(self, scored: ScoredChunk) -> None:
        """Take a chunk from an actor, once, and commit when it is time."""
        if scored.chunk in self.done:
            return
        self.done.add(scored.chunk)
        for line in scored.lines:
            if line not in self._lines:  # every actor says the same
                self._lines.add(line)
                _log.info(line)
        if self._tally is None:
            self._since = time.monotonic() - scored.wall_s
            num_tokens = self.backlog.num_tokens
            self._tally = Tally(self._request.stage, self.target.role, num_tokens, scored.wall_s)
        self._waiting.append(scored)
        self._tally.add(scored.chunk.num_tokens)
        if len(self._waiting) >= self._round_chunks or time.monotonic() - self._since >= self._round_s:
            self.commit()

    def commit(self) -> None:
        """Make what waits visible as one version, each pair once."""
        scored, self._waiting = self._waiting, []
        quarantine(self._request, self.target, [row for part in scored for row in part.unscorable])
        # Chunks come as they are done; the rows of a commit stand in the order of their keys.
        shards = sorted((shard for part in scored for shard in part.shards), key=lambda shard: shard.first_key)
        now = time.monotonic()
        if shards:
            num_tokens = sum(part.chunk.num_tokens for part in scored)
            engine = {**scored[-1].engine, "executor": "ray", "num_actors": self._request.executor.num_actors}
            num_pairs = sum(shard.num_rows for shard in shards)
            metadata = commit_metadata(self.target, num_pairs, num_tokens, now - self._since, engine)
            reference = self._table.append_shards(shards, metadata, self._known)
            if reference.version == (0 if self._known is None else self._known + 1):
                self._known = reference.version  # nobody else has written
        self._since = now
