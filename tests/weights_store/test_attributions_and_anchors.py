"""Tables of attributions and anchors, and weights made from them, as the store's commands see them."""

import json
import os

import polars as pl
import pyarrow as pa
import pytest

import tokenweights
from tests.weights_store.conftest import ANCHORED, DATASET, checksums_of
from weights_store.checks.vacuum import find_orphans, vacuum
from weights_store.checks.verify import verify
from weights_store.messages import progress_of

NAME, TIS = "hh-harmless/ti-dpo", "hh-harmless/tis-dpo"
ATTRIBUTIONS_PATH, ANCHORS_PATH = f"attributions/{DATASET}/ti", f"anchors/{DATASET}/ti"


def findings(store, *paths):
    return [(finding.table, finding.pair_id, finding.problem) for finding in verify(store, paths or None, rows=True)]


def rewrite(store, path, pair_id=None, /, recorded=None, **changes):
    """Write all rows again, other values in the row of one pair, in a version that records what the last did but `recorded`."""
    table = store.table(path)
    rows = [row | (changes if row["pair_id"] == pair_id else {}) for row in table.scan().collect().to_dicts()]
    return table.replace(pa.Table.from_pylist(rows, table.schema), table.metadata() | (recorded or {}))


# --- verify ------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_tables_as_they_were_committed(ti_store, caplog):
    caplog.set_level("INFO", "tokenweights")
    assert list(verify(ti_store, rows=True)) == []
    lines = [record.getMessage() for record in caplog.records if not progress_of(record)]
    tables = [line.partition(":")[0] for line in lines]
    assert [path for path in tables if DATASET in path and "/ti" in path] == [ATTRIBUTIONS_PATH, ANCHORS_PATH]


@pytest.mark.parametrize("path", [ATTRIBUTIONS_PATH, ANCHORS_PATH])
def test_a_flipped_bit_is_found(ti_store, path):
    shard = ti_store.root.path / path / ti_store.table(path).shards()[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert {finding.shard for finding in verify(ti_store, [path])} == {shard.name}


def test_a_broken_law_names_table_and_pair(ti_store):
    rewrite(ti_store, ATTRIBUTIONS_PATH, "d", chosen_attributions=[-1.0])
    problem = "chosen_attributions[0] is -1.0, expected a finite number >= 0"
    assert findings(ti_store) == [(ATTRIBUTIONS_PATH, "d", problem)]


def test_the_vocabulary_of_anchors_is_that_of_the_tokens_they_were_made_from(ti_store):
    rewrite(ti_store, ANCHORS_PATH, "d", anchor_ids=[10], anchor_logps=[-1.0])
    assert findings(ti_store, ANCHORS_PATH) == []  # nobody has recorded one
    tokens = rewrite(ti_store, f"tokens/{DATASET}", recorded={"tokenizer": {"vocab_size": 10}})
    rewrite(ti_store, ANCHORS_PATH, recorded={"parents": [tokens.as_parent()]})
    assert findings(ti_store, ANCHORS_PATH) == [(ANCHORS_PATH, "d", "anchor_ids[0] is 10, expected an id in 0..9")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejected_attributions": [1.0, 3.0]}, "2 rejected_attributions for 3 rejected_ids of tokens/{tokens}"),
        ({"pair_id": "z"}, "has no row in tokens/{tokens} or tokens/{older}, which the table was made from"),
    ],
)
def test_attributions_are_one_for_each_token_of_the_pair(ti_store, change, problem):
    rewrite(ti_store, ATTRIBUTIONS_PATH, "b", **change)
    expected = problem.format(tokens=f"{DATASET}@1", older=f"{DATASET}@0")
    assert findings(ti_store, ATTRIBUTIONS_PATH) == [(ATTRIBUTIONS_PATH, change.get("pair_id", "b"), expected)]


def test_an_anchor_of_a_pair_that_no_tokens_have_is_found(ti_store):
    rewrite(ti_store, ANCHORS_PATH, "b", pair_id="z")
    ((table, pair_id, problem),) = findings(ti_store, ANCHORS_PATH)
    assert (table, pair_id) == (ANCHORS_PATH, "z")
    assert problem == f"has no row in tokens/{DATASET}@1 or tokens/{DATASET}@0, which the table was made from"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"anchor_ids": [3, 7, 9]}, "anchor_ids[1] is 7, in {anchors} it is 8"),
        ({"anchor_ref_logps": [-2.0, -0.5, -1.25]}, "anchor_ref_logps[2] is -1.25, in {anchors} it is -1.0"),
        ({"anchor_ids": None, "anchor_ref_logps": None}, "anchor_ids is None, in {anchors} it is a list of 3"),
    ],
)
def test_anchors_of_weights_are_those_of_the_table_they_were_made_from(ti_store, change, problem):
    rewrite(ti_store, f"weights/{NAME}", "b", **change)
    expected = (f"weights/{NAME}", "b", problem.format(anchors=f"{ANCHORS_PATH}@1"))
    assert findings(ti_store, f"weights/{NAME}")[0] == expected


def with_parents(store, change):
    """The weights once more; `change` gives the parents that they record."""
    parents = [change(parent) for parent in store.metadata(NAME)["parents"]]
    rewrite(store, f"weights/{NAME}", recorded={"parents": [parent for parent in parents if parent]})


