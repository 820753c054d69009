"""A folder that appears whole or not at all: written beside its place, and renamed when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights_store.errors import InputError
from weights_store.processes.lock import locked, wait_for


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it gets the name `folder` at the end, and is deleted after an error.

    What a killed process left is deleted by the next one. Two processes that write the same folder do not mix.

    Raises:
        InputError: `folder` exists and is not an empty folder.
    """
    _check_empty(folder)
    folder = folder.absolute()
    with locked(folder.with_name(f".{folder.name}.lock"), wait_for(f"writing {folder}")):
        _check_empty(folder)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            yield partial
            partial.replace(folder)  # also over an empty folder
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give the name of a new one")
