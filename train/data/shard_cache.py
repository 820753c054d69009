"""Copies of an object store's shards on the local disk: each is fetched once; the least recently used are deleted first.

Called by `PairDataset`. One folder serves all ranks, workers and trainings of a machine. They exclude each other by two kinds
of locks, which the kernel releases if a process is killed: one on each unfinished copy while it is fetched, and one on the
folder, shared to open a copy and exclusive to delete copies. A copy gets its name once it is complete and has the committed
digest. Not here: stores in a local folder, which are read in place; checks of rows (`ShardReader`).
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from weights_store import Table
from weights_store.digests import cache_folder
from weights_store.errors import DamageError, StoreError
from weights_store.location import Location, local_path
from weights_store.messages import logger
from weights_store.processes.lock import is_at
from weights_store.tables.shards import ShardReader, ShardRecord

_log = logger(__name__)

_GIB = 1 << 30
_PARTIAL = ".partial"


class ShardCache:
    """A folder of copies of at most `max_gib` in total, unfinished ones included.

    A copy that is deleted while a process reads it takes disk space until that process closes it.

    Args:
        folder: Its sub-folder `shards` is the cache; None for `TOKENWEIGHTS_CACHE`, by default `~/.cache/tokenweights`.
        max_gib: Limit, GiB.

    Raises:
        InputError: It begins with a home folder that is not here.
        StoreError: The folder cannot be written.
    """

    def __init__(self, folder: str | None, max_gib: float) -> None:
        self.folder = (local_path(folder).absolute() if folder else cache_folder()) / "shards"
        self.max_bytes = int(max_gib * _GIB)
        with self._writing(), self._locked(fcntl.LOCK_SH):
            pass

    def warn_of_oversized(self, records: Sequence[ShardRecord]) -> None:
        """Log a warning about shards that are too large to be kept."""
        sizes = [record.num_bytes for record in records if record.num_bytes > self.max_bytes]
        if sizes:
            _log.warning(
                f"{len(sizes)} of {len(records)} shards are larger than data.cache_gib={self.max_bytes / _GIB:g} (the largest "
                f"has {max(sizes) / _GIB:.2g} GiB) and are read from the object store each time; raise data.cache_gib"
            )

    def open(self, table: Table, record: ShardRecord) -> ShardReader:
        """Open a shard's copy, fetched first if there is none; without room for a copy, open the shard itself.

        Raises:
            DamageError: The shard is not the file that was committed.
            StoreError: The object store cannot be read, or the folder cannot be written.
        """
        if record.num_bytes > self.max_bytes:
            return table.open_shard(record)
        with self._writing():
            reader = self._open_copy(table, record) or self._fetch(table, record)
        return reader or table.open_shard(record)

    def _open_copy(self, table: Table, record: ShardRecord) -> ShardReader | None:
        path = self.folder / record.name
        with self._locked(fcntl.LOCK_SH):
            if _size(path) != record.num_bytes:
                return None
            os.utime(path)  # marks it as recently used
            where = f"{table.path} (the copy in {self.folder}; deleted, it is fetched again)"
            return ShardReader(Location(str(self.folder)), record, table.key, where)

    def _fetch(self, table: Table, record: ShardRecord) -> ShardReader | None:
        """Copy a shard, or wait for the process that is copying it. Return None if there is no room."""
        with _locked_partial(self.folder / f"{record.name}{_PARTIAL}") as partial:
            reader = self._open_copy(table, record)
            if reader is not None or not self._reserve(partial, record.num_bytes):
                return reader
            self._download(table, record, partial)
            partial.flush()
            os.fsync(partial.fileno())
            with self._locked(fcntl.LOCK_SH):
                Path(partial.name).replace(self.folder / record.name)
            return self._open_copy(table, record)

    def _reserve(self, partial: BinaryIO, num_bytes: int) -> bool:
        """Delete the least recently used copies until `num_bytes` fit, and reserve them for `partial`."""
        with self._locked(fcntl.LOCK_EX):
            _delete_abandoned(self.folder)
            free = self.max_bytes - sum(_size(path) for path in self.folder.glob(f"*{_PARTIAL}"))
            if num_bytes > free:
                return False
            copies = sorted(self.folder.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in copies:  # the most recently used first; what no longer fits is deleted
                free -= _size(path)
                if num_bytes > free:
                    path.unlink()
            partial.truncate(num_bytes)
            return True

    def _download(self, table: Table, record: ShardRecord, partial: BinaryIO) -> None:
        digest = hashlib.sha256()
        try:
            for chunk in table.location.stream(record.name):
                digest.update(chunk)
                partial.write(chunk)
        except FileNotFoundError as error:
            raise DamageError(
                f"{table.path}: shard {record.name} is missing; restore it or pin a version that does not need it"
            ) from error
        if digest.hexdigest() != record.sha256:
            raise DamageError(
                f"{table.path}: shard {record.name} is not the file that was committed: its digest differs; restore the file "
                "from a copy, or build the table again"
            )

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, kind)
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot write shards to the cache in {self.folder}: {error.strerror or error}; set data.cache_folder to a "
                "folder on a disk with room, or data.cache_gib to less"
            ) from error


@contextmanager
def _locked_partial(path: Path) -> Iterator[BinaryIO]:
    """Open an unfinished copy that no other process holds; delete it if it still has its name afterwards."""
    while True:
        path.touch()  # not mode `w`, which would truncate the file of another process
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_at(file, path):
                continue  # finished or deleted while we waited
            try:
                yield file
            finally:
                if is_at(file, path):
                    path.unlink()
            return


def _delete_abandoned(folder: Path) -> None:
    """Delete the unfinished copies of processes that are gone."""
    for path in folder.glob(f"*{_PARTIAL}"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(file, path):
                    path.unlink()
        except (BlockingIOError, FileNotFoundError):  # held by a process, or finished meanwhile
            continue


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
