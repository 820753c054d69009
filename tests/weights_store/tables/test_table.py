import multiprocessing
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights_store import WeightStore
from weights_store.errors import ConflictError, DamageError, NotFoundError, SettingsError, StoreError
from weights_store.schemas import LOGPS, QUARANTINE, SCHEMA_VERSION
from weights_store.tables.compaction import optimize
from weights_store.tables.notes import NOT_A_VERSION

METADATA = {"fingerprint": "f0", "statistics": {"num_pairs": 1}}


def _rows(*pair_ids, value=-1.0):
    logps = {"chosen_logps": [value], "rejected_logps": [-2.0]}
    return pa.Table.from_pylist([{"pair_id": pair_id, **logps} for pair_id in pair_ids], LOGPS)


@pytest.fixture
def table(store_uri):
    return WeightStore(store_uri).table("logps/toy/x")


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


def test_the_order_of_rows_is_that_of_the_commits_and_of_their_writers_whatever_clocks_say(table, monkeypatch):
    clock = iter(range(10**18, 0, -1))
    monkeypatch.setattr("weights_store.tables.shards.time.time_ns", lambda: next(clock))

    def shard(name):
        writer = table.writer()
        writer.write(_rows(name))
        return writer.finish()

    for base, names in enumerate(("fg", "a", "db")):
        table.commit([record for name in names for record in shard(name)], METADATA, base - 1 if base else None)
    assert [record.first_key for record in table.records()] == ["f", "g", "a", "d", "b"]
    assert [record.first_key for record in table.records(1)] == ["f", "g", "a"]
    assert [batch["pair_id"][0].as_py() for batch in table.batches()] == ["f", "g", "a", "d", "b"]


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
    for use in (
        table.metadata,
        lambda: table.append(_rows("b"), METADATA),
        lambda: table.replace(_rows("b"), METADATA),
    ):
        with pytest.raises(
            StoreError, match="has schema version 2, this tokenweights reads up to 1; upgrade tokenweights"
        ):
            use()
    assert table.version() == 0


def test_table_of_somebody_else_is_refused(table):
    from deltalake import write_deltalake

    write_deltalake(str(table.location), _rows("a"), storage_options=table.location.storage_options)
    for look in (table.metadata, table.reference, table.records):
        with pytest.raises(StoreError, match="not written by tokenweights"):
            look()


def test_nothing_is_written_into_a_table_of_somebody_else(table):
    from deltalake import DeltaTable, write_deltalake

    options = table.location.storage_options
    write_deltalake(str(table.location), pa.table({"name": ["theirs"]}), storage_options=options)
    for write in (table.append, table.replace):
        with pytest.raises(StoreError, match="logps/toy/x@0 in .* was not written by tokenweights"):
            write(_rows("a"), METADATA)
    assert DeltaTable(str(table.location), storage_options=options).version() == 0
    assert len(table.location.files()) == 1


@pytest.mark.parametrize("path", ["logps/toy", "logps/toy/x/y"])
def test_a_table_inside_another_or_around_one_is_refused(store_uri, path):
    store = WeightStore(store_uri)
    store.table("logps/toy/x").append(_rows("a"), METADATA)
    with pytest.raises(StoreError, match=f"{path} and the table logps/toy/x in .* would be nested"):
        store.table(path).append(_rows("b"), METADATA)
    assert [table.path for table in store.tables("logps")] == ["logps/toy/x"]


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


