"""What an engine offers to the workers: `VllmEngine`, or a made-up one in tests."""

from collections.abc import Callable
from typing import Any, Protocol

from pipeline.engine.score_once import Reply


class Engine(Protocol):
    """What scores: `VllmEngine`, or a made-up one in tests."""

    max_tokens: int
    vocab_size: int
    way: str | None

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in that it has."""
        ...

    def why_not(self, way: str) -> str | None:
        """Return why it does not have a way; None where it has."""
        ...

    def score(self, sequences: Any, progress: Callable[[int], None] = ...) -> list[Reply]:
        """Return the wanted scores of each sequence."""
        ...

    def generate(
        self, prompts: Any, sampling: Any, seeds: Any, progress: Callable[[int], None] = ...
    ) -> list[list[int]]:
        """Return a sampled continuation of each prompt."""
        ...
