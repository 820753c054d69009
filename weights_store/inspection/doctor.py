"""What may be wrong with the weights of a dataset: each finding with its figure, its meaning and what to do.

Bounds are set such that the recommended estimator on our own data has no warning. Figures of reproductions of papers are in
docs/weights.md and docs/quality.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

from weights_store.inspection.clamps import weight_settings
from weights_store.inspection.survey import PEAK, Survey
from weights_store.schemas import SIDES, Side
from weights_store.tables.metadata import CommitMetadata, HeldOutRecord, Statistics
from weights_store.views.held_out import held_out_figures

Severity = Literal["warning", "note"]

MAX_CLAMPED = 0.2
"""Share of the tokens. Above it the clamp's ends decide more than the scores: a fifth of the weights have two values."""
MIN_LOGRATIO_NATS = 0.05
"""Mean |log-ratio|, the bound of `check-prompts` too. Log-probs in bfloat16 are rounded by 0.03 nats (docs/weights.md). Prompts
that a small model does not act on gave 0.04 on HH; models trained by DPO in the demo's language 1.5."""
MAX_POSITION_SHARE = 0.5
"""Share of the variance. Above it the place of a token says more about its weight than the token does."""
MAX_CARRIED = 0.1
"""Share of the responses. TI-DPO with the paper's target has most of them: its last tokens weigh 12 to 66 on average, up to
211 (docs/weights.md). Weights of `tis` and `head` have none: their clamps do not allow it."""
MAX_LAST_FACTOR = 3.0
"""Mean weight of last tokens over that of all, or the other way round. `gold_logps` has 0.08, `max_logit` 12 and more."""
NUM_DOMINANT = 10
MAX_DOMINANCE = 0.2
"""Share of the weight that `NUM_DOMINANT` token ids carry beyond their share of the tokens."""
MIN_EFFECTIVE_SHARE = 0.25
"""Below it three quarters of the tokens are trained on for nothing; `sepo`, which selects a share of 0.3, stays above it."""
MAX_SIDE_FACTOR = 1.25
"""Mean weight of one side over that of the other. The paper's clamp of -0.5 and 1.5 gives up to 1.84 / 1.07 = 1.72."""
MIN_VARIATION = 0.01
"""Standard deviation over mean. Weights that vary less train like plain DPO."""
NOISE_FACTOR = 2.5
"""Two scorers with independent normal errors of mean size m give a log-ratio an error with standard deviation √2 √(π/2) m.
That is more than half of the variance if √2 times as much, 2.5 m, is more than the standard deviation that was measured."""
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """One finding of the doctor."""

    name: str
    """A short name that stays the same, for programs: for example `clamped`."""
    severity: Severity
    """A warning makes `doctor --strict` end with exit code 1."""
    figure: str
    """What was measured, with its bound: "38 % of the chosen tokens are at an end of the clamp (more than 20 %)"."""
    meaning: str
    """What it means for a training on these weights."""
    remedy: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.figure[0].upper()}{self.figure[1:]}. {self.meaning} {self.remedy}"


