"""Opens the source of a recipe: a file, a saved dataset folder or a hub dataset.

What the values mean is decided in `columns.py` and `pairs.py`.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.dataset_section import DatasetSection
from pipeline.source.arrow_files import arrow, arrow_source, parquet
from pipeline.source.json_files import check_encoding, json_array, json_lines
from pipeline.source.rows import RawRow, Source, checked_size, joined
from weights_store.allowed import check_place
from weights_store.errors import InputError
from weights_store.messages import first_line, logger

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_log = logger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_ENDINGS = (
    ".gz",
    ".zip",
    ".zst",
    ".xz",
    ".bz2",
    ".csv",
    ".tsv",
    ".txt",
    ".xlsx",
    ".feather",
    ".pq",
    ".pkl",
    ".arrows",
)
"""Endings of files that are not read: a source that ends like this is a file in the wrong format, and no hub dataset."""
_HUB_TIMEOUT_S = 5.0
_LOOKED_AT_OF_A_STREAM = 1000
_FIRST_BYTES = {
    b"\x1f\x8b": ("a gzip file", ".gz", "add .gz to its name"),
    b"PAR1": ("a Parquet file", ".parquet", "give it the ending .parquet"),
    b"ARROW1": ("an Arrow file", ".arrow", "give it the ending .arrow"),
    b"PK\x03\x04": ("a zip archive", None, "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", None, "unpack it with zstd -d"),
    b"version https://git-lfs": ("a git-LFS pointer, not the file itself", None, "fetch the file with git lfs pull"),
}
"""How some files begin: what they are, their ending, and what to do if they have another one."""


def open_source(dataset: DatasetSection) -> Source:
    """Open the source of a recipe's dataset.

    Raises:
        InputError: No such file, folder or hub dataset, or a file that cannot be read.
    """
    path = Path(dataset.source)
    if len(dataset.splits) > 1 and path.is_file():
        raise InputError(
            f"dataset.split names {', '.join(dataset.splits)}, but dataset.source {path} is a file, which has one split; name "
            "the column that holds the split of each row in dataset.split_column, or give a saved or hub dataset"
        )
    return joined(dataset.source, [_open_split(path, dataset, split) for split in dataset.splits])


def _open_split(path: Path, dataset: DatasetSection, split: str) -> Source:
    if path.is_file():
        source = _open_file(path)
    elif path.is_dir() or is_hub_id(dataset.source):
        source = _with_library(path, dataset, split)
    else:
        raise InputError(
            f"dataset.source {path} does not exist{_nearest_file(path)}; give a file, a saved dataset folder or a hub id"
        )
    return replace(source, name=dataset.source, split=split, max_rows=dataset.max_pairs)


def is_hub_id(source: str) -> bool:
    """Return whether a source is on the hub: it reads `owner/name`, is not a path here, and does not end like a file."""
    path = Path(source)
    is_file = path.suffix.lower() in (*_READERS, *_FILE_ENDINGS)
    return _HUB_ID.fullmatch(source) is not None and not is_file and not path.exists()


# --- files -------------------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> Source:
    ending, kind = path.suffix.lower(), _kind(path)
    if kind not in _READERS:
        raise InputError(
            f"dataset.source {path}: unknown kind of file {kind!r}, expected one of {', '.join(_READERS)}; "
            "convert it, for example with Polars or pandas"
        )
    with path.open("rb") as file:
        first = file.read(max(map(len, _FIRST_BYTES)))
    for start, (what, own_ending, remedy) in _FIRST_BYTES.items():
        if first.startswith(start) and ending != own_ending:
            raise InputError(f"dataset.source {path} is {what}; {remedy}")
    return _READERS[kind](path)


def _kind(path: Path) -> str:
    """Return the ending of a file, with what is compressed in it: `.jsonl`, `.jsonl.gz`."""
    ending = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if ending == ".gz" else ending


def _json_lines(path: Path) -> Source:
    check_encoding(path)
    return Source(str(path), lambda columns: json_lines(path, columns))


def _json_array(path: Path) -> Source:
    check_encoding(path)
    return Source(str(path), lambda columns: json_array(path, columns))


_READERS: dict[str, Callable[[Path], Source]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": parquet,
    ".arrow": arrow,
    ".jsonl.gz": _json_lines,
    ".ndjson.gz": _json_lines,
    ".json.gz": _json_array,
}


def _nearest_file(path: Path) -> str:
    """Return a hint at a file with a similar name."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" (nearest: {path.parent / nearest[0]})" if nearest else ""


# --- datasets ----------------------------------------------------------------------------------------------------------


