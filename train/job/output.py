"""The folder of one training job: its record, its checkpoints, and the finished model.

    OUTPUT/
      train.json      what this folder is for (identity) and the resolved config; written first
      checkpoints/    of transformers' Trainer; gone when the job is finished
      .staging/       the model while it is written
      .lock           held by the process that trains here
      config.json, model*.safetensors, tokenizer …, README.md (the card), metrics.json, lineage.json
      adapter/        of a training with [lora]; without a model beside it if lora.merge is false

`config.json` is moved in after all other model files, and `lineage.json` last: a reader sees a whole model or none, and a
folder with `lineage.json` is finished. Files are moved one by one, so OUTPUT may be a mount point.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from weights_store.errors import InputError, SettingsError
from weights_store.fingerprint import explain_difference, load_json
from weights_store.messages import logger
from weights_store.processes.lock import locked
from weights_store.sharing.new_folder import check_no_uri
from weights_store.tables.metadata import Parent, Section

_log = logger(__name__)


class Identity(TypedDict):
    """What determines a trained model."""

    weights: dict[str, str]
    model: dict[str, str]
    lora: Section | None
    data: Section
    loss: Section
    optim: Section
    eval: Section


class Result(TypedDict):
    """The outcome of a training; metrics by name."""

    steps: int
    before: dict[str, float]
    after: dict[str, float]
    num_sample_pairs: int
    held_out: NotRequired[dict[str, float]]
    held_out_was_seen: NotRequired[bool]
    """Models that made the weights were trained on held-out pairs."""
    notices: list[str]
    best_step: NotRequired[int]


class Lineage(TypedDict):
    """The content of `lineage.json`."""

    kind: str
    fingerprint: str
    identity: Identity
    parents: list[Parent]
    model: dict[str, str | None]
    config: dict[str, Section]
    result: Result
    packages: dict[str, str]


RECORD, LINEAGE, METRICS, LOCK = "train.json", "lineage.json", "metrics.json", ".lock"
_CHECKPOINT_FILES = ("optimizer*", "scheduler.pt", "trainer_state.json")  # FSDP has another name for its optimizer file

_TRAIN_AGAIN = "delete the folder, or give --overwrite, to train again"

_HARDLY_ANY_BYTES = 32 << 20
"""With less room than this, a failed write is explained by a full disk; the partial file may be deleted already."""


@dataclass(frozen=True)
class OutputFolder:
    """One output folder. Creating this object touches nothing."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self, identity: Identity, *, overwrite: bool) -> Lineage | None:
        """Return the recorded lineage if this job is finished here, None if there is work to do. Reads only.

        Raises:
            InputError: The folder holds something that no training job made, is a URI, or a file is in its place.
            SettingsError: It holds a checkpoint or a model of another job, and `overwrite` is False.
        """
        check_no_uri(self.path)
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise InputError(
                f"output.folder={str(self.path)!r} cannot be made: {nearest} is a file; choose another folder"
            )
        if not self.path.exists() or not any(self.path.glob("[!.]*")):
            return None
        if not (self.path / RECORD).is_file():
            raise InputError(
                f"output.folder={str(self.path)!r} is not empty and has no {RECORD}, so it was not made by training; "
                "choose another folder"
            )
        files = {path.name for path in self.path.glob("[!.]*")} - {RECORD, self.checkpoints.name}
        holds_work = files or any(self.checkpoints.glob("checkpoint-*"))  # else the job was refused at its start
        if overwrite or not holds_work:
            return None
        changes = explain_difference(_read_json(self.path / RECORD, "identity", frozenset())["identity"], identity)
        if changes:
            raise SettingsError(
                f"output.folder={str(self.path)!r} holds another training job: {'; '.join(changes)}; choose another "
                "folder, or give --overwrite to delete what is there"
            )
        if not (self.path / LINEAGE).is_file():
            return None
        return cast(Lineage, _read_json(self.path / LINEAGE, "result", Result.__required_keys__))

    @contextmanager
    def claimed(
        self, identity: Identity, config: Mapping[str, Section], *, overwrite: bool, resume: bool
    ) -> Iterator[None]:
        """Keep the folder to this job while inside, and write its record. One process of a job does this, after `check`.

        `overwrite` deletes everything else; without `resume`, the checkpoints are deleted.

        Raises:
            InputError: The folder cannot be written, another process trains there, or one has just finished this job there.
            SettingsError: Another process has just trained another job there.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / LOCK, self._refuse))
                if self.check(identity, overwrite=overwrite) is not None:  # since our first look
                    raise InputError(
                        f"output.folder={str(self.path)!r}: another process has just finished this job there; run the same "
                        "command again to use it"
                    )
                self._clear(everything=overwrite, checkpoints=not resume)
                _write_json(self.path / RECORD, {"identity": identity, "config": config})
            except OSError as error:
                raise InputError(f"cannot write output.folder={str(self.path)!r}: {error}") from error
            yield

    def _refuse(self, holder: str) -> None:
        raise InputError(
            f"output.folder={str(self.path)!r} is in use: {holder} is training there; wait until it is done, or choose another "
            "folder"
        )

    def _clear(self, *, everything: bool, checkpoints: bool) -> None:
        """Delete what an earlier job left."""
        if checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        if not everything:
            return
        for name in (LINEAGE, "config.json"):  # first: from here on the folder is not finished
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, RECORD):  # the record says until it is replaced that the folder is a job's
                path.unlink()

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint. One that a killed run left incomplete, or that is damaged, is passed over."""
        checkpoints = self.checkpoints.glob("checkpoint-*")
        for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            if _is_complete(checkpoint):
                return checkpoint
            _log.warning(f"{checkpoint} is incomplete or damaged; it is passed over")
        return None

    def start_staging(self) -> Path:
        """Return an empty folder, in which the model is written before it becomes visible."""
        staging = self.path / ".staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        return staging

    def publish(
        self, staging: Path, lineage: Lineage, metrics: Mapping[str, object], *, keep_checkpoints: bool
    ) -> None:
        """Move the model from the staging folder into place, and finish the folder."""
        _write_json(staging / METRICS, metrics)
        _write_json(staging / LINEAGE, lineage)
        last = ["config.json", METRICS, LINEAGE]  # in this order, after everything else
        names = sorted({path.name for path in staging.iterdir()}.difference(last))
        for path in (staging / name for name in [*names, *last] if (staging / name).exists()):
            target = self.path / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        staging.rmdir()
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn errors on a full disk into one that says so: those of torch and safetensors do not.

    Raises:
        InputError: Something failed while the disk of `folder` was almost full.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes > _HARDLY_ANY_BYTES:
            raise
        raise InputError(
            f"the run failed with {free_bytes / 2**20:.1f} MiB left on the disk of output.folder={str(folder)!r} ({error}); "
            "make room and run the same command again; it continues from the last complete checkpoint"
        ) from error


