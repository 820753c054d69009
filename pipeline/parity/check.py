"""Is the scorer right? Real pairs, scored by the engine in each of its ways and by transformers, compared token by token.

Called by `tokenweights check-scorer`, and by builds for the log-probs that the store holds already (`check_stored`). Writes
nothing to the store. The two sides are processes of their own in the scorer's interpreter (`parity_process.py`).
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from pipeline.child import check_extra, run_child
from pipeline.engine.vllm_engine import FIXED_IDS, FLAT, RESPONSE_ROWS
from pipeline.models.resolve import resolve_model
from pipeline.parity.process import SAMPLE, SIDES, TRANSFORMERS, Column, Task
from pipeline.recipe import Recipe, ScoreSection
from pipeline.source.chat import ChatTokenizer
from pipeline.source.load import load_rows
from pipeline.source.pairs import Unusable, read_pair
from pipeline.stages.contrast import prompt_pair, wanted_models
from pipeline.stages.prepare import Preparation
from pipeline.stages.score import Scorer
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError, MismatchError, StageError
from weights_store.fingerprint import canonical_json
from weights_store.location import one_line
from weights_store.messages import logger

_log = logger(__name__)

Role = Literal["ref", "positive", "negative"]
WAYS = (FIXED_IDS, RESPONSE_ROWS, FLAT)
TOLERANCE_NATS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}
"""Of the mean, by the dtype that the engine computes in. Rounding alone moves a model of eight layers by 2e-3 in float16 and
1.7e-2 in bfloat16, in transformers too."""
MAX_FACTOR = 50
"""A single token may be off by this many times the tolerance of the mean."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_MAX_STORED_TOKENS = 2048
"""Of a sequence in the sample of a build: transformers' eager attention takes memory for the square of it."""
_SAMPLE_BYTES = 64 << 20
"""Memory for the pairs that a build's sample is taken from."""


@dataclass(frozen=True)
class Sample:
    """Some of a recipe's pairs: rows of schema `SAMPLE`, and where they come from."""

    origin: str
    rows: list[dict[str, Any]]

    def num_tokens(self) -> int:
        """Return how many response tokens there are to compare."""
        return sum(len(row[f"{side}_ids"]) for row in self.rows for side in SIDES)


class Gap(NamedTuple):
    """One response token, scored by both; log-probs in nats."""

    pair_id: str
    side: str
    position: int
    """In the response, from 0."""
    token_id: int
    logp: float
    expected: float

    def __str__(self) -> str:
        where = f"pair {self.pair_id}, {self.side}, response token {self.position} (id {self.token_id})"
        return f"{where}: {self.logp:.5f}, transformers {self.expected:.5f}"


@dataclass(frozen=True)
class Agreement:
    """One way of the engine against transformers; |difference| of log-probs in nats over `num_tokens` tokens.

    Args:
        num_tokens: Tokens of the pairs that both could score.
        mean: Of |difference|; NaN where there is no token.
        percentiles: Of |difference|, those of `PERCENTILES`.
        worst: The token where they are farthest apart.
        unscorable: By pair_id, why the way has no log-probs of it.
    """

    num_tokens: int
    mean: float
    percentiles: tuple[float, ...]
    worst: Gap | None
    unscorable: dict[str, str]

    @property
    def max(self) -> float:
        """The largest |difference|."""
        return abs(self.worst.logp - self.worst.expected) if self.worst else float("nan")

    def passes(self, tolerance_nats: float) -> bool:
        """Return whether mean and maximum are within bounds; nothing compared is no pass, nor is a NaN."""
        return self.mean <= tolerance_nats and self.max <= MAX_FACTOR * tolerance_nats


@dataclass(frozen=True)
class Parity:
    """What the check found.

    Args:
        sample: What was scored.
        scorer: Whose scores they are, and the engine's dtype, in words.
        tolerance_nats: Of the mean.
        agreements: By way.
        absent: By way, why it cannot be taken here.
        unscorable: By pair_id, why transformers has no log-probs of it.
    """

    sample: Sample
    scorer: str
    tolerance_nats: float
    agreements: dict[str, Agreement]
    absent: dict[str, str]
    unscorable: dict[str, str]


