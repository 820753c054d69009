"""The contrastive models of a store, `models/<name>/`, and the records that cover model folders.

A record is a JSON file that is written last: a folder without one is unfinished. It says what the model was made from, and has
the SHA-256 of every other file in the folder and of itself, so no changed byte stays unseen. Names that begin with a dot are
not covered: they belong to running programs and to file managers. Models that a LoRA adapter was merged into
(`pipeline/models/lora.py`) have a record of the same kind.

Stores of earlier versions have contrastive models whose record covers the weights and the config only, or names no file at all.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, NotRequired, TypedDict, cast

from weights_store.errors import DamageError
from weights_store.fingerprint import WEIGHT_FILE, combine_model, fingerprint
from weights_store.location import Location, one_line

MODELS = "models"
RECORD = "contrast.json"

Digest = Callable[[Location, str], str]
"""Returns the SHA-256 of a file in a folder."""

_SIGNATURE = "sha256"
_NAME_DIGITS, _SHOWN_DIGITS = 16, 12


class ModelIdentity(TypedDict):
    """What determines a contrastive model, apart from the version of its training data."""

    side: str
    model: str
    """Fingerprint of the model that it started from."""
    training: dict[str, object]
    table: str
    """The weight dataset that it was trained on."""


class ModelRecord(TypedDict):
    """The content of `contrast.json`."""

    identity: ModelIdentity
    data: str
    """Fingerprint of the training data, which are `version` of the identity's table."""
    version: int
    fingerprint: NotRequired[str]
    files: NotRequired[dict[str, str]]
    """SHA-256 by path in the folder."""


_OLDEST_KEYS = {"identity", "data", "version"}
_KEYS = {*_OLDEST_KEYS, "fingerprint", "files"}


def model_name(identity: ModelIdentity, data: str) -> str:
    """Return the name of the folder of a contrastive model."""
    return fingerprint({**identity, "data": data})[:_NAME_DIGITS]


def sign_record(content: Mapping[str, object], files: Mapping[str, str]) -> bytes:
    """Return a record as bytes: `content`, the SHA-256 of each file of its folder, and the SHA-256 of all that."""
    record = {**content, "files": dict(files)}
    return json.dumps({**record, _SIGNATURE: fingerprint(record)}, indent=2).encode()


def open_record(data: bytes) -> dict[str, Any]:
    """Return the content of a record that `sign_record` made.

    Raises:
        ValueError: It is not as it was written.
    """
    record = _load_object(data)
    recorded, found = record.pop(_SIGNATURE, None), fingerprint(record)
    if recorded != found:
        raise ValueError(f"its SHA-256 is {_short(found)}, recorded is {_short(recorded)}")
    return record


def read_model_record(folder: Location) -> ModelRecord | None:
    """Return the record of the contrastive model in a folder; None if it is not finished.

    Raises:
        DamageError: The record is damaged, or is that of another folder.
        StoreError: The object store does not answer as it should.
    """
    try:
        record = _check_record(folder.read(RECORD))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise DamageError(f"{folder}/{RECORD} is damaged: {one_line(error)}; {remedy(folder)}") from error
    name, expected = folder.uri.rpartition("/")[2], model_name(record["identity"], record["data"])
    if name != expected:
        raise DamageError(
            f"{folder}/{RECORD} is the record of another model, {expected}; {remedy(folder)}, or rename it if it was moved"
        )
    return record


def is_weak(record: ModelRecord) -> bool:
    """Return whether a record does not cover every file: one of an earlier version."""
    return "files" not in record


def check_files(folder: Location, record: ModelRecord, digest: Digest) -> Iterator[str]:
    """Yield what is wrong with the files of a finished contrastive model; each line begins with the file.

    Raises:
        StoreError: The object store does not answer as it should.
    """
    if "files" in record:
        yield from compare_files(folder, RECORD, record["files"], digest)
    elif "fingerprint" in record:
        yield from _compare_fingerprint(folder, record["fingerprint"], digest)


def compare_files(folder: Location, record_name: str, files: Mapping[str, str], digest: Digest) -> Iterator[str]:
    """Yield each file of a folder that is not as its record says, with the difference."""
    there = covered_files(folder, record_name)
    for name in sorted({*files, *there}):
        if name not in there:
            yield f"{name} is missing"
        elif name not in files:
            yield f"{name} is not of this model: it was not there when {record_name} was written"
        elif (found := digest(folder, name)) != files[name]:
            yield f"{name} is damaged: its SHA-256 is {_short(found)}, recorded is {_short(files[name])}"


def covered_files(folder: Location, record_name: str) -> list[str]:
    """Return the files of a model folder that its record covers: all but hidden ones and itself."""
    return [name for name in folder.tree() if name != record_name and not f"/{name}".count("/.")]


def remedy(folder: Location) -> str:
    """Return what to do about a damaged model."""
    return f"restore it from a copy, or delete {folder}: a build then trains the model again"


def _compare_fingerprint(folder: Location, recorded: str, digest: Digest) -> Iterator[str]:
    """Compare weights and config with the fingerprint of the model, which is all that an old record has."""
    try:
        config = _load_object(folder.read("config.json"))
    except FileNotFoundError:
        yield "config.json is missing"
        return
    except (ValueError, RecursionError) as error:
        yield f"config.json is damaged: {one_line(error)}"
        return
    names = [name for name in folder.files() if fnmatch(name, WEIGHT_FILE)]
    found = combine_model(config, {name: digest(folder, name) for name in names})
    if found != recorded:
        yield f"weights or config.json are damaged: their fingerprint is {_short(found)}, recorded is {_short(recorded)}"


def _check_record(data: bytes) -> ModelRecord:
    record = _load_object(data)
    expected = [_OLDEST_KEYS, {*_OLDEST_KEYS, "fingerprint"}]
    if record.keys() & {"files", _SIGNATURE}:
        record, expected = open_record(data), [_KEYS]
    if record.keys() not in expected:
        raise ValueError(f"expected the keys {', '.join(sorted(expected[-1]))}, got {', '.join(sorted(record))}")
    identity = record["identity"]
    if not isinstance(identity, dict) or identity.keys() != ModelIdentity.__annotations__.keys():
        raise ValueError("its identity is not that of a contrastive model")
    kinds = {"data": str, "version": int, "fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(record.get(key, kind()), kind):
            raise ValueError(f"its {key} is {record[key]!r}")
    return cast(ModelRecord, record)


def _load_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got a {type(value).__name__}")
    return value


def _short(digest: object) -> str:
    return f"{digest[:_SHOWN_DIGITS]}…" if isinstance(digest, str) else "missing"
