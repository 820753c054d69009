"""The request between a stage and its process, and what its engine is sized for."""

from dataclasses import replace

import pytest

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.workers.commit import Tally
from pipeline.workers.missing import Backlog, sized
from pipeline.workers.request import AnchorOptions, AttributionOptions, Executor, MismatchOptions, Request, Target
from train.model.sampling import AnchorSampling
from weights_store import TableVersion

OPTIONS = [
    ("score", None),
    ("attribute", AttributionOptions("gold_logps", prompts=True, activations=False)),
    ("anchors", AnchorOptions(AnchorSampling(max_new_tokens=6, temperature=1.0, top_k=0, top_p=0.5), seed=2**62)),
    ("anchors", MismatchOptions(longest=321)),
]


@pytest.mark.parametrize(("stage", "options"), OPTIONS)
def test_a_process_reads_the_request_that_its_stage_has_written(tmp_path, stage, options):
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
        options=options,
    )
    request.save(tmp_path / "request.json")
    assert Request.load(tmp_path / "request.json") == request
    assert list(Request.load(tmp_path / "request.json").targets[0].metadata) == list(metadata)  # what a commit records


def test_every_batch_of_a_chunk_is_shown(logged):
    tally = Tally("score", "ref", num_tokens=100)
    first, second = tally.within(40), tally.within(50)
    for share in (0.25, 0.5):
        first(share)
    second(0.1)  # begins before the first has ended
    first(1.0)
    second(1.0)
    tally.add(10)
    assert [(progress.name, progress.done, progress.total) for progress in logged.progress] == [
        ("score ref", done, 100) for done in (0, 10, 20, 25, 45, 90, 100)
    ]


@pytest.mark.parametrize(
    ("settings", "tokens", "words"),
    [
        (EngineSettings(), 16384, "the default batch_tokens"),
        (EngineSettings(num_halvings=2), 4096, "1/4 of the default batch_tokens"),
        (EngineSettings(batch_tokens=3000, num_halvings=1), 1500, "batch_tokens 1500"),
        (EngineSettings(batch_tokens=1000, num_halvings=5), 256, "batch_tokens 256"),
    ],
)
def test_the_tokens_of_a_step_are_those_of_the_device_or_the_recipe_halved_after_running_out_of_memory(
    settings, tokens, words
):
    assert (settings.step_tokens(16384), settings.budget) == (tokens, words)


def test_an_engine_is_sized_for_the_longest_sequence_that_its_targets_lack():
    tokens = TableVersion("store", "tokens/x", 0, "f")
    plain, conditioned = Target("ref", "a", None, {}), Target("positive", "b", Condition("é" * 10, "system"), {})
    request = Request("score", tokens, "m", [plain, conditioned], 1, EngineSettings())
    lacks = Backlog(3, 900, longest_prompt=120, longest=300) + Backlog(1, 500, longest_prompt=200, longest=250)
    assert lacks == Backlog(4, 1400, 200, 300)
    # The prompt has 20 bytes, so 20 tokens at most, and 256 are left for what the template puts around it.
    assert sized(request, [lacks, Backlog()]).engine.longest == 300
    assert sized(request, [lacks, lacks]).engine.longest == 300 + 20 + 256
    assert sized(replace(request, any_length=True), [lacks, lacks]).engine.longest is None
    sampling = AnchorSampling(max_new_tokens=64)
    anchors = replace(request, stage="anchors", targets=[plain], options=AnchorOptions(sampling, 0))
    assert sized(anchors, [lacks]).engine.longest == 200 + 64
    assert sized(replace(anchors, options=MismatchOptions(500)), [lacks]).engine.longest == 200 + 500
