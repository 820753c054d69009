"""What a recipe, a training config or a run's parameters may name when the operator has set TOKENWEIGHTS_ALLOWED."""

import os
import sys

import pytest

from weights_store.allowed import check_interpreter_place, check_place
from weights_store.errors import InputError, SettingsError
from weights_store.settings import load_toml


@pytest.fixture
def allow(monkeypatch):
    return lambda *entries: monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", os.pathsep.join(map(str, entries)))


def is_allowed(place, hub=None):
    try:
        check_place("x.place", str(place), hub)
    except InputError:
        return False
    return True


def test_without_the_list_every_place_is_allowed(monkeypatch):
    monkeypatch.delenv("TOKENWEIGHTS_ALLOWED", raising=False)
    assert is_allowed("/etc/passwd")
    check_interpreter_place("score.python", "/bin/sh")


def test_an_empty_list_allows_nothing(allow, tmp_path):
    allow()
    with pytest.raises(InputError, match="outside of what the operator allows: nothing; change it"):
        check_place("x.place", str(tmp_path))


def test_a_folder_allows_itself_and_what_is_below_it(allow, tmp_path, monkeypatch):
    allow(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for place in (
        "data",
        "data/",
        "data/pairs.jsonl",
        tmp_path / "data" / "not" / "there",
        f"file://{tmp_path}/data/a%20b",
    ):
        assert is_allowed(place), place
    for place in (".", "database", "data/../models", "/", f"file://{tmp_path}/data/%2e%2e/models", "data/./../../etc"):
        assert not is_allowed(place), place


def test_the_home_of_nobody_is_a_name_like_any_other(allow, tmp_path, monkeypatch):
    allow(tmp_path / "data")
    assert not is_allowed("~nobody-here/x")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert is_allowed("~nobody-here/x")  # as a store has it


def test_a_link_counts_as_what_it_points_to(allow, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "in").symlink_to(tmp_path / "data")
    allow(tmp_path / "in")
    assert is_allowed(tmp_path / "data" / "pairs.jsonl")
    assert is_allowed(tmp_path / "in" / "pairs.jsonl")
    with pytest.raises(InputError, match=f"x.place {tmp_path}/data/out/a \\({tmp_path}/secret/a\\) is outside"):
        check_place("x.place", str(tmp_path / "data" / "out" / "a"))


def test_uris_are_allowed_by_whole_parts_of_their_beginning(allow):
    allow("/data", "s3://bucket/team", "abfss://box@account.example/")
    assert is_allowed("s3://bucket/team")
    assert is_allowed("s3://bucket/team/store")
    assert is_allowed("abfss://box@account.example/a")
    for place in ("s3://bucket", "s3://bucket/teams", "s3://other/team", "gs://bucket/team", "/s3://bucket/team"):
        assert not is_allowed(place), place


def test_a_machine_is_allowed_with_its_port(allow):
    allow("/data", "ray://head:10001", "tcp://head:29500", "/stores")
    for place in ("ray://head:10001", "tcp://head:29500", "/data/a", "/stores/a"):
        assert is_allowed(place), place
    for place in ("ray://head:10002", "ray://head", "tcp://other:29500", "tcp://head:2950"):
        assert not is_allowed(place), place


def test_hub_ids_are_allowed_only_explicitly(allow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    models, datasets = "hf://", "hf://datasets/"
    allow("/data")
    assert not is_allowed("owner/name", models)
    allow("hf://owner")
    assert is_allowed("owner/name", models)
    assert not is_allowed("owner/name", datasets)
    assert not is_allowed("owners/name", models)
    assert not is_allowed("owner/here", models), "a folder of this machine comes first, as when it is loaded"
    assert not is_allowed("../owner/name", models)
    allow("hf://")
    assert is_allowed("owner/name", models)
    assert is_allowed("owner/name", datasets)
    assert not is_allowed("owner/name"), "this setting takes no ids"


def test_an_entry_that_is_neither_absolute_nor_a_uri_is_refused(allow):
    allow("/data", "models")
    with pytest.raises(SettingsError, match="TOKENWEIGHTS_ALLOWED has 'models': expected absolute folders and URIs"):
        check_place("x.place", "/data")


def test_a_folder_allows_no_interpreter_in_it(allow, tmp_path, monkeypatch):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    allow(tmp_path)
    check_interpreter_place("score.python", sys.executable)
    with pytest.raises(InputError, match=r"score\.python .* is none of the interpreters that the operator allows: "):
        check_interpreter_place("score.python", str(python))
    allow(tmp_path, python)
    check_interpreter_place("score.python", str(python))
    check_interpreter_place("score.python", f"{python.parent}/../bin/python")
    allow(tmp_path)
    monkeypatch.setenv("TOKENWEIGHTS_TRAIN_PYTHON", str(python))
    check_interpreter_place("contrast.python", str(python))


def test_a_link_does_not_lead_from_an_interpreter_that_is_allowed_to_another(allow, tmp_path):
    """The system goes to data/deep/env/python, whatever the path looks like."""
    for folder in ("env", "data/deep/env", "data/deep/a/b"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("env", "data/deep/env"):
        (tmp_path / folder / "python").symlink_to(sys.executable)
    (tmp_path / "data/link").symlink_to(tmp_path / "data/deep/a/b")
    allow(tmp_path / "data", tmp_path / "env/python")
    disguised = f"{tmp_path}/data/link/../../env/python"
    with pytest.raises(InputError, match="is none of the interpreters that the operator allows"):
        check_interpreter_place("score.python", disguised)
    (tmp_path / "current").symlink_to(tmp_path / "env")
    allow(tmp_path / "current/python")  # the operator may name an environment by a link
    for python in ("current/python", "env/python"):
        check_interpreter_place("score.python", str(tmp_path / python))


def test_a_settings_file_outside_is_not_even_read(allow, tmp_path):
    (tmp_path / "other.toml").write_text("secret = 'word'")
    allow(tmp_path / "recipes")
    with pytest.raises(InputError, match=r"the settings file .*other\.toml is outside of what the operator allows"):
        load_toml(tmp_path / "other.toml")
