"""How anchors of TI-DPO's triplet loss are sampled, in builds (`[anchors]`) and in trainings that sample their own."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AnchorSampling:
    """Settings of the sampler, named as transformers names them; the defaults are those of TI-DPO's release."""

    max_new_tokens: int = 64
    """End-of-turn token included."""
    temperature: float = 0.8
    top_k: int = 50
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 0.95
    """Of these, sample from the most likely ones whose probabilities add up to this much."""


def closing_ids(lengths: np.ndarray, last_ids: np.ndarray) -> tuple[int, ...]:
    """Return the id that ends most responses, which a model's config need not name; nothing if no id ends more than half.

    The longest responses may have been cut by a build, so they do not count.

    Args:
        lengths: Tokens of each response, `[N]`.
        last_ids: Its last id, `[N]`.
    """
    known, counts = np.unique(last_ids[lengths < lengths.max(initial=0)], return_counts=True)
    return tuple(int(token_id) for token_id in known[2 * counts > counts.sum()])
