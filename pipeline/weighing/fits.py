"""What has to be known of the whole dataset before any pair can be weighed. Called by `publish.py`.

A fit reads all pairs, as often as it likes, and returns the weigher with what it has found. New pairs change that, and so every
weight: `WeightsSection.looks_at_all_pairs` must be true for what needs a fit. Such datasets are written again, not appended to.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.weighing import transforms
from pipeline.weighing.margins import Margins
from pipeline.weighing.weigh import Weigher
from weights_store.errors import InputError
from weights_store.schemas import SIDES

Pass = Callable[[], Iterable[pa.Table]]
"""Starts one pass over all pairs: joined columns in batches of at least one pair, each column in one chunk."""


def with_fits(weigher: Weigher, over_all: Pass) -> Weigher:
    """Return the weigher with everything that its section needs to know of the whole dataset.

    Raises:
        InputError: Scores are to be calibrated, and too few labels are left that they have not seen.
        MismatchError: As `Weigher.sides`.
    """
    for fit in _FITS:
        weigher = fit(weigher, over_all)
    return weigher


def _with_multipliers(weigher: Weigher, over_all: Pass) -> Weigher:
    """Fit the factors of scores, for `weights.scale` "calibrated".

    Scores that predict the opposite of the labels get 0, which makes all weights equal: a negative factor would be another
    estimator.
    """
    if not weigher.section.is_calibrated:
        return weigher
    scaled = {name: each for name, each in weigher.section.estimators.items() if "scale" in each.settings}
    margins = Margins(scaled, weigher.seen)
    if margins.can_measure:
        for lists in over_all():
            margins.add(lists, weigher.scores(lists))
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


def _with_curves(weigher: Weigher, over_all: Pass) -> Weigher:
    """Take mean weights by relative position, for transform `position`: those of the weights that reach it."""
    section = weigher.section
    if "position" not in section.transforms:
        return weigher
    before = section.transforms[: section.transforms.index("position")]
    first_pass = replace(weigher, section=section.model_copy(update={"transforms": before}))
    sums, counts = ({side: np.zeros(section.position_bins) for side in SIDES} for _ in range(2))
    for lists in over_all():
        for side, (scores, weights) in first_pass.sides(lists).items():
            of_bins, in_bins = transforms.position_sums(weights.token_weights, scores.lengths, section.position_bins)
            sums[side] += of_bins
            counts[side] += in_bins
    # Where there is no token the curve is 0, and nothing reads it.
    return replace(weigher, curves={side: sums[side] / np.maximum(counts[side], 1) for side in SIDES})


_FITS: tuple[Callable[[Weigher, Pass], Weigher], ...] = (_with_multipliers, _with_curves)
"""In their order: each uses what the ones before have found."""
