"""The recipe of a build: what a TOML file and `--set` may say, checked before anything runs.

Defaults of the method are TIS-DPO's (arXiv 2410.04350): k = 1, mu = +1 / -1; L = -0.5 and U = 1.5 are the values that SWIFT
(NeurIPS 2025, appendix B.2) uses and that are commonly quoted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.weighing.estimators import ESTIMATORS, EstimatorName, Input
from pipeline.weighing.transforms import TRANSFORM_SETTINGS, TransformName
from train.model.sampling import AnchorSampling
from weights_store.errors import SettingsError
from weights_store.names import check_name
from weights_store.settings import apply_overrides, load_toml, parse_settings


class Section(BaseModel):
    """Base of all sections: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetSection(Section):
    """The preference pairs and how they are cut into tokens."""

    name: str = Field(description="name in the store, lower case")
    source: str = Field(description="a .jsonl, .json, .parquet or .arrow file, a saved dataset folder, or a hub id")
    config: str | None = Field(None, description="configuration of a hub dataset")
    data_dir: str | None = Field(None, description="folder inside a hub dataset")
    split: str = Field("train", description="split of a hub dataset; also recorded in the split column")
    revision: str | None = Field(None, description="revision of a hub dataset")
    streaming: bool = Field(False, description="stream a hub dataset that does not fit on the disk")
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    chosen_score_column: str = "score_chosen"
    rejected_score_column: str = "score_rejected"
    max_pairs: int | None = Field(None, ge=1, description="use the first rows only")
    max_prompt_tokens: int = Field(1024, ge=8, description="oldest whole turns are dropped to fit (keep_end)")
    max_response_tokens: int = Field(1024, ge=1, description="EOS included")
    long_response: Literal["refuse", "cut"] = "refuse"

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if "/" in name:
            raise ValueError("a dataset name has one part, without '/'")
        return check_name(name)


class ModelSection(Section):
    """The starting model: reference of the training and origin of the contrastive pair."""

    path: str = Field(description="a model folder, a LoRA adapter, which is merged into its base, or a hub id")
    revision: str | None = Field(None, description="revision of a hub model")
    chat_template: str | None = Field(None, description="a Jinja file, for models that ship none or a wrong one")


class ContrastSection(Section):
    """How the pair (pi+, pi-) is made: P, S or D of TIS-DPO section 4."""

    method: Literal["prompt", "sft", "dpo"] = "dpo"
    positive_prompt: str = "You are a helpful and harmless assistant. Give a good response."
    negative_prompt: str = "You are an unhelpful and harmful assistant. Give a bad response."
    role: Literal["system", "user"] = Field(
        "system", description="where the prompt goes: a system turn, or in front of the first user turn"
    )
    learning_rate: float = Field(5e-6, gt=0)
    num_epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    pairs_per_step: int = Field(32, ge=1)
    tokens_per_batch: int = Field(8192, ge=1)
    beta: float = Field(0.1, gt=0, description="of the two DPO runs (method dpo)")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="arithmetic of the forward pass; parameters are float32"
    )
    seed: int = Field(0, ge=0)
    retrain: bool = Field(
        False, description="train a new pair when the data has grown; else the pair of the first build stays"
    )
    python: str | None = Field(None, description="interpreter of the training job; default: this one")

    @model_validator(mode="after")
    def _prompts_differ(self) -> "ContrastSection":
        if self.method == "prompt" and self.positive_prompt == self.negative_prompt:
            raise ValueError("contrast.positive_prompt equals contrast.negative_prompt: every weight would be constant")
        return self


