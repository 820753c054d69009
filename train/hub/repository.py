"""Repositories on the Hugging Face hub: everything in one commit or nothing, and downloads of one revision.

The token is that of `hf auth login` or `HF_TOKEN`; it is never an argument here and never in a message. huggingface_hub's own
`upload_folder` is not used: with Xet storage it commits large folders in parts, and readers would see half a dataset.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from train.hub.answers import explained
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint_file
from weights_store.messages import hide_credentials, logger

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_log = logger(__name__)

Kind = Literal["dataset", "model"]
_CARD = "README.md"
_OF_THE_HUB = (".gitattributes", _CARD)
"""A repository has them from its beginning."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
    pushed: Sequence[str]
    """The files of the last push that are still there."""

    def push(self, files: Mapping[str, Path | bytes], message: str) -> Pushed:
        """Replace the files of the last push by these, in one commit; all other files stay.

        Large files are uploaded first; readers see none of it before the commit. After a kill, the next push uploads only what
        the hub does not have yet.

        Args:
            files: Local files, or their content, by path in the repository.
            message: Title of the commit.

        Raises:
            InputError: The hub refuses or cannot be reached, or somebody has changed the repository since it was opened.
        """
        with explained(f"cannot push to {self.repo_id}"):
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            api = _api()
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationDelete(name) for name in self.pushed if name not in files),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ]
            commit = api.create_commit(
                self.repo_id, operations, commit_message=message, repo_type=self.kind, parent_commit=self.head
            )
        folder = "datasets/" if self.kind == "dataset" else ""
        url = hide_credentials(f"{api.endpoint}/{folder}{self.repo_id}")
        return Pushed(url, commit.oid, commit.oid != self.head)


def open_repository(repo_id: str, kind: Kind, *, record: str, is_public: bool, replaces_card: bool) -> Repository:
    """Return a repository to push to. It is made if there is none, private unless `is_public`.

    Args:
        repo_id: `owner/name`.
        kind: What it holds.
        record: The JSON file of a push that has the SHA-256 of all its other files, by path, under `files`.
        is_public: Whether everybody may read it.
        replaces_card: Whether a card may be replaced that somebody wrote or changed on the hub.

    Raises:
        InputError: The hub refuses, or cannot be reached; or the repository holds something else, or a card that would be
            lost, or everybody can read it and `is_public` is False.
        MissingExtraError: huggingface_hub is not installed.
    """
    with explained(f"cannot push to {repo_id}"):
        api = _api()
        api.create_repo(repo_id, repo_type=kind, private=not is_public, exist_ok=True)
        info = api.dataset_info(repo_id) if kind == "dataset" else api.model_info(repo_id)
    there = [file.rfilename for file in info.siblings or []]
    _check_ours(repo_id, there, record, is_private=info.private is True, is_public=is_public)

    def read(name: str) -> Path:
        with explained(f"cannot push to {repo_id}"):
            return Path(api.hf_hub_download(repo_id, name, repo_type=kind, revision=info.sha))

    pushed = _pushed_files(read(record), f"{repo_id}/{record}") if record in there else {}
    if _CARD in there and not replaces_card and fingerprint_file(read(_CARD)) != pushed.get(_CARD):
        raise InputError(
            f"{repo_id} has a {_CARD} that `tokenweights push` did not write, or that was changed since: put your words into "
            "another file of the repository, and give --replace-card"
        )
    return Repository(repo_id, kind, info.sha or None, [name for name in there if name in pushed])


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


def _pushed_files(record: Path, where: str) -> dict[str, str]:
    """Return what a push recorded of its files: SHA-256 by path.

    Raises:
        InputError: The record does not say: the files of that push would stay among those of this one.
    """
    try:
        files = json.loads(record.read_bytes())["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} does not list the files of the last push: restore it from the history, or push to another repository"
        ) from error


def download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder in the hub's cache with the files of a dataset repository that match a pattern.

    Its name is the commit. What is in the cache is not downloaded again; without a connection the cache is all there is.

    Raises:
        InputError: There is no such repository or revision, or the hub cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    at = f" (revision {revision})" if revision else ""
    with explained(f"cannot pull {repo_id}{at}"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
