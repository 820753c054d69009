"""What the processes of a parity check do: score its sample with transformers in float32, or with the engine in each way.

Started by `parity.py` through `python -m pipeline.parity.process`, the two sides one after the other, so that they never share
a GPU's memory.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import pyarrow as pa

from pipeline.workers.pair_scorer import PairScorer
from pipeline.workers.request import Request
from train.model.checkpoint import load_checkpoint
from weights_store.errors import EngineError, InputError
from weights_store.messages import logger
from weights_store.process import run_main
from weights_store.schemas import TOKENS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_log = logger(__name__)

TRANSFORMERS = "transformers"
SIDES = ("chosen", "rejected")
SAMPLE = pa.schema(
    [TOKENS.field(name) for name in ("pair_id", "source_row", "prompt", "chosen_ids", "rejected_ids")]
).append(pa.field("prompt_ids", TOKENS.field("prompt_ids").type))
"""Columns of a sample. `prompt_ids` is null where the chat has no place for a contrastive prompt."""
_GPU_SHARE = 0.8
"""Of its free memory that the float32 weights may take: the rest is for logits of a whole sequence."""
_EVERY = 16


@dataclass(frozen=True)
class Task:
    """The contract between the check and its processes, one JSON file.

    Args:
        side: What scores: `transformers` or the `engine`.
        model: Folder of the model.
        rows: The sample, of schema `SAMPLE`.
        engine: Settings of the engine.
        runner: The model runner that vLLM is told to use; None for the one it takes by itself.
        ways: The engine's ways to go.
    """

    side: Literal["transformers", "engine"]
    model: str
    rows: list[dict[str, Any]]
    engine: dict[str, Any] = field(default_factory=dict)
    runner: Literal["V1", "V2"] | None = None
    ways: list[str] = field(default_factory=list)


@dataclass
class Column:
    """What one scorer made of a sample.

    Args:
        logps: By pair_id, of chosen and of rejected tokens, in nats.
        unscorable: By pair_id, why it has none.
        failed: Why there is nothing at all.
    """

    logps: dict[str, list[list[float]]] = field(default_factory=dict)
    unscorable: dict[str, str] = field(default_factory=dict)
    failed: str | None = None


def run(task: Task) -> dict[str, Column]:
    """Score the sample of a task; return what each scorer made of it, by its name.

    Raises:
        InputError: transformers or vLLM cannot load the model.
        OutOfMemoryError: There is not enough memory for the engine.
    """
    if task.side == "engine":
        return _by_engine(task)
    return {TRANSFORMERS: score_with_transformers(Path(task.model), task.rows)}


# --- the engine --------------------------------------------------------------------------------------------------------


def _by_engine(task: Task) -> dict[str, Column]:
    """Go every way that the engine has."""
    if task.runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if task.runner == "V2" else "0"
    rows = pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(task.rows, SAMPLE)))
    scorer = PairScorer(_request(task))
    columns: dict[str, Column] = {}
    for way in task.ways:
        failed = scorer.engine.why_not(way)
        try:
            columns[way] = Column(failed=failed) if failed else _by_way(scorer, way, rows)
        except EngineError as error:  # what another vLLM version makes of it; the next way may still be there
            columns[way] = Column(failed=str(error))
    return columns


def _by_way(scorer: PairScorer, way: str, rows: pl.DataFrame) -> Column:
    scorer.engine.way = way
    scored, unscorable = scorer.score(rows)
    return Column(
        {row["pair_id"]: [row["chosen_logps"], row["rejected_logps"]] for row in scored.to_pylist()},
        {row["pair_id"]: row["detail"] for row in unscorable},
    )


def _request(task: Task) -> Request:
    """Return the part of a scoring request that a scorer looks at: a model, and how the engine runs."""
    return Request(
        store="",
        tokens_table="",
        tokens_version=0,
        model=task.model,
        tokenizer="",
        chat_template=None,
        targets=[],
        chunk_tokens=0,
        engine=task.engine,
        executor={},
    )


# --- transformers ------------------------------------------------------------------------------------------------------


def score_with_transformers(folder: Path, rows: Sequence[dict[str, Any]]) -> Column:
    """Return the log-probs of a sample in float32, one sequence at a time, nothing shared and nothing clever.

    Eager attention, because the others leave out what only some models have: transformers' own default (SDPA) ignores the
    soft-capping of Gemma 2's attention without a word.

    Raises:
        InputError: The model cannot be loaded.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    _log.info(f"scoring {len(rows)} pairs with transformers in float32")
    model = _placed(load_checkpoint(folder, dtype=torch.float32, attn_implementation="eager"))
    column = Column()
    for index, row in enumerate(rows):
        problem = _why_not(row, model.get_input_embeddings().num_embeddings)
        if problem is not None:
            column.unscorable[row["pair_id"]] = problem
            continue
        sides = [_response_logps(model, row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES]
        column.logps[row["pair_id"]] = [logps.tolist() for logps in sides]
        if (index + 1) % _EVERY == 0:
            _log.info(f"transformers: {index + 1} of {len(rows)} pairs")
    return column


def _placed(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model on a GPU where it fits there."""
    import torch

    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.cuda.is_available() and num_bytes < _GPU_SHARE * torch.cuda.mem_get_info()[0]:
        return model.to("cuda")  # type: ignore[no-any-return]
    return model


def _why_not(row: dict[str, Any], vocab_size: int) -> str | None:
    if row["prompt_ids"] is None:
        return "the chat has no place for the contrastive prompt"
    ids = [token_id for name in ("prompt_ids", "chosen_ids", "rejected_ids") for token_id in row[name]]
    if min(ids) < 0 or max(ids) >= vocab_size:
        return f"a token id is outside the model's vocabulary of {vocab_size}"
    return None


def _response_logps(model: "PreTrainedModel", prompt_ids: list[int], response_ids: list[int]) -> "torch.Tensor":
    """Return log pi(y_t | x, y_<t) of one response, float32 `[num_response]` nats."""
    import torch

    ids = torch.tensor([prompt_ids + response_ids], device=model.device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1).cpu()


def main() -> None:
    """Do the task of one file and write the columns to another; what `python -P -m pipeline.parity.process` runs.

    Raises:
        InputError: This interpreter, which may be another one than the caller's, lacks a package.
    """
    task, output = map(Path, sys.argv[1:])
    try:
        columns = run(Task(**json.loads(task.read_text(encoding="utf-8"))))
    except ImportError as error:
        raise InputError(str(error)) from error
    output.write_text(json.dumps({name: vars(column) for name, column in columns.items()}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
