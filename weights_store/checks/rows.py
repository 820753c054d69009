"""Laws that the rows of one row group must obey by themselves, whatever they were made from.

Vectorised over the flat values of a column; only the first bad row of each law is put into words.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from weights_store.schemas import Reason

_SIDES = ("chosen", "rejected")
_SCORED_BY = {"logps": "", "weights": "ref_"}
"""What stands between the side and the rest in the names of columns that may come with likeliest tokens."""
_ON_REQUEST = {"prompts": "prompt_attribution", "activations": "activations"}
"""What attributions hold on request: setting of the scorer to the columns' name behind the side."""
_MASS_ROUNDING = 1e-3
"""The probabilities of k tokens may add up to this much more than 1: their log-probs are stored to a relative 1.2e-4."""
_Mask = NDArray[np.bool_]


class Violation(NamedTuple):
    """One law broken in one row group."""

    row: int  # the first such row
    problem: str  # of that row
    num_rows: int


def violations(
    kind: str,
    rows: pa.Table,
    key: tuple[str, ...],
    vocab_size: int | None,
    scorer: Mapping[str, Any] | None = None,
) -> Iterator[Violation]:
    """Yield each law that `rows` break, with the first row that breaks it.

    Args:
        kind: Kind of table, see `schemas.KEYS`.
        rows: One row group, all columns.
        key: The table's key columns.
        vocab_size: Upper end of ids, None where the table records none.
        scorer: What made the numbers, as the table's commit says it: which optional columns hold values (`top_k`, how many
            likeliest tokens at each place; `prompts`; `activations`). None where no commit does: the first row decides.
    """
    found = [_null(rows, name) for name in key] + _LAWS[kind](rows, vocab_size)
    if kind in _SCORED_BY:
        found += _top_laws(rows, _SCORED_BY[kind], vocab_size, None if scorer is None else scorer.get("top_k", 0))
    if kind == "attributions":
        found += [_partly_null(rows, option, scorer) for option in _ON_REQUEST]
    yield from (violation for violation in found if violation is not None)


def _token_laws(rows: pa.Table, vocab_size: int | None) -> list[Violation | None]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [_empty(rows, name) for name in names] + [_outside(rows, name, vocab_size) for name in names]


def _logp_laws(rows: pa.Table, _: int | None) -> list[Violation | None]:
    return [_bad_values(rows, f"{side}_logps", _is_logp, _LOGP) for side in _SIDES]


def _attribution_laws(rows: pa.Table, _: int | None) -> list[Violation | None]:
    found: list[Violation | None] = []
    for side in _SIDES:
        activations = f"{side}_activations"
        found.append(_bad_values(rows, f"{side}_attributions", _is_weight, _WEIGHT))
        found.append(_bad_number(rows, f"{side}_prompt_attribution", may_be_null=True))
        found.append(_bad_values(rows, activations, _is_size, _SIZE))
        found.append(_bad_lengths(rows, activations, f"{side}_attributions", may_be_null=True))
    return found


def _partly_null(rows: pa.Table, option: str, scorer: Mapping[str, Any] | None) -> Violation | None:
    """Look at columns that hold a value in every row of a table or in none, both sides alike."""
    names = [f"{side}_{_ON_REQUEST[option]}" for side in _SIDES]
    is_null = np.stack([_nulls(rows[name]) for name in names], axis=1)
    if not is_null.size:
        return None
    wanted = not is_null[0, 0] if scorer is None else bool(scorer.get(option, False))

    def describe(row: int) -> str:
        name, found = names[int((is_null[row] == wanted).argmax())], "null" if wanted else "there"
        return f"{name} is {found}, expected {'a value' if wanted else 'null'}: a table has them for all responses or for none"

    return _first((is_null == wanted).any(1), describe)


def _anchor_laws(rows: pa.Table, vocab_size: int | None) -> list[Violation | None]:
    return [
        _empty(rows, "anchor_ids"),
        _outside(rows, "anchor_ids", vocab_size),
        _bad_lengths(rows, "anchor_logps", "anchor_ids"),
        _bad_values(rows, "anchor_logps", _is_logp, _LOGP),
    ]


