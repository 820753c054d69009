"""The `[weights]` section of a recipe: the keys that do not depend on the estimator.

Not here: the estimators and their own keys (`registry.py`).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from pipeline.section import Section
from pipeline.weighing.estimators import SideWeights
from pipeline.weighing.transforms import TRANSFORM_SETTINGS, TransformName
from weights_store.names import check_name

Name = TypeVar("Name", bound=str)
Input = Literal[
    "contrastive pair",
    "reference",
    "reference top k",
    "attributions",
    "prompt attributions",
    "activations",
    "token keys",
    "words",
]
"""What an estimator, a transform or a pair weight reads of each token. Pair and reference: their log-probs. Token keys are
hashes of pair and position, from which random numbers are drawn."""


@dataclass(frozen=True)
class Estimator:
    """What is known of an estimator besides its settings."""

    estimate: Callable[..., SideWeights]
    source: str
    """Where it comes from: a paper, a release, or "ours"."""
    reads: tuple[Input, ...] = ()
    zero_at: Mapping[str, float] | None = None
    """Settings with which weights of 0 are usual, so that no log of them can be taken; {}: with any; None: with none."""

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The keys of [weights] that it reads: the keyword arguments of its function."""
        parameters = inspect.signature(self.estimate).parameters.values()
        return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


PairWeight = Literal["none", "quality", "margin"]
PAIR_WEIGHT_SETTINGS: dict[str, tuple[str, ...]] = {"quality": ("quality_eta",), "margin": ("margin_tau",)}
"""The keys of [weights] that each kind of pair weight reads."""


class WeightsSection(Section):
    """The keys that all estimators have in common: the name, transforms, and the weight of the pair."""

    about: ClassVar[Estimator]

    name: str = Field(description="name of the weight dataset in two parts, for example hh-harmless/tis-dpo")
    estimator: str = Field(description="where the weights come from, see [weights.md](weights.md)")
    transforms: list[TransformName] = Field(
        [],
        description="what is done to the weights, in this order: `position`, `smooth`, `shrink`, `decay`, `mean_one`",
    )
    position_bins: int = Field(20, ge=2, le=10_000, description="number of relative positions")
    smooth_over: Literal["tokens", "words"] = Field(
        "tokens",
        description="mean over neighbouring tokens, or over the tokens of each word (text between white space)",
    )
    smooth_window: int = Field(3, ge=3, description="tokens in the mean over tokens; an odd number")
    decay_gamma: float = Field(0.98, gt=0, le=1, description="factor per token, the first included")
    pair_weight: PairWeight = Field(
        "none",
        description="`quality`: sigmoid(quality_eta * (score of chosen - score of rejected)), needs both scores in every pair; "
        "`margin`: tanh(abs(m) / (2 margin_tau)), m the log-ratios of the contrastive pair summed over chosen minus over "
        "rejected tokens. The loss is still divided by the number of pairs",
    )
    quality_eta: float = Field(0.7, gt=0, description="per unit of the annotators' scores")
    margin_tau: float = Field(1.0, gt=0, description="in nats")

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if name.count("/") != 1:  # one depth for all, so that no table lies inside another
            raise ValueError("a weight dataset's name has two parts, for example hh-harmless/tis-dpo")
        return check_name(name)

    @field_validator("smooth_window")
    @classmethod
    def _window_has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("expected an odd number of tokens, with one in the middle")
        return window

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> "WeightsSection":
        """Compare values, not what was given: Prefect hands a recipe back with every key in it."""
        read = self.read_keys()
        if self.smooth_over == "words" and self.smooth_window != 3:
            raise ValueError("weights.smooth_window has no effect with weights.smooth_over 'words': leave it out")
        for key, readers in self._readers().items():
            if key not in read and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"weights.{key} has no effect here, only with {' or '.join(readers)}: leave it out")
        return self

    @classmethod
    def _readers(cls) -> dict[str, list[str]]:
        """Return the keys that are read only with certain choices, and those choices."""
        found: dict[str, list[str]] = {}
        for kind, choices in (("transform", TRANSFORM_SETTINGS), ("pair_weight", PAIR_WEIGHT_SETTINGS)):
            for name, keys in choices.items():
                for key in keys:
                    found.setdefault(key, []).append(f"{kind} {name!r}")
        return found

    @field_validator("transforms")
    @classmethod
    def _transforms_differ(cls, transforms: list[TransformName]) -> list[TransformName]:
        return each_once(transforms)

    @model_validator(mode="after")
    def _logs_can_be_taken(self) -> "WeightsSection":
        with_zeros = [name for name, estimator in self.estimators.items() if self._has_zeros(estimator)]
        if "shrink" in self.transforms and with_zeros:
            raise ValueError(
                f"weights.transforms: 'shrink' takes the log of weights, and estimator {with_zeros[0]!r} gives weights of 0: "
                "leave 'shrink' out"
            )
        return self

    def _has_zeros(self, estimator: Estimator) -> bool:
        zero_at = estimator.zero_at
        return zero_at is not None and all(getattr(self, key) == value for key, value in zero_at.items())

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The estimator, or the members of the ensemble, by name."""
        return {self.estimator: self.about}

    def inputs(self) -> set[Input]:
        """Return what must be known of the tokens."""
        found: set[Input] = {needed for estimator in self.estimators.values() for needed in estimator.reads}
        if "smooth" in self.transforms and self.smooth_over == "words":
            found.add("words")
        if self.pair_weight == "margin":
            found.add("contrastive pair")
        return found

    def read_keys(self) -> set[str]:
        """Return the keys that determine the weights; `transforms` and `pair_weight` only where they are used."""
        keys = {"estimator"}.union(*(estimator.settings for estimator in self.estimators.values()))
        for name in self.transforms:
            keys |= {"transforms", *TRANSFORM_SETTINGS[name]}
        if self.smooth_over == "words":
            keys -= {"smooth_window"}
        if self.pair_weight != "none":
            keys |= {"pair_weight", *PAIR_WEIGHT_SETTINGS[self.pair_weight]}
        return keys

    def result_settings(self) -> dict[str, object]:
        """Return the name and the settings that determine the weights, for fingerprints."""
        common, read = WeightsSection.model_fields, {"name", *self.read_keys()}
        own = [key for key in type(self).model_fields if key not in common]
        return {key: getattr(self, key) for key in ("name", "estimator", *own, *common) if key in read}


def each_once(names: list[Name]) -> list[Name]:
    """Return the names if none is there twice; for validators."""
    if len(set(names)) < len(names):
        raise ValueError("expected each name once")
    return names
