"""Damaged model folders: one line that names the file. Light tokenizers: as the whole ones. Probed models: unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from train.model.checkpoint import in_float32, load_checkpoint, load_light_tokenizer, load_tokenizer
from weights_store.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in two files."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: LFS_POINTER])
def test_a_damaged_safetensors_file_is_named(folder, damage) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(folder)
    assert said.startswith(f"{path} is not a whole safetensors file: ")
    assert said.endswith("; copy or download it again")


def test_a_file_that_is_missing_is_named(folder) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.unlink()
    assert str(path) in refusal(folder)


def test_a_model_is_in_float32_inside_and_what_it_was_afterwards(folder) -> None:
    model = load_checkpoint(folder, dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    assert {tensor.dtype for tensor in before} == {torch.bfloat16, torch.float32}
    with in_float32(model):
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_probe_in_float32_gives_every_tensor_back_bit_for_bit() -> None:
    model = torch.nn.Module()
    values = {
        dtype: torch.tensor([0.1, 1 / 3], dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    for dtype, value in values.items():
        model.register_buffer(f"in_{dtype}".replace("torch.", ""), value.clone())
    with in_float32(model):
        assert model.in_bfloat16.dtype == torch.float32
    for buffer, value in zip(model.buffers(), values.values(), strict=True):
        assert buffer.dtype == value.dtype
        assert torch.equal(buffer, value)


def test_a_light_tokenizer_gives_the_texts_and_ids_of_the_whole_one(toy_model):
    light, whole = load_light_tokenizer(toy_model), load_tokenizer(toy_model)
    assert isinstance(light, Tokenizer)
    assert light.get_vocab() == whole.get_vocab()
    ids = sorted(light.get_vocab().values())
    texts = (each.decode(ids, skip_special_tokens=False) for each in (light, whole))
    assert next(texts) == next(texts)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_a_tokenizer_with_tokens_outside_its_main_file_is_loaded_by_transformers(toy_model, tmp_path, file):
    folder = shutil.copytree(toy_model, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    new = load_light_tokenizer(folder).get_vocab_size()
    added = {"added_tokens_decoder": {str(new): {"content": "<new>", "special": True}}}
    content = config | added if file == "tokenizer_config.json" else {"<new>": new}
    (folder / file).write_text(json.dumps(content))
    tokenizer = load_light_tokenizer(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if file == "tokenizer_config.json":
        assert tokenizer.decode([new]) == "<new>"


def test_a_damaged_tokenizer_is_named(toy_model, tmp_path):
    folder = shutil.copytree(toy_model, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=rf"^model {folder}: its tokenizer cannot be loaded: "):
        load_light_tokenizer(folder)
