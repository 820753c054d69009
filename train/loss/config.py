"""The `[loss]` section, and what each loss needs of a weight dataset.

Read by `train/config.py`, so no torch here. Not here: the losses themselves (`losses.py`), and whether a dataset has
what is needed (`objective.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossName = Literal["dpo", "ipo", "tdpo1", "tdpo2", "tis_dpo", "ti_dpo", "simpo", "sepo", "d2po", "uni_dpo", "sft"]
KlDirection = Literal["policy_ref", "ref_policy"]
"""KL(pi‖ref) and KL(ref‖pi), the expectation over the first."""

_SETTINGS: dict[str, dict[str, float | str | None]] = {
    "dpo": {"beta": None, "label_smoothing": 0.0},
    "ipo": {"beta": None},
    "tdpo1": {"beta": None, "kl": "exact"},
    "tdpo2": {"beta": None, "kl": "exact", "alpha": 0.5},
    "tis_dpo": {"beta": None, "kl": "off", "eta_scale": 1.0},
    "ti_dpo": {
        "beta": None,
        "variant": "paper",
        "kl": "exact",
        "alpha": 0.5,
        "triplet_gamma": 0.1,
        "triplet_margin": 0.5,
        "anchor": "stored",
        "importance": "stored",
        "refresh_steps": 1,
    },
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
_TI_DPO_RELEASE = {"triplet_gamma": 0.001, "triplet_margin": 0.001}
"""Defaults of the official release's shipped settings, where they are others than the paper's."""
_KL_DIRECTIONS: dict[str, KlDirection] = {
    "tis_dpo": "policy_ref",
    "ti_dpo": "ref_policy",
    "tdpo1": "ref_policy",
    "tdpo2": "ref_policy",
}


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
    """`tis_dpo` (default off: no eta), `tdpo1`, `tdpo2`, `ti_dpo` of variant release (default exact): exact runs the
    reference model along and takes the whole vocabulary; top_k needs reference top-k log-probs in the dataset, and no
    reference model."""
    eta_scale: float | None = Field(default=None, gt=0)
    """`tis_dpo` with kl exact or top_k: factor of eta (default 1, the paper's; the official release has 0.5)."""
    alpha: float | None = Field(default=None, ge=0)
    """`tdpo2`, `ti_dpo` of variant release: factor of the KL term (default 0.5)."""
    variant: Literal["paper", "release"] | None = None
    """`ti_dpo`: paper (default) has no KL term, release adds TDPO2's and has other defaults for the triplet."""
    triplet_gamma: float | None = Field(default=None, ge=0)
    """`ti_dpo`: factor of the triplet loss (default 0.1, of variant release 0.001); 0 leaves it out, and then the dataset
    needs no anchors."""
    triplet_margin: float | None = Field(default=None, ge=0)
    """`ti_dpo`: by how much nearer the anchor shall be to chosen than to rejected, nats squared (default 0.5, of variant
    release 0.001)."""
    anchor: Literal["stored", "online"] | None = None
    """`ti_dpo` with the triplet: anchors of the dataset, sampled from the reference (default), or sampled from the policy
    on the way."""
    importance: Literal["stored", "online"] | None = None
    """`ti_dpo`: token weights of the dataset (default), or made from the policy's gradients on the way."""
    refresh_steps: int | None = Field(default=None, ge=1, le=1000)
    """`ti_dpo` with anything online: make it anew every so many steps (default 1), whose pairs are held in memory."""
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
        return {**_settings_read(given), **given}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        given = self.model_dump(exclude_none=True)
        reads = _settings_read(given)
        for key, value in given.items():
            if key != "name" and key not in reads:
                raise ValueError(_unread_message(given, key, value))
        if "beta" in reads and self.name != "sft" and self.beta is None:
            raise ValueError(f"loss.name={self.name!r} needs loss.beta > 0, for example 0.1; it has no default")
        if self.name in ("tdpo1", "tdpo2", "ti_dpo") and self.kl == "off":
            without = "use loss.variant='paper'" if self.name == "ti_dpo" else "it is 'dpo'"
            raise ValueError(
                f"loss.name={self.name!r} needs loss.kl 'exact' or 'top_k', got 'off'; without it, {without}"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the function of that name in `losses.py`."""
        of_others = {"name", "kl", "variant", "anchor", "importance", "refresh_steps"}
        return self.model_dump(exclude=of_others, exclude_none=True)


def _settings_read(given: Mapping[str, Any]) -> dict[str, float | str | None]:
    """Return what the loss reads, with defaults; empty for a name that does not exist."""
    name = str(given.get("name"))
    reads = dict(_SETTINGS.get(name, {}))
    if name == "ti_dpo" and given.get("variant") == "release":
        reads |= _TI_DPO_RELEASE
    return {key: default for key, default in reads.items() if key not in _settings_switched_off(given)}


def _settings_switched_off(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that are not read because of another one, and what about it."""
    name = given.get("name")
    if name == "tis_dpo" and given.get("kl") in (None, "off"):
        return {"eta_scale": "without eta; set loss.kl to 'exact' or 'top_k'"}
    off: dict[str, str] = {}
    if name == "ti_dpo":
        if given.get("variant") != "release":
            off |= dict.fromkeys(("kl", "alpha"), "without a KL term; set loss.variant to 'release'")
        if given.get("triplet_gamma") == 0:
            off |= dict.fromkeys(("triplet_margin", "anchor"), "without the triplet; set loss.triplet_gamma above 0")
        if "online" not in (given.get("anchor"), given.get("importance")):
            off["refresh_steps"] = "without anything to refresh; set loss.anchor or loss.importance to 'online'"
    return off


def _unread_message(given: Mapping[str, Any], key: str, value: object) -> str:
    reason = _settings_switched_off(given).get(key)
    if reason is not None:
        return f"loss.{key}={value!r} {reason}, or leave {key} out"
    readers = ", ".join(reader for reader, settings in _SETTINGS.items() if key in settings)
    return (
        f"loss.name={given['name']!r} does not read loss.{key}, got {value!r}; leave it out (it belongs to {readers})"
    )


@dataclass(frozen=True)
class Needs:
    """What a loss needs beside ids and the policy."""

    ref_logps: bool = False
    """Reference log-probs of the response tokens."""
    token_weights: bool = False
    """Stored token weights of the response tokens."""
    fresh_weights: bool = False
    """Token weights made from the policy on the way, in the place of stored ones."""
    anchors: bool = False
    """An anchor in every pair of a batch."""
    fresh_anchors: bool = False
    """Anchors sampled from the policy on the way, in the place of stored ones."""
    ref_top: bool = False
    """The reference's top-k ids and log-probs per response token."""
    scores: bool = False
    """Annotator scores of both responses."""
    rejected: bool = True
    """The rejected responses at all."""
    kl_direction: KlDirection | None = None
    """Which per-token KL; None for none."""
    reference_model: bool = False
    """The reference's own forward pass, for the exact KL and for log-probs of fresh anchors."""


def loss_needs(loss: LossConfig) -> Needs:
    """Return what `loss` needs."""
    has_kl = loss.kl in ("exact", "top_k")
    return Needs(
        ref_logps=loss.name not in ("simpo", "sepo", "sft"),
        token_weights=loss.name in ("tis_dpo", "sepo") or loss.importance == "stored",
        fresh_weights=loss.importance == "online",
        anchors=loss.anchor is not None,
        fresh_anchors=loss.anchor == "online",
        ref_top=loss.kl == "top_k",
        scores=loss.name == "uni_dpo",
        rejected=loss.name != "sft",
        kl_direction=_KL_DIRECTIONS[loss.name] if has_kl else None,
        reference_model=loss.kl == "exact" or loss.anchor == "online",
    )
