"""Damage to the log of a table, one entry or checkpoint at a time: who reads it, and what `verify` says."""

import json
import shutil

import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.checks.log import read_log
from weights_store.checks.verify import verify
from weights_store.errors import DamageError, StoreError
from weights_store.schemas import LOGPS, WEIGHTS
from weights_store.tables.commits import digest, log_name
from weights_store.tables.compaction import optimize

PATH = "logps/hh/ref"


def rows(*pair_ids):
    return pa.Table.from_pylist(
        [{"pair_id": p, "chosen_logps": [-1.0, -0.5], "rejected_logps": [-2.0]} for p in pair_ids], LOGPS
    )


@pytest.fixture
def table(tmp_path):
    """Versions 0..2 add a, b and c, 3 compacts them, 4 adds d."""
    table = WeightStore(tmp_path / "store").table(PATH)
    for name in "abc":
        table.append(rows(name), {"fingerprint": name})
    optimize(table)
    table.append(rows("d"), {"fingerprint": "d"})
    return table


def entry(table, version):
    return table.location.path / log_name(version)


def edit(table, version, old, new):
    text = entry(table, version).read_text()
    assert old in text
    entry(table, version).write_text(text.replace(old, new, 1))


def findings(table):
    return [f for f in verify(WeightStore(table.root.uri)) if not f.is_note]


def readers(table, version=None):
    """Every way to the rows or the shards of a version, and appends."""
    more = {} if version is not None else {"append": lambda: table.append(rows("e"), {"fingerprint": "e"})}
    return more | {
        "records": lambda: table.records(version),
        "shards": lambda: table.shards(version),
        "scan": lambda: table.scan(version).collect(),
        "batches": lambda: list(table.batches(version)),
    }


def assert_refused(table, version=None):
    for name, read in readers(table, version).items():
        with pytest.raises(DamageError):
            pytest.fail(f"{name} has read {read()}")


def as_before(table):
    """Turn every entry into one of a store from before entries said anything of the log."""
    for path in sorted(entry(table, 0).parent.glob("*.json")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for info in (line["commitInfo"] for line in lines if "commitInfo" in line):
            metadata = json.loads(info["tokenweights"])
            del metadata["log"]
            info["tokenweights"] = json.dumps(metadata)
            info["tokenweightsSha256"] = digest(info["tokenweights"], info["tokenweightsShards"])
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def test_a_commit_says_what_the_version_is_made_of(table):
    names = table.shards()
    log = table.metadata()["log"]
    assert (log["version"], log["num_rows"], log["removed"]) == (4, 4, [])
    assert log["base"] == json.loads(entry(table, 3).read_text().splitlines()[0])["commitInfo"]["tokenweightsSha256"]
    assert table.metadata(3)["log"]["removed"] == sorted(shard for v in range(3) for shard in table.shards(v)[-1:])
    assert (table.num_rows(), len(names), table.num_rows(1)) == (4, 2, 2)
    assert table.history()[0].timestamp_ms == log["written_ms"]


def test_a_changed_removal_is_refused_and_named(table):
    removed = table.metadata(3)["log"]["removed"][0]
    edit(table, 3, f'"remove":{{"path":"{removed}', f'"remove":{{"path":"{removed[:-9]}x{removed[-8:]}')
    assert_refused(table)
    (found,) = findings(table)
    assert found.version == 3
    assert "it removes 3 files and records 3, which differ" in found.problem
    assert table.scan(2).collect()["pair_id"].to_list() == ["a", "b", "c"]


def test_a_removal_that_is_gone_doubles_no_row(table):
    lines = entry(table, 3).read_text().splitlines()
    entry(table, 3).write_text("\n".join(line for line in lines if '"remove"' not in line) + "\n")
    assert_refused(table)
    assert [found.version for found in findings(table)] == [3]


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 4), (3, 4)])
def test_exchanged_entries_are_refused_and_named(table, one, other):
    texts = [entry(table, version).read_text() for version in (one, other)]
    entry(table, one).write_text(texts[1])
    entry(table, other).write_text(texts[0])
    assert_refused(table, one)
    found = findings(table)
    assert [f.version for f in found] == [one, other]
    assert f"it is the entry of {PATH}@{other}: entries were exchanged or copied" in found[0].problem


def test_a_copied_entry_is_refused_and_named(table):
    shutil.copy(entry(table, 1), entry(table, 2))
    assert_refused(table, 2)
    assert [found.version for found in findings(table)] == [2]


def test_an_entry_of_another_table_is_refused_and_named(table):
    other = WeightStore(table.root.uri).table("logps/hh/other")
    for name in "abc":
        other.append(rows(name), {"fingerprint": name})
    shutil.copy(entry(other, 1), entry(table, 1))
    assert_refused(table, 1)
    with pytest.raises(DamageError, match="it is the entry of logps/hh/other@1: entries were exchanged or copied"):
        table.read_commit(1)
    assert [found.version for found in findings(table)] == [1]


