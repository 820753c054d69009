"""How much each response token matters to a model: gradients with respect to its input embedding (TI-DPO, arXiv 2505.19653).

I_i = || d target / d e_i ||_1 (Eq. 6), where e_i is what `get_input_embeddings()` returns for token i. One forward and one
backward pass per micro-batch of `collate.py`; gradients of parameters are neither computed nor touched. Called by
`pipeline/workers/pair_attributor.py` for stored attributions and by the trainer for fresh ones. Not here: from attributions to
weights (`hybrid.py`).

The model runs in evaluation mode: no dropout, no gradient checkpointing. The kept activations take far less memory than a
training step of the same micro-batch, which also needs gradients of parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutput

from train.model.attention.continuation import Continuation, EnoughError, KeptPrompts, SplitBatch
from train.model.collate import Batch, model_inputs
from train.model.foreign import Replayed, decoder_of, output_layer, unwrap_adapters
from train.model.logps import decode, per_token_logps
from weights_store.errors import InputError

AttributionTarget = Literal["max_logit", "gold_logps", "dpo_margin"]
Inputs = tuple[object, ...]
"""Positional arguments of a forward pass, as hooks see them."""
_num_attentions: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many attentions a decoder computes in a forward pass."""


@dataclass(frozen=True)
class TokenAttributions:
    """Results for S sequences (2 B, chosen first), float32; 0 outside responses.

    Args:
        attributions: `[S, T]`, >= 0, aligned to `completion_mask`, not normalised; not finite if the gradients are not.
        prompt_attributions: `[S]`, if requested: the sum over the tokens before the response.
        activations: `[S, T]`, if requested: the size of the hidden states that predict token t.
        contexts: `[S, T, d]`, if requested: what `with_contexts` makes of the hidden state that predicts token t.
    """

    attributions: Tensor
    prompt_attributions: Tensor | None = None
    activations: Tensor | None = None
    contexts: Tensor | None = None


Measure = Callable[[tuple[Tensor, ...]], Tensor]
"""From the hidden states after each layer, `[N, H]` each, to m numbers per token, `[N, m]` float32."""


def attribute_tokens(
    model: nn.Module,
    batch: Batch,
    target: AttributionTarget,
    *,
    with_prompts: bool = False,
    with_activations: bool = False,
    with_contexts: Callable[[Tensor], Tensor] | None = None,
) -> TokenAttributions:
    """Return I_i = ||d target / d e_i||_1 of every response token.

    Targets: `max_logit`, the largest logit after the last response token (Eq. 5); `gold_logps`, the sum of the response's
    log-probs in nats; `dpo_margin`, that sum for chosen minus that for rejected. A token affects the margin through its own
    response alone, so its L1 norm equals that of `gold_logps`; beta would scale all norms, and the reference has no gradient.
    With both of these targets the last token has attribution 0, since no response token is predicted from it.

    Args:
        model: A causal language model of transformers, or peft's wrapper of one.
        batch: A micro-batch on the model's device, packed with `share_beginnings=False` or padded.
        target: What is differentiated, for each sequence.
        with_prompts: Return the attribution of prompts too. Then every response needs its own prompt: padded, or packed with
            `with_rejected=False`. Takes longer, since gradients go through prompts.
        with_activations: Return activations too: the L2 norm of the hidden state after each layer (for the last one, after the
            final norm) at the position that predicts a token, averaged over layers, relative to the response's mean. Similar
            to the masks of SparsePO (arXiv 2410.05102) from the reference's activations, but another formula.
        with_contexts: Return contexts too: what this makes of the hidden states after half of the layers, `[N, H]` to `[N, d]`
            float32, at the position that predicts a token, so that it has read all tokens before it.

    Raises:
        InputError: A response is empty, or the model gives no access to its input embeddings, or to its hidden states.
    """
    assert not (with_prompts and target == "dpo_margin"), "a prompt's part in the margin belongs to both responses"
    _check_layout(batch, with_prompts=with_prompts)
    measures: list[Measure] = [_mean_size] if with_activations else []
    if with_contexts is not None:
        measures.append(lambda layers: with_contexts(_at_half_depth(layers)))
    with _frozen(model), _measured_layers(model, measures) if measures else nullcontext() as measured:
        if "layout" in batch and not with_prompts:
            norms, of_tokens = _attribute_responses(model, batch, target, measured)
        else:
            norms = _differentiate(model, batch, target)
            of_tokens = None if measured is None else measured[0]
    mask, places = batch["completion_mask"], batch["places"]
    prompts = norms[places].where(mask.cumsum(1) == 0, 0.0).sum(1) if with_prompts else None
    activations = contexts = None
    if of_tokens is not None:  # of the states that predict a token; the first column is never a response token
        predicting = of_tokens[places.roll(1, dims=1)].where(mask[..., None], 0.0)
        contexts = predicting[..., int(with_activations) :] if with_contexts is not None else None
        if with_activations:
            sizes = predicting[..., 0]
            activations = sizes / (sizes.sum(1, keepdim=True) / mask.sum(1, keepdim=True))
    return TokenAttributions(norms[places].where(mask, 0.0), prompts, activations, contexts)


