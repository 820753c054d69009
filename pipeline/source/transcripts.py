"""Texts that hold a whole chat: which columns have them, and their split into turns.

The usual layout is that of Anthropic-HH, see `HH`. A single text may look like it by chance ("Human: a short history"), so a
column is split only if all of its texts are transcripts, or if the recipe says so. Where a row has no prompt of its own, only a
transcript can hold it: there each response that is one is split.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations

from pipeline.dataset_section import DatasetSection
from pipeline.source.messages import Message
from weights_store.errors import InputError
from weights_store.messages import logger

_log = logger(__name__)

Markers = tuple[str, str]
"""What begins a user's turn, and an assistant's."""
HH: Markers = ("\n\nHuman:", "\n\nAssistant:")
_ENCODED_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


def split_transcript(text: str, markers: Markers) -> list[Message] | None:
    """Return the turns of a transcript, without white space around them; None if the text does not begin with a turn."""
    opening = next((marker for marker in markers if text.lstrip().startswith(marker.lstrip())), None)
    if opening is None:
        return None
    roles = dict(zip(markers, ("user", "assistant"), strict=True))
    rest = text.lstrip().removeprefix(opening.lstrip())
    said, *more = re.split(f"({'|'.join(map(re.escape, markers))})", rest)
    turns = [{"role": roles[opening], "content": said.strip()}]
    turns += [{"role": roles[who], "content": said.strip()} for who, said in zip(more[::2], more[1::2], strict=True)]
    return turns


def is_encoded_chat(text: str) -> bool:
    """Return whether a text is a list of messages, written as JSON or as Python prints it."""
    return _ENCODED_CHAT.match(text) is not None


def looks_like_transcript(text: str, is_prompt: bool) -> bool:
    """Return whether nobody but a program writes such a text: it has the white space of the layout, or turns of both sides.

    A prompt must end where the assistant is to answer.
    """
    if text.startswith(HH[0]):
        return True
    if not text.lstrip().startswith(HH[0].lstrip()):
        return False
    return text.rstrip().endswith(HH[1]) if is_prompt else HH[1] in text


@dataclass
class TextCount:
    """How many texts the columns hold in rows with a prompt, and how many of them look like transcripts."""

    texts: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    encoded: Counter[str] = field(default_factory=Counter)
    """Texts that are lists of messages."""
    others: Counter[str] = field(default_factory=Counter)
    """Values that are no texts, and are not null."""

    def add(self, row: Mapping[str, object]) -> None:
        """Count the values of a row with a prompt of its own; blank texts do not count."""
        for name, value in row.items():
            if not isinstance(value, str):
                self.others[name] += value is not None
            elif value.strip():
                self.texts[name] += 1
                self.encoded[name] += is_encoded_chat(value)
                if "Human:" in value[:20]:  # quick: most texts are no transcripts
                    self.prompts[name] += looks_like_transcript(value, is_prompt=True)
                    self.responses[name] += looks_like_transcript(value, is_prompt=False)

    def are_transcripts(self, column: str, is_prompt: bool) -> bool:
        """Return whether a column holds transcripts: all of its texts are.

        Raises:
            InputError: More than half of them are, and others are not, so somebody must decide.
        """
        num_texts, num_alike = self.texts[column], (self.prompts if is_prompt else self.responses)[column]
        if num_alike == num_texts:
            return num_texts > 0
        what = f"{num_alike:,} of {num_texts:,} texts in column {column!r} look like transcripts of Human and Assistant"
        if 2 * num_alike > num_texts:
            raise InputError(
                f'{what}, the others do not; set dataset.transcript = "hh" to split the ones that do, or "no" to split none'
            )
        if num_alike:
            _log.warning(f'prepare: {what} and are read as plain text; dataset.transcript = "hh" would split them')
        return False


def transcript_columns(
    dataset: DatasetSection, prompt: str | None, responses: tuple[str, ...], count: TextCount
) -> dict[str, Markers]:
    """Return the columns whose texts are split into turns also beside a prompt, with their markers.

    Raises:
        InputError: A column holds transcripts and other texts, or chats that nobody has decoded.
    """
    columns = [*([] if prompt is None else [prompt]), *responses]
    if dataset.transcript == "no":
        return {}
    if dataset.transcript != "auto":
        markers = HH if dataset.transcript == "hh" else dataset.transcript
        return dict.fromkeys(columns, markers)
    encoded = [column for column in columns if 0 < count.texts[column] == count.encoded[column]]
    if encoded:
        raise InputError(
            f"dataset.source {dataset.source}: the texts in column {encoded[0]!r} are lists of messages, written as text; "
            'decode them first, for example with json.loads (or set dataset.transcript = "no", if they are meant as text)'
        )
    found = {column: HH for column in columns if count.are_transcripts(column, is_prompt=column == prompt)}
    _check_sides(responses, found, count)
    return found


def _check_sides(responses: tuple[str, ...], found: Mapping[str, Markers], count: TextCount) -> None:
    """Refuse to split one side and leave whole chats in the other: the model would learn to tell them by that."""
    for side, other in permutations(responses, 2):
        if side in found and other not in found and count.responses[other]:
            raise InputError(
                f"{count.responses[other]:,} of {count.texts[other]:,} texts in column {other!r} look like transcripts of "
                f'Human and Assistant, and all in column {side!r} do; set dataset.transcript = "hh" to split those that do, or '
                '"no" to split none'
            )
