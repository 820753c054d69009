import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.source.rows import Block, RawRow, Source, batches, joined
from weights_store.errors import InputError
from weights_store.schemas import Reason


def test_batches_by_hand():
    cut = lambda *texts: list(batches(texts, 3, 4, len))  # noqa: E731
    assert cut() == []
    assert cut("a", "b", "c", "d") == [["a", "b", "c"], ["d"]]
    assert cut("aaaa", "b", "c") == [["aaaa", "b"], ["c"]]  # 4 are not more than 4
    assert cut("aaaaa", "b") == [["aaaaa"], ["b"]]


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(0, 20))
def test_batches_lose_nothing_and_are_closed_no_later_than_they_must(sizes, max_items, max_size):
    cut = list(batches(sizes, max_items, max_size, int))
    assert [size for batch in cut for size in batch] == sizes
    assert all(len(batch) <= max_items and sum(batch[:-1]) <= max_size for batch in cut)
    assert all(len(batch) == max_items or sum(batch) > max_size for batch in cut[:-1])


def block(*names):
    """Return rows with one column."""

    def read(rows, first_row):
        yield from (RawRow(first_row + at, value) for at, value in enumerate(rows.to_pylist()))

    return Block(0, pa.table({"name": list(names)}), read)


def several_splits(max_rows=None):
    def source(split, *names):
        pieces = [block(*names), RawRow(len(names), None, Reason.ROW_TOO_LARGE)]
        return Source("made up", lambda _: iter(pieces), max_rows=max_rows, split=split)

    return joined("made up", [source("train", "a", "b"), source("test", "c")])


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (None, [(0, "a", "train"), (1, "b", "train"), (2, None, "train"), (3, "c", "test"), (4, None, "test")]),
        (1, [(0, "a", "train"), (1, "c", "test")]),
        (2, [(0, "a", "train"), (1, "b", "train"), (2, "c", "test"), (3, None, "test")]),
        (0, []),
    ],
)
def test_rows_of_blocks_know_their_place_and_split(max_rows, expected):
    source = several_splits(max_rows)
    assert [(row.source_row, row.value and row.value["name"], row.split) for row in source.rows()] == expected
    assert sum(piece.num_rows for piece in source.pieces()) == len(expected)


def test_nothing_is_read_after_the_rows_that_are_wanted():
    def read(_):
        yield block("a", "b")
        raise InputError("damaged")

    assert len(list(Source("made up", read, max_rows=2).rows())) == 2
    with pytest.raises(InputError, match="damaged"):
        list(Source("made up", read, max_rows=3).rows())
