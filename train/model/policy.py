"""The model that is trained: check that it fits the dataset, load it, save it.

What is saved is a folder that transformers and vLLM load: new weights in the dtype of the source, everything else of the
source (config, tokenizer, chat template, generation config) copied byte for byte. Not here: finding the folder (`hub.py`).
"""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from train.config import LoraSection, ModelConfig
from train.model.checkpoint import TEMPLATE_FILES, TOKENIZER_FILES, load_checkpoint, load_model_config
from train.model.logps import check_output_layer
from train.model.packing import enable_packing
from weights_store.errors import InputError, MissingExtraError

_COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES, *TEMPLATE_FILES)


@dataclass(frozen=True)
class Policy:
    """A model ready for training.

    Args:
        model: Of transformers, or peft's wrapper of one.
        not_packed: Why micro-batches are a padded sequence per response; None if they are packed.
        attention: The attention implementation that the model was loaded with, for its own forward pass.
    """

    model: nn.Module
    not_packed: str | None = None
    attention: str = "sdpa"


def load_policy(
    folder: Path, config: ModelConfig, lora: LoraSection | None = None, *, attributions: bool = False
) -> Policy:
    """Load a model for training: parameters in float32 (4 bits when quantised, then frozen), dropout off.

    With `attributions`, it is packed only if packed attributions are right too.

    Raises:
        InputError: It cannot be loaded, lacks weights, computes its logits in a way that we do not know, or lacks the layers
            that `lora` names.
        MissingExtraError: `model.quantization` or `[lora]` need a package that is not installed.
    """
    model = _load_model(folder, config)
    attention = str(model.config._attn_implementation)
    not_packed = enable_packing(model, attributions=attributions) if config.packing else "model.packing is false"
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = model if lora is None else add_adapters(model, lora)
    if config.compile:
        if not hasattr(model.base_model, "layers"):
            raise InputError(f"model.compile: {type(model).__name__} has no list of layers to compile; leave it out")
        for layer in model.base_model.layers:
            layer.compile(dynamic=True)
    return Policy(trained, not_packed, attention)


def load_reference(folder: Path, config: ModelConfig) -> nn.Module:
    """Load the frozen reference model, the one that training starts from, in the dtype of the forward pass.

    Raises:
        InputError: See `load_policy`.
    """
    model = _load_model(folder, config)
    if config.packing:
        enable_packing(model)
    return model.to(getattr(torch, config.dtype)).requires_grad_(False)


def _load_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """Load a model with dropout off, and check that we compute its log-probs as it does."""
    quantization = {"quantization_config": _nf4_settings()} if config.quantization == "nf4" else {}
    model = load_checkpoint(folder, dtype=torch.float32, **quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes would pack 4-bit weights for inference at the first forward pass in eval
            # mode, permanently, and no gradient flows through packed weights.
            module.support_avx512bf16_for_cpu = False
    disable_dropout(model)
    check_output_layer(model)
    return model


def _nf4_settings() -> BitsAndBytesConfig:
    """Return transformers' settings of 4-bit weights as in QLoRA (arXiv 2305.14314)."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("model.quantization='nf4' needs bitsandbytes; pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapters(model: PreTrainedModel, lora: LoraSection) -> nn.Module:
    """Wrap `model` with peft: its parameters are frozen; the adapters are trained and start at zero.

    Raises:
        InputError: The model has no layers of these names, or shares one of them between input and output.
        MissingExtraError: peft or jinja2 is not installed.
    """
    for package in ("peft", "jinja2"):  # peft writes a model card with jinja2, after the training
        if find_spec(package) is None:
            raise MissingExtraError(f"[lora] needs {package}; pip install 'tokenweights[train]'")
    from peft import LoraConfig, get_peft_model

    tied = model.config.get_text_config().tie_word_embeddings
    shared = {"lm_head", "embed_tokens"} & set(lora.target_modules) if tied else set()
    if shared:  # merging an adapter that was trained on one of the two layers would change both
        raise InputError(
            f"lora.target_modules names {', '.join(sorted(shared))}, which this model shares; leave them out"
        )
    layers = [name for name, _ in model.named_modules()]
    named = [] if isinstance(lora.target_modules, str) else lora.target_modules
    unknown = [name for name in named if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:  # peft ignores them as long as one name is right
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "in_features")}
        raise InputError(
            f"lora.target_modules names {', '.join(unknown)}, which {type(model).__name__} does not have; it has "
            f"{', '.join(sorted(leaves))}"
        )
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"lora.target_modules={lora.target_modules!r}: {error}") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate in `model` to 0: policy and stored reference must see the same function.

    The config is left alone, so that the saved model keeps the rates of its source.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save_policy(
    model: PreTrainedModel, lora: LoraSection | None, source_folder: Path, target: Path, base_name: str | None = None
) -> None:
    """Write the trained model to `target`, an empty folder, in the dtype that its config states (else float32).

    `model` (or peft's wrapper of one) is converted in place and cannot be trained further. Adapters are written to
    `target/adapter`, with `base_name` (None: `source_folder`) as their base, and merged into the model unless `lora.merge` is
    false.
    """
    if lora is not None:
        if base_name is not None:
            model.peft_config["default"].base_model_name_or_path = base_name
        # By default peft asks the hub whether the embeddings were resized.
        model.save_pretrained(target / "adapter", save_embedding_layers=False)
        (target / "adapter" / "README.md").unlink(missing_ok=True)  # peft's template; our card is in the folder above
        if not lora.merge:
            return
        model = model.merge_and_unload()
    model.to(load_model_config(source_folder).dtype or torch.float32)
    model.save_pretrained(target)
    for pattern in _COPIED:
        for path in source_folder.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)
    for path in target.glob("*.safetensors"):
        path.chmod((target / "config.json").stat().st_mode)  # safetensors lets only the owner read
