"""Lays a plan out: as plain text for a terminal, or as rows for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import TextWrapper

from pipeline.dry_run.plan import StagePlan
from weights_store.messages import duration

_HEADER = ("stage", "action", "pairs", "tokens", "time")
_WRAP = TextWrapper(
    80, initial_indent="    ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
)


def plan_rows(plans: Sequence[StagePlan]) -> list[dict[str, object]]:
    """Return one row per stage with the fields of `StagePlan`, for JSON."""
    return [asdict(plan) for plan in plans]


def plan_lines(plans: Sequence[StagePlan]) -> list[str]:
    """Return the lines of a table for 80 columns: a line per stage, its reasons below it, the total at the end.

    Estimated numbers begin with "≈". The column for time is only there if the store has measured one.
    """
    is_timed = any(plan.wall_s is not None for plan in plans)
    header = _HEADER if is_timed else _HEADER[:-1]
    rows = [header, *(_cells(plan)[: len(header)] for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_aligned(header, widths)]
    for plan, row in zip(plans, rows[1:], strict=True):
        lines.append(_aligned(row, widths))
        for reason in (*plan.reasons, plan.memory):
            lines += _WRAP.wrap(reason)
    num_computed = sum(plan.action == "compute" for plan in plans)
    what = f"{num_computed} of {len(plans)} stages to compute" if num_computed else "nothing to compute"
    lines.append(f"total: {what}")
    if is_timed:
        lines.append("time: as measured in this store, without the start of the model")
    return lines


def _cells(plan: StagePlan) -> tuple[str, ...]:
    about = "" if plan.is_exact else "≈"
    has_counts = plan.num_pairs or plan.num_tokens
    counts = [f"{about}{count:,}" if has_counts else "" for count in (plan.num_pairs, plan.num_tokens)]
    time = "" if plan.wall_s is None else duration(plan.wall_s)
    return plan.stage, plan.action, *counts, f"≈{time}" if time[:1].isdigit() else time


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line: words to the left, numbers to the right."""
    columns = zip(cells, widths, _HEADER, strict=False)
    return "  ".join(c.ljust(width) if name in _HEADER[:2] else c.rjust(width) for c, width, name in columns).rstrip()
