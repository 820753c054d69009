"""Attributes the responses of pairs by gradients, a micro-batch at a time: what the process of `attribute.py` does.

The only file of the pipeline that imports `train`: gradients, packed layout and the attention over it are the trainer's
(`train/attribution.py`), so that stored and fresh attributions come from one code. Each response behind its prompt is
computed once, in however many pairs of a chunk it stands; two responses of one prompt lie in one packed sequence and share
it, unless what falls on the prompt is wanted too, which is each response's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from pipeline.workers.pair_scorer import why_not
from pipeline.workers.quarantine import unscorable_row
from pipeline.workers.request import Request, Target
from train.data.dataset import Pair, StoredResponse
from train.model.attribution import TokenAttributions, attribute_tokens, input_embeddings
from train.model.checkpoint import load_checkpoint
from train.model.collate import PairCollator
from train.model.logps import check_output_layer
from train.model.packing import enable_packing
from train.model.token_budget import cut_by_tokens
from weights_store.errors import OutOfMemoryError
from weights_store.messages import logger
from weights_store.schemas import ATTRIBUTIONS

_log = logger(__name__)

SIDES = ("chosen", "rejected")
Ids = tuple[int, ...]
PromptedResponse = tuple[Ids, Ids]
"""Ids of a prompt and of a response behind it."""


@dataclass(frozen=True)
class Attributed:
    """What is stored of one response, float32: `[T]` each, and a number of its prompt."""

    attributions: np.ndarray
    prompt_attribution: float | None
    activations: np.ndarray | None

    @property
    def is_finite(self) -> bool:
        """Whether the model's gradients are."""
        parts = (self.attributions, self.prompt_attribution, self.activations)
        return all(np.isfinite(part).all() for part in parts if part is not None)


class PairAttributor:
    """The request's model: rows of the tokens table in, rows of an attributions table out.

    Args:
        request: What is attributed; its options are `target`, `prompts` and `activations` of section `[attribute]`.

    Raises:
        InputError: The model cannot be loaded, or cannot be attributed.
        OutOfMemoryError: There is not enough memory for it.
    """

    def __init__(self, request: Request) -> None:
        _log.info(f"loading {request.model} for gradients")
        self._engine, self._options = request.engine, request.options
        with _memory_told():
            self._model = load_model(Path(request.model), request.engine["dtype"])
            self._not_packed = _switch_to_packing(self._model)
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._model.to(self._device)
        if self._not_packed is not None:
            _log.info(f"responses are padded, each with its prompt: {self._not_packed}")
        # Alone, a response has a prompt of its own; packed in twos the prompt is computed once.
        self._num_together = 1 if self._options["prompts"] or self._not_packed is not None else 2
        config = self._model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._max_tokens = int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @property
    def record(self) -> dict[str, Any]:
        """How it runs, for the lineage: none of it but the dtype changes numbers."""
        return {"restarts": [], **self._engine, "packed": self._not_packed is None, "device": self._device.type}

    def under_condition(self, rows: pl.DataFrame, target: Target) -> pl.DataFrame:  # noqa: ARG002  (the Worker's signature)
        """Return the rows as they are: attributions have no contrastive prompt."""
        return rows

    def fill_in(
        self,
        rows: pl.DataFrame,
        target: Target,  # noqa: ARG002
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the attributions of the pairs that have them, and a quarantine row for each other.

        Raises:
            OutOfMemoryError: A smaller token budget may do.
        """
        problems = {
            row["pair_id"]: why_not(row, self._max_tokens, self._vocab_size) for row in rows.iter_rows(named=True)
        }
        good = [row for row in rows.iter_rows(named=True) if problems[row["pair_id"]] is None]
        attributed = self._attribute([_sequence(row, side) for row in good for side in SIDES], progress)
        for row in good:
            refused = [side for side in SIDES if not attributed[_sequence(row, side)].is_finite]
            if refused:
                problems[row["pair_id"]] = (
                    f"{' and '.join(refused)}: gradients are not finite in {self._engine['dtype']}"
                )
        filled = [_columns(row, attributed) for row in good if problems[row["pair_id"]] is None]
        unscorable = [
            unscorable_row(row, problem)
            for row in rows.iter_rows(named=True)
            if (problem := problems[row["pair_id"]]) is not None
        ]
        columns = {name: [row[name] for row in filled] for name in ATTRIBUTIONS.names}
        return pa.Table.from_pydict(columns, ATTRIBUTIONS), unscorable

    def _attribute(
        self, sequences: Sequence[PromptedResponse], progress: Callable[[float], None]
    ) -> dict[PromptedResponse, Attributed]:
        """Attribute each distinct sequence once; what comes out not finite a second time, alone."""
        of_prompt: dict[Ids, dict[Ids, None]] = {}
        for prompt, response in sequences:
            of_prompt.setdefault(prompt, {})[response] = None
        together = [
            [(prompt, response) for response in part]
            for prompt, responses in of_prompt.items()
            for part in _in_parts(list(responses), self._num_together)
        ]
        attributed = self._attribute_groups(together, progress)
        # In a packed row 0 * NaN is NaN: one poisoned sequence may have spoilt others.
        spoilt = [[sequence] for sequence, result in attributed.items() if not result.is_finite]
        for alone in spoilt:
            attributed |= self._attribute_batch([alone])
        return attributed

    def _attribute_groups(
        self, groups: Sequence[list[PromptedResponse]], progress: Callable[[float], None]
    ) -> dict[PromptedResponse, Attributed]:
        """Attribute groups of one or of two responses of one prompt, those of a size in micro-batches together."""
        sizes = [_num_tokens(group) for group in groups]
        attributed: dict[PromptedResponse, Attributed] = {}
        done, total = 0, sum(sizes)
        for num_together in range(1, self._num_together + 1):
            alike = [(group, size) for group, size in zip(groups, sizes, strict=True) if len(group) == num_together]
            for batch in cut_by_tokens(alike, [size for _, size in alike], self._engine["batch_tokens"]):
                attributed |= self._attribute_batch([group for group, _ in batch])
                done += sum(size for _, size in batch)
                progress(done / total)
        return attributed

    def _attribute_batch(self, groups: Sequence[list[PromptedResponse]]) -> dict[PromptedResponse, Attributed]:
        """Attribute groups of equally many responses, one forward and one backward pass."""
        collate = PairCollator(
            packed=self._not_packed is None, with_rejected=len(groups[0]) == 2, share_beginnings=False
        )
        batch = collate([_as_pair(group) for group in groups])
        wanted = {f"with_{name}": self._options[name] for name in ("prompts", "activations")}
        with _memory_told():
            on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
            result = attribute_tokens(self._model, on_device, self._options["target"], **wanted)
            mask = batch["completion_mask"]
            sequences = [group[index] for index in range(len(groups[0])) for group in groups]
            return dict(zip(sequences, _rows_of(result, mask), strict=True))


# --- the model ---------------------------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: str) -> Any:
    """Load a model for gradients with respect to its embeddings, on the CPU, its parameters frozen.

    Raises:
        InputError: It cannot be loaded, or gives no access to its input embeddings.
    """
    model = load_checkpoint(folder, dtype=dtype)
    input_embeddings(model)
    return model.requires_grad_(False)


def _switch_to_packing(model: Any) -> str | None:
    """Switch to packed attention where the model can; return why not. Judged in float32, where differences mean something.

    Raises:
        InputError: The family computes its logits in a way that we do not know.
    """
    stored = [(parameter, parameter.dtype) for parameter in model.parameters()]
    model.float()
    check_output_layer(model)
    reason = enable_packing(model)
    for parameter, dtype in stored:  # `model.to(dtype)` would round the frequencies of rotary embeddings too
        parameter.data = parameter.data.to(dtype)
    return reason


@contextmanager
def _memory_told() -> Iterator[None]:
    """Turn what PyTorch says when memory runs out into our error.

    Raises:
        OutOfMemoryError: It ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On GPUs a type of its own; on CPUs a RuntimeError like any other.
        told = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not told:
            raise
        raise OutOfMemoryError(
            f"attributing ran out of memory: {(str(error) or 'no memory left').splitlines()[0]}"
        ) from error


# --- rows, sequences, batches ------------------------------------------------------------------------------------------


def _sequence(row: Mapping[str, Any], side: str) -> PromptedResponse:
    return tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])


