"""A folder that appears whole or not at all: written beside its place, and renamed when it is complete."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weights_store.errors import InputError
from weights_store.processes.lock import locked, wait_for

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A `Path` has one of its two slashes."""


@contextmanager
def new_folder(folder: Path, may_replace: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield an empty folder to write into; it gets the name `folder` at the end, and is deleted after an error.

    What a killed process left is deleted by the next one. Two processes that write the same folder do not mix. Links are
    followed. A folder that is replaced is moved away first: for a moment there is none, but never a mixture. If we are killed
    then, the next push to the folder brings the old one back.

    Args:
        folder: The folder.
        may_replace: Says of a folder with files whether it may be replaced; it may raise to say why not.

    Raises:
        InputError: `folder` is a URI, exists, is not an empty folder and may not be replaced, or cannot be renamed.
    """
    place = _check_place(folder, may_replace)
    # Nobody else's: what has the first two of these names is deleted.
    partial, old, lock = (place.with_name(f".{place.name}.tokenweights-{word}") for word in ("partial", "old", "lock"))
    with locked(lock, wait_for(f"writing {place}")):
        if old.exists() and not place.exists():  # a process was killed before the new one got its name
            old.replace(place)
        _check_place(folder, may_replace)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _put(partial, place, old)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _put(partial: Path, place: Path, old: Path) -> None:
    if place.exists():
        shutil.copymode(place, partial)
        place.replace(old)
    try:
        partial.replace(place)
    except BaseException:
        if old.exists():
            old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_no_uri(folder: Path) -> None:
    """Refuse what would become a folder named `s3:` in the current one.

    Raises:
        InputError: It is a URI.
    """
    if _URI.match(str(folder)):
        raise InputError(f"{folder} is a URI; give a folder of this machine, and copy it from there")


def _check_place(folder: Path, may_replace: Callable[[Path], bool]) -> Path:
    """Return where the folder really is, before anything is written: what cannot be renamed costs all of the work."""
    check_no_uri(folder)
    place = Path(os.path.realpath(folder))
    is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    if not (is_free or (place.is_dir() and may_replace(place))):
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
