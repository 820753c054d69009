"""The process of a stage: it scores, attributes or samples anchors chunk by chunk, and commits each chunk.

`supervise.py` starts it as `python -P -m pipeline.workers.process REQUEST`, and starts it again if it dies. Each start looks
up what is missing. A kill loses at most two chunks, the one that is committed and the one that is computed, and the first steps
of a third.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa

from pipeline.workers.commit import Appender, Tally, check_filled, commit_metadata
from pipeline.workers.missing import Backlog, count_missing, cut, missing_pairs, pairs_of, sized
from pipeline.workers.pair_row import QuarantineRow
from pipeline.workers.request import Request, Target, Worker
from pipeline.workers.start import start_worker
from weights_store import WeightStore
from weights_store.processes.process import run_main

_Item = TypeVar("_Item")


def run(request: Request) -> None:
    """Fill the targets of a request.

    Raises:
        ScoringError: No pair of one target could be computed.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    if request.executor.kind == "ray":
        from pipeline.workers.on_ray import run_on_ray

        run_on_ray(request)
        return
    store = WeightStore(request.tokens.store)
    backlogs = [count_missing(request.tokens, store.table(target.table)) for target in request.targets]
    request = sized(request, backlogs)
    worker: Worker | None = None
    for target, backlog in zip(request.targets, backlogs, strict=True):
        if not backlog.num_pairs:
            check_filled(request, target, 0)
            continue
        model = request.model_of(target)
        worker = worker or start_worker(replace(request, model=model))
        worker.use(model)
        fill(request, target, worker, backlog)


@dataclass
class _Chunk:
    """A chunk whose computation has begun."""

    num_tokens: int
    progress: Callable[[float], None]
    finish: Callable[[], tuple[pa.Table, list[QuarantineRow]]]


def fill(request: Request, target: Target, worker: Worker, backlog: Backlog | None = None) -> None:
    """Compute what one target lacks, chunk by chunk; the backlog is counted if it is not given.

    A thread commits a chunk while the next one is computed, and the one after that has begun by then, so that the engine
    always has work. If a commit fails, no other one follows.

    Raises:
        ScoringError: No pair could be computed.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    if backlog is None:
        backlog = count_missing(request.tokens, WeightStore(request.tokens.store).table(target.table))
    tally = Tally(request.stage, target.role, backlog.num_tokens)
    appender = Appender(request, target)
    with ThreadPoolExecutor(1) as executor:
        committing: Future[None] | None = None
        started = time.monotonic()
        try:
            for chunk in one_ahead(_begun(request, target, worker, tally)):
                filled, unscorable = chunk.finish()
                chunk.progress(1.0)
                started, wall_s = time.monotonic(), time.monotonic() - started
                metadata = commit_metadata(target, filled.num_rows, chunk.num_tokens, wall_s, worker.record)
                if committing is not None:
                    committing.result()
                committing = executor.submit(appender.append, filled, unscorable, metadata)
        finally:
            if committing is not None:
                committing.result()  # if it failed, that is what to say, whatever else failed after it
    check_filled(request, target, backlog.num_pairs)


def _begun(request: Request, target: Target, worker: Worker, tally: Tally) -> Iterator[_Chunk]:
    table = WeightStore(request.tokens.store).table(target.table)
    chunks = (chunk for part in missing_pairs(request.tokens, table) for chunk in cut(part, request.chunk_tokens))
    work = ((int(chunk["num_tokens"].sum()), pairs_of(request, target, chunk)) for chunk in chunks)
    for num_tokens, pairs in ahead(work):
        progress = tally.within(num_tokens)
        yield _Chunk(num_tokens, progress, worker.begin(pairs, target, progress))


def one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items, each after its successor has been taken."""
    last = next(items, None)
    while last is not None:
        following = next(items, None)
        yield last
        last = following


def ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items; a thread fetches each one while its predecessor is worked on, so that reading costs no time."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item


if __name__ == "__main__":
    sys.exit(run_main(lambda: run(Request.load(sys.argv[1]))))
