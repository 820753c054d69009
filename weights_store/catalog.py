"""Which tables a store holds: from a path to its table, and listings by kind."""

from collections.abc import Iterator

from weights_store.errors import NotFoundError, SettingsError
from weights_store.location import Location
from weights_store.names import check_name, is_name
from weights_store.schemas import KEYS, SCHEMAS
from weights_store.tables.table import Table


def open_table(root: Location, path: str) -> Table:
    """Return one table by its path under the store's root, for example `weights/hh-harmless/tis-dpo`.

    Raises:
        SettingsError: The path is malformed, or its first part is not a kind of table.
    """
    kind, _, name = path.partition("/")
    if kind not in SCHEMAS:
        raise SettingsError(f"no kind of table {kind!r}: expected one of {', '.join(SCHEMAS)}")
    check_name(name)
    return Table(root, path, SCHEMAS[kind], KEYS[kind])


def list_tables(root: Location, *folders: str) -> Iterator[Table]:
    """Yield the tables under some folders, by default those of all kinds, in order of their names."""
    for folder in folders or SCHEMAS:
        # One level at a time: listing all files of an object store would take minutes.
        for name in filter(is_name, (root / folder).folders()):
            path = f"{folder}/{name}"
            if (root / path).exists("_delta_log"):
                yield open_table(root, path)
            else:
                yield from list_tables(root, path)


def check_store(root: Location) -> None:
    """Check that there is a store.

    Raises:
        NotFoundError: There is none.
    """
    if not root.exists(*SCHEMAS):
        raise NotFoundError(f"no store at {root}: expected a folder that `tokenweights build` has written")