def _top_laws(rows: pa.Table, scorer: str, vocab_size: int | None, top_k: int | None) -> list[Violation | None]:
    """Look at the likeliest tokens, where a table has columns for them: one written before does not."""
    columns = [(f"{side}_{scorer}logps", f"{side}_{scorer}top_ids", f"{side}_{scorer}top_logps") for side in _SIDES]
    if not {name for names in columns for name in names} <= set(rows.column_names):
        return []
    if top_k is None:
        top_k = next((k for of_tokens, _, logps in columns if (k := _first_top_k(rows, of_tokens, logps))), 0)
    found: list[Violation | None] = []
    for of_tokens, ids, logps in columns:
        found += [_outside(rows, ids, vocab_size), _bad_values(rows, logps, _is_logp, _LOGP)]
        wrong = _bad_top_lengths(rows, of_tokens, logps, top_k)
        found += [_bad_lengths(rows, logps, ids), wrong or _bad_places(rows, logps, top_k)]
    return found


def _first_top_k(rows: pa.Table, of_tokens: str, logps: str) -> int:
    """Return how many likeliest tokens the first list of any has for each token of its response; 0 where there is none."""
    num_tokens, num_listed = _lengths(rows[of_tokens]), _lengths(rows[logps])
    listed = np.flatnonzero((num_tokens > 0) & (num_listed > 0))
    return int(num_listed[listed[0]] // num_tokens[listed[0]]) if listed.size else 0


def _bad_top_lengths(rows: pa.Table, of_tokens: str, logps: str, top_k: int) -> Violation | None:
    num_tokens, num_listed, is_null = _lengths(rows[of_tokens]), _lengths(rows[logps]), _nulls(rows[logps])

    def describe(row: int) -> str:
        found = "no" if is_null[row] else num_listed[row]
        return f"{found} {logps} for {num_tokens[row]} {of_tokens}, expected {top_k} for each"

    return _first((num_listed != top_k * num_tokens) | (is_null & (top_k > 0)), describe)


def _bad_places(rows: pa.Table, name: str, top_k: int) -> Violation | None:
    """Look at whole lists of the k likeliest: they fall, and are no more than certain together."""
    if top_k == 0:
        return None
    places = np.asarray(rows[name].combine_chunks().flatten()).astype(np.float64).reshape(-1, top_k)
    too_likely = (
        np.exp(np.minimum(places, 1.0)).sum(1) > 1 + _MASS_ROUNDING
    )  # nothing overflows, and 1.0 is too much anyway
    bad = np.flatnonzero(too_likely | (places[:, 1:] > places[:, :-1]).any(1))
    if not bad.size:
        return None
    row, place, num_rows = _locate(bad, _lengths(rows[name]) // top_k)
    listed = ", ".join(f"{logp:g}" for logp in places[bad[0]])
    problem = f"{name} of response token {place} are {listed}, expected falling log-probs whose probabilities sum to 1 at most"
    return Violation(row, problem, num_rows)


def _weight_laws(rows: pa.Table, vocab_size: int | None) -> list[Violation | None]:
    found = _token_laws(rows, vocab_size)
    for side in _SIDES:
        for values in (f"{side}_token_weights", f"{side}_ref_logps"):
            found.append(_bad_lengths(rows, values, f"{side}_ids"))
        found.append(_bad_values(rows, f"{side}_token_weights", _is_weight, _WEIGHT))
        found.append(_bad_values(rows, f"{side}_ref_logps", _is_logp, _LOGP))
    found.append(_bad_lengths(rows, "anchor_ref_logps", "anchor_ids"))
    found.append(_outside(rows, "anchor_ids", vocab_size))
    found.append(_bad_values(rows, "anchor_ref_logps", _is_logp, _LOGP))
    found.append(_bad_number(rows, "pair_weight"))
    return found


def _quarantine_laws(rows: pa.Table, _: int | None) -> list[Violation | None]:
    reasons = rows["reason"].combine_chunks()
    known = pc.is_in(reasons, value_set=pa.array([reason.value for reason in Reason]))
    unknown = ~np.asarray(known.to_numpy(zero_copy_only=False), dtype=bool)
    return [_first(unknown, lambda row: f"reason {reasons[row].as_py()!r} is none of the known ones")]


_LAWS: dict[str, Callable[[pa.Table, int | None], list[Violation | None]]] = {
    "tokens": _token_laws,
    "logps": _logp_laws,
    "attributions": _attribution_laws,
    "anchors": _anchor_laws,
    "weights": _weight_laws,
    "quarantine": _quarantine_laws,
}
_LOGP = "expected a finite number <= 0"
_WEIGHT = "expected a finite number >= 0"
_SIZE = "expected a finite number > 0"


def _is_logp(values: NDArray[Any]) -> _Mask:
    return np.isfinite(values) & (values <= 0)


def _is_weight(values: NDArray[Any]) -> _Mask:
    return np.isfinite(values) & (values >= 0)


def _is_size(values: NDArray[Any]) -> _Mask:
    return np.isfinite(values) & (values > 0)


def _null(rows: pa.Table, name: str) -> Violation | None:
    return _first(_nulls(rows[name]), lambda row: f"{name} is null in row {row} of the row group")


def _empty(rows: pa.Table, name: str) -> Violation | None:
    return _first(_lengths(rows[name]) == 0, lambda row: f"{name} is empty, expected at least one token")


def _outside(rows: pa.Table, name: str, vocab_size: int | None) -> Violation | None:
    def is_id(values: NDArray[Any]) -> _Mask:
        return (values >= 0) if vocab_size is None else (values >= 0) & (values < vocab_size)

    expected = "expected an id >= 0" if vocab_size is None else f"expected an id in 0..{vocab_size - 1}"
    return _bad_values(rows, name, is_id, expected)


def _bad_lengths(rows: pa.Table, values: str, ids: str, may_be_null: bool = False) -> Violation | None:
    left, right, is_null = _lengths(rows[values]), _lengths(rows[ids]), _nulls(rows[values])
    unequal = ~is_null & (left != right) if may_be_null else (left != right) | (is_null != _nulls(rows[ids]))
    return _first(unequal, lambda row: f"{left[row]} {values} for {right[row]} {ids}")


def _bad_number(rows: pa.Table, name: str, may_be_null: bool = False) -> Violation | None:
    """Look at a column with one number >= 0 per row."""
    numbers = np.asarray(rows[name].combine_chunks().fill_null(np.nan))
    bad = ~_is_weight(numbers) & ~(_nulls(rows[name]) & may_be_null)
    return _first(bad, lambda row: f"{name} is {numbers[row]}, {_WEIGHT}")


def _bad_values(rows: pa.Table, name: str, is_good: Callable[[NDArray[Any]], _Mask], expected: str) -> Violation | None:
    values = np.asarray(rows[name].combine_chunks().flatten())
    bad = np.flatnonzero(~is_good(values))
    if not bad.size:
        return None
    row, place, num_rows = _locate(bad, _lengths(rows[name]))
    return Violation(row, f"{name}[{place}] is {values[bad[0]]}, {expected}", num_rows)


def _locate(bad: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[int, int, int]:
    """Return the row of the first bad value and its place there, of values that lie flat; and how many rows have any."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bad_rows = np.searchsorted(offsets, bad, side="right") - 1  # the last of equal offsets: empty lists hold nothing
    return int(bad_rows[0]), int(bad[0] - offsets[bad_rows[0]]), int(np.unique(bad_rows).size)


def _first(bad: _Mask, describe: Callable[[int], str]) -> Violation | None:
    row = int(bad.argmax()) if bad.size else 0
    return Violation(row, describe(row), int(bad.sum())) if bad.any() else None


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(column).combine_chunks().fill_null(0)).astype(np.int64)


def _nulls(column: pa.ChunkedArray) -> _Mask:
    return np.asarray(column.is_null().combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)
