"""The command `view` as a person meets it, on the small store."""

import base64
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

import tokenweights
from weights_store.errors import MissingExtraError
from weights_store.inspection import model_tokenizer

NAME = "hh-harmless/tis-dpo"


@pytest.fixture
def command(capsys, read_store, tmp_path, monkeypatch):
    """Return a function that runs the command in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments):
        code = tokenweights.main(["view", *arguments, "--store", str(read_store.root)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, texts):
    """A model folder with the tokenizer of the small store."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(
        WordLevel({texts.get(number, f"<{number}>"): number for number in range(10)}, unk_token="<0>")
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_page_is_written_under_the_name_of_the_version(command, tmp_path):
    code, out, err = command(NAME, "--worst", "2")
    page = tmp_path / "here" / "hh-harmless-tis-dpo@1.html"
    assert code == 0
    assert out.startswith(f"{NAME}@1: 2 of 4 pairs, those whose contrastive pair disagrees most with the label\n")
    assert out.endswith(f"  {page.name}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert err.startswith("ids instead of texts: ")
    assert [path.name for path in page.parent.iterdir()] == [page.name]


def test_a_page_in_a_home_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(NAME, "--output=~/page.html")[0] == 0
    assert (tmp_path / "page.html").is_file()


def test_a_page_of_two_datasets_names_both(command, tmp_path):
    assert command(NAME, "hh-harmless/reversed")[0] == 0
    assert (tmp_path / "here" / "hh-harmless-tis-dpo@1-hh-harmless-reversed@0.html").is_file()


def test_our_own_page_is_written_again_and_nothing_else(command, tmp_path):
    page = tmp_path / "here" / "page.html"
    assert command(NAME, "-o", str(page))[0] == 0
    assert command(NAME, "-o", str(page))[0] == 0
    page.write_text("<!doctype html>\n<p>somebody's work")
    code, _, err = command(NAME, "-o", str(page))
    assert code == 1
    assert f"{page} exists and was not written by tokenweights; give -o another name" in err
    assert page.read_text() == "<!doctype html>\n<p>somebody's work"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["-o", "notes.txt"],
            "notes.txt: expected a name that ends in .html for a page, or in .svg or .png for a figure",
        ),
        (["-o", "no/page.html"], "no/page.html: there is no folder no; make it, or give -o another name"),
        (["-o", "figure.png"], "a figure shows one pair, got 4; name it with --pairs ID, or take --random 1"),
        (
            ["hh-harmless/reversed", "-o", "figure.png"],
            "a figure shows the weights of one dataset: leave out hh-harmless/rev",
        ),
        (["--run", "policy", "--ansi"], "--run puts trainings into a page: leave out --ansi and figures"),
        (["--run", "."], "train.json"),
        (["--where", "nonsense > 1"], "there is no column nonsense"),
        (["--search", "sir"], "give a tokenizer, that of the model (--tokenizer FOLDER)"),
        (["--pairs", "a,zz"], "no pair of weights/hh-harmless/tis-dpo@1 begins with 'zz'"),
        (["--tokenizer", "."], "has no tokenizer.json"),
    ],
)
def test_what_cannot_be_shown_is_one_line(command, tmp_path, arguments, problem):
    code, out, err = command(NAME, *arguments)
    assert (code, out) == (1, "")
    assert problem in err.splitlines()[-1]
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_one_pair_is_a_figure(command, model, tmp_path, ending, start):
    figure = tmp_path / "here" / f"figure.{ending}"
    for _ in range(2):  # the second time over the first
        code, out, _ = command(NAME, "--pairs", "a", "--tokenizer", model, "-o", figure.name)
        assert code == 0
        assert out.endswith(f"  figure.{ending}\n")
    assert figure.read_bytes().startswith(start)


def test_trainings_stand_in_the_page(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tokenweights, "_draw_runs", lambda folders, format: f"<svg>{format} of {folders}</svg>".encode()
    )
    assert command(NAME, "--run", "first", "--run", "second", "-o", "page.html")[0] == 0
    page = (tmp_path / "here" / "page.html").read_text(encoding="utf-8")
    address = re.search(r'<img src="data:image/svg\+xml;base64,([^"]*)"', page)[1]
    assert base64.b64decode(address).decode() == "<svg>svg of ['first', 'second']</svg>"


def test_a_pipe_gets_marks_instead_of_colours(command, model):
    code, out, err = command(NAME, "--ansi", "--pairs", "a", "--tokenizer", model)
    assert (code, err) == (0, "")
    assert "chosen, mean weight 1.17\n  Yes ‹sir›2‹⟦</s>⟧›0.5\n" in out
    assert "\x1b" not in out


def test_colours_are_kept_for_a_pager_that_shows_them(command, model, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, out, _ = command(NAME, "--ansi", "--search", "caf", "--random", "1", "--tokenizer", model)
    assert code == 0
    assert "1 of 2 pairs containing 'caf' (of 4), chosen at random" in out
    assert "\x1b[0m" in out


def test_without_the_package_for_tokenizers_ids_are_shown_unless_texts_were_asked_for(command, monkeypatch):
    def load(folder):
        raise MissingExtraError("needs the package 'tokenizers'; pip install it")

    monkeypatch.setattr(tokenweights, "_load_tokenizer", load)
    monkeypatch.setattr(model_tokenizer, "tokenizer_folder", lambda metadata, given: (given or "model", None))
    code, out, err = command(NAME, "--ansi", "--pairs", "a")
    assert code == 0
    assert "#" in out
    assert "ids instead of texts: needs the package 'tokenizers'; pip install it" in err
    assert command(NAME, "--ansi", "--tokenizer", "model")[0] == 1


def test_a_terminal_without_utf_8_is_no_error(read_store, model):
    command = [sys.executable, "-P", "-m", "tokenweights", "view", NAME, "--ansi", "--store", str(read_store.root)]
    done = subprocess.run(
        [*command, "--tokenizer", model], capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u27e6</s>\u27e7" in done.stdout
    assert done.stdout.isascii()
