"""A small store with everything that builds leave, made by the real stages with a made-up engine.

Three builds of a growing dataset: tokens, log-probs of three models, attributions, anchors, quarantine, four weight datasets
with several versions (appended, replaced, optimised), contrastive models, reports, and a checkpoint in every log.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

import pipeline.engine.vllm_engine
import weights_store.tables.shards
from pipeline.engine.contract import EngineSettings
from pipeline.engine.score_once import Scores
from pipeline.models.contrastive import ModelRecord
from pipeline.recipe import Recipe
from pipeline.stages.anchors import anchors_identity
from pipeline.stages.attribute import attribution_identity
from pipeline.stages.contrast import model_shelf, wanted_models
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, Published, publish
from pipeline.stages.report import write_report
from pipeline.stages.score import Scorer, identity_in
from pipeline.toy.language import ToyLanguage
from pipeline.toy.model_maker import make_chat_model
from pipeline.workers.process import run
from pipeline.workers.request import AnchorOptions, AttributionOptions, Request
from pipeline.workers.supervise import Job
from weights_store import TableVersion, WeightStore
from weights_store.catalog import list_tables
from weights_store.fingerprint import fingerprint_model
from weights_store.tables.compaction import optimize

GROUP_BYTES, SHARD_BYTES = 12_000, 24_000
"""Sizes that give a small table several shards of several row groups."""
_VOCAB_SIZE = 320
_NUM_PAIRS = (14, 20, 25)  # of the source at each build; the first pairs are gone in the later ones


@dataclass(frozen=True)
class SoundStore:
    """Where a store is, with the model and the recipes that made it."""

    folder: Path

    @property
    def uri(self) -> str:
        return str(self.folder / "store")

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def store(self) -> WeightStore:
        return WeightStore(self.uri)

    def recipe(self, name: str, build: int = len(_NUM_PAIRS) - 1) -> Recipe:
        """Return the recipe of one weight dataset at one build: `toy/tis` or `toy/ti`."""
        weights = {"toy/tis": {"estimator": "tis", "upper": 0.5 if build else 1.5}, "toy/ti": {"estimator": "ti"}}
        sections = {
            "dataset": {"name": "toy", "source": str(self.folder / f"pairs-{build}.jsonl")},
            "model": {"path": str(self.model)},
            "contrast": {"method": "sft"},
            "score": {"top_k": 2},
            "weights": {"name": name, **weights[name]},
            "store": {"uri": self.uri},
        }
        return Recipe.model_validate(sections | ({"anchors": {"max_new_tokens": 12}} if name == "toy/ti" else {}))


class MadeUpEngine:
    """Scores and continues in no time; what it says depends on the model's bytes and on the ids alone."""

    vocab_size = _VOCAB_SIZE
    max_tokens = 1 << 20
    way = "made_up"
    batch_tokens = 1 << 20
    call_s: ClassVar[float] = 0.0

    def __init__(self, model, settings):
        self.scale = 0.5 + sum((Path(model) / "model.safetensors").read_bytes()) % 97 / 97

    def begin(self, sequences, progress=lambda num_tokens: None):
        return lambda: self.score(sequences, progress)

    def score(self, sequences, progress=lambda num_tokens: None):
        return [self._scores(sequence) for sequence in sequences]

    def _scores(self, sequence):
        ids = np.array(sequence.response_ids[sequence.start :], dtype=np.int64)
        logps = -self.scale * (1.5 + np.sin(ids + float(sum(sequence.prompt_ids)))).astype(np.float32)
        steps = np.arange(sequence.top_k)
        top_ids = ((ids[:, None] + steps) % _VOCAB_SIZE).astype(np.int32)
        return Scores(logps, top_ids, (logps[:, None] - steps).astype(np.float32))

    def generate(self, prompts, sampling, seeds, progress=lambda num_prompts: None):
        draws = [np.random.default_rng(seed) for seed in seeds]
        return [draw.integers(6, _VOCAB_SIZE, sampling.max_new_tokens).tolist() for draw in draws]


@contextmanager
def small_shards() -> Iterator[None]:
    """Let tables of some KB have several shards, and let the made-up engine score."""
    module, engine = weights_store.tables.shards, pipeline.engine.vllm_engine
    before = module.ROW_GROUP_BYTES, module.SHARD_BYTES, engine.VllmEngine
    module.ROW_GROUP_BYTES, module.SHARD_BYTES, engine.VllmEngine = GROUP_BYTES, SHARD_BYTES, MadeUpEngine
    try:
        yield
    finally:
        module.ROW_GROUP_BYTES, module.SHARD_BYTES, engine.VllmEngine = before


