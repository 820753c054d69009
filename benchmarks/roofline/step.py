"""The step whose operations are counted: the model of `make bench-train DEVICE=cuda` and what `PairTrainer` does with it."""

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from benchmarks.roofline.card import Card
from benchmarks.roofline.changes import CHANGES, MasterWeights, applied
from benchmarks.train_inputs import BODIES, MAX_SIDE, VOCABULARIES
from train.data.dataset import Pair
from train.loss.config import LossSection
from train.loss.objective import compute_pair_losses
from train.model import elementwise, policy
from train.model.attention.packed import PACKED
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.logps import per_token_logps
from train.model.token_budget import cut_by_tokens


def build_model(card: Card, dtype: torch.dtype) -> nn.Module:
    """Return the Llama of `make bench-train DEVICE=cuda` without data, with packed attention."""
    body = BODIES["cuda"]
    config = LlamaConfig(
        **body,
        vocab_size=VOCABULARIES["128k"],
        num_key_value_heads=body["num_attention_heads"] // 2,
        tie_word_embeddings=True,
    )
    with card.fake:
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.set_attn_implementation(PACKED)
    if dtype == torch.float32:
        # Whether norms and gates are the usual ones cannot be computed without data.
        with (
            mock.patch.object(elementwise, "is_rms_norm", lambda module: isinstance(module, LlamaRMSNorm)),
            mock.patch.object(elementwise, "is_gated_mlp", lambda module: isinstance(module, LlamaMLP)),
        ):
            policy.enter_bfloat16(model)
    policy.switch_off_noise(model)
    for tensor in (*model.parameters(), *model.buffers()):
        card.hold(tensor)
    card.parameter_bytes = card.live_bytes
    return model


def run_step(card: Card, model: nn.Module, optimizer: Any, batches: Sequence[Batch], *, autocast: bool = True) -> None:
    """Run a step as `PairTrainer.training_step` does: losses of every micro-batch, backward, clipping, update."""
    settings: Any = TypeAdapter(LossSection).validate_python({"name": "tis_dpo", "beta": 0.1})
    collator = PairCollator()
    num_pairs = sum(len(batch["pair_weights"]) for batch in batches)
    with card.running():
        for batch in batches:
            card.phase = "forward"
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                chosen, rejected, _ = collator.split_sides(batch, per_token_logps(model, **model_inputs(batch)))
                result, _ = compute_pair_losses(settings, chosen, rejected)
                total = (result.losses * batch["pair_weights"]).sum() / num_pairs
            card.phase = "backward"
            total.backward()
        card.phase = "update"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()


def cut_step(pairs: Sequence[Pair], pairs_at_once: int) -> list[Batch]:
    """Return the micro-batches of a step, as the benchmark's trainer cuts it."""
    collator = PairCollator()
    sizes = [collator.num_tokens(pair) for pair in pairs]
    return [collator(part) for part in cut_by_tokens(pairs, sizes, 3 * MAX_SIDE * pairs_at_once)]


def predict(pairs: Sequence[Pair], pairs_at_once: int, change: str = "as it is") -> Card:
    """Run two steps with one of `CHANGES`, and count the second."""
    made = CHANGES[change]
    card = Card()
    batches = cut_step(pairs, pairs_at_once)
    with applied(made, card):
        model = build_model(card, torch.bfloat16 if made.is_bfloat16 else torch.float32)
        with card.running():
            make = MasterWeights if made.is_bfloat16 else partial(torch.optim.AdamW, fused=True)
            optimizer = make(list(model.parameters()))
        for _ in range(2):
            card.kernels.clear()
            run_step(card, model, optimizer, batches, autocast=not made.is_bfloat16)
    return card
