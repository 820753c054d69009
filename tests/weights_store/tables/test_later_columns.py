"""Stores written before tables had columns for annotators' scores and the reference's top k: everything still reads them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weights_store.checks.verify import verify
from weights_store.schemas import LOGPS, WEIGHTS
from weights_store.store import _SCHEMAS

NAME = "hh-harmless/tis-dpo"
LATER = WEIGHTS.names[WEIGHTS.names.index("split") + 1 :]


def _early(schema, num_columns):
    return pa.schema(list(schema)[:num_columns])


@pytest.fixture
def old_store(request, monkeypatch):
    """The small store with the columns of its time."""
    with monkeypatch.context() as patch:
        patch.setitem(_SCHEMAS, "weights", _early(WEIGHTS, len(WEIGHTS) - len(LATER)))
        patch.setitem(_SCHEMAS, "logps", _early(LOGPS, 3))
        return request.getfixturevalue("small_store")


def test_later_columns_read_as_null(old_store):
    rows = old_store.scan(NAME).collect()
    assert rows.columns == WEIGHTS.names
    assert set(rows.select(LATER).null_count().row(0)) == {rows.height}
    assert [batch.schema for batch in old_store.table(f"weights/{NAME}").batches()] == [WEIGHTS, WEIGHTS]
    assert list(verify(old_store)) == []


def test_an_export_has_all_columns(old_store, tmp_path):
    file, _ = old_store.export(NAME, tmp_path / "out")
    assert pq.read_schema(file).names == WEIGHTS.names


def test_compaction_adds_no_column(old_store):
    table = old_store.table(f"weights/{NAME}")
    before = table.checksums()
    assert "chosen_score" not in before
    table.optimize()
    assert table.checksums() == before
    assert list(verify(old_store)) == []


def test_log_probs_appended_later_lie_beside_the_early_ones(old_store, monkeypatch):
    (path,) = (table.path for table in old_store.tables("logps") if table.path.endswith("/ref"))
    early = old_store.table(path)
    moved, metadata = early.scan().collect().sort("pair_id").to_arrow().cast(LOGPS), early.metadata()
    with monkeypatch.context() as patch:
        patch.setitem(_SCHEMAS, "logps", _early(LOGPS, 3))
        old_store.table(f"{path}2").append(moved.slice(0, 2), metadata)
    table = old_store.table(f"{path}2")
    table.append(moved.slice(2), metadata)
    assert table.scan().sort("pair_id").collect().equals(early.scan().sort("pair_id").collect())
    assert list(verify(old_store, [table.path])) == []
    table.optimize()
    assert table.num_rows() == 4
    assert list(verify(old_store, [table.path])) == []
