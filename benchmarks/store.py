"""`make bench-store`: size and speed of the weight store, measured against JSONL, plain Parquet and `datasets`' Arrow.

Three parts, in one run: a real build on real text (sizes, and what a second build and one with 1 % new pairs cost), the formats
side by side on the rows of that build and on made-up ones, and memory and the doctor's time over a million made-up pairs.
Speeds are of one core, the doctor's of two: each measurement runs in a process of its own. Medians; the result file has every
run.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from pipeline.weighing.estimators import SideScores
from pipeline.weighing.estimators.tis_dpo import tis
from weights_store import WeightStore
from weights_store.schemas import FLOATS, IDS, LOGPS, SIDES, WEIGHTS
from weights_store.tables.notes import NOT_A_VERSION

REPO = Path(__file__).resolve().parent.parent
RUNS = 5
NAME = "bench/tis-dpo"
COLUMNS = [field.name for field in WEIGHTS if not field.nullable and field.name not in ("pair_weight", "split")]
TARGETS = {
    "bytes_per_response_token": ("at most", 5.5),
    "jsonl_over_ours": ("at least", 5),
    "read_speedup_jsonl": ("at least", 20),
    "rss_growth_mb": ("at most", 64),
    "weigh_tokens_per_s": ("at least", 50e6),
    "noop_rebuild_s": ("at most", 10),
    "doctor_s": ("at most", 60),
    "append_1pct_cost": ("at most", 0.011),
}

# --- the formats -------------------------------------------------------------------------------------------------------


def write_ours(rows: pa.Table, folder: Path) -> None:
    """Write through the store: sorted, rounded, with checksums, committed."""
    WeightStore(folder).table("weights/bench/ours").replace(_whole(rows), {"fingerprint": "bench"})


def read_ours(folder: Path) -> pa.Table:
    """Read our shards as any Parquet reader does."""
    return pa.concat_tables([pq.read_table(path, columns=COLUMNS, use_threads=False) for path in _parquets(folder)])


def read_ours_checked(folder: Path) -> pa.Table:
    """Read our shards through the store, every value checked against the commit."""
    return pa.concat_tables(list(WeightStore(folder).table("weights/bench/ours").batches(columns=COLUMNS)))


def write_jsonl(rows: pa.Table, folder: Path) -> None:
    """Write one object per line with lists of numbers, as the TIS-DPO release does; floats with the digits float32 needs."""
    with (folder / "rows.jsonl").open("w") as file:
        for batch in rows.to_batches(max_chunksize=500):
            for row in batch.to_pylist():
                for name, values in row.items():
                    if name.endswith(("weights", "logps")):
                        row[name] = [float(str(np.float32(value))) for value in values]
                file.write(json.dumps(row) + "\n")


def write_jsonl_doubles(rows: pa.Table, folder: Path) -> None:
    """Write the same with every float as Python prints it: more digits than there are, and faster to write."""
    with (folder / "rows.jsonl").open("w") as file:
        for batch in rows.to_batches(max_chunksize=500):
            file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


def read_jsonl(folder: Path) -> pa.Table:
    """Read line by line with `json`, as the release does, into Arrow."""
    with (folder / "rows.jsonl").open() as file:
        return pa.Table.from_pylist([json.loads(line) for line in file], _schema())


def read_jsonl_arrow(folder: Path) -> pa.Table:
    """Read with the fastest JSON reader that we have, pyarrow's."""
    import pyarrow.json as pajson

    options = pajson.ParseOptions(explicit_schema=_schema())
    return pajson.read_json(folder / "rows.jsonl", pajson.ReadOptions(use_threads=False, block_size=64 << 20), options)


def write_parquet(rows: pa.Table, folder: Path) -> None:
    """Write Parquet as pyarrow does by default."""
    pq.write_table(rows, folder / "rows.parquet")


def read_parquet(folder: Path) -> pa.Table:
    """Read it."""
    return pq.read_table(folder / "rows.parquet", use_threads=False)


