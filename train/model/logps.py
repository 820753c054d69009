"""Per-token log-probabilities of responses. The next-token shift happens here and nowhere else.

The decoder runs over a whole micro-batch, the output layer only on positions that predict a response token, in chunks. If there
are many of them, each chunk is computed again in the backward pass. So there is never a tensor `[B, T, V]`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from train.loss.divergence import at_least_float32, exact_kl, top_k_kl
from train.loss.needs import KlDirection
from train.model.attention.layout import Layout
from train.model.attention.packed import Packing
from train.model.elementwise import compiled
from train.model.foreign import Head, decoder_of, explain, output_layer, unwrap_adapters
from weights_store.errors import InputError

CHUNK_LOGITS = 1 << 29
"""Logits that are computed at a time on a GPU, 1 GiB in bfloat16: each chunk has a gradient of the whole output layer."""
CHUNK_ROWS = 256
"""Rows of logits that are computed at a time, at least; on CPUs not more, since larger chunks do not fit into the cache."""
KEPT_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 30}
"""So many logits of a micro-batch are kept for the backward pass at most, by device; else all are computed again. On a GPU that
is 2 GiB in bfloat16, at the time when a chunk that is computed again would be there too."""
WIDE_LOGITS = 1 << 25
"""The same of whole distributions in float32, 128 MiB."""
_PROBE_LENGTHS = (8, 5)
_PROBE_TOLERANCE = 1e-3  # nats, float32
_ROUNDED_TOLERANCE = 0.1  # nats, half precision
_CAUSES = (
    "this family gives something else than its last hidden states to its output layer; use another model",
    "only where padding follows, so its tokens see what comes after them. It must predict from left to right: if it is an "
    "encoder, set is_decoder=true in its config.json",
)
"""Of a difference in a sequence without padding, and in one with it."""


class ModelInputs(TypedDict):
    """The tensors of a micro-batch that `per_token_logps` takes, as `collate.py` lays them out."""

    input_ids: Tensor
    """Packed pairs `[1, N]`, or sequences `[2 B, T]` with padding at their end."""
    places: Tensor
    """`[2 B, T]`, where each token of each sequence is in the flattened `input_ids`."""
    scored: Tensor
    """`[n]`, which entries of the flattened `places` are response tokens; none in its first column, which nothing predicts."""
    layout: NotRequired[Layout]
    """Of packed pairs."""
    position_ids: NotRequired[Tensor]
    """`[1, N]`, of packed pairs."""
    ref_top_ids: NotRequired[Tensor]
    """`[2 B, T, K]`, for a divergence from stored log-probs; `ref_top_logps` likewise."""
    ref_top_logps: NotRequired[Tensor]
    num_kls: NotRequired[int]
    """How many of `scored` have a divergence, which come first; without it, all have one."""


class TokenTerms(NamedTuple):
    """Per-token results for 2 B sequences (chosen first, then rejected, then anchors), `[2 B, T]` float32 nats; 0 outside
    responses."""

    logps: Tensor
    """log pi(token t | tokens < t)."""
    kls: Tensor | None = None
    """KL divergence of the two next-token distributions at token t, if a loss needs it."""


@dataclass(frozen=True)
class Divergence:
    """Which KL divergence is computed besides the log-probs.

    Args:
        direction: KL(pi‖ref) or KL(ref‖pi).
        top_k: Use the stored log-probs of the reference's k most likely tokens instead of running the reference.
        reference: The frozen reference model; None for the policy with its adapters off.
    """

    direction: KlDirection
    top_k: bool = False
    reference: nn.Module | None = None


def per_token_logps(
    model: nn.Module,
    *,
    divergence: Divergence | None = None,
    chunk_logits: int | None = None,
    kept_logits: int | None = None,
    **batch: Unpack[ModelInputs],
) -> TokenTerms:
    """Return the log-probs of all response tokens.

    Args:
        model: A causal language model of transformers, or peft's wrapper of one.
        divergence: What to compute besides the log-probs.
        chunk_logits: Logits computed at a time; None for a default that suits the device.
        kept_logits: With more logits, they are computed again in the backward pass; None for a default likewise.
        **batch: See `ModelInputs`.
    """
    places, scored = batch["places"].flatten(), batch["scored"]
    previous = places[scored - 1]  # the state at the token before predicts a token
    target_ids = batch["input_ids"].flatten()[places[scored]]
    head, extra = output_layer(model), []
    compute: Callable[..., tuple[Tensor, ...]] = partial(_logps_alone, head)
    if divergence is not None and divergence.top_k:
        extra = [values.flatten(0, 1)[scored] for values in (batch["ref_top_ids"], batch["ref_top_logps"])]
        compute = partial(_logps_and_top_k_kl, head, divergence.direction)
    elif divergence is not None:
        reference = model if divergence.reference is None else divergence.reference
        reference_head, reference_hidden = _run_reference(reference, batch)
        extra = [reference_hidden[previous]]
        compute = partial(_logps_and_exact_kl, head, reference_head, divergence.direction)
    columns = [decode(model, batch)[previous], target_ids]
    vocab_size = _vocab_size(model)
    if chunk_logits is None:
        # Rows of full distributions, of which several are in float32 at a time, cost more than rows of logits.
        on_gpu = CHUNK_LOGITS if divergence is None else WIDE_LOGITS // 4
        chunk_logits = max(on_gpu if scored.is_cuda else 0, CHUNK_ROWS * vocab_size // (1 if divergence is None else 4))
    rows = max(1, chunk_logits // vocab_size)
    if kept_logits is None:
        kept_logits = KEPT_LOGITS["cuda" if scored.is_cuda else "cpu"]
    if isinstance(unwrap_adapters(model), FSDPModule):
        # The output layer is gathered and reduced in every call. Processes with another number of calls would wait for ever.
        rows, kept_logits = max(1, len(target_ids)), len(target_ids) * vocab_size
    again = len(target_ids) * vocab_size > kept_logits or divergence is not None
    num_kls = len(target_ids) if divergence is None else batch.get("num_kls", len(target_ids))
    chunks = _run(compute, [column[:num_kls] for column in (*columns, *extra)], rows, again=again)
    if num_kls < len(target_ids):
        chunks += _run(partial(_logps_alone, head), [column[num_kls:] for column in columns], rows, again=again)
    terms = [torch.cat([chunk[i] for chunk in chunks if i < len(chunk)]) for i in range(len(chunks[0]))]
    return TokenTerms(*(_scatter(values, scored, batch["places"].shape) for values in terms))


def _run(
    compute: Callable[..., tuple[Tensor, ...]], columns: list[Tensor], rows: int, *, again: bool
) -> list[tuple[Tensor, ...]]:
    if again:  # computes each chunk again in the backward pass, and keeps none
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [compute(*chunk) for chunk in zip(*(column.split(rows) for column in columns), strict=True)]


def _scatter(values: Tensor, scored: Tensor, shape: torch.Size) -> Tensor:
    """Put `values`, which may end before the last response token, into their places, 0 elsewhere."""
    first = scored[: len(values)]
    return values.new_zeros(shape).index_put((first // shape[1], first % shape[1]), values)


def decode(model: nn.Module, batch: ModelInputs) -> Tensor:
    """Return the last hidden states of all tokens, `[N, H]` (or `[2 B T, H]`).

    Padded sequences need neither mask nor positions: nothing in a causal model sees what comes after it. `check_output_layer`
    tests that. Masks do not hold everywhere: some families select keys, or count tokens, regardless of them.
    """
    context: dict[str, Tensor | Packing] = {}
    if "layout" in batch:
        packing = Packing(batch["layout"], batch["input_ids"].device)
        context = {"position_ids": batch["position_ids"], "packing": packing}
    output = decoder_of(model)(input_ids=batch["input_ids"], use_cache=False, **context)
    return output.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def _run_reference(reference: nn.Module, batch: ModelInputs) -> tuple[Head, Tensor]:
    """Return the reference's output layer and its hidden states, without adapters if it is the policy."""
    head = output_layer(reference)

    def head_without_adapters(hidden: Tensor) -> Tensor:
        with adapters_off(reference):
            return head(hidden)

    with adapters_off(reference):
        return head_without_adapters, decode(reference, batch)


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Switch the adapters of peft's wrapper off; do nothing for another model."""
    disable: Callable[[], AbstractContextManager[None]] = getattr(model, "disable_adapter", nullcontext)
    return disable()


