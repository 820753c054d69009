"""What `verify` reports: a problem and its exact place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One problem of one table; fields that do not apply are None."""

    table: str
    """Path under the store's root: of a table, or `models/<name>` or `reports/<file>`."""
    problem: str
    version: int | None = None
    shard: str | None = None
    row_group: int | None = None
    pair_id: str | None = None
    file: str | None = None
    """A file that is no shard."""
    is_note: bool = False
    """Something to know, not damage: `verify` prints it and still ends with exit code 0."""

    def __str__(self) -> str:
        places = [self.table if self.version is None else f"{self.table}@{self.version}"]
        named = (("file", self.file), ("shard", self.shard), ("row group", self.row_group), ("pair", self.pair_id))
        places += [f"{name} {value}" for name, value in named if value is not None]
        return f"{'note: ' if self.is_note else ''}{', '.join(places)}: {self.problem}"
