"""The scheduled build: it reads the recipe when it runs, so that each run sees new pairs and changes of the file."""

from prefect import flow

from flows.build import build_weights
from pipeline.recipe import load_recipe


@flow(name="refresh-weights")
def refresh_weights(recipe_file: str, overrides: list[str] | None = None, store: str | None = None) -> str:
    """Read a recipe from its file and build it; return the version, `name@version`, new or the one that was there."""
    result = build_weights(load_recipe(recipe_file, overrides or [], store))
    return f"{result.published.name}@{result.published.weights.version}"
