"""The `[weights]` section of a recipe: one pydantic model per estimator, told apart by `weights.estimator`.

Each model has the common keys of `WeightsSection`, and the keyword arguments of its function in `estimators/`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

from pydantic import AfterValidator, BeforeValidator, Field, create_model, field_validator, model_validator

from pipeline.section import Section
from pipeline.weighing.estimators import ESTIMATORS, Estimator, Input
from pipeline.weighing.keys import Calibrated, DecayGamma
from pipeline.weighing.transforms import TRANSFORM_SETTINGS, TransformName
from weights_store.names import check_new_name

Name = TypeVar("Name", bound=str)

PAIR_WEIGHT_SETTINGS: dict[str, tuple[str, ...]] = {
    "quality": ("quality_eta",),
    "margin": ("margin_tau",),
    "column": (),
}
"""The keys of [weights] that each kind of pair weight reads."""


DEFAULT_ESTIMATOR = "head"
"""Of a recipe that names none: it needs no second model, and is what helps from labels alone (docs/quality.md)."""

_AS_WRITTEN: dict[str, object] = {"transforms": [], "pair_weight": "none"}
_TIS: dict[str, object] = {"scale": 1.0, "spread": "none", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}
PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "paper": {
        "tis": _TIS | _AS_WRITTEN,
        "ti": {"ti_lambda": 0.7, "sigma_divisor": 4.0, "span": "response"} | _AS_WRITTEN,
    },
    "release": {
        "rank_based": {"min_weight": 0.7, "max_weight": 1.3} | _AS_WRITTEN,
        "ti": {"ti_lambda": 0.2, "sigma_divisor": 8.0, "span": "sequence"} | _AS_WRITTEN,
    },
}
"""What `weights.preset` sets, by estimator; the first is that of a recipe which names none. TIS-DPO: eq. 19 of arXiv 2410.04350
with SWIFT's clamp, and the command in its release's README. TI-DPO: arXiv 2505.19653, and its release.
"""


def _each_once(names: list[Name]) -> list[Name]:
    if len(set(names)) < len(names):
        raise ValueError("expected each name once")
    return names


class WeightsSection(Section):
    """The keys that all estimators have in common."""

    name: str = Field(description="name of the weight dataset in two parts, for example hh-harmless/tis-dpo")
    estimator: str = Field(description="where the weights come from, see [weights.md](weights.md)")
    preset: Literal["none", "paper", "release"] = Field(
        "none",
        description="the weights as TIS-DPO's paper or release has them, or TI-DPO's with estimator `ti`, see "
        "[weights.md](weights.md#reproductions-of-the-papers); keys that contradict it are refused",
    )
    transforms: Annotated[list[TransformName], AfterValidator(_each_once)] = Field(
        [],
        description="what is done to the weights, in this order: `position`, `smooth`, `shrink`, `decay`, `mean_one`",
    )
    position_bins: int = Field(20, ge=2, le=10_000, description="number of relative positions")
    smooth_over: Literal["tokens", "words"] = Field(
        "tokens",
        description="mean over neighbouring tokens, or over the tokens of each word (text between white space)",
    )
    smooth_window: int = Field(3, ge=3, description="tokens in the mean over tokens; an odd number")
    decay_gamma: DecayGamma = 0.98
    pair_weight: Literal["none", "quality", "margin", "column"] = Field(
        "none",
        description="`quality`: sigmoid(quality_eta * (score of chosen - score of rejected)), needs both scores in every pair; "
        "`margin`: max(0, 2 sigmoid(m / margin_tau) - 1), m the log-ratios of the contrastive pair summed over chosen minus "
        "over rejected tokens; `column`: the number in `dataset.pair_weight_column`. The loss is still divided by the number "
        "of pairs",
    )
    quality_eta: float = Field(0.7, gt=0, description="per unit of the annotators' scores")
    margin_tau: float = Field(1.0, gt=0, description="in nats")

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if name.count("/") != 1:  # one depth for all, so that no table lies inside another
            raise ValueError("a weight dataset's name has two parts, for example hh-harmless/tis-dpo")
        return check_new_name(name)

    @field_validator("smooth_window")
    @classmethod
    def _window_has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("expected an odd number of tokens, with one in the middle")
        return window

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "WeightsSection":
        for low, high in (("lower", "upper"), ("min_weight", "max_weight")):
            start, end = getattr(self, low, 0), getattr(self, high, 1)
            if start >= end:
                raise ValueError(f"weights.{low} ({start}) must be below weights.{high} ({end})")
        upper = getattr(self, "upper", 1)
        if "threshold" in self.estimators and upper <= 0:
            raise ValueError(
                f"weights.upper ({upper}) must be above 0 with estimator 'threshold', or all weights are 0"
            )
        return self

    @model_validator(mode="after")
    def _one_scale(self) -> "WeightsSection":
        scale, spread = getattr(self, "scale", 1), getattr(self, "spread", "none")
        if scale != 1 and spread != "none":
            raise ValueError(
                f"weights.scale ({scale}) and weights.spread ({spread}) both multiply the scores: keep one, "
                'and set weights.spread to "none" or leave weights.scale out'
            )
        return self

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

    def _readers(self) -> dict[str, list[str]]:
        """Return which choices make a key read, for the keys that depend on more than the estimator."""
        choices: dict[str, Iterable[str]] = {f"transform {name!r}": keys for name, keys in TRANSFORM_SETTINGS.items()}
        choices |= {f"pair_weight {name!r}": keys for name, keys in PAIR_WEIGHT_SETTINGS.items()}
        if self.estimator == "ensemble":
            choices |= {f"member {name!r}": estimator.settings for name, estimator in ESTIMATORS.items()}
        found: dict[str, list[str]] = {}
        for choice, keys in choices.items():
            for key in keys:
                found.setdefault(key, []).append(choice)
        return found

    @model_validator(mode="after")
    def _logs_can_be_taken(self) -> "WeightsSection":
        for name, estimator in self.estimators.items():
            at = estimator.zero_at
            has_zeros = at is not None and all(getattr(self, key) == value for key, value in at.items())
            marked = [*getattr(self, "patterns", ()), *getattr(self, "roles", ())] if name == "pattern" else []
            has_zeros |= any(weight == 0 for _, weight in marked)
            if has_zeros and "shrink" in self.transforms:
                raise ValueError(
                    f"weights.transforms: 'shrink' takes the log of weights, and estimator {name!r} gives weights of 0: "
                    "leave 'shrink' out"
                )
        return self

    @model_validator(mode="after")
    def _marks_are_given(self) -> "WeightsSection":
        names = self.estimators.keys()
        if "pattern" in names and not any(getattr(self, key, None) for key in ("patterns", "roles")):
            raise ValueError(
                "estimator 'pattern' has no pattern: set weights.patterns, for example to [['@code', 2.0]], or weights.roles"
            )
        of_source = [f"estimator {name!r}" for name in ("column", "spans") if name in names]
        of_source += ["weights.roles"] if "message roles" in self.inputs() else []
        if len(of_source) > 1:
            raise ValueError(
                f"{' and '.join(of_source)} each take a number for each token from the source, and there is room for one: keep "
                "one, and write the product of both into its columns"
            )
        return self

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The estimator, or the members of the ensemble, by name."""
        return {self.estimator: ESTIMATORS[self.estimator]}

    def inputs(self) -> set[Input]:
        """Return what must be known of the tokens."""
        found: set[Input] = {needed for estimator in self.estimators.values() for needed in estimator.reads}
        if getattr(self, "span", "response") == "sequence":
            found.add("prompt attributions")
        if "labels" in found and getattr(self, "features", "tokens") == "contexts":
            found.add("contexts")
        if "smooth" in self.transforms and self.smooth_over == "words":
            found.add("words")
        if "pattern" in self.estimators and getattr(self, "roles", None):
            found.add("message roles")
        if self.pair_weight == "margin":
            found.add("contrastive pair")
        if self.pair_weight == "column":
            found.add("own pair weights")
        return found

    @property
    def scales(self) -> dict[str, float | Calibrated]:
        """`weights.scale` by estimator, for those that read it."""
        keys = ((name, key) for name, each in self.estimators.items() for key in each.settings)
        return {name: getattr(self, key) for name, key in keys if key == "scale"}

    @property
    def is_calibrated(self) -> bool:
        """Whether scores are multiplied by factors that are fitted on held-out labels."""
        return "calibrated" in self.scales.values()

    @property
    def spreads(self) -> dict[str, float]:
        """`weights.spread` by estimator, for those that read it; empty if it is "none"."""
        keys = ((name, key) for name, each in self.estimators.items() for key in each.settings)
        return {name: getattr(self, key) for name, key in keys if key == "spread" and getattr(self, key) != "none"}

    @property
    def looks_at_all_pairs(self) -> bool:
        """Whether a pair's weights depend on all other pairs, so that new pairs change them."""
        is_fitted = "labels" in self.inputs()
        return self.is_calibrated or bool(self.spreads) or is_fitted or "position" in self.transforms

    def read_keys(self) -> set[str]:
        """Return the keys that determine the weights; `transforms` and `pair_weight` only if they are used."""
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
        settings = {key: _as_stored(getattr(self, key)) for key in ("name", "estimator", *own, *common) if key in read}
        for key, value in (("scale", 1), ("spread", "none")):
            if settings.get(key) == value:  # the key came later, and what was built without it is the same
                del settings[key]
        # The first formula gave pairs with a strongly negative margin the largest weight: such datasets are built again.
        return settings | ({"margin_formula": 2} if self.pair_weight == "margin" else {})