def check_scorer(
    recipe: Recipe,
    *,
    num_pairs: int = 32,
    tolerance_nats: float | None = None,
    role: Role = "ref",
) -> Parity:
    """Score a sample of the recipe's pairs with the engine and with transformers, and compare them.

    Args:
        recipe: Its pairs, its model, and its engine settings.
        num_pairs: Size of the sample, fewer where there are not so many.
        tolerance_nats: Largest mean |difference| that passes; None for the one of the dtype.
        role: Which scorer.

    Raises:
        InputError: The recipe's inputs cannot be used, or the role's model is not there yet.
        MismatchError: The two have log-probs of different numbers of tokens.
        MissingExtraError: No vLLM.
        StageError: A process failed, transformers' for example for a model that it cannot load.
    """
    model_folder = resolve_model(recipe.model)
    start = Preparation.of(recipe, model_folder)
    scorer = role_scorer(recipe, model_folder, role)
    dtype = scorer.resolve_dtype(recipe.score.dtype)
    check_extra("vllm", "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'", recipe.score.python)
    sample = under_condition(take_sample(start, num_pairs), scorer, start.tokenizer)
    expected, columns = _score_both(scorer, dtype, sample, recipe.score)
    if tolerance_nats is None:
        tolerance_nats = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"])
    return Parity(
        sample,
        f"{role} ({scorer.model}) in {dtype}",
        tolerance_nats,
        {way: compare(sample, column, expected) for way, column in columns.items() if column.failed is None},
        {way: column.failed for way, column in columns.items() if column.failed is not None},
        expected.unscorable,
    )


def check_parity(parity: Parity) -> None:
    """Refuse a scorer that differs from transformers in one of its ways.

    Raises:
        MismatchError: One is out of bounds, or could not be compared; or there is none.
    """
    if not parity.agreements:
        raise MismatchError("no way of the engine works here: " + "; ".join(parity.absent.values()))
    for way, agreement in parity.agreements.items():
        if agreement.worst is None:
            reason = next(iter((agreement.unscorable or parity.unscorable).values()), "the sample is empty")
            raise MismatchError(f"{way}: nothing to compare, no pair has log-probs of both: {reason}")
        if not agreement.passes(parity.tolerance_nats):
            raise MismatchError(
                f"{way} differs from transformers by {agreement.mean:.2g} nats in the mean (expected at most "
                f"{parity.tolerance_nats:g}) and {agreement.max:.2g} at most (expected {_bound(parity):g}), over "
                f"{agreement.num_tokens:,} tokens; farthest apart: {agreement.worst}"
            )


# --- what is stored ----------------------------------------------------------------------------------------------------


def check_stored(
    recipe: Recipe,
    tokens: TableVersion,
    ref_logps: TableVersion,
    model_folder: Path,
) -> dict[str, Any]:
    """Compare the reference's stored log-probs with transformers in float32, on `score.parity_pairs` pairs.

    The engine's side is what the store holds, so no engine is started. What a version of the recipe's weight datasets has
    recorded of the same log-probs is taken as it is.

    Returns:
        What versions made from these log-probs record: `parity` with `num_pairs`, `num_tokens`, `mean`, `p99` and `max` of
        |difference| in nats, and the `dtype` that the scorer computed in. Nothing when the check is off or transformers
        cannot run.

    Raises:
        MismatchError: They differ by more than rounding in that dtype.
    """
    store = WeightStore(tokens.store)
    recorded = _recorded_parity(store, recipe, ref_logps)
    if recorded is not None or not recipe.score.parity_pairs:
        return {"parity": recorded} if recorded else {}
    sample, stored = stored_sample(store, tokens, ref_logps, recipe.score.parity_pairs)
    if not sample.rows:
        _log.info(f"{ref_logps}: not compared with transformers: no pair has at most {_MAX_STORED_TOKENS} tokens")
        return {}
    try:
        expected = _run(Task("transformers", str(model_folder), sample.rows), recipe.score.python)[TRANSFORMERS]
    except StageError as error:
        _log.info(f"{ref_logps}: not compared with transformers: {one_line(error)}")
        return {}
    dtype = Scorer(model_folder).resolve_dtype(recipe.score.dtype)
    found = _agreement_of_stored(sample, stored, expected, dtype)
    _log.info(f"{ref_logps} agrees with transformers: {parity_text(found)}")
    return {"parity": found}


