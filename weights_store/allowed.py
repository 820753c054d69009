"""Which places recipes, training configs and the parameters of a run may name: the operator's list, `TOKENWEIGHTS_ALLOWED`.

Whoever writes a recipe chooses what a build reads and where it writes, and the build has the operator's rights. If the list is
not set, every place is allowed; if it is set, what is below its entries and nothing else. Entries are absolute folders and the
beginnings of URIs, such as `/data:/stores:s3://bucket/team:hf://`. What people write in settings is checked, after symbolic
links; not the links inside an allowed folder, and not the environment, which is the operator's own.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

from weights_store.errors import InputError, SettingsError

ALLOWED = "TOKENWEIGHTS_ALLOWED"
"""Environment variable with the list."""
SCORE_PYTHON, TRAIN_PYTHON = "TOKENWEIGHTS_SCORE_PYTHON", "TOKENWEIGHTS_TRAIN_PYTHON"
"""Environment variables with the operator's interpreters for scoring, and for training and attribution."""
_SEPARATOR = re.compile(rf"{re.escape(os.pathsep)}(?!//|\d+(?:[/{os.pathsep}]|$))")
"""Not the colon of `s3://`, nor that of a port."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CHANGE = f"change it, or ask the operator to add the place to {ALLOWED}"


def expand_home(place: str) -> str:
    """Return a place with `~` as a home folder, `~nobody/x` as it is: in this way for what is checked and what is used."""
    return os.path.expanduser(place)  # noqa: PTH111  (a Path raises if nobody of that name is here)


def check_place(setting: str, place: str, hub: str | None = None) -> None:
    """Check that a setting names a place that the operator allows.

    Args:
        setting: Where the place is from, for the message.
        place: A path, or a URI.
        hub: What ids on the Hugging Face hub begin with in the list, if the setting takes them: `hf://` for models,
            `hf://datasets/` for datasets. What is no path of this machine and looks like an id then is one.

    Raises:
        InputError: It is outside.
        SettingsError: The list itself is wrong.
    """
    allowed = _allowed()
    if allowed is None or any(_is_below(_resolved(place, hub), entry) for entry in allowed):
        return
    resolved = _resolved(place, hub)
    where = "" if resolved == place else f" ({resolved})"
    raise InputError(
        f"{setting} {place}{where} is outside of what the operator allows: {', '.join(allowed) or 'nothing'}; {_CHANGE}"
    )


def check_interpreter_place(setting: str, python: str) -> None:
    """Check that a setting names an interpreter that the operator allows: one in the list itself, or one that is in use.

    A folder in the list allows none of the programs in it: whoever may write data there could start anything.

    Raises:
        InputError: It is another one.
        SettingsError: The list itself is wrong.
    """
    allowed = _allowed()
    known = [sys.executable, *(os.environ[name] for name in (SCORE_PYTHON, TRAIN_PYTHON) if os.environ.get(name))]
    if allowed is not None and _program(python) not in {*map(_program, known), *allowed}:
        raise InputError(
            f"{setting} {python} is none of the interpreters that the operator allows: {', '.join(known)}; leave it out, or "
            f"ask the operator to add the path of the interpreter itself to {ALLOWED}"
        )


def _allowed() -> list[str] | None:
    """Return the entries of the list, folders after symbolic links; None if it is not set."""
    text = os.environ.get(ALLOWED)
    if text is None:
        return None
    entries = []
    for entry in filter(None, _SEPARATOR.split(text)):
        if _URI.match(entry):
            entries.append(entry)
        elif Path(entry).is_absolute():
            entries += [os.path.realpath(entry), _program(entry)]  # the second for interpreters, which are links
        else:
            raise SettingsError(
                f"{ALLOWED} has {entry!r}: expected absolute folders and URIs, separated by {os.pathsep!r}, for example "
                "/data:/stores:s3://bucket/team:hf://"
            )
    return list(dict.fromkeys(entries))


def _resolved(place: str, hub: str | None) -> str:
    if place.startswith("file://"):
        place = unquote(place.removeprefix("file://"))
    if _URI.match(place):
        return place
    path = Path(expand_home(place))
    if hub is not None and not path.exists() and _HUB_ID.fullmatch(place):
        return f"{hub}{place}"
    return os.path.realpath(path)


def _is_below(place: str, entry: str) -> bool:
    if bool(_URI.match(place)) != bool(_URI.match(entry)):
        return False
    above = entry.rstrip("/")
    return place == above or place.startswith(f"{above}/")


def _program(python: str) -> str:
    """Return the absolute path of an interpreter. Only its own link stays, which says of which environment it is.

    A link among its folders counts as what it points to: the system follows it before a `..` behind it.
    """
    folder, name = os.path.split(shutil.which(python) or python)
    return str(Path(os.path.realpath(folder), name))
