"""Reads what a row says of a chat: messages, tools and arguments of the chat template; also the error for an unusable row.

A message keeps every key it has, for the chat template (`chat/template.py`) decides what is printed. Roles get the names that
templates know. Not here: which columns make a pair (`pairs.py`), and what a model's template does with a chat.
"""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from weights_store.fingerprint import canonical_json
from weights_store.schemas import Reason

Message = dict[str, Any]
"""One turn: `role`, `content` (text, text parts, or None beside tool calls) and any other key of a chat template."""

SYSTEM_ROLES = ("system", "developer")
"""Roles of the turn that instructs the model, before the chat."""
_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Roles in lower case, as data sets write them, and their name in chat templates."""

OF_THE_TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns that are handed to the chat template."""

_BEGINNING = r"(?:<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*"
_TURN_MARK = (
    r"(?:<\|im_start\|>|\[/?INST\]|\[SYSTEM_PROMPT\]|<\|start_of_role\|>|<\|header_start\|>|<\|turn>|<\|start_header_id\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>|<\|start\|>"
    r"|<\|(?:system|user|assistant)\|>|<｜(?:User|Assistant)｜>)"
)
_TEMPLATED = re.compile(f"{_BEGINNING}{_TURN_MARK}.*?{_TURN_MARK}", re.DOTALL)
"""Text that begins with the mark of a turn and has another one: the output of a chat template."""


class Unusable(Exception):  # noqa: N818 - describes a row, and never leaves the pipeline
    """A row that cannot be used, with the reason for quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def read_messages(value: object, column: str) -> list[Message]:
    """Return a message or a list of messages as turns. A key whose value is null is a key that is not there.

    Raises:
        Unusable: It is no list of messages; carries the reason for quarantine.
    """
    if isinstance(value, Mapping):
        return [_message(value, column)]
    if not isinstance(value, list | tuple):
        raise Unusable(
            Reason.NOT_TEXT, f"column {column!r} is a {type(value).__name__}, expected text or a list of messages"
        )
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def is_plain(message: Message) -> bool:
    """Return whether a message is a role and a text, and nothing else."""
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def texts_of(message: Message) -> list[str]:
    """Return the text of a message, or the texts of its parts; none beside tool calls without text."""
    content = message["content"]
    return [part["text"] for part in content] if isinstance(content, list) else [content] if content else []


def is_empty(message: Message) -> bool:
    """Return whether a message says nothing: no text and no tool call."""
    return not message.get("tool_calls") and not any(map(str.strip, texts_of(message)))


def read_tools(row: Mapping[str, object]) -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
    """Return the tools of a row and its arguments for the chat template; None where there are none.

    They are in the columns `tools`, a list of JSON schemas, and `chat_template_kwargs`, an object; both, and each
    schema, may be JSON text. Tools among the arguments replace those of the row.

    Raises:
        Unusable: They are something else.
    """
    try:
        return _tools_and_arguments(row)
    except Unusable as problem:
        remedy = f"list {' or '.join(OF_THE_TEMPLATE)} in dataset.unprinted_keys to leave it out"
        raise Unusable(problem.reason, f"{problem.detail}; {remedy}") from problem


def _tools_and_arguments(row: Mapping[str, object]) -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
    arguments = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise Unusable(Reason.BAD_TOOLS, f"chat_template_kwargs is {_shown(arguments)}, expected an object")
    given = _cleaned(arguments, "chat_template_kwargs")
    tools = _parsed(given.pop("tools", row.get("tools")), "tools") or None
    if isinstance(tools, list):
        tools = _cleaned([_parsed(tool, f"tools[{index}]") for index, tool in enumerate(tools)], "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable(Reason.BAD_TOOLS, f"tools is {_shown(tools)}, expected a list of JSON schemas")
    _check_json(given, "chat_template_kwargs")
    _check_json(tools, "tools")
    return tools, given or None


def check_text(text: str, where: str) -> None:
    """Refuse text that is not valid Unicode.

    Raises:
        Unusable: It has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(Reason.INVALID_UTF8, f"{where}: {error.reason} at character {error.start}") from error


