"""The command `view`: pairs of a weight dataset with the weights of their tokens, as an HTML page or in the terminal."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import weights_store
from weights_store.errors import InputError
from weights_store.messages import logger
from weights_store.printing import one_line, size_text

if TYPE_CHECKING:
    from weights_store.inspection.view import View
    from weights_store.views.token_texts import Tokenizer

_log = logger(__name__)

MARK = '<meta name="generator" content="tokenweights">'
"""In the head of every page: a file without it is not ours, and is never overwritten."""
_HEAD_BYTES = 4096


def add_view(add: Callable[..., argparse.ArgumentParser], load_tokenizer: "Callable[[str], Tokenizer]") -> None:
    """Register the command, see `add_commands`."""
    parser = add("view", run_view, "show pairs with the weights of their tokens, as an HTML page or in the terminal")
    parser.set_defaults(load_tokenizer=load_tokenizer)
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
    picks.add_argument("--random", type=int, metavar="N", help="N random pairs (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other random pairs (default: 0)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="model folder for the texts of tokens (default: the recipe's model if it fits)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--ansi", action="store_true", help="print to the terminal instead of writing a page")
    output.add_argument(
        "-o", "--output", metavar="FILE", help="the page (default: NAME@VERSION.html here, with - for /)"
    )


def run_view(options: argparse.Namespace) -> None:
    """Show pairs, see `WeightStore.view`."""
    view = _view(options)
    if options.ansi:
        _print(view)
        return
    from weights_store.inspection.page import render

    path = Path(options.output) if options.output else default_path(view)
    check_ours(path)  # before the page is made
    write_page(path, render(view))
    print(f"{view.title}: {one_line(view.selection)}")
    print(f"{size_text(path.stat().st_size):>10}  {path}")


def _view(options: argparse.Namespace) -> "View":
    from weights_store.inspection.model_tokenizer import tokenizer_folder

    store = weights_store.WeightStore(options.store)
    folder, note = tokenizer_folder(store.metadata(*weights_store.split_name(options.name)), options.tokenizer)
    if note is not None:
        _log.info(note)
    return store.view(
        options.name,
        options.other,
        pairs=[text.strip() for text in options.pairs.split(",")] if options.pairs is not None else (),
        worst=options.worst,
        random=options.random,
        search=options.search,
        where=options.where,
        seed=options.seed,
        tokenizer=None if folder is None else options.load_tokenizer(folder),
    )


def _print(view: "View") -> None:
    from weights_store.inspection.ansi import choose_colours, render

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    width = shutil.get_terminal_size().columns
    for line in render(view, width, choose_colours(sys.stdout.isatty(), os.environ)):
        print(line)


def default_path(view: "View") -> Path:
    """Return where a page goes if nothing is said."""
    name = view.title if view.other is None else f"{view.title}-{view.other}"
    return Path(f"{name.replace('/', '-')}.html")


def check_ours(path: Path) -> None:
    """Check that a page may be written.

    Raises:
        InputError: The name is not one of a page, or there is something else in its place.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path} is no name of a page: expected one that ends in .html")
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} exists and is no file; give -o another name")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(_HEAD_BYTES):
            raise InputError(
                f"{path} exists and was not written by `tokenweights view`; give -o another name, or move it away"
            )


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all, over an older one."""
    assert MARK in page[:_HEAD_BYTES], "a page says in its head that it is ours"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