def make_sound_store(folder: Path) -> SoundStore:
    """Build the store in a new folder."""
    made = SoundStore(folder)
    language = ToyLanguage()
    conversations = language.sample_conversations(100, seed=1)
    make_chat_model(conversations, made.model, hidden_size=32, num_layers=1, vocab_size=_VOCAB_SIZE, steps=1)
    pairs = [json.dumps(pair) for pair in language.sample_pairs(_NUM_PAIRS[-1] + 2, seed=2)]
    for build, num_pairs in enumerate(_NUM_PAIRS):
        lines = [*pairs[2 if build else 0 : num_pairs], "no json"]
        (folder / f"pairs-{build}.jsonl").write_text("\n".join(lines) + "\n")
    with small_shards():
        for build in range(len(_NUM_PAIRS)):
            published = _build(made, build)
            if build == 1:
                for table in list_tables(made.store.root):
                    optimize(table)
                    table.open_delta().create_checkpoint()
        for each in published:
            write_report(each, made.model)
    return made


def _build(made: SoundStore, build: int) -> list[Published]:
    tis, ti = made.recipe("toy/tis", build), made.recipe("toy/ti", build)
    tokens = prepare(tis, made.model).tokens
    ref = _score(tis, tokens, "ref", made.model)
    uniform = publish(tis, tis.uniform, Ingredients(tokens, ref))
    models = _trained_pair(tis, made.model, uniform.weights)
    pair = [_score(tis, tokens, role, folder) for role, folder in models.items()]
    attributions, anchors = _attribute(ti, tokens, made.model), _sample_anchors(ti, tokens, made.model)
    return [
        publish(tis, tis.weights, Ingredients(tokens, ref, *pair)),
        publish(ti, ti.weights, Ingredients(tokens, ref, attributions=attributions, anchors=anchors)),
    ]


def _score(recipe: Recipe, tokens: TableVersion, role: str, model: Path) -> TableVersion:
    identity = identity_in(role, Scorer(model), recipe.score)
    job = Job("score", tokens, role, model, identity)
    run(Request("score", tokens, str(model), [job.target()], 2000, EngineSettings("float32"), tokenizer=str(model)))
    return job.table.reference()


def _attribute(recipe: Recipe, tokens: TableVersion, model: Path) -> TableVersion:
    job = Job("attribute", tokens, "ref", model, attribution_identity(model, recipe.attribute))
    options = AttributionOptions(recipe.attribute.target, recipe.attribute.prompts, recipe.attribute.activations)
    run(Request("attribute", tokens, str(model), [job.target()], 4000, EngineSettings("float32"), options=options))
    return job.table.reference()


def _sample_anchors(recipe: Recipe, tokens: TableVersion, model: Path) -> TableVersion:
    assert recipe.anchors is not None
    job = Job("anchors", tokens, "ref", model, anchors_identity(model, recipe.anchors, recipe.score))
    options = AnchorOptions(recipe.anchors.sampling, recipe.anchors.seed)
    run(Request("anchors", tokens, str(model), [job.target()], 4000, EngineSettings("float32"), options=options))
    return job.table.reference()


def _trained_pair(recipe: Recipe, model: Path, uniform: TableVersion) -> dict[str, Path]:
    """Put two models on the store's shelf as a training leaves them, unless they are there; return their folders."""
    shelf, folders = model_shelf(uniform.store), {}
    for wanted in wanted_models(recipe.contrast_settings, model, uniform):
        folder = wanted.folder or shelf.place(wanted.name)
        if wanted.folder is None:
            shutil.copytree(model, folder)
            weights = bytearray((folder / "model.safetensors").read_bytes())
            weights[-2] ^= 1 if wanted.side == "positive" else 2  # a mantissa bit of the last parameter
            (folder / "model.safetensors").write_bytes(weights)
            lineage = {"weights": uniform.as_parent(), "config": {"data": {"swap": wanted.side == "negative"}}}
            (folder / "lineage.json").write_text(json.dumps(lineage, indent=2))
            record: ModelRecord = {
                "identity": wanted.identity,
                "data": wanted.data,
                "version": uniform.version,
                "fingerprint": fingerprint_model(folder),
            }
            shelf.put(wanted.name, record)
        folders[wanted.side] = folder
    return folders
