"""What people see of a run: lines, progress, and both on their way from a child to its parent."""

import io

import pytest

from weights_store.messages import (
    PREFIX,
    Progress,
    duration,
    first_line,
    logger,
    progress_of,
    receive,
    send_to_parent,
    show,
    show_on_terminal,
)

_log = logger("weights_store.some_module")


@pytest.mark.parametrize(
    ("done", "wall_s", "expected"),
    [
        (0, 0.0, "score ref: 1,000 tokens to do"),
        (10, 60.0, "score ref: 10/1,000 tokens, 0 tokens/s"),  # 1 %: too early, however long it took
        (500, 4.9, "score ref: 500/1,000 tokens, 102 tokens/s"),  # half of it, but within 5 s
        (20, 5.0, "score ref: 20/1,000 tokens, 4 tokens/s, 4 min 05 s left"),  # 980 tokens at 4 a second: 245 s
        (1000, 50.0, "score ref: 1,000/1,000 tokens, 20 tokens/s"),
    ],
)
def test_the_time_left_is_shown_only_from_two_percent_and_five_seconds_on(done, wall_s, expected):
    assert str(Progress("score ref", done, 1000, wall_s)) == expected


@pytest.mark.parametrize(("done", "total", "percent"), [(1, 4, 25.0), (0, 0, 100.0)])
def test_percent_of_nothing_to_do_is_all_of_it(done, total, percent):
    assert Progress("x", done, total, 1.0).percent == percent


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "<1 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600 * 1204 + 60 * 7, "1,204 h 07 min"),
    ],
)
def test_durations_read_like_those_of_people(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("\n no model \n Traceback …"), "no model "), (KeyError(), "KeyError"), ("a\nb", "a"), ("", "str")],
)
def test_the_first_line_of_an_error_or_else_its_type(error, expected):
    assert first_line(error) == expected


def sent_by_child(capsys, say):
    with send_to_parent():
        say()
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]


def test_records_and_progress_of_a_child_are_logged_again_in_the_parent(capsys, caplog):
    progress = Progress("verify weights/x", 3, 3, 0.5, "bytes")

    def say():
        _log.info("two\nlines, é and %s", "an argument")
        _log.warning("careful")
        show(progress)

    messages = sent_by_child(capsys, say)
    caplog.clear()
    caplog.set_level("INFO", "tokenweights")
    heard = []
    for message in messages:
        receive(message, heard.append)
    lines = [(r.name, r.levelname, r.getMessage()) for r in caplog.records if progress_of(r) is None]
    name = "tokenweights.weights_store.some_module"
    assert lines == [(name, "INFO", "two\nlines, é and an argument"), (name, "WARNING", "careful")]
    assert [found for r in caplog.records if (found := progress_of(r))] == heard == [progress]


def test_a_child_sends_the_first_and_the_last_progress_and_few_between(capsys):
    def say():
        for done in range(1001):
            show(Progress("score", done, 1000, done / 1000))

    assert 2 <= len(sent_by_child(capsys, say)) < 20


def test_without_a_terminal_lines_and_the_end_of_progress_are_printed():
    stream = io.StringIO()
    with show_on_terminal(stream):
        _log.info("prepare: %d pairs", 7)
        for done in (0, 1, 2):
            show(Progress("score", done, 2, 1.0))
    _log.info("nobody listens any more")
    assert stream.getvalue().splitlines() == [
        "prepare: 7 pairs",
        "score: 2 tokens to do",
        "score: 2/2 tokens, 2 tokens/s",
    ]
