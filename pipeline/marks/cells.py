"""Reads a user's own weights from the columns of a source: the numbers of each row, checked, as far as one row can tell.

Called by `stages/annotate.py`. Whether they fit the tokens of the responses is known later (`token_values.py`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.source.answers import Answer, answers_of_pairs
from pipeline.source.arrow_files import is_number, lists_of_numbers
from pipeline.source.columns import Columns
from pipeline.source.intake import pairs_of
from pipeline.source.messages import Message, Unusable, is_plain, texts_of
from pipeline.source.responses import as_turns
from pipeline.source.rows import Block, RawRow, Source, batches
from weights_store.fingerprint import canonical_json, ordered_json
from weights_store.schemas import FLOATS, SIDES, Side

Unit = Literal["token", "character", "message", "span", "role"]
"""What the numbers of a cell stand for; roles have theirs in the recipe, and none in a cell."""
_CELL = pa.schema(
    [
        ("chosen", FLOATS),
        ("rejected", FLOATS),
        ("pair", pa.float32()),
        ("chosen_texts", pa.list_(pa.string())),
        ("rejected_texts", pa.list_(pa.string())),
        ("chosen_messages", pa.string()),
        ("rejected_messages", pa.string()),
        ("problem", pa.string()),
    ]
)
"""The numbers of one pair, where its row has the columns that are asked for; a span is start, end and weight.
Texts are those of the messages of each response; messages are these, as JSON, unless a response is one message of a text and
nothing else. If there is a problem, nothing else of the row may be used."""
FOUND = pa.schema([("source_row", pa.int64()), ("of_pair", pa.string()), *_CELL])
"""The cells of rows of the source; `of_pair` where a row may have several pairs."""
CELLS = pa.schema([("pair_id", pa.string()), *_CELL])
"""The cells of pairs."""
_BATCH_CELLS, _BATCH_NUMBERS = 2000, 4 << 20
_SPAN = ("start", "end", "weight")
_NO_ANSWERS: Mapping[Side, Answer] = {}


class BadWeightsError(Exception):
    """The weights of one pair cannot be used; the message says why. Never leaves the pipeline."""


class Cell(NamedTuple):
    """The columns of `FOUND`, of one row of the source."""

    source_row: int
    numbers: dict[Side, np.ndarray]
    pair: float | None
    turns: dict[Side, list[Message]]
    """The messages of each response."""
    problem: str | None
    pair_id: str | None = None
    """Where a row may have several pairs."""


@dataclass(frozen=True)
class CellReader:
    """Reads cells.

    Args:
        columns: Those of the user's weights, by `chosen`, `rejected` and `pair`; what is not needed is missing.
        unit: What the numbers of the two responses stand for; None if there are none.
    """

    columns: Mapping[str, str]
    unit: Unit | None

    def read(self, source: Source, pair_columns: Columns | None) -> Iterator[pa.Table]:
        """Yield the cells of rows in the order of the source, as tables of `FOUND`: without `pair_columns` also of no pairs.

        `pair_columns` are needed for all units but tokens, which are counted without the text, and where rows may have several
        answers: there the column has a list with one cell for each answer that the row lists.

        Raises:
            InputError: The source cannot be read.
        """
        cells = self._counted(source) if pair_columns is None else self._with_texts(source, pair_columns)
        for batch in batches(cells, _BATCH_CELLS, _BATCH_NUMBERS, _num_numbers):
            whole = batch.pop() if isinstance(batch[-1], pa.Table) else None  # a table ends its batch
            if batch:
                yield _table(batch)
            if whole is not None:
                yield whole

    def _counted(self, source: Source) -> Iterator[Cell | pa.Table]:
        for piece in source.pieces(set(self.columns.values())):
            if isinstance(piece, Block) and (whole := self._whole(piece)) is not None:
                yield whole
            else:
                for row in (piece,) if isinstance(piece, RawRow) else piece.rows():
                    yield self._cell(row, {}, row.detail if row.reason is not None else None)

    def _whole(self, block: Block) -> pa.Table | None:
        """Return the cells of a block without a step per row; None if one of them is not there or no number."""
        num_rows = block.columns.num_rows
        is_whole = set(self.columns.values()) <= set(block.columns.schema.names)
        if num_rows == 1 or not is_whole:  # it may be too large, or of a file that lacks a column of the others
            return None
        columns = {"source_row": pa.array(np.arange(block.first_row, block.first_row + num_rows))}
        for side in SIDES if self.unit else ():
            lists = lists_of_numbers(block.columns.column(self.columns[side]))
            if lists is None or lists[1].null_count:
                return None
            starts = np.concatenate([[0], np.cumsum(lists[1].to_numpy())]).astype(np.int32)
            columns[side] = pa.ListArray.from_arrays(pa.array(starts), pa.array(_as_float32(lists[0])))
        if "pair" in self.columns:
            weights = block.columns.column(self.columns["pair"])
            if not is_number(weights.type) or weights.null_count:
                return None
            found = _as_float32(weights.to_numpy())
            if not (np.isfinite(found) & (found >= 0)).all():
                return None
            columns["pair"] = pa.array(found)
        return pa.table([columns.get(field.name, pa.nulls(num_rows, field.type)) for field in FOUND], schema=FOUND)

    def _with_texts(self, source: Source, pair_columns: Columns) -> Iterator[Cell]:
        last, answers = None, iter(list[dict[Side, Answer]]())
        for row, pair in pairs_of(source, pair_columns, self.columns.values()):
            if pair_columns.combines_answers and row is not last:
                last, answers = row, answers_of_pairs(row.value or {}, pair_columns)
            answer = next(answers, {})
            if not isinstance(pair, Unusable):
                cell = self._cell(row, {side: as_turns(getattr(pair, side)) for side in SIDES}, None, answer)
                yield cell._replace(pair_id=pair.pair_id) if pair_columns.combines_answers else cell
            elif row.value is None:  # it is too large with its weights
                yield self._cell(row, {}, pair.detail)

    def _cell(
        self,
        row: RawRow,
        turns: dict[Side, list[Message]],
        problem: str | None,
        answers: Mapping[Side, Answer] = _NO_ANSWERS,
    ) -> Cell:
        value: Mapping[str, object] = row.value or {}
        numbers: dict[Side, np.ndarray] = {}
        weight = None
        column = ""
        try:
            for side in SIDES if self.unit not in (None, "role") else ():
                column = self.columns[side]
                given = value.get(column)
                numbers[side] = self._numbers(_of_answer(given, answers[side]) if side in answers else given)
            if "pair" in self.columns:
                column = self.columns["pair"]
                weight = _pair_weight(value.get(column))
        except BadWeightsError as error:
            problem = problem or f"column {column!r}: {error}"
        return Cell(row.source_row, numbers, weight, turns, problem)

    def _numbers(self, value: object) -> np.ndarray:
        """Return the numbers of one cell, `[n]` float32.

        Raises:
            BadWeightsError: They are something else.
        """
        if value is None:
            raise BadWeightsError("it has no value")
        if self.unit == "span":
            return _spans(value)
        if isinstance(value, np.ndarray):
            return _as_float32(value)
        if self.unit == "message" and _is_number(value):
            value = [value]
        if not isinstance(value, list | tuple):
            raise BadWeightsError(f"{_shown(value)} is no list of numbers")
        if not set(map(type, value)) <= {int, float, Decimal}:
            for place, each in enumerate(value):
                if not _is_number(each):
                    raise BadWeightsError(f"number {place} is {_shown(each)}, expected a finite number >= 0")
        return _as_float32(value)


def _num_numbers(cell: Cell | pa.Table) -> int:
    return _BATCH_NUMBERS + 1 if isinstance(cell, pa.Table) else sum(map(len, cell.numbers.values()))


def _table(cells: Sequence[Cell]) -> pa.Table:
    columns: dict[str, object] = {
        "source_row": [cell.source_row for cell in cells],
        "of_pair": [cell.pair_id for cell in cells],
        "pair": [cell.pair for cell in cells],
        "problem": [cell.problem for cell in cells],
    }
    for side in SIDES:
        lists = [cell.numbers.get(side, _NOTHING) for cell in cells]
        offsets = np.concatenate([[0], np.cumsum([len(numbers) for numbers in lists])]).astype(np.int32)
        columns[side] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(lists), pa.float32()))
        turns = [cell.turns.get(side) for cell in cells]
        texts = [None if each is None else ["".join(texts_of(message)) for message in each] for each in turns]
        columns[f"{side}_texts"] = texts
        columns[f"{side}_messages"] = [
            ordered_json(each) if each and not _is_one_text(each) else None for each in turns
        ]
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in FOUND], schema=FOUND)


_NOTHING = np.zeros(0, np.float32)


def _of_answer(value: object, answer: Answer) -> object:
    """Return the cell of one of several answers."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != answer.num_answers:
        raise BadWeightsError(
            f"{_shown(value)} is no list of weights for each of {answer.num_answers} answers, as its response lists them"
        )
    return value[answer.place]


