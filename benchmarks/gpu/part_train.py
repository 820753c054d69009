"""A training step of ours and of TRL's, then single switches of ours, then a larger model and a long row."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.inputs import llama_config, train_job
from benchmarks.train import peak_tflops
from benchmarks.train_contenders import Job, measure
from benchmarks.train_inputs import VOCABULARIES

SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
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
    for name, settings in SWITCHES.items():
        ctx.attempt(f"ours, {name}", partial(_measure, replace(job, settings=settings), reachable), CONTENDER_S)


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


def _larger(ctx: Context, job: Job) -> Job | None:
    """Return a training of the larger model; None on a card on which float32 parameters with AdamW do not fit."""
    import torch

    body = ctx.sizes.larger_model
    if body is None or (ctx.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 100e9):
        return None
    folder = ctx.work / "train" / "larger"
    llama_config(body, VOCABULARIES[ctx.sizes.vocabulary]).save_pretrained(folder)
    return replace(job, model=str(folder), random=True, num_steps=job.warm_up + 2)
