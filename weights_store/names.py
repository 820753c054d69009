"""How datasets and tables are named: `hh-harmless/tis-dpo`, `hh-harmless/tis-dpo@3`, `weights/hh-harmless/tis-dpo`."""

import re

from weights_store.errors import SettingsError

_MAX_NAME, _MAX_PART = 150, 255
"""Characters of the name that a recipe gives, and of a part of a table's path, which file systems limit. The difference is for
what tables, models and reports add to a name."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


def is_name(text: str) -> bool:
    """Return whether `text` may name a dataset: lower-case parts of letters, digits, `.`, `_`, `-`, joined by `/`."""
    return bool(_NAME.fullmatch(text)) and ".." not in text and max(map(len, text.split("/"))) <= _MAX_PART


def check_name(name: str) -> str:
    """Return `name` if it may name a dataset.

    Raises:
        SettingsError: It may not.
    """
    if max(map(len, name.split("/"))) > _MAX_PART:
        raise SettingsError(
            f"bad name {name[:40]}…: a part of it has more than the {_MAX_PART} characters that a folder's name can have"
        )
    if not is_name(name):
        raise SettingsError(
            f"bad name {name!r}: expected lower-case letters, digits, '.', '_', '-', with '/' between parts, "
            "for example hh-harmless/tis-dpo"
        )
    return name


def check_new_name(name: str) -> str:
    """Return `name` if a recipe may give it to a dataset that is to be built.

    Raises:
        SettingsError: It may not.
    """
    if len(name) > _MAX_NAME:
        raise SettingsError(
            f"bad name {name[:40]}…: it has {len(name):,} characters, expected at most {_MAX_NAME}: a folder's name has "
            f"at most {_MAX_PART}, and tables, models and reports add to it; give a shorter one"
        )
    return check_name(name)


def split_name(text: str) -> tuple[str, int | None]:
    """Split `name@version` into name and version; without `@version` the version is None.

    Raises:
        SettingsError: The name or the version is malformed.
    """
    name, at, version = text.partition("@")
    if at and not version.isdecimal():
        raise SettingsError(f"bad version in {text!r}: expected NAME@NUMBER, for example hh-harmless/tis-dpo@3")
    return check_name(name), int(version) if at else None


def weights_path(name: str) -> str:
    """Return the table of a weight dataset."""
    return f"weights/{name}"


def tokens_path(dataset: str) -> str:
    """Return the table of a tokenised dataset."""
    return f"tokens/{dataset}"


def quarantine_path(tokens_table: str) -> str:
    """Return the quarantine that belongs to a tokens table."""
    return f"quarantine/{name_of(tokens_table)}"


def name_of(path: str) -> str:
    """Return a table's path without its kind, for example `hh-harmless/tis-dpo` of `weights/hh-harmless/tis-dpo`."""
    return path.partition("/")[2]


def base_role(role: str) -> str:
    """Return the role of a parent without the number of a further pair of prompts: `positive_logps` of `positive2_logps`."""
    return re.sub(r"\d+(?=_logps$)", "", role)
