"""The shelf of a store's contrastive models: where they are trained, kept and read. Whoever takes one gets a checked one.

In a local store they lie in its folder `models/`. For an object store they are trained and read in a cache folder of this
machine, uploaded when finished and downloaded where they are needed. Their records: `weights_store/checks/model_folders.py`.
"""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from weights_store.checks.model_folders import (
    RECORD,
    ModelRecord,
    check_files,
    covered_files,
    read_model_record,
    remedy,
    sign_record,
)
from weights_store.digests import cache_folder, digest_once
from weights_store.errors import DamageError
from weights_store.fingerprint import fingerprint
from weights_store.location import Location
from weights_store.messages import logger
from weights_store.processes.lock import locked, wait_for

_log = logger(__name__)


@dataclass(frozen=True)
class ModelShelf:
    """The folder `models/` of a store."""

    location: Location

    def place(self, name: str) -> Path:
        """Return the folder on this machine where a model is trained and read."""
        if self.location.is_local:
            return self.location.path / name
        return cache_folder() / fingerprint(self.location.uri)[:16] / name

    def find(self, name: str) -> Path | None:
        """Return the folder of a finished model, downloaded if need be; None if the store has none of that name.

        Every file is compared with the record. That costs little: whoever scores with the model needs the hash of its weights
        too, and both read a large file once (`digest_once`).

        Raises:
            DamageError: The model in the store is not what was recorded. A damaged download is fetched again.
        """
        source, folder = self.location / name, self.place(name)
        record = read_model_record(source)
        if not self.location.is_local:
            return self._fetch(source, record, folder)
        if record is None:
            return None
        _check_sound(source, source, record)
        return folder

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Keep a model to this process while inside, to train it; wait while another process of this machine does."""
        folder = self.place(name)
        return locked(folder.with_name(f".{name}.lock"), wait_for(f"training {folder}"))

    def put(self, name: str, record: ModelRecord) -> None:
        """Finish the model at `place(name)`: upload it if the store is remote, and write its record, which covers its files.

        If another machine has put it there meanwhile, that model stays, and replaces the one here.
        """
        target, folder = self.location / name, Location(str(self.place(name)))
        if not self.location.is_local and (theirs := read_model_record(target)) is not None:
            self._fetch(target, theirs, folder.path)
            return
        text = sign_record(record, {file: _digest(folder, file) for file in covered_files(folder, RECORD)})
        if not self.location.is_local:
            target.upload(folder.path)
            target.write(RECORD, text)
        folder.write(RECORD, text)

    def record(self, name: str) -> ModelRecord | None:
        """Return the record of a finished model; None if the store has none of that name."""
        return read_model_record(self.location / name)

    def records(self) -> Iterator[ModelRecord]:
        """Yield the record of every finished model.

        Raises:
            DamageError: One is damaged. It may be that of the model that is looked for, so nobody may pass over it.
        """
        for name in self.location.folders():
            record = None if name.startswith(".") else read_model_record(self.location / name)
            if record is not None:
                yield record

    def _fetch(self, source: Location, record: ModelRecord | None, folder: Path) -> Path | None:
        """Make the copy in the cache folder equal to the model in the object store, and return its folder."""
        copy = Location(str(folder))
        if record is None:
            if copy.exists(RECORD):  # it has left the store, so it is to be trained again
                shutil.rmtree(folder)
            return None
        with locked(folder.with_name(f".{folder.name}.download.lock"), wait_for(f"downloading {folder}")):
            if not _is_copy(copy, source, record):
                _download(source, record, folder)
        return folder


def _download(source: Location, record: ModelRecord, folder: Path) -> None:
    """Replace a folder of the cache by the model in the object store, whole or not at all."""
    _log.info(f"downloading {source}")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        source.download(partial)
        _check_sound(Location(str(partial)), source, record)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_sound(folder: Location, shown: Location, record: ModelRecord) -> None:
    """Raise DamageError if a file of `folder`, which messages call `shown`, is not as recorded."""
    problem = next(check_files(folder, record, _digest), None)
    if problem is not None:
        raise DamageError(f"{shown}/{problem}; {remedy(shown)}")


def _is_copy(copy: Location, source: Location, record: ModelRecord) -> bool:
    is_same_record = copy.exists(RECORD) and copy.read(RECORD) == source.read(RECORD)
    return is_same_record and not any(check_files(copy, record, _digest))


def _digest(folder: Location, name: str) -> str:
    return digest_once(folder.path / name)
