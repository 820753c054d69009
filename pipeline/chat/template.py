"""Renders chats with a model's chat template, and says what of a chat the template would leave out.

Messages, tools and arguments go to the template as TRL gives them to it. A template is code of somebody else: it runs in a
process of its own within limits (`render_process.py`), and what it raises makes one row unusable. One that does not compile, or
breaks the limits on a short chat, is refused before a row is rendered.
"""

import datetime
import inspect
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.render_child import MAX_BROKEN_LIMITS
from pipeline.chat.render_process import RENDERER, Job, Pending, Rendered, RenderError
from pipeline.source.messages import Message, Unusable
from weights_store.errors import InputError
from weights_store.schemas import Reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Probe7Zq"
"""A word that stands in no template: where it is printed, a template prints what it was given."""
_TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": {"type": "object"}}}
_MAX_CHARACTERS = 10_000_000
"""More characters than any template needs for one short message."""
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_LINKS = frozenset({"id", "type", "index", "tool_call_id", "strict"})
"""Keys that link a call and its result, or repeat what is known: templates that print these in order do without."""
_DETAILS = re.compile(r"tools\[\d+\](\.function)?\.(parameters|return)\.")
"""Inside of JSON schemas: templates print of them what the model was trained with."""


def may_be_unread(path: str, role: str = "") -> bool:
    """Return whether a template may leave out a key without a loss: it links a call and its result, or is a schema's detail."""
    key = path.rpartition(".")[2]
    return key in _LINKS or (key == "name" and role == "tool") or _DETAILS.match(path) is not None


class Closing(NamedTuple):
    """What a template prints after the text of the last turn."""

    text: str
    end: str
    """Its beginning that a model generates: what it prints there between two turns, without white space at the end.

    A newline and an EOS token for the whole text (Phi-3) are not in it. Empty if the template ends turns with nothing.
    """


