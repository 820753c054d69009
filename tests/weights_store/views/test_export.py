import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pyarrow.parquet as pq
import pytest

from weights_store.errors import DamageError, InputError, MismatchError
from weights_store.processes.lock import locked

NAME = "hh-harmless/tis-dpo"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_parquet_has_a_file_for_each_split_with_every_number_in_place(small_store, tmp_path):
    files = small_store.export(NAME, tmp_path / "out")
    names = ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet", "tokenweights.json"]
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == names
    expected = small_store.scan(NAME).sort("pair_id").with_columns(row=pl.int_range(4, dtype=pl.Int64)).collect()
    read = [pl.read_parquet(path) for path in (files[1], files[0])]  # d, the last pair, is the test split
    assert [part.height for part in read] == [3, 1]
    assert pl.concat(read).equals(expected)


def test_parquet_needs_no_special_encoding(small_store, tmp_path):
    path = small_store.export(NAME, tmp_path / "out")[1]
    groups = pq.ParquetFile(path).metadata
    encodings = {e for column in range(groups.num_columns) for e in groups.row_group(0).column(column).encodings}
    assert encodings <= {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}


def test_files_are_cut_by_size_and_together_hold_every_row_once(small_store, tmp_path, monkeypatch):
    for bound in ("FILE_BYTES", "GROUP_BYTES"):
        monkeypatch.setattr(f"weights_store.sharing.data_files.{bound}", 1)
    rows = small_store.scan(NAME).with_columns(split=pl.lit("train")).sort("pair_id", descending=True).collect()
    table = small_store.table("weights/hh-harmless/cut")
    for pair in rows.iter_slices(1):  # four commits, one row group each
        table.append(pair.to_arrow(), small_store.metadata(NAME))
    *files, _ = small_store.export("hh-harmless/cut", tmp_path / "out")
    assert [path.name for path in files] == [f"train-{index:05d}-of-00004.parquet" for index in range(4)]
    read = [pl.read_parquet(path) for path in files]
    assert [part["pair_id"].to_list() for part in read] == [["d"], ["c"], ["b"], ["a"]]
    assert pl.concat(read)["row"].to_list() == [0, 1, 2, 3]


def test_an_older_version_is_exported_when_asked_for(small_store, tmp_path):
    files = small_store.export(NAME, tmp_path / "out", version=0)
    assert pl.read_parquet(files[0])["pair_id"].to_list() == ["a", "b", "c"]
    record = json.loads(files[-1].read_text())
    assert (record["name"], record["fingerprint"]) == (f"{NAME}@0", small_store.resolve(NAME, 0).fingerprint)
    name = "data/train-00000-of-00001.parquet"
    assert record["splits"] == {"train": {"num_pairs": 3, "files": [name]}}
    assert record["files"] == {name: hashlib.sha256(files[0].read_bytes()).hexdigest()}


def test_the_record_says_how_the_weights_were_made_and_every_parquet_file_says_the_same(small_store, tmp_path, texts):
    *files, last = small_store.export(NAME, tmp_path / "out", tokenizer=texts, licence="cc-by-4.0")
    record, metadata = json.loads(last.read_text()), small_store.metadata(NAME)
    assert record["licence"] == "cc-by-4.0"
    assert record["identity"]["settings"] == metadata["identity"]["settings"]
    assert record["tokenizer"] == {"eos_token_id": 9, "vocab_size": 10}
    names = [row["name"] for row in record["lineage"]]
    assert names == small_store.lineage(NAME)["name"].to_list()
    for path in files:
        footer = json.loads(pq.read_schema(path).metadata[b"tokenweights"])
        assert footer == {key: record[key] for key in footer if key != "splits"} | {
            "splits": {"test": {"num_pairs": 1}, "train": {"num_pairs": 3}}
        }
        assert record.keys() - footer.keys() == {"format", "shards", "files", "sha256"}


def test_texts_stand_beside_the_ids(small_store, tmp_path, texts):
    files = small_store.export(NAME, tmp_path / "out", tokenizer=texts)
    assert pl.read_parquet(files[1]).select("pair_id", "prompt", "chosen", "rejected").rows() == [
        ("a", "Q?", "Yes sir</s>", "No</s>"),
        ("b", "Q", " caf</s>é</s>", "!Yes</s>"),
        ("c", "?Q?", " sir</s>", "No café!</s>"),
    ]
    files = small_store.export(NAME, tmp_path / "ids")
    assert "prompt" not in pl.read_parquet(files[1]).columns