def write_datasets(rows: pa.Table, folder: Path) -> None:
    """Write a saved dataset."""
    from datasets import Dataset

    Dataset(rows).save_to_disk(str(folder / "rows"))


def read_datasets(folder: Path) -> pa.Table:
    """Read it into memory; left memory-mapped, nothing would be read yet."""
    from datasets import load_from_disk

    return load_from_disk(str(folder / "rows"), keep_in_memory=True).data.table


FORMATS: dict[str, tuple[Callable[[pa.Table, Path], None], dict[str, Callable[[Path], pa.Table]]]] = {
    "ours": (write_ours, {"read": read_ours, "read_checked": read_ours_checked}),
    "jsonl": (write_jsonl, {"read": read_jsonl, "read_by_pyarrow": read_jsonl_arrow}),
    "jsonl_doubles": (write_jsonl_doubles, {"read": read_jsonl}),
    "plain_parquet": (write_parquet, {"read": read_parquet}),
    "datasets_arrow": (write_datasets, {"read": read_datasets}),
}


def _parquets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("weights/bench/ours/*.parquet") if path.name != NOT_A_VERSION)


def _schema() -> pa.Schema:
    return pa.schema([WEIGHTS.field(name) for name in COLUMNS])


def _whole(rows: pa.Table) -> pa.Table:
    """Add the columns that no loss here needs, as publish does."""
    columns = {name: rows[name] for name in rows.column_names}
    columns["pair_weight"] = pa.array(np.ones(rows.num_rows, np.float32))
    columns |= {field.name: pa.nulls(rows.num_rows, field.type) for field in WEIGHTS if field.nullable}
    columns["split"] = pa.array(["train"] * rows.num_rows)
    return pa.table({name: columns[name] for name in WEIGHTS.names}, WEIGHTS)


def _num_response_tokens(rows: pa.Table) -> int:
    return sum(len(chunk.flatten()) for side in ("chosen", "rejected") for chunk in rows[f"{side}_ids"].chunks)


def measure_formats(source: str, scratch: str) -> dict[str, Any]:
    """Write and read the rows of one weight dataset in every format, `RUNS` times each, in turns."""
    on_one_core()
    store, _, name = source.partition("::")
    rows = pa.concat_tables(list(WeightStore(store).table(f"weights/{name}").batches(columns=COLUMNS))).combine_chunks()
    num_tokens = _num_response_tokens(rows)
    result: dict[str, Any] = {"num_pairs": rows.num_rows, "num_response_tokens": num_tokens}
    seconds: dict[str, dict[str, list[float]]] = {form: {} for form in FORMATS}
    for _ in range(RUNS):
        for form, (write, readers) in FORMATS.items():
            folder = Path(scratch) / form
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            seconds[form].setdefault("write", []).append(_timed(lambda w=write, f=folder: w(rows, f)))
            for label, read in readers.items():
                seconds[form].setdefault(label, []).append(_timed(lambda r=read, f=folder: r(f)))
    for form, timings in seconds.items():
        folder = Path(scratch) / form
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        result[form] = {"bytes": num_bytes, "bytes_per_response_token": num_bytes / num_tokens}
        for label, runs in timings.items():
            result[form][f"{label}_tokens_per_s"] = num_tokens / statistics.median(runs)
            result[form][f"{label}_s"] = runs
    result["ours"]["column_bytes_per_response_token"] = _column_bytes(Path(scratch) / "ours", num_tokens)
    return result


def _column_bytes(folder: Path, num_tokens: int) -> dict[str, float]:
    sizes: dict[str, int] = {}
    for path in _parquets(folder):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return {name: size / num_tokens for name, size in sizes.items()}


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def on_one_core() -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)


# --- made-up pairs -----------------------------------------------------------------------------------------------------


def write_made_up(store: str, num_pairs: int) -> None:
    """Write a weight dataset of made-up pairs, a few thousand at a time: about 64 prompt and 2 x 48 response tokens."""
    table = WeightStore(store).table(f"weights/bench/made-up-{num_pairs}")
    if table.exists():
        return
    writer = table.writer()
    for rows in _made_up(num_pairs):
        writer.write(rows)
    table.commit(writer.finish(), {"fingerprint": "bench"}, None)


