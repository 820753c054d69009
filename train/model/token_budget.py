"""Cut items into micro-batches by a token budget, for the trainer and for stages that run a model."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def cut_by_tokens(items: Sequence[Item], sizes: Sequence[int], tokens_per_batch: int) -> list[list[Item]]:
    """Return the items in batches of at most `tokens_per_batch` tokens, the longest first; a longer item gets its own batch.

    Items of similar length end up together, which keeps padding small. `sizes` are the tokens of each item.
    """
    longest_first = sorted(range(len(items)), key=lambda index: sizes[index], reverse=True)
    batches: list[list[Item]] = []
    left = 0
    for index in longest_first:
        if not batches or sizes[index] > left:
            batches.append([])
            left = tokens_per_batch
        batches[-1].append(items[index])
        left -= sizes[index]
    return batches
