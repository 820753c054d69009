"""What a user's own weights cost: stage annotate and weighing, beside the tokenisation of the same pairs.

    python -m benchmarks.own_weights [--pairs 100000] [--tokens 200] [--runs 3]

It writes medians of the runs to `benchmarks/results/own_weights.json`, beside those of other numbers of pairs. The pairs are
random ids in a tokens table, with numbers per token in a Parquet file and in a JSONL file (a tenth of the pairs). "Any" numbers
are all different, which is the most work for files; "few" are one of nine, as rules and annotators give them.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import describe
from pipeline.chat.pair_ids import Limits
from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.recipe import Recipe
from pipeline.source.pairs import Pair
from pipeline.stages.annotate import annotate
from weights_store import TableVersion, WeightStore
from weights_store.digests import digest_once
from weights_store.schemas import TOKENS
from weights_store.settings import parse_settings

RESULTS = Path(__file__).parent / "results" / "own_weights.json"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [f"{first}{second}" for first in ("ba", "co", "du", "fe", "gi") for second in ("na", "lo", "ru", "te", "mi")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=200, help="of each response")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        figures: dict[str, object] = {
            "machine": describe("pyarrow", "polars", "tokenizers"),
            "load": round(os.getloadavg()[0], 1),
            "runs": args.runs,
            "tokens_per_response": args.tokens,
            "tokenise_tokens_per_s": round(median(tokenise(model, args.tokens) for _ in range(args.runs))),
        }
        for kind, num_pairs in (("parquet", args.pairs), ("jsonl", args.pairs // 10)):
            for numbers in ("any", "few"):
                of_kind = folder / f"{kind}-{numbers}"
                of_kind.mkdir()
                found = list(
                    time_annotate(
                        of_kind, model, f".{kind}", num_pairs, args.tokens, args.runs, is_few=numbers == "few"
                    )
                )
                figures[f"{kind}, {numbers} numbers"] = {
                    name: round(median(run[name] for run in found)) for name in found[0]
                }
                shutil.rmtree(of_kind)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{args.pairs} pairs"] = figures
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def make_model(folder: Path) -> Path:
    """Make a folder with a tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["</s>", "<|user|>", "<|assistant|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 4096}')
    return folder


def tokenise(model: Path, num_tokens: int, num_pairs: int = 2000) -> float:
    """Return response tokens a second of what prepare does with texts: render and tokenise."""
    draw = np.random.default_rng(0)
    pairs = [
        Pair(
            [{"role": "user", "content": f"question {index}"}],
            *(" ".join(draw.choice(WORDS, num_tokens)) for _ in "ab"),
        )
        for index in range(num_pairs)
    ]
    tokenizer = ChatTokenizer(model)
    tokenizer.check()
    started = time.perf_counter()
    found = list(tokenizer.tokenize_pairs(pairs, Limits(1000, 1000, cut_response=False)))
    taken = time.perf_counter() - started
    return sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in found) / taken


def time_annotate(
    folder: Path, model: Path, ending: str, num_pairs: int, num_tokens: int, num_runs: int, *, is_few: bool = False
) -> Iterator[dict[str, float]]:
    """Yield response tokens a second of stage annotate, numbers per token."""
    draw = np.random.default_rng(1)
    path = folder / f"pairs{ending}"
    offsets = np.arange(num_pairs + 1, dtype=np.int32) * num_tokens

    def lists(values):
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    def numbers():
        if is_few:
            return draw.integers(0, 9, num_pairs * num_tokens).astype(np.float32) / 4
        return draw.random(num_pairs * num_tokens, np.float32)

    weights = {f"{side}_weights": lists(numbers()) for side in ("chosen", "rejected")}
    if ending == ".parquet":
        pq.write_table(pa.table({**weights, "chosen": ["x"] * num_pairs, "rejected": ["y"] * num_pairs}), path)
    else:
        with path.open("w") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in pa.table(weights).to_pylist())
    sections = {
        "dataset": {"name": "own", "source": str(path)},
        "model": {"path": str(model)},
        "weights": {"name": "own/column", "estimator": "column"},
        "store": {"uri": str(folder / f"store{ending}")},
    }
    recipe = parse_settings(Recipe, sections, "benchmark")
    ids = lists(draw.integers(3, 280, num_pairs * num_tokens).astype(np.int32))
    pair_ids = sorted(f"{number:032x}" for number in draw.permutation(1 << 24)[:num_pairs].tolist())
    rows = {"pair_id": pair_ids, "prompt": ["{}"] * num_pairs, "prompt_ids": [[1]] * num_pairs, "chosen_ids": ids}
    rows |= {"rejected_ids": ids, "source_row": draw.permutation(num_pairs), "split": ["train"] * num_pairs}
    rows |= {f"{side}_score": pa.nulls(num_pairs, pa.float32()) for side in ("chosen", "rejected")}
    tokens = write_tokens(recipe, pa.table([pa.array(rows[f.name]).cast(f.type) for f in TOKENS], TOKENS.names))
    del ids, rows
    for _ in range(num_runs):
        shutil.rmtree(Path(recipe.store.uri) / "annotations", ignore_errors=True)
        started, started_cpu = time.perf_counter(), time.process_time()
        annotate(recipe, tokens, model)
        taken, taken_cpu = time.perf_counter() - started, time.process_time() - started_cpu
        num_all = 2 * num_pairs * num_tokens
        yield {"tokens_per_s": num_all / taken, "tokens_per_cpu_s": num_all / taken_cpu}


def write_tokens(recipe: Recipe, rows: pa.Table) -> TableVersion:
    """Write what prepare would have written."""
    store = WeightStore(recipe.store.uri)
    source = {"content": digest_once(Path(recipe.dataset.source)), "max_pairs": None, "settings": {}, "reading": {}}
    metadata = {"fingerprint": "made up", "source": source, "statistics": {"num_pairs": rows.num_rows}}
    store.table("quarantine/own-1").append(store.table("quarantine/own-1").schema.empty_table(), metadata)
    return store.table("tokens/own-1").append(rows.cast(TOKENS), metadata)


if __name__ == "__main__":
    main()
