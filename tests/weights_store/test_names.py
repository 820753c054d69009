"""Names of datasets, and the paths of the tables that belong to them."""

import pytest

from weights_store.errors import SettingsError
from weights_store.names import (
    check_name,
    check_new_name,
    is_name,
    name_of,
    quarantine_path,
    split_name,
    tokens_path,
    weights_path,
)


@pytest.mark.parametrize("name", ["hh", "hh-harmless/tis-dpo", "a.b_c/0/d"])
def test_good_names_come_back(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "HH", "/hh", "hh/", "a//b", "../hh", "a/../b", "a..b", "-a", "a b", "a@1"])
def test_bad_names_are_refused(name):
    with pytest.raises(SettingsError, match=r"bad name .*: expected lower-case letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["x" * 151, "a/" + "x" * 149, "x" * 300])
def test_a_recipe_cannot_give_a_name_that_leaves_no_room_for_what_is_added_to_it(name):
    with pytest.raises(
        SettingsError, match=rf"bad name .*: it has {len(name)} characters, expected at most 150: a folder's"
    ):
        check_new_name(name)
    assert check_new_name(name[:150]) == name[:150]


def test_a_table_has_a_name_that_a_folder_can_have():
    assert check_name("x" * 255 + "/" + "y" * 255)
    assert not is_name("x" * 256)
    with pytest.raises(
        SettingsError, match=r"bad name a/x+…: a part of it has more than the 255 characters that a folder's"
    ):
        check_name("a/" + "x" * 256)


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
