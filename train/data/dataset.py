"""A map-style view of one pinned version of a weight dataset.

Row groups are read on demand, checked against what was committed, and kept in a small cache; the sampler makes neighbouring
reads fall into the same groups. Ids are used as stored: nothing is tokenised here. Not here: checks of rows
(`stored_pairs.py`), order (`sampler.py`), padding (`collate.py`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from train.config import DataConfig
from train.data.sampler import WINDOW_GROUPS, BlockShuffle
from train.data.selection import Selection
from train.data.shard_cache import ShardCache
from train.data.stored_pairs import Pair, PairColumns, StoredResponse, column_names
from weights_store import Table, TableVersion, WeightStore, split_name
from weights_store.errors import MismatchError, NotFoundError
from weights_store.schemas import SIDES
from weights_store.tables.commits import READERS
from weights_store.tables.metadata import CommitMetadata, Statistics
from weights_store.tables.shards import ShardReader, ShardRecord

__all__ = [
    "OrderedPairs",
    "Pair",
    "PairDataset",
    "StoredResponse",
    "WeightSource",
    "check_weights_vary",
    "open_weights",
    "sample_pairs",
]


@dataclass(frozen=True)
class WeightSource:
    """One pinned version of a weight dataset."""

    table: Table
    reference: TableVersion
    metadata: CommitMetadata

    @property
    def name(self) -> str:
        """The dataset's name with its version, for example `hh-harmless/tis-dpo@3`."""
        return str(self.reference).removeprefix("weights/")

    @property
    def statistics(self) -> Statistics:
        """Counts over the whole version; empty if none were recorded."""
        return self.metadata.get("statistics", {})

    @property
    def num_unpaired_rows(self) -> int:
        """Rows with a response on one side only."""
        return self.statistics.get("num_unpaired_rows", 0)

    @property
    def rows_are(self) -> str:
        """What to call its rows in messages."""
        return "rows" if self.num_unpaired_rows else "pairs"

    @property
    def num_responses(self) -> tuple[int, int] | None:
        """Chosen and rejected responses of the whole version; None if they were not counted."""
        chosen, rejected = (self.statistics.get(side, {}).get("num_responses") for side in SIDES)
        return None if chosen is None or rejected is None else (chosen, rejected)

    @property
    def anchors_are(self) -> str:
        """Where its anchors come from, `anchors.source` of its recipe."""
        recorded = self.metadata.get("identity", {}).get("settings", {}).get("anchors", {})
        return str(recorded.get("source", "sampled"))

    def splits_text(self) -> str:
        """Return the splits of the version with their rows, for messages; empty if they were not counted."""
        counts = self.statistics.get("num_pairs_by_split", {})
        return ", ".join(f"{split} ({count:,} {self.rows_are})" for split, count in counts.items())

    def filled_columns(self) -> set[str]:
        """Return the columns with a value in every row, of those that a loss may need."""
        statistics, sides = self.statistics, SIDES
        num_pairs = statistics.get("num_pairs")
        filled = {f"{side}_{name}" for side in sides for name in ("ref_logps", "token_weights")}
        if statistics.get("num_scored_pairs", 0) == num_pairs:
            filled |= {f"{side}_score" for side in sides}
        if statistics.get("ref_top_k"):
            filled |= {f"{side}_ref_top_{name}" for side in sides for name in ("ids", "logps")}
        if statistics.get("num_anchored_pairs", 0) == num_pairs:
            filled |= {"anchor_ids", "anchor_ref_logps"}
        return filled


def open_weights(config: DataConfig) -> WeightSource:
    """Resolve `data.weights` to an explicit version.

    Raises:
        SettingsError: The name or the store's URI is malformed.
        NotFoundError: No such store, name or version.
    """
    store = WeightStore(config.store)
    reference = store.resolve(*split_name(config.weights))
    table = store.table(reference.table)
    return WeightSource(table, reference, table.metadata(reference.version))


