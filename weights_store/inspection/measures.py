"""The numbers that a token can be looked at by: names, words and units, the same in the page, the terminal and docs.

And the one scale of colours of the terminal and of figures; the page has its own for light and dark (`page/style.css`).
"""

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

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

BELOW, MIDDLE, ABOVE = (0x21, 0x66, 0xAC), (0xFF, 0xFF, 0xFF), (0xB3, 0x58, 0x06)
"""Ends and middle of the scale. Colour-blind people tell the ends apart (ColorBrewer's RdBu and PuOr)."""


def colour_at(position: float) -> Colour:
    """Return the colour of a position on the scale: -1 blue, 0 white, 1 orange."""
    end, share = (ABOVE if position > 0 else BELOW), abs(position)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(MIDDLE, end, strict=True))
    return red, green, blue


def is_light(colour: Colour) -> bool:
    """Return whether black text has more contrast on a colour than white text, by WCAG 2's relative luminance."""
    parts = (value / 255 for value in colour)
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return (luminance + 0.05) ** 2 > 1.05 * 0.05
