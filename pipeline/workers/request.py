"""The contract between a stage and its process: one request file, and what a worker does with rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl
import pyarrow as pa

from weights_store import TableVersion

Stage = Literal["score", "attribute", "anchors"]
"""The stages that run a model over all pairs."""


@dataclass(frozen=True)
class Target:
    """One table to fill with what the request's model says, maybe behind a contrastive prompt.

    With `top_k` > 0 log-probs come with those of the likeliest tokens at each place, that many.
    """

    role: str
    table: str
    condition: dict[str, str] | None
    metadata: dict[str, Any]
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """The contract between the stage and its process, one JSON file."""

    store: str
    tokens_table: str
    tokens_version: int
    model: str
    tokenizer: str
    chat_template: str | None
    targets: list[Target]
    chunk_tokens: int
    engine: dict[str, Any]
    executor: dict[str, Any]
    stage: Stage = "score"
    options: dict[str, Any] = field(default_factory=dict)
    """What the stage's worker is told besides: how anchors are sampled, what is attributed."""

    @classmethod
    def over(cls, tokens: TableVersion, model: Path, **settings: Any) -> "Request":
        """Return a request over the pairs of a tokens table; `settings` are the other fields."""
        defaults: dict[str, Any] = {"tokenizer": str(model), "chat_template": None}
        return cls(tokens.store, tokens.table, tokens.version, str(model), **{**defaults, **settings})

    @classmethod
    def load(cls, path: str | Path) -> "Request":
        """Read a request file."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**content, "targets": [Target(**target) for target in content["targets"]]})

    @property
    def tokens(self) -> TableVersion:
        """The pairs to score."""
        return TableVersion(self.store, self.tokens_table, self.tokens_version, "")


class Worker(Protocol):
    """What a stage does with rows of the tokens table; holds a loaded model."""

    @property
    def record(self) -> dict[str, Any]:
        """How it runs, for the lineage: none of it but the dtype changes numbers."""
        ...

    def under_condition(self, rows: pl.DataFrame, target: Target) -> pl.DataFrame:
        """Return the rows as the model will see them; called in a thread, ahead of `fill_in`."""
        ...

    def fill_in(
        self, rows: pl.DataFrame, target: Target, progress: Callable[[float], None] = ...
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the rows of the target's table, by pair_id, and a quarantine row for each pair that has none.

        Args:
            rows: From `under_condition`.
            target: The table to fill.
            progress: Gets the share of the rows that is done, 0 to 1.
        """
        ...
