"""How large the rows of a batch are, and batches small enough to become Python objects.

Arrow's own `nbytes` counts the whole dictionary, and all texts of a view, for each of its rows.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.source.rows import MAX_ROW_BYTES, ROWS_PER_BATCH


def num_bytes(array: pa.Array | pa.ChunkedArray) -> int:
    """Return about how many bytes the values of an array have, each counted where it stands."""
    if isinstance(array, pa.ChunkedArray):
        return sum(map(num_bytes, array.chunks))
    kind = array.type
    if isinstance(kind, pa.ExtensionType | pa.BaseExtensionType):
        return num_bytes(array.storage)
    if isinstance(kind, pa.DictionaryType):
        if not _is_text(kind.value_type):
            return int(array.indices.nbytes)
        return int(pc.sum(pc.take(_lengths(array.dictionary), array.indices)).as_py() or 0) + int(array.indices.nbytes)
    if _is_text(kind):
        return int(pc.sum(_lengths(array)).as_py() or 0) + 8 * len(array)
    if pa.types.is_map(kind) or pa.types.is_nested(kind):
        inner = [num_bytes(child) for child in _children(array)]
        return sum(inner) + 8 * len(array)
    return int(array.nbytes)


def small_pieces(batch: pa.RecordBatch | pa.Table) -> Iterator[pa.RecordBatch | pa.Table]:
    """Yield a batch in pieces of at most 1,000 rows and of `MAX_ROW_BYTES`; a larger row is a piece of its own."""
    starts = range(0, batch.num_rows, ROWS_PER_BATCH)
    # Cut at the end by hand: a slice of a table without columns has as many rows as are asked for.
    waiting = [batch.slice(start, min(ROWS_PER_BATCH, batch.num_rows - start)) for start in starts][::-1]
    while waiting:
        piece = waiting.pop()
        if piece.num_rows == 1 or size_of(piece) <= MAX_ROW_BYTES:
            yield piece
        else:
            half = piece.num_rows // 2
            waiting += [piece.slice(half), piece.slice(0, half)]


def size_of(batch: pa.RecordBatch | pa.Table) -> int:
    """Return about how many bytes the values of a batch have."""
    return sum(num_bytes(column) for column in batch.columns)


def _children(array: pa.Array) -> list[pa.Array]:
    """Return the arrays inside of a nested one, of its rows alone."""
    kind = array.type
    if pa.types.is_struct(kind) or pa.types.is_union(kind):
        return [array.field(at) for at in range(kind.num_fields)] if pa.types.is_union(kind) else list(array.flatten())
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return [array.keys.slice(first, last - first), array.items.slice(first, last - first)]
    return [array.flatten()]


def _is_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
    )


def _lengths(texts: pa.Array) -> pa.Array:
    """Return the bytes of each text."""
    if pa.types.is_string_view(texts.type):
        texts = texts.cast(pa.large_string())
    elif pa.types.is_binary_view(texts.type):
        texts = texts.cast(pa.large_binary())
    return pc.cast(pc.binary_length(texts), pa.int64())
