"""A tiny model with a tokenizer, and weight datasets whose reference is that very model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train.config import TrainConfig
from weights_store import WeightStore
from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.schemas import WEIGHTS

VOCAB_SIZE, EOS = 128, 2
Row = dict[str, Any]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Let `caplog` see what a training says."""
    caplog.set_level("INFO", "tokenweights")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 with a word tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["<pad>", "<s>", "</s>", "né", *(f"w{i}" for i in range(VOCAB_SIZE - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,  # must not matter
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> torch.nn.Module:
    """The same in float32; tests only read it."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def compute_full_logps(model: torch.nn.Module, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """Oracle: log-softmax over the whole vocabulary, one sequence, nothing padded."""
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [logps[t - 1, ids[0, t]].item() for t in range(len(prompt_ids), ids.shape[1])]


def make_rows(model: torch.nn.Module, num_pairs: int, seed: int = 0) -> list[Row]:
    """Pairs of unequal length, some with EOS or the pad id inside; reference = `model`; weights in 0.5..2."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_pairs):
        prompt_ids = [1, *rng.integers(3, VOCAB_SIZE, rng.integers(1, 7)).tolist()]
        row: Row = {"pair_id": f"pair-{i:04d}", "prompt_ids": prompt_ids, "pair_weight": 1.0}
        row |= {"anchor_ids": None, "anchor_ref_logps": None, "split": "test" if i % 4 == 3 else "train"}
        for side in ("chosen", "rejected"):
            ids = [*rng.integers(0, VOCAB_SIZE, rng.integers(1, 10)).tolist(), EOS]
            row[f"{side}_ids"] = ids
            row[f"{side}_token_weights"] = rng.uniform(0.5, 2.0, len(ids)).tolist()
            row[f"{side}_ref_logps"] = compute_full_logps(model, prompt_ids, ids)
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def full_logps(model: torch.nn.Module) -> Callable[[list[int], list[int]], list[float]]:
    return lambda prompt_ids, response_ids: compute_full_logps(model, prompt_ids, response_ids)


@pytest.fixture(scope="session")
def rows(model: torch.nn.Module) -> list[Row]:
    return make_rows(model, 40)


@pytest.fixture(scope="session")
def anchored_rows(model: torch.nn.Module, rows: list[Row]) -> list[Row]:
    """The same with an anchor each, some shorter and some longer than the responses."""
    rng = np.random.default_rng(1)
    anchored = []
    for row in rows:
        ids = [*rng.integers(3, VOCAB_SIZE, rng.integers(1, 12)).tolist(), EOS]
        logps = compute_full_logps(model, row["prompt_ids"], ids)
        anchored.append({**row, "anchor_ids": ids, "anchor_ref_logps": logps})
    return anchored


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of a handful of rows, so that small datasets have many."""
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 2000)


WriteWeights = Callable[..., str]


@pytest.fixture
def write_weights(tmp_path: Path, model_folder: Path) -> WriteWeights:
    """Return a function that writes rows as a new version of `toy/tis` and returns the store's URI."""

    def write(rows: list[Row], **metadata: Any) -> str:
        uri = str(tmp_path / "store")
        tokenizer = {"fingerprint": fingerprint_tokenizer(model_folder), "vocab_size": VOCAB_SIZE, "eos_token_id": EOS}
        num_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        content = {
            "fingerprint": f"{len(rows):064d}",
            "tokenizer": tokenizer,
            "statistics": {"num_pairs": len(rows), "num_response_tokens": num_tokens},
        }
        table = WeightStore(uri).table("weights/toy/tis")
        table.replace(pa.Table.from_pylist(rows, WEIGHTS), {**content, **metadata})
        return uri

    return write


@pytest.fixture
def store(write_weights: WriteWeights, rows: list[Row]) -> str:
    return write_weights(rows)


@pytest.fixture
def settings(store: str, model_folder: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings of a job of a few steps."""
    return {
        "data": {"store": store, "weights": "toy/tis"},
        "model": {"path": str(model_folder)},
        "loss": {"name": "tis_dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-3, "pairs_per_step": 8, "tokens_per_batch": 128},
        "output": {"folder": str(tmp_path / "out"), "log_every_steps": 1},
    }


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(settings: dict[str, dict[str, Any]]) -> MakeConfig:
    """Return a function that builds the config with some keys changed: `make_config(loss={"name": "dpo"})`."""

    def make(**changes: dict[str, Any]) -> TrainConfig:
        sections = {**settings, **{section: {} for section in changes.keys() - settings.keys()}}
        return TrainConfig.model_validate({s: {**v, **changes.get(s, {})} for s, v in sections.items()})

    return make