class ChatTemplate:
    """A chat template on a tokenizer: chats in, text out.

    Args:
        tokenizer: It renders, and gives the texts of its special tokens to the template.
        controls: Its control tokens.
        template: Text of the template, and of that for chats with tools if there is another.
        name: How messages call it.
        date: What `strftime_now` prints.

    Raises:
        InputError: The template does not compile, does not finish, prints the date of the day and no `date` is given, or prints
            something else each time.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        controls: ControlTokens,
        template: str,
        tool_template: str,
        name: str,
        date: datetime.date | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.special_tokens_map
        self._controls = controls
        self._templates = (template, tool_template)
        self.name = name
        self._date = None if date is None else date.isoformat()
        self._num_broken_limits = 0
        self.needs_alone = False
        """Whether chats are also rendered without a generation prompt, because responses have not begun with that."""
        self.known_shapes: set[tuple[object, ...]] = set()
        """Chats, as roles, of which every text is printed."""
        if date is None and (prints_date(template) or prints_date(tool_template)):
            raise InputError(
                f'{name} prints the date of the day: set model.template_date to a fixed one, such as "2026-01-31", so that '
                "all rows and later builds have the same"
            )
        if _CHANCE.search(template) or _CHANCE.search(tool_template):
            raise InputError(f"{name} prints something else each time: give one without `random` and `lipsum`")
        self._check()

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        arguments: dict[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return a chat as text.

        Raises:
            Unusable: The template refuses the chat.
            InputError: The template has broken its limits of time or memory too often.
        """
        job = self.job({"chat": messages}, [(("chat",), add_generation_prompt)], tools, arguments)
        return self.text_of(self.rendered(job).texts[0])

    def job(
        self,
        turns: dict[str, list[Message]],
        chats: Sequence[tuple[Sequence[str], bool]],
        tools: list[dict[str, Any]] | None = None,
        arguments: dict[str, Any] | None = None,
        watch: bool = False,
    ) -> Job:
        """Return the job to render several chats that share turns."""
        return Job(self._templates, self._special_tokens, self._date, turns, chats, tools, arguments, watch)

    def rendered(self, job: Job, pending: Pending | None = None) -> Rendered:
        """Return what became of a job, which may have been submitted before; `text_of` looks at its texts.

        Raises:
            InputError: The template has broken its limits of time or memory too often.
        """
        (pending,) = RENDERER.submit([job]) if pending is None else [pending]
        rendered = pending.result()
        broken = [text for text in rendered.texts if isinstance(text, RenderError) and text.kind == "limit"]
        self._num_broken_limits += bool(broken)
        if broken and self._num_broken_limits >= MAX_BROKEN_LIMITS:
            RENDERER.stop()  # others of its chats are under way
            raise InputError(
                f"{self.name} could not render {self._num_broken_limits} chats within its limits: {broken[0].text}; give "
                "another one in model.chat_template"
            )
        if any("tool_calls" in message for messages in job.turns.values() for message in messages):
            return rendered._replace(texts=[_with_remedy(text) for text in rendered.texts])
        return rendered

    def text_of(self, rendered: str | RenderError) -> str:
        """Return the text of a chat.

        Raises:
            Unusable: The template has refused the chat.
        """
        if isinstance(rendered, str):
            return rendered
        verb = "cannot render" if rendered.kind in ("limit", "overflow") else "refuses"
        raise Unusable(Reason.TEMPLATE_MISMATCH, f"{self.name} {verb} this chat: {rendered.text}") from rendered

    def closing(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, arguments: dict[str, Any] | None
    ) -> Closing:
        """Return what the template prints after the text of a response to a chat.

        Raises:
            Unusable: It does not print the response.
        """
        return self._usual_closing or self._closing(messages, tools, arguments)

    @cached_property
    def generation_prompt(self) -> str:
        """What follows a user's text when the assistant is to answer, without white space around it; may be empty."""
        try:
            text = self.render([{"role": "user", "content": PROBE}], add_generation_prompt=True)
        except Unusable:
            return ""
        return text.rpartition(PROBE)[2].strip()

    @cached_property
    def turn_end(self) -> str | None:
        """What ends every turn of the assistant, without white space around it; None if nothing does."""
        return self._usual_closing.end.strip() or None if self._usual_closing else None

    @cached_property
    def _usual_closing(self) -> Closing | None:
        """What follows every response; None if that is nothing that can be recognised, or this chat is refused."""
        try:
            closing = self._closing([{"role": "user", "content": PROBE}], None, None)
        except Unusable:
            return None
        return closing if closing.text.strip() else None

    def _closing(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, arguments: dict[str, Any] | None
    ) -> Closing:
        answered: list[Message] = [*messages, {"role": "assistant", "content": PROBE}]
        _, found, closing = self.render(answered, tools, arguments).rpartition(PROBE)
        if not found:
            raise Unusable(Reason.TEMPLATE_IGNORES, f"{self.name} leaves out the response")
        try:
            longer = self.render([*answered, {"role": "user", "content": "?"}], tools, arguments)
        except Unusable:
            return Closing(closing, closing.rstrip())
        end = closing[: self._controls.num_common(closing, longer.rpartition(PROBE)[2])]
        return Closing(closing, end.rstrip() or closing.rstrip())

    def adapt(self, messages: list[Message]) -> list[Message]:
        """Return messages in the form that the template takes.

        A developer turn is a system turn for a template that does not know developers. Text parts are joined by a newline for a
        template that takes only text, as vLLM does it. The content of a tool call without text is null or empty text.

        Raises:
            Unusable: Text parts have more than text, and the template does not take parts.
        """
        return [self._adapted(message, f"message {index}") for index, message in enumerate(messages)]

    def check_arguments(self, arguments: dict[str, Any] | None, unprinted_keys: Collection[str] = ()) -> None:
        """Refuse arguments of a row that are no variables of the template, except `unprinted_keys`.

        Raises:
            Unusable: There are such arguments.
        """
        for key in arguments or {}:
            if key in self._own_arguments:
                raise Unusable(Reason.BAD_TOOLS, f"chat_template_kwargs.{key} cannot be set by a row")
            if key not in unprinted_keys and not any(_mentions(text, key) for text in self._templates):
                raise Unusable(
                    Reason.TEMPLATE_IGNORES, f"{self.name} has no variable {key!r}, which chat_template_kwargs sets"
                )

    def _adapted(self, message: Message, where: str) -> Message:
        adapted = dict(message)
        if message["role"] == "developer" and not self._knows_developer:
            adapted["role"] = "system"
        if "tool_calls" in message and not message["content"] and message["content"] not in self._empty_contents:
            adapted["content"] = self._empty_contents[0] if self._empty_contents else ""
        if isinstance(message["content"], list) and not self._takes_parts:
            extra = {key for part in message["content"] for key in part} - {"type", "text"}
            if extra:
                raise Unusable(
                    Reason.TEMPLATE_IGNORES, f"{self.name} leaves out {', '.join(sorted(extra))} of {where}'s parts"
                )
            adapted["content"] = "\n".join(part["text"] for part in message["content"])
        return adapted

    @cached_property
    def _own_arguments(self) -> frozenset[str]:
        """Arguments of `apply_chat_template` that are no variables of a template, and names that a row must not replace."""
        parameters = set(inspect.signature(self._tokenizer.apply_chat_template).parameters) - {"documents"}
        return frozenset(parameters | {"messages", "strftime_now", "raise_exception"})

    @cached_property
    def _knows_developer(self) -> bool:
        return any("developer" in text for text in self._templates)

    @cached_property
    def _takes_parts(self) -> bool:
        turns: dict[str, list[Message]] = {"chat": [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]}
        rendered = self.rendered(self.job(turns, [(("chat",), True)], watch=True))
        is_read = "chat[0].content[0].text" not in dict(rendered.unread)
        return is_read and isinstance(rendered.texts[0], str) and PROBE in rendered.texts[0]

    @cached_property
    def _empty_contents(self) -> list[str | None]:
        """The contents, null and empty text, of a tool call that the template prints, and without the word None."""
        call = {"id": "call00001", "type": "function", "function": {"name": PROBE, "arguments": "{}"}}
        contents = []
        for content in (None, ""):
            chat: list[Message] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": content, "tool_calls": [call]},
            ]
            with suppress(Unusable):
                text = self.render(chat, [_TOOL])
                if PROBE in text and "None" not in text:
                    contents.append(content)
        return contents

    def _check(self) -> None:
        """Render short chats, and refuse a template that breaks on all. Others may want tools or roles: each row is asked."""
        turns: dict[str, list[Message]] = {role: [{"role": role, "content": PROBE}] for role in ("user", "assistant")}
        for tools in (None, [_TOOL]):
            chats = [(("user",), True), (("user", "assistant"), False)]
            for text in self.rendered(self.job(turns, chats, tools)).texts:
                if isinstance(text, RenderError):
                    self._check_kind(text)
                elif len(text) > _MAX_CHARACTERS:
                    raise InputError(f"{self.name} makes {len(text):,} characters of one short message")

    def _check_kind(self, error: RenderError) -> None:
        if error.kind == "syntax":
            raise InputError(f"{self.name} is no valid Jinja: {error.text}") from error
        if error.kind in ("limit", "overflow"):
            raise InputError(f"{self.name} cannot render even one short message: {error.text}") from error


def _with_remedy(rendered: str | RenderError) -> str | RenderError:
    """Return what became of a chat with calls; a template that was given another type than it expects wants other calls."""
    if isinstance(rendered, str) or rendered.kind != "type":
        return rendered
    remedy = "write tool calls as this template takes them, see docs/chats.md on `arguments`"
    return RenderError("type", f"{rendered.text}; {remedy}")


def prints_date(template: str) -> bool:
    """Return whether a template prints the date of the day."""
    return _mentions(template, "strftime_now")


def _mentions(template: str, variable: str) -> bool:
    """Return whether a template has a variable of this name, and not only a key or a text."""
    return re.search(rf"(?<![\w.'\"]){re.escape(variable)}(?![\w'\"])", template) is not None