def test_weights_of_a_pair_without_anchor_are_found(ti_store):
    anchors = ti_store.table(ANCHORS_PATH)
    left = anchors.scan().filter(pl.col("pair_id") != "c").collect().to_arrow()
    made = anchors.replace(left, anchors.metadata())
    with_parents(ti_store, lambda p: p | {"version": made.version} if p["role"] == "anchors" else p)
    problem = f"has no row in {ANCHORS_PATH}@2, which the table was made from"
    assert findings(ti_store, f"weights/{NAME}") == [(f"weights/{NAME}", "c", problem)]


def test_anchors_of_weights_that_name_no_anchors_as_parent_are_not_compared(ti_store):
    with_parents(ti_store, lambda p: p if p["role"] != "anchors" else None)
    rewrite(ti_store, f"weights/{NAME}", "b", anchor_ids=[3, 7, 9])
    assert findings(ti_store, f"weights/{NAME}") == []


def test_a_parent_that_is_gone_is_found(ti_store):
    with_parents(ti_store, lambda p: p | {"version": 7} if p["role"] == "attributions" else p)
    problem = f"its parent {ATTRIBUTIONS_PATH}@7 is not in the store"
    assert findings(ti_store, f"weights/{NAME}") == [(f"weights/{NAME}", None, problem)]


# --- the other commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ATTRIBUTIONS_PATH, ANCHORS_PATH])
def test_optimize_and_vacuum_go_through_these_tables(ti_store, path, capsys):
    table = ti_store.table(path)
    before, sums = table.scan().sort("pair_id").collect(), checksums_of(table)
    assert tokenweights.main(["optimize", path, "--store", str(ti_store.root)]) == 0
    assert f"{path}@1 -> @2" in capsys.readouterr().out
    assert table.scan().sort("pair_id").collect().equals(before)
    assert checksums_of(table) == sums
    assert list(verify(ti_store, rows=True)) == []
    writer = table.writer()
    writer.write(pa.table(before.to_arrow()).cast(table.schema))
    (left,) = writer.finish()
    assert [(orphan.table, orphan.name) for orphan in find_orphans(ti_store)] == [(path, left.name)]
    os.utime(table.location.path / left.name, (1e9, 1e9))
    assert [orphan.name for orphan in vacuum(ti_store, retention_hours=0, dry_run=False, risk_running_builds=True)] == [
        left.name
    ]
    assert table.scan(0).collect().height == 3  # what old versions need stays


def test_lineage_leads_back_through_attributions_and_anchors(ti_store):
    lineage = ti_store.lineage(NAME)
    assert lineage.select("depth", "role", "kind", "name", "version", "num_rows").rows() == [
        (0, "weights", "table", f"weights/{NAME}", 0, 4),
        (1, "tokens", "table", f"tokens/{DATASET}", 1, 4),
        (2, "source", "source", "data/hh_harmless.jsonl", None, 5),
        (2, "quarantine", "table", f"quarantine/{DATASET}", 0, 1),
        (1, "ref_logps", "table", f"logps/{DATASET}/ref", 1, 4),
        (2, "model", "model", "models/tiny-chat", None, None),  # of all three, once
        (1, "attributions", "table", ATTRIBUTIONS_PATH, 1, 4),
        (1, "anchors", "table", ANCHORS_PATH, 1, 4),
    ]


def test_lists_and_histories_name_the_estimator(ti_store):
    row = ti_store.list().row(by_predicate=pl.col("name") == NAME, named=True)
    names = ("version", "estimator", "contrast", "num_pairs", "num_response_tokens")
    assert tuple(row[name] for name in names) == (0, "ti", None, 4, 21)
    assert ti_store.history(NAME)["estimator"].to_list() == ["ti"]


def test_the_token_view_has_ti_weights_and_no_contrastive_pair(ti_store):
    rows = ti_store.scan_tokens(NAME).filter(pl.col("pair_id") == "b", pl.col("side") == "rejected").collect()
    assert rows.rows() == [  # weights are attributions over their mean, 2
        ("b", "rejected", 0, 8, 0.5, -1.0, None, None, 1.0),
        ("b", "rejected", 1, 3, 1.5, -1.0, None, None, 3.0),
        ("b", "rejected", 2, 9, 1.0, -1.0, None, None, 2.0),
    ]


def test_exports_keep_anchors_in_parquet_and_leave_the_layout_of_the_release_as_it_is(ti_store, tmp_path):
    *files, _ = ti_store.export(NAME, tmp_path / "parquet")
    exported = {
        row["pair_id"]: (row["anchor_ids"], row["anchor_ref_logps"]) for row in pl.read_parquet(files).to_dicts()
    }
    assert exported == ANCHORED
    *files, _ = ti_store.export(NAME, tmp_path / "jsonl", format="jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_weight", "rejected_weight"]
    assert [list(line) for line in lines] == [names] * 4
    # Pair a: chosen weights negated, both without the last EOS.
    assert [line for line in lines if line["prompt_ids"] == [1, 2]] == [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [3, 4],
            "rejected_ids": [5],
            "chosen_weight": [-1.5, -0.75],
            "rejected_weight": [0.5],
        }
    ]
