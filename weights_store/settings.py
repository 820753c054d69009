"""Read TOML settings, apply `--set section.key=value`, and turn them into a checked model.

Serves the recipes of `pipeline` and the training configs of `train`. The models are pydantic's, but this file never imports
pydantic: the store's own install stays small.
"""

import difflib
import json
import os
import re
import tomllib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, get_args

from weights_store.allowed import check_place
from weights_store.errors import InputError, SettingsError

DEFAULT_STORE = "stores/default"
STORE = "TOKENWEIGHTS_STORE"
"""Environment variable with the root of the store for commands and recipes that name none."""


def default_store() -> str:
    """Return the root of the store where none is named: `TOKENWEIGHTS_STORE`, or `stores/default`."""
    return os.environ.get(STORE) or DEFAULT_STORE


class _Field(Protocol):
    """What is used of a field of a pydantic model."""

    annotation: object
    discriminator: object
    examples: list[object] | None


class _SettingsModel(Protocol):
    """What is used of a pydantic model class."""

    model_fields: Mapping[str, _Field]

    @classmethod
    def model_validate(cls, obj: object) -> object:
        """Build a checked instance or raise a ValueError with `.errors()`."""


T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of settings file, the command that reads it, and the sections that only this kind has."""

    name: str
    command: str
    sections: tuple[str, ...]


KINDS = (
    Kind(
        "recipe",
        "build",
        ("dataset", "contrast", "score", "weights", "attribute", "anchors", "schedule", "store"),
    ),
    Kind("training config", "train", ("data", "lora", "loss", "optim", "eval", "gate", "parallel", "output")),
)
_GIVE = "give the path of a .toml file, see recipes/"
_TOML = "[section] lines, and below them key = value"
_ENCODINGS = {BOM_UTF32_LE: "UTF-32", BOM_UTF32_BE: "UTF-32", BOM_UTF16_LE: "UTF-16", BOM_UTF16_BE: "UTF-16"}
"""By their byte order marks; those of UTF-32 first, which begin with one of UTF-16."""
_YAML = re.compile(r"^(---\s*$|[\w-]+:(\s|$))", re.MULTILINE)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read one TOML file, with or without a byte order mark.

    Raises:
        InputError: There is no such file, or it is where the operator allows none.
        SettingsError: It is not TOML, or empty; the message says what it is, or names line and column.
    """
    path = Path(path)
    check_place("the settings file", str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"no settings file at {path} ({error.strerror}); {_GIVE}") from error
    text = _decode(path, data)
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} {_describe_no_toml(text, error)}") from error
    except RecursionError as error:
        raise SettingsError(f"{path} is not valid TOML: nested too deeply") from error
    if not settings:
        raise SettingsError(f"{path} has no settings; {_GIVE}")
    return settings


