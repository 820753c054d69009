"""The estimators that a recipe may name: one model each, told apart by `weights.estimator`, with the keys that it reads.

To add an estimator, write its function in `estimators.py` and its model here, and add the model to `AnyWeights`. Its docstring
and `about` are its row in docs/weights.md, its fields are rows in docs/settings.md; tests compare them.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.weighing import estimators
from pipeline.weighing.section import Estimator, Input, WeightsSection, each_once

# --- settings that several estimators read ----------------------------------------------------------------------------

Lower = Annotated[float, Field(description="lower end L of the clamp on log-ratios, in nats")]
Upper = Annotated[float, Field(description="upper end U of the clamp, in nats")]


class _Clamped(WeightsSection):
    lower: Lower = -0.5
    upper: Upper = 1.5

    @model_validator(mode="after")
    def _lower_is_below_upper(self) -> "_Clamped":
        if self.lower >= self.upper:
            raise ValueError(f"weights.lower ({self.lower}) must be below weights.upper ({self.upper})")
        if "threshold" in self.estimators and self.upper <= 0:
            raise ValueError(
                f"weights.upper ({self.upper}) must be above 0 with estimator 'threshold', or all weights are 0"
            )
        return self


class _Seeded(WeightsSection):
    seed: int = Field(0, ge=0, description="seed of the random numbers")


class _Scaled(WeightsSection):
    k: float = Field(1.0, gt=0, description="factor of every weight")
    mu: float = Field(1.0, gt=0, description="+mu on chosen, -mu on rejected tokens")


class _Tis(_Seeded, _Clamped, _Scaled):
    """`tis` and its ablations allow each other's settings, so that an ablation changes nothing but the estimator."""


class _Ranged(WeightsSection):
    min_weight: float = Field(0.7, ge=0, description="smallest weight")
    max_weight: float = Field(1.3, gt=0, description="largest weight")

    @model_validator(mode="after")
    def _smallest_is_below_largest(self) -> "_Ranged":
        if self.min_weight >= self.max_weight:
            raise ValueError(
                f"weights.min_weight ({self.min_weight}) must be below weights.max_weight ({self.max_weight})"
            )
        return self


class _Selecting(WeightsSection):
    share: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of each response's tokens to select, rounded down, at least one; of equal scores the earlier token",
    )


class _Attributed(WeightsSection):
    ti_lambda: float = Field(0.7, ge=0, le=1, description="share of the attribution, 0 to 1; the rest is the prior")
    sigma_divisor: float = Field(
        4.0,
        gt=0,
        description="the prior's sigma is the span's length divided by this; 4 in the paper, 8 in the release",
    )
    span: Literal["response", "sequence"] = Field(
        "response",
        description="over which tokens the weights have mean 1; `sequence`: prompt and response, as in the release, needs "
        "`attribute.prompts`, and the mean over the response is then not 1",
    )

    def inputs(self) -> set[Input]:
        """Return what must be known of the tokens."""
        return super().inputs() | ({"prompt attributions"} if self.span == "sequence" else set())


# --- the estimators, as docs/weights.md lists them --------------------------------------------------------------------

_RELEASE = "TIS-DPO's release"


class Tis(_Tis):
    """k · exp(μ · clamp(log π+ − log π−, L, U)), μ < 0 on rejected tokens."""

    estimator: Literal["tis"] = "tis"
    about = Estimator(estimators.tis, "TIS-DPO, 2410.04350", ("contrastive pair",))


class Ti(_Attributed):
    """Mean one of λ · attribution + (1 − λ) · Gaussian prior."""

    estimator: Literal["ti"] = "ti"
    about = Estimator(estimators.ti, "TI-DPO, 2505.19653", ("attributions",), zero_at={"ti_lambda": 1})


class Sepo(_Selecting):
    """1 on the share of tokens with the largest z, else 0."""

    estimator: Literal["sepo"] = "sepo"
    about = Estimator(estimators.select, "SePO, 2408.13518", ("contrastive pair",), zero_at={})


class Origin(WeightsSection):
    """max(0, z)."""

    estimator: Literal["origin"] = "origin"
    about = Estimator(estimators.origin, _RELEASE, ("contrastive pair",), zero_at={})


class Binary(_Selecting):
    """The same function as `sepo`, under the release's name."""

    estimator: Literal["binary"] = "binary"
    about = Estimator(estimators.select, _RELEASE, ("contrastive pair",), zero_at={})


class Threshold(_Clamped):
    """max(0, clamp(z, L, U))."""

    estimator: Literal["threshold"] = "threshold"
    lower: Lower = -1.0
    upper: Upper = 1.0
    about = Estimator(estimators.threshold, _RELEASE, ("contrastive pair",), zero_at={})


