import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source.load import is_hub_id, open_source
from weights_store.errors import InputError

REPO = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Anthropic/hh-rlhf", True),
        ("argilla/ultrafeedback-binarized.v2", True),
        ("pairs", False),
        ("data/pairs.jsonl", False),
        ("data/pairs.parquet", False),
        ("../data/pairs", False),
        ("/data/pairs", False),
        ("a/b/c", False),
    ],
)
def test_owner_and_name_is_on_the_hub_and_a_file_or_path_is_not(source, expected):
    assert is_hub_id(source) is expected


def test_a_folder_that_is_there_is_not_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")


@pytest.mark.parametrize("name", ["data/pairs.csv", "data/pairs.JSONL", "data/pairs.jsonl.gz", "data/pairs.tsv"])
def test_a_name_that_ends_like_a_file_is_not_on_the_hub(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize("source", ["./pairz.jsonl", "pairz.jsonl", "pairs.json"])
def test_a_source_that_is_not_there_names_the_nearest_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(
        InputError, match=r"does not exist \(nearest: pairs.jsonl\); give a file, a saved dataset folder or"
    ):
        open_source(DatasetSection(name="x", source=source))


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x", "x.jsonl.zst", "x.csv.gz", "x.txt"])
def test_files_of_other_kinds_are_refused_with_the_kinds_that_are_read(tmp_path, name):
    (tmp_path / name).write_text("prompt,chosen,rejected\np,a,b\n")
    with pytest.raises(
        InputError, match=r"unknown kind of file '.*', expected one of .jsonl, .ndjson, .json, .parquet"
    ):
        open_source(DatasetSection(name="x", source=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"\x1f\x8b\x08\x00", "is a gzip file; add .gz to its name"),
        ("x.json", b"PAR1\x15\x04", "is a Parquet file; give it the ending .parquet"),
        ("x.parquet", b"ARROW1\x00\x00", "is an Arrow file; give it the ending .arrow"),
        ("x.jsonl", b"PK\x03\x04", "is a zip archive; unpack it"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-LFS pointer, not the file itself"),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(DatasetSection(name="x", source=str(tmp_path / name)))


def test_endings_in_capitals_are_read(tmp_path, read, write_jsonl):
    write_jsonl(tmp_path / "PAIRS.JSONL", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert len(read(tmp_path / "PAIRS.JSONL")[0]) == 1


def test_a_mistyped_folder_without_a_connection_fails_at_once_and_says_where_it_was_looked_for(tmp_path):
    # In a process of its own: the suite is offline by a setting, which this test is not about. Nobody listens at port 9.
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    script = """
import time
from pipeline.dataset_section import DatasetSection
from pipeline.source.load import open_source
from weights_store.errors import InputError
import datasets

start = time.monotonic()
try:
    open_source(DatasetSection(name="x", source="dat/pairs"))
except InputError as error:
    print(error)
print(time.monotonic() - start < 10)
"""
    (tmp_path / "dat" / "pairs-v2").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    message, is_fast = done.stdout.splitlines()
    assert message.startswith(
        "dataset.source 'dat/pairs' is no file or folder here (nearest: dat/pairs-v2), and could not be loaded from the hub: "
    )
    assert is_fast == "True"


# --- folders of files --------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def write_parquet(path, *rows):
    path.parent.mkdir(exist_ok=True)
    pl.DataFrame(rows).write_parquet(path)


def test_the_files_of_a_split_are_one_source_with_rows_counted_through(tmp_path, read):
    folder = tmp_path / "folder"
    write_parquet(folder / "train-00000.parquet", PAIR, PAIR | {"chosen": "c"})
    write_parquet(folder / "train-00001.parquet", PAIR | {"chosen": "d", "system": "s"})
    write_parquet(folder / "test-00000.parquet", PAIR | {"chosen": "e"})
    (folder / "README.md").write_text("Pairs.")
    (folder / "dataset_infos.json").write_text("{}")
    pairs, _ = read(folder)
    assert [(row, pair.chosen, len(pair.prompt)) for row, pair in pairs.items()] == [
        (0, "a", 1),
        (1, "c", 1),
        (2, "d", 2),
    ]
    assert [pair.chosen for pair in read(folder, split="test")[0].values()] == ["e"]
    with pytest.raises(InputError, match=r"folder has no split 'tests'; it has train, test\. .* for example to 'test'"):
        read(folder, split="tests")


def test_a_bad_row_in_a_folder_goes_to_quarantine_alone_and_types_may_differ(tmp_path, read, write_jsonl):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", [{"prompt": "p", "chosen": "a"}, PAIR])
    write_jsonl(tmp_path / "folder" / "b.jsonl", [b"{", PAIR | {"prompt": [{"role": "user", "content": "q"}]}])
    pairs, reasons = read(tmp_path / "folder")
    assert [(row, pair.prompt[0]["content"]) for row, pair in pairs.items()] == [(1, "p"), (3, "q")]
    assert reasons == {"missing_value": 1, "unparsable_json": 1}


def test_a_damaged_file_in_a_folder_is_named(tmp_path, read):
    write_parquet(tmp_path / "folder" / "a.parquet", PAIR)
    (tmp_path / "folder" / "b.parquet").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"folder/b.parquet is not a whole Parquet file"):
        read(tmp_path / "folder")


def test_files_of_two_kinds_in_a_folder_are_not_left_out_without_a_word(tmp_path, read, write_jsonl):
    write_parquet(tmp_path / "folder" / "a.parquet", PAIR)
    write_jsonl(tmp_path / "folder" / "b.jsonl", [PAIR])
    with pytest.raises(
        InputError, match=r"has files of several kinds, .jsonl, .parquet, of which only .* would be read"
    ):
        read(tmp_path / "folder")


def test_a_folder_of_another_kind_of_files_is_read_by_datasets(tmp_path, read):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    assert [pair.chosen for pair in read(tmp_path / "folder")[0].values()] == ["a"]


def test_a_folder_without_data_says_so(tmp_path, read):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        InputError, match="no dataset with split 'train' in this folder: .*doesn't contain any data files"
    ):
        read(tmp_path / "folder")
