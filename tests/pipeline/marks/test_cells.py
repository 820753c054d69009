import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.marks.cells import FOUND, CellReader
from pipeline.source.arrow_files import Unread, arrow, arrow_source, parquet
from pipeline.source.columns import Columns
from pipeline.source.rows import RawRow, Source, joined
from weights_store.schemas import Reason

COLUMNS = {"chosen": "c", "rejected": "r"}


def read(unit, *values, columns=COLUMNS):
    return cells_of([RawRow(index, value) for index, value in enumerate(values)], unit, columns=columns)


def cells_of(pieces, unit, pair_columns=None, columns=COLUMNS):
    """Return the rows of the tables that are read."""
    tables = CellReader(columns, unit).read(Source("made up", lambda _: iter(pieces)), pair_columns)
    return [row for table in tables for row in table.cast(FOUND).to_pylist()]


def problem(unit, value):
    (cell,) = read(unit, {"c": value, "r": [1.0]})
    return cell["problem"]


def test_numbers_are_read_as_they_are():
    (cell,) = read("token", {"c": [1, np.float16(0.5)], "r": np.array([3, 4], np.int64)})
    assert (cell["problem"], cell["chosen"], cell["rejected"]) == (None, [1.0, 0.5], [3.0, 4.0])


def test_a_number_for_a_message_may_stand_alone():
    (cell,) = read("message", {"c": 2, "r": [1, 0.5]})
    assert (cell["chosen"], cell["rejected"]) == ([2.0], [1.0, 0.5])


@pytest.mark.parametrize(
    "span", [[0, 3, 2.5], {"start": 0, "end": 3, "weight": 2.5}, {"end": 3, "weight": 2.5, "start": 0.0, "kind": None}]
)
def test_spans_are_lists_or_objects(span):
    (cell,) = read("span", {"c": [span, (4, 5, 1)], "r": []})
    assert cell["chosen"] == [0, 3, 2.5, 4, 5, 1]
    assert cell["rejected"] == []


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("token", None, "column 'c': it has no value"),
        ("token", "1 2", "column 'c': \"1 2\" is no list of numbers"),
        ("token", 1.0, "column 'c': 1.0 is no list of numbers"),
        ("token", [1, None], "column 'c': number 1 is null, expected a finite number >= 0"),
        ("token", [1, "2"], "column 'c': number 1 is \"2\", expected a finite number >= 0"),
        ("token", [True], "column 'c': number 0 is true, expected a finite number >= 0"),
        ("span", 3, "column 'c': 3 is no list of spans"),
        ("span", [[0, 1]], "column 'c': span 0 is [0,1], expected start, end and weight"),
        ("span", [[0, 1, "2"]], "column 'c': span 0 is [0,1,\"2\"], expected start, end and weight"),
        (
            "span",
            [{"start": 0, "end": 1}],
            'column \'c\': span 0 is {"end":1,"start":0}, expected start, end and weight',
        ),
        (
            "span",
            [{"start": 0, "end": 1, "weight": 1, "kind": "x"}],
            'column \'c\': span 0 is {"end":1,"kind":"x","start":0,"weight":1}, expected start, end and weight',
        ),
        ("span", [[0, 1.5, 2]], "column 'c': span 0 is [0,1.5,2], expected whole numbers as start and end"),
    ],
)
def test_what_is_no_list_of_weights_is_named(unit, value, expected):
    assert problem(unit, value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, None),
        (Decimal("0.5"), None),  # DuckDB and Spark write them into Parquet
        (0, None),
        (-1, "column 'w': it is -1, expected a finite number >= 0"),
        (float("nan"), "column 'w': it is nan, expected a finite number >= 0"),
        (1e39, "column 'w': it is 1e+39, expected a finite number >= 0"),  # float32 ends at 3.4e38
        (10**400, "column 'w': it is 1000"),
        (None, "column 'w': it has no value"),
        ("1", "column 'w': it is \"1\", expected a finite number >= 0"),
    ],
)
def test_weights_of_pairs(value, expected):
    (cell,) = read(None, {"w": value}, columns={"pair": "w"})
    assert cell["pair"] == (value if expected is None else None)
    assert (cell["problem"] or "").startswith(expected or "")
    assert (cell["problem"] is None) == (expected is None)


def test_messages_are_kept_where_a_response_is_more_than_a_text():
    call = {"role": "assistant", "content": "?", "tool_calls": [{"name": "f", "arguments": {}}]}
    value = {"prompt": "a", "c": [1], "r": [1], "chosen": [call], "rejected": "b"}
    (cell,) = cells_of([RawRow(0, value)], "character", Columns())
    assert (cell["chosen_texts"], cell["rejected_texts"]) == (["?"], ["b"])
    assert (json.loads(cell["chosen_messages"]), cell["rejected_messages"]) == ([call], None)


def test_decimals_are_numbers():
    (cell,) = read("token", {"c": [Decimal("0.25"), 1], "r": [Decimal("3")]})
    assert (cell["chosen"], cell["rejected"]) == ([0.25, 1.0], [3.0])
    (cell,) = read("span", {"c": [[Decimal("1"), Decimal("2"), Decimal("0.5")]], "r": []})
    assert cell["chosen"] == [1.0, 2.0, 0.5]


