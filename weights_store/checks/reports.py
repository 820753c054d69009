"""The reports of a store, `reports/<name>@<version>.html`: each begins with a digest of its name and of the rest of it.

A missing report is no finding: reports are written after publishing, and the next build writes one that is missing.
"""

import hashlib
import re
from collections.abc import Iterator

from weights_store.checks.findings import Finding
from weights_store.location import Location

REPORTS = "reports"

_DOCTYPE = b"<!doctype html>\n"
_HEAD = re.compile(_DOCTYPE + rb"<!-- sha256 of the name in reports/ and of all that follows: ([0-9a-f]{64}) -->\n")


def with_digest(html: str, file: str) -> bytes:
    """Return the bytes of the report `file`, with its digest below the document type."""
    data = html.encode()
    assert data.startswith(_DOCTYPE), "a report is an HTML document"
    body = data.removeprefix(_DOCTYPE)
    line = f"<!-- sha256 of the name in {REPORTS}/ and of all that follows: {_digest(file, body)} -->\n"
    return _DOCTYPE + line.encode() + body


def report_problem(data: bytes, file: str) -> str | None:
    """Return what is wrong with the report `file`, None if it is as it was written under this name."""
    head = _HEAD.match(data)
    if head is None:
        return "it is damaged: its first lines are not those of a report"
    found, recorded = _digest(file, data[head.end() :]), head[1].decode()
    if found != recorded:
        return f"it is damaged, or another report: its SHA-256 is {found[:12]}…, recorded is {recorded[:12]}…"
    return None


def check_reports(root: Location) -> Iterator[Finding]:
    """Yield a finding for each damaged report of a store."""
    folder = root / REPORTS
    for name in sorted(folder.tree()):
        if not name.endswith(".html") or name.rpartition("/")[2].startswith("."):
            continue
        if problem := report_problem(folder.read(name), name):
            yield Finding(f"{REPORTS}/{name}", f"{problem}; the next build of this weight dataset writes it again")


def _digest(file: str, body: bytes) -> str:
    return hashlib.sha256(file.encode() + b"\n" + body).hexdigest()
