"""From cells to one number for each response token, for the pairs of one range of pair_ids. Called by `stages/annotate.py`.

Nothing here reads the source or commits. Work on tokens is vectorised; characters, spans and messages take a step per response.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.chat.turns import Turns
from pipeline.marks.cells import BadWeightsError, Unit
from pipeline.marks.characters import Characters, Texts, Vocabulary
from pipeline.marks.places import Response, character_weights, message_weights, span_weights
from pipeline.source.intake import stored_raw
from pipeline.source.messages import Unusable
from weights_store import Table
from weights_store.errors import InputError
from weights_store.schemas import ANNOTATIONS, SIDES, Reason, Side
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import Written


class Lists(NamedTuple):
    """Lists of numbers, one after the other, `[N]`, and how many each one has, `[B]`."""

    flat: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Lists":
        """Read a column of lists without nulls."""
        lists = column.combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        return cls(lists.flatten().to_numpy(), np.diff(np.asarray(lists.offsets)).astype(np.int64))

    @property
    def starts(self) -> np.ndarray:
        """Where each list begins, and the end of all, `[B + 1]`."""
        return np.concatenate([[0], np.cumsum(self.lengths)])


class Responses(NamedTuple):
    """The responses of one side; every array has one value for each, `[B]`."""

    ids: Lists
    num_ends: np.ndarray
    """How many special tokens it ends with."""
    is_cut: np.ndarray
    """Whether it was cut to the limit of tokens."""
    may_be_cut: np.ndarray
    """Whether it is as long as the limit: one of several messages may be cut behind the end of one of them."""

    @classmethod
    def of(cls, ids: Lists, is_special: np.ndarray, cut_at: int | None) -> "Responses":
        """Look at ids; `is_special` is by id, `[V]` bool, and `cut_at` the limit that responses were cut to."""
        num_ends, may_be_cut = num_at_end(is_special, ids), ids.lengths == cut_at
        return cls(ids, num_ends, may_be_cut & (num_ends == 0), may_be_cut)


@dataclass
class AnnotatedRange:
    """What became of the pairs of one range."""

    num_rows: int
    written: Written
    unusable: list[dict[str, object]] = field(default_factory=list)
    """Quarantine rows."""


@dataclass(frozen=True)
class RangeAnnotator:
    """Makes the annotations of one range.

    Args:
        table: Of the annotations, whose shards are written.
        tokens: The pairs, in version `version`.
        columns: Of the source, by `chosen`, `rejected` and `pair`; for messages.
        unit: What the numbers stand for; None if there are none of responses.
        rest: The weight of characters in no span, and of messages whose role has none.
        roles: The weight of messages by their role.
        vocabulary: Of the tokenizer; None if nothing but tokens is counted.
        chat: Tells where the messages of a response stand; None as the vocabulary.
        is_special: Which ids are special, `[V]`.
        cut_at: The limit of tokens that responses were cut to; None if none were.
    """

    table: Table
    tokens: Table
    version: int
    columns: Mapping[str, str]
    unit: Unit | None
    rest: float
    roles: Mapping[str, float]
    vocabulary: Vocabulary | None
    chat: ChatTokenizer | None
    is_special: np.ndarray
    cut_at: int | None

    def __call__(self, part: tuple[KeyRange, pa.Table]) -> AnnotatedRange:
        """Return what became of the cells of a range, sorted by pair_id.

        Raises:
            InputError: They are not those of the pairs in the tokens table.
        """
        piece, cells = part
        needed = ["pair_id", *(f"{side}_ids" for side in SIDES if self.unit)]
        if any(cells[f"{side}_messages"].null_count < cells.num_rows for side in SIDES):
            needed.append("prompt")
        stored = self.tokens.scan(self.version, within=piece)
        tokens = stored.select(needed).sort("pair_id").collect().to_arrow()
        if tokens["pair_id"].to_pylist() != cells["pair_id"].to_pylist():
            raise InputError(
                f"the rows of the source are not those of {self.tokens.path}@{self.version}: it has changed during the build; "
                "run again"
            )
        writer = self.table.writer()
        if not cells.num_rows:
            return AnnotatedRange(0, writer.finish_part())
        problems = {row: text for row, text in enumerate(cells["problem"].to_pylist()) if text is not None}
        columns: dict[str, pa.Array] = {"pair_id": cells["pair_id"]}
        for side in SIDES if self.unit else ():
            lists = Lists.of(tokens[f"{side}_ids"].cast(pa.list_(pa.int32())))
            flat = self._side(side, cells, tokens, lists, problems)
            columns[f"{side}_values"] = pa.ListArray.from_arrays(
                pa.array(lists.starts.astype(np.int32)), pa.array(flat)
            )
        if "pair" in self.columns:
            columns["pair_value"] = cells["pair"]
        rows = pa.table(
            [columns.get(each.name, pa.nulls(cells.num_rows, each.type)) for each in ANNOTATIONS], ANNOTATIONS.names
        ).cast(ANNOTATIONS)
        is_good = np.ones(cells.num_rows, bool)
        is_good[list(problems)] = False
        writer.write(rows if is_good.all() else rows.filter(pa.array(is_good)))
        return AnnotatedRange(cells.num_rows, writer.finish_part(), self._unusable(stored, tokens, problems))

    def _side(self, side: Side, cells: pa.Table, tokens: pa.Table, ids: Lists, problems: dict[int, str]) -> np.ndarray:
        """Return the numbers of the tokens of one side, `[N]` float32; add what is wrong to the problems, by row."""
        numbers = Lists.of(cells[side])
        found = bad_numbers(numbers, 3 if self.unit == "span" else 1)
        responses = Responses.of(ids, self.is_special, self.cut_at)
        if self.unit == "token":
            flat, misfits = fit(numbers, responses)
            found = misfits | found
        else:
            messages = cells[f"{side}_messages"].to_pylist()
            prompts = tokens["prompt"].to_pylist() if any(messages) else messages
            texts = [
                each and Source(each, messages[row], prompts[row])
                for row, each in enumerate(cells[f"{side}_texts"].to_pylist())
            ]
            flat = self._by_characters(numbers, texts, responses, found)
        where = f"column {self.columns[side]!r}" if side in self.columns else f"{side} response"
        for row, problem in found.items():
            problems.setdefault(row, f"{where}: {problem}")
        return flat

    def _by_characters(
        self, numbers: Lists, sources: Sequence["Source | None"], responses: Responses, problems: dict[int, str]
    ) -> np.ndarray:
        assert self.vocabulary is not None, "no vocabulary, which tells characters"
        ids, num_ends, is_cut, may_be_cut = responses
        special_texts, starts = self.vocabulary.special_texts, numbers.starts
        found, row = [np.zeros(0, np.float32)], 0
        for characters in Texts(self.vocabulary, ids.flat, ids.lengths).parts():
            weights = np.ones(characters.starts[-1], np.float32)
            ends_of_tokens = np.cumsum(ids.lengths[row : row + len(characters.texts)])
            for text, (start, end), end_of_tokens in zip(
                characters.texts, pairwise(characters.starts.tolist()), ends_of_tokens.tolist(), strict=True
            ):
                source, num_marks = sources[row], num_ends[row]
                if row not in problems and source:
                    first_mark = characters.first[end_of_tokens - num_marks] if num_marks else end
                    response = Response(text, int(first_mark) - start, bool(is_cut[row]), special_texts)
                    if source.messages is not None and may_be_cut[row]:
                        response = response._replace(num_own=len(text), is_cut=True)
                    try:
                        weights[start:end] = self._weigh(numbers.flat[starts[row] : starts[row + 1]], source, response)
                    except BadWeightsError as error:
                        problems[row] = str(error)
                row += 1
            found.append(known_means(characters, weights))
        return np.concatenate(found)

    def _weigh(self, numbers: np.ndarray, source: "Source", response: Response) -> np.ndarray:
        """Return the weights of a response's characters, `[C]`; NaN for those that no text of the row has.

        Raises:
            BadWeightsError: The numbers do not fit, or it is unknown where a text stands.
        """
        texts = source.texts
        if self.unit == "message" and len(numbers) not in (1, len(texts)):
            of_messages = (
                "one message; expected one"
                if len(texts) == 1
                else f"{len(texts)} messages; expected one for each, or one"
            )
            raise BadWeightsError(f"{len(numbers)} numbers for a response of {of_messages}")
        is_one = self.unit in ("message", "role") and 1 in (len(numbers), len(texts))
        turns = None if source.messages is None or is_one else self._turns(source)
        match self.unit:
            case "span":
                return span_weights(numbers, self.rest, texts, response, turns)
            case "character":
                return character_weights(numbers, texts, response, turns)
            case "message":
                return message_weights(numbers.tolist(), response, turns)
            case _:
                roles = ["assistant"] if turns is None else [turn.role for turn in turns.turns]
                return message_weights([self.roles.get(role, self.rest) for role in roles], response, turns)

    def _turns(self, source: "Source") -> Turns:
        assert source.messages is not None, "one text alone is the whole response"
        assert source.prompt is not None, "no prompt of messages"
        assert self.chat is not None, "no template, which tells messages"
        try:
            return self.chat.turns(source.prompt, json.loads(source.messages))
        except Unusable as problem:
            raise BadWeightsError(f"{problem.detail}; give weights per token") from problem

    def _unusable(self, stored: pl.LazyFrame, tokens: pa.Table, problems: Mapping[int, str]) -> list[dict[str, object]]:
        if not problems:
            return []
        by_id = {tokens["pair_id"][row].as_py(): problem for row, problem in problems.items()}
        rows = stored.filter(pl.col("pair_id").is_in(list(by_id))).select("source_row", "pair_id", "prompt").collect()
        return [
            {
                "source_row": source_row,
                "pair_id": pair_id,
                "reason": Reason.BAD_WEIGHTS.value,
                "detail": f"{self.table.path}: {by_id[pair_id]} (pair {pair_id})",
                "raw": stored_raw(prompt),
            }
            for source_row, pair_id, prompt in rows.iter_rows()
        ]


class Source(NamedTuple):
    """What the source has of a response."""

    texts: list[str]
    """Of each message."""
    messages: str | None
    """JSON of the messages; None for one with a text and nothing else."""
    prompt: str | None
    """JSON of the chat before them."""


def known_means(characters: Characters, weights: np.ndarray) -> np.ndarray:
    """Return the mean of the weights over the characters of each token, `[N]` float32; those that are NaN do not count.

    So a space that the tokenizer adds to the first word of a text does not change its weight. A token of none has 1.
    """
    is_known = ~np.isnan(weights)
    shares = characters.means(is_known.astype(np.float32), 0.0)
    sums = characters.means(np.where(is_known, weights, 0), 0.0)
    return np.divide(sums, shares, out=np.ones(len(sums)), where=shares > 0).astype(np.float32)


def fit(numbers: Lists, responses: Responses) -> tuple[np.ndarray, dict[int, str]]:
    """Return lists of one number per token as long as the responses, `[N]` float32, and what is wrong, by row.

    A list may leave out the special tokens at the end of a response, which then get 1; one of a response that was cut is cut.
    """
    lengths, num_ends, is_cut = responses.ids.lengths, responses.num_ends, responses.is_cut
    given = numbers.lengths
    if np.array_equal(given, lengths):
        return numbers.flat.astype(np.float32, copy=False), {}
    fits = (given == lengths) | (given == lengths - num_ends) | (is_cut & (given > lengths))
    kept = np.where(fits, np.minimum(given, lengths), 0)
    steps = np.arange(int(kept.sum())) - np.repeat(np.cumsum(kept) - kept, kept)
    found = np.ones(int(lengths.sum()), np.float32)
    starts = np.cumsum(lengths) - lengths
    found[np.repeat(starts, kept) + steps] = numbers.flat[np.repeat(numbers.starts[:-1], kept) + steps]
    problems = {}
    for row in np.flatnonzero(~fits).tolist():
        without = f", or {lengths[row] - num_ends[row]:,} without the end of its turn" if num_ends[row] else ""
        problems[row] = (
            f"{given[row]:,} numbers for a response of {lengths[row]:,} tokens; expected one for each{without}"
        )
    return found, problems


def bad_numbers(numbers: Lists, every: int = 1) -> dict[int, str]:
    """Return the first number that is no weight, by row; only every third one of each list is looked at if `every` is 3."""
    is_bad = ~(np.isfinite(numbers.flat) & (numbers.flat >= 0))
    at = np.flatnonzero(is_bad)
    rows = np.searchsorted(numbers.starts, at, side="right") - 1
    places = at - numbers.starts[rows]
    found: dict[int, str] = {}
    for row, place, value in zip(rows.tolist(), places.tolist(), numbers.flat[at].tolist(), strict=True):
        if every == 1:
            found.setdefault(row, f"number {place} is {value:g}, expected a finite number >= 0")
        elif place % every == every - 1:
            found.setdefault(row, f"the weight of span {place // every} is {value:g}, expected a finite number >= 0")
        else:
            found.setdefault(row, f"span {place // every} begins or ends at {value:g}, expected a place in the text")
    return found


def num_at_end(is_special: np.ndarray, ids: Lists) -> np.ndarray:
    """Return how many special tokens each response ends with, `[B]`; `is_special` is by id, `[V]` bool."""
    found, ends = np.zeros_like(ids.lengths), ids.starts[1:]
    rows = np.flatnonzero(ids.lengths)
    while rows.size:  # as often as a template writes special tokens at the end: usually once
        rows = rows[is_special[ids.flat[ends[rows] - 1 - found[rows]]]]
        found[rows] += 1
        rows = rows[found[rows] < ids.lengths[rows]]
    return found
