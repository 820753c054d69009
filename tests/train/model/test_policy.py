"""What loading and saving must not change: the function that transformers computes from the same files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from train.config import LoraSection, ModelConfig
from train.model.attention.packed import PACKED
from train.model.checkpoint import load_checkpoint
from train.model.policy import Policy, add_adapters, load_policy, load_reference, save_policy
from weights_store.errors import InputError

VOCAB_SIZE = 96
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "layer_types": None, "mlp_layer_types": None,
    # experts
    "n_routed_experts": 8, "num_experts": 8, "num_local_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48, "num_layers": 1, "zero_expert_num": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8,
}  # fmt: skip
"""Of a tiny model, by the names that configs have for them."""
SPECIAL = {
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 24}
}  # eight windowed keys; a third of a head is rotated
NOT_RUN = {"deepseek_v4"}
"""In bfloat16 its own forward pass multiplies matrices of two dtypes, which torch refuses on CPUs."""


def with_float32(flag: str) -> list[str]:
    """Return the model types with tensors that transformers keeps in float32, by the flag of their class that says so."""
    found = []
    for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        kind = getattr(transformers, architecture if isinstance(architecture, str) else architecture[0])
        if getattr(kind, flag, None):
            found.append(name)
    return sorted(found)


def make_source(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a tiny random model as its publisher does: loaded by transformers in `dtype`, and saved."""
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    torch.manual_seed(0)
    sizes = {key: size for key, size in SIZES.items() if key in known} | SPECIAL.get(name, {})
    model = AutoModelForCausalLM.from_config(kind(**sizes))
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for key, buffer in model.named_buffers() if "bias" in key)):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)  # nothing stays 0 or 1, which any dtype can hold
    model.save_pretrained(folder / "float32")
    AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=dtype).save_pretrained(folder / "source")


def load(folder: Path) -> PreTrainedModel:
    """Load a model in its own dtype, as anybody would."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def differences(got: nn.Module, expected: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that are not the same, bit for bit and in the same dtype."""

    def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from model.named_parameters()
        yield from model.named_buffers()

    theirs = dict(tensors(expected))
    assert theirs.keys() == dict(tensors(got)).keys()
    return [
        name for name, mine in tensors(got) if mine.dtype != theirs[name].dtype or not torch.equal(mine, theirs[name])
    ]


def logps(model: nn.Module, num_tokens: int = 12) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in with_float32("_keep_in_fp32_modules_strict")]
    + [(name, torch.float16) for name in with_float32("_keep_in_fp32_modules")],
    ids=str,
)
def test_a_family_with_tensors_in_float32_is_saved_as_it_was_loaded(name, dtype, tmp_path) -> None:
    make_source(name, tmp_path, dtype)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    save_policy(load_checkpoint(source, dtype=torch.float32), None, source, target)
    before, after = load(source), load(target)
    assert {tensor.dtype for tensor in before.state_dict().values()} >= {dtype, torch.float32}  # the case at hand
    assert differences(after, before) == []
    if name not in NOT_RUN:
        assert torch.equal(logps(after), logps(before))


def test_a_tensor_that_the_file_holds_in_float32_keeps_its_precision(tmp_path) -> None:
    """transformers rounds it to bfloat16 like the others, but vLLM keeps such tensors, for example `A_log` of Mamba."""
    make_llama(tmp_path / "source")
    path, name = tmp_path / "source" / "model.safetensors", "model.norm.weight"
    exact = torch.linspace(0.9, 1.1, 64)
    save_file({**load_file(path), name: exact}, path, {"format": "pt"})
    target = tmp_path / "target"
    target.mkdir()
    save_policy(load_checkpoint(tmp_path / "source", dtype=torch.float32), None, tmp_path / "source", target)
    written = load_file(target / "model.safetensors")
    assert torch.equal(written[name], exact)
    assert {tensor.dtype for key, tensor in written.items() if key != name} == {torch.bfloat16}


def test_adapters_that_were_not_trained_are_merged_without_a_trace(tmp_path) -> None:
    make_source("deepseek_v3", tmp_path, torch.bfloat16)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    lora = LoraSection(target_modules=["o_proj"])
    save_policy(add_adapters(load_checkpoint(source, dtype=torch.float32), lora), lora, source, target)
    assert differences(load(target), load(source)) == []


# --- training mode -----------------------------------------------------------------------------------------------------

