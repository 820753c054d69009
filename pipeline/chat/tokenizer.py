"""Turns pairs into ids with a model's tokenizer and chat template: the only place in the project that tokenises.

A response is the text that the template puts after the generation prompt, up to and including the end-of-turn token. What a
template prints after that token (often a newline) is left out: the model would never generate it.
"""

import datetime
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.rendering import Chat, PairRenderer
from pipeline.chat.template import ChatTemplate, prints_date
from pipeline.source.messages import SYSTEM_ROLES, Message, Unusable, is_empty, is_rendered, texts_of
from pipeline.source.pairs import Pair
from pipeline.source.responses import as_turns
from train.model.checkpoint import load_tokenizer
from weights_store.errors import InputError
from weights_store.fingerprint import (
    fingerprint,
    fingerprint_text,
    fingerprint_tokenizer,
    load_chat_template,
    load_json,
)
from weights_store.schemas import SIDES, Reason
from weights_store.tables.metadata import TokenizerRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WALLS = ("\n", "|", "0")
"""Characters in front of a response that is tokenised apart from its prompt."""
RENDERING_VERSION = 3
"""Part of the fingerprint of tokens tables; goes up when the same chat, template and tokenizer give other ids than before."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. `chat` is what stands before the responses, without the turns that did not fit."""

    chat: Chat
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_was_cut: bool = False
    response_was_cut: bool = False
    notes: frozenset[str] = frozenset()
    """What people should know of the ids, though nothing is wrong with them."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A contrastive prompt (construction P): text in front of the chat."""

    text: str
    role: Literal["system", "user"]

    def apply(self, prompt: Sequence[Message]) -> list[Message]:
        """Return the chat with the contrastive prompt in front; a system turn that is there is extended, not replaced."""
        messages = [dict(message) for message in prompt]
        roles = SYSTEM_ROLES if self.role == "system" else ("user",)
        if self.role == "system" and (not messages or messages[0]["role"] not in roles):
            return [{"role": "system", "content": self.text}, *messages]
        first = next((message for message in messages if message["role"] in roles), None)
        if first is not None:
            content, start = first["content"], f"{self.text}\n\n"
            is_text = isinstance(content, str)
            first["content"] = start + content if is_text else [{"type": "text", "text": start}, *content]
        return messages


