"""Does a contrastive pair say anything about the preference? A sample of pairs, scored with and without its prompts.

Called by `tokenweights check-prompts`, before a dataset is scored. The scoring stage itself does the work, in a temporary
store, so that nothing stays behind. Not here: whether weights made from the log-ratios help a training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.child import temporary_folder
from pipeline.models.given import check_given_models
from pipeline.models.section import MODEL_SIDES, pair_role
from pipeline.parity.check import TOLERANCE_NATS
from pipeline.parity.sample import Sample, take_sample
from pipeline.preflight import check_inputs
from pipeline.recipe import Recipe
from pipeline.stages.contrast import untrained_pair
from pipeline.stages.prepare import Preparation
from pipeline.stages.score import REFERENCE, Scorer, score
from pipeline.weighing.section import MODELS
from pipeline.workers.supervise import Filled, resolve_dtype
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError
from weights_store.names import quarantine_path
from weights_store.schemas import QUARANTINE, SIDES, TOKENS, Side

Logps = Mapping[Side, Sequence[np.ndarray]]
"""Log-probs of a scorer, in nats: of each pair's chosen and rejected response, `[T]`; pairs in one order for all scorers."""

_LOOK_AT = 10_000
_STILL_NATS = 0.05
"""A prompt that moves a token's log-prob by less than this on average is hardly acted on."""
_ALIKE = 0.25
"""Prompts whose log-ratio is a smaller share than this of what each of them moves, move the model alike."""
_Z = 1.959964


@dataclass(frozen=True)
class Figures:
    """What a contrastive pair says about a sample. Log-ratio: log pi+ - log pi- of a token, in nats."""

    num_pairs: int
    num_tokens: int
    size: float
    """Mean |log-ratio| of a token."""
    share_clamped: float
    """Share of the tokens with a log-ratio at or beyond an end of the clamp."""
    spread: float
    """Standard deviation over the responses of the mean log-ratio of a token."""
    margin: float
    """Mean over the pairs of the mean log-ratio of a chosen token minus that of a rejected one."""
    margin_error: float
    """Standard error of `margin`."""
    accuracy: float
    """Share of the pairs in which the chosen response has the larger sum of log-ratios; a tie counts half."""
    moved: tuple[float, float]
    """Mean |log pi+ - log ref| and |log pi- - log ref| of a token."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `accuracy` (Wilson 1927)."""
        share = _Z**2 / self.num_pairs
        middle = (self.accuracy + share / 2) / (1 + share)
        half = math.sqrt(share * self.accuracy * (1 - self.accuracy) + share**2 / 4) / (1 + share)
        return middle - half, middle + half


@dataclass(frozen=True)
class PromptCheck:
    """What the check found: figures by the name of a contrastive pair, of several also of their `average`."""

    sample: Sample
    dtype: str
    clamp: tuple[float, float]
    prompts: Sequence[tuple[str | None, str | None]]
    figures: Mapping[str, Figures]
    num_unscored: int
    """Pairs of the sample that one of the scorers could not take."""


