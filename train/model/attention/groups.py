"""Packed attention on CPUs: neighbouring pairs of similar length as one padded row per pair, with a boolean mask.

Nothing here knows of pairs: a group is a few sequences of a packed row, maybe with keys and values in front of each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from train.model.attention.layout import Ints, to_device

MAX_DENSE_SCORES = 1 << 19
"""Scores of one head up to which CPUs use plain matrix products. While scores fit into the cache, these are faster than the
flash kernel: 1.8 against 3.6 ms for a pair of 256 tokens, but 54 against 35 at 1,024 (8 heads, forward and backward)."""
MAX_GROUP_SCORES = 1 << 17
"""Scores of one head up to which pairs are computed together: four of 256 tokens take more than four times as long as one."""
_SHORTEST = 0.8
"""Pairs are computed together if the shortest has at least this share of the longest one's length; the rest is padding."""

KeysValues = tuple[Tensor, Tensor]


class Scoring(NamedTuple):
    """How a layer computes its scores."""

    scaling: float | None = None
    """None for 1 / sqrt(D)."""
    window: int | None = None
    """How many tokens a token sees, itself included; None for all."""
    softcap: float | None = None
    """Scores are mapped into (-softcap, softcap)."""
    sinks: Tensor | None = None
    """`[H]`, the score of a further key with value 0 that all tokens see (gpt-oss)."""


@dataclass(frozen=True)
class RowGroup:
    """B neighbouring sequences of the packed row, as one row per sequence.

    Args:
        begin: Where they begin in the packed row.
        num_tokens: Tokens of all of them.
        places: `[B, T]`, where each token is, counted from `begin`; 0 after a sequence's end.
        is_token: `[B, T]` bool.
    """

    begin: int
    num_tokens: int
    places: Tensor
    is_token: Tensor

    @classmethod
    def of(cls, lengths: Ints, begin: int, device: torch.device) -> Self:
        """Lay out sequences of these lengths."""
        steps = np.arange(lengths.max())
        is_token = steps < lengths[:, None]
        places = np.where(is_token, (lengths.cumsum() - lengths)[:, None] + steps, 0)
        return cls(begin, int(lengths.sum()), *(to_device(array, device) for array in (places, is_token)))

    def spread(self, packed: Tensor) -> Tensor:
        """Return the group's part of a row, `[1, H, N, D]`, as one row per sequence, `[B, H, T, D]`."""
        return _Spread.apply(packed, self.places, self.is_token)


def cut_by_length(lengths: list[int]) -> list[int]:
    """Return the sizes of groups of neighbouring sequences that are computed together."""
    sizes: list[int] = []
    longest = 0
    for length in lengths:
        fits = bool(sizes) and (sizes[-1] + 1) * longest**2 <= MAX_GROUP_SCORES
        if fits and _SHORTEST * longest <= length <= longest:
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes


class _Spread(torch.autograd.Function):
    """`[1, H, N, D]` to `[B, H, T, D]` by `places`; padding repeats the first token.

    Every token has one place, so the backward pass is a plain gather.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, packed: Tensor, places: Tensor, is_token: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(is_token)
        return packed[0].transpose(0, 1)[places].transpose(1, 2)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (is_token,) = ctx.saved_tensors
        return gradient.transpose(1, 2)[is_token].transpose(0, 1)[None], None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, scoring: Scoring, before: KeysValues | None
) -> Tensor:
    """Return softmax attention with a mask, `[B, H, T, D]`; `before` holds constant keys and values in front of the others."""
    scaling, _, softcap, sinks = scoring
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        before = before and (before[0].repeat_interleave(groups, dim=1), before[1].repeat_interleave(groups, dim=1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = softcap is None and sinks is None
    if is_plain and query.shape[0] * query.shape[2] * mask.shape[3] <= MAX_DENSE_SCORES:
        return _DenseAttention.apply(query, key, value, mask, scale, before)
    if before is not None:
        key, value = (torch.cat(parts, dim=2) for parts in zip(before, (key, value), strict=True))
    if not is_plain:
        scores = (query * scale) @ key.transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        return _shares(scores, mask, value.dtype, sinks) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _shares(scores: Tensor, mask: Tensor, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
    """Return the softmax over what the mask allows; in float32, since bfloat16 loses sums of many small numbers."""
    wide = torch.promote_types(dtype, torch.float32)
    scores.masked_fill_(~mask, -torch.inf)  # in place: nobody else uses the scores
    if sinks is None:
        return scores.softmax(-1, dtype=wide).to(dtype)
    sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=wide)[..., :-1].to(dtype)


class _DenseAttention(torch.autograd.Function):
    """`attend` by plain matrix products. Of the tensors as large as the scores, only the shares are kept for backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scale: float,
        before: KeysValues | None,
    ) -> Tensor:
        ctx.num_before = 0 if before is None else before[0].shape[2]
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        shares = _shares((query * scale) @ key.transpose(-1, -2), mask, value.dtype)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale = scale
        return shares @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        query, key, value, shares = ctx.saved_tensors
        of_shares = gradient @ value.transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_query = (of_scores @ key) * ctx.scale
        own_scores, own_shares = (whole[..., ctx.num_before :].transpose(-1, -2) for whole in (of_scores, shares))
        return of_query, (own_scores @ query) * ctx.scale, own_shares @ gradient, None, None, None
