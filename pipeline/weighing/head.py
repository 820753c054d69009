"""Token rewards from the labels alone: a ridge Bradley-Terry regression on the tokens that tell chosen from rejected responses.

The reward of a token is that of its id, and on request also that of its id in a context: d numbers that describe what was read
before it (`attribute.contexts`). `fit_head` is a pure function on flat arrays. The strengths of the penalties are chosen by
held-out likelihood.

Every pair's scores come from a fit that has seen no label of its prompt: each of `NUM_FOLDS` fits leaves out one fold of the
prompts. A pair's label changes its own scores in one way only, by changing which strengths are chosen.

Called by `fits.py`. Not here: the solver (`ridge.py`), and the weights from scores (`estimators/`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.weighing.held_out import MIN_PROMPTS, NUM_FOLDS, folds_of
from pipeline.weighing.margins import are_among
from pipeline.weighing.ridge import Blocks, Design, fit_ridge
from weights_store.tables.metadata import HeadRecord

STRENGTHS = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
"""Candidates of the penalty: 1 / variance of the prior of a coefficient, so 100 expects rewards of about 0.1 nats."""
MAX_PAIRS, MAX_VALUES = 1 << 17, 1 << 27
"""Of more pairs, or of pairs with more numbers in memory, those with the smallest hashes are fitted on."""

_MIN_OCCURRENCES = 4
"""A token id that the fitted pairs have less often gets no coefficients of its context."""
_ROUGH, _EXACT = 1e-2, 1e-6
"""Tolerances of the solver while strengths are compared, and of the result."""
_PATIENCE = 2
"""After so many candidates in a row that are no better, weaker ones are not tried."""
_PIECE = 1 << 16
"""Tokens whose contexts are scored at a time."""


@dataclass(frozen=True, slots=True)
class Responses:
    """One response of each pair, flat over their tokens."""

    ids: np.ndarray
    """Token ids, `[N]`."""
    lengths: np.ndarray
    """Tokens of each response, `[B]`, at least 1."""
    contexts: np.ndarray | None = None
    """What was read before each token, `[N, d]` float32; None if the features are tokens alone."""


@dataclass(frozen=True, slots=True)
class Differences:
    """What the chosen response of each pair has more of than the rejected one: entries sorted by pair, then by token id."""

    lengths: np.ndarray
    """Entries of each pair, `[B]`; a pair of two responses with the same tokens may have none."""
    ids: np.ndarray
    """Token id of each entry, `[E]`."""
    counts: np.ndarray
    """How often chosen has it, minus how often rejected has it, `[E]` float32."""
    occurrences: np.ndarray
    """How often both have it together, `[E]`."""
    contexts: np.ndarray | None = None
    """Sum of its contexts over chosen minus over rejected tokens, `[E, d]` float32."""

    @classmethod
    def of(cls, chosen: Responses, rejected: Responses) -> "Differences":
        """Return the differences of pairs, whose order is that of the responses."""
        num_pairs, sides = len(chosen.lengths), (chosen, rejected)
        rows = np.concatenate([np.repeat(np.arange(num_pairs, dtype=np.int64), side.lengths) for side in sides])
        signs = np.repeat(np.array([1, -1], np.float32), [len(side.ids) for side in sides])
        keys = (rows << 32) | np.concatenate([side.ids for side in sides]).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        keys, signs = keys[order], signs[order]
        firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        found = cls(
            lengths=np.bincount(keys[firsts] >> 32, minlength=num_pairs),
            ids=(keys[firsts] & 0xFFFFFFFF).astype(np.int32),
            counts=np.add.reduceat(signs, firsts),
            occurrences=np.diff(firsts, append=len(keys)).astype(np.int32),
            contexts=None if chosen.contexts is None else _sums_of_contexts(sides, order, signs, firsts),
        )
        return found if found.contexts is not None else found._without_zeros()

    @classmethod
    def joined(cls, parts: Sequence["Differences"]) -> "Differences":
        """Return the pairs of several, in their order."""
        contexts = [part.contexts for part in parts if part.contexts is not None]
        names = ("lengths", "ids", "counts", "occurrences")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**arrays, contexts=np.concatenate(contexts) if contexts else None)

    @property
    def num_values(self) -> np.ndarray:
        """Numbers in memory of each pair, `[B]`."""
        return self.lengths * (1 + (0 if self.contexts is None else self.contexts.shape[1]))

    def take(self, pairs: np.ndarray) -> "Differences":
        """Return some pairs, by their indices, in that order."""
        lengths = self.lengths[pairs]
        starts = np.repeat((np.cumsum(self.lengths) - self.lengths)[pairs] - (np.cumsum(lengths) - lengths), lengths)
        at = starts + np.arange(int(lengths.sum()))
        contexts = None if self.contexts is None else self.contexts[at]
        return Differences(lengths, self.ids[at], self.counts[at], self.occurrences[at], contexts)

    def _without_zeros(self) -> "Differences":
        """Return it without tokens that both responses have equally often."""
        kept = self.counts != 0
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)[kept]
        lengths = np.bincount(rows, minlength=len(self.lengths))
        return Differences(lengths, self.ids[kept], self.counts[kept], self.occurrences[kept])


@dataclass(frozen=True, slots=True)
class Head:
    """Token rewards of `NUM_FOLDS` fits, in nats."""

    ids: np.ndarray
    """Token ids that have a reward, `[p]` sorted."""
    rewards: np.ndarray
    """Of each fold, then the mean of the folds, `[NUM_FOLDS + 1, p + 1]` float32; the last one is 0, of all other ids."""
    prompts: np.ndarray
    """Hashes of the prompts that were fitted on, sorted uint64."""
    record: HeadRecord
    """What a version records."""
    context_ids: np.ndarray | None = None
    """Token ids with coefficients of their contexts, `[q]` sorted."""
    context_rewards: np.ndarray | None = None
    """These coefficients, like `rewards`: `[NUM_FOLDS + 1, q + 1, d]` float32."""

    def scores(self, responses: Responses, groups: np.ndarray) -> np.ndarray:
        """Return the reward of every token, `[N]` float32 nats, from a fit that has seen no label of the pair's prompt.

        Pairs with a prompt that was fitted on get the fit that left out its fold, all others the mean of the fits.

        Args:
            responses: One response of each pair; with contexts if the head has coefficients for them.
            groups: A hash of each pair's prompt, `[B]` uint64.
        """
        is_fitted = are_among(groups, self.prompts)
        rows = np.repeat(np.where(is_fitted, folds_of(groups), NUM_FOLDS), responses.lengths)
        found: np.ndarray = self.rewards[rows, _places(responses.ids, self.ids)]
        if self.context_ids is None or self.context_rewards is None:
            return found
        assert responses.contexts is not None, "no contexts"
        columns = _places(responses.ids, self.context_ids)
        for piece in (slice(start, start + _PIECE) for start in range(0, len(found), _PIECE)):
            of_contexts = self.context_rewards[rows[piece], columns[piece]]
            found[piece] += np.einsum("nd,nd->n", of_contexts, responses.contexts[piece])
        return found


def fit_head(
    chosen: Responses, rejected: Responses, groups: np.ndarray, strengths: Sequence[float] = STRENGTHS
) -> Head:
    """Return token rewards fitted on the labels of all these pairs, which must fit into memory.

    `fit_head(chosen, rejected, groups).scores(chosen, groups)` are scores of the chosen tokens, out of fold.

    Args:
        chosen: The better response of each pair.
        rejected: The other one; with contexts if the chosen ones have some.
        groups: A hash of each pair's prompt, `[B]` uint64: pairs of one prompt are in one fold.
        strengths: Penalties to choose from, from strong to weak.

    Raises:
        ValueError: There are fewer than `MIN_PROMPTS` prompts, or a context is not finite.
    """
    return fit_differences(Differences.of(chosen, rejected), groups, strengths)


def fit_differences(pairs: Differences, groups: np.ndarray, strengths: Sequence[float] = STRENGTHS) -> Head:
    """Return token rewards like `fit_head`, for pairs that are already differences.

    Raises:
        ValueError: There are fewer than `MIN_PROMPTS` prompts, or a context is not finite.
    """
    prompts = np.unique(groups.astype(np.uint64))
    if len(prompts) < MIN_PROMPTS:
        raise ValueError(f"labels of only {len(prompts)} prompts, and at least {MIN_PROMPTS} are needed")
    if pairs.contexts is not None and not np.isfinite(pairs.contexts).all():
        raise ValueError("a context is not finite")
    folds = folds_of(groups)
    ids, is_token = np.unique(pairs.ids[pairs.counts != 0]), pairs.counts != 0
    rows = np.repeat(np.arange(len(pairs.lengths)), pairs.lengths)
    lengths = np.bincount(rows[is_token], minlength=len(pairs.lengths))
    entries = lengths, np.searchsorted(ids, pairs.ids[is_token]), pairs.counts[is_token]
    search = _Search(Design(*entries), folds)
    search.compare([(strength,) for strength in strengths])
    context_ids = None
    if pairs.contexts is not None:
        context_ids, blocks = _blocks(pairs, rows)
        search = search.with_contexts(Design(*entries, blocks), strengths)
    search.refine()
    rewards = np.pad(_with_mean(search.thetas[:, : len(ids)]), ((0, 0), (0, 1)))
    record = search.record(len(pairs.lengths), len(prompts))
    if context_ids is None or len(search.strengths) == 1:
        return Head(ids, rewards, prompts, record)
    of_contexts = _with_mean(search.thetas[:, len(ids) :]).reshape(len(rewards), -1, len(context_ids))
    padded = np.pad(of_contexts, ((0, 0), (0, 0), (0, 1))).transpose(0, 2, 1)
    return Head(ids, rewards, prompts, record, context_ids, np.ascontiguousarray(padded))


class _Search:
    """Finds the strengths of the penalties with the highest held-out likelihood; fits start from the best ones before."""

    def __init__(self, design: Design, folds: np.ndarray) -> None:
        self._design, self._folds = design, folds
        self.thetas = np.zeros((NUM_FOLDS, design.num_features))
        """Of the best strengths, `[NUM_FOLDS, p + d q]`."""
        self.strengths: tuple[float, ...] = ()
        """Of the tokens, and of their contexts."""
        self._log_likelihoods: dict[tuple[float, ...], float] = {}

    def with_contexts(self, design: Design, strengths: Sequence[float]) -> "_Search":
        """Return a search over the features of `design`, which has contexts too; this one if contexts predict no better.

        First the strength of contexts is chosen, with that of tokens as it is, then two others of tokens are tried.
        """
        wider, (of_tokens,) = _Search(design, self._folds), self.strengths
        wider.thetas[:, : self.thetas.shape[1]] = self.thetas
        wider.compare([(of_tokens, of_contexts) for of_contexts in strengths])
        _, of_contexts = wider.strengths
        wider.compare([(other, of_contexts) for other in (3 * of_tokens, of_tokens / 3)])
        tried = self._log_likelihoods | wider._log_likelihoods
        self._log_likelihoods = wider._log_likelihoods = tried
        return wider if tried[wider.strengths] > tried[self.strengths] else self

    def compare(self, candidates: Iterable[tuple[float, ...]]) -> None:
        """Try strengths, from strong to weak, until several in a row are no better than the best ones."""
        num_worse, thetas = 0, self.thetas
        for strengths in candidates:
            thetas = self._fitted(strengths, thetas, _ROUGH)
            found = self._log_likelihoods[strengths] = self._log_likelihood(thetas)
            # Of equal ones the stronger: it is the first.
            if not self.strengths or found > self._log_likelihoods[self.strengths]:
                self.strengths, self.thetas, num_worse = strengths, thetas, 0
            else:
                num_worse += 1
            if num_worse == _PATIENCE:
                return

    def refine(self) -> None:
        """Fit the best strengths to the end."""
        self.thetas = self._fitted(self.strengths, self.thetas, _EXACT)

    def record(self, num_pairs: int, num_prompts: int) -> HeadRecord:
        """Return what a version records."""
        tried = {", ".join(f"{each:g}" for each in key): value for key, value in self._log_likelihoods.items()}
        record: HeadRecord = {
            "num_pairs": num_pairs,
            "num_prompts": num_prompts,
            "strength": self.strengths[0],
            "log_likelihood": self._log_likelihoods[self.strengths],
            "log_likelihoods": tried,
        }
        if len(self.strengths) > 1:
            record["context_strength"] = self.strengths[1]
        return record

    def _fitted(self, strengths: tuple[float, ...], starts: np.ndarray, tolerance: float) -> np.ndarray:
        penalties = np.full(self._design.num_features, strengths[-1])
        penalties[: self._design.num_columns] = strengths[0]
        fits = [
            fit_ridge(self._design, self._folds != fold, penalties, starts[fold], tolerance)
            for fold in range(NUM_FOLDS)
        ]
        return np.array(fits)

    def _log_likelihood(self, thetas: np.ndarray) -> float:
        """Return the mean over all pairs, each with the fit that left out its fold, in nats."""
        of_folds = np.array([self._design.dot(theta) for theta in thetas])
        margins = of_folds[self._folds, np.arange(len(self._folds))]
        return float(np.mean(-np.logaddexp(0.0, -margins)))


class LabelledPairs:
    """The differences of the pairs to fit on, batch by batch: at most `max_pairs`, and about `max_values` numbers.

    Which pairs are kept, and their order, depends on their keys alone, not on how they come.
    """

    def __init__(self, max_pairs: int = MAX_PAIRS, max_values: int = MAX_VALUES) -> None:
        self._max_pairs, self._max_values = max_pairs, max_values
        self._kept: _Keyed | None = None
        self._waiting: list[_Keyed] = []

    def add(self, pairs: Differences, groups: np.ndarray, keys: np.ndarray) -> None:
        """Add a batch; `groups` are hashes of the prompts, and `keys` of the pairs, `[B]` uint64, all different."""
        self._waiting.append(_Keyed(pairs, groups.astype(np.uint64), keys))
        if sum(int(part.pairs.num_values.sum()) for part in self._waiting) > self._max_values // 4:
            self._merge()

    def merge(self, other: "LabelledPairs") -> None:
        """Add the pairs of another part of the dataset."""
        for part in [*([] if other._kept is None else [other._kept]), *other._waiting]:
            self.add(*part)

    def fit(self, strengths: Sequence[float] = STRENGTHS) -> Head:
        """Return the head of these pairs.

        Raises:
            ValueError: As `fit_head`.
        """
        self._merge()
        if self._kept is None:
            raise ValueError(f"no labels, and those of at least {MIN_PROMPTS} prompts are needed")
        return fit_differences(self._kept.pairs, self._kept.groups, strengths)

    def _merge(self) -> None:
        """Keep the pairs with the smallest keys, in their order."""
        parts = [*([] if self._kept is None else [self._kept]), *self._waiting]
        self._waiting = []
        if not parts:
            return
        pairs = Differences.joined([part.pairs for part in parts])
        groups, keys = (np.concatenate([getattr(part, name) for part in parts]) for name in ("groups", "keys"))
        order = np.argsort(keys, kind="stable")[: self._max_pairs]
        fitting = np.cumsum(pairs.num_values[order]) <= self._max_values
        order = order[: max(1, int(np.count_nonzero(fitting)))]
        self._kept = _Keyed(pairs.take(order), groups[order], keys[order])


class _Keyed(NamedTuple):
    pairs: Differences
    groups: np.ndarray
    keys: np.ndarray


def _sums_of_contexts(
    sides: tuple[Responses, Responses], order: np.ndarray, signs: np.ndarray, firsts: np.ndarray
) -> np.ndarray:
    contexts = np.concatenate([side.contexts for side in sides if side.contexts is not None])[order]
    contexts *= signs[:, None]
    sums: np.ndarray = np.add.reduceat(contexts, firsts, axis=0)
    return sums


def _blocks(pairs: Differences, rows: np.ndarray) -> tuple[np.ndarray, Blocks]:
    """Return the token ids that have coefficients of their contexts, `[q]` sorted, and their contexts, by id."""
    assert pairs.contexts is not None, "no contexts"
    order = np.argsort(pairs.ids, kind="stable")
    is_frequent = np.bincount(pairs.ids, pairs.occurrences) >= _MIN_OCCURRENCES
    order = order[is_frequent[pairs.ids[order]]]
    ids, counts = np.unique(pairs.ids[order], return_counts=True)
    return ids, Blocks(rows[order].astype(np.int32), counts, np.ascontiguousarray(pairs.contexts[order].T))


def _with_mean(thetas: np.ndarray) -> np.ndarray:
    """Append the mean over the folds, as float32."""
    return np.concatenate([thetas, thetas.mean(0, keepdims=True)]).astype(np.float32)


def _places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return where ids are among the known ones, which are sorted, `[N]`; `len(known)` for all others."""
    places = np.full(int(max(known.max(initial=0), ids.max(initial=0))) + 1, len(known))
    places[known] = np.arange(len(known))
    return places[ids]
