"""Run the build flow from a terminal: quiet errors, a summary at the end."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flows.build import BuildResult, build_weights
from pipeline.child import stop_children
from pipeline.preflight import check_inputs
from pipeline.recipe import Recipe
from pipeline.stages.report import findings, summary_rows
from weights_store.errors import TokenweightsError


def run_build(recipe: Recipe, expect_same: bool = False, debug: bool = False) -> BuildResult:
    """Run `build_weights` and print what it made.

    Raises:
        TokenweightsError: A stage failed; Prefect prints no traceback of it unless `debug`.
    """
    check_inputs(recipe)
    if not debug:
        hide_expected_tracebacks()
    with _leaving_at_once_on_interrupt():
        result = build_weights(recipe, expect_same)
    print()
    for label, value in summary_rows(result.published):
        print(f"  {label:<18}{value}")
    for finding in findings(result.published.statistics):
        print(f"  warning           {finding}")
    for change in result.published.changes if result.published.is_new else []:
        print(f"  changed           {change}")
    for what, filled in result.filled().items():
        if filled.num_pairs or filled.num_unscorable:
            unscorable = f", {filled.num_unscorable} unscorable" if filled.num_unscorable else ""
            rate = filled.num_tokens / max(filled.wall_s, 1e-9)
            numbers = f"{filled.num_pairs} pairs{unscorable}, {filled.num_tokens:,} tokens, {rate:,.0f} tokens/s"
            print(f"  {what:<18}{numbers} without the model's start")
        for restart in filled.restarts:
            print(f"  warning           {what} was started again: {restart}")
    print(f"  {'stages':<18}" + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.stage_s.items()))
    print(f"  {'':<18}{'published' if result.published.is_new else 'nothing to do: this version was there already'}")
    print(f"  {'store':<18}{recipe.store.uri}")
    print(f"  {'report':<18}{result.report}")
    return result


@contextmanager
def _leaving_at_once_on_interrupt() -> Iterator[None]:
    """Make Ctrl-C end our children and then us, without Prefect.

    Ctrl-C ends Prefect's embedded server with us, and its client would call the dead server for minutes. A server of its own
    (`PREFECT_API_URL`) lives on and is told of the crash in the usual way.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return

    def leave(_signum: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted; what was committed stays, run again to go on", file=sys.stderr, flush=True)
        stop_children()
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def hide_expected_tracebacks() -> None:
    """Keep Prefect from logging errors raised on purpose: the command prints them itself, as one line."""

    def is_unexpected(record: logging.LogRecord) -> bool:
        return not (isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], TokenweightsError | OSError))

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(is_unexpected)
