"""What has to be known of the whole dataset before any pair can be weighed. Called by `publish.py`.

A fit reads all pairs, as often as it likes, and returns the weigher with what it has found. New pairs change that, and so every
weight: `WeightsSection.looks_at_all_pairs` must be true for what needs a fit. Such datasets are written again, not appended to.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.weighing import transforms
from pipeline.weighing.head import Differences, LabelledPairs
from pipeline.weighing.margins import Collected, Margins
from pipeline.weighing.weigh import Weigher, responses_of
from train.data.selection import prompt_hashes
from weights_store.errors import InputError
from weights_store.schemas import SIDES, Side
from weights_store.tables.checksums import mix
from weights_store.tables.metadata import SpreadRecord

_Part = TypeVar("_Part")
Batches = Iterable[pa.Table]
"""Joined columns in batches of at least one pair, each column in one chunk."""


class Pass(Protocol):
    """One pass over all pairs, range of pair_ids by range."""

    def __call__(self, collect: Callable[[Batches], _Part], /) -> Iterable[_Part]:
        """Yield what `collect` makes of each range, in their order; it is picklable, and may run elsewhere."""
        ...


def with_fits(weigher: Weigher, over_all: Pass) -> Weigher:
    """Return the weigher with everything that its section needs to know of the whole dataset.

    Raises:
        InputError: Scores are to be calibrated or rewards fitted, and there are too few labels that may be used for it.
        MismatchError: As `Weigher.sides`.
    """
    for fit in _FITS:
        weigher = fit(weigher, over_all)
    return weigher


def _with_head(weigher: Weigher, over_all: Pass) -> Weigher:
    """Fit token rewards on labels, for estimator `head`."""
    if "labels" not in weigher.section.inputs():
        return weigher
    labelled = LabelledPairs()
    for part in over_all(partial(_labelled, weigher)):
        labelled.merge(part)
    try:
        return replace(weigher, head=labelled.fit())
    except ValueError as error:
        raise InputError(
            f"estimator 'head' learns token rewards from labels: {error}, among the pairs of {weigher.labels}. "
            "Choose another weights.estimator, or add pairs"
        ) from error


def _labelled(weigher: Weigher, batches: Batches) -> LabelledPairs:
    labelled = LabelledPairs()
    for lists in batches:
        kept = lists.filter(pa.array(weigher.labels.keeps(lists))).combine_chunks()
        if kept.num_rows:
            pair_ids = kept["pair_id"].to_pylist()
            keys = mix(np.array([int(pair_id[-16:], 16) for pair_id in pair_ids], np.uint64))
            differences = Differences.of(*(responses_of(kept, side) for side in SIDES))
            labelled.add(differences, prompt_hashes(pair_ids), keys)
    return labelled


def _with_multipliers(weigher: Weigher, over_all: Pass) -> Weigher:
    """Fit the factors of scores, for `weights.scale` "calibrated".

    Scores that predict the opposite of the labels get 0, which makes all weights equal: a negative factor would be another
    estimator.
    """
    if not weigher.section.is_calibrated:
        return weigher
    scaled = [name for name, each in weigher.section.estimators.items() if "scale" in each.settings]
    margins = margins_of(weigher, scaled)
    if margins.can_measure:
        for part in over_all(partial(collect_margins, weigher, scaled)):
            margins.merge(part)
    multipliers: dict[str, float] = {}
    for name in scaled:
        found = margins.measure(name)
        if found is None:
            raise InputError(
                f"weights.scale 'calibrated' fits the scale of estimator {name!r} on labels that its scores have not seen: "
                f"{margins.why_unseen_are_few(name)}, or give weights.scale a number"
            )
        multipliers[name] = max(0.0, found.multiplier)
    return replace(weigher, multipliers=multipliers)


def margins_of(weigher: Weigher, names: Collection[str] | None = None) -> Margins:
    """Return empty margins for some of the weigher's estimators, all by default."""
    estimators = weigher.section.estimators
    return Margins({name: estimators[name] for name in (estimators if names is None else names)}, weigher.seen)


def collect_margins(weigher: Weigher, names: Collection[str] | None, batches: Batches) -> Collected:
    """Return the margins of the pairs of some batches."""
    margins = margins_of(weigher, names)
    for lists in batches:
        margins.add(lists, weigher.scores(lists))
    return margins.collected


def _with_spreads(weigher: Weigher, over_all: Pass) -> Weigher:
    """Fit the factors of scores that give them the standard deviation `weights.spread`; equal scores get 0."""
    spreads = weigher.section.spreads
    if not spreads:
        return weigher
    sums = {name: np.zeros(3) for name in spreads}
    for part in over_all(partial(_sums_of_scores, weigher)):
        for name in spreads:
            sums[name] += part[name]
    found: dict[str, SpreadRecord] = {}
    for name, (count, total, squares) in sums.items():
        std = float(np.sqrt(max(0.0, squares / count - (total / count) ** 2)))
        # Rounded, so that where batches end cannot change the weights.
        found[name] = {"std": std, "scale": float(np.float32(spreads[name] / std)) if std > 0 else 0.0}
    return replace(weigher, spreads=found, multipliers={name: each["scale"] for name, each in found.items()})


def _sums_of_scores(weigher: Weigher, batches: Batches) -> dict[str, np.ndarray]:
    """Return the number of scores, their sum and the sum of their squares, by estimator."""
    sums = {name: np.zeros(3) for name in weigher.section.spreads}
    for lists in batches:
        for scores in weigher.scores(lists).values():
            for name, total in sums.items():
                token_scores = weigher.section.estimators[name].token_scores
                assert token_scores is not None, "an estimator with a spread and without token scores"
                values = token_scores(scores).astype(np.float64)
                total += np.array([len(values), values.sum(), np.square(values).sum()])
    return sums


def _with_curves(weigher: Weigher, over_all: Pass) -> Weigher:
    """Take mean weights by relative position, for transform `position`: those of the weights that reach it."""
    section = weigher.section
    if "position" not in section.transforms:
        return weigher
    before = section.transforms[: section.transforms.index("position")]
    first_pass = replace(weigher, section=section.model_copy(update={"transforms": before}))
    sums, counts = ({side: np.zeros(section.position_bins) for side in SIDES} for _ in range(2))
    for part in over_all(partial(_sums_by_position, first_pass, section.position_bins)):
        for side, (of_bins, in_bins) in part.items():
            sums[side] += of_bins
            counts[side] += in_bins
    # Where there is no token the curve is 0, and nothing reads it.
    return replace(weigher, curves={side: sums[side] / np.maximum(counts[side], 1) for side in SIDES})


def _sums_by_position(weigher: Weigher, num_bins: int, batches: Batches) -> dict[Side, tuple[np.ndarray, np.ndarray]]:
    """Return by side the sum of the weights in each bin of relative position, and how many there are."""
    found: dict[Side, tuple[np.ndarray, np.ndarray]] = {
        side: (np.zeros(num_bins), np.zeros(num_bins)) for side in SIDES
    }
    for lists in batches:
        for side, (scores, weights) in weigher.sides(lists).items():
            for total, more in zip(
                found[side], transforms.position_sums(weights.token_weights, scores.lengths, num_bins), strict=True
            ):
                total += more
    return found


_FITS: tuple[Callable[[Weigher, Pass], Weigher], ...] = (_with_head, _with_multipliers, _with_spreads, _with_curves)
"""In their order: each uses what the ones before have found."""
