"""Which characters each token of a response covers: exact, from the bytes that the tokenizer's vocabulary has for its ids.

A token may cover a part of a character, one or several; two tokens may share one. The weight of a token is the mean over the
characters that it covers, whole or in part (`Characters.means`).

Tokenizers whose tokens are bytes (GPT-2, Llama 3, Qwen, SmolLM), or pieces of text with `▁` for a space (SentencePiece: Llama
2, Mistral, Gemma), are read; others are refused. If a tokenizer changes the text, for example to NFC, this is the changed
text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.model.checkpoint import load_light_tokenizer
from weights_store.errors import InputError, MismatchError
from weights_store.views.token_texts import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PROBE = "Probe 12: naïve 漢字 🙂\n\tx  (y)"
"""Text with characters of one to four bytes, to compare the bytes of a vocabulary with the tokenizer's own decoder."""


def check_ids(ids: np.ndarray, num_tokens: int, who_needs: str) -> None:
    """Check that ids are of a vocabulary with so many tokens.

    Raises:
        MismatchError: One is not.
    """
    if ids.size and int(ids.max()) >= num_tokens:
        raise MismatchError(
            f"token id {int(ids.max())} is not in the tokenizer's vocabulary of {num_tokens}: {who_needs} the tokenizer that "
            "the pairs were tokenised with. Check model.path"
        )


@dataclass(frozen=True)
class Characters:
    """The text of some responses, and the characters that each of their tokens covers; `[C]` characters, `[N]` tokens."""

    texts: list[str]
    """Of each response, `[B]`. A byte that belongs to no whole character is a lone surrogate, as with `surrogateescape`."""
    starts: np.ndarray
    """The place of each response's first character among all characters, `[B + 1]`."""
    first: np.ndarray
    """The first character of each token, `[N]`."""
    last: np.ndarray
    """Its last character, `[N]`, included."""
    is_special: np.ndarray
    """Whether a token is a mark of the tokenizer's own, such as the end of a turn, `[N]` bool."""
    has_text: np.ndarray
    """Whether a token has any character, `[N]` bool."""

    def means(self, values: np.ndarray, without_text: float = 1.0) -> np.ndarray:
        """Return the mean of values of characters, `[C]`, over those of each token, `[N]` float64."""
        if not len(values):
            return np.full(len(self.first), without_text)
        ends = np.stack([self.first, self.last + 1], axis=1).ravel()
        # The ends of spans are starts for `reduceat`, which must be inside of the array.
        sums = np.add.reduceat(np.append(values, 0.0), ends, dtype=np.float64)[::2]
        return np.where(self.has_text, sums / (self.last + 1 - self.first), without_text)


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token, by id."""

    data: np.ndarray
    """Those of all tokens, one after the other, uint8."""
    ends: np.ndarray
    """Where the bytes of each token end, `[V]`."""
    is_special: np.ndarray
    """Whether it is a mark of the tokenizer's own, `[V]` bool."""

    @classmethod
    def of_folder(cls, folder: Path) -> "Vocabulary":
        """Read the tokenizer of a model folder.

        Raises:
            InputError: It cannot be loaded, or its tokens are neither bytes nor pieces of text.
        """
        return cls.of_tokenizer(load_light_tokenizer(folder), str(folder))

    @classmethod
    def of_tokenizer(cls, tokenizer: "Tokenizer | PreTrainedTokenizerBase", name: str) -> "Vocabulary":
        """Read a tokenizer; `name` is for messages.

        Raises:
            InputError: As `of_folder`.
        """
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", tokenizer)
        kinds = _decoder_kinds(backend)
        if backend is None or not kinds & {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}:
            raise _not_known(name, kinds)
        is_bytes = "ByteLevel" in kinds
        to_bytes = _bytes_of_symbols if is_bytes else _bytes_of_piece
        # Pieces of text may be added, such as Gemma's "▁▁"; tokens that were added to bytes stand as they are.
        added = {
            token_id: token.content.encode() if is_bytes or token.special else _bytes_of_piece(token.content)
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        num_ids = 1 + max(backend.get_vocab().values())  # some vocabularies have gaps
        tokens = map(backend.id_to_token, range(num_ids))
        parts = [added.get(token_id) or to_bytes(token or "") for token_id, token in enumerate(tokens)]
        ends = np.cumsum([len(part) for part in parts])
        found = cls(np.frombuffer(b"".join(parts), np.uint8), ends, special_tokens(tokenizer))
        ids = backend.encode(_PROBE, add_special_tokens=False).ids
        text = found.characters(np.array(ids), np.array([len(ids)])).texts[0]
        if text.lstrip() != backend.decode(ids, skip_special_tokens=False).lstrip():
            raise _not_known(name, kinds)
        return found

    @property
    def special_texts(self) -> frozenset[str]:
        """The texts of the marks."""
        spans = (
            (self.ends[token_id - 1] if token_id else 0, self.ends[token_id])
            for token_id in np.flatnonzero(self.is_special)
        )
        return frozenset(self.data[start:end].tobytes().decode() for start, end in spans) - {""}

    def characters(self, ids: np.ndarray, lengths: np.ndarray) -> Characters:
        """Return the characters of responses; `ids` are flat `[N]`, `lengths` the tokens of each response `[B]`.

        Raises:
            MismatchError: An id is not in the vocabulary.
        """
        check_ids(ids, len(self.ends), "marks in texts need")
        starts = np.concatenate([[0], self.ends])[ids]
        num_bytes = self.ends[ids] - starts
        ends = np.cumsum(num_bytes)
        data = self.data[np.repeat(starts - (ends - num_bytes), num_bytes) + np.arange(int(num_bytes.sum()))]
        of_responses = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(lengths)])]
        begins = (data & 0xC0) != 0x80  # UTF-8: a byte that continues no character
        texts = []
        for low, high in pairwise(of_responses.tolist()):
            part = data[low:high].tobytes()
            try:
                texts.append(part.decode())
            except UnicodeDecodeError:  # a response that was cut, or that a model wrote
                texts.append(part.decode(errors="surrogateescape"))
                begins[low:high] = list(_begins(texts[-1]))
        place = np.cumsum(begins) - 1
        has_text = num_bytes > 0
        first, last = (
            np.where(has_text, place[np.minimum(at, len(place) - 1)], 0) if len(place) else np.zeros(len(ids), np.int64)
            for at in (ends - num_bytes, ends - 1)
        )
        sizes = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        return Characters(texts, sizes, first, last, self.is_special[ids], has_text)


