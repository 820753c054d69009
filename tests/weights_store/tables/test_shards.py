import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weights_store.location import Location
from weights_store.schemas import LOGPS
from weights_store.tables.shards import ShardReader, ShardWriter, round_mantissa


def test_rounding_by_hand():
    # 1 + 2**-12 is the next number after 1 with 12 mantissa bits; 1 + 2**-13 is half way and goes to the even one, 1.
    values = np.array([1.0, 1 + 2**-12, 1 + 2**-13, 1 + 3 * 2**-13, -1 - 2**-12, 0.0], dtype=np.float32)
    expected = np.array([1.0, 1 + 2**-12, 1.0, 1 + 2**-11, -1 - 2**-12, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(round_mantissa(values), expected)


def test_relative_error_is_at_most_half_a_step_and_signs_stay():
    values = -np.random.default_rng(0).exponential(3.0, 100_000).astype(np.float32)
    rounded = round_mantissa(values)
    assert np.max(np.abs(rounded - values) / np.abs(values)) <= 2**-13
    assert (rounded <= 0).all()


def test_rounding_twice_changes_nothing_more():
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    once = round_mantissa(values)
    np.testing.assert_array_equal(round_mantissa(once), once)


def test_numbers_that_are_not_finite_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("weights_store.tables.shards._BLOCK", 3)
    values = np.array([1 + 2**-13, np.nan, np.inf, 1, 2, 3, 1 + 3 * 2**-13, -np.inf], dtype=np.float32)
    expected = np.array([1, np.nan, np.inf, 1, 2, 3, 1 + 2**-11, -np.inf], dtype=np.float32)
    np.testing.assert_array_equal(round_mantissa(values), expected)


def written(folder, rows):
    """Write `rows` as one shard and return the open reader."""
    writer = ShardWriter(Location(str(folder)), rows.schema, ["pair_id"])
    writer.write(rows)
    (record,) = writer.finish()
    return ShardReader(Location(str(folder)), record, ["pair_id"], "logps/x")


def logps_rows(columns):
    """Rows without top k, whose columns are null."""
    return pa.table({name: columns.get(name, [None] * len(columns["pair_id"])) for name in LOGPS.names}, LOGPS)


def test_shard_has_the_layout_of_the_store(tmp_path):
    rows = logps_rows({"pair_id": ["a", "b"], "chosen_logps": [[-0.1, -0.2], []], "rejected_logps": [[-3.0], [-4.0]]})
    record = written(tmp_path, rows).record
    assert record.num_bytes == (tmp_path / record.name).stat().st_size
    assert (record.num_rows, record.first_key, record.last_key) == (2, "a", "b")
    column = pq.ParquetFile(tmp_path / record.name).metadata.row_group(0).column(1)
    assert column.path_in_schema == "chosen_logps.list.element"
    assert (column.compression, column.has_dictionary_page) == ("ZSTD", False)
    assert "BYTE_STREAM_SPLIT" in column.encodings
    back = pq.read_table(tmp_path / record.name)
    assert [len(values) for values in back["chosen_logps"].to_pylist()] == [2, 0]


def test_slices_of_a_table_keep_their_own_rows(tmp_path):
    rows = logps_rows(
        {"pair_id": list("abc"), "chosen_logps": [[-1.0], [-2.0], [-3.0]], "rejected_logps": [[-1.0]] * 3}
    )
    (back,) = written(tmp_path, rows.slice(1, 2)).groups()
    assert back["chosen_logps"].to_pylist() == [[-2.0], [-3.0]]


def test_row_groups_and_shards_are_cut_by_size_and_lose_nothing(tmp_path, monkeypatch):
    # 40 pairs of 100 + 50 values come in tables of 7; a row group holds about 4 kB of them, a shard about 5 kB compressed.
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 4000)
    monkeypatch.setattr("weights_store.tables.shards.SHARD_BYTES", 5000)
    values = -np.random.default_rng(0).exponential(size=(40, 150)).astype(np.float32)
    ids = [f"{index:02d}" for index in range(40)]
    columns = [ids, [list(row[:100]) for row in values], [list(row[100:]) for row in values]]
    rows = logps_rows(dict(zip(LOGPS.names[:3], columns, strict=True)))
    folder = Location(str(tmp_path))
    writer = ShardWriter(folder, LOGPS, ["pair_id"])
    for start in range(0, 40, 7):
        writer.write(rows.slice(start, 7))
    records = writer.finish()
    readers = [ShardReader(folder, record, ["pair_id"], "logps/x") for record in records]
    assert len(records) > 2
    assert max(size for reader in readers for size in reader.group_sizes) <= 14
    back = pa.concat_tables([group for reader in readers for group in reader.groups()])
    assert back["pair_id"].to_pylist() == ids
    np.testing.assert_array_equal(
        np.concatenate(back["rejected_logps"].to_pylist()), round_mantissa(values[:, 100:].ravel())
    )
    assert (records[0].first_key, records[-1].last_key) == ("00", "39")


def test_neighbours_with_few_rows_end_up_in_one_shard_and_records_in_the_order_of_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 400)
    schema = pa.schema([("pair_id", pa.string())])

    def part(first, num_rows):
        writer = ShardWriter(Location(str(tmp_path)), schema, ["pair_id"])
        writer.write(pa.table({"pair_id": [f"{index:08d}" for index in range(first, first + num_rows)]}, schema))
        return writer.finish_part()

    parts = [part(first, num_rows) for first, num_rows in ((0, 3), (3, 60), (63, 0), (63, 2), (65, 1), (66, 60))]
    # 60 rows are more bytes than a row group, so those parts have shards of their own.
    assert [(len(each.shards), each.few.num_rows) for each in parts] == [(0, 3), (1, 0), (0, 0), (0, 2), (0, 1), (1, 0)]
    writer = ShardWriter(Location(str(tmp_path)), schema, ["pair_id"])
    for each in parts:
        writer.take(each)
    assert [(record.num_rows, record.first_key, record.last_key) for record in writer.finish()] == [
        (3, "00000000", "00000002"),
        (60, "00000003", "00000062"),
        (3, "00000063", "00000065"),
        (60, "00000066", "00000125"),
    ]
    assert len(list(tmp_path.iterdir())) == 4
