"""The memory that a plan names, against sums by hand for Llama 3 8B and the true number of parameters of small models."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import train.model.elementwise
from benchmarks.roofline.card import Card
from pipeline.dry_run.device import Device, find_device
from pipeline.dry_run.memory import ModelSize, attribution_bytes, engine_bytes, training_bytes
from pipeline.dry_run.needs import Needs
from pipeline.models.train_section import PairTraining
from pipeline.recipe import load_recipe
from tests.train.model.test_packing import random_pairs
from train.model.attention.packed import PACKED
from train.model.collate import PairCollator, model_inputs
from train.model.elementwise import enter_bfloat16
from train.model.logps import CHUNK_LOGITS, KEPT_LOGITS, per_token_logps

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_8B = {
    "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "model_type": "llama",
}  # fmt: skip
PARAMETERS = 8_030_261_248  # as Meta counts them
LAYER = (
    2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
)  # of one layer, linear: q and o, k and v, gate, up and down
RECIPE = Path(__file__).parents[3] / "recipes" / "hh_harmless_paper.toml"  # trains in bfloat16
CARD = Device("NVIDIA A100-SXM4-80GB", 80 << 30, is_gpu=True)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """The weight files of an 8 B model with all their shapes and no content: files that are one hole."""
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    shapes = {
        "model.embed_tokens.weight": (128256, 4096),
        "lm_head.weight": (128256, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(32):
        maps = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
        maps |= {"self_attn.o_proj": (4096, 4096), "mlp.down_proj": (4096, 14336)}
        maps |= {f"mlp.{name}_proj": (14336, 4096) for name in ("gate", "up")}
        maps |= {f"{name}_layernorm": (4096,) for name in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in maps.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def size(llama_8b):
    return ModelSize.of(llama_8b)


def test_llama_3_8b_is_counted_to_the_parameter(size):
    assert size.num_parameters == PARAMETERS == 2 * 128256 * 4096 + 32 * (LAYER + 2 * 4096) + 4096
    assert len(size.linear()) == 32 * 7
    assert size.linear(["q_proj"]) == [(4096, 4096)] * 32


def test_an_engine_needs_weights_cache_and_one_step(size):
    # KV cache: keys and values, 32 layers, 8 heads of 128, 2 bytes; step: logits of 6 bytes and the two widest activations.
    cache = 2048 * (2 * 32 * 8 * 128 * 2)
    step = 4096 * (2 * 2 * (4096 + 14336)) + 2048 * 128256 * 6  # logits of one sequence at a time
    assert engine_bytes(size, "bfloat16", batch_tokens=4096, max_tokens=2048) == 2 * PARAMETERS + cache + step
    halves = engine_bytes(size, "bfloat16", batch_tokens=4096, max_tokens=2048, tensor_parallel=2)
    assert halves == PARAMETERS + cache // 2 + step


def _train(**sections):
    return PairTraining.model_validate({"optim": {"tokens_per_batch": 1024}, **sections})


LOGITS = 1024 * 128256  # fewer than are kept, and than are computed at a time
WIDE = 4 * (8 * 4096 + 2 * 1024 + 4 * 14336)  # bytes per token and layer in float32, and in bfloat16
KEPT = 2 * (4 * 4096 + 5 * 1024 + 2 * 14336)
HEAD = 2 * 128256 * 4096  # bytes of the output layer, rounded to bfloat16
ADAPTERS = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # rank 16; 41.9 million


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # float32: 16 bytes a parameter; logits and their gradient.
        ({}, 16 * PARAMETERS + 1024 * 32 * WIDE + 2 * 4 * LOGITS),
        ({"model": {"dtype": "bfloat16"}}, 16 * PARAMETERS + HEAD + 1024 * 32 * KEPT + 2 * 2 * LOGITS),
        # Checkpointing keeps the inputs of 32 layers, and one layer whole.
        (
            {"model": {"dtype": "bfloat16", "gradient_checkpointing": True}},
            16 * PARAMETERS + HEAD + 1024 * (32 * 2 * 4096 + KEPT) + 2 * 2 * LOGITS,
        ),
        (
            {"model": {"dtype": "bfloat16"}, "lora": {}},
            2 * PARAMETERS + 16 * ADAPTERS + 1024 * 32 * KEPT + 2 * 2 * LOGITS,
        ),
        # NF4: 0.5 bytes, 1/64 for the scale and 4/(64 * 256) for the scale's scale; embeddings, head and norms
        # stay in float32, with a 16-bit copy of the head.
        (
            {"model": {"dtype": "bfloat16", "quantization": "nf4"}, "lora": {}},
            32 * LAYER * (0.5 + 1 / 64 + 4 / 16384)
            + 4 * (PARAMETERS - 32 * LAYER)
            + HEAD
            + 16 * ADAPTERS
            + 1024 * 32 * KEPT
            + 2 * 2 * LOGITS,
        ),
        # A share of the states, and whole: what is outside of layers, and two of them.
        (
            {"model": {"dtype": "bfloat16"}, "parallel": {"strategy": "fsdp2"}, "num_processes": 8},
            16 * PARAMETERS / 8
            + 2 * (2 * 128256 * 4096 + 4096 + 2 * (LAYER + 2 * 4096))
            + 1024 * 32 * KEPT
            + 2 * 2 * LOGITS,
        ),
        # Adapters and a float32 base, since FSDP2 shards parameters of one dtype.
        (
            {"model": {"dtype": "bfloat16"}, "lora": {}, "parallel": {"strategy": "fsdp2"}, "num_processes": 8},
            (4 * PARAMETERS + 16 * ADAPTERS) / 8
            + 2 * (2 * 128256 * 4096 + 4096 + 2 * (LAYER + 2 * 4096))
            + 1024 * 32 * KEPT
            + 2 * 2 * LOGITS,
        ),
    ],
)
def test_training_states_are_bytes_per_parameter_plus_activations(size, sections, expected):
    assert training_bytes(size, _train(**sections)) == pytest.approx(expected, abs=2)


def test_of_many_logits_some_are_kept_and_some_computed_at_a_time(size):
    longer = _train(model={"dtype": "bfloat16"}, optim={"tokens_per_batch": 16_384})
    logits = 2 * (KEPT_LOGITS["cuda"] + CHUNK_LOGITS)  # of the trainer, which a plan does not import
    assert training_bytes(size, longer) == 16 * PARAMETERS + HEAD + 16_384 * 32 * KEPT + logits


def test_attribution_keeps_no_gradients_of_weights(size):
    assert attribution_bytes(size, "bfloat16", 4096) == 2 * PARAMETERS + 4096 * 32 * KEPT


def _kept_bytes(num_layers, dtype):
    """Return what is kept of a forward pass over two pairs on the code path of a GPU, on tensors without data."""
    card = Card()
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": num_layers}, attn_implementation=PACKED)
    with card.fake:
        model = AutoModelForCausalLM.from_config(config)
    names = {"is_rms_norm": "norm", "is_gated_mlp": "mlp"}
    with pytest.MonkeyPatch.context() as patch:
        for check, part in names.items():
            patch.setattr(
                train.model.elementwise, check, lambda module, part=part: part in type(module).__name__.lower()
            )
        if dtype == "bfloat16":
            enter_bfloat16(model)
    for parameter in model.parameters():
        card.hold(parameter)
    parameter_bytes = card.live_bytes
    batch = PairCollator()(random_pairs([(100, 60, 70), (90, 80, 50)], vocab_size=96))
    with card.running(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logps = per_token_logps(model, **model_inputs(batch)).logps
    assert logps.requires_grad
    return card.live_bytes - parameter_bytes, batch["layout"].num_tokens


TINY = {**SMALL, "hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_a_layer_are_what_autograd_keeps(dtype):
    size = ModelSize({}, hidden=128, num_layers=1, kv_width=64, intermediate=384, vocab=96)
    (more, num_tokens), (less, _) = _kept_bytes(3, dtype), _kept_bytes(2, dtype)
    assert size.activation_bytes(num_tokens, dtype) == pytest.approx(more - less, rel=0.1)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"num_key_value_heads": 2}),  # with biases
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
        ("Phi3", {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}),  # with fused matrices
    ],
)
def test_parameters_of_other_families_are_those_that_transformers_has(tmp_path, family, more):
    config = getattr(transformers, f"{family}Config")(**SMALL, **more)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    size = ModelSize.of(tmp_path)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert sorted(size.linear()) == sorted(tuple(module.weight.shape) for module in linear)
    # The cache of a real forward pass.
    cache = model(torch.arange(5)[None]).past_key_values
    assert size.kv_bytes(5, "float32") == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA_8B, "num_local_experts": 8},
        {**LLAMA_8B, "layer_types": ["linear_attention"]},
        {"n_embd": 64, "n_layer": 2, "vocab_size": 10},  # GPT-2
        {**LLAMA_8B, "intermediate_size": [1, 2]},
    ],
    ids=["experts", "hybrid", "other names", "layers that differ"],
)
def test_what_the_formula_does_not_cover_is_unknown(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert ModelSize.of(tmp_path) is None


def _needs(device, *overrides):
    return Needs(load_recipe(RECIPE, overrides), device)


def test_a_plan_says_whether_a_stage_fits_and_what_else_to_do(llama_8b):
    needs = _needs(CARD)
    assert needs.of("publish", llama_8b) is None
    assert needs.of("score", llama_8b).text == "memory: about 19.1 GB of the 85.9 GB of NVIDIA A100-SXM4-80GB"
    found = needs.of("contrast", llama_8b).text
    assert found.startswith(
        "memory: about 159.0 GB, too much for the 85.9 GB of NVIDIA A100-SXM4-80GB; set contrast.train.model"
    )
    lora = _needs(CARD, "contrast.train.lora.rank=16").of("contrast", llama_8b)
    assert "about 46.2 GB of the 85.9 GB" in lora.text
    small = Device("NVIDIA RTX 4000", 20 << 30, is_gpu=True)
    assert "of which 85% can be used; raise score.tensor_parallel" in _needs(small).of("score", llama_8b).text


def test_without_a_gpu_the_cache_of_the_recipe_and_all_processes_count(llama_8b, size):
    ram = Device("this machine, without a GPU", 64 << 30, is_gpu=False)
    needs = _needs(ram, "score.kv_cache_gib=1.5", "contrast.train.num_processes=2")
    expected = engine_bytes(size, "bfloat16", batch_tokens=4096, max_tokens=2048) + 3 * 2**29
    assert needs.of("score", llama_8b).num_bytes == expected
    assert needs.of("contrast", llama_8b).num_bytes == 2 * training_bytes(size, needs.recipe.contrast.train)


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Return a function that sets what a made-up `nvidia-smi` prints, and its exit code."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_answer(*lines, code=0):
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
        program.chmod(0o755)

    return set_answer


def test_a_gpu_without_memory_of_its_own_has_that_of_the_machine(answer):
    answer("[N/A], NVIDIA GB10")
    device = find_device()
    [total] = [line.split() for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:")]
    assert device.num_bytes == int(total[1]) << 10
    assert (device.name, device.is_gpu) == ("NVIDIA GB10 (memory of the machine: it reports none of its own)", True)


def test_the_smallest_gpu_counts(answer, monkeypatch):
    answer("81559, NVIDIA H100 80GB HBM3", "24576, NVIDIA L4")
    assert find_device() == Device("NVIDIA L4", 24 << 30, is_gpu=True)
    answer("NVIDIA-SMI has failed", code=9)
    total = int(subprocess.check_output(["awk", "/MemTotal/ {print $2}", "/proc/meminfo"])) << 10
    assert find_device() == Device("this machine, without a GPU", total, is_gpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not find_device().is_gpu
