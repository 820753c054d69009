"""From joined columns of some pairs to their weights, as the recipe's [weights] says. Called by `publish.py`, batch by batch.

Not here: the formulas (`estimators/`, `transforms.py`), and what has to be known of the whole dataset first (`fits.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.marks.characters import Texts, Vocabulary
from pipeline.marks.subsequence import differing
from pipeline.weighing import transforms
from pipeline.weighing.draws import token_keys
from pipeline.weighing.estimators import SideScores, SideWeights, ensemble
from pipeline.weighing.head import Head, Responses
from pipeline.weighing.margins import NONE_SEEN, SeenLabels
from pipeline.weighing.section import WeightsSection
from pipeline.weighing.transforms import TransformName
from pipeline.weighing.words import WordStarts
from train.data.selection import Selection, prompt_hashes
from weights_store.errors import InputError, MismatchError
from weights_store.schemas import SIDES, Side
from weights_store.tables.metadata import SpreadRecord

ALL_LABELS = Selection()


class Weighed(NamedTuple):
    """One side of some pairs: its scores, and the weights made from them."""

    scores: SideScores
    weights: SideWeights


@dataclass(frozen=True)
class Weigher:
    """Weighs pairs as a recipe says."""

    section: WeightsSection
    words: WordStarts | None = None
    vocabulary: Vocabulary | None = None
    """The bytes of each token, for estimators that read the text."""
    seen: SeenLabels = NONE_SEEN
    """Which labels the scores have seen."""
    labels: Selection = ALL_LABELS
    """The pairs whose labels `head` is fitted on."""
    head: Head | None = None
    """Token rewards fitted on labels; see `fits.py`, also for what follows."""
    multipliers: Mapping[str, float] = field(default_factory=dict)
    """Factors of the scores by estimator, for `weights.scale` "calibrated" and for `weights.spread`."""
    spreads: Mapping[str, SpreadRecord] = field(default_factory=dict)
    """What was measured for `weights.spread`, by estimator."""
    curves: Mapping[Side, np.ndarray] = field(default_factory=dict)
    """Mean weight by relative position over the whole dataset, for transform `position`."""

    @classmethod
    def of(
        cls,
        section: WeightsSection,
        tokenizer_folder: Path | None = None,
        seen: SeenLabels = NONE_SEEN,
        labels: Selection = ALL_LABELS,
    ) -> "Weigher":
        """Return the weigher of a recipe; reads the tokenizer's vocabulary if the settings need it.

        Raises:
            InputError: They need it, and no folder is given, or the tokens' texts cannot be told.
        """
        weigher, inputs = cls(section, seen=seen, labels=labels), section.inputs()
        for needed, setting in (("words", "weights.smooth_over 'words'"), ("text", "estimator 'pattern'")):
            if needed in inputs and tokenizer_folder is None:
                raise InputError(
                    f"{setting} needs the tokenizer that the pairs were tokenised with, got none: give its folder"
                )
        if tokenizer_folder is None:
            return weigher
        return replace(
            weigher,
            words=WordStarts.of_folder(tokenizer_folder) if "words" in inputs else None,
            vocabulary=Vocabulary.of_folder(tokenizer_folder) if "text" in inputs else None,
        )

    def sides(self, lists: pa.Table) -> dict[Side, Weighed]:
        """Return the weights of both sides of at least one pair; `lists` are joined columns, each in one chunk.

        Raises:
            MismatchError: A score is not valid, or a weight is 0 and a transform takes its log.
        """
        found: dict[Side, Weighed] = {}
        for side, scores in self._with_differences(self.scores(lists), lists).items():
            try:
                found[side] = Weighed(scores, weigh(scores, self.section, self.curves.get(side), self.multipliers))
            except ValueError as error:
                first, last = (lists["pair_id"][at].as_py() for at in (0, -1))
                raise MismatchError(f"{side} responses of the pairs {first} to {last}: {error}") from error
        return found

    def scores(self, lists: pa.Table) -> dict[Side, SideScores]:
        """Return what is known of the tokens of at least one pair; `lists` are joined columns, each in one chunk."""
        return {side: self._scores(lists, side) for side in SIDES}

    def _with_differences(self, scores: dict[Side, SideScores], lists: pa.Table) -> dict[Side, SideScores]:
        """Compare both responses if an estimator asks for it: that takes longest, and no fit of scores needs it."""
        if "other response" not in self.section.inputs():
            return scores
        chosen, rejected = (responses_of(lists, side) for side in SIDES)
        masks = differing(chosen.ids, chosen.lengths, rejected.ids, rejected.lengths)
        return {side: replace(scores[side], differs=mask) for side, mask in zip(SIDES, masks, strict=True)}

    @property
    def scales(self) -> dict[str, float]:
        """The factor of the scores by estimator, for those that have one; calibrated ones must be fitted, see `fits.py`."""
        given = {name: scale for name, scale in self.section.scales.items() if scale != "calibrated"}
        return {**given, **self.multipliers}

    def _scores(self, lists: pa.Table, side: Side) -> SideScores:
        """Return the flat arrays of one side, without copying; the rows that have no response there are left out."""

        def flat(column: str) -> np.ndarray | None:
            if column not in lists.column_names or lists[column].null_count:
                return None
            values = one_chunk(lists[column])
            return (values.flatten() if pa.types.is_list(values.type) else values).to_numpy()

        all_lengths, ids = _lengths(lists, f"{side}_ids"), flat(f"{side}_ids")
        is_there = all_lengths > 0
        lengths = all_lengths[is_there]
        needs_keys = "token keys" in self.section.inputs()
        rewards = None
        if self.head is not None:
            rewards = self.head.scores(responses_of(lists, side), prompt_hashes(lists["pair_id"].to_pylist()))
        of_prompts = flat(f"{side}_prompt_attribution")
        return SideScores(
            side,
            lengths,
            positive_logps=flat(f"{side}_positive_logps"),
            negative_logps=flat(f"{side}_negative_logps"),
            ref_logps=flat(f"{side}_ref_logps"),
            top_logps=flat(f"{side}_ref_top_logps"),
            attributions=flat(f"{side}_attributions"),
            prompt_attributions=None if of_prompts is None else of_prompts[is_there],
            prompt_lengths=_lengths(lists, "prompt_ids")[is_there],
            activations=flat(f"{side}_activations"),
            token_keys=token_keys(lists["pair_id"].to_pylist(), side, all_lengths) if needs_keys else None,
            rewards=rewards,
            word_starts=self.words.starts(ids, lengths) if self.words is not None and ids is not None else None,
            own_weights=flat(f"{side}_values"),
            texts=Texts(self.vocabulary, ids, lengths) if self.vocabulary is not None and ids is not None else None,
        )


def weigh(
    scores: SideScores,
    section: WeightsSection,
    curve: np.ndarray | None = None,
    multipliers: Mapping[str, float] | None = None,
) -> SideWeights:
    """Return the weights of one side: the estimator's or the ensemble's, then transformed in the order of the section.

    `curve` is the mean weight by relative position, for transform `position`, and `multipliers` are the factors of scores by
    estimator, for `weights.scale` "calibrated" and `weights.spread`; see `fits.py`.

    Raises:
        ValueError: A score is not valid, or a weight is 0 and a transform takes its log.
    """
    if not scores.num_tokens:  # unpaired rows, all of the other side
        return SideWeights(np.zeros(0, np.float32))
    members = []
    for name, estimator in section.estimators.items():
        settings = {key: getattr(section, key) for key in estimator.settings}
        if (section.is_calibrated or section.spreads) and "scale" in settings:
            assert multipliers is not None, "no multipliers: fit them over the whole dataset first"
            settings |= {"scale": multipliers[name], "spread": "none"}
        members.append(estimator.estimate(scores, **settings))
    weighed = ensemble(members) if len(members) > 1 else members[0]
    for name in section.transforms:
        weighed = replace(weighed, token_weights=_transform(name, weighed.token_weights, scores, section, curve))
    return weighed


def _transform(
    name: TransformName, weights: np.ndarray, scores: SideScores, section: WeightsSection, curve: np.ndarray | None
) -> np.ndarray:
    lengths = scores.lengths
    match name:
        case "position":
            assert curve is not None, "no curve: measure it over the whole dataset first"
            return transforms.divide_by_position(weights, lengths, curve)
        case "smooth" if section.smooth_over == "words":
            assert scores.word_starts is not None, "no word starts"
            return transforms.smooth_words(weights, scores.word_starts)
        case "smooth":
            return transforms.smooth(weights, lengths, section.smooth_window)
        case "shrink":
            return transforms.shrink(weights, lengths)
        case "decay":
            return transforms.decay(weights, lengths, section.decay_gamma)
        case "mean_one":
            return transforms.mean_one(weights, lengths)


def pair_weights(section: WeightsSection, lists: pa.Table, sides: Mapping[Side, Weighed]) -> np.ndarray:
    """Return one weight per pair, `[B]` float32, at least 0: the factor of its loss.

    `quality`: sigmoid(quality_eta * (S_w - S_l)), w_qual of Uni-DPO (arXiv 2506.10054): 1/2 to 1 if the annotators' scores
    agree with the label, below 1/2 if they do not.

    `margin`: max(0, 2 p - 1), p = sigmoid(m / margin_tau), which is tanh(m / (2 margin_tau)) where m > 0; m is the log-ratios
    of the contrastive pair, summed over the chosen minus over the rejected response. If the label is right with probability p,
    a step on the pair goes with p in the direction of its gradient and with 1 - p against it: 2 p - 1 of it is left on
    average. A pair whose contrastive models cannot tell which response is better gets 0, and so does one where they prefer the
    rejected response: a negative weight would train on the opposite label. Our own.

    `column`: the number that the source has for the pair.
    """
    if section.pair_weight == "quality":
        chosen, rejected = (one_chunk(lists[f"{side}_score"]).to_numpy().astype(np.float64) for side in SIDES)
        return (0.5 * (1 + np.tanh(section.quality_eta * (chosen - rejected) / 2))).astype(np.float32)
    if section.pair_weight == "margin":
        of_sides = (sides[side].scores for side in SIDES)
        chosen, rejected = (transforms.means(each.logratios(), each.lengths) * each.lengths for each in of_sides)
        return np.tanh(np.maximum(chosen - rejected, 0) / (2 * section.margin_tau)).astype(np.float32)
    if section.pair_weight == "column":
        return one_chunk(lists["pair_value"]).to_numpy()
    return np.ones(lists.num_rows, dtype=np.float32)


def responses_of(lists: pa.Table, side: Side) -> Responses:
    """Return ids, and contexts if they are there, of one side of at least one pair."""
    lengths = _lengths(lists, f"{side}_ids")
    ids, contexts = one_chunk(lists[f"{side}_ids"]).flatten().to_numpy(), None
    if (column := f"{side}_contexts") in lists.column_names:
        contexts = one_chunk(lists[column]).flatten().to_numpy().reshape(len(ids), -1)
    return Responses(ids, lengths, contexts)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return the only chunk of a column."""
    assert column.num_chunks == 1, "expected combined columns of at least one row"
    return column.chunk(0)


def _lengths(lists: pa.Table, column: str) -> np.ndarray:
    return np.diff(np.asarray(one_chunk(lists[column]).offsets)).astype(np.int64)
