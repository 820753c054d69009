"""Changes to a training step that `python -m benchmarks.roofline --changes` predicts one by one.

Some take back what the code has got, to say what it is worth. Others are stand-ins for what it has not: they count what such a
step would do, and are no implementation of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from benchmarks.roofline.card import Card, Fused
from benchmarks.taken_back import TAKEN_BACK, Exchange, exchanged


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


@dataclass(frozen=True)
class Change:
    """A step to predict.

    Args:
        exchanges: Parts of the code that are exchanged.
        is_fused: Norms, rotation and gates are one kernel each.
        is_bfloat16: Parameters are bfloat16, with float32 masters and no autocast.
    """

    exchanges: Sequence[Exchange] = ()
    is_fused: bool = False
    is_bfloat16: bool = False


CHANGES: dict[str, Change] = {
    "as it is": Change(),
    **{f"with {name}": Change(exchanges) for name, exchanges in TAKEN_BACK.items()},
    "with all of that: as it was": Change(list(chain(*TAKEN_BACK.values()))),
    "as it is, norm, rotation, gate fused": Change(is_fused=True),
    "bfloat16 parameters with float32 masters": Change(is_bfloat16=True),
}


@contextmanager
def applied(change: Change, card: Card) -> Iterator[None]:
    """Exchange the parts. What is no longer compiled must not be counted as one kernel either."""
    is_compiled = not any(exchange.name == "compiled" for exchange in change.exchanges)
    plain = nullcontext() if is_compiled else mock.patch.object(Card, "compiled", lambda _card, compute: compute)
    with exchanged(change.exchanges), plain, fused_layers(card) if change.is_fused else nullcontext():
        yield
