"""The command `view`: pairs of a weight dataset with the weights of their tokens, as an HTML page or in the terminal."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import weights_store
from weights_store.commands.output import check_ours, write_output
from weights_store.errors import InputError
from weights_store.printing import one_line

if TYPE_CHECKING:
    from weights_store.inspection.figure import Format
    from weights_store.inspection.view import View
    from weights_store.views.token_texts import Tokenizer

_PAGES, _FIGURES = (".html", ".htm"), (".svg", ".png")


def add_view(
    add: Callable[..., argparse.ArgumentParser],
    load_tokenizer: "Callable[[str], Tokenizer]",
    draw_runs: "Callable[[Sequence[str], Format], bytes]",
) -> None:
    """Register the command, see `add_commands`."""
    what = "show pairs with the weights of their tokens: as an HTML page, in the terminal, or one pair as a figure"
    parser = add("view", run_view, what)
    parser.set_defaults(load_tokenizer=load_tokenizer, draw_runs=draw_runs)
    parser.add_argument("name", metavar="NAME[@VERSION]", help="for example hh-harmless/tis-dpo@3")
    parser.add_argument(
        "other", metavar="OTHER[@VERSION]", nargs="?", help="compare with the weights of this one, for the same pairs"
    )
    parser.add_argument("--pairs", metavar="ID[,ID...]", help="only these pairs; the beginning of an id will do")
    parser.add_argument("--search", metavar="TEXT", help="only pairs with this text in the prompt or a response")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="only pairs that meet a condition in SQL, for example \"split = 'test' AND num_chosen_tokens > 50\"",
    )
    picks = parser.add_mutually_exclusive_group()
    picks.add_argument(
        "--worst",
        type=int,
        metavar="N",
        help="the N pairs where the contrastive pair disagrees most with the label; without one, those whose weights lie on "
        "the fewest tokens; with OTHER, those where the weights differ most",
    )
    picks.add_argument("--random", type=int, metavar="N", help="N random pairs (default: 20; with OTHER the 20 worst)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other random pairs (default: 0)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="model folder for the texts of tokens (default: the recipe's model if it fits)",
    )
    parser.add_argument(
        "--run",
        metavar="FOLDER",
        action="append",
        default=[],
        dest="runs",
        help="output folder of a training: its rewards and margins over steps stand in the page; repeatable",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--ansi", action="store_true", help="print to the terminal instead of writing a page")
    output.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page (default: NAME@VERSION.html here, with - for /); .svg or .png: a figure of one pair",
    )


def run_view(options: argparse.Namespace) -> None:
    """Show pairs, see `WeightStore.view`."""
    from weights_store.location import local_path

    path = local_path(options.output) if options.output else None
    if path is not None:  # before the work that fills it
        _check_ending(path)
        check_ours(path)
    is_figure = path is not None and path.suffix.lower() in _FIGURES
    if is_figure and options.other is not None:
        raise InputError(f"a figure shows the weights of one dataset: leave out {options.other}")
    if options.runs and (options.ansi or is_figure):
        raise InputError("--run puts trainings into a page: leave out --ansi and figures, or use `tokenweights plot`")
    view = _view(options)
    if options.ansi:
        _print(view)
        return
    path = path or default_path(view)
    check_ours(path)
    content = _figure(view, path) if is_figure else _page(view, options)
    print(f"{view.title}: {one_line(view.selection)}")
    write_output(path, content)


def _check_ending(path: Path) -> None:
    if path.suffix.lower() not in (*_PAGES, *_FIGURES):
        raise InputError(
            f"{path}: expected a name that ends in .html for a page, or in .svg or .png for a figure of one pair"
        )


def _figure(view: "View", path: Path) -> bytes:
    from weights_store.inspection.figure import figure_format
    from weights_store.inspection.heat_map import draw_pair

    if len(view.pairs) != 1:
        raise InputError(f"a figure shows one pair, got {len(view.pairs)}; name it with --pairs ID, or take --random 1")
    return draw_pair(view.pairs[0], figure_format(path))


def _page(view: "View", options: argparse.Namespace) -> bytes:
    from weights_store.inspection.page import render

    if options.runs:
        figure = options.draw_runs(options.runs, "svg").decode()
        view = replace(view, plots=[("Trainings: rewards, margins and accuracy over steps", figure)])
    return render(view).encode()


def _view(options: argparse.Namespace) -> "View":
    from weights_store.inspection.model_tokenizer import load_known_tokenizer

    store = weights_store.WeightStore(options.store)
    metadata = store.metadata(*weights_store.split_name(options.name))
    return store.view(
        options.name,
        options.other,
        pairs=[text.strip() for text in options.pairs.split(",")] if options.pairs is not None else (),
        worst=options.worst,
        random=options.random,
        search=options.search,
        where=options.where,
        seed=options.seed,
        tokenizer=load_known_tokenizer(metadata, options.tokenizer, options.load_tokenizer),
    )


def _print(view: "View") -> None:
    from weights_store.inspection.ansi import choose_colours, render

    width = shutil.get_terminal_size().columns
    for line in render(view, width, choose_colours(sys.stdout.isatty(), os.environ)):
        print(line)


def default_path(view: "View") -> Path:
    """Return where a page goes if nothing is said."""
    name = view.title if view.other is None else f"{view.title}-{view.other}"
    return Path(f"{name.replace('/', '-')}.html")
