"""Renders chats with the model's template and turns them into ids: the only place in the project that tokenises.

A response is the text that the template puts after the generation prompt, up to and including the end-of-turn token. What a
template prints after that token (often a newline) is left out: the model would never generate it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.source.messages import Message, Unusable
from pipeline.source.pairs import Pair
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint, fingerprint_text, fingerprint_tokenizer, load_chat_template
from weights_store.schemas import SIDES, Reason
from weights_store.tables.metadata import TokenizerRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids. `prompt` is the chat without the turns that did not fit."""

    prompt: list[Message]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_was_cut: bool = False
    response_was_cut: bool = False


@dataclass(frozen=True, slots=True)
class Condition:
    """A contrastive prompt (construction P): text in front of the chat."""

    text: str
    role: Literal["system", "user"]

    def apply(self, prompt: Sequence[Message]) -> list[Message]:
        """Return the chat with the contrastive prompt in front; a system turn that is there is extended, not replaced."""
        messages = [dict(message) for message in prompt]
        if self.role == "system" and (not messages or messages[0]["role"] != "system"):
            return [{"role": "system", "content": self.text}, *messages]
        first = next((message for message in messages if message["role"] == self.role), None)
        if first is not None:
            first["content"] = f"{self.text}\n\n{first['content']}"
        return messages


class ChatTokenizer:
    """A tokenizer with its chat template.

    Raises:
        InputError: The folder has no tokenizer, or no chat template and none is given. Or, when text is first tokenised, the
            tokenizer has no EOS token.
    """

    def __init__(self, folder: Path, template_file: str | None = None) -> None:
        self.folder = folder
        if template_file is None:
            template = load_chat_template(folder)
        else:
            try:
                template = Path(template_file).read_text("utf-8")
            except OSError as error:
                raise InputError(f"model.chat_template {template_file} cannot be read: {error.strerror}") from error
        if template is None:
            raise InputError(f"model {folder} has no chat template; set model.chat_template to a Jinja file")
        self._template = template
        self._own_fingerprint = own = fingerprint_tokenizer(folder)
        self.rendering_fingerprint = (
            fingerprint({"tokenizer": own, "chat_template": template}) if template_file else own
        )
        """Fingerprint of what turns chats into ids: the tokenizer, and the template if the recipe gives one."""

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        """Loaded when text is first tokenised: a build with nothing to do needs only the fingerprint."""
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
            Unusable: The pair is over a limit, or the template cannot render it.
        """
        prompt = pair.prompt
        prompt_text = self._render(prompt)
        while len(prompt_ids := self._ids(prompt_text)) > max_prompt_tokens:
            prompt = _drop_oldest_exchange(prompt, len(prompt_ids), max_prompt_tokens)
            prompt_text = self._render(prompt)
        responses: list[list[int]] = []
        response_was_cut = False
        for side, text in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
            ids = self._response_ids(prompt, prompt_text, prompt_ids, text)
            if len(ids) > max_response_tokens and not cut_response:
                detail = f"{side} has {len(ids)} tokens, limit dataset.max_response_tokens = {max_response_tokens}"
                raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
            response_was_cut |= len(ids) > max_response_tokens
            responses.append(ids[:max_response_tokens])
        chosen_ids, rejected_ids = responses
        if chosen_ids == rejected_ids:  # after cutting, or because the template changes the texts
            raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, "the responses have the same tokens")
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if context is not None and longest >= context:
            detail = f"prompt and response have {longest} tokens, the model's context is {context}"
            raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
        prompt_was_cut = len(prompt) < len(pair.prompt)
        return TokenizedPair(prompt, prompt_ids, chosen_ids, rejected_ids, prompt_was_cut, response_was_cut)

    def conditioned_prompt_ids(self, prompts: Sequence[str], condition: Condition) -> list[list[int] | None]:
        """Return the ids of stored prompts (JSON of messages) with a contrastive prompt in front, None where it has no place.

        Raises:
            InputError: The template drops or refuses the contrastive prompt in every one of these chats.
        """
        result: list[list[int] | None] = []
        problem = ""
        for text in prompts:
            try:
                rendered = self._render(condition.apply(json.loads(text)))
                if condition.text.strip() not in rendered:
                    raise Unusable(Reason.TEMPLATE_MISMATCH, "the rendered chat does not contain the prompt")
                result.append(self._ids(rendered))
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

    def _render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise Unusable(Reason.TEMPLATE_MISMATCH, f"the chat template refuses this chat: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _response_ids(self, prompt: list[Message], prompt_text: str, prompt_ids: list[int], response: str) -> list[int]:
        """Return the ids of a response after its prompt, with the end-of-turn token.

        Prompt and response are tokenised together, so that no tokenizer adds a space where they meet. If a token would span
        both, the response is tokenised alone, because the model generates after whole prompt tokens.
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
        """Cut rendered `text` after the end-of-turn token of `response`; add EOS if the template adds none."""
        eos = self._tokenizer.eos_token
        core = response.strip()
        start = text.find(core)
        if start < 0:
            raise Unusable(Reason.TEMPLATE_MISMATCH, "the chat template changes the response's text")
        content_end = start + len(core)
        # White space at the end of the response belongs to it, unless the template trims it.
        tail = response[response.find(core) + len(core) :]
        if tail and text.startswith(tail, content_end):
            content_end += len(tail)
        closing = text[content_end:]
        at = closing.find(eos)
        if at >= 0:
            return text[: content_end + at + len(eos)]
        return text[:content_end] + (closing.rstrip() or eos)


def _drop_oldest_exchange(prompt: list[Message], num_tokens: int, limit: int) -> list[Message]:
    """Drop the oldest turn and everything up to the next user turn. A system turn and the last user turn stay."""
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(head) :]
    starts = [index for index, message in enumerate(rest) if index > 0 and message["role"] == "user"]
    if not starts:
        detail = f"the last turn alone has {num_tokens} tokens, limit dataset.max_prompt_tokens = {limit}"
        raise Unusable(Reason.PROMPT_TOO_LONG, detail)
    return head + rest[starts[0] :]
