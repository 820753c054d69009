import pytest

from pipeline.source.messages import Unusable
from pipeline.source.responses import as_turns, split_responses
from weights_store.schemas import Reason

COLUMNS = ("chosen", "rejected")
USER = {"role": "user", "content": "Weather in Lima?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "18 C"}
OTHER_RESULT = {"role": "tool", "content": "20 C"}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("chosen", "rejected", "before", "chosen_response", "rejected_response"),
    [
        ([said("a")], [said("b")], [], "a", "b"),
        ([USER, said("a")], [USER, said("b")], [USER], "a", "b"),
        ([USER, said("a")], [said("b")], [USER], "a", "b"),
        ([USER, CALL, RESULT, said("a")], [USER, CALL, RESULT, said("b")], [USER, CALL, RESULT], "a", "b"),
        ([USER, CALL, RESULT, said("a")], [USER, said("b")], [USER], [CALL, RESULT, said("a")], "b"),
        ([USER, CALL], [USER, said("b")], [USER], [CALL], "b"),
        (
            [USER, CALL, RESULT, said("a")],
            [USER, CALL, OTHER_RESULT, said("a")],
            [USER],
            [CALL, RESULT, said("a")],
            [CALL, OTHER_RESULT, said("a")],
        ),
        ([USER, CALL], [USER, CALL, RESULT, said("b")], [USER], [CALL], [CALL, RESULT, said("b")]),
        ([said("Wait."), CALL, RESULT, said("a")], [said("b")], [], [said("Wait."), CALL, RESULT, said("a")], "b"),
        ([USER, said("Wait."), CALL], [USER, said("b")], [USER], [said("Wait."), CALL], "b"),
        ([USER, said("Wait."), CALL], [USER, said("Wait."), said("b")], [USER, said("Wait.")], [CALL], "b"),
        ([said("x"), USER, said("a")], [said("x"), USER, said("b")], [said("x"), USER], "a", "b"),
    ],
    ids=[
        "alone",
        "one user turn",
        "one side has it",
        "same call",
        "one calls",
        "only a call",
        "other result",
        "one goes on",
        "text before a call",
        "text before a call in whole chats",
        "same text before a call",
        "both go on",
    ],
)
def test_what_both_sides_begin_with_is_no_response(chosen, rejected, before, chosen_response, rejected_response):
    assert split_responses(chosen, rejected, COLUMNS) == (before, chosen_response, rejected_response)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ([], Reason.NO_FINAL_ASSISTANT_TURN),
        ([CALL, RESULT], Reason.NO_FINAL_ASSISTANT_TURN),
        ([said(" ")], Reason.EMPTY_RESPONSE),
        ([{"role": "assistant", "content": [{"type": "text", "text": " "}]}], Reason.EMPTY_RESPONSE),
        ([said("one"), said("two")], Reason.PROMPTS_DIFFER),
        ([{"role": "user", "content": "other"}, said("a")], Reason.PROMPTS_DIFFER),
    ],
)
def test_conversations_without_a_response_say_why(chosen, reason):
    with pytest.raises(Unusable) as caught:
        split_responses(chosen, [USER, said("b")], COLUMNS)
    assert caught.value.reason is reason


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "longer", [[said("x"), USER, said("a")], [said("x"), said("a")], [CALL, RESULT, USER, said("a")]]
)
def test_a_response_is_not_moved_behind_turns_that_it_never_saw(longer, swap):
    sides = (longer, [said("b")])
    with pytest.raises(Unusable) as caught:
        split_responses(*(sides[::-1] if swap else sides), COLUMNS)
    assert caught.value.reason is Reason.PROMPTS_DIFFER


def test_a_response_as_turns():
    assert (as_turns("a"), as_turns([CALL])) == ([said("a")], [CALL])
