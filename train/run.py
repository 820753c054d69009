"""Run one training job: `tokenweights train CONFIG.toml`, or `run(config)` from Python.

Reads as a table of contents; every part is in a file of its own. Heavy imports happen inside functions, so that `--help` and a
wrong key answer at once.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_store.errors import TokenweightsError
from weights_store.messages import ROOT, logger
from weights_store.settings import apply_overrides, load_toml, parse_settings

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.data.dataset import Pair, PairDataset, WeightSource
    from train.job.output import OutputFolder
    from train.job.stopping import StopRequest
    from train.job.trainer import PairTrainer

_log = logger(__name__)

SAMPLE_PAIRS = 256
"""Pairs that are measured before and after."""

_SILENCE_S = 5.0
"""How long the other processes hold an error back."""
_FLAGS = {"store": "data.store", "weights": "data.weights", "model": "model.path", "output": "output.folder"}
_MODEL_KEYS = {"dtype", "quantization"}
_DATA_KEYS = {"swap", "split", "max_pairs"}
_PACKAGES = ("tokenweights", "torch", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class TrainResult:
    """What a training job came to.

    Args:
        folder: The model.
        steps: Optimizer steps behind it.
        before: Metrics of a fixed sample of pairs before training; `loss` is nats per pair, for SFT nats per token.
        after: The same after it.
        was_trained_before: Nothing was done: the folder held this very job, finished.
    """

    folder: Path
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    was_trained_before: bool = False


def run(
    config: "TrainConfig", *, overwrite: bool = False, dry_run: bool = False, stop: "StopRequest | None" = None
) -> TrainResult | None:
    """Train as `config` says and return where the model is.

    Args:
        config: The job.
        overwrite: Delete what an earlier job left in the output folder.
        dry_run: Only check everything that can be checked without loading the model, and print what would be trained on.
        stop: Looked at after every step; on request a checkpoint is written and `KeyboardInterrupt` raised.

    Raises:
        SettingsError: The output folder holds another job, or `pairs_per_step` cannot be shared by the processes, or the
            loss became infinite.
        InputError: The model or the output folder cannot be used.
        MismatchError: Model and dataset do not belong together (tokenizer, vocabulary, step-0 gate), rows of the dataset don't,
            it lacks what the loss needs, its token weights are constant where the loss reads them, or made in another way
            than the loss would make them anew.
        NotFoundError: No such store, dataset, version or split.
        MissingExtraError: The config asks for a package that is not installed.
        KeyboardInterrupt: A stop was requested; a later run goes on from the checkpoint.
    """
    from train.data.dataset import PairDataset, open_weights, sample_pairs
    from train.data.selection import Selection
    from train.job.output import OutputFolder, explain_full_disk
    from train.job.ranks import join_ranks
    from train.loss.config import loss_needs
    from train.model.policy import check_model_fits, find_model

    source = open_weights(config.data)
    _check_columns(config, source)
    model_folder = find_model(config.model)
    vocab_size = check_model_fits(model_folder, source)
    identity = build_identity(config, source, model_folder)
    output = OutputFolder(Path(config.output.folder))
    finished = output.check(identity, overwrite=overwrite)
    if finished is not None:
        _log.info(f"already trained: {output.path} (--overwrite trains again)")
        return _result(output.path, finished, was_trained_before=True)

    needs = loss_needs(config.loss)
    views: dict[str, Any] = {
        "vocab_size": vocab_size,
        "with_ref_top": needs.ref_top,
        "with_scores": needs.scores,
        "with_anchors": needs.anchors and not needs.fresh_anchors,
    }
    pairs = PairDataset(source, config.data, selection=Selection.for_training(config.data, config.eval), **views)
    sample = sample_pairs(pairs, SAMPLE_PAIRS)
    _check_method(config, source, sample)
    held_out: Sequence[Pair] = []
    if config.eval.is_on:
        others = PairDataset(source, config.data, selection=Selection.for_evaluation(config.data, config.eval), **views)
        held_out = sample_pairs(others, config.eval.max_pairs)
    processes = join_ranks()
    _check_before_claiming(config, len(pairs), processes.num_processes)
    if dry_run:
        from train.job.dry_run import outlook_lines

        _log.info("\n".join(outlook_lines(config, source, pairs, held_out, identity)))
        return None
    processes.wait_for_everyone()  # every process has read the folder before one changes it
    if processes.is_main_process:
        output.claim(identity, config.model_dump(exclude_none=True), overwrite=overwrite, resume=config.output.resume)
    processes.wait_for_everyone()

    trainer = _build_trainer(config, model_folder, pairs, held_out, output.checkpoints, stop)
    _pass_gate(trainer, source, sample, identity)
    with explain_full_disk(output.path):
        record = _train(trainer, sample, output.last_checkpoint(), stop)
        lineage = build_lineage(config, source, identity, record)
        _save(trainer, source, model_folder, output, lineage)
    _log.info(f"wrote {output.path}")
    return _result(output.path, lineage)


def _check_columns(config: "TrainConfig", source: "WeightSource") -> None:
    """Refuse a dataset that lacks what the loss needs; its commit says what it holds."""
    from train.loss.objective import check_columns_for

    statistics = source.metadata.get("statistics", {})
    present = {f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ref_logps", "token_weights")}
    if statistics.get("num_scored_pairs", 0) == statistics.get("num_pairs"):
        present |= {"chosen_score", "rejected_score"}
    if statistics.get("ref_top_k"):
        present |= {f"{side}_ref_top_{name}" for side in ("chosen", "rejected") for name in ("ids", "logps")}
    if statistics.get("num_anchored_pairs", 0) == statistics.get("num_pairs"):
        present |= {"anchor_ids", "anchor_ref_logps"}
    check_columns_for(config.loss, source.name, present)


def _check_method(config: "TrainConfig", source: "WeightSource", sample: "Sequence[Pair]") -> None:
    from train.data.dataset import check_weights_vary
    from train.job.refresh import check_refreshing
    from train.loss.config import loss_needs

    if loss_needs(config.loss).token_weights:
        check_weights_vary(source, sample, config.loss.name)
    check_refreshing(config, source)


def _check_before_claiming(config: "TrainConfig", num_pairs: int, num_processes: int) -> None:
    """Refuse what the Trainer could not do, while the output folder is as it was."""
    from train.job.progress import check_tracker
    from train.job.trainer import build_batches

    check_tracker(config.output.report_to)
    build_batches(config, num_pairs, world_size=num_processes)


def _build_trainer(
    config: "TrainConfig",
    model_folder: Path,
    pairs: "PairDataset",
    held_out: "Sequence[Pair]",
    checkpoints: Path,
    stop: "StopRequest | None",
) -> "PairTrainer":
    from transformers import PrinterCallback, set_seed
    from transformers.utils import logging

    from train.job.progress import ProgressLines, StopAfterStep
    from train.job.trainer import PairTrainer
    from train.loss.config import loss_needs
    from train.model.policy import load_policy, load_reference

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    callbacks: list[Any] = [ProgressLines(config.optim.pairs_per_step)]
    if stop is not None:
        callbacks.append(StopAfterStep(stop))
    set_seed(config.optim.seed)  # new adapters begin at random
    policy = load_policy(model_folder, config.model, config.lora)
    if policy.not_packed is not None:
        _log.info(f"two padded sequences per pair: {policy.not_packed}")
    # With adapters these are switched off instead.
    needs_reference = loss_needs(config.loss).reference_model and config.lora is None
    reference = load_reference(model_folder, config.model) if needs_reference else None
    trainer = PairTrainer(
        policy, pairs, config, checkpoints=checkpoints, held_out=held_out, reference=reference, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    _log.info(
        f"training {config.loss.name} on {pairs.source.name} ({len(pairs):,} pairs): {trainer.batches.num_steps:,} steps "
        f"of {config.optim.pairs_per_step} pairs"
    )
    return trainer


def _pass_gate(
    trainer: "PairTrainer", source: "WeightSource", sample: "Sequence[Pair]", identity: dict[str, Any]
) -> None:
    """Compare the model with the stored reference, for losses that take it for the same function."""
    from train.job.gate import check_step_0, tolerance_of
    from train.loss.config import loss_needs

    config = trainer.config
    if not config.gate.pairs or not loss_needs(config.loss).ref_logps:
        return
    few = sample[: config.gate.pairs]
    tolerance_nats = tolerance_of(config.gate, source.metadata)
    found = check_step_0(
        lambda dtype: trainer.response_logps(few, dtype),
        tolerance_nats=tolerance_nats,
        dtype=config.model.dtype,
        metadata=source.metadata,
        model=config.model.path,
        model_fingerprint=identity["model"]["fingerprint"],
        quantized=config.model.quantization != "none",
    )
    _log.info(
        f"step-0 gate: {found.mean:.2g} nats per token from the stored reference (at most {tolerance_nats:.2g}), over "
        f"{found.num_tokens:,} tokens"
    )


def _train(
    trainer: "PairTrainer", sample: "Sequence[Pair]", checkpoint: Path | None, stop: "StopRequest | None"
) -> dict[str, Any]:
    """Measure, train, measure."""
    before = trainer.measure(sample)
    _log.info(f"before: {_line(before)}")
    if checkpoint is not None:
        _log.info(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop is not None and stop.requested and trainer.state.global_step < trainer.batches.num_steps:
        raise KeyboardInterrupt
    after = trainer.measure(sample)
    _log.info(f"after:  {_line(after)}")
    record: dict[str, Any] = {"steps": trainer.state.global_step, "before": before, "after": after}
    record["num_sample_pairs"] = len(sample)
    if trainer.held_out:
        record["held_out"] = trainer.measure(trainer.held_out)
        _log.info(f"held out: {_line(record['held_out'])}")
    if trainer.config.eval.best:
        record["best_step"] = trainer.state.best_global_step
        _log.info(f"best by held-out {trainer.config.eval.best}: step {trainer.state.best_global_step}")
    return record


def _save(
    trainer: "PairTrainer",
    source: "WeightSource",
    model_folder: Path,
    output: "OutputFolder",
    lineage: dict[str, Any],
) -> None:
    """Write the model, its card, its metrics and its lineage; all ranks take part where the model is cut up."""
    from train.job.card import model_card
    from train.job.ranks import gather_parameters
    from train.model.policy import load_policy, save_policy

    config, accelerator = trainer.config, trainer.accelerator
    model: Any = accelerator.unwrap_model(trainer.model)
    whole = gather_parameters(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if accelerator.is_main_process:
        if whole is not None:
            model = load_policy(model_folder, config.model, config.lora).model
            model.load_state_dict(whole)
        staging = output.start_staging()
        is_hub_id = not Path(config.model.path).expanduser().is_dir()
        save_policy(model, config.lora, model_folder, staging, config.model.path if is_hub_id else None)
        (staging / "README.md").write_text(model_card(lineage, source), encoding="utf-8")
        metrics = {**lineage["result"], "history": trainer.state.log_history}
        output.publish(lineage, metrics, keep_checkpoints=config.output.keep_checkpoints)
    accelerator.wait_for_everyone()


def build_identity(config: "TrainConfig", source: "WeightSource", model_folder: Path) -> dict[str, Any]:
    """Return what determines the trained model: content, never paths, micro-batches or logging.

    Raises:
        InputError: The folder holds no model.
    """
    from weights_store.fingerprint import fingerprint_model

    return {
        "weights": {"name": source.name, "fingerprint": source.reference.fingerprint},
        "model": {"fingerprint": fingerprint_model(model_folder), **config.model.model_dump(include=_MODEL_KEYS)},
        "lora": config.lora and config.lora.model_dump(),
        "data": config.data.model_dump(include=_DATA_KEYS),
        "loss": config.loss.model_dump(exclude_none=True),
        "optim": config.optim.model_dump(exclude={"tokens_per_batch"}),
        "eval": config.eval.model_dump(exclude=set() if config.eval.best else {"every_steps", "max_pairs"}),
    }


def build_lineage(
    config: "TrainConfig", source: "WeightSource", identity: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any]:
    """Return what `lineage.json` holds: from here one can walk back to the pairs."""
    from weights_store.fingerprint import fingerprint

    return {
        "kind": "training",
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "parents": [source.reference.as_parent()],
        "model": {"path": config.model.path, "revision": config.model.revision, **identity["model"]},
        "config": config.model_dump(exclude_none=True),
        "result": record,
        "packages": _package_versions(),
    }


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    return versions


def _result(folder: Path, lineage: dict[str, Any], *, was_trained_before: bool = False) -> TrainResult:
    result = lineage["result"]
    return TrainResult(folder, result["steps"], result["before"], result["after"], was_trained_before)


def _line(metrics: dict[str, float]) -> str:
    shown = ("loss", "rewards/accuracies", "rewards/margins", "weighted_rewards/margins")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `tokenweights train`."""
    parser = argparse.ArgumentParser(
        prog="tokenweights train",
        description="Train a model on one pinned version of a weight dataset. Flags win over the file.",
        epilog="Several processes: torchrun --nproc-per-node N -m tokenweights train CONFIG.toml, or accelerate launch.",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.toml",
        help="sections data, model, lora, loss, optim, eval, gate, parallel, output; see docs/training.md",
    )
    parser.add_argument("--store", metavar="URI", help="root of the store (data.store)")
    parser.add_argument(
        "--weights", metavar="NAME[@V]", help="weight dataset, newest version by default (data.weights)"
    )
    parser.add_argument("--model", metavar="PATH", help="folder or hub id of the model to train (model.path)")
    parser.add_argument("--output", metavar="DIR", help="folder for the trained model (output.folder)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any other key, for example loss.beta=0.1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained on, and do nothing; the model is not loaded"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what another job left in the output folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def load_config(arguments: argparse.Namespace) -> "TrainConfig":
    """Return the config of the file and the flags.

    Raises:
        InputError: There is no such file.
        SettingsError: A key is unknown, missing or wrong.
    """
    from train.config import TrainConfig

    settings = load_toml(arguments.config) if arguments.config else {}
    settings = apply_overrides(settings, arguments.set)
    for flag, key in _FLAGS.items():
        value = getattr(arguments, flag)
        section, name = key.split(".")
        if value is not None:
            settings[section] = {**settings.get(section, {}), name: value}
    return parse_settings(TrainConfig, settings, where=arguments.config or "flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tokenweights train`; return 0 when done, 2 on wrong usage, 130 when stopped by a signal.

    Raises:
        TokenweightsError: Whatever `run` raises.
    """
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has printed help (0) or usage (2)
        return int(leaving.code or 0)
    from train.job.stopping import StopRequest, catch_signals

    is_first = os.environ.get("RANK", "0") == "0"  # asked of the launcher, for nothing may have been joined yet
    if not is_first:
        logging.getLogger(ROOT).setLevel(logging.ERROR)
    stop = StopRequest()
    try:
        with catch_signals(stop):
            run(load_config(arguments), overwrite=arguments.overwrite, dry_run=arguments.dry_run, stop=stop)
    except TokenweightsError:
        if not is_first:  # it mostly has the same to say; when it has, the launcher ends this one
            time.sleep(_SILENCE_S)
        raise
    except KeyboardInterrupt:
        if is_first:
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
