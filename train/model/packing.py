"""Can this model compute packed pairs? Asked once, when it is loaded; where it cannot, two padded sequences per pair do."""

from typing import Any

import numpy as np
import torch
from torch import nn

from train.data.dataset import Pair, StoredResponse
from train.model.attention import PACKED
from train.model.collate import PairCollator, model_inputs
from train.model.logps import per_token_logps

_PROBE_LENGTHS = ((9, 5, 7), (4, 1, 3))  # prompt, chosen, rejected
_PROBE_TOLERANCE = 1e-3  # nats, float32
_LAYERS = {"full_attention", "sliding_attention"}


def enable_packing(model: nn.Module) -> str | None:
    """Switch `model` to packed attention, after trying it; return the reason where it cannot, and leave it as it is.

    Some families say that they cannot. The others are tried on a few ids: packed and padded log-probs must agree.
    """
    causal_model: Any = model
    reason = _known_obstacle(causal_model)
    if reason is not None:
        return reason
    pairs = _probe_pairs(int(causal_model.config.get_text_config().vocab_size))
    ordinary = causal_model.config._attn_implementation
    expected = _probe(model, pairs, packed=False)
    causal_model.set_attn_implementation(PACKED)
    try:
        difference = (_probe(model, pairs, packed=True) - expected).abs().max().item()
        reason = f"packed log-probs differ from those of separate sequences by {difference:.3g} nats"
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what foreign code may say
        difference, reason = float("nan"), f"its decoder does not run packed: {str(error).splitlines()[0]}"
    if difference <= _PROBE_TOLERANCE:
        return None
    causal_model.set_attn_implementation(ordinary)
    return reason


def _known_obstacle(model: Any) -> str | None:
    name = type(model).__name__
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or []) - _LAYERS
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token"
    if other_layers:
        return f"{name} has layers of type {', '.join(sorted(other_layers))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of {name} cannot be replaced"
    return None


@torch.no_grad()
def _probe(model: nn.Module, pairs: list[Pair], *, packed: bool) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in PairCollator(packed=packed)(pairs).items()}
    return per_token_logps(model, **model_inputs(batch)).logps


def _probe_pairs(vocab_size: int) -> list[Pair]:
    ids = np.random.default_rng(0).integers(0, vocab_size, sum(map(sum, _PROBE_LENGTHS)), np.int32)
    pairs = []
    for lengths in _PROBE_LENGTHS:
        prompt, chosen, rejected, ids = np.split(ids, np.cumsum(lengths))
        responses = [StoredResponse(part, *(np.zeros(len(part), np.float32),) * 2) for part in (chosen, rejected)]
        pairs.append(Pair("probe", prompt, responses[0], responses[1]))
    return pairs
