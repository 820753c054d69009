"""Read TOML settings, apply `--set section.key=value`, and turn them into a checked model.

Serves the recipes of `pipeline` and the training configs of `train`, which may not import each other. The models are
pydantic's, but this file never imports pydantic: the store's own install stays small.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from weights_store.errors import InputError, SettingsError


class _SettingsModel(Protocol):
    """What is used of a pydantic model class."""

    model_fields: Any

    @classmethod
    def model_validate(cls, obj: Any) -> Any:
        """Build a checked instance or raise a ValueError with `.errors()`."""


T = TypeVar("T")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read one TOML file.

    Raises:
        InputError: There is no such file.
        SettingsError: It is not TOML; the message names line and column.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"no settings file at {path} ({error.strerror}); give the path of a .toml file, see recipes/"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error


def apply_overrides(settings: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `settings` with every `section.key=value` put in.

    A value is read as TOML (`3`, `1e-6`, `true`, `"text"`, `[1, 2]`) and, where that fails, as plain text, so that
    paths need no quotes.

    Raises:
        SettingsError: An override is not of the form `section.key=value`.
    """
    merged: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name) or "." in name:
            raise SettingsError(f"--set {override!r}: expected section.key=value, for example contrast.method=prompt")
        table = merged.setdefault(section, {})
        if not isinstance(table, dict):
            raise SettingsError(f"--set {override!r}: {section!r} is a value in this file, not a section")
        table[name] = _read_value(text.strip())
    return merged


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_settings(model: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Check `settings` against a pydantic `model` and build it.

    Args:
        model: A pydantic model class whose fields are sections, each a pydantic model with `extra="forbid"`.
        settings: Sections as read from TOML.
        where: File name for messages.

    Raises:
        SettingsError: Unknown key (with the nearest known one), wrong type or value, or a missing key.
    """
    checked: type[_SettingsModel] = model  # type: ignore[assignment]
    try:
        return checked.model_validate(settings)  # type: ignore[no-any-return]
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        problems = "; ".join(_describe(problem, checked) for problem in error.errors())
        raise SettingsError(f"{where}: {problems}") from error


def _describe(problem: Mapping[str, Any], model: type[_SettingsModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key, _known_keys(model))}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = f", got {problem['input']!r}" if location and not isinstance(problem["input"], dict) else ""
    return f"{key}: {message}{got}" if key else message


def _nearest(key: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"did you mean {matches[0]!r}?" if matches else "there are no known keys here"


def _known_keys(model: type[_SettingsModel]) -> list[str]:
    keys: list[str] = []
    for section, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys += [f"{section}.{name}" for name in inner] if inner else [section]
    return keys
