"""What a stage logs, in Prefect: lines in the run's log, and one progress artifact for each work."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging.handlers import APILogHandler

from flows.repeating import may_pass
from weights_store.messages import (
    LINE_EVERY_S,
    ProgressEvery,
    first_line,
    handled_by,
    logger,
    progress_of,
    show_on_terminal,
)

_log = logger(__name__)

_ARTIFACT_EVERY_S, _AFTER_FAILURE_S = 2.0, 60.0


@contextmanager
def run_logs() -> Iterator[None]:
    """Send what is logged while inside to the log of the current run, and print it if nothing prints it yet.

    Of progress the run gets one line every ten seconds.
    """
    handler = APILogHandler()
    handler.addFilter(ProgressEvery(LINE_EVERY_S))
    with show_on_terminal(), handled_by(handler):
        yield


@contextmanager
def progress_artifacts(works: Sequence[str], pairs: str) -> Iterator[None]:
    """Show the progress that is logged while inside as one artifact for each work; at the end each of them is at 100 %.

    Args:
        works: Names of the progress, such as `score ref`; the artifact's key is then `score-ref`.
        pairs: The table of pairs, for the descriptions.
    """
    artifacts = [_Artifact(work, pairs) for work in works]
    with ExitStack() as handlers:
        for artifact in artifacts:
            handlers.enter_context(handled_by(artifact))
        yield
    for artifact in artifacts:
        artifact.update(100.0)


class _Artifact(logging.Handler):
    """The progress artifact of one work. Each update calls Prefect's API, so there is one every two seconds.

    A stage goes on without it where the API fails: what the artifact shows is in the log too.
    """

    def __init__(self, work: str, pairs: str) -> None:
        super().__init__()
        self._work = work
        self._what = f"{work}, {pairs}"
        self._key = work.replace(" ", "-")
        self._id: UUID | None = None
        self._text = "nothing to do"
        self._next_at = 0.0
        self.update(0.0)
        if self._id is not None:
            self._next_at = 0.0  # what is done already is shown at once

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        if progress is None or progress.name != self._work:
            return
        self._text = str(progress)
        if time.monotonic() >= self._next_at:
            self.update(progress.percent)

    def update(self, percent: float) -> None:
        """Show so much, now."""
        try:
            self._send(percent)
            wait_s = _ARTIFACT_EVERY_S
        except Exception as error:
            if not may_pass(error):
                raise
            _log.info(f"Prefect cannot show the progress of {self._what}: {first_line(error)}")
            wait_s = _AFTER_FAILURE_S
        self._next_at = time.monotonic() + wait_s

    def _send(self, percent: float) -> None:
        if self._id is not None:
            update_progress_artifact(self._id, progress=percent, description=f"{self._what}: {self._text}")
            return
        created = create_progress_artifact(percent, key=self._key, description=self._what)
        assert isinstance(created, UUID), "called from a task, which is not a coroutine"
        self._id = created
