"""Render chats with the model's template and cut them into ids: the only place in the project that tokenises.

A response is the text that the template puts after the generation prompt, up to and including the end-of-turn token; what a
template prints after that token (a newline, often) is nothing the model would ever generate and is left out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.source.pairs import Message, Pair, Unusable
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint, fingerprint_text, fingerprint_tokenizer, load_chat_template
from weights_store.schemas import Reason


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. `prompt` is the chat as tokenised, after dropping what did not fit."""

    prompt: list[Message]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_was_cut: bool = False
    response_was_cut: bool = False


@dataclass(frozen=True, slots=True)
class Condition:
    """A contrastive prompt (construction P): text put in front of the chat."""

    text: str
    role: Literal["system", "user"]

    def apply(self, prompt: Sequence[Message]) -> list[Message]:
        """Return the chat with the contrastive prompt in front; an existing system turn is extended, not replaced."""
        messages = [dict(message) for message in prompt]
        if self.role == "system":
            if messages and messages[0]["role"] == "system":
                messages[0]["content"] = f"{self.text}\n\n{messages[0]['content']}"
                return messages
            return [{"role": "system", "content": self.text}, *messages]
        for message in messages:
            if message["role"] == "user":
                message["content"] = f"{self.text}\n\n{message['content']}"
                break
        return messages


