"""Collects, over one pass, the margins of the pairs whose labels the token scores have not seen, and measures them.

Scores are those of an estimator that has some (`Estimator.token_scores`): log pi+ - log pi- for those that read the contrastive
pair. Memory is bounded: of more than `MAX_PAIRS` pairs, a sample of the prompts is measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.weighing.estimators import Estimator, SideScores
from pipeline.weighing.held_out import MIN_PROMPTS, HeldOut, compare, measure
from pipeline.weighing.transforms import sums
from train.data.selection import Selection, prompt_hashes
from weights_store.schemas import SIDES, Side
from weights_store.tables.checksums import mix
from weights_store.tables.metadata import HeldOutRecord

DPO = "dpo"
"""Name of DPO's own implicit reward, log pi+ - log ref, among what is measured."""
MAX_PAIRS = 1_000_000
"""How many pairs are measured for each estimator. Standard errors are then below 0.001 nats, if a prompt has few pairs."""
_HOLD_OUT = "set contrast.held_out, for example to 0.1"


@dataclass(frozen=True, slots=True)
class SeenLabels:
    """Which labels the models of the contrastive pair were trained on.

    The recipe says so, not the models. Pairs that came after the training count as seen too, and one that left the split since
    then as unseen. Models that were not trained here have seen nothing that we know of.
    """

    selection: Selection | None = None
    """The pairs of this dataset that they were trained on; None for none, as with two prompts of one model."""
    other_prompts: np.ndarray | None = None
    """Hashes, sorted, of the prompts of another dataset that they were trained on: all pairs here with one of these count as
    seen, because nobody can tell whether other responses to the same prompt give the label away."""
    other: str = ""
    """Name and version of that dataset."""
    by_dpo: bool = False
    """Whether pi+ was trained by DPO on this dataset, so that log pi+ - log ref is what plain DPO learns of its labels."""
    assumption: str = ""
    """What cannot be checked, said with the figures."""

    @property
    def are_all(self) -> bool:
        """Whether no pair can be unseen."""
        return self.selection is not None and not self.selection.columns

    def of(self, lists: pa.Table, prompts: np.ndarray) -> np.ndarray:
        """Return which pairs are seen, `[B]`; `lists` has their columns, and `prompts` are hashes of their prompts."""
        seen = np.zeros(len(prompts), np.bool_) if self.selection is None else self.selection.keeps(lists)
        return seen if self.other_prompts is None else seen | are_among(prompts, self.other_prompts)


NONE_SEEN = SeenLabels()


