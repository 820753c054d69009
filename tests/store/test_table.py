import multiprocessing

import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.errors import ConflictError, NotFoundError, SettingsError, StoreError
from weights_store.schemas import LOGPS, SCHEMA_VERSION

METADATA = {"fingerprint": "f0", "statistics": {"num_pairs": 1}}


def _rows(*pair_ids, value=-1.0):
    return pa.table(
        {
            "pair_id": list(pair_ids),
            "chosen_logps": [[value]] * len(pair_ids),
            "rejected_logps": [[-2.0]] * len(pair_ids),
        },
        LOGPS,
    )


@pytest.fixture
def table(tmp_path):
    return WeightStore(tmp_path).table("logps/toy/x")


def test_append_takes_each_pair_once_within_and_across_calls(table):
    table.append(_rows("a", "b", "a"), METADATA)
    reference = table.append(_rows("b", "c", value=-9.0), METADATA)
    assert reference.version == 1
    assert sorted(table.pair_ids()) == ["a", "b", "c"]
    kept = dict(table.scan().select("pair_id", "chosen_logps").collect().iter_rows())
    assert kept == {"a": [-1.0], "b": [-1.0], "c": [-9.0]}


def test_appending_nothing_new_writes_no_version(table):
    first = table.append(_rows("a"), METADATA)
    assert table.append(_rows("a"), {**METADATA, "fingerprint": "other"}) == first


def test_old_versions_stay_readable_after_append_and_replace(table):
    table.append(_rows("a"), METADATA)
    table.append(_rows("b"), METADATA)
    table.replace(_rows("z"), METADATA)
    assert [sorted(table.pair_ids(version)) for version in (0, 1, 2)] == [["a"], ["a", "b"], ["z"]]


def test_shards_come_in_the_order_of_writing(table):
    for name in "abcd":
        table.append(_rows(name), METADATA)
    order = [batch["pair_id"].to_pylist() for batch in table.batches()]
    assert order == [["a"], ["b"], ["c"], ["d"]]


def test_metadata_of_each_version_is_its_own(table):
    table.append(_rows("a"), METADATA)
    table.append(_rows("b"), {**METADATA, "fingerprint": "f1"})
    assert [table.reference(version).fingerprint for version in (0, 1)] == ["f0", "f1"]
    assert table.metadata(1)["num_rows_written"] == 1


def test_missing_version_names_what_there_is(table):
    table.append(_rows("a"), METADATA)
    with pytest.raises(NotFoundError, match=r"has no version 7; it has 0\.\.0"):
        table.metadata(7)


def test_newer_schema_version_is_refused(table):
    table.append(_rows("a"), {**METADATA, "schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(StoreError, match="upgrade tokenweights"):
        table.metadata()


def test_table_of_somebody_else_is_refused(tmp_path, table):
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "logps/toy/x"), _rows("a"))
    with pytest.raises(StoreError, match="not written by tokenweights"):
        table.metadata()


def test_rows_without_a_column_are_refused(table):
    with pytest.raises(StoreError, match="lack the columns"):
        table.append(pa.table({"pair_id": ["a"]}), METADATA)


@pytest.mark.parametrize("path", ["logps/../x", "logps//x", "logps/x/", "secrets/x", "logps//etc/passwd", "weights/A"])
def test_bad_table_paths_are_refused(tmp_path, path):
    with pytest.raises(SettingsError):
        WeightStore(tmp_path).table(path)


def _append_range(root, start, stop):
    table = WeightStore(root).table("logps/toy/x")
    for index in range(start, stop):
        table.append(_rows(f"p{index}", f"p{index + 1}"), METADATA)


def test_racing_writers_lose_no_pair_and_double_none(tmp_path):
    # Three processes write overlapping pairs at once: p0..p8 from three sides.
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_range, args=(tmp_path, start, start + 4)) for start in (0, 2, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    pair_ids = WeightStore(tmp_path).table("logps/toy/x").pair_ids().to_list()
    assert sorted(pair_ids) == sorted(set(pair_ids)) == [f"p{index}" for index in range(9)]


def test_loser_of_the_race_for_the_first_version_tries_again(table):
    # As if another process had made version 0 between our look and our commit.
    table.append(_rows("a"), METADATA)
    with pytest.raises(ConflictError, match="another writer made a version after None"):
        table.commit([], METADATA, base=None)
    assert sorted(table.append(_rows("b"), METADATA) and table.pair_ids()) == ["a", "b"]


def test_a_commit_that_fails_for_another_reason_is_no_lost_race(table, monkeypatch):
    from deltalake import DeltaTable
    from deltalake.exceptions import CommitFailedError

    def fail(*_args, **_kwargs):
        raise CommitFailedError("permission denied")

    table.append(_rows("a"), METADATA)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", fail)
    with pytest.raises(StoreError, match="cannot write logps/toy/x .*permission denied; nothing became visible"):
        table.append(_rows("b"), METADATA)


def test_old_versions_outlive_the_clean_up_of_old_logs(table):
    table.append(_rows("a"), METADATA)
    from deltalake import DeltaTable

    assert DeltaTable(str(table.location)).metadata().configuration["delta.enableExpiredLogCleanup"] == "false"


def test_failed_write_leaves_no_version(table, monkeypatch):
    table.append(_rows("a"), METADATA)

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights_store.location.os.fsync", full_disk)
    with pytest.raises(StoreError, match="No space left on device; nothing became visible"):
        table.append(_rows("b"), METADATA)
    assert table.version() == 0
