"""What came of a part of the torture: a table for people, and one line for each case that failed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass
class Result:
    """One part. A failure is its case, such as `damages:123` or `stages:4`, and what went wrong."""

    part: str
    num_cases: int
    table: list[str]
    failures: list[tuple[str, str]]
    wall_s: float


def aligned(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table, texts to the left and numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.rjust(w) if at else cell.ljust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
