"""Turns one raw row of any usual preference layout into one pair: a prompt of messages and two responses.

Layouts: TRL standard and conversational, explicit or implicit prompt, Anthropic-HH transcripts, UltraFeedback-like lists
that repeat the prompt, with or without annotator scores. Any other row raises `Unusable`, which says why.

Does not tokenise (`chat.py`) and does not read files (`load.py`).
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.recipe import DatasetSection
from pipeline.source.messages import (
    Message,
    Unusable,
    check_text,
    is_empty,
    read_messages,
    read_tools,
)
from pipeline.source.responses import Response, split_responses
from weights_store.fingerprint import canonical_json, ordered_json
from weights_store.schemas import Reason

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair as text."""

    prompt: list[Message]
    chosen: Response
    rejected: Response
    chosen_score: float | None = None
    rejected_score: float | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def pair_id(self) -> str:
        """128-bit hash, 32 hex digits, of the prompt and both responses after Unicode NFC and trimming.

        The first 48 bits depend on the prompt alone. Tables are sorted by pair_id, so pairs with the same prompt are
        neighbours, and what they share (the prompt, often a whole response) is scored once.
        """
        extras = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        turns = _keys(self.prompt)
        prompt = [turns, extras] if any(extras.values()) else turns
        return _digest(prompt, 6) + _digest([prompt, _response_key(self.chosen), _response_key(self.rejected)], 10)

    def to_json(self) -> str:
        """Return a JSON text, all keys in the order of the row."""
        return ordered_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Pair":
        """Read what `to_json` has made."""
        return cls(**json.loads(text))


def _digest(value: object, num_bytes: int) -> str:
    return hashlib.blake2b(canonical_json(value).encode("utf-8"), digest_size=num_bytes).hexdigest()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def read_pair(row: Mapping[str, object], columns: DatasetSection) -> Pair:
    """Return the pair in one raw row.

    Raises:
        Unusable: The row is no preference pair; carries the reason for quarantine.
    """
    names = (columns.chosen_column, columns.rejected_column)
    for name in names:
        if row.get(name) is None:
            raise Unusable(Reason.MISSING_VALUE, f"column {name!r} has no value")
    chosen_turns, rejected_turns = (_turns(row[name], name, "assistant") for name in names)
    before, chosen, rejected = split_responses(chosen_turns, rejected_turns, names)
    if _response_key(chosen) == _response_key(rejected):
        raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, f"both responses are {str(chosen)[:80]!r}")
    return Pair(
        _prompt(row.get(columns.prompt_column), before, columns.prompt_column),
        chosen,
        rejected,
        _score(row, columns.chosen_score_column),
        _score(row, columns.rejected_score_column),
        *read_tools(row),
    )


def _turns(value: object, column: str, role: str) -> list[Message]:
    """Return a column as turns. Text that is no Anthropic-HH transcript is one turn of `role`."""
    if not isinstance(value, str):
        return read_messages(value, column)
    check_text(value, column)
    text = "\n\n" + value.lstrip()
    if not _TURN.match(text):
        return [{"role": role, "content": value}]
    parts = _TURN.split(text)[1:]
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(value: object, before: list[Message], column: str) -> list[Message]:
    """Return the whole chat before the responses, from the prompt column and the turns before them, which must agree."""
    own = [] if value is None or value == "" else _turns(value, column, "user")
    if isinstance(value, str) and own and own[-1] == {"role": "assistant", "content": ""}:
        own.pop()  # a transcript may end with an empty turn for the response
    prompt = _join(own, before, column)
    if all(map(is_empty, prompt)):
        raise Unusable(Reason.NO_PROMPT, f"nothing in column {column!r} and no turns before the response")
    return prompt


def _join(own: list[Message], before: list[Message], column: str) -> list[Message]:
    """Join the prompt column with the turns before a response, which may repeat it or continue it."""
    if not own or not before:
        return own or before
    own_key, before_key = _keys(own), _keys(before)
    if own_key in (before_key[: len(own)], before_key[-len(own) :]):
        return before
    if before_key == own_key[-len(before) :]:
        return own
    if before[0]["role"] == "assistant" or all(message["role"] in ("system", "developer") for message in own):
        return own + before
    raise Unusable(Reason.PROMPTS_DIFFER, f"column {column!r} is not the beginning of the turns before the response")


def _keys(messages: list[Message]) -> list[tuple[object, ...]]:
    """Return what identifies messages: role and normalised text, and whatever else they have."""
    keys: list[tuple[object, ...]] = []
    for message in messages:
        content = message["content"]
        key = (message["role"], _normal(content) if isinstance(content, str) else content)
        others = {name: value for name, value in message.items() if name not in ("role", "content")}
        keys.append((*key, others) if others else key)
    return keys


def _response_key(response: Response) -> object:
    return _normal(response) if isinstance(response, str) else _keys(response)


def _score(row: Mapping[str, object], column: str) -> float | None:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more than 308 digits
        return None
