"""Attribution against a forward pass over the same micro-batches, and against the naive loop on part of the pairs."""

import statistics
from functools import partial

from benchmarks.gpu.context import Context, timed
from benchmarks.gpu.inputs import train_job

RUNS = 3


def run(ctx: Context) -> None:
    """Measure the model of the training, in bfloat16."""
    from benchmarks.attribute import Bench, make_tokens

    rows = make_tokens(ctx.work / "attribute", ctx.shared, ctx.sizes.attribute_pairs)
    job = train_job(ctx)
    bench = Bench(job.model, rows, "bfloat16")
    num_tokens = rows["chosen_ids"].list.len().sum() + rows["rejected_ids"].list.len().sum()
    ctx.record(num_pairs=rows.height, num_response_tokens=num_tokens)
    bench.ours()
    for name, call in {"forward": bench.forward, "ours": bench.ours}.items():
        seconds = [timed(ctx.device, call) for _ in range(RUNS)]
        ctx.record(**{name: {"s": statistics.median(seconds), "runs": seconds}})
    part = rows.head(ctx.sizes.naive_pairs)
    few = part["chosen_ids"].list.len().sum() + part["rejected_ids"].list.len().sum()
    bench.naive(part.head(1))
    seconds = timed(ctx.device, partial(bench.naive, part))
    ctx.record(naive={"s": seconds, "num_response_tokens": few, "s_for_all_pairs": seconds * num_tokens / few})
