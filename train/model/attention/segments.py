"""Packed attention by kernels for sequences of different lengths (flash attention), without a mask.

Every run of a row is a segment: its tokens are queries; keys are what its pair shares, then the run itself. The kernel aligns
both at their ends, so that the last query sees all keys and each one before it one key less. A prompt's keys and values are
copied once for each response, which is little beside the rest of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from train.model.attention.layout import NUM_BRANCHES, Ints, Layout, ranges, to_device

LARGEST_HEAD = 256
"""Values per head that flash attention can do; a multiple of 8."""
_NEEDS_TO_KNOW_OF_GROUPS = "enable_gqa" in signature(varlen_attn).parameters
"""torch 2.11 takes fewer heads of keys without being told."""


@dataclass(frozen=True, eq=False)
class Segments:
    """S segments: N queries in the order of the row, and K keys.

    Args:
        query_ends: `[S + 1]` int32, where each segment's queries end, after a 0; `key_ends` likewise.
        key_ends: See there.
        max_queries: Of one segment; `max_keys` likewise.
        max_keys: See there.
        key_places: `[K]`, where each key is: in the row, or in the row of prompts with the row of queries after it.
        own_keys: `[N]`, which key is the token's own, in its own segment.
        repeats: The other uses of tokens of this row, by branch: where the tokens are, and which keys they are, `[M]` each.
    """

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    key_places: Tensor
    own_keys: Tensor
    repeats: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, row: Layout, device: torch.device, prompts: Layout | None = None) -> Self:
        """Return the segments of a row; `prompts` is a row of its own for what responses share, if they do not have it."""
        run_before, num_before = row.before(prompts or row)
        begins_before = (prompts or row).begins[run_before]
        num_keys = num_before + row.lengths
        begins = num_keys.cumsum() - num_keys
        own_keys = ranges(begins + num_before, row.lengths)
        key_places = ranges(begins_before, num_keys)  # right for what comes before; the others follow
        key_places[own_keys] = np.arange(row.num_tokens) + (prompts.num_tokens if prompts else 0)

        def uses(branch: int) -> tuple[Tensor, Tensor]:
            runs = row.branch_ids % NUM_BRANCHES == branch
            places, keys = (ranges(start[runs], num_before[runs]) for start in (begins_before, begins))
            return to_device(places, device), to_device(keys, device)

        branches = set((row.branch_ids % NUM_BRANCHES).tolist()) - {0} if prompts is None else set()
        return cls(
            _ends(row.lengths, device),
            _ends(num_keys, device),
            int(row.lengths.max()),
            int(num_keys.max()),
            to_device(key_places, device),
            to_device(own_keys, device),
            tuple(map(uses, sorted(branches))),
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention output of the row, `[1, N, H, D]`.

        Args:
            query: `[1, H, N, D]` in half precision; keys and values likewise, perhaps with fewer heads.
            key: See there.
            value: See there.
            scale: Of the scores; None for 1 / sqrt(D).
            window: How many tokens a token sees, itself included; None for all.
            before: Keys and values of the row of prompts, constant.
        """
        kept = None if before is None else _by_token(*before)
        keys, values = _LayOut.apply(_by_token(key, value), kept, self).unbind(1)
        groups = {"enable_gqa": True} if _NEEDS_TO_KNOW_OF_GROUPS else {}
        attend: Callable[..., Any] = varlen_attn
        output: Tensor = attend(
            query[0].transpose(0, 1),
            keys,
            values,
            self.query_ends,
            self.key_ends,
            self.max_queries,
            self.max_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **groups,
        )
        return output[None]


def _ends(lengths: Ints, device: torch.device) -> Tensor:
    return to_device(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), device)


def _by_token(key: Tensor, value: Tensor) -> Tensor:
    """Return keys and values, `[1, H, N, D]` each, as `[N, 2, H, D]`: what belongs to a token is then moved together."""
    return torch.stack([tensor[0].transpose(0, 1) for tensor in (key, value)], dim=1)


class _LayOut(torch.autograd.Function):
    """Keys and values of a row, `[N, 2, H, D]`, and constant ones of prompts, to those of its segments, `[K, 2, H, D]`.

    The gradient of a token that several segments use is added up branch by branch: in a fixed order, unlike that of a gather.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, before: Tensor | None, segments: Segments) -> Tensor:  # type: ignore[override]
        ctx.segments = segments
        return (own if before is None else torch.cat([before, own])).index_select(0, segments.key_places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = gradient.index_select(0, ctx.segments.own_keys)
        for places, keys in ctx.segments.repeats:
            total.index_add_(0, places, gradient.index_select(0, keys))
        return total, None, None