def _agreement_of_stored(sample: Sample, stored: Column, expected: Column, dtype: str) -> dict[str, Any]:
    """Return what a version records of the comparison.

    Raises:
        MismatchError: They differ by more than rounding in that dtype.
    """
    agreement = compare(sample, stored, expected)
    tolerance_nats = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"])
    try:
        check_parity(Parity(sample, dtype, tolerance_nats, {sample.origin: agreement}, {}, expected.unscorable))
    except MismatchError as error:
        raise MismatchError(
            f"{error}. Nothing was published. `tokenweights check-scorer` compares each way of the engine; once they agree, "
            "delete the table and build again. `--set score.parity_pairs=0` publishes all the same"
        ) from error
    return {
        "num_pairs": len(expected.logps),
        "num_tokens": agreement.num_tokens,
        "mean": agreement.mean,
        "p99": agreement.percentiles[PERCENTILES.index(99.0)],
        "max": agreement.max,
        "dtype": dtype,
    }


def parity_text(found: Mapping[str, Any]) -> str:
    """Return in words what a version recorded as its `parity`."""
    numbers = ", ".join(f"{name} {found[key]:.1e}" for name, key in (("mean", "mean"), ("99 %", "p99"), ("max", "max")))
    return f"{numbers} nats over {found['num_tokens']:,} tokens of {found['num_pairs']} pairs in {found['dtype']}"


def stored_sample(
    store: WeightStore, tokens: TableVersion, logps: TableVersion, num_pairs: int
) -> tuple[Sample, Column]:
    """Return the pairs with the lowest pair_ids that are scored and not too long, and their stored log-probs."""
    pairs, scores = store.table(tokens.table), store.table(logps.table)
    first = pairs.key_ranges(_SAMPLE_BYTES, tokens.version)[0]
    num_tokens = pl.col("prompt_ids").list.len() + pl.max_horizontal(pl.col(f"{side}_ids").list.len() for side in SIDES)
    rows = (
        first.of(pairs.scan(tokens.version))
        .select(SAMPLE.names)
        .filter(num_tokens <= _MAX_STORED_TOKENS)
        .join(
            first.of(scores.scan(logps.version)).select("pair_id", *(f"{side}_logps" for side in SIDES)), on="pair_id"
        )
        .sort("pair_id")
        .head(num_pairs)
        .collect()
    )
    stored = {row["pair_id"]: [row[f"{side}_logps"] for side in SIDES] for row in rows.iter_rows(named=True)}
    return Sample(str(logps), rows.select(SAMPLE.names).to_dicts()), Column(stored)


def _recorded_parity(store: WeightStore, recipe: Recipe, ref_logps: TableVersion) -> dict[str, Any] | None:
    for name in (recipe.uniform.name, recipe.weights.name):
        table = store.table(f"weights/{name}")
        metadata = table.metadata() if table.exists() else {}
        if {"role": "ref_logps", **ref_logps.as_parent()} in metadata.get("parents", []) and "parity" in metadata:
            return dict(metadata["parity"])
    return None


# --- the sample --------------------------------------------------------------------------------------------------------