def states_before(model: nn.Module, batch: Batch) -> Tensor:
    """Return the hidden states after half of the layers that predict the response tokens of a micro-batch, `[n, H]` float32.

    Raises:
        InputError: As `attribute_tokens`.
    """
    with torch.no_grad(), _frozen(model), _measured_layers(model, [_at_half_depth]) as measured:
        decode(model, model_inputs(batch))
    return measured[0][batch["places"].roll(1, dims=1)[batch["completion_mask"]]]


def _differentiate(model: nn.Module, batch: Batch, target: AttributionTarget) -> Tensor:
    """Return the L1 norm of the gradient at every place of `input_ids`, `[N]` float32.

    It is that of the sum of all targets: a token affects the target of its own sequence alone, so gradients do not mix. In the
    margin the log-probs of rejected have a minus sign, which changes no norm: it is computed as `gold_logps`.
    """
    with torch.enable_grad(), leaf_embeddings(model) as leaves:
        if target == "max_logit":
            value = _largest_logits(model, batch).sum()
        else:
            value = per_token_logps(model, **model_inputs(batch)).logps.sum()
        return embedding_norms(model, value, leaves)


def _attribute_responses(
    model: nn.Module, batch: Batch, target: AttributionTarget, measured: list[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Return the norms at every place of a packed row, 0 on prompts, and what `measured` collects of hidden states, if it does.

    The prompts run without gradients (`continuation.py`). Each response's first token, which a prompt predicts, is then not
    part of the target; it does not depend on any response token anyway. Without `measured`, states after the last layer that no
    target reads are not computed, which saves much in models with few layers; how many attentions there are is known from
    the first batch.
    """
    split = SplitBatch.of(batch)
    row, decoder = split.responses, decoder_of(model)
    device, num_attentions = row["input_ids"].device, _num_attentions.get(decoder) if measured is None else None
    prompts = KeptPrompts(split.prompts["layout"], device, num_attentions=num_attentions)
    with torch.no_grad(), _decoder_option(model, packing=prompts), suppress(EnoughError):
        decode(model, model_inputs(split.prompts))
    _num_attentions[decoder] = len(prompts.kept)
    continuation = Continuation(row["layout"], device, prompts=prompts, group_sizes=split.group_sizes)
    ends_alone = measured is None and target == "max_logit"
    short_mlp = _last_mlp_at(model, _last_places(row)) if ends_alone else nullcontext()
    with _decoder_option(model, packing=continuation), short_mlp:
        own_norms = _differentiate(model, row, target)
    norms = own_norms.new_zeros(len(split.prompt_places) + len(split.own_places))
    norms[split.own_places] = own_norms
    if measured is None:
        return norms, None
    of_tokens = norms.new_empty((*norms.shape, measured[0].shape[1]))
    of_tokens[split.prompt_places], of_tokens[split.own_places] = measured
    return norms, of_tokens


def _check_layout(batch: Batch, *, with_prompts: bool) -> None:
    """Refuse sequences without a response, and layouts in which gradients would mix."""
    places, mask = batch["places"], batch["completion_mask"]
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"sequences {empty} of the micro-batch have no response tokens: there is nothing to attribute")
    if "layout" in batch:
        layout = batch["layout"]
        assert int(mask.sum()) == layout.lengths[~layout.is_shared].sum(), (
            "responses share their first tokens, whose gradients mix: collate with share_beginnings=False"
        )
        is_shared = with_prompts and len(places) > len(batch["pair_weights"])
        assert not is_shared, "responses share a prompt, whose gradients mix: collate one response per pair, or padded"


def _largest_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the largest logit after the last response token of each sequence, `[S]` float32 (Eq. 5)."""
    hidden = decode(model, model_inputs(batch))[_last_places(batch)]
    return output_layer(model)(hidden).float().max(-1).values


def _last_places(batch: Batch) -> Tensor:
    """Return the place of each sequence's last response token, `[S]`."""
    mask = batch["completion_mask"]
    steps = torch.arange(mask.shape[1], device=mask.device)
    return batch["places"].gather(1, (mask * steps).argmax(1, keepdim=True)).squeeze(1)


# --- the model while it is attributed ----------------------------------------------------------------------------------


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Set `model` to evaluation and freeze its parameters, so that layers keep nothing for their gradients."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _decoder_option(model: nn.Module, **option: object) -> RemovableHandle:
    """Call the decoder of `model` with this keyword argument too, inside a `with` block."""

    def add(_decoder: nn.Module, args: Inputs, options: dict[str, object]) -> tuple[Inputs, dict[str, object]]:
        return args, options | option

    return decoder_of(model).register_forward_pre_hook(add, with_kwargs=True)


@contextmanager
def _last_mlp_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Run the MLP of the last layer, its larger part, at a few places of a packed row; elsewhere it returns 0.

    Only for plain MLPs, recognised by their usual names: a mixture of experts may do more than map each token.
    """
    layers = getattr(decoder_of(model), "layers", [None])
    mlp: nn.Module | None = getattr(layers[-1], "mlp", None)
    if mlp is None or not isinstance(getattr(mlp, "down_proj", None), nn.Linear):
        yield
        return

    shapes: list[torch.Size] = []

    def narrow(_mlp: nn.Module, args: tuple[Tensor]) -> Tensor:
        shapes.append(args[0].shape)
        return args[0][:, places]

    def widen(_mlp: nn.Module, _args: Inputs, output: Tensor) -> Tensor:
        return output.new_zeros(shapes.pop()).index_copy(1, places, output)

    with mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen):
        yield


@contextmanager
def leaf_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Make the input embeddings leaves of the graph, in float32, and list them as the decoder looks them up.

    A hook lets the model still see ids, which some families read; others scale the output of the layer.
    """
    leaves: list[Tensor] = []
    is_decoding = False

    def enter(_decoder: nn.Module, _args: Inputs) -> None:
        nonlocal is_decoding
        is_decoding = True

    def leave(_decoder: nn.Module, _args: Inputs, _output: object) -> None:
        nonlocal is_decoding
        is_decoding = False

    def put_leaf(_layer: nn.Module, _args: Inputs, output: Tensor) -> Tensor:
        if not is_decoding:  # `output_layer` runs the rest of the model
            return output
        leaves.append(output.detach().to(torch.promote_types(output.dtype, torch.float32)).requires_grad_())
        return leaves[-1].to(output.dtype, copy=True)  # some families scale it in place, which a leaf does not allow

    decoder = decoder_of(model)
    decoding = decoder.register_forward_pre_hook(enter), decoder.register_forward_hook(leave)
    with decoding[0], decoding[1], input_embeddings(model).register_forward_hook(put_leaf):
        yield leaves


def embedding_norms(model: nn.Module, value: Tensor, leaves: list[Tensor]) -> Tensor:
    """Return the L1 norm of the gradient of a scalar at every place of `input_ids`, `[N]` float32.

    Raises:
        InputError: The model did not read its input embeddings, `leaves`, exactly once.
    """
    if len(leaves) != 1:
        raise InputError(
            f"{type(unwrap_adapters(model)).__name__} reads its input embeddings {len(leaves)} times in a forward "
            "pass, expected once: gradients with respect to them would not be the whole attribution"
        )
    (gradient,) = torch.autograd.grad(value, leaves, materialize_grads=True)
    return gradient.abs().sum(-1).flatten()


def input_embeddings(model: nn.Module) -> nn.Module:
    """Return the layer of the input embeddings.

    Raises:
        InputError: The model does not name it.
    """
    causal_model = unwrap_adapters(model)
    try:
        layer = causal_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        layer = None
    if not isinstance(layer, nn.Module):
        raise InputError(
            f"{type(causal_model).__name__} gives no access to its input embeddings (get_input_embeddings), so its tokens "
            "cannot be attributed; use another model or another estimator"
        )
    return layer


@contextmanager
def _measured_layers(model: nn.Module, measures: Sequence[Measure]) -> Iterator[list[Tensor]]:
    """List what is measured of hidden states at each place, `[N, m]` float32, for each run of the decoder."""
    measured: list[Tensor] = []

    def measure(_decoder: nn.Module, _args: Inputs, output: BaseModelOutput) -> None:
        if isinstance(output, Replayed):
            return
        places = output.last_hidden_state.shape[:2]
        if output.hidden_states is None or any(states.shape[:-1] != places for states in output.hidden_states[1:]):
            raise InputError(
                f"the layers of {type(unwrap_adapters(model)).__name__} do not return one state per token, so activations and "
                "contexts cannot be measured; set attribute.activations=false and attribute.contexts=0"
            )
        layers = tuple(states.detach().flatten(0, 1) for states in output.hidden_states[1:])
        measured.append(torch.cat([each(layers) for each in measures], dim=1))

    decoder = decoder_of(model)
    with _decoder_option(model, output_hidden_states=True), decoder.register_forward_hook(measure):
        yield measured


def _mean_size(layers: tuple[Tensor, ...]) -> Tensor:
    """Return the mean over layers of the L2 norms of hidden states, `[N, 1]` float32."""
    norms = [torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32) for states in layers]
    return torch.stack(norms).mean(0)[:, None]


def _at_half_depth(layers: tuple[Tensor, ...]) -> Tensor:
    """Return the hidden states after half of the layers, rounded up, `[N, H]` float32."""
    return layers[(len(layers) - 1) // 2].float()