class _Kind:
    """Margins of some kind, and of which prompts they are.

    Of more than `MAX_PAIRS` pairs those are kept whose prompts have the smallest hashes, all pairs of a prompt or none. Which
    these are depends neither on the order of the pairs nor on how they are cut into parts.
    """

    def __init__(self) -> None:
        self.num_pairs = 0  # those that are not kept, too
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_kept = 0
        self._limit: np.uint64 | None = None  # hashes from here on are not kept

    def add(self, margins: np.ndarray, prompts: np.ndarray) -> None:
        self.num_pairs += len(margins)
        self._keep(margins, prompts)

    def merge(self, other: "_Kind") -> None:
        self.num_pairs += other.num_pairs
        if other._limit is not None:
            self._limit = other._limit if self._limit is None else min(self._limit, other._limit)
        for margins, prompts in other._parts:
            self._keep(margins, prompts)

    @property
    def is_sample(self) -> bool:
        """Whether some pairs were not kept."""
        return self._limit is not None

    def without(self, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return margins `[n]` and prompts `[n]`, except those of some prompts."""
        self._shrink()
        if not self._parts:
            return np.empty(0), np.empty(0, np.uint64)
        ((margins, prompts),) = self._parts
        is_unseen = ~np.isin(prompts, seen)
        return margins[is_unseen], prompts[is_unseen]

    def _keep(self, margins: np.ndarray, prompts: np.ndarray) -> None:
        self._parts.append((margins, prompts))
        self._num_kept += len(margins)
        if self._num_kept >= 2 * MAX_PAIRS:  # not every time: each takes as long as there are pairs
            self._shrink()

    def _shrink(self) -> None:
        """Make one part of all, with at most `MAX_PAIRS` pairs."""
        if not self._parts:
            return
        margins, prompts = map(np.concatenate, zip(*self._parts, strict=True))
        keys = mix(prompts)
        if len(keys) > MAX_PAIRS:
            limit = np.partition(keys, MAX_PAIRS)[MAX_PAIRS]
            self._limit = limit if self._limit is None else min(self._limit, limit)
        if self._limit is not None:
            is_kept = keys < self._limit
            margins, prompts = margins[is_kept], prompts[is_kept]
        self._parts, self._num_kept = [(margins, prompts)], len(margins)


class Collected(NamedTuple):
    """What margins are made of; see `Margins.collected`."""

    margins: dict[str, _Kind]
    seen_prompts: list[np.ndarray]
    num_pairs: int


class Margins:
    """The margins of a dataset, batch by batch, each with all pairs of a range of pair_ids."""

    def __init__(self, estimators: Mapping[str, Estimator], seen: SeenLabels) -> None:
        self.estimators = {name: each for name, each in estimators.items() if each.token_scores is not None}
        self.seen = seen
        self._found = {name: _Kind() for name in [*self.estimators, DPO]}
        self._seen_prompts: list[np.ndarray] = []  # those that may have pairs in another batch too
        self._num_pairs = 0

    @property
    def can_measure(self) -> bool:
        """Whether a pass over the pairs can find something to measure."""
        return any(not (_reads_pair(each) and self.seen.are_all) for each in self.estimators.values())

    def add(self, lists: pa.Table, sides: Mapping[Side, SideScores]) -> None:
        """Add a batch of pairs; `lists` are joined columns, and `sides` what is known of their tokens.

        Rows with one response are left out.
        """
        if not self.can_measure:
            return
        lengths = {side: pc.list_value_length(lists[f"{side}_ids"]).to_numpy().astype(np.int64) for side in SIDES}
        is_pair = (lengths["chosen"] > 0) & (lengths["rejected"] > 0)
        prompts = prompt_hashes(lists["pair_id"].to_pylist())
        is_seen = self.seen.of(lists, prompts)
        self._num_pairs += int(is_pair.sum())
        seen_prompts = np.unique(prompts[is_seen])
        is_seen |= np.isin(prompts, seen_prompts)  # other pairs of a prompt give its labels away
        self._seen_prompts.append(seen_prompts[np.isin(seen_prompts, (prompts.min(), prompts.max()))])
        for name, estimator in self.estimators.items():
            kept = is_pair & ~is_seen if _reads_pair(estimator) else is_pair
            token_scores = {side: _scores(estimator, sides[side]) for side in SIDES}
            self._found[name].add(_margins(token_scores, lengths)[kept], prompts[kept])
        if self.seen.by_dpo and any(map(_reads_pair, self.estimators.values())):
            rewards, kept = {side: sides[side].implicit_rewards() for side in SIDES}, is_pair & ~is_seen
            self._found[DPO].add(_margins(rewards, lengths)[kept], prompts[kept])

    @property
    def collected(self) -> Collected:
        """What has been added so far, to `merge` into the margins of another process."""
        return Collected(self._found, self._seen_prompts, self._num_pairs)

    def merge(self, other: Collected) -> None:
        """Add the pairs of another part of the dataset."""
        for name, found in other.margins.items():
            self._found[name].merge(found)
        self._seen_prompts += other.seen_prompts
        self._num_pairs += other.num_pairs

    def measure(self, name: str) -> HeldOut | None:
        """Return how well one estimator's scores predict labels; None if there are too few that its scores have not seen."""
        return measure(*self._unseen(name))

    def records(
        self, scales: Mapping[str, float], spreads: Mapping[str, float] | None = None
    ) -> dict[str, HeldOutRecord]:
        """Return what a version records, by estimator, then for DPO's own implicit reward.

        `scales` has the factors of scores in the weights, of estimators that have one, and `spreads` their `weights.spread`.
        """
        found = {name: self._record(name, scales.get(name), (spreads or {}).get(name)) for name in self.estimators}
        if self._found[DPO].num_pairs and (dpo := self.measure(DPO)) is not None:
            found[DPO] = self._figures(DPO, dpo)
        return found

    def why_unseen_are_few(self, name: str) -> str:
        """Return why nothing is measured, and what to do."""
        if _reads_pair(self.estimators[name]) and self.seen.are_all:
            return f"the models of the contrastive pair were trained on all these labels; {_HOLD_OUT}"
        reads_pair = _reads_pair(self.estimators[name])
        num_unseen = len(np.unique(self._unseen(name)[1]))
        problem = (
            f"only {num_unseen} prompts of {self._num_pairs:,} pairs have labels that the scores have not seen, and at least "
            f"{MIN_PROMPTS} are needed"
        )
        if not reads_pair:
            return problem
        selection = self.seen.selection
        if self.seen.other_prompts is not None:
            overlap = f"the models were trained on the other prompts, which are also in {self.seen.other}"
            return f"{problem}; {overlap}; {_HOLD_OUT}"
        if selection is None:
            return problem
        return f"{problem}; {f'raise contrast.held_out above {selection.share:g}' if selection.share else _HOLD_OUT}"

    def _record(self, name: str, scale: float | None, spread: float | None) -> HeldOutRecord:
        found = self.measure(name)
        if found is None:
            return {"not_measured": self.why_unseen_are_few(name)}
        record = self._figures(name, found, scale, spread)
        if not _reads_pair(self.estimators[name]):
            return record
        if self.seen.assumption:
            record["assumption"] = self.seen.assumption
        if self._found[DPO].num_pairs:
            margins, prompts = self._unseen(name)
            record["gain_over_dpo"], record["gain_over_dpo_se"] = compare(margins, self._unseen(DPO)[0], prompts)
        return record

    def _figures(
        self, name: str, found: HeldOut, scale: float | None = None, spread: float | None = None
    ) -> HeldOutRecord:
        """Return the record of what was measured, with how many pairs were not, and why."""
        measured = self._found[name]
        record = _record(found, scale, spread)
        record["num_seen_pairs"] = self._num_pairs - (measured.num_pairs if measured.is_sample else found.num_pairs)
        if measured.is_sample:
            record["num_unseen_pairs"] = measured.num_pairs
        return record

    def _unseen(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        reads_pair = name == DPO or _reads_pair(self.estimators[name])
        seen = self._seen_prompts if reads_pair else []
        return self._found[name].without(np.concatenate([np.empty(0, np.uint64), *seen]))


def are_among(prompts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which prompts are among others, which are sorted: much faster than `np.isin` for a few against many."""
    places = np.searchsorted(others, prompts)
    found = np.zeros(len(prompts), np.bool_)
    is_inside = places < len(others)
    found[is_inside] = others[places[is_inside]] == prompts[is_inside]
    return found


def _margins(token_scores: Mapping[Side, np.ndarray], lengths: Mapping[Side, np.ndarray]) -> np.ndarray:
    """Return the sum of token scores over chosen minus over rejected tokens, `[B]` float64 nats; no tokens have sum 0."""
    chosen, rejected = (sums(token_scores[side], lengths[side]) for side in SIDES)
    return chosen - rejected


def _scores(estimator: Estimator, scores: SideScores) -> np.ndarray:
    assert estimator.token_scores is not None, "an estimator without token scores"
    return estimator.token_scores(scores)


def _reads_pair(estimator: Estimator) -> bool:
    return "contrastive pair" in estimator.reads


def _record(found: HeldOut, scale: float | None, spread: float | None) -> HeldOutRecord:
    record: HeldOutRecord = {
        "num_pairs": found.num_pairs,
        "num_prompts": found.num_prompts,
        "log_likelihood": found.log_likelihood,
        "log_likelihood_se": found.log_likelihood_se,
        "accuracy": found.accuracy,
        "multiplier": found.multiplier,
        "multiplier_se": found.multiplier_se,
        # A scale of 0 comes from scores that predict nothing, or the opposite: they have been switched off. A spread is
        # chosen for the training, so the verdict is on the scores before.
        "verdict": found.verdict((scale or 1.0) if spread is None else 1.0),
    }
    if spread is not None:
        record["spread"] = spread
    if scale is not None:
        record["scale"] = scale
    return record
