"""The recipe of a build: what a TOML file and `--set` may say, checked before anything runs.

Section `[dataset]` is in `dataset_section.py`, `[contrast]` in `models/section.py`, `[weights]` in `weighing/section.py`,
`[attribute]` and `[anchors]` in `stage_sections.py`.
"""

import json
import os
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.dataset_section import DatasetSection
from pipeline.models.section import MODEL_SIDES, ContrastSection
from pipeline.section import Section
from pipeline.stage_sections import AnchorsSection, AttributeSection, Dtype
from pipeline.weighing.section import MODELS, AnyWeights, WeightsSection
from train.data.selection import Selection
from weights_store.allowed import SCORE_PYTHON, check_interpreter_place, check_place, expand_home
from weights_store.names import split_name
from weights_store.schemas import SIDES
from weights_store.settings import apply_overrides, default_store, load_toml, parse_settings


class ModelSection(Section):
    """The starting model: the reference of the training, and the model that the contrastive pair is made from."""

    path: str = Field(description="a model folder, a LoRA adapter, which is merged into its base, or a hub id")
    revision: str | None = Field(None, description="revision of a hub model")
    chat_template: str | None = Field(None, description="a Jinja file, for models that ship none or a wrong one")
    template_date: str | None = Field(
        None, description="the date of the day, for chat templates that print it, such as 2026-01-31"
    )

    @field_validator("path", "chat_template")
    @classmethod
    def _in_home(cls, place: str | None) -> str | None:
        return None if place is None else expand_home(place)

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_date(cls, value: object) -> object:
        return value if value is None else date.fromisoformat(str(value)).isoformat()


class ScoreSection(Section):
    """The scoring engine. Only `dtype` and `top_k` change results; the others affect speed and memory."""

    dtype: Dtype = "auto"
    top_k: int = Field(
        0, ge=0, le=256, description="also store the reference log-probs of this many most likely tokens"
    )
    chunk_tokens: int = Field(262_144, ge=1, description="tokens between two commits; a kill can lose two chunks")
    batch_tokens: int | None = Field(
        None, ge=256, description="tokens in one engine step; default: 16,384 on a GPU, 4,096 on a CPU"
    )
    kv_cache_gib: float = Field(2.0, gt=0, description="KV cache on the CPU back end")
    gpu_memory_share: float = Field(0.85, gt=0, le=1)
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one model")
    python: str | None = Field(
        default_factory=partial(os.environ.get, SCORE_PYTHON),
        description=f"interpreter of the scorer; default: {SCORE_PYTHON}, or this one",
    )
    executor: Literal["process", "ray"] = Field(
        "process", description="one engine here, or many on a Ray cluster, where prepare and publish run too"
    )
    num_actors: int = Field(1, ge=1, description="engines on Ray, each with tensor_parallel GPUs")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPU cores of an engine on Ray")
    ray_address: str | None = Field(
        None, description="default: a running cluster, or else a local Ray; local: a local Ray"
    )
    parity_pairs: int = Field(16, ge=0, description="pairs whose reference log-probs are compared with transformers")

    def result_settings(self) -> dict[str, object]:
        """Return what determines results."""
        return self.model_dump(include={"dtype", "top_k"} if self.top_k else {"dtype"})


class ScheduleSection(Section):
    """When a served deployment runs by itself."""

    cron: str | None = None
    interval_s: float | None = Field(None, gt=0)
    timezone: str = "UTC"

    @model_validator(mode="after")
    def _one_kind(self) -> "ScheduleSection":
        if self.cron and self.interval_s:
            raise ValueError("schedule.cron and schedule.interval_s are both set: keep one")
        return self


class StoreSection(Section):
    """Where the results go."""

    uri: str = Field(default_factory=default_store)


