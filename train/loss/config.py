"""The `[loss]` section: one class per loss, with the settings that it reads, the data that it needs, and its row in the docs.

A new loss is a class here, listed in `LossSection`, and a function of the same name in `losses.py`. Read by
`train/config.py`, so no torch here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import Field, model_validator

from train.loss.loss_config import LossConfig
from train.loss.needs import Needs

Kl = Literal["exact", "top_k"]
LabelSmoothing = Annotated[
    float, Field(ge=0, lt=0.5, description="Probability that the two responses of a pair are swapped, 0 to 0.5.")
]
_BETA = "Strength of the pull towards the reference, > 0. It identifies a result, so it has no default."
Beta = Annotated[float, Field(gt=0, examples=[0.1], description=_BETA)]


class PreferenceLoss(LossConfig):
    """A loss of preferences, to which the likelihood of chosen may be added; see `losses.add_nll`."""

    nll_lambda: float | None = Field(default=None, ge=0)
    """Factor of the negative log-likelihood of each chosen response, the mean over its tokens, that is added to the loss
    (default none)."""

    def arguments(self) -> dict[str, float]:
        """Return the keyword arguments of the function of that name in `losses.py`."""
        return {key: value for key, value in super().arguments().items() if key != "nll_lambda"}


class _BetaLoss(PreferenceLoss):
    reads = Needs(ref_logps=True)

    beta: Beta


class Dpo(_BetaLoss):
    """Sums of log-ratios."""

    title = "DPO (arXiv 2305.18290)"
    has_plain_rewards = True

    name: Literal["dpo"]
    label_smoothing: LabelSmoothing = 0.0


class Ipo(_BetaLoss):
    """Means of log-ratios per token as in TRL; the squared distance of their difference to 1 / (2 beta)."""

    title = "IPO (arXiv 2310.12036)"

    name: Literal["ipo"]


class _TdpoLoss(_BetaLoss):
    kl_direction = "ref_policy"
    switches = frozenset({"kl"})

    kl: Kl = "exact"
    """`exact` runs the reference model along and uses the whole vocabulary; `top_k` needs the reference's top-k log-probs in
    the dataset, and no reference model."""


class Tdpo1(_TdpoLoss):
    """Sums of log-ratios and of KL(ref‖π)."""

    title = "TDPO1 (arXiv 2404.11999)"

    name: Literal["tdpo1"]


class Tdpo2(_TdpoLoss):
    """Sums of log-ratios and of `alpha` KL(ref‖π), without the gradient through the KL of chosen."""

    title = "TDPO2 (arXiv 2404.11999)"

    name: Literal["tdpo2"]
    alpha: float = Field(default=0.5, ge=0)
    """Factor of the KL term."""


class TisDpo(_BetaLoss):
    """Weighted sums of log-ratios; `kl = "exact"` or `"top_k"` adds the eta of the paper, with KL(π‖ref)."""

    title = "TIS-DPO (arXiv 2410.04350)"
    reads = Needs(ref_logps=True, token_weights=True)
    kl_direction = "policy_ref"
    switches = frozenset({"kl"})

    name: Literal["tis_dpo"]
    kl: Literal["off", "exact", "top_k"] = "off"
    """`off` leaves eta out; `exact` and `top_k` as for `tdpo1`."""
    eta_scale: float | None = Field(default_factory=lambda given: None if given["kl"] == "off" else 1.0, gt=0)
    """With `kl`: factor of eta (default 1, as in the paper; the official release has 0.5)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kl == "off":
            self._refuse(["eta_scale"], "without eta; set loss.kl to 'exact' or 'top_k'")
        return self


Given = Mapping[str, object]
T = TypeVar("T")


def _by_variant(*, paper: T, release: T) -> Callable[[Given], T]:
    return lambda given: release if given["variant"] == "release" else paper


def _if_triplet(default: Callable[[Given], T]) -> Callable[[Given], T | None]:
    return lambda given: default(given) if given["triplet_gamma"] else None