def test_jsonl_has_the_fields_of_the_release(small_store, tmp_path, texts):
    files = small_store.export(NAME, tmp_path / "out", format="jsonl", tokenizer=texts)
    assert [path.name for path in files] == ["test.jsonl", "train.jsonl", "tokenweights.json"]
    # Chosen weights negated, as the release's loader negates them again; the last EOS (9) left out, the one inside b kept.
    assert lines(files[1]) == [
        {
            "prompt": "Q?",
            "chosen": "Yes sir",
            "rejected": "No",
            "chosen_weight": [-1.0, -2.0],
            "rejected_weight": [0.25],
        },
        {
            "prompt": "Q",
            "chosen": " caf</s>é",
            "rejected": "!Yes",
            "chosen_weight": [-4.0, -1.0, -0.5],
            "rejected_weight": [2.0, 1.5],
        },
        {
            "prompt": "?Q?",
            "chosen": " sir",
            "rejected": "No caf\u00e9!",
            "chosen_weight": [-0.5],
            "rejected_weight": [1.5, 1.25, 1.0, 1.25],
        },
    ]
    # Cut before EOS: nothing to leave out. Nothing but EOS: nothing left.
    assert lines(files[0]) == [
        {"prompt": "QQ", "chosen": "Yes", "rejected": "", "chosen_weight": [-1.25], "rejected_weight": []}
    ]


@pytest.mark.parametrize(("form", "is_said"), [("jsonl", True), ("tinker", False), ("parquet", False)])
def test_pair_weights_that_lines_cannot_hold_are_not_dropped_without_a_word(
    small_store, tmp_path, caplog, form, is_said
):
    rows = (
        small_store.scan(NAME).with_columns(pair_weight=pl.col("split").eq("test") * pl.lit(0.5, pl.Float32)).collect()
    )
    small_store.table("weights/hh-harmless/paired").append(rows.to_arrow(), small_store.metadata(NAME))
    small_store.export("hh-harmless/paired", tmp_path / "out", format=form)
    found = [record.message for record in caplog.records if "no pair weights" in record.message]
    assert (
        found
        == [
            "lines of jsonl have no pair weights, and 4 pairs have another one than 1: they will count as all others "
            "do; parquet and tinker keep them"
        ]
        * is_said
    )
    small_store.export(NAME, tmp_path / "ones", format=form)
    assert sum("no pair weights" in record.message for record in caplog.records) == is_said


def test_the_release_trains_on_the_stored_weights(small_store, tmp_path, texts):
    # The release's loader, in our words: z = -chosen_weight, z = rejected_weight; transform "origin" is w = z; EOS gets 0.
    files = small_store.export(NAME, tmp_path / "out", format="jsonl", tokenizer=texts)
    read = [([-z for z in line["chosen_weight"]], line["rejected_weight"]) for line in lines(files[1])]
    stored = small_store.scan(NAME, 0).collect()
    for (chosen, rejected), row in zip(read, stored.to_dicts(), strict=True):
        assert [*chosen, 0.0] == [*row["chosen_token_weights"][:-1], 0.0]
        assert [*rejected, 0.0] == [*row["rejected_token_weights"][:-1], 0.0]


def test_without_a_tokenizer_ids_stand_in_the_place_of_text(small_store, tmp_path):
    files = small_store.export(NAME, tmp_path / "out", version=0, format="jsonl")
    assert list(lines(files[0])[0]) == ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_weight", "rejected_weight"]
    assert lines(files[0])[1]["chosen_ids"] == [6, 9, 7]


def test_jsonl_numbers_are_not_rounded(small_store, tmp_path):
    rows = small_store.scan(NAME, 0).with_columns(
        pl.lit(pl.Series([[0.60668945, 0.1, 4.4814453]], dtype=pl.List(pl.Float32))).alias("chosen_token_weights")
    )
    table = small_store.table("weights/hh-harmless/fine")
    table.append(rows.filter(pair_id="a").collect().to_arrow(), small_store.metadata(NAME))
    (path, _) = small_store.export("hh-harmless/fine", tmp_path / "out", format="jsonl")
    stored = small_store.scan("hh-harmless/fine").collect()["chosen_token_weights"].to_list()[0]
    back = pl.Series(lines(path)[0]["chosen_weight"], dtype=pl.Float32)
    assert (-back).to_list() == stored[:2]


