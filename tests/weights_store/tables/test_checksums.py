import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weights_store.tables.checksums import column_checksums, sum_checksums

WRAP = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
NULL, LENGTH = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F
KINDS = {
    "name": pa.string(),
    "count": pa.int64(),
    "score": pa.float32(),
    "ids": pa.list_(pa.int32()),
    "values": pa.list_(pa.float32()),
}


def mix(value):
    """SplitMix64's finaliser, on Python's unbounded integers."""
    z = (value + GOLDEN) & WRAP
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WRAP
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WRAP
    return z ^ (z >> 31)


def text_hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(value, kind):
    if pa.types.is_floating(kind):
        return int(np.float32(value).view(np.uint32))
    return value & (WRAP if kind == pa.int64() else 0xFFFFFFFF)


def oracle(rows, name, kind, key="pair_id"):
    """The checksum of one column by a loop over its values."""
    total = 0
    for row in rows:
        row_key, value = text_hash(row[key]), row[name]
        if pa.types.is_list(kind):
            total += mix(mix(row_key ^ LENGTH) + (NULL if value is None else len(value)))
            for position, one in enumerate(value or []):
                total += mix(mix(row_key) + GOLDEN * position + bits(one, kind.value_type))
        elif value is None:
            total += mix(row_key + NULL)
        else:
            total += mix(row_key + (text_hash(value) if kind == pa.string() else mix(bits(value, kind))))
    return total & WRAP


def table_of(rows):
    return pa.Table.from_pylist(rows, pa.schema([("pair_id", pa.string()), *KINDS.items()]))


def checksums(rows):
    return column_checksums(table_of(rows), ["pair_id"])


floats = st.floats(width=32, allow_nan=False)
int32s = st.integers(-(2**31), 2**31 - 1)
row = st.fixed_dictionaries(
    {
        "name": st.none() | st.text(max_size=3),
        "count": st.none() | st.integers(-(2**63), 2**63 - 1),
        "score": st.none() | floats,
        "ids": st.none() | st.lists(int32s, max_size=4),
        "values": st.none() | st.lists(floats, max_size=4),
    }
)
tables = st.lists(row, min_size=1, max_size=8).map(
    lambda rows: [{"pair_id": f"é{index}", **values} for index, values in enumerate(rows)]
)
quiet = settings(max_examples=60, deadline=None, derandomize=True)


def test_checksum_of_one_small_column_is_the_sum_by_hand():
    # One row: its length, then two values at positions 0 and 1. 1.0 is 0x3f800000, -2.0 is 0xc0000000.
    key = text_hash("a")
    by_hand = mix(mix(key ^ LENGTH) + 2) + mix(mix(key) + 0x3F800000) + mix(mix(key) + GOLDEN + 0xC0000000)
    rows = pa.table({"pair_id": ["a"], "values": pa.array([[1.0, -2.0]], pa.list_(pa.float32()))})
    assert column_checksums(rows, ["pair_id"])["values"] == by_hand & WRAP


@quiet
@given(rows=tables)
def test_every_column_agrees_with_a_loop_over_its_values(rows):
    found = checksums(rows)
    assert found == {name: oracle(rows, name, kind) for name, kind in [("pair_id", pa.string()), *KINDS.items()]}


@quiet
@given(rows=tables, data=st.data())
def test_order_of_rows_and_how_they_lie_in_parts_and_chunks_do_not_matter(rows, data):
    shuffled = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(0, len(rows)))
    whole = table_of(shuffled)
    assert checksums(shuffled) == checksums(rows)
    parts = [column_checksums(part, ["pair_id"]) for part in (whole.slice(0, cut), whole.slice(cut))]
    assert sum_checksums(parts) == checksums(rows)
    assert column_checksums(pa.concat_tables([whole.slice(0, cut), whole.slice(cut)]), ["pair_id"]) == checksums(rows)


@quiet
@given(rows=tables, other=row, data=st.data())
def test_any_changed_value_changes_its_column_and_no_other(rows, other, data):
    name = data.draw(st.sampled_from(list(KINDS)))
    index = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows[:index], {**rows[index], name: other[name]}, *rows[index + 1 :]]
    before, after = checksums(rows), checksums(changed)
    same = table_of(rows)[name].equals(table_of(changed)[name]) and repr(rows[index][name]) == repr(other[name])
    assert (before[name] == after[name]) == same
    assert {**before, name: 0} == {**after, name: 0}


def column(*values, kind=None):
    rows = pa.table({"pair_id": list("abcdefgh")[: len(values)], "x": pa.array(values, kind or pa.list_(pa.int32()))})
    return column_checksums(rows, ["pair_id"])["x"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([[1], [2]], [[2], [1]]),  # exchanged between rows
        ([[1, 2], [3]], [[2, 1], [3]]),  # exchanged between positions
        ([[1, 2], [3]], [[1], [2, 3]]),  # a boundary moved
        ([[1, 2], []], [[], [1, 2]]),
        ([None], [[]]),
        ([[]], [[0]]),
        ([None], [[0]]),
        ([[0]], [[0, 0]]),
        ([[1, 1], [2, 2]], [[1, 2], [2, 1]]),
    ],
)
def test_exchanges_moved_boundaries_and_kinds_of_nothing_are_told_apart(left, right):
    assert column(*left) != column(*right)


def test_null_zero_and_the_two_float_zeros_are_told_apart():
    values = [column(value, kind=pa.float32()) for value in (None, 0.0, -0.0)]
    assert len(set(values)) == 3
    assert column(None, kind=pa.string()) != column("", kind=pa.string())


def test_rows_that_are_missing_or_doubled_change_the_sum():
    rows = [{"pair_id": name, **dict.fromkeys(KINDS)} for name in "ab"]
    assert len({tuple(checksums(some).values()) for some in (rows, rows[:1], [*rows, rows[0]], [])}) == 4


def test_keys_of_two_columns_do_not_run_into_each_other():
    def total(*keys):
        rows = pa.table(
            {"source_row": [key[0] for key in keys], "detail": [key[1] for key in keys], "x": [7] * len(keys)}
        )
        return column_checksums(rows, ["source_row", "detail"])["x"]

    assert total((1, "2")) != total((12, ""))
    assert total((1, "b"), (2, "a")) != total((1, "a"), (2, "b"))


def test_checksums_add_up_around_the_end_of_64_bits():
    assert sum_checksums([{"x": WRAP, "y": 1}, {"x": 2, "z": 3}]) == {"x": 1, "y": 1, "z": 3}


def test_lists_longer_than_what_is_summed_at_a_time(monkeypatch):
    rows = [{"pair_id": str(size), **dict.fromkeys(KINDS), "ids": list(range(size))} for size in (5, 0, 17, 1, 3, 8, 0)]
    monkeypatch.setattr("weights_store.tables.checksums._BLOCK", 4)
    assert checksums(rows)["ids"] == oracle(rows, "ids", KINDS["ids"])


def test_what_stands_behind_a_null_in_memory_does_not_count():
    """Parquet drops it, so a shard would not be what its own checksums say."""
    values, lengths = pa.array([1, 2, 3, 4, 5], pa.int32()), [0, 2, 4, 5]
    hidden = pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), values, mask=pa.array([False, True, False]))
    assert hidden.to_pylist() == [[1, 2], None, [5]]
    of_hidden = column_checksums(pa.table({"pair_id": ["a", "b", "c"], "ids": hidden}), ["pair_id"])["ids"]
    rows = [{"pair_id": name, "ids": ids} for name, ids in zip("abc", hidden.to_pylist(), strict=True)]
    assert of_hidden == oracle(rows, "ids", KINDS["ids"])
