"""What `test_crash.py` starts and kills: two builds of a growing dataset through the real stages, with a made-up engine.

Started from a fork server, so that a start costs milliseconds. The log-probs are a function of the ids, so that
whoever scores a pair finds the same numbers.
"""

import os
from pathlib import Path

import numpy as np

import pipeline.engine.vllm_engine
from pipeline.engine.contract import EngineSettings
from pipeline.engine.score_once import Scores
from pipeline.recipe import Recipe
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.workers.process import run
from pipeline.workers.request import Request, Target
from pipeline.workers.supervise import stage_table

# Imported in the fork server once, instead of by every child.
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  # isort: skip
import deltalake  # noqa: F401  # isort: skip
import weights_store.tables.shards  # isort: skip


class MadeUpEngine:
    """Scores like a model would, in no time."""

    vocab_size = 1 << 20
    max_tokens = 1 << 20
    way = "made_up"

    def __init__(self, model, settings):
        self.scale = float(model.name)

    def score(self, sequences, progress=lambda num_tokens: None):
        return [self._scores(sequence) for sequence in sequences]

    def _scores(self, sequence):
        ids = np.array(sequence.response_ids[sequence.start :], dtype=np.float64) + sum(sequence.prompt_ids)
        return Scores.of((-self.scale * (1.5 + np.sin(ids))).astype(np.float32))


def build(recipes: list[dict], model_folder: str) -> None:
    """Run the builds one after the other; what is there already is not done again."""
    weights_store.tables.shards.ROW_GROUP_BYTES = 2000
    weights_store.tables.shards.SHARD_BYTES = 4000
    pipeline.engine.vllm_engine.VllmEngine = MadeUpEngine
    for settings in recipes:
        recipe = Recipe.model_validate(settings)
        tokens = prepare(recipe, Path(model_folder)).tokens
        logps = [_score(recipe, tokens, scale) for scale in ("1.0", "0.9", "1.1")]
        publish(recipe, recipe.uniform, Ingredients(tokens, logps[0]))
        publish(recipe, recipe.weights, Ingredients(tokens, *logps))
    os._exit(0)  # no clean-up that could hide what a kill leaves


def _score(recipe, tokens, scale):
    identity = {"schema_version": 1, "model": scale, "dtype": "float32"}
    table = stage_table("score", tokens, identity)
    metadata = {"scorer": identity, "parents": [tokens.as_parent()], "fingerprint": f"{scale}-{tokens.fingerprint}"}
    run(Request("score", tokens, scale, [Target("ref", table.path, None, metadata)], 1200, EngineSettings()))
    return table.reference()
