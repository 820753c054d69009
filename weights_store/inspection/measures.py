"""The numbers that a token can be looked at by: names, words and units, the same in the page, the terminal and docs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number per response token."""

    name: str
    label: str
    unit: str
    centre: float | None
    """The value that is neither high nor low; None if the measure has no such value."""
    meaning: str


MEASURES = {
    each.name: each
    for each in (
        Measure("weight", "weight", "", 1.0, "what the loss multiplies this token's log-ratio by"),
        Measure(
            "logratio", "log-ratio", "nats", 0.0, "log π+ − log π−: above 0, the positive model likes the token more"
        ),
        Measure("logp_pos", "log π+", "nats", None, "log-probability of the token under the positive model"),
        Measure("logp_neg", "log π−", "nats", None, "log-probability of the token under the negative model"),
        Measure("ref_logp", "log ref", "nats", None, "log-probability of the token under the reference"),
        Measure("surprise", "surprise", "nats", None, "−log ref: how little the reference expected the token"),
        Measure("attribution", "attribution", "", None, "L1 norm of the target's gradient at the token's embedding"),
    )
}
"""By name. A dataset has those that its estimator used; every one has `weight`, `ref_logp` and `surprise`."""
