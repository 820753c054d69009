"""A tiny random model of every causal language model architecture of the installed transformers.

`make_model(name)` shrinks the default config of a model type by the names of its keys (`SIZES`), keeps at least one layer of
each kind, and draws weights so large that attention, experts and windows all matter. What the names cannot say is in `SPECIAL`;
what cannot be made is in `NOT_MADE`, with the reason.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE, FIRST_ID = 96, 8
"""Ids below FIRST_ID are special in some family (padding, images, …); tests use the others."""
WINDOW = 20
"""Longer than the sequences of the probes at load, shorter than those of the tests."""
_NOISE = re.compile("drop|jitter")
HIDDEN, NUM_HEADS, HEAD_DIM = 32, 4, 8

SIZES: dict[str, int] = {}
for _size, _names in {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size",
    HIDDEN: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim hidden_size_global attention_hidden_size lru_width "
    "vision_output_dim backbone_hidden_size out_hidden_size projection_dim",
    48: "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff "
    "ffn_hidden_size feed_forward_size dense_intermediate_size mlp_dim shared_intermediate_size",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    NUM_HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads "
    "mamba_n_heads mamba_num_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "mamba_chunk_size chunk_size block_size index_block_size patch_size mamba_dt_rank time_step_rank "
    "floor_scale original_max_position_embeddings",
    2: "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers n_layer n_layers num_layers num_blocks depth mamba_expand num_key_value_groups n_group topk_group "
    "index_topk index_topk_blocks",
    HEAD_DIM: "head_dim dim_head d_head v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels attention_head_size "
    "swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim mamba_headdim index_head_dim "
    "attention_head_dim rotary_dim query_pre_attn_scalar mamba_d_state ssm_state_size state_size hidden_size_per_layer_input",
    16: "index_n_heads kv_lora_rank q_lora_rank o_lora_rank qk_head_dim router_hidden_size laurel_rank adapter_rank "
    "image_size mamba_d_head",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups "
    "n_groups mamba_ngroups zero_expert_num moe_layer_start_index",
    WINDOW: "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size "
    "attention_chunk_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions max_source_positions",
}.items():
    SIZES |= dict.fromkeys(_names.split(), _size)

MULTIPLIERS = {
    "logit_scale": 0.7, "logits_scaling": 1.5, "lm_head_multiplier": 0.6, "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0, "attn_logit_softcapping": 2.0, "embedding_multiplier": 1.7,
    "residual_multiplier": 0.8, "attention_multiplier": 0.5,
    "logits_mup_width_multiplier": 1.5,
}  # fmt: skip
"""Scaling and capping of scores and logits, which many default configs switch off."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
ZAMBA = {"num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA_4 = {
    "num_hidden_layers": 2, "per_layer_config": {1: {"head_dim": 16}}, **WINDOWS, "hidden_size_per_layer_input": 8,
}  # fmt: skip
GEMMA_3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4, "vocab_size_per_layer_input": VOCAB_SIZE,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.95, 0.0] * 2,
}  # fmt: skip
QWEN_4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "ple_embed_dim": 8, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2,
    "hc_lowrank": 8,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {**WINDOWS, "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, **WINDOWS},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gemma4": {"text_config": GEMMA_4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {**MAMBA, **HYBRID, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_expert_group": 2},
    "laguna": WINDOWS,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mellum": WINDOWS,
    "minimax_m3_vl_text": {"index_n_heads": 2, "layer_types": ["minimax_m3_sparse", "full_attention"]},
    "ministral": WINDOWS,
    "qwen2_moe": {"sliding_window": WINDOW},
    "qwen4_exp": {"text_config": QWEN_4},
    "qwen4_exp_text": QWEN_4,
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"rescale_every": 1},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 16, "ffn_round_up_to_multiple_of": 8},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": VOCAB_SIZE,
                 "pronunciation_vocab_size": VOCAB_SIZE},
    "zamba": {**ZAMBA, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {
        **ZAMBA, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "mamba_ngroups": 1, "mamba_headdim": 16,
        "n_mamba_heads": 4, "use_shared_attention_adapter": False, "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-bidirectional": ("bert", {"is_decoder": False}),
    "xlm-causal": ("xlm", {"causal": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True}),
    "granitemoehybrid-attention": ("granitemoehybrid", {"layer_types": ["full_attention"] * 2}),
    "rwkv-unscaled": ("rwkv", {"rescale_every": 0}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
"""Settings of a family that change how its tokens see each other."""
NOT_MADE = {
    "gemma3n": "its vision tower needs timm; gemma3n_text is made",
    "gemma4_assistant": "a draft model, which reads another model's hidden states",
    "gemma4_unified_assistant": "a draft model, which reads another model's hidden states",
    "musicgen": "predicts audio codes, and has no config without a text encoder",
    "musicgen_melody": "predicts audio codes, and has no config without a text encoder",
}
"""Why a family is not tested."""
NAMES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - NOT_MADE.keys())


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the keys of a small config of the same kind, nested as it is."""
    small: dict[str, Any] = {}
    keys = config.to_dict()
    for key, value in keys.items():
        part = vars(config).get(key)
        if isinstance(part, PreTrainedConfig):
            small[key] = {**shrink(part), "model_type": part.model_type}
        elif key in SIZES and (value is None or (isinstance(value, int) and value > 0 and not isinstance(value, bool))):
            if value is not None or key in {
                "head_dim",
                "num_key_value_heads",
                "sliding_window",
                "attention_chunk_size",
            }:
                small[key] = SIZES[key]
        elif key in MULTIPLIERS:
            small[key] = MULTIPLIERS[key]
        elif key.endswith(("token_id", "token_index")) and value is not None:
            small[key] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, 3)
        elif key in {"use_sliding_window", "is_decoder"}:
            small[key] = True
    if "kv_lora_rank" in keys and "num_key_value_heads" in keys:  # multi-head latent attention has no groups
        small["num_key_value_heads"] = NUM_HEADS
    return small | choose_layers(keys)


def choose_layers(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that keep two to four layers, at least one of each kind; lists of one value per layer tell kinds."""
    num_layers = keys.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        return {}
    lists = {key: value for key, value in keys.items() if isinstance(value, list) and len(value) == num_layers > 2}
    seen: dict[Any, int] = {}
    for layer in range(num_layers):
        seen.setdefault(str([value[layer] for value in lists.values() if not isinstance(value[layer], float)]), layer)
    chosen = sorted(seen.values())[:4]
    if len(chosen) < 2:
        chosen += [layer for layer in range(num_layers) if layer not in chosen][: 2 - len(chosen)]
    kept = {key: [value[i] for i in chosen] for key, value in lists.items()}
    if "use_sliding_window" in keys and "layer_types" in kept:
        kept["layer_types"][0] = "sliding_attention"
    return {"num_hidden_layers": len(chosen), **kept}


def merge(keys: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `keys` with `changes`, also in the configs inside."""
    merged = dict(keys)
    for key, value in changes.items():
        nested = isinstance(value, dict) and "model_type" in (merged.get(key) or ())
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def make_config(name: str) -> PreTrainedConfig:
    """Return the small config of a family."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[model_type]
    return kind(**merge(merge(shrink(kind()), SPECIAL.get(model_type, {})), changes))


def add_noise(config: PreTrainedConfig) -> None:
    """Switch on everything that a config offers of dropout, layer drop and jitter, in training mode only."""
    if config.model_type == "diffllama":  # refuses dropout
        return
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and _NOISE.search(key):
                vars(part)[key] = 0.3


def make_model(name: str, config: PreTrainedConfig | None = None, **options: Any) -> PreTrainedModel:
    """Return a seeded random model in float32, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or make_config(name), **options)
    enlarge(model)
    return model.float().eval()


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Scale small matrices to the size of trained ones, and move what starts as 0 or 1."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        spread = parameter.std().item() if parameter.numel() > 1 else 0.0
        if parameter.dim() >= 2 and 1e-6 < spread < 0.1:
            parameter.mul_(1.2 * parameter.shape[-1] ** -0.5 / spread)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
