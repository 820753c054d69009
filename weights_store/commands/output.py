"""Files that commands write where the user says: never over a file that is not ours, and whole or not at all."""

import os
from pathlib import Path

from weights_store.errors import InputError
from weights_store.printing import size_text

MARK = b"tokenweights"
"""Near the beginning of every page and every figure that we write."""
_HEAD_BYTES = 4096


def check_ours(path: Path) -> None:
    """Check that a file may be written, before the work that fills it.

    Raises:
        InputError: There is something in its place that we did not write, or its folder does not exist or cannot be written to.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or give -o another name")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: no permission to write to the folder {path.parent.resolve()}; give -o another name")
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} exists and is no file; give -o another name")
    with path.open("rb") as file:
        if MARK not in file.read(_HEAD_BYTES):
            raise InputError(
                f"{path} exists and was not written by tokenweights; give -o another name, or move it away"
            )


def write_output(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, over an older one of ours, and say where it is."""
    assert MARK in content[:_HEAD_BYTES], "what we write says near its beginning that it is ours"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    print(f"{size_text(path.stat().st_size):>10}  {path}")
