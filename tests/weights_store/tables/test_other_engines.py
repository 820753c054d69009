"""Other engines read the tables as they are and find the same numbers as `store.scan`.

docs/readers.md is run block by block, on a dataset with three versions of which the last replaced all rows, and with a shard in
the folder that was never committed. Readers that are not installed are skipped; the page says which were run by hand.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.weights_store.conftest import REVERSED, TIS, build_small_store, weight_rows
from weights_store.tables.notes import NOT_A_VERSION

PAGE = Path(__file__).resolve().parents[3] / "docs" / "readers.md"
NAME = "hh-harmless/tis-dpo"
# Weights of all chosen tokens: 1 + 2 + 0.5, 4 + 1 + 0.5 + 1.5, 0.5 + 0.75, and d's 1.25 from version 1 on.
CHOSEN_SUMS = {"a": 3.5, "b": 7.0, "c": 1.25, "d": 1.25}
# Version 2: 1 + 0.5 + 2, 0.25 + 1 + 2 + 0.75, 2 + 1.25, and 0.75.
REPLACED_SUMS = {"a": 3.5, "b": 4.0, "c": 3.25, "d": 0.75}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Versions 0 (a, b, c), 1 (d added) and 2 (all four replaced), and a shard of a writer that was killed."""
    store = build_small_store(tmp_path_factory.mktemp("readers") / "store")
    table = store.table(f"weights/{NAME}")
    table.replace(weight_rows("abcd", REVERSED), {**table.metadata(), "fingerprint": "f2"})
    table.write_shards(weight_rows("ab", TIS))
    return store


@pytest.fixture(scope="module")
def expected(store):
    return store.scan(NAME).sort("pair_id").collect()


@pytest.fixture
def folder(store):
    return store.table(f"weights/{NAME}").location.path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """`datasets` copies what it reads into a cache, by default the user's own."""
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


# --- docs/readers.md ---------------------------------------------------------------------------------------------------

TEXT = PAGE.read_text(encoding="utf-8")
(OPENING,) = re.findall(r"Every block continues this one:\n\n```python\n(.*?)```", TEXT, re.DOTALL)
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", TEXT.partition(OPENING)[2], re.M | re.S))
TABLE = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.count("|") == 5][2:]
PACKAGES = {
    "DuckDB with its extension": "duckdb_extension_delta",
    "datasets, streaming": "datasets",
    "Ray Data": "ray",
    "Spark": "pyspark",
}
OWN_PROCESS = {  # Ray keeps the token of the first cluster that a process used, Spark its Java machine
    "Ray Data": 'import ray\nray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)\n',
    "Spark": "",
}


def package_of(reader):
    return PACKAGES.get(reader, reader.lower())


def test_the_table_of_the_page_lists_its_blocks_and_the_versions_that_run_here():
    assert [reader for reader, *_ in TABLE if reader != "Spark with Delta"] == list(BLOCKS)
    for reader, _, ran_with, run in TABLE:
        if run == "in every test run":
            assert ran_with == version(package_of(reader)), f"{PAGE.name} names another version of {reader}"


@pytest.mark.parametrize("reader", [pytest.param(r, marks=[pytest.mark.slow] * (r in OWN_PROCESS)) for r in BLOCKS])
def test_every_reader_finds_the_rows_of_the_newest_version_and_no_others(reader, store):
    try:
        version(package_of(reader))
    except PackageNotFoundError:
        pytest.skip(f"{package_of(reader)} is not installed")
    code = OPENING.replace("stores/default", str(store.root)) + BLOCKS[reader]
    if reader in OWN_PROCESS:
        script = f"{OWN_PROCESS[reader]}{code}\nimport json\nprint('\\n' + json.dumps([num_pairs, float(total)]))"
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    else:
        names = {}
        exec(compile(code, f"{PAGE.name}: {reader}", "exec"), names)
        found = [names["num_pairs"], names["total"]]
    assert found == [4, sum(REPLACED_SUMS.values())]


