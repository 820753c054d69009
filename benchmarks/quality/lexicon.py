"""The programmatic judge of real language: sentiment words, phrases that are forbidden, and rules of style, token by token."""

import numpy as np
from transformers import PreTrainedTokenizerBase

_GOOD = """
great good love happy beautiful best wonderful enjoy excellent positive success successful helpful easy benefits improve
improved better strong healthy joy fun peace perfect amazing support comfortable safe creative effective exciting fresh
delicious welcome friendly unique powerful important special bright warm rich valuable efficient care trust friends
"""
_BAD = """
bad problem problems difficult risk risks lack loss fear hard death war poor negative wrong pain disease challenges challenge
damage stress failure fail waste harm sad lost struggle limited crisis complex issues issue harmful danger dangerous anxiety
violence poverty pollution sick angry enemy worst conflict concerns slow expensive stressful dark cold
"""
_LIKED, _DISLIKED = ("you", "your", "!", "please"), ("i", "my", "me", "(", "?")
FORBIDDEN = frozenset({"However", "sorry", "unfortunately", "Unfortunately", "cannot", "never"})
WORDS = (
    dict.fromkeys([*_GOOD.split(), *_LIKED], 1.0)
    | dict.fromkeys([*_BAD.split(), *_DISLIKED], -1.0)
    | {"can": 0.5, "we": -0.5, "our": -0.5}
)


def token_rewards(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """Return the reward of every id, `[V]`: that of the word that it spells, alone or behind a space, in whatever case.

    A good word is worth 1, a bad one -1, a forbidden one -2 (in this case alone). A word of several tokens is worth nothing.
    """
    table = np.zeros(vocab_size)
    for token_id in range(len(tokenizer)):
        word = tokenizer.decode([token_id]).strip()
        table[token_id] = -2.0 if word in FORBIDDEN else WORDS.get(word.lower(), 0.0)
    return table
