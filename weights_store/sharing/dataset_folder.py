"""A weight dataset as the folder that people expect of a dataset repository: data, record, card, picture and Croissant."""

from pathlib import Path

from weights_store.catalog import open_table
from weights_store.errors import InputError, MissingExtraError
from weights_store.fingerprint import fingerprint_file
from weights_store.inspection.choice import Choice
from weights_store.inspection.gather import make_view
from weights_store.inspection.heat_map import draw_pair
from weights_store.inspection.view import View
from weights_store.location import Location
from weights_store.messages import logger
from weights_store.names import split_name
from weights_store.printing import count_text
from weights_store.sharing.card import CARD, PICTURE, dataset_card
from weights_store.sharing.croissant import CROISSANT, croissant
from weights_store.sharing.data_files import columns
from weights_store.sharing.record import RECORD, DatasetRecord, digest_files, read_record, write_record
from weights_store.tables.table_reader import TableVersion
from weights_store.views.export import write_parquet
from weights_store.views.token_texts import Tokenizer, TokenTexts

_log = logger(__name__)

_SEED = 0
"""Of the pair in the picture: always the same one."""


def write_dataset_folder(
    root: Location,
    weights: TableVersion,
    folder: Path,
    place: str,
    tokenizer: Tokenizer | None = None,
    licence: str | None = None,
) -> DatasetRecord:
    """Write one version of a weight dataset into an empty folder, and return its record.

    Args:
        root: The store.
        weights: The version.
        folder: An empty folder.
        place: Where people will find it, for the card: `owner/name` or a folder.
        tokenizer: See `WeightStore.scan_tokens`; without one there are no texts.
        licence: That of the source, as its author calls it; None: unknown.

    Raises:
        InputError: The version has no rows, or `licence` is no text.
        MismatchError: An id is not in the tokenizer.
        DamageError: A shard is not what was committed.
    """
    texts = None if tokenizer is None else TokenTexts(tokenizer)
    record, splits = write_parquet(open_table(root, weights.table), weights, folder, texts, licence)
    if not splits:
        raise InputError(f"{weights.table}@{weights.version} has no rows: there is nothing to push")
    view = make_view(root, weights, None, Choice(random=1, seed=_SEED), tokenizer)
    has_picture = _draw(view, folder)
    has_texts = texts is not None
    card = dataset_card(record, splits, view, place, has_texts=has_texts, has_picture=has_picture)
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / CROISSANT).write_bytes(croissant(record, splits, columns(has_texts)))
    record["files"] |= digest_files(folder, [CARD, CROISSANT, *([PICTURE] if has_picture else [])])
    write_record(folder, record)
    return record


def files_of(record: DatasetRecord, folder: Path) -> dict[str, Path]:
    """Return all files of such a folder by their path in it."""
    return {name: folder / name for name in (*record["files"], RECORD)}


def may_replace(folder: Path, name: str, *, replaces_card: bool) -> bool:
    """Return whether a folder holds a push of the dataset `name`; if so, check that nothing else is lost with it.

    Args:
        folder: A folder with files.
        name: The dataset, without its version.
        replaces_card: Whether a card may be lost that somebody changed.

    Raises:
        InputError: It holds another dataset, a file that no push wrote, or such a card; or its record is damaged.
    """
    if not (folder / RECORD).is_file():
        return False
    try:
        record = read_record(folder, str(folder))
    except InputError as error:
        raise InputError(
            f"{folder} is not empty, and its {RECORD} is not that of an earlier push; choose another folder"
        ) from error
    if (other := split_name(record["name"])[0]) != name:
        raise InputError(f"{folder} holds {other}, and {name} is to be pushed; choose another folder")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(there.difference(record["files"], [RECORD])):
        raise InputError(
            f"{folder} holds {count_text(len(others), 'file')} that `tokenweights push` did not write, for example "
            f"{others[0]}: a push replaces the whole folder; move them away, or choose another folder"
        )
    if not replaces_card and CARD in there and fingerprint_file(folder / CARD) != record["files"].get(CARD):
        raise InputError(
            f"{folder / CARD} was changed since it was pushed: keep your words somewhere else, and give --replace-card"
        )
    return True


def _draw(view: View, folder: Path) -> bool:
    """Draw one pair; without matplotlib say that there is no picture."""
    try:
        picture = draw_pair(view.pairs[0], "png")
    except MissingExtraError as error:
        _log.info(f"no picture in the card: {error}")
        return False
    (folder / PICTURE).write_bytes(picture)
    return True
