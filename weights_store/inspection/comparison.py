"""Two weight datasets of the same pairs: which pairs both have, and how far their token weights agree."""

from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np
import polars as pl

from weights_store.schemas import SIDES
from weights_store.views.diff import correlation

LEAST_WEIGHT = 1 / 64
"""Weights below count as this much in a disagreement, which compares logarithms: a weight of 0 would make it infinite."""
_OTHER = "_other"


@dataclass
class Comparison:
    """Counts over the pairs that have passed through `join`."""

    COLUMNS: ClassVar[frozenset[str]] = frozenset(
        ("pair_id", *(f"{side}_{what}" for side in SIDES for what in ("ids", "token_weights")))
    )
    """What `join` needs of both datasets."""

    num_common: int = 0
    num_only_here: int = 0
    num_only_there: int = 0
    num_differing_tokens: int = 0
    """Common pairs whose response ids differ: their weights belong to other tokens, and are in no figure."""
    num_tokens: int = 0
    """Tokens of the other common pairs."""
    num_disagreeing: int = 0
    """Tokens of which one dataset makes more (weight above 1) and the other less (below 1)."""
    _sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("a", "b", "aa", "bb", "ab"), 0.0), repr=False
    )
    """Of both weights less 1, of their squares and of their product."""

    def join(self, here: pl.DataFrame, there: pl.DataFrame) -> pl.DataFrame:
        """Count one range of pairs; return those that both have, with column `disagreement`, null if the tokens differ."""
        there = there.rename({name: f"{name}{_OTHER}" for name in there.columns if name != "pair_id"})
        common = here.join(there, on="pair_id", maintain_order="left").with_columns(disagreement=disagreement())
        same = common.filter(pl.col("disagreement").is_not_null())
        self.num_common += common.height
        self.num_only_here += here.height - common.height
        self.num_only_there += there.height - common.height
        self.num_differing_tokens += common.height - same.height
        for side in SIDES:
            a, b = (_flat(same, f"{side}_token_weights{end}") for end in ("", _OTHER))
            self.num_tokens += len(a)
            self.num_disagreeing += int(np.count_nonzero(a * b < 0))
            for name, values in {"a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b}.items():
                self._sums[name] += float(values.sum())
        return common

    @property
    def correlation(self) -> float | None:
        """Pearson's, over all tokens; None if one dataset weighs all tokens the same."""
        return correlation(self.num_tokens, self._sums)

    def as_dict(self) -> dict[str, object]:
        """Return the counts and the correlation by name."""
        counts = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return {**counts, "correlation": self.correlation}


def disagreement() -> pl.Expr:
    """Return an expression for mean |log2(other weight / weight)| over the tokens of both sides, null if ids differ."""
    total, num_tokens = pl.lit(0.0), pl.lit(0)
    same = pl.lit(True)
    for side in SIDES:
        here, there = (_log2(pl.col(f"{side}_token_weights{end}")) for end in ("", _OTHER))
        same &= pl.col(f"{side}_ids") == pl.col(f"{side}_ids{_OTHER}")
        total += (there - here).list.eval(pl.element().abs()).list.sum()
        num_tokens += pl.col(f"{side}_ids").list.len()
    return pl.when(same).then(total / num_tokens)


def _log2(weights: pl.Expr) -> pl.Expr:
    return weights.cast(pl.List(pl.Float64)).list.eval(pl.element().clip(LEAST_WEIGHT).log(2))


def _flat(rows: pl.DataFrame, name: str) -> np.ndarray:
    return rows[name].explode(empty_as_null=False).cast(pl.Float64).to_numpy() - 1
