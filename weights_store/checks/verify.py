"""Verifies a store: every byte of every version, the lineage between tables and, if asked, the laws of every newest version.

`verify` reads every file that any version of a table needs, as a stream: that finds whatever is not as it was committed. With
`rows` it also decodes every row of the newest versions and checks the rules that rows must keep, which finds what a program has
written wrong. It changes nothing. It needs the memory of one row group, or of one range of keys when tables are joined.

Not here: files that no version needs (`vacuum.py`). Models and reports: all of them if no tables are named, else the models
behind the named weight datasets.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from weights_store.catalog import check_store, list_tables
from weights_store.checks.files import Examined, SoundTable, examine
from weights_store.checks.findings import Finding
from weights_store.checks.log import TableLog, read_log
from weights_store.checks.metadata import check_balance, check_fingerprints, check_lineage, check_quarantine, parents
from weights_store.checks.models import ModelChecks
from weights_store.checks.relations import (
    ANCHOR_COLUMNS,
    PER_TOKEN_COLUMNS,
    REF_COLUMNS,
    TOKEN_COLUMNS,
    check_keys,
    compare,
)
from weights_store.checks.reports import check_reports
from weights_store.checks.rows import violations
from weights_store.errors import DamageError, NotFoundError, SettingsError
from weights_store.names import quarantine_path
from weights_store.processes.spread import Spread, in_turn
from weights_store.store import WeightStore
from weights_store.tables.metadata import CommitMetadata, Parent, ScorerRecord
from weights_store.tables.shards import ShardRecord


def verify(
    store: WeightStore, tables: Iterable[str] | None = None, rows: bool = False, spread: Spread = in_turn
) -> Iterator[Finding]:
    """Yield every problem of a store, table by table; with `rows` also each broken law of the rows of newest versions.

    A damaged shard or commit is a finding, and everything else is still checked. `tables` are paths such as
    `weights/hh/tis-dpo`; all by default. Tables that they were made from are read too; a problem of those is reported if it
    prevents a check. `spread` reads the shards, and compares the rows of each range of keys.

    Raises:
        NotFoundError: There is no such store or table.
        SettingsError: A path is malformed.
    """
    check_store(store.root)
    asked = list_tables(store.root) if tables is None else map(store.table, tables)
    verification = _Verification(store, [table.path for table in asked], rows, spread)
    for path in () if tables is None else verification.asked:
        log = verification.log(path)
        if log is None or log.newest is None:
            raise NotFoundError(f"no table {path} in {store.root}; `tokenweights ls --store {store.root}` lists them")
    return verification.run(everything=tables is None)


@dataclass
class _Verification:
    """One run; the log and the files of every table are read once."""

    store: WeightStore
    asked: list[str]
    with_rows: bool
    spread: Spread
    _logs: dict[str, TableLog | None] = field(default_factory=dict)
    _examined: dict[str, Examined] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._models = ModelChecks(self.store.root, self.log)

    def run(self, *, everything: bool) -> Iterator[Finding]:
        for path in self.asked:
            log = self.log(path)
            if log is not None and log.newest is not None:
                yield from self._check(log)
        if everything:
            yield from self._models.check_all()
            yield from check_reports(self.store.root)

    def log(self, path: str) -> TableLog | None:
        """Return the log of a table, None if the path names none."""
        if path not in self._logs:
            try:
                self._logs[path] = read_log(self.store.table(path))
            except SettingsError:  # a lineage can hold any text
                self._logs[path] = None
        return self._logs[path]

    def _sound(self, log: TableLog, version: int | None) -> SoundTable:
        path = log.table.path
        if path not in self._examined:
            self._examined[path] = examine(log, self.spread)
        return SoundTable(self._examined[path], version)

    def _check(self, log: TableLog) -> Iterator[Finding]:
        kind = log.table.path.partition("/")[0]
        rows = self._sound(log, log.newest)
        yield from self._examined[log.table.path].findings
        if self.with_rows:
            yield from _with_damage(rows, self._check_laws(kind, log, rows))
        yield from check_lineage(log, self.log)
        yield from check_fingerprints(log)
        if kind in ("tokens", "weights"):
            yield from check_balance(log)
        if kind == "weights":
            yield from self._models.check_scorers(log)
        quarantine = self.log(quarantine_path(log.table.path)) if kind == "tokens" else None
        if quarantine is not None:  # a table without commits holds no rows
            unusable = self._sound(quarantine, quarantine.newest)
            yield from _with_damage(unusable, check_quarantine(log, quarantine, unusable))

    def _check_laws(self, kind: str, log: TableLog, rows: SoundTable) -> Iterator[Finding]:
        scorer = (log.metadata(log.newest) or {}).get("scorer")
        scorer = scorer if isinstance(scorer, dict) else None  # a damaged commit may hold anything
        work = _RowCheck(kind, rows, self._vocab_size(log), scorer)
        yield from chain.from_iterable(self.spread(work, rows.records()))
        yield from check_keys(rows, self.spread)
        yield from self._check_relations(kind, log, rows)

    def _check_relations(self, kind: str, log: TableLog, rows: SoundTable) -> Iterator[Finding]:
        if kind in ("logps", "attributions", "anchors"):  # of all commits: each adds some pairs
            versions = sorted(log.commits, reverse=True)
            references = [parent for version in versions for parent in parents(log.metadata(version))]
            yield from self._compare(PER_TOKEN_COLUMNS, rows, _of_kind("tokens", references), by_length=True)
        if kind == "annotations":
            made = log.metadata(log.newest)
            columns = PER_TOKEN_COLUMNS if _has_values(made) else {}
            yield from self._compare(columns, rows, _of_kind("tokens", parents(made)), by_length=True)
        if kind == "weights":
            references = parents(log.metadata(log.newest))
            yield from self._compare(TOKEN_COLUMNS, rows, _of_kind("tokens", references))
            yield from self._compare(REF_COLUMNS, rows, _of_kind("logps", references, "ref_logps"))
            yield from self._compare(ANCHOR_COLUMNS, rows, _of_kind("anchors", references, "anchors"))

    def _vocab_size(self, log: TableLog) -> int | None:
        """Return the vocabulary size that the newest commit or that of its tokens recorded, None if neither did."""
        of_tokens = _of_kind("tokens", parents(log.metadata(log.newest)))
        logs = [(log, log.newest), *((self.log(parent["table"]), parent["version"]) for parent in of_tokens)]
        for metadata in (made.metadata(version) or {} for made, version in logs if made is not None):
            size = (metadata.get("tokenizer") or {}).get("vocab_size")
            if isinstance(size, int):
                return size
        return None

    def _compare(
        self, columns: Mapping[str, str], rows: SoundTable, references: Iterable[Parent], by_length: bool = False
    ) -> Iterator[Finding]:
        places = dict.fromkeys((parent["table"], parent["version"]) for parent in references)  # each once
        logs = [(self.log(path), version) for path, version in places]
        # `check_lineage` reports missing ones.
        made_from = [self._sound(log, version) for log, version in logs if log is not None and version in log.commits]
        if not made_from:
            return
        yield from compare(rows, made_from, columns, by_length, self.spread)
        for parent in made_from:
            if not parent.is_whole and parent.path not in self.asked:
                problem = f"not all of it could be compared with {parent.name}, which is damaged; verify {parent.path}"
                yield Finding(rows.path, problem, rows.version_number)


def _of_kind(kind: str, references: Iterable[Parent], role: str | None = None) -> list[Parent]:
    of_kind = [parent for parent in references if parent["table"].startswith(f"{kind}/")]
    return [parent for parent in of_kind if role in (None, parent.get("role"))]


def _has_values(metadata: CommitMetadata | None) -> bool:
    """Return whether annotations have numbers of tokens, and not of pairs alone; a damaged commit may hold anything."""
    annotation: object = (metadata or {}).get("annotation")
    settings = annotation.get("settings") if isinstance(annotation, dict) else None
    return isinstance(settings, dict) and settings.get("unit") is not None


def _with_damage(table: SoundTable, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings, and one more if a shard can no longer be read that was sound a moment ago."""
    try:
        yield from findings
    except DamageError as error:
        yield Finding(table.path, str(error), table.version_number)


@dataclass(frozen=True)
class _RowCheck:
    """Checks the laws of rows in one shard of a kind of table."""

    kind: str
    table: SoundTable
    vocab_size: int | None
    scorer: ScorerRecord | None

    def __call__(self, record: ShardRecord) -> list[Finding]:
        """Return the first row that breaks each law, for every row group."""
        return list(self._check(record))

    def _check(self, record: ShardRecord) -> Iterator[Finding]:
        table = self.table
        place = Finding(table.path, "", table.version_number, record.name)
        reader = table.open_shard(record)
        for index in range(len(reader.group_sizes)):
            place = replace(place, row_group=index)
            try:
                rows = reader.read_group(index)
            except DamageError as error:  # the bytes are as committed: the writer's memory or disk was bad
                yield replace(place, problem=str(error))
                continue
            for violation in violations(self.kind, rows, table.key, self.vocab_size, self.scorer):
                more = violation.num_rows - 1
                tail = f" ({more} more rows like this in the row group)" if more else ""
                pair_id = rows["pair_id"][violation.row].as_py()
                yield replace(place, pair_id=pair_id, problem=violation.problem + tail)
