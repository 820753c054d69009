"""Ids of rendered chats in which no text of a user becomes a control token.

A tokenizer makes the id of a control token wherever its text stands, also inside a message: a user who writes `<|system|>`
would open a system turn. Here only the template's own control tokens become their ids. What merely looks like one is encoded
as ordinary text, with the neighbours it has.

Control tokens are those that the tokenizer calls special. Others that it added, such as Qwen's `<think>`, are written by models
as text, and stay as they are.
"""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.source.messages import Unusable
from weights_store.schemas import Reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_OWN, _FOREIGN = 0xF0000, 0x100000
"""First of the private-use characters that stand for the template's control tokens, and for text that looks like one."""
_PRIVATE_USE = re.compile("[\U000f0000-\U0010fffd]")


class ControlTokens:
    """The control tokens of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special or token.content in tokenizer.all_special_tokens}
        self._texts = sorted(filter(str.strip, special), key=len, reverse=True)
        self._ids: list[int] = tokenizer.convert_tokens_to_ids(self._texts)
        self._pattern = _any_of(self._texts)
        all_texts = sorted(filter(None, {token.content.strip() for token in added}), key=len, reverse=True)
        self._added = _any_of(all_texts)
        self._longest = max(map(len, all_texts), default=0)

    def are_in(self, value: object) -> bool:
        """Return whether some text in a JSON value has the text of a control token."""
        waiting = [value]
        while waiting:
            inner = waiting.pop()
            if isinstance(inner, str):
                if self._pattern.search(inner):
                    return True
            elif isinstance(inner, dict):
                waiting += [*inner, *inner.values()]
            elif isinstance(inner, list):
                waiting += inner
        return False

    def hide(self, value: Any) -> Any:
        """Return a JSON value in which private-use characters stand for the control tokens in its texts.

        Raises:
            Unusable: It has such characters itself.
        """
        if isinstance(value, str):
            if _PRIVATE_USE.search(value):
                raise Unusable(
                    Reason.CONTROL_TOKENS, "text has both control tokens and characters of Unicode's private-use planes"
                )
            return self._replace(value, _FOREIGN)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """Return text with what `hide` has hidden."""
        return _PRIVATE_USE.sub(lambda match: self._shown(match[0]), text)

    def num_common(self, *texts: str) -> int:
        """Return how many characters all texts of a template begin with, not counting a part of an added token."""
        first, *others = texts
        low, high = 0, min(map(len, texts))
        while low < high:
            middle = (low + high + 1) // 2
            is_common = all(other.startswith(first[:middle]) for other in others)
            low, high = (middle, high) if is_common else (low, middle - 1)
        near = self._added.finditer(first, max(0, low - self._longest))
        return next((match.start() for match in near if match.start() < low < match.end()), low)

    def are_at_start(self, text: str) -> bool:
        """Return whether text begins with a control token."""
        return self._pattern.match(text) is not None

    def ends_with_one(self, text: str) -> bool:
        """Return whether text of a template ends with an added token."""
        return any(match.end() == len(text) for match in self._added.finditer(text, max(0, len(text) - self._longest)))

    def beginning(self, text: str, num_ids: int) -> str:
        """Return text, or a beginning of it that has far more than `num_ids` ids, if it is so long.

        So a text over a limit is recognised, and cut, without encoding all of it. What follows cannot take back so many ids:
        tokenizers decide on a token by its neighbours.
        """
        length = 64 * num_ids + 4096
        while length < len(text):
            if len(self._encode(text[:length])) > 2 * num_ids + 1000:
                return text[:length]
            length *= 4
        return text

    def ids(self, text: str, is_hidden: bool = False) -> list[int]:
        """Return the ids of a rendered chat; `is_hidden` if its messages went through `hide`.

        Raises:
            Unusable: The tokenizer cannot encode the hidden texts without their control tokens.
        """
        if not is_hidden:
            return self._encode(text)
        if self._backend is None:
            detail = "a text has control tokens, and this tokenizer cannot take them as text"
            raise Unusable(Reason.CONTROL_TOKENS, detail)
        marked = self._replace(text, _OWN)
        copied_ids = self._backend.encode(self.show(marked), add_special_tokens=False).ids
        ids = [self._own_ids.get(token_id, token_id) for token_id in copied_ids]
        control = set(self._ids) - {self._tokenizer.unk_token_id}  # any text may be unknown
        of_template = [self._ids[ord(character) - _OWN] for character in marked if _OWN <= ord(character) < _FOREIGN]
        expected, found = ([token_id for token_id in each if token_id in control] for each in (of_template, ids))
        if found != expected:
            detail = "a text has control tokens, and this tokenizer makes their ids of any text"
            raise Unusable(Reason.CONTROL_TOKENS, detail)
        return ids

    def _encode(self, text: str) -> list[int]:
        if self._plain is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _plain(self) -> "Tokenizer | None":
        """A copy of a fast tokenizer: what transformers calls, a quarter faster without its wrapper and without offsets."""
        copy = self._copy()
        if copy is not None:
            copy.encode_special_tokens = self._tokenizer.split_special_tokens
        return copy

    def _copy(self) -> "Tokenizer | None":
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        return copy

    @cached_property
    def _backend(self) -> "Tokenizer | None":
        """A copy of a fast tokenizer in which private-use characters are the control tokens, and their texts are text."""
        from tokenizers import AddedToken

        copy = self._copy()
        if copy is None:
            return None
        copy.encode_special_tokens = True
        flags = {token.content: token for token in copy.get_added_tokens_decoder().values()}
        for index, text in enumerate(self._texts):
            same = {flag: getattr(flags[text], flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            copy.add_tokens([AddedToken(chr(_OWN + index), **same)])
        return copy

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """The tokenizer's id of a control token by its id in `_backend`."""
        assert self._backend is not None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {vocabulary[chr(_OWN + index)]: token_id for index, token_id in enumerate(self._ids)}

    def _replace(self, text: str, first: int) -> str:
        return self._pattern.sub(lambda match: chr(first + self._texts.index(match[0])), text)

    def _shown(self, character: str) -> str:
        """Return the text of a message that a private-use character stands for; the template's own stay."""
        index = ord(character) - _FOREIGN
        return self._texts[index] if 0 <= index < len(self._texts) else character


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Return a pattern of any of these texts, which are sorted by falling length: the longest matches, as in a tokenizer."""
    return re.compile("|".join(map(re.escape, filter(None, texts))) or r"(?!)")
