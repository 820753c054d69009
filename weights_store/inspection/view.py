"""What a page about a weight dataset says: pairs with their tokens, counts over all tokens, and where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.pairs import ShownPair
from weights_store.inspection.survey import Survey


@dataclass(frozen=True)
class View:
    """One version of a weight dataset, looked at; with `other`, compared with another one."""

    title: str
    """`name@version`."""
    other: str | None
    pairs: Sequence[ShownPair]
    num_pairs: int
    """Pairs of the dataset."""
    selection: str
    """Which pairs are shown, in words: "20 of 1,768 pairs, chosen at random"."""
    measures: Sequence[str]
    """Names of `MEASURES` that the pairs have."""
    facts: Sequence[tuple[str, str]]
    survey: Survey
    other_survey: Survey | None
    token_texts: Mapping[int, str]
    diagnoses: Sequence[Diagnosis]
    lineage: Sequence[Mapping[str, object]]
    recipe: Mapping[str, Mapping[str, object]]
    comparison: Mapping[str, object] | None
    plots: Sequence[tuple[str, str]] = ()
    """Title and SVG document of each."""
