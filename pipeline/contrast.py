"""Stage contrast: the pair (pi+, pi-) of TIS-DPO, by prompt (P), by SFT (S) or by DPO (D).

S and D start the training job as a process, so that its memory is gone afterwards; this file never imports `train`. Trained
models lie under `models/` in the store, named for what determines them. When the data has grown, the pair of the first
build stays (its scores stay valid, and only new pairs are scored) unless the recipe says `contrast.retrain`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.chat import Condition
from pipeline.child import run_child
from pipeline.files import write_whole
from pipeline.recipe import TRAINING_KEYS, ContrastSection
from pipeline.score import Scorer
from weights_store import TableVersion, WeightStore
from weights_store.fingerprint import fingerprint, fingerprint_model

_RECORD = "contrast.json"


@dataclass(frozen=True)
class ContrastivePair:
    """The two scorers, and which of them were trained just now."""

    positive: Scorer
    negative: Scorer
    num_trained: int = 0


def contrast(
    settings: ContrastSection, model_folder: Path, uniform: TableVersion, report: Callable[[str], None] = print
) -> ContrastivePair:
    """Return the contrastive pair, training what is not there yet.

    Args:
        settings: Which construction, and its settings.
        model_folder: The starting model of both.
        uniform: A weight dataset of the pairs with weights 1 and the reference's log-probs: what S and D train on.
        report: Gets the training job's lines.

    Raises:
        StageError: A training job failed; carries its message.
    """
    if settings.method == "prompt":
        prompts = (settings.positive_prompt, settings.negative_prompt)
        positive, negative = (Scorer(model_folder, Condition(text, settings.role)) for text in prompts)
        return ContrastivePair(positive, negative)
    folders, num_trained = [], 0
    for side in ("positive", "negative"):
        folder, trained = _trained_model(settings, side, model_folder, uniform, report)
        folders.append(folder)
        num_trained += trained
    return ContrastivePair(Scorer(folders[0]), Scorer(folders[1]), num_trained)


def _trained_model(
    settings: ContrastSection,
    side: Literal["positive", "negative"],
    model_folder: Path,
    uniform: TableVersion,
    report: Callable[[str], None],
) -> tuple[Path, bool]:
    """Return the folder of one side's model, and whether it was trained just now."""
    keys = TRAINING_KEYS | ({"beta"} if settings.method == "dpo" else set())
    identity = {
        "model": fingerprint_model(model_folder),
        "side": side,
        "training": settings.model_dump(include=keys),
        "table": uniform.table,
    }
    models = WeightStore(uniform.store).models
    for folder, record in _records(models):
        if record["identity"] == identity and (record["data"] == uniform.fingerprint or not settings.retrain):
            return folder, False
    folder = models / fingerprint({**identity, "data": uniform.fingerprint})[:16]
    report(f"training the {side} model ({settings.method}) on {uniform}")
    run_child(_command(settings, side, model_folder, uniform, folder), f"training {folder}", report)
    record = {"identity": identity, "data": uniform.fingerprint, "version": uniform.version}
    write_whole(folder / _RECORD, json.dumps(record, indent=2))
    return folder, True


def _records(models: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(models.glob(f"*/{_RECORD}")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))


def _command(
    settings: ContrastSection, side: str, model_folder: Path, uniform: TableVersion, folder: Path
) -> list[str]:
    """Return the training job's command line. The negative model sees chosen and rejected swapped (S and D alike)."""
    options: dict[str, Any] = {
        "loss.name": settings.method,
        "data.swap": side == "negative",
        "model.dtype": settings.dtype,
        "optim.learning_rate": settings.learning_rate,
        "optim.num_epochs": settings.num_epochs,
        "optim.pairs_per_step": settings.pairs_per_step,
        "optim.pairs_per_batch": settings.pairs_per_batch,
        "optim.seed": settings.seed,
    }
    if settings.method == "dpo":
        options["loss.beta"] = settings.beta
    if settings.max_steps is not None:
        options["optim.max_steps"] = settings.max_steps
    name = uniform.table.removeprefix("weights/")
    command = [settings.python or sys.executable, "-m", "train.run", "--store", uniform.store]
    command += ["--weights", f"{name}@{uniform.version}", "--model", str(model_folder), "--output", str(folder)]
    for key, value in options.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    return command
