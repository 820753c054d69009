import os
import time

import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.checks.vacuum import find_orphans, vacuum
from weights_store.errors import DamageError, NotFoundError, SettingsError
from weights_store.schemas import LOGPS
from weights_store.tables.compaction import optimize

PATH = "logps/toy/x"


def rows(*pair_ids):
    made = {"chosen_logps": [-1.0], "rejected_logps": [-2.0]}
    return pa.Table.from_pylist([{"pair_id": pair_id, **made} for pair_id in pair_ids], LOGPS)


@pytest.fixture
def store(tmp_path):
    """A table whose three versions need five different files, two of which the newest one no longer has."""
    store = WeightStore(tmp_path / "store")
    table = store.table(PATH)
    table.append(rows("a", "c"), {"fingerprint": "f0"})
    table.append(rows("b"), {"fingerprint": "f1"})
    optimize(table)
    return store


def leave(store, name, hours, path=PATH, data=b"12345"):
    """Put a file there as a writer that died so many hours ago."""
    file = store.root.path / path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    then = time.time() - 3600 * hours
    os.utime(file, (then, then))
    return file


def written(store, path=PATH):
    """A shard that was written and never committed."""
    writer = store.table(path).writer()
    writer.write(rows("z"))
    (record,) = writer.finish()
    return record.name


def everything(store):
    return {path for path in store.root.path.rglob("*") if path.is_file()}


def test_a_store_as_it_was_committed_has_no_orphans_in_any_version(store):
    assert list(find_orphans(store)) == []
    before = everything(store)
    assert vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True) == []
    assert everything(store) == before
    contents = [sorted(store.table(PATH).pair_ids(version)) for version in (0, 1, 2)]
    assert contents == [["a", "c"], ["a", "b", "c"], ["a", "b", "c"]]


def test_an_uncommitted_shard_is_an_orphan_with_size_and_age(store):
    name = written(store)
    leave(store, name, hours=200, data=b"x" * 321)
    (orphan,) = find_orphans(store)
    assert (orphan.table, orphan.name, orphan.num_bytes) == (PATH, name, 321)
    assert orphan.age_hours == pytest.approx(200, abs=0.1)


def test_only_orphans_older_than_the_retention_go_and_readers_see_nothing(store):
    old, young = leave(store, "old.parquet", hours=169), leave(store, "young.parquet", hours=167)
    kept = everything(store) - {old}
    assert [orphan.name for orphan in vacuum(store, dry_run=False)] == ["old.parquet"]
    assert everything(store) == kept
    assert young.exists()
    assert store.table(PATH).num_rows(0) == 2
    assert store.table(PATH).num_rows() == 3


def test_a_dry_run_is_the_default_and_removes_nothing(store):
    old = leave(store, "old.parquet", hours=1000)
    assert [orphan.name for orphan in vacuum(store)] == ["old.parquet"]
    assert old.exists()


def test_partial_files_and_dead_commits_are_orphans(store):
    partial = leave(store, f".{written(store)}.4711.partial", hours=1)
    dead = leave(store, "_delta_log/_commit_0c9d.json.tmp", hours=1)
    assert {orphan.name for orphan in find_orphans(store)} >= {partial.name, "_delta_log/_commit_0c9d.json.tmp"}
    vacuum(store, retention_hours=0.5, dry_run=False, risk_running_builds=True)
    assert not partial.exists()
    assert not dead.exists()


def test_what_delta_or_the_system_put_there_stays(store):
    from deltalake import DeltaTable

    DeltaTable(str(store.root.path / PATH)).create_checkpoint()
    names = ("_change_data", "deletion_vector_1.bin", ".nfs0001", "_delta_log/00000000000000000000.crc")
    files = [leave(store, name, hours=1000) for name in names]
    assert vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True) == []
    assert all(file.exists() for file in files)
    assert (store.root.path / PATH / "_delta_log/_last_checkpoint").exists()


def test_shards_whose_first_commit_never_came_are_orphans(store):
    name = written(store, "logps/toy/never")
    readme = leave(store, "README.md", hours=1000, path="logps/toy")
    leave(store, name, hours=1000, path="logps/toy/never")
    assert [(orphan.table, orphan.name) for orphan in vacuum(store, dry_run=False)] == [("logps/toy/never", name)]
    assert readme.exists()


def test_files_of_a_table_inside_a_tables_folder_are_not_its_orphans(store):
    from deltalake import DeltaTable, write_deltalake

    inner = str(store.root.path / PATH / "inner")
    write_deltalake(inner, rows("q"))
    vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True)
    assert DeltaTable(inner).to_pyarrow_table()["pair_id"].to_pylist() == ["q"]


def test_files_of_foreign_commits_stay(store):
    from deltalake import write_deltalake

    write_deltalake(str(store.root.path / PATH), rows("foreign"), mode="append")
    before = everything(store)
    assert vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True) == []
    assert everything(store) == before


def test_a_flipped_bit_in_a_foreign_commit_makes_no_file_a_leftover(store):
    from deltalake import write_deltalake

    write_deltalake(str(store.root.path / PATH), rows("foreign"), mode="append")
    log = store.root.path / PATH / "_delta_log" / f"{3:020d}.json"
    log.write_text(log.read_text().replace('{"add":', '{"ade":'))
    with pytest.raises(DamageError, match=r"x@3: .* it holds \['ade'\] where an action of Delta is expected"):
        vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True)


@pytest.mark.parametrize("damage", ["unreadable", "empty", "missing"])
def test_where_a_commit_cannot_be_read_nothing_is_removed(store, damage):
    # What the commit named cannot be told from leftovers.
    log = store.root.path / PATH / "_delta_log" / f"{1:020d}.json"
    log.unlink() if damage == "missing" else log.write_text({"unreadable": "{", "empty": ""}[damage])
    leave(store, "old.parquet", hours=1000)
    leave(store, "old.parquet", hours=1000, path="logps/toy/y")
    before = everything(store)
    with pytest.raises(DamageError, match=r"logps/toy/x@1: .*Which files it needs is unknown, so nothing was removed"):
        vacuum(store, dry_run=False)
    assert everything(store) == before
    assert list(find_orphans(store)) == []


def test_only_the_tables_asked_for_are_cleaned(store):
    store.table("logps/toy/y").append(rows("a"), {"fingerprint": "f"})
    left = [leave(store, "old.parquet", hours=1000, path=path) for path in (PATH, "logps/toy/y")]
    assert [orphan.table for orphan in vacuum(store, dry_run=False, tables=["logps/toy/y"])] == ["logps/toy/y"]
    assert [file.exists() for file in left] == [True, False]


@pytest.mark.parametrize("hours", [-1, -0.001, float("nan")])
def test_a_retention_that_is_no_time_is_refused(store, hours):
    leave(store, "old.parquet", hours=1000)
    with pytest.raises(SettingsError, match="retention must be at least 0 hours"):
        vacuum(store, retention_hours=hours, dry_run=False)


def test_a_table_that_is_not_there_is_refused(store):
    with pytest.raises(NotFoundError, match="no table logps/toy/none in .*; `tokenweights ls --store"):
        vacuum(store, tables=["logps/toy/none"])
    with pytest.raises(NotFoundError, match="no table logps/toy/none in "):
        list(find_orphans(store, ["logps/toy/none"]))


def test_a_store_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no store at"):
        vacuum(WeightStore(tmp_path / "nowhere"))
    with pytest.raises(NotFoundError, match="no store at"):
        list(find_orphans(WeightStore(tmp_path / "nowhere")))