def test_a_split_that_is_no_file_name_gets_one(small_store, tmp_path):
    rows = small_store.scan(NAME, 0).with_columns(split=pl.lit("../train[:10%]"))
    table = small_store.table("weights/hh-harmless/part")
    table.append(rows.collect().to_arrow(), small_store.metadata(NAME))
    files = small_store.export("hh-harmless/part", tmp_path / "out", format="jsonl")
    assert [path.name for path in files] == ["train_10.jsonl", "tokenweights.json"]


def test_an_empty_folder_is_filled_and_a_full_one_refused(small_store, tmp_path):
    (tmp_path / "out").mkdir()
    small_store.export(NAME, tmp_path / "out")
    with pytest.raises(InputError, match="out exists and is not an empty folder"):
        small_store.export(NAME, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file exists"):
        small_store.export(NAME, tmp_path / "file")


def test_a_link_is_followed_and_stays_a_link(small_store, tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("link", "disk"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        files = small_store.export(NAME, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert all(file.is_file() for file in files)
        assert (tmp_path / target / "tokenweights.json").is_file()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (".", r"\. is the current folder, which cannot be replaced .* a new one in it"),
        ("s3://bucket/out", "s3:/bucket/out is a URI; give a folder of this machine"),
    ],
)
def test_a_place_that_cannot_become_the_folder_is_refused_before_the_work(
    read_store, tmp_path, monkeypatch, place, text
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights_store.views.export.write_parquet", pytest.fail)
    with pytest.raises(InputError, match=text):
        read_store.export(NAME, place)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_refused(read_store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out cannot be made: .*/file is a file; give another folder"):
        read_store.export(NAME, tmp_path / "file" / "out")


def test_a_mount_point_is_refused_before_the_work(read_store, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == tmp_path)
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced"):
        read_store.export(NAME, tmp_path)


def test_two_exports_into_one_folder_do_not_mix_and_a_killed_one_leaves_nothing_behind(small_store, tmp_path):
    (tmp_path / ".out.tokenweights-partial").mkdir()
    (tmp_path / ".out.tokenweights-partial" / "part-00007.parquet").touch()  # of an export that was killed
    with ThreadPoolExecutor() as exports, locked(tmp_path / ".out.tokenweights-lock", pytest.fail):
        both = [exports.submit(small_store.export, NAME, tmp_path / "out") for _ in range(2)]
        with pytest.raises(TimeoutError):
            both[0].result(timeout=0.2)
        assert not (tmp_path / "out").exists()
    errors = [export.exception(timeout=60) for export in both]
    assert sum(error is None for error in errors) == 1
    assert "exists and is not an empty folder" in str(errors[0] or errors[1])
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "tokenweights.json"]


def test_a_home_folder_is_meant_and_not_a_folder_of_that_name(small_store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert small_store.export(NAME, "~/out")[-1] == tmp_path / "out" / "tokenweights.json"


def test_unknown_formats_are_refused(small_store, tmp_path):
    with pytest.raises(InputError, match="no export format 'csv': expected one of parquet, jsonl"):
        small_store.export(NAME, tmp_path / "out", format="csv")


def test_an_export_that_fails_leaves_nothing(small_store, tmp_path, texts):
    with pytest.raises(MismatchError, match="is not in the tokenizer given"):
        small_store.export(NAME, tmp_path / "out", format="jsonl", tokenizer={3: "Yes"})
    shard = small_store.table(f"weights/{NAME}").shards()[-1]
    path = small_store.root.path / f"weights/{NAME}" / shard
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError):
        small_store.export(NAME, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_version_without_an_eos_id_has_no_jsonl(small_store, tmp_path):
    metadata = {key: value for key, value in small_store.metadata(NAME).items() if key != "tokenizer"}
    table = small_store.table("weights/hh-harmless/bare")
    table.append(small_store.scan(NAME).collect().to_arrow(), metadata)
    with pytest.raises(MismatchError, match="records no EOS id"):
        small_store.export("hh-harmless/bare", tmp_path / "out", format="jsonl")
