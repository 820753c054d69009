"""`tokenweights path`, and the line of `show` that leads to it."""

import json

import pytest

import tokenweights
from tests.weights_store.conftest import DATASET

NAME = "hh-harmless/tis-dpo"


@pytest.mark.parametrize(("version", "num_files"), [(0, 1), (1, 2)])
def test_path_prints_the_files_of_a_version_one_a_line(command, small_store, version, num_files):
    code, out, _ = command("path", f"{NAME}@{version}")
    assert code == 0
    assert out.splitlines() == small_store.files(NAME, version)
    assert len(out.splitlines()) == num_files


def test_path_of_a_table_that_is_no_weight_dataset(command, small_store):
    table = small_store.table(f"logps/{DATASET}/ref")
    _, out, _ = command("path", table.path)
    assert out.splitlines() == [f"{table.location}/{name}" for name in table.shards()]


def test_path_as_json_has_rows_and_bytes(command, small_store):
    _, out, _ = command("path", NAME, "--json")
    document = json.loads(out)
    assert (document["table"], document["version"]) == (f"weights/{NAME}", 1)
    assert document["fingerprint"] == small_store.resolve(NAME).fingerprint
    assert [row["num_rows"] for row in document["files"]] == [3, 1]  # a, b, c and then d
    assert [row["file"] for row in document["files"]] == small_store.files(NAME)


@pytest.mark.parametrize(
    ("name", "text"),
    [("hh-harmless/none", "no table weights/hh-harmless/none in"), (f"{NAME}@7", "has no version 7; it has 0..1")],
)
def test_path_of_what_is_not_there_is_refused(command, name, text):
    code, out, err = command("path", name)
    assert (code, out) == (1, "")
    assert text in err


def test_path_in_a_folder_without_a_store_says_so(tmp_path, capsys):
    assert tokenweights.main(["path", NAME, "--store", str(tmp_path)]) == 1
    assert f"no store at {tmp_path}: expected a folder" in capsys.readouterr().err


def test_show_counts_the_files_of_the_version_and_says_how_to_get_them(command, small_store):
    _, out, _ = command("show", NAME)
    (line,) = [line for line in out.splitlines() if line.startswith("  files ")]
    assert "2 files, " in line
    assert line.endswith(f"`tokenweights path {NAME}@1` prints which")
    _, out, _ = command("show", NAME, "--json")
    assert json.loads(out)["files"] == small_store.files(NAME)
