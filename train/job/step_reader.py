"""The steps of one rank: their pairs, read ahead and refreshed if the loss needs it, and cut into micro-batches.

Called by the trainer.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.data.dataset import Pair
from train.data.sampler import StepBatches
from train.job.refresh import Refresher, load_fresh, save_fresh
from train.model.collate import Batch, PairCollator
from train.model.token_budget import cut_by_tokens

Steps = Iterator[list[Pair]]


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimizer step."""

    pairs: Sequence[Pair]
    batches: list[Batch]
    largest: int
    """Tokens of the largest micro-batch, as the budget counts them."""
    num_units: Tensor | int
    """Pairs, responses or tokens of all ranks that the loss is averaged over."""
    mismatched: list[Batch]
    """Of the pairs' prompts with responses to other prompts, if the loss needs them."""


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


def cut_evenly(
    pairs: Sequence[Pair], collator: PairCollator, *, max_tokens: int, device: torch.device | None
) -> tuple[list[Batch], int]:
    """Return pairs in micro-batches, and the tokens of the largest one.

    With a `device`, that of this rank, all ranks get equally many: they compute in lockstep.
    """
    parts = cut_by_tokens(pairs, [collator.num_tokens(pair) for pair in pairs], max_tokens)
    if device is not None:
        most = torch.tensor(len(parts), device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        while len(parts) < int(most):
            longest = max(range(len(parts)), key=lambda part: len(parts[part]))
            middle = len(parts[longest]) // 2
            parts[longest : longest + 1] = [parts[longest][:middle], parts[longest][middle:]]
    batches = [collator(sorted(part, key=lambda pair: pair.is_filler)) for part in parts]
    return batches, max(sum(map(collator.num_tokens, part)) for part in parts)
