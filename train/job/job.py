"""Run one training job: `run_job(config)` from Python, `tokenweights train CONFIG.toml` from a shell (`train/run.py`).

Reads as a table of contents; every part is in a file of its own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from train.config import TrainConfig
from train.data.dataset import Pair
from train.job.card import model_card
from train.job.dry_run import dry_run_lines
from train.job.gate import check_step_0
from train.job.output import Lineage, OutputFolder, Result, explain_full_disk
from train.job.prepare import JobInputs, JobPairs, open_inputs, open_pairs
from train.job.progress import ProgressLines, StopAfterStep, check_tracker, metrics_line
from train.job.ranks import gather_parameters, join_ranks
from train.job.stopping import StopRequest
from train.job.trainer import PairTrainer, build_batches
from train.model.policy import load_policy, load_reference, save_policy
from weights_store.fingerprint import fingerprint
from weights_store.messages import logger
from weights_store.packages import package_versions

_log = logger(__name__)

_PACKAGES = ("tokenweights", "torch", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training job.

    `before` and `after` are the metrics of a fixed sample of pairs; `loss` is in nats per pair, for SFT in nats per token.
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

    Args:
        config: The job.
        overwrite: Delete what an earlier job left in the output folder.
        dry_run: Check what can be checked without loading the model, and print what the training would do.
        stop: Looked at after every step; on request a checkpoint is written and `KeyboardInterrupt` raised.

    Raises:
        SettingsError: The output folder holds another job, the processes cannot share `pairs_per_step`, or the loss became
            infinite.
        InputError: The model or the output folder cannot be used.
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
    pairs = open_pairs(inputs)
    processes = join_ranks()
    check_tracker(config.output.report_to)
    build_batches(config, len(pairs.trained), world_size=processes.num_processes)  # refuses what cannot be shared
    if dry_run:
        if processes.is_main_process:
            print("\n".join(dry_run_lines(inputs, pairs)))
        return None
    processes.wait_for_everyone()  # every process has read the folder before one changes it
    if processes.is_main_process:
        settings = config.model_dump(exclude_none=True)
        output.claim(inputs.identity, settings, overwrite=overwrite, resume=config.output.resume)
    processes.wait_for_everyone()

    trainer = _build_trainer(inputs, pairs, output.checkpoints, stop)
    _pass_gate(trainer, inputs, pairs.sample)
    with explain_full_disk(output.path):
        lineage = _build_lineage(inputs, _train(trainer, pairs.sample, output.last_checkpoint(), stop))
        _save(trainer, inputs, output, lineage)
    _log.info(f"wrote {output.path}")
    return _result(output.path, lineage["result"])


def _build_trainer(inputs: JobInputs, pairs: JobPairs, checkpoints: Path, stop: StopRequest) -> PairTrainer:
    config, folder = inputs.config, inputs.model_folder
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    set_seed(config.optim.seed)  # new adapters begin at random
    policy = load_policy(folder, config.model, config.lora)
    if policy.not_packed is not None:
        _log.info(f"two padded sequences per pair: {policy.not_packed}")
    # With adapters, the policy without them is the reference.
    needs_reference = config.loss.needs.reference_model and config.lora is None
    reference = load_reference(folder, config.model) if needs_reference else None
    trainer = PairTrainer(
        policy,
        pairs.trained,
        config,
        checkpoints=checkpoints,
        held_out=pairs.held_out,
        reference=reference,
        callbacks=[ProgressLines(config.optim.pairs_per_step), StopAfterStep(stop)],
    )
    trainer.remove_callback(PrinterCallback)
    _log.info(
        f"training {config.loss.name} on {inputs.source.name} ({len(pairs.trained):,} pairs): "
        f"{trainer.batches.num_steps:,} steps of {config.optim.pairs_per_step} pairs"
    )
    return trainer


def _pass_gate(trainer: PairTrainer, inputs: JobInputs, sample: Sequence[Pair]) -> None:
    """Compare the model with the stored reference, for losses whose log-ratios start at 0."""
    config, few = inputs.config, sample[: inputs.config.gate.pairs]
    if few and config.loss.needs.ref_logps:
        model_fingerprint = inputs.identity["model"]["fingerprint"]
        check_step_0(
            lambda dtype: trainer.response_logps(few, dtype), config, inputs.source.metadata, model_fingerprint
        )


def _train(trainer: PairTrainer, sample: Sequence[Pair], checkpoint: Path | None, stop: StopRequest) -> Result:
    """Measure, train, measure."""
    before = trainer.measure(sample)
    _log.info(f"before: {metrics_line(before)}")
    if checkpoint is not None:
        _log.info(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested and trainer.state.global_step < trainer.batches.num_steps:
        raise KeyboardInterrupt
    after = trainer.measure(sample)
    _log.info(f"after:  {metrics_line(after)}")
    result = Result(steps=trainer.state.global_step, before=before, after=after, num_sample_pairs=len(sample))
    if trainer.held_out:
        result["held_out"] = trainer.measure(trainer.held_out)
        _log.info(f"held out: {metrics_line(result['held_out'])}")
    if trainer.config.eval.best:
        result["best_step"] = trainer.state.best_global_step
        _log.info(f"best by held-out {trainer.config.eval.best}: step {trainer.state.best_global_step}")
    return result


def _save(trainer: PairTrainer, inputs: JobInputs, output: OutputFolder, lineage: Lineage) -> None:
    """Write the model, its card, its metrics and its lineage; all ranks take part if the model is sharded."""
    config, accelerator = inputs.config, trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    whole = gather_parameters(trainer.model_wrapped) if trainer.is_fsdp_enabled else {}
    if accelerator.is_main_process:
        if whole:
            model = load_policy(inputs.model_folder, config.model, config.lora).model
            model.load_state_dict(whole)
        staging = output.start_staging()
        is_hub_id = not Path(config.model.path).expanduser().is_dir()
        save_policy(model, config.lora, inputs.model_folder, staging, config.model.path if is_hub_id else None)
        (staging / "README.md").write_text(model_card(lineage, inputs.source), encoding="utf-8")
        metrics = {**lineage["result"], "history": trainer.state.log_history}
        output.publish(staging, lineage, metrics, keep_checkpoints=config.output.keep_checkpoints)
    accelerator.wait_for_everyone()


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
