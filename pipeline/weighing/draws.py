"""Random numbers of tokens that depend on the token and a seed alone, not on the batch that it is weighed in."""

import numpy as np

from pipeline.weighing.transforms import positions
from weights_store.schemas import Side
from weights_store.tables.checksums import mix


def token_keys(pair_ids: list[str], side: Side, lengths: np.ndarray) -> np.ndarray:
    """Return one 64-bit key per token, flat `[N]` uint64: a hash of pair (32 hex digits), side and position."""
    pairs = np.array([int(pair_id[:16], 16) for pair_id in pair_ids], dtype=np.uint64)
    salt = np.uint64(1 if side == "chosen" else 2) << np.uint64(62)
    return mix(np.repeat(mix(pairs), lengths) + positions(lengths).astype(np.uint64) + salt)


def draw_uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each key, float32, which does not depend on the other keys."""
    mixed = mix(keys + mix(np.full(1, seed, dtype=np.uint64)))
    return ((mixed >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)
