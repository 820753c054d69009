"""Cuts two conversations into what comes before the responses, and the two responses.

A response is usually one assistant turn. It may have several: calls of tools, their results, and the answer.
"""

from pipeline.source.messages import Message, Unusable, is_empty, is_plain
from weights_store.schemas import Reason

Response = str | list[Message]
"""The text of one assistant turn; messages if there is more than that."""

_GIVEN_ROLES = ("system", "developer", "user")
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
    (before, first), (other_before, second) = _cut(chosen), _cut(rejected)
    if before and other_before and before != other_before:
        raise Unusable(Reason.PROMPTS_DIFFER, "the turns before the two responses are not the same")
    num_shared = _num_shared(first, second)
    before = (before or other_before) + first[:num_shared]
    return before, _response(first[num_shared:]), _response(second[num_shared:])


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


def _cut(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Cut a conversation where its last response begins: behind a turn of the user or the system.

    Also between two assistant turns in a row if the first calls no tool: a model ends its turn once.
    """
    start = len(turns) - 1
    while start and turns[start - 1]["role"] not in _GIVEN_ROLES and not _is_finished(turns[start - 1], turns[start]):
        start -= 1
    return turns[:start], turns[start:]


def _is_finished(turn: Message, following: Message) -> bool:
    return turn["role"] == following["role"] == "assistant" and "tool_calls" not in turn


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
