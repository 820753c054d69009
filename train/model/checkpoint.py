"""Load the model of a folder with transformers: config, tokenizer, all weights, or an error. Compare it with a dataset.

No code that lies in a model folder ever runs: `trust_remote_code` is False at every call, because transformers asks on the
terminal if it is left out; and weights are safetensors, never pickles.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from weights_store.errors import InputError, MismatchError
from weights_store.fingerprint import fingerprint_chat_template, fingerprint_tokenizer, load_json
from weights_store.messages import first_line

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from train.data.dataset import WeightSource

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
)
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")


def load_model_config(folder: Path) -> "PretrainedConfig":
    """Return the config of the model in a folder.

    Raises:
        InputError: It cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise for files that are not what they should be
        raise InputError(f"cannot read the config of the model in {folder}: {why_not_loaded(error)}") from error


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model folder.

    Raises:
        InputError: It cannot be loaded.
    """
    if (
        find_spec("torch") is None
    ):  # as in the environment of the flows: transformers would warn of it when it is imported
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # see above
        raise InputError(f"model {folder}: its tokenizer cannot be loaded: {why_not_loaded(error)}") from error


def load_light_tokenizer(folder: Path) -> "Tokenizer | PreTrainedTokenizerBase":
    """Return the tokenizer of a model folder to look tokens up in, without transformers if `tokenizer.json` says it all.

    Importing transformers takes longer than a build with nothing to do.

    Raises:
        InputError: It cannot be loaded.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return load_tokenizer(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"model {folder}: its tokenizer cannot be loaded: {why_not_loaded(error)}") from error
    largest = max(_added_ids(folder), default=0)
    return tokenizer if largest < tokenizer.get_vocab_size() else load_tokenizer(folder)


def _added_ids(folder: Path) -> Iterator[int]:
    """Yield the ids of tokens that transformers adds to those of `tokenizer.json`, or finds there."""
    if (folder / "tokenizer_config.json").is_file():
        yield from map(int, load_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}))
    if (folder / "added_tokens.json").is_file():
        yield from load_json(folder / "added_tokens.json").values()


def why_not_loaded(error: BaseException | str) -> str:
    """Return in one line why a library cannot load something of a model folder."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own (auto_map), which is never run; give a model that transformers knows"
    return first_line(error)


def load_checkpoint(folder: Path, **options: Any) -> "PreTrainedModel":
    """Return the language model of a folder on the CPU, in evaluation mode; `options` are those of `from_pretrained`.

    Raises:
        InputError: It cannot be loaded, a file of it is damaged, or it lacks weights, which transformers would fill with random
            numbers.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if getattr(load_model_config(folder).get_text_config(), "attn_logit_softcapping", None):
        # Gemma 2: transformers' default attention leaves the soft-capping out without a warning.
        options = {"attn_implementation": "eager", **options}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except SafetensorError as error:
        raise InputError(
            f"{_damaged_file(folder)} is not a whole safetensors file: {first_line(error)}; copy or download it again"
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise InputError(f"transformers cannot load the model {folder}: {why_not_loaded(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"the model {folder} lacks weights; they would be random: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    return model.eval()


def load_skeleton(folder: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """Return the model of a folder without its weights, for a process that gets them from another one.

    Its parameters and buffers lie on the CPU and have no values. They take no memory either, until something is written.

    Raises:
        InputError: See `load_checkpoint`.
    """
    model = load_checkpoint(folder, dtype=dtype, device_map="meta")
    model.to_empty(device="cpu")
    model.tie_weights()  # the line before gives shared parameters a memory each
    return model


def _damaged_file(folder: Path) -> Path:
    """Return the first file of a model that safetensors cannot open; its errors do not say which one it is."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path
    return folder


def restore_dtypes(model: "PreTrainedModel", folder: Path) -> None:
    """Cast every tensor of a model, in place, to the dtype that it has in `folder`, the model that it was loaded from.

    That is the dtype in which transformers loads it: not the same for all tensors, since some families keep routers or biases
    in float32. Where the file itself is more precise, so is the result: other readers, such as vLLM, may use it.

    Raises:
        InputError: The folder cannot be loaded.
    """
    import torch

    skeleton = load_checkpoint(folder, dtype="auto", device_map="meta")  # reads dtypes, holds no weights
    dtypes = {name: tensor.dtype for name, tensor in _named_tensors(skeleton)}
    for name, dtype in _dtypes_of_files(folder):
        if name in dtypes:  # files may hold a tensor under other names, or in parts
            dtypes[name] = torch.promote_types(dtypes[name], dtype)
    for name, tensor in _named_tensors(model):
        tensor.data = tensor.data.to(dtypes.get(name, skeleton.dtype))


@contextmanager
def in_float32(model: "PreTrainedModel") -> Iterator[None]:
    """Hold a model in float32 inside, where rounding cannot hide what a probe looks for; afterwards it is what it was.

    `model.to(dtype)` would not bring it back: it rounds what transformers keeps in float32.
    """
    stored = [(tensor, tensor.dtype) for _, tensor in _named_tensors(model) if tensor.dtype.itemsize < 4]
    for tensor, _ in stored:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in stored:
            tensor.data = tensor.data.to(dtype)


def _named_tensors(model: "PreTrainedModel") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield parameters and buffers of floating point."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())


def _dtypes_of_files(folder: Path) -> Iterator[tuple[str, "torch.dtype"]]:
    import torch
    from safetensors import safe_open

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
        yield from ((name, known[kind]) for name, kind in kinds.items() if kind in known)


def check_model_fits(folder: Path, source: "WeightSource", *, is_reference: bool = True) -> int:
    """Compare tokenizer and vocabulary with those of the dataset; return the size of the model's vocabulary.

    A model that need not be the reference may have another number of ids for the same tokenizer: families pad their embeddings
    differently. Whether it has all ids of a row is checked when the row is read.

    Raises:
        InputError: The folder holds no tokenizer or its config cannot be read.
        MismatchError: The dataset was tokenised with another tokenizer or vocabulary, or does not say with which.
    """
    recorded = source.metadata.get("tokenizer")
    if not recorded:
        raise MismatchError(f"{source.name} does not record its tokenizer; rebuild it with `tokenweights build`")
    tokenizer, template = fingerprint_tokenizer(folder), fingerprint_chat_template(folder)
    # With a chat template of the recipe's own, the recorded one says nothing about the folder's.
    own_template = recorded.get("rendering", recorded["fingerprint"]) == recorded["fingerprint"]
    if tokenizer != recorded["fingerprint"] and own_template and template != recorded.get("chat_template", template):
        raise MismatchError(
            f"{source.name} was rendered with chat template {_short(recorded['chat_template'])}, the model in {folder} has "
            f"{_short(template)}: it would learn another format than it will be asked in. Train a model with the same "
            "template, or build the dataset again for this model"
        )
    if tokenizer != recorded["fingerprint"]:
        raise MismatchError(
            f"{source.name} was tokenised with tokenizer {recorded['fingerprint'][:12]}, the model in {folder} has "
            f"{tokenizer[:12]}: its ids would mean other text. Train a model with the same tokenizer files, or build the "
            "dataset again for this model"
        )
    vocab_size = int(load_model_config(folder).get_text_config().vocab_size)
    if is_reference and vocab_size != recorded["vocab_size"]:
        raise MismatchError(
            f"{source.name} was scored with a vocabulary of {recorded['vocab_size']} ids, the model in {folder} has "
            f"{vocab_size}; train the model that it was built for, or build the dataset again for this model"
        )
    return vocab_size


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
