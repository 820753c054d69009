"""The store's sub-commands: list, compare, export, check and tidy weight datasets. `tokenweights.py` registers them.

Importing this module costs nothing: Polars and pyarrow load when a command runs. What is printed here is for people; programs
use `WeightStore`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights_store.views.diff import SideDiff

_DEFAULT_STORE = "stores/default"
_GAP = "  "

Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
"""Adds one sub-command by name, function and help, and returns its parser."""


def add_commands(add: Add, load_tokenizer: Callable[[str], Any]) -> None:
    """Register the store's commands.

    Args:
        add: Adds one sub-command.
        load_tokenizer: Returns the tokenizer of a model folder; the store itself has no package for that.
    """
    add("ls", _list, "list the weight datasets of a store")
    _named(add("show", _show, "show one weight dataset: statistics, lineage, versions, first rows"))
    history = add("history", _history, "list the versions of a weight dataset, and what changed in each")
    history.add_argument("name", metavar="NAME", help="for example hh-harmless/tis-dpo")
    _named(add("lineage", _lineage, "show everything a weight dataset came from, up to the raw pairs"))
    diff = add("diff", _diff, "compare two weight datasets: settings, pairs, weights token by token, anchors")
    diff.add_argument("a", metavar="A", help="NAME or NAME@VERSION")
    diff.add_argument("b", metavar="B", help="NAME or NAME@VERSION")
    _add_export(add, load_tokenizer)
    verify = add("verify", _verify, "check every file against what was committed; exit code 1 when something is wrong")
    verify.add_argument("tables", nargs="*", metavar="TABLE", help="a weight dataset or a table; default: all tables")
    vacuum = add("vacuum", _vacuum, "list files that no version needs, or delete them with --yes")
    vacuum.add_argument("tables", nargs="*", metavar="TABLE", help="a weight dataset or a table; default: all tables")
    vacuum.add_argument(
        "--retention-hours", type=float, default=168.0, metavar="H", help="spare younger files, in hours (default: 168)"
    )
    vacuum.add_argument("--yes", action="store_true", help="really delete")
    optimize = add("optimize", _optimize, "write a table's rows anew, sorted, in as few shards as they need")
    optimize.add_argument("table", metavar="TABLE", help="a weight dataset, or a table such as logps/x/y")


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Give a command the option that all of the store's commands have."""
    parser.add_argument(
        "--store", metavar="URI", default=_DEFAULT_STORE, help=f"root of the store (default: {_DEFAULT_STORE})"
    )


