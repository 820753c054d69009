"""What contrastive models are trained on: the pairs of a weight dataset of the same store, other ones by `contrast.weights`."""

from pathlib import Path

import numpy as np

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.models.section import ContrastSection
from train.data.selection import Selection, prompt_hashes
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError, NotFoundError
from weights_store.fingerprint import fingerprint_model
from weights_store.names import split_name
from weights_store.schemas import SIDES


def other_pairs(store: str, weights: str) -> TableVersion:
    """Return the version of a weight dataset: `name@version`, or the newest one of `name`.

    Raises:
        InputError: The store has none of that name or version.
    """
    name, version = split_name(weights)
    try:
        return WeightStore(store).resolve(name, version)
    except NotFoundError as error:
        raise InputError(
            f"contrast.weights {weights}: {error}. Build it first, with the same model and store: a recipe for the other "
            f'pairs with weights.name = "{name}" and weights.estimator = "uniform"'
        ) from error


def check_other_pairs(
    store: str, settings: ContrastSection, weights: str, model_folder: Path, tokenizer: ChatTokenizer
) -> None:
    """Check that a weight dataset was made with this tokenizer and chat template, and with this model as its reference.

    Raises:
        InputError: It does not exist, was not, or cannot train the two models.
    """
    version = other_pairs(store, weights)
    check_trainable(settings, version)
    metadata = WeightStore(store).table(version.table).metadata(version.version)
    found = {
        "tokenizer and chat template": metadata.get("tokenizer", {}).get("rendering"),
        "reference model": metadata.get("reference", {}).get("model_fingerprint"),
    }
    expected = {
        "tokenizer and chat template": tokenizer.rendering_fingerprint,
        "reference model": fingerprint_model(model_folder),
    }
    for what, wanted in expected.items():
        if found[what] != wanted:
            raise InputError(
                f"contrast.weights {weights}: {version} has another {what} than {model_folder}: recorded is "
                f"{_short(found[what])}, expected {_short(wanted)}. Build it with the model of this recipe"
            )


def check_trainable(settings: ContrastSection, pairs: TableVersion) -> None:
    """Check that a weight dataset has what the two models are trained on.

    Raises:
        InputError: It has rows with one response and `contrast.method` is "dpo", or "sft" and no response on one side.
    """
    statistics = WeightStore(pairs.store).table(pairs.table).metadata(pairs.version).get("statistics", {})
    num_unpaired = statistics.get("num_unpaired_rows", 0)
    if settings.method == "dpo" and num_unpaired:
        raise InputError(
            f"contrast.method 'dpo' trains on pairs, and {num_unpaired:,} rows of {pairs} have one response: set "
            "contrast.method to 'sft', or contrast.weights to a dataset of pairs"
        )
    for side, kind in zip(SIDES, ("desirable", "undesirable"), strict=True):
        if statistics.get(side, {}).get("num_responses") == 0:
            raise InputError(
                f"contrast.method {settings.method!r} trains one model on desirable and one on undesirable responses, and "
                f"{pairs} has no {kind} ones: set contrast.method to 'prompt' or 'given', or contrast.weights to a dataset "
                "with both"
            )


def trained_prompts(pairs: TableVersion, selection: Selection) -> np.ndarray:
    """Return hashes of the prompts of the pairs that a training with this selection reads, sorted and each once, uint64.

    8 bytes a prompt: with those of another dataset they tell which prompts both have.

    Raises:
        DamageError: A shard is not what was committed.
    """
    table = WeightStore(pairs.store).table(pairs.table)
    found = [np.empty(0, np.uint64)]
    for rows in table.batches(pairs.version, ["pair_id", "split"]):
        found.append(np.unique(prompt_hashes(rows.filter(selection.keeps(rows))["pair_id"].to_pylist())))
    return np.unique(np.concatenate(found))


def _short(fingerprint: str | None) -> str:
    return f"{fingerprint[:12]}…" if fingerprint else "nothing"
