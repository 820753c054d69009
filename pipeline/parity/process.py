"""The processes of a parity check: score its sample with transformers in float32, or with the engine in each way.

`check.py` starts them as `python -P -m pipeline.parity.process TASK COLUMNS`, one after the other, so that they never share a
GPU's memory.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from pipeline.engine.contract import EngineSettings
from pipeline.workers.pair_row import PairRow, why_not
from pipeline.workers.pair_scorer import score_pairs
from train.model.checkpoint import load_checkpoint
from weights_store.errors import EngineError
from weights_store.messages import logger
from weights_store.processes.process import run_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logger(__name__)

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Task:
    """The contract between the check and its processes, one JSON file."""

    side: Literal["transformers", "engine"]
    model: str
    pairs: list[PairRow]
    engine: EngineSettings = field(default_factory=EngineSettings)
    ways: list[str] = field(default_factory=list)


@dataclass
class Column:
    """One scorer's log-probs of a sample, by pair_id, of chosen and of rejected tokens, in nats; or why it has none."""

    logps: dict[str, list[list[float]]] = field(default_factory=dict)
    unscorable: dict[str, str] = field(default_factory=dict)
    failed: str | None = None


def run(task: Task) -> dict[str, Column]:
    """Score the sample of a task; return the column of each scorer by its name.

    Raises:
        InputError: transformers or vLLM cannot load the model.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for the engine.
    """
    if task.side == "transformers":
        return {TRANSFORMERS: score_with_transformers(Path(task.model), task.pairs)}
    from pipeline.engine.vllm_engine import VllmEngine

    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in task.pairs)
    engine = VllmEngine(Path(task.model), replace(task.engine, longest=longest))
    columns: dict[str, Column] = {}
    for way in task.ways:
        engine.way = way
        try:
            scored, unscorable = score_pairs(engine, task.pairs)
        except EngineError as error:  # as another vLLM version may raise; the next way may still work
            columns[way] = Column(failed=str(error))
            continue
        columns[way] = Column(
            {row["pair_id"]: [row["chosen_logps"], row["rejected_logps"]] for row in scored.to_pylist()},
            {row["pair_id"]: row["detail"] for row in unscorable},
        )
    return columns


def score_with_transformers(folder: Path, pairs: Sequence[PairRow]) -> Column:
    """Return the log-probs of a sample in float32, one sequence at a time: nothing is shared or optimised.

    Attention is eager, because other implementations lack what some models have: transformers' default (SDPA) ignores the
    soft-capping of Gemma 2.

    Raises:
        InputError: The model cannot be loaded.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    _log.info(f"scoring {len(pairs)} pairs with transformers in float32")
    model = load_checkpoint(folder, dtype=torch.float32, attn_implementation="eager")
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # A fifth of the GPU's free memory is for the logits of a whole sequence.
    if torch.cuda.is_available() and num_bytes < 0.8 * torch.cuda.mem_get_info()[0]:
        model.to("cuda")
    column = Column()
    for index, pair in enumerate(pairs, start=1):
        problem = why_not(pair, model.get_input_embeddings().num_embeddings)
        if problem is not None:
            column.unscorable[pair.pair_id] = problem
            continue
        sides = (pair.chosen_ids, pair.rejected_ids)
        column.logps[pair.pair_id] = [_response_logps(model, pair.prompt_ids, ids) for ids in sides]
        if index % 16 == 0:
            _log.info(f"transformers: {index} of {len(pairs)} pairs")
    return column


def _response_logps(model: "PreTrainedModel", prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """Return log pi(y_t | x, y_<t) of one response, float32 `[num_response]` nats."""
    import torch

    if not response_ids:
        return []
    ids = torch.tensor([prompt_ids + response_ids], device=model.device)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
        logps: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None])
        return logps.squeeze(-1).tolist()


def main() -> None:
    """Do the task of one file and write the columns to another."""
    task, output = map(Path, sys.argv[1:])
    columns = run(TypeAdapter(Task).validate_python(json.loads(task.read_bytes())))
    output.write_text(json.dumps({name: asdict(column) for name, column in columns.items()}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
