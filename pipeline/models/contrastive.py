"""The contrastive models of a store.

In a local store they lie in its folder `models/`. For an object store they are trained and read in a cache folder of this
machine, uploaded when finished and downloaded where they are needed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from weights_store.fingerprint import fingerprint
from weights_store.location import Location
from weights_store.lock import locked, wait_for

RECORD = "contrast.json"
"""Says what determined a model; written last, so a model without it is unfinished."""


class ModelRecord(TypedDict):
    """What determined a trained model, and its fingerprint."""

    identity: dict[str, object]
    data: str
    version: int
    fingerprint: str


def cache_folder() -> Path:
    """Return where this machine keeps models that can be made again: `TOKENWEIGHTS_CACHE`, or `~/.cache/tokenweights`."""
    return Path(os.environ.get("TOKENWEIGHTS_CACHE", "~/.cache/tokenweights")).expanduser()


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
        """Return the folder of a finished model, downloaded if need be; None if the store has none of that name."""
        folder = self.place(name)
        if (folder / RECORD).is_file():
            return folder
        if not (self.location / name).exists(RECORD):
            return None
        with locked(folder.with_name(f".{name}.download.lock"), wait_for(f"downloading {folder}")):
            if not (folder / RECORD).is_file():  # else another process has downloaded it meanwhile
                self._download(name)
        return folder

    def _download(self, name: str) -> None:
        """Download a model, whole or not at all."""
        folder = self.place(name)
        partial = folder.with_name(f".{name}.partial")
        for leftover in (folder, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.location / name).download(partial)
        partial.replace(folder)

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Keep a model to this process while inside, to train it; wait while another process of this machine does."""
        folder = self.place(name)
        return locked(folder.with_name(f".{name}.lock"), wait_for(f"training {folder}"))

    def put(self, name: str, record: ModelRecord) -> None:
        """Finish the model at `place(name)`: upload it if the store is remote, and write its record.

        If another machine has put it there meanwhile, that model stays, and replaces the one here.
        """
        target, folder = self.location / name, self.place(name)
        if not self.location.is_local and target.exists(RECORD):
            self._download(name)
            return
        text = json.dumps(record, indent=2).encode()
        if not self.location.is_local:
            target.upload(folder)
        target.write(RECORD, text)
        if not self.location.is_local:
            Location(str(folder)).write(RECORD, text)

    def records(self) -> Iterator[ModelRecord]:
        """Yield the record of every finished model."""
        for name in self.location.folders():
            if (self.location / name).exists(RECORD):
                yield json.loads((self.location / name).read(RECORD))
