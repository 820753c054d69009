"""Turns one raw row of any usual preference layout into one pair: a prompt of messages and two responses, or one.

Layouts: TRL standard and conversational, explicit or implicit prompt, transcripts, UltraFeedback-like lists that repeat the
prompt, Alpaca's instruction and input, a system column, with or without annotator scores. `Unusable` says why any other row is
no pair.

Does not tokenise (`chat/`), does not read files (`load.py`) and does not find columns (`columns.py`).
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any

from pipeline.source.columns import Columns
from pipeline.source.messages import (
    SYSTEM_ROLES,
    Message,
    Unusable,
    check_text,
    is_empty,
    is_plain,
    read_messages,
    read_tools,
    texts_of,
)
from pipeline.source.responses import Response, as_turns, is_whole, split_response, split_responses
from pipeline.source.transcripts import Markers, is_encoded_chat, split_transcript
from weights_store.fingerprint import canonical_json, ordered_json
from weights_store.schemas import Reason

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair as text; an unpaired row has no messages on the side that its label does not name."""

    prompt: list[Message]
    chosen: Response
    rejected: Response
    chosen_score: float | None = None
    rejected_score: float | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    ignores_prompt: bool = field(default=False, compare=False)
    """Whether the prompt column contradicts the responses, and was not read because only its name made it one. Not stored."""

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

    @property
    def num_characters(self) -> int:
        """Characters of all its texts."""
        turns = (*self.prompt, *as_turns(self.chosen), *as_turns(self.rejected))
        return sum(len(text) for message in turns for text in texts_of(message))

    def to_json(self) -> str:
        """Return a JSON text, all keys in the order of the row."""
        return ordered_json({name: getattr(self, name) for name in _STORED})

    @classmethod
    def from_json(cls, text: str) -> "Pair":
        """Read what `to_json` has made."""
        return cls(**json.loads(text))


_STORED = [each.name for each in fields(Pair) if each.name != "ignores_prompt"]


def _digest(value: object, num_bytes: int) -> str:
    return hashlib.blake2b(canonical_json(value).encode("utf-8"), digest_size=num_bytes).hexdigest()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def read_pair(row: Mapping[str, object], columns: Columns) -> Pair:
    """Return the pair in one raw row with one answer on each side.

    Raises:
        Unusable: The row is no preference pair; carries the reason for quarantine.
    """
    names = columns.responses
    for name in (*names, *filter(None, [columns.label])):
        if row.get(name) is None:
            raise Unusable(Reason.MISSING_VALUE, f"column {name!r} has no value")
    own, problem = _own_prompt(row, columns)
    more = _text(row, columns.input)
    has_prompt = bool(own or more.strip())
    turns = [_turns(row[name], name, "assistant", columns.markers(name, has_prompt)) for name in names]
    before, chosen, rejected = _responses(row, turns, columns)
    own = _without_response(own, (chosen, rejected))
    _check_same_point(own, before, turns, columns)
    try:
        if problem is not None:
            raise problem
        prompt, ignores_prompt = _whole_prompt(own, more, before, columns), False
    except Unusable as error:
        if not is_whole(before):
            raise
        if not columns.guesses_prompt:
            remedy = 'dataset.prompt_column = "" would take the prompt from the responses alone'
            raise Unusable(error.reason, f"{error.detail}; {remedy}") from error
        prompt, ignores_prompt = before, True
    if all(map(is_empty, prompt)):
        raise Unusable(Reason.NO_PROMPT, _why_no_prompt(row, columns))
    return Pair(
        _with_system(row, columns, prompt),
        chosen,
        rejected,
        read_score(row.get(columns.chosen_score)) if columns.chosen_score else None,
        read_score(row.get(columns.rejected_score)) if columns.rejected_score else None,
        *read_tools({name: row.get(name) for name in columns.of_the_template}),
        ignores_prompt=ignores_prompt,
    )


def _responses(
    row: Mapping[str, object], turns: list[list[Message]], columns: Columns
) -> tuple[list[Message], Response, Response]:
    """Return the turns before the responses, and both responses; of an unpaired row one has no messages."""
    if columns.completion is not None:
        none = list[Message]()
        before, response = split_response(turns[0], columns.completion)
        is_desirable = columns.label is None or read_label(row[columns.label], columns.label)
        return (before, response, none) if is_desirable else (before, none, response)
    before, chosen, rejected = split_responses(turns[0], turns[1], (columns.chosen, columns.rejected))
    if _response_key(chosen) == _response_key(rejected):
        raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, f"both responses are {str(chosen)[:80]!r}")
    return before, chosen, rejected


def read_label(value: object, column: str) -> bool:
    """Return whether a response is desirable, from a truth value, or the number 0 or 1.

    Raises:
        Unusable: It is anything else.
    """
    if isinstance(value, bool | int | float | Decimal) and value in (0, 1):
        return bool(value)
    raise Unusable(Reason.BAD_LABEL, f"column {column!r} is {str(value)[:40]!r}, expected true or false, or 1 or 0")


def _without_response(own: list[Message], responses: tuple[Response, Response]) -> list[Message]:
    """Return the prompt column without a response at its end: `messages` is often a copy of the whole chosen chat."""
    if not own or own[-1]["role"] != "assistant":
        return own
    keys = _keys(own)
    ends = [len(end) for response in responses if (end := _keys(as_turns(response))) and end == keys[-len(end) :]]
    return own[: len(own) - max(ends, default=0)]