def _made_up(num_pairs: int, step: int = 5000, response_tokens: int = 48) -> Iterator[pa.Table]:
    rng = np.random.default_rng(0)
    for start in range(0, num_pairs, step):
        size = min(step, num_pairs - start)
        columns: dict[str, Any] = {"pair_id": [f"{index:032x}" for index in range(start, start + size)]}
        columns["prompt_ids"] = made_up_lists(rng, rng.poisson(64, size) + 1, "ids")
        for side in ("chosen", "rejected"):
            lengths = rng.poisson(response_tokens, size) + 1
            columns[f"{side}_ids"] = made_up_lists(rng, lengths, "ids")
            columns[f"{side}_token_weights"] = made_up_lists(rng, lengths, "weights")
            columns[f"{side}_ref_logps"] = made_up_lists(rng, lengths, "logps")
        yield _whole(pa.table(columns).select(COLUMNS))


def write_contrastive(store: str, num_pairs: int) -> None:
    """Write a weight dataset as `tis` leaves it, with the log-probs of both models: about 2 x 75 response tokens a pair."""
    opened, rng = WeightStore(store), np.random.default_rng(1)
    table = opened.table(f"weights/bench/contrastive-{num_pairs}")
    if table.exists():
        return
    scorers = {role: opened.table(f"logps/bench-{num_pairs}/{role}") for role in ("positive", "negative")}
    writers, writer = {role: each.writer() for role, each in scorers.items()}, table.writer()
    for rows in _made_up(num_pairs, response_tokens=75):
        writer.write(rows)
        for each in writers.values():
            columns: dict[str, Any] = {"pair_id": rows["pair_id"]}
            for side in SIDES:
                lengths = np.diff(rows[f"{side}_ids"].combine_chunks().offsets.to_numpy())
                columns[f"{side}_logps"] = made_up_lists(rng, lengths, "logps")
            each.write(
                pa.table(columns | {n: pa.nulls(len(rows), LOGPS.field(n).type) for n in LOGPS.names[3:]}, LOGPS)
            )
    parents = [
        {"role": f"{role}_logps", **scorers[role].commit(each.finish(), {"fingerprint": role}, None).as_parent()}
        for role, each in writers.items()
    ]
    settings = {"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}
    identity = {"settings": {"weights": settings}}
    table.commit(writer.finish(), {"fingerprint": "bench", "parents": parents, "identity": identity}, None)


def made_up_lists(rng: np.random.Generator, lengths: np.ndarray, kind: str) -> pa.Array:
    """Return lists of Zipf-like ids, exponential log-probs (nats) or log-normal weights in the clamp's range."""
    total = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    if kind == "ids":
        values = np.minimum(rng.zipf(1.3, total), 8191).astype(np.int32)
    elif kind == "logps":
        values = -rng.exponential(2.0, total).astype(np.float32)
    else:
        values = np.exp(np.clip(rng.normal(0.1, 0.5, total), -0.5, 1.5)).astype(np.float32)
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=IDS if kind == "ids" else FLOATS)


def measure_memory(store: str, num_pairs: str) -> dict[str, Any]:
    """Read a whole made-up dataset once, checked, and return the peak of resident memory."""
    on_one_core()
    num_tokens, started = 0, time.perf_counter()
    for rows in WeightStore(store).table(f"weights/bench/made-up-{num_pairs}").batches():
        num_tokens += _num_response_tokens(rows)
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": peak_mb, "read_s": seconds, "num_response_tokens": num_tokens}


def measure_doctor(store: str, num_pairs: str) -> dict[str, Any]:
    """Look for what is wrong with a whole made-up dataset, on two cores."""
    pairs, started = WeightStore(store), time.perf_counter()
    survey = pairs.survey(f"bench/contrastive-{num_pairs}")
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    num_tokens = survey.chosen.num_tokens + survey.rejected.num_tokens
    return {"s": seconds, "cpu_s": time.process_time(), "peak_mb": peak_mb, "num_response_tokens": num_tokens}


