"""The store's commands: list, compare, export, check and tidy weight datasets. `tokenweights.py` registers them.

Results go to standard output: text for people, or one JSON document with `--json`. Programs in Python use `WeightStore`.
Importing this module is fast: Polars and pyarrow load when a command runs, see `weights_store.__getattr__`.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weights_store.commands.doctor import add_doctor
from weights_store.commands.keeping import run_export, run_optimize, run_path, run_repair, run_vacuum, run_verify
from weights_store.commands.listing import run_diff, run_history, run_lineage, run_list, run_quarantine, run_show
from weights_store.commands.view import add_view
from weights_store.settings import DEFAULT_STORE, STORE, default_store

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from weights_store.inspection.figure import Format
    from weights_store.processes.spread import Spread
    from weights_store.views.token_texts import Tokenizer

Run = Callable[[argparse.Namespace], int | None]
Add = Callable[[str, Run, str], argparse.ArgumentParser]
"""Adds one command by name, function and help, and returns its parser."""


def add_commands(
    add: Add,
    load_tokenizer: "Callable[[str], Tokenizer]",
    draw_runs: "Callable[[Sequence[str], Format], bytes]",
    on_ray: "Callable[[str], AbstractContextManager[Spread]]",
) -> None:
    """Register the store's commands.

    `load_tokenizer` returns the tokenizer of a model folder, `draw_runs` a figure of trainings by their output folders, and
    `on_ray` spreads work over the Ray at an address: the store itself has no package for any of them.
    """

    def add_listing(name: str, run: Run, description: str) -> argparse.ArgumentParser:
        parser = add(name, run, description)
        parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        return parser

    add_listing("ls", run_list, "list the weight datasets of a store")
    _add_name(add_listing("show", run_show, "show one weight dataset: statistics, lineage, versions, first rows"))
    history = add_listing("history", run_history, "list the versions of a weight dataset, and what changed in each")
    history.add_argument("name", metavar="NAME", help="for example hh-harmless/tis-dpo")
    _add_name(add_listing("lineage", run_lineage, "show everything that a weight dataset was made from"))
    diff = add_listing("diff", run_diff, "compare two weight datasets: settings, pairs, token weights, anchors")
    diff.add_argument("a", metavar="A", help="NAME or NAME@VERSION")
    diff.add_argument("b", metavar="B", help="NAME or NAME@VERSION")
    _add_name(add_doctor(add_listing))
    add_view(add, load_tokenizer, draw_runs)
    what = "print the Parquet files of one version: the folder of a table also holds files of other versions"
    path = add_listing("path", run_path, what)
    path.add_argument("table", metavar="NAME[@VERSION]", help="a weight dataset, or a table such as logps/x/y@3")
    export = add_listing("export", run_export, "write a weight dataset as plain files, for programs without this store")
    export.set_defaults(load_tokenizer=load_tokenizer)
    _add_name(export)
    export.add_argument("folder", metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--format",
        choices=("parquet", "jsonl", "tinker", "loss_scale"),
        default="parquet",
        help="jsonl: the layout of the TIS-DPO release, for transform.method=origin; tinker: Datums of the tinker API; "
        "loss_scale: rows of ms-swift (default: parquet)",
    )
    export.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="model folder for the texts (default: the recipe's model if it fits); loss_scale needs it",
    )
    export.add_argument(
        "--licence", metavar="ID", help="licence of the source, for tokenweights.json (default: unknown)"
    )
    quarantine = add_listing("quarantine", run_quarantine, "show the rows of a dataset that could not be used, and why")
    quarantine.add_argument("dataset", metavar="DATASET", help="for example hh-harmless")
    quarantine.add_argument("--reason", metavar="R", help="list the rows with this reason, for example no_prompt")
    quarantine.add_argument(
        "--limit", type=int, default=20, metavar="N", help="number of rows to list with --reason (default: 20)"
    )
    _add_keeping(add, add_listing, on_ray)


def _add_keeping(add: Add, add_listing: Add, on_ray: "Callable[[str], AbstractContextManager[Spread]]") -> None:
    """Register the commands that keep a store whole and small."""
    verify = add_listing("verify", run_verify, "check every file against its commit; exit code 1 if something is wrong")
    _add_tables(verify)
    verify.add_argument(
        "--rows", action="store_true", help="also decode every row of the newest versions and check its rules: slower"
    )
    verify.set_defaults(on_ray=on_ray)
    verify.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="read on all cores of a Ray cluster: host:6379 of its head, or local for a Ray on this machine alone",
    )
    vacuum = add_listing("vacuum", run_vacuum, "list files that no version needs, or delete them with --yes")
    _add_tables(vacuum)
    vacuum.add_argument(
        "--retention-hours", type=float, default=168.0, metavar="H", help="keep younger files, in hours (default: 168)"
    )
    vacuum.add_argument("--yes", action="store_true", help="delete the files")
    vacuum.add_argument(
        "--risk-running-builds",
        action="store_true",
        help="allow less than 24 hours: a build that runs may lose what it has not committed yet, and fails",
    )
    repair = add_listing("repair", run_repair, "bring damaged tables back to their newest whole version, with --yes")
    _add_tables(repair)
    repair.add_argument("--yes", action="store_true", help="move the rest to the folder aside/ of the store")
    optimize = add("optimize", run_optimize, "compact a table into fewer, sorted shards")
    optimize.add_argument("table", metavar="TABLE", help="a weight dataset, or a table such as logps/x/y")


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option that all of the store's commands have."""
    parser.add_argument(
        "--store",
        metavar="URI",
        default=default_store(),
        help=f"root of the store (default: {STORE} in the environment, or {DEFAULT_STORE})",
    )


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME[@VERSION]", help="for example hh-harmless/tis-dpo@3")


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="a weight dataset or a table; default: all tables")
