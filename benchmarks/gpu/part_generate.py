"""Sampling with CUDA graphs, as against `sampling` of `part_score`, which runs eagerly. Runs after it."""

import json
import os

from benchmarks.gpu.context import Context
from benchmarks.gpu.part_score import measure_sampling


def run(ctx: Context) -> None:
    """Start an engine as anchors do, and sample."""
    if ctx.device == "cuda":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from benchmarks.score import Bench

    model = json.loads((ctx.work / "expected.json").read_text())["model"]
    bench = Bench(model, samples=True)
    ctx.attempt("sampling", lambda record: measure_sampling(ctx, bench.scorer.engine, record))
