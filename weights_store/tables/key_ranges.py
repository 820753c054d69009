"""Where to cut a table's keys, so that one range of them fits in memory. Reads nothing; `TableReader.key_ranges` calls it.

Row groups are sorted by key. While their spans do not overlap, the first key of each stands for all its bytes. Where spans
overlap, as after appends in any order, all first keys lie at the low end: then some keys of the row group itself are needed.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import polars as pl

_SAMPLES = 16
"""How many keys stand for one row group whose span overlaps others."""


class KeyRange(NamedTuple):
    """Rows whose first key column is at least `low` and below `high`; None is open."""

    low: str | int | None
    high: str | int | None

    @classmethod
    def between(cls, first: str, last: str) -> "KeyRange":
        """Return the range from one text to another, both included."""
        return cls(first, f"{last}\0")  # no text lies between

    def overlaps(self, first: Any, last: Any) -> bool:
        """Return whether some key from `first` to `last` may be in this range."""
        return (self.low is None or last >= self.low) and (self.high is None or first < self.high)

    def of(self, frame: pl.LazyFrame, key: str = "pair_id") -> pl.LazyFrame:
        """Return the rows of `frame` in this range; the condition reaches the files."""
        if self.low is not None:
            frame = frame.filter(pl.col(key) >= self.low)
        return frame if self.high is None else frame.filter(pl.col(key) < self.high)


EVERYTHING = KeyRange(None, None)


class RowGroup(NamedTuple):
    """One row group of a table, with its first and last key: str or int, the same in a whole table."""

    first: Any
    last: Any
    shard: str
    position: int  # in the shard
    num_bytes: int


def cut(groups: list[RowGroup], keys_of: Callable[[RowGroup], list[Any]], num_ranges: int) -> list[KeyRange]:
    """Return at most `num_ranges` (>= 1) ranges with about equally many bytes, which together hold every key of the table.

    `keys_of` returns all keys of one row group, sorted.
    """
    samples = sorted(_samples(sorted(groups), keys_of))
    step = sum(num_bytes for _, num_bytes in samples) / num_ranges
    cuts: list[Any] = []
    last, cut_at = samples[0][0], 0.0
    for below, (key, _) in zip(accumulate(num_bytes for _, num_bytes in samples), samples[1:], strict=False):
        if below - cut_at >= step and key > last:
            cuts.append(key)
            last, cut_at = key, below
    return [KeyRange(low, high) for low, high in zip([None, *cuts], [*cuts, None], strict=True)]


def _samples(groups: list[RowGroup], keys_of: Callable[[RowGroup], list[Any]]) -> Iterator[tuple[Any, float]]:
    """Yield keys, each with the bytes of the rows from it to the next key of its row group."""
    ends = list(accumulate((group.last for group in groups), max))
    for index, group in enumerate(groups):
        overlaps_left = index > 0 and ends[index - 1] >= group.first
        overlaps_right = index + 1 < len(groups) and group.last >= groups[index + 1].first
        keys = [group.first]
        if overlaps_left or overlaps_right or len(groups) == 1:
            keys = keys_of(group)
            keys = keys[:: -(-len(keys) // _SAMPLES)]
        yield from ((key, group.num_bytes / len(keys)) for key in keys)
