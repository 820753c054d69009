"""Can this model compute packed pairs? Tested once, when it is loaded; otherwise each pair is two padded sequences."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from train.data.dataset import Pair, StoredResponse
from train.model.attention import PACKED
from train.model.collate import PairCollator, model_inputs
from train.model.logps import per_token_logps
from weights_store.messages import first_line

_PROBE_LENGTHS = ((9, 5, 7), (4, 1, 3))  # prompt, chosen, rejected
_PROBE_TOLERANCE = 1e-3  # nats, float32
_LAYERS = {"full_attention", "sliding_attention"}


def enable_packing(model: PreTrainedModel) -> str | None:
    """Switch `model` to packed attention if that gives the same log-probs on a few ids; else return the reason."""
    reason = _known_obstacle(model)
    if reason is not None:
        return reason
    ids = np.random.default_rng(0).integers(
        0, model.config.get_text_config().vocab_size, sum(map(sum, _PROBE_LENGTHS)), np.int32
    )
    pairs = []
    for lengths in _PROBE_LENGTHS:
        prompt, chosen, rejected, ids = np.split(ids, np.cumsum(lengths))
        responses = [StoredResponse(part, *(np.zeros(len(part), np.float32),) * 2) for part in (chosen, rejected)]
        pairs.append(Pair("probe", prompt, responses[0], responses[1]))
    ordinary = model.config._attn_implementation
    expected = _probe(model, pairs, packed=False)
    model.set_attn_implementation(PACKED)
    try:
        difference = (_probe(model, pairs, packed=True) - expected).abs().max().item()
        reason = f"packed log-probs differ from those of separate sequences by {difference:.3g} nats"
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever foreign code raises
        difference, reason = float("nan"), f"its decoder does not run packed: {first_line(error)}"
    if difference <= _PROBE_TOLERANCE:
        return None
    model.set_attn_implementation(ordinary)
    return reason


def _known_obstacle(model: PreTrainedModel) -> str | None:
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
    return per_token_logps(model, **model_inputs(PairCollator(packed=packed)(pairs, device))).logps
