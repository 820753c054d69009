"""Where the time of our training step goes: kernels of a few steps by class, from torch's profiler."""

import re
from typing import Any

from benchmarks.gpu.context import Context, wait_for
from benchmarks.gpu.inputs import train_job
from benchmarks.train_contenders import make_trainer

CLASSES = {
    "optimizer": "adam",
    "attention": "flash|fmha|flex|attention|_attn",
    "log-softmax": "softmax|logsumexp",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|matmul|aten::(mm|addmm|bmm)$|_mm_|splitk",
    "casts and copies": "copy|memcpy|memset|cat|fill|_to_copy|clone",
    "compiled": "triton",
    "gather and scatter": "index|gather|scatter|embedding",
    "multiplications": "mul|MulFunctor",
    "additions": "add|AddFunctor|CUDAFunctor_add|aten::(sub|add)",
    "reductions": "reduce|norm|aten::(sum|mean)",
}
"""By name of a kernel; the first that fits."""
STEPS = 3


def run(ctx: Context) -> None:
    """Profile `STEPS` steps after the warm-up."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    job = train_job(ctx)
    warm_up = job.warm_up
    activities = [ProfilerActivity.CUDA] if ctx.device == "cuda" else [ProfilerActivity.CPU]
    profiler = profile(activities=activities, acc_events=True)
    steps = min(STEPS, job.num_steps - warm_up)

    class Window(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step in (warm_up, warm_up + steps):
                wait_for(ctx.device)
                (profiler.start if state.global_step == warm_up else profiler.stop)()

    trainer = make_trainer(job)
    trainer.add_callback(Window())
    trainer.train()
    totals: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        ms = (event.self_device_time_total if ctx.device == "cuda" else event.self_cpu_time_total) / 1e3 / steps
        if ms > 0:
            totals[event.key] = [ms, event.count / steps]
    ctx.record(**summarise(totals), torch=torch.__version__)


def summarise(totals: dict[str, list[float]]) -> dict[str, Any]:
    """Return milliseconds and kernels of a step by class, and the most expensive ones."""
    by_class: dict[str, dict[str, float]] = {}
    for name, (ms, count) in totals.items():
        of = by_class.setdefault(class_of(name), {"ms": 0.0, "kernels": 0.0})
        of["ms"] += ms
        of["kernels"] += count
    most = sorted(totals.items(), key=lambda item: -item[1][0])[:40]
    return {
        "kernel_ms": sum(of["ms"] for of in by_class.values()),
        "classes": dict(sorted(by_class.items(), key=lambda item: -item[1]["ms"])),
        "most_expensive": [{"name": name[:160], "ms": ms, "kernels": count} for name, (ms, count) in most],
    }


def class_of(name: str) -> str:
    """Return the class of a kernel."""
    found = [kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)]
    return found[0] if found else "other"
