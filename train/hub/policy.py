"""The files of a trained policy that are worth publishing: the model, its card, its metrics and where it comes from."""

import json
from pathlib import Path

from train.job.output import LINEAGE, RECORD, OutputFolder
from weights_store.digests import digest_once
from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.sharing.publishable import publishable


def is_policy(folder: Path) -> bool:
    """Return whether a training wrote this folder."""
    return (folder / RECORD).is_file()


def policy_files(folder: Path) -> dict[str, Path | bytes]:
    """Return what to publish of the output folder of a finished training, by path in a repository.

    Left out: checkpoints, the record for resuming, and hidden files. `lineage.json` has its local paths shortened, and the
    SHA-256 of all other files under `files`.

    Raises:
        InputError: The training is not finished.
    """
    if not (folder / LINEAGE).is_file():
        raise InputError(
            f"{folder} has no {LINEAGE}: the training in it is not finished; run `tokenweights train` again"
        )
    checkpoints = OutputFolder(folder).checkpoints.name
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.parts[0] not in (checkpoints, RECORD, LINEAGE):
            files[name.as_posix()] = path
    digests = {name: digest_once(path) for name, path in files.items()}
    lineage = publishable({**load_json(folder / LINEAGE), "files": digests})
    return files | {LINEAGE: json.dumps(lineage, indent=2, ensure_ascii=False).encode() + b"\n"}
