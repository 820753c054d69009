"""How a process ends: its exit code, and the one line that people see."""

import errno
import io
import os
import subprocess
import sys

import pytest

from weights_store.errors import EngineError, InputError, NotFoundError, OutOfMemoryError
from weights_store.processes.process import run_main


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_exit_code_is_what_main_returns(returned, code):
    assert run_main(lambda: returned) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no file\nat x"), 1),
        (NotFoundError("no file at x"), 1),
        (PermissionError("no file at x"), 1),
        (EngineError("no file at x"), 75),
        (OutOfMemoryError("no file at x"), 76),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(error, code, capsys):
    assert run_main(raising(error)) == code
    assert capsys.readouterr().err == "error: no file at x\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "/a/b: No space left on device; make room and run again",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; check the permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"), "/a -> /b: Read-only file system"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory"),
        (
            OSError(errno.ENOSPC, "Error writing bytes.\nDetail: full"),
            "Error writing bytes. Detail: full; make room and",
        ),
        (OSError(), "OSError"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_what_to_do(error, line, capsys):
    assert run_main(raising(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_sigterm_unwinds_the_stack_as_ctrl_c_does():
    code = """
import time
from weights_store.processes.process import run_main

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)

raise SystemExit(run_main(main, after_interrupt="run again"))
"""
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    assert child.communicate(timeout=30) == ("tidied up\n", "run again\n")
    assert child.returncode == 130


def test_debug_shows_the_traceback_instead():
    with pytest.raises(InputError, match="no file"):
        run_main(raising(InputError("no file")), debug=True)


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_an_interrupt_is_exit_code_130_with_what_to_do_next(capsys):
    assert run_main(raising(KeyboardInterrupt()), after_interrupt="run it again to go on") == 130
    assert capsys.readouterr().err == "run it again to go on\n"


def test_a_reader_that_stops_early_is_no_error():
    code = "from weights_store.processes.process import run_main\n"
    code += "run_main(lambda: [print('x' * 99) for _ in range(9999)] and 0)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert (child.stderr.read(), child.wait(60)) == (b"", 0)


def test_another_broken_pipe_is_an_error(capsys, monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stdout:  # somebody reads what is printed
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run_main(raising(BrokenPipeError("a worker is gone"))) == 1
    assert capsys.readouterr().err == "error: a worker is gone\n"


def test_signs_that_a_terminal_lacks_are_no_error(monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run_main(lambda: print("−π")) == 0
        stdout.flush()
        assert stdout.buffer.getvalue() == b"\\u2212\\u03c0\n"


def test_a_child_ends_with_its_parent():
    code = "import time\nfrom weights_store.processes.process import run_main\nrun_main(lambda: time.sleep(60))"
    environment = {**os.environ, "TOKENWEIGHTS_CHILD": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment)
    child.stdin.close()  # as when the parent has died
    assert child.wait(30) == 1
