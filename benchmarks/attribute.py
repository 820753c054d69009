"""`make bench-attribute`: gradient attribution of real pairs against the naive loop and against a forward pass alone.

All attribute every response token of chosen and rejected, target `max_logit`, with the small chat model:

* `naive`: one sequence at a time, as the TI-DPO release does it: embeddings as input, whole logits, `autograd.grad`;
* `ours`: the stage's own worker (`pipeline/attribution.py`), rows of the tokens table to rows of the attributions table;
* `forward`: the decoder over the micro-batches of `ours` without gradients, and the same rows of logits. Nothing else: neither
  cutting nor collating nor tables.

In turns in one process, in float32 and in bfloat16; medians of `RUNS`.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, where `train` would be a file

import numpy as np
import polars as pl
import torch

import pipeline.workers.pair_attributor
from benchmarks.machine import describe
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import Recipe
from pipeline.stage_sections import AttributeSection
from pipeline.stages.prepare import prepare
from pipeline.workers.pair_attributor import PairAttributor
from pipeline.workers.pair_row import read_pairs
from pipeline.workers.request import AttributionOptions, Request, Target
from train.model.attribution import _largest_logits
from weights_store import TableVersion, WeightStore
from weights_store.settings import parse_settings

REPO = Path(__file__).resolve().parent.parent
RUNS = 5
NUM_PAIRS = 200
DTYPES = ("float32", "bfloat16")
TARGETS = {"vs_naive": ("at least", 3.0), "vs_forward_only": ("at most", 3.2)}
TARGET = Target("ref", "attributions/bench", None, {})


def make_tokens(work: Path, shared: Path, num_pairs: int) -> pl.DataFrame:
    """Tokenise the first pairs of HH as a build does; return the rows of the tokens table."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lines = (shared / "data" / "hh_harmless.jsonl").read_text().splitlines()
    (work / "pairs.jsonl").write_text("\n".join(lines[:num_pairs]) + "\n")
    settings = {
        "dataset": {"name": "bench", "source": str(work / "pairs.jsonl")},
        "model": {"path": str(shared / "models" / "tiny-chat")},
        "weights": {"name": "bench/x"},
        "store": {"uri": str(work / "store")},
    }
    recipe = parse_settings(Recipe, settings, "bench")
    tokens = prepare(recipe, shared / "models" / "tiny-chat").tokens
    return WeightStore(tokens.store).table(tokens.table).scan(tokens.version).collect()


