"""Look at what a build needs before anything is started, so that a mistake costs a second and one line, not hours.

`plan` and `build` share this check, and so do the runs of a deployment.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.models.given import check_given_models
from pipeline.models.other_pairs import check_other_pairs
from pipeline.models.resolve import resolve_model
from pipeline.recipe import Recipe
from pipeline.source.columns import check_source
from weights_store.errors import InputError, StoreError
from weights_store.location import Location
from weights_store.messages import logger

_log = logger(__name__)

_OLDEST = (3, 11)
_PROBE = "import sys; print('Python %d.%d' % sys.version_info[:2])"
_VERSION = re.compile(r"^Python (\d+)\.(\d+)$", re.MULTILINE)
_PROBE_TIMEOUT_S = 60


def check_inputs(recipe: Recipe, *, only_plan: bool = False) -> Path:
    """Check what a recipe names, and return the folder of its model.

    Looked at: interpreters, the store's place, the model's weights and tokenizer, the chat template, given models of the
    contrastive pair, the other pairs that it is trained on, and the dataset's columns. Hub models are downloaded here, once; a
    hub dataset is left for the build. vLLM and torch are checked by the stages that need them: a build whose pairs are scored
    already needs neither. With `only_plan` a store that cannot be written is a warning.

    Raises:
        InputError: Something is missing or unusable; names the setting.
        StoreError: The store cannot be written, or a file is in its place.
    """
    for name, section in (("score", recipe.score), ("contrast", recipe.contrast), ("attribute", recipe.attribute)):
        if section.python is not None:
            _check_interpreter(f"{name}.python", section.python)
    _check_store(Location(recipe.store.uri), only_plan)
    model_folder = resolve_model(recipe.model)
    tokenizer = ChatTokenizer(model_folder, recipe.model.chat_template, recipe.model.template_date)
    if recipe.needs_pair and recipe.contrast.method == "given":
        check_given_models(recipe.contrast, model_folder)
    if recipe.needs_pair and recipe.contrast.weights is not None:
        check_other_pairs(recipe.store.uri, recipe.contrast.weights, model_folder, tokenizer)
    check_source(recipe.dataset)
    return model_folder


def _check_store(location: Location, only_plan: bool) -> None:
    """Look at a local store; an object store shows at the first write, before a model starts, whether it can be written."""
    if not location.is_local:
        return
    place = location.nearest_folder()
    if os.access(place, os.W_OK | os.X_OK):
        return
    problem = f"the store {location} cannot be written: no permission for {place}, or its file system is read-only"
    if not only_plan:
        raise StoreError(f"{problem}; change store.uri or give --store")
    _log.warning(f"{problem}; a build from here would fail")


def _check_interpreter(setting: str, python: str) -> None:
    """Run an interpreter and look at its version.

    Raises:
        InputError: It cannot be run, or is too old for our code.
    """
    expected = "give the path of a Python 3.11 or newer"
    if shutil.which(python) is None:
        raise InputError(f"{setting} {python} is no interpreter that can be run; {expected}")
    command = [python, "-I", "-c", _PROBE]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{setting} {python} is no interpreter that can be run: {error}; {expected}") from error
    version = _VERSION.search(done.stdout)
    if version is None:
        said = " ".join((done.stderr or done.stdout).split())[-200:] or "nothing"
        raise InputError(
            f"{setting} {python} is no Python: it ended with code {done.returncode} and said {said}; {expected}"
        )
    if (int(version[1]), int(version[2])) < _OLDEST:
        raise InputError(f"{setting} {python} is Python {version[1]}.{version[2]}; {expected}")
