"""Models that a recipe gives for the contrastive pair (`contrast.method = "given"`): where they are, and whether they fit.

Log-probs of two models can only be compared token by token if both give each text the same id. That is checked before
anything is scored. Not here: scoring them (`stages/score.py`).
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.chat.tokenizer import model_number
from pipeline.models.resolve import resolve_path
from pipeline.models.section import MODEL_SIDES, ContrastSection, ModelSide
from train.model.checkpoint import TOKENIZER_FILES, load_light_tokenizer
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint_file, fingerprint_model, load_json

_TEXT_ONLY = ("chat_template", "model_max_length", "name_or_path")
"""Keys of tokenizer_config.json that give no text another id."""


def given_models(settings: ContrastSection, model_folder: Path) -> dict[ModelSide, Path]:
    """Return the folder of each side's model; a side without a model has the starting one.

    Raises:
        InputError: A model cannot be found or used, see `resolve_path`.
        MissingExtraError: One is an adapter, and peft is not installed.
        StageError: Merging an adapter failed.
    """
    found: dict[ModelSide, Path] = {}
    for side in MODEL_SIDES:
        path, revision = settings.model_of(side)
        found[side] = model_folder if path is None else resolve_path(path, revision, f"contrast.{side}_model")
    return found


def check_given_models(settings: ContrastSection, model_folder: Path) -> None:
    """Check that the given models exist, give each text the id of the starting model, and are not one and the same.

    Raises:
        InputError: They do not; names the setting and the first token that differs.
        MissingExtraError, StageError: As `given_models`.
    """
    found = given_models(settings, model_folder)
    for side, folder in found.items():
        if folder != model_folder:
            check_same_ids(folder, model_folder, f"contrast.{side}_model")
    is_one_prompt = any(positive == negative for positive, negative in settings.prompt_pairs)
    if is_one_prompt and fingerprint_model(found["positive"]) == fingerprint_model(found["negative"]):
        raise InputError(
            f"contrast.positive_model {found['positive']} and contrast.negative_model {found['negative']} are the same model "
            "behind the same prompts, so every weight would be constant; give two models, or two prompts"
        )


def check_same_ids(folder: Path, reference: Path, setting: str) -> None:
    """Check that a model knows every token of the starting model, `reference`, under the same id.

    Tokens that only the other model has do no harm: no pair holds them. Equal tokenizer files are not loaded.

    Raises:
        InputError: A token has another id or is missing, or the model has fewer ids than the tokenizer uses.
    """
    size, reference_size = (model_number(path, "vocab_size") for path in (folder, reference))
    is_same = _ids_in_files(folder) == _ids_in_files(reference)
    if is_same and (size is None or reference_size is None or size >= reference_size):
        return
    wanted = load_light_tokenizer(reference).get_vocab()
    problem = None if is_same else first_difference(load_light_tokenizer(folder).get_vocab(), wanted)
    largest = max(wanted.values(), default=0)
    if problem is None and size is not None and size <= largest:
        problem = f"it has {size} ids (vocab_size in config.json), and the largest id of a token is {largest}"
    if problem is not None:
        raise InputError(
            f"{setting} {folder} does not give the ids of the starting model {reference}: {problem}. Log-probs can only be "
            "compared token by token: give a model with the same tokenizer"
        )


def first_difference(found: Mapping[str, int], wanted: Mapping[str, int]) -> str | None:
    """Return in words the first token of `wanted`, by id, that has another id in `found` or is not there; None if none."""
    for token, token_id in sorted(wanted.items(), key=lambda item: (item[1], item[0])):
        if token not in found:
            return f"token {token!r}, id {token_id}, is not in its tokenizer"
        if found[token] != token_id:
            return f"token {token!r} has id {found[token]}, expected {token_id}"
    return None


def _ids_in_files(folder: Path) -> dict[str, object]:
    """Return the files of a folder that give texts their ids, each as its content or its SHA-256."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    content: dict[str, object] = {path.name: fingerprint_file(path) for path in files}
    if "tokenizer_config.json" in content:
        settings = load_json(folder / "tokenizer_config.json")
        content["tokenizer_config.json"] = {key: value for key, value in settings.items() if key not in _TEXT_ONLY}
    return content
