"""Whoever takes a contrastive model from the shelf gets the one that was put there, or one clear line."""

import json
import random
import shutil

import pytest

from pipeline.models.contrastive import ModelShelf
from weights_store.checks.model_folders import model_name
from weights_store.errors import DamageError
from weights_store.fingerprint import fingerprint_model
from weights_store.location import Location

FILES = {
    "config.json": b'{"vocab_size": 9}',
    "model-1.safetensors": bytes(range(256)) * 4,
    "model-2.safetensors": bytes(range(1, 256)) * 4,
    "tokenizer.json": b'{"model": {}}',
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "README.md": b"# A model",
    "metrics.json": b'{"steps": 2}',
    "lineage.json": b'{"kind": "sft"}',
}
IDENTITY = {
    "side": "positive",
    "model": "5f" * 32,
    "training": {"method": "sft", "seed": 0},
    "table": "weights/toy/uniform",
}
NAME = model_name(IDENTITY, "da" * 32)


def put(shelf, **changed):
    """Put the model of `FILES` on a shelf, and return its folder on this machine."""
    folder = shelf.place(NAME)
    for name, content in (FILES | changed).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    made = {"identity": IDENTITY, "data": "da" * 32, "version": 3, "fingerprint": fingerprint_model(folder)}
    shelf.put(NAME, made)
    return folder


@pytest.fixture
def shelf(tmp_path):
    return ModelShelf(Location(str(tmp_path / "models")))


@pytest.fixture
def remote_shelf(counting_s3, tmp_path, monkeypatch):
    """A shelf in an object store, with an empty cache on this machine."""
    keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in (keys | {"ENDPOINT_URL": counting_s3}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    return ModelShelf(Location(f"s3://bucket/{tmp_path.name}/models"))


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def refusal(shelf):
    with pytest.raises(DamageError) as caught:
        shelf.find(NAME)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_model_is_found_as_it_was_put_there(shelf):
    assert shelf.find(NAME) is None
    folder = put(shelf)
    assert shelf.find(NAME) == folder
    (record,) = shelf.records()
    assert (record["identity"], record["data"], record["version"]) == (IDENTITY, "da" * 32, 3)
    assert record["files"].keys() == FILES.keys()


def test_each_flipped_bit_of_each_file_is_found_and_the_file_is_named(shelf):
    folder, rng = put(shelf), random.Random(15)
    for name, content in FILES.items():
        for bit in rng.sample(range(8 * len(content)), min(20, 8 * len(content))):
            flip(folder / name, bit)
            assert refusal(shelf).startswith(f"{folder}/{name} is damaged: its SHA-256 is ")
            (folder / name).write_bytes(content)
    assert shelf.find(NAME) == folder


def test_each_flipped_bit_of_the_record_is_found_by_whoever_reads_it(shelf):
    record = put(shelf) / "contrast.json"
    whole = record.read_bytes()
    for bit in random.Random(15).sample(range(8 * len(whole)), 400):
        flip(record, bit)
        assert refusal(shelf).startswith(f"{record} is ")
        with pytest.raises(DamageError, match="^[^\n]+; restore it from a copy, or delete [^\n]+$"):
            list(shelf.records())
        record.write_bytes(whole)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"identity": {}', b"[" * 20_000, b"\xff\xfe", b"null"])
def test_a_record_that_is_cut_or_something_else_is_one_line(shelf, data):
    record = put(shelf) / "contrast.json"
    record.write_bytes(data)
    assert refusal(shelf).startswith(f"{record} is damaged: ")


def test_missing_and_foreign_files_are_named_and_hidden_ones_do_not_matter(shelf):
    folder = put(shelf)
    (folder / ".DS_Store").write_bytes(b"of a file manager")
    assert shelf.find(NAME) == folder
    (folder / "generation_config.json").write_text("{}")
    assert refusal(shelf).startswith(f"{folder}/generation_config.json is not of this model: it was not there when")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    expected = (
        f"{folder}/tokenizer.json is missing; restore it from a copy, or delete {folder}: a build then trains the"
    )
    assert refusal(shelf).startswith(expected)


def test_a_model_in_the_place_of_another_is_refused(shelf):
    folder = put(shelf)
    folder.rename(folder.with_name("0" * 16))
    with pytest.raises(DamageError, match=f"contrast.json is the record of another model, {NAME}; "):
        list(shelf.records())


def test_a_record_of_an_earlier_version_covers_weights_and_config(shelf):
    folder = put(shelf)
    record = json.loads((folder / "contrast.json").read_text())
    del record["files"], record["sha256"]
    (folder / "contrast.json").write_text(json.dumps(record))
    assert shelf.find(NAME) == folder
    flip(folder / "tokenizer.json", 0)
    assert shelf.find(NAME) == folder
    flip(folder / "model-2.safetensors", 1000)
    assert refusal(shelf).startswith(f"{folder}/weights or config.json are damaged: their fingerprint is ")


def test_a_record_that_lost_its_digests_is_not_taken_for_an_old_one(shelf):
    record = put(shelf) / "contrast.json"
    content = json.loads(record.read_text())
    for key in ("files", "sha256"):
        record.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
        assert refusal(shelf).startswith(f"{record} is damaged: its SHA-256 is ")


def test_a_damaged_copy_of_a_remote_model_is_fetched_again(remote_shelf):
    folder = put(remote_shelf)
    assert remote_shelf.find(NAME) == folder
    for name in ("model-1.safetensors", "contrast.json", "tokenizer.json"):
        flip(folder / name, 77)
        assert remote_shelf.find(NAME) == folder
        assert {file: (folder / file).read_bytes() for file in FILES} == FILES
    shutil.rmtree(folder)
    assert remote_shelf.find(NAME) == folder
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_a_damaged_model_in_the_object_store_is_refused_by_its_address_there(remote_shelf):
    folder = put(remote_shelf)
    shutil.rmtree(folder)
    place = remote_shelf.location / NAME
    place.write("model-2.safetensors", FILES["model-2.safetensors"][:-1])
    assert refusal(remote_shelf).startswith(f"{place}/model-2.safetensors is damaged: ")
    assert not folder.exists()
    place.write("contrast.json", place.read("contrast.json")[:-1])
    assert refusal(remote_shelf).startswith(f"{place}/contrast.json is damaged: ")


def test_a_model_that_has_left_the_object_store_is_not_taken_from_the_cache(remote_shelf):
    folder = put(remote_shelf)
    for name in (*FILES, "contrast.json"):
        (remote_shelf.location / NAME).delete(name)
    assert remote_shelf.find(NAME) is None
    assert not folder.exists()  # else a training would be skipped, since its folder is finished


def test_of_two_machines_that_train_the_same_model_the_first_one_wins(remote_shelf, tmp_path, monkeypatch):
    put(remote_shelf, **{"README.md": b"of the first"})
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "second"))
    folder = put(remote_shelf, **{"README.md": b"of the second"})
    assert (folder / "README.md").read_bytes() == b"of the first"
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "third"))
    assert (remote_shelf.find(NAME) / "README.md").read_bytes() == b"of the first"


def test_a_download_clears_what_a_killed_one_left(remote_shelf, tmp_path, monkeypatch):
    put(remote_shelf)
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "second"))
    partial = remote_shelf.place(NAME).with_name(f".{NAME}.partial")
    partial.mkdir(parents=True)
    (partial / "left.safetensors").touch()
    folder = remote_shelf.find(NAME)
    assert not (folder / "left.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == [NAME]
