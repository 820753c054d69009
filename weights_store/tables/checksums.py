"""Checksums of content: one 64-bit sum per column, independent of the order of rows and of their distribution over files.

A row adds a hash of (key, position, value) for every value of a column, and the sums wrap around. So the checksum of a shard is
the sum over its row groups, that of a table the sum over its shards, and compaction changes neither. Checksums find damaged
values, and missing, doubled or exchanged rows. They are no defence against an adversary.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_WRAP = (1 << 64) - 1
_BLOCK = 1 << 15
"""Values that are mixed at a time: few enough that all that is made of them on the way stays in the processor's cache."""
_NULL, _LENGTH = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F  # salts, so that null, empty and 0 differ


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of SplitMix64 of each value (Steele, Lea, Flood 2014), wrapping around in uint64."""
    z = values + np.uint64(_GOLDEN)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def column_checksums(rows: pa.Table, key: Sequence[str]) -> dict[str, int]:
    """Return the checksum of every column of `rows`: strings, integers, floats, or lists of 32-bit numbers."""
    columns = [rows[name].to_pylist() for name in key]
    texts = columns[0] if len(columns) == 1 else ["\0".join(map(str, values)) for values in zip(*columns, strict=True)]
    keys = _hash_texts([str(text) for text in texts])
    checksums = {name: _checksum(rows[name], keys) for name in rows.column_names if [name] != list(key)}
    # A one-column key is already the hash of its text.
    return {name: checksums.get(name, _total(mix(keys + keys))) for name in rows.column_names}


def sum_checksums(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the checksums of the rows of all parts."""
    total: dict[str, int] = {}
    for part in parts:
        total |= {name: (total.get(name, 0) + checksum) & _WRAP for name, checksum in part.items()}
    return total


def _hash_texts(texts: Sequence[str | None]) -> NDArray[np.uint64]:
    digests = (
        (_NULL).to_bytes(8, "little") if text is None else hashlib.blake2b(text.encode(), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _checksum(column: pa.ChunkedArray, keys: NDArray[np.uint64]) -> int:
    total, start = 0, 0
    for chunk in column.chunks:
        total += _sum(chunk, keys[start : start + len(chunk)])
        start += len(chunk)
    return total & _WRAP


def _sum(chunk: pa.Array, keys: NDArray[np.uint64]) -> int:
    if pa.types.is_list(chunk.type):
        return _list_sum(chunk, keys)
    if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
        encoded = chunk.dictionary_encode(null_encoding="encode")  # `split` is the same text in most rows
        bits = _hash_texts(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
    else:
        bits = _bits(chunk.fill_null(0).to_numpy(zero_copy_only=False)).astype(np.uint64)
        bits = np.where(np.asarray(chunk.is_null()), np.uint64(_NULL), mix(bits))
    return _total(mix(keys + bits))


def _list_sum(chunk: pa.ListArray, keys: NDArray[np.uint64]) -> int:
    """Sum over all values of a ragged column, without a loop over rows.

    The state of a value is key + GOLDEN * position, wrapping around, plus its bits: one repeat over rows and one ramp.
    """
    offsets = np.asarray(chunk.offsets).astype(np.int64)
    lengths = np.diff(offsets)
    is_null = np.asarray(chunk.is_null())
    sizes = np.where(is_null, np.uint64(_NULL), lengths.astype(np.uint64))
    total = _total(mix(mix(keys ^ np.uint64(_LENGTH)) + sizes))
    lengths = np.where(is_null, 0, lengths)
    values = chunk.flatten().to_numpy(zero_copy_only=False)  # without what may stand behind a null
    starts = np.cumsum(lengths) - lengths
    salts = mix(keys) - starts.astype(np.uint64) * np.uint64(_GOLDEN)
    cuts = np.searchsorted(starts, np.arange(0, len(values), _BLOCK)).tolist()
    for low, high in pairwise([*cuts, len(lengths)]):
        if low == high:
            continue
        start = int(starts[low])
        state = np.repeat(salts[low:high], lengths[low:high])
        state += np.arange(start, start + len(state), dtype=np.uint64) * np.uint64(_GOLDEN)
        state += _bits(values[start : start + len(state)])
        total += _total(mix(state))
    return total


def _bits(values: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    return values.view(f"u{values.dtype.itemsize}")


def _total(values: NDArray[np.uint64]) -> int:
    return int(values.sum(dtype=np.uint64))
