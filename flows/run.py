"""Run the build flow from a terminal: one line for an error, a summary at the end."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from flows.api import check_server, server_of_run
from flows.lineage_events import check_client
from pipeline.child import leave
from pipeline.preflight import check_inputs
from pipeline.recipe import Recipe
from pipeline.stages.report import summary_rows
from weights_store.errors import TokenweightsError
from weights_store.processes.guard import guard

if TYPE_CHECKING:
    from flows.build import BuildResult

_EXPECTED = (TokenweightsError, OSError, ModuleNotFoundError)
"""Errors that the command prints as one line."""


def run_build(recipe: Recipe, expect_same: bool = False, debug: bool = False) -> "BuildResult":
    """Run `build_weights` and print what it made.

    Raises:
        StageError: The Prefect server that is to be used does not answer, or the build's own does not start.
        TokenweightsError: A stage failed. Prefect prints the traceback only with `debug`.
    """
    check_inputs(recipe)
    check_server()
    check_client()
    if not debug:
        _hide_expected_tracebacks()
    guard().mark_environment()  # what the build starts ends with it
    with (
        server_of_run(partial(import_module, "flows.build")) as is_own,  # both take seconds
        _leave_at_once_on_interrupt() if is_own else nullcontext(),
    ):
        from flows.build import build_weights

        result = build_weights(recipe, expect_same)
    print()
    for label, value in _summary(result, recipe.store.uri):
        print(f"  {label:<17} {value}")
    return result


def _summary(result: "BuildResult", store: str) -> Iterator[tuple[str, object]]:
    published = result.published
    yield from summary_rows(published)
    yield from ((found.severity, f"{found.name}: {found}") for found in result.diagnoses)
    if published.is_new:
        yield from (("changed", change) for change in published.changes)
    for what, filled in result.filled().items():
        if filled.num_pairs or filled.num_unscorable:
            unscorable = f", {filled.num_unscorable} unscorable" if filled.num_unscorable else ""
            rate = filled.num_tokens / max(filled.wall_s, 1e-9)
            numbers = f"{filled.num_pairs} pairs{unscorable}, {filled.num_tokens:,} tokens, {rate:,.0f} tokens/s"
            yield what, f"{numbers} without the model's start"
        yield from (("warning", f"{what} was started again: {restart}") for restart in filled.restarts)
    yield "stages", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.stage_s.items())
    yield "", "published" if published.is_new else "nothing to do: this version exists already"
    yield "store", store
    yield "report", result.report


@contextmanager
def _leave_at_once_on_interrupt() -> Iterator[None]:
    """On Ctrl-C and SIGTERM end our children and this process, without Prefect.

    Prefect would report to the server, and wait for tasks that wait for children. A server that runs elsewhere keeps a
    record of the run, so there Prefect reports the crash as usual.
    """

    def leave_at_once(_signum: int, _frame: object) -> None:
        for signum in handled:
            signal.signal(signum, signal.SIG_IGN)
        leave(130, "interrupted; what was committed stays, run again to go on", was_told=True)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, leave_at_once) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _hide_expected_tracebacks() -> None:
    """Stop Prefect from logging the traceback of errors that the command prints itself as one line."""

    def is_unexpected(record: logging.LogRecord) -> bool:
        return not (isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], _EXPECTED))

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(is_unexpected)
