"""Do weights help on real pairs, where nobody knows the true rewards? Run as `python -m benchmarks.quality.real_pairs`.

Policies are trained on a few hundred pairs of a real dataset for one epoch, and then asked which response of held-out pairs is
the better one: the margin of a pair is the difference of log pi - log ref between its responses. So this measures whether a
policy has learnt the annotators' taste, and not what it would write: reward at equal KL needs worlds with a known reward
(`__main__.py`). For comparison the same is measured of the head's scores alone, and of the number of tokens.

All arithmetic is float32. Measured in bfloat16, margins were a third of what they are: after 8 steps nine tenths of the weights
of SmolLM2 still rounded to those of the start.

Every policy is one line in `benchmarks/scratch/real_pairs/`; a second call goes on where the first one stopped.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from benchmarks.machine import describe
from benchmarks.quality.heat_map import SPREAD, draw_sentences
from benchmarks.quality.methods import SPREAD_CLAMP
from benchmarks.quality.real_data import Split, groups_of, read_pairs, split_by_prompt
from benchmarks.quality.runs import Log
from benchmarks.quality.scores import (
    Scorers,
    Scores,
    as_pairs,
    logps_of,
    margins_of,
    responses_of,
    scores_by,
    sequences,
    weights_of,
)
from benchmarks.quality.summary import interval
from benchmarks.quality.worlds import KLS, Row, World
from pipeline.toy.policies import Base, train_policy
from pipeline.toy.world import Rewards
from pipeline.weighing.head import Head, fit_head
from pipeline.weighing.held_out import measure

REPO = Path(__file__).resolve().parent.parent.parent
SCRATCH = REPO / "benchmarks" / "scratch" / "real_pairs"
RESULTS = REPO / "benchmarks" / "results"
DATA = {"hh": "hh_harmless.jsonl", "alpaca": "alpaca_judged.parquet"}
PAIRS_PER_STEP, LEARNING_RATE = 16, 2e-5
MEASURES = ("accuracy", "log_likelihood", "log_likelihood_at_beta")
"""Of held-out pairs: share that is right; nats a pair with a fitted scale of the margins, and with the method's own beta."""


def scores_of(head: Head, rows: Sequence[Row]) -> Scores:
    """Return the head's token scores, chosen and rejected in turns, of fits that have not seen the pair's prompt."""
    return scores_by(head, responses_of(rows), groups_of(rows))


def measured(scores: Scores, rows: Sequence[Row], beta: float | None) -> dict[str, float]:
    """Return how well token scores of pairs, chosen and rejected in turns, predict labels; `beta` is their scale, if any."""
    margins = margins_of(scores)
    found = measure(margins, groups_of(rows))
    assert found is not None, "too few prompts to measure"
    sums = [float(each.sum(dtype=np.float64)) for each in scores]
    at_beta = {} if beta is None else {"log_likelihood_at_beta": float(np.mean(-np.logaddexp(0.0, -beta * margins)))}
    return at_beta | {
        "accuracy": found.accuracy,
        "log_likelihood": found.log_likelihood,
        "log_likelihood_se": found.log_likelihood_se,
        "multiplier": found.multiplier,
        "margin_std": float(margins.std()),
        "mean_chosen": float(np.mean(sums[::2])),
        "mean_rejected": float(np.mean(sums[1::2])),
    }


@dataclass
class Case:
    """One dataset and seed: its pairs, and what the reference and the head make of them."""

    base: Base
    split: Split

    def head(self, *, on_other: bool = False) -> Head:
        """Return the head, fitted on the training pairs, with `on_other` on the other ones too."""
        rows = [*self.split.train, *(self.split.other if on_other else [])]
        return fit_head(*responses_of(rows), groups_of(rows))

    def scores_of_d(self) -> Scores:
        """Return log pi+ - log pi- of construction D for the training pairs, which its models have seen."""
        unknown = Rewards(np.zeros((1, 1)))
        return Scorers(World(self.base, unknown, self.split.train, [], [], 0, LEARNING_RATE, (), KLS["real"])).trained(
            "dpo"
        )

    @cached_property
    def train_ref_logps(self) -> Scores:
        """The reference's log-probs of the training pairs."""
        return logps_of(self.base, self.base.plain, *sequences(self.split.train))

    @cached_property
    def held_out_ref_logps(self) -> Scores:
        """The reference's log-probs of the held-out pairs."""
        return logps_of(self.base, self.base.plain, *sequences(self.split.held_out))

    def run(self, method: "Method") -> dict[str, object]:
        """Train a policy, and return what it makes of the held-out pairs."""
        weights = method.weights(self) if method.weights else None
        pairs, held_out = as_pairs(self.split.train, self.train_ref_logps, weights), self.split.held_out
        reference, started = self.held_out_ref_logps, time.monotonic()
        optim = {
            "learning_rate": LEARNING_RATE,
            "pairs_per_step": PAIRS_PER_STEP,
            "max_steps": len(pairs) // PAIRS_PER_STEP,
            "tokens_per_batch": 1024,  # a whole step at once would take 5 GB more
        }
        model = train_policy(self.base, pairs, {"name": method.loss, "beta": method.beta}, optim)
        logps = logps_of(self.base, self.base.plain_copy(model), *sequences(held_out))
        log_ratios = [of_policy - of_ref for of_policy, of_ref in zip(logps, reference, strict=True)]
        return measured(log_ratios, held_out, method.beta) | {"wall_s": round(time.monotonic() - started, 1)}


class Method(NamedTuple):
    """A training."""

    loss: str
    beta: float
    weights: Callable[[Case], Scores] | None = None


