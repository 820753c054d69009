"""Changes to a training step that `python -m benchmarks.roofline --changes` predicts one by one.

Some take back what the code has got, to say what it is worth. Others are stand-ins for what it has not: they count what such a
step would do, and are no implementation of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import train.model.attention.packed
import train.model.elementwise
import train.model.logps
from benchmarks.roofline.card import Card, Fused

Change = Callable[[Card], AbstractContextManager[Any]]


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


def exchanged(owner: Any, name: str, value: object) -> Change:
    """Return a change that puts something else in the place of a name."""
    return lambda _card: mock.patch.object(owner, name, value)


autocast_alone = exchanged(train.model.elementwise, "enter_bfloat16", lambda _model: None)
flex_attention = exchanged(train.model.attention.packed, "way_of", lambda *_: "blocks")
single_gates = exchanged(train.model.elementwise, "_run_gated", lambda mlp, hidden: type(mlp).forward(mlp, hidden))
small_chunks = exchanged(train.model.logps, "CHUNK_LOGITS", 1 << 25)
logits_again = exchanged(train.model.logps, "KEPT_LOGITS", dict.fromkeys(("cpu", "cuda"), 1 << 26))
not_compiled = exchanged(Card, "compiled", lambda _card, compute: compute)

CHANGES: dict[str, tuple[bool, list[Change]]] = {
    "as it is": (False, []),
    "with autocast alone": (False, [autocast_alone]),
    "with flex attention": (False, [flex_attention]),
    "with an output layer of 256 rows at a time": (False, [small_chunks]),
    "with logits computed again": (False, [logits_again]),
    "with log-softmax and gates not compiled": (False, [not_compiled]),
    "with gates as single operations": (False, [single_gates]),
    "with all of that: as it was": (
        False,
        [autocast_alone, flex_attention, small_chunks, logits_again, not_compiled],
    ),
    "as it is, norm, rotation, gate fused": (False, [fused_layers]),
    "bfloat16 parameters with float32 masters": (True, []),
}
"""Whether parameters are bfloat16, with float32 masters and no autocast; and what else is exchanged."""


@contextmanager
def applied(changes: Sequence[Change], card: Card) -> Iterator[None]:
    """Exchange the parts."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change(card))
        yield
