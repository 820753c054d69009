"""Repositories on the Hugging Face hub: everything in one commit or nothing, and downloads of one revision.

The token is that of `hf auth login` or `HF_TOKEN`; it is never an argument here and never in a message. huggingface_hub's own
`upload_folder` is not used: with Xet storage it commits large folders in parts, and readers would see half a dataset.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weights_store.errors import InputError, MissingExtraError
from weights_store.messages import first_line, hide_credentials, logger
from weights_store.packages import how_to_install

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_log = logger(__name__)

Kind = Literal["dataset", "model"]
_OF_THE_HUB = (".gitattributes", "README.md")
"""A repository has them from its beginning."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
"""The query of a URL to upload to may be a signature."""
_REMEDIES = {
    401: "check the name, and log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not do that: log in as somebody who may write there",
    404: "check the name; a private repository is only seen by those who are logged in and may read it",
    412: "somebody else changed the repository meanwhile; run again",
}


def is_repo_id(text: str) -> bool:
    """Return whether a text reads `owner/name`."""
    return _REPO_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str
    revision: str
    is_new: bool
    """Whether there was something to change."""


@dataclass(frozen=True)
class Repository:
    """A repository as it was when it was opened."""

    repo_id: str
    kind: Kind
    head: str | None
    """Its newest commit."""
    files: Sequence[str]

    def push(self, files: Mapping[str, Path | bytes], *, replaced: Sequence[str], message: str) -> Pushed:
        """Make it hold these files, in one commit.

        Large files are uploaded first; readers see none of it before the commit. After a kill, the next push uploads only what
        the hub does not have yet.

        Args:
            files: Local files, or their content, by path in the repository.
            replaced: Patterns of files that an earlier push may have left and this one replaces.
            message: Title of the commit.

        Raises:
            InputError: The hub refuses or cannot be reached, or somebody has changed the repository since it was opened.
        """
        stale = [name for name in self.files if name not in files and any(fnmatch(name, each) for each in replaced)]
        with _explained(f"cannot push to {self.repo_id}"):
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            api = _api()
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ]
            commit = api.create_commit(
                self.repo_id, operations, commit_message=message, repo_type=self.kind, parent_commit=self.head
            )
        folder = "datasets/" if self.kind == "dataset" else ""
        return Pushed(f"{api.endpoint}/{folder}{self.repo_id}", commit.oid, commit.oid != self.head)


def open_repository(repo_id: str, kind: Kind, *, record: str, is_public: bool) -> Repository:
    """Return a repository to push to. It is made if there is none, private unless `is_public`.

    Args:
        repo_id: `owner/name`.
        kind: What it holds.
        record: The file that tells repositories of ours from others.
        is_public: Whether everybody may read it.

    Raises:
        InputError: The hub refuses, or cannot be reached; or the repository holds something else, or everybody can read it
            and `is_public` is False.
        MissingExtraError: huggingface_hub is not installed.
    """
    with _explained(f"cannot push to {repo_id}"):
        api = _api()
        api.create_repo(repo_id, repo_type=kind, private=not is_public, exist_ok=True)
        info = api.dataset_info(repo_id) if kind == "dataset" else api.model_info(repo_id)
    there = [file.rfilename for file in info.siblings or []]
    _check_ours(repo_id, there, record, is_private=info.private is not False, is_public=is_public)
    return Repository(repo_id, kind, info.sha or None, there)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="tokenweights")


def _check_ours(repo_id: str, there: Sequence[str], record: str, *, is_private: bool, is_public: bool) -> None:
    others = [name for name in there if name not in _OF_THE_HUB]
    if others and record not in others:
        raise InputError(
            f"{repo_id} holds {len(others)} files, for example {others[0]}, and no {record}: `tokenweights push` did not write "
            "them; choose another repository"
        )
    if not (is_private or is_public):
        raise InputError(f"everybody can read {repo_id}: give --public if that is meant, or push to another repository")
    if is_private and is_public:
        _log.warning(f"{repo_id} is private and stays so: --public is for new repositories; change it in its settings")


def download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder in the hub's cache with the files of a dataset repository that match a pattern.

    Its name is the commit. What is in the cache is not downloaded again; without a connection the cache is all there is.

    Raises:
        InputError: There is no such repository or revision, or the hub cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    at = f" (revision {revision})" if revision else ""
    with _explained(f"cannot pull {repo_id}{at}"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one line without secrets.

    Raises:
        InputError: The hub refuses or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client, which has changed
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        package = "huggingface_hub"
        raise MissingExtraError(
            f"{problem}: this needs the package {package!r}, which is not installed; {how_to_install(package, 'hub')}"
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = getattr(cause, "server_message", None) or cause
        text = hide_credentials(_QUERY.sub(r"\1", first_line(said)))
        if token := get_token():
            text = text.replace(token, "***")
        remedy = _REMEDIES.get(
            status or 0, "check the connection, and run again: what was uploaded is not uploaded again"
        )
        raise InputError(f"{problem}: {text.rstrip('.')}; {remedy}") from None
