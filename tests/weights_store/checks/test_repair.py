import json
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tokenweights import main
from weights_store import WeightStore
from weights_store.checks.repair import apply_repair, find_repairs
from weights_store.checks.vacuum import vacuum
from weights_store.checks.verify import verify
from weights_store.errors import ConflictError, DamageError, NotFoundError, StoreError
from weights_store.schemas import LOGPS
from weights_store.tables.commits import ENTRY, log_name
from weights_store.tables.compaction import optimize
from weights_store.tables.locks import without_writers

PATH = "logps/hh/ref"


def rows(*pair_ids):
    return pa.Table.from_pylist(
        [{"pair_id": p, "chosen_logps": [-1.0, -0.5], "rejected_logps": [-2.0]} for p in pair_ids], LOGPS
    )


def fill(uri):
    """Versions 0..2 add a, b and c, 3 compacts them, 4 adds d, 5 adds e."""
    table = WeightStore(uri).table(PATH)
    for name in "abc":
        table.append(rows(name), {"fingerprint": name})
    optimize(table)
    for name in "de":
        table.append(rows(name), {"fingerprint": name})
    return table


@pytest.fixture
def table(tmp_path):
    return fill(tmp_path / "store")


def content(table, version=None):
    return sorted(table.scan(version).collect()["pair_id"])


def repaired(table):
    """Repair the store and check that it is whole and can grow; return what had to be done."""
    store = WeightStore(table.root.uri)
    (repair,) = find_repairs(store)
    apply_repair(store, repair)
    assert list(find_repairs(store)) == []
    assert list(verify(store)) == []
    table.append(rows("z"), {"fingerprint": "z"})
    assert "z" in content(table)
    return repair


def checkpoint_of(table):
    from deltalake import DeltaTable

    DeltaTable(str(table.location)).create_checkpoint()
    return next((table.location.path / "_delta_log").glob("*.checkpoint.parquet"))


