"""Cuts two conversations into what comes before the responses, and the two responses.

A response is usually one assistant turn. It may have several: calls of tools, their results, and the answer.
"""

from pipeline.source.messages import SYSTEM_ROLES, Message, Unusable, is_empty, is_plain
from weights_store.schemas import Reason

Response = str | list[Message]
"""The text of one assistant turn; messages if there is more than that, and none for a side without a response."""

_GIVEN_ROLES = (*SYSTEM_ROLES, "user")
"""Roles of turns that the model never writes, and that are no answer to its own calls."""


def split_responses(
    chosen: list[Message], rejected: list[Message], columns: tuple[str, str]
) -> tuple[list[Message], Response, Response]:
    """Return the turns before the responses, and both responses.

    Turns that both sides begin with are no response: they come before it.

    Raises:
        Unusable: A side ends with no assistant turn or an empty one, or the turns before differ.
    """
    for turns, column in zip((chosen, rejected), columns, strict=True):
        _check_end(turns, column)
    first, second = _whole(chosen, rejected), _whole(rejected, chosen)
    start = max(_start(first), _start(second))
    if start >= min(len(first), len(second)) or first[:start] != second[:start]:
        raise Unusable(Reason.PROMPTS_DIFFER, "the turns before the two responses are not the same")
    start += _num_shared(first[start:], second[start:])
    return first[:start], _response(first[start:]), _response(second[start:])


def split_response(turns: list[Message], column: str) -> tuple[list[Message], Response]:
    """Return the turns before the only response of a row, and the response.

    Raises:
        Unusable: The turns end with no assistant turn or an empty one.
    """
    _check_end(turns, column)
    start = _start(turns)
    return turns[:start], _response(turns[start:])


def is_whole(turns: list[Message]) -> bool:
    """Return whether turns are a chat from its beginning: it begins with what was given to the model."""
    return bool(turns) and turns[0]["role"] in _GIVEN_ROLES


def as_turns(response: Response) -> list[Message]:
    """Return a response as messages."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _check_end(turns: list[Message], column: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise Unusable(
            Reason.NO_FINAL_ASSISTANT_TURN, f"column {column!r} ends with {last}, expected an assistant turn"
        )
    if is_empty(turns[-1]):
        raise Unusable(Reason.EMPTY_RESPONSE, f"column {column!r} has an empty response")


def _whole(turns: list[Message], other: list[Message]) -> list[Message]:
    """Return a response that stands alone as an answer to the whole chat of the other side, if that is one."""
    return other[: _start(other)] + turns if is_whole(other) and _start(turns) == 0 else turns


def _start(turns: list[Message]) -> int:
    """Return where the last response of a conversation begins: behind a turn of the user or the system.

    Also between two assistant turns in a row, for a model ends its turn once, unless one of them calls a tool: what is said
    before a call belongs to it.
    """
    start = len(turns) - 1
    while start and turns[start - 1]["role"] not in _GIVEN_ROLES and not _is_finished(turns[start - 1], turns[start]):
        start -= 1
    return start


def _is_finished(turn: Message, following: Message) -> bool:
    both_speak = turn["role"] == following["role"] == "assistant"
    return both_speak and "tool_calls" not in turn and "tool_calls" not in following


def _num_shared(first: list[Message], second: list[Message]) -> int:
    """Return how many turns both responses begin with; what is left of each begins with an assistant turn."""
    alike = 0
    while alike < min(len(first), len(second)) - 1 and first[alike] == second[alike]:
        alike += 1
    while alike and not (first[alike]["role"] == second[alike]["role"] == "assistant"):
        alike -= 1
    return alike


def _response(turns: list[Message]) -> Response:
    return turns[0]["content"] if len(turns) == 1 and is_plain(turns[0]) else turns