class ThresholdAndScale(_Ranged, _Clamped):
    """clamp(z, L, U), scaled linearly so that L becomes `min_weight` and U `max_weight`."""

    estimator: Literal["threshold_and_scale"] = "threshold_and_scale"
    lower: Lower = -1.5
    about = Estimator(estimators.threshold_and_scale, _RELEASE, ("contrastive pair",), zero_at={"min_weight": 0})


class RankBased(_Ranged):
    """From `min_weight` to `max_weight` by the rank of z in its response; equal z have equal ranks."""

    estimator: Literal["rank_based"] = "rank_based"
    about = Estimator(estimators.rank_based, _RELEASE, ("contrastive pair",), zero_at={"min_weight": 0})


class RandomScale(_Ranged, _Seeded):
    """Drawn from U(`min_weight`, `max_weight`)."""

    estimator: Literal["random_scale"] = "random_scale"
    about = Estimator(estimators.random_scale, f"{_RELEASE} (`random`)", ("token keys",), zero_at={"min_weight": 0})


class Decay(WeightsSection):
    """γ^t, t from 1."""

    estimator: Literal["decay"] = "decay"
    about = Estimator(estimators.decay, "D2PO, 2502.14340")


class Surprise(WeightsSection):
    """−log ref(y_t) divided by its mean in the response."""

    estimator: Literal["surprise"] = "surprise"
    about = Estimator(estimators.surprise, "ours", ("reference",), zero_at={})


class Entropy(WeightsSection):
    """Entropy of the reference at that position divided by its mean in the response, from the stored top k (`score.top_k`)."""

    estimator: Literal["entropy"] = "entropy"
    about = Estimator(estimators.entropy, "ours", ("reference top k",), zero_at={})


class Activation(WeightsSection):
    """Size of the hidden states that predict the token (`attribute.activations`), divided by its mean in the response."""

    estimator: Literal["activation"] = "activation"
    about = Estimator(estimators.activation, "after SparsePO, 2410.05102; the definition is ours", ("activations",))


class Uniform(_Tis):
    """1 everywhere."""

    estimator: Literal["uniform"] = "uniform"
    about = Estimator(estimators.uniform, "plain DPO")


class Random(_Tis):
    """`tis` of log-ratios drawn from U(L, U)."""

    estimator: Literal["random"] = "random"
    about = Estimator(estimators.random, "ablation", ("token keys",))


class Reversed(_Tis):
    """`tis` with π+ and π− exchanged."""

    estimator: Literal["reversed"] = "reversed"
    about = Estimator(estimators.reversed_tis, "ablation", ("contrastive pair",))


class Ensemble(_Ranged, _Attributed, _Selecting, _Tis):
    """Geometric mean of `members`, for example `["tis", "ti"]`, which share their settings."""

    estimator: Literal["ensemble"] = "ensemble"
    members: list[str] = Field(description="the estimators, at least two", examples=[["tis", "ti"]])
    about = Estimator(estimators.ensemble, "ours")

    @field_validator("members")
    @classmethod
    def _members_are_estimators(cls, members: list[str]) -> list[str]:
        for name in members:
            if name not in ESTIMATORS:
                raise ValueError(f"no estimator {name!r}: expected some of {', '.join(map(repr, ESTIMATORS))}")
        if len(set(members)) < 2:
            raise ValueError("expected at least two different estimators")
        return each_once(members)

    @classmethod
    def _readers(cls) -> dict[str, list[str]]:
        found = super()._readers()
        for name, estimator in ESTIMATORS.items():
            for key in estimator.settings:
                found.setdefault(key, []).append(f"member {name!r}")
        return found

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The members, by name."""
        return {name: ESTIMATORS[name] for name in self.members}

    def read_keys(self) -> set[str]:
        """Return the keys that determine the weights."""
        return super().read_keys() | {"members"}


def _tis_by_default(given: object) -> object:
    return {"estimator": "tis", **given} if isinstance(given, Mapping) else given


_Models = (
    Tis
    | Ti
    | Sepo
    | Origin
    | Binary
    | Threshold
    | ThresholdAndScale
    | RankBased
    | RandomScale
    | Decay
    | Surprise
    | Entropy
    | Activation
    | Uniform
    | Random
    | Reversed
    | Ensemble
)
AnyWeights = Annotated[_Models, Field(discriminator="estimator"), BeforeValidator(_tis_by_default)]
"""What a recipe's [weights] may be."""
MODELS: tuple[type[WeightsSection], ...] = get_args(_Models)
ESTIMATORS = {model.model_fields["estimator"].default: model.about for model in MODELS if model is not Ensemble}
"""The estimators by their names in a recipe, `ensemble` apart, which is made of them."""
