"""Lock files: one process at a time does something, on one machine or on several that share a file system.

The kernel releases a lock when its process ends, SIGKILL included. On NFS, Linux passes `flock` on to the server, so a lock
also holds for other machines; if a machine dies, the server releases its locks after the lease (90 s by default).
"""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from weights_store.messages import logger

_log = logger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, when_busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` while inside; the file is deleted afterwards. Missing parents are created.

    On a file system without locks this only warns. The lock is not re-entrant: a second one in the same process waits too.

    Args:
        path: The lock file. It names its holder.
        when_busy: Called with the holder, for example "process 4711 on node3", if somebody else holds the lock. It raises to
            give up; if it returns, we wait.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(path, when_busy) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still locked: whoever waits sees that the file is gone, and makes a new one


def wait_for(what: str) -> Callable[[str], None]:
    """Return a `when_busy` that says which process we wait for, and what that does."""
    return lambda holder: _log.info(f"waiting for {holder}, which is {what}")


def is_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _open_locked(path: Path, when_busy: Callable[[str], None]) -> Iterator[IO[str]]:
    """Open a lock file and lock it; a file that was deleted while we waited locks nobody out, so try again."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _flock(file, path, when_busy)
            if is_at(file, path):
                yield file
                return


def _flock(file: IO[str], path: Path, when_busy: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        when_busy(file.read().strip() or "another process")  # empty: it has the lock, but has not written its name yet
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(f"the file system of {path.parent} has no locks ({error}); see that no other process works there")
