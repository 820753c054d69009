"""How anchors of TI-DPO's triplet loss are sampled: what builds (`[anchors]`) and trainings that sample their own share."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AnchorSampling:
    """Settings of the sampler; the defaults are those of TI-DPO's release."""

    max_new_tokens: int = 64
    """End-of-turn token included."""
    temperature: float = 0.8
    top_k: int = 50
    """Sample among this many likeliest tokens; 0: all."""
    top_p: float = 0.95
    """And among the likeliest with this much probability together."""


def closing_ids(lengths: np.ndarray, last_ids: np.ndarray) -> tuple[int, ...]:
    """Return the id that ends a turn in these chats, which a model's configs need not name; none where responses end variously.

    A response that a build cut to a maximum ends anywhere; none is longer, so only shorter ones count.

    Args:
        lengths: Tokens of each response, `[N]`.
        last_ids: The last id of each, `[N]`.
    """
    known, counts = np.unique(last_ids[lengths < lengths.max(initial=0)], return_counts=True)
    return tuple(int(token_id) for token_id in known[2 * counts > counts.sum()])
