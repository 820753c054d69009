"""Where words start among the tokens of a response, looked up in the tokenizer's vocabulary.

A word is the text between white space, with its punctuation. Each special token is a word. Languages written without spaces
are not split.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.marks.characters import check_ids
from train.model.checkpoint import load_tokenizer

_SPACES_OF_BYTES = tuple("ĠĊĉč")
"""Space, line feed, tab and carriage return in byte-level vocabularies."""
_SPACES = ("▁", " ", "\n", "\t", "\r", "<0x20>", "<0x0A>", "<0x09>", "<0x0D>")
"""The same in SentencePiece vocabularies."""


@dataclass(frozen=True)
class WordStarts:
    """Word boundaries by token id, `[V]` bool each."""

    before: np.ndarray
    """Whether a word starts with this token."""
    after: np.ndarray
    """Whether a word starts with the token behind it."""

    @classmethod
    def of_vocabulary(cls, tokens: list[str], special: set[int]) -> "WordStarts":
        """Use raw tokens by id, which still have their white space; decoding a single token may drop it."""
        spaces = _SPACES_OF_BYTES if "Ġ" in tokens else _SPACES
        is_special = np.isin(np.arange(len(tokens)), list(special))
        before = np.array([token.startswith(spaces) for token in tokens], dtype=bool)
        lone = ("Ġ", "▁")  # belongs to the token behind it
        after = np.array([token.endswith(spaces) and token not in lone for token in tokens], dtype=bool)
        return cls(before | is_special, after | is_special)

    @classmethod
    def of_folder(cls, folder: Path) -> "WordStarts":
        """Read the vocabulary of a tokenizer's folder.

        Raises:
            InputError: The tokenizer cannot be loaded.
        """
        tokenizer = load_tokenizer(folder)
        tokens = tokenizer.convert_ids_to_tokens(range(1 + max(tokenizer.get_vocab().values())))
        return cls.of_vocabulary([token or "" for token in tokens], set(tokenizer.all_special_ids))

    def starts(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return whether a word starts at each token, flat `[N]` bool; True at the start of each response.

        Raises:
            MismatchError: An id is not in the vocabulary.
        """
        check_ids(ids, len(self.before), "smoothing over words needs")
        found = self.before[ids]
        found[1:] |= self.after[ids[:-1]]
        found[np.cumsum(lengths) - lengths] = True
        return found