# --- the folder --------------------------------------------------------------------------------------------------------


def with_polars(folder):
    pl.read_parquet(folder / "*.parquet")


def with_pyarrow(folder):
    import pyarrow.dataset

    pyarrow.dataset.dataset(folder)


def with_duckdb(folder):
    import duckdb

    duckdb.read_parquet(f"{folder}/*.parquet").fetchone()


def with_duckdb_below(folder):
    import duckdb

    duckdb.read_parquet(f"{folder.parent}/**/*.parquet").fetchone()


def with_datasets(folder):
    from datasets import load_dataset

    load_dataset("parquet", data_files=str(folder / "*.parquet"))


def with_datasets_streaming(folder):
    from datasets import load_dataset

    next(iter(load_dataset("parquet", data_dir=str(folder), split="train", streaming=True)))


@pytest.mark.parametrize(
    "read", [with_polars, with_pyarrow, with_duckdb, with_duckdb_below, with_datasets, with_datasets_streaming]
)
def test_a_plain_read_of_the_folder_fails_instead_of_doubling_rows(read, folder, caplog):
    with pytest.raises(Exception, match=r"(?i)magic bytes|must end with PAR1") as refused:
        read(folder)
    assert NOT_A_VERSION in str(refused.value) + caplog.text or read is with_polars


def test_without_that_file_the_folder_gives_rows_of_all_versions(folder):
    """Why it is there: 3 and 1 rows of version 1, 4 of version 2, 2 that nobody committed."""
    assert min(path.name for path in folder.glob("0[!0]*.parquet")) > NOT_A_VERSION
    assert pl.read_parquet(folder / "0[!0]*.parquet").height == 3 + 1 + 4 + 2


# --- one by one --------------------------------------------------------------------------------------------------------


def opened(store, version=None):
    from deltalake import DeltaTable

    return DeltaTable(str(store.table(f"weights/{NAME}").location), version=version)


@pytest.mark.parametrize(("number", "sums"), [(0, "abc"), (1, "abcd"), (2, None)])
def test_the_files_of_old_versions_hold_their_rows(store, number, sums):
    import duckdb

    with duckdb.connect() as connection:
        query = "SELECT pair_id, list_sum(chosen_token_weights) FROM read_parquet(?)"
        rows = dict(connection.execute(query, [store.files(NAME, number)]).fetchall())
    assert rows == (REPLACED_SUMS if sums is None else {pair_id: CHOSEN_SUMS[pair_id] for pair_id in sums})


def test_deltalake_sql_reads_every_column(store, expected):
    from deltalake import QueryBuilder

    query = QueryBuilder().register("weights", opened(store))
    rows = pa.table(query.execute("SELECT * FROM weights ORDER BY pair_id").read_all())
    assert rows.to_pylist() == expected.to_dicts()


def test_the_files_hold_every_column(store, expected):
    rows = pl.read_parquet(store.files(NAME), glob=False).sort("pair_id")
    assert rows.to_dicts() == expected.to_dicts()


def test_duckdb_over_a_pyarrow_dataset(store):
    import duckdb

    with duckdb.connect() as connection:
        weights = connection.from_arrow(opened(store).to_pyarrow_dataset())
        rows = weights.filter("pair_id < 'c'").aggregate("count(*), sum(len(rejected_ids))").fetchall()
    assert rows == [(2, 5)]


def test_pyarrow_dataset(store, expected):
    dataset = opened(store).to_pyarrow_dataset()
    assert dataset.to_table().sort_by("pair_id").to_pylist() == expected.to_dicts()
    one = dataset.to_table(columns=["rejected_token_weights"], filter=pc.field("pair_id") == "c")
    assert one.to_pylist() == [{"rejected_token_weights": [0.75, 0.75, 1.0, 0.75, 1.0]}]


def test_pyarrow_dataset_filtered_by_a_column_without_statistics(store):
    dataset = opened(store).to_pyarrow_dataset()
    assert dataset.to_table(filter=pc.field("split") == "train").num_rows == 3
