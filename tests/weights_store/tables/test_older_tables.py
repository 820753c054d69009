"""Tables written before some columns existed, and rows added to them that have values there.

What an old table as such reads like is in `test_later_columns.py`.
"""

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from deltalake.table import TableAlterer
from tests.weights_store.conftest import build_small_store

from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import DamageError
from weights_store.schemas import LOGPS, WEIGHTS
from weights_store.store import _SCHEMAS
from weights_store.tables.table import Table

PATH, NAME = "logps/toy/x", "hh-harmless/tis-dpo"
LATER = ["chosen_top_ids", "chosen_top_logps", "rejected_top_ids", "rejected_top_logps"]
EARLY_WEIGHTS = WEIGHTS.names[: WEIGHTS.names.index("split") + 1]
EARLY = pa.schema([field for field in LOGPS if field.name not in LATER])


def row(pair_id, **later):
    return {"pair_id": pair_id, "chosen_logps": [-1.0, -2.0], "rejected_logps": [-3.0], **later}


TOPS = {
    "chosen_top_ids": [4, 7],
    "chosen_top_logps": [-1.0, -0.5],
    "rejected_top_ids": [5],
    "rejected_top_logps": [-3.0],
}
NEW = {"b": row("b", **TOPS), "d": row("d", **TOPS | {"rejected_top_ids": [6]})}


def append(table, *rows):
    return table.append(pa.Table.from_pylist(list(rows), table.schema), {"fingerprint": "".join(table.schema.names)})


def made_early(root, *pair_ids):
    """A table with rows of three columns, open for a tokenweights that knows seven."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_SCHEMAS, "logps", EARLY)
        append(WeightStore(root).table(PATH), *map(row, pair_ids))
    return WeightStore(root).table(PATH)


@pytest.fixture
def early(tmp_path):
    return made_early(tmp_path / "store", "a", "c")


@pytest.fixture
def grown(early):
    append(early, *NEW.values())
    return early


EXPECTED = [row("a", **dict.fromkeys(LATER)), NEW["b"], row("c", **dict.fromkeys(LATER)), NEW["d"]]


def by_pair(rows):
    return sorted(rows, key=lambda one: one["pair_id"])


def test_every_reader_sees_the_values_of_later_columns_and_null_in_early_rows(store_uri):
    table = made_early(store_uri, "a", "c")
    append(table, *NEW.values())
    assert by_pair(table.scan().collect().to_dicts()) == EXPECTED
    assert by_pair(table.scan_shards(table.records()).collect().to_dicts()) == EXPECTED
    assert by_pair(pa.concat_tables(table.batches()).to_pylist()) == EXPECTED
    others = table._open().to_pyarrow_dataset()
    assert by_pair(others.to_table().to_pylist()) == EXPECTED
    assert duckdb.from_arrow(others).filter("rejected_top_ids[1] = 5").fetchall() == [tuple(NEW["b"].values())]


def test_the_columns_come_as_a_version_of_their_own_and_old_versions_stay(grown):
    assert [commit.version for commit in grown.history()] == [2, 1, 0]
    widened = grown.metadata(1)
    assert (widened["fingerprint"], widened["num_rows_written"]) == (grown.metadata(0)["fingerprint"], 0)
    assert widened["changes"] == [f"columns: new are {', '.join(LATER)}"]
    assert [sorted(grown.pair_ids(version)) for version in range(3)] == [["a", "c"], ["a", "c"], ["a", "b", "c", "d"]]
    assert grown.scan(0).collect().columns == LOGPS.names
    assert list(verify(WeightStore(grown.root.path))) == []
    append(grown, row("e"))
    assert grown.version() == 3


def test_where_nothing_is_added_nothing_is_widened(early):
    assert append(early, row("a", **TOPS)).version == 0


def test_replacing_the_rows_replaces_the_columns(early):
    early.replace(pa.Table.from_pylist([NEW["b"]], LOGPS), {"fingerprint": "new"})
    assert early.version() == 1
    assert early._open().to_pyarrow_dataset().to_table().to_pylist() == [NEW["b"]]
    assert list(verify(WeightStore(early.root.path))) == []


def test_a_folder_whose_name_delta_escapes_reads_the_same(tmp_path):
    table = made_early(tmp_path / "é ~", "a", "c")
    assert table.scan().collect().columns == LOGPS.names
    append(table, *NEW.values())
    assert by_pair(table.scan().collect().to_dicts()) == EXPECTED


@pytest.mark.parametrize("schema", [EARLY, LOGPS], ids=["early rows", "later columns, too"])
def test_a_writer_that_was_overtaken_while_it_added_columns_loses_and_doubles_nothing(early, monkeypatch, schema):
    real = TableAlterer.add_columns
    theirs = [{name: value for name, value in row(pair_id, **TOPS).items() if name in schema.names} for pair_id in "de"]

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(TableAlterer, "add_columns", real)
        append(Table(early.root, PATH, schema), *theirs)
        return real(*args, **kwargs)

    monkeypatch.setattr(TableAlterer, "add_columns", overtaken)
    append(early, *NEW.values())
    expected = [*EXPECTED[:3], *(dict.fromkeys(LATER) | one for one in theirs)]  # who came first wins d
    assert by_pair(early.scan().collect().to_dicts()) == expected
    assert list(verify(WeightStore(early.root.path))) == []


def test_compaction_keeps_what_was_recorded_and_counts_what_was_not_there_as_null(grown, tmp_path):
    recorded = grown.checksums()
    grown.optimize()
    assert grown.scan().collect().to_dicts() == EXPECTED
    after = grown.checksums()
    assert {name: after[name] for name in EARLY.names} == {name: recorded[name] for name in EARLY.names}
    whole = WeightStore(tmp_path / "whole").table(PATH)
    append(whole, *EXPECTED)
    assert after == whole.checksums()


def test_a_value_of_a_later_column_that_changed_on_its_way_is_not_written_anew(grown, monkeypatch):
    scan = Table.scan

    def spoilt(self, version=None):
        return scan(self, version).with_columns(pl.col("rejected_top_ids").list.eval(pl.element() + 1))

    monkeypatch.setattr(Table, "scan", spoilt)
    with pytest.raises(DamageError, match="the rows read are not those that were committed; nothing was changed"):
        grown.optimize()
    assert grown.version() == 2


def test_columns_that_the_log_hides_from_readers_are_a_finding(early, monkeypatch):
    monkeypatch.setattr(Table, "_widened", lambda self, opened, shards: opened)
    append(early, *NEW.values())
    (found,) = verify(WeightStore(early.root.path))
    assert found.problem == (
        f"its log gives it columns {EARLY.names} or types that are not those of this tokenweights, {LOGPS.names}"
    )


def test_tokens_differences_and_the_layout_of_the_release_are_those_of_a_store_made_today(
    small_store, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setitem(_SCHEMAS, "logps", EARLY)
        patch.setitem(_SCHEMAS, "weights", pa.schema([field for field in WEIGHTS if field.name in EARLY_WEIGHTS]))
        old = build_small_store(tmp_path / "old")
    assert old.scan_tokens(NAME).collect().equals(small_store.scan_tokens(NAME).collect())
    here, there = (vars(store.diff(NAME, "hh-harmless/reversed")) for store in (old, small_store))
    assert here.pop("largest").equals(there.pop("largest"))
    assert here == there
    here, there = (
        store.export(NAME, tmp_path / f"out-{store.root.path.name}", format="jsonl") for store in (old, small_store)
    )
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there]