class Recipe(Section):
    """One build."""

    dataset: DatasetSection
    model: ModelSection
    contrast: ContrastSection = Field(default_factory=ContrastSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    weights: AnyWeights
    attribute: AttributeSection = Field(default_factory=AttributeSection)
    anchors: AnchorsSection | None = None
    schedule: ScheduleSection = ScheduleSection()
    store: StoreSection = Field(default_factory=StoreSection)

    @model_validator(mode="after")
    def _places_are_allowed(self) -> "Recipe":
        """Look at every place that a recipe can name, so that none exists whose build would go where it must not."""
        check_place("dataset.source", self.dataset.source, hub="hf://datasets/")
        if self.dataset.data_dir is not None and Path(self.dataset.source).is_dir():  # else it is in a hub dataset
            check_place("dataset.data_dir", str(Path(self.dataset.source, self.dataset.data_dir)))
        check_place("store.uri", self.store.uri)
        models = {f"contrast.{side}_model": self.contrast.model_of(side)[0] for side in MODEL_SIDES}
        for setting, model in {"model.path": self.model.path, **models}.items():
            if model is not None:
                check_place(setting, model, hub="hf://")
        if self.model.chat_template is not None:
            check_place("model.chat_template", self.model.chat_template)
        address = self.score.ray_address
        if address not in (None, "local", "auto"):
            check_place("score.ray_address", address if "://" in address else f"ray://{address}")
        for name, section in self.interpreters().items():
            if section.python is not None:
                check_interpreter_place(f"{name}.python", section.python)
        return self

    @model_validator(mode="after")
    def _uniform_is_uniform(self) -> "Recipe":
        is_plain = (
            self.weights.read_keys() == {"estimator"} and self.weights.estimator == "uniform" and not self.anchors
        )
        if self.weights.name == f"{self.dataset.name}/uniform" and not is_plain:
            raise ValueError(
                f"weights.name {self.weights.name} is kept for weights.estimator 'uniform' without transforms, pair weights "
                "and anchors; choose another name"
            )
        return self

    @model_validator(mode="after")
    def _pair_is_trained_on_other_weights(self) -> "Recipe":
        if self.contrast.weights is not None:
            name = split_name(self.contrast.weights)[0]
            if name in (self.weights.name, self.uniform.name):
                raise ValueError(
                    f"contrast.weights {self.contrast.weights} is what this recipe builds itself: leave it out to train on its "
                    "pairs, or name another weight dataset"
                )
        return self

    @model_validator(mode="after")
    def _weights_find_their_inputs(self) -> "Recipe":
        inputs = self.weights.inputs()
        if "prompt attributions" in inputs and not self.attribute.prompts:
            raise ValueError("weights.span 'sequence' reads attributions of prompts: set attribute.prompts = true")
        if self.attribute.prompts and self.attribute.target == "dpo_margin":
            raise ValueError(
                "attribute.prompts stores a prompt's attributions once for each response, but with attribute.target "
                "'dpo_margin' they belong to both responses: use 'gold_logps', whose numbers are the same on response tokens"
            )
        if "activations" in inputs and not self.attribute.activations:
            raise ValueError("estimator 'activation' reads the size of hidden states: set attribute.activations = true")
        if "contexts" in inputs and not self.attribute.contexts:
            raise ValueError(
                "weights.features 'contexts' reads what the reference model makes of the text before each token: set "
                "attribute.contexts, for example to 16"
            )
        if "reference top k" in inputs and not self.score.top_k:
            raise ValueError("estimator 'entropy' reads the most likely tokens: set score.top_k, for example to 16")
        return self

    @model_validator(mode="after")
    def _scale_has_labels_to_fit(self) -> "Recipe":
        """Say before anything is trained what `fits.py` would say at the end."""
        is_on_these = self.contrast.trains and self.contrast.weights is None
        seen_all = is_on_these and not self.contrast.held_out and self.contrast_settings.split is None
        of_pair = any("contrastive pair" in self.weights.estimators[name].reads for name in self.weights.scales)
        if self.weights.is_calibrated and of_pair and seen_all:
            raise ValueError(
                "weights.scale 'calibrated' fits the scale on labels that the contrastive models have not seen, and they are "
                "trained on all: set contrast.held_out, for example to 0.1, or give weights.scale a number"
            )
        return self

    @model_validator(mode="after")
    def _own_columns_are_read(self) -> "Recipe":
        readers = {"pair_weight_column": "weights.pair_weight 'column'"}
        readers |= {f"{side}_weights_column": "weights.estimator 'column' or 'spans'" for side in SIDES}
        for setting, reader in readers.items():
            if getattr(self.dataset, setting) is not None and setting not in self.weight_columns:
                raise ValueError(f"dataset.{setting} has no effect here, only with {reader}: leave it out")
        return self

    @property
    def weight_columns(self) -> dict[str, str]:
        """The columns of the source with the user's own weights that are read, by the setting of [dataset] that names them."""
        inputs, usual = self.weights.inputs(), "spans" if "spans" in self.weights.estimators else "weights"
        wanted = {"pair_weight_column": "pair_weight"} if "own pair weights" in inputs else {}
        if "own weights" in inputs:
            wanted = {f"{side}_weights_column": f"{side}_{usual}" for side in SIDES} | wanted
        return {setting: getattr(self.dataset, setting) or name for setting, name in wanted.items()}

    @property
    def needs_annotations(self) -> bool:
        """Whether stage annotate reads something of the source: the user's own weights, or the roles of messages."""
        return bool(self.weight_columns) or "message roles" in self.weights.inputs()

    @property
    def needs_pair(self) -> bool:
        """Whether the weights compare a contrastive pair."""
        return "contrastive pair" in self.weights.inputs()

    @property
    def needs_scores(self) -> bool:
        """Whether the weights read annotators' scores of both responses."""
        return self.weights.pair_weight == "quality"

    @property
    def needs_two_responses(self) -> str | None:
        """What cannot be made of unpaired rows, and what to use instead; None if all can be."""
        has_labels, trains_here = not self.dataset.has_no_labels, self.needs_pair and self.contrast.weights is None
        if "labels" in self.weights.inputs():
            return (
                "estimator 'head' learns from two responses to one prompt: choose an estimator that does not, for example "
                f"'tis' with contrast.method {'sft' if has_labels else 'prompt'!r}"
            )
        if "other response" in self.weights.inputs():
            return "estimator 'diff' compares two responses: choose another"
        if self.weight_columns:
            columns = " and ".join(map(repr, self.weight_columns.values()))
            return (
                f"columns {columns} are of pairs: choose another estimator, such as 'pattern', and set "
                "weights.pair_weight to 'none'"
            )
        if self.weights.pair_weight != "none":
            return f"weights.pair_weight {self.weights.pair_weight!r} compares two responses: set it to 'none'"
        if self.weights.is_calibrated:
            return "weights.scale 'calibrated' is fitted to which of two responses was preferred: give weights.scale a number"
        instead = "'sft', 'prompt' or 'given'" if has_labels else "'prompt' or 'given'"
        if trains_here and self.contrast.method == "dpo":
            return (
                f"contrast.method 'dpo' trains on pairs: set contrast.method to {instead}, or contrast.weights to a dataset of "
                "pairs"
            )
        if trains_here and self.contrast.method == "sft" and not has_labels:
            return (
                "contrast.method 'sft' trains one model on undesirable responses, which rows without labels have not: set "
                f"contrast.method to {instead}, or contrast.weights to a dataset with both kinds"
            )
        if self.needs_attributions and self.attribute.target == "dpo_margin":
            return "attribute.target 'dpo_margin' is of two responses: set it to 'max_logit' or 'gold_logps'"
        return None

    @property
    def contrast_settings(self) -> ContrastSection:
        """[contrast] with the split that trains: by default the first of several splits, and all pairs of a single one.

        With `contrast.weights` the splits are those of other pairs, so there is no default.
        """
        if self.contrast.split is not None or self.contrast.weights is not None or not self.dataset.has_splits:
            return self.contrast
        return self.contrast.model_copy(update={"split": self.dataset.splits[0]})

    @property
    def labels(self) -> Selection:
        """The pairs whose labels estimator `head` learns from: those that would train contrastive models of these pairs."""
        is_of_others = self.contrast.weights is not None  # then contrast.split is one of theirs
        first = self.dataset.splits[0] if self.dataset.has_splits else ""
        split = first if is_of_others else self.contrast_settings.split or ""
        return Selection(split, self.contrast.held_out)

    @property
    def learns_from(self) -> str | None:
        """The split whose labels the weights learn; None for all pairs, or if they learn none of these labels."""
        trains = self.needs_pair and self.contrast.trains and self.contrast.weights is None
        return self.labels.split or None if trains or "labels" in self.weights.inputs() else None

    @property
    def needs_attributions(self) -> bool:
        """Whether the weights read gradient attributions, or the activations or contexts in the same table."""
        return not self.weights.inputs().isdisjoint(("attributions", "activations", "contexts"))

    @property
    def uniform(self) -> WeightsSection:
        """Weights of 1, which every build with a pair publishes first: for contrastive training and as a plain DPO baseline."""
        return MODELS["uniform"](name=f"{self.dataset.name}/uniform", estimator="uniform")

    def interpreters(self) -> dict[str, ScoreSection | ContrastSection | AttributeSection]:
        """Return the sections that may name an interpreter of their own, by name."""
        return {"score": self.score, "contrast": self.contrast, "attribute": self.attribute}

    def result_settings(self) -> dict[str, dict[str, object]]:
        """Return the settings that determine the weights, by section, for fingerprints and for explaining what changed.

        Not included: paths, schedules, interpreters, and engine settings that do not change numbers. The content of the source
        and of the model is in the lineage.
        """
        dataset_keys = {"name", "split", "max_prompt_tokens", "max_response_tokens", "long_response"}
        settings = {
            "dataset": self.dataset.model_dump(include=dataset_keys),
            "contrast": self.contrast_settings.result_settings() if self.needs_pair else {},
            "score": self.score.result_settings(),
            "weights": self.weights.result_settings(),
        }
        if self.dataset.split_column is not None:
            settings["dataset"]["split_column"] = self.dataset.split_column
        # These sections came later. They are left out if they are not used, so that older versions keep their fingerprints.
        if "labels" in self.weights.inputs():
            settings["labels"] = {"split": self.labels.split or None, "held_out": self.labels.share}
        if self.needs_attributions:
            settings["attribute"] = self.attribute.result_settings()
        if self.anchors:
            settings["anchors"] = self.anchors.result_settings()
        return settings


def load_recipe(path: str | Path, overrides: Sequence[str] = (), store: str | None = None) -> Recipe:
    """Read a recipe file, apply `--set` overrides and `--store`, and check the result.

    Relative paths in the file start at the working directory, as on the command line.

    Raises:
        InputError: There is no such file.
        SettingsError: The file or an override is wrong; the message names the nearest known key.
    """
    of_store = [] if store is None else [f"store.uri={json.dumps(store, ensure_ascii=False)}"]
    settings = apply_overrides(load_toml(path), [*overrides, *of_store])
    return parse_settings(Recipe, settings, str(path))
