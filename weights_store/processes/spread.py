"""How the same work is done on many parts of a table: one part after the other in this process, or many at once elsewhere.

Functions that go over all rows of a table take a `Spread`. Whatever it is, results come in the order of the items, so what is
made of them does not depend on where the work was done. Ray's is in `pipeline/workers/ray_spread.py`: the store knows no Ray.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

_MAX_THREADS = 4
"""How many items are in memory at once."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Spread(Protocol):
    """Does the work of every item. Work, items and results must be picklable, and doing the work twice must be harmless."""

    def __call__(self, work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
        """Yield the result of each item, in their order; items are taken as they are needed."""
        ...


def in_turn(work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
    """Do the work of one item after the other, here."""
    return map(work, items)


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
    """Do the work of several items at once, here: for work that is mostly outside of Python's lock."""
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads)
    running: deque[Future[_Result]] = deque()
    try:
        for item in items:
            if len(running) == num_threads:
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
