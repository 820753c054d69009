"""OpenLineage events: one START and one end per stage, one event per commit, with what the client's own models demand."""

import json
from datetime import datetime

import pyarrow as pa
import pytest
from openlineage.client.event_v2 import Dataset, Job, Run, RunEvent, RunState
from openlineage.client.facet_v2 import error_message_run, output_statistics_output_dataset, schema_dataset

from flows import lineage_events
from flows.lineage_events import check_client, lineage_of
from weights_store import WeightStore
from weights_store.errors import MissingExtraError
from weights_store.schemas import TOKENS
from weights_store.tables.notes import NOT_A_VERSION

ROW = {
    "prompt": "{}",
    "prompt_ids": [1],
    "chosen_ids": [2, 3],
    "rejected_ids": [4],
    "chosen_score": None,
    "rejected_score": None,
    "split": "train",
}


@pytest.fixture
def events(tmp_path, monkeypatch):
    """Return a function that reads the events sent so far, each parsed by the client's own models."""
    lineage_events._client.cache_clear()
    monkeypatch.setattr(lineage_events, "_silent_until", [0.0])
    file = tmp_path / "events.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(file))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    yield lambda: [_parsed(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    lineage_events._client.cache_clear()


def _parsed(event):
    """Build the client's models from a written event: they check ids, times and names."""
    event = {key: value for key, value in event.items() if key != "schemaURL"}
    run = Run(event["run"]["runId"], event["run"]["facets"])
    job = Job(event["job"]["namespace"], event["job"]["name"])
    for side in ("inputs", "outputs"):
        for dataset in event[side]:
            Dataset(dataset["namespace"], dataset["name"])
    datetime.fromisoformat(event["eventTime"])
    fields = {**event, "run": run, "job": job, "eventType": RunState[event["eventType"]]}
    return RunEvent(**fields)


@pytest.fixture
def commit(tmp_path):
    """Return a function that commits some pairs to a table."""
    table = WeightStore(tmp_path / "store").table("tokens/hh-1")

    def run(first, num_rows):
        rows = [{**ROW, "pair_id": f"{row:032x}", "source_row": row} for row in range(first, first + num_rows)]
        return table.append(pa.Table.from_pylist(rows, TOKENS), {"fingerprint": "0" * 64})

    return run


def _kinds(events):
    return [event.eventType.value for event in events]


def test_a_stage_is_a_run_with_one_event_per_commit(events, commit, tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    before = commit(0, 1)
    with lineage_of("prepare", "hh/head", [str(tmp_path / "pairs.jsonl"), "org/hub-dataset", before]) as outputs:
        commit(1, 2)
        outputs.append(commit(3, 4))
    sent = events()
    assert _kinds(sent) == ["START", "RUNNING", "RUNNING", "COMPLETE"]
    assert {(event.run.runId, event.job.name, event.job.namespace) for event in sent} == {
        (sent[0].run.runId, "hh/head.prepare", "tokenweights")
    }
    assert [(place["namespace"], place["name"]) for place in sent[0].inputs] == [
        ("file", str(tmp_path / "pairs.jsonl")),
        ("https://huggingface.co", "org/hub-dataset"),
        ("file", f"{tmp_path}/store/tokens/hh-1"),
    ]
    outputs = [event.outputs[0] for event in sent[1:]]
    assert [place["facets"]["version"]["datasetVersion"] for place in outputs] == ["1", "2", "2"]
    # What each commit added, and at the end what the version holds.
    statistics = [place["outputFacets"]["outputStatistics"] for place in outputs]
    assert [found["rowCount"] for found in statistics] == [2, 4, 7]
    shards = [path for path in (tmp_path / "store/tokens/hh-1").glob("*.parquet") if path.name != NOT_A_VERSION]
    assert statistics[2]["fileCount"] == len(shards) == 3
    assert statistics[2]["size"] == sum(shard.stat().st_size for shard in shards)
    columns = [field["name"] for field in outputs[0]["facets"]["schema"]["fields"]]
    assert columns == TOKENS.names
    assert outputs[0]["facets"]["schema"]["_schemaURL"] == schema_dataset.SchemaDatasetFacet._get_schema()
    assert (
        output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet._get_schema() == statistics[0]["_schemaURL"]
    )


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("cannot read s3://me:secret@bucket"), "FAIL"), (KeyboardInterrupt(), "ABORT")]
)
def test_a_stage_that_ends_badly_says_so_without_credentials(events, error, kind):
    with pytest.raises(type(error)), lineage_of("score", "hh/head", []):
        raise error
    sent = events()
    assert _kinds(sent) == ["START", kind]
    facet = sent[1].run.facets["errorMessage"]
    assert facet["_schemaURL"] == error_message_run.ErrorMessageRunFacet._get_schema()
    assert facet["message"] == ("cannot read s3://***@bucket" if kind == "FAIL" else "KeyboardInterrupt")


def test_nothing_is_sent_unless_somebody_wants_it(events, monkeypatch):
    for name in ("TYPE", "LOG_FILE_PATH", "APPEND"):
        monkeypatch.delenv(f"OPENLINEAGE__TRANSPORT__{name}")
    with lineage_of("score", "hh/head", []):
        pass
    assert events() == []


def test_a_catalogue_that_does_not_answer_ends_no_build(events, monkeypatch, caplog):
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
    with caplog.at_level("WARNING", logger="tokenweights"), lineage_of("score", "hh/head", []) as outputs:
        outputs.append("models/x")
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("tokenweights")]
    assert said.startswith("OpenLineage: events are not sent for 60 s, the build goes on: HTTPConnectionPool")


def test_a_store_that_cannot_be_read_for_an_event_ends_no_build(events, commit, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="tokenweights"), lineage_of("prepare", "hh/head", []) as outputs:
        outputs.append(commit(0, 1))
        for entry in (tmp_path / "store/tokens/hh-1/_delta_log").glob("*.json"):
            entry.write_text("{")
    assert _kinds(events()) == ["START"]
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("tokenweights")]
    assert "the build goes on: " in said


def test_wanted_events_without_the_package_are_refused_before_a_build(events, monkeypatch):
    monkeypatch.setattr("pipeline.child.find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'openlineage'.*tokenweights\[lineage\]"):
        check_client()
