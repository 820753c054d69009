"""`make bench-train`: a training step of ours against TRL's DPOTrainer and against the official TIS-DPO step.

Everybody trains the same random Llama on the same pairs in the same order: float32 parameters, bf16 autocast, no gradient
checkpointing, eight pairs a step. A step is everything from one optimizer step to the next: data, forward, backward, clipping,
optimizer. The contenders:

* `ours`: `tokenweights train`'s own trainer, loss `tis_dpo`;
* `trl`: TRL's DPOTrainer with its reference model, all eight pairs at once;
* `trl_precomputed`: with `precompute_ref_log_probs`, the precomputing left out, and as few pairs at once as suits it best;
* `official`: the step of the TIS-DPO release, re-implemented: chosen and rejected in one padded batch, both models' whole
  log-softmax, a KL over the vocabulary that has a graph and is only logged, RMSprop.

TRL gets its tokens as ids, fused AdamW, and the fused head that 1.16 always uses; `--tries` measures what else might make it
faster. The official step gets bf16 autocast too, which the release does not have, and a reference in half precision, which it
has.

Each run is a process of its own, and the contenders take turns. Memory is the peak of the resident set from the first step on
(on a GPU: of the memory in tensors), minus what was there before the first step. `loader_share` is the share of the measured
steps that our trainer spends in getting its micro-batches: reading, checking, cutting, collating.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, where `train` would be this file

from benchmarks.machine import describe
from benchmarks.train_contenders import Job, measure
from benchmarks.train_inputs import VOCABULARIES, make_inputs

REPO = Path(__file__).resolve().parent.parent
ROUNDS, WARM_UP, STEPS = 2, 3, 10
"""Runs per contender; steps of a run that do not count, and that do."""
PAIRS_PER_STEP = 8
TRL_PAIRS_AT_ONCE = {"cpu": 2, "cuda": 8}
"""Of `trl_precomputed`: less padding against more kernels, see `--tries`."""
CURVE_STEPS, CURVE_PAIRS = 50, 2
BIG_STEPS, BIG_PAIRS_AT_ONCE = 2, 4
"""With 128 k ids: steps that count after a first one, and pairs at once. The official step on all eight needs over 24 GiB."""
TARGETS = {
    "step_vs_trl": 0.25,
    "step_vs_trl_precomputed": 0.40,
    "step_vs_official": 0.25,
    "peak_memory_vs_trl": 0.6,
    "peak_memory_vs_official": 0.25,
    "loader_share": 0.01,
    "curve_max_abs_diff": 1e-3,
    "curve_max_abs_diff_same_reference": 5e-5,
}
"""All at most. The curve against TRL's live reference has the 12 bits of stored log-probs in it; the one against TRL with the
same stored ones (`train/trl_adapter.py`) has the arithmetic alone. Its bound is TRL's own rounding: it subtracts two sums of
some -2,000 nats in float32, 1.2e-4 apart at best, times beta = 0.1."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, by part of the device's name."""
TRIES: dict[str, dict[str, Any]] = {
    "8 pairs at once": {},
    "4 pairs at once": {"pairs_at_once": 4},
    "2 pairs at once": {"pairs_at_once": 2},
    "1 pair at once": {"pairs_at_once": 1},
    "eager attention": {"trl_settings": {"model_init_kwargs": {"attn_implementation": "eager"}}},
    "lengths rounded up to 64": {"trl_settings": {"pad_to_multiple_of": 64}},
    "torch.compile": {"trl_settings": {"torch_compile": True, "pad_to_multiple_of": 64}},
}
"""Not tried: `padding_free`, which 1.16 switches off with a warning, and Liger's kernels, which want Triton."""


