"""Real pairs for `real_pairs.py`: read and tokenised as a build does it, and split by prompt."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.quality.worlds import Row
from pipeline.recipe import Recipe
from pipeline.stages.prepare import prepare
from weights_store import WeightStore
from weights_store.settings import parse_settings

NUM_PAIRS, MAX_PER_PROMPT, MAX_TOKENS = 256, 4, 128
"""Pairs to train on, and as many held-out ones; of a prompt at most so many; their sequences have at most so many tokens."""


class Split(NamedTuple):
    """Pairs of one seed. All pairs of a prompt are on one side."""

    train: list[Row]
    held_out: list[Row]
    other: list[Row]
    """All pairs of all other prompts, however long."""


def read_pairs(model: Path, source: Path, store: Path) -> list[Row]:
    """Return the pairs of a file as a build tokenises them for a model."""
    settings = {
        "dataset": {"name": source.stem.replace("_", "-"), "source": str(source)},
        "model": {"path": str(model)},
        "weights": {"name": "real-pairs/head"},
        "store": {"uri": str(store)},
    }
    tokens = prepare(parse_settings(Recipe, settings, "real_pairs"), model).tokens
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    frame = WeightStore(tokens.store).table(tokens.table).scan(tokens.version).sort("pair_id").select(names).collect()
    return [tuple(np.array(ids, np.int32) for ids in row) for row in frame.iter_rows()]  # type: ignore[misc]


def split_by_prompt(
    rows: Sequence[Row],
    seed: int,
    *,
    num_pairs: int = NUM_PAIRS,
    max_per_prompt: int = MAX_PER_PROMPT,
    max_tokens: int = MAX_TOKENS,
) -> Split:
    """Return `num_pairs` short pairs to train on, as many held-out ones, and all pairs of all other prompts.

    Pairs that share a prompt with the first two and are too long or too many are on no side.

    Raises:
        ValueError: There are too few short pairs.
    """
    of_prompts: dict[bytes, list[Row]] = {}
    for row in rows:
        of_prompts.setdefault(row[0].tobytes(), []).append(row)
    prompts, sides, other = list(of_prompts), (list[Row](), list[Row]()), list[Row]()
    for i in np.random.default_rng(seed).permutation(len(prompts)):
        of_prompt = of_prompts[prompts[i]]
        short = [row for row in of_prompt if len(row[0]) + max(map(len, row[1:])) <= max_tokens][:max_per_prompt]
        side = next((side for side in sides if len(side) < num_pairs), None)
        if short and side is not None:
            side += short[: num_pairs - len(side)]
        else:
            other += of_prompt
    if len(sides[1]) < num_pairs:
        raise ValueError(f"{2 * num_pairs} pairs of at most {max_tokens} tokens are needed, got {sum(map(len, sides))}")
    return Split(*sides, other)


def groups_of(rows: Sequence[Row]) -> np.ndarray:
    """Return a hash of the prompt of each pair, `[n]` uint64."""
    digests = [blake2b(row[0].tobytes(), digest_size=8).digest() for row in rows]
    return np.array([int.from_bytes(digest) for digest in digests], np.uint64)
