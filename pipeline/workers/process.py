"""The process of a stage: it scores, attributes or samples anchors chunk by chunk, and commits each chunk.

`supervise.py` starts it as `python -P -m pipeline.workers.process REQUEST`, and starts it again if it dies. Each start looks
up what is missing, so a kill loses at most one chunk.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.workers.commit import Tally, check_filled, commit_metadata, quarantine
from pipeline.workers.missing import count_missing, cut, missing_pairs, pairs_of
from pipeline.workers.request import Request, Target, Worker
from pipeline.workers.start import start_worker
from weights_store import WeightStore
from weights_store.process import run_main

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
    worker = start_worker(request)
    for target in request.targets:
        fill(request, target, worker)


def fill(request: Request, target: Target, worker: Worker) -> None:
    """Compute what one target lacks, chunk by chunk.

    Raises:
        ScoringError: No pair could be computed.
        TokenweightsError: The engine or the store failed; what was committed stays.
    """
    table = WeightStore(request.tokens.store).table(target.table)
    tally = Tally(request.stage, target.role, *count_missing(request.tokens, table))
    known = table.version()  # holds none of the pairs to come, so an append looks only at what others have added since
    chunks = (chunk for part in missing_pairs(request.tokens, table) for chunk in cut(part, request.chunk_tokens))
    work = ((int(chunk["num_tokens"].sum()), pairs_of(request, target, chunk)) for chunk in chunks)
    for num_tokens, pairs in ahead(work):
        started = time.monotonic()
        filled, unscorable = worker.fill_in(pairs, target, tally.within(num_tokens))
        quarantine(request, target, unscorable)
        if filled.num_rows:
            metadata = commit_metadata(target, filled.num_rows, num_tokens, time.monotonic() - started, worker.record)
            reference = table.append(filled, metadata, known)
            if reference.version == (0 if known is None else known + 1):
                known = reference.version  # nobody else has written: the next append need not look at ours
        tally.add(num_tokens)
    check_filled(request, target, tally.num_pairs)


def ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items; a thread fetches each one while its predecessor is worked on, so that reading costs no time."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item


if __name__ == "__main__":
    sys.exit(run_main(lambda: run(Request.load(sys.argv[1]))))
