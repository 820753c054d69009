"""The event of a published version, and what it may start."""

import logging

from prefect.events import DeploymentEventTrigger, emit_event
from prefect.events.worker import EventsWorker

from pipeline.stages.publish import Published
from pipeline.stages.report import Report
from weights_store.location import Location

PUBLISHED = "tokenweights.weights.published"
"""The event. Its resource is `tokenweights.weights.NAME` with the labels `tokenweights.store`, the store's root, and
`tokenweights.doctor`: `sound` if the doctor warns of nothing, else `warning`. Its payload: `weights` (`name@version`),
`fingerprint`, `num_pairs`, `warnings` (their names), `report`."""
_DRAIN_S = 10
_SOUND, _WARNING = "sound", "warning"


def announce(published: Published, report: Report) -> None:
    """Emit the event of a version. It is sent again if a build died after it and before its report was written."""
    weights = published.weights
    warnings = [found.name for found in report.diagnoses if found.severity == "warning"]
    emit_event(
        PUBLISHED,
        resource={
            **_resource(weights.store, published.name),
            "prefect.resource.name": published.name,
            "tokenweights.doctor": _WARNING if warnings else _SOUND,
        },
        payload={
            "weights": f"{published.name}@{weights.version}",
            "fingerprint": weights.fingerprint,
            "num_pairs": published.statistics["num_pairs"],
            "warnings": warnings,
            "report": report.path,
        },
    )
    # Before the report is written, which says that this was done. The worker would warn of the event that it is about to send.
    logging.getLogger(EventsWorker.__name__).setLevel(logging.ERROR)
    EventsWorker.drain_all(timeout=_DRAIN_S)


def when_published(store: str, name: str) -> DeploymentEventTrigger:
    """Return what starts a deployment of `train-policy` on each new version of a weight dataset that the doctor finds sound."""
    return DeploymentEventTrigger(
        name=f"train on new versions of {name}",
        description="A build has published a version, and `tokenweights doctor` warns of nothing.",
        expect={PUBLISHED},
        match={**_resource(store, name), "tokenweights.doctor": _SOUND},
        parameters={"weights": {"__prefect_kind": "jinja", "template": "{{ event.payload.weights }}"}},
    )


def _resource(store: str, name: str) -> dict[str, str]:
    """Return how events name a weight dataset; names are the same in many stores."""
    return {
        "prefect.resource.id": f"tokenweights.weights.{name}",
        "tokenweights.store": Location(store).absolute_uri,
    }
