import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tests.weights_store.conftest import checksums_of
from weights_store import Table, WeightStore
from weights_store.errors import ConflictError, DamageError
from weights_store.schemas import LOGPS, QUARANTINE
from weights_store.tables.compaction import optimize

METADATA = {"fingerprint": "f0", "statistics": {"num_pairs": 1}}
RNG = np.random.default_rng(0)


def logps_rows(pair_ids):
    values = [list(-RNG.exponential(size=length).astype(np.float32)) for length in RNG.integers(1, 60, len(pair_ids))]
    return pa.table([pair_ids, values, values[::-1], *[[None] * len(pair_ids)] * 4], schema=LOGPS)


def quarantine_rows(keys):
    rows = [
        {"source_row": row, "pair_id": None, "reason": "no_prompt", "detail": detail, "raw": f"é{row}{detail}"}
        for row, detail in keys
    ]
    return pa.Table.from_pylist(rows, QUARANTINE)


def made_logps(root):
    table = WeightStore(root).table("logps/toy/x")
    ids = [f"{number:03d}" for number in RNG.permutation(120)]
    for start in range(0, 120, 20):
        table.append(logps_rows(ids[start : start + 20]), METADATA)
    return table


def made_quarantine(root):
    # Several details of one source row: a range of the first key column holds all of them.
    table = WeightStore(root).table("quarantine/toy")
    keys = [(int(row), detail) for row in RNG.permutation(40) for detail in ("", "b", "ä")]
    for start in range(0, 120, 20):
        table.append(quarantine_rows(keys[start : start + 20]), METADATA)
    return table


def rows_of(table, version=None):
    return table.scan(version).sort(table.key).collect()


@pytest.mark.parametrize("make", [made_logps, made_quarantine])
@pytest.mark.parametrize("max_bytes", [1 << 30, 2000])
def test_optimize_keeps_rows_fingerprint_and_checksums_and_sorts_them(store_uri, make, max_bytes):
    table = make(store_uri)
    assert (len(table.key_ranges(max_bytes)) > 3) == (max_bytes == 2000)
    before, checksums, old = rows_of(table), checksums_of(table), table.reference()
    reference = optimize(table, max_bytes)
    assert (reference.version, reference.fingerprint) == (old.version + 1, old.fingerprint)
    assert rows_of(table).equals(before)
    assert checksums_of(table) == checksums
    assert table.metadata()["statistics"] == METADATA["statistics"]
    assert table.metadata()["changes"] == ["optimized: 6 shards -> 1"]
    stored = pa.concat_tables(table.batches())
    assert stored.equals(stored.sort_by([(name, "ascending") for name in table.key]))
    assert len(table.records()) == 1


def test_old_versions_stay_readable_after_optimize(tmp_path):
    table = made_logps(tmp_path)
    before = [rows_of(table, version) for version in range(6)]
    optimize(table)
    assert all(rows_of(table, version).equals(rows) for version, rows in enumerate(before))
    assert [batch.num_rows for batch in table.batches(5)] == [20] * 6


def test_new_rows_can_be_added_after_optimize_and_none_comes_twice(tmp_path):
    table = made_logps(tmp_path)
    optimize(table)
    table.append(logps_rows(["000", "119", "new"]), METADATA, known=None)
    assert sorted(table.pair_ids()) == [*(f"{number:03d}" for number in range(120)), "new"]


def test_nothing_is_done_where_nothing_is_to_be_gained(tmp_path):
    table = WeightStore(tmp_path).table("logps/toy/x")
    table.append(logps_rows(["a", "b"]), METADATA)
    assert optimize(table) is None
    table.append(logps_rows(["a2", "c"]), METADATA)  # a … b and a2 … c overlap
    assert optimize(table).version == 2
    assert optimize(table) is None
    assert table.version() == 2


def test_an_optimize_that_was_overtaken_changes_nothing(tmp_path, monkeypatch):
    from deltalake import DeltaTable

    real = DeltaTable.create_write_transaction

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(DeltaTable, "create_write_transaction", real)
        table.append(logps_rows(["new"]), METADATA)
        return real(*args, **kwargs)

    table = made_logps(tmp_path)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", overtaken)
    with pytest.raises(ConflictError, match="logps/toy/x: another writer made version 6 first; run again"):
        optimize(table)
    assert table.version() == 6
    assert len(table.shards()) == 7
    assert table.num_rows() == 121


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip(position):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[position] ^= 0xFF
        path.write_bytes(data)

    damage.__name__ = f"flip_{position}"
    return damage


def exchange_values(path):
    """Write the shard again with one value changed, as large as before or not: a whole, readable Parquet file."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path)
    pq.write_table(rows.set_column(1, rows.schema.field(1), rows["rejected_logps"]), path)


def test_a_value_that_changed_while_it_was_read_is_not_written(tmp_path, monkeypatch):
    table, scan = made_logps(tmp_path), Table.scan

    def spoilt(self, version=None, **options):
        return scan(self, version, **options).with_columns(pl.col("chosen_logps").list.eval(pl.element() - 1))

    monkeypatch.setattr(Table, "scan", spoilt)
    with pytest.raises(DamageError, match="the rows read are not those that were committed; nothing was changed"):
        optimize(table)
    assert table.version() == 5


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), cut_off, exchange_values, flip(60), flip(400), flip(-3)]
)
@pytest.mark.parametrize("max_bytes", [1 << 30, 2000])
def test_damaged_shards_are_not_written_anew(tmp_path, damage, max_bytes):
    table = made_logps(tmp_path)
    shards = table.shards()
    damage(table.location.path / shards[2])
    with pytest.raises(DamageError, match=r"^logps/toy/x[^\n]*shard [^\n]*restore[^\n]*$"):
        optimize(table, max_bytes)
    assert table.version() == 5
    assert table.shards() == shards
