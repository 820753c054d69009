"""Commands that show what a store holds: ls, show, history, lineage, diff, quarantine."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import weights_store
from weights_store.printing import GAP, count_text, one_line, print_json, print_table

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


def run_list(options: argparse.Namespace) -> None:
    """List the weight datasets of a store."""
    rows = weights_store.WeightStore(options.store).list().drop("changes").to_dicts()
    if options.json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        print(f"no weight datasets in {options.store} yet")


def run_show(options: argparse.Namespace) -> None:
    """Show one weight dataset."""
    from weights_store.views.held_out import held_out_lines

    name, version = weights_store.split_name(options.name)
    store = weights_store.WeightStore(options.store)
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


def run_history(options: argparse.Namespace) -> None:
    """List the versions of a weight dataset."""
    versions = _versions(weights_store.WeightStore(options.store).history(options.name))
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


def run_lineage(options: argparse.Namespace) -> None:
    """Show what a weight dataset was made from."""
    rows = weights_store.WeightStore(options.store).lineage(*weights_store.split_name(options.name)).to_dicts()
    if options.json:
        print_json(rows)
        return
    lines = []
    for row in rows:
        at = "" if row["version"] is None else f"@{row['version']}"
        line = {"what": f"{GAP * row['depth']}{row['role']}", "name": f"{row['name'] or '(unnamed)'}{at}"}
        lines.append(line | {key: row[key] for key in ("fingerprint", "rows", "created")})
    print_table(lines)


def run_diff(options: argparse.Namespace) -> None:
    """Compare two weight datasets."""
    diff = weights_store.WeightStore(options.store).diff(options.a, options.b)
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


def run_quarantine(options: argparse.Namespace) -> None:
    """Show the rows that could not be used, or count them by reason."""
    from weights_store.views.quarantine import reasons_of, rows_of

    rows = weights_store.WeightStore(options.store).quarantine(options.dataset)
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
