"""The model that is trained: find it, refuse it where it does not fit the dataset, load it, save it.

What is saved is a folder that transformers and vLLM load: new weights in the dtype of the source, everything else of the
source (config, tokenizer, chat template, generation config) copied byte for byte.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ModelConfig
from train.dataset import WeightSource
from weights_store.errors import InputError, MismatchError
from weights_store.fingerprint import fingerprint_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
)
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def find_model(config: ModelConfig) -> Path:
    """Return the local folder of a model; a hub id is downloaded (or taken from the cache) first.

    Raises:
        InputError: There is no such folder and no such model on the hub, or the hub cannot be reached.
    """
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.path={config.path!r} is not a model folder: it has no config.json")
        return folder
    return _download(config)


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=list(_DOWNLOADED)))
    except HFValidationError as error:
        raise InputError(f"model.path={config.path!r}: there is no such folder, and it is no id on the hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model.path={config.path!r}: there is no such folder, and it cannot be had from the hub "
            f"(revision {config.revision or 'main'}): {reason}"
        ) from error


def check_model_fits(folder: Path, source: WeightSource) -> int:
    """Compare tokenizer and vocabulary with those of the dataset; return the size of the vocabulary.

    Raises:
        InputError: The folder holds no tokenizer or its config cannot be read.
        MismatchError: The dataset was tokenised with another tokenizer or vocabulary, or does not say with which.
    """
    recorded = source.metadata.get("tokenizer")
    if not recorded:
        raise MismatchError(f"{source.name} does not record its tokenizer; rebuild it with `tokenweights build`")
    tokenizer = fingerprint_tokenizer(folder)
    if tokenizer != recorded["fingerprint"]:
        raise MismatchError(
            f"{source.name} was tokenised with tokenizer {recorded['fingerprint'][:12]}, the model in {folder} has "
            f"{tokenizer[:12]}: its ids would mean other text. Train a model with the same tokenizer files and chat "
            "template, or build the dataset again for this model"
        )
    vocab_size = int(_load_config(folder).get_text_config().vocab_size)
    if vocab_size != recorded["vocab_size"]:
        raise MismatchError(
            f"{source.name} was scored with a vocabulary of {recorded['vocab_size']} ids, the model in {folder} has "
            f"{vocab_size}; train the model that it was made for, or build the dataset again for this model"
        )
    return vocab_size


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the config of the model in {folder}: {error}") from error


def load_policy(folder: Path) -> "PreTrainedModel":
    """Load a model for training: parameters in float32, dropout off.

    Raises:
        InputError: It cannot be loaded, lacks weights, or computes its logits in a way that we do not know.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from train.logps import check_output_layer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the model in {folder}: {error}") from error
    if report["missing_keys"]:
        raise InputError(
            f"the model in {folder} lacks weights, they would be random: {', '.join(sorted(report['missing_keys'])[:3])} "
            f"({len(report['missing_keys'])} in all)"
        )
    disable_dropout(model)
    check_output_layer(model.eval())
    return model  # type: ignore[no-any-return]


def disable_dropout(model: "nn.Module") -> None:
    """Set every dropout rate in `model` to 0: policy and stored reference must see the same function.

    The config is left alone, so that the saved model keeps the rates of its source.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save_policy(model: "PreTrainedModel", source_folder: Path, target: Path) -> None:
    """Write the trained model to `target`, an empty folder, in the dtype that its config states (else float32).

    `model` is converted in place and of no use for training afterwards.
    """
    import torch

    config = _load_config(source_folder)
    model.to(config.dtype or torch.float32)
    model.save_pretrained(target)
    for pattern in _COPIED:
        for path in source_folder.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)
    for path in target.glob("*.safetensors"):
        path.chmod((target / "config.json").stat().st_mode)  # safetensors writes for the owner alone
