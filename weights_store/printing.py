"""Prints the results of the store's commands: aligned tables, counts, sizes, and JSON."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_store.checks.repair import Repair
    from weights_store.checks.vacuum import Orphan
    from weights_store.tables.shards import ShardRecord

GAP = "  "
"""Between columns, and in front of indented lines."""


def print_json(document: object) -> None:
    """Print a document that may hold times, frames and dataclasses."""
    print(json.dumps(document, indent=2, default=_plain, allow_nan=False))


def _plain(value: object) -> object:
    """Return what JSON can hold: a time as ISO 8601, a frame as its rows, a dataclass as its fields."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value.to_dicts() if hasattr(value, "to_dicts") else vars(value)


def print_orphans(orphans: "Sequence[Orphan]") -> None:
    """Print one line per file that no version needs; nothing if there are none."""
    if orphans:
        rows = [
            {"size": size_text(o.num_bytes), "age": f"{o.age_hours:.0f} h", "file": f"{o.table}/{o.name}"}
            for o in orphans
        ]
        print_table(rows, GAP)


def print_repair(repair: "Repair", aside: str | None) -> None:
    """Print what is lost and kept of one table, and where the rest went; None if it is still in its place."""
    if repair.kept is None:
        print(f"{repair.table}: none of its {count_text(repair.newest + 1, 'version')} is whole; build it again")
    elif repair.dropped:
        print(f"{repair.table}: back from version {repair.newest} to {repair.kept}, its newest whole one")
    elif repair.files:
        print(f"{repair.table}: all versions stay; checkpoints that are no true summary of its log go")
    else:
        print(f"{repair.table}: version {repair.newest} is whole and can be built on; some older ones are damaged")
    for problem, group in groupby(sorted(repair.dropped.items()), key=lambda item: item[1]):
        versions = [version for version, _ in group]
        one = len(versions) == 1
        span = f"version {versions[0]} is" if one else f"versions {versions[0]}..{versions[-1]} are"
        print(f"{GAP}{span} dropped: {problem}")
    for version, problem in sorted(repair.unreadable.items()):
        print(f"{GAP}version {version} stays damaged: {problem}")
    if repair.dropped:
        before = "an unknown number of" if repair.num_rows is None else f"{repair.num_rows:,}"
        print(f"{GAP}{repair.num_rows_kept:,} rows are kept of {before} in version {repair.newest}")
    if not repair.files:
        return
    files = count_text(len(repair.files), "file")
    print(f"{GAP}moved {files} to {aside}" if aside else f"{GAP}would move {files} to the folder aside/ of the store")


def print_table(rows: Sequence[Mapping[str, object]], indent: str = "", right: Sequence[str] = ()) -> None:
    """Print rows under a line of column names; numbers, and the texts of columns in `right`, to the right.

    Texts are data of strangers (ids, splits, paths): what is not printable is escaped.
    """
    if not rows:
        print(f"{indent}none")
        return
    names = list(rows[0])
    numeric = {
        name for name in names if all(isinstance(row[name], int | float | None) or row[name] == "" for row in rows)
    }.union(right)
    lines = [{name: name.replace("_", " ") for name in names}]
    lines += [{name: _cell(row[name]) for name in names} for row in rows]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    for line in lines:
        cells = [f"{line[name]:{'>' if name in numeric else '<'}{widths[name]}}" for name in names]
        print(f"{indent}{GAP.join(cells)}".rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def count_text(number: int, noun: str) -> str:
    """Return for example `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share_text(share: float) -> str:
    """Return for example `12.5 %`."""
    return f"{share:.1%}".replace("%", " %")


def amount_text(files: "Sequence[ShardRecord | Orphan]", noun: str) -> str:
    """Return for example `2 files, 3.5 KiB`."""
    return f"{count_text(len(files), noun)}, {size_text(sum(file.num_bytes for file in files))}"


def size_text(num_bytes: float) -> str:
    """Return for example `3.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def one_line(text: str, limit: int | None = None) -> str:
    """Return text for one line of a terminal: what is not printable is escaped, and it is cut after `limit` characters."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:limit])
    return f"{shown}…" if limit is not None and len(text) > limit else shown
