"""A recipe that needs every stage, and what its store must hold in the end."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from tests.torture.losses import Loss, loss_of
from tests.torture.orphans import SCORER
from weights_store import WeightStore
from weights_store.checks.verify import verify

_ALL = {
    "contrast.method": "sft",
    "contrast.python": sys.executable,
    "contrast.train.optim.learning_rate": 1e-3,
    "contrast.train.optim.max_steps": 3,
    "contrast.train.optim.pairs_per_step": 4,
    "attribute.python": sys.executable,
    "attribute.chunk_tokens": 256,
    "anchors.max_new_tokens": 8,
    "weights.name": "toy/all",
    "weights.estimator": "ensemble",
    "weights.members": ["tis", "ti"],
}
"""What a recipe that needs every stage says besides."""
_KINDS = ("tokens", "logps", "attributions", "anchors", "weights", "quarantine")


def write_world(folder: Path, model: Path, pairs: list[dict[str, Any]], is_small: bool = False) -> Path:
    """Write pairs and a recipe into a folder, and return the recipe's path.

    The recipe needs every stage, or, if it `is_small`, neither trainings nor attributions nor anchors. The scoring engine is
    made up, the others are real. The interpreters are named, so the flow's own needs neither vLLM nor torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*(json.dumps(pair) for pair in pairs), "no json"]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    scorer = folder / "scorer"
    scorer.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SCORER}" "$@"\n', encoding="utf-8")
    scorer.chmod(0o755)
    settings: dict[str, object] = {
        "dataset.name": "toy",
        "dataset.source": str(folder / "pairs.jsonl"),
        "model.path": str(model),
        "contrast.method": "prompt",
        "score.python": str(scorer),
        "score.chunk_tokens": 256,
        "score.parity_pairs": 0,
        "weights.name": "toy/small",
        "weights.estimator": "tis",
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in (settings if is_small else settings | _ALL).items()]
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "recipe.toml"


def values(store: Path) -> dict[str, dict[Any, Any]]:
    """Return key and values of the newest rows of every table of a store."""
    return {table.path: _by_key(table) for kind in _KINDS for table in WeightStore(store).tables(kind)}


def loss_of_store(store: Path, expected: Mapping[str, Mapping[Any, Any]]) -> Loss:
    """Compare a store with the tables of an undisturbed build: every row once, with the same numbers."""
    loss, tables = Loss(), {table.path: table for kind in _KINDS for table in WeightStore(store).tables(kind)}
    for path in expected.keys() | tables.keys():
        rows = _rows(tables[path]) if path in tables else []
        loss += loss_of(rows, expected.get(path, {}))
    return loss


def _by_key(table: Any) -> dict[Any, Any]:
    rows = _rows(table)
    assert max(Counter(key for key, _ in rows).values(), default=1) == 1, f"{table.path} has a key twice"
    return dict(rows)


def _rows(table: Any) -> list[tuple[Any, Any]]:
    """Return key and values of every row; floats to six digits, as threads add in any order."""
    frame = table.scan().collect().with_columns(pl.selectors.float().round_sig_figs(6))
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List) and dtype.inner.is_float()]
    frame = frame.with_columns(pl.col(lists).list.eval(pl.element().round_sig_figs(6)))
    return [(tuple(row[name] for name in table.key), row) for row in frame.to_dicts()]


def check_store(store: Path, expected: Mapping[str, Mapping[Any, Any]]) -> None:
    """Check that a store holds what an undisturbed build made, every row once, and that `verify` finds nothing."""
    assert loss_of_store(store, expected) == Loss()
    findings = [str(finding) for finding in verify(WeightStore(store), rows=True) if not finding.is_note]
    assert not findings, "\n".join(findings)
