"""Check that the weight files of a model folder are whole: by headers and sizes, so that 100 GB cost milliseconds.

Called for every folder that a build, a plan or a training starts from. It sees half a download, a git-LFS pointer and a missing
shard. It does not see flipped bytes, nor NaN in the weights: for that, every byte would have to be read.

Only safetensors are read. Files of torch.save (`pytorch_model.bin`) are pickles: loading one can run code, and nothing in their
header tells whether they are whole.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.messages import first_line

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_EXPECTED = f"{_SINGLE}, or {_INDEX} with its files"
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024


def check_weight_files(folder: Path, setting: str) -> None:
    """Check the weight files that transformers and vLLM would load from a folder.

    Args:
        folder: Of a whole model.
        setting: Where the folder is from, for messages.

    Raises:
        InputError: There are none, one is missing or not whole, or something in the folder is a git-LFS pointer.
    """
    try:
        _check_pointers(folder)
        for path, tensors in _wanted_files(folder):
            check_safetensors(path, tensors)
    except InputError as error:
        raise InputError(f"{setting}: {error}") from error


def check_safetensors(path: Path, tensors: frozenset[str] = frozenset()) -> None:
    """Check that a safetensors file is as long as its header says, and has the named tensors.

    Raises:
        InputError: It is not, or is no such file.
    """
    _check_pointer(path)
    try:
        with safe_open(path, "np") as file:
            missing = tensors.difference(file.keys())
    except SafetensorError as error:
        num_bytes, stated = path.stat().st_size, _stated_bytes(path)
        problem = first_line(error) if stated is None else f"its header says {stated:,} bytes"
        raise InputError(
            f"{path} is not whole: {problem}, the file has {num_bytes:,}; download or copy it again"
        ) from error
    if missing:
        raise InputError(
            f"{path} lacks tensors that the index says it has, for example {min(missing)}; download all files of "
            "the same revision again"
        )


def _wanted_files(folder: Path) -> Iterator[tuple[Path, frozenset[str]]]:
    """Yield each file that would be loaded, with the tensors that an index says are in it."""
    if (folder / _SINGLE).is_file():
        yield folder / _SINGLE, frozenset()
    if (folder / _INDEX).is_file():
        yield from _files_of_index(folder / _INDEX)
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        return
    others = sorted(folder.glob("*.safetensors"))  # vLLM loads whatever ends so
    if not others:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        only = " ({} is a pickle, which can run code, so it is not read: save it as safetensors)"
        raise InputError(
            f"no weight files in {folder}; expected {_EXPECTED}{only.format(pickles[0]) if pickles else ''}"
        )
    yield from ((path, frozenset()) for path in others)


def _files_of_index(index: Path) -> Iterator[tuple[Path, frozenset[str]]]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download it again")
    tensors: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        tensors.setdefault(str(name), set()).add(tensor)
    missing = sorted(name for name in tensors if not (index.parent / name).is_file())
    if others := sorted(name for name in tensors if not name.endswith(".safetensors")):
        raise InputError(f"{index} names {others[0]}, expected *.safetensors files only: other files can run code")
    if missing:
        raise InputError(
            f"{index} names {len(tensors)} files, of which {len(missing)} are missing, for example {missing[0]}; "
            "download or copy them"
        )
    yield from ((index.parent / name, frozenset(names)) for name, names in sorted(tensors.items()))


def _check_pointers(folder: Path) -> None:
    """Check the small files: git-LFS keeps large tokenizers too."""
    for pattern in ("*.json", "*.model", "*.tiktoken"):
        for path in sorted(folder.glob(pattern)):
            _check_pointer(path)


def _check_pointer(path: Path) -> None:
    if path.stat().st_size > _MAX_POINTER_BYTES:
        return
    text = path.read_bytes()
    if text.startswith(_POINTER):
        size = next((line.split()[1] for line in text.decode().splitlines() if line.startswith("size ")), "?")
        raise InputError(
            f"{path} is a git-LFS pointer to a file of {size} bytes, not that file; run `git lfs pull` in the folder"
        )


def _stated_bytes(path: Path) -> int | None:
    """Return how long a safetensors file is by its header; None if the header cannot be read either."""
    with path.open("rb") as file:
        length = file.read(8)
        if len(length) < 8 or 8 + (size := struct.unpack("<Q", length)[0]) > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return int(8 + size + max(ends, default=0))
        except (ValueError, TypeError, LookupError, AttributeError):
            return None