def is_rendered(text: str) -> bool:
    """Return whether text is the output of a well-known chat template: it begins with the mark of a turn, and has another."""
    return _TEMPLATED.match(text.lstrip()) is not None


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise Unusable(Reason.NOT_TEXT, f"{where} is no message with role and content: {_shown(value)}")
    message: Message = _cleaned(value, where)
    for name, name_in_sharegpt in (("role", "from"), ("content", "value")):
        if name not in message and name_in_sharegpt in message:
            message[name] = message.pop(name_in_sharegpt)
    if "role" not in message:
        raise Unusable(Reason.NOT_TEXT, f"{where} is no message with role and content: {_shown(value)}")
    role = message["role"]
    name = role.strip().lower() if isinstance(role, str) else ""
    calls = _sharegpt_calls(message.get("content")) if name == "function_call" else None
    if calls is not None:
        message |= {"role": "assistant", "content": None, "tool_calls": calls}
    elif name in _ROLES:
        message["role"] = _ROLES[name]
    else:
        expected = f"{', '.join(_ROLES)}, or function_call with the name and arguments of a call as JSON"
        raise Unusable(Reason.UNKNOWN_ROLE, f"{where}.role is {_shown(role)}, expected one of {expected}")
    calls = _tool_calls(message.get("tool_calls"), f"{where}.tool_calls")
    message["content"] = _content(message.get("content"), f"{where}.content", may_be_null=calls is not None)
    if calls is not None:
        message["tool_calls"] = calls
    else:
        message.pop("tool_calls", None)
    if not is_plain(message):
        _check_json(message, where)
    return message


def _sharegpt_calls(content: object) -> list[dict[str, Any]] | None:
    """Return the calls in the content of ShareGPT's role `function_call`: JSON of one call or of a list of calls."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _cleaned(value: object, where: str) -> Any:
    """Return a value of Parquet as the JSON that it was: no keys whose value is null, and dates as text.

    A column of Parquet has one type, so that every object gets the keys of all others in its place, null where it has none.
    This goes for the arguments of calls too. Items of a list are not filled in: a null there stays.

    Raises:
        Unusable: It is nested too deep.
    """
    try:
        return _without_nulls(value)
    except RecursionError as error:
        raise Unusable(Reason.NOT_TEXT, f"{where} is no JSON: {error}") from error


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def _content(content: object, where: str, may_be_null: bool) -> str | list[dict[str, Any]] | None:
    if content is None:
        if may_be_null:
            return None
        raise Unusable(Reason.MISSING_VALUE, f"{where} has no value")
    if isinstance(content, str):
        check_text(content, where)
        return content
    if not isinstance(content, list) or not content:
        raise Unusable(Reason.NOT_TEXT, f"{where} is a {type(content).__name__}, expected text or text parts")
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: object, where: str) -> dict[str, Any]:
    given = part if isinstance(part, dict) else {}
    if given.get("type", "text") != "text" or not isinstance(given.get("text"), str):
        kind = f"of type {given['type']!r}" if "type" in given else f"{_shown(part)}"
        raise Unusable(Reason.NOT_TEXT, f"{where} is a part {kind}, expected a part of type 'text' with its text")
    return {"type": "text", **given}


def _tool_calls(value: object, where: str) -> list[dict[str, Any]] | None:
    calls = _cleaned(_parsed(value, where), where)
    if not calls:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unusable(Reason.BAD_TOOLS, f"{where} is {_shown(calls)}, expected a list of calls")
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(Reason.BAD_TOOLS, f"{where}[{index}] names no function: {_shown(call)}")
    return calls


def _parsed(value: object, where: str) -> object:
    """Return a value that may be given as JSON text, as in Parquet files, whose columns need one type."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise Unusable(Reason.BAD_TOOLS, f"{where} is no valid JSON: {error}") from error


def _check_json(value: object, where: str) -> None:
    """Refuse what a chat template cannot be given, and a store cannot keep: dates, bytes, NaN, lone surrogates."""
    try:
        text = canonical_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable(Reason.NOT_TEXT, f"{where} is no JSON: {error}") from error
    check_text(text, where)


def _shown(value: object) -> str:
    return repr(value)[:80]