class TiDpo(_BetaLoss):
    """Weighted sums of log-ratios, and a triplet with an anchor; `variant = "release"` adds the KL term of TDPO2."""

    title = "TI-DPO (arXiv 2505.19653)"
    kl_direction = "ref_policy"
    estimator = "ti"
    switches = frozenset({"kl", "variant", "anchor", "importance", "refresh_steps"})

    name: Literal["ti_dpo"]
    variant: Literal["paper", "release"] = "paper"
    """`paper` has no KL term; `release` has the one of TDPO2, and other defaults for the triplet."""
    kl: Kl | None = Field(default_factory=_by_variant(paper=None, release="exact"))
    """With variant `release`, as for `tdpo1` (default exact)."""
    alpha: float | None = Field(default_factory=_by_variant(paper=None, release=0.5), ge=0)
    """With variant `release`: factor of the KL term (default 0.5)."""
    triplet_gamma: float = Field(default_factory=_by_variant(paper=0.1, release=0.001), ge=0)
    """Factor of the triplet loss (default 0.1, for variant `release` 0.001); with 0 there is no triplet, and the dataset
    needs no anchors."""
    triplet_margin: float | None = Field(default_factory=_if_triplet(_by_variant(paper=0.5, release=0.001)), ge=0)
    """How much nearer the anchor must be to chosen than to rejected, nats squared (default 0.5, for variant `release`
    0.001)."""
    anchor: Literal["stored", "online"] | None = Field(default_factory=_if_triplet(lambda _: "stored"))
    """With the triplet: `stored` (default) takes the anchors of the dataset, sampled from the reference; `online` samples
    them from the policy during training."""
    importance: Literal["stored", "online"] = "stored"
    """`stored` takes the token weights of the dataset; `online` computes them from the policy's gradients during training."""
    refresh_steps: int | None = Field(
        default_factory=lambda given: 1 if "online" in (given["anchor"], given["importance"]) else None, ge=1, le=1000
    )
    """With anything `online`: steps between two refreshes (default 1); the pairs of these steps are held in memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.variant != "release":
            self._refuse(["kl", "alpha"], "without a KL term; set loss.variant to 'release'")
        if self.triplet_gamma == 0:
            self._refuse(["triplet_margin", "anchor"], "without the triplet; set loss.triplet_gamma above 0")
        if "online" not in (self.anchor, self.importance):
            why = "without anything to refresh; set loss.anchor or loss.importance to 'online'"
            self._refuse(["refresh_steps"], why)
        return self

    @property
    def needs(self) -> Needs:
        """What the loss needs with these settings."""
        needs = super().needs
        return replace(
            needs,
            token_weights=self.importance == "stored",
            fresh_weights=self.importance == "online",
            anchors=self.anchor is not None,
            fresh_anchors=self.anchor == "online",
            reference_model=needs.reference_model or self.anchor == "online",
            refresh_steps=self.refresh_steps,
        )


class Treg(_BetaLoss):
    """Sums of log-ratios, and a regulariser towards the token rewards in weights of `weights.estimator = "treg"`."""

    title = "T-REG on DPO (arXiv 2412.02685)"
    has_plain_rewards = True
    reads = Needs(ref_logps=True, token_weights=True)
    estimator = "treg"

    name: Literal["treg"]
    reg_alpha: float = Field(default=0.25, ge=0)
    """Factor of the regulariser; the paper is said to try 0.1, 0.25 and 0.5. With 0 it is `dpo`."""


class Bpo(_BetaLoss):
    """Sums of log-ratios, by a Bregman divergence of the ratio of the data from that of the policy."""

    title = "BPO (arXiv 2505.19601)"
    has_plain_rewards = True

    name: Literal["bpo"]
    bregman_lambda: float = Field(default=-0.5, gt=-1, le=1)
    """Lambda of the divergence. At -1/2 the loss is exp(-u / 2) - 1 of DPO's margin u: a pair counts less the better the policy
    gets it. Above 0 it counts more again once it is told apart clearly. 0 is KLIEP, 1 LSIF, both scaled."""
    min_ratio: float = Field(default=0.01, gt=0, lt=1)
    """Smallest R: a pair that the policy tells apart more clearly has no gradient; 0.003 to 0.025 in the paper."""


class TbpoA(_TdpoLoss):
    """Log-ratios plus KL(ref‖π) at each position that both responses have, by the divergence of `bpo`."""

    title = "TBPO-A (arXiv 2605.12288)"

    name: Literal["tbpo_a"]
    bregman_lambda: float = Field(default=0.2, gt=-1, le=1)
    """As for `bpo`, for each position."""


class Simpo(PreferenceLoss):
    """Mean log-probs per token, with a margin."""

    title = "SimPO (arXiv 2405.14734)"
    reads = Needs()

    name: Literal["simpo"]
    beta: float = Field(gt=0, examples=[2.0])
    """Scale of the margins, > 0; 2 to 10 in the paper."""
    label_smoothing: LabelSmoothing = 0.0
    gamma_beta_ratio: float = Field(default=0.5, ge=0)
    """Margin by which chosen should win, as a share of beta, nats per token."""


class Confpo(Simpo):
    """`simpo` on the tokens that the policy finds no more likely than its mean in the response."""

    title = "ConfPO (arXiv 2506.08712)"

    name: Literal["confpo"]  # type: ignore[assignment]


class Sepo(PreferenceLoss):
    """Mean log-probs of the selected tokens, with weights of `weights.estimator = "sepo"`."""

    title = "SePO (arXiv 2408.13518)"
    reads = Needs(token_weights=True)
    estimator = "sepo"

    name: Literal["sepo"]


class D2po(_BetaLoss):
    """Sums of log-ratios that decay with `gamma`^t."""

    title = "D2PO (arXiv 2502.14340)"

    name: Literal["d2po"]
    gamma: float = Field(default=0.98, gt=0, le=1)
    """Response token t counts gamma^t, t from 1."""


class UniDpo(LossConfig):
    """Means of log-ratios per token, weighted by annotator scores and by how well the policy does already."""

    title = "Uni-DPO (arXiv 2506.10054)"
    reads = Needs(ref_logps=True, scores=True)

    name: Literal["uni_dpo"]
    beta: Beta
    quality_eta: float = Field(default=0.7, ge=0)
    """Slope of a pair's weight in the difference of its annotator scores."""
    tau_ref: float = 0.8
    """Pairs whose margin in the policy is larger than this, in beta x nats per token, count less."""
    focal_gamma: float = Field(default=3.0, ge=0)
    """How much less they count."""
    nll_lambda: float = Field(default=0.001, ge=0)
    """Factor of the likelihood term on good chosen responses."""
    tau_good: float = 3.2
    """A chosen response is good from this annotator score on."""


