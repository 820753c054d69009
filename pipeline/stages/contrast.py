"""Stage contrast: the pair (pi+, pi-) of TIS-DPO, by prompt (P), by SFT (S), by DPO (D), or two models that are given.

S and D start `tokenweights train` as a process, or as several ones by torchrun, so that its memory is free afterwards. Trained
models lie under `models/` in the store, named for what determines them. Of a model trained with LoRA the store keeps only the
adapter; each machine that scores merges it into its base, the starting model, once. If the data has grown, the models of the
first build are used again (their scores stay valid, and only new pairs are scored), unless the recipe says `contrast.retrain`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.chat.tokenizer import Condition
from pipeline.child import check_extra
from pipeline.models.contrastive import ModelShelf
from pipeline.models.given import given_models
from pipeline.models.other_pairs import check_trainable, other_pairs
from pipeline.models.resolve import merge_once
from pipeline.models.section import MODEL_SIDES, ContrastSection, pair_role
from pipeline.stages.score import Scorer
from pipeline.stages.train import run_training, set_options
from weights_store import TableVersion, WeightStore
from weights_store.checks.model_folders import MODELS, ModelIdentity, ModelRecord, model_name
from weights_store.fingerprint import fingerprint_model
from weights_store.messages import logger
from weights_store.names import name_of

_log = logger(__name__)


@dataclass(frozen=True)
class ContrastivePair:
    """The scorers by their role, `positive` and `negative`, and how many models were trained just now.

    Further pairs of prompts have the roles `positive2`, `negative2` and so on; the log-ratio is the mean over the pairs.
    """

    scorers: Mapping[str, Scorer]
    num_trained: int = 0


def contrast(settings: ContrastSection, model_folder: Path, uniform: TableVersion) -> ContrastivePair:
    """Return the contrastive pair; train the models that the store does not have yet.

    Both start from the model in `model_folder`. S and D train on `uniform`: a weight dataset of the pairs with weights 1 and
    the reference's log-probs; or on the one that `contrast.weights` names.

    Raises:
        DamageError: A model in the store is not what was recorded.
        InputError: There is no dataset `contrast.weights`, the pairs cannot train two models, or a given model cannot be used.
        MissingExtraError: There is something to train, and torch is not installed.
        StageError: A training job failed; carries its message.
    """
    if not settings.trains:
        return untrained_pair(settings, model_folder)
    models, pairs = model_shelf(uniform.store), training_pairs(settings, uniform)
    check_trainable(settings, pairs)
    scorers, num_trained = {}, 0
    for model in wanted_models(settings, model_folder, uniform):
        folder = model.folder
        if folder is None:
            check_extra("torch", settings.python)
            with models.lock(model.name):
                # another build may have trained it while we waited
                folder = _find_whole(models, model.name, settings, model_folder)
                if folder is None:
                    folder = _train(models, model, settings, model_folder, pairs)
                    num_trained += 1
        scorers[model.side] = Scorer(folder)
    return ContrastivePair(scorers, num_trained)


def untrained_pair(settings: ContrastSection, model_folder: Path) -> ContrastivePair:
    """Return the scorers of a method that trains nothing: one model behind two prompts (P), or given models.

    Raises:
        InputError: A given model cannot be found or used.
        MissingExtraError, StageError: A given model is an adapter that cannot be merged here.
    """
    folders = given_models(settings, model_folder)
    scorers = {}
    for index, prompts in enumerate(settings.prompt_pairs):
        for side, text in zip(MODEL_SIDES, prompts, strict=True):
            condition = None if text is None else Condition(text, settings.role)
            scorers[pair_role(side, index)] = Scorer(folders[side], condition)
    return ContrastivePair(scorers)


def training_pairs(settings: ContrastSection, uniform: TableVersion) -> TableVersion:
    """Return the weight dataset whose pairs train the two models: `contrast.weights`, or the recipe's own pairs, `uniform`.

    Raises:
        InputError: There is no dataset `contrast.weights`.
    """
    return uniform if settings.weights is None else other_pairs(uniform.store, settings.weights)


@dataclass(frozen=True)
class WantedModel:
    """One side's model of construction S or D: what determines it, its name in the store, and where it is."""

    side: str
    name: str
    identity: ModelIdentity
    data: str
    folder: Path | None
    """The whole model, to score with; None: it has to be trained."""


_ADAPTER = "adapter"
"""The folder in which `tokenweights train` leaves an adapter that it does not merge."""


def _find_whole(models: ModelShelf, name: str, settings: ContrastSection, model_folder: Path) -> Path | None:
    """Return the folder of a finished model, its adapter merged; None if the store has none of that name."""
    folder = models.find(name)
    if folder is None:
        return None
    whole, record = _whole(folder, settings, model_folder), models.record(name)
    if record is not None and fingerprint_model(whole) != record["fingerprint"]:
        _log.info(
            f"models/{name}: merged on this machine it is not bit for bit what it was where it was trained, so scores of the "
            "other one are not used"
        )
    return whole


