"""Rows with several answers on a side, which give one pair for each combination if the recipe says so.

Called by `intake.py` for every row; a row with one answer on each side is one pair.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple, TypeGuard

import numpy as np

from pipeline.source.columns import Columns
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair, read_pair
from weights_store.schemas import SIDES, Reason, Side


def read_pairs(row: Mapping[str, object], columns: Columns) -> Iterator[Pair | Unusable]:
    """Yield the pair in one raw row, or those of its several answers; for each that cannot be used, why.

    An unpaired row is a pair with nothing on one side.
    """
    chosen, *others = (_answers(row.get(column)) for column in columns.responses)
    if not others:
        what = f"{len(chosen)} answers in a row of one response; give each a row of its own"
        yield _read(row, columns) if len(chosen) == 1 else Unusable(Reason.MANY_ANSWERS, what)
        return
    (rejected,) = others
    if len(chosen) == len(rejected) == 1:
        yield _read(_with_answers(row, columns, chosen, rejected, (0, 0)), columns)
        return
    if not columns.combines_answers:
        what = f"{len(chosen)} chosen and {len(rejected)} rejected answers"
        remedy = 'dataset.many_answers = "combine" would make a pair of each combination'
        yield Unusable(Reason.MANY_ANSWERS, f"{what}; {remedy}")
        return
    seen: set[str] = set()
    for i, j in product(range(len(chosen)), range(len(rejected))):
        found = _read(_with_answers(row, columns, chosen, rejected, (i, j)), columns)
        if isinstance(found, Pair):
            if found.pair_id in seen:
                found = Unusable(Reason.DUPLICATE_PAIR, "other answers of this row make the same pair")
            else:
                seen.add(found.pair_id)
        if isinstance(found, Unusable):
            found = Unusable(found.reason, f"chosen answer {i} and rejected answer {j}: {found.detail}")
        yield found


class Answer(NamedTuple):
    """One of several answers on a side."""

    place: int
    num_answers: int


def answers_of_pairs(row: Mapping[str, object], columns: Columns) -> Iterator[dict[Side, Answer]]:
    """Yield for each pair of a raw row, in the order of `read_pairs`, which answers it has of the sides that list some."""
    # An unpaired row has one answer, and no weights of its own.
    of_sides = zip(SIDES, columns.responses, strict=True) if columns.completion is None else ()
    sides = {side: row.get(column) for side, column in of_sides}
    listed = {side: len(_answers(value)) for side, value in sides.items() if _are_answers(value)}
    for places in product(*(range(listed.get(side, 1)) for side in SIDES)):
        at = zip(SIDES, places, strict=True)
        yield {side: Answer(place, listed[side]) for side, place in at if side in listed}


def _answers(value: object) -> list[object]:
    """Return the answers of one side: the items of a list of texts or of chats, else the value itself."""
    return value if _are_answers(value) else [value]


def _are_answers(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str | list) for item in value)


def _with_answers(
    row: Mapping[str, object], columns: Columns, chosen: list[object], rejected: list[object], at: tuple[int, int]
) -> Mapping[str, object]:
    """Return a row with one answer on each side, and with the scores of these if there is one for each answer."""
    single = {**row, columns.chosen: chosen[at[0]], columns.rejected: rejected[at[1]]}
    for column, index in zip((columns.chosen_score, columns.rejected_score), at, strict=True):
        scores = row.get(column) if column is not None else None
        if isinstance(scores, np.ndarray):
            scores = scores.tolist()
        if column is not None and isinstance(scores, list) and index < len(scores):
            single[column] = scores[index]
    return single


def _read(row: Mapping[str, object], columns: Columns) -> Pair | Unusable:
    try:
        return read_pair(row, columns)
    except Unusable as problem:
        return problem
