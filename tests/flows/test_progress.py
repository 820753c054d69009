"""What people see while scoring: a bar on a terminal, lines elsewhere, and Prefect's artifacts."""

import io

import pytest

import flows.progress
from flows.progress import scoring_progress
from pipeline.score import Progress

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


def run(monkeypatch, is_terminal):
    screen, lines = io.StringIO(), []
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", screen)
    with scoring_progress(["ref"], "tokens/toy-1@0", lines.append) as show:
        for state in STATES:
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
        "scoring tokens/toy-1@0 as ref: score ref: 3,000/3,000 tokens, 500 tokens/s, <1 s left",
    )


def test_the_time_left_follows_from_the_rate():
    assert str(STATES[1]) == "score ref: 1,000/3,000 tokens, 500 tokens/s, 4 s left"
    assert str(Progress("ref", 1, 10_000, 1.0)).endswith("1 tokens/s, 2 h 46 min left")
    assert Progress("ref", 0, 0, 0.0).percent == 100.0
