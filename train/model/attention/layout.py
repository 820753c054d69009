"""What lies where in a packed row: the layout that all ways of computing attention read.

A row is a sequence of runs: neighbouring tokens of one branch of one pair. The branch 0 of a pair is what its responses share,
and comes before them. Known on the host, so that nobody has to wait for a GPU to learn how long something is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHOSEN, REJECTED, ANCHOR = 1, 2, 3
"""Branches of a pair: the tokens of one response. What all responses share is branch 0."""
NUM_BRANCHES = 4

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The R runs of a packed row of N tokens.

    Args:
        branch_ids: `[R]`, NUM_BRANCHES * pair + branch.
        lengths: `[R]`, tokens of each run, at least 1.
    """

    branch_ids: Ints
    lengths: Ints

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]]) -> Self:
        """Return the layout of these runs, a branch id and a length each; runs without tokens are left out."""
        table = np.array([run for run in runs if run[1]], np.int64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1])

    @classmethod
    def of_tokens(cls, branch_ids: Sequence[int]) -> Self:
        """Return the layout of tokens of these branches."""
        return cls.of([(branch_id, len(list(run))) for branch_id, run in groupby(branch_ids)])

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.lengths.sum())

    @cached_property
    def begins(self) -> Ints:
        """`[R]`, where each run begins."""
        return self.lengths.cumsum() - self.lengths

    @cached_property
    def is_shared(self) -> NDArray[np.bool_]:
        """`[R]`, whether it is the run that the responses of a pair share."""
        return self.branch_ids % NUM_BRANCHES == 0

    @property
    def pairs(self) -> Ints:
        """`[R]`, the pair of each run."""
        return self.branch_ids // NUM_BRANCHES

    def take(self, runs: Ints) -> Self:
        """Return a row of some of these runs, in the order given."""
        return type(self)(self.branch_ids[runs], self.lengths[runs])

    def places(self, runs: Ints) -> Ints:
        """Return where the tokens of some runs are, one run after the other."""
        return ranges(self.begins[runs], self.lengths[runs])

    def token_branch_ids(self) -> Ints:
        """Return the branch id of each token, `[N]`."""
        return np.repeat(self.branch_ids, self.lengths)

    def positions(self) -> Ints:
        """Return the position of each token in the sequence that it belongs to, `[N]`."""
        return ranges(self.before(self)[1], self.lengths)

    def before(self, prompts: "Layout") -> tuple[Ints, Ints]:
        """Return for each run the run of `prompts` that comes before it in its sequence, and how long it is, `[R]` each.

        `prompts` is the row with what the responses share: this one, or a row of its own. A shared run has nothing before it:
        0 tokens.
        """
        shared = np.flatnonzero(prompts.is_shared)
        order = np.argsort(prompts.pairs[shared])
        found = shared[order][np.searchsorted(prompts.pairs[shared], self.pairs, sorter=order)]
        return found, np.where(self.is_shared, 0, prompts.lengths[found])


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """Return `begins[i], begins[i] + 1, …`, `lengths[i]` numbers of each, one after the other."""
    ends = lengths.cumsum()
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def to_device(data: Tensor | NDArray[Any], device: torch.device | str) -> Tensor:
    """Return a tensor on a device.

    A GPU gets it from pinned memory, behind what it is doing; from other memory the host would wait until that is done.
    """
    tensor = data if isinstance(data, Tensor) else torch.from_numpy(data)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
