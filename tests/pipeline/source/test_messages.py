import datetime
import json
import subprocess
import sys

import pytest

from pipeline.source.messages import Unusable, is_rendered, read_messages, read_tools
from weights_store.schemas import Reason

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(*messages):
    return read_messages(list(messages), "prompt")


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("Human", "user"),
        ("human", "user"),
        ("User", "user"),
        ("prompter", "user"),
        ("gpt", "assistant"),
        ("Assistant", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("SYSTEM", "system"),
        ("developer", "developer"),
        ("function", "tool"),
        ("observation", "tool"),
        (" tool ", "tool"),
    ],
)
def test_roles_get_the_names_of_chat_templates(written, role):
    assert read({"role": written, "content": "x"}) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_function_call_of_sharegpt_is_a_turn_with_calls(as_list):
    call = {"name": "weather", "arguments": {"city": "Lima"}}
    calls = [call, {"name": "now", "arguments": "{}"}] if as_list else [call]
    value = json.dumps(calls if as_list else call)
    expected = [{"type": "function", "function": each} for each in calls]
    assert read({"from": "function_call", "value": value}) == [
        {"role": "assistant", "content": None, "tool_calls": expected}
    ]


@pytest.mark.parametrize(
    "value", ["weather of Lima", "3", "[]", '{"name": "weather"}', '{"arguments": {}}', '["f"]', None]
)
def test_a_function_call_that_is_no_call_is_an_unknown_role(value):
    with pytest.raises(
        Unusable, match=r"prompt\[0\].role is 'function_call', expected one of .* or function_call with"
    ) as caught:
        read({"from": "function_call", "value": value})
    assert caught.value.reason is Reason.UNKNOWN_ROLE


@pytest.mark.parametrize("role", ["narrator", "", 3])
def test_an_unknown_role_is_named(role):
    with pytest.raises(Unusable, match=rf"prompt\[0\].role is {role!r}, expected one of system, developer, user"):
        read({"role": role, "content": "x"})


def test_sharegpt_names_and_a_single_message_are_read():
    assert read_messages({"from": "human", "value": "Hi"}, "prompt") == [{"role": "user", "content": "Hi"}]
    assert read_messages({"role": "gpt", "content": "Hi"}, "chosen") == [{"role": "assistant", "content": "Hi"}]


def test_every_key_of_a_message_stays_and_a_null_is_no_key():
    message = {"role": "assistant", "content": "x", "name": "Ann", "reasoning_content": "hm", "weight": 1}
    assert read({**message, "tool_calls": None, "tool_call_id": None}) == [message]


def test_a_date_is_the_text_that_json_has():
    assert (
        read({"role": "user", "content": "x", "at": datetime.datetime(2026, 1, 2, 3)})[0]["at"] == "2026-01-02T03:00:00"
    )


def test_a_call_needs_no_text():
    expected = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert read({"role": "assistant", "tool_calls": [{**CALL, "index": None}]}) == expected
    assert read({"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}) == expected
    assert read({"role": "assistant", "content": "x", "tool_calls": []}) == [{"role": "assistant", "content": "x"}]


def test_a_null_is_no_key_at_any_depth_of_a_call():
    function = {"name": "weather", "arguments": {"city": "Lima", "unit": None, "at": {"day": None}}, "strict": None}
    filled = {**CALL, "index": None, "function": function}
    cleaned = {**CALL, "function": {"name": "weather", "arguments": {"city": "Lima", "at": {}}}}
    for calls in ([filled], json.dumps([filled])):
        assert read({"role": "assistant", "tool_calls": calls})[0]["tool_calls"] == [cleaned]


def test_nulls_in_lists_and_in_arguments_that_are_json_text_stay():
    function = {"name": "weather", "arguments": '{"city": "Lima", "unit": null}'}
    calls = [{"function": function}]
    assert read({"role": "assistant", "tool_calls": calls, "marks": [None, 1]}) == [
        {"role": "assistant", "content": None, "tool_calls": calls, "marks": [None, 1]}
    ]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [None, "x"]}}}}}
    assert read_tools({"tools": [schema]}) == ([schema], None)


def test_a_message_that_is_nested_too_deep_is_no_json():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"x": deep}
    with pytest.raises(Unusable, match=r"prompt\[0\] is no JSON: ") as caught:
        read({"role": "user", "content": "x", "deep": deep})
    assert caught.value.reason is Reason.NOT_TEXT


