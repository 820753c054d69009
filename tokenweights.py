"""The `tokenweights` command. Every sub-command imports its extra only when it runs, so that `--help` is instant.

This module stands above all packages, and nothing imports it.
"""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.abspath(__file__)):
    del sys.path[
        0
    ]  # where `python -m` and torchrun put the current directory: a user's own train.py would stand for ours

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_store.commands import add_commands, add_store_option
from weights_store.errors import InputError, MissingExtraError
from weights_store.process import run_main

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # the training job has options of its own
        return run_main(lambda: _train(arguments[1:]), debug="--debug" in arguments)
    options = _parser().parse_args(arguments)
    run: Callable[[], int | None] = lambda: options.run(options)  # noqa: E731
    return run_main(
        run, debug=options.debug, after_interrupt="interrupted; what was committed stays, run again to go on"
    )


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra to install when a package that is imported inside is missing.

    Raises:
        MissingExtraError: A package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("flows", "pipeline", "train", "weights_store"):
            raise
        raise MissingExtraError(
            f"this command needs the package {error.name!r}, which is not installed; pip install 'tokenweights[{extra}]'"
        ) from error


def _train(arguments: list[str]) -> int:
    with needs_extra("train"):
        from train.run import main
    return main(arguments)


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
    with needs_extra("flows"):
        from flows.run import run_build
        from pipeline.recipe import load_recipe
    run_build(load_recipe(options.recipe, options.overrides, options.store), options.expect_same, options.debug)


def _plan(options: argparse.Namespace) -> None:
    with needs_extra("flows"):
        from pipeline.dry_run.plan import plan
        from pipeline.dry_run.table import plan_lines
        from pipeline.recipe import load_recipe
    recipe = load_recipe(options.recipe, options.overrides, options.store)
    plans = plan(recipe)
    print(f"A build of {recipe.weights.name} in {recipe.store.uri} would do this:\n")
    print("\n".join(plan_lines(plans)))


def _check_scorer(options: argparse.Namespace) -> None:
    with needs_extra("flows"):
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


def _serve(options: argparse.Namespace) -> None:
    with needs_extra("flows"):
        from flows.serve import serve_recipes
        from pipeline.recipe import load_recipe
    serve_recipes({path: load_recipe(path, options.overrides, options.store) for path in options.recipes})


def _demo(options: argparse.Namespace) -> None:
    with needs_extra("flows"):
        from flows.demo import run_demo
    run_demo(options.folder, options.debug)


def _load_tokenizer(folder: str) -> "Tokenizer":
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
    with needs_extra("train"):
        from tokenizers import Tokenizer
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    sys.exit(main())
