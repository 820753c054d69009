"""Finds the columns of a source: those that the recipe names, and others by their usual names.

Nothing is left out without a word: what was found under another name than the plain one is logged, and so is every column that
is not read.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from pipeline.dataset_section import DatasetSection
from pipeline.source.load import is_hub_id, open_source
from pipeline.source.messages import OF_THE_TEMPLATE
from pipeline.source.rows import Source
from pipeline.source.transcripts import HH, Markers, TextCount, transcript_columns
from weights_store.errors import InputError
from weights_store.messages import logger
from weights_store.schemas import SIDES

_log = logger(__name__)

_USUAL = {
    "prompt": (
        "prompt",
        "question",
        "query",
        "instruction",
        "conversations",
        "conversation",
        "messages",
        "input",
    ),
    "input": ("input",),
    "system": ("system", "system_prompt", "system_message"),
}
"""The usual names of a column, the first choice first. Case, `_`, `-` and blanks do not count."""
_RESPONSES = ("{}", "{}_response", "response_{}", "{}_answer", "answer_{}", "{}_text")
"""The usual names of the two responses, with `chosen` and `rejected` in them."""
_SCORE = re.compile(r"(score|rating|reward|grade)s?|.+(score|rating|reward|grade)")
"""What is left of the name of a score without `chosen` or `rejected`: such a word, or a kind of it, as in `avg_rating`. What
goes on behind the word says something about the score, as `rating_rationale`."""
_PLAIN = {name: name for name in ("prompt", "chosen", "rejected", "completion", "label")}
_NO_OTHERS: Mapping[str, str] = {}
_NO_LABELS = ', or dataset.label_column = "" if each row has one response and all of them are desirable'


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a row holds what; None: no column does."""

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str | None = "prompt"
    input: str | None = None
    """Joined to a prompt that is text, as in Alpaca's `instruction` and `input`."""
    system: str | None = None
    chosen_score: str | None = None
    rejected_score: str | None = None
    transcripts: Mapping[str, Markers] = field(default_factory=dict)
    """The columns whose texts are split into turns."""
    splits_without_prompt: bool = True
    """Whether a response that is a transcript is split also in another column, if its row has no prompt of its own."""
    split: str | None = None
    """Holds the name of each row's split."""
    guesses_prompt: bool = False
    """Whether only a usual name, and not `prompt` itself, makes the prompt column one: then whole chats prevail over it."""
    guesses_input: bool = False
    """Whether only its name makes the input column one: then it is left out where whole chats do not have it."""
    combines_answers: bool = False
    """A row with several answers on a side gives a pair for each combination."""
    of_the_template: tuple[str, ...] = OF_THE_TEMPLATE
    """The columns that are handed to the chat template."""
    completion: str | None = None
    """Of unpaired rows, in place of `chosen` and `rejected`: the one response."""
    label: str | None = None
    """Says of unpaired rows whether the response is desirable. Without it, every response is."""

    @property
    def responses(self) -> tuple[str, ...]:
        """The columns of the chosen and of the rejected response, or that of the only one."""
        return (self.chosen, self.rejected) if self.completion is None else (self.completion,)

    def by_role(self) -> dict[str, str]:
        """Return the columns that there are, by what they hold."""
        responses = SIDES if self.completion is None else ("completion", "label")
        names = ("prompt", "input", "system", *responses, "chosen_score", "rejected_score", "split")
        return {name: column for name in names if (column := getattr(self, name)) is not None}

    def needed(self) -> set[str]:
        """Return every column that is read."""
        return {*self.by_role().values(), *self.of_the_template}

    def markers(self, column: str, has_prompt: bool = True) -> Markers | None:
        """Return what splits the texts of a column into turns; None: nothing."""
        own = self.transcripts.get(column)
        return HH if own is None and self.splits_without_prompt and not has_prompt else own

    def record(self) -> dict[str, object]:
        """Return what decides how rows are read."""
        found: dict[str, object] = dict(self.by_role())
        if self.transcripts:
            found["transcripts"] = {name: list(markers) for name, markers in self.transcripts.items()}
        if not self.splits_without_prompt:
            found["splits_without_prompt"] = False
        return found | ({"many_answers": "combine"} if self.combines_answers else {})


def find_columns(dataset: DatasetSection, names: Collection[str]) -> Columns:
    """Return the columns of a source among all its column names.

    Raises:
        InputError: A column that the recipe names is not there, or none holds a response.
    """
    if not names:  # no row can be read: the reasons are in quarantine
        return Columns()
    unpaired = _unpaired(dataset, names)
    chosen, rejected = SIDES if unpaired else _responses(dataset, names)
    taken = tuple(unpaired.values()) or (chosen, rejected)
    prompt = _find(dataset, "prompt", names, taken)
    input_column = _find(dataset, "input", names, (*taken, prompt)) if prompt or dataset.input_column else None
    usual_scores = score_columns(name for name in names if name not in taken) if not unpaired else []
    scores = _named_scores(dataset, names) or next(iter(usual_scores), (None, None))
    return Columns(
        chosen,
        rejected,
        prompt,
        input_column,
        _find(dataset, "system", names, (*taken, prompt)),
        *scores,
        splits_without_prompt=dataset.transcript != "no",
        split=dataset.split_column and _named(dataset, "split_column", names),
        guesses_prompt=prompt is not None and dataset.prompt_column is None and _key(prompt) != "prompt",
        guesses_input=input_column is not None and dataset.input_column is None,
        combines_answers=dataset.many_answers == "combine",
        of_the_template=tuple(name for name in OF_THE_TEMPLATE if name not in dataset.unprinted_keys),
        completion=unpaired.get("completion"),
        label=unpaired.get("label"),
    )


