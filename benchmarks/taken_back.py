"""What made a training step fast on GPUs, each as the change that takes it back: predicted by `roofline`, measured by `gpu`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

from torch import nn

import train.model.attention.packed
import train.model.elementwise
import train.model.logps
import train.model.policy


class Exchange(NamedTuple):
    """Something else in the place of a name of a module."""

    module: Any
    name: str
    value: object


def _plain(compute: Callable[..., Any]) -> Callable[..., Any]:
    return compute


def _own_mlp(mlp: nn.Module, hidden: object) -> Any:
    return type(mlp).forward(mlp, hidden)


TAKEN_BACK: dict[str, list[Exchange]] = {
    "autocast alone": [Exchange(train.model.policy, "enter_bfloat16", lambda *_, **__: None)],
    "flex attention": [Exchange(train.model.attention.packed, "way_of", lambda *_: "blocks")],
    "an output layer of 256 rows at a time": [Exchange(train.model.logps, "CHUNK_LOGITS", 1 << 25)],
    "logits computed again": [Exchange(train.model.logps, "KEPT_LOGITS", dict.fromkeys(("cpu", "cuda"), 1 << 26))],
    "log-softmax and gates not compiled": [
        Exchange(train.model.logps, "compiled", _plain),
        Exchange(train.model.elementwise, "compiled", _plain),
    ],
    "norms, gates and rounded weights kept": [Exchange(train.model.elementwise, "recomputing", nullcontext)],
    "gates as single operations": [Exchange(train.model.elementwise, "_run_gated", _own_mlp)],
}
"""By what a step has without it."""


@contextmanager
def exchanged(exchanges: Sequence[Exchange]) -> Iterator[None]:
    """Put them in place."""
    with ExitStack() as stack:
        for exchange in exchanges:
            stack.enter_context(mock.patch.object(*exchange))
        yield
