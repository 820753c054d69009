"""The command line of a training job: `tokenweights train CONFIG.toml`. The job itself is `job/job.py`.

Light: heavy imports happen inside functions, so that `--help` and a wrong key answer at once.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.job.stopping import StopRequest, catch_signals
from weights_store.errors import TokenweightsError
from weights_store.messages import ROOT
from weights_store.processes.guard import guard
from weights_store.processes.process import CHILD, end_with_parent
from weights_store.settings import apply_overrides, load_toml, parse_settings

if TYPE_CHECKING:
    from train.config import TrainConfig

_SILENCE_S = 15.0
"""How long the processes other than the first hold an error back."""
_FLAGS = {"store": "data.store", "weights": "data.weights", "model": "model.path", "output": "output.folder"}


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
        "--dry-run", action="store_true", help="show what would be trained on, without training or loading the model"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what another job left in the output folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def load_config(arguments: argparse.Namespace) -> "TrainConfig":
    """Return the config of the file and the flags.

    Raises:
        InputError: There is no such file, or the config names a place that the operator does not allow.
        SettingsError: A key is unknown, missing or wrong.
    """
    from train.config import TrainConfig, check_places

    settings = load_toml(arguments.config) if arguments.config else {}
    settings = apply_overrides(settings, arguments.set)
    for flag, key in _FLAGS.items():
        section, name = key.split(".")
        if (value := getattr(arguments, flag)) is not None:
            settings[section] = {**settings.get(section, {}), name: value}
    config = parse_settings(TrainConfig, settings, where=arguments.config or "flags")
    if CHILD not in os.environ:
        check_places(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tokenweights train`; return 0 when done, 2 on wrong usage, 130 when stopped by a signal.

    Raises:
        TokenweightsError: See `load_config` and `train.job.job.run_job`.
    """
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has printed help (0) or usage (2)
        return int(leaving.code or 0)
    is_first = os.environ.get("RANK", "0") == "0"  # from the launcher: the processes have not joined yet
    if not is_first:
        logging.getLogger(ROOT).setLevel(logging.ERROR)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, which must not leave its ranks behind
        end_with_parent()
    stop = StopRequest()
    try:
        config = load_config(arguments)
        guard().mark_environment()  # loaders and compilers end with this process
        with catch_signals(stop):
            from train.job.job import run_job

            run_job(config, overwrite=arguments.overwrite, dry_run=arguments.dry_run, stop=stop)
    except (TokenweightsError, OSError, ModuleNotFoundError):
        if not is_first:  # the first process usually has the same error; the launcher then ends this one
            time.sleep(_SILENCE_S)
        raise
    except KeyboardInterrupt:
        if is_first:
            print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0
