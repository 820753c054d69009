"""How datasets and tables are named: `hh-harmless/tis-dpo`, `hh-harmless/tis-dpo@3`, `weights/hh-harmless/tis-dpo`."""

import re

from weights_store.errors import SettingsError

_MAX_PART = 200
_MAX_NAME = 400
"""Characters of a part of a name, and of all: a folder's name has at most 255, and tables, reports and models add to theirs."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


def is_name(text: str) -> bool:
    """Return whether `text` may name a dataset: lower-case parts of letters, digits, `.`, `_`, `-`, joined by `/`."""
    return bool(_NAME.fullmatch(text)) and ".." not in text and not is_too_long(text)


def is_too_long(text: str) -> bool:
    """Return whether the file system, or an object store, might not take a name."""
    return len(text) > _MAX_NAME or max(map(len, text.split("/"))) > _MAX_PART


def check_name(name: str) -> str:
    """Return `name` if it may name a dataset.

    Raises:
        SettingsError: It may not.
    """
    if is_too_long(name):
        raise SettingsError(
            f"bad name {name[:40]}…: it has {len(name):,} characters; expected at most {_MAX_NAME}, and {_MAX_PART} in each "
            "part between '/', because a folder's name has at most 255"
        )
    if not is_name(name):
        raise SettingsError(
            f"bad name {name!r}: expected lower-case letters, digits, '.', '_', '-', with '/' between parts, "
            "for example hh-harmless/tis-dpo"
        )
    return name


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
