"""The commands `push` and `pull`. `tokenweights.py` registers them; folders need the base install, the hub the extra `hub`."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import weights_store
from weights_store.commands import Add
from weights_store.errors import InputError
from weights_store.messages import logger
from weights_store.printing import count_text, size_text

if TYPE_CHECKING:
    from train.hub.repository import Kind, Pushed, Repository
    from weights_store.sharing.record import DatasetRecord
    from weights_store.views.token_texts import Tokenizer

_log = logger(__name__)

_HUB = "hf://datasets/"
_LOCAL = ("/", "./", "../", "~")


def add_hub(add: Add, load_tokenizer: "Callable[[str], Tokenizer]") -> None:
    """Register the commands. `load_tokenizer` returns the tokenizer of a model folder."""
    push = add("push", run_push, "publish a weight dataset or a trained policy as a repository of the hub, or a folder")
    push.set_defaults(load_tokenizer=load_tokenizer)
    push.add_argument(
        "what", metavar="NAME[@VERSION]|FOLDER", help="a weight dataset, or the output folder of a training"
    )
    push.add_argument(
        "target",
        metavar="REPO_ID|FOLDER",
        help="owner/name on the hub; or a folder, such as ./shared: a new one, or one with an earlier push of the dataset",
    )
    push.add_argument("--public", action="store_true", help="let everybody read a new repository (default: private)")
    push.add_argument(
        "--licence", metavar="ID", help="licence of the source, for example apache-2.0 (default: unknown)"
    )
    push.add_argument(
        "--replace-card",
        action="store_true",
        help="replace a README.md that somebody wrote or changed since the last push",
    )
    push.add_argument("--tokenizer", metavar="FOLDER", help="model folder for the texts (default: the recipe's model)")
    pull = add("pull", run_pull, "bring a pushed weight dataset into the store, checked and ready to train")
    pull.add_argument(
        "source", metavar="REPO_ID|FOLDER", help="owner/name on the hub, or a folder that push wrote, such as ./shared"
    )
    pull.add_argument("--revision", metavar="R", help="commit, tag or branch of the repository (default: the newest)")
    pull.add_argument("--as", dest="name", metavar="NAME", help="name in the store (default: as where it was pushed)")


def run_push(options: argparse.Namespace) -> None:
    """Publish a weight dataset or a policy."""
    from train.hub.policy import is_policy
    from weights_store.location import local_path

    folder = local_path(options.what)
    if is_policy(folder):
        _check_not_both(options)
        _push_policy(folder, options)
    elif options.what.startswith(_LOCAL):
        raise InputError(
            f"{options.what} is no output folder of `tokenweights train`; give one, or the name of a dataset"
        )
    else:
        _push_dataset(options)


def _check_not_both(options: argparse.Namespace) -> None:
    """Refuse a word that names a folder and a dataset, and options that say nothing about a policy.

    Raises:
        InputError: Both are there, or such an option is given.
    """
    from weights_store.names import is_name, weights_path

    name = options.what
    if is_name(name) and weights_store.WeightStore(options.store).table(weights_path(name)).exists():
        raise InputError(
            f"{name} is a policy here and a weight dataset in {options.store}; write ./{name} for the folder"
        )
    for option in ("licence", "tokenizer"):
        if getattr(options, option) is not None:
            raise InputError(f"--{option} is for weight datasets, and {name} is a policy; leave it out")


def _push_policy(folder: Path, options: argparse.Namespace) -> None:
    from train.hub.policy import policy_files
    from train.job.output import LINEAGE
    from weights_store.sharing.new_folder import new_folder

    files = policy_files(folder)
    what = f"{count_text(len(files), 'file')} of {folder}"
    if _is_on_hub(options.target):
        _print_pushed(_open(options, "model", LINEAGE).push(files, f"Push {folder.absolute().name}"), what)
        return
    target = _target_folder(options)
    with new_folder(target) as partial:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                shutil.copyfile(content, partial / name)
    print(f"wrote {what} to {target}")


def _push_dataset(options: argparse.Namespace) -> None:
    from weights_store.inspection.model_tokenizer import load_known_tokenizer
    from weights_store.sharing.dataset_folder import files_of, may_replace, write_dataset_folder
    from weights_store.sharing.new_folder import new_folder

    store = weights_store.WeightStore(options.store)
    name, version = weights_store.split_name(options.what)
    weights = store.resolve(name, version)
    metadata = store.table(weights.table).metadata(weights.version)

    def write(folder: Path, place: str) -> "DatasetRecord":
        tokenizer = load_known_tokenizer(metadata, options.tokenizer, options.load_tokenizer)
        return write_dataset_folder(store.root, weights, folder, place, tokenizer, options.licence)

    if _is_on_hub(options.target):
        _upload_dataset(options, write)
        return
    folder = _target_folder(options)
    with new_folder(folder, lambda old: may_replace(old, name, replaces_card=options.replace_card)) as partial:
        record = write(partial, f"./{folder.absolute().name}")  # whoever reads the card has the folder somewhere else
    for name, path in files_of(record, folder).items():
        print(f"{size_text(path.stat().st_size):>10}  {folder / name}")


def _upload_dataset(options: argparse.Namespace, write: "Callable[[Path, str], DatasetRecord]") -> None:
    """Write the files into our cache, and push them from there."""
    from weights_store.digests import cache_folder
    from weights_store.processes.lock import locked, wait_for
    from weights_store.sharing.dataset_folder import files_of
    from weights_store.sharing.record import RECORD

    staging = cache_folder() / "push" / options.target.replace("/", "--")
    with locked(staging.with_name(f"{staging.name}.lock"), wait_for(f"pushing to {options.target}")):
        repository = _open(options, "dataset", RECORD)
        shutil.rmtree(staging, ignore_errors=True)  # of a push that was killed
        staging.mkdir()
        try:
            record = write(staging, options.target)
            files = files_of(record, staging)
            pushed = repository.push(files, f"Push {record['name']}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _print_pushed(pushed, f"{record['name']}, {count_text(len(files), 'file')}")


def _is_on_hub(target: str) -> bool:
    """Return whether a target or a source is a repository of the hub; say so if a folder may have been meant."""
    from train.hub.repository import is_repo_id

    is_repository = is_repo_id(target)
    if is_repository and Path(target).parent.is_dir():
        _log.info(f"{target} is a repository of the hub here; write ./{target} for the folder")
    return is_repository


def _open(options: argparse.Namespace, kind: "Kind", record: str) -> "Repository":
    from train.hub.repository import open_repository

    return open_repository(
        options.target, kind, record=record, is_public=options.public, replaces_card=options.replace_card
    )


def _target_folder(options: argparse.Namespace) -> Path:
    from weights_store.location import local_path

    if options.public:
        raise InputError(f"--public is for repositories of the hub (owner/name), and {options.target} is a folder")
    return local_path(options.target)


def _print_pushed(pushed: "Pushed", what: str) -> None:
    verb = "pushed" if pushed.is_new else "nothing to push: the repository has it already,"
    print(f"{verb} {what}\n{pushed.url} at {pushed.revision}")


def run_pull(options: argparse.Namespace) -> None:
    """Bring a dataset into the store."""
    from weights_store.location import local_path
    from weights_store.names import name_of
    from weights_store.sharing.bring_in import bring_in

    root = weights_store.WeightStore(options.store).root
    folder = local_path(options.source)
    if not _is_on_hub(options.source):
        if not folder.is_dir():
            raise InputError(
                f"{options.source} is no folder, and does not read owner/name as repositories of the hub do; a commit or tag "
                "of one is --revision"
            )
        if options.revision is not None:
            raise InputError(
                f"--revision is for repositories of the hub, and {options.source} is a folder; leave it out"
            )
        pulled = bring_in(root, folder, str(folder.absolute()), None, options.name)
    else:
        files = _download(options.source, options.revision)
        pulled = bring_in(root, files, f"{_HUB}{options.source}", files.name, options.name)
    pairs = count_text(pulled.num_pairs, "pair")
    name = f"{name_of(pulled.weights.table)}@{pulled.weights.version}"
    if pulled.is_new:
        print(f"pulled {name} into {options.store}: {pairs}, every file and every row as they were pushed")
    else:
        print(f"{name} in {options.store} has these {pairs} already")
    if pulled.left_behind:
        things = ", ".join(count_text(number, kind) for kind, number in sorted(pulled.left_behind.items()))
        print(f"not in the repository: {things} that the weights were made from, see `tokenweights lineage {name}`")
        print("train on the weights as they are; to add pairs, or to weigh them differently, build from the source")


def _download(repo_id: str, revision: str | None) -> Path:
    from train.hub.repository import download
    from weights_store.sharing.record import RECORD, listed_files, read_record

    folder = download(repo_id, revision, [RECORD])
    record = read_record(folder, f"{_HUB}{repo_id}@{folder.name[:12]}")  # before gigabytes of something else
    return download(repo_id, folder.name, [RECORD, *listed_files(record)])
