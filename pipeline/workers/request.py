"""The contract between a stage and its process: one request file, and what a worker does with pairs."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import TypeAdapter

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.workers.pair_row import PairRow, QuarantineRow
from train.model.sampling import AnchorSampling
from weights_store import TableVersion

Stage = Literal["score", "attribute", "anchors"]
"""The stages that run a model over all pairs."""
DOING: dict[Stage, str] = {"score": "scoring", "attribute": "attributing", "anchors": "making anchors"}
DONE: dict[Stage, str] = {"score": "scored", "attribute": "attributed", "anchors": "given an anchor"}


@dataclass(frozen=True)
class Target:
    """One table to fill by a model, maybe behind a contrastive prompt.

    If `top_k` > 0, also store the k most likely tokens and their log-probs at each position. `model` is None for the model of
    the request; another one has the same config and tensors, so that the engine can exchange the weights.
    """

    role: str
    table: str
    condition: Condition | None
    metadata: dict[str, object]
    top_k: int = 0
    model: str | None = None


@dataclass(frozen=True)
class Executor:
    """Where the workers of a stage run: one in a process here, or many in actors on Ray."""

    kind: Literal["process", "ray"] = "process"
    num_actors: int = 1
    cpus_per_actor: float = 1.0
    ray_address: str | None = None


@dataclass(frozen=True)
class AttributionOptions:
    """What is attributed, see section `[attribute]` of the recipe."""

    target: Literal["max_logit", "gold_logps", "dpo_margin"]
    prompts: bool
    activations: bool
    contexts: int = 0


@dataclass(frozen=True)
class AnchorOptions:
    """How anchors are sampled, see section `[anchors]` of the recipe."""

    sampling: AnchorSampling
    seed: int


@dataclass(frozen=True)
class MismatchOptions:
    """Anchors are responses to other prompts, of which the longest has `longest` tokens."""

    longest: int


@dataclass(frozen=True)
class Request:
    """What one process of a stage does: fill the targets for all pairs in `tokens`, one commit per `chunk_tokens`.

    The folder `tokenizer` and the recipe's own file `chat_template` are for contrastive prompts. `restarts` says why the
    process was started again, once for each time. The engine takes the longest sequence that is missing, or `any_length` that
    the model takes.
    """

    stage: Stage
    tokens: TableVersion
    model: str
    targets: list[Target]
    chunk_tokens: int
    engine: EngineSettings
    executor: Executor = Executor()
    tokenizer: str = ""
    chat_template: str | None = None
    restarts: list[str] = field(default_factory=list)
    options: AttributionOptions | AnchorOptions | MismatchOptions | None = None
    any_length: bool = False

    def model_of(self, target: Target) -> str:
        """Return the folder of the model that fills a target."""
        return target.model or self.model

    def save(self, path: Path) -> None:
        """Write a request file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Request":
        """Read a request file."""
        return TypeAdapter(cls).validate_python(
            json.loads(Path(path).read_bytes())
        )  # JSON mode refuses odd bytes in paths


class Worker(ABC):
    """What a stage does with pairs; holds a loaded model."""

    @property
    @abstractmethod
    def record(self) -> dict[str, object]:
        """How it runs, for the lineage; only the dtype changes numbers."""

    @abstractmethod
    def fill_in(
        self, pairs: Sequence[PairRow], target: Target, progress: Callable[[float], None] = ...
    ) -> tuple[pa.Table, list[QuarantineRow]]:
        """Return the rows of the target's table, and a quarantine row for each pair that has none.

        The pairs have the target's contrastive prompt already. `progress` gets the share of the work that is done, 0 to 1.
        """

    def begin(
        self, pairs: Sequence[PairRow], target: Target, progress: Callable[[float], None]
    ) -> Callable[[], tuple[pa.Table, list[QuarantineRow]]]:
        """Return a function that does what `fill_in` does; a worker that can may begin the work now."""
        return lambda: self.fill_in(pairs, target, progress)

    def use(self, model: str) -> None:  # noqa: ARG002 - most workers have one model
        """Go on with this model. Only scorers have requests with several models."""
        return
