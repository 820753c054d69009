"""Changes to a training step that `python -m benchmarks.roofline --changes` predicts one by one, and all together.

Stand-ins: they count what such a step would do, and are no implementation of it. Delete one that the code has got.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import train.model.logps
from benchmarks.roofline.card import Card, Fused


@contextmanager
def fused_layers(card: Card) -> Iterator[None]:
    """Norm, rotation and gated product as one kernel each, as Liger has them."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        first, second = (Fused.apply(card, "fused_rotation", each, cos, sin) for each in (query, key))
        return first, second

    def gate(mlp: Any, hidden: Tensor) -> Tensor:
        return mlp.down_proj(Fused.apply(card, "fused_gate", mlp.gate_proj(hidden), mlp.up_proj(hidden)))

    with (
        mock.patch.object(
            modeling_llama.LlamaRMSNorm, "forward", lambda s, x: Fused.apply(card, "_fused_rms_norm", x, s.weight)
        ),
        mock.patch.object(modeling_llama.LlamaMLP, "forward", gate),
        mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate),
    ):
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
    "fused norm, rotation, gate": (False, [fused_layers]),
    "head keeps its logits": (False, [head_keeps_logits]),
    "bfloat16 parameters": (True, []),
    "bfloat16 parameters, fused": (True, [fused_layers]),
    "bfloat16 parameters, fused, logits kept": (True, [fused_layers, head_keeps_logits]),
}
"""Whether parameters are bfloat16, with float32 masters and no autocast; and what else is exchanged."""


@contextmanager
def applied(changes: Sequence[Change], card: Card) -> Iterator[None]:
    """Exchange the parts."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change(card))
        yield