def measure_weigh() -> dict[str, Any]:
    """Weigh ten million tokens from their log-probs, as `publish` does for a range of pairs."""
    on_one_core()
    rng = np.random.default_rng(0)
    positive, negative = (-rng.exponential(2.0, 10_000_000).astype(np.float32) for _ in range(2))
    scores = SideScores("chosen", np.array([len(positive)]), positive, negative)
    runs = [_timed(lambda: tis(scores, k=1.0, mu=1.0, lower=-0.5, upper=1.5)) for _ in range(2 * RUNS)]
    return {"tokens_per_s": len(positive) / statistics.median(runs), "s": runs}


# --- a real build ------------------------------------------------------------------------------------------------------


def real_build(work: Path, shared: Path, num_pairs: int) -> dict[str, Any]:
    """Build a weight dataset of real pairs, build it again, and once more with 1 % new pairs."""
    store = work / "real"
    shutil.rmtree(store, ignore_errors=True)
    result: dict[str, Any] = {"build_s": _build(shared, store, num_pairs)}
    result["noop_rebuild_s"] = [_build(shared, store, num_pairs) for _ in range(3)]
    full = _scored_tokens(store)
    result["append_s"] = _build(shared, store, num_pairs + num_pairs // 100)
    appended = _scored_tokens(store) - full
    return {**result, "full_scored_tokens": full, "append_scored_tokens": appended, "append_1pct_cost": appended / full}


def _build(shared: Path, store: Path, num_pairs: int) -> float:
    settings = {
        "dataset.source": shared / "data" / "alpaca_judged.parquet",
        "dataset.max_pairs": num_pairs,
        "model.path": shared / "models" / "tiny-chat",
        "contrast.train.optim.max_steps": 6,
        "contrast.train.optim.learning_rate": 2e-4,
        "contrast.train.model.dtype": "bfloat16",
        "weights.name": NAME,
        "weights.estimator": "tis",
    }
    command = [sys.executable, "-m", "tokenweights", "build", "recipes/alpaca_judged.toml", "--store", str(store)]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def _scored_tokens(store: Path) -> int:
    commits = [commit for table in WeightStore(store).tables("logps") for commit in table.history()]
    return sum(commit.metadata["statistics"]["num_tokens"] for commit in commits)


# --- all of it ---------------------------------------------------------------------------------------------------------


def in_child(measurement: str, *args: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    threads = {
        "POLARS_MAX_THREADS": "2" if measurement == "doctor" else "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, __file__, "--measure", measurement, *args]
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_all(work: Path, shared: Path, num_pairs: int, num_made_up: int) -> dict[str, Any]:
    """Measure everything and return the results."""
    work.mkdir(parents=True, exist_ok=True)
    _say(f"building {num_pairs} real pairs twice, and once with 1 % more (minutes)")
    build = real_build(work, shared, num_pairs)
    _say("formats, real rows")
    real = in_child("formats", f"{work / 'real'}::{NAME}", str(work / "formats"))
    _say(f"writing {num_made_up} made-up pairs")
    sizes = (num_made_up // 100, num_made_up)
    for size in sizes:
        in_child("write_made_up", str(work / "made-up"), str(size))
    _say("formats, made-up rows")
    made_up = in_child("formats", f"{work / 'made-up'}::bench/made-up-{sizes[0]}", str(work / "formats"))
    _say("memory")
    memory = {str(size): [in_child("memory", str(work / "made-up"), str(size)) for _ in range(3)] for size in sizes}
    weighing = in_child("weigh")
    _say(f"doctor, {num_made_up:,} made-up pairs with log-probs of a contrastive pair")
    in_child("write_contrastive", str(work / "doctor"), str(num_made_up))
    doctor = in_child("doctor", str(work / "doctor"), str(num_made_up))
    peaks = [statistics.median(run["peak_mb"] for run in memory[str(size)]) for size in sizes]
    columns = real["ours"]["column_bytes_per_response_token"]
    summary = {
        "bytes_per_response_token": sum(v for k, v in columns.items() if k.startswith(("chosen_", "rejected_"))),
        "bytes_per_response_token_with_prompts": real["ours"]["bytes_per_response_token"],
        "jsonl_over_ours": real["jsonl"]["bytes"] / real["ours"]["bytes"],
        "write_tokens_per_s": real["ours"]["write_tokens_per_s"],
        "read_tokens_per_s": real["ours"]["read_tokens_per_s"],
        "read_checked_tokens_per_s": real["ours"]["read_checked_tokens_per_s"],
        "read_speedup_jsonl": real["ours"]["read_tokens_per_s"] / real["jsonl"]["read_tokens_per_s"],
        "read_speedup_jsonl_by_pyarrow": real["ours"]["read_tokens_per_s"]
        / real["jsonl"]["read_by_pyarrow_tokens_per_s"],
        "write_speedup_jsonl": real["ours"]["write_tokens_per_s"]
        / max(real[form]["write_tokens_per_s"] for form in ("jsonl", "jsonl_doubles")),
        "rss_growth_mb": peaks[1] - peaks[0],
        "weigh_tokens_per_s": weighing["tokens_per_s"],
        "noop_rebuild_s": statistics.median(build["noop_rebuild_s"]),
        "append_1pct_cost": build["append_1pct_cost"],
        "doctor_s": doctor["s"],
        "doctor_peak_mb": doctor["peak_mb"],
    }
    machine = describe("pyarrow", "polars", "deltalake", "datasets", "numpy")
    parts = {"build": build, "real": real, "made_up": made_up, "memory": memory, "weigh": weighing, "doctor": doctor}
    return {**summary, "machine": machine, "runs": RUNS, "measured": parts}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(results: dict[str, Any]) -> None:
    """Print the figures with their targets, and the formats side by side."""
    print(f"\n{'figure':<40}{'measured':>14}   target")
    for name, value in results.items():
        if not isinstance(value, int | float) or name == "runs":
            continue
        bound, target = TARGETS.get(name, ("", None))
        met = target is None or (value <= target if bound == "at most" else value >= target)
        wanted = "" if target is None else f"{bound} {target:,.6g}" + ("" if met else "   MISSED")
        print(f"{name:<40}{value:>14,.4g}   {wanted}" if value < 1e4 else f"{name:<40}{value:>14,.0f}   {wanted}")
    for part in ("real", "made_up"):
        measured = results["measured"][part]
        print(
            f"\n{part.replace('_', '-')} rows: {measured['num_pairs']:,} pairs, {measured['num_response_tokens']:,} tokens"
        )
        print(f"{'format':<18}{'bytes/token':>12}{'write tok/s':>16}{'read tok/s':>16}")
        for form in FORMATS:
            row = measured[form]
            print(
                f"{form:<18}{row['bytes_per_response_token']:>12.2f}{row['write_tokens_per_s']:>16,.0f}"
                f"{row['read_tokens_per_s']:>16,.0f}"
            )


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "formats": measure_formats,
    "memory": measure_memory,
    "weigh": measure_weigh,
    "doctor": measure_doctor,
    "write_contrastive": lambda store, size: write_contrastive(store, int(size)),
    "write_made_up": lambda store, size: write_made_up(store, int(size)),
}


def main() -> None:
    """Run the benchmark, or one measurement of it in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument(
        "--work", type=Path, default=REPO / "benchmarks" / "scratch", help="scratch folder (about 5 GB)"
    )
    parser.add_argument("--pairs", type=int, default=1500, help="real pairs to build (default: 1500)")
    parser.add_argument("--made-up", type=int, default=1_000_000, help="made-up pairs (default: a million)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure[0]](*options.measure[1:]) or {}))
        return
    if not (options.shared / "data" / "alpaca_judged.parquet").is_file():
        raise SystemExit(f"{options.shared} has no data/alpaca_judged.parquet: give the folder with --shared")
    results = run_all(options.work, options.shared, options.pairs, options.made_up)
    target = REPO / "benchmarks" / "results" / "store.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nwrote {target.relative_to(REPO)}")


if __name__ == "__main__":
    main()
