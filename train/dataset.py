"""A map-style view of one pinned version of a weight dataset.

Row groups are read on demand, checked against what was committed, and kept in a small cache; the sampler makes neighbouring
reads fall into the same groups. Ids are used as they are stored: nothing is tokenised here. Not here: order (`sampler.py`),
padding (`collate.py`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import Dataset

from train.config import DataConfig
from train.sampler import WINDOW_GROUPS, BlockShuffle
from weights_store import Table, TableVersion, WeightStore, split_name
from weights_store.errors import MismatchError, NotFoundError
from weights_store.shards import ShardReader, ShardRecord

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_FLOATS = {
    "chosen": ("chosen_token_weights", "chosen_ref_logps"),
    "rejected": ("rejected_token_weights", "rejected_ref_logps"),
}
_COLUMNS = ["pair_id", *_IDS, *(name for names in _FLOATS.values() for name in names)]


@dataclass(frozen=True)
class WeightSource:
    """One pinned version of a weight dataset."""

    table: Table
    reference: TableVersion
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The dataset's name with its version, for example `hh-harmless/tis-dpo@3`."""
        return str(self.reference).removeprefix("weights/")


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


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response as stored, one entry per token, end-of-text included: shapes `[T]`."""

    ids: NDArray[np.int32]
    token_weights: NDArray[np.float32]
    ref_logps: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair; chosen and rejected are exchanged already where the config says `swap`."""

    pair_id: str
    prompt_ids: NDArray[np.int32]
    chosen: StoredResponse
    rejected: StoredResponse

    @property
    def num_tokens(self) -> int:
        """Length of the longer of its two sequences, prompt + response."""
        return len(self.prompt_ids) + max(len(self.chosen.ids), len(self.rejected.ids))


class _Group(NamedTuple):
    """A row group and how many of its rows are in the view."""

    shard: ShardRecord
    position: int  # in the shard
    num_rows: int


class PairDataset(Dataset[Pair]):
    """The pairs of one version, by row number in stored order.

    Args:
        source: The pinned version.
        config: Split, `max_pairs`, `swap`.
        vocab_size: Ids must be below it.
        cache_groups: Row groups kept in memory, about 1 MiB each.

    Raises:
        NotFoundError: No pair is left: unknown split, or an empty dataset.
    """

    def __init__(
        self, source: WeightSource, config: DataConfig, *, vocab_size: int, cache_groups: int = WINDOW_GROUPS + 1
    ) -> None:
        self.source = source
        self.config = config
        self.vocab_size = vocab_size
        self.cache_groups = cache_groups
        self._groups = _list_groups(source, config)
        self._ends = np.cumsum([group.num_rows for group in self._groups])
        self._cache: OrderedDict[int, _Columns] = OrderedDict()
        self._shards: dict[str, ShardReader] = {}
        if len(self) == 0:
            raise NotFoundError(
                f"{source.name} has no pair with split {config.split!r}; leave data.split empty for all"
            )

    @property
    def group_sizes(self) -> list[int]:
        """Rows of every row group, for the sampler."""
        return [group.num_rows for group in self._groups]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Pair:
        """Return the pair at `row`.

        Raises:
            IndexError: There is no such row.
            MismatchError: Ids, weights and reference log-probs of a row do not belong together, see `check_columns`.
            DamageError: A shard is not what was committed.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside {self.source.name} with {len(self)} rows")
        group = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[group]) - self._groups[group].num_rows
        pair = self._load_group(group).pair(row - first)
        return Pair(pair.pair_id, pair.prompt_ids, pair.rejected, pair.chosen) if self.config.swap else pair

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and cached rows behind: every worker has its own."""
        return {**self.__dict__, "_cache": OrderedDict(), "_shards": {}}

    def _load_group(self, group: int) -> "_Columns":
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        columns = self._read_group(self._groups[group])
        self._cache[group] = columns
        if len(self._cache) > self.cache_groups:
            self._cache.popitem(last=False)
        return columns

    def _read_group(self, group: _Group) -> "_Columns":
        names = [*_COLUMNS, "split"] if self.config.split else _COLUMNS
        rows = self._open(group.shard).read_group(group.position, names)
        if self.config.split:
            rows = rows.filter(pc.equal(rows["split"], self.config.split))
        columns = _Columns(rows.slice(0, group.num_rows).combine_chunks())
        check_columns(columns, self.vocab_size, where=f"{self.source.name}, shard {group.shard.name}")
        return columns

    def _open(self, shard: ShardRecord) -> ShardReader:
        if shard.name not in self._shards:
            self._shards = {shard.name: self.source.table.open_shard(shard)}  # one open file is enough
        return self._shards[shard.name]


def _list_groups(source: WeightSource, config: DataConfig) -> list[_Group]:
    """Read the footer of every shard and, with a split, its column; stop once `max_pairs` are there."""
    groups: list[_Group] = []
    left = config.max_pairs
    for shard in source.table.records(source.reference.version):
        reader = source.table.open_shard(shard)
        for index, size in enumerate(reader.group_sizes):
            num_rows = _count_rows(reader, index, config.split) if config.split else size
            groups.append(_Group(shard, index, num_rows if left is None else min(num_rows, left)))
            left = None if left is None else left - groups[-1].num_rows
            if left == 0:
                return groups
    return groups