def test_a_store_that_is_whole_needs_no_repair(table, capsys):
    checkpoint_of(table)
    assert list(find_repairs(WeightStore(table.root.uri))) == []
    assert main(["repair", "--store", table.root.uri]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_a_table_that_names_a_missing_shard_can_be_appended_to_again(store_uri):
    table = fill(store_uri)
    lost = table.shards(4)[-1]
    table.location.delete(lost)
    with pytest.raises(DamageError, match="is missing"):
        table.append(rows("d", "f"), {"fingerprint": "f"})
    repair = repaired(table)
    assert (repair.newest, repair.kept, repair.num_rows, repair.num_rows_kept) == (5, 3, 5, 3)
    assert list(repair.dropped) == [5, 4]
    assert lost in repair.dropped[4]
    assert content(table) == ["a", "b", "c", "z"]
    assert (table.version(), content(table, 2)) == (4, ["a", "b", "c"])


def test_what_is_dropped_is_kept_aside_and_can_be_put_back(table):
    before = {path.name: path.read_bytes() for path in table.location.path.rglob("*") if path.is_file()}
    entry = table.location.path / log_name(5)
    whole = entry.read_bytes()
    entry.write_bytes(whole.replace(b"numRecords", b"numRecordt"))
    (repair,) = find_repairs(WeightStore(table.root.uri))
    aside = table.root.path / apply_repair(WeightStore(table.root.uri), repair)
    assert content(table) == ["a", "b", "c", "d"]
    moved = [path for path in aside.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(aside).as_posix() for path in moved) == sorted(repair.files)
    for path in moved:
        path.rename(table.location.path / path.relative_to(aside))
    entry.write_bytes(whole)
    assert {path.name: path.read_bytes() for path in table.location.path.rglob("*") if path.is_file()} == before
    assert content(table) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00" * 100, None])
def test_an_entry_that_cannot_be_read_ends_the_log_before_it(table, damage):
    entry = table.location.path / log_name(4)
    entry.unlink() if damage is None else entry.write_bytes(damage)
    repair = repaired(table)
    assert (repair.kept, repair.num_rows) == (3, None)
    assert content(table) == ["a", "b", "c", "z"]


@pytest.mark.parametrize("damage", ["cut", "gone", "of another version"])
def test_a_damaged_checkpoint_goes_and_every_version_stays(table, damage):
    earlier = checkpoint_of(table).read_bytes()
    checkpoint = table.location.path / "_delta_log" / f"{5:020d}.checkpoint.parquet"
    assert checkpoint.exists()
    table.append(rows("f"), {"fingerprint": "f"})
    if damage == "gone":
        checkpoint.unlink()
    elif damage == "cut":
        checkpoint.write_bytes(earlier[:-30])
    else:
        checkpoint_of(table)
        newer = checkpoint.with_name(f"{6:020d}.checkpoint.parquet")
        checkpoint.write_bytes(newer.read_bytes())
    repair = repaired(table)
    assert (repair.kept, repair.dropped) == (6, {})
    assert content(table) == ["a", "b", "c", "d", "e", "f", "z"]


def test_a_hint_at_a_checkpoint_that_is_not_there_goes(table):
    hint = table.location.path / "_delta_log" / "_last_checkpoint"
    hint.write_text('{"version":77,"size":3}')
    with pytest.raises(StoreError, match="`tokenweights verify logps/hh/ref` says what is wrong"):
        table.version()
    assert repaired(table).files == ["_delta_log/_last_checkpoint"]


def test_a_table_without_any_whole_version_goes_aside_and_is_built_again(table):
    table.location.delete(table.shards(0)[0])
    for version in range(3, 6):
        (table.location.path / log_name(version)).write_text("{")
    (repair,) = find_repairs(WeightStore(table.root.uri))
    assert (repair.kept, repair.num_rows_kept) == (None, 0)
    apply_repair(WeightStore(table.root.uri), repair)
    assert not table.exists()
    table.append(rows("a"), {"fingerprint": "a"})
    assert content(table) == ["a"]


def test_a_kill_in_the_middle_is_mended_by_another_repair(table):
    checkpoint_of(table)
    (table.location.path / table.shards(4)[-1]).unlink()
    store = WeightStore(table.root.uri)
    (whole,) = find_repairs(store)
    for count in range(1, len(whole.files)):
        store.root.move(f"{PATH}/{whole.files[0]}", f"aside/{PATH}/{count}/{whole.files[0]}")
        found = list(find_repairs(store))
        whole = found[0] if found else whole
        if not found:
            break
        assert (count, found[0].kept) == (count, 3)
    assert content(table) == ["a", "b", "c"]
    assert list(verify(store)) == []


def test_the_command_says_what_is_lost_and_moves_only_with_yes(table, capsys):
    lost = table.shards(5)[-1]
    table.location.delete(lost)
    assert main(["repair", "--store", table.root.uri]) == 0
    out = capsys.readouterr().out
    assert "logps/hh/ref: back from version 5 to 4, its newest whole one" in out
    assert f"version 5 is dropped: logps/hh/ref: shard {lost} is missing" in out
    assert "4 rows are kept of 5 in version 5" in out
    assert "would move 1 file" in out
    assert table.version() == 5
    assert main(["repair", PATH, "--store", table.root.uri, "--yes"]) == 0
    assert "moved 1 file to aside/logps/hh/ref/" in capsys.readouterr().out
    assert table.version() == 4


def test_versions_with_the_same_damage_are_one_line(table, capsys):
    lost = table.shards(4)[-1]
    table.location.delete(lost)
    assert main(["repair", "--store", table.root.uri]) == 0
    assert f"versions 4..5 are dropped: logps/hh/ref: shard {lost} is missing\n" in capsys.readouterr().out


def test_a_table_that_is_not_there_is_refused(table):
    with pytest.raises(NotFoundError, match="no table logps/hh/none in"):
        list(find_repairs(WeightStore(table.root.uri), ["logps/hh/none"]))


def test_a_vacuum_beside_a_writer_costs_its_commit_and_no_table(table):
    shards = table.write_shards(rows("f", "g"))
    vacuum(WeightStore(table.root.uri), retention_hours=0, dry_run=False, risk_running_builds=True)
    with pytest.raises(StoreError, match=r"shard .* is no longer in .*vacuum.*; nothing became visible, run again"):
        table.append_shards(shards, {"fingerprint": "f"})
    assert content(table) == ["a", "b", "c", "d", "e"]
    assert list(verify(WeightStore(table.root.uri))) == []
    table.append(rows("f"), {"fingerprint": "f"})


def damage_entry(table, version):
    """Change our part of an entry so that Delta's readers see nothing of it."""
    entry = table.location.read(log_name(version))
    table.location.write(log_name(version), entry.replace(b"tokenweightsSha256", b"tokenweightsSha257"))


def test_an_old_entry_that_the_newest_version_does_not_need_costs_no_row(store_uri, capsys):
    damage_entry(fill(store_uri), 1)  # version 3 has its rows in another shard
    table = WeightStore(store_uri).table(PATH)
    assert content(table) == ["a", "b", "c", "d", "e"]
    store = WeightStore(table.root.uri)
    assert [(found.version, found.is_note) for found in verify(store)] == [(1, False)]
    (repair,) = find_repairs(store)
    assert (repair.kept, repair.num_rows_kept, repair.files, list(repair.unreadable)) == (5, 5, [], [1])
    assert main(["repair", "--store", table.root.uri, "--yes"]) == 0
    out = capsys.readouterr().out
    assert "version 1 stays damaged: its commit cannot be read: " in out
    assert "nothing to repair" in out
    table.append(rows("a", "f"), {"fingerprint": "f"})
    assert content(table) == ["a", "b", "c", "d", "e", "f"]
    assert main(["repair", "--store", table.root.uri]) == 0


def test_an_entry_that_is_still_needed_ends_the_log_before_it(table):
    damage_entry(table, 4)
    with pytest.raises(DamageError, match=f"{log_name(4)} is damaged: KeyError"):
        table.records()
    assert (repaired(table).kept, content(table)) == (3, ["a", "b", "c", "z"])


def test_an_entry_that_delta_needs_ends_the_log_before_it(table):
    (table.location.path / log_name(1)).write_text("{")
    with pytest.raises(StoreError, match="cannot open"):
        table.records()
    repair = repaired(table)
    assert (repair.kept, repair.dropped[5].partition(":")[0]) == (0, "version 1")


def test_a_version_that_a_checkpoint_replaces_is_kept(table):
    checkpoint_of(table)
    entry = table.location.path / log_name(1)
    entry.write_text("{")
    assert content(table) == ["a", "b", "c", "d", "e"]
    (repair,) = find_repairs(WeightStore(table.root.uri))
    assert (repair.kept, repair.files, list(repair.unreadable)) == (5, [], [1])


def test_a_version_of_another_program_is_dropped(table):
    from deltalake import DeltaTable

    DeltaTable(str(table.location)).alter.set_table_properties({"delta.logRetentionDuration": "interval 30 days"})
    with pytest.raises(StoreError, match="logps/hh/ref@6 .* was not written by tokenweights.* `tokenweights repair"):
        table.append(rows("f"), {"fingerprint": "f"})
    repair = repaired(table)
    assert (repair.kept, repair.dropped) == (5, {6: "it was not written by tokenweights"})


def test_a_table_of_another_program_stays_where_it_is(table):
    from deltalake import write_deltalake

    write_deltalake(f"{table.root.uri}/weights/theirs", rows("a"))
    assert list(find_repairs(WeightStore(table.root.uri))) == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file of Linux that gives EIO")
@pytest.mark.parametrize("what", ["shard", "entry", "checkpoint"])
def test_what_the_disk_does_not_give_now_is_not_dropped(table, what):
    checkpoint = checkpoint_of(table)
    shard, entry = table.location.path / table.shards()[-1], table.location.path / log_name(4)
    path = {"shard": shard, "entry": entry, "checkpoint": checkpoint}[what]
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to("/proc/self/mem")  # its first page cannot be read: EIO, like a bad sector
    store = WeightStore(table.root.uri)
    with pytest.raises(StoreError, match=r"cannot read .*Input/output error") as raised:
        list(find_repairs(store))
    assert not isinstance(raised.value, DamageError)
    assert any("Input/output error" in found.problem for found in verify(store))
    path.unlink()
    path.write_bytes(whole)
    assert list(find_repairs(store)) == []


def test_a_version_of_a_newer_tokenweights_is_not_dropped(table, monkeypatch):
    monkeypatch.setattr("weights_store.tables.table.SCHEMA_VERSION", 99)
    table.append(rows("f"), {"fingerprint": "f"})
    with pytest.raises(StoreError, match="upgrade tokenweights"):
        list(find_repairs(WeightStore(table.root.uri)))


def test_a_table_without_its_first_entry_is_no_new_table(table):
    (table.location.path / log_name(0)).unlink()
    with pytest.raises(
        StoreError, match="cannot open logps/hh/ref .*`tokenweights repair logps/hh/ref` what can be kept"
    ):
        table.append(rows("f"), {"fingerprint": "f"})
    (repair,) = find_repairs(WeightStore(table.root.uri))
    assert repair.kept is None


def test_a_gap_in_the_log_is_one_short_line(table):
    (table.location.path / log_name(4)).unlink()
    with pytest.raises(
        StoreError, match=r"Expected contiguous commit files, but found gap; `tokenweights verify"
    ) as raised:
        table.version()
    assert len(str(raised.value)) < 350


def test_a_repair_that_was_found_before_another_commit_moves_nothing(table):
    store, shard = WeightStore(table.root.uri), table.location.path / table.shards()[-1]
    whole = shard.read_bytes()
    shard.unlink()
    (repair,) = find_repairs(store)
    shard.write_bytes(whole)
    table.append(rows("f"), {"fingerprint": "f"})
    with pytest.raises(ConflictError, match="nothing was moved, run again"):
        apply_repair(store, repair)
    assert content(table) == ["a", "b", "c", "d", "e", "f"]


def test_a_commit_that_waits_for_a_repair_leaves_no_gap(table):
    shards, done = table.write_shards(rows("f")), []
    base = table.version()

    def write():
        try:
            table.commit(shards, {"fingerprint": "f"}, base)
        except StoreError as error:
            done.append(str(error))

    with without_writers(table.location):
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.5)  # it waits for the lock
        table.root.move(f"{PATH}/{log_name(base)}", f"aside/{PATH}/{log_name(base)}")
    writer.join(20)
    assert len(done) == 1
    assert "`tokenweights repair` moved version 5 away" in done[0]
    names = sorted(path.name for path in (table.location.path / "_delta_log").iterdir())
    assert [int(match[1]) for name in names if (match := ENTRY.fullmatch(name))] == [0, 1, 2, 3, 4]