def test_an_entry_of_another_history_is_named_and_not_the_newest(table, tmp_path):
    other = WeightStore(tmp_path / "other").table(PATH)
    other.append(rows("a"), {"fingerprint": "a"})
    other.append(rows("z"), {"fingerprint": "z"})
    shutil.copy(entry(other, 1), entry(table, 1))
    shutil.copy(other.location.path / other.shards()[-1], table.location.path)
    found = findings(table)
    assert [f.version for f in found] == [1]
    assert "is not the one that version 2 was made from" in found[0].problem
    with pytest.raises(DamageError, match="is not the one that version 2 was made from"):
        table.history()
    assert_refused(table, 2)


def test_an_entry_that_lost_what_is_ours_ends_no_history(table):
    edit(table, 1, '"commitInfo"', '"commitInfp"')
    with pytest.raises(DamageError, match=r"000001.json is damaged: it holds \['commitInfp'\]"):
        table.history()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"size":2', '"size":3'),
        ('"partitionValues":{}', '"partitionValues":{"split":"a"}'),
        ('\\"numRecords\\": 1', '\\"numRecords\\": 0'),
        ('\\"minValues\\": {\\"pair_id\\": \\"b', '\\"minValues\\": {\\"pair_id\\": \\"c'),
        ('\\"nullCount\\": {\\"pair_id\\": 0', '\\"nullCount\\": {\\"pair_id\\": 1'),
        ('\\"maxValues\\"', '\\"maxValuet\\"'),
    ],
)
@pytest.mark.parametrize("is_weaker", [False, True])
def test_what_delta_readers_are_told_of_replaced_files_is_compared(table, old, new, is_weaker):
    if is_weaker:
        as_before(table)
        old = old.replace(":", ": ", 1) if not old.startswith("\\") else old
    edit(table, 1, old, new)
    assert [found.version for found in findings(table)] == [1]
    assert_refused(table, 1)


def test_a_store_from_before_is_read_and_said_to_be_of_the_weaker_kind(table):
    as_before(table)
    notes = list(verify(WeightStore(table.root.uri)))
    assert [note.is_note for note in notes] == [True]
    assert "versions up to 4 are of an older tokenweights" in notes[0].problem
    assert table.scan().collect()["pair_id"].sort().to_list() == list("abcd")
    table.append(rows("e"), {"fingerprint": "e"})
    assert (table.num_rows(), table.metadata()["log"]["num_rows"]) == (5, 5)
    assert not findings(table)


def test_a_removal_of_what_was_never_there_is_found_in_a_store_from_before(table):
    as_before(table)
    removed = table.read_commit(3).removed[0]
    edit(table, 3, f'"path": "{removed}', f'"path": "{removed[:-9]}x{removed[-8:]}')
    found = findings(table)[0]
    assert (found.version, found.problem.partition(",")[0]) == (3, f"it removes {removed[:-9]}x{removed[-8:]}")


def test_an_entry_that_stands_twice_is_found_in_a_store_from_before(table):
    as_before(table)
    shutil.copy(entry(table, 1), entry(table, 2))
    (found,) = findings(table)
    assert (found.version, "which version 1 added: entries were copied" in found.problem) == (2, True)


def test_a_log_that_is_damaged_is_still_read_whole(table):
    edit(table, 0, "tokenweightsSha256", "tokenweightsSha257")
    log = read_log(table)
    assert (sorted(log.commits), sorted(log.problems)) == ([1, 2, 3, 4], [0])


def test_rows_that_no_removal_took_away_reach_no_training_in_a_store_from_before(tmp_path):
    # Their entries say nothing of removals, but weights say how many pairs they have.
    table = WeightStore(tmp_path / "store").table("weights/hh/tis")
    one_number = {"pair_weight": [1.0], "split": ["train"]}
    one_list = {field.name: [[1]] for field in WEIGHTS if field.name not in ("pair_id", *one_number)}
    for name in "ab":
        row = pa.table({"pair_id": [name], **one_list, **one_number, "chosen_score": [1.0], "rejected_score": [1.0]})
        table.replace(row.select(WEIGHTS.names), {"fingerprint": name, "statistics": {"num_pairs": 1}})
    as_before(table)
    assert table.records()[0].num_rows == 1
    lines = entry(table, 1).read_text().splitlines()
    entry(table, 1).write_text("\n".join(line for line in lines if '"remove"' not in line) + "\n")
    with pytest.raises(
        DamageError, match=r"^weights/hh/tis@1 in .*: its shards have 2 rows, 1 were committed: an earlier"
    ):
        table.records()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"dataChange", b"dataChangf"), (b"engineInfo", b"engine\xffnfo"), (b"numRecords", b"numRecord\xff")],
)
def test_an_entry_that_only_delta_cannot_read_is_found_behind_a_checkpoint(table, old, new):
    from deltalake import DeltaTable

    path = entry(table, 2)
    assert old in path.read_bytes()
    DeltaTable(str(table.location)).create_checkpoint()  # newer versions no longer need the entry
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert table.scan().collect().height == 4
    with pytest.raises(StoreError):
        table.scan(2)
    assert findings(table)


def test_a_damaged_entry_stops_readers_of_a_store_from_before_even_if_its_rows_were_replaced(table):
    as_before(table)
    edit(table, 2, "tokenweightsSha256", "tokenweightsSha257")  # nothing says whether it also removed something
    for read in (table.records, table.scan, lambda: list(table.batches())):
        with pytest.raises(DamageError, match=f"{log_name(2)} is damaged"):
            read()
