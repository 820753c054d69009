"""How much memory the stages that run a model need, by formula. Called by `plan.py`.

Parameters are counted in the headers of the weight files, so their number is exact for every family and nothing is loaded. The
rest follows from `config.json`. States (weights, gradients, AdamW) are sums; activations are an estimate for decoders with a
gated MLP, not compiled. A model that the formula does not cover gives None, never a guess. Not included: about 1 GB that CUDA
itself takes, and what an allocator wastes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.models.train_section import PairTraining
from train.config import FIRST_TOKENS
from weights_store.errors import InputError
from weights_store.fingerprint import WEIGHT_FILE, load_json

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Per 4-bit weight: half a byte, an 8-bit scale for each 64, and a float32 for each 256 of these (QLoRA, arXiv 2305.14314)."""
_TRAINED_BYTES = 4 + 4 + 8
"""Per trained parameter: itself in float32, its gradient, and AdamW's two moments."""
_SCORED_LOGIT_BYTES = 6
"""Per position of a sequence and token of the vocabulary: logits and their float32 log-softmax, which vLLM computes sequence by
sequence."""
_KEPT_LOGITS, _CHUNK_LOGITS = 1 << 30, 1 << 29
"""Logits that a training on a GPU keeps, and computes at a time (`train/model/logps.py`)."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ATTENTION = {"full_attention", "sliding_attention"}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that its memory follows from."""

    shapes: dict[str, Shape]
    """Of every weight, by name; a matrix that is input and output layer counts once."""
    hidden: int
    num_layers: int
    kv_width: int
    """Size of the keys of one token in one layer; the values have the same."""
    intermediate: int
    vocab: int
    is_half: bool = False
    """Whether its config says bfloat16: then a frozen base is held in it, see `train/model/policy.py`."""

    @classmethod
    def of(cls, folder: Path) -> "ModelSize | None":
        """Return the numbers of the model in a folder; None if the formula does not cover its architecture."""
        try:
            config = load_json(folder / "config.json")
            text = config.get("text_config") or config
            shapes = _read_shapes(folder)
        except (InputError, SafetensorError, OSError):
            return None
        if (config.get("tie_word_embeddings") or text.get("tie_word_embeddings")) and len(shapes) > 1:
            shapes.pop("lm_head.weight", None)
        return cls._of_config(text, shapes) if shapes else None

    @classmethod
    def _of_config(cls, config: dict[str, Any], shapes: dict[str, Shape]) -> "ModelSize | None":
        keys = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        numbers = [number for key in keys if isinstance(number := config.get(key), int) and number > 0]
        is_other = any(config.get(key) for key in _EXPERTS) or set(config.get("layer_types") or ()) - _ATTENTION
        if len(numbers) < len(keys) or is_other:
            return None
        heads, hidden, num_layers, intermediate, vocab = numbers
        kv_heads = config.get("num_key_value_heads") or heads
        kv_width = kv_heads * (config.get("head_dim") or hidden // heads)
        is_half = (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
        return cls(shapes, hidden, num_layers, kv_width, intermediate, vocab, is_half)

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return sum(map(math.prod, self.shapes.values()))

    def linear(self, leaves: list[str] | None = None) -> list[Shape]:
        """Return the shapes of the linear layers without the output layer, or only of those whose names end like `leaves`."""
        found = {name.removesuffix(".weight"): shape for name, shape in self.shapes.items() if len(shape) == 2}
        if leaves is not None:
            return [shape for name, shape in found.items() if any(f".{name}".endswith(f".{leaf}") for leaf in leaves)]
        return [shape for name, shape in found.items() if ".layers." in f".{name}"]

    def kv_bytes(self, num_tokens: int, dtype: str) -> int:
        """Return the KV cache of that many tokens: the least that an engine needs is one sequence."""
        return 2 * self.num_layers * self.kv_width * BYTES[dtype] * num_tokens

    def activation_bytes(self, num_tokens: int, dtype: str, *, checkpointing: bool = False) -> int:
        """Return what a forward pass keeps for the backward pass on a GPU.

        Per token and layer: the residual stream twice, queries and outputs of attention, keys and values, and gate and input
        of the MLP. In float32 also what norms and gates compute, which is computed again in half precision; there the keys and
        values once more, as flash attention reads them, with prompts in front of each response. With checkpointing: the inputs
        of all layers, and one layer whole.
        """
        is_wide = dtype == "float32"
        values = (8 if is_wide else 4) * self.hidden + (4 if is_wide else 2) * self.intermediate
        layer_bytes = num_tokens * BYTES[dtype] * (values + (2 if is_wide else 5) * self.kv_width)
        if checkpointing:
            return self.num_layers * num_tokens * BYTES[dtype] * self.hidden + layer_bytes
        return self.num_layers * layer_bytes


def _read_shapes(folder: Path) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for path in sorted(folder.glob(WEIGHT_FILE)):
        with safe_open(path, "np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    return shapes


def engine_bytes(size: ModelSize, dtype: str, *, batch_tokens: int, max_tokens: int, tensor_parallel: int = 1) -> int:
    """Return the memory of an engine on each of its GPUs.

    Args:
        size: Of the model.
        dtype: Of weights and KV cache.
        batch_tokens: In one engine step.
        max_tokens: Of the longest sequence, for which the KV cache must have room.
        tensor_parallel: GPUs that share weights and KV cache.
    """
    shared = BYTES[dtype] * size.num_parameters + size.kv_bytes(max_tokens, dtype)
    step = batch_tokens * BYTES[dtype] * 2 * (size.hidden + size.intermediate)
    return shared // tensor_parallel + step + min(batch_tokens, max_tokens) * _SCORED_LOGIT_BYTES * size.vocab


def attribution_bytes(size: ModelSize, dtype: str, batch_tokens: int) -> int:
    """Return the memory of gradients with respect to the input embeddings; the weights have none."""
    return BYTES[dtype] * size.num_parameters + size.activation_bytes(batch_tokens, dtype)


def training_bytes(size: ModelSize, train: PairTraining) -> int:
    """Return the memory of one process that trains one side of the contrastive pair, on its device."""
    model, num_processes = train.model, train.num_processes * train.num_machines
    is_sharded = train.parallel.strategy == "fsdp2" and num_processes > 1
    width = BYTES[model.dtype]
    is_half = size.is_half and not is_sharded and model.quantization == "none"
    frozen = width if is_half else 4
    states: float = _TRAINED_BYTES * size.num_parameters
    if train.lora is not None:
        targets = train.lora.target_modules
        adapted = size.linear(None if isinstance(targets, str) else targets)
        num_adapter = train.lora.rank * sum(sum(shape) for shape in adapted)
        num_quantized = sum(map(math.prod, size.linear())) if model.quantization == "nf4" else 0
        states = _TRAINED_BYTES * num_adapter
        states += _NF4_BYTES * num_quantized + frozen * (size.num_parameters - num_quantized)
    if is_sharded:
        states = states / num_processes + width * _gathered(size)
    elif width < 4 and not (train.lora is not None and is_half):
        states += (
            width * size.vocab * size.hidden
        )  # of the output layer, rounded; those of other layers are rounded again
    num_tokens = train.optim.tokens_per_batch or FIRST_TOKENS
    activations = size.activation_bytes(num_tokens, model.dtype, checkpointing=model.gradient_checkpointing)
    num_logits = num_tokens * size.vocab
    if not is_sharded:  # then the output layer runs once, over all of them
        num_logits = min(num_logits, _KEPT_LOGITS)
    of_gradient = num_logits if is_sharded else min(num_logits, _CHUNK_LOGITS)
    return round(states) + activations + width * (num_logits + of_gradient)


def _gathered(size: ModelSize) -> int:
    """Return the parameters that FSDP2 has whole at a time: those outside of layers, and two layers, one of them prefetched."""
    in_layers = sum(math.prod(shape) for name, shape in size.shapes.items() if ".layers." in f".{name}")
    return size.num_parameters - in_layers + 2 * in_layers // size.num_layers
