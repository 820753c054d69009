"""Content fingerprints: SHA-256 over canonical JSON of what determines a result.

Paths, machines, batch sizes and clock times are never part of one. What cannot be hashed stably raises; there is no fallback to
`str()`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from weights_store.digests import digest_file, digest_once
from weights_store.errors import InputError

WEIGHT_FILE = "*.safetensors"
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
# The settings of tokenizer_config.json that change ids or rendered text; others, such as class names, may differ.
_TOKENIZER_SETTINGS = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
)


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces.

    Raises:
        TypeError: `value` holds something that has no stable JSON form (a set, an object, a non-string key).
        ValueError: `value` holds NaN or an infinity.
    """
    _check_plain(value, "value")
    return _CANONICAL.encode(value)


def ordered_json(value: object) -> str:
    """Return a JSON text of `value` without spaces, keys in their own order: chat templates print tools in that order."""
    return _ORDERED.encode(value)


# Made once: `json.dumps` with any option makes an encoder for every call, and prepare calls these four times a pair.
_ORDERED = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"cannot fingerprint {where}: {value} is not finite")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"cannot fingerprint {where}: key {key!r} is a {type(key).__name__}, expected str")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | bool | int):
        raise TypeError(f"cannot fingerprint {where}: a {type(value).__name__} has no stable form")


def fingerprint(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, 64 hex digits.

    Raises:
        TypeError, ValueError: `value` cannot be hashed stably, see `canonical_json`.
    """
    return fingerprint_text(canonical_json(value))


def fingerprint_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """Return the SHA-256 of the bytes of one file."""
    return digest_file(Path(path))


def fingerprint_model(folder: str | Path) -> str:
    """Return the fingerprint of a model: the bytes of its weight files, and its config without paths and library versions.

    Raises:
        InputError: The folder holds no `config.json` or no weight file.
    """
    folder = Path(folder)
    weight_files = list(folder.glob(WEIGHT_FILE))
    if not (folder / "config.json").is_file() or not weight_files:
        raise InputError(f"{folder} is not a model folder: expected config.json and *.safetensors files")
    return combine_model(load_json(folder / "config.json"), {path.name: digest_once(path) for path in weight_files})


def combine_model(config: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the fingerprint of a model from its config and the SHA-256 of each weight file, by name."""
    determines = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return fingerprint({"config": determines, "files": dict(files)})


def load_chat_template(folder: str | Path, name: str = "default") -> str | None:
    """Return a chat template of a tokenizer folder, None if it has none of this name.

    Some models have a second one, `tool_use`, for chats with tools.

    Raises:
        InputError: A file of it is not UTF-8 text, or not what transformers writes.
    """
    folder = Path(folder)
    file = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text: {error}") from error
    if (folder / "chat_template.jinja").is_file() or not (folder / "tokenizer_config.json").is_file():
        return None
    template = load_json(folder / "tokenizer_config.json").get("chat_template")
    try:
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get(name)
        elif name != "default":
            return None
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is no list of named templates") from error
    if not isinstance(template, str | None):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}, expected text"
        )
    return template


def fingerprint_chat_template(folder: str | Path) -> str | None:
    """Return the SHA-256 of the chat template of a tokenizer folder, None if it has none.

    Weight datasets record it unless their recipe has its own template. If `fingerprint_tokenizer` differs, it tells whether the
    template or the vocabulary has changed.
    """
    template = load_chat_template(folder)
    return None if template is None else fingerprint_text(template)


def fingerprint_tokenizer(folder: str | Path) -> str:
    """Return the fingerprint of everything that turns text into ids: vocabulary, merges, special tokens, chat template.

    Raises:
        InputError: The folder holds no tokenizer.
    """
    folder = Path(folder)
    content: dict[str, object] = {"chat_template": load_chat_template(folder)}
    tool_template = load_chat_template(folder, "tool_use")
    if tool_template is not None:
        content["tool_template"] = tool_template
    backend = folder / "tokenizer.json"
    if not backend.is_file():
        files = [folder / name for name in _SLOW_TOKENIZER_FILES if (folder / name).is_file()]
        if not files:
            raise InputError(
                f"{folder} holds no tokenizer: expected tokenizer.json or {', '.join(_SLOW_TOKENIZER_FILES)}"
            )
        content["files"] = {path.name: fingerprint_file(path) for path in files}
    if (folder / "tokenizer_config.json").is_file():
        config = load_json(folder / "tokenizer_config.json")
        settings = {key: config[key] for key in _TOKENIZER_SETTINGS if key in config}
        # Older configs store a special token as an object with a `content`.
        content["settings"] = {k: v.get("content", v) if isinstance(v, dict) else v for k, v in settings.items()}
    if not backend.is_file():
        return fingerprint(content)
    return _with_backend(canonical_json(content), backend, backend.read_bytes())


@lru_cache(maxsize=2)
def _with_backend(content: str, path: Path, data: bytes) -> str:
    """Return the fingerprint of `content` with the data of a `tokenizer.json`; a build asks for it several times.

    A vocabulary of 150,000 tokens takes nearly a second.
    """
    backend = {key: value for key, value in _parse(path, data).items() if key not in ("truncation", "padding")}
    return fingerprint({**json.loads(content), "backend": backend})


def load_json(path: Path) -> dict[str, Any]:
    """Return one JSON file of a model folder.

    Raises:
        InputError: It is not valid JSON, or no object.
    """
    return _parse(path, path.read_bytes())


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def explain_difference(old: object, new: object, where: str = "") -> list[str]:
    """Return one line per field that differs, `path: old -> new`, sorted by path. Fingerprints are cut to 12 digits."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = {key: f"{where}.{key}" if where else str(key) for key in sorted({*old, *new})}
        return [line for key, at in keys.items() for line in explain_difference(old.get(key), new.get(key), at)]
    return [] if old == new else [f"{where}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text[1:13] if re.fullmatch('"[0-9a-f]{64}"', text) else text
