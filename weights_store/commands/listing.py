"""Commands that show what a store holds: ls, show, history, lineage, diff, quarantine."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import weights_store
from weights_store.errors import StoreError
from weights_store.names import weights_path
from weights_store.printing import GAP, count_text, one_line, print_json, print_table, share_text, size_text

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from weights_store.views.diff import SideDiff

_DIGITS = 12
"""Of a fingerprint, for people; JSON has all 64."""
_CREATED = "created (UTC)"


def run_list(options: argparse.Namespace) -> None:
    """List the weight datasets of a store."""
    store = weights_store.WeightStore(options.store)
    rows = store.list().drop("changes").to_dicts()
    rows = [{**row, "num_bytes": _num_bytes(store, row["name"], row["version"])} for row in rows]
    if options.json:
        print_json(rows)
    elif rows:
        print_table([_listed(row) for row in rows], right=["size"])
    else:
        print(f"no weight datasets in {options.store} yet")


def _num_bytes(store: "weights_store.WeightStore", name: str, version: int) -> int | None:
    """Return the size of a version's files; None if its log is damaged, which `verify` explains."""
    try:
        return sum(record.num_bytes for record in store.table(weights_path(name)).records(version))
    except StoreError:
        return None


def _listed(row: Mapping[str, Any]) -> dict[str, object]:
    """Return one line of `ls`; it fits into 80 columns, unless the name is long."""
    return {
        "name": f"{row['name']}@{row['version']}",
        "estimator": f"{row['estimator']} ({row['contrast']})" if row["contrast"] else row["estimator"] or "-",
        "pairs": row["num_pairs"],
        "tokens": row["num_response_tokens"],
        "size": "-" if row["num_bytes"] is None else size_text(row["num_bytes"]),
        _CREATED: row["created"],
    }


def run_show(options: argparse.Namespace) -> None:
    """Show one weight dataset."""
    from weights_store.tables.metadata import Statistics
    from weights_store.views.lineage import origin_text
    from weights_store.views.summary import summary_lines

    name, version = weights_store.split_name(options.name)
    store = weights_store.WeightStore(options.store)
    reference = store.resolve(name, version)
    metadata = store.metadata(name, reference.version)
    table = store.table(reference.table)
    # What no recipe has made may lack any of these.
    statistics = Statistics(num_pairs=table.num_rows(reference.version)) | metadata.get("statistics", {})
    settings, parents = metadata.get("identity", {}).get("settings", {}), metadata.get("parents", [])
    versions = _versions(store.history(name))
    records = table.records(reference.version)
    first = next(table.batches(reference.version), None)
    rows = [] if first is None else _row_summary(first)
    if options.json:
        document = {"name": name, "version": reference.version, "fingerprint": reference.fingerprint}
        document |= {"statistics": statistics, "parents": parents, "versions": versions, "rows": rows}
        document |= {"origin": metadata["origin"]} if "origin" in metadata else {}
        print_json({**document, "files": store.files(name, reference.version)})
        return
    print(f"{reference}  fingerprint {reference.fingerprint[:_DIGITS]}\n")
    lines = summary_lines(statistics, settings.get("weights", {}), metadata.get("parity"))
    amount = f"{count_text(len(records), 'file')}, {size_text(sum(record.num_bytes for record in records))}"
    lines.append(("files", f"{amount}: `tokenweights path {name}@{reference.version}` prints which"))
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{GAP}{label:<{width}}{GAP}{one_line(value)}")
    print("\nmade from")
    if "origin" in metadata:
        print(f"{GAP}{origin_text(metadata['origin'])}, where it was {one_line(metadata['origin']['name'])}")
    if not parents and "origin" not in metadata:
        print(f"{GAP}nothing that was recorded")
    for parent in parents:
        print(
            f"{GAP}{parent.get('role', ''):<16}{parent['table']}@{parent['version']}{GAP}{parent['fingerprint'][:_DIGITS]}"
        )
    print("\nversions")
    _print_versions(versions, GAP)
    print("\nfirst rows: tokens and mean weights")
    print_table([_shown(row) for row in rows], GAP)