def _is_complete(checkpoint: Path) -> bool:
    """Return whether the Trainer finished writing `checkpoint`, its state last, and nothing in it is cut.

    Flipped bits are found in the numbers of optimizer, schedule and random states. Of weights, header and size are compared.
    """
    from train.model.weight_files import check_safetensors  # the rest of this module needs the base install only

    if not all(any(checkpoint.glob(pattern)) for pattern in _CHECKPOINT_FILES):
        return False
    try:
        for path in checkpoint.glob("*.safetensors"):
            check_safetensors(path)
        has_state = "global_step" in load_json(checkpoint / "trainer_state.json")
    except InputError:
        return False
    return has_state and all(_is_sound_archive(path) for path in checkpoint.glob("*.pt*"))


def _is_sound_archive(path: Path) -> bool:
    """Return whether a file of torch.save is as it was written: a zip archive, with a checksum for each tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError):  # by what its directory says
        return False


def _read_json(path: Path, key: str, needed: frozenset[str]) -> dict[str, Any]:
    """Return the content of a file that a training wrote, whose `key` is an object with the `needed` keys."""
    try:
        content = load_json(path)
    except InputError as error:
        raise InputError(f"{error}; {_TRAIN_AGAIN}") from error
    value = content.get(key)
    if not isinstance(value, dict) or not needed <= value.keys():
        raise InputError(f"{path} is damaged: its {key} is not what a training writes; {_TRAIN_AGAIN}")
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)  # whole or not at all
