"""The doctor's findings in the report of a version, so that a build with nothing to do need not read all tokens again.

They stand in the page as one comment, with a key of what they were made from: the commit of the version, which never changes,
and the code that counts and judges. Findings under another key are not read, so those of old rules never pass for new ones.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files

from weights_store.catalog import open_table
from weights_store.fingerprint import fingerprint, fingerprint_text
from weights_store.inspection.doctor import Diagnosis
from weights_store.location import Location
from weights_store.tables.table_reader import TableVersion

_LINE = re.compile(rb"^<!-- findings of ([0-9a-f]{64}): (\[.*\]) -->$", re.MULTILINE)
_JUDGES = ("inspection", "views/held_out.py", "checks/rows.py")
"""Folders and files of this package that decide what the findings are."""


def findings_key(root: Location, weights: TableVersion) -> str:
    """Return the key of the findings about a version, 64 hex digits; a version of the same name made later has another one."""
    commit = open_table(root, weights.table).read_commit(weights.version)
    return fingerprint({"table": weights.table, "commit": commit.digest, "code": _code()})


def with_findings(html: str, key: str, diagnoses: Sequence[Diagnosis]) -> str:
    """Return a page with its findings in a comment below the document type."""
    text = json.dumps(list(map(asdict, diagnoses))).replace("<", "\\u003c").replace(">", "\\u003e")
    doctype, _, rest = html.partition("\n")
    return f"{doctype}\n<!-- findings of {key}: {text} -->\n{rest}"


def read_findings(page: bytes, key: str) -> list[Diagnosis] | None:
    """Return the findings in an undamaged page, None if it has none under this key."""
    line = _LINE.search(page)
    if line is None or line[1].decode() != key:
        return None
    return [Diagnosis(**finding) for finding in json.loads(line[2])]


@lru_cache(maxsize=1)
def _code() -> str:
    """Return the fingerprint of the code that makes findings; it changes with every edit, so nobody has to count versions."""
    package = files("weights_store")
    texts = {}
    for name in _JUDGES:
        place = package / name
        for file in place.iterdir() if place.is_dir() else [place]:
            if file.name.endswith(".py"):
                texts[f"{name}/{file.name}"] = fingerprint_text(file.read_text(encoding="utf-8"))
    return fingerprint(texts)
