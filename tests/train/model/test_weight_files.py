"""Weight files that are not whole are refused by their headers, before anything is loaded."""

import json
import re
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from train.model.hub import check_model_folder
from weights_store.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665ea4e\nsize 988097824\n"


@pytest.fixture
def folder(tmp_path):
    """A model of two shards with an index."""
    (tmp_path / "config.json").write_text("{}")
    shards = {"model-1.safetensors": {"a": [2, 3]}, "model-2.safetensors": {"b": [4], "c": [5, 6]}}
    for name, tensors in shards.items():
        save_file({tensor: np.ones(shape, np.float32) for tensor, shape in tensors.items()}, tmp_path / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.fixture
def single(tmp_path):
    """A model of one file: 24 bytes of numbers after a header of 64."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones([2, 3], np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def problem(folder):
    with pytest.raises(InputError) as caught:
        check_model_folder(folder, "model.path")
    text = str(caught.value)
    assert text.startswith("model.path: ")
    assert "\n" not in text
    return text.removeprefix("model.path: ").replace(f"{folder}/", "")


def test_whole_files_pass(folder):
    assert check_model_folder(folder, "model.path") == folder


def test_a_missing_shard_is_named(folder):
    (folder / "model-2.safetensors").unlink()
    expected = "model.safetensors.index.json names 2 files, of which 1 are missing, for example model-2.safetensors"
    assert problem(folder).startswith(expected)


def test_a_shard_of_another_revision_is_named(folder):
    save_file({"b": np.ones(4, np.float32)}, folder / "model-2.safetensors")
    assert problem(folder).startswith("model-2.safetensors lacks tensors that the index says it has, for example c;")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_an_index_that_is_damaged_is_named(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in problem(folder)


def test_half_a_file_is_told_by_its_size(single):
    path = single / "model.safetensors"
    data = path.read_bytes()
    num_bytes = 8 + struct.unpack("<Q", data[:8])[0] + 4 * 2 * 3
    assert len(data) == num_bytes
    path.write_bytes(data[:-10])
    expected = f"model.safetensors is not whole: its header says {num_bytes} bytes, the file has {num_bytes - 10};"
    assert problem(single).startswith(expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"<!DOCTYPE html><p>not found",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_what_is_no_safetensors_file_is_named_with_its_size(single, data):
    (single / "model.safetensors").write_bytes(data)
    assert re.match(rf"model\.safetensors is not whole: .+, the file has {len(data)}; download", problem(single))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_apart(single, name):
    (single / name).write_text(POINTER)
    expected = f"{name} is a git-LFS pointer to a file of 988097824 bytes, not that file; run `git lfs pull`"
    assert problem(single).startswith(expected)


def test_a_folder_without_weights_is_refused(single):
    (single / "model.safetensors").unlink()
    assert problem(single).startswith(f"no weight files in {single}; expected model.safetensors, ")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_no_weights(single, name):
    (single / "model.safetensors").rename(single / name)
    assert problem(single).startswith(f"no weight files in {single}; expected model.safetensors, or ")
    assert problem(single).endswith(
        f"({name} is a pickle, which can run code, so it is not read: save it as safetensors)"
    )


def test_files_that_nobody_loads_do_not_matter(folder):
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "consolidated.safetensors").write_text(POINTER)
    assert check_model_folder(folder, "model.path") == folder


def test_a_hundred_gib_are_checked_in_less_than_a_second(single):
    num_bytes = 100 << 30
    header = json.dumps({"a": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}).encode()
    with (single / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)  # sparse: it takes no room
    started = time.monotonic()
    check_model_folder(single, "model.path")
    assert time.monotonic() - started < 1