# --- from a chunk of rows (hidden states [n, H], ids [n], …) to values [n] -----------------------------------------------


def _logps_alone(head: Head, hidden: Tensor, target_ids: Tensor) -> tuple[Tensor]:
    return (_SelectedLogps.apply(head(hidden), target_ids),)


def _logps_and_top_k_kl(
    head: Head, direction: KlDirection, hidden: Tensor, target_ids: Tensor, top_ids: Tensor, top_logps: Tensor
) -> tuple[Tensor, Tensor]:
    logps = at_least_float32(head(hidden)).log_softmax(-1)
    return _select(logps, target_ids), top_k_kl(logps.gather(-1, top_ids), top_logps, direction)


def _logps_and_exact_kl(
    head: Head,
    reference_head: Head,
    direction: KlDirection,
    hidden: Tensor,
    target_ids: Tensor,
    reference_hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    logits = at_least_float32(head(hidden))
    with torch.no_grad():
        reference_logits = at_least_float32(reference_head(reference_hidden))
    return _select(logits.log_softmax(-1), target_ids), exact_kl(logits, reference_logits, direction)


def _select(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[:, None]).squeeze(-1)


class _SelectedLogps(torch.autograd.Function):
    """log softmax(logits)[ids], `[n, V]` and `[n]` to `[n]` float32.

    d logp / d logits = onehot(id) - softmax(logits); autograd would allocate half a dozen tensors over the vocabulary. On a GPU
    both directions are compiled: they read logits once, and nothing over the vocabulary is in float32. The gradient is written
    over the logits, so autograd refuses a second backward pass, and a head that needs its logits for its own gradient. Where
    logits are computed again it would not notice such a head; `packing.confirm_layout` runs few enough ids to keep them.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        compute = compiled(selected_logps) if logits.is_cuda else selected_logps
        logps, log_sums = compute(logits, ids)
        ctx.save_for_backward(logits, ids, log_sums)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, ids, log_sums = ctx.saved_tensors
        if logits.is_cuda:
            return compiled(gradient_of_logits)(logits, ids, log_sums, gradient), None
        in_place = {"out": logits} if logits.dtype == log_sums.dtype else {}
        wide = torch.sub(logits, log_sums[:, None], **in_place).exp_().mul_(-gradient[:, None])
        wide.scatter_add_(1, ids[:, None], gradient[:, None])
        return wide.to(logits.dtype), None


def selected_logps(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits)[ids] and log sum exp(logits), `[n, V]` and `[n]` to `[n]` each, float32 (or float64)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = _select(logits.log_softmax(-1, dtype=wide), ids)  # on CPUs, logsumexp takes twice the memory and time
    return logps, _select(logits, ids).to(wide) - logps


def gradient_of_logits(logits: Tensor, ids: Tensor, log_sums: Tensor, gradient: Tensor) -> Tensor:
    """Write the gradient of `selected_logps` over `logits`, `[n, V]`, and return it; so put that a compiler makes one loop."""
    is_target = torch.arange(logits.shape[1], device=logits.device) == ids[:, None]
    return logits.copy_(gradient[:, None] * (is_target.to(gradient.dtype) - (logits - log_sums[:, None]).exp()))


def _vocab_size(model: nn.Module) -> int:
    return int(unwrap_adapters(model).config.get_text_config().vocab_size)


@torch.no_grad()
def check_output_layer(model: nn.Module, *, rounds: bool = False) -> None:
    """Compare our log-probs of two padded sequences of a few ids with those of the model's own forward pass on each alone.

    With `rounds`, for quantised models, which compute in half precision, a larger difference passes.

    Raises:
        InputError: They differ: this family gives something else than its last hidden states to its output layer, or tokens
            see what comes after them. Or its code fails, or changes the weights.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is None or decoder_of(model) is model:
        raise InputError(f"{type(model).__name__} is not a causal language model with a decoder and an output layer")
    device = next(model.parameters()).device
    places = torch.arange(len(_PROBE_LENGTHS) * max(_PROBE_LENGTHS), device=device).view(len(_PROBE_LENGTHS), -1)
    input_ids = (places + 1) * 7 % _vocab_size(model)
    lengths = torch.tensor(_PROBE_LENGTHS, device=device)
    steps = torch.arange(places.shape[1], device=device)
    scored = ((steps > 0) & (steps < lengths[:, None])).flatten().nonzero().flatten()
    versions = [parameter._version for parameter in model.parameters()]
    with explain(model, "does not run on a few ids", "use another model"):
        got = per_token_logps(model, input_ids=input_ids, places=places, scored=scored).logps
        differences = [
            (_own_logps(model, row[:length]) - logps[1:length]).abs().max().item()
            for row, logps, length in zip(input_ids, got, _PROBE_LENGTHS, strict=True)
        ]
    if [parameter._version for parameter in model.parameters()] != versions:
        raise InputError(
            f"{type(model).__name__} changes its own weights in a forward pass, so that another model would be saved; switch "
            "that off in its config.json (RWKV: rescale_every=0)"
        )
    tolerance = _ROUNDED_TOLERANCE if rounds else _PROBE_TOLERANCE
    for difference, cause in zip(differences, _CAUSES, strict=True):
        if not difference <= tolerance:
            raise InputError(
                f"{type(model).__name__}: log-probs computed from its hidden states differ from its own forward pass by "
                f"{difference:.3g} nats, expected at most {tolerance}; {cause}"
            )


def _own_logps(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probs of all but the first id by the model's own forward pass, `[T - 1]`."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return _select(logits[:-1].float().log_softmax(-1), ids[1:])


def route_forward(model: nn.Module, divergence: Divergence | None = None) -> None:
    """Make `model(...)` compute `per_token_logps`.

    DDP, FSDP and autocast hook into `forward`; bypassing it would train without gradient exchange. The class and what
    `save_pretrained` writes do not change.
    """
    model.forward = MethodType(partial(per_token_logps, divergence=divergence), model)
