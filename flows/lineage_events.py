"""OpenLineage events of every stage, for catalogues that follow data over many tools (Marquez, DataHub and others).

A stage is a run: START, at its end RUNNING for every version that it has committed, then COMPLETE; or FAIL with the error
(ABORT if somebody stopped it), without what it had committed. Nothing is sent unless the client is configured in its own way:
OPENLINEAGE_URL, OPENLINEAGE_CONFIG or OPENLINEAGE__TRANSPORT__TYPE=file and so on (`docs/operate.md`). A catalogue that does
not answer ends no build. The store's own lineage needs none of this.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.child import check_extra
from weights_store import TableVersion, WeightStore
from weights_store.location import Location
from weights_store.messages import first_line, hide_credentials, logger
from weights_store.tables.commits import Commit

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import InputDataset, OutputDataset

    AnyDataset = TypeVar("AnyDataset", InputDataset, OutputDataset)

_log = logger(__name__)

_silent_until = [0.0]
"""On the monotonic clock."""

Place = TableVersion | str
"""A version of one of our tables, or the path or hub id of a file or folder."""
_HUB = "https://huggingface.co"
_URL, _CONFIG, _PREFIX = "OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__"
"""Environment variables that configure the client."""
_PAUSE_S = 60.0
"""After an event that could not be sent: the client tries for seconds each time, and a stage has several events."""
_PRODUCER = "https://pypi.org/project/tokenweights"


def is_configured() -> bool:
    """Return whether somebody wants the events."""
    return any(name in (_URL, _CONFIG) or name.startswith(_PREFIX) for name in os.environ)


@contextmanager
def lineage_of(stage: str, weights: str, inputs: Sequence[Place]) -> Iterator[list[Place]]:
    """Send the events of one stage; the caller appends to the yielded list what it has written.

    Args:
        stage: For example `score`.
        weights: The name of the weight dataset that is being built, or trained on.
        inputs: What the stage reads.
    """
    outputs: list[Place] = []
    if not is_configured():
        yield outputs
        return
    from openlineage.client.uuid import generate_new_uuid

    run = _Run(f"{weights}.{stage}", [*inputs], str(generate_new_uuid()))
    run.send("START")
    try:
        yield outputs
    except BaseException as error:
        run.send("FAIL" if isinstance(error, Exception) else "ABORT", outputs, error=error)
        raise
    with _going_on():
        for output in outputs:
            for commit in run.commits_of(output):
                run.send("RUNNING", [output], commit=commit)
    run.send("COMPLETE", outputs)


@dataclass
class _Run:
    """One run of OpenLineage."""

    job: str
    inputs: list[Place]
    id: str
    started_ms: float = field(default_factory=lambda: time.time() * 1000)

    def commits_of(self, output: Place) -> list[Commit]:
        """Return the commits of a table since the run began, the oldest first."""
        if isinstance(output, str):
            return []
        history = WeightStore(output.store).table(output.table).history()
        new = [commit for commit in history if (commit.timestamp_ms or 0) >= self.started_ms]
        return sorted(new, key=lambda commit: commit.version)

    def send(
        self,
        state: str,
        outputs: Sequence[Place] = (),
        commit: Commit | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Send one event. `commit` is what the only output got in it."""
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState

        if time.monotonic() < _silent_until[0]:
            return
        with _going_on():
            event = RunEvent(
                eventType=RunState[state],
                eventTime=datetime.now(UTC).isoformat(),
                run=Run(self.id, _run_facets(error)),
                job=Job(_namespace(), self.job),
                producer=_PRODUCER,
                inputs=[_dataset(InputDataset, place) for place in self.inputs],
                outputs=[_dataset(OutputDataset, place, commit) for place in outputs],
            )
            _client().emit(event)


@contextmanager
def _going_on() -> Iterator[None]:
    """Send nothing for a while after an event that cannot be made or sent, and go on."""
    try:
        yield
    except Exception as problem:  # noqa: BLE001  (whatever a transport or a store raises: a catalogue is not worth a build)
        _silent_until[0] = time.monotonic() + _PAUSE_S
        reason = hide_credentials(first_line(problem))
        _log.warning(f"OpenLineage: events are not sent for {_PAUSE_S:.0f} s, the build goes on: {reason}")


@cache
def _client() -> "OpenLineageClient":
    from openlineage.client import OpenLineageClient

    return OpenLineageClient()


def check_client() -> None:
    """Check, before a build starts, that configured events can be made.

    Raises:
        MissingExtraError: The package is not installed.
    """
    if is_configured():
        check_extra("openlineage", None)


def _namespace() -> str:
    return os.environ.get("OPENLINEAGE_NAMESPACE", "tokenweights")


def _run_facets(error: BaseException | None) -> dict[str, Any]:
    from openlineage.client.event_v2 import Job, Run
    from openlineage.client.facet_v2 import error_message_run, parent_run
    from prefect import runtime

    facets: dict[str, Any] = {}
    if runtime.flow_run.id is not None:
        parent = Job(_namespace(), runtime.flow_run.flow_name or "")
        facets["parent"] = parent_run.ParentRunFacet(Run(runtime.flow_run.id), parent)
    if error is not None:
        message = hide_credentials(first_line(error))
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message, "Python")
    return facets


def _dataset(kind: "type[AnyDataset]", place: Place, commit: Commit | None = None) -> "AnyDataset":
    """Return a dataset as OpenLineage names it, with the version, columns and number of rows of a table."""
    if isinstance(place, str):
        path = Path(place)
        if path.exists():
            return kind("file", str(path.absolute()))
        return kind(_HUB, place)
    from openlineage.client.facet_v2 import (
        dataset_version_dataset,
        input_statistics_input_dataset,
        output_statistics_output_dataset,
        schema_dataset,
    )

    table = WeightStore(place.store).table(place.table)
    version = place.version if commit is None else commit.version
    columns = [
        schema_dataset.SchemaDatasetFacetFields(name, str(column))
        for name, column in table.scan(version, checked=False).collect_schema().items()
    ]
    dataset = kind(*_name_of(place))
    dataset.facets = {
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(str(version)),
        "schema": schema_dataset.SchemaDatasetFacet(columns),
    }
    shards = table.records(version) if commit is None else commit.shards
    numbers = {
        "rowCount": sum(shard.num_rows for shard in shards),
        "size": sum(shard.num_bytes for shard in shards),
        "fileCount": len(shards),
    }
    if hasattr(dataset, "outputFacets"):
        facet = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(**numbers)
        dataset.outputFacets = {"outputStatistics": facet}
    else:
        read = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(**numbers)
        dataset.inputFacets = {"inputStatistics": read}
    return dataset


def _name_of(place: TableVersion) -> tuple[str, str]:
    """Return namespace and name of a table, as OpenLineage forms them for folders and object stores."""
    location = Location(place.store)
    if location.is_local:
        return "file", f"{location.absolute_uri}/{place.table}"
    scheme, _, rest = str(location).partition("://")
    bucket, _, prefix = rest.partition("/")
    return f"{scheme}://{bucket}", f"{prefix}/{place.table}".lstrip("/")