def score_columns(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of columns that may hold scores: equal names but for `chosen` and `rejected`, the usual ones first."""
    keys = {_key(name): name for name in names}
    usual = ("scorechosen", "chosenscore")
    found: list[tuple[int, str, str]] = []
    for key, name in keys.items():
        partner = keys.get(key.replace("chosen", "rejected"))
        kind = _SCORE.fullmatch(key.replace("chosen", "")) if "chosen" in key else None
        if partner is not None and kind is not None:
            place = usual.index(key) if key in usual else len(usual) + (kind[1] is None)
            found.append((place, name, partner))
    return [(name, partner) for _, name, partner in sorted(found, key=lambda score: score[0])]


def resolve_columns(dataset: DatasetSection, source: Source, others: Mapping[str, str] = _NO_OTHERS) -> Columns:
    """Return the columns of a source after a look at its rows, and log what was found.

    A text format is read once for it, because a column may appear in the last row; of a stream only the first rows are read.
    `others` are columns that another stage reads, by the setting of [dataset] that names them.

    Raises:
        InputError: A column is missing, or a column holds transcripts and other texts.
    """
    count, names = TextCount(), dict.fromkeys(source.columns or [])
    columns = _check_doubled(source, find_columns(dataset, names), others) if names else Columns()
    asked = {*columns.responses, columns.prompt or "", columns.input or ""}
    has_texts = columns.prompt is not None and (source.texts is None or not asked.isdisjoint(source.texts))
    if None in (source.columns, source.texts) or (dataset.transcript == "auto" and has_texts):
        for row in islice(source.rows(asked if names else None), source.max_looked_at):
            value = row.value or {}
            if not value.keys() <= names.keys():
                names.update(dict.fromkeys(value))
                columns = replace(columns, prompt=_find_prompt(dataset, names))
            if value.get(columns.prompt or "") not in (None, "", []):
                count.add(value)
        columns = find_columns(dataset, names)
    _check_others(dataset, columns, others, names)
    if columns.guesses_input and not _are_texts(columns, source, count):
        columns = replace(columns, input=None, guesses_input=False)
    transcripts = transcript_columns(dataset, columns.prompt, columns.responses, count)
    columns = replace(columns, transcripts=transcripts)
    _report(columns, names, others.values())
    return columns


def _are_texts(columns: Columns, source: Source, count: TextCount) -> bool:
    """Return whether the prompt and the input can be joined, as two texts."""
    prompt, more = columns.prompt or "", columns.input or ""
    if source.texts is not None:
        return {prompt, more} <= source.texts
    return count.texts[prompt] > 0 and not count.others[more]


def _find_prompt(dataset: DatasetSection, names: Collection[str]) -> str | None:
    """Return the prompt column of the rows so far; the one that the recipe names may come in a later row."""
    responses = (dataset.chosen_column, dataset.rejected_column, dataset.completion_column)
    return dataset.prompt_column or _find(dataset, "prompt", names, responses)


def _check_doubled(source: Source, columns: Columns, others: Mapping[str, str]) -> Columns:
    doubled = sorted(source.doubled & {*columns.needed(), *others.values()})
    if doubled:
        raise InputError(f"dataset.source {source.name} has the column {doubled[0]!r} twice; rename one of them")
    return columns


def check_source(dataset: DatasetSection, others: Mapping[str, str] = _NO_OTHERS) -> None:
    """Check before a build that the source can be opened and has its columns; a hub dataset is left to the build.

    Of a text format as many rows are read as it takes to see every column. For `others` see `resolve_columns`.

    Raises:
        InputError: The source cannot be read, or a column is not there.
    """
    if is_hub_id(dataset.source):
        return
    source = open_source(dataset)
    names = dict.fromkeys(source.columns or [])
    for row in () if names else source.rows():
        new = dict.fromkeys(row.value or {})
        if new.keys() - names:
            names.update(new)
            try:
                _check_others(dataset, find_columns(dataset, names), others, names)
                return
            except InputError:  # a later row may have the column
                continue
    _check_others(dataset, _check_doubled(source, find_columns(dataset, names), others), others, names)


# --- finding -----------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _find(dataset: DatasetSection, role: str, names: Collection[str], taken: Collection[str | None] = ()) -> str | None:
    """Return the column of a role: the one that the recipe names, or the first of the usual names that is not taken."""
    asked = getattr(dataset, f"{role}_column")
    if asked is not None:
        return _named(dataset, f"{role}_column", names) if asked else None
    free = [name for name in names if name not in taken]
    return next((name for usual in _USUAL[role] if (name := _usual(usual, free)) is not None), None)


def _usual(usual: str, names: Collection[str]) -> str | None:
    """Return the column of a usual name; the exact spelling wins over another one."""
    return usual if usual in names else next((name for name in names if _key(name) == _key(usual)), None)


def _check_others(dataset: DatasetSection, columns: Columns, others: Mapping[str, str], names: Collection[str]) -> None:
    if columns.completion is not None:  # of unpaired rows no others are read, and prepare says what to use instead
        return
    for setting, column in others.items() if names else ():  # without names no row can be read
        _named(dataset, setting, names, column)


def _named(dataset: DatasetSection, setting: str, names: Collection[str], usual: str = "") -> str:
    column = str(getattr(dataset, setting) or usual)
    if column in names:
        return column
    nearest = difflib.get_close_matches(column, names, n=1)
    hint = f"; nearest: {nearest[0]!r}" if nearest else ""
    raise InputError(
        f"dataset.source {dataset.source} has no column {column!r}; it has {', '.join(names)}. Set dataset.{setting}{hint}"
    )


def _unpaired(dataset: DatasetSection, names: Collection[str]) -> dict[str, str]:
    """Return `completion` and `label`, if rows have one response: by the recipe, or by their names; else nothing.

    Only a recipe can say that there is no label: a label that was not found would make undesirable responses desirable.
    """
    asked = {"completion": dataset.completion_column}
    if not dataset.has_no_labels:
        asked["label"] = dataset.label_column
    is_asked = any(asked.values()) or dataset.has_no_labels
    if not is_asked and any(_usual_responses(dataset, names)):
        return {}
    found: dict[str, str] = {}
    for role, column in asked.items():
        name = _named(dataset, f"{role}_column", names) if column else _usual(role, names)
        if name is not None:
            found[role] = name
        elif is_asked:
            raise InputError(
                f"dataset.source {dataset.source} has no column {role!r}, which unpaired rows need; it has {', '.join(names)}. "
                f"Set dataset.{role}_column{_NO_LABELS if role == 'label' else ''}"
            )
    if len(found) < len(asked):
        return {}
    if dataset.chosen_score_column:
        raise InputError(
            f"dataset.source {dataset.source} has one response in a row (column {found['completion']!r}): leave "
            "dataset.chosen_score_column and dataset.rejected_score_column out"
        )
    return found


def _usual_responses(dataset: DatasetSection, names: Collection[str]) -> list[str | None]:
    """Return the columns of the chosen and of the rejected response, as the recipe names them or by their usual names."""
    found = []
    for side in SIDES:
        usual = (_usual(pattern.format(side), names) for pattern in _RESPONSES)
        found.append(getattr(dataset, f"{side}_column") or next((name for name in usual if name is not None), None))
    return found


def _responses(dataset: DatasetSection, names: Collection[str]) -> tuple[str, str]:
    found: list[str] = []
    for side, column in zip(SIDES, _usual_responses(dataset, names), strict=True):
        setting = f"{side}_column"
        if column is None:
            hint = _NO_LABELS if _usual("completion", names) else ""
            raise InputError(
                f"dataset.source {dataset.source} has no column of the {side} response; it has {', '.join(names)}. "
                f"Set dataset.{setting}{hint}"
            )
        found.append(column if getattr(dataset, setting) is None else _named(dataset, setting, names))
    return found[0], found[1]


def _named_scores(dataset: DatasetSection, names: Collection[str]) -> tuple[str | None, str | None] | None:
    if dataset.chosen_score_column is None:
        return None
    if not dataset.chosen_score_column:
        return None, None
    return _named(dataset, "chosen_score_column", names), _named(dataset, "rejected_score_column", names)


def _report(columns: Columns, names: Collection[str], read_later: Collection[str]) -> None:
    """Log the columns that were found by another name than the plain one, and those that are not read."""
    found = {role: column for role, column in columns.by_role().items() if _PLAIN.get(role) != column}
    if found:
        _log.info(f"prepare: columns {', '.join(f'{role} = {column!r}' for role, column in found.items())}")
    others = [pair for pair in score_columns(names) if pair[0] not in (columns.chosen_score, *columns.responses)]
    if columns.chosen_score and others:
        listed = ", ".join(" and ".join(map(repr, pair)) for pair in others)
        _log.warning(
            f"prepare: scores are read from {columns.chosen_score!r} and {columns.rejected_score!r}, and not from {listed}; "
            "set dataset.chosen_score_column and dataset.rejected_score_column to choose"
        )
    unused = [name for name in names if name not in {*columns.needed(), *read_later}]
    if unused:
        _log.warning(f"prepare: columns that are not read: {', '.join(map(repr, unused))}")