def test_racing_writers_lose_no_pair_and_double_none(store_uri):
    # Three processes write overlapping pairs at once: p0..p8 from three sides.
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_range, args=(store_uri, start, start + 4)) for start in (0, 2, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    pair_ids = WeightStore(store_uri).table("logps/toy/x").pair_ids().to_list()
    assert sorted(pair_ids) == sorted(set(pair_ids)) == [f"p{index}" for index in range(9)]


def test_loser_of_the_race_for_the_first_version_tries_again(table):
    # As if another process had made version 0 between our look and our commit.
    table.append(_rows("a"), METADATA)
    with pytest.raises(ConflictError, match="another writer made version 0 first"):
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

    opened = DeltaTable(str(table.location), storage_options=table.location.storage_options)
    assert opened.metadata().configuration["delta.enableExpiredLogCleanup"] == "false"


def test_failed_write_leaves_no_version(tmp_path, monkeypatch):
    table = WeightStore(tmp_path).table("logps/toy/x")
    table.append(_rows("a"), METADATA)

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights_store.location.os.fsync", full_disk)
    with pytest.raises(StoreError, match="No space left on device; nothing became visible"):
        table.append(_rows("b"), METADATA)
    assert table.version() == 0
    assert {path.name for path in table.location.path.iterdir()} == {"_delta_log", NOT_A_VERSION, *table.shards()}


@pytest.mark.parametrize(
    ("column", "values", "text"),
    [
        ("pair_id", [None], "Casting field 'pair_id' with null values to non-nullable"),
        ("chosen_logps", [None], "Casting field 'chosen_logps' with null values to non-nullable"),
        ("chosen_logps", [["much"]], "Failed to parse string: 'much' as a scalar of type float"),
        ("rejected_logps", [[-1.0, None]], "have no value inside a list of column rejected_logps"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(table, column, values, text):
    columns = {name: [None] for name in LOGPS.names} | {
        "pair_id": ["a"],
        "chosen_logps": [[-1.0]],
        "rejected_logps": [[-2.0]],
    }
    columns[column] = values
    for write in (table.append, table.replace):
        with pytest.raises(StoreError, match=f"logps/toy/x: rows .*{text}"):
            write(pa.table(columns), METADATA)
    assert not table.exists()
    assert not table.location.files()


@pytest.mark.parametrize("version", [-1, 7, 2**70])
def test_versions_that_are_not_there_are_refused_alike(table, version):
    table.append(_rows("a"), METADATA)
    for use in (table.scan, table.metadata, table.reference, table.records, table.shards):
        with pytest.raises(NotFoundError, match=rf"logps/toy/x has no version {version}; it has 0\.\.0"):
            use(version)


def test_a_damaged_newest_entry_of_the_log_is_one_line(table):
    table.append(_rows("a"), METADATA)
    name = "_delta_log/00000000000000000000.json"
    table.location.write(name, table.location.read(name)[:-30])
    with pytest.raises(StoreError, match=r"^cannot open logps/toy/x in .*: [^\n]*Json error[^\n<]*$"):
        table.scan()


def test_many_commits_leave_checkpoints_and_opening_starts_from_them(tmp_path):
    # 250 versions without rows; delta-rs writes a checkpoint every 100 commits. With every log entry before the newest
    # checkpoint out of the way the table still opens and counts its rows: they are not read for it.
    table = WeightStore(tmp_path).table("logps/toy/x")
    table.append(_rows("a"), METADATA)
    for version in range(250):
        table.commit([], METADATA, version)
    log = table.location.path / "_delta_log"
    checkpoints = [int(path.name[:20]) for path in log.glob("*.checkpoint.parquet")]
    assert sorted(checkpoints) == [99, 199]
    for version in range(199):
        (log / f"{version:020d}.json").rename(log / f"{version:020d}.away")
    assert (table.version(), table.num_rows(), len(table.shards())) == (250, 1, 1)
    (log / "00000000000000000005.json").write_text('{"commitInfo":{"timest')
    with pytest.raises(
        DamageError, match=r"_delta_log/00000000000000000005.json is damaged: .*; restore it from a copy"
    ):
        table.history()


def test_a_store_can_lie_in_a_folder_of_any_name(tmp_path):
    for name in ("a b", "größe", "[x]*", "100%", "a#b", "c?d", "it's", "$&;=+~@:,"):
        table = WeightStore(tmp_path / name).table("logps/toy/x")
        table.append(_rows("a"), METADATA)
        table.append(_rows("a", "b"), METADATA, known=None)
        table.append(_rows("c"), METADATA, known=0)
        assert sorted(table.pair_ids()) == ["a", "b", "c"]
        assert table.num_rows(0) == 1
        assert optimize(table).version == 3
        assert [batch["pair_id"].to_pylist() for batch in table.batches()] == [["a", "b", "c"]]


@pytest.mark.parametrize("num_sorted", [0, 2400])
def test_key_ranges_part_the_rows_and_are_about_equally_large(tmp_path, monkeypatch, num_sorted):
    # 60 appends of one row group each whose keys all mix, as when pairs come in any order; then perhaps a large sorted one.
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 5000)
    rng = np.random.default_rng(0)
    table = WeightStore(tmp_path).table("logps/toy/x")
    ids = [f"{number:05d}" for number in rng.permutation(1200 + num_sorted)]
    for start in range(0, 1200, 20):
        table.append(_long_rows(ids[start : start + 20], rng), METADATA)
    if num_sorted:
        table.append(_long_rows(ids[1200:], rng), METADATA)
    max_bytes = 3 * sum(record.num_bytes for record in table.records()) // 12
    ranges = table.key_ranges(max_bytes)
    assert ranges[0].low is None
    assert ranges[-1].high is None
    assert [piece.high for piece in ranges[:-1]] == [piece.low for piece in ranges[1:]]
    parts = [piece.of(table.scan()).select("pair_id").collect()["pair_id"].to_list() for piece in ranges]
    assert sorted(pair_id for part in parts for pair_id in part) == sorted(ids)
    assert len(parts) >= 9
    assert max(map(len, parts)) <= 2 * len(ids) / 12


def _long_rows(pair_ids, rng):
    values = -rng.exponential(size=(len(pair_ids), 50)).astype(np.float32)
    return pa.table([pair_ids, list(values), [[-1.0]] * len(pair_ids), *[[None] * len(pair_ids)] * 4], schema=LOGPS)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    appends=st.lists(st.sets(st.integers(0, 200), min_size=1, max_size=30), min_size=1, max_size=6),
    max_bytes=st.integers(1, 5000),
)
def test_every_row_lies_in_exactly_one_key_range(tmp_path, appends, max_bytes):
    table = WeightStore(tmp_path / uuid.uuid4().hex).table("quarantine/toy")
    for rows in appends:
        columns = [sorted(rows), None, "no_prompt", "", "{}"]
        columns = [columns[0], *([value] * len(rows) for value in columns[1:])]
        table.append(pa.table(columns, schema=QUARANTINE), METADATA)
    parts = [
        piece.of(table.scan(), "source_row").collect()["source_row"].to_list() for piece in table.key_ranges(max_bytes)
    ]
    assert sorted(row for part in parts for row in part) == sorted(set().union(*appends))
