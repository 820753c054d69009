"""Read raw preference rows from a file, a saved dataset or the hub, one at a time.

A line that is no JSON or no UTF-8 becomes a `RawRow` with a reason instead of an exception, so that one bad line does not
stop a build; that is why local JSON lines are read here and not with `datasets`.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.models.resolve import is_hub_id
from pipeline.recipe import DatasetSection
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint_file
from weights_store.messages import first_line
from weights_store.schemas import Reason

_ROWS_CHECKED = 100
"""Rows of a JSON lines file in which the response columns must show up."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it came: either `value` or a `reason` why it could not be read."""

    source_row: int
    value: dict[str, Any] | None
    reason: Reason | None = None
    detail: str = ""
    raw: str = ""


def load_rows(dataset: DatasetSection) -> Iterator[RawRow]:
    """Yield the rows of the recipe's dataset in their order, at most `max_pairs`.

    Raises:
        InputError: No such file, folder or hub dataset, an unknown kind of file, or a column that is not there.
    """
    for row in _rows(dataset):
        if dataset.max_pairs is not None and row.source_row >= dataset.max_pairs:
            return
        yield row


def content_fingerprint(dataset: DatasetSection) -> str | None:
    """Return the SHA-256 of a local file's bytes; None for what has no single file (folders, hub ids)."""
    path = Path(dataset.source)
    return fingerprint_file(path) if path.is_file() else None


def _rows(dataset: DatasetSection) -> Iterator[RawRow]:
    path = Path(dataset.source)
    if path.is_dir():
        return _saved_dataset(path, dataset)
    if is_hub_id(dataset.source):
        return _hub(dataset)
    if not path.is_file():
        raise InputError(f"dataset.source {path} does not exist; give a file, a saved dataset folder or a hub id")
    if path.suffix not in _READERS:
        raise InputError(
            f"dataset.source {path}: unknown kind of file {path.suffix!r}, expected one of {', '.join(_READERS)}"
        )
    return _READERS[path.suffix](path, dataset)


def _json_lines(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    with path.open("rb") as file:
        # Binary iteration splits at \n only, so a broken character cannot shift the rows behind it.
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        rows = (_parse_line(index, line) for index, line in enumerate(line for line in file if line.strip()))
        first = list(islice(rows, _ROWS_CHECKED))
        check_columns([row.value for row in first if row.value is not None], dataset)
        yield from first
        yield from rows


def _parse_line(index: int, line: bytes) -> RawRow:
    raw = line.decode("utf-8", "replace").strip()
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(index, None, Reason.INVALID_UTF8, f"byte {error.start}: {error.reason}", raw)
    except (ValueError, RecursionError) as error:
        return RawRow(index, None, Reason.UNPARSABLE_JSON, str(error), raw)
    if not isinstance(value, dict):
        return RawRow(index, None, Reason.UNPARSABLE_JSON, f"a {type(value).__name__}, expected an object", raw)
    return RawRow(index, value, raw=raw)


def _json_file(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"dataset.source {path} is not valid JSON: {error}; one object per line needs the ending .jsonl"
        ) from error
    if not isinstance(values, list):
        raise InputError(f"dataset.source {path}: expected a JSON array of rows, got a {type(values).__name__}")
    check_columns([value for value in values if isinstance(value, dict)], dataset)
    for index, value in enumerate(values):
        if isinstance(value, dict):
            yield RawRow(index, value)
        else:
            yield RawRow(
                index, None, Reason.UNPARSABLE_JSON, f"a {type(value).__name__}, expected an object", str(value)
            )


def _parquet(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"dataset.source {path} is not a Parquet file: {first_line(error)}") from error
    check_columns([dict.fromkeys(file.schema_arrow.names)], dataset)
    index = 0
    for batch in file.iter_batches(batch_size=1000):
        for position in range(batch.num_rows):
            row = batch.slice(position, 1)
            try:
                yield RawRow(index, row.to_pylist()[0])
            except UnicodeDecodeError as error:
                yield RawRow(index, None, Reason.INVALID_UTF8, str(error))
            index += 1


def _arrow(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    from datasets import Dataset

    try:
        loaded = Dataset.from_file(str(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"dataset.source {path} is not an Arrow file of `datasets`: {first_line(error)}") from error
    return _checked(loaded, dataset)


def _saved_dataset(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    import datasets

    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[dataset.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(str(path), dataset.config, split=dataset.split)
    except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"dataset.source {path}: no dataset with split {dataset.split!r} in this folder: {first_line(error)}"
        ) from error
    return _checked(loaded, dataset)


def _hub(dataset: DatasetSection) -> Iterator[RawRow]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(
            dataset.source,
            dataset.config,
            data_dir=dataset.data_dir,
            split=dataset.split,
            revision=dataset.revision,
            streaming=dataset.streaming,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        raise InputError(
            f"dataset.source {dataset.source!r} is no file here and could not be loaded from the hub: {first_line(error)}"
        ) from error
    return _checked(loaded, dataset)


def _checked(loaded: Any, dataset: DatasetSection) -> Iterator[RawRow]:
    names = loaded.column_names
    if names is not None:  # a stream may not know its columns
        check_columns([dict.fromkeys(names)], dataset)
    for index, value in enumerate(loaded):
        yield RawRow(index, value)


def check_columns(rows: Sequence[dict[str, Any]], dataset: DatasetSection) -> None:
    """Check that each response column is there in some row; a single row without it is a matter for quarantine.

    Raises:
        InputError: One is in none of `rows`; names the columns that are.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    for setting in ("chosen_column", "rejected_column"):
        column = getattr(dataset, setting)
        if rows and column not in names:
            raise InputError(
                f"dataset.source {dataset.source} has no column {column!r}; it has {', '.join(names)}. "
                f"Set dataset.{setting}"
            )


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