class PairDataset(Dataset[Pair]):
    """The pairs of one version, by row number in stored order.

    Opening it reads the log, and shards only if a split must be counted. Shards of an object store are copied to the local disk
    as they are needed.

    Args:
        config: Split, `max_pairs`, `swap`, whether pair weights count, folder for copies of shards.
        vocab_size: Ids must be below it.
        selection: Which rows; None for those of the config's split, up to its `max_pairs`.
        with_ref_top: Read the reference's top-k log-probs too, 2 K more numbers per response token.
        with_anchors: Read the anchors and their reference log-probs too.

    Raises:
        NotFoundError: No pair is left: unknown split, or an empty dataset.
        DamageError: A shard is not what was committed.
        StoreError: The store cannot be read, or the folder for copies of shards cannot be written.
    """

    def __init__(
        self,
        source: WeightSource,
        config: DataConfig,
        *,
        vocab_size: int,
        selection: Selection | None = None,
        with_ref_top: bool = False,
        with_scores: bool = False,
        with_anchors: bool = False,
    ) -> None:
        self.source = source
        self.config = config
        self.vocab_size = vocab_size
        self.cache_groups = WINDOW_GROUPS + 1  # kept in memory, about 1 MiB each
        self._columns = column_names(with_ref_top=with_ref_top, with_scores=with_scores, with_anchors=with_anchors)
        self._records = source.table.records(source.reference.version)
        self.selection = selection or Selection(config.split, max_pairs=config.max_pairs)
        self._groups = _find_groups(source.table, self._records, self.selection)
        self._ends = np.cumsum(self._groups.num_rows)
        self._cache: OrderedDict[int, PairColumns] = OrderedDict()
        self._open_shards: dict[int, ShardReader] = {}
        self._copies: ShardCache | None = None
        if not source.table.location.is_local:
            self._copies = ShardCache(config.cache_folder, config.cache_gib)
            self._copies.warn_of_oversized(self._records)
        if len(self) == 0:
            splits = source.splits_text()
            there = f"; it has {splits}" if splits else ""
            raise NotFoundError(
                f"{source.name} has no {source.rows_are} of {self.selection}{there}. Name another split in data.split or "
                "eval.split, leave data.split empty for all splits, or hold out more"
            )

    @property
    def group_sizes(self) -> list[list[int]]:
        """Rows of every row group, by shard, for the sampler."""
        shards, num_rows = self._groups.shards, self._groups.num_rows
        return [part.tolist() for part in np.split(num_rows, np.flatnonzero(np.diff(shards)) + 1)]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Pair:
        """Return the pair at `row`.

        Raises:
            IndexError: There is no such row.
            MismatchError: Ids, weights and reference log-probs of a row do not fit together, see `PairColumns`.
            DamageError: A shard is not what was committed.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside {self.source.name} with {len(self)} rows")
        group = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[group] - self._groups.num_rows[group])
        pair = self._load_group(group).pair(row - first)
        if not self.config.use_pair_weights:
            pair = replace(pair, pair_weight=1.0)
        return pair.swapped() if self.config.swap else pair

    def __getstate__(self) -> dict[str, object]:
        """Leave out open files and cached rows: every worker has its own."""
        return {**self.__dict__, "_cache": OrderedDict(), "_open_shards": {}}

    def _load_group(self, group: int) -> PairColumns:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        self._cache[group] = self.read_group(group)
        if len(self._cache) > self.cache_groups:
            self._cache.popitem(last=False)
        return self._cache[group]

    def read_group(self, group: int) -> PairColumns:
        """Read one row group of the view from its shard, past the cache.

        Raises:
            MismatchError, DamageError: See `__getitem__`.
        """
        shard, position, num_rows = (int(values[group]) for values in self._groups)
        names = list(dict.fromkeys([*self._columns, *self.selection.columns]))
        if shard not in self._open_shards:
            table, record = self.source.table, self._records[shard]
            reader = table.open_shard(record) if self._copies is None else self._copies.open(table, record)
            self._open_shards = {shard: reader}  # one open file is enough
        rows = self._open_shards[shard].read_group(position, names)
        if self.selection.columns:
            rows = rows.filter(self.selection.keeps(rows))
        where = f"{self.source.name}, shard {self._records[shard].name}"
        return PairColumns(rows.slice(0, num_rows).select(self._columns), vocab_size=self.vocab_size, where=where)


class _Groups(NamedTuple):
    """The row groups with rows in the view, in stored order, `[G]` each; arrays, since there may be a million."""

    shards: NDArray[np.int64]  # index of the record
    positions: NDArray[np.int64]  # in the shard
    num_rows: NDArray[np.int64]  # in the view


def _find_groups(table: Table, records: Sequence[ShardRecord], selection: Selection) -> _Groups:
    sizes: list[list[int]] = []  # rows in view of each row group, by shard; only as many shards as `max_pairs` needs
    num_found = 0
    with ThreadPoolExecutor(READERS) as pool:
        for begin in range(0, len(records), READERS):
            part = records[begin : begin + READERS]
            sizes += pool.map(lambda record: _sizes_of_shard(table, record, selection), part)
            num_found += sum(map(sum, sizes[begin:]))
            if selection.max_pairs is not None and num_found >= selection.max_pairs:
                break
    shards = np.repeat(np.arange(len(sizes)), [len(part) for part in sizes])
    positions = np.array([position for part in sizes for position in range(len(part))], dtype=np.int64)
    num_rows = np.array([size for part in sizes for size in part], dtype=np.int64)
    if selection.max_pairs is not None:
        num_rows = np.diff(np.minimum(np.cumsum(num_rows), selection.max_pairs), prepend=0)
    kept = num_rows > 0
    return _Groups(shards[kept], positions[kept], num_rows[kept])


def _sizes_of_shard(table: Table, record: ShardRecord, selection: Selection) -> list[int]:
    if not selection.columns:
        return list(record.group_sizes)
    reader = table.open_shard(record)
    groups = (reader.read_group(index, selection.columns) for index in range(len(reader.group_sizes)))
    return [int(selection.keeps(rows).sum()) for rows in groups]


class OrderedPairs(Dataset[Pair]):
    """The pairs of a dataset by their position in a training of `num_positions`, one epoch after the other.

    Positions from `num_positions` on are fillers, which make the last step equally long for every rank: they repeat the last
    real pair, usually in the cache, marked `is_filler`.
    """

    def __init__(self, pairs: PairDataset, order: BlockShuffle, num_positions: int) -> None:
        self.pairs = pairs
        self.order = order
        self.num_positions = num_positions

    def __len__(self) -> int:
        return self.num_positions

    def __getitem__(self, position: int) -> Pair:
        """Return the pair at `position`.

        Raises:
            MismatchError, DamageError: See `PairDataset`.
        """
        if position >= self.num_positions:
            return replace(self[self.num_positions - 1], is_filler=True)
        return self.pairs[self.order.rows([position])[0]]


def sample_pairs(pairs: PairDataset, num_pairs: int = 256) -> list[Pair]:
    """Return up to `num_pairs` pairs from a few row groups, always the same ones for the same dataset."""
    order = BlockShuffle(pairs.group_sizes, seed=0)
    return [pairs[row] for row in sorted(order.rows(range(min(num_pairs, len(pairs)))))]


def check_weights_vary(source: WeightSource, sample: Iterable[Pair], loss_name: str) -> None:
    """Refuse token weights that are all equal: a weighted loss would silently train like the plain one.

    Looks at `sample` if the metadata does not record whether weights are constant.

    Raises:
        MismatchError: The weights are constant.
    """
    constant = source.statistics.get("constant_weights")
    if constant is None:
        values = np.concatenate([side.token_weights for pair in sample for side in (pair.chosen, pair.rejected)])
        constant = values.min() == values.max()
    if constant:
        raise MismatchError(
            f"loss.name={loss_name!r} needs token weights that differ, but all weights of {source.name} are equal; use "
            "loss.name='dpo' or a dataset with another estimator"
        )
