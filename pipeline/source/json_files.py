"""Reads .jsonl, .ndjson and .json files, plain or compressed with gzip.

Text must be UTF-8. Another encoding of the whole file is recognised and refused, because its rows would be garbage; a broken
character spoils its own row only.
"""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from pipeline.source.rows import MAX_ROW_BYTES, RawRow, checked_size, too_large
from weights_store.errors import InputError
from weights_store.schemas import Reason

_BOMS = {
    BOM_UTF32_LE: "UTF-32LE",
    BOM_UTF32_BE: "UTF-32BE",
    BOM_UTF16_LE: "UTF-16LE",
    BOM_UTF16_BE: "UTF-16BE",
}
"""UTF-32 first: its mark begins with that of UTF-16."""
_ZEROS = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True): "UTF-16LE",
    (True, False): "UTF-16BE",
}
"""Where the zero bytes are in the first character of a JSON text, which is ASCII."""
_QUOTE = re.compile(rb'(?<!\\)"')
"""A quote that no backslash stands before: the end of a text, or its beginning."""
_MAX_LINE_BYTES = 4 * MAX_ROW_BYTES
"""Of a line, which may have more columns than those that are read."""
_SHOWN_BYTES = 2000


def json_lines(path: Path, columns: Collection[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object per line; blank lines do not count.

    Raises:
        InputError: The file is not UTF-8, or damaged.
    """
    check_encoding(path)
    index = 0
    with _open(path) as file:
        try:
            # Lines of bytes: they are split at \n only, so that a broken character cannot shift the rows after it.
            while line := file.readline(_MAX_LINE_BYTES + 1):
                if len(line) > _MAX_LINE_BYTES:
                    yield _too_long(index, line, file)
                elif line.strip():
                    row = _parse_line(index, line)
                    yield row if len(line) <= MAX_ROW_BYTES else checked_size(row, columns)
                else:
                    continue
                index += 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"dataset.source {path} is damaged after row {index}: {error}; copy or download it again"
            ) from error


def _too_long(index: int, line: bytes, file: IO[bytes]) -> RawRow:
    """Return the row of a line that is not read, and read on to its end."""
    num_bytes, raw = len(line), line[:_SHOWN_BYTES].decode("utf-8", "replace")
    while line and not line.endswith(b"\n"):
        line = file.readline(_MAX_LINE_BYTES)
        num_bytes += len(line)
    return too_large(index, f"the line has {num_bytes:,} bytes, limit {_MAX_LINE_BYTES:,}", raw)


def json_array(path: Path, columns: Collection[str] | None = None) -> Iterator[RawRow]:
    """Yield the rows of a JSON file: an array of objects, or an object whose only list of objects is that array.

    Raises:
        InputError: It is another JSON value, no JSON, or not UTF-8.
    """
    check_encoding(path)
    _check_no_long_text(path)
    try:
        with _open(path) as file:
            document = _parse(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"dataset.source {path}: {_not_utf8(error)}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"dataset.source {path} is damaged: {error}; copy or download it again") from error
    except RecursionError as error:
        raise InputError(
            f"dataset.source {path}: its values are nested too deeply to read; expected an array of flat objects, one per "
            "row"
        ) from error
    except ValueError as error:
        problem = "it is empty" if not path.stat().st_size else f"{error}; one object per line needs the ending .jsonl"
        raise InputError(f"dataset.source {path} is not valid JSON: {problem}") from error
    for index, value in enumerate(_rows_in(document, path)):
        if not isinstance(value, dict):
            yield _no_object(index, value, str(value))
        else:
            yield checked_size(RawRow(index, value), columns)


def _check_no_long_text(path: Path) -> None:
    """Refuse an array with a text that is far too long, before all of it is in memory several times.

    A piece of `_MAX_LINE_BYTES` without the quote that ends a text is inside of one. Texts that are less than twice as long may
    stand in no such piece; they are found when they are read.

    Raises:
        InputError: There is such a text.
    """
    with _open(path) as file, suppress(EOFError, gzip.BadGzipFile, zlib.error):  # damage is told by who reads on
        start = 0
        while piece := file.read(_MAX_LINE_BYTES):
            if len(piece) == _MAX_LINE_BYTES and not _QUOTE.search(piece):
                raise InputError(
                    f"dataset.source {path}: one value has more than {_MAX_LINE_BYTES:,} bytes, after byte {start:,}; take its "
                    "row out, or write one object per line into a .jsonl file, where only that row is left out"
                )
            start += len(piece)


def check_encoding(path: Path) -> None:
    """Refuse text whose every character has two or four bytes.

    Raises:
        InputError: The file is UTF-16 or UTF-32.
    """
    with _open(path) as file, suppress(EOFError, gzip.BadGzipFile, zlib.error):  # damage is told by who reads on
        first = file.read(4)
        marked = next((name for mark, name in _BOMS.items() if first.startswith(mark)), None)
        found = marked or next(
            (name for zeros, name in _ZEROS.items() if tuple(not byte for byte in first[: len(zeros)]) == zeros), None
        )
        if found:
            raise InputError(
                f"dataset.source {path} is not UTF-8 but {found}; convert its text with iconv -f {found} -t UTF-8"
            )


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _parse_line(index: int, line: bytes) -> RawRow:
    raw = line.decode("utf-8", "replace").strip()
    try:
        value = _parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RawRow(index, None, Reason.INVALID_UTF8, _not_utf8(error), raw)
    except RecursionError:
        return RawRow(index, None, Reason.UNPARSABLE_JSON, "its values are nested too deeply", raw)
    except ValueError as error:
        return RawRow(index, None, Reason.UNPARSABLE_JSON, str(error), raw)
    return RawRow(index, value, raw=raw) if isinstance(value, dict) else _no_object(index, value, raw)


def _parse(text: str) -> object:
    """Return a JSON text as Python values; of an object that has a key twice nothing is dropped without a word.

    Raises:
        ValueError: It is no JSON, or an object has a key twice.
        RecursionError: It is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a key that stands twice, or an integer of more than 4,300 digits, which Python refuses
        return json.loads(text, object_pairs_hook=_object, parse_int=float)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def _rows_in(document: object, path: Path) -> list[object]:
    if isinstance(document, list):
        return document
    what = f"a {type(document).__name__}"
    if isinstance(document, dict):
        lists = [value for value in document.values() if _holds_rows(value)]
        if len(lists) == 1:
            return lists[0]
        what = f"one object with the keys {', '.join(document)}"[:200]
    raise InputError(
        f"dataset.source {path}: expected a JSON array of rows, got {what}; put the rows into [ ], or write one object per "
        "line into a .jsonl file"
    )


def _holds_rows(value: object) -> bool:
    """Return whether a value is a list of objects that are no messages of a chat."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not first.keys() & {"role", "from"}


def _no_object(index: int, value: object, raw: str) -> RawRow:
    return RawRow(index, None, Reason.UNPARSABLE_JSON, f"a {type(value).__name__}, expected an object", raw)


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"byte {error.start} (0x{byte:02x}) is not UTF-8: {error.reason}; if the file is Latin-1 or Windows-1252, convert it "
        "with iconv"
    )
