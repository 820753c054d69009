"""What the workers ask of an engine. `VllmEngine` offers it, and the tests' made-up engines do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.engine.score_once import Reply, ScoredSequence
from train.model.sampling import AnchorSampling


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a model runs. Only `dtype` changes numbers. Attribution reads `dtype` and `batch_tokens` alone."""

    dtype: str = "auto"
    batch_tokens: int = 4096
    kv_cache_gib: float = 2.0
    gpu_memory_share: float = 0.85
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Sampling(AnchorSampling):
    """How continuations are sampled; each of `stop_ids` ends one, as its last token."""

    stop_ids: tuple[int, ...] = ()
    """vLLM adds those of the model's generation_config.json."""


class Engine(Protocol):
    """One loaded model."""

    max_tokens: int
    """Longest prompt + response that can be scored."""
    vocab_size: int
    way: str | None
    """How log-probs are asked for; None until the first sequences have been scored."""

    def score(self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = ...) -> list[Reply]:
        """Return the wanted scores of each sequence; `progress` gets the number of tokens of each one that is done."""
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
