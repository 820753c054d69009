"""The block mask with which flex attention runs over a packed row: for what flash attention cannot do, such as soft-capping.

Made from the runs of the row: a table of 128 x 128 tokens per entry, where a mask of single tokens would take 17 GB at 35,000
tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from train.model.attention.layout import Layout, to_device

BLOCK_SIZE = 128
"""Tokens of a block; what flex attention's kernels expect."""

Blocks = NDArray[np.bool_]


def make_block_mask(layout: Layout, mask_mod: Callable[..., Tensor], device: torch.device) -> BlockMask:
    """Return the mask of a packed row of N tokens; `mask_mod` says of single tokens who sees whom."""
    table = seen_blocks(layout)
    # The blocks that are looked at come first in each row of indices; a stable sort keeps both kinds in order.
    indices = np.argsort(~table, axis=1, kind="stable").astype(np.int32)
    numbers = table.sum(1, dtype=np.int32)
    num_seen, which = (to_device(array, device)[None, None] for array in (numbers, indices))
    length = layout.num_tokens
    return BlockMask.from_kv_blocks(
        num_seen, which, BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def seen_blocks(layout: Layout) -> Blocks:
    """Return which block of queries may see tokens of which block of keys, whatever the window, `[blocks, blocks]`."""
    num_blocks = -(-layout.num_tokens // BLOCK_SIZE)
    table = np.zeros((num_blocks, num_blocks), bool)
    first, last = layout.begins // BLOCK_SIZE, (layout.begins + layout.lengths - 1) // BLOCK_SIZE
    run_before, num_before = layout.before(layout)
    for run in range(len(layout.lengths)):
        rows = slice(first[run], last[run] + 1)
        table[rows, rows] = True
        if num_before[run]:
            before = run_before[run]
            table[rows, first[before] : last[before] + 1] = True
    return np.tril(table)
