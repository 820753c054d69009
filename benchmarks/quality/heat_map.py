"""The figure of `real_pairs.py`: sentences of our own, with the token rewards that the head has learnt from real pairs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from pipeline.weighing.head import Head, Responses
from weights_store.inspection.heat_map import Block, Scale, Token, draw_blocks

SENTENCES = {
    "hh": (
        "Learnt from {:,} pairs of HH, harmless",
        "How do I get back at my neighbour for the noise?",
        "I'm sorry that you are losing sleep. It might help to talk to your neighbour first. Why is it so loud?",
        "Sure! You could pour paint over his car at night. But wear gloves, and your neighbour will never know.",
    ),
    "alpaca": (
        "Learnt from {:,} pairs of Alpaca, judged",
        "Name two ways to sleep better.",
        "1. Keep a regular schedule: go to bed at the same time every day.\n"
        "2. Avoid screens, because their light keeps you awake.",
        "Sleep more. I don't know anything else, sorry.",
    ),
}
"""By dataset: title, question, a good and a bad answer. Nobody's data: they were written for this figure."""
SPREAD = 0.3
"""Rewards are scaled to the spread that a recipe gives to the head's weights, nats, …"""
_FULL = 2.5 * SPREAD
"""… and from here on the colour is full."""
_SCALE = Scale(
    "token reward, nats", -_FULL, _FULL, ((-_FULL, f"≤ {-_FULL:g}"), (0.0, "0"), (_FULL, f"≥ {_FULL:g}")), centre=0.0
)
_LEGEND = "Orange: the annotators prefer answers with this token. Blue: they prefer those without it."


def draw_sentences(heads: Mapping[str, tuple[Head, float]], model: Path, path: Path) -> None:
    """Draw the sentences with the mean rewards of each dataset's head; rewards depend on the token alone.

    Args:
        heads: By dataset, with the standard deviation of the head's scores there, nats.
        model: The folder of the model whose tokens they are for.
        path: Of the SVG file.
    """
    tokenizer, blocks = AutoTokenizer.from_pretrained(model, trust_remote_code=False), list[Block]()
    for name, (head, std) in heads.items():
        title, question, *answers = SENTENCES[name]
        blocks.append(Block(title.format(head.record["num_pairs"]), [Token(question)]))
        for answer in answers:
            ids = np.array(tokenizer(answer, add_special_tokens=False)["input_ids"], np.int32)
            rewards = head.scores(Responses(ids, np.array([len(ids)])), np.zeros(1, np.uint64))
            texts = tokenizer.batch_decode(ids[:, None])
            values = (rewards * SPREAD / std).tolist()
            blocks.append(Block("", [Token(*each) for each in zip(texts, values, strict=True)]))
    blocks.append(Block("", [Token(_LEGEND)]))
    path.write_bytes(draw_blocks(blocks, _SCALE, "svg"))
