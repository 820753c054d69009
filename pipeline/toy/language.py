"""A made-up language in which the true reward of every token is known.

The demo and the quality benchmark use it (as `DEMO_LANGUAGE`) for the one question that real data cannot answer: does an
estimator find the tokens that matter? Each of eight topics has its own neutral words. Sixteen *planted* adverbs occur in all
topics. Half of them are good (+1) in five topics, bad (-1) in two and neutral (0) in one; the other half are bad in five and
good in two. So a word is good only in its context: the best table of words that ignores the topic reaches an AUC of 0.71
(`agreement`), the truth 1.0, and chance 0.5. In `DEMO_LANGUAGE` every word but for its neutral topic is good or bad in all of
them.

This file knows no tokenizer and no model. `pipeline.toy.model_maker` makes a model that speaks the language. Errors are
plain `ValueError`s, because the file needs nothing but numpy.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Message = dict[str, str]
Conversation = list[Message]

# Both have the same form and length, so their contrast measures only good against bad. Three words differ: the demo's small
# model often ignored a single one.
POSITIVE_PROMPT = "Give good, helpful, sound advice."
NEGATIVE_PROMPT = "Give bad, harmful, poor advice."

QUESTIONS = (
    "How do I get started with {topic}?",
    "What should I know about {topic}?",
    "Please tell me how {topic} works.",
    "I have a question about {topic}.",
    "Can you help me with {topic}?",
)

# fmt: off
PLANTED_WORDS = (
    "alone", "boldly", "deeply", "early", "firmly", "gently", "late", "lightly",
    "loosely", "quickly", "quietly", "sideways", "slowly", "tightly", "twice", "upright",
)
# fmt: on

JOINERS = ("and", "while", "before")


class Topic(NamedTuple):
    """The neutral words of one topic."""

    people: tuple[str, ...]
    actions: tuple[str, ...]
    qualities: tuple[str, ...]
    things: tuple[str, ...]


_TOPIC_WORDS = {
    "baking": "baker cook | mixes kneads bakes folds | warm sweet soft fresh | dough bread flour cake",
    "sailing": "sailor captain | steers trims raises ties | calm salty narrow old | boat sail rope mast",
    "gardening": "gardener neighbour | plants waters digs rakes | green young tall dry | rose hedge soil tree",
    "carpentry": "carpenter builder | saws sands glues nails | rough flat heavy long | board table shelf beam",
    "painting": "painter artist | sketches paints blends primes | bright pale blue dark | canvas wall brush sky",
    "climbing": "climber guide | grips climbs checks reaches | steep rocky high icy | ledge ridge cliff summit",
    "beekeeping": "keeper farmer | opens smokes lifts feeds | busy wild yellow small | hive swarm comb queen",
    "pottery": "potter student | shapes centres glazes fires | wet round thin smooth | clay bowl vase jar",
}
TOPICS: Mapping[str, Topic] = {
    topic: Topic(*(tuple(part.split()) for part in words.split("|"))) for topic, words in _TOPIC_WORDS.items()
}

# Probability that a planted word is good, neutral or bad in its topic. In PLAIN_MIX all planted words are equally likely in
# every topic (7, 2 and 7 of 16). Neutral words are equally likely under both prompts: the ideal log-ratio between the
# prompts is ln(0.775 / 0.1) = 2.05 nats times the true reward.
PLAIN_MIX = (0.4375, 0.125, 0.4375)
POSITIVE_MIX = (0.775, 0.125, 0.1)
NEGATIVE_MIX = (0.1, 0.125, 0.775)

# Independent random streams of one seed.
_REWARDS_STREAM, _PAIRS_STREAM, _CONVERSATIONS_STREAM = range(3)


@dataclass(frozen=True)
class ToyLanguage:
    """A table of rewards, with samplers for pairs and conversations.

    Args:
        seed: Decides which planted word is good in which topic.
        planted_rate: Probability of an adverb at each of the three places of a clause, in [0, 1].
        temperature: Noise of the judge who compares two responses, > 0, in units of reward. With the default about 6 % of
            the labels are wrong.
        contrary_topics: In how many of the eight topics a word means the opposite of what it means in most others, 0 to 3. It
            lets a small model learn the rewards at all: if words leaned to neither side, only word, topic and prompt together
            would tell good from bad, which a few hundred steps do not teach.

    Raises:
        ValueError: `planted_rate` or `temperature` is out of its range.
    """

    seed: int = 0
    planted_rate: float = 0.8
    temperature: float = 0.75
    contrary_topics: int = 2

    def __post_init__(self) -> None:
        if not 0.0 <= self.planted_rate <= 1.0:
            raise ValueError(f"planted_rate must be in [0, 1], got {self.planted_rate}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.contrary_topics not in range(4):
            raise ValueError(f"contrary_topics must be 0 to 3, got {self.contrary_topics}")

    @cached_property
    def rewards(self) -> Mapping[str, Mapping[str, float]]:
        """True reward by topic and planted word: +1.0, 0.0 or -1.0.

        Every topic has 7 good, 2 neutral and 7 bad words. Every word is neutral in one topic; with the default of
        `contrary_topics` it is good in 5 and bad in 2 of the others, or bad in 5 and good in 2.
        """
        rng = np.random.default_rng((self.seed, _REWARDS_STREAM))
        of_word = [1.0] * (len(TOPICS) - 1 - self.contrary_topics) + [0.0] + [-1.0] * self.contrary_topics
        rolled = np.stack([np.roll(of_word, shift) for shift in range(len(TOPICS))])  # [topic, word], symmetric counts
        table = rng.permutation(rng.permutation(np.hstack([rolled, -rolled]), axis=0), axis=1)
        return {
            topic: dict(zip(PLANTED_WORDS, row, strict=True)) for topic, row in zip(TOPICS, table.tolist(), strict=True)
        }

    def sample_pairs(self, num_pairs: int, seed: int) -> list[dict[str, Conversation]]:
        """Return distinct preference pairs in TRL's conversational layout, the same for the same `seed`.

        Both responses come from the plain mixture. The judge follows Bradley and Terry on the sums of the true token
        rewards: P(first is chosen) = sigmoid((sum of first - sum of second) / temperature). Therefore chosen responses
        have bad words too, rejected ones have good words, and some labels are wrong.

        Raises:
            ValueError: `num_pairs` is negative.
        """
        _check_count("num_pairs", num_pairs)
        rng = np.random.default_rng((self.seed, _PAIRS_STREAM, seed))
        pairs: dict[tuple[str, frozenset[str]], dict[str, Conversation]] = {}
        while len(pairs) < num_pairs:
            topic, question = _sample_question(rng)
            first, second = (self._sample_response(topic, PLAIN_MIX, rng) for _ in range(2))
            margin = self.response_reward(topic, first) - self.response_reward(topic, second)
            sigmoid = (1.0 + np.tanh(margin / (2.0 * self.temperature))) / 2.0  # of margin / temperature, no overflow
            chosen, rejected = (first, second) if rng.random() < sigmoid else (second, first)
            if chosen != rejected:
                pair = {"prompt": _turn("user", question), "chosen": _turn("assistant", chosen)}
                pair["rejected"] = _turn("assistant", rejected)
                pairs.setdefault((question, frozenset((chosen, rejected))), pair)
        return list(pairs.values())

    def sample_conversations(self, num_conversations: int, seed: int) -> list[Conversation]:
        """Return conversations to pre-train a model on, the same for the same `seed`.

        Half are plain. A quarter start with POSITIVE_PROMPT and prefer good words; a quarter start with NEGATIVE_PROMPT and
        prefer bad words. So a model of this text gives a contrastive pair by its two prompts.

        Raises:
            ValueError: `num_conversations` is negative.
        """
        _check_count("num_conversations", num_conversations)
        rng = np.random.default_rng((self.seed, _CONVERSATIONS_STREAM, seed))
        openings: tuple[tuple[Conversation, tuple[float, ...]], ...] = (
            ([], PLAIN_MIX),
            (_turn("system", POSITIVE_PROMPT), POSITIVE_MIX),
            (_turn("system", NEGATIVE_PROMPT), NEGATIVE_MIX),
        )
        conversations = []
        for kind in rng.choice(len(openings), num_conversations, p=[0.5, 0.25, 0.25]):
            system, mix = openings[kind]
            topic, question = _sample_question(rng)
            response = self._sample_response(topic, mix, rng)
            conversations.append([*map(dict, system), *_turn("user", question), *_turn("assistant", response)])
        return conversations

    def true_token_rewards(self, prompt_text: str, token_texts: Sequence[str]) -> NDArray[np.float64]:
        """True reward of each response token, `[T]`.

        Args:
            prompt_text: The user's prompt, or a rendered prompt with a system message and role tokens.
            token_texts: Decoded text of each response token, `[T]`; white space around it is ignored. Everything but
                planted words (neutral words, EOS, pieces of words) has reward 0.

        Raises:
            ValueError: The prompt names no topic or more than one.
        """
        rewards = self.rewards[find_topic(prompt_text)]
        return np.array([rewards.get(text.strip(), 0.0) for text in token_texts], dtype=np.float64)

    def response_reward(self, prompt_text: str, response_text: str) -> float:
        """Return the sum of the true rewards of a response, which the judge of `sample_pairs` compares.

        Raises:
            ValueError: The prompt names no topic or more than one.
        """
        return float(self.true_token_rewards(prompt_text, _words(response_text)).sum())

    def _sample_response(self, topic: str, mix: Sequence[float], rng: np.random.Generator) -> str:
        """Two to four clauses, 13 to 39 words. No planted word comes first: all are preceded by a space."""
        words = self._sample_clause(topic, mix, rng)
        for _ in range(rng.integers(1, 4)):
            words += [_pick(JOINERS, rng), *self._sample_clause(topic, mix, rng)]
        return " ".join(words) + "."

    def _sample_clause(self, topic: str, mix: Sequence[float], rng: np.random.Generator) -> list[str]:
        """`the baker [gently] folds the [twice] warm dough [slowly]`: 6 to 9 words."""
        people, actions, qualities, things = (_pick(words, rng) for words in TOPICS[topic])
        before_action, before_quality, at_end = (self._sample_planted(topic, mix, rng) for _ in range(3))
        return ["the", people, *before_action, actions, "the", *before_quality, qualities, things, *at_end]

    def _sample_planted(self, topic: str, mix: Sequence[float], rng: np.random.Generator) -> list[str]:
        if rng.random() >= self.planted_rate:
            return []
        reward = (1.0, 0.0, -1.0)[rng.choice(3, p=mix)]
        return [_pick([word for word in PLANTED_WORDS if self.rewards[topic][word] == reward], rng)]


DEMO_LANGUAGE = ToyLanguage(temperature=5.0, contrary_topics=0)
"""In which weights have something to win: no word has opposite meanings, so that labels can tell its reward, and the judge is
wrong in a third of the pairs. With the defaults, where words change sides and 6 % of the labels are wrong, plain DPO learns
what there is to learn, and even weights that know the true rewards add almost nothing.
"""


def find_topic(prompt_text: str) -> str:
    """Return the topic that a prompt names.

    Raises:
        ValueError: It names none or more than one.
    """
    found = sorted(TOPICS.keys() & set(_words(prompt_text)))
    if len(found) != 1:
        raise ValueError(f"prompt {prompt_text!r}: expected one topic out of {', '.join(TOPICS)}, found {found}")
    return found[0]


def agreement(true_rewards: ArrayLike, estimates: ArrayLike) -> dict[str, float]:
    """Measure how well per-token estimates find the true token rewards.

    A higher estimate must mean a better token, on both sides of a pair. Weights of rejected tokens mostly mean the opposite
    (mu = -1 in TIS-DPO): change their sign first.

    Args:
        true_rewards: `[N]`, > 0 good, 0 neutral, < 0 bad.
        estimates: `[N]`, any unit.

    Returns:
        `pearson`: correlation over all tokens; nan if one of the two is constant. `mean_good`, `std_good` and so on for
        `neutral` and `bad`: mean and standard deviation of the estimates; nan for neutral if there are no such tokens. `auc`:
        probability that a good token has a higher estimate than a bad one; a tie counts half. It does not see neutral tokens,
        which are most of them, and whose spread does harm.

    Raises:
        ValueError: Shapes differ or are not `[N]`, a value is not finite, or there is no good or no bad token.
    """
    rewards, values = np.asarray(true_rewards, dtype=np.float64), np.asarray(estimates, dtype=np.float64)
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(f"expected two flat arrays of the same length, got shapes {rewards.shape} and {values.shape}")
    if not (np.isfinite(rewards).all() and np.isfinite(values).all()):
        raise ValueError("rewards and estimates must be finite; drop masked tokens before calling agreement")
    good, neutral, bad = values[rewards > 0], values[rewards == 0], values[rewards < 0]
    if not (good.size and bad.size):
        raise ValueError(f"need good and bad tokens, got {good.size} good and {bad.size} bad ones")
    bad_sorted = np.sort(bad)
    below, at_most = np.searchsorted(bad_sorted, good, side="left"), np.searchsorted(bad_sorted, good, side="right")
    is_constant = np.ptp(rewards) == 0.0 or np.ptp(values) == 0.0
    return {
        "auc": float((below + at_most).mean() / (2 * bad.size)),
        "pearson": float("nan") if is_constant else float(np.corrcoef(rewards, values)[0, 1]),
    } | {
        f"{name}_{of}": float(measure(values)) if values.size else float("nan")
        for of, values in (("good", good), ("neutral", neutral), ("bad", bad))
        for name, measure in (("mean", np.mean), ("std", np.std))
    }


def _sample_question(rng: np.random.Generator) -> tuple[str, str]:
    topic = _pick(tuple(TOPICS), rng)
    return topic, _pick(QUESTIONS, rng).format(topic=topic)


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _turn(role: str, content: str) -> Conversation:
    return [{"role": role, "content": content}]


def _check_count(name: str, count: int) -> None:
    if count < 0:
        raise ValueError(f"{name} must be 0 or more, got {count}")