def _with_library(path: Path, dataset: DatasetSection, split: str) -> Source:
    """Open a dataset folder or a hub dataset with `datasets`."""
    import datasets

    problem = f"{dataset.source!r} is no file or folder here{_nearest_file(path)}, and could not be loaded from the hub"
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            problem = f"{path} is no whole saved dataset"
            loaded = _saved(path, split)
        elif path.is_dir():
            problem = f"{path}: no dataset with split {split!r} in this folder"
            files = _files_of_split(path, dataset, split)
            if files:
                return joined(dataset.source, [_open_file(file) for file in files])
            loaded = datasets.load_dataset(str(path), dataset.config, split=split, data_dir=dataset.data_dir)
        else:
            loaded = _from_hub(dataset, split)
    except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"dataset.source {problem}: {first_line(error.__cause__ or error)}") from error
    if isinstance(loaded, datasets.IterableDataset):
        return streamed(loaded, dataset.source)
    return arrow_source(
        dataset.source, loaded.features.arrow_schema, [("a file of the dataset", partial(_tables, loaded))]
    )


def _saved(path: Path, split: str) -> "Dataset":
    """Return a dataset that `save_to_disk` wrote, or one split of several."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    _check_split(path, split, [str(name) for name in loaded])
    return loaded[split]


def _check_split(path: Path, split: str, names: list[str]) -> None:
    if split not in names:
        nearest = difflib.get_close_matches(split, names, n=1, cutoff=0.0)
        hint = (
            f"it has {', '.join(names)}. Set dataset.split, for example to {nearest[0]!r}" if nearest else "it has none"
        )
        raise InputError(f"dataset.source {path} has no split {split!r}; {hint}")


def _files_of_split(path: Path, dataset: DatasetSection, split: str) -> list[Path]:
    """Return the files of one split of a folder, as `datasets` sorts them; none if they are of a kind that only it reads.

    Its own reader would refuse a whole folder for one bad row, and does not say in which file that is.

    Raises:
        InputError: There is no such split, or files of another kind would be left out.
    """
    import datasets

    splits = datasets.load_dataset_builder(str(path), dataset.config, data_dir=dataset.data_dir).config.data_files or {}
    _check_places(path, splits)
    if set(split) & set("[+"):  # a part of a split, or several
        return []
    found = {str(split): [Path(file) for file in files] for split, files in splits.items()}
    if not all(_kind(file) in _READERS for files in found.values() for file in files):
        return []
    _check_split(path, split, list(found))
    kinds = {_kind(file) for files in found.values() for file in files}
    there = [file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    others = {_kind(file) for file in there if file.is_file()} & (_READERS.keys() - {".json"})  # .json: often metadata
    if others - kinds and dataset.config is None:
        raise InputError(
            f"dataset.source {path} has files of several kinds, {', '.join(sorted(others | kinds))}, of which only "
            f"{', '.join(sorted(kinds))} would be read; keep one kind, or name one file"
        )
    return found[split]


def _check_places(path: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Check that a folder has only files in it, or where the operator allows them: its README may name any file."""
    for file in (str(file) for files in splits.values() for file in files):
        if ".." in Path(file).parts or not Path(file).is_relative_to(path.resolve()):
            check_place(f"a file of dataset.source {path},", file)


def _from_hub(dataset: DatasetSection, split: str) -> "Dataset | IterableDataset":
    """Return a hub dataset; without a connection that of the cache, at once: the library would try for half a minute."""
    import datasets

    options = dataset.model_dump(include={"data_dir", "revision", "streaming"})
    was_offline = datasets.config.HF_HUB_OFFLINE
    if not was_offline and not _hub_answers():
        _log.warning(f"prepare: no connection to the hub; {dataset.source} is looked for in the cache")
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(dataset.source, dataset.config, split=split, **options)
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _hub_answers() -> bool:
    """Return whether the hub can be reached; any answer counts, also a refusal."""
    import socket
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT

    try:
        with urlopen(Request(ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT_S):
            return True
    except HTTPError:
        return True
    except URLError as error:
        return not isinstance(error.reason, socket.gaierror | ConnectionError | TimeoutError)
    except TimeoutError:
        return False


def _tables(loaded: "Dataset", columns: list[str]) -> Iterator[Any]:
    """Yield Arrow tables: no image or sound is decoded."""
    # At least one column: `datasets` has no rows without.
    tables = loaded.select_columns(columns or loaded.column_names[:1]).with_format("arrow").iter(1000)
    return (table.select(columns) for table in tables)


def streamed(loaded: "IterableDataset", name: str) -> Source:
    """Return the source of a dataset that is read over the network; its columns may be unknown before the rows."""

    def read(columns: Collection[str] | None = None) -> Iterator[RawRow]:
        known = loaded.column_names
        wanted = (
            loaded if known is None or columns is None else loaded.select_columns([c for c in known if c in columns])
        )
        return (checked_size(RawRow(index, value), columns) for index, value in enumerate(wanted))

    return Source(name, read, loaded.column_names, max_looked_at=_LOOKED_AT_OF_A_STREAM)
