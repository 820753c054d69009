"""Look at what a build needs before anything is started, so that a wrong path costs a second and one line."""

import shutil
from importlib.util import find_spec

from pipeline.chat import ChatTokenizer
from pipeline.load import load_rows
from pipeline.models import is_hub_id, resolve_model
from pipeline.recipe import Recipe
from weights_store.errors import InputError, MissingExtraError


def check_inputs(recipe: Recipe) -> None:
    """Check the local inputs of a recipe: model, tokenizer, chat template, dataset, columns, interpreters, extras.

    Hub ids are left for the build, which downloads them once.

    Raises:
        InputError: Something is missing or unusable; names the setting.
        MissingExtraError: vLLM or torch is not installed for the interpreter that needs it.
    """
    if not is_hub_id(recipe.model.path):
        ChatTokenizer(resolve_model(recipe.model), recipe.model.chat_template)
    if not is_hub_id(recipe.dataset.source):
        next(iter(load_rows(recipe.dataset)), None)
    _check_interpreter("score.python", recipe.score.python, "vllm", "score] (GPU) or tokenweights[score-cpu")
    if recipe.contrast.method != "prompt":
        _check_interpreter("contrast.python", recipe.contrast.python, "torch", "train")


def _check_interpreter(setting: str, python: str | None, package: str, extra: str) -> None:
    if python is None:
        if find_spec(package) is None:
            raise MissingExtraError(
                f"this build needs the package {package!r}, which is not installed; pip install tokenweights[{extra}], "
                f"or set {setting} to an interpreter that has it"
            )
    elif shutil.which(python) is None:
        raise InputError(f"{setting} {python} is no interpreter that can be run")
