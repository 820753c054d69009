"""Other engines read the tables as they are and find the same numbers as `store.scan`."""

import json
import os
import secrets
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

NAME = "hh-harmless/tis-dpo"
# Weights of all chosen tokens: 1 + 2 + 0.5, 4 + 1 + 0.5 + 1.5, 0.5 + 0.75, and d's 1.25 in version 1.
CHOSEN_SUMS = {"a": 3.5, "b": 7.0, "c": 1.25, "d": 1.25}


def opened(store, version=None):
    from deltalake import DeltaTable

    return DeltaTable(str(store.table(f"weights/{NAME}").location), version=version)


@pytest.fixture
def expected(small_store):
    return small_store.scan(NAME).sort("pair_id").collect()


def test_polars_itself(small_store):
    sums = small_store.scan(NAME).select("pair_id", pl.col("chosen_token_weights").list.sum()).collect()
    assert dict(sums.rows()) == CHOSEN_SUMS


def test_deltalake_sql(small_store, expected):
    from deltalake import QueryBuilder

    query = QueryBuilder().register("weights", opened(small_store))
    rows = pa.table(query.execute("SELECT * FROM weights ORDER BY pair_id").read_all())
    assert rows.to_pylist() == expected.to_dicts()
    sums = query.execute(
        "SELECT pair_id, sum(w) AS total FROM (SELECT pair_id, unnest(chosen_token_weights) AS w FROM weights) "
        "GROUP BY pair_id"
    )
    assert {row["pair_id"]: row["total"] for row in pa.table(sums.read_all()).to_pylist()} == CHOSEN_SUMS


@pytest.fixture
def duckdb():
    """A DuckDB of one's own; the `delta` extension would have to be downloaded, so it gets the files from Delta's log."""
    import duckdb

    with duckdb.connect() as connection:
        yield connection


@pytest.mark.parametrize("version", [0, 1])
def test_duckdb_over_the_files_of_a_version(small_store, duckdb, version):
    files = opened(small_store, version).file_uris()
    rows = duckdb.execute("SELECT pair_id, list_sum(chosen_token_weights) FROM read_parquet(?)", [files]).fetchall()
    assert dict(rows) == {pair_id: CHOSEN_SUMS[pair_id] for pair_id in "abcd"[: 3 + version]}
    ids = duckdb.execute("SELECT chosen_ids FROM read_parquet(?) WHERE pair_id = 'b'", [files]).fetchall()
    assert ids == [([6, 9, 7, 9],)]


def test_duckdb_over_a_pyarrow_dataset(small_store, duckdb):
    weights = duckdb.from_arrow(opened(small_store).to_pyarrow_dataset())
    rows = weights.filter("pair_id < 'c'").aggregate("count(*), sum(len(rejected_ids))").fetchall()
    assert rows == [(2, 5)]


def test_pyarrow_dataset(small_store, expected):
    dataset = opened(small_store).to_pyarrow_dataset()
    assert dataset.to_table().sort_by("pair_id").to_pylist() == expected.to_dicts()
    one = dataset.to_table(columns=["rejected_token_weights"], filter=pc.field("pair_id") == "c")
    assert one.to_pylist() == [{"rejected_token_weights": [1.5, 1.25, 1.0, 1.25, 1.0]}]


def test_pyarrow_dataset_filtered_by_a_column_without_statistics(small_store):
    dataset = opened(small_store).to_pyarrow_dataset()
    assert dataset.to_table(filter=pc.field("split") == "train").num_rows == 3


READ_WITH_RAY = """
import json, sys
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
rows = ray.data.read_parquet(sys.argv[1:]).take_all()
print(json.dumps([{name: getattr(value, "tolist", lambda v=value: v)() for name, value in row.items()} for row in rows]))
"""


@pytest.mark.slow
def test_ray_data(small_store, expected):
    # In a process of its own: Ray keeps the token of the first cluster that a process used, and other tests use some.
    command = [sys.executable, "-c", READ_WITH_RAY, *opened(small_store).file_uris()]
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # else Ray writes one into the home folder
    done = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    assert sorted(rows, key=lambda row: row["pair_id"]) == expected.to_dicts()
