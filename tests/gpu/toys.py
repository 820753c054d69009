"""Tiny models and pairs for the checks, and a training job of them: what a GPU machine needs no pytest and no data for."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from train.config import TrainConfig
from train.data.dataset import Pair, StoredResponse
from weights_store import WeightStore
from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.schemas import WEIGHTS

VOCAB_SIZE = 96
BASE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
"""Heads of 16, the least that the kernels take."""
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**BASE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**BASE, head_dim=16)),
    "mistral-window": (MistralForCausalLM, MistralConfig(**BASE, sliding_window=12)),
    "gemma2-window-softcap": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **BASE, **LAYERS, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
}  # fmt: skip
LENGTHS = [(70, 30, 9, 20), (1, 1, 140, 3), (11, 3, 1, 7), (33, 64, 65, 40)]
"""Of prompt, chosen, rejected and anchor, tokens: shorter and longer than the window and than a block of a kernel."""


def build_model(family: str) -> PreTrainedModel:
    """Return a random model in float32 on the CPU."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family][0], copy.deepcopy(FAMILIES[family][1])
    if family.startswith("gemma2"):
        config._attn_implementation = "eager"  # the default leaves soft-capping out
    return kind(config).eval()


def random_pairs(seed: int = 0) -> list[Pair]:
    """Return pairs of random ids with weights and reference log-probs; the responses of the first begin alike."""
    generator = np.random.default_rng(seed)
    pairs = []
    for lengths in LENGTHS:
        prompt, *responses = (generator.integers(3, VOCAB_SIZE, n).astype(np.int32) for n in lengths)
        if not pairs:
            for other in responses[1:]:
                other[:2] = responses[0][:2]
        sides = [
            StoredResponse(
                ids,
                generator.uniform(0.5, 2.0, len(ids)).astype(np.float32),
                generator.normal(-4.5, 0.3, len(ids)).astype(np.float32),
            )
            for ids in responses
        ]
        pairs.append(Pair(f"pair-{len(pairs)}", prompt, sides[0], sides[1], anchor=sides[2]))
    return pairs


def make_job(folder: Path, **changes: dict[str, Any]) -> TrainConfig:
    """Write a tiny model with a tokenizer and a weight dataset into `folder`; return a job of a few steps over them."""
    model_folder, uri = folder / "model", str(folder / "store")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"
    tokenizer.save_pretrained(model_folder)
    model = build_model("llama")
    model.save_pretrained(model_folder)
    rows = [row for seed in range(4) for row in _rows(model, random_pairs(seed), seed)]
    metadata = {
        "fingerprint": "0" * 64,
        "tokenizer": {
            "fingerprint": fingerprint_tokenizer(model_folder),
            "vocab_size": VOCAB_SIZE,
            "eos_token_id": 2,
        },
        "statistics": {"num_pairs": len(rows), "num_response_tokens": sum(len(row["chosen_ids"]) for row in rows)},
    }
    WeightStore(uri).table("weights/toy/tis").replace(pa.Table.from_pylist(rows, WEIGHTS), metadata)
    sections: dict[str, dict[str, Any]] = {
        "data": {"store": uri, "weights": "toy/tis"},
        "model": {"path": str(model_folder)},
        "loss": {"name": "tis_dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-3, "pairs_per_step": 8, "tokens_per_batch": 512},
        "output": {"folder": str(folder / "out"), "log_every_steps": 1},
    }
    return TrainConfig.model_validate({name: {**of, **changes.get(name, {})} for name, of in sections.items()})


def _rows(model: PreTrainedModel, pairs: list[Pair], seed: int) -> list[dict[str, Any]]:
    rows = []
    for index, pair in enumerate(pairs):
        row: dict[str, Any] = {"pair_id": f"{seed}-{index}", "prompt_ids": pair.prompt_ids.tolist(), "pair_weight": 1.0}
        row |= {"anchor_ids": None, "anchor_ref_logps": None, "split": "train"}
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row[f"{side}_ids"] = response.ids.tolist()
            row[f"{side}_token_weights"] = response.token_weights.tolist()
            row[f"{side}_ref_logps"] = whole_logps(model, pair.prompt_ids, response.ids).tolist()
        rows.append(row)
    return rows


def whole_logps(model: PreTrainedModel, prompt_ids: Any, response_ids: Any) -> torch.Tensor:
    """Return the response's log-probs, `[T]`: one sequence, nothing packed or padded, the whole log-softmax."""
    ids = torch.tensor([[*prompt_ids.tolist(), *response_ids.tolist()]], device=model.device)
    logits = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt_ids) - 1 :]
