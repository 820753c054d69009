"""Changes to a training step that `python -m benchmarks.roofline --changes` predicts one by one, and all together.

Stand-ins: they count what such a step would do, and are no implementation of it. Delete one that
the code has got.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.models.llama import modeling_llama

import train.model.logps
from benchmarks.roofline.card import Card, byte_size
from train.model.attention import NUM_BRANCHES, Packing, Scoring


class _Fused(torch.autograd.Function):
    """One kernel forward and one backward, over whatever goes in; the first input has the shape of what comes out."""

    @staticmethod
    def forward(ctx: Any, card: Card, name: str, *inputs: Tensor) -> Tensor:
        ctx.card, ctx.name = card, name
        ctx.save_for_backward(*inputs)
        output = torch.empty_like(inputs[0])
        card.add(name, 0, 1, sum(map(byte_size, (*inputs, output))))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        ctx.card.add(f"{ctx.name}_backward", 0, 1, 2 * sum(map(byte_size, inputs)) + byte_size(gradient))
        return (None, None, *map(torch.empty_like, inputs))


@contextmanager
def varlen_attention(_card: Card) -> Iterator[None]:
    """Three segments a pair; keys and values of prompts gathered in front of both responses."""

    def attend(packing: Packing, _: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        index, of_queries, of_keys = _segments(packing.branch_ids.tolist())
        rows = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
        keys, values = (row.index_select(0, index) for row in rows[1:])
        longest = [int(ends.diff().max()) for ends in (of_queries, of_keys)]
        window = (-1 if scoring.window is None else scoring.window - 1, 0)
        return varlen_attn(
            rows[0], keys, values, of_queries, of_keys, *longest, window_size=window, enable_gqa=True
        )[None]  # fmt: skip

    with mock.patch.object(Packing, "attend", attend):
        yield


def _segments(branches: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return where keys come from, and the ends of segments of queries and of keys."""
    starts = [i for i in range(len(branches)) if i == 0 or branches[i] != branches[i - 1]]
    segments = list(zip(starts, [*starts[1:], len(branches)], strict=True))
    index: list[int] = []
    of_keys, shared = [0], range(0)
    for begin, end in segments:
        own = range(begin, end)
        if branches[begin] % NUM_BRANCHES == 0:
            shared, before = own, range(0)
        else:
            before = shared
        index += [*before, *own]
        of_keys.append(len(index))
    return torch.tensor(index), torch.tensor([0, *(end for _, end in segments)]), torch.tensor(of_keys)


@contextmanager
def fused_layers(card: Card) -> Iterator[None]:
    """Norm, rotation and gated product as one kernel each, as Liger has them."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _Fused.apply(card, "fused_rotation", query, cos, sin), _Fused.apply(
            card, "fused_rotation", key, cos, sin
        )

    def gate(mlp: Any, hidden: Tensor) -> Tensor:
        return mlp.down_proj(_Fused.apply(card, "fused_gate", mlp.gate_proj(hidden), mlp.up_proj(hidden)))

    with (
        mock.patch.object(
            modeling_llama.LlamaRMSNorm, "forward", lambda s, x: _Fused.apply(card, "fused_norm", x, s.weight)
        ),
        mock.patch.object(modeling_llama.LlamaMLP, "forward", gate),
        mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate),
    ):
        yield


@contextmanager
def head_in_large_chunks(_card: Card) -> Iterator[None]:
    """2 ** 29 logits at a time, computed again in the backward pass: fewer casts of the matrix and sums of its gradients."""
    with mock.patch.object(train.model.logps, "CHUNK_LOGITS", 1 << 29):
        yield


@contextmanager
def head_keeps_logits(_card: Card) -> Iterator[None]:
    """Large chunks, and nothing is computed again."""
    with (
        mock.patch.object(train.model.logps, "CHUNK_LOGITS", 1 << 29),
        mock.patch.object(
            train.model.logps.per_token_logps,
            "__kwdefaults__",
            {"divergence": None, "chunk_logits": None, "kept_logits": 1 << 40},
        ),
    ):
        yield


class MasterWeights:
    """AdamW over float32 copies of bfloat16 parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [parameter.detach().float() for parameter in parameters]
        self.inner = torch.optim.AdamW(self.masters, fused=True)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.inner.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)
                master.grad = None

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


Change = Callable[[Card], Any]
CHANGES: dict[str, tuple[bool, list[Change]]] = {
    "as it is": (False, []),
    "varlen attention": (False, [varlen_attention]),
    "fused norm, rotation, gate": (False, [fused_layers]),
    "head in large chunks": (False, [head_in_large_chunks]),
    "head keeps its logits": (False, [head_keeps_logits]),
    "bfloat16 parameters": (True, []),
    "bfloat16, varlen": (True, [varlen_attention]),
    "bfloat16, varlen, fused": (True, [varlen_attention, fused_layers]),
    "bfloat16, varlen, fused, large chunks": (True, [varlen_attention, fused_layers, head_in_large_chunks]),
    "bfloat16, varlen, fused, logits kept": (True, [varlen_attention, fused_layers, head_keeps_logits]),
}
"""Whether parameters are bfloat16, with float32 masters and no autocast; and what else is exchanged."""


@contextmanager
def applied(changes: Sequence[Change], card: Card) -> Iterator[None]:
    """Exchange the parts."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change(card))
        yield