def in_child(job: Job) -> dict[str, Any]:
    """Run one contender in a process of its own, with two threads on the CPU; a finished run is kept in `runs.jsonl`."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "0"}
    threads = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    started = time.perf_counter()
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(job))]
    done = subprocess.run(command, env={**os.environ, **quiet, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job.contender} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    took = time.perf_counter() - started
    with (Path(job.store).parent.parent / "runs.jsonl").open("a") as lines:
        lines.write(json.dumps({"job": asdict(job), "took_s": round(took, 1), **result}) + "\n")
    _say(f"  {job.contender:<16} median step {statistics.median(result['step_s']):6.2f} s   run {took:4.0f} s")
    return result


def run_all(work: Path, shared: Path, device: str, *, quick: bool) -> dict[str, Any]:
    """Measure everything and return the results."""
    started = time.perf_counter()
    rounds, warm_up, steps = (1, 1, 2) if quick else (ROUNDS, WARM_UP, STEPS)
    curve_steps, big_steps = (3, 1) if quick else (CURVE_STEPS, BIG_STEPS)
    big_pairs = BIG_PAIRS_AT_ONCE if quick else PAIRS_PER_STEP
    _say("random models, and pairs scored with them")
    num_pairs = max((warm_up + steps) * PAIRS_PER_STEP, curve_steps * CURVE_PAIRS)
    small = make_inputs(work, shared, device, "8k", num_pairs)
    big = make_inputs(work, shared, device, "128k", (1 + big_steps) * big_pairs)

    _say(f"{rounds} rounds of {warm_up} + {steps} steps, 8 k vocabulary")
    contenders = ("ours", "trl", "trl_precomputed", "official")
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    for seed in range(rounds):
        for contender in contenders:
            job = Job(contender, **small, device=device, num_steps=warm_up + steps, warm_up=warm_up, seed=seed)
            at_once = TRL_PAIRS_AT_ONCE[device] if contender == "trl_precomputed" else PAIRS_PER_STEP
            runs[contender].append(in_child(replace(job, pairs_at_once=at_once)))

    _say(f"128 k vocabulary, {BIG_PAIRS_AT_ONCE} pairs at once, 1 + {big_steps} steps of {big_pairs} pairs")
    big_job = Job("", **big, device=device, num_steps=1 + big_steps, warm_up=1)
    big_job = replace(big_job, pairs_per_step=big_pairs, pairs_at_once=BIG_PAIRS_AT_ONCE)
    big_runs = {name: [in_child(replace(big_job, contender=name))] for name in ("ours", "trl", "official")}

    _say(f"loss curves in float32, {curve_steps} steps")
    curve_job = Job(
        "",
        **small,
        device=device,
        num_steps=curve_steps,
        pairs_per_step=CURVE_PAIRS,
        pairs_at_once=CURVE_PAIRS,
        dtype="float32",
        learning_rate=1e-5,
        warm_up=1,
    )
    names = ("ours_dpo", "trl", "trl_on_stored")
    curves = {contender: in_child(replace(curve_job, contender=contender))["losses"] for contender in names}
    return {
        **summarise(runs, big_runs, curves),
        "8k": describe_runs(runs, device),
        "128k": describe_runs(big_runs, device),
        "curves": curves,
        "device": device,
        "pairs_per_step": PAIRS_PER_STEP,
        "machine": describe("torch", "transformers", "accelerate", "trl"),
        "took_s": round(time.perf_counter() - started),
        "measured": {"8k": runs, "128k": big_runs},
    }


def run_tries(work: Path, shared: Path, device: str) -> None:
    """Measure single changes to TRL's settings, in two rounds, and print the median steps."""
    inputs = make_inputs(work, shared, device, "8k", (WARM_UP + 4) * PAIRS_PER_STEP)
    job = Job("trl_precomputed", **inputs, device=device, num_steps=WARM_UP + 4, warm_up=WARM_UP)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRIES}
    for seed in range(2):
        for name, changes in TRIES.items():
            _say(name)
            runs[name].append(in_child(replace(job, seed=seed, **changes)))
    for name, of in runs.items():
        print(f"{name:<28}{median_step(of):>8.2f} s per step{peak(of):>10,.0f} MB")


Runs = dict[str, list[dict[str, Any]]]


