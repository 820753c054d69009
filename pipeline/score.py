"""Stage score: per-token log-probs of one model over a tokens table, in a process of its own.

`score` finds what is missing, writes a request and starts `python -m pipeline.score REQUEST`, so that the engine's memory is
gone afterwards and its requirements need not be the caller's. The child scores chunks by token budget, longest first, and
commits each: a kill loses one chunk at most, and the next run does the rest.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.chat import Condition
from pipeline.child import check_extra, run_child
from pipeline.provenance import provenance
from pipeline.recipe import ScoreSection
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ScoringError
from weights_store.fingerprint import explain_difference, fingerprint, fingerprint_model, load_json
from weights_store.schemas import LOGPS, QUARANTINE, SCHEMA_VERSION, Reason

_PROGRESS = "PROGRESS "
_RANGE_BYTES = 512 << 20
_ENGINE_KEYS = {"batch_tokens", "kv_cache_gib", "gpu_memory_share", "tensor_parallel"}


@dataclass(frozen=True)
class Scorer:
    """A model, maybe behind a contrastive prompt: what a column of log-probs comes from."""

    model: Path
    condition: Condition | None = None

    def resolve_dtype(self, dtype: str) -> str:
        """Return the dtype to score in: for `auto` the one the model is stored in.

        vLLM's own `auto` would quietly turn float32 into a 16-bit type.
        """
        config = load_json(self.model / "config.json")
        return dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "auto"

    def identity(self, dtype: str) -> dict[str, Any]:
        """Return what determines this scorer's numbers."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": fingerprint_model(self.model),
            "condition": asdict(self.condition) if self.condition else None,
            "dtype": dtype,
        }


@dataclass(frozen=True)
class Scored:
    """What score hands on."""

    logps: TableVersion
    num_scored_pairs: int
    num_scored_tokens: int
    num_unscorable: int
    wall_s: float


@dataclass(frozen=True)
class _Request:
    """The contract between the stage and its process, one JSON file."""

    store: str
    tokens_table: str
    tokens_version: int
    logps_table: str
    model: str
    tokenizer: str
    chat_template: str | None
    condition: dict[str, str] | None
    metadata: dict[str, Any]
    chunk_tokens: int
    engine: dict[str, Any]


def score(
    tokens: TableVersion,
    scorer: Scorer,
    settings: ScoreSection,
    tokenizer_folder: Path,
    chat_template: str | None = None,
    report: Callable[[str], None] = print,
    progress: Callable[[float], None] = lambda percent: None,
    role: str = "ref",
) -> Scored:
    """Bring the scorer's logps table up to a version of the tokens table; returns at once when nothing is missing.

    Args:
        tokens: The pairs to cover.
        scorer: The model and its contrastive prompt.
        settings: Engine settings of the recipe.
        tokenizer_folder: Where the chat template for a contrastive prompt is; a trained model keeps its origin's.
        chat_template: The recipe's own template file, if any.
        report: Gets one line now and then.
        progress: Gets the percentage done, 0 to 100.
        role: What the scorer is to the build: `ref`, `positive` or `negative`.

    Raises:
        MissingExtraError: There is something to score, and no vLLM.
        StageError: The scoring process failed; carries its last lines. What it had committed stays.
    """
    started = time.monotonic()
    dtype = scorer.resolve_dtype(settings.dtype)
    identity = scorer.identity(dtype)
    table = logps_table(tokens, identity)
    missing = [(part.height, int(part["num_tokens"].sum())) for part in _missing(tokens, table)]
    num_pairs, num_tokens = (sum(counts) for counts in zip(*missing, strict=True))
    if not num_pairs and table.exists():
        return Scored(table.reference(), 0, 0, 0, time.monotonic() - started)
    if not table.exists():
        _explain_new_table(table, role, identity, report)
    check_extra("vllm", "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'", settings.python)
    before = table.num_rows() if table.exists() else 0
    request = _Request(
        store=tokens.store,
        tokens_table=tokens.table,
        tokens_version=tokens.version,
        logps_table=table.path,
        model=str(scorer.model),
        tokenizer=str(tokenizer_folder),
        chat_template=chat_template,
        condition=asdict(scorer.condition) if scorer.condition else None,
        metadata={
            "scorer": identity,
            "role": role,
            "parents": [tokens.as_parent()],
            "fingerprint": fingerprint({"scorer": identity, "tokens": tokens.fingerprint}),
            **provenance(),
        },
        chunk_tokens=settings.chunk_tokens,
        engine={"dtype": dtype, **settings.model_dump(include=_ENGINE_KEYS)},
    )

    def passed_on(line: str) -> None:
        percent, _, text = line.partition(" ")
        progress(float(percent))
        report(text)

    _run_process(request, settings.python, passed_on)
    num_scored = table.num_rows() - before
    unscorable = num_pairs - num_scored
    return Scored(table.reference(), num_scored, num_tokens, unscorable, time.monotonic() - started)


