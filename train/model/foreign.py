"""Code that we did not write: where a model of transformers has its decoder, how it makes logits, and what it raises.

No list of families: the model's own forward pass is run with its decoder replaced. Not here: whether our log-probs are its own
(`logps.check_output_layer`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from weights_store.errors import InputError
from weights_store.messages import first_line

FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's code raises on inputs, or on a device, that it was not written for; all but bugs of Python itself."""

_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

Head = Callable[[Tensor], Tensor]


def unwrap_adapters(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers, without peft's wrapper if it has one."""
    unwrap: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """Return the part that maps ids to hidden states, the one that the model's own forward pass calls.

    Usually `base_model`; without adapters of peft.
    """
    causal_lm = unwrap_adapters(model)
    decoder = causal_lm.base_model
    if decoder is causal_lm:  # its prefix names a part of another class: Llama 4, Mllama
        decoder = getattr(causal_lm, "model", causal_lm)
    children = list(decoder.children())
    if len(children) == 1 and isinstance(children[0], PreTrainedModel):  # BART and others call what is inside
        decoder = children[0]
    return decoder


def output_layer(model: nn.Module) -> Head:
    """Return the map from hidden states `[n, H]` to logits `[n, V]`.

    It is the model's own forward pass with a decoder that returns the hidden states. So whatever a family does after its
    decoder is done here too: a head of several layers, scaling, soft-capping.
    """
    causal_lm, decoder = unwrap_adapters(model), decoder_of(model)
    own_forward = type(causal_lm).forward  # that of the instance may be ours, see `logps.route_forward`

    def head(hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # nothing but the decoder reads them
        with _replaying(decoder, hidden[None]):
            # not [0]: the gradient of a view needs no copy
            return own_forward(causal_lm, input_ids=ids, use_cache=False).logits.flatten(0, 1)

    return head


class Replayed(BaseModelOutput):
    """What a replaced decoder returns; anything but hidden states (caches, losses of routers) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaying(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Make `decoder` return `hidden`, whatever it is called with."""
    ordinary = vars(decoder).get("forward")  # accelerate and peft may have set one
    vars(decoder)["forward"] = lambda *_args, **_options: Replayed(last_hidden_state=hidden)
    try:
        yield
    finally:
        del vars(decoder)["forward"]
        if ordinary is not None:
            vars(decoder)["forward"] = ordinary


@contextmanager
def explain(model: nn.Module, problem: str, remedy: str) -> Iterator[None]:
    """Turn errors of the model's code into one that names its class, `problem` and `remedy`.

    Raises:
        InputError: The code inside raised one of FOREIGN_ERRORS; errors of ours and about memory pass.
    """
    try:
        yield
    except FOREIGN_ERRORS as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        name = type(unwrap_adapters(model)).__name__
        raise InputError(f"{name} {problem}: {type(error).__name__}: {first_line(error)}; {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether PyTorch ran out of memory; on CPUs it raises a RuntimeError like any other."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