def take_sample(start: Preparation, num_pairs: int) -> Sample:
    """Return pairs as prepare cuts them: of the tokens table where it is there, else the first usable rows of the source.

    The table's are those with the lowest pair_ids, which are hashes: as good as drawn by chance, and pairs of one prompt lie
    together, so that what they share is shared here as well.

    Raises:
        InputError: The source cannot be read, or no row of it can be used.
    """
    if start.tokens.exists():
        pairs = start.tokens.scan()
        last = pl.lit(pairs.select("pair_id").bottom_k(num_pairs, by="pair_id").max().collect().item())
        rows = pairs.filter(pl.col("pair_id") <= last).select(SAMPLE.names).sort("pair_id").collect()
        return Sample(str(start.tokens.reference()), rows.to_dicts())
    rows_of_source = [row for row, _ in zip(_usable_rows(start), range(num_pairs), strict=False)]
    if not rows_of_source:
        raise InputError(f"dataset.source {start.dataset.source}: no row of it can be used")
    return Sample(f"the first rows of {start.dataset.source}", rows_of_source)


def _usable_rows(start: Preparation) -> Iterator[dict[str, Any]]:
    limits = start.dataset
    for row in load_rows(start.dataset):
        if row.value is None:
            continue
        try:
            pair = read_pair(row.value, start.dataset)
            tokens = start.tokenizer.tokenize_pair(
                pair, limits.max_prompt_tokens, limits.max_response_tokens, limits.long_response == "cut"
            )
        except Unusable:
            continue
        if len(tokens.prompt_ids) + max(len(tokens.chosen_ids), len(tokens.rejected_ids)) < start.context:
            yield {
                "pair_id": pair.pair_id,
                "source_row": row.source_row,
                "prompt": canonical_json(tokens.prompt),
                "prompt_ids": tokens.prompt_ids,
                "chosen_ids": tokens.chosen_ids,
                "rejected_ids": tokens.rejected_ids,
            }


def under_condition(sample: Sample, scorer: Scorer, tokenizer: ChatTokenizer) -> Sample:
    """Put the scorer's contrastive prompt into the prompts of a sample."""
    if scorer.condition is None:
        return sample
    prompt_ids = tokenizer.conditioned_prompt_ids([row["prompt"] for row in sample.rows], scorer.condition)
    return replace(sample, rows=[{**row, "prompt_ids": ids} for row, ids in zip(sample.rows, prompt_ids, strict=True)])


def role_scorer(recipe: Recipe, model_folder: Path, role: Role) -> Scorer:
    """Return the scorer of a role, which must be there already.

    Raises:
        InputError: Its model has not been trained yet.
    """
    if role == "ref":
        return Scorer(model_folder)
    if recipe.contrast.method == "prompt":
        return prompt_pair(recipe.contrast, model_folder).scorers[role]
    uniform = WeightStore(recipe.store.uri).table(f"weights/{recipe.dataset.name}/uniform")
    if uniform.exists():
        models = {model.side: model for model in wanted_models(recipe.contrast, model_folder, uniform.reference())}
        folder = models[role].folder
        if folder is not None:
            return Scorer(folder)
    raise InputError(
        f"the {role} model (contrast.method {recipe.contrast.method}) is not in {recipe.store.uri} yet; train it with "
        "`tokenweights build`, or check --role ref"
    )


# --- both sides --------------------------------------------------------------------------------------------------------


def _score_both(scorer: Scorer, dtype: str, sample: Sample, settings: ScoreSection) -> tuple[Column, dict[str, Column]]:
    """Return what transformers made of a sample, and each way of the engine."""
    task = Task("transformers", str(scorer.model), sample.rows)
    expected = _run(task, settings.python)[TRANSFORMERS]
    task = replace(task, side="engine", engine=settings.engine_settings(dtype))
    columns = _run(replace(task, ways=list(WAYS)), settings.python)
    if columns[FIXED_IDS].failed is None and columns[RESPONSE_ROWS].failed:  # V2 runs here, and so does V1 when told to
        try:
            columns |= _run(replace(task, runner="V1", ways=[RESPONSE_ROWS]), settings.python)
        except StageError as error:
            columns[RESPONSE_ROWS] = Column(failed=str(error))
    return expected, columns


