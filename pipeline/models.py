"""Find a model: a folder on disk or a hub id, resolved to a folder."""

import re
from pathlib import Path

from pipeline.recipe import ModelSection
from weights_store.errors import InputError

_FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Return whether `text` names something on the hub: `owner/name`, no path here, and no file by its ending."""
    path = Path(text)
    return _HUB_ID.fullmatch(text) is not None and path.suffix not in _FILE_ENDINGS and not path.exists()


def resolve_model(model: ModelSection) -> Path:
    """Return the folder of a model, downloading a hub id into the hub's cache.

    Raises:
        InputError: No such folder, and no such model on the hub (or no way to reach it).
    """
    folder = Path(model.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.path {folder} has no config.json: not a model folder")
        return folder
    if not is_hub_id(model.path):
        raise InputError(f"model.path {model.path} does not exist; give a model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model.path {model.path!r} is no folder here and could not be had from the hub: {reason}"
        ) from error
