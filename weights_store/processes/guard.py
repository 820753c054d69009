"""When a process ends, however it ends, nothing stays of what it has started, nor of its temporary files.

A dead process cleans nothing up. The death of a parent tells its children (`process.py`), but not those of libraries: engine
cores, loaders, Ray, a server. A signal to a process group does not reach other sessions. So the first `guard()` of a process
makes a temporary folder and starts a watcher: this file as a script, in a session of its own. It sleeps until the process has
ended. Then it kills every process whose environment names the folder, and deletes the folder. What we start gets the name
from `marked_environment`, and what that starts inherits it.

A part of a process's work is guarded by a folder inside that one, see `end_marked`. Only Linux shows the environment of
processes (`/proc`); elsewhere the watcher only deletes the folder, and our children end because their standard input closes.
"""

import atexit
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

RUN = "TOKENWEIGHTS_RUN"
"""Environment variable with the folders of all guarded processes above this one."""
_POLL_S = 0.02
_TRACKER_S, _PATIENCE_S = 0.5, 60.0
"""How long resource trackers may take to end by themselves, and processes to die (one that uses a GPU takes seconds)."""
_starting = threading.Lock()
_guards: dict[int, "Guard"] = {}
"""By process id: a forked child has no guard yet."""


class Guard:
    """A temporary folder and its watcher. `guard()` has the one of this process."""

    def __init__(self, prefix: str = "tokenweights-", place: str | None = None) -> None:
        """Make the folder, in `place` or where temporary folders belong, and start the watcher.

        Raises:
            OSError: The folder cannot be made, or no process started.
        """
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        self._pid = os.getpid()
        # Not with a name in its environment that another watcher, ours or one above us, would kill it for.
        environment = {name: value for name, value in os.environ.items() if name not in (RUN, "PYTHONPATH")}
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self._pid), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Kill what is left of what was guarded, and delete the folder."""
        if self._pid == os.getpid() and self._watcher.stdin is not None:
            self._watcher.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._watcher.wait(5)

    def mark_environment(self) -> None:
        """Guard everything that this process starts from now on, also what libraries start. For processes of our own."""
        os.environ.update(marked_environment(self.folder))


def guard() -> Guard:
    """Return the guard of this process; the first call starts it."""
    with _starting:
        if os.getpid() not in _guards:
            _guards[os.getpid()] = Guard()
        return _guards[os.getpid()]


def marked_environment(folder: Path) -> Mapping[str, str]:
    """Return the variable that names `folder`, and what this process's own names, to a process to start."""
    named = [name for name in os.environ.get(RUN, "").split(os.pathsep) if name]
    return {RUN: os.pathsep.join(dict.fromkeys([*named, str(folder)]))}


def end_marked(folder: Path, spare: int = 0) -> None:
    """Kill every process whose environment names `folder`, a guard's or one inside it, and wait until they are gone.

    Python's resource trackers come last: as soon as the others are gone they delete their shared memory, and end.

    Args:
        folder: Named by `marked_environment`.
        spare: A process that lives on.
    """
    deadline = time.monotonic() + _PATIENCE_S
    trackers_until = None
    num_quiet = 0
    # Two quiet looks: a process that is being started has its environment a little later.
    while num_quiet < 2 and time.monotonic() < deadline:
        found = [pid for pid in _marked(str(folder).encode()) if pid not in (os.getpid(), spare)]
        workers = [pid for pid in found if not _is_tracker(pid)]
        if found and not workers:
            trackers_until = trackers_until or time.monotonic() + _TRACKER_S
            workers = found if time.monotonic() > trackers_until else []
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_quiet = 0 if found else num_quiet + 1
        time.sleep(_POLL_S)


def _marked(mark: bytes) -> list[int]:
    """Return the processes with `mark` in their environment. Those that are ending have none any more."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has just ended, or it is another user's
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _wait_for_end(pid: int) -> None:
    """Wait until a process has ended, or closes the pipe that is our standard input."""
    places = [0]
    with suppress(AttributeError, OSError):  # only Linux has process descriptors
        try:
            places.append(os.pidfd_open(pid))  # a child that the process has forked may hold the pipe open
        except ProcessLookupError:
            return
    select.select(places, [], [])


def _watch(pid: int, folder: Path) -> None:
    _wait_for_end(pid)
    end_marked(folder, spare=pid)  # it may only have closed its guard, and bear its own mark after an exec
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), Path(sys.argv[2]))
