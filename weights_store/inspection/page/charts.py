"""The charts above the pairs, as inline SVG: without style attributes, which the page's policy forbids, so it has classes."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from weights_store.inspection.survey import SideSurvey, Survey
from weights_store.printing import share_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 380, 170, 40, 26, 8
_TEXT_HEIGHT = 14
_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)


def histogram(survey: Survey) -> Markup:
    """Draw the share of the tokens of each side by weight, on a log scale."""
    sides = survey.sides()
    edges = np.asarray(survey.chosen.edges, np.float64)
    used = np.flatnonzero(np.asarray(survey.chosen.counts) + np.asarray(survey.rejected.counts))
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, len(edges) - 1)
    # The first and the last bin reach to 0 and to infinity: they are drawn as wide as their neighbours.
    logs = np.log2(np.clip(edges, 2.0**-12, 2.0**12))
    low, high = min(float(logs[first]), -1.0), max(float(logs[last]), 1.0)
    if np.isinf(edges[last]) or edges[first] == 0:
        inner = [position for position in range(first, last + 1) if 0 < edges[position] < np.inf]
        width = float(np.diff(logs[inner]).mean()) if len(inner) > 1 else 0.25
        if edges[first] == 0 and inner:
            logs[first] = logs[inner[0]] - width
        if np.isinf(edges[last]) and inner:
            logs[last] = logs[inner[-1]] + width
        low, high = min(float(logs[first]), -1.0), max(float(logs[last]), 1.0)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 8)

    shares = {name: np.asarray(side.counts) / max(side.num_tokens, 1) for name, side in sides.items()}
    top = max((float(share.max(initial=0)) for share in shares.values()), default=0.0) or 1.0
    parts = []
    for name, share in shares.items():
        points = [f"{x(float(logs[first])):.1f},{_y(0, top):.1f}"]
        for index in range(first, last):
            for edge in (index, index + 1):
                points.append(f"{x(float(logs[edge])):.1f},{_y(float(share[index]), top):.1f}")
        points.append(f"{x(float(logs[last])):.1f},{_y(0, top):.1f}")
        parts.append(f'<polygon class="{name}" points="{" ".join(points)}"/>')
    ticks = [(x(float(np.log2(tick))), f"{tick:g}") for tick in _TICKS if low <= np.log2(tick) <= high]
    ticks = [(at, _fraction(text)) for at, text in ticks]
    label = "Share of the tokens by weight: " + "; ".join(
        f"{name} mean {side.mean_weight:.2f}" for name, side in sides.items()
    )
    return _chart(label, parts, ticks, [(_y(top, top), f"{100 * top:.0f} %")], x(0.0))


def by_position(survey: Survey) -> Markup:
    """Draw the mean weight of each side by relative position in the response."""
    values = {name: np.asarray(side.weight_by_position, np.float64) for name, side in survey.sides().items()}
    top = max(1.0, *(float(np.nanmax(each)) for each in values.values() if not np.isnan(each).all())) * 1.05
    parts = [f'<line class="one" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{_y(1, top):.1f}" y2="{_y(1, top):.1f}"/>']
    for name, each in values.items():
        for run in _runs(each):
            points = " ".join(f"{_x_of(index, len(each)):.1f},{_y(float(each[index]), top):.1f}" for index in run)
            parts.append(f'<polyline class="{name}" points="{points}"/>')
    label = "Mean weight by position in the response, from its first to its last token"
    ends = [(_x_of(0, 20), "first"), (_x_of(19, 20), "last")]
    ticks = [(_y(1, top), "1"), (_y(top, top), f"{top:.1f}")]
    is_tight = ticks[0][0] - ticks[1][0] < _TEXT_HEIGHT
    return _chart(label, parts, ends, ticks[:1] if is_tight else ticks, None)


def side_numbers(side: SideSurvey) -> dict[str, str]:
    """Return what is said of a side in numbers, by label."""
    rows = {"mean weight": f"{side.mean_weight:.3f}", "effective share": share_text(side.effective_share)}
    ends = {"at the lower end": side.share_at_lower, "at the upper end": side.share_at_upper}
    return rows | {label: share_text(share) for label, share in ends.items() if share is not None}


def _y(value: float, top: float) -> float:
    return _TOP + (1 - value / top) * (_HEIGHT - _TOP - _BOTTOM)


def _x_of(index: int, number: int) -> float:
    return _LEFT + 8 + index / (number - 1) * (_WIDTH - _LEFT - 32)


def _runs(values: np.ndarray) -> list[list[int]]:
    """Return the indices of values that are numbers, as runs without a gap."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if np.isnan(value):
            runs.append([])
        else:
            runs[-1].append(index)
    return [run for run in runs if run]


def _fraction(text: str) -> str:
    return {"0.0625": "1/16", "0.125": "1/8", "0.25": "1/4", "0.5": "1/2"}.get(text, text)


def _chart(
    label: str,
    parts: Sequence[str],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_one: float | None,
) -> Markup:
    base = _HEIGHT - _BOTTOM
    lines = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{base}" y2="{base}"/>']
    if x_one is not None:
        lines.append(f'<line class="one" x1="{x_one:.1f}" x2="{x_one:.1f}" y1="{_TOP}" y2="{base}"/>')
    lines += [f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{text}</text>' for x, text in x_ticks]
    lines += [f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>' for y, text in y_ticks]
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return Markup(f'<svg {box} role="img" aria-label="{label}">{"".join(lines + list(parts))}</svg>')
