"""How much of the files a query reads, counted in bytes that a server sends."""

import urllib.request

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.schemas import FLOATS, IDS, LOGPS, WEIGHTS

NUM_PAIRS = 3000
NAME = "hh-harmless/tis-dpo"


@pytest.fixture(scope="module")
def store(counting_s3):
    """3,000 pairs of random tokens, in some fifty row groups instead of one."""
    patch = pytest.MonkeyPatch()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": counting_s3,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 200_000)
    store = WeightStore("s3://bucket/store")
    rows = random_rows()
    names = [name for name in rows.column_names if name.startswith(("chosen_ref_", "rejected_ref_"))]
    logps = rows.select(["pair_id", *names]).rename_columns(LOGPS.names)
    parents = []
    for role in ("positive_logps", "negative_logps"):
        reference = store.table(f"logps/hh/{role}").append(logps, {"fingerprint": "f"})
        parents.append({"role": role, **reference.as_parent()})
    store.table(f"weights/{NAME}").append(rows, {"fingerprint": "f", "parents": parents})
    yield store
    patch.undo()


def random_rows():
    generator = np.random.default_rng(0)
    pair_ids = sorted(generator.bytes(16).hex() for _ in range(NUM_PAIRS))
    lengths = {side: generator.integers(100, 200, NUM_PAIRS) for side in ("prompt", "chosen", "rejected")}

    def ragged(side, kind):
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths[side])]).astype(np.int32))
        size = int(lengths[side].sum())
        values = generator.integers(0, 32_000, size) if kind is IDS else -generator.exponential(size=size)
        return pa.ListArray.from_arrays(offsets, pa.array(values).cast(kind.value_type), type=kind)

    columns = {"pair_id": pa.array(pair_ids), "split": pa.array(["train"] * NUM_PAIRS)}
    columns["pair_weight"] = pa.array(np.ones(NUM_PAIRS, np.float32))
    for name in WEIGHTS.names:
        if WEIGHTS.field(name).nullable:
            columns[name] = pa.nulls(NUM_PAIRS, WEIGHTS.field(name).type)
        elif name not in columns:
            columns[name] = ragged(name.split("_")[0], IDS if name.endswith("_ids") else FLOATS)
    return pa.table({name: columns[name] for name in WEIGHTS.names}).cast(WEIGHTS)


@pytest.fixture
def bytes_read(counting_s3):
    """Return a function that collects a query and returns its rows and how many bytes of Parquet it took."""

    def read(query):
        count(counting_s3)
        rows = query.collect()
        return rows, count(counting_s3)

    return read


def count(server):
    with urllib.request.urlopen(f"{server}/-/bytes", timeout=30) as reply:
        return int(reply.read())


def test_one_pair_and_one_column_take_a_small_part_of_the_files(store, bytes_read):
    everything, full = bytes_read(store.scan(NAME))
    assert everything.height == NUM_PAIRS
    pair_id = everything["pair_id"][1234]
    one, part = bytes_read(store.scan(NAME).filter(pl.col("pair_id") == pair_id).select("chosen_token_weights"))
    assert one.to_series().to_list() == [everything["chosen_token_weights"].to_list()[1234]]
    assert full > 5_000_000
    assert part < 0.2 * full  # measured: 4.5 %


def test_one_column_takes_that_column_only(store, bytes_read):
    _, full = bytes_read(store.scan(NAME))
    _, part = bytes_read(store.scan(NAME).select("chosen_token_weights"))
    assert part < 0.25 * full  # one of seven columns of tokens


def test_counting_pairs_reads_footers_only(store, bytes_read):
    _, full = bytes_read(store.scan(NAME))
    counted, part = bytes_read(store.scan(NAME).select(pl.len()))
    assert counted.item() == NUM_PAIRS
    assert part < 0.1 * full


def test_tokens_of_one_pair_take_a_small_part_of_all_three_tables(store, bytes_read):
    everything, full = bytes_read(store.scan_tokens(NAME))
    pair_id = everything["pair_id"][0]
    one, part = bytes_read(store.scan_tokens(NAME).filter(pl.col("pair_id") == pair_id))
    assert one.equals(everything.filter(pl.col("pair_id") == pair_id))
    assert part < 0.2 * full
