"""Laws that rows must obey by themselves, whatever they were made from.

`violations` checks all laws of a kind of table, for `verify`. `train/data/stored_pairs.py` and `pipeline/stages/publish.py`
check some of them one by one. Each law looks at all values of a column at once, and describes only the first bad row.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from weights_store.schemas import SIDES, Reason
from weights_store.tables.metadata import ScorerRecord

_OPTIONAL = {"prompts": "prompt_attribution", "activations": "activations", "contexts": "contexts"}
"""Optional columns of attributions: setting of the scorer, and name of the columns after the side."""
_MASS_ROUNDING = 1e-3
"""How much the probabilities of k tokens may add up to above 1: log-probs are stored with a relative error of 1.2e-4."""
_LOGP_ROUNDING_NATS = 1e-3
"""Log-probs above 0 by less than this come from the rounding of a log-softmax."""

_Mask = NDArray[np.bool_]
_Numbers = NDArray[np.float32] | NDArray[np.int32]


class Violation(NamedTuple):
    """One law broken by one column."""

    column: str
    row: int  # the first such row
    problem: str  # of that row
    num_rows: int


class Law(NamedTuple):
    """What every number of a column must be."""

    holds: Callable[[_Numbers], _Mask]
    expected: str


LOGP = Law(lambda values: np.isfinite(values) & (values <= 0), "expected a finite number <= 0")
ROUNDED_LOGP = Law(lambda values: np.isfinite(values) & (values <= _LOGP_ROUNDING_NATS), LOGP.expected)
WEIGHT = Law(lambda values: np.isfinite(values) & (values >= 0), "expected a finite number >= 0")
SIZE = Law(lambda values: np.isfinite(values) & (values > 0), "expected a finite number > 0")
FINITE = Law(lambda values: np.isfinite(values), "expected a finite number")

_LAWS = {"logps": LOGP, "activations": SIZE, "contexts": FINITE}
_LAWS |= dict.fromkeys(("weights", "weight", "attributions", "attribution", "values", "value"), WEIGHT)
"""The law of a column, by the last word of its name."""
_ONE_PER = {
    "token_weights": "ids",
    "logps": "ids",
    "ref_logps": "ids",
    "top_logps": "top_ids",
    "ref_top_logps": "ref_top_ids",
    "activations": "attributions",
}
"""Columns with one number for each value of another column, named without the prefix `chosen_`, `rejected_` or `anchor_`."""


def id_law(vocab_size: int | None) -> Law:
    """Return the law of token ids; a vocabulary of None is of unknown size."""
    if vocab_size is None:
        return Law(lambda values: values >= 0, "expected an id >= 0")
    return Law(lambda values: (values >= 0) & (values < vocab_size), f"expected an id in 0..{vocab_size - 1}")


def violations(
    kind: str, rows: pa.Table, key: tuple[str, ...], vocab_size: int | None, scorer: ScorerRecord | None = None
) -> Iterator[Violation]:
    """Yield each law that `rows`, one row group of a kind of table, break, with the first row that breaks it.

    Ids must be below `vocab_size`, None if the table does not record it. `scorer` says which optional columns hold values; if
    it is None, the first row decides.
    """
    for name in key:
        for found in null(rows, name):
            yield found._replace(problem=f"{found.problem} in row {found.row} of the row group")
    laws = _LAWS | {"ids": id_law(vocab_size)}
    for name in rows.column_names:
        if name == "prompt_ids" or (kind, name) == ("anchors", "anchor_ids"):
            yield from empty(rows, name)
        side, _, values = name.partition("_")
        of = f"{side}_{_ONE_PER.get(values)}"
        if of in rows.column_names:
            yield from wrong_lengths(rows, name, of, may_be_null=values == "activations")
        if law := laws.get(name.rpartition("_")[2]):
            yield from bad_values(rows, name, law)
    if kind in ("tokens", "weights"):
        yield from no_response(rows)
    match kind:
        case "logps":
            yield from _top_laws(rows, "", scorer)
        case "attributions":
            for option, column in _OPTIONAL.items():
                wanted = None if scorer is None else bool(scorer.get(option, False))
                yield from _partly_null(rows, [f"{side}_{column}" for side in SIDES], wanted)
            yield from _context_laws(rows, scorer)
        case "annotations":
            yield from _partly_null(rows, [f"{side}_values" for side in SIDES], None)
            yield from _partly_null(rows, ["pair_value"], None)
        case "weights":
            yield from _top_laws(rows, "ref_", scorer)
        case "quarantine":
            known = pc.is_in(rows["reason"], value_set=pa.array([reason.value for reason in Reason]))
            for row, num_rows in _first(~_mask(known)):
                problem = f"reason {rows['reason'][row].as_py()!r} is none of the known ones"
                yield Violation("reason", row, problem, num_rows)


def _partly_null(rows: pa.Table, names: list[str], wanted: bool | None) -> Iterator[Violation]:
    """Check columns that hold a value in every row of a table or in none, the same for both sides."""
    is_null = np.stack([_nulls(rows[name]) for name in names], axis=1)
    if not is_null.size:
        return
    wanted = not is_null[0, 0] if wanted is None else wanted
    found, expected = ("null", "a value") if wanted else ("there", "null")
    for row, num_rows in _first((is_null == wanted).any(1)):
        name = names[int((is_null[row] == wanted).argmax())]
        problem = f"{name} is {found}, expected {expected}: a table has them for all responses or for none"
        yield Violation(name, row, problem, num_rows)


def _context_laws(rows: pa.Table, scorer: ScorerRecord | None) -> Iterator[Violation]:
    """Check that there are equally many numbers for each response token."""
    columns = [(f"{side}_attributions", f"{side}_contexts") for side in SIDES]
    num_contexts = 0 if scorer is None else scorer.get("contexts", 0)
    if scorer is None:
        num_contexts = next((n for of_tokens, values in columns if (n := _first_per_token(rows, of_tokens, values))), 0)
    for of_tokens, values in columns if num_contexts else ():
        yield from wrong_lengths(rows, values, of_tokens, per_token=num_contexts, may_be_null=True)


def _top_laws(rows: pa.Table, of: str, scorer: ScorerRecord | None) -> Iterator[Violation]:
    """Check the k most likely tokens at each position; `of` is `ref_` in weights and empty in logps."""
    columns = [(f"{side}_{of}logps", f"{side}_{of}top_logps") for side in SIDES]
    if scorer is None:
        top_k = next((k for of_tokens, logps in columns if (k := _first_per_token(rows, of_tokens, logps))), 0)
    else:
        top_k = scorer.get("top_k", 0)
    for of_tokens, logps in columns:
        wrong = list(wrong_lengths(rows, logps, of_tokens, per_token=top_k))
        yield from wrong or _bad_positions(rows, logps, top_k)


def _first_per_token(rows: pa.Table, of_tokens: str, logps: str) -> int:
    """Return how many values the first row that has any has for each token, 0 if none has."""
    num_tokens, num_listed = _lengths(rows[of_tokens]), _lengths(rows[logps])
    listed = np.flatnonzero((num_tokens > 0) & (num_listed > 0))
    return int(num_listed[listed[0]] // num_tokens[listed[0]]) if listed.size else 0


def _bad_positions(rows: pa.Table, name: str, top_k: int) -> Iterator[Violation]:
    """Check that the k log-probs at each position fall, and that their probabilities sum to at most 1."""
    if top_k == 0:
        return
    positions = np.asarray(rows[name].combine_chunks().flatten()).astype(np.float64).reshape(-1, top_k)
    # Capped at 1.0, so that exp does not overflow: that is too much anyway.
    too_likely = np.exp(np.minimum(positions, 1.0)).sum(1) > 1 + _MASS_ROUNDING
    bad = np.flatnonzero(too_likely | (positions[:, 1:] > positions[:, :-1]).any(1))
    if bad.size:
        row, position, num_rows = _locate(bad, _lengths(rows[name]) // top_k)
        listed = ", ".join(f"{logp:g}" for logp in positions[bad[0]])
        expected = "expected falling log-probs whose probabilities sum to 1 at most"
        yield Violation(name, row, f"{name} of response token {position} are {listed}, {expected}", num_rows)


# --- single laws -------------------------------------------------------------------------------------------------------


def null(rows: pa.Table, name: str) -> Iterator[Violation]:
    """Yield a violation if a column has a null."""
    if num_nulls := rows[name].null_count:
        yield Violation(name, int(_nulls(rows[name]).argmax()), f"{name} is null", num_nulls)


def empty(rows: pa.Table, name: str) -> Iterator[Violation]:
    """Yield a violation if a list is empty."""
    for row, num_rows in _first(_lengths(rows[name]) == 0):
        yield Violation(name, row, f"{name} is empty, expected at least one token", num_rows)


def no_response(rows: pa.Table) -> Iterator[Violation]:
    """Yield a violation if a row has a response on neither side; an unpaired row has one on the side of its label."""
    for name in (f"{side}_ids" for side in SIDES):
        yield from null(rows, name)
    both = sum(_lengths(rows[f"{side}_ids"]) for side in SIDES)
    for row, num_rows in _first(np.asarray(both) == 0):
        yield Violation(
            "chosen_ids", row, "chosen_ids and rejected_ids are empty, expected tokens in one of them", num_rows
        )


def wrong_lengths(
    rows: pa.Table, values: str, ids: str, *, per_token: int | None = None, may_be_null: bool = False
) -> Iterator[Violation]:
    """Yield a violation if a list has not one value per id, or not `per_token` of them.

    A null list belongs to a null list; with `may_be_null` or 0 values per token it is always allowed.
    """
    found, num_tokens, is_null = _lengths(rows[values]), _lengths(rows[ids]), _nulls(rows[values])
    wrong = found != num_tokens * (1 if per_token is None else per_token)
    if may_be_null:
        wrong &= ~is_null
    elif per_token is None:
        wrong |= is_null != _nulls(rows[ids])
    elif per_token:
        wrong |= is_null
    for row, num_rows in _first(wrong):
        here = "no" if per_token is not None and is_null[row] else found[row]
        tail = "" if per_token is None else f", expected {per_token} for each"
        yield Violation(values, row, f"{here} {values} for {num_tokens[row]} {ids}{tail}", num_rows)


def bad_values(rows: pa.Table, name: str, law: Law) -> Iterator[Violation]:
    """Yield a violation if a number breaks a law; the column holds numbers or lists of them, and nulls are skipped."""
    column = rows[name].combine_chunks()
    is_list = not pa.types.is_primitive(column.type)
    values = np.asarray(column.flatten() if is_list else column.drop_null())
    bad = np.flatnonzero(~law.holds(values))
    if bad.size:
        lengths = _lengths(rows[name]) if is_list else (~_nulls(rows[name])).astype(np.int64)
        row, position, num_rows = _locate(bad, lengths)
        where = f"{name}[{position}]" if is_list else name
        yield Violation(name, row, f"{where} is {values[bad[0]]}, {law.expected}", num_rows)


def _locate(bad: NDArray[np.intp], lengths: NDArray[np.int64]) -> tuple[int, int, int]:
    """Return the row of the first bad value, its position there, and how many rows have a bad one.

    `bad` are indices into the flat values of all rows; each row has `lengths` of them.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bad_rows = np.searchsorted(offsets, bad, side="right") - 1  # the last of equal offsets: empty lists hold nothing
    return int(bad_rows[0]), int(bad[0] - offsets[bad_rows[0]]), int(np.unique(bad_rows).size)


def _first(bad: _Mask) -> list[tuple[int, int]]:
    """Return the first bad row and how many there are; nothing if there is none."""
    return [(int(bad.argmax()), int(bad.sum()))] if bad.any() else []


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(column).combine_chunks().fill_null(0)).astype(np.int64)


def _nulls(column: pa.ChunkedArray) -> _Mask:
    return _mask(column.is_null())


def _mask(column: pa.ChunkedArray) -> _Mask:
    return np.asarray(column.combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)
