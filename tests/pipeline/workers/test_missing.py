"""What a table lacks; if it lacks nothing, no file of rows is opened to find that out."""

import pyarrow as pa
import pytest

from pipeline.workers.missing import Backlog, column_sum, count_missing
from weights_store import WeightStore
from weights_store.errors import DamageError
from weights_store.schemas import LOGPS, QUARANTINE, TOKENS, Reason
from weights_store.tables.compaction import optimize

METADATA = {"fingerprint": "made up"}


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store")


@pytest.fixture
def tokens(store):
    """Three pairs; pair `c` has a prompt of two tokens and responses of three and one."""
    rows = [
        {
            "pair_id": pair_id,
            "prompt": "[]",
            "prompt_ids": [1, 4],
            "chosen_ids": [5, 6, 2],
            "rejected_ids": [7],
            "source_row": index,
            "split": "train",
        }
        for index, pair_id in enumerate("abc")
    ]
    return store.table("tokens/toy-1").append(pa.Table.from_pylist(rows, TOKENS), METADATA)


def _score(store, *pair_ids):
    table = store.table("logps/toy-1/ref")
    rows = [{"pair_id": pair_id, "chosen_logps": [-1.0] * 3, "rejected_logps": [-1.0]} for pair_id in pair_ids]
    table.append(pa.Table.from_pylist(rows, LOGPS), METADATA)
    return table


def test_what_is_missing_is_counted(store, tokens):
    one = Backlog(num_pairs=1, num_tokens=6, longest_prompt=2, longest=5)
    assert count_missing(tokens, store.table("logps/toy-1/ref")) == one + one + one
    assert count_missing(tokens, _score(store, "a")) == one + one
    assert count_missing(tokens, _score(store, "z", "b")) == one  # as many rows as pairs, but one is of another pair
    assert count_missing(tokens, _score(store, "c")) == Backlog()  # one more row than pairs


def test_a_pair_that_this_scorer_could_not_take_is_not_missing(store, tokens):
    columns = {"reason": Reason.UNSCORABLE.value, "detail": "logps/toy-1/ref: too long", "raw": "{}"}
    quarantined = [{"pair_id": "c", "source_row": 2, **columns}]
    store.table("quarantine/toy-1").append(pa.Table.from_pylist(quarantined, QUARANTINE), METADATA)
    assert count_missing(tokens, _score(store, "a", "b")) == Backlog()


def test_no_row_is_read_where_nothing_is_missing(store, tokens):
    table = _score(store, "c", "a")
    _score(store, "b")
    for each in (table, store.table(tokens.table)):
        for name in each.shards():
            (each.location.path / name).write_bytes(b"not what was committed")
    assert count_missing(tokens, table) == Backlog()
    with pytest.raises(DamageError, match="not the file that was committed"):
        count_missing(tokens, store.table("logps/toy-1/other"))


def _logps(*pair_ids, value=-1.0):
    rows = [{"pair_id": pair_id, "chosen_logps": [value], "rejected_logps": [-2.0]} for pair_id in pair_ids]
    return pa.Table.from_pylist(rows, LOGPS)


def test_sums_of_keys_tell_whether_two_tables_have_the_same_pairs(store):
    table, other = store.table("logps/toy/x"), store.table("logps/toy/y")
    table.append(_logps("a", "b", "c"), METADATA)
    for name in "cab":  # in other commits, another order, and with other values
        assert not other.exists() or column_sum(other, "pair_id") != column_sum(table, "pair_id")
        other.append(_logps(name, value=-3.0), METADATA)
    assert column_sum(other, "pair_id") == column_sum(table, "pair_id")
    optimize(other)
    assert column_sum(other, "pair_id") == column_sum(table, "pair_id")
    other.replace(_logps("a", "b", "d"), METADATA)
    assert column_sum(other, "pair_id") != column_sum(table, "pair_id")
    assert column_sum(other, "pair_id", 2) == column_sum(table, "pair_id")
