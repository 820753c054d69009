"""The files of a trained policy that are worth publishing: the model, its card, its metrics and where it comes from."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from train.job.output import LINEAGE, RECORD, OutputFolder
from weights_store.digests import digest_once
from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.sharing.publishable import publishable, shorten

_CONFIGS = ("config.json", "tokenizer_config.json", "adapter/adapter_config.json")
_INDEX = "model.safetensors.index.json"
_PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""What transformers, in some of its versions, and peft record of the place of the starting model."""


def is_policy(folder: Path) -> bool:
    """Return whether a training wrote this folder."""
    return (folder / RECORD).is_file()


def policy_files(folder: Path) -> dict[str, Path | bytes]:
    """Return what to publish of the output folder of a finished training, by path in a repository.

    Left out: checkpoints, the record for resuming, and hidden files. Local paths are shortened in configs and `lineage.json`,
    which has the SHA-256 of all other files under `files`.

    Raises:
        InputError: The training is not finished, or a file of weights is missing.
    """
    if not (folder / LINEAGE).is_file():
        raise InputError(
            f"{folder} has no {LINEAGE}: the training in it is not finished; run `tokenweights train` again"
        )
    checkpoints = OutputFolder(folder).checkpoints.name
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.parts[0] not in (checkpoints, RECORD, LINEAGE):
            files[name.as_posix()] = path
    _check_weights(folder, files.keys())
    for config in files.keys() & set(_CONFIGS):
        content = load_json(folder / config)
        shortened = {key: shorten(value) if key in _PATH_KEYS else value for key, value in content.items()}
        if shortened != content:
            files[config] = _as_json(shortened)
    digests = {name: _digest(content) for name, content in files.items()}
    return files | {LINEAGE: _as_json(publishable({**load_json(folder / LINEAGE), "files": digests}))}


def _check_weights(folder: Path, names: Collection[str]) -> None:
    """Check that all weights are there, by their names: what is published without them cannot be loaded.

    Raises:
        InputError: They are not.
    """
    indexes = [name for name in names if name.endswith(_INDEX)]
    wanted = {Path(name).with_name(part).as_posix() for name in indexes for part in _parts(folder / name)}
    missing = sorted(wanted.difference(names))
    place = "" if "config.json" in names else "adapter/"  # which is alone without `lora.merge`
    if not missing and not any(re.fullmatch(rf"{place}[^/]+\.safetensors", name) for name in names):
        missing = [f"{place}*.safetensors"]
    if missing:
        raise InputError(
            f"{folder} has no {missing[0]}: a policy is pushed with all its weights; copy the folder again, or train with "
            "--overwrite"
        )


def _parts(index: Path) -> set[str]:
    weight_map = load_json(index).get("weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()


def _as_json(content: object) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _digest(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else digest_once(content)
