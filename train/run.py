"""Run one training job: `python -m train.run CONFIG.toml`, `tokenweights train …`, or `run(config)` from Python.

Reads as a table of contents; every part is in a file of its own. Heavy imports happen inside functions, so that `--help` and a
wrong key answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_store.errors import TokenweightsError
from weights_store.settings import apply_overrides, load_toml, parse_settings

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.dataset import Pair, PairDataset, WeightSource
    from train.stopping import StopRequest
    from train.trainer import PairTrainer

SAMPLE_PAIRS = 256
"""Pairs that are measured before and after."""

_FLAGS = {"store": "data.store", "weights": "data.weights", "model": "model.path", "output": "output.folder"}
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


def run(config: "TrainConfig", *, overwrite: bool = False, stop: "StopRequest | None" = None) -> TrainResult:
    """Train as `config` says and return where the model is.

    Args:
        config: The job.
        overwrite: Delete what an earlier job left in the output folder.
        stop: Looked at after every step; on request a checkpoint is written and `KeyboardInterrupt` raised.

    Raises:
        SettingsError: The output folder holds another job, or `pairs_per_step` cannot be shared by the processes, or the
            loss became infinite.
        InputError: The model or the output folder cannot be used.
        MismatchError: Model and dataset do not belong together, rows of the dataset do not, or `tis_dpo` meets constant
            weights.
        NotFoundError: No such store, dataset, version or split.
        KeyboardInterrupt: A stop was requested; a later run goes on from the checkpoint.
    """
    from accelerate import PartialState

    from train.dataset import PairDataset, open_weights, sample_pairs
    from train.output import OutputFolder
    from train.policy import check_model_fits, find_model

    source = open_weights(config.data)
    model_folder = find_model(config.model)
    vocab_size = check_model_fits(model_folder, source)
    identity = build_identity(config, source, model_folder)
    output = OutputFolder(Path(config.output.folder))
    finished = output.check(identity, overwrite=overwrite)
    if finished is not None:
        _say(f"already trained: {output.path} (--overwrite trains again)")
        return _result(output.path, finished, was_trained_before=True)

    pairs = PairDataset(source, config.data, vocab_size=vocab_size)
    sample = sample_pairs(pairs, SAMPLE_PAIRS)
    _check_method(config, source, sample)
    processes = PartialState()
    processes.wait_for_everyone()  # every process has read the folder before one changes it
    if processes.is_main_process:
        output.claim(identity, config.model_dump(), overwrite=overwrite, resume=config.output.resume)
    processes.wait_for_everyone()

    trainer = _build_trainer(config, model_folder, pairs, output.checkpoints, stop)
    record = _train(trainer, sample, output.last_checkpoint(), stop)
    lineage = build_lineage(config, source, identity, record)
    if processes.is_main_process:
        from train.policy import save_policy

        save_policy(trainer.accelerator.unwrap_model(trainer.model), model_folder, output.start_staging())
        metrics = {**record, "history": trainer.state.log_history}
        output.publish(lineage, metrics, keep_checkpoints=config.output.keep_checkpoints)
    processes.wait_for_everyone()
    _say(f"wrote {output.path}")
    return _result(output.path, lineage)


def _check_method(config: "TrainConfig", source: "WeightSource", sample: "Sequence[Pair]") -> None:
    from train.dataset import check_weights_vary

    if config.loss.name == "tis_dpo":
        check_weights_vary(source, sample)


def _build_trainer(
    config: "TrainConfig", model_folder: Path, pairs: "PairDataset", checkpoints: Path, stop: "StopRequest | None"
) -> "PairTrainer":
    from transformers import PrinterCallback
    from transformers.utils import logging

    from train.policy import load_policy
    from train.progress import ProgressLines, StopAfterStep
    from train.trainer import PairTrainer

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    callbacks: list[Any] = [ProgressLines(config.optim.pairs_per_step)]
    if stop is not None:
        callbacks.append(StopAfterStep(stop))
    trainer = PairTrainer(load_policy(model_folder), pairs, config, checkpoints=checkpoints, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    _say(
        f"training {config.loss.name} on {pairs.source.name} ({len(pairs):,} pairs): {trainer.batches.num_steps:,} steps "
        f"of {config.optim.pairs_per_step} pairs"
    )
    return trainer


def _train(
    trainer: "PairTrainer", sample: "Sequence[Pair]", checkpoint: Path | None, stop: "StopRequest | None"
) -> dict[str, Any]:
    """Measure, train, measure."""
    before = trainer.measure(sample)
    _say(f"before: {_line(before)}")
    if checkpoint is not None:
        _say(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop is not None and stop.requested and trainer.state.global_step < trainer.batches.num_steps:
        raise KeyboardInterrupt
    after = trainer.measure(sample)
    _say(f"after:  {_line(after)}")
    return {"steps": trainer.state.global_step, "before": before, "after": after, "num_sample_pairs": len(sample)}


def build_identity(config: "TrainConfig", source: "WeightSource", model_folder: Path) -> dict[str, Any]:
    """Return what determines the trained model: content, never paths, micro-batches or logging.

    Raises:
        InputError: The folder holds no model.
    """
    from weights_store.fingerprint import fingerprint_model

    return {
        "weights": {"name": source.name, "fingerprint": source.reference.fingerprint},
        "model": {"fingerprint": fingerprint_model(model_folder), "dtype": config.model.dtype},
        "data": config.data.model_dump(exclude={"store", "weights"}),
        "loss": config.loss.model_dump(),
        "optim": config.optim.model_dump(exclude={"pairs_per_batch"}),
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
        "config": config.model_dump(),
        **record,
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
    return TrainResult(folder, lineage["steps"], lineage["before"], lineage["after"], was_trained_before)


def _line(metrics: dict[str, float]) -> str:
    shown = ("loss", "rewards/accuracies", "rewards/margins", "weighted_rewards/margins")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)


def _say(line: str) -> None:
    """Print on the first process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(line, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `tokenweights train`."""
    parser = argparse.ArgumentParser(
        prog="tokenweights train",
        description="Train a model on one pinned version of a weight dataset. Flags win over the file.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="sections data, model, loss, optim, output")
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
    """Run the command; return 0 when done, 1 on an error, 2 on wrong usage, 130 when stopped by a signal."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has printed help (0) or usage (2)
        return int(leaving.code or 0)
    from train.stopping import StopRequest, catch_signals

    stop = StopRequest()
    try:
        with catch_signals(stop):
            run(load_config(arguments), overwrite=arguments.overwrite, stop=stop)
    except TokenweightsError as error:
        if arguments.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
