"""A folder that appears whole or not at all: written beside its place, and renamed when it is complete."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weights_store.errors import InputError
from weights_store.processes.lock import locked, wait_for


@contextmanager
def new_folder(folder: Path, may_replace: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield an empty folder to write into; it gets the name `folder` at the end, and is deleted after an error.

    What a killed process left is deleted by the next one. Two processes that write the same folder do not mix. A folder that is
    replaced is moved away first: for a moment there is none, but never a mixture. If we are killed then, the next push to the
    folder brings the old one back.

    Args:
        folder: The folder.
        may_replace: Says of a folder with files whether it may be replaced; it may raise to say why not.

    Raises:
        InputError: `folder` exists, is not an empty folder, and may not be replaced.
    """
    folder = folder.absolute()
    if folder.is_symlink():
        folder = folder.resolve()
    _check_free(folder, may_replace)
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    with locked(folder.with_name(f".{folder.name}.lock"), wait_for(f"writing {folder}")):
        if old.exists() and not folder.exists():  # a process was killed before the new one got its name
            old.replace(folder)
        _check_free(folder, may_replace)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _put(partial, folder, old)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _put(partial: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        shutil.copymode(folder, partial)
        folder.replace(old)
    try:
        partial.replace(folder)
    except BaseException:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_free(folder: Path, may_replace: Callable[[Path], bool]) -> None:
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not (is_free or (folder.is_dir() and may_replace(folder))):
        raise InputError(f"{folder} exists and is not an empty folder; give the name of a new one")
