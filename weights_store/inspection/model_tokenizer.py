"""Which folder's tokenizer turns the ids of a weight dataset into texts: the one given, or that of the recipe's model.

The store has no package that loads tokenizers: whoever calls brings the function that does.
"""

from collections.abc import Callable
from pathlib import Path

from weights_store.errors import InputError, MissingExtraError
from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.location import local_path
from weights_store.messages import logger
from weights_store.tables.metadata import CommitMetadata
from weights_store.views.token_texts import Tokenizer

_log = logger(__name__)

_HINT = "--tokenizer FOLDER, the folder of the model that the pairs were tokenised with, shows texts"


def load_known_tokenizer(
    metadata: CommitMetadata, given: str | None, load: Callable[[str], Tokenizer]
) -> Tokenizer | None:
    """Return the tokenizer of a version, see `tokenizer_folder`; None, with a line for people, if there is none.

    `load` returns the tokenizer of a model folder. One that was not asked for is done without if the package for it is not
    installed.

    Raises:
        MissingExtraError: It was asked for.
    """
    folder, note = tokenizer_folder(metadata, given)
    if note is not None:
        _log.info(note)
    try:
        return None if folder is None else load(folder)
    except MissingExtraError as error:
        if given is not None:
            raise
        _log.info(f"ids instead of texts: {error}")
        return None


def tokenizer_folder(metadata: CommitMetadata, given: str | None) -> tuple[str | None, str | None]:
    """Return the folder of the tokenizer, None if none is known to fit, and a line for people if there is something to say.

    A folder that is given is used, also if its fingerprint is another one than that of the tokenizer that made the ids: its
    chat template may have changed since, which changes no id's text. The recipe's model is used only if both are the same; one
    of the hub is looked for in the hub's cache, and nothing is downloaded.
    """
    recorded = (metadata.get("tokenizer") or {}).get("fingerprint")
    if given is not None:
        is_other = recorded is not None and _fingerprint(Path(given)) not in (recorded, None)
        note = f"the tokenizer in {given} is not the one that the store recorded, or its chat template has changed"
        return given, f"{note}: texts may be wrong" if is_other else None
    model = metadata.get("recipe", {}).get("model", {})
    path, revision = model.get("path"), model.get("revision")
    if recorded is None or not isinstance(path, str):
        return None, f"ids instead of texts: the store recorded no tokenizer; {_HINT}"
    folder = _local(path) or _in_cache(path, revision)
    if folder is None:
        return None, f"ids instead of texts: {path}, the recipe's model, is not here with a tokenizer.json; {_HINT}"
    if _fingerprint(Path(folder)) != recorded:
        return None, f"ids instead of texts: the tokenizer in {folder} is not the one that made the ids; {_HINT}"
    return folder, None


def _local(path: str) -> str | None:
    """Return the folder of a model as a recipe names it, None if its tokenizer is not there."""
    try:
        folder = local_path(path)
    except InputError:  # the home folder of nobody here
        return None
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def _in_cache(repo_id: str, revision: object) -> str | None:
    """Return the folder of a model in the hub's cache, None if its tokenizer is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repo_id, "tokenizer.json", revision=str(revision or "main"))
    except ValueError:  # no name of a repository
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def _fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of a folder's tokenizer, None if it cannot be read: loading it says why."""
    try:
        return fingerprint_tokenizer(folder)
    except (InputError, OSError):
        return None
