"""A folder that appears whole or not at all: written beside its place, and renamed when it is complete."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights_store.errors import InputError
from weights_store.processes.lock import locked, wait_for

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A `Path` has one of its two slashes."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it gets the name `folder` at the end, and is deleted after an error.

    What a killed process left is deleted by the next one. Two processes that write the same folder do not mix. Links are
    followed.

    Raises:
        InputError: `folder` is a URI, exists and is not an empty folder, or cannot be replaced by another one.
    """
    place = _check_place(folder)
    with locked(place.with_name(f".{place.name}.lock"), wait_for(f"writing {place}")):
        _check_place(folder)
        partial = place.with_name(f".{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            yield partial
            partial.replace(place)  # also over an empty folder
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_no_uri(folder: Path) -> None:
    """Refuse what would become a folder named `s3:` in the current one.

    Raises:
        InputError: It is a URI.
    """
    if _URI.match(str(folder)):
        raise InputError(f"{folder} is a URI; give a folder of this machine, and copy it from there")


def _check_place(folder: Path) -> Path:
    """Return where the folder really is, before anything is written: what cannot be renamed costs all of the work."""
    check_no_uri(folder)
    place = Path(os.path.realpath(folder))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give the name of a new one")
    nearest = next(above for above in place.parents if above.exists())
    if not nearest.is_dir():
        raise InputError(f"{folder} cannot be made: {nearest} is a file; give another folder")
    if place == Path.cwd() or place.is_mount():
        what = "the current folder" if place == Path.cwd() else "a mount point"
        raise InputError(
            f"{folder} is {what}, which cannot be replaced by a complete folder; give the name of a new one in it"
        )
    return place