def _row_summary(rows: "pa.Table", num_rows: int = 5) -> list[dict[str, Any]]:
    """Return the first rows with lengths and mean weights instead of lists, which no terminal can show."""
    import polars as pl

    from weights_store.schemas import SIDES

    summary = pl.DataFrame(pl.from_arrow(rows.slice(0, num_rows))).select(
        "pair_id",
        "split",
        pl.col("prompt_ids").list.len().alias("num_prompt_tokens"),
        *(pl.col(f"{side}_ids").list.len().alias(f"num_{side}_tokens") for side in SIDES),
        *(pl.col(f"{side}_token_weights").list.mean().alias(f"{side}_mean_weight") for side in SIDES),
    )
    return summary.to_dicts()


def _shown(row: Mapping[str, Any]) -> dict[str, object]:
    """Return a line for one of the first rows; the id stands last, because it is the longest."""
    counts = {f"{name} tokens": row[f"num_{name}_tokens"] for name in ("prompt", "chosen", "rejected")}
    means = {f"{side} weight": row[f"{side}_mean_weight"] for side in ("chosen", "rejected")}
    return {"split": row["split"], **counts, **means, "pair": row["pair_id"]}


def run_history(options: argparse.Namespace) -> None:
    """List the versions of a weight dataset."""
    versions = _versions(weights_store.WeightStore(options.store).history(options.name))
    if options.json:
        print_json(versions)
    else:
        _print_versions(versions)


def _versions(history: "pl.DataFrame") -> list[dict[str, Any]]:
    rows = history.drop("name").to_dicts()
    return [{**row, "changes": [change for change in row["changes"].split("; ") if change]} for row in rows]


def _print_versions(versions: Sequence[Mapping[str, Any]], indent: str = "") -> None:
    """Print one line per version, and below it one line for every change after the first."""
    rows: list[dict[str, object]] = []
    for version in versions:
        first, *more = version["changes"] or [""]
        line = {
            "version": version["version"],
            _CREATED: version["created"],
            "pairs": version["num_pairs"],
            "response tokens": version["num_response_tokens"],
            "fingerprint": version["fingerprint"][:_DIGITS],
            "changes": first,
        }
        rows.append(line)
        rows += [{**dict.fromkeys(line, ""), "changes": change} for change in more]
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
        line = {
            "what": f"{GAP * row['depth']}{row['role']}",
            "rows": row["num_rows"],
            _CREATED: row["created"],
            "fingerprint": row["fingerprint"] and row["fingerprint"][:_DIGITS],
            "name": f"{row['name'] or '(unnamed)'}{at}",
        }
        lines.append(line)
    print_table(lines)


def run_diff(options: argparse.Namespace) -> None:
    """Compare two weight datasets."""
    diff = weights_store.WeightStore(options.store).diff(options.a, options.b)
    if options.json:
        print_json(diff)
        return
    print(f"A  {diff.a}\nB  {diff.b}\n\nsettings, A -> B")
    for line in diff.settings or ["no difference"]:
        print(f"{GAP}{one_line(line)}")
    print("\npairs")
    print(f"{GAP}{diff.num_common:,} in both, {diff.num_only_in_a:,} only in A, {diff.num_only_in_b:,} only in B")
    if diff.num_not_comparable:
        print(f"{GAP}{diff.num_not_comparable:,} of those in both have other response tokens, and are not compared")
    print("\nweights, token by token")
    sides = {"chosen": diff.chosen, "rejected": diff.rejected, "pair weights": diff.pair_weights}
    print_table([{"side": side, **_change_of(made)} for side, made in sides.items()], GAP, right=["differ"])
    if diff.num_anchors_changed:
        print(f"\nanchors: {count_text(diff.num_anchors_changed, 'pair')} with another one or none")
    if not diff.largest.is_empty():
        print("\nlargest disagreements")
        rows = [{"side": row["side"], **_means(row), "pair": row["pair_id"]} for row in diff.largest.to_dicts()]
        print_table(rows, GAP)


def _change_of(side: "SideDiff") -> dict[str, object]:
    differ = share_text(side.num_tokens_changed / side.num_tokens) if side.num_tokens else "-"
    return {"tokens": side.num_tokens, "differ": differ, **_means(vars(side)), "correlation": side.correlation}


def _means(change: Mapping[str, Any]) -> dict[str, object]:
    return {
        "mean in A": change["mean_a"],
        "mean in B": change["mean_b"],
        "mean |B − A|": change["mean_abs_change"],
        "max |B − A|": change["max_abs_change"],
    }


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
