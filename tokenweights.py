"""The `tokenweights` command. Each sub-command imports its packages only when it runs, so that `--help` is instant.

This module stands above all packages, and nothing imports it.
"""

import os
import sys

# `python -m` and torchrun put the current directory first on the path, and so does a relative entry of PYTHONPATH: a user's own
# train.py would be imported as ours. Without pathlib, which would itself be searched there.
if __name__ == "__main__" or os.environ.get("PYTHONPATH"):
    _unsafe = [entry for entry in os.environ.get("PYTHONPATH", "/").split(os.pathsep) if not entry.startswith("/")]
    if __name__ == "__main__" and not sys.flags.safe_path:
        _unsafe.append(sys.path[0])
    _folders = {os.path.realpath(entry) for entry in _unsafe} - {os.path.dirname(os.path.realpath(__file__))}  # noqa: PTH120
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) not in _folders]

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from train.hub.run import add_hub
from train.run import build_parser as build_train_parser
from weights_store.commands import add_commands, add_store_option
from weights_store.errors import InputError, MissingExtraError, TokenweightsError
from weights_store.messages import first_line, hide_credentials
from weights_store.packages import how_to_install, missing_package, package_versions
from weights_store.processes.process import run_main

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tokenizers import Tokenizer

    from weights_store.inspection.figure import Format
    from weights_store.processes.spread import Spread

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Run = Callable[[argparse.Namespace], int | None]

_SHELLS = ("bash", "zsh", "fish")
_PATHS = ("recipe", "files", "config", "folder", "store", "output", "tokenizer", "runs", "what", "target", "source")
"""Arguments that a shell completes with file names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # `train.run` parses its options itself
        return run_main(lambda: _train(arguments[1:]), debug="--debug" in arguments)
    options = build_parser().parse_args(arguments)
    run: Run = options.run
    if options.extra:
        run = needs_extra(options.extra)(run)
    after_interrupt = "interrupted; what was committed stays, run again to go on"
    return run_main(lambda: run(options), debug=options.debug, after_interrupt=after_interrupt)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra to install if a package is missing that the code inside imports.

    Raises:
        MissingExtraError: A package is not installed, or an installed one lacks what is imported from it.
    """
    try:
        yield
    except TokenweightsError:
        raise
    except ImportError as error:
        package = missing_package(error) or (error.name or "").partition(".")[0]
        if package in ("flows", "pipeline", "train", "weights_store"):
            raise
        problem = f"this command needs the package {package!r}, which is not installed"
        if not package or find_spec(package) is not None:  # it is there, but damaged or of a version that does not fit
            problem = f"this command cannot import what it needs: {first_line(error)}"
        raise MissingExtraError(f"{problem}; {how_to_install(package, extra)}") from error


# --- options -----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors do not repeat credentials, such as those of a store's URI in the wrong place."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with code 2."""
        super().error(hide_credentials(message))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; nothing heavy is imported."""
    parser: argparse.ArgumentParser = _Parser(
        prog="tokenweights",
        description="Precomputed token weights for DPO: score once, weigh many times, train many times.",
    )
    version = package_versions(["tokenweights"]).get("tokenweights", "(not installed)")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build_commands(commands)
    commands.add_parser(
        "train", parents=[build_train_parser()], add_help=False, help="train a model from a weight dataset"
    )
    plot = _command(commands, "plot", _plot, "draw rewards, margins and accuracy of trainings over their steps")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training, finished or not")
    plot.add_argument("-o", "--output", metavar="FILE", required=True, help="the figure: .svg or .png")
    demo = _command(commands, "demo", _demo, "run the whole job on a made-up language", "flows")
    demo.add_argument("--folder", default="demo", help="folder for the demo's store and models (default: demo)")

    def add(name: str, run: "Run", what: str) -> argparse.ArgumentParser:
        command = _command(commands, name, run, what)
        add_store_option(command)
        return command

    add_commands(add, _load_tokenizer, _draw_runs, _on_ray)
    add_hub(add, _load_tokenizer)
    completion = _command(
        commands,
        "completion",
        partial(_completion, parser, commands),
        "print a script that completes commands in a shell",
    )
    completion.add_argument("shell", choices=_SHELLS, help="for example: source <(tokenweights completion bash)")
    return parser


def _add_build_commands(commands: "Commands") -> None:
    build = _recipe_command(commands, "build", _build, "build the weight dataset of a recipe")
    build.add_argument(
        "--expect-same", action="store_true", help="fail if the settings differ from those of the latest version"
    )
    plan = _recipe_command(commands, "plan", _plan, "show what a build would do, without running it")
    plan.add_argument("--json", action="store_true", help="print one JSON list with an object for each stage")
    check = _recipe_command(
        commands, "check-scorer", _check_scorer, "compare the scoring engine's log-probs with transformers in float32"
    )
    check.add_argument("--pairs", metavar="N", type=_count, default=32, help="number of pairs to score (default: 32)")
    check.add_argument(
        "--tolerance",
        metavar="NATS",
        type=_nats,
        help="largest mean |difference| per token that passes, in nats; a single token may differ by 50 times as much "
        "(default: 1e-3 if the engine computes in float32, 1e-2 in float16, 4e-2 in bfloat16)",
    )
    check.add_argument(
        "--role",
        choices=["ref", "positive", "negative"],
        default="ref",
        help="model to score with: the reference, or one of the contrastive pair (default: ref)",
    )
    prompts = _recipe_command(
        commands,
        "check-prompts",
        _check_prompts,
        "measure on a sample whether contrastive prompts or given models say anything",
    )
    prompts.add_argument("--pairs", metavar="N", type=_count, default=64, help="number of pairs to score (default: 64)")
    what = "show whether the interpreters of a build have what they need, and which Prefect server it would use"
    doctor = _command(commands, "doctor-env", _doctor_env, what, "flows")
    doctor.add_argument("recipe", nargs="?", metavar="RECIPE", help="a TOML file (default: look at this interpreter)")
    _add_settings(doctor)
    what = "run recipes on their schedules, and trainings on what they publish, as Prefect deployments, until stopped"
    serve = _command(commands, "serve", _serve, what, "flows")
    serve.add_argument(
        "files", nargs="+", metavar="FILE", help="TOML files: recipes with a [schedule], and training configs"
    )
    _add_settings(serve)
    what = "show what deployments do: running, last, next, and what is stale"
    status = _command(commands, "status", _status, what, "flows")
    status.add_argument("--quick", action="store_true", help="do not look whether weights and policies are stale")
    status.add_argument("--json", action="store_true", help="print one JSON list with an object for each deployment")


def _recipe_command(commands: "Commands", name: str, run: "Run", what: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, run, what, "flows")
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, see recipes/")
    _add_settings(parser)
    return parser


def _command(commands: "Commands", name: str, run: "Run", what: str, extra: str = "") -> argparse.ArgumentParser:
    """Add a command. `extra` has the packages that it needs; the store's commands need those of the base."""
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, extra=extra)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="URI", help="root of the store (default: store.uri of the recipe)")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a setting of the recipe; repeatable",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _nats(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of nats above 0, got {text!r}")
    return number


