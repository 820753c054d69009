"""Is the scorer right? Real pairs, scored by the engine in each of its ways and by transformers, compared token by token.

Called by `tokenweights check-scorer`, and by builds for log-probs that the store has already (`check_stored`). Writes nothing
to the store. Each side runs in a process of its own, in the scorer's interpreter (`process.py`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from pipeline.child import check_extra, run_child, running_model, temporary_folder
from pipeline.engine.ways import WAYS
from pipeline.models.resolve import resolve_model
from pipeline.parity.process import TRANSFORMERS, Column, Task
from pipeline.parity.sample import MAX_STORED_TOKENS, Sample, stored_sample, take_sample
from pipeline.recipe import Recipe, ScoreSection
from pipeline.stages.contrast import untrained_pair, wanted_models
from pipeline.stages.prepare import Preparation
from pipeline.stages.score import Scorer, engine_settings
from pipeline.workers.pair_row import under_condition
from pipeline.workers.supervise import resolve_dtype
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError, MismatchError, StageError, StoreError
from weights_store.location import one_line
from weights_store.messages import logger
from weights_store.names import weights_path
from weights_store.schemas import SIDES
from weights_store.tables.metadata import ParityRecord
from weights_store.views.summary import parity_text

_log = logger(__name__)

Role = Literal["ref", "positive", "negative"]
TOLERANCE_NATS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}
"""Of the mean, by the engine's dtype. Rounding alone moves a model of eight layers by 2e-3 in float16 and 1.7e-2 in bfloat16,
in transformers too."""
MAX_FACTOR = 50
"""A single token may be off by this many times the tolerance of the mean."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


class Gap(NamedTuple):
    """One response token and its two log-probs, in nats."""

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
    """One way of the engine against transformers: |difference| of log-probs in nats over `num_tokens` tokens.

    The tokens are those of the pairs that both could score; `mean` is NaN if there are none. `percentiles` are those of
    `PERCENTILES`; `unscorable` says by pair_id why this way has no log-probs of it.
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
        """Return whether mean and maximum are within bounds; a NaN fails, and so does a comparison of nothing."""
        return self.mean <= tolerance_nats and self.max <= MAX_FACTOR * tolerance_nats


@dataclass(frozen=True)
class Parity:
    """What the check found: `agreements` by way; why other ways are `absent`; and by pair_id, what transformers cannot score.

    `scorer` is its role, model and dtype in words; `tolerance_nats` is for the mean.
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

    `tolerance_nats` is the largest mean |difference| that passes; None for that of the dtype.

    Raises:
        InputError: The recipe's inputs cannot be used, or the role's model has not been trained yet.
        MismatchError: The two have log-probs of different numbers of tokens.
        MissingExtraError: vLLM is not installed.
        StageError: A process failed, for example because transformers cannot load the model.
    """
    model_folder = resolve_model(recipe.model)
    start = Preparation.of(recipe, model_folder)
    scorer = role_scorer(recipe, model_folder, role)
    dtype = resolve_dtype(scorer.model, recipe.score.dtype)
    check_extra("vllm", recipe.score.python)
    sample = take_sample(start, num_pairs)
    if scorer.condition is not None:
        sample = replace(sample, pairs=under_condition(sample.pairs, scorer.condition, start.tokenizer))
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
        MismatchError: One way is out of bounds or could not be compared, or no way works.
    """
    if not parity.agreements:
        raise MismatchError("no way of the engine works here: " + "; ".join(parity.absent.values()))
    bound = MAX_FACTOR * parity.tolerance_nats
    for way, agreement in parity.agreements.items():
        if agreement.worst is None:
            reason = next(iter((agreement.unscorable or parity.unscorable).values()), "the sample is empty")
            raise MismatchError(f"{way}: nothing to compare, no pair has log-probs of both: {reason}")
        if not agreement.passes(parity.tolerance_nats):
            raise MismatchError(
                f"{way} differs from transformers by {agreement.mean:.2g} nats in the mean (expected at most "
                f"{parity.tolerance_nats:g}) and {agreement.max:.2g} at most (expected {bound:g}), over "
                f"{agreement.num_tokens:,} tokens; farthest apart: {agreement.worst}"
            )