def _named(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME[@VERSION]", help="for example hh-harmless/tis-dpo@3")


def _add_export(add: Add, load_tokenizer: Callable[[str], Any]) -> None:
    export = add("export", _export, "write a weight dataset as plain files, for programs that do not know this store")
    _named(export)
    export.add_argument("folder", metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--format",
        choices=("parquet", "jsonl"),
        default="parquet",
        help="jsonl: the layout of the TIS-DPO release, to be read with transform.method=origin (default: parquet)",
    )
    export.add_argument(
        "--tokenizer", metavar="FOLDER", help="model folder, for the texts of jsonl; else ids are written"
    )
    export.set_defaults(load_tokenizer=load_tokenizer)


# --- looking -----------------------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    from weights_store import WeightStore

    listing = WeightStore(options.store).list()
    if listing.is_empty():
        print(f"no weight datasets in {options.store} yet")
        return
    _print_table(listing.drop("changes").to_dicts())


def _show(options: argparse.Namespace) -> None:
    from weights_store import WeightStore, split_name

    name, version = split_name(options.name)
    store = WeightStore(options.store)
    reference = store.resolve(name, version)
    metadata = store.metadata(name, reference.version)
    print(f"{reference}  fingerprint {metadata['fingerprint'][:12]}\n")
    for label, value in _facts(metadata["statistics"]):
        print(f"  {label:<36}{value}")
    print("\nmade from")
    for parent in metadata["parents"]:
        print(f"  {parent['role']:<16}{parent['table']}@{parent['version']}  {parent['fingerprint'][:12]}")
    print("\nversions")
    _print_history(store.history(name), _GAP)
    print("\nfirst rows")
    _print_table(_row_summary(store.scan(name, reference.version).head(5)).collect().to_dicts(), _GAP)


def _row_summary(rows: Any) -> Any:
    """Return lengths and mean weights instead of lists, which no terminal can show."""
    import polars as pl

    sides = ("chosen", "rejected")
    return rows.select(
        "pair_id",
        "split",
        pl.col("prompt_ids").list.len().alias("prompt_tokens"),
        *(pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in sides),
        *(pl.col(f"{side}_token_weights").list.mean().alias(f"{side}_mean_weight") for side in sides),
    )


def _facts(statistics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, value in statistics.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict):
            facts += _facts(value, f"{label}.")
        else:
            facts.append((label, f"{value:.4f}" if isinstance(value, float) else str(value)))
    return facts


def _history(options: argparse.Namespace) -> None:
    from weights_store import WeightStore

    _print_history(WeightStore(options.store).history(options.name))


def _print_history(history: Any, indent: str = "") -> None:
    """Print one line per version, and below it one per change from the second on."""
    rows = []
    for version in history.drop("name").to_dicts():
        first, *more = version.pop("changes").split("; ")
        rows.append({**version, "changes": first})
        rows += [{**dict.fromkeys(version, ""), "changes": change} for change in more]
    _print_table(rows, indent)


def _lineage(options: argparse.Namespace) -> None:
    from weights_store import WeightStore, split_name

    rows = []
    for row in WeightStore(options.store).lineage(*split_name(options.name)).to_dicts():
        name = row["name"] or "(unnamed)"
        at = "" if row["version"] is None else f"@{row['version']}"
        label = f"{_GAP * row['depth']}{row['role']}"
        rows.append(
            {"what": label, "name": f"{name}{at}", **{key: row[key] for key in ("fingerprint", "rows", "created")}}
        )
    _print_table(rows)


def _diff(options: argparse.Namespace) -> None:
    from weights_store import WeightStore

    diff = WeightStore(options.store).diff(options.a, options.b)
    print(f"{diff.a} -> {diff.b}\n")
    print("settings")
    for line in diff.settings or ["no difference"]:
        print(f"{_GAP}{line}")
    print("\npairs")
    counts = ("common", "only_in_a", "only_in_b", "not_comparable")
    _print_table([{name: getattr(diff, f"num_{name}") for name in counts}], _GAP)
    print("\nweights")
    sides = {"chosen": diff.chosen, "rejected": diff.rejected, "pair weights": diff.pair_weights}
    _print_table([_side_row(side, changes) for side, changes in sides.items()], _GAP)
    if diff.num_anchors_changed:
        print(f"\nanchors: {_count(diff.num_anchors_changed, 'pair')} with another one or none")
    if not diff.largest.is_empty():
        print("\nlargest changes")
        _print_table(diff.largest.to_dicts(), _GAP)


def _side_row(side: str, diff: "SideDiff") -> dict[str, Any]:
    return {
        "side": side,
        "tokens": diff.num_tokens,
        "changed": diff.num_tokens_changed,
        "mean_abs_change": diff.mean_abs_change,
        "max_abs_change": diff.max_abs_change,
    }


# --- writing -----------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> None:
    from weights_store import WeightStore, split_name

    name, version = split_name(options.name)
    tokenizer = options.load_tokenizer(options.tokenizer) if options.tokenizer else None
    store = WeightStore(options.store)
    files = store.export(name, options.folder, version, options.format, tokenizer)
    for path in files:
        print(f"{_size(path.stat().st_size):>10}  {path}")
    if options.format == "jsonl":
        print("the TIS-DPO release trains on these weights with transform.method=origin")
        if tokenizer is None:
            print("ids stand in the place of text, which the release needs: give --tokenizer")


def _verify(options: argparse.Namespace) -> int:
    from weights_store import WeightStore
    from weights_store.checks.vacuum import find_orphans
    from weights_store.checks.verify import verify
    from weights_store.schemas import KEYS

    store, tables = WeightStore(options.store), _tables(options.tables)
    num_findings = 0
    for finding in verify(store, tables):
        num_findings += 1
        print(finding)
    orphans = list(find_orphans(store, tables))
    if orphans:
        size = _size(sum(orphan.num_bytes for orphan in orphans))
        print(f"{_count(len(orphans), 'file')} that no version needs, {size}; see `tokenweights vacuum`")
        _print_orphans(orphans)
    num_tables = len(tables) if tables is not None else sum(1 for kind in KEYS for _ in store.tables(kind))
    result = _count(num_findings, "finding") if num_findings else "all as it was committed"
    print(f"checked {_count(num_tables, 'table')} in {options.store}: {result}")
    return 1 if num_findings else 0


def _vacuum(options: argparse.Namespace) -> None:
    from weights_store import WeightStore
    from weights_store.checks.vacuum import vacuum

    orphans = vacuum(
        WeightStore(options.store), options.retention_hours, dry_run=not options.yes, tables=_tables(options.tables)
    )
    _print_orphans(orphans)
    total = f"{_count(len(orphans), 'file')}, {_size(sum(orphan.num_bytes for orphan in orphans))}"
    rule = f"that no version needs, older than {options.retention_hours:g} h, in {options.store}"
    if not orphans:
        print(f"nothing to delete: no file {rule}")
    elif options.yes:
        print(f"deleted {total} {rule}")
    else:
        print(f"would delete {total} {rule}; --yes deletes")


def _optimize(options: argparse.Namespace) -> None:
    from weights_store import WeightStore

    table = WeightStore(options.store).table(_table_path(options.table))
    base = table.reference()
    before = table.records(base.version)
    made = table.optimize()
    if made is None:
        print(f"{base}: nothing to do, {_shards(before)}")
        return
    print(f"{base} -> @{made.version} in {options.store}")
    print(f"{_GAP}{_shards(before)} -> {_shards(table.records(made.version))}; older versions stay readable")


def _shards(records: Sequence[Any]) -> str:
    return f"{_count(len(records), 'shard')}, {_size(sum(record.num_bytes for record in records))}"


def _table_path(text: str) -> str:
    """Return the path of a table: the text itself when it begins with a kind of table, else of that weight dataset."""
    from weights_store.schemas import KEYS

    return text if text.partition("/")[0] in KEYS else f"weights/{text}"


def _tables(names: Sequence[str]) -> list[str] | None:
    """Return the paths of the tables meant, None for all."""
    return [_table_path(name) for name in names] or None


# --- printing ----------------------------------------------------------------------------------------------------------


def _print_orphans(orphans: Sequence[Any]) -> None:
    if orphans:
        rows = [
            {"size": _size(o.num_bytes), "age": f"{o.age_hours:.0f} h", "file": f"{o.table}/{o.name}"} for o in orphans
        ]
        _print_table(rows, _GAP)


def _print_table(rows: Sequence[Mapping[str, Any]], indent: str = "") -> None:
    """Print rows under a line of column names, numbers to the right."""
    if not rows:
        print(f"{indent}none")
        return
    names = list(rows[0])
    numeric = {
        name for name in names if all(isinstance(row[name], int | float | None) or row[name] == "" for row in rows)
    }
    lines = [{name: name.replace("_", " ") for name in names}]
    lines += [{name: _cell(row[name]) for name in names} for row in rows]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    for line in lines:
        cells = [f"{line[name]:{'>' if name in numeric else '<'}{widths[name]}}" for name in names]
        print(f"{indent}{_GAP.join(cells)}".rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
