"""What the workers ask of an engine. `VllmEngine` offers it, and the tests' made-up engines do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.engine.score_once import Reply, ScoredSequence
from train.model.sampling import AnchorSampling

STEP_TOKENS = {"cpu": 4096, "gpu": 16_384}
"""Tokens of an engine step that no recipe sets."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a model runs. Only `dtype` changes numbers. Attribution reads `dtype` and the token budget alone."""

    dtype: str = "auto"
    batch_tokens: int | None = None
    """Tokens of a step; None for the default of the device, which only the process that owns it knows."""
    kv_cache_gib: float = 2.0
    gpu_memory_share: float = 0.85
    tensor_parallel: int = 1
    num_halvings: int = 0
    """How often the tokens of a step were halved, because they did not fit into memory."""
    longest: int | None = None
    """Tokens of the longest sequence to come, which sizes the engine; None for as many as the model takes."""
    samples: bool = False
    """Whether continuations are sampled: their many small steps pay for CUDA graphs, which scoring does not need."""

    def step_tokens(self, default: int) -> int:
        """Return the tokens of a step on a device with this default."""
        return max(256, (self.batch_tokens or default) >> self.num_halvings)

    @property
    def budget(self) -> str:
        """The tokens of a step in words."""
        if self.batch_tokens is None:
            share = f"1/{1 << self.num_halvings} of " if self.num_halvings else ""
            return f"{share}the default batch_tokens"
        return f"batch_tokens {self.step_tokens(self.batch_tokens)}"


@dataclass(frozen=True)
class Sampling(AnchorSampling):
    """How continuations are sampled; each of `stop_ids` ends one, as its last token."""

    stop_ids: tuple[int, ...] = ()
    """vLLM adds those of the model's generation_config.json."""


class Engine(Protocol):
    """One loaded model."""

    max_tokens: int
    """Longest prompt + response that the model takes. The engine may be started for less, see `EngineSettings.longest`."""
    vocab_size: int
    batch_tokens: int
    """Tokens of a step."""
    way: str | None
    """How log-probs are asked for; None until the first sequences have been scored."""

    def score(self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = ...) -> list[Reply]:
        """Return the wanted scores of each sequence; `progress` gets the number of tokens of each one that is done."""
        ...

    def begin(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = ...
    ) -> Callable[[], list[Reply]]:
        """Queue sequences behind those begun before, and return a function that waits for their scores.

        While the engine finishes what was begun first, it fills its steps with what was begun next.
        """
        ...

    def load(self, model: Path) -> None:
        """Exchange the weights for those of another model with the same config and tensors."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int], None] = ...,
    ) -> list[list[int]]:
        """Return one sampled continuation of each prompt; `progress` gets the number of prompts that are done."""
        ...
