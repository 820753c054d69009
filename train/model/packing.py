"""Which layout can this model compute? Packed pairs if a few ids say so, else two padded sequences per pair.

`enable_packing` compares exactly, in float32, when a model is loaded. `confirm_layout` runs forward and backward where the
model will run: on its device, in its dtype and mode. Not here: whether padded sequences are right, which has no alternative
(`logps.check_output_layer`).
"""

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from train.data.dataset import Pair, StoredResponse
from train.model.attention.packed import PACKED
from train.model.attribution import AttributionTarget, attribute_tokens, embedding_norms, leaf_embeddings
from train.model.collate import PairCollator, model_inputs
from train.model.foreign import FOREIGN_ERRORS, decoder_of, explain, unwrap_adapters
from train.model.logps import per_token_logps
from weights_store.messages import first_line

_PROBE_LENGTHS = ((9, 5, 7), (4, 2, 3))  # prompt, chosen, rejected
_SHORT_WINDOW = 3
_ATTENTIONS = {"full_attention", "sliding_attention"}
_WINDOW_NAMES = re.compile("window|chunk|local_attention")
_TARGETS: tuple[AttributionTarget, ...] = ("max_logit", "gold_logps")
_EXACT = {"nats": 1e-3, "share": 1e-2}
"""In float32: largest difference of a log-prob, and of a gradient as a share of the largest one."""
_ROUNDED = {"nats": 0.1, "share": 0.2}
"""In half precision: the same of means. Twice what two bfloat16 runs of a real model differ; wrong attention gives far more."""


def enable_packing(model: PreTrainedModel, *, attributions: bool = False, rounds: bool = False) -> str | None:
    """Switch `model` to packed attention if that changes nothing on a few ids; else return the reason, and leave it as it is.

    Args:
        model: In float32, where rounding cannot hide errors, unless it is quantised.
        attributions: Compare attributions too, whose packed way is another one (`continuation.py`).
        rounds: The model is quantised and computes in half precision, so allow for rounding.

    Raises:
        InputError: Attributions cannot be computed at all.
    """
    if (reason := _known_obstacle(model)) is not None:
        return reason
    plain = _measure(model, packed=False, attributions=attributions)
    with _short_windows(model):
        try:
            expected = _measure(model, packed=False, attributions=attributions)
        except FOREIGN_ERRORS as error:
            return f"its sliding window cannot be shortened for a test: {first_line(error)}"
        if "sliding_attention" in _layer_types(model) and expected[0].equal(plain[0]):
            return "its sliding window cannot be shortened for a test"
        ordinary = model.config._attn_implementation
        model.set_attn_implementation(PACKED)
        reason = _compare_packed(model, expected, _ROUNDED if rounds else _EXACT, attributions=attributions)
    if reason is not None:
        model.set_attn_implementation(ordinary)
    return reason


def confirm_layout(
    model: nn.Module, ordinary: str, not_packed: str | None, *, attributions: bool = False
) -> str | None:
    """Run a few ids forward and backward as the model will run; return why it is not packed, `not_packed` or a new reason.

    Kernels and dtypes of the device may fail where those of `enable_packing` did not. Then the model gets its ordinary
    attention back.

    Args:
        model: On its device and in the mode that it will run in; the caller has switched autocast on.
        ordinary: The attention implementation of its own forward pass.
        not_packed: What `enable_packing` returned.
        attributions: Attributions will be computed too.

    Raises:
        InputError: Padded sequences fail.
    """
    causal_lm = unwrap_adapters(model)
    causal_lm.set_attn_implementation(ordinary)
    expected = _measure(model, packed=False, gradients=True, attributions=attributions)
    if not_packed is not None:
        return not_packed
    causal_lm.set_attn_implementation(PACKED)
    reason = _compare_packed(model, expected, _ROUNDED, gradients=True, attributions=attributions)
    if reason is not None:
        causal_lm.set_attn_implementation(ordinary)
    return reason


