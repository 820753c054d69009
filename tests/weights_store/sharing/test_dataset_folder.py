"""What `push` writes into a folder, read by the programs of strangers."""

import hashlib
import json

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml

import tokenweights
from weights_store.errors import InputError
from weights_store.sharing.data_files import file_names
from weights_store.sharing.dataset_folder import files_of, write_dataset_folder
from weights_store.sharing.publishable import publishable

NAME = "hh-harmless/tis-dpo"


@pytest.fixture
def write(tmp_path, texts):
    """Return a function that writes the newest version of a dataset into a new folder, and returns it with its record."""

    def write(store, name=NAME, folder="out", place="owner/weights", **options):
        made = tmp_path / folder
        made.mkdir()
        record = write_dataset_folder(store.root, store.resolve(name), made, place, **{"tokenizer": texts, **options})
        return made, record

    return write


def test_datasets_polars_and_duckdb_read_the_rows_of_the_store(write, read_store, tmp_path):
    from datasets import load_dataset

    folder, _ = write(read_store)
    expected = read_store.scan(NAME).sort("pair_id").collect().to_dicts()  # a, b, c are train, d is test
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    streamed = load_dataset(str(folder), streaming=True)
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 3, "test": 1}
    for splits in (loaded, streamed):
        rows = [row for split in ("train", "test") for row in splits[split]]
        assert [{name: row[name] for name in expected[0]} for row in rows] == expected
    assert [row["chosen"] for row in streamed["train"]] == ["Yes sir</s>", " caf</s>é</s>", " sir</s>"]
    names = list(expected[0])
    assert pl.scan_parquet(folder / "data/*.parquet").select(names).sort("pair_id").collect().to_dicts() == expected
    query = f"SELECT {', '.join(names)} FROM '{folder}/data/*.parquet' ORDER BY pair_id"
    assert duckdb.sql(query).pl().to_dicts() == expected


def test_the_card_has_what_a_hub_and_a_stranger_want_to_know(write, read_store):
    folder, record = write(read_store, licence="cc-by-4.0")
    _, header, card = (folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["license"] == "cc-by-4.0"
    assert found["size_categories"] == ["n<1K"]
    files = [{"split": "train", "path": "data/train-*"}, {"split": "test", "path": "data/test-*"}]  # the largest first
    assert found["configs"] == [{"config_name": "default", "data_files": files}]
    for text in (
        'load_dataset("owner/weights", split="train"',
        "tokenweights pull owner/weights",
        "4 preference pairs",
        "tis: k 1.0",
        "| `weights.k` | `1.0` |",
    ):
        assert text in card
    diagnoses = read_store.doctor(NAME)
    assert diagnoses
    for diagnosis in diagnoses:
        assert f"`{diagnosis.name}`: {diagnosis}" in card
    for row in read_store.lineage(NAME).to_dicts():
        assert f"| `{row['fingerprint'][:12]}` |" in card
    assert "![A pair, each token coloured by its weight](heat-map.png)" in card
    assert (folder / "heat-map.png").read_bytes().startswith(b"\x89PNG")
    assert list(files_of(record, folder)) == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
        "README.md",
        "croissant.json",
        "heat-map.png",
        "tokenweights.json",
    ]
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_an_unknown_licence_is_said_to_be_unknown_and_ids_need_no_tokenizer(write, read_store):
    folder, record = write(read_store, tokenizer=None)
    card = (folder / "README.md").read_text()
    assert record["licence"] == yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert "The licence of the source is unknown" in card
    assert "`prompt`, `chosen`, `rejected`" not in card