@dataclass(frozen=True)
class _Case:
    """What the checks look at."""

    survey: Survey
    metadata: CommitMetadata

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings of `[weights]`."""
        return weight_settings(self.metadata)

    @property
    def statistics(self) -> Statistics:
        """What the build counted."""
        return self.metadata.get("statistics", {})

    @property
    def is_plain(self) -> bool:
        """Whether all weights are equal, or nearly."""
        sides = self.survey.sides().values()
        low, high = min(side.min_weight for side in sides), max(side.max_weight for side in sides)
        varied = max(side.std_weight / side.mean_weight if side.mean_weight else 0.0 for side in sides)
        return not high > low or varied < MIN_VARIATION


@dataclass(frozen=True)
class _Found:
    """A finding without its name."""

    figure: str
    meaning: str
    remedy: str
    severity: Severity = "warning"


def diagnose(survey: Survey, metadata: CommitMetadata) -> list[Diagnosis]:
    """Return what looks wrong with a version, warnings first; `metadata` is what its commit recorded."""
    if not survey.sides():
        return []
    case = _Case(survey, metadata)
    found = [
        Diagnosis(name, f.severity, f.figure, f.meaning, f.remedy) for name, c in CHECKS.items() for f in c.run(case)
    ]
    return sorted(found, key=lambda diagnosis: diagnosis.severity == "note")


# --- checks of the contrastive pair and the scores --------------------------------------------------------------------


def _held_out(case: _Case) -> Iterator[_Found]:
    for name, record in case.statistics.get("held_out", {}).items():
        if name == "dpo" or "not_measured" in record:
            continue
        found = _of_scores(record, is_reversed=name == "reversed")
        if found is not None:
            yield found


def _of_scores(record: HeldOutRecord, is_reversed: bool) -> _Found | None:
    figure = f"sums of token scores against labels that they have not seen: {held_out_figures(record)}"
    match record["verdict"]:
        case "no better than chance":
            return _Found(
                figure,
                "The gain over chance is within two standard errors: as far as these labels tell, the weights are noise.",
                "Use more pairs, other scores, or no weights (estimator `uniform`: plain DPO).",
            )
        case "wrong way round":
            return _Found(
                figure,
                "The scores predict the opposite of the labels, so the weights stress the wrong tokens.",
                "Check which model of the pair is which, and what the labels reward.",
                "note" if is_reversed else "warning",
            )
        case "overconfident" | "underconfident" if "spread" not in record:  # a spread is chosen for the training
            return _Found(
                figure,
                f"The scores have the right direction, but are {record['verdict']}: the best factor for them is "
                f"{record['multiplier']:.3g}.",
                'Set `weights.scale = "calibrated"`, or choose `weights.spread`.',
                "note",
            )
    return None


def _hardly_differs(case: _Case) -> Iterator[_Found]:
    ratios = case.survey.logratios
    if ratios is not None and ratios.mean_abs < MIN_LOGRATIO_NATS:
        yield _Found(
            f"log-ratios of the contrastive pair are {ratios.mean_abs:.2g} nats in size on average (less than "
            f"{MIN_LOGRATIO_NATS:g})",
            "π+ and π− say nearly the same, so the weights are near 1, or enlarged rounding errors if `weights.spread` scales "
            "them.",
            "With prompts: measure others with `tokenweights check-prompts`. With trained models: train them for longer, or "
            'with a larger learning rate. Small log-ratios need `score.dtype = "float32"`.',
        )


def _inverted(case: _Case) -> Iterator[_Found]:
    ratios = case.survey.logratios
    if ratios is not None and ratios.mean_gap < -_STANDARD_ERRORS * ratios.mean_gap_se:
        yield _Found(
            f"the log-ratio of a chosen token is {-ratios.mean_gap:.3g} ± {ratios.mean_gap_se:.2g} nats lower than that of a "
            f"rejected one; {_percent(ratios.share_agreeing)} of {ratios.num_pairs:,} pairs agree with their label",
            "The contrastive pair takes good responses for bad ones.",
            "Check that π+ and π− are not exchanged, and that the prompts name what the labels reward.",
        )


def _noise(case: _Case) -> Iterator[_Found]:
    ratios, parity = case.survey.logratios, case.metadata.get("parity", {})
    noise = NOISE_FACTOR * parity.get("mean", 0.0)
    if ratios is not None and noise > ratios.std:
        yield _Found(
            f"log-probs differ from those of transformers by {parity['mean']:.2g} nats on average; log-ratios have a standard "
            f"deviation of {ratios.std:.2g} nats (less than {NOISE_FACTOR:g} times as much)",
            "More than half of the variance of the log-ratios may be errors of the scorer.",
            'Set `score.dtype = "float32"`, or use a contrastive pair that differs by more.',
        )


def _clamped(case: _Case) -> Iterator[_Found]:
    ends = {name: (side.share_at_lower or 0, side.share_at_upper or 0) for name, side in case.survey.sides().items()}
    shares = {name: sum(each) for name, each in ends.items()}
    if max(shares.values()) > MAX_CLAMPED:
        lower, upper = (_by_side({name: each[at] for name, each in ends.items()}) for at in (0, 1))
        yield _Found(
            f"{_by_side(shares)} of the tokens are at an end of the clamp (more than {_percent(MAX_CLAMPED)}): {lower} at the "
            f"lower one, {upper} at the upper one",
            "These tokens all have one of two weights: how much the scores differ is lost.",
            "Widen `weights.lower` and `weights.upper`, or set `weights.spread` (0.3 is the default of `head`).",
        )


# --- checks of the weights --------------------------------------------------------------------------------------------


def _constant(case: _Case) -> Iterator[_Found]:
    if case.is_plain and case.settings.get("estimator") != "uniform":
        sides = ", ".join(
            f"{name} {side.mean_weight:.4f} ± {side.std_weight:.1g}" for name, side in case.survey.sides().items()
        )
        yield _Found(
            f"weights hardly vary: {sides} (less than {_percent(MIN_VARIATION)} of the mean)",
            "The tokens of a response all count the same, as in plain DPO.",
            "Check whether both models of the contrastive pair are the same; raise `weights.spread`; or say so with estimator "
            "`uniform`.",
        )


def _sides_apart(case: _Case) -> Iterator[_Found]:
    chosen, rejected = case.survey.chosen.mean_weight, case.survey.rejected.mean_weight
    low, high = sorted((chosen, rejected))  # NaN, of a side without a token, is not above anything
    if high > MAX_SIDE_FACTOR * low:
        direction = "raising" if chosen > rejected else "lowering"
        yield _Found(
            f"mean weight {chosen:.3g} on chosen and {rejected:.3g} on rejected tokens (apart by more than a factor of "
            f"{MAX_SIDE_FACTOR:g})",
            f"The loss falls by {direction} the log-probs of both responses alike, whatever their tokens. This comes from a "
            "clamp that is not around 0, or from scores that reward nearly every token, as where long responses are preferred.",
            "Set `weights.lower` = −`weights.upper`, or add `mean_one` to `weights.transforms`.",
        )


def _position(case: _Case) -> Iterator[_Found]:
    shares = {name: side.position_share for name, side in case.survey.sides().items()}
    if not case.is_plain and max(shares.values()) > MAX_POSITION_SHARE:
        is_meant = case.settings.get("estimator") == "decay" or "decay" in _transforms(case)
        yield _Found(
            f"relative position explains {_by_side(shares)} of the variance of the weights (more than "
            f"{_percent(MAX_POSITION_SHARE)})",
            "The weights say where a token stands rather than what it is.",
            "If that is not meant, add `position` to `weights.transforms`, or with `ti` raise `weights.ti_lambda`.",
            "note" if is_meant else "warning",
        )


def _carried(case: _Case) -> Iterator[_Found]:
    shares = {name: side.share_carried for name, side in case.survey.sides().items()}
    if max(shares.values()) > MAX_CARRIED:
        last = {name: side.share_carried_by_last for name, side in case.survey.sides().items()}
        largest = max(side.max_weight for side in case.survey.sides().values())
        yield _Found(
            f"one token weighs at least {PEAK:g} times the mean of its response in {_by_side(shares)} of the responses (more "
            f"than {_percent(MAX_CARRIED)}); it is the last token in {_by_side(last)}; the largest weight is {largest:.3g}",
            "The training looks at this one token, often the end of the turn, and hardly at the others.",
            'With `ti`: `attribute.target = "gold_logps"`, or a lower `weights.ti_lambda`. Else an estimator with a clamp.',
        )


def _last_token(case: _Case) -> Iterator[_Found]:
    factors = {
        name: side.last_weight / side.mean_weight for name, side in case.survey.sides().items() if side.mean_weight
    }
    odd = [factor for factor in factors.values() if not 1 / MAX_LAST_FACTOR <= factor <= MAX_LAST_FACTOR]
    if odd:
        is_meant = case.settings.get("estimator") == "decay" or "decay" in _transforms(case)
        sides = case.survey.sides().items()
        words = " and ".join(f"{factor:.2g} times ({name})" for name, factor in factors.items())
        most = " and ".join(f"id {side.last_id} in {_percent(side.last_id_share)} ({name})" for name, side in sides)
        yield _Found(
            f"last tokens of responses weigh {words} the mean weight of a token (beyond a factor of {MAX_LAST_FACTOR:g}); most "
            f"often they are {most}",
            "The end of the turn is learnt far more, or far less, than the text: policies stop too early or too late.",
            "Look at the lengths that a policy writes. With `ti` this is the attribution's target: see "
            "`attribute.target`; with `decay` it is meant.",
            "note" if is_meant else "warning",
        )


def _dominant(case: _Case) -> Iterator[_Found]:
    shares, ids = {}, {}
    for name, side in case.survey.sides().items():
        excess = pl.col("share_of_weight") - pl.col("count") / side.num_tokens
        tokens = case.survey.tokens.filter(pl.col("side") == name).select("token_id", excess=excess)
        largest = tokens.filter(pl.col("excess") > 0).sort("excess", descending=True).head(NUM_DOMINANT)
        shares[name], ids[name] = float(largest["excess"].sum()), largest["token_id"].to_list()
    worst = max(shares, key=shares.__getitem__)
    if shares[worst] > MAX_DOMINANCE:
        yield _Found(
            f"{NUM_DOMINANT} token ids carry {_by_side(shares)} of the weight beyond their share of the tokens (more than "
            f"{_percent(MAX_DOMINANCE)}), first of all {', '.join(map(str, ids[worst][:3]))} ({worst})",
            "The training is mostly about these few tokens.",
            "Look at them in `tokenweights view`. If they are not what the labels reward, lower `weights.spread`, or use other "
            "scores.",
        )


def _few_effective(case: _Case) -> Iterator[_Found]:
    shares = {name: side.effective_share for name, side in case.survey.sides().items()}
    if min(shares.values()) < MIN_EFFECTIVE_SHARE:  # NaN if there is no weight at all, see `constant`
        yield _Found(
            f"the effective sample size is {_by_side(shares)} of the tokens of a response (less than "
            f"{_percent(MIN_EFFECTIVE_SHARE)})",
            "Gradients are as noisy as those of responses that much shorter.",
            "Lower `weights.spread`, narrow the clamp, or select a larger `weights.share`.",
        )


def _transforms(case: _Case) -> list[str]:
    found = case.settings.get("transforms")
    return found if isinstance(found, list) else []


def _by_side(shares: Mapping[Side, float]) -> str:
    return " and ".join(f"{_percent(shares[side])} ({side})" for side in SIDES if side in shares)


def _percent(share: float) -> str:
    """Return for example `38 %`, and digits where a small share has only them."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


