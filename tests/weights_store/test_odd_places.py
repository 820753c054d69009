"""Stores in folders with odd names: refused before anything is written, or every reader works there."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenweights import main
from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import SettingsError
from weights_store.schemas import LOGPS

REPO = Path(__file__).resolve().parents[2]
ODD = "\\%~#?*[]{}'\"`:;=&+|<>$^@!, .-é\u0301\u00e9日🍞\u200b\u2028\x85\xa0\n\t\x01\x7f4a"
"""Characters that URIs, shells, globs, SQL and object stores read in their own way, and some that they do not."""
PLACES = st.text(ODD + "/", min_size=1, max_size=12).filter(lambda text: ".." not in text)


def rows(pair_id):
    return pa.table([[pair_id], [[-1.0]], [[-2.0]], *[[None]] * 4], schema=LOGPS)


@settings(max_examples=25, deadline=None)
@given(PLACES, st.booleans())
@example("a\\b", False)
@example("a%2Fb", False)
@example("a%b", True)
@example("e\u0301/é", True)
@example(" a ", True)
@example("~ada/x", True)
@example("x" * 256, True)
@example("file:x", True)
def test_a_folder_with_an_odd_name_is_refused_before_a_write_or_works_for_every_reader(name, is_absolute):
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/{name}" if is_absolute else name.lstrip("/") or "a"
        if uri.startswith("~/") or uri == "~":
            return  # the home folder
        before = Path.cwd()
        os.chdir(folder)
        try:
            check_place(uri, Path(folder))
        finally:
            os.chdir(before)


def check_place(uri, folder):
    problem = write(uri)
    if problem is not None:
        assert list(folder.iterdir()) == []
        assert "\n" not in problem
        return
    assert list(folder.iterdir()) != []
    table = WeightStore(uri).table("logps/toy/x")
    table.append(rows("b"), {"fingerprint": "f1"})
    assert table.scan().collect()["pair_id"].sort().to_list() == ["a", "b"]
    assert sorted(table.pair_ids()) == ["a", "b"]
    assert sum(batch.num_rows for batch in table.batches()) == 2
    assert [found.path for found in WeightStore(uri).tables("logps")] == ["logps/toy/x"]
    assert list(verify(WeightStore(uri))) == []


def write(uri):
    """Write a table, and return None; or return why its place is refused."""
    try:
        WeightStore(uri).table("logps/toy/x").append(rows("a"), {"fingerprint": "f0"})
    except SettingsError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "command",
    [
        "ls --store",
        "verify --store",
        "ls",
        "show",
        "diff x",
        "quarantine",
        "build",
        "plan",
        "plan {recipe} --store",
        "plan {recipe} --set",
        "serve",
        "demo",
        "train",
        "train {settings} --store",
        "",
    ],
)
@pytest.mark.parametrize("secret", ["s3:/AKIDINURI:hunter2@b", "s3://AKIDINURI:hunter2@b", "AKIDINURI:hunter2@b"])
def test_credentials_in_any_argument_are_not_printed(command, secret, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = REPO / "recipes" / "hh_harmless.toml"
    words = command.format(recipe=recipe, settings=REPO / "recipes" / "train" / "hh_harmless_tis_dpo.toml").split()
    assert run([*words, f"store.uri={secret}" if words[-1:] == ["--set"] else secret]) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert "hunter2" not in printed
    assert "error: " in printed
    assert list(tmp_path.iterdir()) == []


def run(arguments):
    try:
        return main(arguments)
    except SystemExit as end:  # of argparse
        return end.code
