"""Where a store is: a local folder, or a prefix in an object store that both pyarrow and deltalake speak.

Credentials come from the usual environment variables and are never part of a URI, so they reach no log, no lineage and no
error message. Servers quote keys and tokens in their replies: errors about those go through `one_line`.
"""

import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from http.client import HTTPException
from pathlib import Path
from secrets import randbelow
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.fs as pafs

from weights_store.allowed import expand_home
from weights_store.errors import InputError, SettingsError, StoreError
from weights_store.messages import hide_credentials

_SCHEMES = ("s3", "gs", "abfs", "abfss")
_KNOWN = ", ".join(f"{name}://…" for name in _SCHEMES)
_REMOTE_PART = re.compile(r"[A-Za-z0-9_.=+~@:,-]+")  # pyarrow, deltalake and Polars read all others differently
_SCHEME_TYPO = re.compile(
    rf"(?:(?:{'|'.join((*_SCHEMES, 'file'))})(?::|//)|[A-Za-z][A-Za-z0-9+.-]+:/)/?", re.IGNORECASE
)
"""`s3:/bucket`, `s3:bucket`, `s3//bucket`, `hdfs:/folder`."""
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_XML_ERROR = re.compile(r"(?:<\?xml[^>]*\?>)?\s*<Error>.*?</Error>", re.DOTALL)
_BACKTRACE = re.compile(r"\n\s+0: .*", re.DOTALL)
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]")
"""Characters in a folder that deltalake takes for another one or refuses: the backslash, and control characters."""
_MAX_PART_BYTES = 255
"""Of a folder's name, on the usual file systems."""
_MAX_PATH_BYTES = 3000
"""Of a store's folder: a path has at most 4,096 bytes, and tables and their files need their part."""
_LOG_PATHS = re.compile(r": ParsedLogPath \{.*\}", re.DOTALL)
_SECRET_NAME = re.compile(r"(AWS|AZURE|GOOGLE|GCS)_.*(KEY|SECRET|TOKEN|PASSWORD)")
_LISTING_TRIES = 3
PROBE_S = 4
PROBE_PAUSES_S = (1, 3)
"""How long to wait for an answer of an object store, and how long between the tries, in seconds."""


