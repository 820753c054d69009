"""The made-up language as a model reads it: prompts as ids, and the true reward of every token id.

The demo and the quality benchmark use it. `Rewards` also describes the benchmark's other worlds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.toy.language import QUESTIONS, TOPICS, Message, ToyLanguage, find_topic
from pipeline.toy.policies import Ids


@dataclass(frozen=True)
class Rewards:
    """True rewards of tokens: of the token alone, or also of what the prompt is about, or of the token before.

    `table` is `[G, V]`; the row is 0, what `group_of` says of the prompt, or the id before the token.
    """

    table: np.ndarray
    group_of: Callable[[Ids], int] | None = None
    by_previous: bool = False

    def of(self, prompt: Ids, response: Ids) -> np.ndarray:
        """Return the reward of each response token, `[T]` float32."""
        rows: int | np.ndarray = 0 if self.group_of is None else self.group_of(prompt)
        if self.by_previous:
            rows = np.concatenate([prompt[-1:], response[:-1]])
        return self.table[rows, response].astype(np.float32)

    def behind(self, prompts: Sequence[Ids], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the `NextRewards` of sampled responses to these prompts."""
        table = torch.tensor(self.table, dtype=torch.float32, device=device)
        if self.by_previous:
            return lambda _, previous: table[previous]
        if self.group_of is None:
            return lambda _prompts, _previous: table[0]
        groups = torch.tensor([self.group_of(prompt) for prompt in prompts], device=device)
        return lambda which, _: table[groups[which]]


class SpokenLanguage:
    """A language behind the tokenizer of a model that `model_maker.py` has made from it.

    Attributes:
        texts: The text of each of the 40 prompts, by the bytes of its ids.
        rewards: True rewards of ids, by the topic of the prompt.
    """

    def __init__(self, language: ToyLanguage, folder: Path, vocab_size: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        asked = [(topic, question.format(topic=topic)) for topic in TOPICS for question in QUESTIONS]
        self.texts = {self.question(text).tobytes(): text for _, text in asked}
        topics = {prompt: list(TOPICS).index(find_topic(text)) for prompt, text in self.texts.items()}
        words = [self._tokenizer.decode([i]).strip() for i in range(len(self._tokenizer))]
        table = np.zeros((len(TOPICS), vocab_size))
        for row, topic in zip(table, TOPICS, strict=True):
            row[: len(words)] = [language.rewards[topic].get(word, 0.0) for word in words]
        self.rewards = Rewards(table, lambda prompt: topics[prompt.tobytes()])

    @property
    def prompts(self) -> list[Ids]:
        """Every prompt of the language once."""
        return [np.frombuffer(prompt, np.int32) for prompt in self.texts]

    def ids(self, messages: Sequence[Message], **more: bool) -> Ids:
        """Return a rendered chat as ids, `[T]` int32."""
        return np.array(self._tokenizer.apply_chat_template(list(messages), return_dict=False, **more), np.int32)

    def question(self, text: str, *before: Message) -> Ids:
        """Return the ids of a prompt up to where the answer begins; `before` it, for example, a system prompt."""
        return self.ids([*before, {"role": "user", "content": text}], add_generation_prompt=True)
