"""Ids of rendered chats in which no text of a user becomes a control token.

A tokenizer makes the id of a control token wherever its text stands, also inside a message: a user who writes `<|system|>`
would open a system turn. Here only the template's own control tokens become their ids. What merely looks like one is encoded
as ordinary text, with the neighbours it has.

Control tokens are those that the tokenizer calls special. Others that it added, such as Qwen's `<think>`, are written by models
as text, and stay as they are.
"""

import re
from functools import cached_property
from itertools import takewhile
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
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._texts = sorted((text for text in special if text.strip()), key=lambda text: (-len(text), text))
        self._ids: list[int] = tokenizer.convert_tokens_to_ids(self._texts)
        self._pattern = _any_of(self._texts)
        self._added = _any_of(sorted({token.content.strip() for token in added} | special, key=len, reverse=True))

    def are_in(self, value: object) -> bool:
        """Return whether some text in a JSON value has the text of a control token."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self.are_in(key) or self.are_in(inner) for key, inner in value.items())
        return isinstance(value, list) and any(map(self.are_in, value))

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
        alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
        num_alike = sum(1 for _ in alike)
        starts = (match.start() for match in self._added.finditer(texts[0]) if match.start() < num_alike < match.end())
        return next(starts, num_alike)

    def ends_with_one(self, text: str) -> bool:
        """Return whether text of a template ends with an added token."""
        return any(match.end() == len(text) for match in self._added.finditer(text))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a rendered chat; hidden texts are encoded as ordinary text.

        Raises:
            Unusable: There are hidden texts, and the tokenizer cannot encode one without its control token.
        """
        if not _PRIVATE_USE.search(text):
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]
        return self._ids_of_hidden(text)

    def _ids_of_hidden(self, text: str) -> list[int]:
        backend = self._backend
        if backend is None:
            raise Unusable(
                Reason.CONTROL_TOKENS, "a text has control tokens, and this tokenizer cannot take them as text"
            )
        marked = self._replace(text, _OWN)
        ids = backend.encode(self.show(marked), add_special_tokens=False).ids
        ids = [self._own_ids.get(token_id, token_id) for token_id in ids]
        of_template = [self._ids[ord(character) - _OWN] for character in marked if _OWN <= ord(character) < _FOREIGN]
        control = set(self._ids) - {self._tokenizer.unk_token_id}  # any text may be unknown
        if [token_id for token_id in ids if token_id in control] != [
            token_id for token_id in of_template if token_id in control
        ]:
            raise Unusable(
                Reason.CONTROL_TOKENS, "a text has control tokens, and this tokenizer makes their ids of any text"
            )
        return ids

    @cached_property
    def _backend(self) -> "Tokenizer | None":
        """A copy of a fast tokenizer in which private-use characters are the control tokens, and their texts are text."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True
        flags = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        for index, text in enumerate(self._texts):
            token = flags[text]
            copy.add_tokens(
                [
                    AddedToken(
                        chr(_OWN + index),
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=token.normalized,
                    )
                ]
            )
        return copy

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """The tokenizer's id of a control token by its id in `_backend`."""
        assert self._backend is not None
        copied_ids = (self._backend.encode(chr(_OWN + index)).ids[-1] for index in range(len(self._texts)))
        return dict(zip(copied_ids, self._ids, strict=True))

    def _replace(self, text: str, first: int) -> str:
        return self._pattern.sub(lambda match: chr(first + self._texts.index(match[0])), text)

    def _shown(self, character: str) -> str:
        """Return the text of a message that a private-use character stands for; the template's own stay."""
        index = ord(character) - _FOREIGN
        return self._texts[index] if 0 <= index < len(self._texts) else character


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Return a pattern of any of these texts, which are sorted by falling length: the longest matches, as in a tokenizer."""
    return re.compile("|".join(map(re.escape, filter(None, texts))) or r"(?!)")
