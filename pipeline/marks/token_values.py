"""From cells to one number for each response token, for the pairs of one range of pair_ids. Called by `stages/annotate.py`.

Nothing here reads the source or commits. Work on tokens is vectorised; characters, spans and messages take a step per response.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.marks.cells import BadWeightsError, Unit
from pipeline.marks.characters import Texts, Vocabulary
from pipeline.marks.places import Response, character_weights, message_weights, span_weights
from pipeline.source.intake import stored_raw
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

    @classmethod
    def of(cls, ids: Lists, is_special: np.ndarray, cut_at: int | None) -> "Responses":
        """Look at ids; `is_special` is by id, `[V]` bool, and `cut_at` the limit that responses were cut to."""
        num_ends = num_at_end(is_special, ids)
        return cls(ids, num_ends, (ids.lengths == cut_at) & (num_ends == 0))


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
        rest: The weight of characters in no span.
        vocabulary: Of the tokenizer; None if nothing but tokens is counted.
        is_special: Which ids are special, `[V]`.
        cut_at: The limit of tokens that responses were cut to; None if none were.
    """

    table: Table
    tokens: Table
    version: int
    columns: Mapping[str, str]
    unit: Unit | None
    rest: float
    vocabulary: Vocabulary | None
    is_special: np.ndarray
    cut_at: int | None

    def __call__(self, part: tuple[KeyRange, pa.Table]) -> AnnotatedRange:
        """Return what became of the cells of a range, sorted by pair_id.

        Raises:
            InputError: They are not those of the pairs in the tokens table.
        """
        piece, cells = part
        ids = [f"{side}_ids" for side in SIDES]
        stored = self.tokens.scan(self.version, within=piece)
        tokens = stored.select("pair_id", *(ids if self.unit else [])).sort("pair_id").collect().to_arrow()
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
            flat = self._side(side, cells, lists, problems)
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

    def _side(self, side: Side, cells: pa.Table, ids: Lists, problems: dict[int, str]) -> np.ndarray:
        """Return the numbers of the tokens of one side, `[N]` float32; add what is wrong to the problems, by row."""
        numbers = Lists.of(cells[side])
        found = bad_numbers(numbers, 3 if self.unit == "span" else 1)
        responses = Responses.of(ids, self.is_special, self.cut_at)
        if self.unit == "token":
            flat, misfits = fit(numbers, responses)
            found = misfits | found
        else:
            flat = self._by_characters(numbers, cells[f"{side}_texts"].to_pylist(), responses, found)
        for row, problem in found.items():
            problems.setdefault(row, f"column {self.columns[side]!r}: {problem}")
        return flat

    def _by_characters(
        self, numbers: Lists, texts: list[list[str] | None], responses: Responses, problems: dict[int, str]
    ) -> np.ndarray:
        assert self.vocabulary is not None, "no vocabulary, which tells characters"
        ids, num_ends, is_cut = responses
        special_texts, starts = self.vocabulary.special_texts, numbers.starts
        found, row = [np.zeros(0, np.float32)], 0
        for characters in Texts(self.vocabulary, ids.flat, ids.lengths).parts():
            weights = np.ones(characters.starts[-1], np.float32)
            ends_of_tokens = np.cumsum(ids.lengths[row : row + len(characters.texts)])
            for text, (start, end), end_of_tokens in zip(
                characters.texts, pairwise(characters.starts.tolist()), ends_of_tokens.tolist(), strict=True
            ):
                of_row, num_marks = texts[row], num_ends[row]
                if row not in problems and of_row is not None:
                    first_mark = characters.first[end_of_tokens - num_marks] if num_marks else end
                    response = Response(text, int(first_mark) - start, bool(is_cut[row]), special_texts)
                    try:
                        weights[start:end] = self._weigh(numbers.flat[starts[row] : starts[row + 1]], of_row, response)
                    except BadWeightsError as error:
                        problems[row] = str(error)
                row += 1
            found.append(characters.means(weights).astype(np.float32))
        return np.concatenate(found)

    def _weigh(self, numbers: np.ndarray, texts: list[str], response: Response) -> np.ndarray:
        match self.unit:
            case "span":
                return span_weights(numbers, self.rest, texts, response)
            case "message":
                return message_weights(numbers, texts, response)
            case _:
                return character_weights(numbers, texts, response)

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
    goes_on = np.ones(len(found), bool)
    while goes_on.any():  # as often as a template writes special tokens at the end: usually once
        goes_on &= found < ids.lengths
        goes_on &= is_special[ids.flat[ends - 1 - np.minimum(found, ids.lengths - 1)]]
        found += goes_on
    return found
