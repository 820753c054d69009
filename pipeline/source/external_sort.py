"""Sorts tables that do not fit into memory: an external merge sort over Arrow files.

Tables are collected in memory. When they exceed the budget, they are sorted and written to a temporary file. Reading merges the
files one range of keys at a time, so that memory stays at about one budget.
"""

import bisect
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from pipeline.child import temporary_folder
from weights_store.messages import first_line
from weights_store.tables.key_ranges import KeyRange

DEFAULT_BYTES = 256 << 20
_SAMPLES_PER_RUN = 64
_ROWS_PER_BATCH = 1000


class ExternalSort:
    """Takes tables in any order and returns them sorted; a context manager that removes its files.

    Args:
        key: Sort columns; the first one cuts the ranges.
        max_bytes: Arrow bytes kept in memory, and about the size of one range; None for `DEFAULT_BYTES`.
    """

    def __init__(self, schema: pa.Schema, *key: str, max_bytes: int | None = None) -> None:
        self.schema = schema
        self.key = key
        self.max_bytes = max_bytes or DEFAULT_BYTES
        self.num_rows = 0
        self._waiting: list[pa.Table] = []
        self._num_waiting_bytes = 0
        self._num_bytes = 0
        self._runs: list[Path] = []
        self._samples: list[str | int] = []
        self._files = ExitStack()

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *_error: object) -> None:
        self._files.close()

    def add(self, rows: pa.Table) -> None:
        """Add rows.

        Raises:
            OSError: The temporary folder (TMPDIR) cannot be written, or is full.
        """
        if not rows.num_rows:
            return
        self._waiting.append(rows)
        self._num_bytes += rows.nbytes
        self._num_waiting_bytes += rows.nbytes
        self.num_rows += rows.num_rows
        if self._num_waiting_bytes > self.max_bytes:
            self._spill()

    def ranges(self, max_bytes: int | None = None) -> Iterator[tuple[KeyRange, pa.Table]]:
        """Yield all rows, sorted, cut into ranges that together cover all keys. Can be called again.

        A range has about `max_bytes` Arrow bytes; None for as many as are kept in memory.
        """
        if self._runs and self._waiting:
            self._spill()
        if self._runs:
            runs = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in self._runs]
            samples = sorted(self._samples)
        else:
            self._waiting = [self._sorted(self._waiting)]
            runs, samples = self._waiting, self._samples_of(self._waiting[0])
        num_ranges = max(1, -(-self._num_bytes // min(max_bytes or self.max_bytes, self.max_bytes)))
        cuts = (
            sorted({samples[len(samples) * index // num_ranges] for index in range(1, num_ranges)}) if samples else []
        )
        for piece in map(KeyRange, [None, *cuts], [*cuts, None]):
            slices = [_slice(run, self.key[0], piece) for run in runs]
            yield piece, slices[0] if len(slices) == 1 else self._sorted(slices)

    def _samples_of(self, run: pa.Table) -> list[str | int]:
        """Return some keys of sorted rows, at equal distances."""
        step = max(1, -(-run.num_rows // _SAMPLES_PER_RUN))
        keys: list[str | int] = run[self.key[0]].take(pa.array(range(0, run.num_rows, step), pa.int64())).to_pylist()
        return keys

    def _sorted(self, tables: list[pa.Table]) -> pa.Table:
        rows = pa.concat_tables([self.schema.empty_table(), *tables])
        return rows.sort_by([(name, "ascending") for name in self.key])

    def _spill(self) -> None:
        if not self._runs:
            self._folder = Path(self._files.enter_context(temporary_folder("sort-")))
        rows = self._sorted(self._waiting)
        path = self._folder / f"{len(self._runs)}.arrow"
        try:
            with pa.ipc.new_file(path, self.schema) as file:
                file.write_table(rows, max_chunksize=_ROWS_PER_BATCH)
        except OSError as error:
            place = self._folder.parent.parent  # TMPDIR: between them is the folder of this process
            raise OSError(
                f"cannot write temporary files to {place}, {shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there: "
                f"{first_line(error)}; make room, or set TMPDIR to a folder on a larger disk"
            ) from error
        self._samples += self._samples_of(rows)
        self._runs.append(path)
        self._waiting, self._num_waiting_bytes = [], 0


def _slice(run: pa.Table, key: str, piece: KeyRange) -> pa.Table:
    """Return the rows of a sorted table in a range of keys, by bisection, so that few pages are read."""
    column, all_rows = run[key], range(run.num_rows)
    start = 0 if piece.low is None else bisect.bisect_left(all_rows, piece.low, key=lambda row: column[row].as_py())
    stop = len(all_rows)
    if piece.high is not None:
        stop = bisect.bisect_left(all_rows, piece.high, key=lambda row: column[row].as_py())
    return run.slice(start, stop - start)
