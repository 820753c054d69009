"""What may be published of settings and lineages: a path of this machine is cut to its last two parts."""

from collections.abc import Mapping
from pathlib import PurePosixPath

_LOCAL = ("/", "~", "./", "../", "file:")
_TEXTS = frozenset({"patterns", "positive_prompt", "negative_prompt", "transcript"})
"""Settings whose texts name no place, also if they begin like one: `~~~`, `/no_think`."""


def shorten(place: object) -> object:
    """Return a value as it may be published: the last two parts of a local path, all of anything else."""
    if not isinstance(place, str) or not place.startswith(_LOCAL) or "\n" in place:
        return place
    names = [part for part in PurePosixPath(place).parts if part != "/"]
    return "/".join(["…", *names[-2:]])


def publishable(value: object) -> object:
    """Return settings, at any depth, with every local path shortened."""
    if isinstance(value, Mapping):
        return {key: inner if key in _TEXTS else publishable(inner) for key, inner in value.items()}
    return [publishable(inner) for inner in value] if isinstance(value, list | tuple) else shorten(value)
