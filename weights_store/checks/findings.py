"""What `verify` reports: a problem and its exact place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One problem of one table; fields that do not apply are None."""

    table: str
    problem: str
    version: int | None = None
    shard: str | None = None
    row_group: int | None = None
    pair_id: str | None = None

    def __str__(self) -> str:
        places = [self.table if self.version is None else f"{self.table}@{self.version}"]
        named = (("shard", self.shard), ("row group", self.row_group), ("pair", self.pair_id))
        places += [f"{name} {value}" for name, value in named if value is not None]
        return f"{', '.join(places)}: {self.problem}"
