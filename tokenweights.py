"""The `tokenweights` command. Every sub-command loads its extra only when it runs, so that `--help` is instant.

This module stands above all packages, and nothing imports it.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weights_store.commands import add_commands, add_store_option
from weights_store.errors import InputError, MissingExtraError, TokenweightsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # the training job has options of its own: the same as `python -m train.run`
        return int(_guarded(lambda: _load("train.run", "train").main(arguments[1:]), debug="--debug" in arguments))
    options = _parser().parse_args(arguments)
    return int(_guarded(lambda: options.run(options), options.debug))


def _guarded(run: Any, debug: bool) -> int:
    try:
        return int(run() or 0)
    except TokenweightsError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `tokenweights ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # no permission, a full disk, a file where a folder should be
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was committed stays, run again to go on", file=sys.stderr)
        return 130


def _load(module: str, extra: str) -> Any:
    """Import one of our modules, and name the extra to install when one of its requirements is missing.

    Raises:
        MissingExtraError: A package of the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("flows", "pipeline", "train", "weights_store"):
            raise
        raise MissingExtraError(
            f"this command needs the package {error.name!r}, which is not installed; pip install 'tokenweights[{extra}]'"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenweights",
        description="Precomputed token weights for DPO: score once, weigh many times, train many times.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = _command(commands, "build", _build, "build the weight dataset of a recipe")
    build.add_argument("recipe", help="a TOML file, see recipes/")
    build.add_argument("--store", metavar="URI", help="root of the store; default: the recipe's store.uri")
    _add_overrides(build)
    build.add_argument(
        "--expect-same", action="store_true", help="refuse to make a version with other settings than the newest"
    )

    plan = _command(commands, "plan", _plan, "say what a build of a recipe would do, and do nothing")
    plan.add_argument("recipe", help="a TOML file, see recipes/")
    plan.add_argument("--store", metavar="URI", help="root of the store; default: the recipe's store.uri")
    _add_overrides(plan)

    check = _command(
        commands, "check-scorer", _check_scorer, "compare the scoring engine's log-probs with transformers in float32"
    )
    check.add_argument("recipe", help="a TOML file, see recipes/")
    check.add_argument("--store", metavar="URI", help="root of the store; default: the recipe's store.uri")
    _add_overrides(check)
    check.add_argument("--pairs", metavar="N", type=_count, default=32, help="pairs to score (default: 32)")
    check.add_argument(
        "--tolerance",
        metavar="NATS",
        type=_nats,
        help="largest mean |difference| per token that passes, in nats; no token may be off by more than 50 times as much "
        "(default: 1e-3 and 0.05 where the engine computes in float32, 1e-2 and 0.5 in float16, 4e-2 and 2 in bfloat16)",
    )
    check.add_argument(
        "--role",
        choices=["ref", "positive", "negative"],
        default="ref",
        help="which scorer: the reference, or one of the contrastive pair (default: ref)",
    )

    serve = _command(commands, "serve", _serve, "serve recipes as scheduled Prefect deployments, until stopped")
    serve.add_argument("recipes", nargs="+", metavar="RECIPE", help="TOML files, each with a [schedule]")
    serve.add_argument("--store", metavar="URI", help="root of the store; default: each recipe's store.uri")
    _add_overrides(serve)

    train = commands.add_parser("train", help="train a policy from a weight dataset; the same as python -m train.run")
    train.set_defaults(debug=False)

    demo = _command(commands, "demo", _demo, "run everything on a made-up language, in a folder of its own")
    demo.add_argument("--folder", default="demo", help="where the demo's store and models go (default: demo)")

    def add(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        command = _command(commands, name, run, what)
        add_store_option(command)
        return command

    add_commands(add, _load_tokenizer)
    return parser


def _command(commands: Any, name: str, run: Any, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)
    return parser


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


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a setting; repeatable",
    )


def _build(options: argparse.Namespace) -> None:
    recipes, run = _load("pipeline.recipe", "flows"), _load("flows.run", "flows")
    recipe = recipes.load_recipe(options.recipe, options.overrides, options.store)
    run.run_build(recipe, options.expect_same, options.debug)


def _plan(options: argparse.Namespace) -> None:
    recipes, planning = _load("pipeline.recipe", "flows"), _load("pipeline.plan", "flows")
    recipe = recipes.load_recipe(options.recipe, options.overrides, options.store)
    plans = planning.plan(recipe, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"A build of {recipe.weights.name} in {recipe.store.uri} would do this:\n")
    print("\n".join(_load("pipeline.plan_table", "flows").plan_lines(plans)))


def _check_scorer(options: argparse.Namespace) -> None:
    recipes, parity = _load("pipeline.recipe", "flows"), _load("pipeline.parity", "flows")
    found = parity.check_scorer(
        recipes.load_recipe(options.recipe, options.overrides, options.store),
        num_pairs=options.pairs,
        tolerance_nats=options.tolerance,
        role=options.role,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print("\n".join(parity.parity_lines(found)))
    parity.check_parity(found)


def _serve(options: argparse.Namespace) -> None:
    recipes, serving = _load("pipeline.recipe", "flows"), _load("flows.serve", "flows")
    loaded = {path: recipes.load_recipe(path, options.overrides, options.store) for path in options.recipes}
    serving.serve_recipes(loaded)


def _demo(options: argparse.Namespace) -> None:
    _load("flows.demo", "flows").run_demo(options.folder, options.debug)


def _load_tokenizer(folder: str) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        InputError: The folder has no tokenizer.json.
        MissingExtraError: The package `tokenizers` is not installed.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json; give the folder of the model that the pairs were tokenised with"
        )
    return _load("tokenizers", "train").Tokenizer.from_file(str(path))


if __name__ == "__main__":
    sys.exit(main())
