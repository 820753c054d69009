"""Lock files: one holder at a time, and none that outlives its process."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from weights_store.processes.lock import locked

HOLD = """
import sys
from pathlib import Path
from weights_store.processes.lock import locked
with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    sys.stdin.read()
"""


class BusyError(Exception):
    """Raised instead of waiting."""


def refuse(holder):
    raise BusyError(holder)


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "folder" / ".lock"


@pytest.fixture
def holder(lock):
    """Another process that holds the lock until its standard input closes."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_lock_names_its_holder_and_leaves_no_file(lock, holder):
    with pytest.raises(BusyError, match=rf"^process {holder.pid} on \S+$"), locked(lock, refuse):
        pass
    holder.stdin.close()
    holder.wait(30)
    with locked(lock, refuse):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
    assert not any(lock.parent.iterdir())


def test_a_killed_process_holds_no_lock(lock, holder):
    holder.kill()
    holder.wait(30)
    assert lock.exists()
    with locked(lock, refuse):
        pass


def test_who_waits_gets_the_lock_as_soon_as_it_is_free(lock, holder):
    said = []

    def on_busy(who):
        said.append(who)
        holder.stdin.close()

    with locked(lock, on_busy):
        assert holder.wait(30) == 0
        assert lock.exists()  # a new file: that of the holder is gone
    assert len(said) == 1


def test_many_waiters_enter_one_at_a_time(lock):
    inside, most, entered = [], [], []

    def work():
        for _ in range(20):
            with locked(lock, lambda holder: None):
                inside.append(1)
                most.append(len(inside))
                entered.append(1)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (max(most), len(entered)) == (1, 160)


def test_a_file_system_without_locks_is_a_warning(lock, monkeypatch, caplog):
    def flock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(lock, refuse):
        pass
    assert f"the file system of {lock.parent} has no locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    Path(tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / ".lock", refuse):
        pass