class ScoreSection(Section):
    """The scoring engine. Only `dtype` and `top_k` change results; the rest is speed and memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the dtype the model is stored in"
    )
    top_k: int = Field(
        0,
        ge=0,
        le=256,
        description="likeliest tokens at each place whose reference log-probs are stored too: tis_dpo's eta and tdpo "
        "can take them in place of the reference model",
    )
    chunk_tokens: int = Field(262_144, ge=1, description="tokens scored between two commits: what a kill can lose")
    batch_tokens: int = Field(4096, ge=256, description="tokens in one engine step (max_num_batched_tokens)")
    kv_cache_gib: float = Field(2.0, gt=0, description="KV cache on the CPU back end")
    gpu_memory_share: float = Field(0.85, gt=0, le=1)
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one model")
    python: str | None = Field(None, description="interpreter of the scorer; default: this one")
    executor: Literal["process", "ray"] = Field("process", description="one engine here, or many on a Ray cluster")
    num_actors: int = Field(1, ge=1, description="engines on Ray, each with tensor_parallel GPUs")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPU cores of an engine on Ray")
    ray_address: str | None = Field(
        None, description="of a running Ray cluster, or local; default: the one at hand, else a local one"
    )
    parity_pairs: int = Field(
        16, ge=0, description="pairs whose stored reference log-probs a build compares with transformers; 0: none"
    )

    def engine_settings(self, dtype: str) -> dict[str, Any]:
        """Return how the engine runs, in a resolved dtype, as the scoring process takes it."""
        keys = {"batch_tokens", "kv_cache_gib", "gpu_memory_share", "tensor_parallel"}
        return {"dtype": dtype, **self.model_dump(include=keys)}

    def result_settings(self) -> dict[str, Any]:
        """Return what determines results."""
        return self.model_dump(include={"dtype", "top_k"} if self.top_k else {"dtype"})

    def executor_settings(self) -> dict[str, Any]:
        """Return where the engines run, as the scoring process takes it."""
        return {"kind": self.executor, **self.model_dump(include={"num_actors", "cpus_per_actor", "ray_address"})}


class AttributeSection(Section):
    """Gradient attribution by the reference policy (TI-DPO, arXiv 2505.19653): L1 norms of input-embedding gradients."""

    target: Literal["max_logit", "gold_logps", "dpo_margin"] = Field(
        "max_logit",
        description="what is differentiated: the largest logit behind the last response token (the paper's), the sum of the "
        "response's log-probs, or the pair's DPO margin",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward and backward pass; auto: the dtype the model is stored in"
    )
    prompts: bool = Field(
        False,
        description="store what falls on each prompt too, which weights.span 'sequence' needs; a prompt is then computed once "
        "for each response",
    )
    activations: bool = Field(False, description="store the size of the hidden states too, for estimator 'activation'")
    chunk_tokens: int = Field(262_144, ge=1, description="tokens between two commits: what a kill can lose")
    batch_tokens: int = Field(4096, ge=256, description="tokens in one forward and backward pass")
    python: str | None = Field(None, description="interpreter of the process; default: this one")

    def result_settings(self) -> dict[str, Any]:
        """Return what determines results."""
        return self.model_dump(include={"target", "dtype", "prompts", "activations"})


class AnchorsSection(Section):
    """Anchors of TI-DPO's triplet loss: one response per prompt, sampled from the reference policy. Defaults: its release's."""

    max_new_tokens: int = Field(AnchorSampling.max_new_tokens, ge=1, description="end-of-turn token included")
    temperature: float = Field(AnchorSampling.temperature, ge=0.01, le=2, description="as vLLM takes it")
    top_k: int = Field(AnchorSampling.top_k, ge=0, description="sample among this many likeliest tokens; 0: all")
    top_p: float = Field(
        AnchorSampling.top_p, gt=0, le=1, description="and among the likeliest with this much probability together"
    )
    seed: int = Field(0, ge=0)


class WeightsSection(Section):
    """From what is stored of each token to its weight: an estimator, then transforms; and the weight of the pair."""

    name: str = Field(description="name of the weight dataset in two parts, for example hh-harmless/tis-dpo")
    estimator: Literal[EstimatorName, "ensemble"] = Field(
        "tis", description="where the weights come from; ensemble: the geometric mean of members"
    )
    k: float = Field(1.0, gt=0)
    mu: float = Field(1.0, gt=0, description="+mu on chosen, -mu on rejected tokens")
    lower: float = Field(-0.5, description="L, in nats; by default -1 with threshold, -1.5 with threshold_and_scale")
    upper: float = Field(1.5, description="U, in nats; by default 1 with threshold")
    seed: int = Field(0, ge=0, description="of the estimators random and random_scale")
    share: float = Field(
        0.3, gt=0, le=1, description="of each response's tokens that sepo or binary selects, at least one"
    )
    ti_lambda: float = Field(0.7, description="share of the attribution, the rest is the prior (ti); 0 to 1")
    sigma_divisor: float = Field(
        4.0, gt=0, description="the prior's sigma is the span's length over this (ti); 4 in the paper, 8 in the release"
    )
    span: Literal["response", "sequence"] = Field(
        "response", description="over what the weights of ti have mean 1; sequence: prompt and response, as the release"
    )
    min_weight: float = Field(0.7, ge=0, description="of threshold_and_scale, rank_based, random_scale")
    max_weight: float = Field(1.3, gt=0, description="of the same")
    members: list[EstimatorName] = Field(
        [], description="estimators whose geometric mean is taken (ensemble); they share settings"
    )
    transforms: list[TransformName] = Field([], description="what is done to the weights, in this order")
    position_bins: int = Field(20, ge=2, le=10_000, description="relative positions told apart (transform position)")
    smooth_over: Literal["tokens", "words"] = Field("tokens", description="of transform smooth")
    smooth_window: int = Field(3, ge=3, description="tokens in the mean, odd (transform smooth over tokens)")
    decay_gamma: float = Field(0.98, gt=0, le=1, description="factor per token (estimator and transform decay)")
    pair_weight: Literal["none", "quality", "margin"] = Field(
        "none",
        description="quality: sigmoid(quality_eta * (score of chosen - of rejected)); margin: tanh(|m| / (2 margin_tau)), m "
        "the pair's log-ratios summed over chosen minus over rejected tokens. The loss stays divided by the number of pairs",
    )
    quality_eta: float = Field(0.7, gt=0, description="per unit of the annotators' scores")
    margin_tau: float = Field(1.0, gt=0, description="in nats")

    @model_validator(mode="before")
    @classmethod
    def _clamp_of_the_estimator(cls, given: Any) -> Any:
        """Put in the ends that the release clamps at, where they are its own."""
        estimator = given.get("estimator") if isinstance(given, dict) else None
        return {**_CLAMPS[estimator], **given} if isinstance(estimator, str) and estimator in _CLAMPS else given

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if name.count("/") != 1:  # one depth for all, so that no table lies inside another
            raise ValueError("a weight dataset's name has two parts, for example hh-harmless/tis-dpo")
        return check_name(name)

    @field_validator("ti_lambda")
    @classmethod
    def _lambda_is_a_share(cls, ti_lambda: float) -> float:
        if not 0 <= ti_lambda <= 1:
            raise ValueError("weights.ti_lambda is the share of the attribution: expected 0 to 1")
        return ti_lambda

    @field_validator("smooth_window")
    @classmethod
    def _window_has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("weights.smooth_window: expected an odd number of tokens, one in the middle")
        return window

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "WeightsSection":
        if self.lower >= self.upper:
            raise ValueError(f"weights.lower ({self.lower}) must be below weights.upper ({self.upper})")
        if self.min_weight >= self.max_weight:
            raise ValueError(
                f"weights.min_weight ({self.min_weight}) must be below weights.max_weight ({self.max_weight})"
            )
        if "threshold" in self.estimators and self.upper <= 0:
            raise ValueError(
                f"weights.upper ({self.upper}) must be above 0 with estimator 'threshold', or all weights are 0"
            )
        return self

    @model_validator(mode="after")
    def _lists_make_sense(self) -> "WeightsSection":
        if self.estimator == "ensemble" and len(set(self.members)) < 2:
            raise ValueError(
                "weights.estimator 'ensemble' is a mean of several: put at least two different estimators into weights.members"
            )
        for key in ("members", "transforms"):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                raise ValueError(f"weights.{key} {names} names one of them twice")
        with_zeros = [name for name in self.estimators if ESTIMATORS[name].has_zeros]
        with_zeros += ["ti"] if "ti" in self.estimators and self.ti_lambda == 1 else []  # an attribution may be 0
        with_zeros += [
            name for name in self.estimators if "min_weight" in ESTIMATORS[name].settings and not self.min_weight
        ]
        if "shrink" in self.transforms and with_zeros:
            raise ValueError(
                f"weights.transforms: 'shrink' takes the log of weights, and estimator {with_zeros[0]!r} gives weights of 0: "
                "leave 'shrink' out"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "WeightsSection":
        """Compare values, not what was given: a deployment hands a recipe back with every key in it."""
        read = self.read_keys()
        if self.estimator in _CLAMP_ABLATIONS:
            read |= {*ESTIMATORS["tis"].settings, "seed"}  # one recipe, its estimator set to another for an ablation
        for key, field in type(self).model_fields.items():
            if key not in ("name", *read) and getattr(self, key) != field.get_default():
                raise ValueError(f"weights.{key} has no effect with {self._choices_beside(key)}: leave it out")
        return self

    def _choices_beside(self, key: str) -> str:
        """Say which choices decide whether a key is read."""
        if key in ("quality_eta", "margin_tau"):
            return f"weights.pair_weight {self.pair_weight!r}"
        if any(key in keys for keys in TRANSFORM_SETTINGS.values()):
            smooth = f" and weights.smooth_over {self.smooth_over!r}" if key == "smooth_window" else ""
            return f"weights.estimator {self.estimator!r} and weights.transforms {self.transforms}{smooth}"
        return f"weights.estimator {self.estimator!r}"

    @property
    def estimators(self) -> list[EstimatorName]:
        """The estimator, or the members of the ensemble."""
        return self.members if self.estimator == "ensemble" else [self.estimator]

    def inputs(self) -> set[Input]:
        """Return what must be known of the tokens besides the reference's log-probs."""
        found: set[Input] = {needed for name in self.estimators for needed in ESTIMATORS[name].inputs}
        if "ti" in self.estimators and self.span == "sequence":
            found.add("prompts")
        if "smooth" in self.transforms and self.smooth_over == "words":
            found.add("words")
        if self.pair_weight == "margin":
            found.add("pair")
        return found

    def read_keys(self) -> set[str]:
        """Return the keys that determine the weights; those of later versions only where they are used."""
        keys = {"estimator"}.union(*(ESTIMATORS[name].settings for name in self.estimators))
        keys |= {"members"} if self.estimator == "ensemble" else set()
        for name in self.transforms:
            keys |= {"transforms", *TRANSFORM_SETTINGS[name]}
        if self.smooth_over == "words":
            keys -= {"smooth_window"}
        of_pair = {
            "none": set[str](),
            "quality": {"pair_weight", "quality_eta"},
            "margin": {"pair_weight", "margin_tau"},
        }
        return keys | of_pair[self.pair_weight]


