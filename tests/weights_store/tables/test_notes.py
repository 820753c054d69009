"""What a store says in its folders to people and programs that do not know it."""

import os
import re
import time
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tests.weights_store.conftest import REVERSED, weight_rows
from weights_store import WeightStore
from weights_store.checks.vacuum import find_orphans, vacuum
from weights_store.checks.verify import verify
from weights_store.schemas import SCHEMAS
from weights_store.tables.notes import NOT_A_VERSION, README

NAME, PATH = "toy/tis", "weights/toy/tis"
METADATA = {"fingerprint": "f0"}


@pytest.fixture
def store(store_uri):
    store = WeightStore(store_uri)
    store.table(PATH).append(weight_rows("ab", REVERSED), METADATA)
    return store


def test_a_new_store_says_what_lies_where_and_that_a_folder_is_not_a_version(store):
    text = store.root.read(README).decode()
    assert all(f"`{kind}/" in text for kind in SCHEMAS)
    assert "The folder of a table is not a version of it" in text
    assert NOT_A_VERSION in text
    assert b"tokenweights path" in store.table(PATH).location.read(NOT_A_VERSION)


def test_the_notes_are_no_orphans_and_no_findings(store):
    store.table(PATH).replace(weight_rows("b", REVERSED), METADATA)
    assert list(find_orphans(store)) == []
    assert vacuum(store, retention_hours=0, dry_run=False, risk_running_builds=True) == []
    assert store.root.exists(README)
    assert store.table(PATH).location.exists(NOT_A_VERSION)
    assert list(verify(store)) == []


def test_a_vacuum_of_delta_leaves_old_versions_and_the_note(tmp_path):
    table = WeightStore(tmp_path).table(PATH)
    table.append(weight_rows("ab", REVERSED), METADATA)
    table.replace(weight_rows("b", REVERSED), METADATA)
    long_ago = time.time() - 400 * 86_400
    for file in table.location.path.glob("*.parquet"):
        os.utime(file, (long_ago, long_ago))
    opened = DeltaTable(str(table.location))
    assert opened.vacuum(dry_run=False, full=True) == []  # by its own default, what is older than a week
    with pytest.raises(DeltaError, match="minimum retention for vacuum is configured to be greater than 876000 hours"):
        opened.vacuum(retention_hours=168, dry_run=False)
    assert table.scan(0).collect().height == 2
    assert table.location.exists(NOT_A_VERSION)


def test_a_note_that_somebody_changed_stays_as_it_is(store):
    store.root.write(README, b"ours")
    store.table("weights/toy/other").append(weight_rows("a", REVERSED), METADATA)
    assert store.root.read(README) == b"ours"


def test_a_folder_that_had_a_readme_before_it_was_a_store_keeps_it(tmp_path):
    (tmp_path / README).write_text("# My project\n")
    store = WeightStore(tmp_path)
    store.table(PATH).append(weight_rows("a", REVERSED), METADATA)
    assert (tmp_path / README).read_text() == "# My project\n"


def test_the_files_of_a_version_are_absolute_and_in_stored_order(store):
    table = store.table(PATH)
    table.append(weight_rows("c", REVERSED), METADATA)
    table.replace(weight_rows("abcd", REVERSED), METADATA)
    first, added, replaced = (store.files(NAME, version) for version in range(3))
    assert (len(first), len(added), len(replaced)) == (1, 2, 1)
    assert added[0] == first[0]
    assert not {*added} & {*replaced}
    assert store.files(NAME) == replaced
    assert all(file.startswith(f"{store.root.absolute_uri}/{PATH}/") for file in (*added, *replaced))
    assert pl.read_parquet(added)["pair_id"].to_list() == ["a", "b", "c"]


def test_files_are_absolute_for_a_relative_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = WeightStore("here")
    store.table(PATH).append(weight_rows("a", REVERSED), METADATA)
    (file,) = store.files(NAME)
    assert file.startswith(f"{tmp_path}/here/")
    assert Path(file).is_file()


def test_the_code_of_the_readme_runs(small_store):
    text = (small_store.root.path / README).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(block.replace("stores/default", str(small_store.root)), names)
    assert names["weights"].collect().height == 4
    assert names["files"] == small_store.files("hh-harmless/tis-dpo", 0)
