"""What is left of a process that ends, however it ends: nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.torture.orphans import MARK, kill_marked, marked
from weights_store.processes.guard import RUN, end_marked, marked_environment

GUARDED = """
import os, subprocess, sys, time
from weights_store.processes.guard import guard, marked_environment

daemon = "import os, time; os.fork() and os._exit(0); os.setsid(); print('daemon', flush=True); time.sleep(600)"
shared = '''
import signal, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(SharedMemory(create=True, size=64).name, flush=True)
time.sleep(600)
'''
folder = guard().folder
(folder / "request.json").touch()
environment = {**os.environ, **marked_environment(folder)}
names = []
for code in (daemon, shared):
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    names.append(child.stdout.readline().strip())
if sys.argv[1:] == ["fork"] and os.fork() == 0:  # it holds every pipe of its parent, and is none of what was guarded
    time.sleep(600)
print(folder, names[1], flush=True)
if sys.stdin.read() == "raise":
    1 / 0
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a guarded process; whatever is left of it is killed at the end."""
    mark = tmp_path.name
    started = []

    def run(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", GUARDED, *arguments],
            env={**os.environ, MARK: mark, "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        folder, shared = process.stdout.readline().split()
        wait_until(lambda: len(marked(mark)) >= 5)  # it, its watcher, the daemon, the other child, its resource tracker
        return process, Path(folder), Path("/dev/shm") / shared

    yield run
    kill_marked(mark)
    for process in started:
        process.communicate()


def wait_until(is_so, patience_s=60.0):
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < patience_s
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["alone", "group"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_killed_process(start, tmp_path, kill, signum):
    process, folder, shared = start()
    assert folder.parent == tmp_path
    assert shared.exists()
    kill(process.pid, signum)
    process.wait(20)
    wait_until(lambda: not marked(tmp_path.name))
    assert not folder.exists()
    if (kill, signum) == (
        os.killpg,
        signal.SIGKILL,
    ):  # it reaches the resource tracker, which alone knows what is shared
        shared.unlink(missing_ok=True)
    assert not shared.exists()


def test_a_forked_child_that_holds_its_parents_pipes_does_not_keep_the_watcher_waiting(start, tmp_path):
    process, folder, _ = start("fork")
    process.kill()
    process.wait(20)
    wait_until(lambda: not folder.exists())
    wait_until(lambda: len(marked(tmp_path.name)) == 1)  # the forked child, which was not marked


@pytest.mark.parametrize("text", ["", "raise"], ids=["returns", "raises"])
def test_nothing_is_left_of_a_process_that_ends(start, tmp_path, text):
    process, folder, shared = start()
    process.communicate(text, timeout=20)
    assert process.returncode == bool(text)
    assert not marked(tmp_path.name)  # at once: it waits for its watcher
    assert not folder.exists()
    assert not shared.exists()


def test_a_part_of_the_work_ends_alone(tmp_path):
    part, other = tmp_path / "part-1", tmp_path / "part-2"
    code = [sys.executable, "-c", "import time; time.sleep(600)"]
    first, second = (subprocess.Popen(code, env={**os.environ, **marked_environment(name)}) for name in (part, other))
    try:
        end_marked(part)
        assert first.wait(10) == -signal.SIGKILL
        assert second.poll() is None
        end_marked(tmp_path)
        assert second.wait(10) == -signal.SIGKILL
    finally:
        for child in (first, second):
            child.kill()
            child.wait()


def test_a_process_below_a_guarded_one_belongs_to_both(monkeypatch):
    monkeypatch.setenv(RUN, "/tmp/outer")
    assert marked_environment(Path("/tmp/inner")) == {RUN: "/tmp/outer:/tmp/inner"}
    monkeypatch.setenv(RUN, "/tmp/outer:/tmp/inner")
    assert marked_environment(Path("/tmp/inner")) == {RUN: "/tmp/outer:/tmp/inner"}
    monkeypatch.delenv(RUN)
    assert marked_environment(Path("/tmp/inner")) == {RUN: "/tmp/inner"}


EXEC = """
import os, sys
from weights_store.processes.guard import guard
guard().mark_environment()
code = "import os, sys; print(os.environ['TOKENWEIGHTS_RUN'], flush=True); sys.stdin.read()"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


def test_a_process_that_becomes_another_program_lives_on():
    with subprocess.Popen(
        [sys.executable, "-c", EXEC], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        folder = Path(one.stdout.readline().strip())
        wait_until(lambda: not folder.exists())
        one.stdin.close()
        assert one.wait(20) == 0