def test_text_parts_stay_parts():
    parts = [{"type": "text", "text": "Hi", "image_url": None}, {"text": "you"}]
    assert read({"role": "user", "content": parts})[0]["content"] == [
        {"type": "text", "text": "Hi"},
        {"type": "text", "text": "you"},
    ]


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        ("Hi", Reason.NOT_TEXT, r"prompt\[0\] is no message with role and content: 'Hi'"),
        ({"content": "Hi"}, Reason.NOT_TEXT, "no message with role"),
        ({"role": "user"}, Reason.MISSING_VALUE, r"prompt\[0\].content has no value"),
        ({"role": "assistant", "content": None, "tool_calls": []}, Reason.MISSING_VALUE, "content has no value"),
        ({"role": "user", "content": 7}, Reason.NOT_TEXT, "content is a int, expected text or text parts"),
        ({"role": "user", "content": []}, Reason.NOT_TEXT, "content is a list, expected text or text parts"),
        ({"role": "user", "content": [{"type": "image"}]}, Reason.NOT_TEXT, r"content\[0\] is a part of type 'image'"),
        ({"role": "user", "content": ["Hi"]}, Reason.NOT_TEXT, r"content\[0\] is a part 'Hi'"),
        ({"role": "user", "content": [{"type": "text"}]}, Reason.NOT_TEXT, "is a part of type 'text', expected"),
        (
            {"role": "user", "content": "x", "of": b"x"},
            Reason.NOT_TEXT,
            r"prompt\[0\] is no JSON: .*of: a bytes",
        ),
        ({"role": "user", "content": "x", "at": float("nan")}, Reason.NOT_TEXT, "is not finite"),
        ({"role": "user", "content": "x", "name": "\ud800"}, Reason.INVALID_UTF8, "surrogates"),
        ({"role": "assistant", "tool_calls": "[{"}, Reason.BAD_TOOLS, "tool_calls is no valid JSON"),
        ({"role": "assistant", "tool_calls": ["f"]}, Reason.BAD_TOOLS, "expected a list of calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {}}]},
            Reason.BAD_TOOLS,
            r"tool_calls\[0\] names no function",
        ),
    ],
)
def test_messages_that_cannot_be_read_say_why(message, reason, detail):
    with pytest.raises(Unusable, match=detail) as caught:
        read(message)
    assert caught.value.reason is reason


def test_tools_and_template_arguments_are_lists_and_objects_or_their_json():
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        assert read_tools({"tools": tools}) == ([TOOL], None)
        assert read_tools({"tools": ["old"], "chat_template_kwargs": {"tools": tools}}) == ([TOOL], None)
    for tools in ([], "", "null", None):
        assert read_tools({"tools": tools, "chat_template_kwargs": {"date": None}}) == (None, None)
    for arguments in ({"thinking": False, "date": None}, '{"thinking": false}'):
        assert read_tools({"chat_template_kwargs": arguments}) == (None, {"thinking": False})


@pytest.mark.parametrize("value", ["not JSON", "None", "[1]", {"type": "function"}, 3, ["search", "calc"], [TOOL, "3"]])
def test_other_tools_are_refused_with_a_remedy(value):
    with pytest.raises(Unusable, match=r"tools(\[\d\])? is ") as caught:
        read_tools({"tools": value})
    assert caught.value.reason is Reason.BAD_TOOLS
    assert caught.value.detail.endswith(
        "; list tools or chat_template_kwargs in dataset.unprinted_keys to leave it out"
    )


def test_other_template_arguments_are_refused():
    with pytest.raises(Unusable, match="chat_template_kwargs is True, expected an object"):
        read_tools({"chat_template_kwargs": True})


@pytest.mark.parametrize(
    "text",
    [
        "<s><|user|>\nName a fruit.\n<|assistant|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Hi [/INST]",
        " <bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant",
    ],
)
def test_a_rendered_chat_is_recognised(text):
    assert is_rendered(text)


@pytest.mark.parametrize(
    "text",
    ["What is <|im_start|>?", "Ignore this.\n<|assistant|>\nSure!</s>\n<|user|>\nGo.", "[INST] means instruction", ""],
)
def test_text_about_control_tokens_is_no_rendered_chat(text):
    assert not is_rendered(text)


def test_white_space_at_the_start_of_a_text_costs_no_time():
    # One pass over a million blanks takes milliseconds. A pattern that tries every split of them takes hours.
    code = "from pipeline.source.messages import is_rendered; assert not is_rendered(' ' * 1_000_000 + 'x')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