def logps_table(tokens: TableVersion, identity: dict[str, Any]) -> Table:
    """Return the table of one scorer over one dataset."""
    key = tokens.table.removeprefix("tokens/")
    return WeightStore(tokens.store).table(f"logps/{key}/{fingerprint(identity)[:12]}")


def _explain_new_table(table: Table, role: str, identity: dict[str, Any], report: Callable[[str], None]) -> None:
    """Say why pairs that were scored in this role before are scored anew: what differs from the last such scorer."""
    folder = table.path.rpartition("/")[0]
    others = [t for t in WeightStore(str(table.root)).tables("logps") if t.path.startswith(f"{folder}/")]
    newest = {other.path: other.history(limit=1)[0] for other in others}
    same_role = [
        (c.timestamp_ms, path, c.metadata)
        for path, c in newest.items()
        if c.metadata and c.metadata.get("role") == role
    ]
    if same_role:
        _, path, metadata = max(same_role)
        changes = explain_difference(metadata["scorer"], identity)
        report(f"score {role}: {table.path} is a new table; unlike {path}: {'; '.join(changes)}")


def _missing(tokens: TableVersion, table: Table) -> Iterator[pl.DataFrame]:
    """Yield the pairs without log-probs, by pair_id, one range at a time: pair_id and number of tokens to compute."""
    source = WeightStore(tokens.store).table(tokens.table)
    pairs = source.scan(tokens.version)
    lengths = pl.sum_horizontal(pl.col(c).list.len() for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
    done = [_known_unscorable(tokens, table), *([table.scan().select("pair_id")] if table.exists() else [])]
    for piece in source.key_ranges(_RANGE_BYTES, tokens.version):
        wanted = piece.of(pairs)
        for frame in done:
            wanted = wanted.join(piece.of(frame), on="pair_id", how="anti")
        ids = wanted.select("pair_id").collect()
        if ids.is_empty():  # the usual case of a second build: no list has been read
            yield ids.with_columns(num_tokens=pl.lit(0, pl.UInt32))
            continue
        yield (
            piece.of(pairs)
            .join(ids.lazy(), on="pair_id", how="semi")
            .select("pair_id", lengths.alias("num_tokens"))
            .sort("pair_id")
            .collect()
        )


def _known_unscorable(tokens: TableVersion, table: Table) -> pl.LazyFrame:
    """Return the pairs that this very scorer has put into quarantine: trying them again would change nothing."""
    quarantine = WeightStore(tokens.store).table(_quarantine_path(tokens.table))
    if not quarantine.exists():
        return pl.LazyFrame(schema={"pair_id": pl.String})
    by_this = (pl.col("reason") == Reason.UNSCORABLE.value) & pl.col("detail").str.starts_with(f"{table.path}: ")
    return quarantine.scan().filter(by_this).select("pair_id")


def _run_process(request: _Request, python: str | None, report: Callable[[str], None]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="score-", delete=False) as file:
        json.dump(asdict(request), file)
    command = [python or sys.executable, "-m", "pipeline.score", file.name]
    try:
        run_child(command, f"scoring {request.logps_table}", report, prefix=_PROGRESS)
    finally:
        Path(file.name).unlink(missing_ok=True)


# --- in the child ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Score one request file; what `python -m pipeline.score` runs."""
    from weights_store.errors import TokenweightsError

    request = _Request(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    try:
        _score_request(request)
    except TokenweightsError as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


def _score_request(request: _Request) -> None:
    from pipeline.chat import ChatTokenizer
    from pipeline.engine import EngineSettings, VllmEngine

    store = WeightStore(request.store)
    tokens = TableVersion(request.store, request.tokens_table, request.tokens_version, "")
    table = store.table(request.logps_table)
    parts = [(part.height, int(part["num_tokens"].sum())) for part in _missing(tokens, table)]
    num_pairs, total = (sum(counts) for counts in zip(*parts, strict=True))
    _say(f"{num_pairs} pairs, {total} tokens to score with {request.model}; starting the engine", 0)
    tokenizer = None
    condition = Condition(**request.condition) if request.condition else None  # type: ignore[arg-type]
    if condition:
        tokenizer = ChatTokenizer(Path(request.tokenizer), request.chat_template)
    engine = VllmEngine(Path(request.model), EngineSettings(**request.engine))
    pairs = store.table(request.tokens_table).scan(request.tokens_version)
    started, done = time.monotonic(), 0
    known = (
        table.version()
    )  # holds none of the pairs to come, so that an append looks only at what others have added since
    for chunk in _chunks(tokens, table, request.chunk_tokens):
        rows = chunk.join(_rows_of(pairs, chunk), on="pair_id", how="left", maintain_order="left")
        if tokenizer is not None and condition is not None:
            prompt_ids = tokenizer.conditioned_prompt_ids(rows["prompt"].to_list(), condition)
            rows = rows.with_columns(pl.Series("prompt_ids", prompt_ids, pl.List(pl.Int32)))
        scored, unscorable = _score_rows(engine, rows)
        num_tokens = int(chunk["num_tokens"].sum())
        if unscorable:
            _quarantine(store, request, unscorable)
        if scored.num_rows:
            statistics = {"num_pairs": scored.num_rows, "num_tokens": num_tokens}
            reference = table.append(scored, {**request.metadata, "statistics": statistics}, known)
            if reference.version == (0 if known is None else known + 1):
                known = reference.version  # nobody else has written: the next append need not look at ours
        done += num_tokens
        rate = done / (time.monotonic() - started)
        _say(
            f"scored {done}/{total} tokens, {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left",
            100 * done / total,
        )
    if not table.exists():
        raise ScoringError(f"none of {num_pairs} pairs could be scored; see {_quarantine_path(request.tokens_table)}")


def _rows_of(pairs: pl.LazyFrame, chunk: pl.DataFrame) -> pl.DataFrame:
    """Read the pairs of a chunk; its span of pair_ids is what reaches the files."""
    span = pl.col("pair_id").is_between(pl.lit(chunk["pair_id"].min()), pl.lit(chunk["pair_id"].max()))
    return pairs.filter(span).join(chunk.lazy().select("pair_id"), on="pair_id", how="semi").collect()


def _say(text: str, percent: float) -> None:
    print(f"{_PROGRESS}{percent:.1f} {text}", flush=True)


def _chunks(tokens: TableVersion, table: Table, chunk_tokens: int) -> Iterator[pl.DataFrame]:
    """Cut what is missing into chunks of about `chunk_tokens`, each a span of pair_ids with the longest pairs first."""
    for part in _missing(tokens, table):
        numbered = part.with_columns(((pl.col("num_tokens").cum_sum() - 1) // chunk_tokens).alias("chunk"))
        for chunk in numbered.partition_by("chunk", maintain_order=True):
            yield chunk.sort("num_tokens", "pair_id", descending=[True, False]).select("pair_id", "num_tokens")


def _score_rows(engine: Any, rows: pl.DataFrame) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Return the log-probs of the pairs that could be scored, and a quarantine row for each other."""
    from pipeline.engine import ScoredSequence

    unscorable: list[dict[str, Any]] = []
    sequences, owners = [], []
    for row in rows.iter_rows(named=True):
        if row["prompt_ids"] is None:
            unscorable.append(_unscorable(row, "the chat has no place for the contrastive prompt"))
            continue
        longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if longest > engine.max_tokens:
            unscorable.append(
                _unscorable(row, f"prompt and response have {longest} tokens, the engine takes {engine.max_tokens}")
            )
            continue
        if max(max(row["prompt_ids"]), max(row["chosen_ids"]), max(row["rejected_ids"])) >= engine.vocab_size:
            unscorable.append(_unscorable(row, f"a token id is outside the model's vocabulary of {engine.vocab_size}"))
            continue
        owners.append(row)
        sequences += [ScoredSequence(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")]
    replies = engine.score(sequences)
    scored: dict[str, list[Any]] = {name: [] for name in LOGPS.names}
    for index, row in enumerate(owners):
        chosen, rejected = replies[2 * index : 2 * index + 2]
        problems = [
            f"{side}: {r}" for side, r in (("chosen", chosen), ("rejected", rejected)) if isinstance(r, ScoringError)
        ]
        if problems:
            unscorable.append(_unscorable(row, "; ".join(problems)))
            continue
        for name, value in zip(LOGPS.names, (row["pair_id"], chosen, rejected), strict=True):
            scored[name].append(value)
    return pa.Table.from_pydict(scored, LOGPS), unscorable


def _unscorable(row: dict[str, Any], detail: str) -> dict[str, Any]:
    return {
        "source_row": row["source_row"],
        "pair_id": row["pair_id"],
        "reason": Reason.UNSCORABLE.value,
        "detail": detail,
        "raw": row["prompt"][:2000],
    }


def _quarantine_path(tokens_table: str) -> str:
    return tokens_table.replace("tokens/", "quarantine/", 1)


def _quarantine(store: WeightStore, request: _Request, rows: list[dict[str, Any]]) -> None:
    """Put unscorable pairs into quarantine, once each, however often scoring is repeated."""
    table = store.table(_quarantine_path(request.tokens_table))
    marked = [{**row, "detail": f"{request.logps_table}: {row['detail']}"} for row in rows]
    table.append(pa.Table.from_pylist(marked, QUARANTINE), table.metadata())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