def _run(task: Task, python: str | None) -> dict[str, Column]:
    with tempfile.TemporaryDirectory(prefix="check-scorer-") as folder:
        paths = [Path(folder, name) for name in ("task.json", "columns.json")]
        paths[0].write_text(json.dumps(asdict(task)), encoding="utf-8")
        run_child("pipeline.parity.process", [*map(str, paths)], f"scoring with {task.model} ({task.side})", python)
        columns = json.loads(paths[1].read_text(encoding="utf-8"))
    return {name: Column(**column) for name, column in columns.items()}


# --- the comparison ----------------------------------------------------------------------------------------------------


def compare(sample: Sample, column: Column, expected: Column) -> Agreement:
    """Compare what two scorers made of a sample, over the pairs that both have.

    Raises:
        MismatchError: They have log-probs of different numbers of tokens.
    """
    gaps = list(_gaps(sample, column.logps, expected.logps))
    if not gaps:
        return Agreement(0, float("nan"), (float("nan"),) * len(PERCENTILES), None, column.unscorable)
    sizes = np.abs(np.array([gap.logp for gap in gaps]) - np.array([gap.expected for gap in gaps]))
    worst = gaps[int(np.argmax(sizes))]  # a NaN, if there is one
    return Agreement(
        len(gaps), float(sizes.mean()), tuple(np.percentile(sizes, PERCENTILES).tolist()), worst, column.unscorable
    )


def _gaps(
    sample: Sample, logps: Mapping[str, list[list[float]]], expected: Mapping[str, list[list[float]]]
) -> Iterator[Gap]:
    for row in sample.rows:
        pair_id = row["pair_id"]
        if pair_id not in logps or pair_id not in expected:
            continue
        for side, got, wanted in zip(SIDES, logps[pair_id], expected[pair_id], strict=True):
            ids = row[f"{side}_ids"]
            if not len(ids) == len(got) == len(wanted):
                raise MismatchError(
                    f"pair {pair_id}, {side}: {len(ids)} tokens, {len(got)} log-probs by the engine and {len(wanted)} by "
                    "transformers"
                )
            for position, (token_id, one, other) in enumerate(zip(ids, got, wanted, strict=True)):
                yield Gap(pair_id, side, position, token_id, one, other)


# --- in words ----------------------------------------------------------------------------------------------------------


def _bound(parity: Parity) -> float:
    return MAX_FACTOR * parity.tolerance_nats


def parity_lines(parity: Parity) -> list[str]:
    """Return what the check found as lines of text: a table with a row for each way, and where each is farthest off."""
    sample = parity.sample
    lines = [
        f"{len(sample.rows)} pairs, {sample.num_tokens():,} response tokens, of {sample.origin}",
        f"scorer {parity.scorer} against transformers in float32",
        f"|difference| in nats; passes with a mean of at most {parity.tolerance_nats:g} and {_bound(parity):g} for any token",
        "",
    ]
    heads = ["way", "mean", *(f"{percentile:g} %" for percentile in PERCENTILES), "max", "tokens", "not scored", ""]
    rows = [heads, *(_row(way, agreement, parity) for way, agreement in parity.agreements.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    widths[0] = max(widths[0], *map(len, WAYS))
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{way.ljust(widths[0])}  not here: {reason}" for way, reason in parity.absent.items()]
    lines.append("")
    for way, agreement in parity.agreements.items():
        lines.append(f"farthest off by {way}: {agreement.worst or 'nothing to compare'}")
        for pair_id, reason in list(agreement.unscorable.items())[:3]:
            lines.append(f"not scored by {way}: pair {pair_id}: {reason}")
    return [
        *lines,
        *(f"not scored by transformers: pair {pair_id}: {why}" for pair_id, why in _first(parity.unscorable)),
    ]


def _row(way: str, agreement: Agreement, parity: Parity) -> list[str]:
    numbers = [agreement.mean, *agreement.percentiles, agreement.max]
    verdict = "passes" if agreement.passes(parity.tolerance_nats) else "FAILS"
    counts = [f"{agreement.num_tokens:,}", str(len(agreement.unscorable))]
    return [way, *(f"{number:.1e}" for number in numbers), *counts, verdict]


def _first(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    return list(reasons.items())[:3]
