"""What a kill may cost, counted: rows that are lost, that are there twice, and that mix what different writers wrote."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """Rows of a table that are not as they must be."""

    lost: int = 0
    doubled: int = 0
    mixed: int = 0
    """Rows with other values than one writer wrote, or that nobody wrote."""

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.lost + other.lost, self.doubled + other.doubled, self.mixed + other.mixed)

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.mixed)


def loss_of(found: Iterable[tuple[Hashable, object]], expected: Mapping[Hashable, object]) -> Loss:
    """Compare rows, each a key with its values, with what must be there."""
    rows = list(found)
    counts = Counter(key for key, _ in rows)
    return Loss(
        lost=len(expected.keys() - counts.keys()),
        doubled=sum(count - 1 for count in counts.values()),
        mixed=sum(1 for key, values in rows if key not in expected or expected[key] != values),
    )
