"""How anchors of TI-DPO's triplet loss are sampled: what builds (`[anchors]`) and trainings that sample their own share."""

from dataclasses import dataclass


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