@dataclass(frozen=True)
class Location:
    """One folder by its URI: a path, `file://…`, `s3://bucket/prefix`, `gs://…` or `abfss://…`.

    Methods that list or read raise StoreError if the object store does not answer as it should.

    Raises:
        SettingsError: The scheme is unknown, or the URI carries credentials or options.
    """

    uri: str

    def __post_init__(self) -> None:
        scheme, colon, rest = self.uri.partition("://")
        if not colon or scheme == "file":
            _check_no_typo(self.uri)
            text = _local_path(self.uri)
        elif scheme not in _SCHEMES:
            raise SettingsError(f"a store cannot be at {scheme}://…: expected a folder, file:///… or one of {_KNOWN}")
        else:
            text = self.uri.rstrip("/")
            _check_remote(scheme, rest.rstrip("/"))
        object.__setattr__(self, "uri", text)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of this machine."""
        return "://" not in self.uri

    @property
    def path(self) -> Path:
        """The local folder; raises SettingsError if it is not local."""
        if not self.is_local:
            raise SettingsError(f"{self.uri} is not a local folder")
        return Path(self.uri)

    @property
    def absolute_uri(self) -> str:
        """The URI that names this place in any current folder."""
        return str(self.path.absolute()) if self.is_local else self.uri

    def nearest_folder(self) -> Path:
        """Return this local folder or, if it does not exist, the nearest one above it that does.

        Raises:
            StoreError: A file is there, or where one of its parents should be.
        """
        place = self.path.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise StoreError(f"a store cannot be at {self}: {place} is not a folder; give another folder")
        return place

    @property
    def storage_options(self) -> dict[str, str]:
        """Options of deltalake beside the environment. On S3 a commit is a conditional put, so no lock table is needed.

        Retries last about as long as pyarrow's, 6 s, so a short failure of the network does no harm.
        """
        if self.is_local:
            return {}
        retries = {"max_retries": "24", "retry_timeout": "30s", "backoff_config.max_backoff": "2s"}
        return retries | ({"conditional_put": "etag"} if self.uri.startswith("s3://") else {})

    @property
    def scan_options(self) -> dict[str, int]:
        """Options of Polars beside the environment: the same retries as the others."""
        return {} if self.is_local else {"max_retries": 24, "retry_timeout_ms": 30_000, "retry_max_backoff_ms": 2_000}

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """The file system whose root is this folder.

        Raises:
            StoreError: The object store cannot be reached or the bucket is unknown.
        """
        if self.is_local:
            return pafs.SubTreeFileSystem(str(self.path.absolute()), pafs.LocalFileSystem())
        if self.uri.startswith("s3://") and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            _check_reachable(endpoint)
        try:
            base, path = pafs.FileSystem.from_uri(self.uri)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot open {self.uri}: {one_line(error)}{_hint(error)}") from None
        return pafs.SubTreeFileSystem(path, base)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of listing and reading into one line; a missing file stays a `FileNotFoundError`."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            text = f"cannot read {self.uri}: {one_line(error)}{_hint(error)}"
            raise StoreError(text) from (error if self.is_local else None)

    def __reduce__(self) -> tuple[type["Location"], tuple[str]]:
        """Leave out the open file system, every process has its own; a local folder is the same one in any current folder."""
        return Location, (self.absolute_uri,)

    def exists(self, *names: str) -> bool:
        """Return whether at least one of the files or folders is there."""
        return any(info.type != pafs.FileType.NotFound for info in self.info(list(names)))

    def info(self, names: list[str]) -> list[pafs.FileInfo]:
        """Return what there is under each of some names."""
        with self._reading():
            return list(self.filesystem.get_file_info(names))

    def state(self, name: str) -> tuple[int, int, int] | None:
        """Return what changes if a local file is written again: inode, size in bytes and time in ns.

        None for an object store: there our files are never written again, and asking costs a request.

        Raises:
            FileNotFoundError: There is no such local file.
        """
        if not self.is_local:
            return None
        with self._reading():
            stat = (self.path / name).stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def files(self) -> dict[str, pafs.FileInfo]:
        """Return the files in this folder by name; none if the folder does not exist."""
        return {info.path: info for info in self._entries() if info.is_file}

    def tree(self) -> dict[str, pafs.FileInfo]:
        """Return the files in this folder and all below it, by path; none if the folder does not exist."""
        return {info.path: info for info in self._entries(recursive=True) if info.is_file}

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none if it does not exist."""
        return sorted(info.base_name for info in self._entries() if info.type == pafs.FileType.Directory)

    def _entries(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector("", allow_not_found=True, recursive=recursive)
        with self._reading():
            for _ in range(_LISTING_TRIES - 1):
                # Only after it could not list a folder pyarrow looks whether there is one. By then a writer may have made it.
                with suppress(FileNotFoundError):
                    return list(self.filesystem.get_file_info(selector))
            return list(self.filesystem.get_file_info(selector))

    def read(self, name: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._reading(), self.filesystem.open_input_stream(name, compression=None) as file:
            return bytes(file.readall())

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one file in pieces, see `read`."""
        # Each piece of an object is a request. On the disk, pieces that fit into the processor's cache are twice as fast.
        chunk_bytes = 1 << 20 if self.is_local else 16 << 20
        with self._reading(), self.filesystem.open_input_stream(name, compression=None) as file:
            while chunk := file.read(chunk_bytes):
                yield chunk

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write one whole file. On return it is on the disk; after a failure or a kill the old file, or none, is there.

        Raises:
            OSError: The folder cannot be written or the disk is full.
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(name, compression=None) as stream:
                stream.write(data)
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the process id: containers that share a file system have the same one.
        partial = path.with_name(f".{path.name}.{randbelow(10**9)}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(path)  # the system names no file when the disk is full
            raise

    def move(self, name: str, target: str) -> None:
        """Move one file to another place under this one."""
        self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        self.filesystem.move(name, target)

    def delete(self, name: str) -> None:
        """Delete one file."""
        self.filesystem.delete_file(name)

    def upload(self, folder: Path) -> None:
        """Copy the files of a local folder to this place."""
        pafs.copy_files(
            str(folder), "", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
        )

    def download(self, folder: Path) -> None:
        """Copy the files of this place into a local folder."""
        folder.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            "", str(folder), source_filesystem=self.filesystem, destination_filesystem=pafs.LocalFileSystem()
        )


def write_whole(path: Path, text: str) -> None:
    """Write a local text file. A kill leaves the old file or the new one, never a part."""
    Location(str(path.parent)).write(path.name, text.encode())


def one_line(error: BaseException) -> str:
    """Return the whole message of an error on one line, without colours, backtraces and credentials.

    For errors of storage libraries, which may quote keys. `messages.first_line` is for all others.
    """
    text = _LOG_PATHS.sub("", _BACKTRACE.sub("", _ANSI.sub("", str(error)))).replace("↳", " ")
    # Of a server's reply only the code and the message: the rest may quote the key, the request and the session token.
    text = _XML_ERROR.sub(lambda reply: ": ".join(re.findall(r"<(?:Code|Message)>(.*?)</", reply[0], re.DOTALL)), text)
    text = hide_credentials(text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.fullmatch(name):
            text = text.replace(value, "***")
    return " ".join(text.split()) or type(error).__name__


def _hint(error: BaseException) -> str:
    text = str(error)
    if "ACCESS_DENIED" in text or "403" in text:
        return "; check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION)"
    if "Permission denied" in text:
        return "; check the permissions"
    return "; check AWS_ENDPOINT_URL and the network" if "NETWORK_CONNECTION" in text else ""


def _check_no_typo(uri: str) -> None:
    """Refuse what would become a folder named `s3:` in the current directory."""
    typo = _SCHEME_TYPO.match(uri)
    if typo and not uri.startswith("file://"):
        raise SettingsError(f"a store cannot be at {typo[0]}…: expected a folder, file:///… or one of {_KNOWN}")


def _local_path(uri: str) -> str:
    if not uri:
        raise SettingsError("store URI is empty; expected a folder or a URI")
    if uri.startswith("file://") and not uri.startswith("file:///"):
        raise SettingsError("a file:// URI of a store names a host: expected file:///absolute/path")
    text = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    if hide_credentials(text) != text:
        raise SettingsError(
            f"a store cannot be at …:…@…: expected a folder without a ':' before an '@', or one of {_KNOWN}"
        )
    if "\0" in text:
        raise SettingsError("bad store URI: it has a zero byte, which no path can have")
    if _UNSAFE.search(text):
        raise SettingsError(
            f"bad folder {text!r}: deltalake cannot read a table below a backslash or a control character"
        )
    if _ESCAPE.search(text):
        raise SettingsError(f"bad folder {text!r}: deltalake takes a % before two hex digits for another character")
    path = Path(expand_home(text))
    _check_lengths(path)
    return str(path)


def local_path(text: str) -> Path:
    """Return a path that a person has given, with `~` as a home folder; raises InputError if there is none of that name."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: there is no home folder of that name here; give the whole path") from error


def _check_lengths(path: Path) -> None:
    """Refuse a folder that no file system can make, or below which no table would fit."""
    try:
        parts = [len(part.encode()) for part in path.parts]
    except UnicodeEncodeError:
        raise SettingsError(f"bad folder {str(path)!r}: its name is not UTF-8") from None
    if max(parts, default=0) > _MAX_PART_BYTES:
        raise SettingsError(
            f"bad folder {str(path)[:40]}…: a part of its path has {max(parts)} bytes, file systems take {_MAX_PART_BYTES}"
        )
    num_bytes = len(str(path.absolute()).encode("utf-8", "surrogateescape"))
    if num_bytes > _MAX_PATH_BYTES:
        raise SettingsError(
            f"bad folder {str(path)[:40]}…: its path has {num_bytes:,} bytes, limit {_MAX_PATH_BYTES:,}; give a shorter one"
        )


def _check_remote(scheme: str, rest: str) -> None:
    """Refuse credentials, options, and names that the libraries read differently."""
    host = urlsplit(f"{scheme}://{rest}").netloc
    account = scheme.startswith("abfs") and ":" not in host.partition("@")[0]
    if ("@" in host and not account) or "?" in rest or "#" in rest:
        raise SettingsError(
            f"the store's {scheme}:// URI carries credentials or options; give them as environment variables "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, …)"
        )
    for part in rest.split("/"):
        if not _REMOTE_PART.fullmatch(part) or part in (".", ".."):
            raise SettingsError(
                f"bad part {part!r} in the store's {scheme}:// URI: expected {scheme}://bucket/prefix of letters, digits and "
                "any of _.=+~@:,-"
            )


@lru_cache
def _check_reachable(endpoint: str) -> None:
    """Check once a process, within seconds, that a server answers: the libraries themselves would try for minutes.

    Raises:
        SettingsError: It is not an http:// or https:// URL.
        StoreError: No server answers.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError("AWS_ENDPOINT_URL is not a URL: expected http://host:port or https://host")
    for pause_s in (*PROBE_PAUSES_S, None):
        try:
            urlopen(Request(endpoint, method="HEAD"), timeout=PROBE_S).close()
            return
        except (HTTPError, HTTPException):  # a server is there; the libraries report the rest
            return
        except OSError as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLError):
                return
            if pause_s is None:
                place = parts.netloc.rpartition("@")[2]
                raise StoreError(
                    f"cannot reach the object store at {place}: {reason}; check AWS_ENDPOINT_URL and the network"
                ) from error
            time.sleep(pause_s)
