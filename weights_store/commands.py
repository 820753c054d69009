"""The store's commands: list, compare, export, check and tidy weight datasets. `tokenweights.py` registers them.

Results go to standard output: text for people, or one JSON document with `--json`. Programs in Python use `WeightStore`.
Importing this module is fast: Polars and pyarrow load when a command runs, see `weights_store.__getattr__`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import weights_store
from weights_store.inspection.doctor_command import add_doctor
from weights_store.printing import (
    GAP,
    amount_text,
    count_text,
    one_line,
    print_json,
    print_orphans,
    print_repair,
    print_table,
    size_text,
)

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from weights_store.checks.findings import Finding
    from weights_store.views.token_texts import Tokenizer

_DEFAULT_STORE = "stores/default"

Run = Callable[[argparse.Namespace], int | None]
Add = Callable[[str, Run, str], argparse.ArgumentParser]
"""Adds one command by name, function and help, and returns its parser."""


def add_commands(add: Add, load_tokenizer: "Callable[[str], Tokenizer]") -> None:
    """Register the store's commands.

    `load_tokenizer` returns the tokenizer of a model folder; the store itself has no package for that.
    """

    def add_listing(name: str, run: Run, description: str) -> argparse.ArgumentParser:
        parser = add(name, run, description)
        parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        return parser

    add_listing("ls", _list, "list the weight datasets of a store")
    _add_name(add_listing("show", _show, "show one weight dataset: statistics, lineage, versions, first rows"))
    history = add_listing("history", _history, "list the versions of a weight dataset, and what changed in each")
    history.add_argument("name", metavar="NAME", help="for example hh-harmless/tis-dpo")
    _add_name(add_listing("lineage", _lineage, "show everything that a weight dataset was made from"))
    diff = add_listing("diff", _diff, "compare two weight datasets: settings, pairs, weights token by token, anchors")
    diff.add_argument("a", metavar="A", help="NAME or NAME@VERSION")
    diff.add_argument("b", metavar="B", help="NAME or NAME@VERSION")
    _add_name(add_doctor(add_listing))
    export = add_listing("export", _export, "write a weight dataset as plain files, for programs without this store")
    export.set_defaults(load_tokenizer=load_tokenizer)
    _add_name(export)
    export.add_argument("folder", metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--format",
        choices=("parquet", "jsonl"),
        default="parquet",
        help="jsonl: the layout of the TIS-DPO release, for transform.method=origin (default: parquet)",
    )
    export.add_argument(
        "--tokenizer", metavar="FOLDER", help="model folder, for the texts of jsonl; without it ids are written"
    )
    quarantine = add_listing("quarantine", _quarantine, "show the rows of a dataset that could not be used, and why")
    quarantine.add_argument("dataset", metavar="DATASET", help="for example hh-harmless")
    quarantine.add_argument("--reason", metavar="R", help="list the rows with this reason, for example no_prompt")
    quarantine.add_argument(
        "--limit", type=int, default=20, metavar="N", help="number of rows to list with --reason (default: 20)"
    )
    verify = add_listing("verify", _verify, "check every file against its commit; exit code 1 if something is wrong")
    _add_tables(verify)
    verify.add_argument(
        "--rows", action="store_true", help="also decode every row of the newest versions and check its rules: slower"
    )
    vacuum = add_listing("vacuum", _vacuum, "list files that no version needs, or delete them with --yes")
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
    repair = add_listing("repair", _repair, "bring damaged tables back to their newest whole version, with --yes")
    _add_tables(repair)
    repair.add_argument("--yes", action="store_true", help="move the rest to the folder aside/ of the store")
    optimize = add("optimize", _optimize, "compact a table into fewer, sorted shards")
    optimize.add_argument("table", metavar="TABLE", help="a weight dataset, or a table such as logps/x/y")


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option that all of the store's commands have."""
    parser.add_argument(
        "--store", metavar="URI", default=_DEFAULT_STORE, help=f"root of the store (default: {_DEFAULT_STORE})"
    )


def _store(options: argparse.Namespace) -> "weights_store.WeightStore":
    return weights_store.WeightStore(options.store)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME[@VERSION]", help="for example hh-harmless/tis-dpo@3")


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="a weight dataset or a table; default: all tables")


# --- looking -----------------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    rows = _store(options).list().drop("changes").to_dicts()
    if options.json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        print(f"no weight datasets in {options.store} yet")