def _known_obstacle(model: PreTrainedModel) -> str | None:
    name, layers = type(model).__name__, _layer_types(model)
    other_layers = layers - _ATTENTIONS
    if getattr(model, "_is_stateful", False) and (other_layers or not layers):
        return f"{name} carries a state from token to token"
    if other_layers:
        return f"{name} has layers of type {', '.join(sorted(other_layers))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of {name} cannot be replaced"
    return None


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or [])


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten windows and chunks of attention, so that a few ids reach beyond them; real ones are thousands of tokens long.

    Configs and modules say how long they are; masks and attention are computed from that in every forward pass.
    """
    modules = list(decoder_of(model).modules())
    configs = [model.config.get_text_config(), *(getattr(module, "config", None) for module in modules)]
    known = [owner for owner in (*configs, *modules) if isinstance(owner, PreTrainedConfig | nn.Module)]
    owners: dict[int, MutableMapping[str, Any]] = {id(owner): vars(owner) for owner in known}
    long = [
        (values, name, value)
        for values in owners.values()
        for name, value in values.items()
        if _WINDOW_NAMES.search(name) and _shorten(value) != value
    ]
    for values, name, value in long:
        values[name] = _shorten(value)
    try:
        yield
    finally:
        for values, name, value in long:
            values[name] = value


def _shorten(value: Any) -> Any:
    """Return a length, or a list with one per layer, at most as long as `_SHORT_WINDOW`; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(_shorten, value))
    return min(value, _SHORT_WINDOW) if type(value) is int else value


def _compare_packed(model: nn.Module, expected: list[Tensor], limits: dict[str, float], **what: bool) -> str | None:
    """Return how packed pairs differ from `expected`, see `_measure`; None if they do not."""
    exact = limits is _EXACT
    try:
        got = _measure(model, packed=True, **what)
    except FOREIGN_ERRORS as error:  # also those of compilers and kernels
        return f"its decoder does not run packed: {first_line(error)}"
    for index, (packed, separate) in enumerate(zip(got, expected, strict=True)):
        gaps, sizes = (packed - separate).abs(), separate.abs()
        difference = gaps.max() if exact else gaps.mean()
        if index == 0 and not difference <= limits["nats"]:
            return f"packed log-probs differ from those of separate sequences by {difference:.3g} nats"
        if index > 0 and not difference <= limits["share"] * (sizes.max() if exact else sizes.mean()):
            return f"packed gradients differ from those of separate sequences by {difference / sizes.max():.2g} of the largest"
    return None


def _measure(model: nn.Module, *, packed: bool, gradients: bool = False, attributions: bool = False) -> list[Tensor]:
    """Return what a few ids give, at response tokens, `[n]` each: log-probs in nats; gradients of their sum; attributions.

    Raises:
        InputError: The model cannot compute it, if it is not packed.
    """
    device = next(model.parameters()).device
    batch = PairCollator(packed=packed, share_beginnings=False)(_probe_pairs(model), device)
    mask, places = batch["completion_mask"], batch["places"]
    # Errors of packed runs are reasons not to pack.
    guard = nullcontext() if packed else explain(model, "does not run on a few ids", "use another model")
    with guard, torch.set_grad_enabled(gradients):
        if gradients:
            with leaf_embeddings(model) as leaves:
                logps = per_token_logps(model, **model_inputs(batch)).logps
                found = [logps.detach()[mask], embedding_norms(model, logps.sum(), leaves)[places][mask]]
        else:
            found = [per_token_logps(model, **model_inputs(batch)).logps[mask]]
    if attributions:
        guard = nullcontext() if packed else explain(model, "cannot be attributed", "use another model or estimator")
        with guard:
            found += [attribute_tokens(model, batch, target).attributions[mask] for target in _TARGETS]
    return [values.float() for values in found]


def _probe_pairs(model: nn.Module) -> list[Pair]:
    vocab_size = unwrap_adapters(model).config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, sum(map(sum, _PROBE_LENGTHS)), np.int32)
    pairs = []
    for lengths in _PROBE_LENGTHS:
        prompt, chosen, rejected, ids = np.split(ids, np.cumsum(lengths))
        responses = [StoredResponse(part, *(np.zeros(len(part), np.float32),) * 2) for part in (chosen, rejected)]
        pairs.append(Pair("probe", prompt, responses[0], responses[1]))
    return pairs
