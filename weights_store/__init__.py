"""The weight store: versioned tables of token weights on Delta, with a Polars surface.

Needs the base install only. The main entry is `WeightStore`.
"""

from weights_store.store import WeightStore, split_name
from weights_store.table import Table, TableVersion

__all__ = ["Table", "TableVersion", "WeightStore", "split_name"]
