"""LoRA adapters become whole models: against W + scale * B * A by hand, and against PEFT's own forward pass."""

import json
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.models.lora import merge_adapter, merged_fingerprint, problem_of_merged
from pipeline.models.resolve import resolve_model
from pipeline.recipe import ModelSection
from weights_store.checks.model_folders import sign_record
from weights_store.errors import InputError, MissingExtraError
from weights_store.fingerprint import fingerprint_file
from weights_store.processes.lock import locked

VOCAB_SIZE = 101
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])
RANK, ALPHA = 4, 12  # scale = alpha / rank = 3


@pytest.fixture(scope="session")
def bases(tmp_path_factory, toy_model):
    """Return a function that gives a random Llama's folder with the toy model's tokenizer: `bases(tied, dtype)`."""
    folder = tmp_path_factory.mktemp("bases")

    def base(tied=False, dtype=torch.float32):
        made = folder / f"{tied}-{dtype}"
        if not made.exists():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES)).to(dtype).save_pretrained(made)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(toy_model / name, made / name)
        return made

    return base


@pytest.fixture
def make_adapter(tmp_path):
    """Return a function that saves a LoRA adapter with random weights and returns its folder."""
    from peft import LoraConfig, get_peft_model

    def make(base, named=None, name="adapter", seed=1, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings: what some of the tests are about
            config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"} | settings)
            torch.manual_seed(seed)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(tmp_path / name)
        _rename_base(tmp_path / name, named or base)
        return tmp_path / name

    return make


def _rename_base(adapter, base):
    _edit(adapter, base_model_name_or_path=str(base))


def _edit(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@torch.no_grad()
def _logps(model):
    return model.eval()(IDS).logits.float().log_softmax(-1)


def _of_peft(base, adapter):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _logps(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_merged_weights_are_w_plus_scale_times_b_times_a(bases, make_adapter, tmp_path):
    base = bases()
    adapter = make_adapter(base, target_modules=["q_proj"])
    merge_adapter(adapter, base, tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    change = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        expected = weight
        if "q_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            expected = weight + 3.0 * change[f"{key}.lora_B.weight"] @ change[f"{key}.lora_A.weight"]
            assert (expected - weight).abs().mean() > 0.01
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "use_rslora": True, "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 14]},
    ],
    ids=["layers", "head-saved", "head", "embeddings", "tied-adapter", "rslora-dora", "tokens"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_model_gives_the_log_probs_of_base_and_adapter(bases, make_adapter, tmp_path, tied, settings):
    base = bases(tied)
    adapter = make_adapter(base, **settings)
    merge_adapter(adapter, base, tmp_path / "merged")
    expected = _of_peft(base, adapter)
    assert (expected - _logps(AutoModelForCausalLM.from_pretrained(base))).abs().mean() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logps(merged), expected, rtol=0, atol=1e-4)


def test_merging_waits_for_the_process_that_merges_the_same(bases, make_adapter, tmp_path):
    base = bases(False)
    adapter, target = make_adapter(base, target_modules=["q_proj"]), tmp_path / "merged"
    (tmp_path / ".merged.partial").mkdir()
    (tmp_path / ".merged.partial" / "model.safetensors").write_text("left by a process that was killed")
    with ThreadPoolExecutor(1) as executor:
        with locked(tmp_path / ".merged.lock", pytest.fail):
            second = executor.submit(merge_adapter, adapter, base, target)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            assert not target.exists()
        second.result(timeout=60)
    assert load_file(target / "model.safetensors")
    changed_ns = (target / "model.safetensors").stat().st_mtime_ns
    merge_adapter(adapter, base, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == changed_ns  # it was there
    assert not list(tmp_path.glob(".merged*"))


def test_merge_that_changes_what_it_should_not_is_noticed(bases, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.lora.untie_changed_embeddings", lambda model: None)  # as PEFT does it alone
    base = bases(tied=True)
    adapter = make_adapter(base, target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"log-probs differ from base and adapter by .* expected at most 0\.001"):
        merge_adapter(adapter, base, tmp_path / "merged")
    assert list(tmp_path.glob("*merged*")) == []


def test_merged_model_is_stored_in_the_dtype_of_the_base(bases, make_adapter, tmp_path):
    base = bases(dtype=torch.bfloat16)
    merge_adapter(make_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"]), base, tmp_path / "merged")
    assert {weight.dtype for weight in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merging_leaves_alone_what_transformers_keeps_in_float32(bases, make_adapter, tmp_path):
    """DeepSeek-V3 has biases of its routers in float32, whatever the dtype of the rest."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).to(torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = torch.randn(8)
    model.get_submodule(bias.rpartition(".")[0]).e_score_correction_bias = exact
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bases() / name, tmp_path / "base" / name)
    adapter = make_adapter(tmp_path / "base", target_modules=["o_proj"])
    merge_adapter(adapter, tmp_path / "base", tmp_path / "merged")
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    assert torch.equal(merged[bias], exact)
    changed = {
        name for name in base if merged[name].dtype != base[name].dtype or not torch.equal(merged[name], base[name])
    }
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}


def test_tokenizer_and_template_are_the_adapters_where_it_has_them_else_the_bases(bases, make_adapter, tmp_path):
    base = bases()
    adapter = make_adapter(base, target_modules=["q_proj"])
    merge_adapter(adapter, base, tmp_path / "one")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (base / name).read_bytes()
    (adapter / "chat_template.jinja").write_text("{{ bos_token }}another")
    merge_adapter(adapter, base, tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "{{ bos_token }}another"
    own = json.loads((base / "tokenizer.json").read_text()) | {"added_by": "the adapter"}
    (adapter / "tokenizer.json").write_text(json.dumps(own))
    merge_adapter(adapter, base, tmp_path / "three")
    assert json.loads((tmp_path / "three" / "tokenizer.json").read_text()) == own
    assert not (tmp_path / "three" / "tokenizer_config.json").exists()  # never files of both


def test_adapter_folder_is_resolved_to_a_merged_model_once(bases, make_adapter, tmp_path, monkeypatch, logged):
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    base = bases()
    adapter = make_adapter(base, target_modules=["q_proj"])
    folder = resolve_model(ModelSection(path=str(adapter)))
    assert folder.parent == tmp_path / "cache" / "merged"
    torch.testing.assert_close(
        _logps(AutoModelForCausalLM.from_pretrained(folder)), _of_peft(base, adapter), rtol=0, atol=1e-4
    )
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = shutil.copytree(adapter, tmp_path / "moved")  # the same content elsewhere is the same model
    assert resolve_model(ModelSection(path=str(moved))) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert [line.partition(" ")[0] for line in logged.lines] == ["merging", "using", "using"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one weight
    assert resolve_model(ModelSection(path=str(adapter))) == folder
    assert weights.read_bytes() == whole
    assert f"{folder}: model.safetensors is damaged: its SHA-256 is " in "\n".join(logged.lines)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "merged.json"])
def test_each_flipped_bit_of_a_merged_model_is_noticed(tmp_path, name):
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text('{"a": 1}')
    files = {path.name: fingerprint_file(path) for path in tmp_path.iterdir()}
    (tmp_path / "merged.json").write_bytes(sign_record({"adapter": "a", "base": "b"}, files))
    assert problem_of_merged(tmp_path) is None
    whole = (tmp_path / name).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(flipped)
        assert problem_of_merged(tmp_path).startswith(f"{name} is damaged: "), bit


def test_name_of_the_merged_model_follows_what_determines_it(bases, make_adapter, toy_model):
    base = bases()
    names = [merged_fingerprint(make_adapter(base, target_modules=["q_proj"]), base)]
    names += [merged_fingerprint(make_adapter(base, name="seed", seed=2, target_modules=["q_proj"]), base)]
    adapter = make_adapter(base, name="same", target_modules=["q_proj"])
    names += [merged_fingerprint(adapter, bases(dtype=torch.bfloat16))]
    _edit(adapter, lora_alpha=1)
    names += [merged_fingerprint(adapter, base)]
    _edit(adapter, lora_alpha=ALPHA)
    (adapter / "chat_template.jinja").write_text("another")
    names += [merged_fingerprint(adapter, base)]
    (adapter / "chat_template.jinja").unlink()
    assert len(set(names)) == len(names)
    _rename_base(adapter, "elsewhere")
    assert merged_fingerprint(adapter, base) == names[0]


def test_base_is_found_relative_to_the_adapter(bases, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(bases(), tmp_path / "the-base")
    adapter = make_adapter(bases(), "../the-base", target_modules=["q_proj"])
    merged = tmp_path / "cache" / "merged" / merged_fingerprint(adapter, bases())[:16]
    merged.mkdir(parents=True)
    (merged / "merged.json").write_bytes(sign_record({}, {}))
    assert resolve_model(ModelSection(path=str(adapter))).is_dir()  # there already: found without merging


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_model_name_or_path": "/no/such/base"},
            "adapter .* base_model_name_or_path /no/such/base does not exist",
        ),
        (
            {"base_model_name_or_path": "models/none"},
            "base_model_name_or_path 'models/none' is not a local folder, and it could",
        ),
        (
            {"base_model_name_or_path": None},
            "does not name its base: set base_model_name_or_path in adapter_config.json",
        ),
        ({"peft_type": "PROMPT_TUNING"}, "is of type PROMPT_TUNING; only LORA can be merged"),
        ({"task_type": "SEQ_CLS"}, "is for the task SEQ_CLS, expected CAUSAL_LM"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication"),
    ],
)
def test_adapter_that_cannot_be_merged_is_refused_in_one_line(bases, make_adapter, settings, message):
    adapter = make_adapter(bases(), target_modules=["q_proj"])
    _edit(adapter, **settings)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(ModelSection(path=str(adapter)))
    assert "\n" not in str(caught.value)


def test_adapter_without_weights_or_beside_a_whole_model_is_refused(bases, make_adapter, tmp_path):
    adapter = make_adapter(bases(), target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    with pytest.raises(InputError, match=r"holds an adapter .* and a model \(model.safetensors\); keep one"):
        resolve_model(ModelSection(path=str(adapter)))
    (adapter / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        resolve_model(ModelSection(path=str(adapter)))


def test_broken_weights_of_an_adapter_are_one_line_and_leave_nothing(bases, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(bases(), target_modules=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        InputError, match=rf"^{weights} is not whole: its header says [\d,]+ bytes, the file has 1,000; "
    ):
        resolve_model(ModelSection(path=str(adapter)))
    assert not (tmp_path / "cache").exists()


def _resized(weights):
    key = "base_model.model.lm_head.weight"
    return weights | {key: torch.cat([weights[key], weights[key][:3]])}


def _lacking(weights):
    return {name: weight for name, weight in weights.items() if "layers.1" not in name}


def _of_another_model(weights):
    return {name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}


def _broken(weights):
    return {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_resized, r"do not fit: size mismatch for .*lm_head.*\[104, 64\].*was the vocabulary resized"),
        (_lacking, r"do not fit: 2 weights have no counterpart, for example .*layers\.1"),
        (_of_another_model, r"do not fit: 4 weights have no counterpart, for example .*layers\.1"),
        (_broken, "cannot be merged: NaNs detected"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(bases, make_adapter, tmp_path, spoil, message):
    base = bases()
    adapter = make_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_file(spoil(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        merge_adapter(adapter, base, tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_layers_that_the_base_does_not_have_are_refused(bases, make_adapter, tmp_path):
    adapter = make_adapter(bases(), target_modules=["q_proj"])
    _edit(adapter, target_modules=["c_attn"])
    with pytest.raises(InputError, match="do not fit: Target modules .*c_attn.* not found"):
        merge_adapter(adapter, bases(), tmp_path / "merged")


def test_missing_peft_is_named(bases, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(bases(), target_modules=["q_proj"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"'peft', which is not installed; pip install 'tokenweights\[train\]'"):
        resolve_model(ModelSection(path=str(adapter)))


def test_whole_models_are_taken_as_they_are(bases, tmp_path):
    assert resolve_model(ModelSection(path=str(bases()))) == Path(bases())
    with pytest.raises(InputError, match="has no config.json: not a model folder"):
        resolve_model(ModelSection(path=str(tmp_path)))
