"""Every pair stands exactly once, whatever happens between a look and a commit.

Interleavings are made in one process: what another writer does, and what goes wrong, happens inside the very call of
deltalake that commits. Real processes race at the end.
"""

import multiprocessing
import uuid
from itertools import pairwise
from unittest.mock import patch

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import create_table_with_add_actions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights_store import WeightStore
from weights_store.checks.vacuum import find_orphans
from weights_store.checks.verify import verify
from weights_store.errors import ConflictError, StoreError
from weights_store.schemas import LOGPS
from weights_store.tables.compaction import optimize

METADATA = {"fingerprint": "f0"}
PAIRS = [f"p{index}" for index in range(8)]


def rows(pair_ids, value):
    columns = [
        list(pair_ids),
        [[-float(value)]] * len(pair_ids),
        [[-1.0]] * len(pair_ids),
        *[[None] * len(pair_ids)] * 4,
    ]
    return pa.table(columns, schema=LOGPS)


def content(table, version=None):
    """`pair_id` -> value; fails when a pair stands twice."""
    found = table.scan(version).select("pair_id", "chosen_logps").collect().rows()
    assert len(dict(found)) == len(found)
    return {pair_id: -values[0] for pair_id, values in found}


class Commits:
    """Stands in for deltalake's two calls that commit: takes one of `waiting` for each call, then does the real thing."""

    def __init__(self):
        self.waiting = []

    def around(self, real):
        def commit(*args, **kwargs):
            happening = self.waiting.pop(0) if self.waiting else None
            return real(*args, **kwargs) if happening is None else happening(lambda: real(*args, **kwargs))

        return commit

    def __enter__(self):
        self.patches = [
            patch.object(DeltaTable, "create_write_transaction", self.around(DeltaTable.create_write_transaction)),
            patch("deltalake.transaction.create_table_with_add_actions", self.around(create_table_with_add_actions)),
        ]
        for one in self.patches:
            one.start()
        return self

    def __exit__(self, *_):
        for one in self.patches:
            one.stop()


@pytest.fixture
def commits():
    with Commits() as standing_in:
        yield standing_in


@pytest.fixture
def table(tmp_path):
    return WeightStore(tmp_path).table("logps/toy/x")


def lose_reply(commit):
    commit()
    raise CommitFailedError("connection reset by peer")


def lose_reply_as_os_error(commit):
    commit()
    raise OSError("connection reset by peer")


def fail_before(commit):
    raise CommitFailedError("no route to host")


@pytest.mark.parametrize("lost", [lose_reply, lose_reply_as_os_error])
@pytest.mark.parametrize("before", [[], ["a"]])
def test_a_commit_whose_reply_is_lost_counts_once_and_as_success(table, commits, before, lost):
    if before:
        table.append(rows(before, 1), METADATA)
    commits.waiting = [lost]
    reference = table.append(rows(["b"], 2), METADATA)
    assert reference.version == len(before)
    assert content(table) == {**dict.fromkeys(before, 1.0), "b": 2.0}


def test_a_replace_whose_reply_is_lost_is_a_success(table, commits):
    table.append(rows(["a"], 1), METADATA)
    commits.waiting = [lose_reply]
    assert table.replace(rows(["z"], 2), METADATA).version == 1
    assert content(table) == {"z": 2.0}


def test_an_optimize_whose_reply_is_lost_is_a_success(table, commits):
    for name in "ab":
        table.append(rows([name], 1), METADATA)
    table.append(rows(["0", "z"], 1), METADATA)
    commits.waiting = [lose_reply]
    assert optimize(table).version == 3
    assert sorted(content(table)) == ["0", "a", "b", "z"]


def test_a_commit_that_failed_before_it_was_made_leaves_nothing_and_can_be_repeated(table, commits):
    commits.waiting = [fail_before]
    with pytest.raises(StoreError, match="cannot write logps/toy/x in .*: no route to host; nothing became visible"):
        table.append(rows(["a"], 1), METADATA)
    assert not table.exists()
    assert table.append(rows(["a"], 1), METADATA).version == 0
    assert content(table) == {"a": 1.0}


def test_an_append_that_was_overtaken_by_a_replace_brings_back_what_the_replace_took(table, commits):
    # "a" was there when we looked; then somebody made the table hold only "z": after us it must hold "a" again.
    def overtaken(commit):
        table.replace(rows(["z"], 5), METADATA)
        commit()

    table.append(rows(["a"], 1), METADATA)
    commits.waiting = [overtaken]
    table.append(rows(["a", "b"], 2), METADATA)
    assert content(table) == {"a": 2.0, "b": 2.0, "z": 5.0}