def check_prompts(recipe: Recipe, num_pairs: int = 64) -> PromptCheck:
    """Score a sample of the recipe's pairs with the contrastive pair and the starting model, and count up what it says.

    Raises:
        InputError: The recipe's inputs cannot be used, its pair has to be trained first, its rows have one response, or less
            than two pairs could be scored.
        MissingExtraError: vLLM is not installed.
        StageError: Scoring failed.
    """
    if recipe.contrast.trains:
        raise InputError(
            f"contrast.method is {recipe.contrast.method!r}, which has no prompts to check; --set contrast.method=prompt "
            "checks contrast.positive_prompt and contrast.negative_prompt"
        )
    model_folder = check_inputs(recipe, only_plan=True)
    check_given_models(recipe.contrast, model_folder)  # which check_inputs leaves out if the weights read no pair
    start = Preparation.of(recipe, model_folder)
    sample = take_sample(start, num_pairs, _LOOK_AT)
    if not all(pair.chosen_ids and pair.rejected_ids for pair in sample.pairs):
        raise InputError(
            f"check-prompts compares two responses to a prompt, and dataset.source {recipe.dataset.source} has one in a row: "
            "check the prompts on a source of pairs"
        )
    scorers = {REFERENCE: Scorer(model_folder), **untrained_pair(recipe.contrast, model_folder).scorers}
    settings = recipe.score.model_copy(
        update={"executor": "process", "top_k": 0}
    )  # the store is on this machine's disk
    with temporary_folder("check-prompts-") as folder:
        tokens = _store_sample(sample, start, folder)
        filled = score(tokens, scorers, settings, model_folder, recipe.model.chat_template)
        logps, num_scored = _read_logps(filled)
    if num_scored < 2:
        raise InputError(
            f"{num_scored} of {len(sample.pairs)} pairs could be scored, expected at least 2: check the prompts"
        )
    clamp = _clamp(recipe)
    dtypes = {resolve_dtype(scorer.model, settings.dtype) for scorer in scorers.values()}
    coarsest = max(dtypes, key=lambda dtype: TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"]))
    prompts = recipe.contrast.prompt_pairs
    found = figures_of_all(logps, len(prompts), clamp)
    return PromptCheck(sample, coarsest, clamp, prompts, found, len(sample.pairs) - num_scored)


def _clamp(recipe: Recipe) -> tuple[float, float]:
    """Return the clamp of the recipe's estimator, or that of `tis` if it has none."""
    lower, upper = (getattr(recipe.weights, end, MODELS["tis"].model_fields[end].default) for end in ("lower", "upper"))
    return float(lower), float(upper)


def _store_sample(sample: Sample, start: Preparation, folder: Path) -> TableVersion:
    """Write a sample into a new store, as prepare would; return its tokens table."""
    store = WeightStore(folder)
    rows = [
        {
            **{name: getattr(pair, name) for name in TOKENS.names if hasattr(pair, name)},
            "split": "train",
        }
        for pair in sample.pairs
    ]
    cut = {"template_date": start.cut["template_date"]}
    store.table(quarantine_path(start.tokens.path)).append(
        pa.Table.from_pylist([], QUARANTINE), {"fingerprint": "sample"}
    )
    return store.table(start.tokens.path).append(
        pa.Table.from_pylist(rows, TOKENS), {"fingerprint": "sample", "cut": cut}
    )


def _read_logps(filled: Mapping[str, Filled]) -> tuple[dict[str, Logps], int]:
    """Return the log-probs by role of the pairs that every scorer could take, and their number."""
    frames = {}
    for role, result in filled.items():
        table = WeightStore(result.output.store).table(result.output.table)
        frames[role] = (
            table.scan(result.output.version).select("pair_id", *(f"{side}_logps" for side in SIDES)).collect()
        )
    ids = set.intersection(*(set(frame["pair_id"]) for frame in frames.values()))
    logps: dict[str, Logps] = {}
    for role, frame in frames.items():
        of_all = frame.filter(pl.col("pair_id").is_in(list(ids))).sort("pair_id")
        logps[role] = {side: [np.array(row) for row in of_all[f"{side}_logps"]] for side in SIDES}
    return logps, len(ids)


# --- numbers ----------------------------------------------------------------------------------------------------------


def figures_of_all(logps: Mapping[str, Logps], num_prompt_pairs: int, clamp: tuple[float, float]) -> dict[str, Figures]:
    """Return the figures of each contrastive pair by its number, from "1", and of several those of their "average"."""
    positives, negatives = (
        [logps[pair_role(model, index)] for index in range(num_prompt_pairs)] for model in MODEL_SIDES
    )
    ref = logps[REFERENCE]
    found = {
        str(number): figures(positive, negative, ref, clamp)
        for number, (positive, negative) in enumerate(zip(positives, negatives, strict=True), start=1)
    }
    if num_prompt_pairs > 1:
        found["average"] = figures(_mean(positives), _mean(negatives), ref, clamp)
    return found


def figures(positive: Logps, negative: Logps, ref: Logps, clamp: tuple[float, float]) -> Figures:
    """Return what log-probs of pi+, pi- and the starting model say about at least two pairs; `clamp` is in nats."""
    ratios: dict[Side, list[np.ndarray]] = {
        side: [np.subtract(*both) for both in zip(positive[side], negative[side], strict=True)] for side in SIDES
    }
    flat = np.concatenate([response for side in SIDES for response in ratios[side]])
    means = {side: np.array([response.mean() for response in ratios[side]]) for side in SIDES}
    sums = {side: np.array([response.sum() for response in ratios[side]]) for side in SIDES}
    margins = means["chosen"] - means["rejected"]
    is_right = np.sign(sums["chosen"] - sums["rejected"]) / 2 + 0.5
    return Figures(
        num_pairs=len(margins),
        num_tokens=len(flat),
        size=float(np.abs(flat).mean()),
        share_clamped=float(((flat <= clamp[0]) | (flat >= clamp[1])).mean()),
        spread=float(np.concatenate([means[side] for side in SIDES]).std(ddof=1)),
        margin=float(margins.mean()),
        margin_error=float(margins.std(ddof=1) / math.sqrt(len(margins))),
        accuracy=float(is_right.mean()),
        moved=(_distance(positive, ref), _distance(negative, ref)),
    )


def _distance(logps: Logps, ref: Logps) -> float:
    """Return the mean absolute difference of the tokens' log-probs."""
    both = (pair for side in SIDES for pair in zip(logps[side], ref[side], strict=True))
    return float(np.abs(np.concatenate([np.subtract(*pair) for pair in both])).mean())


def _mean(several: Sequence[Logps]) -> Logps:
    return {
        side: [np.mean(response, axis=0) for response in zip(*(logps[side] for logps in several), strict=True)]
        for side in SIDES
    }


# --- in words ---------------------------------------------------------------------------------------------------------


def verdict(found: Figures, dtype: str) -> str:
    """Return in one line whether a contrastive pair says something about the preference, and if not, what to try."""
    low, high = found.interval
    noise = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"])
    agrees = low > 0.5 or found.margin > 2 * found.margin_error
    contradicts = high < 0.5 or found.margin < -2 * found.margin_error
    numbers = f"it prefers the chosen response in {found.accuracy:.0%} of the pairs ({low:.0%} to {high:.0%})"
    if found.size < noise:
        remedy = _what_to_try(found) if dtype == "float32" else 'set score.dtype = "float32" and check again'
        return (
            f"says little: log-ratios of {found.size:.2g} nats are within the rounding of {dtype} ({noise:g}); {remedy}"
        )
    if agrees and contradicts:
        return (
            f"is unclear: {numbers}, but not token by token, so the length of the responses decides; check more pairs"
        )
    if agrees:
        return f"says something: {numbers}"
    if contradicts:
        return f"is the wrong way round: {numbers}; exchange the two sides, or look at what the labels reward"
    return f"says little: {numbers}, which may be chance; {_what_to_try(found)}"


def _what_to_try(found: Figures) -> str:
    if max(found.moved) < _STILL_NATS:
        return (
            'try contrast.role = "user", prompts that are easier to follow, or a larger model with the same tokenizer '
            '(contrast.method = "given"): this one hardly acts on them'
        )
    if found.size < _ALIKE * min(found.moved):
        return "try prompts that differ in one word, the attribute: these two move the model alike"
    return "try prompts that name what the annotators judged, or check more pairs (--pairs)"


def check_lines(check: PromptCheck) -> list[str]:
    """Return what the check found as lines of text: a table with a row for each contrastive pair, and a verdict on each."""
    first = next(iter(check.figures.values()))
    low, high = check.clamp
    lines = [
        f"{first.num_pairs} pairs, {first.num_tokens:,} response tokens, of {check.sample.origin}; scored in {check.dtype}",
        "log-ratio: log π+ − log π− of a token, in nats; moved: mean |difference| from the starting model without a prompt",
        "",
    ]
    if check.num_unscored:
        lines.insert(1, f"{check.num_unscored} more pairs could not be scored")
    heads = [
        "pair",
        "|log-ratio|",
        f"beyond {low:g}, {high:g}",
        "spread",
        "chosen − rejected",
        "chosen preferred",
        "moved by +, −",
    ]
    rows = [heads]
    for name, each in check.figures.items():
        ends = " to ".join(f"{end:.0%}" for end in each.interval)
        rows.append(
            [
                name,
                f"{each.size:.4f}",
                f"{each.share_clamped:.1%}",
                f"{each.spread:.4f}",
                f"{each.margin:+.4f} ± {each.margin_error:.4f}",
                f"{each.accuracy:.0%} ({ends})",
                ", ".join(f"{moved:.3f}" for moved in each.moved),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.append("")
    for number, prompts in enumerate(check.prompts, start=1):
        lines += [f"{number} {sign} {prompt or 'no prompt'}" for sign, prompt in zip("+−", prompts, strict=True)]
    lines.append("")
    several = len(check.figures) > 1
    for name, each in check.figures.items():
        which = "this pair" if not several else "the average of the pairs" if name == "average" else f"pair {name}"
        lines.append(f"{which} {verdict(each, check.dtype)}")
    return lines
