"""Single damages to the files of a store: what bad disks, broken copies and careless hands do.

Each damage follows from a random number generator and the bytes of the sound store, so a case can be made again. Not here:
deleting the newest commit of a table, whole: that store is one that was never built further, and nothing in it is wrong. Nor
deleting the record of a model, which makes it an unfinished one: `plan` and `lineage` say so.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from weights_store.schemas import SCHEMAS

Files = Mapping[str, bytes]
"""The files of a store: path under its root -> content."""
Change = dict[str, bytes | None]
"""Files that a damage writes; None: it deletes them."""

_COMMIT = re.compile(r"\d{20}\.json")
_SHARES = {
    "shard": 32,
    "commit": 32,
    "checkpoint": 8,
    "last checkpoint": 6,
    "model": 12,
    "model record": 6,
    "report": 4,
}
"""How many of 100 damages hit a file of each kind."""


@dataclass(frozen=True)
class Damage:
    """One damage: what was done to which file, and the content of every file that it changes."""

    what: str
    place: str
    change: Change

    @property
    def table(self) -> str | None:
        """The path of the damaged table, None if the damage is outside of tables."""
        folder = PurePosixPath(next(iter(self.change))).parent
        folder = folder.parent if folder.name == "_delta_log" else folder
        return str(folder) if folder.parts[0] in SCHEMAS else None


def kind_of(path: str) -> str:
    """Return what a file of a store is, a key of `_SHARES`."""
    *folders, name = path.split("/")
    if folders[0] == "models":
        return "model record" if name in ("contrast.json", "lineage.json") else "model"
    if folders[0] == "reports":
        return "report"
    if name == "_last_checkpoint":
        return "last checkpoint"
    if folders[-1] == "_delta_log":
        return "commit" if _COMMIT.fullmatch(name) else "checkpoint"
    return "shard"


def draw_damage(rng: random.Random, files: Files) -> Damage:
    """Return a damage to one file, or to two of a kind. It changes at least one byte."""
    by_kind: dict[str, list[str]] = {}
    for path in sorted(files):
        by_kind.setdefault(kind_of(path), []).append(path)
    while True:
        kind = rng.choices(list(by_kind), [_SHARES[kind] for kind in by_kind])[0]
        how = rng.choices(list(_WAYS), [weight for _, weight in _WAYS.values()])[0]
        change = _WAYS[how][0](rng, files, rng.choice(by_kind[kind]))
        change = {path: data for path, data in change.items() if data != files.get(path)}
        if change and not _rolls_back(change, files):
            place = ", ".join(change) if len(change) < 3 else _folder_of(next(iter(change)))
            return Damage(f"{kind}: {how}", place, change)


def _rolls_back(change: Change, files: Files) -> bool:
    """Return whether a damage only makes a table what it was one commit ago."""
    gone = [path for path, data in change.items() if data is None and kind_of(path) == "commit"]
    return len(change) == 1 and any(path > max(_alike(path, files), default="") for path in gone)


def _alike(path: str, files: Files) -> list[str]:
    """Return the other files of the same kind in the same folder, or of the same name in other models."""
    name, kind = path.rpartition("/")[2], kind_of(path)
    by_name = kind.startswith("model")
    folder = None if by_name else path.rpartition("/")[0]
    return [
        other
        for other in sorted(files)
        if other != path
        and kind_of(other) == kind
        and (other.endswith(f"/{name}") if by_name else other.rpartition("/")[0] == folder)
    ]


# --- one file ----------------------------------------------------------------------------------------------------------


def _flip(rng: random.Random, files: Files, path: str) -> Change:
    data = bytearray(files[path])
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    return {path: bytes(data)}


def _alter_field(rng: random.Random, files: Files, path: str) -> Change:
    """Change one character of one value in JSON, also in JSON inside a text, and keep it JSON."""
    if not path.endswith(".json") and not path.endswith("_last_checkpoint"):
        return {}
    text = files[path].decode()
    is_commit = kind_of(path) == "commit"
    documents = [json.loads(line) for line in text.splitlines()] if is_commit else [json.loads(text)]
    document = rng.choice(documents)
    altered = [_altered(rng, each) if each is document else each for each in documents]
    lines = [json.dumps(each, separators=(",", ":")) for each in altered]
    return {path: "\n".join(lines).encode()}


def _altered(rng: random.Random, value: object) -> object:
    """Return a value with one character of one of its leaves changed."""
    if isinstance(value, dict) and value:
        name = rng.choice(list(value))
        return {**value, name: _altered(rng, value[name])}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], _altered(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        digits = str(value)
        at = rng.choice([at for at, character in enumerate(digits) if character.isdigit()])
        changed = f"{digits[:at]}{(int(digits[at]) + rng.randint(1, 9)) % 10}{digits[at + 1 :]}"
        return type(value)(changed)
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.dumps(_altered(rng, json.loads(value)))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + chr(ord(value[at]) ^ rng.choice((1, 2, 4))) + value[at + 1 :]
    return "x"


def _cut(rng: random.Random, files: Files, path: str) -> Change:
    return {path: files[path][: rng.randrange(len(files[path]))]}


def _extend(rng: random.Random, files: Files, path: str) -> Change:
    data = files[path]
    start = rng.randrange(len(data))
    more = rng.choice((rng.randbytes(rng.randint(1, 64)), b"\0" * 512, data[start : start + 200], b"\n" + data))
    return {path: data + more}


def _empty_block(rng: random.Random, files: Files, path: str) -> Change:
    """A block that was never written: zeros in its place."""
    data = files[path]
    start, size = rng.randrange(len(data)), rng.choice((16, 512, 4096))
    return {path: (data[:start] + b"\0" * min(size, len(data) - start) + data[start + size :])}


def _delete(rng: random.Random, files: Files, path: str) -> Change:
    return {} if path.endswith("/contrast.json") else {path: None}


# --- two files ---------------------------------------------------------------------------------------------------------


def _swap(rng: random.Random, files: Files, path: str) -> Change:
    others = _alike(path, files)
    if not others:
        return {}
    other = rng.choice(others)
    return {path: files[other], other: files[path]}


def _copy_over(rng: random.Random, files: Files, path: str) -> Change:
    others = _alike(path, files)
    return {path: files[rng.choice(others)]} if others else {}


def _copy_from_elsewhere(rng: random.Random, files: Files, path: str) -> Change:
    """A file of the same kind and number that belongs to another table or model."""
    kind, folder = kind_of(path), path.rpartition("/")[0]
    others = [other for other in sorted(files) if kind_of(other) == kind and other.rpartition("/")[0] != folder]
    if kind == "commit":
        others = [other for other in others if other.rpartition("/")[2] == path.rpartition("/")[2]]
    return {path: files[rng.choice(others)]} if others else {}


def _folder_over_another(rng: random.Random, files: Files, path: str) -> Change:
    """A whole table or model in the place of another one of its kind."""
    folder, kind = _folder_of(path), path.partition("/")[0]
    folders = sorted({_folder_of(other) for other in files if other.startswith(f"{kind}/")} - {folder})
    if not folders or kind == "reports":
        return {}
    source = rng.choice(folders)
    gone: Change = {other: None for other in files if _folder_of(other) == folder}
    come = {f"{folder}{other.removeprefix(source)}": files[other] for other in files if _folder_of(other) == source}
    return gone | come


def _folder_of(path: str) -> str:
    """Return the folder of the table or the model that a file belongs to."""
    return path.rpartition("/")[0].removesuffix("/_delta_log")


def _repeat_commit(rng: random.Random, files: Files, path: str) -> Change:
    """An older commit once more, as the newest one."""
    if kind_of(path) != "commit":
        return {}
    newest = max([path, *_alike(path, files)])
    folder, _, name = newest.rpartition("/")
    return {f"{folder}/{int(name.removesuffix('.json')) + 1:020d}.json": files[path]}


_WAYS: dict[str, tuple[Callable[[random.Random, Files, str], Change], int]] = {
    "bit flipped": (_flip, 45),
    "field altered": (_alter_field, 20),
    "cut off": (_cut, 7),
    "extended": (_extend, 5),
    "block of zeros": (_empty_block, 4),
    "deleted": (_delete, 4),
    "two swapped": (_swap, 6),
    "copied over another": (_copy_over, 5),
    "from elsewhere": (_copy_from_elsewhere, 3),
    "commit repeated": (_repeat_commit, 3),
    "folder over another": (_folder_over_another, 3),
}
"""The ways to damage a file, with how often each is drawn."""