def _whole(folder: Path, settings: ContrastSection, model_folder: Path) -> Path:
    if settings.train.lora is None:
        return folder
    return merge_once(folder / _ADAPTER, model_folder, settings.python)


def _train(
    models: ModelShelf, model: WantedModel, settings: ContrastSection, model_folder: Path, pairs: TableVersion
) -> Path:
    """Train one side's model, put it into the store, and return the folder of the whole model."""
    folder, train = models.place(model.name), settings.train
    _log.info(f"training the {model.side} model ({settings.method}) on {pairs}")
    run_training(_options(settings, model.side, model_folder, pairs, folder), folder, train, settings.python)
    whole = _whole(folder, settings, model_folder)
    record: ModelRecord = {
        "identity": model.identity,
        "data": model.data,
        "version": pairs.version,
        "fingerprint": fingerprint_model(whole),
    }
    models.put(model.name, record)
    return whole


def model_shelf(store: str) -> ModelShelf:
    """Return where a store keeps its contrastive models."""
    return ModelShelf(WeightStore(store).root / MODELS)


def wanted_models(settings: ContrastSection, model_folder: Path, uniform: TableVersion) -> list[WantedModel]:
    """Return the positive and the negative model of construction S or D.

    They are trained on `uniform` or on `contrast.weights`. The fingerprint of these pairs matters only if `retrain` is set, a
    version is named, or the store has no pair yet. A dry run asks this too, and gets the same answer: it needs the hashes of
    the weights anyway, for the tables of their log-probs.

    Raises:
        DamageError: A record on the shelf, or a file of one of the two models, is not what was written.
        InputError: There is no dataset `contrast.weights`.
    """
    # Which version of the data a model is trained on is no part of its identity.
    pairs = training_pairs(settings, uniform)
    model, training = fingerprint_model(model_folder), settings.training_settings()
    identities: dict[str, ModelIdentity] = {
        side: {"model": model, "training": training, "table": pairs.table, "side": side} for side in MODEL_SIDES
    }
    models = model_shelf(uniform.store)
    is_pinned = settings.weights is not None and "@" in settings.weights
    wanted = pairs.fingerprint if settings.retrain or is_pinned else None
    data = _data_of_both(models, identities, wanted) or pairs.fingerprint
    names = {side: model_name(identity, data) for side, identity in identities.items()}
    folders = {side: _find_whole(models, names[side], settings, model_folder) for side in MODEL_SIDES}
    return [WantedModel(side, names[side], identities[side], data, folders[side]) for side in MODEL_SIDES]


def _data_of_both(models: ModelShelf, identities: dict[str, ModelIdentity], wanted: str | None) -> str | None:
    """Return the fingerprint of the oldest data that both sides have been trained on: a pair never mixes two versions."""
    versions: dict[str, dict[str, int]] = {side: {} for side in identities}
    for record in models.records():
        for side, identity in identities.items():
            if record["identity"] == identity:
                versions[side][record["data"]] = record["version"]
    both = versions["positive"].keys() & versions["negative"].keys()
    both = both & {wanted} if wanted is not None else both
    return min(both, key=lambda data: versions["positive"][data], default=None)


def _options(settings: ContrastSection, side: str, model_folder: Path, pairs: TableVersion, folder: Path) -> list[str]:
    """Return the options of `tokenweights train`. For the negative model chosen and rejected are swapped, in S and D."""
    train = settings.train
    options: dict[str, object] = {
        "loss.name": settings.method,
        "data.swap": side == "negative",
        "output.save_every_steps": 50,
    }
    sections = {"model": train.model, "lora": train.lora, "optim": train.optim, "parallel": train.parallel}
    for section, values in sections.items():
        chosen = {} if values is None else values.model_dump(exclude_none=True)
        options |= {f"{section}.{key}": value for key, value in chosen.items()}
    if train.lora is not None:
        options["lora.merge"] = False  # the scorer merges, and checks what it has merged
    if settings.held_out:
        options["eval.share"] = settings.held_out
    if settings.split is not None:
        options["data.split"] = settings.split
    if settings.method == "dpo":
        options["loss.beta"] = train.loss.beta
    # The model is the reference itself, and rounding puts them apart: with SmolLM2-135M bfloat16 by 0.04 nats, 4-bit weights by
    # 0.64; less with larger models.
    if train.model.quantization != "none":
        options["gate.tolerance_nats"] = 1.0
    elif train.model.dtype == "bfloat16":
        options["gate.tolerance_nats"] = 0.1
    name = name_of(pairs.table)
    given = ["--store", pairs.store, "--weights", f"{name}@{pairs.version}"]
    return [*given, "--model", str(model_folder), "--output", str(folder), *set_options(options)]