def test_a_hint_at_a_checkpoint_that_a_writer_has_just_made_is_right(table):
    from weights_store.checks.files import check_summaries
    from weights_store.checks.log import read_log

    log = read_log(table)
    checkpoint_of(table)
    assert json.loads((table.location.path / "_delta_log" / "_last_checkpoint").read_text())["version"] == 5
    assert list(check_summaries(log)) == []


def test_a_shard_that_vacuum_took_while_its_writer_lost_a_race_is_not_called_damaged(table, monkeypatch):
    shards = table.write_shards(rows("e", "f"))
    real = type(table)._checked_version

    def after_vacuum(self):
        self.location.delete(shards[0].name)
        return real(self)

    monkeypatch.setattr(type(table), "_checked_version", after_vacuum)
    with pytest.raises(StoreError, match="is no longer in .*nothing became visible, run again") as raised:
        table.append_shards(shards, {"fingerprint": "f"})
    assert not isinstance(raised.value, DamageError)


def test_a_checkpoint_that_only_delta_cannot_read_goes(table):
    checkpoint = checkpoint_of(table)
    data = checkpoint.read_bytes()
    at = data.index(b"elementType")
    checkpoint.write_bytes(data[:at] + b"\xff" + data[at + 1 :])  # in the schema: the names of files are as they were
    with pytest.raises(StoreError, match="cannot open"):
        table.append(rows("f"), {"fingerprint": "f"})
    repair = repaired(table)
    assert (repair.kept, len(repair.files)) == (5, 2)
    assert content(table) == ["a", "b", "c", "d", "e", "z"]
