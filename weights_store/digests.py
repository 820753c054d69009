"""The SHA-256 of large local files, read once by this machine: models and sources that a scheduled build meets every time.

This process keeps digests in memory, and those of large files in `TOKENWEIGHTS_CACHE` too, one small file for each path. A
digest counts only while the file's size, inode and times of change are the same. If the file changed just before it was read,
its digest is not kept: the file may change again within a tick of the file system's clock. `verify` and the checks of shards
use none of them: they find bytes that changed by themselves.
"""

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

_MIN_BYTES = 8 << 20
"""Smaller files are read by each process: that takes some ten milliseconds."""
_SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use, FAT's."""

_State = tuple[int, int, int, int]

_known: dict[Path, tuple[_State, str]] = {}
"""What this process has read, by file."""


def cache_folder() -> Path:
    """Return where this machine keeps what can be made again: `TOKENWEIGHTS_CACHE`, or `~/.cache/tokenweights`."""
    return Path(os.environ.get("TOKENWEIGHTS_CACHE") or "~/.cache/tokenweights").expanduser().absolute()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of the bytes of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_once(path: Path) -> str:
    """Return the SHA-256 of the bytes of one file; it is read again only if it has changed, or a small one by each process."""
    path = path.resolve()
    state, known = _state(path), _known.get(path)
    if known is not None and known[0] == state:
        return known[1]
    kept = _place(path) if state[0] >= _MIN_BYTES else None
    if kept is not None:
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # not there yet, or damaged
            found = json.loads(kept.read_bytes())
            if found == _record(path, state, found["sha256"]):
                _known[path] = state, found["sha256"]
                return str(found["sha256"])
    started_ns = time.time_ns()
    sha256 = digest_file(path)
    if _state(path) == state and max(state[2:]) < started_ns - _SETTLED_NS:
        _known[path] = state, sha256
        if kept is not None:
            _keep(kept, _record(path, state, sha256))
    return sha256


def _place(path: Path) -> Path | None:
    """Return where the digest of a file is kept; None if this user has no folder for it."""
    try:
        return cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    except RuntimeError:  # a user without a home folder, as in some containers
        return None


def _state(path: Path) -> _State:
    stat = path.stat()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _record(path: Path, state: _State, sha256: str) -> dict[str, object]:
    """Return the content of a kept digest; `check` covers the rest, so that a damaged digest counts for nothing."""
    made: dict[str, object] = {"path": str(path), "state": list(state), "sha256": sha256}
    return made | {"check": hashlib.sha256(json.dumps(made).encode()).hexdigest()}


def _keep(place: Path, record: dict[str, object]) -> None:
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")  # other machines may share the folder
    with suppress(OSError):  # a folder that cannot be written, or is full, costs time, nothing else
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(record), encoding="utf-8")
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
