"""Model folders that are damaged: one line that names the file. Models that are probed: the same afterwards."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.model.checkpoint import in_float32, load_checkpoint
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