def describe_pairs(rows: pl.DataFrame) -> dict[str, Any]:
    """Return what the naive loop computes, and how little of it is new."""
    prompts, chosen, rejected = (rows[name].list.len().sum() for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return {
        "num_pairs": rows.height,
        "num_response_tokens": chosen + rejected,
        "num_sequence_tokens": 2 * prompts + chosen + rejected,
        "share_with_shared_prompts": (prompts + chosen + rejected) / (2 * prompts + chosen + rejected),
    }


class Bench:
    """One loaded model, and the contenders."""

    def __init__(self, model: Path | str, rows: pl.DataFrame, dtype: str) -> None:
        settings = AttributeSection(dtype=dtype)  # type: ignore[arg-type]
        engine = EngineSettings(dtype, settings.batch_tokens)
        options = AttributionOptions(settings.target, settings.prompts, settings.activations)
        nowhere = TableVersion("", "", 0, "")
        request = Request("attribute", nowhere, str(model), [TARGET], settings.chunk_tokens, engine, options=options)
        self.rows = rows
        self.worker = PairAttributor(request)
        self.plain = pipeline.workers.pair_attributor.load_model(Path(model), dtype).to(self.worker._device)
        self.plain.requires_grad_(True)  # as the release has it
        self.batches = self._batches()

    def _batches(self) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of `ours`."""
        batches = []
        ordinary = pipeline.workers.pair_attributor.attribute_tokens

        def record(model: Any, batch: Any, target: Any, **options: Any) -> Any:
            batches.append(batch)
            return ordinary(model, batch, target, **options)

        pipeline.workers.pair_attributor.attribute_tokens = record
        self.ours()
        pipeline.workers.pair_attributor.attribute_tokens = ordinary
        return batches

    def ours(self) -> dict[str, list[np.ndarray]]:
        table, unscorable = self.worker.fill_in(read_pairs(self.rows), TARGET)
        assert not unscorable
        return {side: table[f"{side}_attributions"].to_pylist() for side in ("chosen", "rejected")}

    @torch.no_grad()
    def forward(self) -> None:
        for batch in self.batches:
            _largest_logits(self.worker._model, batch)

    def naive(self, rows: pl.DataFrame | None = None) -> dict[str, list[np.ndarray]]:
        """Attribute all rows, or these."""
        rows = self.rows if rows is None else rows
        return {
            side: [
                self._naive(row["prompt_ids"], row[f"{side}_ids"]) for row in rows.sort("pair_id").iter_rows(named=True)
            ]
            for side in ("chosen", "rejected")
        }

    def _naive(self, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
        ids = torch.tensor([prompt_ids + response_ids], device=self.worker._device)
        embeddings = self.plain.get_input_embeddings()(ids).detach().requires_grad_()
        logits = self.plain(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, -1].max(), embeddings)
        return gradient[0].float().abs().sum(-1)[len(prompt_ids) :].cpu().numpy()

    def max_difference(self) -> float:
        """Return the largest difference between ours and the naive loop, relative to the response's largest value."""
        ours, naive = self.ours(), self.naive()
        return max(
            float(np.abs(np.array(mine) - other).max() / other.max())
            for side in ("chosen", "rejected")
            for mine, other in zip(ours[side], naive[side], strict=True)
        )


def time_in_turns(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Return the seconds of each run, after one that does not count."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            _wait_for_card()
            started = time.perf_counter()
            run()
            _wait_for_card()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for_card() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_all(work: Path, shared: Path, num_pairs: int, runs: int) -> dict[str, Any]:
    """Measure everything and return the results."""
    rows = make_tokens(work, shared, num_pairs)
    results: dict[str, Any] = {"vs_naive": {}, "vs_forward_only": {}, "response_tokens_per_s": {}}
    differences, measured = {}, {}
    described = describe_pairs(rows)
    for dtype in DTYPES:
        bench = Bench(shared / "models" / "tiny-chat", rows, dtype)
        differences[dtype] = bench.max_difference()
        seconds = time_in_turns({"naive": bench.naive, "ours": bench.ours, "forward": bench.forward}, runs)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        results["vs_naive"][dtype] = medians["naive"] / medians["ours"]
        results["vs_forward_only"][dtype] = medians["ours"] / medians["forward"]
        results["response_tokens_per_s"][dtype] = {
            name: described["num_response_tokens"] / median for name, median in medians.items()
        }
        measured[dtype] = seconds
    return {
        **results,
        "max_relative_difference": differences,
        "pairs": described,
        "runs": runs,
        "threads": torch.get_num_threads(),
        "machine": describe("torch", "transformers"),
        "measured": {"s": measured},
    }


def print_table(results: dict[str, Any]) -> None:
    """Print the figures with their targets."""
    print(f"\n{'figure':<20}" + "".join(f"{dtype:>12}" for dtype in DTYPES) + "   target")
    for figure, (bound, target) in TARGETS.items():
        values = results[figure]
        missed = [d for d in DTYPES if (values[d] < target if bound == "at least" else values[d] > target)]
        cells = "".join(f"{values[dtype]:>12.2f}" for dtype in DTYPES)
        print(f"{figure:<20}{cells}   {bound} {target:g}" + (f"   MISSED: {', '.join(missed)}" if missed else ""))
    print(f"{'max difference':<20}" + "".join(f"{results['max_relative_difference'][d]:>12.1e}" for d in DTYPES))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument(
        "--work", type=Path, default=REPO / "benchmarks" / "scratch" / "attribute", help="scratch folder"
    )
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--dry", action="store_true", help="print the figures without writing the result file")
    options = parser.parse_args()
    if not (options.shared / "data" / "hh_harmless.jsonl").is_file():
        raise SystemExit(f"{options.shared} has no data/hh_harmless.jsonl: give the folder with --shared")
    results = run_all(options.work, options.shared, options.pairs, options.runs)
    print_table(results)
    if not options.dry:
        target = REPO / "benchmarks" / "results" / "attribute.json"
        target.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwrote {target.relative_to(REPO)}")


if __name__ == "__main__":
    main()
