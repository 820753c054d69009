"""Both ways into vLLM's other model runner, V1, against transformers. Runs after `part_score`."""

import json
import os

from benchmarks.gpu.context import Context
from benchmarks.gpu.part_score import measure_parity


def run(ctx: Context) -> None:
    """Start an engine on the V1 runner and compare."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from benchmarks.score import Bench

    bench = Bench(json.loads((ctx.work / "expected.json").read_text())["model"])
    ctx.attempt("parity", lambda record: measure_parity(ctx, bench.scorer.engine, record))