# --- what is stored ----------------------------------------------------------------------------------------------------


def check_stored(
    recipe: Recipe,
    tokens: TableVersion,
    ref_logps: TableVersion,
    model_folder: Path,
    max_tokens: int = MAX_STORED_TOKENS,
) -> dict[str, ParityRecord]:
    """Compare the reference's stored log-probs with transformers in float32, on `score.parity_pairs` pairs.

    The engine's side is what the store holds, so no engine is started. If the newest version of any weight dataset of the store
    has recorded the result for the same log-probs, that is returned.

    Returns:
        What versions made from these log-probs record: `parity` with `num_pairs`, `num_tokens`, `mean`, `p99` and `max` of
        |difference| in nats, and the scorer's `dtype`. Empty if the check is off or transformers cannot run.

    Raises:
        MismatchError: They differ by more than rounding in that dtype.
    """
    recorded = _recorded(ref_logps)
    if recorded is not None:
        return {"parity": recorded}
    if not recipe.score.parity_pairs:
        return {}
    sample, stored = stored_sample(tokens, ref_logps, recipe.score.parity_pairs, max_tokens)
    if not sample.pairs:
        _log.info(f"{ref_logps}: not compared with transformers: no pair has at most {max_tokens} tokens")
        return {}
    try:
        expected = run_task(Task("transformers", str(model_folder), sample.pairs), recipe.score.python)[TRANSFORMERS]
    except StageError as error:
        _log.info(f"{ref_logps}: not compared with transformers: {one_line(error)}")
        return {}
    dtype = resolve_dtype(model_folder, recipe.score.dtype)
    found = _agreement_of_stored(sample, stored, expected, dtype)
    _log.info(f"{ref_logps} agrees with transformers: {parity_text(found)}")
    return {"parity": found}


def _recorded(ref_logps: TableVersion) -> ParityRecord | None:
    """Return what the newest version of a weight dataset recorded of these log-probs, None if none did."""
    for table in WeightStore(ref_logps.store).tables("weights"):
        with suppress(StoreError):  # another dataset may be damaged: `verify` says so, and this build does without it
            metadata = table.metadata()
            if {"role": "ref_logps", **ref_logps.as_parent()} in metadata.get("parents", []) and "parity" in metadata:
                return metadata["parity"]
    return None


def _agreement_of_stored(sample: Sample, stored: Column, expected: Column, dtype: str) -> ParityRecord:
    """Return what a version records of the comparison; a difference beyond rounding in that dtype is a `MismatchError`."""
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


def role_scorer(recipe: Recipe, model_folder: Path, role: Role) -> Scorer:
    """Return the scorer of a role; of several pairs of prompts, that of the first.

    Raises:
        InputError: Its model has not been trained yet, or a given model cannot be used.
    """
    if role == "ref":
        return Scorer(model_folder)
    if not recipe.contrast.trains:
        return untrained_pair(recipe.contrast, model_folder).scorers[role]
    uniform = WeightStore(recipe.store.uri).table(weights_path(f"{recipe.dataset.name}/uniform"))
    if uniform.exists():
        models = {
            model.side: model for model in wanted_models(recipe.contrast_settings, model_folder, uniform.reference())
        }
        folder = models[role].folder
        if folder is not None:
            return Scorer(folder)
    raise InputError(
        f"the {role} model (contrast.method {recipe.contrast.method}) is not in {recipe.store.uri} yet; train it with "
        "`tokenweights build`, or check --role ref"
    )


# --- both sides --------------------------------------------------------------------------------------------------------


def _score_both(scorer: Scorer, dtype: str, sample: Sample, settings: ScoreSection) -> tuple[Column, dict[str, Column]]:
    """Return the log-probs of transformers, and those of each way of the engine."""
    task = Task("transformers", str(scorer.model), sample.pairs)
    expected = run_task(task, settings.python)[TRANSFORMERS]
    task = replace(task, side="engine", engine=engine_settings(settings, dtype))
    return expected, run_task(replace(task, ways=list(WAYS)), settings.python)


