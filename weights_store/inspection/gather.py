"""Gathers everything that is shown of a weight dataset into a `View`, see `WeightStore.view`."""

import html
from collections.abc import Iterator, Sequence

from weights_store.inspection.choice import Choice, choose
from weights_store.inspection.clamps import weight_settings
from weights_store.inspection.doctor import diagnose
from weights_store.inspection.pair_tables import PairTables
from weights_store.inspection.pairs import ShownPair
from weights_store.inspection.shown import load_pairs
from weights_store.inspection.survey import Survey, survey
from weights_store.inspection.view import View
from weights_store.location import Location
from weights_store.names import name_of
from weights_store.schemas import SIDES
from weights_store.tables.table_reader import TableVersion
from weights_store.views.lineage import lineage
from weights_store.views.summary import summary_lines
from weights_store.views.token_texts import Tokenizer, TokenTexts

_FRAME_HEIGHT_PX = 800


class NotebookView(View):
    """A view that a notebook shows as its page. Apart from `View`, which the page itself is made from."""

    def __repr__(self) -> str:
        """Return one line: all that it holds would fill a terminal with numbers."""
        return f"<{type(self).__name__} {self.title}: {self.selection}>"

    def _repr_html_(self) -> str:
        """Return the page in a frame for a notebook: its scripts cannot reach the notebook."""
        from weights_store.inspection.page import render

        document = html.escape(render(self), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{document}" title="{html.escape(self.title)}" width="100%" '
            f'height="{_FRAME_HEIGHT_PX}" style="border:0"></iframe>'
        )


def make_view(
    root: Location,
    weights: TableVersion,
    other: TableVersion | None,
    choice: Choice,
    tokenizer: Tokenizer | None,
) -> NotebookView:
    """Return what is shown of one dataset, or of two, see `WeightStore.view`."""
    here, there = PairTables(root, weights), None if other is None else PairTables(root, other)
    texts = None if tokenizer is None else TokenTexts(tokenizer)
    chosen = choose(here, there, choice, texts)
    pairs = load_pairs(here, there, chosen.pair_ids, texts)
    found, other_found = survey(root, weights), None if other is None else survey(root, other)
    return NotebookView(
        title=_name(weights),
        other=None if other is None else _name(other),
        pairs=pairs,
        num_pairs=chosen.num_pairs,
        selection=chosen.words,
        measures=here.measures,
        facts=list(_facts(here, weights)),
        survey=found,
        other_survey=other_found,
        token_texts={} if texts is None else _texts_of(texts, pairs, found),
        diagnoses=diagnose(found, here.metadata),
        lineage=lineage(root, weights).to_dicts(),
        recipe=here.metadata.get("recipe", {}),
        comparison=None if chosen.comparison is None else chosen.comparison.as_dict(),
    )


def _name(weights: TableVersion) -> str:
    return f"{name_of(weights.table)}@{weights.version}"


def _facts(tables: PairTables, weights: TableVersion) -> Iterator[tuple[str, str]]:
    """Yield what a person wants to know first: what `show` says of the version, the reference, and its fingerprint."""
    metadata = tables.metadata
    if statistics := metadata.get("statistics"):  # commits of other programs have none
        yield from summary_lines(statistics, weight_settings(metadata), metadata.get("parity"))
    if "model" in (reference := metadata.get("reference", {})):
        yield "reference model", f"{reference['model']}, {reference.get('dtype', 'unknown dtype')}"
    yield "fingerprint", weights.fingerprint[:12]


def _texts_of(texts: TokenTexts, pairs: Sequence[ShownPair], surveyed: Survey) -> dict[int, str]:
    """Return the texts of the ids that are shown."""
    ids = {token_id for pair in pairs for side in (pair.chosen, pair.rejected) for token_id in side.ids}
    ids |= {token_id for side in SIDES for rows in surveyed.extremes(side).values() for token_id in rows["token_id"]}
    return {token_id: texts.text(token_id) for token_id in sorted(ids)}
