"""Progress of a stage as Prefect artifacts: one for every role, updated while the stage runs."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from pipeline.workers.request import Stage
from weights_store.messages import ROOT, Progress, progress_of

_ARTIFACT_EVERY_S = 2.0


@contextmanager
def stage_progress(stage: Stage, roles: list[str], what: str) -> Iterator[None]:
    """Show the progress that is logged while inside; at the end every role's artifact stands at 100 %.

    Args:
        stage: What is done.
        roles: That it is done for.
        what: The pairs, for the artifacts' descriptions.
    """
    artifacts = {f"{stage} {role}": _Artifact(stage, role, what) for role in roles}
    handler = _ArtifactHandler(artifacts)
    logging.getLogger(ROOT).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(ROOT).removeHandler(handler)
    for artifact in artifacts.values():
        artifact.finish()


class _ArtifactHandler(logging.Handler):
    """Hands progress to the artifact of its role."""

    def __init__(self, artifacts: dict[str, "_Artifact"]) -> None:
        super().__init__()
        self._artifacts = artifacts

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        if progress is not None and progress.name in self._artifacts:
            self._artifacts[progress.name].show(progress)


class _Artifact:
    """One role's progress artifact; each update is a call of Prefect's API, so it comes every few seconds."""

    def __init__(self, stage: Stage, role: str, what: str) -> None:
        self._what = f"{stage} {role}, {what}"
        created = create_progress_artifact(0.0, key=f"{stage}-{role}", description=self._what)
        assert isinstance(created, UUID), "called from a task, which is not a coroutine"
        self._id = created
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
