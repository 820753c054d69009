"""What one pass over all response tokens of a weight dataset counts, in bounded memory.

Weights are read together with the log-probs of the contrastive pair, range by range of `pair_id`, and counted with numpy on
flat arrays. Called by the doctor, by the page and by every build's report.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from weights_store.catalog import open_table
from weights_store.checks.rows import FINITE, WEIGHT
from weights_store.errors import DamageError
from weights_store.inspection.clamps import clamped
from weights_store.location import Location
from weights_store.names import base_role
from weights_store.schemas import SIDES, Side
from weights_store.tables.metadata import CommitMetadata, SideStatistics
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion

NUM_POSITIONS = 20
PEAK = 10.0
"""A token carries its response if it weighs at least this many times the response's mean: the largest ratio that the clamp of
the paper leaves possible is e² = 7.4."""
MIN_COUNT = 5
"""A token id that occurs less often on one side says nothing about its mean weight."""
NUM_EXTREMES = 8
RANGE_BYTES = 256 << 20
"""Memory of one range of pairs. Smaller ones read row groups at their borders more often."""

_HINT = "`tokenweights verify --rows` names the pairs"
_SLICE_PAIRS = 4096
"""Pairs that are counted at a time: their arrays stay in the processor's cache."""
_OCTAVES, _PER_OCTAVE = 4, 8
EDGES = np.array([0.0, *np.exp2(np.arange(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1) / _PER_OCTAVE), np.inf])
"""Of the histograms: an eighth of an octave each, from 1/16 to 16, and what lies below and above."""


@dataclass(frozen=True)
class SideSurvey:
    """The token weights of one side. Means are NaN if there is no token."""

    num_responses: int
    num_tokens: int
    mean_weight: float
    min_weight: float
    max_weight: float
    std_weight: float
    """Standard deviation over the tokens."""
    edges: np.ndarray
    """Ends of the histogram's bins, `[K + 1]`, the same for both sides; equal steps of log2 of the weight, but for the ends:
    the first bin begins at 0, the last one has no end."""
    counts: np.ndarray
    """Tokens in each bin, `[K]`."""
    weight_by_position: np.ndarray
    """Mean weight by relative position in the response, `[20]`: twentieths, NaN where no response has a token."""
    position_share: float
    """Share of the weights' variance that these means explain, less what they would by chance (adjusted R², at least 0)."""
    share_at_lower: float | None
    share_at_upper: float | None
    """Shares of tokens whose score is at or beyond an end of the clamp; None if the estimator has no clamp."""
    effective_share: float
    """Mean over responses of (Σw)² / (T Σw²), in (0, 1]: 1 if all tokens of a response weigh the same. Responses without any
    weight do not count."""
    share_carried: float
    """Share of the responses in which one token weighs at least `PEAK` times the response's mean."""
    share_carried_by_last: float
    """Share of the responses in which that is the last token."""
    last_weight: float
    """Mean weight of the last tokens of responses: usually the end of the turn."""
    last_id: int | None
    """The token id that ends most responses."""
    last_id_share: float
    """Share of the responses that end on it."""


@dataclass(frozen=True)
class LogratioSurvey:
    """Log-ratios log π+ − log π− of a contrastive pair, over the tokens of both sides, in nats."""

    std: float
    """Standard deviation over the tokens."""
    mean_abs: float
    """Mean of their absolute values."""
    mean: Mapping[Side, float]
    """Mean over the tokens of each side."""
    num_pairs: int
    mean_gap: float
    """Mean over pairs of the mean log-ratio of a chosen token minus that of a rejected one."""
    mean_gap_se: float
    """Its standard error; NaN for a single pair."""
    share_agreeing: float
    """Share of the pairs whose sum of log-ratios is larger over the chosen response; a tie counts half."""


@dataclass(frozen=True)
class Survey:
    """Both sides, and the tokens that occur often enough to say something about."""

    num_pairs: int
    chosen: SideSurvey
    rejected: SideSurvey
    tokens: pl.DataFrame
    """One row per token id and side, for ids that occur at least `MIN_COUNT` times there: `token_id`, `side`, `count`,
    `mean_weight`, `share_of_weight` (of the side's total)."""
    logratios: LogratioSurvey | None
    """None if the weights were not made from a contrastive pair, or no row has two responses."""

    def sides(self) -> dict[Side, SideSurvey]:
        """Return those with a token, by side: unpaired rows may all be of one."""
        both: dict[Side, SideSurvey] = {"chosen": self.chosen, "rejected": self.rejected}
        return {side: found for side, found in both.items() if found.num_tokens}

    def extremes(self, side: Side) -> dict[str, pl.DataFrame]:
        """Return the rows of `tokens` with the largest and the smallest mean weight on a side, as "heaviest" and "lightest"."""
        of_side = self.tokens.filter(pl.col("side") == side)
        return {
            name: of_side.sort("mean_weight", "token_id", descending=[is_first, False]).head(NUM_EXTREMES)
            for name, is_first in (("heaviest", True), ("lightest", False))
        }


