"""Reads raw preference rows from a file, a saved dataset or the hub, one at a time.

A line that is not JSON or not UTF-8 becomes a `RawRow` with a reason, so that one bad line does not stop a build. That is why
JSON lines in local files are read here and not with `datasets`.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.recipe import DatasetSection
from weights_store.errors import InputError
from weights_store.messages import first_line
from weights_store.schemas import Reason

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ROWS_CHECKED = 100
"""The response columns must be in one of the first rows of a JSON lines file, this many."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of the source: either its `value`, or the `reason` why it cannot be read."""

    source_row: int
    value: dict[str, object] | None
    reason: Reason | None = None
    detail: str = ""
    raw: str = ""
    """The text of the row, if the source is text."""
    split: str = ""
    """Filled in by `splits.py`."""


def load_rows(dataset: DatasetSection) -> Iterator[RawRow]:
    """Return the rows of the recipe's dataset in their order, at most `max_pairs`.

    Raises:
        InputError: No such file, folder or hub dataset, an unknown kind of file, or a column that is not there.
    """
    path = Path(dataset.source)
    if path.is_dir() or is_hub_id(dataset.source):
        rows = _with_library(path, dataset)
    elif not path.is_file():
        raise InputError(f"dataset.source {path} does not exist; give a file, a saved dataset folder or a hub id")
    elif path.suffix not in _READERS:
        expected = ", ".join(_READERS)
        raise InputError(f"dataset.source {path}: unknown kind of file {path.suffix!r}, expected one of {expected}")
    else:
        rows = _READERS[path.suffix](path, dataset)
    return islice(rows, dataset.max_pairs)


def is_hub_id(source: str) -> bool:
    """Return whether a source is on the hub: it reads `owner/name`, is not a path here, and does not end like a file."""
    path = Path(source)
    return _HUB_ID.fullmatch(source) is not None and path.suffix not in _READERS and not path.exists()


def _json_lines(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    with path.open("rb") as file:
        # Binary iteration splits at \n only, so a broken character cannot shift the rows after it.
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        rows = (_parse_line(index, line) for index, line in enumerate(line for line in file if line.strip()))
        first = list(islice(rows, _ROWS_CHECKED))
        _check_columns([row.value for row in first if row.value is not None], dataset)
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
    return RawRow(index, value, raw=raw) if isinstance(value, dict) else _no_object(index, value, raw)


def _no_object(index: int, value: object, raw: str) -> RawRow:
    return RawRow(index, None, Reason.UNPARSABLE_JSON, f"a {type(value).__name__}, expected an object", raw)


def _json_file(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"dataset.source {path} is not valid JSON: {error}; one object per line needs the ending .jsonl"
        ) from error
    if not isinstance(values, list):
        raise InputError(f"dataset.source {path}: expected a JSON array of rows, got a {type(values).__name__}")
    _check_columns([value for value in values if isinstance(value, dict)], dataset)
    for index, value in enumerate(values):
        yield RawRow(index, value) if isinstance(value, dict) else _no_object(index, value, str(value))


def _parquet(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"dataset.source {path} is not a Parquet file: {first_line(error)}") from error
    _check_columns([dict.fromkeys(file.schema_arrow.names)], dataset)
    rows = (batch.slice(at, 1) for batch in file.iter_batches(batch_size=1000) for at in range(batch.num_rows))
    for index, row in enumerate(rows):
        try:
            yield RawRow(index, row.to_pylist()[0])
        except UnicodeDecodeError as error:
            yield RawRow(index, None, Reason.INVALID_UTF8, str(error))


def _with_library(path: Path, dataset: DatasetSection) -> Iterator[RawRow]:
    """Read an Arrow file, a dataset folder or a hub dataset with `datasets`."""
    import datasets

    problem = f"{dataset.source!r} is no file here and could not be loaded from the hub"
    try:
        if path.is_file():
            problem = f"{path} is not an Arrow file of `datasets`"
            loaded = datasets.Dataset.from_file(str(path))
        elif path.is_dir():
            problem = f"{path}: no dataset with split {dataset.split!r} in this folder"
            if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(path))
                loaded = loaded[dataset.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                loaded = datasets.load_dataset(str(path), dataset.config, split=dataset.split)
        else:
            options = dataset.model_dump(include={"data_dir", "split", "revision", "streaming"})
            loaded = datasets.load_dataset(dataset.source, dataset.config, **options)
    except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset.source {problem}: {first_line(error)}") from error
    if loaded.column_names is not None:  # a stream may not know its columns
        _check_columns([dict.fromkeys(loaded.column_names)], dataset)
    return (RawRow(index, value) for index, value in enumerate(loaded))


def _check_columns(rows: Sequence[Mapping[str, object]], dataset: DatasetSection) -> None:
    """Check that some row has each response column; a single row without it goes to quarantine later."""
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
    ".arrow": _with_library,
}
