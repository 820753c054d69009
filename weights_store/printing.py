"""Prints the results of the store's commands: aligned tables, counts, sizes, and JSON."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

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