def roles_of(cells: pa.Table) -> set[str]:
    """Return the roles of the messages in the responses of some cells."""
    found: set[str] = set()
    for side in SIDES:
        messages = cells[f"{side}_messages"]
        if messages.null_count > cells[f"{side}_texts"].null_count:
            found.add("assistant")  # one message of a text and nothing else
        found |= {turn["role"] for each in messages.drop_null().to_pylist() for turn in json.loads(each)}
    return found


def _is_one_text(turns: list[Message]) -> bool:
    return len(turns) == 1 and is_plain(turns[0])


def _pair_weight(value: object) -> float:
    if value is None:
        raise BadWeightsError("it has no value")
    if not _is_number(value) or not _is_weight(weight := np.float32(_as_float32([value])[0])):
        raise BadWeightsError(f"it is {_shown(value)}, expected a finite number >= 0")
    return float(weight)


def _spans(value: object) -> np.ndarray:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise BadWeightsError(f"{_shown(value)} is no list of spans")
    found: list[object] = []
    for place, given in enumerate(value):
        span = given.tolist() if isinstance(given, np.ndarray) else given
        if isinstance(span, Mapping):
            known = {name: each for name, each in span.items() if each is not None or name in _SPAN}
            span = [known.get(name) for name in _SPAN] if known.keys() == set(_SPAN) else None
        if not isinstance(span, list | tuple) or len(span) != len(_SPAN) or not all(map(_is_number, span)):
            raise BadWeightsError(f"span {place} is {_shown(given)}, expected start, end and weight")
        if not all(map(_is_whole, span[:2])):
            raise BadWeightsError(f"span {place} is {_shown(given)}, expected whole numbers as start and end")
        found += span
    return _as_float32(found)


def _as_float32(numbers: object) -> np.ndarray:
    if isinstance(numbers, np.ndarray) and numbers.dtype == np.float32:
        return numbers
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        try:
            return np.asarray(numbers, np.float64).astype(np.float32)
        except OverflowError:
            return np.array([_as_float(each) for each in numbers], np.float32)  # type: ignore[attr-defined]


def _as_float(number: float | Decimal) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if number > 0 else -math.inf


def _is_whole(number: float | Decimal) -> bool:
    """Return whether a number has no fraction; also of those that are refused later, such as NaN."""
    found = _as_float(number)
    return not math.isfinite(found) or found.is_integer()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal | np.number) and not isinstance(value, bool)


def _is_weight(value: np.float32) -> bool:
    return bool(np.isfinite(value) and value >= 0)


def _shown(value: object) -> str:
    try:
        return canonical_json(value)[:80]
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:80]
