"""Where each message of a response stands, if there are several: calls of tools, their results, and the answer.

Called by `tokenizer.py` for stage annotate. The ids do not say it, and a text may stand in several places: the result of a tool
is often among the arguments of a call. So the chat is rendered again up to each message, and with another text in its place.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.render_process import RenderError
from pipeline.chat.rendering import Chat
from pipeline.chat.template import PROBE, ChatTemplate
from pipeline.source.messages import Message, Unusable, texts_of
from weights_store.schemas import Reason


class Turn(NamedTuple):
    """One message of a response as the template prints it; places count the characters of the response."""

    role: str
    start: int
    """The message begins here: behind the generation prompt, if it is the assistant's, else where the one before has ended."""
    at: int | None
    """Its text begins here, with the white space that the template keeps; None if it has none, or is printed in another way."""
    end: int | None
    """Its text ends here."""


class Turns(NamedTuple):
    """A response of several messages as text, which may go on with what the template prints after the last one."""

    text: str
    turns: list[Turn]


def find_turns(template: ChatTemplate, controls: ControlTokens, chat: Chat, messages: list[Message]) -> Turns:
    """Return where the messages of a response to a chat stand, in the form that the template takes.

    Raises:
        Unusable: The template refuses a part of the chat, or it is unknown where a message begins.
    """
    parts: list[Any] = [chat.messages, chat.tools, chat.chat_template_kwargs, messages]
    if controls.are_in(parts):
        parts = controls.hide(parts)
    before, tools, arguments, hidden = parts
    contents = ["".join(texts_of(message)).strip() for message in hidden]
    prompt, whole, beginnings, others = _rendered(template, before, hidden, tools, arguments)
    places = [
        _place(whole, content, text) if content and isinstance(text, str) else None
        for content, text in zip(contents, others, strict=True)
    ]
    mark = template.generation_prompt.removesuffix(chat.dropped.strip()).strip()
    starts = [len(prompt.removesuffix(chat.dropped) + chat.added)]
    for place, text in enumerate(beginnings, start=1):
        start = _end_of(controls, text, whole)
        if start is None:
            known = places[place - 1]
            low = starts[-1] if known is None else known[1]
            high = None if (own := places[place]) is None else own[0]
            is_own = hidden[place]["role"] == "assistant"
            start = _behind(whole, mark if is_own else template.turn_end or "", low, high)
        starts.append(start)
    return _shown(controls, messages, whole, starts, places)


def _rendered(
    template: ChatTemplate,
    before: list[Message],
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    arguments: dict[str, Any] | None,
) -> tuple[str, str, list[str | RenderError], list[str | RenderError]]:
    """Return the prompt, the whole chat, what there is before each message but the first, and chats with another text in one.

    Raises:
        Unusable: The template refuses the prompt or the whole chat.
    """
    turns = {"prompt": before} | {str(place): [message] for place, message in enumerate(messages)}
    turns |= {f"other {place}": [{**message, "content": PROBE}] for place, message in enumerate(messages)}
    names = [str(place) for place in range(len(messages))]
    chats = [
        (("prompt",), True),
        (("prompt", *names), False),
        *((("prompt", *names[:end]), messages[end]["role"] == "assistant") for end in range(1, len(names))),
        *((("prompt", *names[:at], f"other {at}", *names[at + 1 :]), False) for at in range(len(names))),
    ]
    prompt, whole, *texts = template.rendered(template.job(turns, chats, tools, arguments)).texts
    return template.text_of(prompt), template.text_of(whole), texts[: len(names) - 1], texts[len(names) - 1 :]


def _end_of(controls: ControlTokens, beginning: str | RenderError, whole: str) -> int | None:
    """Return where a beginning of a chat ends in it; None if the template prints a last message in another way than others."""
    if isinstance(beginning, RenderError):
        return None
    end = controls.num_common(beginning, whole)
    return end if end >= len(beginning.rstrip()) else None


def _place(whole: str, content: str, other: str) -> tuple[int, int] | None:
    """Return where a text begins and ends in a chat, given the chat with another one in its place; None if it is changed."""
    before, found, behind = other.partition(PROBE)
    at, end = len(before), len(whole) - len(behind)
    is_there = found and whole.startswith(before) and whole.endswith(behind) and whole[at:end].strip() == content
    return (at, end) if is_there else None


def _behind(whole: str, mark: str, low: int, high: int | None) -> int:
    """Return the end of the first mark of the template from `low` on and before `high`, and of the white space behind it.

    If there is none, as between several results of tools in one turn, it is `high`.

    Raises:
        Unusable: There is neither.
    """
    at = whole.find(mark, low, high) if mark else -1
    if at >= 0:
        end = at + len(mark)
        return end + len(whole[end:high]) - len(whole[end:high].lstrip())
    if high is None:
        raise Unusable(Reason.TEMPLATE_MISMATCH, "it is unknown where a message of the response begins")
    return high


def _shown(
    controls: ControlTokens,
    messages: Sequence[Message],
    whole: str,
    starts: Sequence[int],
    places: Sequence[tuple[int, int] | None],
) -> Turns:
    """Return places in the response's text, with what was hidden in it.

    Raises:
        Unusable: A message begins before the one in front of it.
    """
    if list(starts) != sorted(starts) or any(at and at[0] < start for at, start in zip(places, starts, strict=True)):
        raise Unusable(Reason.TEMPLATE_MISMATCH, "it is unknown where the messages of the response begin")

    def shown(end: int) -> int:
        return len(controls.show(whole[starts[0] : end]))

    return Turns(
        controls.show(whole[starts[0] :]),
        [
            Turn(message["role"], shown(start), *((None, None) if at is None else map(shown, at)))
            for message, start, at in zip(messages, starts, places, strict=True)
        ],
    )