class Kto(_BetaLoss):
    """Each response by itself: its sum of log-ratios against z0, the mean over responses to other prompts. On unpaired rows."""

    title = "KTO (arXiv 2402.01306)"
    reads = Needs(ref_logps=True, anchors=True, mismatched=True)
    unit = "response"
    compares = False
    has_plain_rewards = True

    name: Literal["kto"]
    desirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the loss of chosen responses. With D desirable and U undesirable responses, TRL advises to keep
    desirable_weight D / (undesirable_weight U) between 1 and 1.33."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the loss of rejected responses."""


class TisKto(Kto):
    """`kto` on weighted sums of log-ratios."""

    title = "Token-weighted KTO, after TKTO (arXiv 2510.05799)"
    reads = Needs(ref_logps=True, token_weights=True, anchors=True, mismatched=True)
    has_plain_rewards = False

    name: Literal["tis_kto"]  # type: ignore[assignment]


class Sft(LossConfig):
    """Likelihood of chosen."""

    title = "Supervised fine-tuning"
    reads = Needs(rejected=False)
    unit = "chosen token"
    compares = False
    has_plain_rewards = True

    name: Literal["sft"]
    beta: float | None = Field(default=None, gt=0)
    """Factor of the logged rewards; 1 if it is not given."""


class Distill(LossConfig):
    """KL(ref‖π) of each token of chosen, times its weight: distillation, with the reference of the build as the teacher."""

    title = "Forward-KL distillation (arXiv 1503.02531)"
    reads = Needs(token_weights=True, ref_top=True, rejected=False, kl_direction="ref_policy")
    unit = "chosen token"
    compares = False
    needs_differing_weights = False
    has_plain_rewards = True

    name: Literal["distill"]
    nll_lambda: float = Field(default=0.0, ge=0)
    """Factor of the negative log-likelihood of each token, which is added to its KL."""


LossSection = Annotated[
    Dpo
    | Ipo
    | Tdpo1
    | Tdpo2
    | TisDpo
    | TiDpo
    | Treg
    | Bpo
    | TbpoA
    | Simpo
    | Confpo
    | Sepo
    | D2po
    | UniDpo
    | Kto
    | TisKto
    | Sft
    | Distill,
    Field(discriminator="name"),
]
LOSSES: dict[str, type[LossConfig]] = {
    get_args(loss.model_fields["name"].annotation)[0]: loss for loss in get_args(get_args(LossSection)[0])
}
"""All losses by name, in the order of the docs."""
