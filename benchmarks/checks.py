"""`make bench-checks`: what it costs to compare everything that is read with its commit.

Made-up pairs in one store: tokens and three tables of log-probs. `publish` makes weights of them, with the comparison and
without it, in turns; `verify` reads it all. Each run is a process of its own on one core. Medians; the result file has
every run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from benchmarks.store import made_up_lists, on_one_core
from weights_store import TableVersion, WeightStore
from weights_store.checks.verify import verify
from weights_store.schemas import LOGPS, TOKENS

REPO = Path(__file__).resolve().parent.parent
RUNS = 7
SCORERS = ("ref", "positive", "negative")
TARGETS = {"checked_share_of_publish": ("at most", 0.05), "verify_mb_per_s": ("at least", 300)}


def write_tables(uri: str, num_pairs: int) -> None:
    """Write tokens and log-probs of made-up pairs: about 200 tokens in the prompt and in each response."""
    store, rng = WeightStore(uri), np.random.default_rng(0)
    lengths = {side: rng.poisson(200, num_pairs) + 1 for side in ("prompt", "chosen", "rejected")}
    columns: dict[str, Any] = {f"{side}_ids": made_up_lists(rng, lengths[side], "ids") for side in lengths}
    columns |= {"pair_id": sorted(rng.bytes(16).hex() for _ in range(num_pairs))}
    columns |= {"prompt": ["[" + "word " * 150 + "]"] * num_pairs, "split": ["train"] * num_pairs}
    columns |= {"source_row": np.arange(num_pairs)}
    statistics_of_all = {"num_source_rows": num_pairs, "num_pairs": num_pairs, "quarantined": {}}
    tokenizer = {"fingerprint": "t", "vocab_size": 8192, "eos_token_id": 2}
    metadata = {"fingerprint": "tokens", "statistics": statistics_of_all, "tokenizer": tokenizer}
    tokens = store.table("tokens/bench-1").append(_filled(columns, TOKENS, num_pairs), metadata)
    for scorer in SCORERS:
        logps = {f"{side}_logps": made_up_lists(rng, lengths[side], "logps") for side in ("chosen", "rejected")}
        rows = _filled({"pair_id": columns["pair_id"], **logps}, LOGPS, num_pairs)
        made_from = {"fingerprint": scorer, "statistics": {}, "parents": [tokens.as_parent()]}
        store.table(f"logps/bench-1/{scorer}").append(rows, made_from)


def _filled(columns: dict[str, Any], schema: pa.Schema, num_rows: int) -> pa.Table:
    """Return a table of the columns, with nulls for those of the schema that are not there."""
    empty = {field.name: pa.nulls(num_rows, field.type) for field in schema if field.name not in columns}
    return pa.table({name: {**columns, **empty}[name] for name in schema.names}, schema)


def measure_publish(uri: str, checked: str, name: str) -> float:
    """Publish once and return the CPU seconds it took."""
    from pipeline.recipe import Recipe
    from pipeline.stages.publish import Ingredients, publish
    from weights_store.settings import parse_settings
    from weights_store.tables.table_reader import TableReader

    if checked == "without":
        TableReader.check_shards = lambda self, shards: None  # type: ignore[method-assign]
    on_one_core()
    sections: dict[str, dict[str, object]] = {
        "dataset": {"name": "bench", "source": "pairs.jsonl"},
        "model": {"path": "model"},
        "weights": {"name": f"bench/{name}"},
        "store": {"uri": uri},
    }
    recipe = parse_settings(Recipe, sections, "the benchmark")
    started = time.process_time()
    publish(
        recipe,
        recipe.weights,
        Ingredients(_newest(uri, "tokens/bench-1"), *(_newest(uri, f"logps/bench-1/{s}") for s in SCORERS)),
    )
    return time.process_time() - started


def _newest(uri: str, path: str) -> TableVersion:
    return WeightStore(uri).table(path).reference()


def measure_verify(uri: str, rows: str) -> float:
    """Verify the whole store and return the MB of shards per CPU second."""
    on_one_core()
    num_bytes = sum(path.stat().st_size for path in Path(uri).rglob("*.parquet"))
    started = time.process_time()
    if findings := list(verify(WeightStore(uri), rows=rows == "rows")):
        raise SystemExit(f"the store is damaged: {findings[0]}")
    return num_bytes / 1e6 / (time.process_time() - started)


MEASUREMENTS: dict[str, Callable[..., float | None]] = {
    "write": lambda uri, num_pairs: write_tables(uri, int(num_pairs)),
    "publish": measure_publish,
    "verify": measure_verify,
}


def in_child(measurement: str, *arguments: str) -> float:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", measurement, *arguments]
    threads = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]) or 0)


def run_all(uri: Path, num_pairs: int) -> dict[str, Any]:
    """Measure everything and return the results."""
    shutil.rmtree(uri, ignore_errors=True)
    in_child("write", str(uri), str(num_pairs))
    publish_s: dict[str, list[float]] = {"with": [], "without": []}
    for run in range(RUNS):
        for checked, seconds in publish_s.items():
            seconds.append(in_child("publish", str(uri), checked, f"{checked}-{run}"))
    rates = {rows: [in_child("verify", str(uri), rows) for _ in range(RUNS)] for rows in ("bytes", "rows")}
    medians = {checked: statistics.median(seconds) for checked, seconds in publish_s.items()}
    return {
        "publish_s": medians["with"],
        "publish_without_checks_s": medians["without"],
        "checked_share_of_publish": 1 - medians["without"] / medians["with"],
        "verify_mb_per_s": statistics.median(rates["bytes"]),
        "verify_rows_mb_per_s": statistics.median(rates["rows"]),
        "num_pairs": num_pairs,
        "runs": {"publish_s": publish_s, "verify_mb_per_s": rates},
        "machine": describe("pyarrow", "polars", "deltalake", "numpy"),
    }


def main() -> None:
    """Run the benchmark, or one measurement of it in a child."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=REPO / "benchmarks" / "scratch", help="scratch folder (about 1 GB)"
    )
    parser.add_argument("--pairs", type=int, default=20_000, help="made-up pairs (default: 20,000)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure[0]](*options.measure[1:])))
        return
    results = run_all(options.work / "checks", options.pairs)
    target = REPO / "benchmarks" / "results" / "checks.json"
    target.write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        if isinstance(value, int | float):
            print(f"{name:<30}{value:>12,.4g}   {' '.join(map(str, TARGETS.get(name, ())))}")
    print(f"\nwrote {target.relative_to(REPO)}")


if __name__ == "__main__":
    main()
