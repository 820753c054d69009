"""The process of a stage: it scores, attributes or samples chunk by chunk, and commits each chunk.

Started by `supervise.py` as `python -P -m pipeline.workers.process REQUEST`. It looks up what is missing; a restarted
process continues where the last one stopped; a kill loses at most one chunk. Restarts are the parent's decision.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl

from pipeline.workers.commit import check_filled, commit_metadata
from pipeline.workers.missing import count_missing, missing_chunks, rows_of
from pipeline.workers.quarantine import quarantine
from pipeline.workers.request import Request, Target, Worker
from pipeline.workers.start import start_worker
from pipeline.workers.tally import Tally
from weights_store import WeightStore
from weights_store.process import run_main


def main() -> None:
    """Work off one request file; what `python -P -m pipeline.workers.process REQUEST` runs."""
    run(Request.load(sys.argv[1]))


def run(request: Request) -> None:
    """Fill the targets of a request.

    Raises:
        ScoringError: Nothing came of any pair of one target.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    if request.executor["kind"] == "ray":
        from pipeline.workers.on_ray import run_on_ray

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


if __name__ == "__main__":
    sys.exit(run_main(main))
