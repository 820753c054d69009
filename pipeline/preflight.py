"""Look at what a build needs before anything is started, so that a wrong path costs a second and one line."""

import shutil

from pipeline.models.resolve import resolve_model
from pipeline.recipe import Recipe
from pipeline.source.chat import ChatTokenizer
from pipeline.source.load import is_hub_id, load_rows
from weights_store.errors import InputError


def check_inputs(recipe: Recipe) -> None:
    """Check the local inputs of a recipe: model, tokenizer, chat template, dataset, columns, interpreters.

    A hub model is downloaded here, once; a hub dataset is left for the build. vLLM and torch are checked by the stages that
    need them: a build whose pairs are scored already needs neither.

    Raises:
        InputError: Something is missing or unusable; names the setting.
    """
    ChatTokenizer(resolve_model(recipe.model), recipe.model.chat_template, recipe.model.template_date)
    if not is_hub_id(recipe.dataset.source):
        next(iter(load_rows(recipe.dataset)), None)
    for name, section in (("score", recipe.score), ("contrast", recipe.contrast), ("attribute", recipe.attribute)):
        python = section.python
        if python is not None and shutil.which(python) is None:
            raise InputError(
                f"{name}.python {python} is no interpreter that can be run; give the path of a Python 3.11 or newer"
            )
