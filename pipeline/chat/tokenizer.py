"""Turns pairs into ids with a model's tokenizer and chat template: the only place in the project that tokenises.

A response is the text that the template puts after the generation prompt, up to and including the end-of-turn token. What a
template prints after that token (often a newline) is left out: the model would never generate it.
"""

import datetime
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.pair_ids import Limits, PairInWork, TokenizedPair
from pipeline.chat.rendering import Chat, PairRenderer, begin
from pipeline.chat.template import ChatTemplate, prints_date
from pipeline.chat.turns import Turns, find_turns
from pipeline.source.messages import SYSTEM_ROLES, Message, Unusable, is_empty, is_rendered, texts_of
from pipeline.source.pairs import Pair
from pipeline.source.responses import as_turns
from pipeline.source.rows import batches
from train.model.checkpoint import load_tokenizer
from weights_store.errors import InputError
from weights_store.fingerprint import (
    fingerprint,
    fingerprint_text,
    fingerprint_tokenizer,
    load_chat_template,
    load_json,
)
from weights_store.schemas import Reason
from weights_store.tables.metadata import TokenizerRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAIRS_PER_CHUNK = 64
_CHARACTERS_PER_CHUNK = 1 << 20
"""Pairs are rendered together: so many that waiting costs little, and so few that they take little memory."""
RENDERING_VERSION = 3
"""Part of the fingerprint of tokens tables; goes up when the same chat, template and tokenizer give other ids than before."""


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

    def __reduce__(self) -> tuple[object, ...]:
        """Let each process that gets it load it once, from the same files in whatever folder it runs."""
        template_file = self._template_file and str(Path(self._template_file).absolute())
        return _opened, (self.folder.absolute(), template_file, self.template_date, self._unprinted_keys)

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

    def turns(self, prompt: str, messages: list[Message]) -> Turns:
        """Return where the messages of a response stand behind a stored prompt (JSON of a chat).

        Raises:
            Unusable: The template cannot render them, or it is unknown where one begins.
        """
        adapted = [self._without_end(message) for message in self._chat_template.adapt(messages)]
        return find_turns(self._chat_template, self._controls, Chat.from_json(prompt), adapted)

    def tokenize_pair(
        self,
        pair: Pair,
        max_prompt_tokens: int,
        max_response_tokens: int,
        cut_response: bool,
        context: int | None = None,
    ) -> TokenizedPair:
        """Tokenise one pair within limits, see `Limits`.

        Raises:
            Unusable: The pair is over a limit, or the template cannot render it or would leave out a part of it.
            InputError: The tokenizer or the template cannot be used, see `check`.
        """
        limits = Limits(max_prompt_tokens, max_response_tokens, cut_response, context)
        (found,) = self.tokenize_pairs([pair], limits)
        if isinstance(found, Unusable):
            raise found
        return found

    def tokenize_pairs(self, pairs: Iterable[Pair], limits: Limits) -> Iterator[TokenizedPair | Unusable]:
        """Yield each pair within the limits as ids, or why it cannot be used.

        While one chunk of pairs is tokenised, the process that renders works on the next one.

        Raises:
            InputError: The tokenizer or the template cannot be used, see `check`.
        """
        sizes = (_PAIRS_PER_CHUNK, _CHARACTERS_PER_CHUNK)
        chunks = map(self._begun, batches(pairs, *sizes, lambda pair: pair.num_characters))
        chunk = next(chunks, [])
        while chunk:
            following = next(chunks, [])
            for started in chunk:
                try:
                    yield started if isinstance(started, Unusable) else started.tokenized(limits)
                except Unusable as problem:
                    yield problem
            chunk = following

    def _begun(self, pairs: Sequence[Pair]) -> list[PairInWork | Unusable]:
        """Begin to render pairs."""
        started: list[PairInWork | Unusable] = []
        for pair in pairs:
            try:
                chat, responses, notes = self._read(pair)
                renderer_of = partial(self._renderer, responses=responses)
                started.append(PairInWork(chat, renderer_of, self._controls, self._unprinted_keys, notes))
            except Unusable as problem:
                started.append(problem)
        begin([each.renderer for each in started if isinstance(each, PairInWork)])
        return started

    def _renderer(self, chat: Chat, responses: tuple[list[Message], list[Message]]) -> PairRenderer:
        return PairRenderer(self._chat_template, self._controls, chat, responses, self._eos_token)

    def conditioned_prompt_ids(self, prompts: Sequence[str], condition: Condition) -> list[list[int] | None]:
        """Return the ids of stored prompts (JSON of chats) with a contrastive prompt in front, None where it has no place.

        Raises:
            InputError: The template drops or refuses the contrastive prompt in every one of these chats.
        """
        result: list[list[int] | None] = []
        problem = ""
        chats = [Chat.from_json(text) for text in prompts]
        for chat, renderer in zip(chats, self._conditioned(chats, condition), strict=True):
            try:
                if isinstance(renderer, Unusable):
                    raise renderer
                result.append(self._conditioned_ids(chat, renderer, condition))
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

    def _conditioned(self, chats: Sequence[Chat], condition: Condition) -> list[PairRenderer | Unusable]:
        """Begin to render chats with a contrastive prompt in front."""
        renderers: list[PairRenderer | Unusable] = []
        for chat in chats:
            try:
                messages = self._chat_template.adapt(condition.apply(chat.messages))
                renderers.append(self._renderer(replace(chat, messages=messages), ([], [])))
            except Unusable as problem:
                renderers.append(problem)
        begin([renderer for renderer in renderers if isinstance(renderer, PairRenderer)])
        return renderers

    def _conditioned_ids(self, chat: Chat, renderer: PairRenderer, condition: Condition) -> list[int]:
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
            if name != "prompt" and ended and is_empty(ended[-1]):
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


@lru_cache(maxsize=1)
def _opened(
    folder: Path, template_file: str | None, template_date: str | None, unprinted_keys: frozenset[str]
) -> ChatTokenizer:
    return ChatTokenizer(folder, template_file, template_date, unprinted_keys)


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
