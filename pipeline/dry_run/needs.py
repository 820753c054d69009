"""What the stages of a recipe need of a device, in words: `memory.py` computes, `device.py` says what is there."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dry_run.device import Device
from pipeline.dry_run.memory import BYTES, ModelSize, attribution_bytes, engine_bytes, training_bytes
from pipeline.engine.contract import STEP_TOKENS
from pipeline.recipe import Recipe
from pipeline.workers.supervise import resolve_dtype

_USABLE = 0.9
"""Share of a device that a training or an attribution can count on: CUDA and the allocator take some."""
_REMEDIES = {
    "score": "raise score.tensor_parallel or lower score.batch_tokens",
    "anchors": "raise score.tensor_parallel or lower score.batch_tokens",
    "attribute": "lower attribute.batch_tokens",
    "contrast": "set contrast.train.model.gradient_checkpointing = true or a section [contrast.train.lora], lower "
    "contrast.train.optim.tokens_per_batch, or share the model with contrast.train.num_processes and "
    'contrast.train.parallel.strategy = "fsdp2"',
}


@dataclass(frozen=True)
class Note:
    """Memory that a stage needs on each device."""

    text: str
    num_bytes: int | None
    """None: unknown."""


@dataclass(frozen=True)
class Needs:
    """The memory that the stages of a recipe need."""

    recipe: Recipe
    device: Device
    _sizes: dict[Path, ModelSize | None] = field(default_factory=dict)

    def of(self, stage: str, model: Path) -> Note | None:
        """Return what a stage needs to run a model in that folder; None for a stage that runs none."""
        if stage not in _REMEDIES:
            return None
        if model not in self._sizes:
            self._sizes[model] = ModelSize.of(model)
        size = self._sizes[model]
        num_bytes = None if size is None else self._num_bytes(stage, model, size)
        if num_bytes is None:
            return Note("memory: unknown, the formula does not cover this model", None)
        return Note(f"memory: {self._compare(stage, num_bytes)}", num_bytes)

    def _num_bytes(self, stage: str, model: Path, size: ModelSize) -> int | None:
        score, attribute, train = self.recipe.score, self.recipe.attribute, self.recipe.contrast.train
        if stage == "contrast":
            num_here = 1 if self.device.is_gpu else train.num_processes  # on CPUs all processes share the RAM
            return num_here * training_bytes(size, train)
        dtype = resolve_dtype(model, attribute.dtype if stage == "attribute" else score.dtype)
        if dtype not in BYTES:
            return None
        if stage == "attribute":
            return attribution_bytes(size, dtype, attribute.batch_tokens)
        num_bytes = engine_bytes(
            size,
            dtype,
            batch_tokens=score.batch_tokens or STEP_TOKENS["gpu" if self.device.is_gpu else "cpu"],
            max_tokens=self.recipe.dataset.max_prompt_tokens + self.recipe.dataset.max_response_tokens,
            tensor_parallel=score.tensor_parallel if self.device.is_gpu else 1,
        )
        return num_bytes if self.device.is_gpu else num_bytes + round(score.kv_cache_gib * 2**30)

    def _compare(self, stage: str, num_bytes: int) -> str:
        device = self.device
        is_engine = stage in ("score", "anchors")
        share = self.recipe.score.gpu_memory_share if is_engine and device.is_gpu else _USABLE
        there = f"the {_size(device.num_bytes)} of {device.name}"
        if num_bytes <= share * device.num_bytes:
            return f"about {_size(num_bytes)} of {there}"
        limit = f", of which {share:.0%} can be used" if num_bytes <= device.num_bytes else ""
        return f"about {_size(num_bytes)}, too much for {there}{limit}; {_REMEDIES[stage]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