class _EnsembleSection(WeightsSection):
    """The geometric mean of several estimators, which share their settings."""

    members: Annotated[list[str], AfterValidator(_each_once)] = Field(
        min_length=2, description="the estimators, at least two", examples=[["tis", "ti"]]
    )

    @field_validator("members")
    @classmethod
    def _members_are_estimators(cls, members: list[str]) -> list[str]:
        for name in members:
            if name not in ESTIMATORS:
                raise ValueError(f"no estimator {name!r}: expected some of {', '.join(map(repr, ESTIMATORS))}")
        return members

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The members, by name."""
        return {name: ESTIMATORS[name] for name in self.members}

    def read_keys(self) -> set[str]:
        """Return the keys that determine the weights."""
        return super().read_keys() | {"members"}


def _as_stored(value: object) -> object:
    """Return a setting as JSON gives it back, so that it equals what an earlier version has recorded."""
    return [_as_stored(each) for each in value] if isinstance(value, list | tuple) else value


# --- the models -------------------------------------------------------------------------------------------------------

_ABLATIONS = ("tis", "reversed", "random", "uniform")
"""They allow each other's settings, so that an ablation changes nothing but the estimator."""


def _model(name: str, base: type[WeightsSection], estimators: Iterable[str]) -> type[WeightsSection]:
    """Return the model of one name, with the settings of some estimators; of equal keys the first one's default counts."""
    fields: dict[str, Any] = {"estimator": (Literal[name], name)}
    for estimator in estimators:
        for key, field in ESTIMATORS[estimator].settings.items():
            if key not in base.model_fields:
                fields.setdefault(key, field)
    return create_model(name.title().replace("_", "") + "Section", __base__=base, __module__=__name__, **fields)


