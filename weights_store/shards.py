"""Write one Parquet shard in the layout of the store.

Float lists: mantissa rounded to 12 bits, BYTE_STREAM_SPLIT, zstd, never a dictionary (pyarrow's default is the worst
choice for floats). Ids: int32 with BYTE_STREAM_SPLIT. Row groups of about a MiB of tokens, so that a trainer can seek.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MANTISSA_BITS = 12
"""Explicit mantissa bits kept of float32's 23: relative error at most 2**-13 = 1.2e-4."""

ROW_GROUP_BYTES = 1 << 20
"""Uncompressed Arrow bytes of one row group."""


def round_mantissa(values: np.ndarray, bits: int = MANTISSA_BITS) -> np.ndarray:
    """Round float32 `values` to `bits` explicit mantissa bits, ties to even. Signs, zeros, infinities and NaN stay.

    Raises:
        ValueError: `bits` is not in 1..23.
    """
    if not 1 <= bits <= 23:
        raise ValueError(f"mantissa bits must be in 1..23, got {bits}")
    drop = 23 - bits
    if drop == 0:
        return values.astype(np.float32)
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (raw >> drop) & np.uint32(1)
    rounded = (raw + (np.uint32((1 << (drop - 1)) - 1) + odd)) & np.uint32(~((1 << drop) - 1) & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float32)


def _round_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = []
    for chunk in column.chunks:
        if chunk.null_count == len(chunk):
            chunks.append(chunk)
            continue
        values = round_mantissa(chunk.values.to_numpy(zero_copy_only=False))
        mask = chunk.is_null() if chunk.null_count else None
        chunks.append(
            pa.ListArray.from_arrays(chunk.offsets, pa.array(values, pa.float32()), type=chunk.type, mask=mask)
        )
    return pa.chunked_array(chunks, column.type)


def _is_float_list(field: pa.Field) -> bool:
    return pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)


def write_shard(table: pa.Table, path: Path) -> int:
    """Write `table` to `path` and return the file's size in bytes. The file is complete on return.

    Raises:
        OSError: The folder cannot be written or the disk is full; nothing is left behind.
    """
    for index, field in enumerate(table.schema):
        if _is_float_list(field):
            table = table.set_column(index, field, _round_column(table.column(index)))
    try:
        pq.write_table(table, path, row_group_size=_rows_per_group(table), **_layout(table.schema))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path.stat().st_size


def _rows_per_group(table: pa.Table) -> int:
    return max(1, int(table.num_rows * ROW_GROUP_BYTES / max(table.nbytes, 1)))


def _layout(schema: pa.Schema) -> dict[str, object]:
    lists = [f.name for f in schema if pa.types.is_list(f.type)]
    encodings = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists}
    dictionary = [f.name for f in schema if f.name in ("split", "reason")]
    return {
        "compression": "zstd",
        "column_encoding": encodings,
        "use_dictionary": dictionary,
        "write_statistics": ["pair_id", "source_row"],
    }
