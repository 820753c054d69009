"""Find a model: a folder on disk or a hub id, resolved to a folder. A LoRA adapter becomes a whole model first."""

import shutil
from pathlib import Path

from pipeline.child import check_extra, run_child
from pipeline.models import lora
from pipeline.recipe import ModelSection
from train.model.hub import check_model_folder, find_folder
from weights_store.allowed import check_place
from weights_store.digests import cache_folder
from weights_store.messages import logger

_log = logger(__name__)


def resolve_model(model: ModelSection) -> Path:
    """Return the folder of the starting model, see `resolve_path`."""
    return resolve_path(model.path, model.revision, "model.path")


def resolve_path(path: str, revision: str | None, setting: str) -> Path:
    """Return the folder of a whole model; `setting` is where the path is from, for messages.

    A hub id is downloaded into the hub's cache. A LoRA adapter is merged into its base, once, in a process of its own; the
    merged model stays in the cache folder, named for the contents of adapter and base; a damaged one is made again.

    Raises:
        InputError: There is no such folder and no such model on the hub, the hub cannot be reached, or it is an adapter that
            cannot be merged, or whose base is where the operator allows none.
        MissingExtraError: There is an adapter to merge, and peft is not installed.
        StageError: Merging failed; carries its message.
    """
    adapter = find_folder(path, revision, setting)
    if not lora.is_adapter(adapter):
        return check_model_folder(adapter, setting)
    config = lora.check_adapter(adapter)
    name = str(config["base_model_name_or_path"])
    beside = adapter / name  # a relative path starts here or at the adapter
    base_path = str(beside) if beside.is_dir() and not Path(name).is_dir() else name
    base_setting = f"adapter {adapter}: base_model_name_or_path"
    check_place(base_setting, base_path, hub="hf://")
    base = check_model_folder(find_folder(base_path, config.get("revision"), base_setting), base_setting)
    target = merge_once(adapter, base)
    _log.info(f"using {target} as {setting}: the adapter {adapter} merged into its base")
    return target


def merge_once(adapter: Path, base: Path, python: str | None = None) -> Path:
    """Return the folder of the whole model that an adapter and its base make; merged in a process if the cache has it not.

    Args:
        adapter: A folder that `check_adapter` accepts.
        base: The folder of a whole model.
        python: The interpreter that merges; None: this one.

    Raises:
        MissingExtraError: It has no peft.
        StageError: Merging failed; carries its message.
    """
    target = cache_folder() / "merged" / lora.merged_fingerprint(adapter, base)[:16]
    problem = lora.problem_of_merged(target) if target.exists() else None
    if problem is not None:
        _log.warning(f"{target}: {problem}; the adapter is merged again")
        shutil.rmtree(target)
    if not target.exists():
        check_extra("peft", python)
        _log.info(f"merging the adapter {adapter} into its base {base}")
        arguments = [str(adapter), str(base), str(target)]
        run_child("pipeline.models.lora", arguments, f"merging the adapter {adapter}", python)
    return target