def _in_parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _num_tokens(group: Sequence[PromptedResponse]) -> int:
    """Return the tokens of a group, whose prompt is there once."""
    return len(group[0][0]) + sum(len(response) for _, response in group)


def _as_pair(group: Sequence[PromptedResponse]) -> Pair:
    """Return one or two responses of one prompt as the pair that the trainer's collator knows."""
    first, last = (_as_response(response) for _, response in (group[0], group[-1]))
    return Pair("", np.array(group[0][0], np.int32), first, last)


def _as_response(ids: Ids) -> StoredResponse:
    nothing = np.zeros(len(ids), np.float32)
    return StoredResponse(np.array(ids, np.int32), nothing, nothing)


def _rows_of(result: TokenAttributions, mask: torch.Tensor) -> list[Attributed]:
    """Return what is stored of each sequence of a micro-batch."""
    sizes = mask.sum(1).tolist()
    split = partial(_split, mask=mask, sizes=sizes)
    nothing = [None] * len(sizes)
    prompts = result.prompt_attributions
    return [
        Attributed(*columns)
        for columns in zip(
            split(result.attributions),
            nothing if prompts is None else prompts.tolist(),
            nothing if result.activations is None else split(result.activations),
            strict=True,
        )
    ]


def _split(values: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> list[np.ndarray]:
    return [part.numpy() for part in values.cpu()[mask].split(sizes)]


def _columns(row: Mapping[str, Any], attributed: Mapping[PromptedResponse, Attributed]) -> dict[str, Any]:
    """Return a pair's row of the attributions table."""
    columns = {"pair_id": row["pair_id"]}
    for side in SIDES:
        result = attributed[_sequence(row, side)]
        columns[f"{side}_attributions"] = result.attributions
        columns[f"{side}_prompt_attribution"] = result.prompt_attribution
        columns[f"{side}_activations"] = result.activations
    return columns
