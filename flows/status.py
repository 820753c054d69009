"""What the deployments of a Prefect server do: running, last, next, and whether what they make is stale.

A recipe's weights are stale if a build would compute something (`pipeline/dry_run`), a policy if there is a version of its
weights that it was not trained on. Both are looked up here, so files are those of the folder in which this runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api import server_to_ask
from flows.serve import TAG
from pipeline.dry_run.plan import plan
from pipeline.recipe import Recipe, load_recipe
from pipeline.stages.train import load_training, pinned
from train.job.output import LINEAGE
from weights_store.errors import TokenweightsError
from weights_store.messages import first_line, hide_credentials
from weights_store.printing import one_line, print_json, print_table

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse


@dataclass(frozen=True)
class RunStatus:
    """One run of a deployment."""

    name: str
    state: str
    """As Prefect names it: `Running`, `Completed`, `Failed`, `Crashed`, `Cancelled` and so on."""
    since: datetime | None
    """When it came into this state; of a run to come, when it is due."""
    said: str
    """Of a run that works, how far its last progress artifact is; else the first line of its state's message, which says of a
    failed run what went wrong."""


@dataclass(frozen=True)
class DeploymentStatus:
    """What one deployment does."""

    deployment: str
    """`flow/name`."""
    running: list[RunStatus]
    last: RunStatus | None
    """The last one that ended, but none that was cancelled before it started: a schedule that fires while a run works."""
    next: RunStatus | None
    is_stale: bool | None
    """Whether a run would have something to do; None if that is not known."""
    why: str = ""
    """What there is to do, or why it is not known."""


def read_status(check_stale: bool = True) -> list[DeploymentStatus]:
    """Return what each deployment of ours does, by name.

    Args:
        check_stale: Look whether weights and policies are stale, as `tokenweights plan` does: that takes seconds for each.

    Raises:
        StageError: The server does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    with server_to_ask(), get_client(sync_client=True) as client:
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        flows = {flow.id: flow.name for flow in client.read_flows(deployment_filter=ours)}
        found = client.read_deployments(deployment_filter=ours)
        named = sorted((f"{flows[deployment.flow_id]}/{deployment.name}", deployment) for deployment in found)
        return [
            DeploymentStatus(
                name,
                _runs(client, deployment, _WORKING, "EXPECTED_START_TIME_DESC"),
                _last(client, deployment),
                next(iter(_runs(client, deployment, _TO_COME, "NEXT_SCHEDULED_START_TIME_ASC", limit=1)), None),
                *(_stale(name, deployment.parameters) if check_stale else (None, "")),
            )
            for name, deployment in named
        ]


_WORKING = ("PENDING", "RUNNING", "PAUSED", "CANCELLING")
_ENDED = ("COMPLETED", "FAILED", "CRASHED")
_TO_COME = ("SCHEDULED",)
_PAGE = 200
"""The most runs that the server returns at once."""


def print_status(found: Sequence[DeploymentStatus], as_json: bool) -> None:
    """Print one line for each deployment, and below it what is stale and why the last run failed."""
    if as_json:
        print_json([asdict(deployment) for deployment in found])
    elif found:
        print_table([_line(deployment) for deployment in found])
        for deployment in found:
            for run in deployment.running:
                if run.said:
                    print(f"\n{deployment.deployment} runs: {one_line(run.said)}")
            if deployment.last is not None and deployment.last.state not in ("Completed", "Cancelled"):
                print(f"\n{deployment.deployment} {deployment.last.state.lower()}: {one_line(deployment.last.said)}")
            if deployment.why:
                verdict = "is stale" if deployment.is_stale else "may be stale"
                print(f"\n{deployment.deployment} {verdict}: {one_line(deployment.why)}")
    else:
        print("no deployments of tokenweights on this server; `tokenweights serve` and `prefect deploy` make them")


