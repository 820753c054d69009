"""The model that is trained: load it, keep its training mode free of noise, save it.

What is saved is a folder that transformers and vLLM load: new weights, each tensor in the dtype that it has in the source,
everything else of the source (config, tokenizer, chat template, generation config) copied byte for byte. Not here: finding the
folder (`hub.py`), reading it (`checkpoint.py`).
"""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from train.config import LoraSection, ModelConfig
from train.model.attention.packed import PACKED
from train.model.checkpoint import (
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    in_float32,
    load_checkpoint,
    load_model_config,
    load_skeleton,
    restore_dtypes,
)
from train.model.elementwise import Kernels, enter_bfloat16
from train.model.foreign import unwrap_adapters
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
    kernels: Kernels = field(default_factory=dict)
    """See `use_kernels`."""

    def findings(self) -> "Findings":
        """Return what another process needs to make the same policy without its weights."""
        return Findings(self.not_packed, self.kernels, dict(self.model.named_buffers()))


@dataclass(frozen=True)
class Findings:
    """What was found out about a policy by running it, and its buffers, which no process sends when a model is split."""

    not_packed: str | None
    kernels: Kernels
    buffers: Mapping[str, Tensor]


def load_policy(
    folder: Path,
    config: ModelConfig,
    lora: LoraSection | None = None,
    *,
    attributions: bool = False,
    one_dtype: bool = False,
    findings: Findings | None = None,
) -> Policy:
    """Load a model for training, without noise.

    What is trained is in float32. Frozen parameters under adapters are in 4 bits if quantised, and in bfloat16 if the forward
    pass and the files are.

    Args:
        folder: Of the model.
        config: See `ModelConfig`.
        lora: Adapters to train.
        attributions: Pack it only if packed attributions are right too.
        one_dtype: Hold all parameters in float32, as FSDP2 wants them.
        findings: Of the process that has the weights. The model gets none then, see `load_skeleton`, and is not run.

    Raises:
        InputError: It cannot be loaded, lacks weights, computes its logits in a way that we do not know, lacks the layers that
            `lora` names, or cannot do what `model.gradient_checkpointing` or `model.compile` ask for.
        MissingExtraError: `model.quantization` or `[lora]` need a package that is not installed.
    """
    quantization = {"quantization_config": _nf4_settings()} if config.quantization == "nf4" else {}
    is_half = lora is not None and not one_dtype and not quantization and config.dtype == "bfloat16"
    is_half = is_half and load_model_config(folder).get_text_config().dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_half else torch.float32
    model = load_checkpoint(folder, dtype=dtype, **quantization) if findings is None else load_skeleton(folder, dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes would pack 4-bit weights for inference at the first forward pass in eval
            # mode, permanently, and no gradient flows through packed weights.
            module.support_avx512bf16_for_cpu = False
    attention = str(model.config._attn_implementation)
    if findings is None:
        with in_float32(model) if is_half else nullcontext():
            not_packed = _try_layouts(model, config, attributions=attributions)
    else:
        not_packed = findings.not_packed
        if not_packed is None:
            model.set_attn_implementation(PACKED)
    kernels = None if findings is None else findings.kernels
    if config.dtype == "bfloat16":
        kernels = enter_bfloat16(model, fuse=not config.compile, kernels=kernels)
    if config.gradient_checkpointing and not enable_checkpointing(model):
        raise InputError(f"model.gradient_checkpointing: {type(model).__name__} cannot do that; leave it out")
    trained = model if lora is None else add_adapters(model, lora)
    switch_off_noise(trained)
    if config.compile and not hasattr(model.base_model, "layers"):
        raise InputError(f"model.compile: {type(model).__name__} has no list of layers to compile; leave it out")
    if findings is not None:
        for name, buffer in trained.named_buffers():
            buffer.copy_(findings.buffers[name])
    return Policy(trained, not_packed, attention, kernels or {})


def _try_layouts(model: PreTrainedModel, config: ModelConfig, *, attributions: bool) -> str | None:
    """Check the output layer, and pack if that changes nothing; return why it is not packed, see `enable_packing`."""
    rounds = config.quantization != "none"  # 4-bit layers compute in bfloat16, so there is rounding in what is compared
    check_output_layer(model, rounds=rounds)
    if not config.packing:
        return "model.packing is false"
    return enable_packing(model, attributions=attributions, rounds=rounds)


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of a policy. Its layout is tried before, with two kinds of attention that would both be compiled."""
    for layer in unwrap_adapters(model).base_model.layers:
        layer.compile(dynamic=True)


def load_reference(folder: Path, config: ModelConfig, policy: Policy) -> nn.Module:
    """Load the frozen reference model, the one that `policy` starts from, in the dtype of the forward pass.

    It is loaded in that dtype, not cast to it: transformers keeps some tensors in float32, such as the frequencies of rotary
    embeddings, and a reference with rounded frequencies drifts away from the policy with every position.

    Raises:
        InputError: It cannot be loaded, or lacks weights.
    """
    model = load_checkpoint(folder, dtype=getattr(torch, config.dtype))
    if policy.not_packed is None:
        model.set_attn_implementation(PACKED)  # probed with the policy, which has the same weights
    return model.requires_grad_(False)


def enable_checkpointing(model: nn.Module) -> bool:
    """Let layers keep their inputs alone and compute the rest again; return whether that changes anything.

    False: they do so already, or the model cannot.
    """
    causal_lm = unwrap_adapters(model)
    if causal_lm.is_gradient_checkpointing:
        return False
    try:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        return False
    return True


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


def switch_off_noise(model: nn.Module) -> None:
    """Make `model.train()` compute what `model.eval()` does: policy and stored reference must be the same function.

    Dropout, router jitter, layer drop and whatever else a family does in training only is off, since the modules stay in
    evaluation mode. Two kinds do not: the model itself, which trainers ask for its mode, and layers with gradient checkpointing
    (not the modules inside them), since transformers recomputes a layer only in training mode. So dropout rates are set to 0
    too, also in the config that such a layer reads (Falcon's), which is a copy from then on. The model's config is left alone:
    the saved model keeps the rates of its source.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
        config = vars(module).get("config")
        if isinstance(module, GradientCheckpointingLayer) and isinstance(config, PreTrainedConfig):
            module.config = copy(config)
            _zero_dropout(module.config)
    model.train = MethodType(_train_without_noise, model)  # type: ignore[method-assign]


def _zero_dropout(owner: nn.Module | PreTrainedConfig) -> None:
    for name, value in vars(owner).items():
        if "drop" in name and isinstance(value, float):
            setattr(owner, name, 0.0)


def _train_without_noise(model: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(model, mode=False)
    model.training = mode  # trainers ask the model which mode they have set
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = mode
    return model


def save_policy(
    model: PreTrainedModel, lora: LoraSection | None, source_folder: Path, target: Path, base_name: str | None = None
) -> None:
    """Write the trained model to `target`, an empty folder, each tensor in the dtype that it has in `source_folder`.

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
        model.cpu()  # where there is room for all parameters in float32
        with in_float32(
            model.get_base_model()
        ):  # else the update would be rounded before it is added, and once more after
            model = model.merge_and_unload()
    restore_dtypes(model, source_folder)
    model.save_pretrained(target)
    for pattern in _COPIED:
        for path in source_folder.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)
    for path in target.glob("*.safetensors"):
        path.chmod((target / "config.json").stat().st_mode)  # safetensors lets only the owner read
