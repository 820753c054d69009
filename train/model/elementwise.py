"""What is between matrix products, in bfloat16: half of the bytes that autocast alone moves, in fewer kernels.

Under autocast alone, matrix products are in bfloat16 and everything between them is in float32: embeddings have the dtype of
parameters, and so have sums with them, and norms. Here embeddings leave in bfloat16 and norms return what they get, as in a
model whose parameters are bfloat16. Parameters, gradients and the optimizer stay float32. Not here: log-probs (`logps.py`),
which are float32 always.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from train.model.foreign import FOREIGN_ERRORS, decoder_of, is_out_of_memory
from train.model.recompute import cheap, recomputing
from weights_store.messages import first_line, logger

_log = logger(__name__)

_TOLERANCE = 1e-5


Kernels = Mapping[str, Callable[..., Any]]
"""By the name of a module, the function that takes the place of its forward pass."""


def enter_bfloat16(model: PreTrainedModel, *, fuse: bool = True, kernels: Kernels | None = None) -> Kernels:
    """Let the residual stream of a model be bfloat16 wherever autocast to bfloat16 is on; see `use_kernels` for the rest.

    A model that does not say which its input embeddings are stays as it is.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return {}
    if not isinstance(embeddings, nn.Module):
        return {}
    embeddings.register_forward_hook(_round)
    return use_kernels(model, fuse=fuse, kernels=kernels)


def use_kernels(model: PreTrainedModel, *, fuse: bool = True, kernels: Kernels | None = None) -> Kernels:
    """Let norms be torch's own, one kernel in each direction on a GPU; and with `fuse` the gates of MLPs too.

    With `fuse`, a GPU also keeps less for the backward pass: no outputs of norms and gates, and no weights in bfloat16
    (`recompute.py`). A model whose layers are compiled needs neither; its compiler decides that. Return what was used; give it
    as `kernels` for a copy of the model without weights, on which nothing can be tried.
    """
    if kernels is None:
        kernels = _find_kernels(model, fuse=fuse)
    for name, compute in kernels.items():
        module = model.get_submodule(name)
        module.forward = MethodType(compute, module)
    return kernels


def _find_kernels(model: PreTrainedModel, *, fuse: bool) -> Kernels:
    found: dict[str, Callable[..., Any]] = {}
    for name, module in model.named_modules():
        if is_rms_norm(module):
            found[name] = _norm_by_torch
        elif fuse and is_gated_mlp(module):
            found[name] = _run_gated
    if fuse:
        decoder = decoder_of(model)
        (prefix,) = (name for name, module in model.named_modules() if module is decoder)
        found[prefix] = _run_decoder
        inside = ((f"{prefix}.{name}".lstrip("."), module) for name, module in decoder.named_modules())
        found |= {name: _multiply for name, module in inside if type(module) is nn.Linear}
    return found


def _run_decoder(decoder: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Run the decoder's own forward pass."""
    on_gpu = any(parameter.is_cuda for parameter in decoder.parameters())
    with recomputing() if on_gpu and torch.is_grad_enabled() else nullcontext():
        return type(decoder).forward(decoder, *arguments, **options)


def _multiply(module: nn.Linear, hidden: Tensor) -> Tensor:
    """Do what a linear layer does. The weight is rounded here, since autocast would keep the rounded one until backward."""
    weight = module.weight
    if weight.is_cuda and weight.dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        weight = cheap(partial(Tensor.to, dtype=torch.get_autocast_dtype(hidden.device.type)), weight)
    return F.linear(hidden, weight, module.bias)


def _round(_embeddings: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output


def _norm_by_torch(module: nn.Module, hidden: Tensor) -> Tensor:
    """Torch's own RMS norm, one kernel on a GPU, in place of the lines of a family; in the dtype that comes in.

    On a CPU it has more parts than those lines. One function for all layers: `torch.compile` then sees the same code in each.
    """
    if not hidden.is_cuda:
        own: Tensor = type(module).forward(module, hidden)
        return own.to(hidden.dtype)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return cheap(partial(_rms_norm, epsilon=_epsilon_of(module)), hidden, weight)


def _rms_norm(hidden: Tensor, weight: Tensor, *, epsilon: float | None) -> Tensor:
    """Return torch's RMS norm in the dtype of `hidden`; on GPUs, autocast would have it compute and return float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), epsilon)


def _epsilon_of(module: nn.Module) -> float | None:
    """Return the number that keeps a norm from dividing by 0, by the two names that families give it."""
    found: object = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return found if isinstance(found, float) else None


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module computes torch's RMS norm, and not another one, such as Gemma's with weights around 0.

    A name proves nothing, so two rows are compared.
    """
    weight, epsilon = getattr(module, "weight", None), _epsilon_of(module)
    if "RMSNorm" not in type(module).__name__ or epsilon is None or not _takes_one_input(module):
        return False
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:  # a buffer may be there for show
        return False
    rows = torch.linspace(-1, 3, 2 * len(weight), device=weight.device).view(2, -1) * epsilon**0.5
    try:
        own = module(rows)
    except FOREIGN_ERRORS:
        return False
    expected = F.rms_norm(rows, weight.shape, weight.to(rows.dtype), epsilon)
    return own.dtype == rows.dtype and torch.allclose(own, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


# --- gates of MLPs -----------------------------------------------------------------------------------------------------


def _run_gated(module: Any, hidden: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    return module.down_proj(cheap(_Gated.apply, gate, up) if gate.is_cuda else gated(gate, up))


@torch.no_grad()
def is_gated_mlp(module: nn.Module) -> bool:
    """Return whether a module computes down(silu(gate(x)) * up(x)), by its parts' usual names and by two rows."""
    gate = getattr(module, "gate_proj", None)
    if not isinstance(gate, nn.Linear) or not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
        return False
    dtype = gate.weight.dtype if gate.weight.is_floating_point() else torch.float32  # 4-bit weights are bytes
    rows = torch.linspace(-1, 1, 2 * gate.in_features, device=gate.weight.device, dtype=dtype).view(1, 2, -1)
    try:
        return _takes_one_input(module) and torch.equal(module(rows), _run_gated(module, rows))
    except FOREIGN_ERRORS:
        return False


def _takes_one_input(module: nn.Module) -> bool:
    return len(signature(module.forward).parameters) == 1


class _Gated(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return compiled(gated)(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return compiled(gradients_of_gated)(gate, up, gradient)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def gradients_of_gated(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gated` with respect to both, in their dtype; in between float32 at least."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    share = torch.sigmoid(wide)
    of_gate = gradient * up * share * (1 + wide * (1 - share))
    return of_gate.to(gate.dtype), (gradient * wide * share).to(up.dtype)


@cache
def compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return an elementwise function over tensors of any number of rows, as few kernels.

    Where nothing can be compiled, for want of a C compiler for example, it stays what it is.
    """
    fast: Callable[..., Any] | None = torch.compile(compute, dynamic=True)

    def call(*tensors: Tensor) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*tensors)
            except FOREIGN_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                fast = None
                _log.info(f"{compute.__name__} cannot be compiled, and is slower now: {first_line(error)}")
        return compute(*tensors)

    return call