class _Check(NamedTuple):
    """One check: in words, and what it yields."""

    words: str
    run: Callable[[_Case], Iterator[_Found]]


CHECKS = {
    "held_out": _Check("prediction of held-out labels", _held_out),
    "inverted": _Check("direction of the contrastive pair", _inverted),
    "hardly_differs": _Check("size of its log-ratios", _hardly_differs),
    "scorer_noise": _Check("errors of the scorer", _noise),
    "clamped": _Check("clamped tokens", _clamped),
    "constant": _Check("constant weights", _constant),
    "sides_apart": _Check("mean weights of the two sides", _sides_apart),
    "position": _Check("weight by position", _position),
    "one_token": _Check("single tokens that carry a response", _carried),
    "last_token": _Check("last tokens", _last_token),
    "few_token_ids": _Check("token ids that carry most of the weight", _dominant),
    "effective_sample": _Check("effective sample size", _few_effective),
}
"""By the name of what they find, in the order in which findings are said. docs/weights.md has a row for each."""


def looked_at(survey: Survey, metadata: CommitMetadata) -> list[str]:
    """Return in words what `diagnose` can look at: without a contrastive pair there are no log-ratios, and so on."""
    has_clamp = any(side.share_at_lower is not None for side in survey.sides().values())
    is_measured = any("verdict" in record for record in metadata.get("statistics", {}).get("held_out", {}).values())
    has_pair = survey.logratios is not None
    needs = {"held_out": is_measured, "clamped": has_clamp, "inverted": has_pair, "hardly_differs": has_pair}
    needs["scorer_noise"] = has_pair and "parity" in metadata
    return [check.words for name, check in CHECKS.items() if needs.get(name, True)]
