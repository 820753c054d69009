"""Look at what a build needs before anything is started, so that a mistake costs a second and one line, not hours.

`plan` and `build` share this check, and so do the runs of a deployment.
"""

import os
from pathlib import Path

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.interpreters import check_interpreter
from pipeline.models.given import check_given_models
from pipeline.models.other_pairs import check_other_pairs
from pipeline.models.resolve import resolve_model
from pipeline.recipe import Recipe
from pipeline.source.columns import check_source
from weights_store.errors import StoreError
from weights_store.location import Location
from weights_store.messages import logger

_log = logger(__name__)


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
    for name, section in recipe.interpreters().items():
        if section.python is not None:
            check_interpreter(f"{name}.python", section.python)
    _check_store(Location(recipe.store.uri), only_plan)
    model_folder = resolve_model(recipe.model)
    tokenizer = ChatTokenizer(model_folder, recipe.model.chat_template, recipe.model.template_date)
    if recipe.needs_pair and recipe.contrast.method == "given":
        check_given_models(recipe.contrast, model_folder)
    if recipe.needs_pair and recipe.contrast.weights is not None:
        check_other_pairs(recipe.store.uri, recipe.contrast, recipe.contrast.weights, model_folder, tokenizer)
    check_source(recipe.dataset, recipe.weight_columns)
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
