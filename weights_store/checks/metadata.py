"""Compares what commits recorded with what is there: parents, fingerprints, and where every source row went.

A check is skipped if a commit does not record what it needs: other programs than `pipeline` can fill tables too.
"""

from collections.abc import Callable, Iterator
from typing import TypeGuard

import polars as pl

from weights_store.checks.files import SoundTable
from weights_store.checks.findings import Finding
from weights_store.checks.log import TableLog
from weights_store.fingerprint import fingerprint
from weights_store.schemas import OF_LATER_STAGES
from weights_store.tables.metadata import CommitMetadata, Parent, Statistics

_DIGITS = 12  # of a fingerprint, in messages


def parents(metadata: CommitMetadata | None) -> list[Parent]:
    """Return the well-formed parents that a commit recorded."""
    return [parent for parent in _listed(metadata) if _is_reference(parent)]


def check_lineage(log: TableLog, find_log: Callable[[str], TableLog | None]) -> Iterator[Finding]:
    """Yield a finding for each parent of any version that is missing or has changed, each once.

    `find_log` returns the log of a table by its path, None if the store has no such table.
    """
    seen: list[object] = []
    for version in sorted(log.commits, reverse=True):
        for parent in _listed(log.metadata(version)):
            if parent in seen:
                continue
            seen.append(parent)
            if not _is_reference(parent):
                yield Finding(log.table.path, f"its parent {parent!r} is malformed", version)
            elif problem := parent_problem(parent, find_log):
                yield Finding(log.table.path, problem, version)


def check_fingerprints(log: TableLog) -> Iterator[Finding]:
    """Yield the versions whose fingerprint is not that of the identity they recorded."""
    for version in sorted(log.commits):
        metadata = log.metadata(version)
        if not metadata or "identity" not in metadata:
            continue
        try:
            expected = fingerprint(metadata["identity"])
        except (TypeError, ValueError) as error:
            yield Finding(log.table.path, f"its identity cannot be fingerprinted: {error}", version)
            continue
        if metadata["fingerprint"] != expected:
            text = (
                f"its fingerprint is {metadata['fingerprint'][:_DIGITS]}…, that of its identity {expected[:_DIGITS]}…"
            )
            yield Finding(log.table.path, f"{text}: the commit was changed afterwards", version)


def check_balance(log: TableLog) -> Iterator[Finding]:
    """Yield a finding if the newest version of tokens or weights does not say where every source row went."""
    statistics = _statistics(log)
    num_pairs, num_rows = statistics.get("num_pairs"), log.num_rows(log.newest)
    if num_pairs is None:
        return
    if num_rows is not None and num_pairs != num_rows:
        yield Finding(log.table.path, f"its statistics count {num_pairs} pairs, it holds {num_rows} rows", log.newest)
    if "num_source_rows" in statistics and "quarantined" in statistics:
        num_quarantined = sum(statistics["quarantined"].values())
        if statistics["num_source_rows"] != num_pairs + num_quarantined:
            yield Finding(
                log.table.path,
                f"{statistics['num_source_rows']} source rows are not {num_pairs} pairs + {num_quarantined} quarantined",
                log.newest,
            )


def check_quarantine(tokens: TableLog, log: TableLog, quarantine: SoundTable) -> Iterator[Finding]:
    """Yield a finding for each reason if quarantine does not hold as many rows as the newest tokens say.

    A later source without any usable pair leaves the tokens as they were: then quarantine says what was wrong with that source.
    """
    expected = _statistics(tokens).get("quarantined")
    if expected is None or not quarantine.is_whole or _statistics(log).get("num_pairs") == 0:
        return
    reasons = quarantine.scan().filter(~pl.col("reason").is_in(OF_LATER_STAGES)).group_by("reason").len()
    with quarantine.reading():
        found = dict(reasons.collect().iter_rows())
    for reason in sorted({*found, *expected}):
        here, there = found.get(reason, 0), expected.get(reason, 0)
        if here != there:
            yield Finding(
                tokens.table.path,
                f"its statistics count {there} rows in quarantine as {reason}, {quarantine.name} holds {here}; "
                "a build is running, or died in between: run it again",
                tokens.newest,
            )


def _statistics(log: TableLog) -> Statistics:
    return (log.metadata(log.newest) or {}).get("statistics") or {}


def _listed(metadata: CommitMetadata | None) -> list[object]:
    """Return the parents that a commit recorded; a damaged commit may have anything there."""
    listed: object = (metadata or {}).get("parents", [])
    return listed if isinstance(listed, list) else [listed]


def _is_reference(parent: object) -> TypeGuard[Parent]:
    kinds = {"table": str, "version": int, "fingerprint": str}
    return isinstance(parent, dict) and all(isinstance(parent.get(name), kind) for name, kind in kinds.items())


def parent_problem(parent: Parent, find_log: Callable[[str], TableLog | None]) -> str | None:
    """Return what is wrong with a recorded parent; None if it is there, or if its own findings say what is wrong."""
    log, version = find_log(parent["table"]), parent["version"]
    name = f"{parent['table']}@{version}"
    if log is None or version not in {*log.commits, *log.problems}:
        return f"its parent {name} is not in the store"
    if version in log.problems:
        return None  # the parent's own finding
    metadata = log.metadata(version)
    if metadata is None:
        return f"its parent {name} was not written by tokenweights"
    if metadata["fingerprint"] != parent["fingerprint"]:
        found, recorded = metadata["fingerprint"][:_DIGITS], parent["fingerprint"][:_DIGITS]
        return f"its parent {name} has fingerprint {found}…, recorded is {recorded}…: it is not what this was made from"
    return None