def test_an_append_that_was_overtaken_by_an_optimize_doubles_nothing(table, commits):
    def overtaken(commit):
        table.append(rows(["c", "d"], 3), METADATA)
        assert optimize(table) is not None
        commit()

    table.append(rows(["a", "e"], 1), METADATA)
    commits.waiting = [overtaken]
    table.append(rows(["b", "c"], 2), METADATA, known=None)
    assert content(table) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 3.0, "e": 1.0}


def test_a_replace_that_was_overtaken_raises_and_changes_nothing(table, commits):
    def overtaken(commit):
        table.append(rows(["b"], 2), METADATA)
        commit()

    table.append(rows(["a"], 1), METADATA)
    commits.waiting = [overtaken]
    with pytest.raises(ConflictError, match="logps/toy/x: another writer made version 1 first; run again"):
        table.replace(rows(["z"], 3), METADATA)
    assert content(table) == {"a": 1.0, "b": 2.0}


def test_a_writer_that_always_loses_gives_up_with_a_count_and_writes_nothing(table, commits, monkeypatch):
    def overtaken(commit):
        table.append(rows([uuid.uuid4().hex], 2), METADATA)
        commit()

    monkeypatch.setattr("weights_store.tables.table.time.sleep", lambda _s: None)
    # Between two of ours stands the other's own commit.
    commits.waiting = [overtaken, *[None, overtaken] * 19]
    with pytest.raises(
        ConflictError, match="lost the race for the next version 20 times; run again when fewer processes write"
    ):
        table.append(rows(["a"], 1), METADATA)
    assert table.version() == 19
    assert "a" not in content(table)


def write_in_two_shards(table, pair_ids, value):
    """What two actors would write: the first two pairs, and the others."""
    parts = (pair_ids[:2], pair_ids[2:])
    return [record for part in parts if part for record in table.write_shards(rows(part, value))]


@pytest.mark.parametrize("before", [[], ["a"]])
def test_shards_that_were_overtaken_by_other_rows_are_committed_as_they_are(table, commits, before):
    def overtaken(commit):
        table.append(rows(["z"], 5), METADATA)
        commit()

    if before:
        table.append(rows(before, 1), METADATA)
    shards = write_in_two_shards(table, ["b", "c", "d"], 2)
    commits.waiting = [overtaken]
    reference = table.append_shards(shards, METADATA)
    assert reference.version == len(before) + 1
    assert content(table) == {**dict.fromkeys(before, 1.0), "b": 2.0, "c": 2.0, "d": 2.0, "z": 5.0}
    assert {shard.name for shard in shards} < {record.name for record in table.records()}


@pytest.mark.parametrize("before", [[], ["a"]])
def test_shards_that_were_overtaken_by_some_of_their_rows_leave_those_out(table, commits, before):
    def overtaken(commit):
        table.append(rows(["c", "z"], 5), METADATA)
        commit()

    if before:
        table.append(rows(before, 1), METADATA)
    shards = write_in_two_shards(table, ["b", "c", "d"], 2)
    commits.waiting = [overtaken]
    known = table.version()
    table.append_shards(shards, METADATA, known)
    assert content(table) == {**dict.fromkeys(before, 1.0), "b": 2.0, "c": 5.0, "d": 2.0, "z": 5.0}
    named = {record.name for record in table.records()}
    assert [shard.name in named for shard in shards] == [False, True]  # b and c were written anew without c
    assert list(verify(WeightStore(table.root.uri), [table.path])) == []
    assert [orphan.name for orphan in find_orphans(WeightStore(table.root.uri))] == [shards[0].name]


def test_shards_whose_rows_were_all_there_already_make_no_version(table, commits):
    def overtaken(commit):
        table.append(rows(["a", "b", "c"], 5), METADATA)
        commit()

    commits.waiting = [overtaken]
    assert table.append_shards(write_in_two_shards(table, ["a", "b", "c"], 2), METADATA).version == 0
    assert table.append_shards(write_in_two_shards(table, ["c"], 3), METADATA).version == 0
    assert content(table) == dict.fromkeys("abc", 5.0)