def _turns(value: object, column: str, role: str, markers: Markers | None) -> list[Message]:
    """Return a column as turns. Text that is no transcript is one turn of `role`."""
    if not isinstance(value, str):
        return read_messages(value, column)
    check_text(value, column)
    turns = split_transcript(value, markers) if markers else None
    return turns or [{"role": role, "content": value}]


def _own_prompt(row: Mapping[str, object], columns: Columns) -> tuple[list[Message], Unusable | None]:
    """Return the turns in the prompt column; none and the problem if it cannot be read, for the responses may do without it."""
    column, problem = columns.prompt or "", None
    value = row.get(column)
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    try:
        own = [] if is_blank else _turns(value, column, "user", columns.markers(column))
    except Unusable as error:
        own, problem = [], error
    if isinstance(value, str) and own and own[-1] == {"role": "assistant", "content": ""}:
        own.pop()  # a transcript may end with an empty turn for the response
    return own, problem


def _check_same_point(own: list[Message], before: list[Message], turns: list[list[Message]], columns: Columns) -> None:
    """Refuse a response alone beside a whole chat that goes on after the prompt column: it answers an earlier turn."""
    chats = [name for name, side in zip(columns.responses, turns, strict=True) if is_whole(side)]
    if len(turns) == 1 or len(chats) != 1 or all(message["role"] in SYSTEM_ROLES for message in own):
        return
    own_key, before_key = _keys(own), _keys(before)
    if own_key in _beginnings(before_key, len(own)) and own_key != before_key[-len(own) :]:
        raise Unusable(
            Reason.PROMPTS_DIFFER, f"column {chats[0]!r} goes on after the prompt in column {columns.prompt!r}"
        )


def _beginnings(keys: list[tuple[object, ...]], num: int) -> tuple[object, object]:
    """Return the first keys of a chat, with its system turn and without."""
    num_system = sum(key[0] in SYSTEM_ROLES for key in keys[:1])
    return keys[:num], keys[num_system:][:num]


def _whole_prompt(own: list[Message], more: str, before: list[Message], columns: Columns) -> list[Message]:
    """Join the prompt column, the text of the input column and the turns before the responses."""
    try:
        return _join(_with_input(own, more), before, columns.prompt or "")
    except Unusable:
        if not (columns.guesses_input and is_whole(before)):
            raise
        return _join(own, before, columns.prompt or "")


def _with_input(own: list[Message], more: str) -> list[Message]:
    """Return turns with the text of the input column below the last one, unless that has it as lines of its own."""
    if not more.strip():
        return own
    if not (own and own[-1]["role"] == "user" and is_plain(own[-1])):
        return [*own, {"role": "user", "content": more}]
    text = own[-1]["content"]
    if f"\n{more.strip()}\n" in f"\n{text}\n":
        return own
    return [*own[:-1], {"role": "user", "content": f"{text}\n\n{more}"}]


def _with_system(row: Mapping[str, object], columns: Columns, prompt: list[Message]) -> list[Message]:
    """Return the chat with the text of the system column as its first turn; a system turn that is there must say the same."""
    text = _text(row, columns.system)
    if not text.strip():
        return prompt
    system = {"role": "system", "content": text}
    if prompt[0]["role"] not in SYSTEM_ROLES:
        return [system, *prompt]
    if _keys([{**prompt[0], "role": "system"}]) != _keys([system]):
        raise Unusable(Reason.PROMPTS_DIFFER, f"column {columns.system!r} is not the system turn of the chat")
    return prompt


def _text(row: Mapping[str, object], column: str | None) -> str:
    """Return the text of a column that may be missing or null."""
    value = row.get(column) if column is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(Reason.NOT_TEXT, f"column {column!r} is a {type(value).__name__}, expected text")
    check_text(value, str(column))
    return value


def _why_no_prompt(row: Mapping[str, object], columns: Columns) -> str:
    column = columns.responses[0]
    response = row.get(column)
    if isinstance(response, str) and is_encoded_chat(response):
        return (
            f"the text in column {column!r} is a list of messages, written as text; decode it first, for example with "
            "json.loads"
        )
    if columns.prompt is not None:
        return f"nothing in column {columns.prompt!r} and no turns before the response"
    return (
        f"no prompt column was found, and {str(response)[:40]!r} in column {column!r} begins no transcript (usual are "
        "'\\n\\nHuman:' and '\\n\\nAssistant:'); set dataset.prompt_column, or the two markers in dataset.transcript"
    )


def _join(own: list[Message], before: list[Message], column: str) -> list[Message]:
    """Join the prompt column with the turns before a response, which may repeat it or continue it."""
    if not own or not before:
        return own or before
    own_key, before_key = _keys(own), _keys(before)
    if own_key in (*_beginnings(before_key, len(own)), before_key[-len(own) :]):
        return before
    if before_key == own_key[-len(before) :]:
        return own
    if before[0]["role"] == "assistant" or all(message["role"] in SYSTEM_ROLES for message in own):
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


def read_score(value: object) -> float | None:
    """Return a score as a finite number that float32 can hold, also from a number in a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        score = float(value)
    except (ValueError, OverflowError):  # no number, or an integer of more than 308 digits
        return None
    return score if abs(score) <= _FLOAT32_MAX else None
