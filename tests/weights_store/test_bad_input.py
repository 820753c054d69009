"""What people do wrong, and disks: each is one clear line, and the table stays as it was."""

import multiprocessing

import numpy as np
import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.errors import NotFoundError, SettingsError, StoreError
from weights_store.schemas import LOGPS
from weights_store.tables.compaction import optimize

METADATA = {"fingerprint": "f0"}


def rows(*pair_ids, length=1):
    values = [list(-np.random.default_rng(0).exponential(size=length))] * len(pair_ids)
    return pa.table([list(pair_ids), values, [[-2.0]] * len(pair_ids), *[[None] * len(pair_ids)] * 4], schema=LOGPS)


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/../../b", "A", "a b", "", "a//b", "a/", ".hidden", "-x", "a\n", "ä"]
)
def test_wrong_names_are_refused_before_anything_is_looked_up(tmp_path, name):
    store = WeightStore(tmp_path / "nowhere")
    for use in (store.scan, store.resolve, store.history, store.metadata, lambda name: store.table(f"weights/{name}")):
        with pytest.raises(SettingsError, match="bad name .*: expected lower-case letters, digits"):
            use(name)


def test_wrong_versions_name_what_there_is(tmp_path):
    store = WeightStore(tmp_path)
    store.table("logps/toy/x").append(rows("a"), METADATA)
    with pytest.raises(NotFoundError, match=r"logps/toy/x has no version 1; it has 0\.\.0"):
        store.table("logps/toy/x").scan(1)


def test_a_table_that_is_not_there_names_the_command_that_lists(tmp_path):
    with pytest.raises(
        NotFoundError, match=rf"no table logps/toy/x in {tmp_path}; `tokenweights ls --store {tmp_path}` lists"
    ):
        WeightStore(tmp_path).table("logps/toy/x").scan()


def test_folders_with_other_things_hold_no_store(tmp_path):
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "sales"), pa.table({"amount": [1]}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        NotFoundError, match=f"no store at {tmp_path}: expected a folder that `tokenweights build` has written"
    ):
        WeightStore(tmp_path).list()


def test_other_things_beside_our_tables_do_not_disturb_the_listing(tmp_path):
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "weights/theirs"), pa.table({"amount": [1]}))
    (tmp_path / "weights/notes.txt").write_text("mine")
    (tmp_path / "weights/Other Things").mkdir()
    store = WeightStore(tmp_path)
    assert store.list().is_empty()
    with pytest.raises(StoreError, match="weights/theirs@0 in .* was not written by tokenweights"):
        store.metadata("theirs")


@pytest.mark.parametrize("where", ["", "logps", "logps/toy/x"])
def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, where):
    root = tmp_path / "store"
    file = root / where if where else root
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    table = WeightStore(root).table("logps/toy/x")
    assert not table.exists()
    with pytest.raises(StoreError, match=r"^cannot write logps/toy/x in [^\n]*; nothing became visible$"):
        table.append(rows("a"), METADATA)
    assert file.read_text() == "mine"


def test_a_read_only_folder_can_be_read_and_refuses_every_write(disk):
    folder, remount = disk
    table = WeightStore(folder).table("logps/toy/x")
    table.append(rows("a", "c"), METADATA)
    table.append(rows("b"), METADATA)
    remount("ro")
    for write in (
        lambda: table.append(rows("d"), METADATA),
        lambda: table.replace(rows("d"), METADATA),
        lambda: table.commit([], METADATA, 1),
        lambda: WeightStore(folder).table("logps/toy/new").append(rows("d"), METADATA),
        lambda: optimize(table),
    ):
        with pytest.raises(
            StoreError, match=r"^cannot write logps/toy/(x|new) in [^\n]*[Rr]ead-only[^\n]*nothing became visible$"
        ):
            write()
    assert (table.version(), sorted(table.pair_ids())) == (1, ["a", "b", "c"])
    assert not WeightStore(folder).table("logps/toy/new").exists()


def test_a_full_disk_leaves_the_table_as_it_was_wherever_it_strikes(disk):
    # The filler leaves 0, 4, 8 … KiB: first the shard does not fit, then its commit, at last both do.
    folder, _ = disk
    table = WeightStore(folder / "store").table("logps/toy/x")
    table.append(rows("a", "c"), METADATA)
    table.append(rows("b"), METADATA)
    filler, before = folder / "filler", set(table.location.files())
    num_failures, failed_at = 0, set()
    for free_bytes in range(0, 64 << 10, 4 << 10):
        fill(filler, free_bytes)
        for write in (lambda: table.append(rows("new", length=2000), METADATA), lambda: optimize(table)):
            version = table.version()
            error = refusal(write)
            if error is not None:
                assert "nothing became visible" in str(error)
                assert "\n" not in str(error)
                assert (table.version(), table.num_rows()) == (version, table.num_rows(version))
                num_failures += 1
                failed_at.add(len(set(table.location.files()) - before) > 0)
        if table.num_rows() == 4:
            break
    assert num_failures >= 2
    assert failed_at == {False, True}  # without and with a shard written that no commit names
    assert not [name for name in table.location.files() if name.endswith(".partial")]
    filler.unlink()
    table.append(rows("new", "last"), METADATA)
    assert sorted(table.pair_ids()) == ["a", "b", "c", "last", "new"]
    assert [sorted(table.pair_ids(version)) for version in (0, 1)] == [["a", "c"], ["a", "b", "c"]]


def refusal(write):
    try:
        write()
    except StoreError as error:
        return error
    return None


def fill(filler, free_bytes):
    """Fill the disk up but for `free_bytes`."""
    filler.unlink(missing_ok=True)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(file.tell() - free_bytes)


def append_in_batches(root, num_batches):
    table = WeightStore(root).table("logps/toy/x")
    for batch in range(num_batches):
        table.append(rows(*(f"{batch}-{index}" for index in range(10))), METADATA)
        if batch % 10 == 9:
            optimize(table)


def test_readers_see_whole_versions_while_another_process_writes(tmp_path):
    # 30 appends of 10 rows each with an optimize now and then: whatever is read is a multiple of 10 rows, and never less
    # than before.
    table = WeightStore(tmp_path).table("logps/toy/x")
    table.append(rows(*(f"first-{index}" for index in range(10))), METADATA)
    writer = multiprocessing.get_context("spawn").Process(target=append_in_batches, args=(tmp_path, 30))
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(table.num_rows())
        reference = table.reference()
        assert table.scan(reference.version).collect().height == sum(
            r.num_rows for r in table.records(reference.version)
        )
    writer.join(60)
    assert writer.exitcode == 0
    seen.append(table.num_rows())
    assert seen == sorted(seen)
    assert {count % 10 for count in seen} == {0}
    assert (seen[-1], len(set(seen)) > 3) == (310, True)
