"""The weight store: versioned tables of token weights on Delta, with a Polars surface.

Needs the base install only. The main entry is `WeightStore`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights_store.store import WeightStore, split_name
    from weights_store.tables.table import Table
    from weights_store.tables.table_reader import TableVersion

__all__ = ["Table", "TableVersion", "WeightStore", "split_name"]


def __getattr__(name: str) -> Any:
    """Load the public names when they are first asked for: Polars and pyarrow cost a quarter of a second."""
    from importlib import import_module

    home = {
        "WeightStore": "store",
        "split_name": "store",
        "Table": "tables.table",
        "TableVersion": "tables.table_reader",
    }.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