def test_the_card_of_single_responses_does_not_call_them_pairs(write, small_store):
    rows = small_store.scan(NAME).collect()
    gone = [
        pl.lit([], rows.schema[name]).alias(name)
        for name in rows.columns
        if name.startswith("rejected_") and "score" not in name
    ]
    metadata = small_store.metadata(NAME)
    changed = {**metadata, "parents": [], "statistics": {**metadata["statistics"], "num_unpaired_rows": 4}}
    small_store.table("weights/hh-harmless/single").append(rows.with_columns(gone).to_arrow(), changed)
    folder, _ = write(small_store, "hh-harmless/single")
    card = (folder / "README.md").read_text()
    assert "4 rows with a weight for every response token. 4 of them have one response, for KTO" in card
    assert "preference pair" not in card
    assert pl.read_parquet(folder / "data/*.parquet")["rejected"].to_list() == [""] * 4
    assert (folder / "heat-map.png").exists()
    changed["statistics"] |= {"chosen": {"num_responses": 4}, "rejected": {"num_responses": 0}}  # no row has a label
    small_store.table("weights/hh-harmless/chosen").append(rows.with_columns(gone).to_arrow(), changed)
    folder, _ = write(small_store, "hh-harmless/chosen", folder="chosen")
    card = (folder / "README.md").read_text()
    assert "4 rows with a weight for every response token. Each has one response, for distillation or SFT" in card
    assert "KTO" not in card.partition("## Columns")[0]


def test_one_row_makes_a_whole_folder_and_none_is_refused(write, small_store):
    rows, metadata = small_store.scan(NAME).collect().to_arrow(), {**small_store.metadata(NAME), "parents": []}
    small_store.table("weights/hh-harmless/one").append(rows.slice(0, 1), metadata)
    folder, record = write(small_store, "hh-harmless/one")
    assert "\n\n1 preference pair with a weight" in (folder / "README.md").read_text()
    assert "heat-map.png" in record["files"]
    small_store.table("weights/hh-harmless/none").replace(rows.slice(0, 0), metadata)
    with pytest.raises(InputError, match=r"^weights/hh-harmless/none@0 has no rows: there is nothing to push$"):
        write(small_store, "hh-harmless/none", folder="none")


def test_signs_of_markdown_and_html_in_settings_and_places_are_shown_as_they_are(write, small_store):
    patterns = [["`<b>|\\d` ```x``` [a](b)\n\u2028é", 0.5]]
    metadata = small_store.metadata(NAME)
    settings = {"weights": {"estimator": "pattern", "patterns": patterns}, "contrast": {}}
    changed = {**metadata, "identity": {**metadata["identity"], "settings": settings}}
    small_store.table("weights/hh-harmless/signs").append(small_store.scan(NAME).collect().to_arrow(), changed)
    folder, _ = write(small_store, "hh-harmless/signs", licence="[x](y)", place='./it\'s "new"')
    card = (folder / "README.md").read_text()
    shown = '[["`<b>\\|\\\\d` ```x``` [a](b)\\n\\u2028é", 0.5]]'  # as JSON, with the bar escaped for the table
    assert f"| `weights.patterns` | ````{shown}```` |" in card
    assert "Of the source: \\[x](y)." in card
    assert 'load_dataset("./it\'s \\"new\\""' in card
    assert "tokenweights pull './it'\"'\"'s \"new\"'" in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "[x](y)"


@pytest.mark.parametrize("licence", ["", " ", "mit\nor so"])
def test_a_licence_that_is_no_text_is_refused(write, read_store, licence):
    with pytest.raises(InputError, match="expected a name such as mit or cc-by-4.0; leave it out if it is unknown"):
        write(read_store, licence=licence)


