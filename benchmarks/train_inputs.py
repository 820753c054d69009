"""What `make bench-train` trains: random Llamas, and a weight dataset of pairs of both files in `shared/data`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.dataset import Pair

MAX_SIDE = 256
"""Longest prompt and longest response, tokens: 512 together, as in the release."""
BODIES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "cuda": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12},
}
"""24 M and 600 M parameters without the vocabulary."""
VOCABULARIES = {"8k": 8192, "128k": 131_072}


def make_inputs(work: Path, shared: Path, device: str, vocabulary: str, num_pairs: int) -> dict[str, Any]:
    """Make a random model and a weight dataset of pairs of both files, half of each; return where they are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / f"{device}-{vocabulary}"
    shutil.rmtree(folder, ignore_errors=True)
    tiny, model_folder = shared / "models" / "tiny-chat", folder / "model"
    torch.manual_seed(0)
    body = BODIES[device]
    config = LlamaConfig(
        **body,
        vocab_size=VOCABULARIES[vocabulary],
        num_key_value_heads=body["num_attention_heads"] // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(model_folder)
    for path in (*tiny.glob("tokenizer*"), *tiny.glob("chat_template*"), *tiny.glob("special_tokens_map.json")):
        shutil.copyfile(path, model_folder / path.name)
    store = str(folder / "store")
    rows = [row for source in _sources(folder, shared, num_pairs // 2) for row in _tokenise(source, folder, tiny)]
    _write_weights(store, rows, model.to(device), model_folder)
    return {"model": str(model_folder), "store": store}


def read_pairs(folder: Path, shared: Path, num_pairs: int) -> "list[Pair]":
    """Return pairs of both files, half of each, with weights 1 and reference log-probs 0: for what needs no scores."""
    import numpy as np

    from train.data.dataset import Pair, StoredResponse

    def response(ids: list[int]) -> StoredResponse:
        return StoredResponse(np.array(ids, np.int32), np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32))

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiny = shared / "models" / "tiny-chat"
    half = num_pairs // 2
    rows = [row for source in _sources(folder, shared, half) for row in _tokenise(source, folder, tiny)[:half]]
    return [
        Pair(
            row["pair_id"],
            np.array(row["prompt_ids"], np.int32),
            response(row["chosen_ids"]),
            response(row["rejected_ids"]),
        )
        for row in rows
    ]


def _sources(folder: Path, shared: Path, num_pairs: int) -> list[Path]:
    """Return files with a sample of each of the two, a few pairs more than asked for: some are quarantined."""
    import polars as pl

    hh, alpaca = folder / "hh.jsonl", folder / "alpaca.parquet"
    lines = (shared / "data" / "hh_harmless.jsonl").read_text().splitlines()
    hh.write_text("\n".join(lines[: num_pairs + num_pairs // 4]) + "\n")
    judged = pl.read_parquet(shared / "data" / "alpaca_judged.parquet")
    judged.sample(num_pairs + num_pairs // 4, seed=0, shuffle=True).write_parquet(alpaca)
    return [hh, alpaca]


def _tokenise(source: Path, folder: Path, tokenizer: Path) -> list[dict[str, Any]]:
    from pipeline.recipe import Recipe
    from pipeline.stages.prepare import prepare
    from weights_store import WeightStore
    from weights_store.settings import parse_settings

    limits = {"max_prompt_tokens": MAX_SIDE, "max_response_tokens": MAX_SIDE, "long_response": "cut"}
    settings = {
        "dataset": {"name": source.stem, "source": str(source), **limits},
        "model": {"path": str(tokenizer)},
        "weights": {"name": f"{source.stem}/x"},
        "store": {"uri": str(folder / "tokens")},
    }
    tokens = prepare(parse_settings(Recipe, settings, source.stem), tokenizer).tokens
    columns = ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"]
    return WeightStore(tokens.store).table(tokens.table).scan(tokens.version).select(columns).collect().to_dicts()


def _write_weights(store: str, rows: list[dict[str, Any]], model: Any, model_folder: Path) -> None:
    """Score every response with the model itself, make up weights that look like TIS-DPO's, and write both."""
    import numpy as np
    import pyarrow as pa

    from weights_store import WeightStore
    from weights_store.fingerprint import fingerprint_tokenizer
    from weights_store.schemas import WEIGHTS

    rng = np.random.default_rng(0)
    for row in rows:
        row |= {"pair_weight": 1.0, "split": "train"}
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ids = row[f"{side}_ids"]
            row[f"{side}_token_weights"] = np.exp(sign * np.clip(rng.normal(0, 0.6, len(ids)), -0.5, 1.5)).tolist()
            row[f"{side}_ref_logps"] = _reference_logps(model, row["prompt_ids"], ids)
    tokenizer = {"fingerprint": fingerprint_tokenizer(model_folder), "vocab_size": model.config.vocab_size}
    num_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    statistics_ = {"num_pairs": len(rows), "num_response_tokens": num_tokens}
    metadata = {"fingerprint": "0" * 64, "tokenizer": {**tokenizer, "eos_token_id": 2}, "statistics": statistics_}
    WeightStore(store).table("weights/bench/tis").replace(pa.Table.from_pylist(rows, WEIGHTS), metadata)


def _reference_logps(model: Any, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    import torch

    ids = torch.tensor([prompt_ids + response_ids], device=model.device)
    with torch.no_grad():
        logps = model(ids, logits_to_keep=len(response_ids) + 1).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1).tolist()
