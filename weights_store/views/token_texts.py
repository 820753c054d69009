"""Texts of token ids, from a tokenizer, a mapping or a list.

The store keeps ids only. It needs a tokenizer only to show them to people, and for programs that take texts.
"""

from collections.abc import Mapping, Sequence, Sized
from functools import cached_property
from typing import Protocol

import polars as pl

from weights_store.errors import InputError, MismatchError


class Decoder(Protocol):
    """What transformers' tokenizers and `tokenizers.Tokenizer` have in common."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = ...) -> str:
        """Return the text of some ids."""


Tokenizer = Decoder | Mapping[int, str] | Sequence[str]
"""A tokenizer, or the texts themselves by id."""


_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""
_MAX_GROUP, _MAX_CONTEXT = 8, 4
"""Tokens whose text shows only together, and tokens before them that are decoded too. A character has at most four bytes."""
_MAX_PREFIXES = 16
"""How often a whole prefix of a sequence is decoded: each costs as much as the sequence, so more would take quadratic time."""


class TokenTexts:
    """Texts of ids. Special tokens are shown; bytes that belong to no whole character show as U+FFFD.

    Its methods raise MismatchError if the tokenizer has no such id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._source = tokenizer
        self._known: dict[int, str] = {}
        self._inside: dict[int, str | None] = {}
        self._num_ids: int | None = None  # it does not say, or its ids need not be consecutive
        if hasattr(tokenizer, "get_vocab"):
            self._num_ids = 1 + max(tokenizer.get_vocab().values(), default=-1)  # some vocabularies have gaps
        elif isinstance(tokenizer, Sized) and not isinstance(tokenizer, Mapping):
            self._num_ids = len(tokenizer)

    def text(self, token_id: int) -> str:
        """Return the text of one id."""
        if token_id not in self._known:
            self._check(token_id)
            if isinstance(self._source, Mapping | Sequence):
                try:
                    self._known[token_id] = str(self._source[token_id])
                except (KeyError, IndexError):
                    raise self._unknown(token_id) from None
            else:
                self._known[token_id] = self._decode([token_id])
        return self._known[token_id]

    def texts(self, ids: pl.Series) -> pl.Series:
        """Return the text of every id of a series; each distinct id is decoded once."""
        distinct = ids.drop_nulls().unique()
        texts = [self.text(token_id) for token_id in distinct.to_list()]
        return ids.replace_strict(distinct, pl.Series(texts, dtype=pl.String), default=None, return_dtype=pl.String)

    def join(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence. A decoder gets the whole sequence, so split characters come together."""
        if isinstance(self._source, Mapping | Sequence):
            return "".join(map(self.text, ids))
        self._check(max(ids, default=0))
        return self._decode(ids)

    def encode(self, text: str, *, with_marks: bool = False) -> list[int]:
        """Return the ids of a text; `with_marks` with what the tokenizer puts around every text.

        Raises:
            InputError: The tokenizer only has texts of ids.
        """
        if not hasattr(self._source, "encode"):
            raise InputError(f"a {type(self._source).__name__} cannot encode texts; give the model's tokenizer")
        found = self._source.encode(text, add_special_tokens=with_marks)
        return list(getattr(found, "ids", found))  # of `tokenizers`, or of transformers

    def split(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token within its sequence, `[T]`: joined they are the text of the whole sequence.

        A character of several tokens stands with the first of them, and the others have an empty text. A token has the space
        that it has inside the sequence, also with tokenizers that drop it in front of a text. Takes time linear in T.
        """
        if isinstance(self._source, Mapping | Sequence):
            return list(map(self.text, ids))
        whole = self.join(ids)
        texts: list[str] = []
        at, num_prefixes = 0, 0
        while len(texts) < len(ids):
            first = len(texts)
            guess = self._text_inside(ids[first - 1], ids[first]) if first else None
            found = [guess] if guess is not None and whole.startswith(guess, at) else self._group(ids, first, whole, at)
            if found is None:  # what this token adds depends on tokens far away
                end = at
                if num_prefixes < _MAX_PREFIXES:
                    num_prefixes += 1
                    end = max(at, _num_common(self._decode(ids[: first + 1]), whole))
                found = [whole[at:end]]
            texts += found
            at += sum(map(len, found))
        if texts:
            texts[-1] += whole[at:]
        return texts

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that the tokenizer has for its own marks, such as the end of a turn; a mapping or a list does not say."""
        if hasattr(self._source, "get_added_tokens_decoder"):
            added = self._source.get_added_tokens_decoder()
        else:
            added = getattr(self._source, "added_tokens_decoder", {})
        marked = (token_id for token_id, token in added.items() if getattr(token, "special", False))
        return frozenset((*marked, *getattr(self._source, "all_special_ids", ())))

    def _text_inside(self, before: int, token_id: int) -> str | None:
        """Return what an id usually adds after another token, or None if it is no whole character alone."""
        if token_id not in self._inside:
            start, both = self.text(before), "" if _BROKEN in self.text(token_id) else self._decode([before, token_id])
            self._inside[token_id] = both[len(start) :] if both and both.startswith(start) else None
        return self._inside[token_id]

    def _group(self, ids: Sequence[int], first: int, whole: str, at: int) -> list[str] | None:
        """Return the texts of the fewest tokens from `first` on that together continue `whole` at `at`; None if unknown."""
        for start in self._starts(ids, first):
            before = self._decode(ids[start:first])
            ends: list[int] = []  # of each token's text, after `at`
            for last in range(first, min(first + _MAX_GROUP, len(ids))):
                text = self._decode(ids[start : last + 1])
                added = text[len(before) :] if text.startswith(before) else _BROKEN
                if whole.startswith(added, at):
                    ends = [min(end, len(added)) for end in ends] + [len(added)]
                    return [whole[at + low : at + high] for low, high in zip([0, *ends], ends, strict=False)]
                # The character that is not whole yet stands with the token that begins it.
                ends.append(max(_num_common(added, whole[at : at + len(added)]) + 1, *ends, 0))
        return None

    def _starts(self, ids: Sequence[int], first: int) -> list[int]:
        """Return where to begin decoding for the tokens from `first` on: bytes of a character first without others before."""
        alone = [first] if _BROKEN in self.text(ids[first]) or not first else []
        return [*alone, *range(first - 1, max(first - _MAX_CONTEXT, 0) - 1, -1)]

    def _check(self, token_id: int) -> None:
        if self._num_ids is not None and token_id >= self._num_ids:
            raise self._unknown(token_id)

    def _decode(self, ids: Sequence[int]) -> str:
        assert not isinstance(self._source, Mapping | Sequence)
        return str(self._source.decode(list(ids), skip_special_tokens=False))  # else `tokenizers` leaves them out

    def _unknown(self, token_id: int) -> MismatchError:
        size = "" if self._num_ids is None else f", which has {self._num_ids} ids"
        return MismatchError(
            f"token id {token_id} is not in the tokenizer given{size}; give the tokenizer of the model that the pairs were "
            "tokenised with"
        )


def _num_common(a: str, b: str) -> int:
    """Return how many characters two texts share from their beginning."""
    if b.startswith(a):
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
