"""Commands that name, write or check files: path, export, verify, vacuum, repair, optimize."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING

import weights_store
from weights_store.printing import GAP, count_text, print_json, print_table, size_text
from weights_store.processes.spread import in_turn

if TYPE_CHECKING:
    from weights_store.checks.findings import Finding
    from weights_store.checks.repair import Repair
    from weights_store.checks.vacuum import Orphan
    from weights_store.tables.shards import ShardRecord


def run_path(options: argparse.Namespace) -> None:
    """Print the files of one version of a table, for programs that read Parquet and no Delta."""
    from weights_store.catalog import check_store

    name, version = weights_store.split_name(options.table)
    store = weights_store.WeightStore(options.store)
    check_store(store.root)
    table = store.table(_table_path(name))
    reference = table.reference(version)
    records = table.records(reference.version)
    files = [(table.location / record.name).absolute_uri for record in records]
    if not options.json:
        print("".join(f"{file}\n" for file in files), end="")
        return
    rows = [
        {"file": file, "num_rows": record.num_rows, "num_bytes": record.num_bytes}
        for file, record in zip(files, records, strict=True)
    ]
    document = {"table": reference.table, "version": reference.version, "fingerprint": reference.fingerprint}
    print_json({**document, "files": rows})


def run_export(options: argparse.Namespace) -> None:
    """Write a weight dataset as plain files."""
    from weights_store.inspection.model_tokenizer import load_known_tokenizer

    name, version = weights_store.split_name(options.name)
    store = weights_store.WeightStore(options.store)
    metadata, tokenizer = store.metadata(name, version), None
    if options.format != "tinker" or options.tokenizer is not None:
        tokenizer = load_known_tokenizer(metadata, options.tokenizer, options.load_tokenizer)
    paths = store.export(name, options.folder, version, options.format, tokenizer, options.licence)
    if options.json:
        print_json([{"path": str(path), "num_bytes": path.stat().st_size} for path in paths])
        return
    for path in paths:
        print(f"{size_text(path.stat().st_size):>10}  {path}")
    if options.format == "jsonl":
        print("the TIS-DPO release trains on these weights with transform.method=origin")
        if tokenizer is None:
            print("the files hold ids instead of texts, which the release needs: give --tokenizer")


def run_verify(options: argparse.Namespace) -> int:
    """Check every file against its commit; return 1 if something is wrong."""
    from weights_store.catalog import list_tables
    from weights_store.checks.vacuum import find_orphans
    from weights_store.checks.verify import verify

    store, tables = weights_store.WeightStore(options.store), _table_paths(options.tables)
    findings: list[Finding] = []
    notes: list[Finding] = []
    with nullcontext(in_turn) if options.ray is None else options.on_ray(options.ray) as spread:
        for finding in verify(store, tables, options.rows, spread):
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
        _print_orphans(orphans)
    result = count_text(len(findings), "finding") if findings else "all as it was committed"
    if not (findings or options.rows):
        result += "; --rows also checks the rules that rows must keep"
    print(f"checked {count_text(num_tables, 'table')} in {options.store}: {result}")
    return 1 if findings else 0


def run_vacuum(options: argparse.Namespace) -> None:
    """List or delete files that no version needs."""
    from weights_store.checks.vacuum import vacuum

    store, tables = weights_store.WeightStore(options.store), _table_paths(options.tables)
    orphans = vacuum(store, options.retention_hours, not options.yes, tables, options.risk_running_builds)
    if options.json:
        document = {"store": options.store, "retention_hours": options.retention_hours, "deleted": options.yes}
        print_json({**document, "files": orphans})
        return
    _print_orphans(orphans)
    rule = f"that no version needs, older than {options.retention_hours:g} h, in {options.store}"
    if not orphans:
        print(f"nothing to delete: no file {rule}")
    elif options.yes:
        print(f"deleted {_amount_text(orphans, 'file')} {rule}")
    else:
        print(f"would delete {_amount_text(orphans, 'file')} {rule}; --yes deletes")


def run_repair(options: argparse.Namespace) -> None:
    """Show or do what brings damaged tables back to a whole version."""
    from weights_store.checks.repair import apply_repair, find_repairs

    store = weights_store.WeightStore(options.store)
    repairs = list(find_repairs(store, _table_paths(options.tables)))
    needed = [repair for repair in repairs if repair.files]
    moved = {repair.table: apply_repair(store, repair) for repair in needed} if options.yes else {}
    if options.json:
        print_json([{**vars(repair), "aside": moved.get(repair.table)} for repair in repairs])
        return
    for repair in repairs:
        _print_repair(repair, moved.get(repair.table))
    if not needed:
        print(f"nothing to repair in {options.store}: every table's newest version is whole")
    elif not options.yes:
        print("nothing was changed: --yes does it. Restore damaged files from a copy instead, if there is one")


def run_optimize(options: argparse.Namespace) -> None:
    """Compact one table."""
    from weights_store.tables.compaction import optimize

    table = weights_store.WeightStore(options.store).table(_table_path(options.table))
    base = table.reference()
    before = table.records(base.version)
    made = optimize(table)
    if made is None:
        print(f"{base}: nothing to do, {_amount_text(before, 'shard')}")
        return
    print(f"{base} -> @{made.version} in {options.store}")
    after = table.records(made.version)
    print(f"{GAP}{_amount_text(before, 'shard')} -> {_amount_text(after, 'shard')}; older versions stay readable")


def _table_path(text: str) -> str:
    """Return the path of a table: the text itself if it begins with a kind of table, else that of a weight dataset."""
    from weights_store.names import weights_path
    from weights_store.schemas import KEYS

    return text if text.partition("/")[0] in KEYS else weights_path(text)


def _table_paths(names: Sequence[str]) -> list[str] | None:
    return [_table_path(name) for name in names] or None


def _print_orphans(orphans: "Sequence[Orphan]") -> None:
    """Print one line per file that no version needs; nothing if there are none."""
    if orphans:
        rows = [
            {"size": size_text(o.num_bytes), "age": f"{o.age_hours:.0f} h", "file": f"{o.table}/{o.name}"}
            for o in orphans
        ]
        print_table(rows, GAP)


def _print_repair(repair: "Repair", aside: str | None) -> None:
    """Print what is lost and kept of one table, and where the rest went; None if it is still in its place."""
    if repair.kept is None:
        print(f"{repair.table}: none of its {count_text(repair.newest + 1, 'version')} is whole; build it again")
    elif repair.dropped:
        print(f"{repair.table}: back from version {repair.newest} to {repair.kept}, its newest whole one")
    elif repair.files:
        print(f"{repair.table}: all versions stay; checkpoints that are no true summary of its log go")
    else:
        print(f"{repair.table}: version {repair.newest} is whole and can be built on; some older ones are damaged")
    for problem, group in groupby(sorted(repair.dropped.items()), key=lambda item: item[1]):
        versions = [version for version, _ in group]
        one = len(versions) == 1
        span = f"version {versions[0]} is" if one else f"versions {versions[0]}..{versions[-1]} are"
        print(f"{GAP}{span} dropped: {problem}")
    for version, problem in sorted(repair.unreadable.items()):
        print(f"{GAP}version {version} stays damaged: {problem}")
    if repair.dropped:
        before = "an unknown number of" if repair.num_rows is None else f"{repair.num_rows:,}"
        print(f"{GAP}{repair.num_rows_kept:,} rows are kept of {before} in version {repair.newest}")
    if not repair.files:
        return
    files = count_text(len(repair.files), "file")
    print(f"{GAP}moved {files} to {aside}" if aside else f"{GAP}would move {files} to the folder aside/ of the store")


def _amount_text(files: "Sequence[ShardRecord | Orphan]", noun: str) -> str:
    """Return for example `2 files, 3.5 KiB`."""
    return f"{count_text(len(files), noun)}, {size_text(sum(file.num_bytes for file in files))}"