def _count_rows(reader: ShardReader, index: int, split: str) -> int:
    column = reader.read_group(index, ["split"])["split"]
    return int(pc.sum(pc.equal(column, split)).as_py() or 0)


class _Ragged:
    """A list column as flat values and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunk = column.combine_chunks()
        array = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
        self.offsets: NDArray[np.int64] = np.asarray(array.offsets).astype(np.int64)
        self.values: NDArray[Any] = array.values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def row_of_first(self, bad: NDArray[np.bool_]) -> int | None:
        """Return the row of the first True among values within the rows, None where there is none."""
        first, last = self.offsets[0], self.offsets[-1]
        hits = np.flatnonzero(bad[first:last])
        return int(np.searchsorted(self.offsets, first + hits[0], side="right")) - 1 if len(hits) else None


class _Columns:
    """The decoded columns of one row group."""

    def __init__(self, rows: pa.Table) -> None:
        self.pair_ids = rows["pair_id"]
        self.ragged = {name: _Ragged(rows[name]) for name in _COLUMNS if name != "pair_id"}

    def pair(self, row: int) -> Pair:
        return Pair(
            self.pair_id(row),
            self.ragged["prompt_ids"][row],
            self._response("chosen", row),
            self._response("rejected", row),
        )

    def pair_id(self, row: int) -> str:
        return str(self.pair_ids[row].as_py())

    def _response(self, side: str, row: int) -> StoredResponse:
        weights, ref_logps = _FLOATS[side]
        return StoredResponse(self.ragged[f"{side}_ids"][row], self.ragged[weights][row], self.ragged[ref_logps][row])


def check_columns(columns: _Columns, vocab_size: int, where: str) -> None:
    """Check that every row of a group belongs together, without a loop over rows.

    Raises:
        MismatchError: A prompt or response is empty, an id is outside the vocabulary, there is not exactly one weight and
            one reference log-prob per response token, or one of them is not finite. Names pair, side and place.
    """
    for name in _IDS:
        _check_ids(columns, name, vocab_size, where)
    for side, names in _FLOATS.items():
        for name in names:
            _check_floats(columns, side, name, where)


def _check_ids(columns: _Columns, name: str, vocab_size: int, where: str) -> None:
    column = columns.ragged[name]
    empty = np.flatnonzero(column.lengths == 0)
    if len(empty):
        raise MismatchError(f"pair {columns.pair_id(int(empty[0]))}: {name} is empty ({where}); {_REBUILD}")
    row = column.row_of_first((column.values < 0) | (column.values >= vocab_size))
    if row is not None:
        raise MismatchError(
            f"pair {columns.pair_id(row)}: {name} goes up to {column[row].max()}, the model's vocabulary has {vocab_size} "
            f"ids ({where}); train the model that the dataset was tokenised for"
        )


def _check_floats(columns: _Columns, side: str, name: str, where: str) -> None:
    lengths, expected = columns.ragged[name].lengths, columns.ragged[f"{side}_ids"].lengths
    unequal = np.flatnonzero(lengths != expected)
    if len(unequal):
        row = int(unequal[0])
        raise MismatchError(
            f"pair {columns.pair_id(row)}, {side}: {lengths[row]} {name} for {expected[row]} response tokens ({where}); "
            f"{_REBUILD}"
        )
    bad_row = columns.ragged[name].row_of_first(~np.isfinite(columns.ragged[name].values))
    if bad_row is not None:
        raise MismatchError(
            f"pair {columns.pair_id(bad_row)}, {side}: {name} holds NaN or infinity ({where}); {_REBUILD}"
        )


_REBUILD = "rebuild the dataset with `tokenweights build`"


class OrderedPairs(Dataset[Pair]):
    """The pairs of a dataset by position in the training order instead of by row; positions go on over epochs."""

    def __init__(self, pairs: PairDataset, order: BlockShuffle) -> None:
        self.pairs = pairs
        self.order = order

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Pair:
        return self.pairs[self.order.rows([position])[0]]


def sample_pairs(pairs: PairDataset, num_pairs: int) -> list[Pair]:
    """Return up to `num_pairs` pairs, always the same ones for the same dataset, from a few row groups."""
    order = BlockShuffle(pairs.group_sizes, seed=0)
    return [pairs[row] for row in sorted(order.rows(range(min(num_pairs, len(pairs)))))]


def check_weights_vary(source: WeightSource, sample: Iterable[Pair]) -> None:
    """Refuse token weights that are all the same: TIS-DPO would silently train something like plain DPO.

    Args:
        source: Its metadata may know already (`statistics.constant_weights`).
        sample: Looked at where it does not.

    Raises:
        MismatchError: The weights are constant.
    """
    constant = source.metadata.get("statistics", {}).get("constant_weights")
    if constant is None:
        constant = _is_constant([side.token_weights for pair in sample for side in (pair.chosen, pair.rejected)])
    if constant:
        raise MismatchError(
            f"loss.name='tis_dpo' needs token weights that differ, but all weights of {source.name} are equal; use "
            "loss.name='dpo' or a dataset with another estimator"
        )


def _is_constant(token_weights: Sequence[NDArray[np.float32]]) -> bool:
    values = np.concatenate(token_weights)
    return bool(values.min() == values.max())