def survey(root: Location, weights: TableVersion, range_bytes: int = RANGE_BYTES) -> Survey:
    """Count one version of a weight dataset in one pass, see `WeightStore.survey`."""
    table = open_table(root, weights.table)
    metadata = table.metadata(weights.version)
    sums: dict[Side, _SideSums] = {side: _SideSums() for side in SIDES}
    logratios, num_pairs = _LogratioSums(), 0
    for frame in _slices(root, table, weights.version, metadata, range_bytes):
        num_pairs += frame.height
        of_pairs = {}
        for side in SIDES:
            flat = _flat(frame, side, weights)
            sums[side].add(flat, clamped(metadata, side, flat.weights, flat.logratios))
            if flat.logratios is not None:
                of_pairs[side] = logratios.add_side(side, flat)
        if of_pairs:
            logratios.add_pairs(of_pairs["chosen"], of_pairs["rejected"])
    recorded = metadata.get("statistics", {})
    chosen, rejected = (sums[side].result(recorded.get(side, {})) for side in SIDES)
    return Survey(num_pairs, chosen, rejected, _tokens(sums), logratios.result())


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Flat:
    """One side of some pairs: flat over tokens `[N]`, tokens by response, and which pairs have a response here, `[B]`."""

    ids: np.ndarray
    weights: np.ndarray
    logratios: np.ndarray | None
    lengths: np.ndarray
    is_there: np.ndarray


def _slices(
    root: Location, table: Table, version: int, metadata: CommitMetadata, range_bytes: int
) -> Iterator[pl.DataFrame]:
    """Yield ids, weights and `CHOSEN_pos`, `CHOSEN_neg` (a list per contrastive pair) of some pairs at a time."""
    parents = metadata.get("parents", [])
    logps: dict[str, tuple[Table, int]] = {}
    for model in ("positive", "negative"):
        for parent in parents:
            role = parent.get("role", "")
            if base_role(role) == f"{model}_logps":
                logps[role.removesuffix("_logps")] = open_table(root, parent["table"]), parent["version"]
    tables = [(table, version), *logps.values()]
    num_bytes = sum(record.num_bytes for each, at in tables for record in each.records(at))
    columns = [f"{side}_{what}" for side in SIDES for what in ("ids", "token_weights")]
    for piece in table.key_ranges(range_bytes, version, num_bytes):
        frame = table.scan(version, within=piece).select("pair_id", *columns)
        for role, (scores, at) in logps.items():
            names = {f"{side}_logps": f"{side}_{role}" for side in SIDES}
            rows = scores.scan(at, within=piece).select("pair_id", *names).rename(names)
            frame = frame.join(rows, on="pair_id", how="left", maintain_order="left")
        yield from frame.drop("pair_id").collect().iter_slices(_SLICE_PAIRS)


def _flat(frame: pl.DataFrame, side: Side, weights: TableVersion) -> _Flat:
    """Return one side of some pairs, with log-ratios of the mean over all contrastive pairs.

    Raises:
        DamageError: Both responses are empty, a list is not as long as its ids, a pair has no log-probs, or a number breaks its
            law: one NaN would make means NaN, of which no check can say anything.
    """
    ids, lengths = _values(frame[f"{side}_ids"])
    is_there = lengths > 0
    if frame.select((pl.sum_horizontal(pl.col(f"{each}_ids").list.len() for each in SIDES) == 0).any()).item():
        raise DamageError(f"{weights}: chosen_ids and rejected_ids are empty in a pair, expected a token; {_HINT}")

    def values(column: str) -> np.ndarray:
        found, its_lengths = _values(frame[column])
        if frame[column].null_count() or not np.array_equal(its_lengths, lengths):
            raise DamageError(
                f"{weights}: column {column} does not have one value for each of {side}_ids in every pair; {_HINT}"
            )
        law = WEIGHT if column.endswith("_weights") else FINITE
        if not (holds := law.holds(found)).all():
            raise DamageError(f"{weights}: column {column} has {found[~holds][0]}, {law.expected}; {_HINT}")
        return found

    logps = {
        model: [values(name) for name in frame.columns if name.startswith(f"{side}_{model}")]
        for model in ("positive", "negative")
    }
    logratios = None
    if logps["positive"] and logps["negative"]:
        # The same sums in the same order as `Join._average_pairs`, so that tokens at an end of the clamp are the same.
        positive, negative = (sum(each[1:], each[0]) / np.float32(len(each)) for each in logps.values())
        logratios = np.subtract(positive, negative, dtype=np.float32)
    return _Flat(ids, values(f"{side}_token_weights"), logratios, lengths[is_there], is_there)


