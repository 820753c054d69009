"""What is between matrix products, in bfloat16: half of the bytes that autocast alone moves, in fewer kernels.

Under autocast alone, matrix products are in bfloat16 and everything between them is in float32: embeddings have the dtype of
parameters, and so have sums with them, and norms. Here embeddings leave in bfloat16 and norms return what they get, as in a
model whose parameters are bfloat16. Parameters, gradients and the optimizer stay float32. Not here: log-probs (`logps.py`),
which are float32 always.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_TOLERANCE = 1e-5


def enter_bfloat16(model: PreTrainedModel) -> None:
    """Let the residual stream of a model be bfloat16 wherever autocast to bfloat16 is on.

    A model that does not say which its input embeddings are stays as it is.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if not isinstance(embeddings, nn.Module):
        return
    embeddings.register_forward_hook(_round)
    for module in model.modules():
        if is_rms_norm(module):
            module.forward = MethodType(_norm_by_torch, module)


def _round(_embeddings: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16) if torch.is_autocast_enabled(output.device.type) else output


def _norm_by_torch(module: nn.Module, hidden: Tensor) -> Tensor:
    """Torch's own RMS norm, one kernel on a GPU, in place of the lines of a family; in the dtype that comes in.

    One function for all layers, so that `torch.compile` sees the same code in each.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    return F.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), _epsilon_of(module))


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
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1 or epsilon is None:
        return False
    rows = torch.linspace(-1, 3, 2 * len(weight), device=weight.device).view(2, -1) * epsilon**0.5
    try:
        own = module(rows)
    except (RuntimeError, TypeError):  # it takes something else, too
        return False
    expected = F.rms_norm(rows, weight.shape, weight.to(rows.dtype), epsilon)
    return own.dtype == rows.dtype and torch.allclose(own, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
