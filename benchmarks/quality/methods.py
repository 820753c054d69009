"""What is compared: families of methods, each with a few settings to choose from.

Settings are chosen on other seeds than the one that is reported, and the baseline has the most of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.quality import estimates, needed
from benchmarks.quality.scores import Scorers, Scores, weights_of
from train.data.stored_pairs import Pair

SPREAD_CLAMP = {"lower": -1.5, "upper": 1.5}


@dataclass(frozen=True)
class Setting:
    """One training: its loss, and its learning rate relative to the world's."""

    name: str
    loss: Mapping[str, object]
    rate: float = 1.0
    weights: Callable[[Scores], Scores] | None = None
    """From the token scores of its family; None for weights of 1."""
    pairs: Callable[[Scorers, list[Pair]], list[Pair]] | None = None
    """Adds to the pairs what else the loss reads."""
    recipe: Mapping[str, object] | None = None
    """How the training refreshes weights and anchors."""


@dataclass(frozen=True)
class Family:
    """Token scores, and the trainings that use them."""

    name: str
    settings: tuple[Setting, ...]
    scores: Callable[[Scorers], Scores] | None = None
    in_sample: bool = False
    """Whether the scores have seen the labels that they are measured on."""
    needs: str = ""
    """`other` pairs, system `prompts` or a larger `scorer`; worlds without them leave the family out."""


def _dpo(beta: float, rate: float = 1.0) -> Setting:
    return Setting(f"beta {beta:g}" + (f", rate x{rate:g}" if rate != 1 else ""), {"name": "dpo", "beta": beta}, rate)


def _paper(beta: float) -> Setting:
    return Setting(f"beta {beta:g}", {"name": "tis_dpo", "beta": beta}, weights=weights_of)


def _spread(spread: float, beta: float = 0.1) -> Setting:
    name = f"spread {spread:g}" + (f", beta {beta:g}" if beta != 0.1 else "")
    return Setting(
        name,
        {"name": "tis_dpo", "beta": beta},
        weights=lambda scores: weights_of(scores, spread=spread, **SPREAD_CLAMP),
    )


def _clamp(name: str, lower: float, upper: float) -> Setting:
    weights: Callable[[Scores], Scores] = lambda scores: weights_of(scores, lower=lower, upper=upper)  # noqa: E731
    return Setting(f"beta 0.1, {name}", {"name": "tis_dpo", "beta": 0.1}, weights=weights)


def _at_rates(setting: Setting, *rates: float) -> tuple[Setting, ...]:
    """At the world's learning rate some losses move so little that they do not come to the KLs of the comparison."""
    return setting, *(replace(setting, name=f"{setting.name}, rate x{rate:g}", rate=rate) for rate in rates)


def _ti(mix: float = 0.7, **loss: object) -> Setting:
    """TI-DPO of the paper on stored attributions and anchors."""
    return Setting("beta 0.1", {"name": "ti_dpo", "beta": 0.1, **loss}, pairs=partial(needed.attributed, mix=mix))


_TI_ONLINE = Setting(
    "beta 0.1",
    {"name": "ti_dpo", "beta": 0.1, "importance": "online", "anchor": "online"},
    recipe=needed.TI_RECIPE,
)
_UNI = Setting("beta 2", {"name": "uni_dpo", "beta": 2.0, "quality_eta": 0.0}, pairs=needed.unscored)
# The paper's threshold for good responses belongs to its scale of scores; here good is better than neutral.
_UNI_TRUE = Setting("beta 2", {"name": "uni_dpo", "beta": 2.0, "tau_good": 0.0}, pairs=needed.scored)


def _release(estimator: str) -> Setting:
    return Setting(estimator, {"name": "tis_dpo", "beta": 0.1}, weights=lambda scores: weights_of(scores, estimator))


def _d(scorers: Scorers) -> Scores:
    return scorers.trained("dpo")


def _d_on_other(scorers: Scorers) -> Scores:
    return scorers.trained("dpo", on_other=True, num_epochs=1)


def _natural(beta: float) -> Setting:
    """Scores as they are: those of `head` are calibrated already."""
    weights: Callable[[Scores], Scores] = lambda scores: weights_of(scores, **SPREAD_CLAMP)  # noqa: E731
    return Setting(f"as they are, beta {beta:g}", {"name": "tis_dpo", "beta": beta}, weights=weights)