@pytest.mark.parametrize("unit", ["token", "span"])
def test_an_integer_that_no_float_holds_is_refused_later(unit):
    value = [1, 10**400, 0.5]
    (cell,) = read(unit, {"c": [value] if unit == "span" else value, "r": []})
    assert cell["chosen"] == [1.0, np.inf, 0.5]


def test_numbers_that_float32_cannot_hold_are_infinite_and_refused_later():
    (cell,) = read("token", {"c": [1e300], "r": np.array([-1e300])})
    assert (cell["chosen"], cell["rejected"]) == ([np.inf], [-np.inf])


def test_a_row_that_cannot_be_read_with_its_weights_says_why():
    rows = [RawRow(0, None, Reason.ROW_TOO_LARGE, "the row has 17 bytes"), RawRow(1, {"c": [1], "r": [2]})]
    assert [cell["problem"] for cell in cells_of(rows, "token")] == ["the row has 17 bytes", None]
    by_text = cells_of(rows, "character", Columns())
    assert [(cell["problem"], cell["chosen_texts"]) for cell in by_text] == [
        ("the row has 17 bytes", None)
    ]  # the other is no pair at all


def test_a_table_of_cells_has_the_numbers_of_each_row():
    rows = read("token", {"c": [1, 2], "r": []}, {"c": None, "r": [3]}, {"c": [4], "r": [5.5]})
    assert [row["source_row"] for row in rows] == [0, 1, 2]
    assert [row["chosen"] for row in rows] == [[1, 2], [], [4]]
    assert [row["rejected"] for row in rows] == [[], [], [5.5]]
    assert [row["problem"] for row in rows] == [None, "column 'c': it has no value", None]


BOTH = {**COLUMNS, "pair": "w"}
LISTS = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("lists", "weights"),
    [
        (pa.array([[1, 2], [], [0.5]], LISTS), pa.array([1, 0.5, 2])),
        (pa.array([[9], [1, 2], [], [0.5], [9]], LISTS).slice(1, 3), pa.array([1, 2, 3])),
        (pa.chunked_array([[[1, 2]], [[], [7]]], pa.large_list(pa.int64())), pa.chunked_array([[1.0], [2.0, 3.0]])),
        (pa.array([[1], [1e300], [-1]], pa.list_(pa.float64())), pa.array([1, 2, 3], pa.uint8())),
        (pa.array([[1], None, [2]], LISTS), pa.array([1, 2, 3])),
        (pa.array([[1], [None], [2]], LISTS), pa.array([1, 2, 3])),
        (pa.array([["1"], [], ["x"]]), pa.array([1, 2, 3])),
        (pa.array([[1], [2], [3]], LISTS), pa.array([1, None, 3])),
        (pa.array([[1], [2], [3]], LISTS), pa.array([1, float("nan"), -1])),
        (pa.array([[1], [2], [3]], LISTS), pa.array([True, False, True])),
        (pa.array([[True], [], [False]]), pa.array(["1", "2", "3"])),
        (pa.array([[1]], LISTS), pa.array([2.0])),
    ],
)
def test_columns_of_a_block_are_read_as_its_rows_are(lists, weights):
    table = pa.table({"c": lists, "w": weights, "r": lists})
    read_at_once = cells_of(
        arrow_source("made up", table.schema, [("all", lambda c: [table.select(c)])]).pieces(), "token", columns=BOTH
    )
    one_by_one = [RawRow(index, row) for index, row in enumerate(table.to_pylist())]
    np.testing.assert_equal(read_at_once, cells_of(one_by_one, "token", columns=BOTH))


def test_rows_and_blocks_stay_in_the_order_of_the_source():
    table = pa.table({"c": pa.array([[1], [2]], LISTS), "r": pa.array([[3], [4]], LISTS)})
    no_numbers = pa.table({"c": [["x"], ["y"]], "r": [["z"], ["z"]]})
    parts = [("", lambda c, part=part: [part]) for part in (table, Unread(1, "it is large"), no_numbers, table)]
    cells = cells_of(arrow_source("made up", table.schema, parts).pieces(), "token")
    assert [cell["source_row"] for cell in cells] == list(range(7))
    assert [cell["chosen"] for cell in cells] == [[1], [2], [], [], [], [1], [2]]
    assert [cell["problem"] is None for cell in cells] == [True, True, False, False, False, True, True]


@pytest.mark.parametrize("read_file", [parquet, arrow])
def test_rows_of_a_file_that_lacks_columns_of_the_others_have_no_value(tmp_path, read_file):
    whole = pa.table({"c": pa.array([[1], [2]], LISTS), "r": pa.array([[3], [4]], LISTS), "x": ["a", "b"]})
    files = []
    for number, names in enumerate((["c", "r"], ["c", "x"], ["x"], ["r", "c", "x"])):
        path = tmp_path / str(number)
        if read_file is parquet:
            pq.write_table(whole.select(names), path)
        else:
            with pa.ipc.new_file(path, whole.select(names).schema) as writer:
                writer.write_table(whole.select(names))
        files.append(read_file(path))
    found = [
        row for table in CellReader(COLUMNS, "token").read(joined("all", files), None) for row in table.to_pylist()
    ]
    assert [row["source_row"] for row in found] == list(range(8))
    problems = ["column 'r': it has no value"] * 2 + ["column 'c': it has no value"] * 2
    assert [row["problem"] for row in found] == [None, None, *problems, None, None]
    assert [row["chosen"] for row in found][-2:] == [[1.0], [2.0]]
