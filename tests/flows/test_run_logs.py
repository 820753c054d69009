"""What a stage logs reaches its Prefect run and the terminal, each line once, and progress becomes an artifact."""

import io
import time
from uuid import uuid4

import httpx
import pytest

import flows.run_logs
from flows.run_logs import progress_artifacts, run_logs
from weights_store.messages import Progress, logger, show, show_on_terminal

PAIRS = "tokens/toy-1@0"


def states(stage="score"):
    steps = [(0, 0.0), (1000, 2.0), (3000, 6.0)]
    return [Progress(f"{stage} ref", done, 3000, wall_s) for done, wall_s in steps]


@pytest.fixture
def artifacts(monkeypatch):
    """What Prefect's API was called with: key, progress and description of each update."""
    keys, calls = {}, []

    def create(progress, key, description):
        keys[created := uuid4()] = key
        return created

    def update(artifact_id, progress, description):
        calls.append((keys[artifact_id], progress, description))

    monkeypatch.setattr(flows.run_logs, "create_progress_artifact", create)
    monkeypatch.setattr(flows.run_logs, "update_progress_artifact", update)
    return calls


@pytest.mark.parametrize("stage", ["score", "attribute", "anchors"])
def test_an_artifact_says_tokens_and_rate_and_ends_at_a_hundred_per_cent(artifacts, stage):
    with progress_artifacts([f"{stage} ref"], PAIRS):
        for state in states(stage):
            show(state)
    # The two later states come less than two seconds after the first, and the end is always shown.
    assert artifacts == [
        (f"{stage}-ref", 0.0, f"{stage} ref, {PAIRS}: {stage} ref: 3,000 tokens to do"),
        (f"{stage}-ref", 100.0, f"{stage} ref, {PAIRS}: {stage} ref: 3,000/3,000 tokens, 500 tokens/s"),
    ]


def test_each_work_has_an_artifact_and_a_work_with_nothing_to_do_says_so(artifacts):
    with progress_artifacts(["score positive", "score negative"], PAIRS):
        show(Progress("score negative", 10, 10, 1.0))
        show(Progress("score ref", 1, 10, 1.0))
    assert {key: text for key, progress, text in artifacts if progress == 100.0} == {
        "score-positive": f"score positive, {PAIRS}: nothing to do",
        "score-negative": f"score negative, {PAIRS}: score negative: 10/10 tokens, 10 tokens/s",
    }


@pytest.mark.parametrize("num_calls", [0, 1])
def test_a_stage_goes_on_where_prefect_cannot_show_its_progress(artifacts, monkeypatch, num_calls):
    """The server is away when the artifact is made, or when it is moved, and there again in the end."""
    answers = [None] * num_calls + [httpx.ConnectError("gone")]

    def failing(call):
        def answer(*arguments, **options):
            if answers and (error := answers.pop(0)):
                raise error
            return call(*arguments, **options)

        return answer

    for name in ("create_progress_artifact", "update_progress_artifact"):
        monkeypatch.setattr(flows.run_logs, name, failing(getattr(flows.run_logs, name)))
    said = io.StringIO()
    with show_on_terminal(said), progress_artifacts(["score ref"], PAIRS):
        show(Progress("score ref", 1, 4, 1.0))
        show(Progress("score ref", 4, 4, 2.0))  # the server is not asked again at once
    assert said.getvalue().count(f"Prefect cannot show the progress of score ref, {PAIRS}: gone") == 1
    assert [progress for _, progress, _ in artifacts] == [100.0] * num_calls
    assert not answers


@pytest.mark.parametrize("stage", ["score", "attribute", "anchors"])
def test_a_terminal_gets_a_bar_with_share_and_rate_and_lines_above_it(stage):
    screen = io.StringIO()
    screen.isatty = lambda: True
    with show_on_terminal(screen):
        logger("pipeline.stages.score").info("starting the engine")
        for state in states(stage):
            show(state)
    first, _, bar = screen.getvalue().partition("\n")
    assert first == "starting the engine"
    assert f"{stage} ref: 100%" in bar
    assert "3.00k/3.00k" in bar
    assert "tokens/s" in bar


@pytest.fixture
def run_stage(prefect_server):
    """Return a flow with one task that logs a line and much progress; the flow returns the id of its run."""
    from prefect import flow, runtime, task

    @task
    def stage():
        logger("pipeline.stages.score").info("starting the engine")
        for done in range(0, 3001, 10):
            show(Progress("score ref", done, 3000, 6.0))

    @flow(name="logs-of-a-stage")
    def build():
        with run_logs():
            logger("flows.build").info("3 pairs are new")
            stage()
        return runtime.flow_run.id

    return build


def logged(run_id):
    """The logs of ours in a run, read from the API."""
    from prefect import get_client
    from prefect.client.schemas.filters import LogFilter

    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:  # Prefect sends logs in batches
            logs = client.read_logs(LogFilter(flow_run_id={"any_": [run_id]}))
            ours = [log for log in logs if log.name.startswith("tokenweights")]
            if any(log.message.startswith("score ref: 3,000/3,000") for log in ours):
                return sorted(ours, key=lambda log: log.timestamp)
            time.sleep(0.5)
    raise AssertionError([log.message for log in logs])


LINES = [
    "3 pairs are new",
    "starting the engine",
    "score ref: 3,000 tokens to do",
    "score ref: 3,000/3,000 tokens, 500 tokens/s",
]


def test_lines_are_in_the_log_of_their_run_and_progress_does_not_flood_it(run_stage):
    logs = logged(run_stage())
    assert [log.message for log in logs] == LINES
    assert [log.task_run_id is None for log in logs] == [True, False, False, False]


def test_lines_come_to_the_terminal_once(run_stage, capsys):
    run_stage()
    assert our_lines(capsys.readouterr().err) == LINES


def test_lines_come_to_the_terminal_once_also_when_the_command_prints_them(run_stage, capsys):
    with show_on_terminal():
        run_stage()
    assert our_lines(capsys.readouterr().err) == LINES


def our_lines(text):
    """The lines that hold one of ours, whoever printed them."""
    return [
        line for line in text.splitlines() if any(part in line for part in ("pairs are", "the engine", "score ref"))
    ]
