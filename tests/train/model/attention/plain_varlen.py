"""What `torch.nn.attention.varlen.varlen_attn` computes on a GPU, segment by segment in plain products, for any dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import train.model.attention.continuation
import train.model.attention.packed
import train.model.attention.segments
from train.model.attention.groups import Scoring


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """`[N, H, D]` queries, `[K, H, D]` keys and values with as many heads or fewer; the last query sees the last key."""
    assert enable_gqa
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert int(query_ends.diff().max()) == max_queries
    assert int(key_ends.diff().max()) == max_keys
    assert query_ends[-1] == len(query)
    assert key_ends[-1] == len(key) == len(value)
    assert window_size[1] == 0
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    outputs = []
    for segment in range(len(query_ends) - 1):
        of_queries, of_keys = (slice(*ends[segment : segment + 2].tolist()) for ends in (query_ends, key_ends))
        own = query[of_queries].transpose(0, 1)
        scores = own @ key[of_keys].permute(1, 2, 0) * (query.shape[-1] ** -0.5 if scale is None else scale)
        num_queries, num_keys = scores.shape[1:]
        distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        sees = distance >= 0
        if window_size[0] >= 0:
            sees &= distance <= window_size[0]
        shares = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append((shares @ value[of_keys].transpose(0, 1)).transpose(0, 1))
    return torch.cat(outputs)


def use_segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a CPU compute attention as a GPU does in half precision; return a list that grows by one with every attention."""
    calls: list[int] = []

    def way_of(_query: Tensor, _value: Tensor, scoring: Scoring) -> str:
        return "segments" if scoring.softcap is None and scoring.sinks is None else "groups"

    def counted(*inputs: Any, **options: Any) -> Tensor:
        calls.append(len(inputs[0]))
        with _disable_current_modes():  # who counts operations does not mean those of the stand-in
            return plain_varlen(*inputs, **options)

    for module in (train.model.attention.packed, train.model.attention.continuation):
        monkeypatch.setattr(module, "way_of", way_of)
    monkeypatch.setattr(train.model.attention.segments, "varlen_attn", counted)
    return calls
