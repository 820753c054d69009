"""Where a store lies: a local folder, or a prefix in an object store that both pyarrow and deltalake speak.

Credentials come from the usual environment variables and are never part of a URI, so that they reach no log, no lineage and
no error message. Nothing here knows about tables.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from weights_store.errors import SettingsError, StoreError

_SCHEMES = ("s3", "gs", "abfs", "abfss")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Location:
    """One folder by its URI: a path, `file://…`, `s3://bucket/prefix`, `gs://…` or `abfss://…`.

    Raises:
        SettingsError: The scheme is unknown, or the URI carries credentials or options.
    """

    uri: str

    def __post_init__(self) -> None:
        text = self.uri.rstrip("/") or self.uri
        scheme, colon, _ = text.partition("://")
        if not colon or scheme == "file":
            text = str(Path(text.removeprefix("file://")))
        elif scheme not in _SCHEMES:
            known = ", ".join(f"{name}://…" for name in _SCHEMES)
            raise SettingsError(f"a store cannot lie at {scheme}://…: expected a folder, file://… or one of {known}")
        elif (scheme in ("s3", "gs") and "@" in urlsplit(text).netloc) or "?" in text:
            raise SettingsError(
                f"the store's {scheme}:// URI carries credentials or options; give them as environment variables "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, …)"
            )
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
        """The local folder.

        Raises:
            SettingsError: It is not local.
        """
        if not self.is_local:
            raise SettingsError(f"{self.uri} is no local folder")
        return Path(self.uri)

    @property
    def storage_options(self) -> dict[str, str]:
        """What deltalake needs beside the environment: on S3 a commit is a conditional put, and no lock table is needed."""
        return {"conditional_put": "etag"} if self.uri.startswith("s3://") else {}

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """The file system whose root is this folder.

        Raises:
            StoreError: The object store cannot be reached or the bucket is unknown.
        """
        if self.is_local:
            return pafs.SubTreeFileSystem(str(self.path.absolute()), pafs.LocalFileSystem())
        try:
            base, path = pafs.FileSystem.from_uri(self.uri)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot open {self.uri}: {one_line(error)}") from error
        return pafs.SubTreeFileSystem(path, base)

    def __getstate__(self) -> dict[str, str]:
        """Leave the open file system behind: every process has its own."""
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def exists(self, name: str = "") -> bool:
        """Return whether there is a file or a folder of that name."""
        return bool(self.filesystem.get_file_info(name).type != pafs.FileType.NotFound)

    def files(self, recursive: bool = False) -> dict[str, pafs.FileInfo]:
        """Return the files in this folder by their name relative to it; none when the folder does not exist."""
        return {info.path: info for info in self._entries(recursive) if info.is_file}

    def folders(self) -> Iterator[str]:
        """Yield the names of the folders right in this one, sorted."""
        return iter(sorted(info.base_name for info in self._entries(False) if info.type == pafs.FileType.Directory))

    def _entries(self, recursive: bool) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector("", recursive=recursive, allow_not_found=True)
        return list(self.filesystem.get_file_info(selector))

    def read(self, name: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self.filesystem.open_input_stream(name, compression=None) as file:
            return bytes(file.readall())

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write one file, whole: on return it is on the disk; a failure leaves nothing behind.

        Raises:
            OSError: The folder cannot be written or the disk is full.
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(name, compression=None) as stream:
                stream.write(data)
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

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


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, without the colours and trees some libraries print."""
    text = " ".join(_ANSI.sub("", str(error)).replace("↳", " ").split())
    return text or type(error).__name__