NOISY = {
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "mixtral": {"router_jitter_noise": 0.3},
    "minimax": {"router_jitter_noise": 0.3},
    "minimax_m2": {"router_jitter_noise": 0.3},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_jitter_eps": 0.3,
             "moe_num_experts": 4, "ffn_hidden_size": 32}, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "gemma3n_text": {"altup_coef_clip": 0.01, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0,
                     "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "intermediate_size": [48] * 2, "activation_sparsity_pattern": [0.0] * 2, "num_key_value_heads": 2},
    "opt": {"layerdrop": 0.5, "dropout": 0.3, "attention_dropout": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}  # fmt: skip
"""Families with something that only `train()` switches on: jitter of routers, clipped coefficients, skipped layers, dropout."""


def make_noisy(name: str, folder: Path) -> None:
    """Write a tiny random model of a family with noise."""
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    sizes = {key: size for key, size in SIZES.items() if key in known} | NOISY[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_training_mode_computes_what_evaluation_mode_does(name, gradient_checkpointing, tmp_path) -> None:
    make_noisy(name, tmp_path)
    config = ModelConfig(path=str(tmp_path), gradient_checkpointing=gradient_checkpointing, packing=False)
    model = load_policy(tmp_path, config).model
    assert torch.equal(logps(model.train()), logps(model.eval()))
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logps(untouched.train()), logps(untouched.eval()))  # there was something to switch off


def test_gradient_checkpointing_recomputes_each_layer_and_changes_no_gradient(tmp_path) -> None:
    make_noisy("mixtral", tmp_path)
    gradients, runs = {}, {}
    for recomputed in (False, True):
        config = ModelConfig(path=str(tmp_path), gradient_checkpointing=recomputed, packing=False)
        model = load_policy(tmp_path, config).model.train()
        calls = []
        model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits.float().log_softmax(-1)[
            ..., 5
        ].sum().backward()
        runs[recomputed] = len(calls)
        gradients[recomputed] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert runs == {False: 1, True: 2}
    for name, expected in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], expected)


def test_a_family_without_gradient_checkpointing_says_so(tmp_path) -> None:
    config = CTRLConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, dff=48)
    CTRLLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model.gradient_checkpointing: CTRLLMHeadModel cannot do that; leave it out"):
        load_policy(tmp_path, ModelConfig(path=str(tmp_path), gradient_checkpointing=True, packing=False))


# --- the frozen reference ----------------------------------------------------------------------------------------------


def make_llama(folder: Path, **changes: object) -> None:
    """Write a random Llama in bfloat16 that can read 2,048 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2, **changes
        }
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def test_the_reference_in_bfloat16_is_what_transformers_loads(tmp_path) -> None:
    """`model.to(bfloat16)` would round the frequencies of rotary embeddings: positions in the hundreds would be off."""
    make_llama(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16", packing=False)
    reference = load_reference(tmp_path, config, Policy(nn.Identity(), "padded"))
    assert differences(reference, load(tmp_path)) == []
    assert torch.equal(logps(reference, 1500), logps(load(tmp_path), 1500))
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_the_reference_is_packed_where_the_policy_is(tmp_path) -> None:
    make_llama(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    policy = load_policy(tmp_path, config)
    assert load_reference(tmp_path, config, policy).config._attn_implementation == PACKED
    assert load_reference(tmp_path, config, Policy(policy.model, "why not")).config._attn_implementation == "sdpa"


def test_kl_to_the_reference_at_the_start_does_not_grow_with_the_position(tmp_path) -> None:
    """Policy = reference: what is left is the rounding of bfloat16; rounded frequencies would give 0.02 nats at 1,600."""
    make_llama(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16", packing=False)
    policy = load_policy(tmp_path, config)
    reference = load_reference(tmp_path, config, policy)
    for num_tokens in (20, 500, 1600):
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = (logps(model, num_tokens)[0, -10:] for model in (policy.model, reference))
        assert (theirs.exp() * (theirs - mine)).sum(-1).mean().item() < 2e-3


@pytest.mark.parametrize(("name", "tied"), [("gemma", True), ("deepseek_v3", False)])
def test_a_policy_without_weights_is_the_same_in_everything_else(name, tied, tmp_path) -> None:
    """The second family has a buffer that is saved."""
    make_source(name, tmp_path, torch.bfloat16)
    folder = tmp_path / "source"
    config, lora = ModelConfig(path=str(folder), dtype="bfloat16"), LoraSection(rank=2)
    whole = load_policy(folder, config, lora, one_dtype=True)
    empty = load_policy(folder, config, lora, one_dtype=True, findings=whole.findings())
    assert (empty.not_packed, empty.attention, empty.kernels) == (whole.not_packed, whole.attention, whole.kernels)
    assert empty.model.config._attn_implementation == whole.model.config._attn_implementation

    def structure(policy: Policy) -> list[tuple[object, ...]]:
        named = [*policy.model.named_parameters(remove_duplicate=False), *policy.model.named_buffers()]
        return [(name, part.shape, part.dtype, part.requires_grad, part.device) for name, part in named]

    assert structure(empty) == structure(whole)
    for (_, found), (_, expected) in zip(empty.model.named_buffers(), whole.model.named_buffers(), strict=True):
        assert torch.equal(found, expected)
    shared = empty.model.get_output_embeddings().weight is empty.model.get_input_embeddings().weight
    assert shared == tied
    # With the weights of the other it computes the same: nothing else was lost.
    empty.model.load_state_dict(whole.model.state_dict())
    for policy in (empty, whole):
        policy.model.get_base_model().set_attn_implementation(policy.attention)
    ids = torch.arange(3, 11)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(empty.model(ids).logits, whole.model(ids).logits)
