"""`make bench-scale`: what a million pairs cost in the stages that need no model, and how much memory they take.

Made-up pairs with short texts go through prepare, publish and verify. No model scores them: their log-probs are made up as
tables of the store. Each stage is a process of its own; while it runs, the memory of all its processes is sampled. The log of
a large run shows how prepare and publish go on; `benchmarks/results/scale.json` has what each stage took.
"""

import argparse
import json
import os
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from pipeline.recipe import Recipe
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.toy.model_maker import make_chat_model
from weights_store import TableVersion, WeightStore
from weights_store.checks.verify import verify
from weights_store.messages import show_on_terminal
from weights_store.schemas import LOGPS, SIDES
from weights_store.settings import parse_settings

REPO = Path(__file__).resolve().parent.parent
ROLES = ("ref", "positive", "negative")
WORDS = (REPO / "README.md").read_text("utf-8").split()
SAMPLE_S = 0.5


def make_recipe(folder: Path, executor: str) -> Recipe:
    """Return a recipe for the made-up pairs."""
    sections: dict[str, dict[str, object]] = {
        "dataset": {"name": "scale", "source": str(folder / "pairs.jsonl")},
        "model": {"path": str(folder / "model")},
        "score": {"executor": executor, "ray_address": "local" if executor == "ray" else None},
        "weights": {"name": "scale/tis-dpo", "estimator": "tis"},
        "store": {"uri": str(folder / "store")},
    }
    return parse_settings(Recipe, sections, "the benchmark")


def write_source(folder: Path, num_pairs: int) -> None:
    """Write pairs of a dozen words each, and a tokenizer for them with a model that nothing runs."""
    chat = [
        {"role": "user", "content": " ".join(WORDS[:400])},
        {"role": "assistant", "content": " ".join(WORDS[400:800])},
    ]
    make_chat_model([chat], folder / "model", hidden_size=32, num_layers=1, steps=1)  # type: ignore[list-item]
    rng = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, num_pairs, 10_000):
            words = rng.integers(len(WORDS), size=(min(10_000, num_pairs - start), 3, 5)).tolist()
            for index, texts in enumerate(words, start):
                prompt, chosen, rejected = (" ".join(WORDS[word] for word in text) for text in texts)
                row = {"prompt": f"{index}: {prompt}", "chosen": f"A {chosen}", "rejected": f"B {rejected}"}
                file.write(json.dumps(row) + "\n")


def write_logps(folder: Path) -> None:
    """Make up the log-probs of the reference and of a contrastive pair, in the memory of one row group."""
    tokens = _newest(folder, "tokens")
    store, rng = WeightStore(tokens.store), np.random.default_rng(0)
    for role in ROLES:
        table = store.table(f"logps/scale/{role}")
        writer = table.writer()
        for rows in store.table(tokens.table).batches(tokens.version, ["pair_id", *(f"{side}_ids" for side in SIDES)]):
            columns: dict[str, Any] = {"pair_id": rows["pair_id"].combine_chunks()}
            for side in SIDES:
                ids = rows[f"{side}_ids"].combine_chunks()
                values = -rng.exponential(1.5, len(ids.values)).astype(np.float32)
                columns[f"{side}_logps"] = pa.ListArray.from_arrays(ids.offsets, pa.array(values))
            columns |= {field.name: pa.nulls(len(rows), field.type) for field in LOGPS if field.name not in columns}
            writer.write(pa.table(columns))
        metadata = {"fingerprint": role, "statistics": {}, "parents": [tokens.as_parent()], "role": role}
        table.commit(writer.finish(), metadata, None)


def _newest(folder: Path, kind: str) -> TableVersion:
    """Return the newest version of the only table of a kind."""
    (table,) = WeightStore(str(folder / "store")).tables(kind)
    return table.reference()