@dataclass(frozen=True, slots=True)
class Texts:
    """Responses whose characters are looked up some at a time: they take a hundred times the space of the ids.

    Args:
        vocabulary: Of the tokenizer that made the ids.
        ids: Flat over the responses, `[N]`.
        lengths: Tokens of each response, `[B]`.
    """

    vocabulary: Vocabulary
    ids: np.ndarray
    lengths: np.ndarray

    def parts(self, num_tokens: int = 1 << 16) -> Iterator[Characters]:
        """Yield the characters of the responses in their order, of about so many tokens at a time.

        Raises:
            MismatchError: An id is not in the vocabulary.
        """
        ends = np.cumsum(self.lengths)
        cuts = np.flatnonzero(np.diff((ends - 1) // num_tokens)) + 1
        for lengths, ids in zip(np.split(self.lengths, cuts), np.split(self.ids, ends[cuts - 1]), strict=True):
            yield self.vocabulary.characters(ids, lengths)


def special_tokens(tokenizer: "Tokenizer | PreTrainedTokenizerBase") -> np.ndarray:
    """Return which ids the tokenizer calls special, `[V]` bool."""
    size = 1 + max(tokenizer.get_vocab().values())  # some vocabularies have gaps
    return np.isin(np.arange(size), list(TokenTexts(tokenizer).special_ids))


def _not_known(name: str, kinds: set[str]) -> InputError:
    return InputError(
        f"model {name}: its tokens are neither bytes nor pieces of text (decoder {' '.join(sorted(kinds)) or 'unknown'}): "
        'characters cannot be told; give weights per token (weights.per = "token"), or another weights.estimator'
    )


def _begins(text: str) -> Iterator[bool]:
    """Yield for each byte of a text whether a character begins with it; a lone surrogate stands for one byte."""
    for character in text:
        size = 1 if "\udc80" <= character <= "\udcff" else len(character.encode())
        yield from (place == 0 for place in range(size))


def _decoder_kinds(tokenizer: "Tokenizer | None") -> set[str]:
    """Return the kinds of steps that turn tokens into text; none if it is not known."""
    decoder = None if tokenizer is None else tokenizer.decoder
    waiting: list[dict[str, Any]] = [] if decoder is None else [json.loads(decoder.__getstate__())]
    found = set()
    while waiting:
        step = waiting.pop()
        waiting += step.get("decoders", [])
        found.add(step["type"])
    return found - {"Sequence"}


def _symbols() -> dict[str, int]:
    """Return the byte of each character in a byte-level vocabulary: GPT-2 shows bytes without a glyph by later characters."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_SYMBOLS = _symbols()
_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _bytes_of_symbols(token: str) -> bytes:
    return bytes(_SYMBOLS[each] for each in token) if all(each in _SYMBOLS for each in token) else token.encode()


def _bytes_of_piece(token: str) -> bytes:
    return _BYTE_PIECES.get(token) or token.replace("▁", " ").encode()