def _line(deployment: DeploymentStatus) -> dict[str, object]:
    def shown(run: RunStatus | None) -> str:
        when = run.since.astimezone().strftime("%m-%d %H:%M:%S") if run is not None and run.since is not None else ""
        return f"{run.state.lower()} {when}" if run is not None else "-"

    return {
        "deployment": deployment.deployment,
        "now": ", ".join(map(shown, deployment.running)) or "-",
        "last": shown(deployment.last),
        "next": shown(deployment.next).removeprefix("scheduled "),
        "stale": {True: "yes", False: "no", None: "?" if deployment.why else "-"}[deployment.is_stale],
    }


def _last(client: "SyncPrefectClient", deployment: "DeploymentResponse") -> RunStatus | None:
    cancelled = _read(client, deployment, ("CANCELLED",), "END_TIME_DESC", limit=_PAGE)
    ended = [run for run in cancelled if run.run_count] + _read(client, deployment, _ENDED, "END_TIME_DESC", limit=1)
    newest = max(ended, key=lambda run: run.end_time.timestamp() if run.end_time else 0.0, default=None)
    return _run_status(client, newest) if newest is not None else None


def _runs(
    client: "SyncPrefectClient", deployment: "DeploymentResponse", states: Sequence[str], order: str, limit: int = 10
) -> list[RunStatus]:
    return [_run_status(client, run) for run in _read(client, deployment, states, order, limit)]


def _read(
    client: "SyncPrefectClient", deployment: "DeploymentResponse", states: Sequence[str], order: str, limit: int
) -> "list[FlowRun]":
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    chosen = {"deployment_id": {"any_": [deployment.id]}, "state": {"type": {"any_": [*states]}}}
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(chosen), sort=FlowRunSort(order), limit=limit
    )


def _run_status(client: "SyncPrefectClient", run: "FlowRun") -> RunStatus:
    state = run.state
    since = run.next_scheduled_start_time or (state.timestamp if state else None)
    if run.state_type == "RUNNING":
        said = _progress(client, run)
    else:
        said = first_line(state.message) if state and state.message else ""
    return RunStatus(run.name, run.state_name or "", since, hide_credentials(said))


def _progress(client: "SyncPrefectClient", run: "FlowRun") -> str:
    """Return how far a run and the flows that it runs have come; empty as long as no model has run."""
    from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
    from prefect.client.schemas.sorting import ArtifactSort

    children = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run.id]}})
    ids = [run.id, *(child.id for child in client.read_flow_runs(flow_run_filter=children))]
    progress = ArtifactFilter.model_validate({"flow_run_id": {"any_": ids}, "type": {"any_": ["progress"]}})
    found = client.read_artifacts(artifact_filter=progress, sort=ArtifactSort.UPDATED_DESC, limit=1)
    return next((artifact.description or "" for artifact in found), "")


def _stale(name: str, parameters: dict[str, Any]) -> tuple[bool | None, str]:
    """Return whether what a deployment makes is stale, and why; None and why if that is not known."""
    flow, _, _ = name.partition("/")
    try:
        if flow == "refresh-weights":
            file, overrides = parameters["recipe_file"], parameters.get("overrides") or []
            why = _stale_weights(load_recipe(file, overrides, parameters.get("store")))
        elif flow == "build-weights":
            why = _stale_weights(Recipe.model_validate(parameters["recipe"]))
        elif flow == "train-policy":
            why = _stale_policy(parameters["config"])
        else:  # build-and-train: its weights and its policy have rows of their own
            return None, ""
    except (TokenweightsError, OSError, KeyError, ValueError) as error:
        return None, first_line(error)
    return bool(why), why


def _stale_weights(recipe: Recipe) -> str:
    return "; ".join(_to_compute(recipe))


def _to_compute(recipe: Recipe) -> Iterator[str]:
    for stage in plan(recipe):
        if stage.action == "compute":
            yield f"{stage.stage}: {stage.num_pairs:,} pairs" if stage.num_pairs else stage.stage


def _stale_policy(config: dict[str, Any] | str) -> str:
    job = pinned(load_training(config))
    is_trained = (Path(job.output.folder) / LINEAGE).is_file()
    return "" if is_trained else f"no training on {job.data.weights} yet"