_TWO_SPREADS = (_spread(0.3, 0.3), _spread(0.6))
_SPREADS = (*_TWO_SPREADS, _spread(0.3), _spread(0.15))
DPO, ORACLE = "DPO", "oracle weights"
_ETA = Setting("beta 0.1, eta", {"name": "tis_dpo", "beta": 0.1, "kl": "exact"}, weights=weights_of)
FAMILIES = (
    Family(DPO, (_dpo(0.1), _dpo(0.3), _dpo(0.1, 2.0), _dpo(1.0), _dpo(0.03), _dpo(0.1, 0.5))),
    Family(ORACLE, (_paper(0.3), _paper(0.1)), Scorers.oracle),
    Family("head", _SPREADS, Scorers.head),
    Family("TIS-DPO (D), paper", (_paper(0.1), _paper(0.3), _paper(0.03), _paper(1.0)), _d, in_sample=True),
    Family("head on other pairs", _TWO_SPREADS, lambda scorers: scorers.head(on_other=True), needs="other"),
    Family("D on other pairs, paper", (_paper(0.1), _paper(0.3)), _d_on_other, needs="other"),
    Family("D on other pairs", _TWO_SPREADS, _d_on_other, needs="other"),
    Family("TIS-DPO (P), paper", (_paper(0.1), _paper(0.3)), Scorers.prompted, needs="prompts"),
    Family("P", _TWO_SPREADS, Scorers.prompted, needs="prompts"),
    Family("head, calibrated", (_natural(0.1), _natural(0.3)), Scorers.head),
    Family("head with contexts", _TWO_SPREADS, lambda scorers: scorers.head(16)),
    Family("D", _TWO_SPREADS, _d, in_sample=True),
    Family("D, cross-fitted", _TWO_SPREADS, estimates.cross_fitted),
    Family("D, cross-fitted and bagged", _TWO_SPREADS, lambda scorers: estimates.cross_fitted(scorers, 3)),
    Family("stacked", _TWO_SPREADS, estimates.stacked),
    Family("iterated", (_spread(0.6),), estimates.iterated),
    Family("given", _TWO_SPREADS, estimates.given, needs="other"),
    Family("TIS-DPO (S), paper", (_paper(0.1), _paper(0.3)), lambda scorers: scorers.trained("sft"), in_sample=True),
    Family("TIS-DPO (D), release", (_release("rank_based"), _release("threshold_and_scale")), _d, in_sample=True),
    Family("random weights", (_paper(0.1),), lambda scorers: scorers.drawn(0)),
    Family("reversed D", (_paper(0.1),), lambda scorers: [-each for each in _d(scorers)], in_sample=True),
    Family("SePO (D)", (Setting("30 %", {"name": "sepo"}, weights=lambda s: weights_of(s, "sepo")),), _d, in_sample=True),
    Family("SimPO", (Setting("beta 2", {"name": "simpo", "beta": 2.0}), Setting("beta 10", {"name": "simpo", "beta": 10.0}))),
    Family("D2PO", (Setting("beta 0.1", {"name": "d2po", "beta": 0.1}),)),
    Family("TDPO2", (Setting("beta 0.1", {"name": "tdpo2", "beta": 0.1}), Setting("beta 0.3", {"name": "tdpo2", "beta": 0.3}))),
    Family("TI-DPO, stored", _at_rates(_ti(), 2, 4)),
    Family("TI-DPO, online", _at_rates(_TI_ONLINE, 2, 4)),
    Family("Uni-DPO", _at_rates(_UNI, 2)),
    Family("Uni-DPO, true scores", _at_rates(_UNI_TRUE, 2)),
    Family("P, larger scorer", _TWO_SPREADS, lambda scorers: scorers.prompted(by_scorer=True), needs="scorer"),
    # A reference point that no pairs can reach, and ablations of the papers. Their full forms are above, TIS-DPO without eta.
    Family("GRPO (TRL), true rewards", tuple(Setting(f"beta {b:g}", {"name": "grpo", "beta": b}) for b in (0.04, 0.1, 0.01))),
    Family("TIS-DPO (D), no clamp", (_clamp("no clamp", -math.inf, math.inf),), _d, in_sample=True),
    Family("TIS-DPO (D), symmetric clamp", (_clamp("clamp ±1", -1.0, 1.0),), _d, in_sample=True),
    Family("TIS-DPO (D), with eta", (_ETA,), _d, in_sample=True),
    Family("TI-DPO, no prior", _at_rates(_ti(mix=1.0), 2)[1:]),
    Family("TI-DPO, no triplet", _at_rates(_ti(triplet_gamma=0.0), 2)[1:]),
)  # fmt: skip
PLANTED = {family.name: 1 for family in FAMILIES} | {
    DPO: 6,
    ORACLE: 2,
    "head": 4,
    "TIS-DPO (D), paper": 3,
    "head on other pairs": 2,
    "D on other pairs": 2,
    "given": 2,
    "D, cross-fitted": 2,
    "stacked": 2,
    "head with contexts": 2,
    "SimPO": 2,
    "TDPO2": 2,
    "TI-DPO, stored": 3,
    "TI-DPO, online": 3,
    "Uni-DPO": 2,
    "Uni-DPO, true scores": 2,
    "GRPO (TRL), true rewards": 3,
}
"""How many of their settings families have in the planted world's first cell."""
CELL = {DPO: 3, ORACLE: 1, "head": 1, "head with contexts": 1, "TIS-DPO (D), paper": 1}
"""The same in its other cells, …"""
TOY = {
    DPO: 6,
    ORACLE: 2,
    "head": 4,
    "TIS-DPO (D), paper": 2,
    "head on other pairs": 2,
    "given": 1,
    "P": 2,
    "P, larger scorer": 1,
    "TIS-DPO (P), paper": 1,
    "D, cross-fitted": 1,
    "stacked": 1,
}
"""… in the demo's language, …"""
TINY = {DPO: 3, ORACLE: 1, "head": 1, "head on other pairs": 1, "given": 1}
"""… in real language on two cores, …"""
REAL = {
    DPO: 3,
    ORACLE: 1,
    "head": 2,
    "head on other pairs": 1,
    "TIS-DPO (D), paper": 1,
    "D on other pairs": 1,
    "given": 1,
    "TIS-DPO (P), paper": 1,
    "P": 1,
    "TIS-DPO (S), paper": 1,
    "random weights": 1,
}
"""… and in real language on a GPU."""
