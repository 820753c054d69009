"""The pairs of one rank, step by step: read ahead, and refreshed if the loss needs it. Called by the trainer."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from train.data.dataset import Pair
from train.data.sampler import StepBatches
from train.job.refresh import Refresher, load_fresh, save_fresh

Steps = Iterator[list[Pair]]


class StepReader:
    """Hands out the pairs of each step.

    With a refresher, the pairs of `refresher.num_steps` steps (a window) are refreshed together, when the first of them begins.

    Args:
        refresher: None if everything comes from the dataset.
        seed: Of the training; what is sampled depends on it, the step and the rank.
    """

    def __init__(self, batches: StepBatches, refresher: Refresher | None, *, seed: int) -> None:
        self.batches = batches
        self.refresher = refresher
        self.seed = seed
        self.refreshed_s = 0.0
        self.resumed_from: Path | None = None  # the checkpoint that this training continues from
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[list[Pair] | None] | None = None
        self._window: deque[list[Pair]] = deque()

    def next_pairs(self, steps: Steps, step: int) -> list[Pair] | None:
        """Return the pairs of the step with this number; None after the last step."""
        if self.refresher is None:
            return self._read(steps)
        if not self._window:
            num_steps = self.refresher.num_steps - step % self.refresher.num_steps  # fewer if resumed within a window
            window = [pairs for _ in range(num_steps) if (pairs := self._read(steps)) is not None]
            if window:
                begin = time.perf_counter()
                self._window.extend(self._refresh(self.refresher, window, step))
                self.refreshed_s += time.perf_counter() - begin
        return self._window.popleft() if self._window else None

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the rest of the current window into a checkpoint, for a training that continues from it."""
        if self._window:
            save_fresh(checkpoint, self.batches.rank, self._by_position(self._window, step))

    def _read(self, steps: Steps) -> list[Pair] | None:
        """Return the stored pairs of the next step; None after the last step."""
        # The next step's pairs are read while this one is computed: opening a window of row groups takes 0.2 s and more.
        pairs = (self._ahead or self._reader.submit(next, steps, None)).result()
        self._ahead = None if pairs is None else self._reader.submit(next, steps, None)
        return pairs

    def _refresh(self, refresher: Refresher, window: Sequence[list[Pair]], step: int) -> Steps:
        """Yield the steps of a window, refreshed now; or, if resumed within it, as they were when it began."""
        if step % refresher.num_steps:
            assert self.resumed_from is not None
            fresh = iter(load_fresh(self.resumed_from, self._by_position(window, step)).values())
        else:
            entropy = (self.seed, step, self.batches.rank)
            seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
            fresh = iter(refresher.refresh(list(chain(*window)), seed))
        return ([next(fresh) for _ in pairs] for pairs in window)

    def _by_position(self, window: Iterable[list[Pair]], step: int) -> dict[int, Pair]:
        steps = ((self.batches.positions_of_step(later), pairs) for later, pairs in enumerate(window, step))
        return {position: pair for positions, pairs in steps for position, pair in zip(positions, pairs, strict=True)}
