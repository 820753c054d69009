import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weights_store.schemas import LOGPS
from weights_store.shards import round_mantissa, write_shard


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


def test_numbers_that_are_not_finite_stay_as_they_are():
    values = np.array([np.nan, np.inf, -np.inf], dtype=np.float32)
    np.testing.assert_array_equal(round_mantissa(values), values)


@pytest.mark.parametrize("bits", [0, 24])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=r"must be in 1\.\.23"):
        round_mantissa(np.ones(1, np.float32), bits)


def test_shard_has_the_layout_of_the_store(tmp_path):
    rows = pa.table(
        {"pair_id": ["a", "b"], "chosen_logps": [[-0.1, -0.2], []], "rejected_logps": [[-3.0], [-4.0]]}, LOGPS
    )
    size = write_shard(rows, tmp_path / "x.parquet")
    assert size == (tmp_path / "x.parquet").stat().st_size
    column = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(1)
    assert column.path_in_schema == "chosen_logps.list.element"
    assert (column.compression, column.has_dictionary_page) == ("ZSTD", False)
    assert "BYTE_STREAM_SPLIT" in column.encodings
    back = pq.read_table(tmp_path / "x.parquet")
    assert [len(values) for values in back["chosen_logps"].to_pylist()] == [2, 0]


def test_slices_of_a_table_keep_their_own_rows(tmp_path):
    rows = pa.table(
        {"pair_id": list("abc"), "chosen_logps": [[-1.0], [-2.0], [-3.0]], "rejected_logps": [[-1.0]] * 3}, LOGPS
    )
    write_shard(rows.slice(1, 2), tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet")["chosen_logps"].to_pylist() == [[-2.0], [-3.0]]