# --- commands ----------------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    with needs_extra("train"):
        from train.run import main

        return main(arguments)


def _plot(options: argparse.Namespace) -> None:
    from weights_store.commands.output import check_ours, write_output
    from weights_store.inspection.figure import figure_format
    from weights_store.location import local_path

    path, format = local_path(options.output), figure_format(options.output)
    check_ours(path)
    write_output(path, _draw_runs(options.runs, format))


def _draw_runs(folders: Sequence[str], format: "Format") -> bytes:
    from train.plots import draw_runs

    return draw_runs(folders, format)


def _build(options: argparse.Namespace) -> None:
    from flows.run import run_build
    from pipeline.recipe import load_recipe

    run_build(load_recipe(options.recipe, options.overrides, options.store), options.expect_same, options.debug)


def _plan(options: argparse.Namespace) -> None:
    from pipeline.dry_run.plan import plan
    from pipeline.dry_run.table import plan_lines, plan_rows
    from pipeline.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, options.store)
    plans = plan(recipe)
    if options.json:
        print(json.dumps(plan_rows(plans), indent=2))
        return
    print(f"A build of {recipe.weights.name} in {recipe.store.uri} would do this:\n")
    print("\n".join(plan_lines(plans)))


def _check_scorer(options: argparse.Namespace) -> None:
    from pipeline.parity.check import check_parity, check_scorer, parity_lines
    from pipeline.recipe import load_recipe

    found = check_scorer(
        load_recipe(options.recipe, options.overrides, options.store),
        num_pairs=options.pairs,
        tolerance_nats=options.tolerance,
        role=options.role,
    )
    print("\n".join(parity_lines(found)))
    check_parity(found)


def _check_prompts(options: argparse.Namespace) -> None:
    from pipeline.prompt_check import check_lines, check_prompts
    from pipeline.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, options.store)
    print("\n".join(check_lines(check_prompts(recipe, options.pairs))))


def _doctor_env(options: argparse.Namespace) -> None:
    from flows.environments import environment_rows
    from pipeline.recipe import load_recipe
    from weights_store.printing import print_table

    recipe = load_recipe(options.recipe, options.overrides, options.store) if options.recipe else None
    rows = environment_rows(recipe)
    print_table(rows)
    problems = [f"{row['what']}: {row['problem']}" for row in rows if row["problem"]]
    if problems:
        more = f"; {len(problems) - 1} more in the table" if problems[1:] else ""
        raise InputError(f"{problems[0]}{more}")


def _serve(options: argparse.Namespace) -> None:
    from flows.serve import serve

    serve(options.files, options.overrides, options.store)


def _status(options: argparse.Namespace) -> None:
    from flows.status import print_status, read_status

    print_status(read_status(check_stale=not options.quick), as_json=options.json)


def _demo(options: argparse.Namespace) -> None:
    from flows.demo import run_demo

    run_demo(options.folder, options.debug)


def _completion(parser: argparse.ArgumentParser, commands: "Commands", options: argparse.Namespace) -> None:
    import shtab

    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in _PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # an attribute that shtab looks for
    print(shtab.complete(parser, options.shell))


def _load_tokenizer(folder: str) -> "Tokenizer":
    """Return the tokenizer of a model folder.

    Raises:
        InputError: The folder has no tokenizer.json, or a damaged one.
        MissingExtraError: The package `tokenizers` is not installed.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json; give the folder of the model that tokenised the pairs")
    with needs_extra("train"):
        from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{path} is damaged: {first_line(error)}; copy it from the model again") from error


def _on_ray(address: str) -> "AbstractContextManager[Spread]":
    from pipeline.workers.ray_spread import ray_spread

    return ray_spread(address)


if __name__ == "__main__":
    sys.exit(main())
