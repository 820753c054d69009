"""Where keys are cut, by hand: no table is read."""

import polars as pl
import pytest

from weights_store.tables.key_ranges import KeyRange, RowGroup, cut


def group(first, last, num_bytes=100, position=0):
    return RowGroup(first, last, "shard", position, num_bytes)


def unread(group):
    raise AssertionError("the keys of a row group that overlaps no other are not needed")


def test_row_groups_that_do_not_overlap_are_cut_by_their_first_keys():
    # 100 bytes each, 400 / 2 = 200 in a range: c and a come before the cut at e.
    groups = [group("e", "f"), group("a", "b"), group("g", "h"), group("c", "d")]
    assert cut(groups, unread, 2) == [KeyRange(None, "e"), KeyRange("e", None)]


def test_larger_row_groups_fill_a_range_earlier():
    # 500 bytes in 2 ranges of 250: the first row group alone has 300.
    groups = [group("a", "b", 300), group("c", "d"), group("e", "f")]
    assert cut(groups, unread, 2) == [KeyRange(None, "c"), KeyRange("c", None)]


def test_row_groups_that_overlap_are_cut_by_their_own_keys():
    # 8 keys of 25 bytes each, 200 / 2 = 100 in a range: a, b, c, d and e, f, g, h.
    keys = {0: list("aceg"), 1: list("bdfh")}
    groups = [group(keys[at][0], keys[at][-1], position=at) for at in keys]
    assert cut(groups, lambda group: keys[group.position], 2) == [KeyRange(None, "e"), KeyRange("e", None)]


def test_one_key_is_never_cut():
    assert cut([group(7, 7)], lambda group: [7] * 50, 10) == [KeyRange(None, None)]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (KeyRange(None, None), ["a", "b", "c"]),
        (KeyRange("b", None), ["b", "c"]),
        (KeyRange(None, "b"), ["a"]),
        (KeyRange("b", "c"), ["b"]),
    ],
)
def test_a_range_holds_its_low_end_and_not_its_high_end(piece, expected):
    frame = pl.LazyFrame({"pair_id": ["a", "b", "c"]})
    assert piece.of(frame).collect()["pair_id"].to_list() == expected