_CLAMP_ABLATIONS = ("tis", "reversed", "random", "uniform")
_CLAMPS = {"threshold": {"lower": -1.0, "upper": 1.0}, "threshold_and_scale": {"lower": -1.5, "upper": 1.5}}


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

    uri: str = "stores/default"


class Recipe(Section):
    """One build, whole."""

    dataset: DatasetSection
    model: ModelSection
    contrast: ContrastSection = ContrastSection()
    score: ScoreSection = ScoreSection()
    weights: WeightsSection
    attribute: AttributeSection = AttributeSection()
    anchors: AnchorsSection | None = None
    schedule: ScheduleSection = ScheduleSection()
    store: StoreSection = StoreSection()

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
    def _weights_find_their_inputs(self) -> "Recipe":
        inputs = self.weights.inputs()
        if "prompts" in inputs and not self.attribute.prompts:
            raise ValueError("weights.span 'sequence' reads what falls on prompts: set attribute.prompts = true")
        if self.attribute.prompts and self.attribute.target == "dpo_margin":
            raise ValueError(
                "attribute.prompts stores what falls on a prompt for each response, and the margin of attribute.target "
                "'dpo_margin' belongs to both: take 'gold_logps', whose numbers are the same on response tokens"
            )
        if "activations" in inputs and not self.attribute.activations:
            raise ValueError("estimator 'activation' reads the size of hidden states: set attribute.activations = true")
        if "top_k" in inputs and not self.score.top_k:
            raise ValueError(
                "estimator 'entropy' reads the likeliest tokens at each place: set score.top_k, for example to 16"
            )
        return self

    @property
    def needs_pair(self) -> bool:
        """Whether the weights compare a contrastive pair."""
        return "pair" in self.weights.inputs()

    @property
    def needs_attributions(self) -> bool:
        """Whether the weights read gradient attributions, or what is stored beside them."""
        return not self.weights.inputs().isdisjoint(("attributions", "activations"))

    @property
    def uniform(self) -> WeightsSection:
        """The by-product of every build with a pair: weights 1, for contrastive training and the plain DPO baseline."""
        return WeightsSection(name=f"{self.dataset.name}/uniform", estimator="uniform")

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that determine the weights, for fingerprints and for explaining what changed.

        Left out: places, schedules, interpreters and engine settings that do not change numbers. The dataset's source, how much
        of it is read, and the model's path are left out too: their content stands in the lineage.
        """
        dataset = self.dataset.model_dump(
            include={"name", "split", "max_prompt_tokens", "max_response_tokens", "long_response"}
        )
        method = self.contrast.method
        keep = {
            "prompt": {"method", "positive_prompt", "negative_prompt", "role"},
            "sft": TRAINING_KEYS,
            "dpo": {*TRAINING_KEYS, "beta"},
        }[method]
        # Sections that came later stand here only where they count: versions that were made before them stay what they are.
        later = {
            "attribute": self.attribute.result_settings() if self.needs_attributions else None,
            "anchors": self.anchors and self.anchors.model_dump(),
        }
        return {
            "dataset": dataset,
            "contrast": self.contrast.model_dump(include=keep) if self.needs_pair else {},
            "score": self.score.result_settings(),
            "weights": self.weights.model_dump(include={"name", *self.weights.read_keys()}),
            **{name: settings for name, settings in later.items() if settings},
        }


TRAINING_KEYS = {"method", "learning_rate", "num_epochs", "max_steps", "pairs_per_step", "dtype", "seed"}
"""Settings of [contrast] that determine a trained contrastive model; `beta` comes on top for DPO."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), store: str | None = None) -> Recipe:
    """Read a recipe file, put `--set` overrides and `--store` in, and check it.

    Relative paths in the file are relative to the working directory, as on the command line.

    Raises:
        InputError: There is no such file.
        SettingsError: The file or an override is wrong; unknown keys come with the nearest known one.
    """
    settings = apply_overrides(load_toml(path), overrides)
    if store is not None:
        settings["store"] = {**_section(settings, "store"), "uri": store}
    return parse_settings(Recipe, settings, str(path))


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name, {})
    if not isinstance(section, dict):
        raise SettingsError(f"{name!r} is a value in this recipe, expected a section [{name}]")
    return section
