"""How child processes are started: what another interpreter finds, and what it says when a package is missing."""

import os
import sys
import venv

import pytest

from pipeline.child import run_child
from tests.torture import orphans
from weights_store.errors import KilledError, OutOfMemoryError, StageError


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The interpreter of an environment without packages."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def _printing(tmp_path, bare):
    """An interpreter that prints its `sys.path` and environment, and the content of the first folder of the path, and fails."""
    code = "import os, sys; print(sys.path, sorted(os.listdir(sys.path[0])), os.environ['PYTHONSAFEPATH']); sys.exit(1)"
    path = tmp_path / "printing"
    path.write_text(f'#!/bin/sh\nexec "{bare}" "$1" -c "{code}"\n')
    path.chmod(0o755)
    return str(path)


def test_another_interpreter_finds_our_packages_alone(tmp_path, bare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(["", ".", "mine", "/their/own"])
    )  # the first is the current directory
    with pytest.raises(StageError) as caught:
        run_child("pipeline.workers.process", [], "scoring", _printing(tmp_path, bare))
    said = str(caught.value)
    assert "['pipeline', 'tokenweights.py', 'train', 'weights_store'] 1" in said
    assert "/their/own" in said
    assert f"'{tmp_path}'" not in said
    assert "mine" not in said
    assert all(path not in said for path in sys.path if path.endswith("site-packages"))


@pytest.mark.parametrize(
    ("package", "remedy"),
    [("vllm", "'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'"), ("torch", "'tokenweights[train]'")],
)
def test_an_interpreter_that_lacks_a_package_is_named_with_it_and_with_what_to_install(bare, package, remedy):
    with pytest.raises(StageError) as caught:
        run_child("pipeline.workers.process", [], "working", str(bare), package=package)
    missing = str(caught.value).partition("it has no package ")[2].partition(";")[0]
    assert missing.strip("'") in ("deltalake", "numpy", "polars", "pyarrow")
    expected = f"it has no package {missing}; in its environment, pip install {remedy}"
    assert str(caught.value) == f"working in the interpreter {bare} failed with exit code 1: {expected}"


def test_an_interpreter_that_cannot_train_is_named_with_what_to_install(bare):
    with pytest.raises(StageError) as caught:
        run_child("tokenweights", ["train", "config.toml"], "training", str(bare))
    assert f"training in the interpreter {bare} failed with exit code 1: " in str(caught.value)
    assert "pip install 'tokenweights[train]'" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(StageError, match=f"working: cannot start the interpreter {tmp_path}/python: "):
        run_child("tokenweights", [], "working", str(tmp_path / "python"))


def test_the_error_of_a_child_is_the_error_of_its_stage():
    with pytest.raises(StageError, match="^training failed with exit code 1: no settings file at nowhere.toml"):
        run_child("tokenweights", ["train", "nowhere.toml"], "training")


def test_an_error_that_nobody_expected_is_one_line_with_its_traceback_in_a_note(tmp_path):
    python = tmp_path / "python"
    code = "raise ZeroDivisionError('division by zero\\nin two lines')"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    python.chmod(0o755)
    with pytest.raises(StageError) as caught:
        run_child("tokenweights", [], "working", str(python))
    expected = f"working in the interpreter {python} failed with exit code 1: ZeroDivisionError: division by zero"
    assert str(caught.value) == f"{expected} (unexpected; --debug shows more)"
    (note,) = caught.value.__notes__
    assert note.startswith("Its last lines:\nTraceback (most recent call last):")


def test_a_child_that_is_killed_says_so(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    with pytest.raises(
        KilledError, match=r"^working was killed by signal 9 \(out of memory\?\); what it had done stays$"
    ):
        run_child("tokenweights", [], "working", str(python))


_TORCHRUN = """\
error: loss.beta is wrong
E1126 10:00:00.1 api.py:1022] failed (exitcode: {code}) local_rank: 0 (pid: 7) of binary: python
Traceback (most recent call last):
{lines}torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
  exitcode  : 1 (pid: 8)
Root Cause (first observed failure):
  exitcode  : {code} (pid: 7)
"""


def test_an_unexpected_error_of_a_rank_is_told_and_not_that_of_the_launcher(tmp_path):
    of_rank = '[rank1]: Traceback (most recent call last):\n[rank1]:   File "x"\n[rank1]: RuntimeError: invalid device ordinal'
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncat "$0.txt"\nexit 1\n')
    python.chmod(0o755)
    text = _TORCHRUN.format(code=1, lines="  File\n" * 3).replace("error: loss.beta is wrong", of_rank)
    (tmp_path / "python.txt").write_text(text)
    with pytest.raises(StageError, match=r": RuntimeError: invalid device ordinal \(unexpected; --debug shows more\)"):
        run_child("tokenweights", [], "training", str(python), launcher=["-m", "torch.distributed.run"])


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (-9, KilledError, "training was killed by signal 9"),
        (76, OutOfMemoryError, "failed with exit code 76: loss.beta is wrong"),
        (1, StageError, "failed with exit code 1: loss.beta is wrong"),
    ],
)
def test_the_error_of_the_process_that_failed_first_is_the_launchers(tmp_path, code, kind, said):
    """torchrun itself ends with 1, and prints a long traceback of its own after the error of its process."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncat "$0.txt"\nexit 1\n')
    python.chmod(0o755)
    (tmp_path / "python.txt").write_text(_TORCHRUN.format(code=code, lines="  File\n" * 60))
    with pytest.raises(StageError) as caught:
        run_child("tokenweights", [], "training", str(python), launcher=["-m", "torch.distributed.run"])
    assert type(caught.value) is kind
    assert said in str(caught.value)


def test_what_a_dead_child_has_started_ends_too_and_keeps_nobody_waiting(tmp_path, monkeypatch):
    """It holds the pipe through which its parent speaks to us."""
    monkeypatch.setenv(orphans.MARK, tmp_path.name)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600 &\nkill -9 $$\n")
    python.chmod(0o755)
    with pytest.raises(KilledError):
        run_child("tokenweights", [], "working", str(python))
    assert not orphans.marked(tmp_path.name)
