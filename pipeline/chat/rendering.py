"""Renders one pair: the text of the prompt, and of both responses up to their end of turn. One side may have no response.

Where a prompt ends and a response begins is decided here, and what a template must not leave out. Ids: `tokenizer.py`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.render_process import RENDERER, Job, Pending, Rendered
from pipeline.chat.template import PROBE, ChatTemplate, Closing, may_be_unread
from pipeline.source.messages import Message, Unusable, is_plain
from weights_store.fingerprint import ordered_json
from weights_store.schemas import SIDES, Reason


@dataclass(frozen=True, slots=True)
class Chat:
    """What stands before a response. The tokens table keeps it as JSON, so that a contrastive prompt can be put in front."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dropped: str = ""
    """End of the template's generation prompt that no response follows, such as an opening `<think>`: not in the prompt."""
    added: str = ""
    """What the template prints between its generation prompt and both responses, such as `<think></think>`: in the prompt."""

    def to_json(self) -> str:
        """Return a JSON text without the fields that are empty."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return ordered_json({name: value for name, value in values.items() if value})

    @classmethod
    def from_json(cls, text: str) -> "Chat":
        """Read what `to_json` has made."""
        return cls(**json.loads(text))


class RenderedPair(NamedTuple):
    """One pair as text. Its control tokens in messages are hidden, see `ControlTokens.hide`."""

    chat: Chat
    prompt: str
    responses: tuple[str, str]
    """Empty for a side without a response."""
    left_out: frozenset[str]
    """Keys that the template does not print, and that say nothing which it would have to."""


class PairRenderer:
    """One pair, as the template gets it."""

    def __init__(
        self,
        template: ChatTemplate,
        controls: ControlTokens,
        chat: Chat,
        responses: tuple[list[Message], list[Message]],
        eos_token: str,
    ) -> None:
        self._template, self._controls, self._chat, self._eos_token = template, controls, chat, eos_token
        parts: list[Any] = [chat.messages, chat.tools, chat.chat_template_kwargs, *responses]
        self.is_hidden = controls.are_in(parts)
        """Whether control tokens in the texts are hidden, as some are there."""
        if self.is_hidden:
            parts = controls.hide(parts)
        self._messages, self._tools, self._arguments = parts[:3]
        self._responses: dict[str, list[Message]] = {
            side: turns for side, turns in zip(SIDES, parts[3:], strict=True) if turns
        }
        self._pending: Pending | None = None

    @cached_property
    def prompt(self) -> str:
        """The chat and the template's generation prompt.

        Raises:
            Unusable: The template refuses the chat.
        """
        if self._pending is None:  # the chats with the responses may never be needed
            return self._render(self._messages, add_generation_prompt=True)
        return self._template.text_of(self._rendered.texts[0])

    def pair(self, unprinted_keys: frozenset[str] = frozenset()) -> RenderedPair:
        """Return the whole pair as text; the template may leave out `unprinted_keys`.

        Raises:
            Unusable: The template refuses the chat, or would leave out or change a part of it.
        """
        prompt, *whole = map(self._template.text_of, self._rendered.texts[: 1 + len(self._responses)])
        self._check_texts(self._messages, prompt, "prompt")
        for (side, response), text in zip(self._responses.items(), whole, strict=True):
            self._check_texts(response, text, side)
        left_out = self._check_keys(unprinted_keys)
        closing = self._template.closing(self._messages, self._tools, self._arguments)
        bodies, ends = zip(*(self._cut_end(text, closing) for text in whole), strict=True)
        starts = [_start(body, response) for body, response in zip(bodies, self._responses.values(), strict=True)]
        if all(body.startswith(prompt) for body in bodies):
            added, dropped = _lead(len(prompt), bodies, starts), ""
        else:
            added, dropped = "", self._unanswered(prompt, bodies, starts)
        prompt = prompt.removesuffix(dropped) + added
        texts = dict.fromkeys(SIDES, "") | {
            side: body[len(prompt) :] + end for side, body, end in zip(self._responses, bodies, ends, strict=True)
        }
        chat = replace(self._chat, dropped=dropped, added=added)
        return RenderedPair(chat, prompt, (texts["chosen"], texts["rejected"]), left_out)

    @cached_property
    def job(self) -> Job:
        """Renders the prompt and, if there are any, the chats with each response."""
        turns: dict[str, list[Message]] = {"prompt": self._messages, **self._responses}
        is_plain_chat = not self._tools and all(
            is_plain(message) for messages in turns.values() for message in messages
        )
        whole: list[tuple[tuple[str, ...], bool]] = [(("prompt", side), False) for side in self._responses]
        if whole and self._template.needs_alone:
            whole.append((("prompt",), False))
        return self._template.job(turns, [(("prompt",), True), *whole], self._tools, self._arguments, not is_plain_chat)

    @cached_property
    def _rendered(self) -> Rendered:
        return self._template.rendered(self.job, self._pending)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, self._arguments, add_generation_prompt)

    def _cut_end(self, text: str, closing: Closing) -> tuple[str, str]:
        """Cut a whole chat before the end of its last turn. Return that, and the end as a model generates it.

        EOS ends a turn that has no end of its own.
        """
        if closing.text.strip() and not text.endswith(closing.text):  # calls of tools may end in another way
            body = text.rstrip()
            return body, "" if self._controls.ends_with_one(body) else self._eos_token
        return text.removesuffix(closing.text), closing.end or self._eos_token

    def _unanswered(self, prompt: str, bodies: tuple[str, ...], starts: list[int | None]) -> str:
        """Return the end of a generation prompt that the responses do not repeat, as TRL leaves it out of the prompt.

        Raises:
            Unusable: It would be more than the generation prompt.
        """
        cut = self._controls.num_common(prompt, *bodies)
        cut = min(cut, *(start for start in starts if start is not None), cut)
        self._template.needs_alone = True
        last = self._rendered.texts[1 + len(self._responses) :]
        alone = self._template.text_of(last[0]) if last else self._render(self._messages)
        if cut < len(prompt[: self._controls.num_common(prompt, alone)].rstrip()):
            detail = "the chat with the response does not begin with the rendered prompt"
            raise Unusable(Reason.TEMPLATE_MISMATCH, detail)
        return prompt[cut:]

    def _check_texts(self, messages: list[Message], text: str, name: str) -> None:
        """Check that every content is printed. A template may change it, as those do that leave out earlier reasoning.

        The first chat of each shape is rendered again with another word in each place: a short text stands anywhere.

        Raises:
            Unusable: A content is not printed.
        """
        before = [] if name == "prompt" else self._messages
        shape = (
            len(before),
            bool(self._tools),
            *((turn["role"], "tool_calls" in turn) for turn in (*before, *messages)),
        )
        is_known = shape in self._template.known_shapes
        places, position = [], 0
        for index, message in enumerate(messages):
            content = message["content"]
            if not isinstance(content, str) or not content.strip():
                continue
            found = _find(text, content.strip(), position) if is_known else -1
            position = max(position, found)
            if found < 0:
                places.append(index)
        for index in self._unprinted(before, messages, places):
            role = messages[index]["role"]
            detail = f"{self._template.name} leaves out the text of {name}[{index}] (role {role})"
            raise Unusable(Reason.TEMPLATE_IGNORES, detail)
        self._template.known_shapes.add(shape)

    def _unprinted(self, before: list[Message], messages: list[Message], places: list[int]) -> Iterator[int]:
        """Yield the places where another content would not be printed; if it would be refused, this one was looked at.

        All contents are replaced at once. Only where that does not answer it, one after the other is.
        """
        words = {index: f"{PROBE}{index}q" for index in places}
        try:
            text = self._render_with(before, messages, words) if places else ""
        except Unusable:
            text = ""
        for index, word in words.items():
            try:
                if word not in text and word not in self._render_with(before, messages, {index: word}):
                    yield index
            except Unusable:
                continue

    def _render_with(self, before: list[Message], messages: list[Message], contents: dict[int, str]) -> str:
        changed = [
            {**message, "content": contents.get(index, message["content"])} for index, message in enumerate(messages)
        ]
        return self._render([*before, *changed], add_generation_prompt=messages is self._messages)

    def _check_keys(self, unprinted_keys: frozenset[str]) -> frozenset[str]:
        """Return the names of the keys that the template has not read and need not.

        Raises:
            Unusable: It has not read others.
        """
        paths = [
            (path, role)
            for path, role in self._rendered.unread
            if not unprinted_keys.intersection(re.findall(r"\w+", path))
        ]
        lost = [path for path, role in paths if not may_be_unread(path, role)]
        if lost:
            names = ", ".join(lost[:5]) + (" …" if len(lost) > 5 else "")
            detail = (
                f"{self._template.name} leaves out {names}; list keys that it may leave out in dataset.unprinted_keys"
            )
            raise Unusable(Reason.TEMPLATE_IGNORES, detail)
        return frozenset(path.rpartition(".")[2] for path, _ in paths)


def begin(renderers: Sequence[PairRenderer]) -> None:
    """Begin to render several pairs at once, in the other process."""
    for renderer, pending in zip(renderers, RENDERER.submit([renderer.job for renderer in renderers]), strict=True):
        renderer._pending = pending


def _find(text: str, part: str, position: int) -> int:
    """Return where a part stands, first looked for from a position; -1 if nowhere.

    Turns are printed in order, so that all texts of a chat together are looked for in one pass.
    """
    found = text.find(part, position)
    return found if found >= 0 else text.find(part, 0, position + len(part))


def _start(body: str, response: list[Message]) -> int | None:
    """Return where a response of one text begins; None if it is more than a text, or has other white space than that.

    Raises:
        Unusable: The template changes more than white space of its last turn.
    """
    answer = response[-1]
    content = answer["content"]
    if not isinstance(content, str) or answer.get("tool_calls"):
        return None
    core, trimmed = content.strip(), body.rstrip()
    if not trimmed.endswith(core):
        if "".join(body.split()).endswith("".join(content.split())):
            return None
        raise Unusable(Reason.TEMPLATE_MISMATCH, "the chat template changes the response's text")
    if len(response) > 1 or not is_plain(answer):
        return None
    start = len(trimmed) - len(core)
    leading = content[: content.find(core)]
    return start - len(leading) if body[:start].endswith(leading) else start


def _lead(start: int, bodies: tuple[str, ...], starts: list[int | None]) -> str:
    """Return what the template prints before the text of both responses: nobody wrote it, so it belongs to the prompt.

    Spaces at its end stay with the responses, for a tokenizer joins them with the word that follows.
    """
    if None in starts:
        return ""
    leads = {body[start:own].rstrip(" ") for body, own in zip(bodies, starts, strict=True)}
    return leads.pop() if len(leads) == 1 and next(iter(leads)).strip() else ""