def run_task(task: Task, python: str | None) -> dict[str, Column]:
    """Do a task in a process of its own.

    Raises:
        StageError: It failed; carries its message.
    """
    with temporary_folder("check-scorer-") as folder:
        request, columns = folder / "task.json", folder / "columns.json"
        request.write_text(json.dumps(asdict(task)), encoding="utf-8")
        what, package = f"scoring with {task.model} ({task.side})", "vllm" if task.side == "engine" else "torch"
        with running_model():
            run_child("pipeline.parity.process", [str(request), str(columns)], what, python, package=package)
        return TypeAdapter(dict[str, Column]).validate_json(columns.read_bytes())


# --- the comparison ----------------------------------------------------------------------------------------------------


def compare(sample: Sample, column: Column, expected: Column) -> Agreement:
    """Compare two scorers on the pairs of a sample that both could score.

    Raises:
        MismatchError: They have log-probs of different numbers of tokens.
    """
    gaps = list(_gaps(sample, column.logps, expected.logps))
    if not gaps:
        return Agreement(0, float("nan"), (float("nan"),) * len(PERCENTILES), None, column.unscorable)
    sizes = np.abs([gap.logp - gap.expected for gap in gaps])
    worst = gaps[int(np.argmax(sizes))]  # a NaN, if there is one
    return Agreement(
        len(gaps), float(sizes.mean()), tuple(np.percentile(sizes, PERCENTILES).tolist()), worst, column.unscorable
    )


def _gaps(
    sample: Sample, logps: Mapping[str, list[list[float]]], expected: Mapping[str, list[list[float]]]
) -> Iterator[Gap]:
    for pair in [pair for pair in sample.pairs if pair.pair_id in logps and pair.pair_id in expected]:
        pair_id = pair.pair_id
        sides = zip(SIDES, (pair.chosen_ids, pair.rejected_ids), logps[pair_id], expected[pair_id], strict=True)
        for side, ids, got, wanted in sides:
            if not len(ids) == len(got) == len(wanted):
                raise MismatchError(
                    f"pair {pair_id}, {side}: {len(ids)} tokens, {len(got)} log-probs by the engine and {len(wanted)} by "
                    "transformers"
                )
            for position, (token_id, one, other) in enumerate(zip(ids, got, wanted, strict=True)):
                yield Gap(pair_id, side, position, token_id, one, other)


# --- in words ----------------------------------------------------------------------------------------------------------


def parity_lines(parity: Parity) -> list[str]:
    """Return what the check found as lines of text: a table with a row for each way, and the worst token of each."""
    sample, bound = parity.sample, MAX_FACTOR * parity.tolerance_nats
    lines = [
        f"{len(sample.pairs)} pairs, {sample.num_tokens():,} response tokens, of {sample.origin}",
        f"scorer {parity.scorer} against transformers in float32",
        f"|difference| in nats; passes with a mean of at most {parity.tolerance_nats:g} and {bound:g} for any token",
        "",
    ]
    heads = ["way", "mean", *(f"{percentile:g} %" for percentile in PERCENTILES), "max", "tokens", "not scored", ""]
    rows = [heads]
    for way, agreement in parity.agreements.items():
        numbers = [f"{number:.1e}" for number in (agreement.mean, *agreement.percentiles, agreement.max)]
        verdict = "passes" if agreement.passes(parity.tolerance_nats) else "FAILS"
        rows.append([way, *numbers, f"{agreement.num_tokens:,}", str(len(agreement.unscorable)), verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    widths[0] = max(widths[0], *map(len, WAYS))
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{way.ljust(widths[0])}  not here: {reason}" for way, reason in parity.absent.items()]
    lines.append("")
    for way, agreement in parity.agreements.items():
        lines.append(f"farthest off by {way}: {agreement.worst or 'nothing to compare'}")
        lines += _not_scored(way, agreement.unscorable)
    return lines + _not_scored("transformers", parity.unscorable)


def _not_scored(by: str, reasons: Mapping[str, str]) -> list[str]:
    return [f"not scored by {by}: pair {pair_id}: {reason}" for pair_id, reason in islice(reasons.items(), 3)]
