"""Texts of token ids, from a tokenizer, a mapping or a list.

The store keeps ids only. It needs a tokenizer only to show them to people.
"""

from collections.abc import Mapping, Sequence, Sized
from typing import Protocol

import polars as pl

from weights_store.errors import MismatchError


class Decoder(Protocol):
    """What transformers' tokenizers and `tokenizers.Tokenizer` have in common."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = ...) -> str:
        """Return the text of some ids."""


Tokenizer = Decoder | Mapping[int, str] | Sequence[str]
"""A tokenizer, or the texts themselves by id."""


class TokenTexts:
    """Texts of ids. Special tokens are shown; bytes of a split character show as U+FFFD.

    Its methods raise MismatchError if the tokenizer has no such id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._source = tokenizer
        self._known: dict[int, str] = {}
        self._num_ids: int | None = None  # it does not say, or its ids need not be consecutive
        if hasattr(tokenizer, "get_vocab_size"):
            self._num_ids = int(tokenizer.get_vocab_size())
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
                self._known[token_id] = _decode(self._source, [token_id])
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
        return _decode(self._source, list(ids))

    def _check(self, token_id: int) -> None:
        if self._num_ids is not None and token_id >= self._num_ids:
            raise self._unknown(token_id)

    def _unknown(self, token_id: int) -> MismatchError:
        size = "" if self._num_ids is None else f", which has {self._num_ids} ids"
        return MismatchError(
            f"token id {token_id} is not in the tokenizer given{size}; give the tokenizer of the model that the pairs were "
            "tokenised with"
        )


def _decode(decoder: Decoder, ids: list[int]) -> str:
    return str(decoder.decode(ids, skip_special_tokens=False))  # `tokenizers` leaves special tokens out by default
