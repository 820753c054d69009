"""Find the folder of a model: a local one as it is, a hub id downloaded or from the hub's cache."""

from pathlib import Path

from train.model.weight_files import check_weight_files
from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.location import local_path
from weights_store.messages import first_line

_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def find_folder(path: str, revision: str | None, setting: str) -> Path:
    """Return a local folder, or the one of a hub id, downloaded if it is not in the hub's cache.

    Args:
        path: A folder, or `owner/name` on the hub.
        revision: Commit, tag or branch of a hub id; None for its main branch.
        setting: Where the path is from, for messages.

    Raises:
        InputError: There is no such folder and no such model on the hub, it is a file, or the hub cannot be reached.
    """
    folder = local_path(path)
    if path and folder.is_dir():
        return folder
    if not path or folder.exists():
        raise InputError(
            f"{setting} {path!r} is {'a file' if path else 'empty'}; give a model folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_DOWNLOADED)))
    except HFValidationError as error:
        raise InputError(f"{setting} {path} does not exist; give a model folder or a hub id (owner/name)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{setting} {path!r} is not a local folder, and it could not be downloaded from the hub (revision "
            f"{revision or 'main'}): {first_line(error)}"
        ) from error


def check_model_folder(folder: Path, setting: str) -> Path:
    """Return a folder that holds a whole model: a config that can be read, and weight files that are whole by their headers.

    Raises:
        InputError: It does not; see `check_weight_files`.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{setting} {folder} has no config.json: not a model folder")
    check_weight_files(folder, setting)
    load_json(folder / "config.json")
    return folder