def _of_head(spread: float, on_other: bool = False) -> Callable[[Case], Scores]:
    def weights(case: Case) -> Scores:
        return weights_of(scores_of(case.head(on_other=on_other), case.split.train), spread=spread, **SPREAD_CLAMP)

    return weights


METHODS = {
    "DPO, beta 0.1": Method("dpo", 0.1),
    "DPO, beta 0.3": Method("dpo", 0.3),
    "head": Method("tis_dpo", 0.3, _of_head(SPREAD)),
    "head on other pairs": Method("tis_dpo", 0.3, _of_head(SPREAD, on_other=True)),
    "head, spread 0.6, beta 0.1": Method("tis_dpo", 0.1, _of_head(0.6)),
    "head on other pairs, spread 0.6, beta 0.1": Method("tis_dpo", 0.1, _of_head(0.6, on_other=True)),
    "TIS-DPO (D), paper": Method("tis_dpo", 0.1, lambda case: weights_of(case.scores_of_d())),
}


def run_case(base: Base, rows: Sequence[Row], seed: int, methods: Sequence[str], log: Log) -> None:
    """Run what one dataset and seed does not have yet."""
    case = Case(base, split_by_prompt(rows, seed))
    held_out = case.split.held_out
    if not log.has(kind="scores"):
        log.add(kind="split", **{side: len(pairs) for side, pairs in case.split._asdict().items()})
        alone = {
            "number of tokens": [np.ones(len(response), np.float32) for row in held_out for response in row[1:]],
            "the head's scores": scores_of(case.head(), held_out),
            "the head's scores, on other pairs": scores_of(case.head(on_other=True), held_out),
        }
        for name, scores in alone.items():
            log.add(kind="scores", name=name, **measured(scores, held_out, 1.0 if "head" in name else None))
    for name in methods:
        if not log.has(kind="policy", name=name):
            log.add(kind="policy", name=name, **case.run(METHODS[name]))
            print(f"{time.strftime('%H:%M:%S')} {log.path.stem} {log.lines[-1]}", flush=True)


def summarise(logs: Mapping[int, Log]) -> dict[str, Any]:
    """Return means over seeds with 95 % intervals, and the differences from the better one of DPO's settings, by seed."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed, log in logs.items():
        for line in log.lines:
            if "name" in line:
                found.setdefault(line["name"], {})[seed] = line
    rows: dict[str, Any] = {name: {"every_run": by_seed} for name, by_seed in found.items()}
    for key in MEASURES:
        values = {
            name: {seed: line[key] for seed, line in by_seed.items() if key in line} for name, by_seed in found.items()
        }
        of_dpo = [name for name in values if name.startswith("DPO")]
        dpo = max(of_dpo, key=lambda name: np.mean([*values[name].values()]), default=None)
        for name, by_seed in values.items():
            if not by_seed:
                continue
            rows[name][key] = interval([*by_seed.values()])
            if dpo is not None and name != dpo and (seeds := sorted(by_seed.keys() & values[dpo].keys())):
                rows[name][f"{key}_minus_dpo"] = interval([by_seed[seed] - values[dpo][seed] for seed in seeds])
    return {"rows": rows, "num_seeds": len(logs)}


def table(summary: Mapping[str, Any]) -> list[str]:
    """Return the table of one dataset in Markdown."""
    heads = ("held-out pairs", "right", "− DPO", "nats a pair, fitted scale", "− DPO", "at its own beta", "− DPO")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in summary["rows"].items():
        cells = []
        for key in MEASURES:
            unit = "%" if key == "accuracy" else ""
            cells += [_pm(row.get(key), unit, ""), _pm(row.get(f"{key}_minus_dpo"), unit, "+")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _pm(found: tuple[float, float] | None, unit: str, sign: str) -> str:
    """Return a mean and half its interval, which is unknown with one seed; in percent or in nats."""
    if found is None:
        return ""
    scale, digits = (100, 1) if unit else (1, 3)
    error = "" if math.isnan(found[1]) else f" ± {scale * found[1]:.{digits}f}"
    return f"{scale * found[0]:{sign}.{digits}f}{error}{' ' * bool(unit)}{unit}"


def main() -> None:
    """Run what is missing, and write the result file and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="the folder of a chat model, SmolLM2-135M-Instruct here"
    )
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:4], choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="the folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result file and the figure")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    rows = {
        name: read_pairs(arguments.model, arguments.shared / "data" / DATA[name], arguments.scratch / "store")
        for name in arguments.data
    }
    base = Base(arguments.model)
    for seed in arguments.seeds:
        for name in arguments.data:
            run_case(base, rows[name], seed, arguments.methods, Log(arguments.scratch / f"{name}-{seed}.jsonl"))
    found: dict[str, Any] = {"machine": describe("torch", "transformers", "numpy")}
    for name in arguments.data:
        paths = sorted(arguments.scratch.glob(f"{name}-*.jsonl"))
        found[name] = summarise({int(path.stem.rsplit("-", 1)[1]): Log(path) for path in paths})
        print(f"\n### {name}: {found[name]['num_seeds']} seeds\n")
        print("\n".join(table(found[name])))
    arguments.results.mkdir(parents=True, exist_ok=True)
    heads = {name: fit_head(*responses_of(pairs), groups_of(pairs)) for name, pairs in rows.items()}
    spreads = {name: float(np.concatenate(scores_of(heads[name], pairs)).std()) for name, pairs in rows.items()}
    draw_sentences(
        {name: (heads[name], spreads[name]) for name in rows}, arguments.model, arguments.results / "real_pairs.svg"
    )
    (arguments.results / "real_pairs.json").write_text(
        json.dumps(found, indent=1, sort_keys=True).replace("NaN", "null") + "\n"
    )


if __name__ == "__main__":
    main()
