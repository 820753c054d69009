"""Rows that are too large to be used: found before they fill the memory, and their neighbours are read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source import arrow_files, json_files, rows
from pipeline.source.arrow_sizes import num_bytes
from pipeline.source.intake import read_source
from pipeline.source.load import open_source
from pipeline.source.messages import Unusable
from pipeline.source.parquet_pages import column_sizes
from weights_store.errors import InputError
from weights_store.schemas import Reason

GOOD = {"prompt": "Hi?", "chosen": "yes", "rejected": "no"}
SCHEMA = pa.schema([(name, pa.string()) for name in GOOD])


def row(number, chosen="yes"):
    return {"prompt": f"Hi {number}?", "chosen": chosen, "rejected": "no"}


def write_parquet(path, *groups, **others):
    with pq.ParquetWriter(path, SCHEMA, **others) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
    return path


def reasons_of(path):
    """Return the reason of each row, and its detail; None for a pair."""
    found = read_source(DatasetSection(name="x", source=str(path)))
    return [(pair.reason.value, pair.detail) if isinstance(pair, Unusable) else None for _, pair in found]


@pytest.fixture
def small_limits(monkeypatch):
    """Let a row have 10,000 bytes, a line 40,000 and a page of a Parquet file 50,000."""
    for module in (rows, arrow_files, json_files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr("pipeline.source.arrow_sizes.MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr(json_files, "_MAX_LINE_BYTES", 40_000)
    monkeypatch.setattr(arrow_files, "_MAX_PAGE_BYTES", 50_000)


SOURCE = [row(0), row(1, "x" * 9_900), row(2, "x" * 10_100), row(3), row(4, "é" * 45_000), row(5)]
"""A row that just fits, one that just does not, and one that is far too large, in bytes."""


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in SOURCE))


def write_gz(path):
    with gzip.open(path, "wt") as file:
        file.write("\n\n".join(json.dumps(each, ensure_ascii=False) for each in SOURCE))


def write_arrow(path, kind=None):
    kind = kind or pa.string()
    schema = pa.schema([(name, kind) for name in GOOD])
    table = pa.table({name: pa.array([each[name] for each in SOURCE]).cast(kind) for name in GOOD}, schema=schema)
    with pa.ipc.new_file(path, schema) as writer:
        writer.write(table)


def write_stream(path):
    with pa.ipc.new_stream(path, SCHEMA) as writer:
        writer.write(pa.Table.from_pylist(SOURCE, SCHEMA))


def write_views(path):
    write_arrow(path, pa.string_view())


def write_dictionary(path):
    with pa.ipc.new_file(path, pa.schema([(name, pa.dictionary(pa.int32(), pa.string())) for name in GOOD])) as writer:
        writer.write(pa.table({name: pa.array([each[name] for each in SOURCE]).dictionary_encode() for name in GOOD}))


def write_folder(path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(SOURCE).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gz),
        ("a.arrow", write_arrow),
        ("b.arrow", write_stream),
        ("c.arrow", write_views),
        ("d.arrow", write_dictionary),
        ("folder", write_folder),
        ("a.parquet", lambda path: write_parquet(path, SOURCE[:4], SOURCE[4:5], SOURCE[5:])),
    ],
    ids=["jsonl", "gz", "arrow", "stream", "views", "dictionary", "folder", "parquet"],
)
def test_a_row_that_is_too_large_goes_to_quarantine_alone(small_limits, tmp_path, name, write):
    write(tmp_path / name)
    found = reasons_of(tmp_path / name)
    assert [each and each[0] for each in found] == [None, None, "row_too_large", None, "row_too_large", None]
    assert all("limit" in each[1] for each in found if each)
    assert "\n" not in found[4][1]


def test_the_size_of_a_row_counts_the_columns_that_are_needed(small_limits, tmp_path):
    rows_ = [{**row(0), "image": "x" * 20_000}, row(1)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    pq.write_table(
        pa.Table.from_pylist([{**each, "image": each.get("image")} for each in rows_]), tmp_path / "a.parquet"
    )
    assert reasons_of(tmp_path / "a.jsonl") == reasons_of(tmp_path / "a.parquet") == [None, None]


def test_a_row_of_messages_counts_all_of_them(small_limits, tmp_path):
    turns = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y" * 600}] * 9
    chats = [{"chosen": [*turns[:count], *turns[:1], said], "rejected": [*turns[:count], *turns[:1], turns[1]]}
             for count in (2, 18) for said in [{"role": "assistant", "content": "z"}]]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(chats))
    for name in ("a.parquet", "a.json"):
        assert [each and each[0] for each in reasons_of(tmp_path / name)] == [None, "row_too_large"]


def test_a_json_array_with_a_huge_text_is_refused_before_it_is_parsed(small_limits, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row(0), row(1, "x" * 90_000)]))
    with pytest.raises(
        InputError, match=r"one value has more than 40,000 bytes, after byte 40,000; .* into a .jsonl file"
    ):
        list(open_source(DatasetSection(name="x", source=str(tmp_path / "a.json"))).rows())


def test_quarantine_keeps_the_beginning_of_a_line_that_is_not_read(small_limits, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    found = list(open_source(DatasetSection(name="x", source=str(tmp_path / "a.jsonl"))).rows())
    assert found[4].reason is Reason.ROW_TOO_LARGE
    assert found[4].raw.startswith('{"prompt": "Hi 4?", "chosen": "ééé')
    assert found[5].value == row(5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0"},
        {"use_dictionary": False},
        {"use_dictionary": False, "column_encoding": {"chosen": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"chosen": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"compression": "zstd", "write_page_index": True, "write_page_checksum": True},
    ],
    ids=str,
)
def test_the_largest_page_of_a_column_is_as_large_as_its_longest_text(tmp_path, options):
    texts = [f"{number}" + "x" * 3000 for number in range(200)] + ["y" * 300_000]
    pq.write_table(pa.table({"a": list(range(201)), "chosen": texts}), tmp_path / "a.parquet", **options)
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    (size,) = column_sizes(tmp_path / "a.parquet", group, ["chosen"])
    assert 300_000 <= size.largest_page_bytes <= size.num_bytes <= group.column(1).total_uncompressed_size


def test_a_page_header_with_long_statistics_is_read_to_its_end(tmp_path, monkeypatch):
    pq.write_table(pa.table({"chosen": ["x" * 2000, "y" * 3000]}), tmp_path / "a.parquet", use_dictionary=False)
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    (size,) = column_sizes(tmp_path / "a.parquet", group, ["chosen"])
    monkeypatch.setattr("pipeline.source.parquet_pages._HEADER_BYTES", (8, 1 << 20))
    assert list(column_sizes(tmp_path / "a.parquet", group, ["chosen"])) == [size]


def test_a_text_that_many_rows_share_is_read_a_few_rows_at_a_time(tmp_path):
    # 64 MiB of texts at a time: 16 rows of 4 MiB each, though the file has 40 KB.
    write_parquet(tmp_path / "a.parquet", [row(number, "x" * (4 << 20)) for number in range(40)], compression="zstd")
    (path,) = tmp_path.iterdir()
    metadata = pq.ParquetFile(path).metadata
    batches = list(arrow_files._row_group(path, metadata, 0, ["chosen"]))
    assert max(batch.num_rows for batch in batches) <= 16
    assert sum(batch.num_rows for batch in batches) == 40


def test_damage_in_front_of_a_page_is_told_as_damage(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [row(0)])
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"row group 0 \(rows 0 to 0\) is damaged, after row 0: .*; copy or download"):
        reasons_of(path)


def test_bytes_of_values_are_counted_where_they_stand():
    texts = ["a", "bb", "ccc"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()):
        array = pa.array(texts).cast(kind) if kind != pa.binary_view() else pa.array([b"a", b"bb", b"ccc"], kind)
        assert num_bytes(array.slice(1, 2)) == 2 + 3 + 2 * 8
    words = pa.array(["a", "x" * 1000, "a", "x" * 1000]).dictionary_encode()
    assert num_bytes(words.slice(2, 2)) == 1 + 1000 + 2 * 4
    nested = pa.array([[{"content": "abc"}], [], [{"content": "x" * 100}, {"content": None}]])
    assert num_bytes(nested.slice(2, 1)) == 100 + 2 * 8 + 2 * 8 + 8
    pairs = pa.array([[("k", "abc")], [("key", "x" * 100)]], pa.map_(pa.string(), pa.string()))
    assert num_bytes(pairs.slice(1, 1)) == 3 + 8 + 100 + 8 + 8