def _publish(folder: Path, executor: str) -> None:
    recipe, store = make_recipe(folder, executor), WeightStore(str(folder / "store"))
    logps = {role: store.table(f"logps/scale/{role}").reference() for role in ROLES}
    publish(recipe, recipe.weights, Ingredients.of_scorers(_newest(folder, "tokens"), logps))


def _verify(folder: Path, executor: str, *, rows: bool = False) -> None:
    store = WeightStore(str(folder / "store"))
    if executor == "process":
        findings = list(verify(store, rows=rows))
    else:
        from pipeline.workers.ray_spread import ray_spread

        with ray_spread("local") as spread:
            findings = list(verify(store, rows=rows, spread=spread))
    if findings:
        raise SystemExit(f"the store is damaged: {findings[0]}")


STAGES: dict[str, Callable[[Path, str], object]] = {
    "prepare": lambda folder, executor: prepare(make_recipe(folder, executor), folder / "model"),
    "make up log-probs": lambda folder, _: write_logps(folder),
    "publish": _publish,
    "verify": _verify,
    "verify --rows": lambda folder, executor: _verify(folder, executor, rows=True),
}


# --- measuring ---------------------------------------------------------------------------------------------------------


def measure(stage: str, folder: Path, executor: str, num_pairs: int) -> dict[str, float]:
    """Run one stage in a process and return what it took."""
    before, started, load = _num_bytes(folder / "store"), time.monotonic(), os.getloadavg()[0]
    command = [sys.executable, str(Path(__file__)), "--stage", stage, "--folder", str(folder), "--executor", executor]
    process = subprocess.Popen(command, start_new_session=True)
    peak, largest, cpu_s, loads = 0, 0, 0.0, [load]
    while process.poll() is None:
        of_processes = [use for pid in _tree(process.pid) if (use := _memory(pid)) is not None]
        peak, largest = max(peak, sum(of_processes)), max([largest, *of_processes])
        cpu_s = max(cpu_s, sum(_cpu_s(pid) for pid in _tree(process.pid)))
        loads.append(os.getloadavg()[0])
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{stage} failed with exit code {process.returncode}")
    wall_s, millions = time.monotonic() - started, num_pairs / 1e6
    return {
        "s_per_million": round(wall_s / millions, 1),
        "cpu_s_per_million": round(cpu_s / millions, 1),
        "store_bytes_per_pair": round((_num_bytes(folder / "store") - before) / num_pairs, 1),
        "peak_mib_all": round(peak / 2**20),
        "peak_mib_largest": round(largest / 2**20),
        "mean_load": round(statistics.mean(loads), 1),
    }


def _tree(root: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _tree(int(child))


def _memory(pid: int) -> int | None:
    """Return the bytes of a process that the kernel cannot drop: without pages of files, as those of sorted runs are."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure all stages, or run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000, help="number of pairs")
    parser.add_argument("--executor", choices=("process", "ray"), default="process")
    parser.add_argument("--folder", type=Path, default=REPO / "benchmarks" / "scratch" / "scale")
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results" / "scale.json")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    options = parser.parse_args()
    if options.stage:
        with show_on_terminal():
            STAGES[options.stage](options.folder, options.executor)
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    print(f"writing {options.pairs:,} pairs", flush=True)
    write_source(options.folder, options.pairs)
    stages = {stage: measure(stage, options.folder, options.executor, options.pairs) for stage in STAGES}
    machine = describe("pyarrow", "polars", "deltalake", "transformers", "tokenizers", "ray")
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    source_bytes = (options.folder / "pairs.jsonl").stat().st_size
    results[f"{options.executor}, {options.pairs} pairs"] = {
        "machine": machine,
        "source_bytes_per_pair": round(source_bytes / options.pairs, 1),
        "stages": stages,
    }
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    for stage, found in stages.items():
        print(f"{stage:18} {found}")
    shutil.rmtree(options.folder)
    print(f"wrote {options.results}")


if __name__ == "__main__":
    main()