def _decode(path: Path, data: bytes) -> str:
    """Return the text of a file.

    Raises:
        SettingsError: It is not in UTF-8, or no text.
    """
    if not data:
        raise SettingsError(f"{path} is empty; {_GIVE}")
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        if max(data[::2].count(0), data[1::2].count(0)) < len(data) // 3:
            raise SettingsError(f"{path} is not a text file; {_GIVE}")
        encoding = "UTF-16"  # without a mark: every other byte of Latin text is 0
    if encoding is not None:
        raise SettingsError(f"{path} is in {encoding}, expected UTF-8; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = 1 + data.count(b"\n", 0, error.start), data[error.start]
        raise SettingsError(
            f"{path} is not in UTF-8: line {line} has the byte {byte:#04x}; save it in UTF-8"
        ) from error


def _describe_no_toml(text: str, error: tomllib.TOMLDecodeError) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        is_yaml = _YAML.search(text) and "=" not in text.partition(":")[0]
        return f"is not valid TOML, it looks like YAML; write {_TOML}" if is_yaml else f"is not valid TOML: {error}"
    return f"is JSON, expected TOML: {_TOML}; see recipes/"


def apply_overrides(settings: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `settings` with every `section.key=value` put in; a section may lie in another one.

    A value is read as TOML (`3`, `1e-6`, `true`, `"text"`, `[1, 2]`) and, where that fails, as plain text, so that
    paths need no quotes.

    Raises:
        SettingsError: An override is not of the form `section.key=value`.
    """
    merged: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, name = key.strip().split(".")
        if not (equals and sections and name and all(sections)):
            raise SettingsError(f"--set {override!r}: expected section.key=value, for example contrast.method=prompt")
        table = merged
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise SettingsError(f"--set {override!r}: {section!r} is a value in this file, not a section")
        try:
            table[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[name] = text.strip()
    return merged


def parse_settings(model: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Check `settings` against a pydantic `model` and build it.

    The fields of `model` are sections. A section is a pydantic model with `extra="forbid"`, or a union of such models that a
    discriminator tells apart (`loss.name`): then only the keys of the named model are known. `where` is the file name for
    messages.

    Raises:
        SettingsError: Unknown key (with the nearest known one), wrong type or value, or a missing key; or a file of the other
            kind, see `KINDS`.
    """
    checked: type[_SettingsModel] = model  # type: ignore[assignment]
    _check_kind(checked, settings, where)
    try:
        return checked.model_validate(settings)  # type: ignore[return-value]
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        # A default that depends on a wrong value is not a second mistake.
        problems = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        raise SettingsError(f"{where}: " + "; ".join(_describe(problem, checked) for problem in problems)) from error


def kind_of(settings: Mapping[str, Any]) -> Kind:
    """Return the kind that most sections of a file belong to; of a file without any known section, the first."""
    return max(KINDS, key=lambda kind: len(_sections_of(kind, settings)))


def _sections_of(kind: Kind, settings: Mapping[str, Any]) -> list[str]:
    return [name for name in settings if name in kind.sections]


def _check_kind(model: type[_SettingsModel], settings: Mapping[str, Any], where: str) -> None:
    """Refuse a file of the other kind: every one of its keys would be unknown."""
    found = kind_of(settings)
    for own in KINDS:
        if set(own.sections) <= model.model_fields.keys() and len(_sections_of(found, settings)) > len(
            _sections_of(own, settings)
        ):
            raise SettingsError(
                f"{where} is a {found.name} (sections {', '.join(_sections_of(found, settings))}), not a {own.name}; use it "
                f"with `tokenweights {found.command}`"
            )


def _describe(problem: Mapping[str, Any], model: type[_SettingsModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    field = model.model_fields.get(location[0]) if location else None
    discriminator = field.discriminator if field else None
    # Behind a section with several models pydantic puts the name of the chosen one.
    chosen = location.pop(1) if discriminator and len(location) > 1 else None
    key, value = ".".join(location), problem["input"]
    if problem["type"] == "extra_forbidden":
        return _describe_unknown(key, value, model, chosen)
    if problem["type"] == "missing":
        inner = _models_of(field)[chosen or ""].model_fields[location[1]] if field and len(location) == 2 else None
        example = f", for example {inner.examples[0]!r}; it has no default" if inner and inner.examples else ""
        return f"missing key {key!r}{example}"
    if problem["type"] == "union_tag_not_found":
        return _describe_unnamed(key, value, model)
    if problem["type"] == "union_tag_invalid":
        *names, last = problem["ctx"]["expected_tags"].split(", ")
        return f"{key}.{discriminator}: Input should be {', '.join(names)} or {last}, got {problem['ctx']['tag']!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = f", got {value!r}" if location and not isinstance(value, dict) else ""
    return f"{key}: {message}{got}" if key else message


def _describe_unnamed(section: str, value: Mapping[str, object], model: type[_SettingsModel]) -> str:
    """Describe a section without the key that chooses its model: this key may be misspelt."""
    field = model.model_fields[section]
    known = {name for inner in _models_of(field).values() for name in inner.model_fields}
    unknown = [_describe_unknown(f"{section}.{name}", value[name], model, None) for name in value if name not in known]
    return "; ".join(unknown or [f"missing key '{section}.{field.discriminator}'"])


def _describe_unknown(key: str, value: object, model: type[_SettingsModel], chosen: str | None) -> str:
    section, _, name = key.partition(".")
    field = model.model_fields.get(section)
    branches = _models_of(field) if field else {}
    readers = [branch for branch, inner in branches.items() if name in inner.model_fields]
    if field and chosen and readers:
        return (
            f"{section}.{field.discriminator}={chosen!r} does not read {key}, got {value!r}; leave it out (it belongs to "
            f"{', '.join(readers)})"
        )
    known: list[str] = []  # keys of all sections, but of this one those of its chosen model alone
    for other, other_field in model.model_fields.items():
        known += _keys_of(other, other_field, chosen if other == section else None)
    if not known:
        return f"unknown key {key!r}; there are no known keys here"
    if field is None and not difflib.get_close_matches(section, model.model_fields, n=1, cutoff=0.5):
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if not nearest:
            return f"unknown section {section!r}; expected one of {', '.join(model.model_fields)}"
    # A key of the same name deeper in this section, else the one that is written most alike.
    same = [other for other in known if other.startswith(f"{section}.") and other.endswith(f".{name}")]
    nearest = same or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {nearest[0]!r}?"


def _keys_of(name: str, field: _Field, chosen: str | None = None) -> list[str]:
    """Return the keys of a section and of the sections in it; of a value, its own. `chosen` is the one model that counts."""
    models = _models_of(field)
    wanted = [models[chosen]] if chosen else models.values()
    keys = [
        _keys_of(f"{name}.{key}", inner_field) for inner in wanted for key, inner_field in inner.model_fields.items()
    ]
    return [key for found in keys for key in found] or [name]


def _models_of(field: _Field) -> dict[str, type[_SettingsModel]]:
    """Return the models that a section may be, by the value of their discriminator; one without a name where there is none."""
    models = [part for part in (field.annotation, *get_args(field.annotation)) if hasattr(part, "model_fields")]
    if not field.discriminator:
        return dict(zip([""], models, strict=False))
    names = [get_args(part.model_fields[str(field.discriminator)].annotation) for part in models]
    return {name: part for part, aliases in zip(models, names, strict=True) for name in aliases}
