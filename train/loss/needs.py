"""What a loss needs of the dataset and of the models. `config.py` reads it, so no torch here."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["pair", "chosen token", "response"]
KlDirection = Literal["policy_ref", "ref_policy"]
"""KL(pi‖ref) or KL(ref‖pi); the expectation is over the first."""


@dataclass(frozen=True)
class Needs:
    """What a loss needs besides the ids and the policy."""

    ref_logps: bool = False
    """From the dataset: reference log-probs of the response tokens."""
    token_weights: bool = False
    """From the dataset: token weights of the response tokens."""
    fresh_weights: bool = False
    """From the policy, in place of the stored ones: token weights."""
    anchors: bool = False
    """An anchor in every pair of a batch: from the dataset, unless they are fresh."""
    fresh_anchors: bool = False
    """From the policy, in place of the stored ones: anchors."""
    mismatched: bool = False
    """The anchors are responses to other prompts, from which the z0 of a step is computed before its loss."""
    ref_top: bool = False
    """From the dataset: the reference's top-k ids and log-probs per response token."""
    scores: bool = False
    """From the dataset: annotator scores of both responses."""
    rejected: bool = True
    """The rejected responses."""
    kl_direction: KlDirection | None = None
    """Which per-token KL; None for none."""
    reference_model: bool = False
    """The reference's own forward pass: for the exact KL, and for log-probs of fresh anchors."""
    refresh_steps: int | None = None
    """Steps between two refreshes of what comes from the policy; None if nothing does."""