MODELS = {name: _model(name, WeightsSection, _ABLATIONS if name in _ABLATIONS else [name]) for name in ESTIMATORS} | {
    "ensemble": _model("ensemble", _EnsembleSection, ESTIMATORS)
}
"""The section of each estimator, by name."""
globals().update({model.__name__: model for model in MODELS.values()})  # so that recipes can be pickled


def _completed(given: object) -> object:
    """Fill in the preset's values and the estimator where they are not given, and refuse values that contradict the preset."""
    if not isinstance(given, Mapping):
        return given
    presets = PRESETS.get(str(given.get("preset")))  # another name is refused by its type
    if presets is None:
        return {"estimator": DEFAULT_ESTIMATOR, **given}
    preset, estimator = given["preset"], given.get("estimator", next(iter(presets)))
    if estimator not in presets:
        raise ValueError(
            f"weights.preset {preset!r} is for estimator {' or '.join(map(repr, presets))}, got weights.estimator "
            f"{estimator!r}: leave one of the two out"
        )
    for key, value in presets[estimator].items():
        if given.get(key, value) != value:
            raise ValueError(
                f"weights.preset {preset!r} sets weights.{key} = {value!r} for estimator {estimator!r}, got {given[key]!r}: "
                f'leave weights.{key} out, or set weights.preset = "none"'
            )
    return {"estimator": estimator, **presets[estimator], **given}


if TYPE_CHECKING:
    AnyWeights = WeightsSection
else:
    AnyWeights = Annotated[
        Union[tuple(MODELS.values())],  # noqa: UP007
        Field(discriminator="estimator"),
        BeforeValidator(_completed),
    ]
