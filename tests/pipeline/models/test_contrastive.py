"""The contrastive models of a store in an object store, as machines with a cache of their own see them."""

import pytest

from pipeline.models.contrastive import ModelShelf
from weights_store.location import Location

NAME = "0123456789abcdef"


@pytest.fixture
def machine(counting_s3, tmp_path, monkeypatch):
    """Return a function that makes this process the machine of a name: its own cache, the same store."""
    environment = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in (environment | {"ENDPOINT_URL": counting_s3}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def be(name):
        monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / name))
        return ModelShelf(Location("s3://bucket/store/models"))

    return be


def train_on(models, text):
    """Put a model of one file."""
    models.place(NAME).mkdir(parents=True)
    (models.place(NAME) / "model.safetensors").write_text(text)
    models.put(NAME, {"identity": {}, "data": "d", "version": 0, "fingerprint": text})
    return (models.place(NAME) / "model.safetensors").read_text()


def test_of_two_machines_that_train_the_same_model_the_first_one_wins(machine):
    assert train_on(machine("first"), "of the first") == "of the first"
    assert train_on(machine("second"), "of the second") == "of the first"
    (record,) = machine("third").records()
    assert record["fingerprint"] == "of the first"


def test_a_download_clears_what_a_killed_one_left(machine):
    train_on(machine("first"), "whole")
    models = machine("second")
    partial = models.place(NAME).with_name(f".{NAME}.partial")
    partial.mkdir(parents=True)
    (partial / "left.safetensors").touch()
    folder = models.find(NAME)
    assert sorted(path.name for path in folder.iterdir()) == ["contrast.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [NAME]
