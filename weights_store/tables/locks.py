"""Keeps `vacuum` from deleting a shard between a writer's last look at it and the commit that makes it visible.

The lock is one of the kernel on the table's folder, so nothing has to be cleaned up after a kill. Object stores and NFS have
none: there the retention of `vacuum` is all that protects a writer.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from weights_store.location import Location


@contextmanager
def shared_with_writers(folder: Location) -> Iterator[None]:
    """Hold the lock of a table beside other writers, to make a commit."""
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def without_writers(folder: Location) -> Iterator[None]:
    """Hold the lock of a table alone, to delete files that no commit names; waits for commits that are being made."""
    with _locked(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(folder: Location, kind: int) -> Iterator[None]:
    if not folder.is_local or not folder.path.is_dir():
        yield
        return
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
