"""Worlds in which the true reward of every token is known: a small planted one, the demo's language, and real language twice.

Responses come from the starting model or its language. A judge compares two of them by Bradley and Terry: P(first is better) =
sigmoid((difference of the sums of true token rewards) / temperature). Some labels are flipped besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.quality.lexicon import token_rewards
from pipeline.toy.language import DEMO_LANGUAGE, NEGATIVE_PROMPT, POSITIVE_PROMPT, ToyLanguage
from pipeline.toy.model_maker import make_chat_model
from pipeline.toy.policies import Base, Ids
from pipeline.toy.sampling import sample
from pipeline.toy.world import Rewards, SpokenLanguage
from weights_store.processes.lock import locked, wait_for

Row = tuple[Ids, Ids, Ids]
"""A pair: prompt, chosen, rejected."""
Kind = Literal["sparse", "dense", "topic", "previous"]
KLS = {"planted": (0.5, 1.0, 2.0), "toy": (1.0, 2.0, 3.0), "tiny": (0.75, 1.0, 2.0), "real": (1.0, 2.0, 3.0)}
"""At which policies of each kind of world are compared, nats a response."""


@dataclass(frozen=True)
class World:
    """Pairs of one seed, and all that is needed to train policies on them and to measure these."""

    base: Base
    rewards: Rewards
    rows: list[Row]
    other: list[Row]
    """More pairs of the same judge, which the policy is not trained on."""
    prompts: list[Ids]
    """Of the measurements."""
    num_new: int
    learning_rate: float
    steps: tuple[int, ...]
    """Steps after which a policy is measured; the last ends its training."""
    kls: tuple[float, float, float]
    """At which rewards are compared, nats."""
    behind: Callable[[Ids, bool], Ids] | None = None
    """A prompt behind the good or the bad system prompt."""
    scorer: Callable[[], Base] | None = None
    """Makes or loads a larger model with the same tokens."""

    def true_rewards(self) -> list[np.ndarray]:
        """Return the true token rewards of the responses of pairs, chosen and rejected in turns."""
        return [self.rewards.of(row[0], response) for row in self.rows for response in row[1:]]


def judged(
    rewards: Rewards, triples: Sequence[tuple[Ids, Ids, Ids]], temperature: float, flips: float, seed: int
) -> list[Row]:
    """Return pairs out of a prompt and two responses each; equal responses are left out."""
    rng, rows = np.random.default_rng(seed), []
    for prompt, first, second in triples:
        margin = float(rewards.of(prompt, first).sum() - rewards.of(prompt, second).sum())
        first_wins = (rng.random() < (1 + np.tanh(margin / (2 * temperature))) / 2) != (rng.random() < flips)
        if not np.array_equal(first, second):
            rows.append((prompt, first, second) if first_wins else (prompt, second, first))
    return rows


def _sampled(base: Base, prompts: Sequence[Ids], num_new: int, seed: int) -> list[tuple[Ids, Ids, Ids]]:
    """Return each prompt with two responses of the base."""
    responses = sample(base, base.plain, [prompt for prompt in prompts for _ in range(2)], num_new, seed=seed)
    return list(zip(prompts, responses[::2], responses[1::2], strict=True))


# --- (a) a small planted world -------------------------------------------------------------------------------------------

_NUM_TOPICS, _NUM_WORDS, _BOS, _EOS, _ANSWER, _FIRST_TOPIC = 8, 64, 1, 2, 3, 4
_FIRST_WORD = _FIRST_TOPIC + _NUM_TOPICS
_VOCAB = _FIRST_WORD + _NUM_WORDS


def planted(
    folder: Path,
    kind: Kind,
    seed: int,
    *,
    num_pairs: int = 1000,
    num_other: int = 0,
    flips: float = 0.0,
    temperature: float = 2.0,
    num_samples: int = 2000,
) -> World:
    """Return a world of a model with 100 k parameters that speaks a Markov chain over 64 words, with planted rewards.

    `sparse`: 12 words are worth +1 or -1; `dense`: all words are worth something, from a normal distribution; `topic`: 12 words
    are worth +1 or -1, which depends on the topic in the prompt; `previous`: one in seven pairs of words, of which the second
    gets the reward.
    """
    base = Base(planted_model(folder))
    rng = np.random.default_rng((seed, 11))
    table = np.zeros((_VOCAB if kind == "previous" else _NUM_TOPICS if kind == "topic" else 1, _VOCAB))
    words = np.arange(_FIRST_WORD, _VOCAB)
    if kind == "dense":
        table[0, words] = rng.normal(0, 0.45, _NUM_WORDS)
    elif kind == "previous":
        table[:, words] = rng.choice([-1.0, 0.0, 1.0], (_VOCAB, _NUM_WORDS), p=[0.1, 0.8, 0.1])
    else:
        table[:, rng.choice(words, 12, replace=False)] = rng.choice([-1.0, 1.0], (len(table), 12))
    group_of = (lambda prompt: int(prompt[1]) - _FIRST_TOPIC) if kind == "topic" else None
    rewards = Rewards(table, group_of, kind == "previous")
    prompts = [np.array([_BOS, _FIRST_TOPIC + topic, _ANSWER], np.int32) for topic in range(_NUM_TOPICS)]
    total = num_pairs + num_other
    rows = judged(
        rewards,
        _sampled(base, [prompts[i % len(prompts)] for i in range(total + total // 50 + 5)], 24, 1000 + seed),
        temperature,
        flips,
        seed,
    )
    return World(
        base,
        rewards,
        rows[:num_pairs],
        rows[num_pairs:total],
        prompts * (num_samples // len(prompts)),
        24,
        3e-4,
        (12, 30, 60, 120),
        KLS["planted"],
    )


def planted_model(folder: Path, num_epochs: int = 8) -> Path:
    """Train the model of the planted world once, on 4,000 texts."""
    with locked(folder.with_name(f".{folder.name}.lock"), wait_for(f"making {folder}")):
        if not (folder / "config.json").is_file():
            _train_planted_model(folder, num_epochs)
    return folder


def _train_planted_model(folder: Path, num_epochs: int) -> None:
    rng = np.random.default_rng(5)
    chances = rng.dirichlet(np.full(_NUM_WORDS, 0.25), (_NUM_TOPICS + 1, _NUM_WORDS + 1))  # the last row begins a text
    texts = torch.zeros(4000, 28, dtype=torch.long)
    for text in texts:
        topic, word, place = int(rng.integers(_NUM_TOPICS)), _NUM_WORDS, 3
        text[:3] = torch.tensor([_BOS, _FIRST_TOPIC + topic, _ANSWER])
        while place < 26 and (place < 9 or rng.random() > 0.08):
            mixed = 0.7 * chances[-1, word] + 0.3 * chances[topic, word]
            word = int(rng.choice(_NUM_WORDS, p=mixed))
            text[place], place = _FIRST_WORD + word, place + 1
        text[place] = _EOS
    config = LlamaConfig(
        vocab_size=_VOCAB, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, initializer_range=0.125, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=_BOS, eos_token_id=_EOS, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(num_epochs):
        for batch in texts[torch.randperm(len(texts))].split(64):
            loss = model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)


# --- (b) the demo's language -----------------------------------------------------------------------------------------------


def toy(
    folder: Path,
    seed: int,
    *,
    num_pairs: int = 500,
    num_other: int = 0,
    temperature: float = DEMO_LANGUAGE.temperature,
    num_samples: int = 2000,
) -> World:
    """Return the demo's language: adverbs that are good or bad nearly everywhere, and a judge who is often wrong.

    Every adverb is neutral in one topic. See `DEMO_LANGUAGE` for why.
    """
    language = replace(DEMO_LANGUAGE, temperature=temperature)
    with locked(folder.with_name(f".{folder.name}.lock"), wait_for(f"making {folder}")):
        if not folder.exists():
            make_chat_model(language.sample_conversations(6000, seed=1), folder)
    base = Base(folder)
    scorer = partial(_larger_model, language, folder)
    spoken = SpokenLanguage(language, folder, base.plain.config.vocab_size)
    rows = []
    for pair in language.sample_pairs(num_pairs + num_other, seed=1000 + seed):
        prompt = spoken.ids(pair["prompt"], add_generation_prompt=True)
        whole = [spoken.ids(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        rows.append((prompt, whole[0][len(prompt) :], whole[1][len(prompt) :]))
    system = {
        True: {"role": "system", "content": POSITIVE_PROMPT},
        False: {"role": "system", "content": NEGATIVE_PROMPT},
    }
    return World(
        base,
        spoken.rewards,
        rows[:num_pairs],
        rows[num_pairs:],
        spoken.prompts * (num_samples // len(spoken.prompts)),
        48,
        1.5e-4,
        (10, 22, 44, 88),
        KLS["toy"],
        lambda prompt, good: spoken.question(spoken.texts[prompt.tobytes()], system[good]),
        scorer,
    )


def _larger_model(language: ToyLanguage, folder: Path) -> Base:
    """Return a model of 2.8 M parameters, trained longer on the same conversations, so with the same tokenizer; made once."""
    larger = folder.with_name(f"{folder.name}-larger")
    with locked(folder.with_name(f".{larger.name}.lock"), wait_for(f"making {larger}")):
        if not larger.exists():
            sizes = {"hidden_size": 256, "num_layers": 3, "steps": 700, "learning_rate": 2e-3}
            make_chat_model(language.sample_conversations(6000, seed=1), larger, **sizes)
    own, its = (AutoTokenizer.from_pretrained(each, trust_remote_code=False).get_vocab() for each in (folder, larger))
    if own != its:
        raise ValueError(f"{folder} and {larger} have different tokens: remove both, then they are made again")
    return Base(larger)


# --- (c) real language -------------------------------------------------------------------------------------------------------

CHEERFUL = "You always write cheerful, warm, positive answers and speak to the reader."
GLOOMY = "You always write gloomy, cold, negative answers and speak about yourself."


def real(
    folder: Path,
    instructions: Sequence[str],
    seed: int,
    *,
    num_pairs: int = 1000,
    num_other: int = 0,
    temperature: float = 2.0,
    num_samples: int = 2048,
    num_new: int = 40,
    max_prompt_tokens: int = 110,
    device: str = "cpu",
    dtype: str = "float32",
    learning_rate: float = 4e-5,
    steps: tuple[int, ...] = (10, 20, 40, 80),
    kls: tuple[float, float, float] = KLS["real"],
) -> World:
    """Return samples of a real chat model, judged by sentiment words, forbidden phrases and rules of style (`lexicon.py`).

    The first 128 instructions that are short enough are kept for the measurements.
    """
    base, tokenizer = Base(folder, device, dtype), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def rendered(text: str, *before: dict[str, str]) -> Ids:
        messages = [*before, {"role": "user", "content": text}]
        return np.array(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), np.int32
        )

    texts = {rendered(text).tobytes(): text for text in instructions}
    prompts = [ids for ids in (np.frombuffer(each, np.int32) for each in texts) if len(ids) <= max_prompt_tokens]
    rewards = Rewards(token_rewards(tokenizer, base.plain.config.vocab_size)[None])
    held_out, rest = prompts[:128], prompts[128:]
    order, total = np.random.default_rng(seed).permutation(len(rest)), num_pairs + num_other
    asked = [rest[order[i % len(rest)]] for i in range(total + total // 50 + 5)]
    rows = judged(rewards, _sampled(base, asked, num_new, 1000 + seed), temperature, 0.0, seed)
    system = {True: {"role": "system", "content": CHEERFUL}, False: {"role": "system", "content": GLOOMY}}
    return World(
        base,
        rewards,
        rows[:num_pairs],
        rows[num_pairs:total],
        held_out * (num_samples // len(held_out)),
        num_new,
        learning_rate,
        steps,
        kls,
        lambda prompt, good: rendered(texts[prompt.tobytes()], system[good]),
    )


def tiny(folder: Path, instructions: Sequence[str], seed: int, **settings: Any) -> World:
    """Return real language that two cores can do: a chat model of 8 M parameters, short prompts, responses of 24 tokens."""
    return real(
        folder,
        instructions,
        seed,
        temperature=1.0,
        num_new=24,
        max_prompt_tokens=32,
        learning_rate=6e-5,
        steps=(10, 20, 40, 60),
        kls=KLS["tiny"],
        **settings,
    )


def instructions_of(path: Path) -> list[str]:
    """Return the last user turn of every prompt in a Parquet file of preference pairs once, in a fixed random order."""
    texts = sorted({prompt[-1]["content"] for prompt in pl.read_parquet(path, columns=["prompt"])["prompt"]})
    np.random.default_rng(0).shuffle(texts)
    return texts
