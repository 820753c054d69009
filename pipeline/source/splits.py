"""Reads the rows of all splits of a recipe's dataset, each row with the name of its split.

A row's split is that of the source from which it was loaded, or the value of `dataset.split_column`. Called by `intake.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from pipeline.recipe import DatasetSection
from pipeline.source.load import RawRow, load_rows
from weights_store.errors import InputError
from weights_store.schemas import Reason


def load_split_rows(dataset: DatasetSection) -> Iterator[RawRow]:
    """Yield the rows of every split, one split after the other; rows are numbered over all of them.

    Raises:
        InputError: A file is asked for several splits, or see `load_rows`.
    """
    if len(dataset.splits) > 1 and Path(dataset.source).is_file():
        raise InputError(
            f"dataset.split names {', '.join(dataset.splits)}, but dataset.source {dataset.source} is a file, which has one "
            "split; name a column that holds the split of each row in dataset.split_column, or give a saved or hub dataset"
        )
    numbers = count()
    for split in dataset.splits:
        for row in load_rows(dataset.model_copy(update={"split": split})):
            yield _with_split(replace(row, source_row=next(numbers), split=split), dataset.split_column)


def _with_split(row: RawRow, column: str | None) -> RawRow:
    """Return the row with the split that its column names, or with the reason why it has none."""
    if column is None or row.value is None:
        return row
    split = row.value.get(column)
    if split is None or split == "":
        return replace(row, reason=Reason.MISSING_VALUE, detail=f"column {column!r} has no value")
    if not isinstance(split, str):
        detail = f"column {column!r} is a {type(split).__name__}, expected the name of a split"
        return replace(row, reason=Reason.NOT_TEXT, detail=detail)
    return replace(row, split=split)