def summarise(runs: Runs, big_runs: Runs, curves: dict[str, list[float]]) -> dict[str, float]:
    """Return the figures that have a target."""

    def step_vs(contender: str) -> float:
        return median_step(runs["ours"]) / median_step(runs[contender])

    def apart(contender: str) -> float:
        pairs = zip(curves["ours_dpo"], curves[contender], strict=True)
        return max(abs(ours - theirs) for ours, theirs in pairs)

    waited, total = (sum(sum(run[name]) for run in runs["ours"]) for name in ("wait_s", "step_s"))
    return {
        "step_vs_trl": step_vs("trl"),
        "step_vs_trl_precomputed": step_vs("trl_precomputed"),
        "step_vs_official": step_vs("official"),
        "peak_memory_vs_trl": peak(runs["ours"]) / peak(runs["trl"]),
        "peak_memory_vs_official": peak(big_runs["ours"]) / peak(big_runs["official"]),
        "loader_share": waited / total,
        "curve_max_abs_diff": apart("trl"),
        "curve_max_abs_diff_same_reference": apart("trl_on_stored"),
    }


def median_step(runs: list[dict[str, Any]]) -> float:
    """Return the median over the measured steps of all runs, seconds."""
    return statistics.median(step_s for run in runs for step_s in run["step_s"])


def peak(runs: list[dict[str, Any]]) -> float:
    """Return the median over runs of the memory that training takes beyond what was there before, MB."""
    return statistics.median(run["peak_mb"] - run["before_mb"] for run in runs)


def describe_runs(runs: Runs, device: str) -> dict[str, Any]:
    """Return per contender: step time, memory, tokens/s (prompts counted once) and use of the device's arithmetic."""
    reachable = peak_tflops(device)
    described: dict[str, Any] = {"peak_tflops": reachable}
    for contender, of in runs.items():
        seconds = sum(sum(run["step_s"]) for run in of)
        described[contender] = {
            "median_step_s": median_step(of),
            "num_steps": sum(len(run["step_s"]) for run in of),
            "peak_mb": peak(of),
            "tokens_per_s": sum(sum(run["num_tokens"]) for run in of) / seconds,
            "model_flops_utilisation": sum(sum(run["needed_tflop"]) for run in of) / seconds / reachable,
        }
    return described


def peak_tflops(device: str) -> float:
    """Return dense bf16 TFLOP/s: of the data sheet where we know it, else of a large product of matrices."""
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
        if known := [tflops for part, tflops in PEAK_TFLOPS.items() if part in name]:
            return known[0]
    size, times = (8192 if device == "cuda" else 2048), []
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e12


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(results: dict[str, Any]) -> None:
    """Print the figures with their targets, and what each contender reached."""
    print(f"\n{'figure':<36}{'target':>14}{'reached':>12}")
    for figure, target in TARGETS.items():
        missed = "   MISSED" if results[figure] > target else ""
        print(f"{figure:<36}{f'at most {target:g}':>14}{results[figure]:>12.3g}{missed}")
    print(f"\n{'':<22}{'s per step':>12}{'peak MB':>10}{'tokens/s':>12}{'MFU':>8}")
    for vocabulary in VOCABULARIES:
        for contender, of in results[vocabulary].items():
            if contender != "peak_tflops":
                cells = f"{of['median_step_s']:>12.3f}{of['peak_mb']:>10,.0f}{of['tokens_per_s']:>12,.0f}"
                print(f"{vocabulary:<6}{contender:<16}{cells}{of['model_flops_utilisation']:>8.1%}")


def main() -> None:
    """Run the benchmark, or one run of it in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--work", type=Path, default=REPO / "benchmarks" / "scratch" / "train", help="scratch folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda takes a model of 0.6-0.8 B")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; writes no result file")
    parser.add_argument("--tries", action="store_true", help="measure other settings of TRL instead, and print them")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Job(**json.loads(options.measure)))))
        return
    if not (options.shared / "data" / "alpaca_judged.parquet").is_file():
        raise SystemExit(f"{options.shared} has no data/alpaca_judged.parquet: give the folder with --shared")
    if options.tries:
        run_tries(options.work, options.shared, options.device)
        return
    results = run_all(options.work, options.shared, options.device, quick=options.quick)
    name = "train.json" if options.device == "cpu" else f"train_{options.device}.json"
    target = (options.work if options.quick else REPO / "benchmarks" / "results") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nwrote {target}")


if __name__ == "__main__":
    main()
