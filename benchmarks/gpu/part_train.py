"""A training step of ours and of TRL's, then single switches of ours, then a larger model and a long row."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.context import Context, timed
from benchmarks.gpu.inputs import llama_config, train_job
from benchmarks.taken_back import TAKEN_BACK, exchanged
from benchmarks.train import peak_tflops
from benchmarks.train_contenders import Job, make_trainer, measure, memory_mb
from benchmarks.train_inputs import VOCABULARIES

SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "all pairs at once": {"optim": {"tokens_per_batch": 1 << 20}},
    "float32": {"model": {"dtype": "float32"}},
    "gradient checkpointing": {"model": {"gradient_checkpointing": True}},
    "padded sequences": {"model": {"packing": False}},
    "compiled layers": {"model": {"compile": True}},
}
"""Each alone on top of what the benchmark trains with, as sections of our config."""
CONTENDER_S = 12.0
"""Seconds that a contender needs at least; with less left it is not begun."""


def run(ctx: Context) -> None:
    """Measure one contender after the other."""
    job = train_job(ctx)
    reachable = peak_tflops(ctx.device)
    ctx.record(peak_tflops=reachable, pairs_per_step=job.pairs_per_step)
    contenders = {"ours": job, **{name: replace(job, contender=name) for name in ("trl", "trl_precomputed")}}
    for name, contender in contenders.items():
        ctx.attempt(name, partial(_measure, contender, reachable), CONTENDER_S if name != "ours" else 0.0)
    larger = _larger(ctx, job)
    if larger is not None:
        ctx.attempt("ours, larger model", partial(_measure, larger, reachable), CONTENDER_S)
    for name in ("", ", gradient checkpointing"):
        settings = {"model": {"gradient_checkpointing": bool(name)}}
        row = partial(_measure_row, replace(job, settings=job.settings | settings), ctx.sizes.long_row)
        ctx.attempt(f"long row{name}", row, CONTENDER_S)
    for name, settings in SWITCHES.items():
        ctx.attempt(
            f"ours, {name}", partial(_measure, replace(job, settings=job.settings | settings), reachable), CONTENDER_S
        )
    for name, exchanges in TAKEN_BACK.items():
        with exchanged(exchanges):
            ctx.attempt(f"ours, with {name}", partial(_measure, job, reachable), CONTENDER_S)


def _measure(job: Job, reachable: float, record: Callable[..., None]) -> None:
    found = measure(job)
    seconds = sum(found["step_s"])
    record(
        median_step_s=statistics.median(found["step_s"]),
        peak_mb=found["peak_mb"] - found["before_mb"],
        all_mb=found["peak_mb"],
        tokens_per_s=sum(found["num_tokens"]) / seconds,
        model_flops_utilisation=sum(found["needed_tflop"]) / seconds / reachable,
        data_wait_share=sum(found["wait_s"]) / seconds,
        losses=found["losses"],
        step_s=found["step_s"],
    )


def _measure_row(job: Job, num_tokens: int, record: Callable[..., None]) -> None:
    """Run forward and backward of one pair, half of it prompt; the optimizer would add 8 bytes a parameter."""
    import numpy as np
    import torch

    from train.data.dataset import Pair, StoredResponse
    from train.model.collate import PairCollator, model_inputs

    ids = np.random.default_rng(0).integers(3, 8000, num_tokens).astype(np.int32)
    prompt, chosen, rejected = np.split(ids, [num_tokens // 2, num_tokens * 3 // 4])
    sides = [StoredResponse(part, *np.zeros((2, len(part)), np.float32)) for part in (chosen, rejected)]
    trainer = make_trainer(job)
    model = trainer.model.train()
    batch = PairCollator()([Pair("long", prompt, sides[0], sides[1])], job.device)
    before_mb = memory_mb(job.device, restart_peak=True)

    def run() -> None:
        with torch.autocast(job.device, torch.bfloat16):
            terms = model(**model_inputs(batch))
        terms.logps.sum().backward()

    seconds = [timed(job.device, run) for _ in range(2)]
    peak_mb = memory_mb(job.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    record(num_tokens=num_tokens, s=seconds, peak_mb=peak_mb - before_mb, with_adamw_mb=peak_mb + 8e-6 * num_parameters)


def _larger(ctx: Context, job: Job) -> Job | None:
    """Return a training of the larger model; None on a card on which float32 parameters with AdamW do not fit."""
    import torch

    body = ctx.sizes.larger_model
    if body is None or (ctx.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 100e9):
        return None
    folder = ctx.work / "train" / "larger"
    llama_config(body, VOCABULARIES[ctx.sizes.vocabulary]).save_pretrained(folder)
    return replace(job, model=str(folder), random=True, num_steps=job.warm_up + 2)