def _show(options: argparse.Namespace) -> None:
    from weights_store.views.held_out import held_out_lines

    name, version = weights_store.split_name(options.name)
    store = _store(options)
    reference = store.resolve(name, version)
    metadata = store.metadata(name, reference.version)
    statistics, parents = metadata["statistics"], metadata["parents"]
    versions = _versions(store.history(name))
    first = next(store.table(reference.table).batches(reference.version), None)
    rows = [] if first is None else _row_summary(first)
    if options.json:
        document = {"name": name, "version": reference.version, "fingerprint": reference.fingerprint}
        print_json({**document, "statistics": statistics, "parents": parents, "versions": versions, "rows": rows})
        return
    print(f"{reference}  fingerprint {reference.fingerprint[:12]}\n")
    facts = _facts({key: value for key, value in statistics.items() if key != "held_out"})
    for label, value in facts:
        print(f"  {label:<36}{value}")
    held_out = held_out_lines(statistics)
    if held_out:
        print()
    for label, line in held_out:
        print(f"{label}: {line}")
    print("\nmade from")
    for parent in parents:
        print(f"  {parent['role']:<16}{parent['table']}@{parent['version']}  {parent['fingerprint'][:12]}")
    print("\nversions")
    _print_versions(versions, GAP)
    print("\nfirst rows")
    print_table(rows, GAP)


def _row_summary(rows: "pa.Table", num_rows: int = 5) -> list[dict[str, object]]:
    """Return the first rows with lengths and mean weights instead of lists, which no terminal can show."""
    import polars as pl

    from weights_store.schemas import SIDES

    summary = pl.DataFrame(pl.from_arrow(rows.slice(0, num_rows))).select(
        "pair_id",
        "split",
        pl.col("prompt_ids").list.len().alias("prompt_tokens"),
        *(pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in SIDES),
        *(pl.col(f"{side}_token_weights").list.mean().alias(f"{side}_mean_weight") for side in SIDES),
    )
    return summary.to_dicts()


def _facts(statistics: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, value in statistics.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict):
            facts += _facts(value, f"{label}.")
        else:
            facts.append((label, f"{value:.4f}" if isinstance(value, float) else str(value)))
    return facts


def _history(options: argparse.Namespace) -> None:
    versions = _versions(_store(options).history(options.name))
    if options.json:
        print_json(versions)
    else:
        _print_versions(versions)


def _versions(history: "pl.DataFrame") -> list[dict[str, object]]:
    rows = history.drop("name").to_dicts()
    return [{**row, "changes": [change for change in row["changes"].split("; ") if change]} for row in rows]


def _print_versions(versions: Sequence[Mapping[str, object]], indent: str = "") -> None:
    """Print one line per version, and below it one line for every change after the first."""
    rows: list[dict[str, object]] = []
    for version in versions:
        changes = version["changes"]
        first, *more = changes if isinstance(changes, list) and changes else [""]
        rows.append({**version, "changes": first})
        rows += [{**dict.fromkeys(version, ""), "changes": change} for change in more]
    print_table(rows, indent)


def _lineage(options: argparse.Namespace) -> None:
    rows = _store(options).lineage(*weights_store.split_name(options.name)).to_dicts()
    if options.json:
        print_json(rows)
        return
    lines = []
    for row in rows:
        at = "" if row["version"] is None else f"@{row['version']}"
        line = {"what": f"{GAP * row['depth']}{row['role']}", "name": f"{row['name'] or '(unnamed)'}{at}"}
        lines.append(line | {key: row[key] for key in ("fingerprint", "rows", "created")})
    print_table(lines)


def _diff(options: argparse.Namespace) -> None:
    diff = _store(options).diff(options.a, options.b)
    if options.json:
        print_json(diff)
        return
    print(f"{diff.a} -> {diff.b}\n")
    print("settings")
    for line in diff.settings or ["no difference"]:
        print(f"{GAP}{line}")
    print("\npairs")
    counts = ("common", "only_in_a", "only_in_b", "not_comparable")
    print_table([{name: getattr(diff, f"num_{name}") for name in counts}], GAP)
    print("\nweights")
    sides = {"chosen": diff.chosen, "rejected": diff.rejected, "pair weights": diff.pair_weights}
    names = ("tokens", "changed", "mean_abs_change", "max_abs_change")
    rows = [{"side": side} | dict(zip(names, vars(made).values(), strict=True)) for side, made in sides.items()]
    print_table(rows, GAP)
    if diff.num_anchors_changed:
        print(f"\nanchors: {count_text(diff.num_anchors_changed, 'pair')} with another one or none")
    if not diff.largest.is_empty():
        print("\nlargest changes")
        print_table(diff.largest.to_dicts(), GAP)


def _quarantine(options: argparse.Namespace) -> None:
    from weights_store.views.quarantine import reasons_of, rows_of

    rows = _store(options).quarantine(options.dataset)
    if options.reason is None:
        shown = reasons_of(rows)
        num_rows = len(shown)
    else:
        shown, num_rows = rows_of(rows, options.reason, options.limit)
    found = shown.to_dicts()
    if options.json:
        print_json(found)
        return
    if not found:
        what = "no row" if options.reason is None else f"no row with reason {options.reason}"
        print(f"{what} of {options.dataset} is in quarantine in {options.store}")
    table = None
    for row in found:
        if row["table"] != table:
            table = row["table"]
            print(table)
        counted = f"{count_text(row['num_rows'], 'row')} {row['reason']}, for example " if "num_rows" in row else ""
        print(f"{GAP}{counted}row {row['source_row']}: {one_line(row['detail'])}")
        print(f"{GAP}{GAP}{one_line(row['raw'], 120)}")
    if len(found) < num_rows:
        print(f"the first {len(found)} of {count_text(num_rows, 'row')}; --limit lists more")


