"""Names of datasets, and the paths of the tables that belong to them."""

import pytest

from weights_store.errors import SettingsError
from weights_store.names import check_name, name_of, quarantine_path, split_name, tokens_path, weights_path


@pytest.mark.parametrize("name", ["hh", "hh-harmless/tis-dpo", "a.b_c/0/d"])
def test_good_names_come_back(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "HH", "/hh", "hh/", "a//b", "../hh", "a/../b", "a..b", "-a", "a b", "a@1"])
def test_bad_names_are_refused(name):
    with pytest.raises(SettingsError, match=r"bad name .*: expected lower-case letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["x" * 201, "a/" + "x" * 201, "/".join(["x" * 100] * 4)])
def test_a_name_that_no_folder_can_have_is_refused_with_the_limit(name):
    with pytest.raises(
        SettingsError, match=rf"bad name .*: it has {len(name)} characters; expected at most 400, and 200"
    ):
        check_name(name)
    assert check_name("x" * 200 + "/" + "y" * 199)


def test_a_version_is_split_off():
    assert split_name("hh/tis@12") == ("hh/tis", 12)
    assert split_name("hh/tis") == ("hh/tis", None)
    for text in ("hh@", "hh@-1", "hh@newest", "hh@1@2"):
        with pytest.raises(SettingsError, match="bad version in"):
            split_name(text)


def test_paths_of_tables():
    assert weights_path("hh/tis") == "weights/hh/tis"
    assert tokens_path("hh-0123") == "tokens/hh-0123"
    assert quarantine_path("tokens/hh-0123") == "quarantine/hh-0123"
    assert name_of("weights/hh/tis@3") == "hh/tis@3"