def _values(lists: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of lists, `[N]`, without copying, and their numbers, `[B]`."""
    arrow = lists.to_arrow()
    return arrow.flatten().to_numpy(), np.diff(arrow.offsets.to_numpy())


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _SideSums:
    """What has been counted of one side so far."""

    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Numbers and sums by name."""
    lowest: float = math.inf
    highest: float = -math.inf
    bins: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))
    positions: np.ndarray = field(default_factory=lambda: np.zeros((2, NUM_POSITIONS)))
    """Tokens and sums of weights by relative position."""
    ids: np.ndarray = field(default_factory=lambda: np.zeros((2, 0)))
    """Tokens and sums of weights by token id, `[2, V]`."""
    last_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, flat: _Flat, ends: np.ndarray | None) -> None:
        lengths = flat.lengths.astype(np.int32)
        weights = flat.weights.astype(np.float64)
        if not len(weights):
            return
        self._add_responses(flat, weights)
        self.lowest, self.highest = min(self.lowest, float(weights.min())), max(self.highest, float(weights.max()))
        self.bins += np.bincount(np.searchsorted(EDGES, weights, side="right") - 1, minlength=len(self.bins))
        within = np.arange(len(weights), dtype=np.int32) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = within.astype(np.int64) * NUM_POSITIONS // np.repeat(lengths, lengths)
        self.positions += _count(places, weights, NUM_POSITIONS)
        self.ids = _plus(self.ids, _count(flat.ids, weights, self.ids.shape[1]))
        if ends is not None:
            self.counts["clampable"] += len(ends)
            self.counts["at_lower"] += int(np.count_nonzero(ends < 0))
            self.counts["at_upper"] += int(np.count_nonzero(ends > 0))

    def _add_responses(self, flat: _Flat, weights: np.ndarray) -> None:
        lengths, ends = flat.lengths, np.cumsum(flat.lengths)
        starts = ends - lengths
        sums, squares = np.add.reduceat(weights, starts), np.add.reduceat(weights**2, starts)
        peaks, last = np.maximum.reduceat(weights, starts), weights[ends - 1]
        has_weight = sums > 0
        is_carried = has_weight & (peaks * lengths >= PEAK * sums)
        shares = sums[has_weight] ** 2 / (lengths[has_weight] * squares[has_weight])
        found = {
            "responses": len(lengths),
            "tokens": len(weights),
            "weight": sums.sum(),
            "squares": squares.sum(),
            "with_weight": has_weight.sum(),
            "effective": shares.sum(),
            "carried": is_carried.sum(),
            "carried_by_last": (is_carried & (last == peaks)).sum(),
            "last": last.sum(),
        }
        for name, number in found.items():
            self.counts[name] += float(number)
        self.last_ids = _plus(self.last_ids, np.bincount(flat.ids[ends - 1], minlength=len(self.last_ids)))

    def result(self, recorded: SideStatistics) -> SideSurvey:
        """`recorded` are the build's statistics of this side: the clamp's shares, where tokens do not tell them."""
        tokens, responses = self.counts["tokens"], self.counts["responses"]
        mean = _over(self.counts["weight"], tokens)
        variance = max(0.0, _over(self.counts["squares"], tokens) - mean**2) if tokens else math.nan
        at_lower, at_upper = recorded.get("share_at_lower"), recorded.get("share_at_upper")
        if clampable := self.counts["clampable"]:
            at_lower, at_upper = self.counts["at_lower"] / clampable, self.counts["at_upper"] / clampable
        numbers, sums = self.positions
        return SideSurvey(
            num_responses=int(responses),
            num_tokens=int(tokens),
            mean_weight=mean,
            min_weight=self.lowest if tokens else math.nan,
            max_weight=self.highest if tokens else math.nan,
            std_weight=math.sqrt(variance),
            edges=EDGES,
            counts=self.bins,
            weight_by_position=np.divide(sums, numbers, out=np.full(NUM_POSITIONS, np.nan), where=numbers > 0),
            position_share=_explained(numbers, sums, variance),
            share_at_lower=at_lower,
            share_at_upper=at_upper,
            effective_share=_over(self.counts["effective"], self.counts["with_weight"]),
            share_carried=_over(self.counts["carried"], responses),
            share_carried_by_last=_over(self.counts["carried_by_last"], responses),
            last_weight=_over(self.counts["last"], responses),
            last_id=int(self.last_ids.argmax()) if responses else None,
            last_id_share=_over(self.last_ids.max(initial=0), responses),
        )


