"""Lay a plan out as plain text: one line per stage, what it is based on below it, totals at the end."""

from collections.abc import Sequence
from textwrap import wrap

from pipeline.dry_run.plan import StagePlan
from weights_store.messages import duration

_WIDTH = 110
_HEADER = ("stage", "action", "pairs", "tokens", "time", "rate", "adds")


def plan_lines(plans: Sequence[StagePlan]) -> list[str]:
    """Return the lines of a table at most 110 columns wide; estimated numbers begin with "≈"."""
    rows = [_HEADER, *(_cells(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_aligned(_HEADER, widths)]
    for plan, row in zip(plans, rows[1:], strict=True):
        lines.append(_aligned(row, widths))
        for reason in plan.reasons:
            lines += wrap(reason, _WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
    return [*lines, _totals(plans)]


def _cells(plan: StagePlan) -> tuple[str, ...]:
    if plan.action == "reuse":
        return plan.stage, plan.action, "", "", "", "", ""
    about = "" if plan.is_exact else "≈"
    has_counts = plan.num_pairs or plan.num_tokens
    counts = [f"{about}{count:,}" if has_counts else "" for count in (plan.num_pairs, plan.num_tokens)]
    time, size = _about(duration(plan.seconds)), _about(_size(plan.num_bytes))
    return plan.stage, plan.action, *counts, time, plan.rate_source or "", size


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line: words to the left, numbers to the right."""
    numbers = ("pairs", "tokens", "time", "adds")
    columns = zip(cells, widths, _HEADER, strict=True)
    return "  ".join(c.rjust(width) if name in numbers else c.ljust(width) for c, width, name in columns).rstrip()


def _totals(plans: Sequence[StagePlan]) -> str:
    num_computed = sum(plan.action == "compute" for plan in plans)
    if not num_computed:
        return "total: nothing to compute, 0 s, 0 B"
    seconds, num_bytes = sum(plan.seconds for plan in plans), sum(plan.num_bytes for plan in plans)
    what = f"{num_computed} of {len(plans)} stages to compute"
    return f"total: {what}, {_about(duration(seconds))}, {_about(_size(num_bytes))} more in the store"


def _about(text: str) -> str:
    return text if text.startswith("<") else f"≈{text}"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} B"
