"""How far a stage is: a bar on a terminal, plain lines elsewhere, and an artifact for every role in Prefect."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from pipeline.jobs import Progress
from pipeline.scoring import Stage

_ARTIFACT_EVERY_S = 2.0
_LINE_EVERY_S = 10.0


@contextmanager
def stage_progress(
    stage: Stage, roles: list[str], what: str, report: Callable[[str], None]
) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows the state of a role; at the end every role's artifact stands at 100 %.

    Args:
        stage: What is done.
        roles: That it is done for.
        what: The pairs, for the artifacts' descriptions.
        report: Gets plain lines where standard error is no terminal.
    """
    artifacts = {role: _Artifact(stage, role, what) for role in roles}
    with _bars() if sys.stderr.isatty() else _lines(report) as show:

        def shown(progress: Progress) -> None:
            show(progress)
            artifacts[progress.role].show(progress)

        yield shown
    for artifact in artifacts.values():
        artifact.finish()


class _Artifact:
    """One role's progress artifact; each update is a call of Prefect's API, so it comes every few seconds."""

    def __init__(self, stage: Stage, role: str, what: str) -> None:
        self._what = f"{stage} {role}, {what}"
        self._id: Any = create_progress_artifact(0.0, key=f"{stage}-{role}", description=self._what)
        self._text = "nothing to do"
        self._shown_at = 0.0

    def show(self, progress: Progress) -> None:
        self._text = str(progress)
        if time.monotonic() - self._shown_at >= _ARTIFACT_EVERY_S:
            self._shown_at = time.monotonic()
            self._update(progress.percent)

    def finish(self) -> None:
        self._update(100.0)

    def _update(self, percent: float) -> None:
        update_progress_artifact(self._id, progress=percent, description=f"{self._what}: {self._text}")


@contextmanager
def _lines(report: Callable[[str], None]) -> Iterator[Callable[[Progress], None]]:
    said_at: dict[str, float] = {}

    def show(progress: Progress) -> None:
        is_due = time.monotonic() - said_at.get(progress.role, -_LINE_EVERY_S) >= _LINE_EVERY_S
        if is_due or progress.done == progress.total:
            said_at[progress.role] = time.monotonic()
            report(str(progress))

    yield show


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(progress: Progress) -> None:
        if not progress.done:  # lines of the engine's start still come
            return
        if progress.role not in bars:
            bars[progress.role] = tqdm(
                total=progress.total,
                desc=progress.name,
                unit=" tokens",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        bar = bars[progress.role]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            bar.close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