@dataclass(slots=True)
class _LogratioSums:
    """What has been counted of the log-ratios so far."""

    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add_side(self, side: Side, flat: _Flat) -> np.ndarray:
        """Return the sum and the mean over each pair's response, `[2, B]`; NaN where it has none on this side."""
        wide, lengths = np.asarray(flat.logratios, np.float64), flat.lengths
        sums = np.add.reduceat(wide, np.cumsum(lengths) - lengths) if len(wide) else np.zeros(0)
        self.counts[f"{side}_tokens"] += len(wide)
        self.counts[side] += float(sums.sum())
        self.counts["squares"] += float(np.square(wide).sum())
        self.counts["sizes"] += float(np.abs(wide).sum())
        of_pairs = np.full((2, len(flat.is_there)), np.nan)
        of_pairs[:, flat.is_there] = sums, sums / lengths
        return of_pairs

    def add_pairs(self, chosen: np.ndarray, rejected: np.ndarray) -> None:
        differences = chosen - rejected
        sums, gaps = differences[:, ~np.isnan(differences[0])]
        self.counts["pairs"] += len(gaps)
        self.counts["gaps"] += float(gaps.sum())
        self.counts["gap_squares"] += float(np.square(gaps).sum())
        self.counts["agreeing"] += float((np.sign(sums) / 2 + 0.5).sum())

    def result(self) -> LogratioSurvey | None:
        pairs, tokens = self.counts["pairs"], self.counts["chosen_tokens"] + self.counts["rejected_tokens"]
        if not pairs:
            return None
        mean = (self.counts["chosen"] + self.counts["rejected"]) / tokens
        gap = self.counts["gaps"] / pairs
        variance = max(0.0, self.counts["gap_squares"] / pairs - gap**2)
        return LogratioSurvey(
            std=math.sqrt(max(0.0, self.counts["squares"] / tokens - mean**2)),
            mean_abs=self.counts["sizes"] / tokens,
            mean={side: _over(self.counts[side], self.counts[f"{side}_tokens"]) for side in SIDES},
            num_pairs=int(pairs),
            mean_gap=gap,
            mean_gap_se=math.sqrt(variance / (pairs - 1)) if pairs > 1 else math.nan,
            share_agreeing=self.counts["agreeing"] / pairs,
        )


def _tokens(sums: Mapping[Side, _SideSums]) -> pl.DataFrame:
    frames = []
    for side, each in sums.items():
        numbers, totals = each.ids
        ids = np.flatnonzero(numbers >= MIN_COUNT)
        total = max(float(totals.sum()), np.finfo(float).tiny)
        columns = {
            "token_id": pl.Series(ids, dtype=pl.Int32),
            "side": pl.repeat(side, len(ids), eager=True, dtype=pl.String),
            "count": pl.Series(numbers[ids], dtype=pl.Int64),
            "mean_weight": totals[ids] / numbers[ids],
            "share_of_weight": totals[ids] / total,
        }
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def _count(keys: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Return numbers and sums of weights by key, `[2, max(size, largest key + 1)]`."""
    return np.stack([np.bincount(keys, minlength=size), np.bincount(keys, weights, minlength=size)])


def _plus(sums: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Add to sums by key; `more` has at least as many keys."""
    more[..., : sums.shape[-1]] += sums
    return more


def _over(total: float, number: float) -> float:
    return float(total / number) if number else math.nan


def _explained(numbers: np.ndarray, sums: np.ndarray, variance: float) -> float:
    """Return the adjusted R² of the means by position; 0 if nothing varies, or there are too few tokens to tell."""
    tokens, bins = numbers.sum(), np.count_nonzero(numbers)
    if tokens <= bins or not variance > 0:
        return 0.0
    kept = numbers > 0
    means = sums[kept] / numbers[kept]
    between = float(np.sum(numbers[kept] * (means - sums.sum() / tokens) ** 2)) / tokens
    return float(max(0.0, 1 - (1 - between / variance) * (tokens - 1) / (tokens - bins)))
