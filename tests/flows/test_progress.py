"""What people see while scoring: a bar on a terminal, lines elsewhere, and Prefect's artifacts."""

import io
from dataclasses import replace

import pytest

import flows.progress
from flows.progress import stage_progress
from pipeline.workers.supervise import Progress

STATES = [Progress("ref", 0, 3000, 0.0), Progress("ref", 1000, 3000, 2.0), Progress("ref", 3000, 3000, 6.0)]


@pytest.fixture
def artifacts(monkeypatch):
    """What Prefect was told, instead of telling it."""
    told = []
    monkeypatch.setattr(flows.progress, "create_progress_artifact", lambda progress, key, description: key)
    monkeypatch.setattr(
        flows.progress,
        "update_progress_artifact",
        lambda key, progress, description: told.append((key, progress, description)),
    )
    return told


def run(monkeypatch, is_terminal, states=STATES):
    screen, lines = io.StringIO(), []
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", screen)
    with stage_progress(states[0].stage, ["ref"], "tokens/toy-1@0", lines.append) as show:
        for state in states:
            show(state)
    return screen.getvalue(), lines


def test_a_terminal_gets_a_bar_with_share_rate_and_time_left(monkeypatch, artifacts):
    screen, lines = run(monkeypatch, is_terminal=True)
    assert "score ref: 100%" in screen
    assert "3.00k/3.00k" in screen
    assert "tokens/s" in screen
    assert lines == []


def test_elsewhere_plain_lines_come_now_and_then_and_at_the_end(monkeypatch, artifacts):
    screen, lines = run(monkeypatch, is_terminal=False)
    assert screen == ""
    # The state in the middle comes less than ten seconds after the first.
    assert lines == ["score ref: 3,000 tokens to do", "score ref: 3,000/3,000 tokens, 500 tokens/s, <1 s left"]


def test_the_artifact_says_tokens_rate_and_time_left_and_ends_at_a_hundred_per_cent(monkeypatch, artifacts):
    run(monkeypatch, is_terminal=False)
    assert {key for key, _, _ in artifacts} == {"score-ref"}
    assert artifacts[-1][1:] == (
        100.0,
        "score ref, tokens/toy-1@0: score ref: 3,000/3,000 tokens, 500 tokens/s, <1 s left",
    )


@pytest.mark.parametrize("stage", ["attribute", "anchors"])
def test_the_stages_of_ti_dpo_show_themselves_by_name(monkeypatch, artifacts, stage):
    states = [replace(state, stage=stage) for state in STATES]
    end = f"{stage} ref: 3,000/3,000 tokens, 500 tokens/s, <1 s left"
    _, lines = run(monkeypatch, False, states)
    assert lines == [f"{stage} ref: 3,000 tokens to do", end]
    assert {key for key, _, _ in artifacts} == {f"{stage}-ref"}
    assert artifacts[-1][1:] == (100.0, f"{stage} ref, tokens/toy-1@0: {end}")
    screen, _ = run(monkeypatch, True, states)
    assert f"{stage} ref: 100%" in screen
    assert "score" not in screen


def test_a_stage_with_nothing_to_do_says_so(monkeypatch, artifacts):
    with stage_progress("anchors", ["ref"], "tokens/toy-1@0", lambda line: None):
        pass
    assert artifacts == [("anchors-ref", 100.0, "anchors ref, tokens/toy-1@0: nothing to do")]


def test_the_time_left_follows_from_the_rate():
    assert str(STATES[1]) == "score ref: 1,000/3,000 tokens, 500 tokens/s, 4 s left"
    assert str(Progress("ref", 1, 10_000, 1.0)).endswith("1 tokens/s, 2 h 46 min left")
    assert Progress("ref", 0, 0, 0.0).percent == 100.0
