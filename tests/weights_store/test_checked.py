"""Whoever reads through the store reads what was committed, or is told."""

import pyarrow.parquet as pq
import pytest

from tokenweights import main
from weights_store.errors import DamageError

NAME = "hh-harmless/tis-dpo"


READERS = {
    "scan": lambda store, folder: store.scan(NAME, checked=True).collect(),
    "scan_tokens": lambda store, folder: store.scan_tokens(NAME, checked=True).collect(),
    "diff": lambda store, folder: store.diff(NAME, "hh-harmless/reversed"),
    "export": lambda store, folder: store.export(NAME, folder / "out"),
    "jsonl": lambda store, folder: store.export(NAME, folder / "out", format="jsonl"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_changed_weight_reaches_no_reader(small_store, flip_silently, tmp_path, read):
    table = small_store.table(f"weights/{NAME}")
    flip_silently(table, "chosen_token_weights")
    with pytest.raises(DamageError, match=rf"^weights/{NAME}.*shard {table.shards()[-1]}.* is not "):
        read(small_store, tmp_path)


def test_show_ends_with_one_line_if_the_rows_that_it_shows_are_not_what_was_committed(
    small_store, flip_silently, capsys
):
    flip_silently(small_store.table(f"weights/{NAME}"), "chosen_token_weights", version=0)
    assert main(["show", NAME, "--store", str(small_store.uri)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: weights/hh-harmless/tis-dpo, shard ")
    assert error.count("\n") == 1


def test_tokens_are_read_from_checked_log_probs(small_store, flip_silently):
    parents = {parent["role"]: parent for parent in small_store.metadata(NAME)["parents"]}
    path = parents["positive_logps"]["table"]
    flip_silently(small_store.table(path), "rejected_logps", parents["positive_logps"]["version"])
    with pytest.raises(DamageError, match=f"^{path} "):
        small_store.scan_tokens(NAME, checked=True)
    assert small_store.scan_tokens(NAME).collect().height == 21


def test_a_plain_scan_compares_nothing(small_store, flip_silently):
    # What the docs say of the frames of users: fast, and only `verify` or `checked` find damage.
    before = small_store.scan(NAME).collect()
    flip_silently(small_store.table(f"weights/{NAME}"), "chosen_token_weights")
    assert not small_store.scan(NAME).collect().equals(before)


def test_a_shard_is_read_again_if_its_file_has_changed(small_store, flip_silently):
    table = small_store.table(f"weights/{NAME}")
    assert table.scan().collect().height == 4
    flip_silently(table, "rejected_token_weights")
    with pytest.raises(DamageError):
        table.scan()


def test_a_shard_is_hashed_once_per_process(small_store, monkeypatch):
    streamed = []
    stream = type(small_store.root).stream
    monkeypatch.setattr(
        type(small_store.root), "stream", lambda self, name: streamed.append(name) or stream(self, name)
    )
    table = small_store.table(f"weights/{NAME}")
    for _ in range(3):
        table.scan().collect()
    # `d` was appended to rows that its writer, this process, had to look at.
    assert streamed == table.shards()[-1:]


def test_only_the_shards_of_a_range_of_keys_are_read(small_store, flip_silently):
    from weights_store.tables.key_ranges import KeyRange

    table = small_store.table(f"weights/{NAME}")
    flip_silently(table, "chosen_token_weights")  # of the shard with `d` alone
    assert table.scan(within=KeyRange("a", "d")).collect()["pair_id"].sort().to_list() == ["a", "b", "c"]
    assert table.scan(within=KeyRange.between("a", "c")).collect()["pair_id"].sort().to_list() == ["a", "b", "c"]
    for within in (KeyRange("d", None), KeyRange.between("c", "d")):
        with pytest.raises(DamageError):
            table.scan(within=within)


def test_a_doubled_row_is_not_published_twice_because_a_key_is_damaged(small_store, flip_silently):
    table = small_store.table(f"weights/{NAME}")
    path = table.location.path / table.shards()[-1]
    again = pq.read_table(path).cast(table.schema)
    flip_silently(table, "pair_id")
    with pytest.raises(DamageError):
        table.append(again, {"fingerprint": "f"})
    assert table.version() == 1


def test_a_column_that_the_footer_has_lost_is_damage(small_store):
    table = small_store.table(f"weights/{NAME}")
    path = table.location.path / table.shards()[0]
    path.write_bytes(
        path.read_bytes().replace(b"chosen_token_weights", b"chosen_token_weightz", 1)
    )  # the schema's name
    with pytest.raises(DamageError, match="cannot be decoded"):
        list(table.batches(columns=["pair_id", "chosen_token_weights"]))