class ChatTokenizer:
    """A tokenizer with its chat template.

    Args:
        folder: Of the model.
        template_file: The recipe's own template, for all chats; None: the model's.
        template_date: What a template prints as the date of the day, if it prints it (`strftime_now`); in ISO format.
        unprinted_keys: Keys of messages and rows that the template may leave out.

    Raises:
        InputError: The folder has no tokenizer, or no chat template and none is given.
    """

    def __init__(
        self,
        folder: Path,
        template_file: str | None = None,
        template_date: str | None = None,
        unprinted_keys: Collection[str] = (),
    ) -> None:
        self.folder = folder
        if template_file is None:
            template, tool_template = load_chat_template(folder), load_chat_template(folder, "tool_use")
        else:
            template, tool_template = _read_template(template_file), None
        if template is None:
            raise InputError(f"model {folder} has no chat template; set model.chat_template to a Jinja file")
        self._template_file = template_file
        self._unprinted_keys = frozenset(unprinted_keys)
        self._template = template
        self._tool_template = tool_template or template
        has_date = prints_date(self._template) or prints_date(self._tool_template)
        self.template_date = template_date if has_date else None
        self._own_fingerprint = own = fingerprint_tokenizer(folder)
        self.rendering_fingerprint = (
            fingerprint({"tokenizer": own, "chat_template": template}) if template_file else own
        )
        """Fingerprint of what turns chats into ids: the tokenizer, and the template if the recipe gives one."""

    def check(self) -> None:
        """Load tokenizer and template, which else happens when text is first tokenised, and compare them with the model.

        Raises:
            InputError: The tokenizer cannot be loaded, has no EOS token, or one that is no id of the model; or the template
                does not compile, does not finish, or prints the date of the day and none is given.
        """
        _ = self._chat_template

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        """Loaded when text is first tokenised: a build with nothing to do needs only the fingerprint."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.eos_token is None:
            raise InputError(
                f"model {self.folder}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json"
            )
        vocab_size = model_number(self.folder, "vocab_size")
        if vocab_size is not None and tokenizer.eos_token_id >= vocab_size:
            raise InputError(
                f"model {self.folder}: the EOS token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, the model has "
                f"{vocab_size} ids (vocab_size in config.json); set eos_token in tokenizer_config.json to one of the model's"
            )
        return tokenizer

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        name = f"the chat template {self._template_file or f'of {self.folder}'}"
        date = datetime.date.fromisoformat(self.template_date) if self.template_date else None
        return ChatTemplate(self._tokenizer, self._controls, self._template, self._tool_template, name, date)

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self._tokenizer)

    @cached_property
    def _eos_token(self) -> str:
        return str(self._tokenizer.eos_token)

    @property
    def eos_token_id(self) -> int:
        """Id of the tokenizer's EOS token."""
        return int(self._tokenizer.eos_token_id)

    def properties(self, vocab_size: int) -> TokenizerRecord:
        """Return what the store records of the tokenizer, which trainers compare with their own.

        `fingerprint` is that of the folder with its own template, `rendering` that with the template that was used.
        """
        return {
            "fingerprint": self._own_fingerprint,
            "rendering": self.rendering_fingerprint,
            "chat_template": fingerprint_text(self._template),
            "vocab_size": vocab_size,
            "eos_token_id": self.eos_token_id,
        }

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id alone; bytes of a split character show as a replacement character."""
        return self._tokenizer.batch_decode([[token_id] for token_id in ids])

    def tokenize_pair(
        self,
        pair: Pair,
        max_prompt_tokens: int,
        max_response_tokens: int,
        cut_response: bool,
        context: int | None = None,
    ) -> TokenizedPair:
        """Tokenise one pair within the limits.

        The oldest turns of a long prompt are dropped. A long response is cut (`cut_response`) or refused. `context` is the
        longest sequence of the model, one position of which the scoring engine needs; None: no limit.

        Raises:
            Unusable: The pair is over a limit, or the template cannot render it or would leave out a part of it.
            InputError: The tokenizer or the template cannot be used, see `check`.
        """
        chat, responses, notes = self._read(pair)
        num_turns = len(chat.messages)
        while True:
            renderer = PairRenderer(self._chat_template, self._controls, chat, responses, self._eos_token)
            prompt_ids = self._controls.ids(renderer.prompt, renderer.is_hidden)
            if len(prompt_ids) <= max_prompt_tokens:
                rendered = renderer.pair(self._unprinted_keys)
                if rendered.prompt != renderer.prompt:
                    prompt_ids = self._controls.ids(rendered.prompt, renderer.is_hidden)
                if len(prompt_ids) <= max_prompt_tokens:
                    break
            chat = replace(chat, messages=_drop_oldest_exchange(chat.messages, len(prompt_ids), max_prompt_tokens))
        to_ids = partial(self._controls.ids, is_hidden=renderer.is_hidden)
        sides = [_response_ids(to_ids, rendered.prompt, prompt_ids, text) for text in rendered.responses]
        for side, ids in zip(SIDES, sides, strict=True):
            if len(ids) > max_response_tokens and not cut_response:
                detail = f"{side} has {len(ids)} tokens, limit dataset.max_response_tokens = {max_response_tokens}"
                raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
        chosen_ids, rejected_ids = (ids[:max_response_tokens] for ids in sides)
        if chosen_ids == rejected_ids:  # after cutting, or because the template changes the texts
            raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, "the responses have the same tokens")
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if context is not None and longest >= context:
            detail = f"prompt and response have {longest} tokens, the model's context is {context}"
            raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
        return TokenizedPair(
            rendered.chat,
            prompt_ids,
            chosen_ids,
            rejected_ids,
            prompt_was_cut=len(chat.messages) < num_turns,
            response_was_cut=any(len(ids) > max_response_tokens for ids in sides),
            notes=frozenset([*notes, *(f"the chat template does not print `{key}`" for key in rendered.left_out)]),
        )

    def conditioned_prompt_ids(self, prompts: Sequence[str], condition: Condition) -> list[list[int] | None]:
        """Return the ids of stored prompts (JSON of chats) with a contrastive prompt in front, None where it has no place.

        Raises:
            InputError: The template drops or refuses the contrastive prompt in every one of these chats.
        """
        result: list[list[int] | None] = []
        problem = ""
        for text in prompts:
            try:
                result.append(self._conditioned(Chat.from_json(text), condition))
            except Unusable as error:
                problem = error.detail
                result.append(None)
        if prompts and all(ids is None for ids in result):
            other = "user" if condition.role == "system" else "system"
            raise InputError(
                f"the chat template of {self.folder} takes no {condition.role} prompt ({problem}); "
                f'set contrast.role = "{other}"'
            )
        return result

    def _conditioned(self, chat: Chat, condition: Condition) -> list[int]:
        messages = self._chat_template.adapt(condition.apply(chat.messages))
        renderer = PairRenderer(
            self._chat_template, self._controls, replace(chat, messages=messages), ([], []), self._eos_token
        )
        rendered = renderer.prompt
        if condition.text.strip() not in (self._controls.show(rendered) if renderer.is_hidden else rendered):
            raise Unusable(Reason.TEMPLATE_MISMATCH, "the rendered chat does not contain the prompt")
        return self._controls.ids(rendered.removesuffix(chat.dropped) + chat.added, renderer.is_hidden)

    def _read(self, pair: Pair) -> tuple[Chat, tuple[list[Message], list[Message]], frozenset[str]]:
        """Return the chat and the responses of a pair in the form that the template takes, and what there is to note."""
        template, notes = self._chat_template, set()
        template.check_arguments(pair.chat_template_kwargs, self._unprinted_keys)
        sides = []
        for name, turns in (
            ("prompt", pair.prompt),
            ("chosen", as_turns(pair.chosen)),
            ("rejected", as_turns(pair.rejected)),
        ):
            for message in turns:
                for text in texts_of(message):
                    self._check_not_rendered(text, name)
            adapted = template.adapt(turns)
            ended = [self._without_end(message) for message in adapted]
            if ended != adapted:
                notes.add("a text ends with the token that ends a turn; it is there once")
            if name != "prompt" and is_empty(ended[-1]):
                raise Unusable(Reason.EMPTY_RESPONSE, f"{name} is only an end-of-turn token")
            sides.append(ended)
        prompt, chosen, rejected = sides
        return Chat(prompt, pair.tools, pair.chat_template_kwargs), (chosen, rejected), frozenset(notes)

    def _check_not_rendered(self, text: str, name: str) -> None:
        """Refuse text that this template or that of a well-known model has made already: one more around it would be wrong."""
        mark = self._chat_template.generation_prompt
        is_ours = mark and text.rstrip().endswith(mark) and self._controls.are_at_start(text.lstrip())
        if is_ours or is_rendered(text):
            detail = (
                f"{name} is a rendered chat, it begins with {text.strip()[:40]!r}; give messages, or the text alone"
            )
            raise Unusable(Reason.ALREADY_TEMPLATED, detail)

    def _without_end(self, message: Message) -> Message:
        """Return an assistant turn without EOS or the template's end of turn as text at its end: the template ends it."""
        content = message["content"]
        if message["role"] != "assistant" or not content:
            return message
        if isinstance(content, str):
            return {**message, "content": self._cut_ends(content)}
        *others, last = content
        return {**message, "content": [*others, {**last, "text": self._cut_ends(last["text"])}]}

    def _cut_ends(self, text: str) -> str:
        ends = tuple(filter(None, (self._eos_token, self._chat_template.turn_end)))
        while (end := next(filter(text.rstrip().endswith, ends), None)) is not None:
            text = text.rstrip().removesuffix(end)
        return text


