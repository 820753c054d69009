"""Attention over packed pairs: all tokens of a micro-batch are in one row; each sees its own prompt and its own branch.

Registered with transformers as an attention implementation, so that decoders need no change: what they pass to flash attention
(scale, sliding window, soft-capping) arrives here by name. On a GPU, flex attention runs over the row. On a CPU, the attention
alone runs over one padded row per pair with a boolean mask; the rest of the decoder runs over the packed row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

PACKED = "tokenweights_packed"
"""Name of the attention implementation."""
CHOSEN, REJECTED, ANCHOR = 1, 2, 3
"""Branches of a pair: the tokens of one response. What all responses share is branch 0."""
NUM_BRANCHES = 4
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
    """B neighbouring pairs of the packed row, as one row per pair.

    Args:
        begin: Where they begin in the packed row.
        num_tokens: Tokens of all of them.
        places: `[B, T]`, where each token is, counted from `begin`; 0 after a pair's end.
        is_token: `[B, T]` bool.
    """

    begin: int
    num_tokens: int
    places: Tensor
    is_token: Tensor

    @classmethod
    def of(cls, lengths: Tensor, begin: int, *others: Tensor) -> Self:
        """Lay out pairs of these lengths; `others` are further fields of a subclass."""
        starts = lengths.cumsum(0) - lengths
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        is_token = steps < lengths[:, None]
        return cls(begin, int(lengths.sum()), torch.where(is_token, starts[:, None] + steps, 0), is_token, *others)

    def mask(self, packing: "Packing", window: int | None) -> Tensor:
        """Return which token of a pair sees which, `[B, 1, T, T]` bool. Padding sees itself: a softmax over nothing is NaN."""
        places = self.begin + self.places
        mask = packing.sees(places[:, :, None], places[:, None, :], window)
        mask &= self.is_token[:, :, None] & self.is_token[:, None, :]
        mask.diagonal(dim1=1, dim2=2).fill_(True)
        return mask[:, None]


def _cut_by_length(lengths: list[int]) -> list[int]:
    """Return the sizes of groups of neighbouring pairs that are computed together."""
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


@dataclass
class Packing:
    """Who may see whom in a packed row of N tokens.

    Args:
        branch_ids: `[N]`, NUM_BRANCHES * pair + branch: 0 for what all responses share, else the response whose own it is.
        positions: `[N]`, in the sequence that the token belongs to.
    """

    branch_ids: Tensor
    positions: Tensor
    _row_masks: dict[int | None, list[Tensor]] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def sees(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Return whether the tokens at `query` may see those at `key`, broadcast.

        A token sees the earlier tokens of its own branch and of the shared branch of its pair.
        """
        query_branch, key_branch = self.branch_ids[query], self.branch_ids[key]
        same_pair = query_branch // NUM_BRANCHES == key_branch // NUM_BRANCHES
        distance = self.positions[query] - self.positions[key]
        allowed = same_pair & ((key_branch % NUM_BRANCHES == 0) | (key_branch == query_branch)) & (distance >= 0)
        return allowed if window is None else allowed & (distance < window)

    @cached_property
    def groups(self) -> Sequence[RowGroup]:
        """The pairs in groups of similar length, in their order."""
        lengths = torch.bincount(self.branch_ids // NUM_BRANCHES)
        groups: list[RowGroup] = []
        begin = 0
        for part in lengths.split(_cut_by_length(lengths.tolist())):
            groups.append(RowGroup.of(part, begin))
            begin += groups[-1].num_tokens
        return groups

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the mask of the packed row for flex attention."""
        if window not in self._block_masks:

            def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return self.sees(query, key, window)

            length = len(self.branch_ids)
            device = str(self.branch_ids.device)
            self._block_masks[window] = create_block_mask(mask_mod, None, None, length, length, device)
        return self._block_masks[window]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention output of the row, `[1, N, H, D]`; see `packed_attention`."""
        if query.is_cuda:
            options = {"scaling": scoring.scaling, "softcap": scoring.softcap, "s_aux": scoring.sinks}
            return flex_attention_forward(module, query, key, value, self.block_mask(scoring.window), **options)[0]
        return self.attend_in_groups((query, key, value), repeat(None), scoring)

    def attend_in_groups(self, row: Sequence[Tensor], befores: Iterable[KeysValues | None], scoring: Scoring) -> Tensor:
        """Return the attention output of a row of queries, keys and values; one of `befores` for each group, see `attend`."""
        masks = self._row_masks.get(scoring.window)
        if masks is None:
            masks = self._row_masks[scoring.window] = [group.mask(self, scoring.window) for group in self.groups]
        dtype, sizes = row[-1].dtype, [group.num_tokens for group in self.groups]
        # Under autocast, rotation returns float32, which every matrix product would cast again.
        parts = zip(*(tensor.to(dtype).split(sizes, dim=2) for tensor in row), strict=True)
        outputs = []
        for group, mask, tensors, before in zip(self.groups, masks, parts, befores, strict=False):
            laid_out = (_Spread.apply(tensor, group.places, group.is_token) for tensor in tensors)
            attended = attend(*laid_out, mask=mask, scoring=scoring, before=before)
            outputs.append(attended.transpose(1, 2)[group.is_token])
        return torch.cat(outputs)[None]


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

    The decoder passes its keyword arguments, such as `packing`, on to here. Queries and keys are already rotated.
    """
    assert dropout == 0.0, "policy.py turns dropout off"
    return packing.attend(module, query, key, value, Scoring(scaling, sliding_window, softcap, s_aux)), None


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


AttentionInterface.register(PACKED, packed_attention)
