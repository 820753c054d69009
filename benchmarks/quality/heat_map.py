"""The figure of `real_pairs.py`: sentences of our own, with the token rewards that the head has learnt from real pairs."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from pipeline.weighing.head import Head, Responses

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
_CHARACTER, _LINE, _WIDTH, _SIZE = 7.6, 22.0, 880.0, 12.6
SPREAD = 0.3
"""Rewards are scaled to the spread that a recipe gives to the head's weights, nats, …"""
_FULL = 2.5 * SPREAD
"""… and from here on the colour is full."""
_GOOD, _BAD = "46,160,67", "230,126,34"


def draw_sentences(heads: Mapping[str, tuple[Head, float]], model: Path, path: Path) -> None:
    """Draw the sentences with the mean rewards of each dataset's head; rewards depend on the token alone.

    Args:
        heads: By dataset, with the standard deviation of the head's scores there, nats.
        model: The folder of the model whose tokens they are for.
        path: Of the SVG file.
    """
    tokenizer, parts, y = AutoTokenizer.from_pretrained(model, trust_remote_code=False), list[str](), 0.0
    for name, (head, std) in heads.items():
        title, question, *answers = SENTENCES[name]
        y += _LINE
        parts += [f'<text x="8" y="{y:.0f}" class="title">{escape(title.format(head.record["num_pairs"]))}</text>']
        y += _LINE
        parts += [f'<text x="8" y="{y:.0f}" class="question">{escape(question)}</text>']
        for answer in answers:
            ids = np.array(tokenizer(answer, add_special_tokens=False)["input_ids"], np.int32)
            rewards = head.scores(Responses(ids, np.array([len(ids)])), np.zeros(1, np.uint64))
            texts = tokenizer.batch_decode(ids[:, None])
            y = _draw_tokens(parts, texts, rewards * SPREAD / std, y + 8)
        y += _LINE / 2
    legend = "green: the annotators prefer answers with this token; orange: they prefer those without it"
    y += _LINE
    parts.append(f'<text x="8" y="{y:.0f}" class="question">{legend}</text>')
    style = (
        f"text{{font:{_SIZE}px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328;white-space:pre}}"
        ".title{font-weight:600}.question{fill:#57606a}"
    )
    size = f'viewBox="0 0 {_WIDTH:.0f} {y + 12:.0f}" width="{_WIDTH:.0f}" height="{y + 12:.0f}"'
    head_line = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{style}</style>'
    background = '<rect width="100%" height="100%" fill="white"/>'
    path.write_text("\n".join([head_line, background, *parts, "</svg>"]) + "\n", encoding="utf-8")


def _draw_tokens(parts: list[str], texts: list[str], rewards: np.ndarray, y: float) -> float:
    """Append the tokens of one answer, and return where its last line is."""
    x, y = 24.0, y + _LINE
    for text, reward in zip(texts, rewards.tolist(), strict=True):
        shown = text.strip("\n")
        width = _CHARACTER * len(shown)
        if shown != text or x + width > _WIDTH - 16:
            x, y = 24.0, y + _LINE
        if not shown:
            continue
        strength = min(1.0, abs(reward) / _FULL)
        colour = f"rgba({_GOOD if reward >= 0 else _BAD},{strength:.2f})"
        box = f'x="{x:.1f}" y="{y - 15:.0f}" width="{width:.1f}" height="20"'
        parts.append(f'<rect {box} fill="{colour}"><title>{reward:+.2f}</title></rect>')
        skip = len(shown) - len(shown.lstrip())
        word = shown.strip()
        if word:
            length = f'textLength="{_CHARACTER * len(word):.1f}" lengthAdjust="spacingAndGlyphs"'
            parts.append(f'<text x="{x + _CHARACTER * skip:.1f}" y="{y:.0f}" {length}>{escape(word)}</text>')
        x += width
    return y
