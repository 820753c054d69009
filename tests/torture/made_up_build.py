"""Builds of a growing dataset through the real stages, with a made-up engine, that can be killed at any moment.

Started from a fork server, so that a start costs milliseconds. The log-probs are a function of the ids, so that
whoever scores a pair finds the same numbers.
"""

import json
import os
import random
import traceback
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pipeline.engine.vllm_engine
from pipeline.engine.contract import EngineSettings
from pipeline.engine.score_once import Scores
from pipeline.recipe import Recipe
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.toy.language import ToyLanguage
from pipeline.toy.model_maker import make_chat_model
from pipeline.workers.process import run
from pipeline.workers.request import Request, Target
from pipeline.workers.supervise import stage_table
from tests.torture.losses import Loss, loss_of
from weights_store import TableVersion, WeightStore
from weights_store.checks.vacuum import vacuum
from weights_store.errors import ConflictError, NotFoundError
from weights_store.tables.compaction import optimize
from weights_store.tables.table import Table

# Imported in the fork server once, instead of by every child.
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  # isort: skip
import deltalake  # noqa: F401  # isort: skip
import pandas  # noqa: F401  # isort: skip
import weights_store.tables.shards  # isort: skip


Rows = list[tuple[Hashable, object]]
"""Keys and values of the rows of a table."""


class MadeUpEngine:
    """Scores like a model would, in no time."""

    vocab_size = 1 << 20
    max_tokens = 1 << 20
    batch_tokens = 4096
    way = "made_up"

    def __init__(self, model, settings):
        self.scale = float(model.name)

    def begin(self, sequences, progress=lambda num_tokens: None):
        return lambda: self.score(sequences, progress)

    def score(self, sequences, progress=lambda num_tokens: None):
        return [self._scores(sequence) for sequence in sequences]

    def _scores(self, sequence):
        ids = np.array(sequence.response_ids[sequence.start :], dtype=np.float64) + sum(sequence.prompt_ids)
        return Scores.of((-self.scale * (1.5 + np.sin(ids))).astype(np.float32))


def make_pairs(num_pairs: int) -> list[dict[str, Any]]:
    """Return pairs of the toy language, always the same ones."""
    return ToyLanguage().sample_pairs(num_pairs, seed=4)


def make_model(folder: Path) -> Path:
    """Make a model of which only the tokenizer is used."""
    make_chat_model(ToyLanguage().sample_conversations(200, seed=1), folder, hidden_size=32, num_layers=1, steps=1)
    return folder


@dataclass(frozen=True)
class MadeUpBuild:
    """Three builds, without a store: of 40 pairs; of 50, of which 3 of the first are gone; and with another clamp."""

    recipes: list[dict[str, Any]]
    model: Path
    problems: Path
    """A file for the error that ended a child."""

    @classmethod
    def prepared(cls, folder: Path) -> "MadeUpBuild":
        """Write the sources and the model into a folder."""
        pairs, model, recipes = [json.dumps(pair) for pair in make_pairs(50)], make_model(folder / "model"), []
        for name, rows, upper in (("first", pairs[:40], 1.5), ("second", pairs[3:], 1.5), ("second", pairs[3:], 0.2)):
            path = folder / f"{name}.jsonl"
            path.write_text("\n".join([*rows, "no json"]) + "\n")
            dataset, weights = (
                {"name": "toy", "source": str(path)},
                {"name": "toy/tis-dpo", "estimator": "tis", "upper": upper},
            )
            contrast = {"method": "prompt"}  # no trained models, which `verify` would miss
            recipes.append(
                {"dataset": dataset, "model": {"path": str(model)}, "contrast": contrast, "weights": weights}
            )
        return cls(recipes, model, folder / "problems")

    def start(self, server: Any, uri: Path) -> Any:
        """Start a child of a fork server that runs the three builds; return the process."""
        return server.start(build, self.recipes, str(uri), str(self.model), str(self.problems))


def build(recipes: list[dict[str, Any]], uri: str, model: str, problems: str) -> None:
    """Run the builds one after the other; what is there already is not done again. An error goes to the file `problems`."""
    weights_store.tables.shards.ROW_GROUP_BYTES = 2000
    weights_store.tables.shards.SHARD_BYTES = 4000
    pipeline.engine.vllm_engine.VllmEngine = MadeUpEngine
    try:
        for settings in recipes:
            recipe = Recipe.model_validate({**settings, "store": {"uri": uri}})
            tokens = prepare(recipe, Path(model)).tokens
            logps = [_score(recipe, tokens, scale) for scale in ("1.0", "0.9", "1.1")]
            publish(recipe, recipe.uniform, Ingredients(tokens, logps[0]))
            publish(recipe, recipe.weights, Ingredients(tokens, *logps))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        Path(problems).write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no clean-up that could hide what a kill leaves


def _score(recipe: Recipe, tokens: TableVersion, scale: str) -> TableVersion:
    identity: dict[str, object] = {"schema_version": 1, "model": scale, "dtype": "float32"}
    table = stage_table("score", tokens, identity)
    metadata = {"scorer": identity, "parents": [tokens.as_parent()], "fingerprint": f"{scale}-{tokens.fingerprint}"}
    run(Request("score", tokens, scale, [Target("ref", table.path, None, metadata)], 1200, EngineSettings()))
    return table.reference()


def tidy(uri: str, problems: str) -> None:
    """Optimize every table and vacuum the store, with its usual retention, until somebody ends this process."""
    weights_store.tables.shards.SHARD_BYTES = 4000
    store = WeightStore(uri)
    while True:
        try:
            for table in _tables(store):
                with suppress(ConflictError):  # a writer was faster
                    optimize(table)
            with suppress(NotFoundError):  # no store yet
                vacuum(store, dry_run=False)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
            Path(problems).write_text(traceback.format_exc())
            os._exit(1)


def _tables(store: WeightStore) -> list[Table]:
    return [table for kind in ("tokens", "logps", "weights", "quarantine") for table in store.tables(kind)]


def rows_of(uri: str | Path) -> dict[str, Rows]:
    """Return key and values of the newest rows of every table, whichever versions they took."""
    found = {}
    for table in _tables(WeightStore(uri)):
        frame = table.scan().collect().sort(table.key)
        found[table.path] = [(tuple(row[name] for name in table.key), row) for row in frame.to_dicts()]
    return found


def loss_of_build(uri: str | Path, expected: dict[str, Rows]) -> Loss:
    """Compare all tables of a store with those of an undisturbed build."""
    found, loss = rows_of(uri), Loss()
    for path in expected.keys() | found.keys():
        loss += loss_of(found.get(path, []), dict(expected.get(path, [])))
    return loss


def unreadable_versions(uri: str | Path, draw: random.Random) -> list[str]:
    """Return the versions that do not hold whole rows, each key once: of the newest and one older one of every table."""
    found = []
    for table in _tables(WeightStore(uri)) if Path(uri).exists() else []:
        newest = table.version()
        for version in () if newest is None else {newest, draw.randint(0, newest)}:
            keys = table.scan(version).select(table.key).collect()
            if not keys.n_unique() == keys.height == sum(record.num_rows for record in table.records(version)):
                found.append(f"{table.path}@{version}")
    return found
