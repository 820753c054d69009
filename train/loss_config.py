"""The `[loss]` section, and what each loss needs of a weight dataset.

Read by `train/config.py`, so no torch here. Not here: the losses themselves (`losses.py`), and whether a dataset has
what is needed (`objective.py`).
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossName = Literal["dpo", "ipo", "tdpo1", "tdpo2", "tis_dpo", "simpo", "sepo", "d2po", "uni_dpo", "sft"]
KlDirection = Literal["policy_ref", "ref_policy"]
"""KL(pi‖ref) and KL(ref‖pi), the expectation over the first."""

_SETTINGS: dict[str, dict[str, float | str | None]] = {
    "dpo": {"beta": None, "label_smoothing": 0.0},
    "ipo": {"beta": None},
    "tdpo1": {"beta": None, "kl": "exact"},
    "tdpo2": {"beta": None, "kl": "exact", "alpha": 0.5},
    "tis_dpo": {"beta": None, "kl": "off", "eta_scale": 1.0},
    "simpo": {"beta": None, "label_smoothing": 0.0, "gamma_beta_ratio": 0.5},
    "sepo": {},
    "d2po": {"beta": None, "gamma": 0.98},
    "uni_dpo": {
        "beta": None,
        "quality_eta": 0.7,
        "tau_ref": 0.8,
        "focal_gamma": 3.0,
        "nll_lambda": 0.001,
        "tau_good": 3.2,
    },
    "sft": {"beta": None},
}
"""The settings that each loss reads, with their defaults."""
_KL_DIRECTIONS: dict[str, KlDirection] = {"tis_dpo": "policy_ref", "tdpo1": "ref_policy", "tdpo2": "ref_policy"}


class LossConfig(BaseModel):
    """What is minimised. A setting that the chosen loss does not read is refused; those it reads are always filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: LossName
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference (of the logistic, for `simpo`), > 0. Identifies a result, so it has no
    default; `sft` needs none and scales its logged rewards with it, `sepo` has none."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """`dpo`, `simpo`: probability that a pair is labelled the wrong way round, 0..0.5 (default 0)."""
    kl: Literal["off", "exact", "top_k"] | None = None
    """`tis_dpo` (default off: no eta), `tdpo1`, `tdpo2` (default exact): exact runs the reference model along and takes
    the whole vocabulary; top_k needs reference top-k log-probs in the dataset, and no reference model."""
    eta_scale: float | None = Field(default=None, gt=0)
    """`tis_dpo` with kl exact or top_k: factor of eta (default 1, the paper's; the official release has 0.5)."""
    alpha: float | None = Field(default=None, ge=0)
    """`tdpo2`: factor of its KL term (default 0.5)."""
    gamma_beta_ratio: float | None = Field(default=None, ge=0)
    """`simpo`: margin that chosen should win by, as a share of beta, nats per token (default 0.5)."""
    gamma: float | None = Field(default=None, gt=0, le=1)
    """`d2po`: response token t counts gamma^t, t from 1 (default 0.98)."""
    quality_eta: float | None = Field(default=None, ge=0)
    """`uni_dpo`: slope of the pair's weight in the difference of annotator scores (default 0.7)."""
    tau_ref: float | None = None
    """`uni_dpo`: pairs that the policy tells apart by more than this, in beta x nats per token, count less (default
    0.8)."""
    focal_gamma: float | None = Field(default=None, ge=0)
    """`uni_dpo`: how much less (default 3)."""
    nll_lambda: float | None = Field(default=None, ge=0)
    """`uni_dpo`: factor of the likelihood term on good chosen responses (default 0.001)."""
    tau_good: float | None = None
    """`uni_dpo`: annotator score from which a chosen response is good, on the annotator's scale (default 3.2)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, settings: Any) -> Any:
        # None stands for "not given" throughout, so that a config which was dumped with its defaults loads again.
        if not isinstance(settings, dict):
            return settings
        given = {key: value for key, value in settings.items() if value is not None}
        return {**_settings_read(given.get("name"), given.get("kl")), **given}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        reads = _settings_read(self.name, self.kl)
        for key, value in self.model_dump(exclude={"name"}, exclude_none=True).items():
            if key not in reads:
                raise ValueError(_unread_message(self.name, key, value))
        if "beta" in reads and self.name != "sft" and self.beta is None:
            raise ValueError(f"loss.name={self.name!r} needs loss.beta > 0, for example 0.1; it has no default")
        if self.name in ("tdpo1", "tdpo2") and self.kl == "off":
            raise ValueError(
                f"loss.name={self.name!r} needs loss.kl 'exact' or 'top_k', got 'off'; without it, it is 'dpo'"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the function of that name in `losses.py`."""
        return self.model_dump(exclude={"name", "kl"}, exclude_none=True)


def _settings_read(name: object, kl: object) -> dict[str, float | str | None]:
    """Return what the loss reads, with defaults; empty for a name that does not exist."""
    reads = _SETTINGS.get(str(name), {})
    if name == "tis_dpo" and kl in (None, "off"):
        return {key: default for key, default in reads.items() if key != "eta_scale"}
    return reads


def _unread_message(name: str, key: str, value: object) -> str:
    if (name, key) == ("tis_dpo", "eta_scale"):
        return f"loss.eta_scale={value} without eta; set loss.kl to 'exact' or 'top_k', or leave eta_scale out"
    readers = ", ".join(reader for reader, settings in _SETTINGS.items() if key in settings)
    return f"loss.name={name!r} does not read loss.{key}, got {value!r}; leave it out (it belongs to {readers})"


@dataclass(frozen=True)
class Needs:
    """What a loss needs beside ids and the policy."""

    ref_logps: bool = False
    """Reference log-probs of the response tokens."""
    token_weights: bool = False
    ref_top: bool = False
    """The reference's top-k ids and log-probs per response token."""
    scores: bool = False
    """Annotator scores of both responses."""
    rejected: bool = True
    """The rejected responses at all."""
    kl_direction: KlDirection | None = None
    """Which per-token KL; None for none."""
    reference_model: bool = False
    """The reference's own forward pass, for the exact KL."""


def loss_needs(loss: LossConfig) -> Needs:
    """Return what `loss` needs."""
    has_kl = loss.kl in ("exact", "top_k")
    return Needs(
        ref_logps=loss.name not in ("simpo", "sepo", "sft"),
        token_weights=loss.name in ("tis_dpo", "sepo"),
        ref_top=loss.kl == "top_k",
        scores=loss.name == "uni_dpo",
        rejected=loss.name != "sft",
        kl_direction=_KL_DIRECTIONS[loss.name] if has_kl else None,
        reference_model=loss.kl == "exact",
    )