def test_a_shard_that_is_not_in_the_folder_is_refused(table):
    shards = write_in_two_shards(table, ["a", "b", "c"], 2)
    table.location.delete(shards[1].name)
    with pytest.raises(
        StoreError, match=f"shard {shards[1].name} was written, but is no longer in .*that all of them share"
    ):
        table.append_shards(shards, METADATA)
    assert not table.exists()


class Model:
    """What the table must hold: the first value committed of every pair, version by version."""

    def __init__(self, table, commits):
        self.table = table
        self.commits = commits
        self.versions = []

    @property
    def newest(self):
        return self.versions[-1] if self.versions else {}

    def append(self, pair_ids, value, use_known, as_shards, happenings):
        known = self.known_without(pair_ids) if use_known else None
        self.commits.waiting = [self.happening(*one) for one in happenings]
        try:
            self.add(pair_ids, value, known, as_shards)
        except StoreError:
            self.commits.waiting = []
            self.add(pair_ids, value, known, as_shards)  # a repeated stage
        self.commits.waiting = []
        self.took(dict.fromkeys(pair_ids, float(value)))

    def add(self, pair_ids, value, known, as_shards):
        if as_shards:
            shards = write_in_two_shards(self.table, list(dict.fromkeys(pair_ids)), value)
            self.table.append_shards(shards, METADATA, known)
        else:
            self.table.append(rows(pair_ids, value), METADATA, known)

    def known_without(self, pair_ids):
        free = [version for version, held in enumerate(self.versions) if not set(pair_ids) & set(held)]
        return free[-1] if free else None

    def took(self, values):
        if set(values) - set(self.newest) or not self.versions:
            self.versions.append({**values, **self.newest})

    def happening(self, kind, other, value):
        def overtaken(commit):
            waiting, self.commits.waiting = self.commits.waiting, []
            if kind == "optimized" and self.versions:
                if optimize(self.table) is not None:
                    self.versions.append(dict(self.newest))
            else:
                self.table.append(rows(other, value), METADATA)
                self.took(dict.fromkeys(other, float(value)))
            self.commits.waiting = waiting
            commit()

        return {"lost": lose_reply, "failed": fail_before}.get(kind, overtaken)


pair_sets = st.lists(st.sampled_from(PAIRS), min_size=1, max_size=4)
happening = st.tuples(st.sampled_from(["lost", "failed", "overtaken", "optimized"]), pair_sets, st.integers(100, 199))
steps = st.lists(
    st.tuples(pair_sets, st.booleans(), st.booleans(), st.lists(happening, max_size=3)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_every_pair_stands_once_with_the_value_that_was_committed_first(tmp_path, commits, steps):
    table = WeightStore(tmp_path / uuid.uuid4().hex).table("logps/toy/x")
    model = Model(table, commits)
    for value, step in enumerate(steps, start=1):
        pair_ids, use_known, as_shards, happenings = step
        model.append(pair_ids, value, use_known, as_shards, happenings)
    assert [content(table, version) for version in range(table.version() + 1)] == model.versions
    assert sum(record.num_rows for record in table.records()) == len(model.newest)


def write_overlapping(root, writer, start_line):
    """Append p0..p29 in windows of 5 that shift by 3, each writer from another place; half of the time with `known`, half of
    the time as shards."""
    table = WeightStore(root).table("logps/toy/x")
    start_line.wait(60)
    for step in range(5):
        first = (3 * step + 9 * writer) % 30
        window = [f"p{(first + index) % 30}" for index in range(5)]
        value, known = 10 * writer + step, 0 if step % 2 else None
        if (writer + step // 2) % 2:
            table.append_shards(write_in_two_shards(table, window, value), METADATA, known)
        else:
            table.append(rows(window, value), METADATA, known)


@pytest.mark.slow
def test_four_racing_processes_write_every_pair_once(store_uri):
    context = multiprocessing.get_context("spawn")
    WeightStore(store_uri).table("logps/toy/x").append(rows(["first"], 99), METADATA)
    start_line = context.Barrier(4)
    writers = [context.Process(target=write_overlapping, args=(store_uri, w, start_line)) for w in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(240)
        assert writer.exitcode == 0
    table = WeightStore(store_uri).table("logps/toy/x")
    assert sorted(content(table)) == sorted(["first", *(f"p{index}" for index in range(30))])
    # Every version holds what the one before held, with the same values: the first committed stays.
    versions = [content(table, version) for version in range(table.version() + 1)]
    assert all(before.items() < after.items() for before, after in pairwise(versions))
