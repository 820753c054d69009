"""The order in which pairs are trained on: a pure function of (seed, epoch, position).

Shards are put in a random order, row groups are shuffled inside blocks of a few shards, and rows inside windows of a few
groups. So a reader holds one window in memory and the shards of one block on its disk at a time, and every rank, worker and
resumed run can compute any position without replaying what came before. The order does not depend on ranks; `StepBatches`
says which rank takes which positions of a step.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WINDOW_GROUPS = 32
"""Row groups that rows are mixed over; a group is about 1 MiB."""

BLOCK_GROUPS = 256
"""Row groups from which a window is chosen: those of a few full shards, which must be on the local disk meanwhile."""

Rows = NDArray[np.int64]


class BlockShuffle:
    """A permutation of rows for every epoch, local to windows of row groups, and these to blocks of shards.

    Args:
        group_sizes: Rows of each row group, by shard, in stored order.
        block_groups: Row groups per block, about.
    """

    def __init__(
        self,
        group_sizes: Sequence[Sequence[int]],
        *,
        seed: int,
        window_groups: int = WINDOW_GROUPS,
        block_groups: int = BLOCK_GROUPS,
    ) -> None:
        self.seed = seed
        self.window_groups = window_groups
        self.block_groups = block_groups
        self._groups_per_shard: Rows = np.array([len(sizes) for sizes in group_sizes], dtype=np.int64)
        self._sizes: Rows = np.array([size for sizes in group_sizes for size in sizes], dtype=np.int64)
        self._starts: Rows = np.cumsum(self._sizes) - self._sizes
        self.num_rows = int(self._sizes.sum())

    def rows(self, positions: Sequence[int]) -> list[int]:
        """Return the rows at `positions` of the endless sequence of epochs, epoch 0 first."""
        return [self.row(*divmod(position, self.num_rows)) for position in positions]

    def row(self, epoch: int, position: int) -> int:
        """Return the row that comes at `position` (0 .. num_rows - 1) of `epoch`.

        Raises:
            IndexError: The position is outside the epoch.
        """
        if not 0 <= position < self.num_rows:
            raise IndexError(f"position {position} is outside an epoch of {self.num_rows} rows")
        _, window_starts = _plan_epoch(self, epoch)
        window = int(np.searchsorted(window_starts, position, side="right")) - 1
        return int(_shuffle_window(self, epoch, window)[position - window_starts[window]])

    def plan_epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """Return the order of groups, those of one block of shards together, and the first position of every window."""
        group_order = _permutation(len(self._sizes), self.seed, epoch)
        shard_order = _permutation(len(self._groups_per_shard), self.seed, epoch, 0, 1)  # 0, 0 would be the bits above
        num_groups = self._groups_per_shard[shard_order]
        block_of_shard = np.empty_like(shard_order)
        block_of_shard[shard_order] = (np.cumsum(num_groups) - num_groups) // self.block_groups
        block_of_group = np.repeat(block_of_shard, self._groups_per_shard)
        group_order = group_order[np.argsort(block_of_group[group_order], kind="stable")]
        ends = np.cumsum(self._sizes[group_order])
        return group_order, np.concatenate([[0], ends])[:-1][:: self.window_groups]

    def shuffle_window(self, epoch: int, window: int) -> Rows:
        """Return the rows of one window in training order."""
        group_order, _ = _plan_epoch(self, epoch)
        groups = group_order[window * self.window_groups : (window + 1) * self.window_groups]
        rows = np.concatenate([np.arange(self._starts[g], self._starts[g] + self._sizes[g]) for g in groups])
        return rows[_permutation(len(rows), self.seed, epoch, window + 1)]  # 0 would equal the group order's entropy


# Small caches outside the object, so that it pickles to workers as a few arrays.
_plan_epoch = lru_cache(maxsize=2)(BlockShuffle.plan_epoch)
_shuffle_window = lru_cache(maxsize=4)(BlockShuffle.shuffle_window)


def _permutation(length: int, *entropy: int) -> Rows:
    """Return a permutation from raw generator bits.

    `Generator.permutation` may change between versions of numpy, the bit stream of PCG64 may not: a run that is resumed after
    an upgrade keeps its order.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(bits, kind="stable")


class StepBatches:
    """Positions of every step of one rank, as ranges, in order: a batch sampler with one batch per step.

    Step s takes the `pairs_per_step` positions from s * pairs_per_step on, for any number of ranks. Epochs follow each other
    without a gap, so only the last step of a run may be smaller. There, too, all ranks get equally many: positions from
    `num_positions` on, fewer than `world_size`, are fillers. Ranges cost nothing, so skipping to a step reads no data.

    Args:
        num_positions: Pairs to train on over the whole run, epochs included.
        pairs_per_step: Over all ranks.
        world_size: Number of ranks; divides `pairs_per_step`.
    """

    def __init__(self, num_positions: int, *, pairs_per_step: int, rank: int = 0, world_size: int = 1) -> None:
        assert pairs_per_step % world_size == 0, "checked by the caller"
        self.num_positions = num_positions
        self.pairs_per_step = pairs_per_step
        self.rank = rank
        self.world_size = world_size
        self.num_steps = -(-num_positions // pairs_per_step)

    def __iter__(self) -> Iterator[range]:
        return (self.positions_of_step(step) for step in range(self.num_steps))

    def __len__(self) -> int:
        return self.num_steps

    def positions_of_step(self, step: int) -> range:
        """Return the positions of this rank in one step."""
        first = step * self.pairs_per_step
        share = -(-min(self.pairs_per_step, self.num_positions - first) // self.world_size)
        return range(first + self.rank * share, first + (self.rank + 1) * share)
