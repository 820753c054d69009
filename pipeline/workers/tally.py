"""Counts the tokens that a worker has done, and shows the progress."""

import time
from collections.abc import Callable

from pipeline.workers.request import Stage
from weights_store.messages import Progress, show


class Tally:
    """Counts tokens and shows every change; log handlers decide how often to print. The work began `since_s` ago."""

    def __init__(self, stage: Stage, role: str, num_pairs: int, num_tokens: int, since_s: float = 0.0) -> None:
        self.num_pairs = num_pairs
        self._name, self._total, self._done = f"{stage} {role}", num_tokens, 0
        self._started = time.monotonic() - since_s
        self._show(0)

    def within(self, num_tokens: int) -> Callable[[float], None]:
        """Return a function that shows a share of the next `num_tokens` as done."""
        return lambda share: self._show(self._done + int(share * num_tokens))

    def add(self, num_tokens: int) -> None:
        """Count tokens that are done and committed."""
        self._done += num_tokens
        self._show(self._done)

    def _show(self, done: int) -> None:
        show(Progress(self._name, done, self._total, time.monotonic() - self._started))
