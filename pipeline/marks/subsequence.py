"""Which tokens two responses have in common, by a longest common subsequence. Called by `weighing/weigh.py`."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def differing(
    chosen_ids: np.ndarray, chosen_lengths: np.ndarray, rejected_ids: np.ndarray, rejected_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens of each side are not in a longest common subsequence of the pair, flat `[N]` bool each.

    Ids are flat over the responses; lengths are `[B]`. Of several longest ones, one is taken that has the beginning and the end
    that both responses share.
    """
    sides = (chosen_ids, rejected_ids)
    differ = (np.ones(len(chosen_ids), dtype=bool), np.ones(len(rejected_ids), dtype=bool))
    ends = [pairwise([0, *np.cumsum(lengths).tolist()]) for lengths in (chosen_lengths, rejected_lengths)]
    for spans in zip(*ends, strict=True):
        a, b = (ids[low:high] for ids, (low, high) in zip(sides, spans, strict=True))
        for mask, (low, _), places in zip(differ, spans, common_places(a, b), strict=True):
            mask[low + places] = False
    return differ


def common_places(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places in `a` `[n]` and in `b` `[m]` of a longest common subsequence, both `[length]` and rising."""
    start = _num_equal(a, b)
    end = _num_equal(a[start:][::-1], b[start:][::-1])
    inner = _matches(a[start : len(a) - end].tolist(), b[start : len(b) - end].tolist())
    found = np.array(inner, dtype=np.int64).reshape(-1, 2).T + start
    return tuple(  # type: ignore[return-value]
        np.concatenate([np.arange(start), middle, np.arange(len(ids) - end, len(ids))])
        for ids, middle in zip((a, b), found, strict=True)
    )


def _num_equal(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many ids both begin with."""
    size = min(len(a), len(b))
    unequal = np.flatnonzero(a[:size] != b[:size])
    return int(unequal[0]) if unequal.size else size


def _matches(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of a longest common subsequence as pairs, in order.

    The table of the textbook's dynamic programme, one row for each token of `b`, as integers of n bits: bit i is set if the
    length rises from `a[:i]` to `a[:i + 1]`. A row follows from the one above by an addition (Hyyrö, "Bit-parallel LCS-length
    computation revisited", AWOCA 2004), so that 1,000 by 1,000 tokens take 1,000 steps.
    """
    places: dict[int, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    whole = (1 << len(a)) - 1
    stays, rises = whole, [0]
    for token in b:
        here = stays & places.get(token, 0)
        stays = ((stays + here) | (stays - here)) & whole
        rises.append(whole ^ stays)
    found = []
    end = len(a)
    for row in range(
        len(b), 0, -1
    ):  # from the end of both: where the length rises in this row and not above, both agree
        end = (rises[row] & ((1 << end) - 1)).bit_length()
        if end and not rises[row - 1] >> (end - 1) & 1:
            end -= 1
            found.append((end, row - 1))
    return found[::-1]
