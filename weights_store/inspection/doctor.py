"""What may be wrong with the weights of a dataset: each finding with its figure, its meaning and what to do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Diagnosis:
    """One finding of the doctor."""

    name: str
    """A short name that stays the same, for programs: for example `clamped`."""
    severity: Literal["warning", "note"]
    """A warning makes `doctor --strict` end with exit code 1."""
    figure: str
    """What was measured, with its bound: "38 % of the chosen tokens are at an end of the clamp (more than 20 %)"."""
    meaning: str
    """What it means for a training on these weights."""
    remedy: str
    """What to do."""