def _response_ids(to_ids: Callable[[str], list[int]], prompt: str, prompt_ids: list[int], response: str) -> list[int]:
    """Return the ids of a response after its prompt, with the end-of-turn token.

    Prompt and response are tokenised together, so that no tokenizer adds a space where they meet. If a token would span both,
    the response is tokenised behind a character that joins with nothing, because the model generates after whole prompt tokens.
    """
    joint = to_ids(prompt + response)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    for wall in _WALLS:
        wall_ids, ids = to_ids(wall), to_ids(wall + response)
        if ids[: len(wall_ids)] == wall_ids:
            return ids[len(wall_ids) :]
    return to_ids(response)


def model_number(folder: Path, name: str) -> int | None:
    """Return a number of a model's config.json, where it has one; the text part of a multi-modal model comes first.

    Raises:
        InputError: The file is not valid JSON.
    """
    if not (folder / "config.json").is_file():
        return None
    config = load_json(folder / "config.json")
    text_config = config.get("text_config")
    value = {**config, **text_config}.get(name) if isinstance(text_config, dict) else config.get(name)
    return value if isinstance(value, int) else None


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise InputError(f"model.chat_template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"model.chat_template {path} is not in UTF-8: {error.reason} at byte {error.start}") from error


def _drop_oldest_exchange(prompt: list[Message], num_tokens: int, limit: int) -> list[Message]:
    """Drop the oldest turn and everything up to the next user turn. A system turn and the last user turn stay."""
    head = prompt[:1] if prompt[0]["role"] in SYSTEM_ROLES else []
    rest = prompt[len(head) :]
    starts = [index for index, message in enumerate(rest) if index > 0 and message["role"] == "user"]
    if not starts:
        detail = f"the last turn alone has {num_tokens} tokens, limit dataset.max_prompt_tokens = {limit}"
        raise Unusable(Reason.PROMPT_TOO_LONG, detail)
    return head + rest[starts[0] :]