def test_without_matplotlib_there_is_no_picture_and_the_card_shows_none(write, read_store, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with caplog.at_level("INFO", "tokenweights"):
        folder, _ = write(read_store)
    assert not (folder / "heat-map.png").exists()
    assert "heat-map" not in (folder / "README.md").read_text()
    assert "no picture in the card: a figure needs the package 'matplotlib'" in caplog.text


def test_croissant_names_every_file_and_every_column(write, read_store):
    folder, _ = write(read_store)
    found = json.loads((folder / "croissant.json").read_text())
    files = {entry["contentUrl"]: entry["sha256"] for entry in found["distribution"] if "sha256" in entry}
    data = sorted(folder.glob("data/*"))
    assert files == {f"data/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in data}
    (rows,) = found["recordSet"]
    fields = {field["name"]: (field["dataType"], field.get("repeated", False)) for field in rows["field"]}
    assert list(fields) == pq.read_schema(data[0]).names
    assert fields["chosen"] == ("sc:Text", False)
    assert fields["chosen_ids"] == ("sc:Integer", True)
    assert fields["chosen_token_weights"] == ("sc:Float", True)
    assert fields["pair_weight"] == ("sc:Float", False)


def test_the_same_version_gives_the_same_bytes(write, read_store):
    (first, _), (second, _) = write(read_store, folder="one"), write(read_store, folder="two")
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(names) == 6
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def test_no_path_of_this_machine_is_published(write, small_store, tmp_path):
    private = tmp_path / "private" / "raw" / "pairs.jsonl"
    metadata = small_store.metadata(NAME)
    recipe = {
        "dataset": {"source": str(private)},
        "model": {"path": "~/models/tiny"},
        "store": {"uri": str(small_store.root)},
        "score": {"python": "/envs/private/score/bin/python"},
        "contrast": {"positive_prompt": "/no_think\nbe kind"},
    }
    changed = {**metadata, "recipe": recipe, "reference": {"model": str(tmp_path / "private/models/tiny")}}
    small_store.table("weights/hh-harmless/moved").append(small_store.scan(NAME).collect().to_arrow(), changed)
    folder, record = write(small_store, "hh-harmless/moved")
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"private" not in path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
    assert record["recipe"] == {
        "dataset": {"source": "…/raw/pairs.jsonl"},
        "model": {"path": "…/models/tiny"},
        "score": {"python": "…/bin/python"},
        "contrast": {"positive_prompt": "/no_think\nbe kind"},
    }


def test_places_are_shortened_at_any_depth_and_nothing_else_is():
    settings = {"a": ["/x/y/z", {"b": "../data/q.json"}], "c": "owner/name", "d": 1.5, "e": None, "f": "s3://bucket/x"}
    settings["weights"] = {"patterns": [["~~~", 2.0], ["/a/b/c", 0.5]]}
    settings["contrast"] = {"positive_prompt": "/no_think", "negative_prompt": ["/think", "./x"]}
    assert publishable(settings) == {**settings, "a": ["…/y/z", {"b": "…/data/q.json"}]}
    assert publishable("/models") == "…/models"


def test_splits_get_names_that_files_and_datasets_can_have():
    splits = ["train", "train[:10%]", "train 10", "../..", "all", "été"]
    assert file_names(splits) == {
        "train": "train",
        "train[:10%]": "train_10",
        "train 10": "train_10_2",
        "../..": "split",
        "all": "all_2",
        "été": "t",
    }


def test_a_push_into_a_folder_leaves_nothing_half_done(small_store, tmp_path, capsys):
    command = ["push", NAME, str(tmp_path / "shared"), "--store", str(small_store.root)]
    shard = small_store.table(f"weights/{NAME}").shards()[0]
    path = small_store.root.path / f"weights/{NAME}" / shard
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    assert tokenweights.main(command) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    path.write_bytes(good)
    (tmp_path / ".shared.tokenweights-partial" / "data").mkdir(parents=True)  # of a push that was killed
    (tmp_path / ".shared.tokenweights-partial" / "data" / "train-00007.parquet").touch()
    assert tokenweights.main(command) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shared", "store"]
    files = sorted(str(file.relative_to(tmp_path)) for file in (tmp_path / "shared").rglob("*") if file.is_file())
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == [str(tmp_path / file) for file in files]
    card = (tmp_path / "shared" / "README.md").read_text()
    assert 'load_dataset("./shared"' in card
    assert str(tmp_path) not in card
    assert tokenweights.main([command[0], "hh-harmless/reversed", *command[2:]]) == 1
    assert f"shared holds {NAME}, and hh-harmless/reversed is to be pushed; choose" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert tokenweights.main([*command[:2], str(tmp_path / "mine"), *command[3:]]) == 1
    assert "mine exists and is not an empty folder" in capsys.readouterr().err


@pytest.fixture
def push(small_store, tmp_path, capsys):
    """Return a function that pushes a version into the folder `shared`: the exit code, and what was said."""

    def push(what, *options, target=None):
        code = tokenweights.main(
            ["push", what, str(target or tmp_path / "shared"), *options, "--store", str(small_store.root)]
        )
        return code, capsys.readouterr().err

    return push


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_version_replaces_an_earlier_push_in_a_folder_whole(push, tmp_path):
    push(NAME)
    push(f"{NAME}@0", target=tmp_path / "shared-0")
    of_both = [contents(tmp_path / name) for name in ("shared", "shared-0")]
    assert "data/test-00000-of-00001.parquet" in of_both[0].keys() - of_both[1].keys()  # version 0 has no such split
    (tmp_path / "link").symlink_to("shared")
    (tmp_path / "shared").chmod(0o2775)  # for a group
    assert push(f"{NAME}@0", target=tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "shared").stat().st_mode & 0o7777 == 0o2775
    found = contents(tmp_path / "shared")
    assert found.keys() == of_both[1].keys()
    of_place = {"README.md", "tokenweights.json"}  # the card names the folder
    assert all(found[name] == of_both[1][name] for name in found.keys() - of_place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "shared", "shared-0", "store"]


def test_a_push_that_fails_or_is_killed_keeps_the_earlier_one(push, small_store, tmp_path, monkeypatch):
    push(NAME)
    before = contents(tmp_path / "shared")
    with monkeypatch.context() as patch:
        patch.setattr(
            "weights_store.sharing.dataset_folder.croissant", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        code, said = push(f"{NAME}@0")
        assert (code, said.splitlines()[-1]) == (1, "error: full")
    assert contents(tmp_path / "shared") == before
    # Of a push that was killed before the new folder had its name.
    (tmp_path / "shared").rename(tmp_path / ".shared.tokenweights-old")
    (tmp_path / ".shared.tokenweights-partial").mkdir()
    (tmp_path / ".shared.old").mkdir()  # somebody's
    assert push("hh-harmless/none")[0] == 1
    assert push("hh-harmless/reversed")[0] == 1  # the old one is back, and is another dataset
    assert contents(tmp_path / "shared") == before
    assert push(NAME)[0] == 0
    assert contents(tmp_path / "shared") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shared.old", "shared", "store"]


def test_words_and_files_of_people_are_not_lost_with_an_earlier_push(push, tmp_path):
    push(NAME)
    card = tmp_path / "shared" / "README.md"
    written = card.read_bytes()
    card.write_bytes(written + b"\nRead this first.\n")
    code, said = push(NAME)
    assert (code, f"{card} was changed since it was pushed: keep your words somewhere else" in said) == (1, True)
    assert card.read_bytes().endswith(b"Read this first.\n")
    assert push(NAME, "--replace-card")[0] == 0
    assert card.read_bytes() == written
    (tmp_path / "shared" / "data" / "notes.txt").touch()
    code, said = push(NAME, "--replace-card")
    assert (code, "holds 1 file that `tokenweights push` did not write, for example data/notes.txt" in said) == (
        1,
        True,
    )
    (tmp_path / "shared" / "data" / "notes.txt").unlink()
    (tmp_path / "shared" / "tokenweights.json").write_text("{}")
    code, said = push(NAME)
    assert (code, said.splitlines()[-1]) == (
        1,
        f"error: {tmp_path / 'shared'} is not empty, and its tokenweights.json is not that of an earlier push; choose another "
        "folder",
    )
