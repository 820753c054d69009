"""The request file between a stage and its process."""

import pytest

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.workers.commit import Tally
from pipeline.workers.request import AnchorOptions, AttributionOptions, Executor, Request, Target
from train.model.sampling import AnchorSampling
from weights_store import TableVersion

OPTIONS = {
    "score": None,
    "attribute": AttributionOptions("gold_logps", prompts=True, activations=False),
    "anchors": AnchorOptions(AnchorSampling(max_new_tokens=6, temperature=1.0, top_k=0, top_p=0.5), seed=2**62),
}


@pytest.mark.parametrize("stage", OPTIONS)
def test_a_process_reads_the_request_that_its_stage_has_written(tmp_path, stage):
    metadata = {"scorer": {"model": "f" * 64, "top_k": 3}, "parents": [{"version": 4}], "nothing": None, "share": 0.1}
    targets = [
        Target("ref", "logps/toy-1/x", None, metadata, top_k=3),
        Target("positive", "logps/toy-1/y", Condition("sei höflich", "system"), {}),
    ]
    request = Request(
        stage,
        TableVersion("s3://bucket/store", "tokens/toy-1", 7, "a" * 64),
        "/models/m",
        targets,
        4096,
        EngineSettings("bfloat16", 512, 1.5, 0.5, 2),
        Executor("ray", 8, 0.5, "head:6379"),
        tokenizer="/models/t",
        chat_template="{{ messages }}",
        restarts=["out of memory; batch_tokens 512"],
        options=OPTIONS[stage],
    )
    request.save(tmp_path / "request.json")
    assert Request.load(tmp_path / "request.json") == request
    assert list(Request.load(tmp_path / "request.json").targets[0].metadata) == list(metadata)  # what a commit records


def test_every_batch_of_a_chunk_is_shown(logged):
    tally = Tally("score", "ref", num_pairs=5, num_tokens=100)
    within = tally.within(40)
    for share in (0.25, 0.5, 1.0):
        within(share)
    tally.add(40)
    tally.within(60)(0.5)
    assert [(progress.name, progress.done, progress.total) for progress in logged.progress] == [
        ("score ref", done, 100) for done in (0, 10, 20, 40, 40, 70)
    ]
