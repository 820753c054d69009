"""Scoring against the engine's own prefill and plain vLLM, parity of the ways into vLLM, and sampling without CUDA graphs.

One start of the engine for all of it. `part_ways.py` has the other model runner.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

from benchmarks.gpu.context import Context, forget_memory, timed
from benchmarks.gpu.inputs import score_model

PARITY_NATS = 0.05
"""Largest mean difference from transformers in float32, in bfloat16; 0.0155 were seen on an H200."""
NUM_IN_FULL_STEPS = 1000
FULL_STEPS_NATS = 1.0
"""Largest difference of two ways in any token; a row that is read too early or from another request is off by several nats."""
Sequences = list[tuple[list[int], list[int]]]


def run(ctx: Context) -> None:
    """Compare the ways, then measure ours and prefill on every set, then sampling, then plain vLLM."""
    if ctx.device == "cuda":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from benchmarks.score import Bench, make_sets, sequences_of

    sets = make_sets(ctx.work / "score", ctx.shared, amounts=ctx.sizes.amounts)
    sequences = {name: sequences_of(described["tokens"]) for name, described in sets.items()}
    model = str(score_model(ctx))
    keep_expected(ctx, model, sequences["hh"][: ctx.sizes.parity_sequences])
    bench = Bench(model)
    ctx.record(engine={"v2": bool(bench.engine.vllm_config.use_v2_model_runner), "settings": str(bench.request.engine)})
    # First, so that kernels are compiled and the way is chosen before anything is timed.
    ctx.attempt("parity", partial(measure_parity, ctx, bench.scorer.engine))
    bench.prefill(sequences["hh"][:64])
    for name, described in sets.items():
        ways = {"prefill": partial(bench.prefill, sequences[name]), "ours": partial(bench.ours, described["tokens"])}
        ctx.attempt(name, partial(_compare, ctx.device, bench, ways, described))
    ctx.attempt("full steps", partial(measure_full_steps, bench.scorer.engine, sequences["hh"][:NUM_IN_FULL_STEPS]))
    ctx.attempt("sampling", partial(measure_sampling, ctx, bench.scorer.engine))
    for name, described in sets.items():
        plain = {"plain": partial(bench.plain, sequences[name])}
        enough = 3 * ctx.found[name].get("prefill", {}).get("s", 0.0)
        ctx.attempt(f"{name}, plain", partial(_compare, ctx.device, bench, plain, described), least_s=enough)


def _compare(
    device: str,
    bench: Any,
    ways: dict[str, Callable[[], Any]],
    described: dict[str, Any],
    record: Callable[..., None],
) -> None:
    """Time each way once, on an empty cache; record after each."""
    for way, call in ways.items():
        bench.forget()
        seconds = timed(device, call)
        rates = {f"{kind}_tokens_per_s": described[f"num_{kind}_tokens"] / seconds for kind in ("response", "engine")}
        record(**{way: {"s": seconds, **rates}}, num_pairs=described["num_pairs"])


# --- parity ------------------------------------------------------------------------------------------------------------


def keep_expected(ctx: Context, model: str, sequences: Sequences) -> None:
    """Write what transformers gives in float32, a sequence at a time, for `measure_parity` of this and another process."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("highest")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, **options).eval()
    plain.to(ctx.device)
    logps = []
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response], device=ctx.device)
        with torch.inference_mode():
            rows = plain(ids, logits_to_keep=len(response) + 1, use_cache=False).logits[0, :-1].log_softmax(-1)
        logps.append(rows.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist())
    del plain, rows
    forget_memory()
    (ctx.work / "expected.json").write_text(json.dumps({"model": model, "sequences": sequences, "logps": logps}))


def measure_parity(ctx: Context, engine: Any, record: Callable[..., None]) -> None:
    """Compare each way into the engine with transformers, and with each other, nats. The fast one must have been chosen."""
    import numpy as np

    from pipeline.engine.score_once import ScoredSequence, Scores
    from pipeline.engine.ways import RESPONSE_ROWS, WAYS

    expected = json.loads((ctx.work / "expected.json").read_text())
    sequences = [ScoredSequence(prompt, response) for prompt, response in expected["sequences"]]
    engine.score(sequences)  # chooses its way
    chosen, found = engine.way, {"transformers": np.concatenate(expected["logps"])}
    for way in WAYS:
        engine.way, engine._top_k = way, None
        replies = engine.score(sequences)
        assert all(isinstance(reply, Scores) for reply in replies), replies
        found[way] = np.concatenate([reply.logps for reply in replies])
    engine.way = chosen
    gaps = {
        f"{one} to {other}": {"mean": float(gap.mean()), "max": float(gap.max())}
        for one, other in combinations(found, 2)
        for gap in [np.abs(found[one] - found[other])]
    }
    record(chosen_way=chosen, nats=gaps, num_tokens=len(found["transformers"]))
    record(passed=chosen == RESPONSE_ROWS and all(gap["mean"] <= PARITY_NATS for gap in gaps.values()))


def measure_full_steps(engine: Any, sequences: Sequences, record: Callable[..., None]) -> None:
    """Compare the ways in steps that follow each other without a pause, with the eight most likely tokens, nats."""
    import numpy as np

    from pipeline.engine.score_once import ScoredSequence, Scores
    from pipeline.engine.ways import WAYS, mean_difference

    asked = [ScoredSequence(prompt, response, top_k=8) for prompt, response in sequences]
    chosen, found = (engine.way, engine._top_k), {}
    for way in WAYS:
        engine.way, engine._top_k = way, None
        found[way] = engine.score(asked)
    engine.way, engine._top_k = chosen
    bad = [str(reply) for replies in found.values() for reply in replies if not isinstance(reply, Scores)]
    record(num_sequences=len(asked), bad=bad[:3], mean=mean_difference(*found.values()), passed=False)
    if not bad:
        one, other = (np.concatenate([reply.logps for reply in replies]) for replies in found.values())
        largest = float(np.abs(one - other).max())
        record(max=largest, passed=largest <= FULL_STEPS_NATS)


# --- sampling ----------------------------------------------------------------------------------------------------------


def measure_sampling(ctx: Context, engine: Any, record: Callable[..., None]) -> None:
    """Sample continuations as anchors are; the second run counts."""
    from pipeline.engine.contract import Sampling

    expected = json.loads((ctx.work / "expected.json").read_text())
    prompts = [prompt for prompt, _ in expected["sequences"]]
    prompts = [prompts[i % len(prompts)] for i in range(ctx.sizes.prompts)]
    sampling, made = Sampling(max_new_tokens=ctx.sizes.new_tokens, temperature=1.0), []
    first = prompts[:8]
    engine.generate(first, sampling, range(len(first)))
    seconds = timed(ctx.device, lambda: made.extend(engine.generate(prompts, sampling, range(len(prompts)))))
    num_tokens = sum(map(len, made))
    record(s=seconds, num_prompts=len(prompts), num_tokens=num_tokens, tokens_per_s=num_tokens / seconds)
