"""The weight store: versioned tables of token weights on Delta, read with Polars.

Needs the base install only. The entry is `WeightStore`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights_store.names import split_name
    from weights_store.store import WeightStore
    from weights_store.tables.table import Table
    from weights_store.tables.table_reader import TableVersion

__all__ = ["Table", "TableVersion", "WeightStore", "split_name"]

_HOMES = {
    "WeightStore": "store",
    "split_name": "names",
    "Table": "tables.table",
    "TableVersion": "tables.table_reader",
}


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used: Polars and pyarrow take a quarter of a second."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
