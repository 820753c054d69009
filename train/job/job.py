"""Run one training job: `run_job(config)` from Python, `tokenweights train CONFIG.toml` from a shell (`train/run.py`).

Reads as a table of contents; every part is in a file of its own.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from train.config import TrainConfig
from train.job.output import Lineage, OutputFolder, Result, explain_full_disk
from train.job.prepare import JobInputs, open_inputs, open_pairs
from train.job.ranks import join_ranks
from train.job.stopping import StopRequest
from weights_store.fingerprint import fingerprint
from weights_store.messages import logger
from weights_store.packages import package_versions

_log = logger(__name__)

_PACKAGES = ("tokenweights", "torch", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training job.

    `before` and `after` are the metrics of a fixed sample of pairs; `loss` is in nats per pair, for SFT and distillation in
    nats per token.
    """

    folder: Path
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    was_trained_before: bool = False
    """Nothing was done: the folder held this job, finished."""


def run_job(
    config: TrainConfig, *, overwrite: bool = False, dry_run: bool = False, stop: StopRequest | None = None
) -> TrainResult | None:
    """Train as `config` says and return where the model is; None after a dry run.

    With several processes every rank logs; `tokenweights train` silences all but the first.

    Args:
        config: The job.
        overwrite: Delete what an earlier job left in the output folder.
        dry_run: Check what can be checked without loading the model, and print what the training would do.
        stop: Looked at after every step; on request a checkpoint is written and `KeyboardInterrupt` raised.

    Raises:
        SettingsError: The output folder holds another job, the processes cannot share `pairs_per_step`, or the loss became
            infinite.
        InputError: The model or the output folder cannot be used, or another process trains in that folder.
        MismatchError: Model and dataset do not belong together (tokenizer, vocabulary, step-0 gate), rows of the dataset are
            damaged, or the dataset lacks what the loss needs: columns, token weights that differ, or the settings to refresh
            them.
        NotFoundError: No such store, dataset, version or split.
        MissingExtraError: The config asks for a package that is not installed.
        KeyboardInterrupt: A stop was requested; a later run continues from the checkpoint.
    """
    stop = stop or StopRequest()
    inputs = open_inputs(config)
    output = OutputFolder(Path(config.output.folder))
    finished = output.check(inputs.identity, overwrite=overwrite)
    if finished is not None:
        _log.info(f"already trained: {output.path} (--overwrite trains again)")
        return _result(output.path, finished["result"], was_trained_before=True)
    from train.job.training import (  # loads transformers
        build_batches,
        build_trainer,
        check_tracker,
        pass_gate,
        save,
        train,
    )

    pairs = open_pairs(inputs)
    processes = join_ranks()
    check_tracker(config.output.report_to)
    build_batches(config, len(pairs.trained), world_size=processes.num_processes)  # refuses what cannot be shared
    if dry_run:
        from train.job.dry_run import dry_run_lines

        if processes.is_main_process:
            print("\n".join(dry_run_lines(inputs, pairs)))
        return None
    processes.wait_for_everyone()  # every process has read the folder before one changes it
    with ExitStack() as claim:
        if processes.is_main_process:  # the one that writes; the others belong to the same job
            settings = config.model_dump(exclude_none=True)
            claim.enter_context(
                output.claimed(inputs.identity, settings, overwrite=overwrite, resume=config.output.resume)
            )
        processes.wait_for_everyone()
        trainer = build_trainer(inputs, pairs, output.checkpoints, stop)
        pass_gate(trainer, inputs, pairs.sample)
        with explain_full_disk(output.path):
            lineage = _build_lineage(inputs, train(trainer, inputs, pairs, output.last_checkpoint(), stop))
            save(trainer, inputs, output, lineage)
    _log.info(f"wrote {output.path}")
    return _result(output.path, lineage["result"])


def _build_lineage(inputs: JobInputs, result: Result) -> Lineage:
    """Return what `lineage.json` holds: from here one can walk back to the pairs."""
    config, identity = inputs.config, inputs.identity
    return {
        "kind": "training",
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "parents": [inputs.source.reference.as_parent()],
        "model": {"path": config.model.path, "revision": config.model.revision, **identity["model"]},
        "config": config.model_dump(exclude_none=True),
        "result": result,
        "packages": package_versions(_PACKAGES),
    }


def _result(folder: Path, result: Result, *, was_trained_before: bool = False) -> TrainResult:
    return TrainResult(folder, result["steps"], result["before"], result["after"], was_trained_before)
