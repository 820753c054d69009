"""Packed attention: all tokens of a micro-batch are in one row; each sees its own prompt and its own branch.

Registered with transformers as an attention implementation, so that decoders need no change: what they pass to flash attention
(scale, sliding window, soft-capping) arrives here by name. On a GPU, flash attention runs over the segments of the row
(`segments.py`) in half precision, and flex attention with a block mask (`blocks.py`) in float32 or with soft-capping; on a CPU,
plain attention runs over one padded row per pair (`groups.py`). The rest of the decoder runs over the packed row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from train.model.attention.blocks import make_block_mask
from train.model.attention.groups import KeysValues, RowGroup, Scoring, attend, cut_by_length
from train.model.attention.layout import NUM_BRANCHES, Layout, to_device
from train.model.attention.segments import LARGEST_HEAD, Segments

PACKED = "tokenweights_packed"
"""Name of the attention implementation."""
Way = Literal["segments", "blocks", "groups"]


def way_of(query: Tensor, value: Tensor, scoring: Scoring) -> Way:
    """Return how the attention of these queries `[1, H, N, D]` is computed; `value` has the dtype of the products."""
    if not query.is_cuda:
        return "groups"
    size, is_plain = query.shape[-1], scoring.softcap is None and scoring.sinks is None
    is_half = value.dtype in (torch.bfloat16, torch.float16)
    fits = size == value.shape[-1] and size % 8 == 0 and size <= LARGEST_HEAD
    return "segments" if is_plain and is_half and fits else "blocks"


@dataclass
class Packing:
    """Who may see whom in a packed row of N tokens; built for one forward pass.

    Args:
        layout: The runs of the row.
        device: Where it is computed.
    """

    layout: Layout
    device: torch.device
    _row_masks: dict[int | None, list[Tensor]] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def sees(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Return whether the tokens at `query` may see those at `key`, broadcast.

        A token sees the earlier tokens of its own branch and of the shared branch of its pair.
        """
        branch_ids, positions = self._tokens
        query_branch, key_branch = branch_ids[query], branch_ids[key]
        same_pair = query_branch // NUM_BRANCHES == key_branch // NUM_BRANCHES
        distance = positions[query] - positions[key]
        allowed = same_pair & ((key_branch % NUM_BRANCHES == 0) | (key_branch == query_branch)) & (distance >= 0)
        return allowed if window is None else allowed & (distance < window)

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Branch id and position of each token, `[N]` each."""
        branch_ids, positions = self.layout.token_branch_ids(), self.layout.positions()
        return to_device(branch_ids, self.device), to_device(positions, self.device)

    @cached_property
    def groups(self) -> Sequence[RowGroup]:
        """The pairs in groups of similar length, in their order."""
        firsts = np.flatnonzero(np.diff(self.layout.pairs, prepend=-1))  # runs with which a pair begins
        lengths = np.add.reduceat(self.layout.lengths, firsts)
        parts = np.split(lengths, np.cumsum(cut_by_length(lengths.tolist()))[:-1])
        begins = np.cumsum([0, *(part.sum() for part in parts)])
        return [RowGroup.of(part, int(begin), self.device) for part, begin in zip(parts, begins, strict=False)]

    @cached_property
    def segments(self) -> Segments:
        """The row as flash attention takes it."""
        return Segments.of(self.layout, self.device)

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the mask of the row for flex attention."""
        if window not in self._block_masks:

            def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return self.sees(query, key, window)

            self._block_masks[window] = make_block_mask(self.layout, mask_mod, self.device)
        return self._block_masks[window]

    def mask(self, group: RowGroup, window: int | None) -> Tensor:
        """Return which token of a group's pair sees which, `[B, 1, T, T]` bool."""
        places = group.begin + group.places
        mask = self.sees(places[:, :, None], places[:, None, :], window)
        mask &= group.is_token[:, :, None] & group.is_token[:, None, :]
        mask.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: a softmax over nothing is NaN
        return mask[:, None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention output of the row, `[1, N, H, D]`; see `packed_attention`."""
        # Under autocast, rotation may return float32, which every matrix product would cast again.
        query, key = query.to(value.dtype), key.to(value.dtype)
        way = way_of(query, value, scoring)
        if way == "segments":
            return self.segments.attend(query, key, value, scale=scoring.scaling, window=scoring.window)
        if way == "groups":
            return self.attend_in_groups((query, key, value), repeat(None), scoring)
        options = {"scaling": scoring.scaling, "softcap": scoring.softcap, "s_aux": scoring.sinks}
        return flex_attention_forward(module, query, key, value, self.block_mask(scoring.window), **options)[0]

    def attend_in_groups(self, row: Sequence[Tensor], befores: Iterable[KeysValues | None], scoring: Scoring) -> Tensor:
        """Return the attention output of a row of queries, keys and values; one of `befores` for each group, see `attend`."""
        masks = self._row_masks.get(scoring.window)
        if masks is None:
            masks = self._row_masks[scoring.window] = [self.mask(group, scoring.window) for group in self.groups]
        sizes = [group.num_tokens for group in self.groups]
        parts = zip(*(tensor.split(sizes, dim=2) for tensor in row), strict=True)
        outputs = []
        for group, mask, tensors, before in zip(self.groups, masks, parts, befores, strict=False):
            laid_out = map(group.spread, tensors)
            attended = attend(*laid_out, mask=mask, scoring=scoring, before=before)
            outputs.append(attended.transpose(1, 2)[group.is_token])
        return torch.cat(outputs)[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # noqa: ARG001 - we make our own
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_rest: object,
) -> tuple[Tensor, None]:
    """Attend within pairs; `[1, H, N, D]` queries, keys and values (fewer heads) to `[1, N, H, D]`.

    Not compiled with the layer around it (`model.compile`): who sees whom changes with every micro-batch.

    The decoder passes its keyword arguments, such as `packing`, on to here. Queries and keys are already rotated.
    """
    assert dropout == 0.0, "policy.py turns dropout off"
    return packing.attend(module, query, key, value, Scoring(scaling, sliding_window, softcap, s_aux)), None


AttentionInterface.register(PACKED, packed_attention)