class ChatTokenizer:
    """A tokenizer with its chat template.

    Raises:
        InputError: No tokenizer in the folder, no chat template there and none given, or (when it first cuts) no EOS token.
    """

    def __init__(self, folder: Path, template_file: str | None = None) -> None:
        self.folder = folder
        template = _read_template(template_file) if template_file else load_chat_template(folder)
        if template is None:
            raise InputError(f"model {folder} has no chat template; set model.chat_template to a Jinja file")
        self._fingerprint = fingerprint_tokenizer(folder)
        if template_file:
            self._fingerprint = fingerprint({"tokenizer": self._fingerprint, "chat_template": template})
        self._template = template

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer itself, loaded when text is first cut: a build with nothing to do needs only its fingerprint."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokenizer.chat_template = self._template
        if tokenizer.eos_token is None:
            raise InputError(
                f"model {self.folder}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json"
            )
        return tokenizer

    @property
    def eos_token_id(self) -> int:
        """Id of the tokenizer's EOS token."""
        return int(self._tokenizer.eos_token_id)

    @property
    def rendering_fingerprint(self) -> str:
        """Fingerprint of what turns chats into ids: the tokenizer, and the template where the recipe gives another."""
        return self._fingerprint

    def properties(self, vocab_size: int) -> dict[str, Any]:
        """Return what the store records of the tokenizer: trainers compare it with their own.

        `fingerprint` is the folder's, its own template included, as a trainer can compute it. `rendering` and `chat_template`
        are of the template that was used; where a recipe gives another than the folder's, `rendering` is not `fingerprint`.
        """
        return {
            "fingerprint": fingerprint_tokenizer(self.folder),
            "rendering": self.rendering_fingerprint,
            "chat_template": fingerprint_text(self._template),
            "vocab_size": vocab_size,
            "eos_token_id": self.eos_token_id,
        }

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id alone; bytes of a split character show as a replacement character."""
        return self._tokenizer.batch_decode([[token_id] for token_id in ids])  # type: ignore[no-any-return]

    def tokenize_pair(
        self, pair: Pair, max_prompt_tokens: int, max_response_tokens: int, cut_response: bool
    ) -> TokenizedPair:
        """Tokenise one pair within the limits.

        Raises:
            Unusable: Over a limit, or the template cannot render this chat.
        """
        prompt = list(pair.prompt)
        prompt_text = self._render_prompt(prompt)
        prompt_ids = self._ids(prompt_text)
        while len(prompt_ids) > max_prompt_tokens:
            prompt = _drop_oldest_exchange(prompt, len(prompt_ids), max_prompt_tokens)
            prompt_text = self._render_prompt(prompt)
            prompt_ids = self._ids(prompt_text)
        responses: list[list[int]] = []
        was_cut = False
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = self._response_ids(prompt, prompt_text, prompt_ids, text)
            if len(ids) > max_response_tokens:
                if not cut_response:
                    detail = f"{side} has {len(ids)} tokens, limit dataset.max_response_tokens = {max_response_tokens}"
                    raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
                ids, was_cut = ids[:max_response_tokens], True
            responses.append(ids)
        if responses[0] == responses[1]:  # after cutting, or where the template changes the texts
            raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, "the responses have the same tokens")
        chosen_ids, rejected_ids = responses
        return TokenizedPair(prompt, prompt_ids, chosen_ids, rejected_ids, len(prompt) < len(pair.prompt), was_cut)

    def conditioned_prompt_ids(self, prompts: Sequence[str], condition: Condition) -> list[list[int] | None]:
        """Return the ids of stored prompts (JSON of messages) with a contrastive prompt in front, None where it has no place.

        Raises:
            InputError: The template drops or refuses the contrastive prompt in every one of these chats.
        """
        result: list[list[int] | None] = []
        problem = ""
        for text in prompts:
            try:
                rendered = self._render_prompt(condition.apply(json.loads(text)))
            except Unusable as error:
                problem = error.detail
                result.append(None)
                continue
            if condition.text.strip() in rendered:
                result.append(self._ids(rendered))
            else:
                problem = "the rendered chat does not contain the prompt"
                result.append(None)
        if prompts and all(ids is None for ids in result):
            raise InputError(self._condition_problem(problem, condition))
        return result

    def _condition_problem(self, detail: str, condition: Condition) -> str:
        other = "user" if condition.role == "system" else "system"
        return f'the chat template of {self.folder} takes no {condition.role} prompt ({detail}); set contrast.role = "{other}"'

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise Unusable(Reason.TEMPLATE_MISMATCH, f"the chat template refuses this chat: {error}") from error

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def _response_ids(self, prompt: list[Message], prompt_text: str, prompt_ids: list[int], response: str) -> list[int]:
        """Return the ids of a response behind its prompt, end of turn included.

        Tokenised together with the prompt, so that no tokenizer adds a space of its own at the border. Where a merge reaches
        over the border the response is tokenised alone: the model generates behind whole prompt tokens.
        """
        full = self._render([*prompt, {"role": "assistant", "content": response}], add_generation_prompt=False)
        if not full.startswith(prompt_text):
            raise Unusable(
                Reason.TEMPLATE_MISMATCH, "the chat with the response does not begin with the rendered prompt"
            )
        text = self._end_of_turn(full[len(prompt_text) :], response)
        joint = self._ids(prompt_text + text)
        return joint[len(prompt_ids) :] if joint[: len(prompt_ids)] == prompt_ids else self._ids(text)

    def _end_of_turn(self, text: str, response: str) -> str:
        """Cut rendered `text` behind the end-of-turn token that closes `response`; add EOS where the template adds none."""
        eos = self._tokenizer.eos_token
        core = response.strip()
        start = text.find(core)
        if start < 0:
            raise Unusable(Reason.TEMPLATE_MISMATCH, "the chat template changes the response's text")
        content_end = start + len(core)
        # Blanks at the response's own end belong to it, unless the template trims them.
        tail = response[response.find(core) + len(core) :]
        if tail and text.startswith(tail, content_end):
            content_end += len(tail)
        closing = text[content_end:]
        at = closing.find(eos)
        if at >= 0:
            return text[: content_end + at + len(eos)]
        return text[:content_end] + (closing.rstrip() or eos)


def _drop_oldest_exchange(prompt: list[Message], num_tokens: int, limit: int) -> list[Message]:
    """Drop the oldest turn, and what follows it up to the next user turn; a system turn and the last user turn stay."""
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(head) :]
    starts = [index for index, message in enumerate(rest) if index > 0 and message["role"] == "user"]
    if not starts:
        detail = f"the last turn alone has {num_tokens} tokens, limit dataset.max_prompt_tokens = {limit}"
        raise Unusable(Reason.PROMPT_TOO_LONG, detail)
    return head + rest[starts[0] :]


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"model.chat_template {path} cannot be read: {error.strerror}") from error
