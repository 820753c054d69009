"""Per-token log-probabilities of responses. The next-token shift happens here and nowhere else.

The decoder runs over whole sequences, the output layer only on the positions that predict a response token, in chunks that
the backward pass computes again. So the largest tensor over the vocabulary is one chunk, never `[B, T, V]`.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weights_store.errors import InputError

CHUNK_LOGITS = 1 << 25
"""Logits that exist at a time, 128 MiB in float32."""
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-3  # nats, float32


def per_token_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    completion_mask: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Return log pi(token t | tokens < t), `[B, T]` float32 nats; 0 where `completion_mask` is False.

    Args:
        model: A causal language model of transformers.
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 1 on tokens, 0 on padding.
        position_ids: `[B, T]`.
        completion_mask: `[B, T]` bool, True on response tokens; False in the first column (nothing predicts it).
        chunk_logits: Logits computed at a time.
    """
    assert not completion_mask[:, 0].any(), "the first token of a sequence cannot be scored"
    decoder: Any = model.base_model
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    row_idx, token_idx = completion_mask.nonzero(as_tuple=True)
    hidden = output.last_hidden_state[row_idx, token_idx - 1]  # the state before token t predicts token t
    flat_logps = _chunked_logps(model, hidden, input_ids[row_idx, token_idx], chunk_logits)
    logps = flat_logps.new_zeros(input_ids.shape)
    return logps.index_put((row_idx, token_idx), flat_logps)


def _chunked_logps(model: nn.Module, hidden: Tensor, target_ids: Tensor, chunk_logits: int) -> Tensor:
    """Return log-probs of `target_ids` `[N]` under `hidden` `[N, H]`, `[N]` float32."""
    head = _output_layer(model)
    rows = max(1, chunk_logits // _vocab_size(model))
    chunks = zip(hidden.split(rows), target_ids.split(rows), strict=True)
    return torch.cat(
        [checkpoint(_head_logps, head, h, ids, use_reentrant=False, preserve_rng_state=False) for h, ids in chunks]
    )


def _head_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, target_ids: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, target_ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _output_layer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from hidden states to logits, with what some families do to logits afterwards."""
    config: Any = model.config
    text_config = config.get_text_config()
    lm_head: Any = model.get_output_embeddings()  # type: ignore[operator]
    multiplier = getattr(text_config, "logit_scale", None)  # Cohere
    divisor = getattr(text_config, "logits_scaling", None)  # Granite
    cap = getattr(text_config, "final_logit_softcapping", None)  # Gemma

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = lm_head(hidden)
        if multiplier is not None:
            logits = logits * multiplier
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def _vocab_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


@torch.no_grad()
def check_output_layer(model: nn.Module) -> None:
    """Compare our output layer with the model's own forward pass on a few ids.

    Raises:
        InputError: They differ, so this family does something to its logits that `logps.py` does not know.
    """
    decoder: Any = getattr(model, "base_model", None)
    if decoder is None or decoder is model or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise InputError(f"{type(model).__name__} is no causal language model with a decoder and an output layer")
    vocab_size = _vocab_size(model)
    device = next(model.parameters()).device
    input_ids = (torch.arange(1, _PROBE_TOKENS + 1, device=device)[None] * 7) % vocab_size
    positions = torch.arange(_PROBE_TOKENS, device=device)[None]
    ones = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=ones, position_ids=positions).logits.float()
    expected = logits.log_softmax(-1)[0, :-1].gather(-1, input_ids[0, 1:, None]).squeeze(-1)
    got = per_token_logps(model, input_ids, ones, positions, positions > 0)[0, 1:]
    difference = (expected - got).abs().max().item()
    if not difference <= _PROBE_TOLERANCE:
        raise InputError(
            f"{type(model).__name__}: log-probs computed from its hidden states differ from its own forward pass by "
            f"{difference:.3g} nats, expected at most {_PROBE_TOLERANCE}; this family scales its logits in a way that "
            "train/logps.py does not know yet"
        )


def route_forward(model: nn.Module) -> None:
    """Make `model(...)` compute `per_token_logps`.

    DDP, FSDP and autocast hook into `forward`; calling the decoder and the output layer around them would train without
    gradient exchange. The class and what `save_pretrained` writes stay as they are.
    """
    model.forward = MethodType(per_token_logps, model)