# --- writing and checking ----------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> None:
    name, version = weights_store.split_name(options.name)
    tokenizer = options.load_tokenizer(options.tokenizer) if options.tokenizer else None
    paths = _store(options).export(name, options.folder, version, options.format, tokenizer)
    if options.json:
        print_json([{"path": str(path), "num_bytes": path.stat().st_size} for path in paths])
        return
    for path in paths:
        print(f"{size_text(path.stat().st_size):>10}  {path}")
    if options.format == "jsonl":
        print("the TIS-DPO release trains on these weights with transform.method=origin")
        if tokenizer is None:
            print("the files hold ids instead of texts, which the release needs: give --tokenizer")


def _verify(options: argparse.Namespace) -> int:
    from weights_store.catalog import list_tables
    from weights_store.checks.vacuum import find_orphans
    from weights_store.checks.verify import verify

    store, tables = _store(options), _table_paths(options.tables)
    findings: list[Finding] = []
    notes: list[Finding] = []
    for finding in verify(store, tables, options.rows):
        (notes if finding.is_note else findings).append(finding)
        if not options.json:
            print(finding, flush=True)
    orphans = list(find_orphans(store, tables))
    num_tables = len(tables) if tables is not None else sum(1 for _ in list_tables(store.root))
    if options.json:
        document = {"store": options.store, "num_tables": num_tables, "findings": findings, "notes": notes}
        print_json({**document, "orphans": orphans})
        return 1 if findings else 0
    if orphans:
        size = size_text(sum(orphan.num_bytes for orphan in orphans))
        print(f"{count_text(len(orphans), 'file')} that no version needs, {size}; see `tokenweights vacuum`")
        print_orphans(orphans)
    result = count_text(len(findings), "finding") if findings else "all as it was committed"
    if not (findings or options.rows):
        result += "; --rows also checks the rules that rows must keep"
    print(f"checked {count_text(num_tables, 'table')} in {options.store}: {result}")
    return 1 if findings else 0


def _vacuum(options: argparse.Namespace) -> None:
    from weights_store.checks.vacuum import vacuum

    store, tables = _store(options), _table_paths(options.tables)
    orphans = vacuum(store, options.retention_hours, not options.yes, tables, options.risk_running_builds)
    if options.json:
        document = {"store": options.store, "retention_hours": options.retention_hours, "deleted": options.yes}
        print_json({**document, "files": orphans})
        return
    print_orphans(orphans)
    rule = f"that no version needs, older than {options.retention_hours:g} h, in {options.store}"
    if not orphans:
        print(f"nothing to delete: no file {rule}")
    elif options.yes:
        print(f"deleted {amount_text(orphans, 'file')} {rule}")
    else:
        print(f"would delete {amount_text(orphans, 'file')} {rule}; --yes deletes")


def _repair(options: argparse.Namespace) -> None:
    from weights_store.checks.repair import apply_repair, find_repairs

    store = _store(options)
    repairs = list(find_repairs(store, _table_paths(options.tables)))
    needed = [repair for repair in repairs if repair.files]
    moved = {repair.table: apply_repair(store, repair) for repair in needed} if options.yes else {}
    if options.json:
        print_json([{**vars(repair), "aside": moved.get(repair.table)} for repair in repairs])
        return
    for repair in repairs:
        print_repair(repair, moved.get(repair.table))
    if not needed:
        print(f"nothing to repair in {options.store}: every table's newest version is whole")
    elif not options.yes:
        print("nothing was changed: --yes does it. Restore damaged files from a copy instead, if there is one")


def _optimize(options: argparse.Namespace) -> None:
    from weights_store.tables.compaction import optimize

    table = _store(options).table(_table_path(options.table))
    base = table.reference()
    before = table.records(base.version)
    made = optimize(table)
    if made is None:
        print(f"{base}: nothing to do, {amount_text(before, 'shard')}")
        return
    print(f"{base} -> @{made.version} in {options.store}")
    after = table.records(made.version)
    print(f"{GAP}{amount_text(before, 'shard')} -> {amount_text(after, 'shard')}; older versions stay readable")


def _table_path(text: str) -> str:
    """Return the path of a table: the text itself if it begins with a kind of table, else that of a weight dataset."""
    from weights_store.names import weights_path
    from weights_store.schemas import KEYS

    return text if text.partition("/")[0] in KEYS else weights_path(text)


def _table_paths(names: Sequence[str]) -> list[str] | None:
    return [_table_path(name) for name in names] or None
